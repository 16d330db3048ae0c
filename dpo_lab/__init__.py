"A notebook laboratory for Direct Preference Optimization: learn it, try it, do it."
import os

__version__ = "0.1.0"
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')      # large pages of memory, before the first tensor: chapter `logprobs`

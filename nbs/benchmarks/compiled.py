"""Does torch.compile pay? Norms and MLPs compiled, beside plain and hand-fused ones, on batches of different lengths.

    python nbs/benchmarks/compiled.py out=compiled.jsonl

Random weights in the shape of SmolLM2-135M. Whole layers do not compile: the attention asks for the pairs of its batch.
"""
import statistics
import tempfile

import chz
import torch
from scaling import SIZES, USUAL, random_model, random_pairs, seconds
from throughput import add_line
from torch._inductor.utils import fresh_inductor_cache

from dpo_lab.batches import collate
from dpo_lab.logprobs import use_exact_products


@chz.chz
class Compiled:
    "What is timed."
    size: str = chz.field(default='135M', doc="a size of scaling.py")
    repeats: int = chz.field(default=3, doc="steps of each way on each batch")
    lengths: str = chz.field(default='160,200,230,256', doc="tokens of a side, a batch each")
    out: str|None = chz.field(default=None, doc="JSON lines file that the result is added to")


def compile_layers(model):
    "Compile every norm and MLP, for any number of tokens."
    for module in model.modules():
        if type(module).__name__.endswith(('RMSNorm', 'MLP')): module.compile(dynamic=True)


def main(c):
    use_exact_products()
    point = USUAL | SIZES[c.size]
    models = {way: random_model(point['layers'], point['hidden'], point['vocabulary'])
              for way in ('packed', 'packed_fused', 'compiled')}
    compile_layers(models['compiled'])
    batches = [collate(random_pairs(point['pairs'], int(length), point['prompt_share'], point['vocabulary']))
               for length in c.lengths.split(',')]
    def step(way, batch): return seconds(models[way], batch, 'packed_fused' if way == 'packed_fused' else 'packed')
    with tempfile.TemporaryDirectory() as fresh, fresh_inductor_cache(dir=fresh):
        first = {way: sum(step(way, batch) for batch in batches) for way in models}
    found = {way: [] for way in models}
    for _ in range(c.repeats):
        for batch in batches:
            for way in models: found[way].append(step(way, batch) / point['pairs'])
    result = dict(size=c.size, threads=torch.get_num_threads(), torch=torch.__version__, first_round=first,
                  seconds={way: statistics.median(times) for way, times in found.items()})
    print(result)
    add_line(c.out, result)


if __name__ == '__main__' and '__file__' in globals(): main(chz.entrypoint(Compiled))

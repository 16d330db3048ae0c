"What several tests share: a cache of their own, toy rows of the tiny model, random models of many architectures."
import os
import random
import signal
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
os.environ['DPO_LAB_CACHE'] = tempfile.mkdtemp()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup

import pytest
import torch

from dpo_lab.batches import PairRow, encode_pairs
from dpo_lab.data import load_pairs
from dpo_lab.models import load_policy, tiny_model
from dpo_lab.reference import reference_logps, with_reference
from dpo_lab.renderers import get_renderer

VOCABULARY = 101
LONG = 'test_benchmarks', 'test_browser', 'test_lockstep', 'test_sweep', 'test_train', 'test_widgets'


def pytest_collection_modifyitems(items):
    "Files that take minutes go first, so that no worker is left alone with one at the end."
    items.sort(key=lambda item: item.path.stem not in LONG)


def random_rows(n=12, seed=0, empty_prompts=True):
    "Pairs of random tokens: uneven lengths, shared starts, one-token completions, empty prompts."
    rng = random.Random(seed)
    def draw(k): return [rng.randrange(VOCABULARY) for _ in range(k)]
    rows = [PairRow(draw(5), draw(1), draw(1), [True], [True], 0)]
    for i in range(1, n):
        chosen, rejected = draw(rng.randint(2, 25)), draw(rng.randint(2, 25))
        shared = rng.randint(0, min(len(chosen), len(rejected)) - 1)
        rejected[:shared] = chosen[:shared]
        scored = [rng.random() < .9 or j == len(chosen) - 1 for j in range(len(chosen))]
        prompt = draw(rng.randint(0 if empty_prompts else 1, 30))
        rows.append(PairRow(prompt, chosen, rejected, scored, [True]*len(rejected), i))
    return rows


def random_model(name, dtype=torch.float32):
    "A small model of an architecture, with random weights."
    import transformers as t
    ends = dict(bos_token_id=1, eos_token_id=2)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                 max_position_embeddings=128)
    gated = sizes | ends | dict(intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    wide, windowed = gated | dict(head_dim=8), dict(sliding_window=20)      # longer than what a probe looks at
    gpt2 = ends | dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128)
    mamba = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    def make():
        if name == 'llama': return t.LlamaForCausalLM(t.LlamaConfig(**wide))
        if name == 'qwen2': return t.Qwen2ForCausalLM(t.Qwen2Config(**gated))
        if name == 'qwen3': return t.Qwen3ForCausalLM(t.Qwen3Config(**wide))
        if name == 'mistral': return t.MistralForCausalLM(t.MistralConfig(**wide, sliding_window=8))
        if name == 'gemma2': return t.Gemma2ForCausalLM(t.Gemma2Config(**wide, sliding_window=8))
        if name == 'gemma3': return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**wide, sliding_window=8))
        if name == 'phi': return t.PhiForCausalLM(t.PhiConfig(**gated))
        if name == 'olmo2': return t.Olmo2ForCausalLM(t.Olmo2Config(**gated))
        if name == 'smollm3': return t.SmolLM3ForCausalLM(t.SmolLM3Config(**gated))
        if name == 'gpt_neox': return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**sizes, **ends, intermediate_size=48))
        if name == 'gpt2': return t.GPT2LMHeadModel(t.GPT2Config(**gpt2))
        if name == 'qwen2_moe': return t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(
            **gated, **windowed, use_sliding_window=True, max_window_layers=3, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16, shared_expert_intermediate_size=16))
        if name == 'phimoe': return t.PhimoeForCausalLM(t.PhimoeConfig(**gated, **windowed, num_local_experts=4))
        if name == 'mamba': return t.MambaForCausalLM(t.MambaConfig(**mamba))
        raise ValueError(name)
    torch.manual_seed(0)
    return make().to(dtype).eval()


class Far(torch.Tensor):
    "A tensor as on Apple's GPU: it has no float64, and whoever asks for its numbers is noted."
    where, reads = torch.device('mps'), []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__: return cls.where
        if func is torch.Tensor.double: raise TypeError('MPS has no float64')
        if func.__name__ in ('cpu', 'item', 'tolist', 'numpy', '__bool__', '__float__', '__int__'):
            cls.reads.append(func.__name__)
        if func is not torch.Tensor.cpu: return super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass(): return args[0].as_subclass(torch.Tensor)


@pytest.fixture(scope='session')
def tiny_rows():
    "Toy rows of the tiny model, joined with their reference: (train, test)."
    model, tokenizer = tiny_model()
    pairs, renderer = load_pairs('toy'), get_renderer('role_colon', tokenizer)
    def ready(part):
        rows = encode_pairs(part, renderer)
        return with_reference(rows, reference_logps(model, rows))
    return ready(pairs.train[:128]), ready(pairs.test[:64])


@pytest.fixture(scope='session')
def smollm2():
    "A real model and its tokenizer, for tests that leave it as it is."
    path = os.environ.get('DPO_LAB_SMOLLM2', '')
    if not Path(path).is_file(): pytest.skip('set DPO_LAB_SMOLLM2 to the path of SmolLM2-135M-Instruct.Q4_1.gguf')
    return load_policy(path, device='cpu')


class Tracked:
    "A run as a tracker knows it."
    def __init__(self, name): self.name, self.steps, self.open = name, [], True
    def log(self, metrics, step): assert self.open; self.steps.append(step)
    def finish(self): self.open = False


@pytest.fixture
def trackio(monkeypatch):
    "The runs of a tracker that, asked for another while one is open, gives that one."
    module, runs = ModuleType('trackio'), []
    def init(project, name, config):
        if not (runs and runs[-1].open): runs.append(Tracked(name))
        return runs[-1]
    module.init, module.__spec__ = init, ModuleSpec('trackio', None)
    monkeypatch.setitem(sys.modules, 'trackio', module)
    return runs


def shared(name):
    "Path of a file of real preference pairs."
    folder = Path(os.environ.get('DPO_LAB_SHARED', Path(__file__).parents[2]/'shared'))/'data'
    if not (folder/name).exists(): pytest.skip(f'needs {name} of the shared data: set DPO_LAB_SHARED to its folder')
    return folder/name

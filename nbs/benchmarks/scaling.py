"""What a step costs as pairs, vocabulary and model grow: packed and fused beside plain padded rows, in turn.

    python nbs/benchmarks/scaling.py out=scaling.jsonl

Random weights and random tokens: nothing here depends on what the tokens say.
"""
import statistics
import time

import chz
import torch
from throughput import add_line
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lab.batches import PairRow, collate
from dpo_lab.logprobs import pair_logps, use_exact_products
from dpo_lab.models import add_lora

USUAL = dict(prompt_share=.75, length=256, pairs=4, vocabulary=16384, layers=6, hidden=576)
AXES = {'prompt_share': [0., .25, .5, .75, .9], 'length': [64, 128, 256, 512, 1024], 'pairs': [1, 2, 4, 8, 16],
        'vocabulary': [1024, 4096, 16384, 49152, 131072]}
SIZES = {'135M': dict(layers=30, hidden=576, vocabulary=49152), '.5B': dict(layers=24, hidden=1216, vocabulary=32768),
         '1B': dict(layers=22, hidden=1792, vocabulary=32768), '3B': dict(layers=26, hidden=2944, vocabulary=32768)}


@chz.chz
class Scaling:
    "What is timed."
    repeats: int = chz.field(default=3, doc="steps of each way at each point")
    sizes: str = chz.field(default='135M,.5B,1B', doc="model sizes; 3B needs 16 GB")
    axes: str = chz.field(default=','.join(AXES), doc="what is varied apart from the size")
    out: str|None = chz.field(default=None, doc="JSON lines file that each point is added to")


def random_pairs(n, length, prompt_share, vocabulary):
    "Pairs whose sides have `length` tokens each, of which the prompt has this share."
    p = max(1, round(length * prompt_share))
    def draw(k): return torch.randint(vocabulary, (k,)).tolist()
    return [PairRow(draw(p), draw(length - p), draw(length - p), [True]*(length - p), [True]*(length - p), i)
            for i in range(n)]


def random_model(layers, hidden, vocabulary, dtype=torch.float32):
    "A Llama with random weights, as wide in its MLP and as grouped in its heads as SmolLM2."
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden*8//3,
                         num_hidden_layers=layers, num_attention_heads=hidden//64,
                         num_key_value_heads=hidden//64, tie_word_embeddings=True)
    torch.set_default_dtype(dtype)
    try: return LlamaForCausalLM(config).eval()
    finally: torch.set_default_dtype(torch.float32)


def seconds(model, batch, layout):
    "Forward and backward of one batch."
    model.zero_grad()
    start = time.perf_counter()
    pair_logps(model, batch, layout).sum().backward()
    return time.perf_counter() - start


def timed(model, point, repeats):
    "Median seconds a pair of both ways."
    batch = collate(random_pairs(point['pairs'], point['length'], point['prompt_share'], point['vocabulary']))
    ways = {'packed_fused': [], 'padded': []}
    for i in range(repeats + 1):
        for way, found in ways.items():
            found += [seconds(model, batch, way)] * (i > 0)         # the first warms up
    return {way: statistics.median(found) / point['pairs'] for way, found in ways.items()}


def main(c):
    use_exact_products()
    def note(axis, value, model, point, **more):
        found = dict(axis=axis, value=value, **timed(model, point, c.repeats), threads=torch.get_num_threads(), **more)
        print(found)
        add_line(c.out, found)
    for axis in filter(None, c.axes.split(',')):
        for value in AXES[axis]:
            point = USUAL | {axis: value}
            note(axis, value, random_model(point['layers'], point['hidden'], point['vocabulary']), point)
    for name in filter(None, c.sizes.split(',')):
        point = USUAL | SIZES[name]
        model = add_lora(random_model(point['layers'], point['hidden'], point['vocabulary'], torch.bfloat16), 16)
        note('size', name, model, point, weights=sum(p.numel() for p in model.parameters()))


if __name__ == '__main__' and '__file__' in globals(): main(chz.entrypoint(Scaling))

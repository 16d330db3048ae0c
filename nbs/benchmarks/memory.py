"""Memory against time: peak of a process of its own, and seconds a pair, for budgets of tokens, checkpointing and TRL.

    python nbs/benchmarks/memory.py model_name=path/to/model dataset=pairs.jsonl renderer_name=role_colon

Takes the words of throughput.py, `out=` among them; TRL runs with the first of `micro_batches` and of `attentions`.
The allocator settings of the environment hold for all.
"""
import json
import os
import statistics
import subprocess
import sys

import chz
from throughput import Bench, Ours, Peer, Place, step_seconds

from dpo_lab import batches
from dpo_lab.logprobs import use_exact_products
from dpo_lab.models import save_memory
from dpo_lab.training import trainable_weights


@chz.chz
class Memory(Bench):
    "What is measured."
    ways: str = chz.field(default='trl,1024,512,checkpointed', doc="TRL, token budgets, computing activations twice")
    steps: int = chz.field(default=2, doc="timed steps, after one to warm up")


def held(model):
    "GB that no step can do without: weights, gradients, and in float32 the moments and the masters of shorter weights."
    trained = [*trainable_weights(model).values()]
    weights = sum(p.nbytes for p in model.parameters())
    return (weights + sum(p.nbytes + p.numel()*(8 if p.itemsize == 4 else 12) for p in trained)) / 1e9


def measured(c):
    "Seconds a pair, and GB: the peak of this process, and what the model and its optimiser hold."
    use_exact_products()
    place = Place(c)
    model = place.model()
    found = {'held': held(model)}
    if c.ways == 'trl': one = Peer(place, model, int(c.micro_batches.split(',')[0]), c.attentions.split(',')[0])
    else: one = Ours(place, model)
    if c.ways == 'checkpointed':
        save_memory(model)
        model.train()           # which checkpointing asks for
    elif c.ways.isdigit(): batches.TOKEN_BUDGET = int(c.ways)
    rows = one.refer(place.rows)
    seconds = [step_seconds(one, [rows[(i + k) % len(rows)] for k in range(c.batch_size)])
               for i in range(0, (c.steps + 1)*c.batch_size, c.batch_size)]
    peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))
    return found | dict(seconds=statistics.median(seconds[1:]) / c.batch_size, gigabytes=int(peak) / 1e6)


def main(c):
    ways = c.ways.split(',')
    if len(ways) == 1: return print(json.dumps(measured(c)))
    allocator = {k: v for k, v in os.environ.items() if k.startswith('MALLOC_')}
    result = dict(lora_rank=c.lora_rank, dtype=c.dtype, allocator=allocator, ways={})
    for way in ways:
        words = [f'{k}={v}' for k, v in chz.asdict(c).items() if v is not None and k not in ('out', 'ways')]
        done = subprocess.run([sys.executable, __file__, *words, f'ways={way}'], capture_output=True, text=True)
        if done.returncode: raise SystemExit(done.stderr[-2000:])
        result['ways'][way] = json.loads(done.stdout.splitlines()[-1])
        print(way, result['ways'][way])
    if c.out:
        with open(c.out, 'a') as f: f.write(json.dumps(result) + '\n')


if __name__ == '__main__' and '__file__' in globals(): main(chz.entrypoint(Memory))

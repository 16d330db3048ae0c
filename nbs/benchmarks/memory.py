"""Memory against time: peak of a process of its own, and seconds a pair, for budgets of tokens, checkpointing and TRL.

    python nbs/benchmarks/memory.py model_name=path/to/model dataset=pairs.jsonl renderer_name=role_colon

Takes the words of throughput.py, `out=` among them; TRL runs with the first of `micro_batches` and of `attentions`.
The allocator settings of the environment hold for all; where it has none, dpo_lab keeps freed memory as its runs do.
"""
import json
import statistics

import chz
from throughput import Bench, Ours, Peer, Place, add_line, alone, machine, peak_gb, step_seconds

from dpo_lab import batches
from dpo_lab.logprobs import keep_freed_memory, use_exact_products
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
    kept = held(model)
    if c.ways == 'trl': one = Peer(place, model, int(c.micro_batches.split(',')[0]), c.attentions.split(',')[0])
    else:
        keep_freed_memory()
        one = Ours(place, model)
    if c.ways == 'checkpointed':
        save_memory(model)
        model.train()           # which checkpointing asks for
    elif c.ways.isdigit(): batches.TOKEN_BUDGET = int(c.ways)
    rows = one.refer(place.rows)
    seconds = [step_seconds(one, [rows[(i + k) % len(rows)] for k in range(c.batch_size)])
               for i in range(0, (c.steps + 1)*c.batch_size, c.batch_size)]
    return dict(held=kept, seconds=statistics.median(seconds[1:]) / c.batch_size, gigabytes=peak_gb())


def main(c):
    ways = c.ways.split(',')
    if len(ways) == 1: return print(json.dumps(measured(c)))
    result = dict(lora_rank=c.lora_rank, dtype=c.dtype, machine=machine(use_exact_products()), ways={})
    for way in ways:
        result['ways'][way] = alone(__file__, c, ways=way)
        print(way, result['ways'][way])
    add_line(c.out, result)


if __name__ == '__main__' and '__file__' in globals(): main(chz.entrypoint(Memory))

"""Where a step goes, for dpo_lab and for TRL at its best: seconds a pair by kind of operation, and the floor.

    python nbs/benchmarks/where_time_goes.py model_name=path/to/model dataset=pairs.jsonl renderer_name=role_colon

Takes the words of throughput.py, `out=` among them; TRL runs with the first of `micro_batches` and the first of
`attentions`. The floor is the time of the products that no exact step on these tokens can avoid, those of layers and
head and those of attention, at the speed of a large product.
"""
import gc
import json

import chz
from throughput import Bench, Ours, Peer, Place, add_line, machine, peak_gflops, step_seconds, work
from torch.profiler import ProfilerActivity, profile

from dpo_lab.attention import tree_mask
from dpo_lab.batches import collate
from dpo_lab.logprobs import use_exact_products

KINDS = {'attention': ('bmm', 'aten::_softmax', 'masked_fill', 'scaled_dot_product'),       # the first that fits
         'products of layers and head': ('mm', 'linear'),
         'casts, copies, gathers': ('copy', 'cat', 'index', 'clone', 'gather', 'scatter', 'fill', 'zero')}


def kind(name):
    "What an operation is counted as."
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), 'the rest')


def attention_work(model, rows):
    "GFLOP of attention: two products forward and four backward, for the tokens that are seen and no others."
    seen = sum(tree_mask(*part).sum().item() for part in collate(rows).parts)
    width = model.config.num_attention_heads * model.config.head_dim
    return 6 * 2 * width * model.config.num_hidden_layers * seen / 1e9


def seconds_by_kind(contestant, rows):
    "Seconds a pair of one step, by kind; they add up to the step."
    step_seconds(contestant, rows)
    step = min(step_seconds(contestant, rows) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU]) as found: step_seconds(contestant, rows)
    events, total = found.key_averages(), dict.fromkeys([*KINDS, 'the rest'], 0.)
    for event in events: total[kind(event.key)] += event.self_cpu_time_total
    return {what: time / sum(total.values()) * step / len(rows) for what, time in total.items()}


def main(c):
    products, place = use_exact_products(), Place(c)
    model, rows = place.model(), place.rows[:c.batch_size]
    speed = peak_gflops(next(model.parameters())) * len(rows)
    result = dict(lora_rank=c.lora_rank, dtype=c.dtype, machine=machine(products), seconds={},
                  floor=work(c, model, rows) / speed, attention_floor=attention_work(model, rows) / speed)
    micro, attention = int(c.micro_batches.split(',')[0]), c.attentions.split(',')[0]
    for name, make in {'dpo_lab': Ours, 'TRL, tuned': lambda c, model: Peer(c, model, micro, attention)}.items():
        contestant = make(place, place.model())
        result['seconds'][name] = seconds_by_kind(contestant, contestant.refer(rows))
        del contestant
        gc.collect()            # a trainer holds itself
    print(json.dumps(result, indent=1))
    add_line(c.out, result)


if __name__ == '__main__' and '__file__' in globals(): main(chz.entrypoint(Bench))

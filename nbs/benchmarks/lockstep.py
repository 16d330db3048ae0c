"""Adapters in lock-step: points apart, in turns over one base, and stacked; seconds a step of all, and peak memory.

    python nbs/benchmarks/lockstep.py model_name=path/to/model dataset=pairs.jsonl renderer_name=role_colon

Each way runs in a process of its own. Apart, one point is trained after another.
"""
import gc
import json
import statistics
import sys
import tempfile
import time

import chz
from throughput import add_line, alone, peak_gb

from dpo_lab import lockstep
from dpo_lab.sweep import open_run, shared_rows
from dpo_lab.train import Config, quiet_libraries

WAYS = {'apart': None, 'turns': 0, 'stacked': sys.maxsize}        # what counts as a small model


@chz.chz
class Lockstep:
    "What is timed."
    model_name: str = chz.field(default='tiny', doc="as in dpo_lab.train")
    dataset: str = chz.field(default='toy', doc="as in dpo_lab.train")
    renderer_name: str|None = chz.field(default=None, doc="as in dpo_lab.train")
    points: int = chz.field(default=3, doc="betas")
    lora_rank: int = chz.field(default=16, doc="of the adapters; 0 trains all weights")
    batch_size: int = chz.field(default=4, doc="pairs in a step")
    max_length: int = chz.field(default=256, doc="tokens of a side")
    steps: int = chz.field(default=4, doc="timed steps, after one to warm up")
    ways: str = chz.field(default='apart,turns,stacked', doc="which are timed")
    out: str|None = chz.field(default=None, doc="JSON lines file that the result is added to")


def lane(c):
    "Points that differ in beta."
    asked = {name: getattr(c, name) for name in ('model_name', 'dataset', 'renderer_name', 'lora_rank', 'batch_size',
                                                 'max_length')}
    folder = tempfile.mkdtemp()
    return {str(i): Config(log_path=f'{folder}/{i}', dpo_beta=.05*2**i, max_steps=c.steps + 1, eval_every=0,
                           save_every=0, **asked) for i in range(c.points)}


def step_seconds(steps, n):
    "The median of n steps after the first, which evaluates and warms up."
    ticks = []
    for _ in steps:
        ticks.append(time.perf_counter())
        if len(ticks) > n: break
    return statistics.median(b - a for a, b in zip(ticks, ticks[1:]))


def timed(c):
    "Seconds for a step of all points, and the process's peak memory in GB."
    load, seconds = shared_rows(), 0.
    def opened(config): return open_run(config, load)
    if c.ways == 'apart':
        for config in lane(c).values():
            run = opened(config)
            seconds += step_seconds(run, c.steps)
            run.let_go()
            del run
            gc.collect()
    else:
        lockstep.SMALL = WAYS[c.ways]
        seconds = step_seconds(lockstep.lane_steps(lane(c), opened, {}), c.steps)
    return dict(seconds=seconds, gigabytes=peak_gb())


def main(c):
    quiet_libraries()
    ways = c.ways.split(',')
    if len(ways) == 1: return print(json.dumps(timed(c)))
    result = {k: v for k, v in chz.asdict(c).items() if k in ('points', 'lora_rank', 'batch_size', 'max_length')}
    for way in ways:
        result[way] = alone(__file__, c, ways=way)
        print(way, result[way])
    add_line(c.out, result)


if __name__ == '__main__' and '__file__' in globals(): main(chz.entrypoint(Lockstep))

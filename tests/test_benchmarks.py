"The scripts behind the benchmark pages run, on the tiny model; their timings are not looked at."
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent/'nbs'/'benchmarks'


def run(script, out, *words):
    done = subprocess.run([sys.executable, BENCHMARKS/script, *words, f'out={out}'], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_comparison_with_trl(tmp_path):
    pytest.importorskip('trl', reason='TRL is not installed')
    found, = run('throughput.py', tmp_path/'found', 'pairs=16', 'micro_batches=4', 'attentions=sdpa', 'prompt_share=.4')
    assert found['differ']['nats'] < 1e-4 and found['differ']['gradient'] < 1e-4
    ways = {'trl_tuned', 'trl_stock', 'trl_documented'}
    assert set(found['ratios']) == ways and set(found['steps']) == ways | {'dpo_lab'}
    assert found['timed_pairs'] == 16 and found['tokens']['unique'] < found['tokens']['padded']
    assert abs(found['tokens']['prompt_share'] - .4) < .05


def test_where_time_goes(tmp_path):
    pytest.importorskip('trl', reason='TRL is not installed')
    found, = run('where_time_goes.py', tmp_path/'found', 'pairs=16', 'micro_batches=4', 'attentions=sdpa')
    for kinds in found['seconds'].values():
        assert 'the rest' in kinds and all(0 < seconds for seconds in kinds.values())


def test_what_an_operation_counts_as():
    sys.path.insert(0, str(BENCHMARKS))
    try: from where_time_goes import kind
    finally: sys.path.remove(str(BENCHMARKS))
    assert {kind(f'aten::{name}') for name in ('mm', 'addmm', 'addmm_', 'linear')} == {'products of layers and head'}
    assert {kind(f'aten::{name}') for name in ('bmm', 'baddbmm', '_softmax', 'masked_fill_')} == {'attention'}
    assert kind('aten::copy_') == 'casts, copies, gathers' and kind('aten::_log_softmax') == 'the rest'

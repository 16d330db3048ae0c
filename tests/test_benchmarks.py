"The scripts behind the benchmark pages run, on the tiny model; their timings are not looked at."
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_lab.batches import PairRow
from dpo_lab.models import load_policy
from dpo_lab.training import make_optimizer

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


def test_what_an_operation_counts_as(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from where_time_goes import kind
    assert {kind(f'aten::{name}') for name in ('mm', 'addmm', 'addmm_', 'linear')} == {'products of layers and head'}
    assert {kind(f'aten::{name}') for name in ('bmm', 'baddbmm', '_softmax', 'masked_fill_')} == {'attention'}
    assert kind('aten::copy_') == 'casts, copies, gathers' and kind('aten::_log_softmax') == 'the rest'


def test_attention_work_counts_the_tokens_that_are_seen(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from where_time_goes import attention_work
    model, _ = load_policy('tiny')
    rows = [PairRow([1, 1], [2], [3], [True], [True])]      # 1 + 2 of the prompt, 3 of each completion
    width = model.config.num_attention_heads * model.config.head_dim
    assert attention_work(model, rows) == 6 * 2*9*width * model.config.num_hidden_layers / 1e9


def test_a_grid_in_lockstep(tmp_path):
    found, = run('lockstep.py', tmp_path/'found', 'points=2', 'steps=2', 'lora_rank=4')
    assert all(found[way]['seconds'] > 0 and found[way]['gigabytes'] > 0 for way in ('apart', 'turns', 'stacked'))


def test_joined_products_are_the_products(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from joined import KINDS, Joined, ways
    for kind in KINDS:
        made = ways(kind, torch.float64, Joined(tokens=8, rank=2))
        for name in ('full', 'LoRA'):
            (outs, back, grads, *thin), (out, joined_back, joined_grads, *joined_thin) = (
                made[f'{name}, {how}']() for how in ('apart', 'joined'))
            out = torch.cat(out, 1) if isinstance(out, list) else out
            joined_grads = torch.cat(joined_grads) if isinstance(joined_grads, list) else joined_grads
            torch.testing.assert_close(torch.cat(outs, 1), out)
            torch.testing.assert_close(back, joined_back)
            torch.testing.assert_close(torch.cat(grads), joined_grads)
            torch.testing.assert_close(thin, joined_thin)
    assert len(run('joined.py', tmp_path/'found', 'tokens=8', 'repeats=1')) == 4


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_a_step_holds(dtype, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from memory import held
    model, _ = load_policy('tiny', dtype=dtype)
    optimizer, weights = make_optimizer(model), [*model.parameters()]
    for p in weights: p.grad = torch.ones_like(p)
    tensors = weights + [p.grad for p in weights]
    optimizer.step()
    tensors += [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    if dtype == 'bfloat16': tensors += optimizer.masters
    assert held(model) == sum(x.nbytes for x in tensors) / 1e9


def test_memory_against_time(tmp_path):
    pytest.importorskip('trl', reason='TRL is not installed')
    found, = run('memory.py', tmp_path/'found', 'pairs=16', 'steps=1', 'micro_batches=4', 'attentions=sdpa')
    assert set(found['ways']) == {'trl', '1024', '512', 'checkpointed'}
    for way in found['ways'].values(): assert way['gigabytes'] > way['held'] > 0 and way['seconds'] > 0

"Points that train together are the runs they would be alone."
from contextlib import nullcontext

import chz
import numpy as np
import pytest

from dpo_lab.lockstep import SMALL, lanes, share_frozen
from dpo_lab.models import add_lora, load_policy
from dpo_lab.runs import Run
from dpo_lab.sweep import begin_sweep, main, processes, sweep, train_together
from dpo_lab.train import Config

METRICS = ('dpo_loss', 'margin', 'grad_norm', 'test/margin', 'test/nll', 'test/accuracy')


@pytest.mark.parametrize('rank, alike, small', [(0, {}, SMALL), (4, {'loss': ['sigmoid', 'ipo']}, SMALL), (4, {}, 0)])
def test_each_point_has_the_numbers_of_its_single_run(tmp_path, monkeypatch, rank, alike, small):
    monkeypatch.setattr('dpo_lab.lockstep.SMALL', small)        # 0: the points take turns
    config = Config(log_path=str(tmp_path/'together'), max_steps=3, eval_every=0, lora_rank=rank)
    axes = dict(dpo_beta=[.1, .5], learning_rate=[1e-4, 1e-3]) | alike
    begun = begin_sweep(config, axes)
    steps = [dict(shown) for shown in train_together(begun)]
    alone = sweep(chz.replace(config, log_path=str(tmp_path/'alone')), **axes)
    assert len(steps) == 4 and all(len(shown) == len(begun.points) for shown in steps)
    assert begun.table.status.tolist() == ['finished']*len(begun.points)
    for name, run in begun.runs.items():
        for metric in METRICS:
            mine, theirs = (r.metrics[metric].dropna() for r in (run, alone.runs[name]))
            assert len(mine) == (2 if metric.startswith('test/') else 3), f'{metric} has gaps: {run.metrics[metric]}'
            np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4, equal_nan=False)


def test_adapters_keep_their_base_once():
    ours, base = (add_lora(load_policy('tiny')[0], rank=4) for _ in range(2))
    share_frozen(ours, base)
    for (name, mine), theirs in zip(ours.named_parameters(), base.parameters()):
        assert (mine.data_ptr() == theirs.data_ptr()) == ('lora_' not in name), name


def test_a_point_that_fails_leaves_the_others_alone(tmp_path):
    config = Config(log_path=str(tmp_path/'s'), max_steps=3, eval_every=0)
    begun = begin_sweep(config, dict(learning_rate=[1e30, 1e-4]))
    for _ in train_together(begun): pass
    assert begun.table.status.tolist() == ['failed', 'finished'] and 'FloatingPointError' in begun.table.error[0]


def test_seeds_walk_in_lanes_of_their_own(tmp_path):
    begun = begin_sweep(Config(log_path=str(tmp_path/'s')), dict(dpo_beta=[.1, .5], seed=[0, 1]))
    assert [len(lane) for lane in lanes(begun.configs)] == [2, 2]


@pytest.mark.parametrize('words', [dict(beta_end=.5), dict(reference_refresh_every=5)])
def test_what_it_cannot_do_is_refused(words):
    with pytest.raises(ValueError, match='train the points apart'): lanes({'a': Config(**words)})


def test_an_interrupt_leaves_all_points_at_the_same_step(tmp_path, monkeypatch):
    begun = begin_sweep(Config(log_path=str(tmp_path/'s'), max_steps=4, eval_every=0, save_every=0),
                        dict(dpo_beta=[.1, .5]))
    heard = [[], []]*2 + [[True], []]       # a Ctrl-C while the first point is at its third step
    monkeypatch.setattr('dpo_lab.train.interrupt_later', lambda say: nullcontext(heard.pop(0)))
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for shown in train_together(begun): seen.append(shown)
    monkeypatch.undo()
    assert len(seen) == 2 and [run.checkpoints[-1]['step'] for run in begun.runs.values()] == [2, 2]
    for _ in train_together(begun): pass
    assert begun.table.status.tolist() == ['finished']*2
    for run in begun.runs.values(): assert run.metrics.dpo_loss.dropna().index.tolist() == [0, 1, 2, 3]


def test_lanes_are_what_workers_are_given(tmp_path):
    config = Config(log_path=str(tmp_path/'s'), max_steps=2, eval_every=0)
    with processes(2) as pool: found = sweep(config, pool, together=2, dpo_beta=[.1, .5], seed=[0, 1])
    assert found.table.status.tolist() == ['finished']*4


def test_the_command_line_trains_together(tmp_path, capsys):
    words = [f'log_path={tmp_path/"s"}', 'max_steps=2', 'eval_every=0', 'dpo_beta=0.1,0.5', 'together=2']
    assert main([*words, 'dry_run=true']) == 0 and '1 lane of' in capsys.readouterr().out
    assert main(words) == 0
    assert len(Run(tmp_path/'s'/'dpo_beta=0.5').metrics.dpo_loss.dropna()) == 2
    words[0] = f'log_path={tmp_path/"t"}'
    assert main([*words, 'beta_end=0.3']) == 2 and 'train the points apart' in capsys.readouterr().err

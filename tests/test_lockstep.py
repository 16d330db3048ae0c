"Points that train together are the runs they would be alone."
import chz
import numpy as np
import pytest

from dpo_lab.lockstep import lanes, train_together
from dpo_lab.sweep import begin_sweep, sweep
from dpo_lab.train import Config

METRICS = ('dpo_loss', 'margin', 'grad_norm', 'test/margin', 'test/nll', 'test/accuracy')


@pytest.mark.parametrize('rank, alike', [(0, {}), (4, {'loss': ['sigmoid', 'ipo']})])
def test_each_point_has_the_numbers_of_its_single_run(tmp_path, rank, alike):
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


def test_a_point_that_fails_leaves_the_others_alone(tmp_path):
    config = Config(log_path=str(tmp_path/'s'), max_steps=3, eval_every=0)
    begun = begin_sweep(config, dict(learning_rate=[1e30, 1e-4]))
    for _ in train_together(begun): pass
    assert begun.table.status.tolist() == ['failed', 'finished'] and 'FloatingPointError' in begun.table.error[0]


def test_seeds_walk_in_lanes_of_their_own(tmp_path):
    begun = begin_sweep(Config(log_path=str(tmp_path/'s')), dict(dpo_beta=[.1, .5], seed=[0, 1]))
    assert [len(names) for names in lanes(begun.configs)] == [2, 2]


@pytest.mark.parametrize('words', [dict(beta_end=.5), dict(reference_refresh_every=5)])
def test_what_it_cannot_do_is_refused(words):
    with pytest.raises(ValueError, match='use `sweep`'): lanes({'a': Config(**words)})

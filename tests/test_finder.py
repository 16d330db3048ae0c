"The learning-rate ramp: what it reads off a curve, its mistakes, its command."
import numpy as np
import pandas as pd
import pytest

import dpo_lab.data
from dpo_lab.finder import find_learning_rate, for_good, main, ramp, suggest
from dpo_lab.train import Config


def made_up(begins, costs, n=50):
    "A ramp whose margin begins to grow at one rate and whose KL explodes at another."
    rate, noise = np.geomspace(1e-6, 1e-2, n), np.random.default_rng(0).normal(size=n)*1e-4
    return pd.DataFrame(dict(learning_rate=rate, margin=noise + np.maximum(0, rate - begins)*1e3,
                             kl=np.where(rate > costs, 9., .01)))


def test_it_reads_off_where_learning_begins_and_where_it_gets_expensive():
    found = suggest(made_up(1e-5, 2e-3))
    assert 1e-5 <= found.begins < 3e-5 and 1.5e-3 < found.costs < 4e-3
    assert found.rate == pytest.approx(found.costs/10, rel=.05) and 'KL passes 1 nats' in found.reason


def test_a_single_wild_step_changes_nothing():
    curve = made_up(1e-5, 2e-3)
    wild = curve.assign(kl=curve.kl.where(curve.index != 20, 1e6))
    assert suggest(wild).rate == suggest(curve).rate


def test_it_never_goes_below_where_learning_begins():
    found = suggest(made_up(1e-3, 2e-3))
    assert found.rate == pytest.approx(found.begins, rel=.05)


def test_a_fall_of_the_margin_is_an_end():
    curve = made_up(1e-5, 1.)
    fallen = curve.assign(margin=curve.margin.where(curve.learning_rate < 1e-3, 0.))
    assert 'falls back' in suggest(fallen).reason and suggest(fallen).costs < 2e-3


def test_a_ramp_that_never_gets_expensive_says_so():
    assert 'the ramp ends' in suggest(made_up(1e-5, 1.)).reason


def test_a_flat_ramp_is_an_error():
    with pytest.raises(ValueError, match='never left its noise.*set high='): suggest(made_up(1., 1.))


def test_a_ramp_that_begins_too_high_is_told_to_begin_lower():
    with pytest.raises(ValueError, match='ended after 2 steps.*set low='): suggest(made_up(1e-5, 2e-3)[:2])
    with pytest.raises(ValueError, match='ended after 0 steps'): suggest(pd.DataFrame([]))
    wild = made_up(1., 1e-6)
    with pytest.raises(ValueError, match='noise.*set low='): suggest(wild)


def test_for_good_means_until_the_end():
    assert for_good(pd.Series([True, False, True, True])) == 2
    assert for_good(pd.Series([True, False])) == 2 and for_good(pd.Series([True])) == 0


@pytest.mark.parametrize('asked, said', [(dict(low=1., high=.1), 'low < high'), (dict(steps=3), 'at least 8'),
                                         (dict(budget=0), 'above 0')])
def test_a_mistake_is_refused_before_any_work(asked, said):
    with pytest.raises(ValueError, match=said): find_learning_rate(Config(), **asked)


def test_a_second_ramp_reads_its_pairs_again(monkeypatch):
    read, load = [], dpo_lab.data.load_pairs
    monkeypatch.setattr(dpo_lab.data, 'load_pairs', lambda *args, **more: read.append(args) or load(*args, **more))
    for _ in range(2): next(ramp(Config()))
    assert len(read) == 2


def test_the_command_answers_a_mistake_in_a_sentence(capsys):
    assert main(['low=1', 'high=0.1']) == 2
    assert capsys.readouterr().err.startswith('error: low=1.0')


def test_a_rate_that_breaks_the_model_at_once_names_low(capsys):
    assert main(['low=1', 'high=10', 'steps=20']) == 2
    assert 'set low= to a smaller rate' in capsys.readouterr().err


def test_ctrl_c_is_a_sentence(monkeypatch, capsys):
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr('dpo_lab.finder.find_learning_rate', interrupted)
    assert main(['steps=20', 'seed=1']) == 130
    assert capsys.readouterr().out.endswith('python -m dpo_lab.finder steps=20 seed=1\n')


def test_the_command_suggests_a_rate(capsys):
    assert main(['steps=12', 'high=1e-2', 'max_steps=12']) == 0
    assert 'learning_rate=' in capsys.readouterr().out

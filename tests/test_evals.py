"Models on held-out pairs, two models on the same pairs, and win rates."
import math

import numpy as np
import pytest
import torch

from dpo_lab import evals
from dpo_lab.data import load_pairs
from dpo_lab.evals import (
    Subject,
    as_subject,
    compare,
    evaluate,
    grouped_interval,
    independent,
    length_controlled,
    paired,
    rows_of,
    sampled_kl,
    win_rate,
    wins,
)
from dpo_lab.logprobs import use_exact_products
from dpo_lab.models import tiny_model
from dpo_lab.onpolicy import Compares, find_judge
from dpo_lab.reference import reference_logps
from dpo_lab.renderers import get_renderer
from dpo_lab.toy import policy_kl, prompts, space_logps
from dpo_lab.train import Config, run_dpo
from dpo_lab.training import wilson

PAIRS = load_pairs('toy').test[:40]
ASKED = [[dict(role='user', content=text)] for text in prompts('test')]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    asked = Config(log_path=str(tmp_path_factory.mktemp('evals')/'run'), max_steps=20, eval_every=0, learning_rate=1e-3)
    run = run_dpo(asked, lambda line: None)
    *_, last = run
    return run, last


@pytest.fixture(scope='module')
def base(): return as_subject('tiny', device='cpu')


@pytest.fixture(scope='module')
def tuned(run): return as_subject(run[0].run, device='cpu')


def test_a_run_is_measured_as_it_measured_itself(run, base):
    found = evaluate(run[0].path, 'toy', base)
    for name in ('accuracy', 'margin', 'dpo_loss', 'chosen_nll', 'accuracy_low', 'accuracy_high'):
        assert found[name] == pytest.approx(run[1][f'test/{name}'], abs=1e-5), name


def test_without_a_reference_there_are_no_rewards(tuned, base):
    alone, beside = evaluate(tuned, PAIRS), evaluate(tuned, PAIRS, base)
    assert not {'accuracy', 'margin', 'dpo_loss'} & {*alone}
    for name in ('nll', 'chosen_nll', 'rejected_nll', 'nll_low'):
        assert alone[name] == pytest.approx(beside[name], abs=1e-6)
    assert len(alone.pairs) == 40 and 'loss' not in alone.pairs[0]


def test_the_renderer_is_that_of_the_run(run, tuned):
    assert tuned.renderer.name == run[0].run.config['renderer_name']
    assert as_subject(run[0].path/'final').renderer.name == tuned.renderer.name


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    unfinished = run_dpo(Config(log_path=str(tmp_path/'run'), eval_every=0), lambda line: None)
    next(unfinished)
    with pytest.raises(ValueError, match='not finished'): as_subject(tmp_path/'run')


def test_a_model_beside_itself_differs_by_nothing(base):
    table = compare(base, base, PAIRS)
    assert (table.difference == 0).all() and table.low.accuracy == -table.high.accuracy < 0
    measured = table.drop('accuracy')       # right or wrong is told from a few pairs: its interval has a width
    assert (measured.low == 0).all() and (measured.high == 0).all()
    assert table.base.accuracy == .5 and table.base.dpo_loss == pytest.approx(math.log(2))


def test_a_model_ties_with_its_kept_reference_however_the_process_multiplies():
    pairs, before = PAIRS[:31], torch.get_float32_matmul_precision()        # in no other column on disk
    try:
        subject = as_subject('tiny', device='cpu')
        use_exact_products()                # as a run does, which keeps the column
        reference_logps(subject.model, rows_of(subject, pairs))
        torch.set_float32_matmul_precision('highest')
        again = evaluate(fresh := as_subject('tiny', device='cpu'), pairs, fresh)
    finally: torch.set_float32_matmul_precision(before)
    assert again['ties'] == 31 and again['accuracy'] == .5


def test_the_paired_difference_is_that_of_the_means(base, tuned):
    table, one, other = compare(base, tuned, PAIRS), evaluate(base, PAIRS, base), evaluate(tuned, PAIRS, base)
    for name in ('accuracy', 'margin', 'dpo_loss'):
        assert table.difference[name] == pytest.approx(other[name] - one[name], abs=1e-5)
    assert table.low.margin < table.difference.margin < table.high.margin and table.n.margin == 40


def test_two_formats_are_not_compared(base):
    from dpo_lab.renderers import Format
    model, tokenizer = tiny_model()
    other = Subject('other', model, tokenizer, get_renderer(Format(
        'plain', user=('Q:', ' {c}\n\n'), past=('A:', ' {c}\n\n'), opening='A:', answer=' {c}', end='\n\n',
        borrowed='Q:', stop=('\n\nQ:',)), tokenizer))
    with pytest.raises(ValueError, match='speaks plain'): compare(base, other, PAIRS)


def test_models_that_agree_on_a_small_set_are_not_surely_alike():
    for scores in ([1.]*20, [0.]*20, [.5]*20, [1., 0.]*10):
        found = paired(scores, scores)
        assert found['difference'] == 0 and found['low'] == pytest.approx(-found['high']) and found['high'] > .05
    better = paired([0.]*20, [1.]*20)
    assert better['low'] < .9 and better['difference'] == better['high'] == 1       # inside [-1, 1]
    once = paired([0., 1.]*40, [1., 0.]*40, [i//8 for i in range(80)])
    assert once['high'] > paired([0., 1.]*40, [1., 0.]*40)['high']                  # ten prompts, not eighty


def test_a_paired_interval_covers_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        shared = rng.normal(0, 5, 50)
        found = paired(shared + rng.normal(0, 1, 50), shared + rng.normal(.3, 1, 50))
        hits += found['low'] < .3 < found['high']
        assert found['high'] - found['low'] < 1.2       # the shared part is gone
    assert .9 < hits/400 < .98
    with pytest.raises(ValueError, match='pair them'): paired([1., 2.], [1.])
    with pytest.raises(ValueError, match='nothing to compare'): paired([], [])


def test_a_judge_of_positions_decides_nothing():
    class First:
        name, workers = 'first', 1
        def __call__(self, prompt, answers): return [-float(i) for i in range(len(answers))]
        def report(self): return {}
    assert wins(First(), ASKED[:3], ['a', 'b', 'c'], ['x', 'y', 'z']) == [.5, .5, .5]
    assert wins(find_judge('longest'), ASKED[:3], ['aa', 'b', 'c'], ['x', 'yy', 'z']) == [1., 0., .5]


def test_a_judge_that_is_free_of_order_is_asked_once():
    class Counts:
        name, workers, asked = 'counts', 1, 0
        def __call__(self, prompt, answers): self.asked += 1; return [len(a) for a in answers]
        def report(self): return {}
    twice, once = Counts(), Counts()
    once.order_free = True
    for judge, n in ((twice, 6), (once, 3)):
        assert wins(judge, ASKED[:3], ['aa', 'b', 'c'], ['x', 'yy', 'z']) == [1., 0., .5] and judge.asked == n
    letters = Compares('letters', lambda asked: [.9]*len(asked))        # asks in both orders by itself
    assert wins(letters, ASKED[:3], ['a', 'b', 'c'], ['x', 'y', 'z']) == [.5]*3 and len(letters.seen) == 3


def test_an_interval_over_prompts_covers_the_truth_where_answers_share_them():
    rng, groups, hits = np.random.default_rng(0), np.repeat(range(25), 8).tolist(), np.zeros(3)
    for _ in range(300):
        skill = rng.beta(1.5, 1.5, 25)      # of each prompt
        won = (rng.random((25, 8)) < skill[:, None]).astype(float).ravel()
        gaps = rng.normal(0, 1, 200)
        mean, low, high = grouped_interval(won, groups)
        assert mean == pytest.approx(won.mean())
        lc, alone = length_controlled(won, gaps, groups), wilson(mean, 200)
        hits += [low < .5 < high, lc[1] < .5 < lc[2], alone[0] < .5 < alone[1]]
    assert .9 < hits[0]/300 < .98 and .9 < hits[1]/300 < .985 and hits[2]/300 < .85


def test_copies_of_an_answer_add_no_evidence(base, tuned, monkeypatch):
    once = win_rate(tuned, base, judge='toy', max_new_tokens=32)
    kl = sampled_kl(tuned, base, ASKED, max_new_tokens=32)
    draw, ids = evals.sample_answers, evals.generate_ids
    monkeypatch.setattr(evals, 'sample_answers', lambda m, t, r, asked, k, **more:
                        [several*k for several in draw(m, t, r, asked, 1, **more)])
    monkeypatch.setattr(evals, 'generate_ids', lambda m, t, r, heads, *more, **named:
                        [said for said in ids(m, t, r, heads[::6], *more, **named) for _ in range(6)])
    copied = win_rate(tuned, base, judge='toy', k=6, max_new_tokens=32)
    assert copied['num_answers'] == 6*once['num_answers']
    assert sampled_kl(tuned, base, ASKED, 6, max_new_tokens=32) == pytest.approx(kl, rel=1e-4)
    for end in ('', '_low', '_high'): assert copied[f'win_rate{end}'] == pytest.approx(once[f'win_rate{end}'])


@pytest.mark.parametrize('won, groups, n', [([1.]*8, [0, 1]*4, 2), ([1., 0.]*4, range(8), 8), ([.5], [0], 1),
                                            ([1., 0.]*4, [0]*8, 1)])
def test_samples_are_worth_at_least_their_groups(won, groups, n): assert independent(won, list(groups)) == n


def test_length_control_takes_away_what_length_won():
    rng = np.random.default_rng(1)
    gaps = rng.normal(40, 30, 4000)
    def won(skill): return rng.random(4000) < 1/(1 + np.exp(-skill - 2*np.tanh(gaps/gaps.std())))
    rate, low, high = length_controlled(won(0.), gaps)
    assert low < .5 < high and high - low < .1
    rate, low, high = length_controlled(won(1.), gaps)
    assert low < 1/(1 + math.exp(-1)) < high
    raw = won(0.).mean()
    assert raw > .7


@pytest.mark.parametrize('won, gaps', [([1.]*20, [5.]*20), ([0.]*20, list(range(20))), ([1.], [0.])])
def test_length_control_stays_finite(won, gaps):
    assert all(0 < x < 1 for x in length_controlled(won, gaps))


def test_no_difference_in_length_leaves_the_raw_rate():
    won = [1.]*60 + [0.]*40
    assert length_controlled(won, [0]*100)[0] == pytest.approx(.6, abs=.01)


def test_the_better_model_wins_by_the_true_reward(base, tuned):
    found = win_rate(tuned, base, judge='toy', k=8, max_new_tokens=32)
    assert found['win_rate_low'] > .5 and found['num_answers'] == 96 and len(found.pairs) == 96
    back = win_rate(base, tuned, judge='toy', k=8, max_new_tokens=32)
    assert back['win_rate'] == pytest.approx(1 - found['win_rate'])
    same = win_rate(base, base, k=2, max_new_tokens=32)
    assert same['win_rate'] == .5 and same['ties'] == 1. and same['lc_win_rate'] == pytest.approx(.5)


def test_the_sampled_kl_is_near_the_exact_one(base, tuned):
    def logps(s, p): return space_logps(s.model, s.tokenizer, p)
    exact = np.mean([policy_kl(logps(tuned, p), logps(base, p)) for p in prompts('test')[:4]])
    found = sampled_kl(tuned, base, ASKED[:4], k=60, max_new_tokens=32)
    assert abs(found['kl'] - exact) < max(.15*exact, found['kl_high'] - found['kl_low'])
    assert sampled_kl(base, base, ASKED[:4], max_new_tokens=32)['kl'] == pytest.approx(0, abs=1e-4)
    assert torch.is_grad_enabled()

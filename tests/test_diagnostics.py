"Read-outs of pairs and tokens: identities with the losses, the records, and the models."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_lab.batches import pack
from dpo_lab.diagnostics import (as_logps, counterfactual, credit_map, pair_frame, pair_table, pair_weights, quadrants,
                                 saturation, spread, suspects)
from dpo_lab.logprobs import pair_logps
from dpo_lab.losses import LOSSES, PairLogps, get_loss
from dpo_lab.models import tiny_model
from dpo_lab.training import evaluate_pairs, train_dpo


def random_logps(n=40, seed=0):
    draw = torch.Generator().manual_seed(seed)
    policy, reference = (-30 + 5*torch.randn(2, n, generator=draw, dtype=torch.float64) for _ in range(2))
    return PairLogps(policy, reference, torch.randint(5, 40, (2, n), generator=draw))


def records(step, deltas, split='train', beta=.1):
    "Pair records whose chosen side carries the delta."
    sides = dict(chosen_length=8, rejected_length=5, chosen_kl=.2, rejected_kl=.4, rejected_logratio=0.)
    return [dict(pair=i, step=step, split=split, beta=beta, loss=1., chosen_logratio=d, chosen_logps=-9. + d,
                 rejected_logps=-9.5, **sides) for i, d in enumerate(deltas)]


@pytest.fixture(scope='module')
def steps(tiny_rows):
    return list(train_dpo(tiny_model()[0], tiny_rows[0], learning_rate=2e-4, max_steps=4))


@pytest.mark.parametrize('beta', [.01, .3, 5.])
def test_the_weight_of_the_dpo_loss_is_a_sigmoid(beta):
    logps = random_logps()
    assert torch.allclose(pair_weights(logps, beta), torch.sigmoid(-beta*logps.delta))


def test_the_weight_of_any_loss_is_its_slope():
    logps, h = random_logps(), 1e-6
    for name in ('ipo_sum', 'simpo', 'hinge', 'robust'):
        up = PairLogps(logps.policy + torch.tensor([[h], [0]]), logps.reference, logps.lengths)
        slope = (LOSSES[name](up, .2) - LOSSES[name](logps, .2))/h
        assert torch.allclose(pair_weights(logps, .2, name), slope.abs()/.2, atol=1e-4), name


def test_the_counterfactual_of_the_beta_that_was_used_is_what_was_measured(steps):
    frame, last = pair_frame(steps, step=3), steps[3]
    read = counterfactual(frame, .1)
    for name, metric in dict(loss='dpo_loss', margin='margin', chosen_reward='chosen_reward').items():
        assert read[name] == pytest.approx(last[metric], abs=1e-5)


def test_a_counterfactual_beta_is_the_loss_at_that_beta(steps):
    frame = pair_frame(steps, step=2)
    for loss in ('sigmoid', 'ipo', 'simpo'):
        want = get_loss(loss)(as_logps(frame), .7).mean().item()
        assert counterfactual(frame, .7, loss)['loss'] == pytest.approx(want)
    with pytest.raises(ValueError, match='above 0'): counterfactual(frame, -1)


@pytest.mark.parametrize('loss, columns', [('sigmoid', ('soft_label',)), ('ipo', ('weight', 'soft_label')),
                                           ('odpo', ('weight', 'offset')), ('sigmoid + 0.2*sft', ('offset',))])
def test_the_columns_of_the_pairs_count_when_they_are_read_again(tiny_rows, loss, columns):
    values = dict(weight=lambda i: 1. + i % 3, soft_label=lambda i: .5 + i % 10/20, offset=lambda i: .5 + i % 4/2)
    rows = [replace(row, **{c: values[c](i) for c in columns}) for i, row in enumerate(tiny_rows[0])]
    steps = list(train_dpo(tiny_model()[0], rows, beta=.3, loss=loss, learning_rate=2e-4, max_steps=3))
    frame = pair_frame(steps, step=2)
    assert counterfactual(frame, .3, loss)['loss'] == pytest.approx(steps[2]['dpo_loss'], abs=1e-5)
    held = evaluate_pairs(tiny_model()[0], rows, beta=.3, loss=loss)
    assert counterfactual(pair_frame([held]), .3, loss)['loss'] == pytest.approx(held['dpo_loss'], abs=1e-5)
    with pytest.raises(ValueError, match=f'no room for the column {columns[0]!r}'): counterfactual(frame, .3, 'aot')


def test_what_the_records_do_not_hold_is_not_made_up(steps):
    frame = pair_frame(steps, step=2)
    for loss in ('bco_pair', 'sigmoid + 0.1*beta_dpo'):
        with pytest.raises(ValueError, match='of earlier steps, and pair records do not keep that'):
            counterfactual(frame, .1, loss)
    assert math.isfinite(counterfactual(frame, .1, 'bco_pair(delta=0)')['loss'])
    for loss, field in dict(tdpo1='token_kl', soft_label='soft_label').items():
        with pytest.raises(ValueError, match=f'needs {field!r}'): counterfactual(frame, .1, loss)


def test_effective_pairs_count_equal_weights():
    assert saturation(torch.tensor([2., 2, 0, 0])) == dict(saturated=.5, effective_pairs=2., effective_share=.5)
    assert saturation(torch.zeros(3))['effective_pairs'] == 0


def test_every_pair_stands_in_one_quadrant():
    frame = pair_frame(records(0, [1., 2, -1, 0]))
    table = quadrants(frame.assign(rejected_logratio=[-1., 1, -1, 1]))
    assert table.pairs.tolist() == [1, 1, 1, 1] and math.isclose(table.share.sum(), 1)


def test_a_flip_is_a_change_of_rank_since_the_reference():
    table = pair_table(records(0, [0., 0, 0]) + records(1, [2., -3, .1]))
    assert table.flip.tolist() == ['', 'lost', ''] and table.visits.tolist() == [2, 2, 2]


def test_a_suspect_moved_the_wrong_way_far_from_the_others():
    deltas = np.r_[np.linspace(.5, 1.5, 50), -4., -.2]
    assert np.flatnonzero(suspects(deltas)).tolist() == [50, 51]
    assert not suspects(np.linspace(.5, 1.5, 50)).any()


def test_spread_is_in_order_and_holds_the_median(steps):
    for name, quantiles in spread(steps[2].pairs).items():
        assert quantiles == sorted(quantiles)
        if name == 'margin': assert quantiles[2] == pytest.approx(pair_frame([steps[2]]).margin.median(), abs=1e-6)


def test_credits_of_tokens_add_up_to_the_logratios_of_the_completions(tiny_rows):
    model, tokenizer = tiny_model()
    rows = tiny_rows[0][:32]
    for _ in train_dpo(model, rows, learning_rate=1e-3, max_steps=2): pass
    credits = credit_map(model, tokenizer, rows)
    got = torch.tensor([[sum(nats for _, nats in pair[side] if nats is not None) for pair in credits]
                        for side in ('chosen', 'rejected')])
    reference = torch.tensor([[part.sum() for part in row.reference.split(row.num_scored)] for row in rows]).T
    with torch.no_grad(): want = pair_logps(model, pack(rows, 10**6)[0]) - reference
    assert got.abs().max() > .1 and torch.allclose(got, want, atol=5e-3)


def test_rows_without_a_reference_have_no_credit(tiny_rows):
    model, tokenizer = tiny_model()
    with pytest.raises(ValueError, match='with_reference'):
        credit_map(model, tokenizer, [replace(tiny_rows[0][0], reference=None)])

"Rows, truncation and packing."
import pytest
import torch
from conftest import random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lab.batches import TRUNCATIONS, PairBatch, PairRow, collate, pack, rows_of_step, scored_lengths, truncate


def row(p, c, r, **columns):
    prompt, chosen, rejected = list(range(p)), list(range(100, 100+c)), list(range(200, 200+r))
    return PairRow(prompt, chosen, rejected, [True]*c, [True]*r, **columns)


@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 20), st.integers(2, 45), st.sampled_from(TRUNCATIONS))
@settings(deadline=None, max_examples=300)
def test_truncation_fits_both_sides_or_says_why_not(p, c, r, max_length, how):
    fitted, events = truncate(row(p, c, r), max_length, how)
    if fitted is None: assert any(e.startswith('dropped') for e in events); return
    assert len(fitted.prompt) + max(len(fitted.chosen), len(fitted.rejected)) <= max_length
    assert any(fitted.chosen_scored) and any(fitted.rejected_scored)
    assert fitted.truncated == bool(events) == (p + max(c, r) > max_length)
    # a stop token never goes without a count, and never on one side for the sake of the other
    for side, n in (('chosen', c), ('rejected', r)):
        assert (len(getattr(fitted, side)) < n) == (f'{side} cut before its stop token' in events)


def test_keep_end_keeps_the_completions_and_the_begin_token():
    fitted, _ = truncate(row(10, 4, 5), 9, 'keep_end', bos=0)
    assert fitted.prompt == [0, 7, 8, 9] and len(fitted.chosen) == 4 and len(fitted.rejected) == 5


def test_packing_keeps_order_and_loses_nothing():
    rows = random_rows(40)
    batches = pack(rows, token_budget=90)
    assert torch.cat([b.index for b in batches]).tolist() == [r.index for r in rows]
    assert all(len(b.input_ids) <= 90 or len(b) == 1 for b in batches)


def test_a_pair_over_the_budget_gets_a_batch_of_its_own():
    assert [len(b) for b in pack([row(3, 2, 2), row(50, 9, 9), row(3, 2, 2)], token_budget=20)] == [1, 1, 1]


def test_an_empty_prompt_leaves_its_first_tokens_unscored():
    assert scored_lengths(collate([row(0, 3, 2)])).flatten().tolist() == [2, 1]


def test_every_epoch_sees_every_pair_once_in_another_order():
    rows = random_rows(37)
    epochs = [[r.index for s in range(e*4, e*4+4) for r in rows_of_step(rows, s, 10, seed=3)] for e in range(2)]
    assert [sorted(e) for e in epochs] == [list(range(37))]*2 and epochs[0] != epochs[1]


def test_every_pair_is_as_likely_at_every_step_and_beside_every_other():
    rows, seeds = random_rows(8), 4000
    place, beside = torch.zeros(8, 4), torch.zeros(8, 8)
    for seed in range(seeds):
        for step in range(4):
            a, b = (r.index for r in rows_of_step(rows, step, 2, seed))
            place[[a, b], step] += 1
            beside[a, b] += 1
            beside[b, a] += 1
    for counts, chance, cells in ((place, 1/4, 32), (beside[~torch.eye(8, dtype=bool)], 1/7, 56)):
        expected = seeds*chance
        spread = ((counts - expected)**2/(expected*(1 - chance))).sum().item()     # about chi-square
        assert spread < cells + 4*(2*cells)**.5, 'an order that depends on the pair'


def test_pair_columns_reach_the_batch():
    batch = collate([row(2, 1, 1, weight=2., soft_label=.7, offset=1.),
                     row(2, 1, 1, weight=1., soft_label=1., offset=0.)])
    assert batch.weight.tolist() == [2., 1.] and batch.offset.tolist() == [1., 0.]
    assert batch.soft_label.tolist() == pytest.approx([.7, 1.])


def test_a_batch_of_the_wrong_shape_is_refused():
    b = collate([row(2, 1, 1)])
    with pytest.raises(ValueError, match='parts add up to 4 tokens'):
        PairBatch(b.input_ids[1:], b.position_ids, b.parts, b.predictors, b.targets, b.sides, b.pairs, b.index)

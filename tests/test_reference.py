"The reference column: cached equals live, and no run can take another's."
import multiprocessing

import pytest
import torch
from conftest import random_model, random_rows

from dpo_lab.batches import TOKEN_BUDGET, pack
from dpo_lab.logprobs import token_logps
from dpo_lab.reference import SAVE_SECONDS, compute_reference, reference_fingerprint, reference_logps, with_reference


def counted(calls):
    def progress(batches): calls.append(len(batches)); return batches
    return progress


def test_cached_equals_live_and_the_second_call_runs_no_model(tmp_path):
    model, rows, calls = random_model('llama'), random_rows(20), []
    first, second = (reference_logps(model, rows, cache=tmp_path, progress=counted(calls)) for _ in range(2))
    with torch.no_grad(): live = torch.cat([token_logps(model, b) for b in pack(rows, 100)])
    assert calls == [1] and torch.equal(first.values, second.values) and torch.allclose(first.values, live, atol=1e-4)


def test_the_fingerprint_knows_weights_tokens_and_dtype_and_nothing_else():
    model, rows = random_model('llama'), random_rows(5)
    base = reference_fingerprint(model, rows)
    assert reference_fingerprint(random_model('llama'), random_rows(5), token_budget=50) == base
    assert reference_fingerprint(model, rows[1:]) != base
    assert reference_fingerprint(random_model('llama', torch.float64), rows) != base
    with torch.no_grad(): model.model.norm.weight[0] += 1e-3
    assert reference_fingerprint(model, rows) != base


def test_in_low_precision_the_fingerprint_knows_the_budget_in_use_and_the_device(monkeypatch):
    model, rows = random_model('llama', torch.bfloat16), random_rows(5)
    base = reference_fingerprint(model, rows)
    assert base == reference_fingerprint(model, rows, TOKEN_BUDGET) != reference_fingerprint(model, rows, 50)
    monkeypatch.setattr('dpo_lab.reference.TOKEN_BUDGET', 50)           # as where there is another default
    assert reference_fingerprint(model, rows) == reference_fingerprint(model, rows, 50)
    assert base.split('-')[2:] == ['bfloat16', 'packed_fused', str(TOKEN_BUDGET), 'cpu']
    assert reference_fingerprint(random_model('llama'), rows).split('-')[2:] == ['float32', 'packed_fused']


def test_an_interrupted_pass_continues_where_it_was(tmp_path, monkeypatch):
    import dpo_lab.reference as R
    monkeypatch.setattr(R, 'SAVE_SECONDS', -1.)
    model, rows = random_model('llama'), random_rows(30)
    whole, asked = compute_reference(model, rows, 80), []
    def break_after_three(batches):
        for i, batch in enumerate(batches):
            if i == 3: raise KeyboardInterrupt
            yield batch
    with pytest.raises(KeyboardInterrupt): reference_logps(model, rows, 80, tmp_path, break_after_three)
    monkeypatch.setattr(R, 'token_logps', lambda m, b: asked.append(1) or token_logps(m, b))
    assert torch.allclose(reference_logps(model, rows, 80, tmp_path).values, whole, atol=1e-5)
    assert len(asked) == len(pack(rows, 80)) - 3
    assert SAVE_SECONDS > 1


def _reference(folder, out):
    torch.set_num_threads(1)
    model, calls = random_model('llama'), []
    column = reference_logps(model, random_rows(40), cache=folder, progress=counted(calls))
    out.put((len(calls), column.values.sum().item()))


def test_two_runs_at_once_compute_it_once(tmp_path):
    context = multiprocessing.get_context('spawn')
    out = context.Queue()
    workers = [context.Process(target=_reference, args=(tmp_path, out)) for _ in range(2)]
    for w in workers: w.start()
    (a, x), (b, y) = (out.get(timeout=120) for _ in workers)
    for w in workers: w.join()
    assert a + b == 1 and x == y


def test_a_column_of_other_rows_is_refused(tmp_path):
    model, rows = random_model('llama'), random_rows(6)
    column = reference_logps(model, rows, cache=tmp_path)
    with pytest.raises(ValueError, match='has 6 rows, the data 5'): with_reference(rows[:5], column)

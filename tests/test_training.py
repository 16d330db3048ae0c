"The loop: accumulation, step 0, resuming, objectives, low precision."
import math

import pytest
import torch
from conftest import Far, random_model, random_rows
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_lab.batches import collate, pack, rows_of_step
from dpo_lab.logprobs import token_entropy, token_logps
from dpo_lab.losses import PairLogps
from dpo_lab.models import tiny_model
from dpo_lab.reference import compute_reference, reference_logps, with_reference
from dpo_lab.training import (DPOObjective, MasterAdamW, check_reference, evaluate_pairs, learning_rate_at,
                              load_training_state, make_optimizer, moved_reference, on_cpu, save_training_state,
                              train, train_dpo, wilson)

LOSSES = ['sigmoid', 'ipo', 'aot', 'bco_pair', 'beta_dpo', 'kto_pair', 'simpo', 'sigmoid(ld_alpha=0.3)',
          'sigmoid(wpo=true)', 'sigmoid + 0.2*sft']


def ready(model, rows, tmp_path): return with_reference(rows, reference_logps(model, rows, cache=tmp_path))


@pytest.mark.parametrize('loss', LOSSES)
def test_micro_batches_equal_one_batch(loss, tmp_path):
    rows = ready(random_model('llama', torch.float64), random_rows(16, empty_prompts=False), tmp_path)
    def step(budget):
        model = random_model('llama', torch.float64)
        with torch.no_grad(): model.model.norm.weight.mul_(1.1)     # away from the reference, so that no term vanishes
        report, _ = DPOObjective(loss)(model, pack(rows, budget), 0)
        return report['dpo_loss'], torch.cat([p.grad.flatten() for p in model.parameters()])
    (one, g1), (many, gk) = step(10**6), step(100)
    assert many == pytest.approx(one, rel=1e-6) and (gk - g1).norm() / g1.norm() < 1e-6


def test_micro_batches_in_bfloat16_round_little_more_than_one_batch(tmp_path):
    rows = ready(random_model('llama'), random_rows(64, empty_prompts=False), tmp_path)
    def gradient(dtype, budget):
        model = random_model('llama', dtype)
        DPOObjective()(model, pack(rows, budget), 0)
        return torch.cat([p.grad.float().flatten() for p in model.parameters()])
    exact = gradient(torch.float32, 10**6)
    one, sixteen = ((gradient(torch.bfloat16, budget) - exact).norm() for budget in (10**6, 200))
    assert len(pack(rows, 200)) == 16 and sixteen < 1.3*one < .02*exact.norm()


def test_step_zero_is_ln_2_with_no_reward(tiny_rows):
    model, _ = tiny_model()
    metrics = next(train_dpo(model, tiny_rows[0]))
    assert metrics.step == 0 and metrics['dpo_loss'] == pytest.approx(math.log(2), abs=1e-5)
    assert all(abs(metrics[k]) < 1e-5 for k in ('margin', 'chosen_reward', 'rejected_reward', 'kl'))
    assert metrics['beta'] == .1


def test_training_helps_on_held_out_pairs_and_break_is_enough_to_stop(tiny_rows):
    model, _ = tiny_model()
    before = evaluate_pairs(model, tiny_rows[1])
    for metrics in train_dpo(model, tiny_rows[0], learning_rate=2e-4, num_epochs=4):
        if metrics.step == 20: break
    after = evaluate_pairs(model, tiny_rows[1])
    assert after['dpo_loss'] < before['dpo_loss'] and after['accuracy'] > .55
    assert after['accuracy_low'] < after['accuracy'] < after['accuracy_high']


def test_metrics_come_from_the_pairs_of_the_whole_step(tiny_rows):
    model, _ = tiny_model()
    *_, metrics = train_dpo(model, tiny_rows[0], learning_rate=1e-3, batch_size=24, token_budget=100, max_steps=3)
    assert len(metrics.pairs) == 24 == metrics['num_pairs']
    margins = [.1*(r['chosen_logratio'] - r['rejected_logratio']) for r in metrics.pairs]
    assert metrics['margin'] == pytest.approx(sum(margins)/24, abs=1e-5)
    assert metrics['accuracy'] == pytest.approx(sum(m > 0 for m in margins)/24)
    assert metrics['margin'] == pytest.approx(metrics['chosen_reward'] - metrics['rejected_reward'], abs=1e-6)


def test_beta_can_be_read_again_from_the_records(tiny_rows):
    model, _ = tiny_model()
    for _ in train_dpo(model, tiny_rows[0], learning_rate=2e-4, max_steps=5): pass
    records, other = evaluate_pairs(model, tiny_rows[1], beta=.1).pairs, evaluate_pairs(model, tiny_rows[1], beta=.5)
    again = [-math.log(1/(1 + math.exp(-.5*(r['chosen_logratio'] - r['rejected_logratio'])))) for r in records]
    assert sum(again)/len(again) == pytest.approx(other['dpo_loss'], abs=1e-5)


@pytest.mark.parametrize('loss', ['sigmoid', 'bco_pair', 'beta_dpo'])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(loss, tiny_rows, tmp_path):
    def run(stop=None, folder=None):
        model, _ = tiny_model()
        optimizer, objective, start = make_optimizer(model, 1e-4), DPOObjective(loss), 0
        if folder:
            state = load_training_state(folder, model, optimizer)
            objective.state, start = state['objective'], state['step']
        def batches_of(step): return pack(rows_of_step(tiny_rows[0], step, 32))
        for m in train(model, batches_of, objective, optimizer, 6, lambda step: 1e-4*(1 - step/6), start=start):
            if m.step == stop:
                save_training_state(tmp_path, model, optimizer, stop, objective=objective.found)
                break
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    whole = run()
    run(stop=4)
    assert torch.equal(run(folder=tmp_path), whole)


def test_the_first_gradient_has_one_direction_for_every_beta(tiny_rows):
    def gradient(beta):
        model, _ = tiny_model()
        DPOObjective(beta=beta)(model, pack(tiny_rows[0][:32]), 0)
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    weak, strong = gradient(.1), gradient(.5)
    assert torch.nn.functional.cosine_similarity(weak, strong, dim=0) > 1 - 1e-6
    assert (strong.norm()/weak.norm()).item() == pytest.approx(5, rel=1e-4)


def test_low_precision_weights_get_float32_masters(tmp_path):
    model = random_model('llama', torch.bfloat16)
    rows = ready(model, random_rows(8, empty_prompts=False), tmp_path)
    optimizer = make_optimizer(model, 1e-4)
    assert isinstance(optimizer, MasterAdamW)
    for _ in train(model, lambda s: pack(rows), DPOObjective(), optimizer, 3, lambda s: 1e-4): pass
    moved = max((m - p.float()).abs().max().item() for m, p in zip(optimizer.masters, optimizer.live))
    assert 0 < moved < 2e-2                                  # masters hold what bfloat16 cannot
    save_training_state(tmp_path, model, optimizer, 3)
    fresh = random_model('llama', torch.bfloat16)
    again = make_optimizer(fresh, 1e-4)
    load_training_state(tmp_path, fresh, again)
    assert all(torch.equal(a, b) for a, b in zip(again.masters, optimizer.masters))


def test_a_loss_that_is_not_a_number_names_the_step_and_the_pairs(tiny_rows):
    model, _ = tiny_model()
    with torch.no_grad(): model.model.norm.weight.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match=r'step 0: dpo_loss and grad_norm not finite on pairs \['):
        next(train_dpo(model, tiny_rows[0]))


def test_another_reference_is_caught_before_the_first_step(tmp_path):
    rows = ready(random_model('llama'), random_rows(8), tmp_path)
    assert check_reference(random_model('llama'), rows) < 1e-3
    with pytest.raises(ValueError, match='policy and reference differ by'):
        check_reference(random_model('qwen2'), rows)


def test_a_moved_reference_is_the_mixture_of_weights(tmp_path):
    model, rows = random_model('llama'), random_rows(8)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad(): model.model.norm.weight.add_(1.)
    moved = moved_reference(model, anchor, .25, rows)
    assert torch.allclose(anchor['model.norm.weight'], torch.full((32,), 1.25))
    assert torch.allclose(model.model.norm.weight, torch.full((32,), 2.))
    expected = random_model('llama')
    with torch.no_grad(): expected.model.norm.weight.fill_(1.25)
    assert torch.allclose(torch.cat([r.reference for r in moved]), compute_reference(expected, rows), atol=1e-5)


def test_schedules_warm_up_and_end_at_zero():
    for schedule in ('linear', 'cosine'):
        rates = [learning_rate_at(s, 100, 1., schedule, .1) for s in range(100)]
        assert rates[0] < rates[5] < rates[10] == 1. and rates[-1] < .02
        assert sorted(rates[10:], reverse=True) == rates[10:]
    assert {learning_rate_at(s, 10, 1., 'constant') for s in range(10)} == {1.}


def test_fewer_pairs_than_a_batch_is_refused(tiny_rows):
    with pytest.raises(ValueError, match='4 pairs are fewer than one batch of 16: set batch_size=4'):
        next(train_dpo(tiny_model()[0], tiny_rows[0][:4]))


def test_wilson_stays_inside_zero_and_one():
    assert wilson(1., 10)[1] <= 1 + 1e-12 and wilson(0., 10)[0] >= -1e-12
    assert wilson(.5, 100) == pytest.approx((.404, .596), abs=1e-3)


def test_a_loss_that_needs_the_live_reference_says_what_to_set(tiny_rows):
    with pytest.raises(ValueError, match='set live_reference to a function'):
        next(train_dpo(tiny_model()[0], tiny_rows[0], loss='tdpo2'))


def test_entropy_is_told_only_when_asked(tiny_rows):
    model, _ = tiny_model()
    with torch.no_grad(): model.model.norm.weight.mul_(1.1)     # away from the reference, or rounding alone breaks ties
    rows = tiny_rows[1][:20]
    plain, asked = evaluate_pairs(model, rows), evaluate_pairs(model, rows, token_budget=200, entropy=True)
    assert not {'entropy', 'top1'} & set(plain)
    assert {name: asked[name] for name in plain} == pytest.approx(plain, abs=1e-4)
    batch = collate(rows)
    nats, first = token_entropy(model, batch)
    assert asked['entropy'] == pytest.approx(nats.mean().item(), abs=1e-4)
    assert asked['top1'] == pytest.approx(first.mean().item(), abs=1e-4)
    for name in ('entropy', 'top1'): assert asked[f'{name}_low'] < asked[name] < asked[f'{name}_high']


def test_a_loss_without_a_reference_is_evaluated_without_one():
    metrics = evaluate_pairs(random_model('llama'), random_rows(8, empty_prompts=False), loss='simpo')
    assert {'dpo_loss', 'dpo_loss_low', 'nll'} <= metrics.keys() and not {'accuracy', 'margin', 'kl'} & metrics.keys()


def test_the_intervals_of_one_held_out_pair_are_unbounded():
    metrics = evaluate_pairs(random_model('llama'), random_rows(1, empty_prompts=False), loss='simpo')
    for name in ('nll', 'chosen_nll', 'rejected_nll', 'dpo_loss'):
        assert (metrics[f'{name}_low'], metrics[f'{name}_high']) == (-math.inf, math.inf)


class HostReads(TorchDispatchMode):
    "Which operations made Python wait for a number."
    def __init__(self): super().__init__(); self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ('_local_scalar_dense', 'equal', 'nonzero', 'masked_select', 'unique'): self.names.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize('loss', ['sigmoid', 'ipo', 'aot', 'simpo', 'sigmoid(ld_alpha=0.3)', 'sigmoid + 0.2*sft'])
def test_a_step_asks_for_no_number_before_its_gradient_is_there(loss, tmp_path, monkeypatch):
    monkeypatch.setattr('dpo_lab.losses.check_values', lambda logps: None)     # as on a GPU
    model = random_model('llama')
    batches = pack(ready(model, random_rows(8, empty_prompts=False), tmp_path), 100)
    objective = DPOObjective(loss)
    expected = objective(model, batches, 0)             # makes the plans of the batches, on the host
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with HostReads() as reads: later = objective.later(model, batches, 0)
    assert not reads.names
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), gradient)
    with reads: assert later() == expected
    assert reads.names


def far(model, batch): return token_logps(model, batch).as_subclass(Far)


@pytest.mark.parametrize('loss', ['sigmoid', 'ipo', 'simpo'])
def test_metrics_are_computed_on_the_cpu_after_one_transfer(loss, tmp_path):
    model = random_model('llama')
    rows = ready(model, random_rows(8, empty_prompts=False), tmp_path)
    with torch.no_grad(): model.model.norm.weight.mul_(1.1)     # away from the reference, or rounding alone breaks ties
    report, _ = DPOObjective(loss)(model, pack(rows, 100), 0)
    later = DPOObjective(loss, read=far).later(model, pack(rows, 100), 0)
    Far.reads.clear()
    found, records = later()
    assert Far.reads == ['cpu'] and len(records) == 8 and found == pytest.approx(report, abs=1e-4)
    Far.reads.clear()
    found = evaluate_pairs(model, rows, objective=DPOObjective(loss, read=far))
    assert Far.reads == ['cpu'] and dict(found) == pytest.approx(dict(evaluate_pairs(model, rows, loss=loss)), abs=1e-4)


def test_columns_of_any_dtype_arrive_as_they_left():
    logps = PairLogps(torch.randn(2, 3), None, torch.ones(2, 3).long(), offset=torch.randn(3))
    columns = torch.randn(1), torch.arange(5), torch.randn(2, 3).double(), torch.randn(3).bfloat16(), torch.ones(1)
    distant = PairLogps(logps.policy.as_subclass(Far), None, logps.lengths.as_subclass(Far),
                        offset=logps.offset.as_subclass(Far))
    here, *found = on_cpu(distant, *(x.as_subclass(Far) for x in columns))
    pairs = [(here.policy, logps.policy), (here.lengths, logps.lengths), (here.offset, logps.offset)]
    for ours, theirs in pairs + [*zip(found, columns, strict=True)]:
        assert type(ours) is torch.Tensor and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert here.reference is None and on_cpu(logps, *columns)[0] is logps


def test_batches_made_ahead_change_nothing(tiny_rows):
    def run(ahead, made):
        model, _ = tiny_model()
        rows = with_reference(tiny_rows[0], reference_logps(model, tiny_rows[0]))
        def batches_of(step): made.append(step); return pack(rows_of_step(rows, step, 8))
        objective, optimizer = DPOObjective(), make_optimizer(model, 1e-4)
        for m in train(model, batches_of, objective, optimizer, 3, lambda step: 1e-4, ahead=ahead):
            made.append(f'yield {m.step}')
            yield m['dpo_loss'], m['grad_norm'], m.pairs
    early, late = [], []
    assert [*run(True, early)] == [*run(False, late)]
    assert late == [0, 'yield 0', 1, 'yield 1', 2, 'yield 2'] and early == [0, 1, 'yield 0', 2, 'yield 1', 'yield 2']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_a_gpu_is_waited_for_once_a_step(tmp_path):
    model = random_model('llama').cuda()
    batches = [b.to('cuda') for b in pack(ready(model, random_rows(8, empty_prompts=False), tmp_path), 100)]
    objective = DPOObjective()
    expected = objective(model, batches, 0)[0]['dpo_loss']
    torch.cuda.set_sync_debug_mode('error')
    try: later = objective.later(model, batches, 0)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert later()[0]['dpo_loss'] == pytest.approx(expected, rel=1e-4)

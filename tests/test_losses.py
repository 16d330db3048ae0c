"The loss catalogue against a second writing in numpy, against its derivatives, and against TRL on the same log-probs."

import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Far

from dpo_lab.losses import (
    COLUMNS,
    LOSSES,
    PairLogps,
    beta_at,
    desensitize,
    detached,
    dpo_loss,
    f_scores,
    get_loss,
    implicit_rewards,
    kept_pairs,
    loss_table,
    preference_loss,
    preference_metrics,
    swapped,
    tail_logps,
)

# ---- a second writing of every formula: numpy, float64, softplus for the logistic ----
softplus = lambda x: np.logaddexp(0, x)  # -log sigmoid(-x)
sigma = lambda x: np.exp(-softplus(-x))
bernoulli = lambda z, p: p * softplus(-z) + (1 - p) * softplus(z)  # cross-entropy of a coin with log-odds z


def exo(z, e):
    q, log_q, log_r = sigma(z), -softplus(-z), -softplus(z)
    return q * log_q + sigma(-z) * log_r - q * np.log(1 - e) - sigma(-z) * np.log(e)


def log_odds(mean):
    with np.errstate(over='ignore'):
        return -np.log(np.expm1(np.minimum(-mean, 700))) * (-mean <= 700) + mean * (-mean > 700)


def power_reward(mean, a):
    return (1 - np.exp(np.minimum(-a * mean, 80))) / a


def by_rank(x):
    return np.sort(x, kind='mergesort')


NUMPY = dict(
    sigmoid=lambda n, b: softplus(-b * (n.lw - n.ll)),
    cdpo=lambda n, b: bernoulli(b * (n.lw - n.ll), 0.9),
    robust=lambda n, b: (0.9 * softplus(-b * (n.lw - n.ll)) - 0.1 * softplus(b * (n.lw - n.ll))) / 0.8,
    soft_label=lambda n, b: bernoulli(b * (n.lw - n.ll), n.p),
    exo_pair=lambda n, b: exo(b * (n.lw - n.ll), 1e-3),
    hinge=lambda n, b: np.maximum(0, 1 - b * n.lw + b * n.ll),
    ipo_sum=lambda n, b: np.square(n.lw - n.ll - 0.5 / b),
    ipo=lambda n, b: np.square(n.lw / n.nw - n.ll / n.nl - 0.5 / b),
    discopop=lambda n, b: (lambda u: sigma(-20 * u) * softplus(-u) + np.exp(-softplus(-20 * u) - u))(b * (n.lw - n.ll)),
    sigmoid_norm=lambda n, b: softplus(b * n.ll / n.nl - b * n.lw / n.nw),
    rdpo=lambda n, b: softplus(b * (n.ll - n.lw) - 0.01 * n.nw + 0.01 * n.nl),
    nca_pair=lambda n, b: softplus(-b * n.lw) + 0.5 * softplus(b * n.lw) + 0.5 * softplus(b * n.ll),
    sppo_hard=lambda n, b: np.square(n.lw - 0.5 / b) + np.square(n.ll + 0.5 / b),
    apo_zero=lambda n, b: 1 - sigma(b * n.lw) + sigma(b * n.ll),
    apo_down=lambda n, b: sigma(b * n.lw) + 1 - sigma(b * (n.lw - n.ll)),
    kto_pair=lambda n, b: 2 - sigma(b * (n.lw - max(0, n.ll.mean()))) - sigma(b * (max(0, n.lw.mean()) - n.ll)),
    dpop=lambda n, b: softplus(-b * (n.lw - n.ll - 50 * np.maximum(0, n.rw - n.pw))),
    odpo=lambda n, b: softplus(np.log(n.gap) - b * (n.lw - n.ll)),
    simpo=lambda n, b: softplus(1 - b * (n.pw / n.nw - n.pl / n.nl)),
    alphapo=lambda n, b: softplus(1 - b * (power_reward(n.pw / n.nw, 0.25) - power_reward(n.pl / n.nl, 0.25))),
    sft=lambda n, b: -n.pw / n.nw,
    cpo=lambda n, b: softplus(b * (n.pl - n.pw)) - n.pw / n.nw,
    orpo=lambda n, b: -n.pw / n.nw + b * softplus(log_odds(n.pl / n.nl) - log_odds(n.pw / n.nw)),
    tdpo1=lambda n, b: softplus(-b * ((n.lw + n.kw) - (n.ll + n.kl))),
    tdpo2=lambda n, b: softplus(-b * (n.lw - n.ll - 0.5 * (n.kl - n.kw))),
    aot=lambda n, b: softplus(-b * (by_rank(n.pw - n.pl) - by_rank(n.rw - n.rl))),
    aot_unpaired=lambda n, b: softplus(-b * (by_rank(n.lw) - by_rank(n.ll))),
    bco_pair=lambda n, b: softplus(-b * n.lw) + softplus(b * n.ll),
    beta_dpo=lambda n, b: softplus(-max(1e-3, b + 0.6 * b * (n.lw - n.ll).mean()) * (n.lw - n.ll)),
)
NAMES = sorted(LOSSES)
EXTREME = 40


def random_pairs(n=1000, seed=0, extreme=True):
    "Pairs with uneven lengths; the first 40 have logratios of a thousand nats in every combination of signs."
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, 300, (2, n), generator=g)
    policy = -lengths * (0.05 + 4 * rand(2, n))
    reference = policy + 20 * torch.randn(2, n, generator=g, dtype=torch.float64)
    if extreme:
        signs = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]]).repeat(1, EXTREME // 4)[:, :n]
        reference[:, :EXTREME] = -2500.0
        policy[:, :EXTREME] = -2500 + 1000 * signs
    return PairLogps(policy, reference, lengths)


def needed(name, logps):
    "The pairs with what the loss asks for besides the reference."
    n, g = logps.policy.shape[1], torch.Generator().manual_seed(1)
    values = dict(
        soft_label=torch.rand(n, generator=g).double(),
        offset=0.1 + torch.rand(n, generator=g).double(),
        token_kl=5 * torch.rand(2, n, generator=g).double(),
    )
    return replace(logps, **{k: values[k] for k in LOSSES[name].needs if k in values})


def as_numpy(x):
    (pw, pl), (rw, rl), (nw, nl) = (v.numpy() for v in (x.policy, x.reference, x.lengths))
    kw, kl = x.token_kl.numpy() if x.token_kl is not None else (None, None)
    return SimpleNamespace(
        pw=pw,
        pl=pl,
        rw=rw,
        rl=rl,
        nw=nw,
        nl=nl,
        lw=pw - rw,
        ll=pl - rl,
        kw=kw,
        kl=kl,
        p=None if x.soft_label is None else x.soft_label.numpy(),
        gap=None if x.offset is None else x.offset.numpy(),
    )


def test_every_loss_has_a_second_writing():
    assert set(NUMPY) == set(LOSSES) and len(loss_table().rows) == len(LOSSES)


@pytest.mark.parametrize('name', NAMES)
def test_value_equals_a_second_writing_on_a_thousand_pairs(name):
    for beta in (LOSSES[name].beta0, 0.03, 1.0):
        x = needed(name, random_pairs())
        value = LOSSES[name](x, beta).numpy()
        assert np.isfinite(value).all()
        np.testing.assert_allclose(value, NUMPY[name](as_numpy(x), beta), rtol=1e-9, atol=1e-9)


FIXED = dict(kto_pair=dict(kl=0.3), beta_dpo=dict(batch_mean=0.5))  # what is detached has no derivative to compare


@pytest.mark.parametrize('name', NAMES)
def test_gradient_equals_finite_differences(name):
    x, f = needed(name, random_pairs(24, seed=2, extreme=False)), get_loss(name, **FIXED.get(name, {}))
    for beta in (f.beta0, 0.02):
        value = lambda policy, beta=beta: f(replace(x, policy=policy), beta)
        assert torch.autograd.gradcheck(value, (x.policy.clone().requires_grad_(),), eps=1e-5, atol=1e-5, rtol=1e-4)


CLOSED = dict(  # d loss / d (policy chosen, policy rejected)
    sigmoid=lambda n, b: (-b * sigma(-b * (n.lw - n.ll)), b * sigma(-b * (n.lw - n.ll))),
    hinge=lambda n, b: (-b * (b * (n.lw - n.ll) < 1), b * (b * (n.lw - n.ll) < 1)),
    ipo_sum=lambda n, b: (2 * (n.lw - n.ll - 0.5 / b), -2 * (n.lw - n.ll - 0.5 / b)),
    ipo=lambda n, b: (
        2 / n.nw * (n.lw / n.nw - n.ll / n.nl - 0.5 / b),
        -2 / n.nl * (n.lw / n.nw - n.ll / n.nl - 0.5 / b),
    ),
    cdpo=lambda n, b: (b * (sigma(b * (n.lw - n.ll)) - 0.9), -b * (sigma(b * (n.lw - n.ll)) - 0.9)),
    sppo_hard=lambda n, b: (2 * (n.lw - 0.5 / b), 2 * (n.ll + 0.5 / b)),
    nca_pair=lambda n, b: (b * (1.5 * sigma(b * n.lw) - 1), 0.5 * b * sigma(b * n.ll)),
    bco_pair=lambda n, b: (-b * sigma(-b * n.lw), b * sigma(b * n.ll)),
    apo_zero=lambda n, b: (-b * sigma(b * n.lw) * sigma(-b * n.lw), b * sigma(b * n.ll) * sigma(-b * n.ll)),
    dpop=lambda n, b: (
        -b * (1 + 50 * (n.lw < 0)) * (w := sigma(-b * (n.lw - n.ll - 50 * np.maximum(0, -n.lw)))),
        b * w,
    ),
    simpo=lambda n, b: (-b / n.nw * (w := sigma(1 - b * (n.pw / n.nw - n.pl / n.nl))), b / n.nl * w),
    sft=lambda n, b: (-1 / n.nw, 0 * n.nl),
    orpo=lambda n, b: (
        -1 / n.nw - b * (w := sigma(log_odds(n.pl / n.nl) - log_odds(n.pw / n.nw))) / n.nw / -np.expm1(n.pw / n.nw),
        b * w / n.nl / -np.expm1(n.pl / n.nl),
    ),
)


@pytest.mark.parametrize('name', sorted(CLOSED))
def test_gradient_equals_its_closed_form(name):
    x = random_pairs()
    policy = x.policy.clone().requires_grad_()
    LOSSES[name](replace(x, policy=policy), 0.1).sum().backward()
    np.testing.assert_allclose(policy.grad.numpy(), np.stack(CLOSED[name](as_numpy(x), 0.1)), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', NAMES)
def test_extreme_logits_stay_finite(name, dtype):
    x = needed(name, random_pairs())
    x = replace(x, policy=x.policy.to(dtype), reference=x.reference.to(dtype))
    policy = x.policy.clone().requires_grad_()
    value = LOSSES[name](replace(x, policy=policy), 1.0)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(policy.grad).all()


def test_certain_completions_have_finite_odds():
    certain = PairLogps(torch.zeros(2, 1, requires_grad=True), None, torch.ones(2, 1))
    value = LOSSES['orpo'](certain)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(certain.policy.grad).all()


# ---- identities ----
def same(a, b, eps=1e-12):
    assert torch.allclose(a, b, rtol=0, atol=eps), (a - b).abs().max()


def test_at_delta_zero_every_beta_costs_ln_2_and_pulls_with_half_of_it():
    d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for beta in (0.01, 0.1, 5.0):
        value = dpo_loss(PairLogps(torch.stack([d, 0 * d]), torch.zeros(2, 1).double(), torch.ones(2, 1)), beta)
        assert value.item() == pytest.approx(math.log(2), abs=1e-15)
        assert torch.autograd.grad(value, d)[0].item() == pytest.approx(-beta / 2, abs=1e-15)


def test_swapping_a_pair_changes_the_loss_by_its_margin():
    x = random_pairs()
    same(dpo_loss(x, 0.1) - dpo_loss(swapped(x), 0.1), -0.1 * x.delta, 1e-9)
    assert (
        dpo_loss(PairLogps(torch.tensor([[-1000.0], [0.0]]), torch.zeros(2, 1), torch.ones(2, 1)), 1.0).item() == 1000.0
    )


def test_losses_meet_where_their_formulas_do():
    x, L = random_pairs(), LOSSES
    plain = dpo_loss(x, 0.1)
    same(L['cdpo'](x, 0.1, label_smoothing=0.0), plain)
    same(L['robust'](x, 0.1, label_smoothing=0.0), plain, 1e-10)
    same(L['soft_label'](replace(x, soft_label=torch.ones(1000).double()), 0.1), plain)
    same(L['rdpo'](x, 0.1, alpha=0.0), plain)
    same(L['dpop'](x, 0.1, penalty=0.0), plain)
    same(L['kto_pair'](x, 0.1, kl=0.0), L['apo_zero'](x, 0.1))
    same(L['discopop'](x, 1e-9), (plain * 0 + 0.5 * math.log(2) + 0.5), 1e-4)
    same(L['alphapo'](x, alpha=0.0), L['simpo'](x))
    near = random_pairs(extreme=False)
    same(L['alphapo'](near, alpha=1e-7), L['simpo'](near), 1e-5)
    same(L['aot'](x, 0.1, label_smoothing=0.0).mean(), L['aot'](swapped(swapped(x)), 0.1).mean())
    same(L['beta_dpo'](x, 0.1, mean=float(x.delta.mean())), plain)
    same(dpo_loss(x, 0.1, label_smoothing=0.1), L['cdpo'](x, 0.1))
    same(dpo_loss(x, 5.0, length_normalized=True), L['sigmoid_norm'](x), 1e-9)
    same(L['ipo_sum'](x, 0.1, length_normalized=True), L['ipo'](x, 0.1), 1e-9)


def test_the_best_policy_gives_the_reward_back_also_when_length_has_a_price():
    g = torch.Generator().manual_seed(5)
    reward, ref = (torch.randn(8, generator=g, dtype=torch.float64) for _ in range(2))
    ref, tokens = ref.log_softmax(0), torch.randint(1, 30, (8,), generator=g).double()
    for alpha in (0.0, 0.1):
        best = (ref + (reward - alpha * tokens) / 0.3).log_softmax(0)
        x = PairLogps(best.view(2, 4), ref.view(2, 4), tokens.view(2, 4))
        same(LOSSES['rdpo'](x, 0.3, alpha=alpha), -torch.nn.functional.logsigmoid(reward[:4] - reward[4:]), 1e-12)


def test_the_guard_of_dpop_only_acts_below_the_reference():
    x = random_pairs()
    up = x.logratios[0] >= 0
    value, plain = LOSSES['dpop'](x, 0.3), dpo_loss(x, 0.3)
    same(value[up], plain[up])
    assert (value[~up] >= plain[~up]).all()
    same(value[~up], -torch.nn.functional.logsigmoid(0.3 * (51 * x.logratios[0] - x.logratios[1]))[~up], 1e-9)


def test_asking_for_a_gap_moves_the_margin_by_its_logarithm():
    x = random_pairs(50, extreme=False)
    gap = torch.rand(50).double() + 0.1
    moved = replace(x, policy=torch.stack([x.policy[0] - 2 * torch.log(gap) / 0.1, x.policy[1]]))
    same(LOSSES['odpo'](replace(x, offset=gap), 0.1, alpha=2.0), dpo_loss(moved, 0.1), 1e-10)
    same(LOSSES['odpo'](replace(x, offset=gap), 0.1, scale='linear'), dpo_loss(replace(x, offset=gap), 0.1))


def test_kto_takes_its_zero_from_the_other_side_never_below_zero():
    x = PairLogps(torch.tensor([[4.0, 2], [-3, -1]]), torch.zeros(2, 2), torch.ones(2, 2))  # means 3 and -2
    same(LOSSES['kto_pair'](x, 1.0), torch.sigmoid(-x.policy[0]) + torch.sigmoid(x.policy[1] - 3), 1e-6)
    two = LOSSES['kto_pair'](x, 1.0, desirable=2.0) - LOSSES['kto_pair'](x, 1.0)
    same(two, torch.sigmoid(-x.policy[0]), 1e-6)


# ---- memory ----
def test_running_numbers_are_what_they_say():
    steps = [random_pairs(30, seed=s, extreme=False) for s in range(6)]
    bco, beta = LOSSES['bco_pair'], LOSSES['beta_dpo']
    a, b = bco.start(), beta.start()
    for x in steps:
        a, b = bco.update(a, detached(x), 0.1), beta.update(b, detached(x), 0.1)
    assert a['delta'] == pytest.approx(np.mean([implicit_rewards(x, 0.1).mean() for x in steps]))
    assert b['mean'] == pytest.approx(sum(0.1 * 0.9 ** (5 - i) * x.delta.mean().item() for i, x in enumerate(steps)))
    used = beta.beta_used(0.1, **b)
    assert used == pytest.approx(max(0.1 * (1 + 0.6 * (steps[-1].delta.mean().item() - b['mean'])), 1e-3))
    same(beta(steps[-1], 0.1, **b), dpo_loss(steps[-1], used))
    half = replace(
        steps[-1],
        policy=steps[-1].policy[:, :15],
        reference=steps[-1].reference[:, :15],
        lengths=steps[-1].lengths[:, :15],
    )
    same(beta(half, 0.1, **b), dpo_loss(half, used))  # a micro-batch uses the beta of the step


def test_the_filter_keeps_a_share_and_the_mean_of_it():
    x, keep = random_pairs(40, extreme=False), get_loss('beta_dpo(keep=0.75)')
    state = keep.update(keep.start(), x, 0.1)
    value = keep(x, 0.1, **state)
    kept = value != 0
    assert kept.sum() == 30 and state['batch_mean'] == pytest.approx(x.delta[kept].mean().item())
    same(value.mean(), dpo_loss(x, keep.beta_used(0.1, **state))[kept].mean())
    same(value, keep(x, 0.1, **state))  # the draw is seeded by the step


def test_a_memory_fixed_by_hand_is_not_updated_and_sums_share_one():
    x = random_pairs(10, extreme=False)
    fixed = get_loss('bco_pair(delta=0.5)')
    assert fixed.start() == {} and fixed.update({}, x, 0.1) == {}
    same(fixed(x, 0.1), LOSSES['bco_pair'](x, 0.1, delta=0.5))
    mix = get_loss('0.5*beta_dpo(alpha=0.2) + bco_pair + 0.1*sft')
    state = mix.update(mix.start(), x, 0.1)
    parts = [get_loss('beta_dpo', alpha=0.2), LOSSES['bco_pair']]
    own = [f.update(f.start(), x, 0.1) for f in parts]
    same(mix(x, 0.1, **state), 0.5 * parts[0](x, 0.1, **own[0]) + parts[1](x, 0.1, **own[1]) + 0.1 * LOSSES['sft'](x))
    assert mix.beta_used(0.1, **state) == parts[0].beta_used(0.1, **own[0]) and mix.whole_batch


# ---- columns and refusals ----
@pytest.mark.parametrize('name', NAMES)
def test_columns_are_honoured_or_refused(name):
    f, x = LOSSES[name], needed(name, random_pairs(20, extreme=False))
    columns = dict(
        weight=torch.rand(20).double(), soft_label=torch.rand(20).double(), offset=torch.rand(20).double() + 0.1
    )
    for column in COLUMNS:
        given = replace(x, **{column: columns[column]})
        if column not in f.uses:
            with pytest.raises(ValueError, match=f"no room for the column '{column}'"):
                f(given, 0.1)
            continue
        if column == 'weight':
            same(f(given, 0.1), columns['weight'] * f(x, 0.1))
        elif column == 'offset':
            assert not torch.equal(f(given, 0.1), f(x if x.offset is None else replace(x, offset=x.offset + 1), 0.1))
        elif name != 'soft_label':
            same(f(given, 0.1), given.soft_label * f(x, 0.1) + (1 - given.soft_label) * f(swapped(x), 0.1), 1e-9)


@pytest.mark.parametrize('name', NAMES)
def test_what_a_loss_needs_is_asked_for_and_only_that(name):
    f, x = LOSSES[name], needed(name, random_pairs(5, extreme=False))
    for field in f.needs:
        with pytest.raises(ValueError, match=f"needs '{field}'"):
            f(replace(x, **{field: None}))
    if 'reference' not in f.needs:
        f(replace(x, reference=None))


@pytest.mark.parametrize('name', NAMES)
def test_a_knob_that_nothing_reads_is_an_error(name):
    for call in (
        lambda: get_loss(name, nonsense=1),
        lambda: LOSSES[name](random_pairs(2), 0.1, nonsense=1),
        lambda: get_loss(f'{name}(nonsense=1)'),
    ):
        with pytest.raises(ValueError, match=f"{name!r} has no knob 'nonsense': it takes beta"):
            call()


@pytest.mark.parametrize('name', NAMES)
def test_every_knob_that_a_loss_lists_changes_what_it_gives(name):
    other = dict(
        label_smoothing=0.2,
        alpha=0.3,
        tau=0.5,
        penalty=2.0,
        scale='linear',
        gamma=0.3,
        nll=0.5,
        desirable=2.0,
        undesirable=2.0,
        kl=2.0,
        delta=1.0,
        keep=0.5,
        mean=3.0,
        batch_mean=7.0,
        f_divergence='js',
        length_normalized=True,
        ld_alpha=0.5,
        wpo=True,
    )
    g = torch.Generator().manual_seed(3)
    x = needed(name, random_pairs(20, extreme=False))
    x = replace(
        x, confidence=-torch.rand(2, 20, generator=g).double(), tails=-torch.rand(2, 2, 20, generator=g).double() * 50
    )
    for knob in set(LOSSES[name].knobs) - {'seen', 'std', 'step', 'f_alpha', 'ld_side'}:
        assert not torch.allclose(LOSSES[name](x, 0.1), LOSSES[name](x, 0.1, **{knob: other[knob]})), knob
    if 'f_alpha' in LOSSES[name].knobs:
        assert not torch.allclose(*(LOSSES[name](x, 0.1, f_divergence='alpha', f_alpha=a) for a in (0.3, 0.6)))
    if 'ld_side' in LOSSES[name].knobs:
        assert not torch.allclose(*(LOSSES[name](x, 0.1, ld_alpha=0.5, ld_side=s) for s in ('both', 'policy')))
    if 'std' in LOSSES[name].knobs:
        assert not torch.allclose(*(LOSSES[name](x, 0.1, keep=0.5, std=50.0, step=s) for s in (1.0, 2.0)))
        assert not torch.allclose(*(LOSSES[name](x, 0.1, keep=0.5, std=s, batch_mean=0.0) for s in (0.5, 1e9)))


def test_beta_must_be_positive_and_smoothing_below_one_half():
    x = random_pairs(2)
    with pytest.raises(ValueError, match="beta is 0"):
        dpo_loss(x, 0.0)
    for name in ('sigmoid', 'cdpo', 'robust', 'exo_pair', 'aot', 'aot_unpaired'):
        with pytest.raises(ValueError, match="in \\[0, 0.5\\)"):
            LOSSES[name](x, 0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="above 0"):
        LOSSES['exo_pair'](x, 0.1, label_smoothing=0.0)


def test_shapes_are_checked_where_data_enters():
    ok = dict(policy=torch.zeros(2, 3), reference=torch.zeros(2, 3), lengths=torch.ones(2, 3))
    PairLogps(**ok)
    for wrong, message in [
        (dict(policy=torch.zeros(3)), r"\(2, B\)"),
        (dict(reference=torch.zeros(2, 4)), "reference has shape"),
        (dict(lengths=torch.zeros(2, 3)), "no scored tokens"),
        (dict(weight=torch.ones(2, 3)), "weight has shape"),
        (dict(soft_label=torch.tensor([0.0, 1, 2])), "chance"),
        (dict(tails=torch.zeros(2, 3)), "tails has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            PairLogps(**{**ok, **wrong})


# ---- words ----
def test_words_become_losses():
    x = random_pairs(6, extreme=False)
    same(get_loss('sigmoid+0.2*sft')(x, 0.1), dpo_loss(x, 0.1) + 0.2 * LOSSES['sft'](x))
    same(
        get_loss(' 1e-1 * ipo ( f_divergence = js ) + .5*simpo(gamma=1e+0)')(x, 2.0),
        0.1 * LOSSES['ipo'](x, 2.0, f_divergence='js') + 0.5 * LOSSES['simpo'](x, 2.0),
    )
    same(get_loss('robust', label_smoothing=0.3)(x, beta=0.2), LOSSES['robust'](x, 0.2, 0.3))
    same(
        get_loss('sigmoid + 0.1*aot', label_smoothing=0.3)(x, 0.1),
        dpo_loss(x, 0.1, 0.3) + 0.1 * LOSSES['aot'](x, 0.1, 0.3),
    )
    assert get_loss('sigmoid') is dpo_loss and get_loss(dpo_loss) is dpo_loss and get_loss('simpo').beta0 == 2.0
    assert get_loss('simpo + sft').needs == () and get_loss('sigmoid + 0.2*sft').uses == COLUMNS
    assert get_loss('sigmoid(wpo=true)').needs == ('reference', 'confidence') and get_loss(
        'sigmoid(ld_alpha=0.5)'
    ).needs == ('reference', 'tails')


@pytest.mark.parametrize(
    'spec, message',
    [
        ('dpo', r"unknown loss 'dpo'\. .*Choose one of"),
        ('zzz', r"unknown loss 'zzz'\. Choose one of"),
        ('simppo', r"unknown loss 'simppo'\. Did you mean 'simpo'\? Choose one of"),
        ('sigmoid +', "cannot read"),
        ('', "cannot read"),
        ('sigmoid sft', "cannot read"),
        ('simpo(gamma)', "write knob=value"),
        ('no_such_module:loss', "loss 'no_such_module:loss': cannot import 'no_such_module'"),
        ('math:sqtr', "loss 'math:sqtr': math has no 'sqtr'. Did you mean 'sqrt'"),
        ('math:pi', r"loss 'math:pi' is 3\.14\d*: it must be a function"),
        ('simpo(beta=2)', "no knob 'beta'"),
    ],
)
def test_words_that_mean_nothing_are_answered(spec, message):
    with pytest.raises(ValueError, match=message):
        get_loss(spec)


def test_a_users_function_is_a_loss(tmp_path, monkeypatch):
    (tmp_path / 'my_losses.py').write_text(
        "def cube(logps, beta=0.1, shift=0.):\n    return (beta * logps.delta - shift) ** 3\n"
        "def total(logps, beta=0.1):\n    return logps.delta.sum()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    x, f = random_pairs(4, extreme=False), get_loss('my_losses:cube(shift=1)')
    same(f(x, 0.2), (0.2 * x.delta - 1) ** 3)
    same(f(replace(x, weight=2 * torch.ones(4))), 2 * f(x))
    with pytest.raises(ValueError, match="no room for the column 'soft_label'"):
        f(replace(x, soft_label=torch.ones(4)))
    with pytest.raises(ValueError, match="one value per pair"):
        get_loss('my_losses:total')(x)
    same(get_loss('sigmoid + 0.5*my_losses:cube')(x, 0.1), dpo_loss(x, 0.1) + 0.5 * (0.1 * x.delta) ** 3)
    own = preference_loss(r'\Delta^2', 'here', takes=('f_divergence',))(
        lambda logps, beta=0.1: (beta * logps.delta) ** 2
    )
    same(own(x, 1.0, f_divergence='js'), (f_scores(x.logratios, 'js')[0] - f_scores(x.logratios, 'js')[1]) ** 2)


def test_a_loss_takes_an_offset_only_if_it_says_that_it_reads_it():
    with_offset = replace(random_pairs(4, extreme=False), offset=torch.ones(4))
    deaf = preference_loss(r'\Delta', 'here')(lambda logps, beta=0.1: -beta * logps.delta)
    with pytest.raises(ValueError, match="no room for the column 'offset'"):
        deaf(with_offset)
    hears = preference_loss(r'\Delta', 'here', uses=COLUMNS)(lambda logps, beta=0.1: logps.gap - beta * logps.delta)
    same(hears(with_offset), 1 + hears(replace(with_offset, offset=None)))


# ---- modifiers and metrics ----
def test_tails_and_tokens_give_the_same_desensitised_loss():
    g = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 9, (2, 7), generator=g)
    segment = torch.repeat_interleave(torch.arange(14), lengths.flatten())
    shuffle = torch.randperm(14, generator=g)  # completions may lie in any order
    segment = torch.cat([segment[segment == i] for i in shuffle])
    pi, ref = (-torch.rand(len(segment), generator=g, dtype=torch.float64) for _ in range(2))
    sums = lambda a, b: PairLogps(desensitize(pi, segment, lengths, a), desensitize(ref, segment, lengths, b), lengths)
    whole = replace(sums(1.0, 1.0), tails=torch.stack([tail_logps(v, segment, lengths) for v in (pi, ref)]))
    slow = [
        [
            sum(
                (0.3 if t >= min(lengths[:, b]) else 1.0) * v
                for t, v in enumerate(pi[segment == side * 7 + b].tolist())
            )
            for b in range(7)
        ]
        for side in (0, 1)
    ]
    same(sums(0.3, 1.0).policy, torch.tensor(slow, dtype=torch.float64))
    same(dpo_loss(whole, 0.1, ld_alpha=0.3), dpo_loss(sums(0.3, 0.3), 0.1))
    same(dpo_loss(whole, 0.1, ld_alpha=0.3, ld_side='policy'), dpo_loss(sums(0.3, 1.0), 0.1))


def test_beta_schedules_start_and_end_where_they_say():
    for schedule in ('linear', 'cosine'):
        assert (beta_at(0.0, 0.5, 0.1, schedule), beta_at(1.0, 0.5, 0.1, schedule)) == (0.5, 0.1)
    assert beta_at(0.7, 0.5, 0.1, 'constant') == 0.5
    with pytest.raises(ValueError, match="schedule is 'linaer'"):
        beta_at(0.5, 0.5, 0.1, 'linaer')


def test_metrics_are_the_guides():
    x = random_pairs(200)
    m = preference_metrics(x, 0.2)
    chosen, rejected = (0.2 * x.logratios).mean(1).tolist()
    assert (m['chosen_reward'], m['rejected_reward']) == pytest.approx((chosen, rejected))
    assert m['margin'] == pytest.approx(chosen - rejected) and m['num_pairs'] == 200
    still = preference_metrics(replace(x, policy=x.reference), 0.2)
    assert (still['accuracy'], still['ties'], still['margin']) == (0.5, 200, 0.0)
    assert set(preference_metrics(replace(x, reference=None))) == {'chosen_logps', 'rejected_logps', 'num_pairs'}


def test_a_device_without_float64_is_asked_for_none(monkeypatch):
    x = random_pairs(40)
    far = PairLogps(x.policy.as_subclass(Far), x.reference.as_subclass(Far), x.lengths.as_subclass(Far))
    assert preference_metrics(far) == preference_metrics(x)
    monkeypatch.setattr(Far, 'where', torch.device('cpu'))      # so that what was drawn has a way back
    assert torch.equal(kept_pairs(far.delta, 0.5, 0.0, 1.0, 3), kept_pairs(x.delta, 0.5, 0.0, 1.0, 3))


# ---- TRL, run live: its own loss code, on token log-probs of our making ----
@pytest.fixture(scope='module')
def trl():
    os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'
    return pytest.importorskip('trl', reason='trl is not installed: it comes with the development extra')


class Tokens:
    "Per-token log-probs of B pairs: chosen rows, then rejected rows, zero outside the completion."

    def __init__(self, lengths, seed=0, prompt=3, scale=1.0):
        g = torch.Generator().manual_seed(seed)
        self.lengths, flat = lengths, lengths.flatten()
        width = prompt + int(flat.max())
        at = torch.arange(width)
        self.mask = ((at >= prompt) & (at < prompt + flat[:, None])).long()
        rand = lambda: (
            -scale * torch.rand(len(flat), width - 1, generator=g, dtype=torch.float64) * 3 * self.mask[:, 1:]
        )
        self.policy, self.reference, self.sum_sq = rand(), rand(), rand()

    def pairs(self):
        keep, shape = self.mask[:, 1:].bool(), self.lengths.shape
        segment = torch.arange(len(keep))[:, None].expand_as(keep)[keep]
        tails = torch.stack([tail_logps(v[keep], segment, self.lengths) for v in (self.policy, self.reference)])
        confidence = (self.policy - self.sum_sq).sum(1).view(shape) / self.lengths
        return PairLogps(
            self.policy.sum(1).view(shape),
            self.reference.sum(1).view(shape),
            self.lengths,
            tails=tails,
            confidence=confidence,
        )

    def model(self, values):
        "A module that answers with these log-probs, in TRL's form."
        nothing, module = torch.zeros_like(values), torch.nn.Identity()
        module.is_gradient_checkpointing = False
        module.forward = lambda **_: SimpleNamespace(
            log_probs=values, log_sum_sq_probs=self.sum_sq, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )
        return module


def trl_value(tokens, loss_type, beta, **settings):
    "What the loss code of TRL's DPOTrainer gives for these tokens: a mean over the pairs."
    from collections import defaultdict
    from trl.trainer.dpo_trainer import DPOTrainer

    model, ref_model = tokens.model(tokens.policy), tokens.model(tokens.reference)
    whole = lambda v: v
    stub = SimpleNamespace(
        **dict(
            model=model,
            ref_model=ref_model,
            accelerator=SimpleNamespace(device=torch.device('cpu'), gather=whole, gather_for_metrics=whole),
            args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
            aux_loss_enabled=False,
            precompute_ref_logps=False,
            ld_alpha=None,
            f_divergence_type='reverse_kl',
            f_alpha_divergence_coef=0.5,
            loss_types=[loss_type],
            loss_weights=[1.0],
            beta=beta,
            label_smoothing=0.0,
            use_weighting=False,
            _metrics=dict(train=defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )
        | settings
    )
    inputs = dict(
        input_ids=torch.zeros_like(tokens.mask),
        attention_mask=torch.ones_like(tokens.mask),
        completion_mask=tokens.mask,
    )
    value = DPOTrainer._compute_loss(stub, model, inputs, False).item()
    return value, stub._metrics['train']


def many_tokens(n=25, scale=1.0):
    g = torch.Generator().manual_seed(9)
    for seed in range(n):
        yield Tokens(torch.randint(1, 40, (2, 1), generator=g), seed, scale=scale)


@pytest.mark.parametrize(
    'name, knobs, settings',
    [
        ('sigmoid', {}, {}),
        ('hinge', {}, {}),
        ('ipo', {}, {}),
        ('sigmoid_norm', {}, {}),
        ('nca_pair', {}, {}),
        ('sppo_hard', {}, {}),
        ('apo_zero', {}, {}),
        ('apo_down', {}, {}),
        ('discopop', {}, {}),
        ('bco_pair', {}, {}),
        ('exo_pair', dict(label_smoothing=0.1), dict(label_smoothing=0.1)),
        ('robust', dict(label_smoothing=0.1), dict(label_smoothing=0.1)),
        ('aot', {}, {}),
        ('aot_unpaired', dict(label_smoothing=0.1), dict(label_smoothing=0.1)),
        ('sft', {}, {}),
        ('sigmoid', dict(f_divergence='js'), dict(f_divergence_type='js_divergence')),
        ('ipo', dict(f_divergence='forward_kl'), dict(f_divergence_type='forward_kl')),
        ('hinge', dict(f_divergence='js'), dict(f_divergence_type='js_divergence')),
        ('sigmoid', dict(ld_alpha=0.4), dict(ld_alpha=0.4)),
        ('sigmoid_norm', dict(ld_alpha=0.4), dict(ld_alpha=0.4)),
        ('apo_zero', dict(ld_alpha=0.4), dict(ld_alpha=0.4)),
        ('sigmoid', dict(wpo=True), dict(use_weighting=True)),
        ('nca_pair', dict(wpo=True), dict(use_weighting=True)),
    ],
)
def test_values_agree_with_trl(trl, name, knobs, settings):
    for beta in (0.1, 0.5):
        for tokens in many_tokens():
            theirs, _ = trl_value(tokens, name, beta, **settings)
            assert LOSSES[name](tokens.pairs(), beta, **knobs).mean().item() == pytest.approx(
                theirs, rel=1e-6, abs=1e-6
            )


@pytest.mark.parametrize('name', ['sigmoid', 'ipo', 'aot', 'aot_unpaired', 'sigmoid_norm'])
def test_batches_agree_with_trl(trl, name):
    tokens = Tokens(torch.randint(1, 40, (2, 33), generator=torch.Generator().manual_seed(1)))
    theirs, metrics = trl_value(tokens, name, 0.1)
    ours = preference_metrics(tokens.pairs(), 0.1)
    assert LOSSES[name](tokens.pairs(), 0.1).mean().item() == pytest.approx(theirs, abs=1e-6)
    for mine, other in dict(
        margin='rewards/margins',
        chosen_reward='rewards/chosen',
        accuracy='rewards/accuracies',
        chosen_logps='logps/chosen',
    ).items():
        assert ours[mine] == pytest.approx(metrics[other][0], abs=1e-6)


def test_alpha_divergence_agrees_with_trl_in_its_precision(trl):
    for tokens in many_tokens(scale=0.2):
        x = tokens.pairs()
        tokens.policy, tokens.reference = (
            tokens.policy.float(),
            tokens.reference.float(),
        )  # TRL's clamp has no entry for float64
        theirs, _ = trl_value(tokens, 'sigmoid', 0.1, f_divergence_type='alpha_divergence', f_alpha_divergence_coef=0.7)
        assert dpo_loss(x, 0.1, f_divergence='alpha', f_alpha=0.7).item() == pytest.approx(theirs, abs=1e-5)


def test_where_trl_is_known_to_differ(trl):
    tokens = Tokens(torch.tensor([[5, 30], [7, 3]]))
    x = tokens.pairs()
    assert trl_value(tokens, 'sigmoid', 0.1, label_smoothing=0.3)[0] == pytest.approx(
        dpo_loss(x, 0.1).mean().item(), abs=1e-6
    )  # dropped
    assert trl_value(tokens, 'sft', 0.1)[0] == pytest.approx(
        (-x.policy[0].sum() / x.lengths[0].sum()).item(), abs=1e-6
    )  # token-weighted
    far = Tokens(torch.tensor([[40], [1]]))
    far.policy = far.policy * 40  # delta about -2400
    assert math.isnan(trl_value(far, 'discopop', 1.0)[0]) and torch.isfinite(LOSSES['discopop'](far.pairs(), 1.0)).all()
    tokens.policy = tokens.reference
    assert (
        trl_value(tokens, 'sigmoid', 0.1)[1]['rewards/accuracies'] == [0.0]
        and preference_metrics(tokens.pairs())['accuracy'] == 0.5
    )


def test_kto_agrees_with_trl_given_the_same_estimate(trl):
    from collections import defaultdict
    from trl.trainer.kto_trainer import KTOTrainer

    tokens = Tokens(torch.randint(1, 40, (2, 20), generator=torch.Generator().manual_seed(2)))
    model, ref_model = tokens.model(tokens.policy), tokens.model(tokens.reference)
    whole = lambda v: v
    for kl, loss_type in ((1.7, 'kto'), (-3.0, 'kto'), (0.0, 'apo_zero_unpaired')):
        stub = SimpleNamespace(
            model=model,
            ref_model=ref_model,
            accelerator=SimpleNamespace(device=torch.device('cpu'), gather=whole, gather_for_metrics=whole),
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            aux_loss_enabled=False,
            precompute_ref_logps=False,
            calculate_KL=loss_type == 'kto',
            _compute_kl_logps=lambda m, _, kl=kl: torch.tensor([kl if m is model else 0.0], dtype=torch.float64),
            loss_type=loss_type,
            beta=0.1,
            desirable_weight=1.5,
            undesirable_weight=0.5,
            _metrics=dict(train=defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )
        inputs = dict(
            input_ids=torch.zeros_like(tokens.mask),
            attention_mask=torch.ones_like(tokens.mask),
            completion_mask=tokens.mask,
            label=torch.tensor([True] * 20 + [False] * 20),
        )
        theirs = KTOTrainer._compute_loss(stub, model, inputs, False).item()  # a mean over both sides: half of ours
        ours = LOSSES['kto_pair'](tokens.pairs(), 0.1, kl=kl, desirable=1.5, undesirable=0.5).mean().item() / 2
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_reference_free_losses_agree_with_trl(trl):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    x = random_pairs(200, extreme=False)
    chosen, rejected = x.token_means
    stub = SimpleNamespace(
        accelerator=SimpleNamespace(device='cpu'),
        beta=2.0,
        alpha=0.0,
        loss_type='simpo',
        simpo_gamma=1.0,
        label_smoothing=0.0,
    )
    theirs = lambda *logps, **change: CPOTrainer.cpo_loss(SimpleNamespace(**vars(stub) | change), *logps)[0]
    same(LOSSES['simpo'](x), theirs(chosen, rejected), 1e-6)
    same(LOSSES['alphapo'](x), theirs(chosen, rejected, alpha=0.25), 1e-6)
    same(LOSSES['cpo'](x, 0.1, nll=0.0), theirs(*x.policy, loss_type='sigmoid', beta=0.1), 1e-6)
    odds = ORPOTrainer.odds_ratio_loss(SimpleNamespace(**vars(stub) | dict(beta=0.1)), chosen, rejected)[0]
    same(LOSSES['orpo'](x, 0.1) - LOSSES['sft'](x), -odds.double(), 1e-6)


def test_the_table_has_a_full_row_for_every_loss():
    table = loss_table()._repr_markdown_().splitlines()
    assert len(table) == len(LOSSES) + 2 and len({line.count('|') for line in table}) == 1
    assert [row['loss'] for row in loss_table().rows] == [f'`{name}`' for name in LOSSES]
    mix = loss_table({'mine': get_loss('sigmoid + 0.2*sft')}).rows[0]
    assert mix['reference'] == 'yes' and '0.2' in mix['per pair']


@pytest.mark.parametrize(
    'spec, message',
    [
        ('cdpo(label_smoothing=0.7)', "label_smoothing is 0.7"),
        ('sigmoid(wpo=no)', "must be true or false"),
        ('simpo(gamma=high)', "must be a number"),
        ('odpo(scale=cubic)', "scale is 'cubic'"),
        ('sigmoid(f_divergence=kl)', "f_divergence is 'kl'"),
        ('hinge(f_alpha=0.3)', "only f_divergence='alpha' reads it"),
        ('hinge(ld_side=policy)', "no ld_alpha is set"),
        ('ipo(ld_alpha=0.5, ld_side=reference)', "ld_side is 'reference'"),
        ('discopop(tau=0)', "tau is 0"),
        ('beta_dpo(keep=0)', "keep is 0"),
        ('sigmoid(ld_alpha=half)', "loss 'sigmoid' cannot take ld_alpha='half'"),
        ('0.5*hinge(f_divergence=alpha, f_alpha=x) + sft', "'hinge' cannot take f_divergence='alpha', f_alpha='x'"),
        ('kto_pair(kl=far)', "loss 'kto_pair' cannot take kl='far'"),
    ],
)
def test_a_value_out_of_range_is_refused_before_there_are_pairs(spec, message):
    with pytest.raises(ValueError, match=message):
        get_loss(spec)

"Ways to attend within packed pairs, each against plain rows of a model."
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logprobs import PACKED, one_by_one

import dpo_lab.attention as A
from dpo_lab.attention import (ATTENTIONS, GROUP_WASTE, attend_in_blocks, attention_error, block_mask, find_attention,
                               varlen_plan, groups_of, tree_mask)
from dpo_lab.batches import collate
from dpo_lab.logprobs import pair_logps, restore_attention, use_shared_prompt_attention


def plain_varlen(query, key, value, query_ends, key_ends, most_queries, most_keys, *, scale, window_size, enable_gqa):
    "What flash attention for variable lengths computes, sequence by sequence: the last query sees every key."
    out, left = [], window_size[0]
    assert window_size[1] == 0 and enable_gqa
    for (a, b), (c, d) in zip(zip(query_ends, query_ends[1:]), zip(key_ends, key_ends[1:])):
        q, k, v = query[a:b], key[c:d], value[c:d]
        assert len(q) <= most_queries and len(k) <= most_keys
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


@pytest.fixture(params=['flex', 'varlen'])
def kernel(request, monkeypatch):
    "An attention for GPUs, runnable here: flex without gradients, and plain sequences in place of flash attention."
    varlen = pytest.importorskip('torch.nn.attention.varlen', reason='this torch has no attention for variable lengths')
    monkeypatch.setattr(varlen, 'varlen_attn', plain_varlen)
    return request.param


@pytest.mark.parametrize('name', PACKED)
def test_a_model_gives_the_numbers_of_plain_rows(name, kernel):
    model, rows = random_model(name).requires_grad_(kernel == 'varlen'), random_rows(5)
    if kernel == 'varlen' and getattr(model.config, 'attn_logit_softcapping', None): pytest.skip('it squashes scores')
    weights = torch.randn(2, 5)
    def gradient(f):
        model.zero_grad()
        logps = f()
        if logps.requires_grad: (logps * weights).sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return logps.detach(), torch.cat(grads or [torch.ones(1)])
    use_shared_prompt_attention(model, kernel)
    logps, packed = gradient(lambda: pair_logps(model, collate(rows)))
    assert kernel in model.config._attn_implementation
    restore_attention(model)
    expected, plain = gradient(lambda: torch.stack([one_by_one(model, row) for row in rows], 1))
    assert torch.allclose(logps, expected, atol=1e-4) and (packed - plain).norm() / plain.norm() < 1e-4


def test_weights_computed_again_give_the_same_gradients(monkeypatch):
    parts = [(60, 40, 50), (20, 10, 10), (0, 150, 70)]
    plan, g = A.attention_plan(parts, heads=2, window=30), torch.Generator().manual_seed(0)
    leaves = [torch.randn(heads, 410, 8, generator=g, requires_grad=True) for heads in (4, 2, 2)]
    def gradients():
        out, *kept = A._PackedAttention.apply(*leaves, plan, .3)
        return len(kept) - 3*len(plan.bias), torch.autograd.grad(out.pow(3).sum(), leaves)
    with_weights, expected = gradients()
    monkeypatch.setattr(A, 'KEEP_WEIGHTS', 0)
    without, found = gradients()
    assert with_weights > 0 == without and all(torch.equal(a, b) for a, b in zip(found, expected))


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 30)]*3).filter(any), min_size=1, max_size=4), st.none() | st.integers(1, 9),
       st.integers(2, 9))
def test_stripes_change_no_number(parts, window, threads):
    T = sum(map(sum, parts))
    leaves = [torch.randn(heads, T, 4, dtype=torch.float64, requires_grad=True) for heads in (6, 3, 3)]
    def outcome(threads):
        plan = A.attention_plan(parts, heads=3, window=window, dtype=torch.float64, threads=threads)
        out = A._PackedAttention.apply(*leaves, plan, .3)[0]
        return out, *torch.autograd.grad(out.pow(3).sum(), leaves)
    for plain, striped in zip(outcome(1), outcome(threads)): assert torch.allclose(plain, striped, atol=1e-10)


@pytest.mark.parametrize('window', [None, 2, 20])
def test_an_attention_agrees_with_the_blocks(kernel, window):
    assert attention_error(kernel, 4, 2, 16, window, backward=kernel == 'varlen') < 1e-5


def test_a_wrong_attention_shows(monkeypatch):
    def shortsighted(q, k, v, batch, scaling, *_): return attend_in_blocks(q, k, v, batch, scaling, window=2)
    monkeypatch.setitem(ATTENTIONS, 'flex', shortsighted)
    assert attention_error('flex', 4, 2, 16) > .1


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 9)]*3).filter(any), min_size=1, max_size=4), st.none() | st.integers(1, 9))
def test_plans_see_what_the_tree_mask_sees(parts, window):
    lengths = [sum(part) for part in parts]
    whole = torch.block_diag(*[tree_mask(*part, window=window) for part in parts]).bool()
    position = torch.cat([torch.tensor([*range(p + c), *range(p, p + r)]) for p, c, r in parts])
    batch = SimpleNamespace(parts=parts, position_ids=position)
    place = torch.arange(sum(lengths))
    assert torch.equal(block_mask(batch, window).mask_mod(0, 0, place[:, None], place), whole)
    plan = varlen_plan(parts)
    seen = torch.zeros_like(whole)
    for a, b, c, d in zip(plan.query_ends, plan.query_ends[1:], plan.key_ends, plan.key_ends[1:]):
        keys = plan.keys[c:d]
        for i in range(b - a):
            mine = keys[:len(keys) - (b - a) + i + 1]           # all but what follows
            seen[a + i, mine if window is None else mine[-window:]] = True
    assert torch.equal(seen, whole)


def on_a_gpu(dtype, **config):
    weight = SimpleNamespace(device=torch.device('cuda'), dtype=dtype)
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=16, **config)
    return SimpleNamespace(parameters=lambda: iter([weight]), config=SimpleNamespace(get_text_config=lambda: config))


def test_the_fastest_attention_that_is_right_is_taken(monkeypatch):
    assert find_attention(random_model('llama')) == ('blocks', None)
    found, tried = {'varlen': 1e-3, 'flex': 1e-3}, []
    def error(name, heads, key_heads, size, window, softcap, dtype, device):
        tried.append((name, window))
        if isinstance(found[name], Exception): raise found[name]
        return found[name]
    monkeypatch.setattr(A, 'attention_error', error)
    assert find_attention(on_a_gpu(torch.bfloat16)) == ('varlen', None) and tried == [('varlen', None)]
    assert find_attention(on_a_gpu(torch.bfloat16, attn_logit_softcapping=50.)) == ('flex', None)
    found['varlen'] = ImportError('no kernel\nand a long story')
    assert find_attention(on_a_gpu(torch.bfloat16)) == ('flex', 'varlen: ImportError: no kernel')
    assert find_attention(on_a_gpu(torch.float32))[0] == 'blocks'       # 1e-3 is not float32
    found['flex'] = .5
    kept, why = find_attention(on_a_gpu(torch.bfloat16, sliding_window=8))
    assert kept == 'blocks' and why == 'varlen: ImportError: no kernel; flex is off by 0.5' and ('flex', 20) in tried


def test_an_unknown_attention_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="unknown attention 'fast': choose one of varlen, flex, blocks"):
        use_shared_prompt_attention(random_model('llama'), 'fast')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('window', [None, 20])
def test_attention_on_a_gpu(dtype, window):
    for name in ('flex',) if dtype == torch.float32 else ('flex', 'varlen'):
        assert attention_error(name, 8, 4, 64, window, None, dtype, 'cuda') < A.CLOSE[dtype]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(1, 2**17))
def test_groups_hold_every_pair_once_and_waste_little(lengths, area):
    groups = groups_of(lengths, area)
    assert sorted(b for group in groups for b in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[b] for b in group)**2
        assert len(group) == 1 or padded <= min(area, GROUP_WASTE * sum(lengths[b]**2 for b in group))

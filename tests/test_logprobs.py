"Packed log-probs against plain padded transformers, across architectures."
import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import random_model, random_rows, shared
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_lab.logprobs as L
from dpo_lab.attention import ATTENTIONS, BLOCK
from dpo_lab.batches import PairRow, collate, encode_pairs, pack
from dpo_lab.data import load_pairs
from dpo_lab.logprobs import (AFTER_HEAD, LAYOUTS, TOKEN_LOGPS, at_least_float32, completion_confidence, completion_kl,
                              find_layout, padded_inputs, padded_logits, padded_token_logps, pair_logps, probe,
                              restore_attention, scored_log_softmax, shared_prompt_attention, token_entropy,
                              token_logps, use_layout)
from dpo_lab.models import add_lora
from dpo_lab.renderers import get_renderer
from dpo_lab.train import LAYOUT_NAMES

PACKED = ['llama', 'qwen2', 'qwen3', 'mistral', 'gemma2', 'gemma3', 'phi', 'olmo2', 'smollm3', 'gpt2', 'gpt_neox']


def one_by_one(model, row):
    "Log-probs of both completions from two plain forward passes without padding: `(2,)` nats."
    sums = []
    for tokens, scored in ((row.chosen, row.chosen_scored), (row.rejected, row.rejected_scored)):
        logits = model(torch.tensor([row.prompt + tokens])).logits[0]
        logp, p = logits.double().log_softmax(-1), len(row.prompt)
        read = [logp[p+j-1, t] for j, (t, s) in enumerate(zip(tokens, scored)) if s and p + j]
        sums.append(sum(read, torch.zeros((), dtype=torch.float64)))
    return torch.stack(sums).to(at_least_float32(logits).dtype)


@pytest.mark.parametrize('name', PACKED)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@torch.no_grad()
def test_packed_equals_plain(name, dtype, tolerance, monkeypatch):
    monkeypatch.setitem(BLOCK, 'cpu', 8)                    # so that these short pairs are several blocks
    model, rows = random_model(name, dtype), random_rows(16)
    plain = torch.stack([one_by_one(model, row) for row in rows], 1)
    packed = pair_logps(model, collate(rows))
    if name == 'gemma2': tolerance = 1e-4                   # its own attention takes the softmax in float32
    assert packed.dtype == dtype and (packed - plain).abs().max() < tolerance
    assert find_layout(model).startswith('packed')
    if (name, dtype) != ('gemma2', torch.float64):      # transformers' own padded Gemma 2 gives NaN in float64
        assert (pair_logps(model, collate(rows), layout='padded') - plain).abs().max() < tolerance


@pytest.mark.parametrize('block', [8, 128])
@pytest.mark.parametrize('name', ['llama', 'mistral', 'gemma2', 'gpt2'])    # shared keys, a window, squashed scores
def test_gradient_packed_equals_padded(name, block, monkeypatch):
    monkeypatch.setitem(BLOCK, 'cpu', block)
    model, batch, found = random_model(name), collate(random_rows(8)), []
    if name == 'gemma2': model.config.final_logit_softcapping = None    # else the head is its own
    weights = torch.linspace(-1, 1, 2*len(batch)).view(2, -1)
    for layout in ('packed', 'padded'):
        grads = torch.autograd.grad((pair_logps(model, batch, layout) * weights).sum(), list(model.parameters()))
        found.append(torch.cat([grad.flatten() for grad in grads]))
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


@pytest.mark.parametrize('products, tolerance', [('highest', 1e-4), ('medium', 3e-4)])
@torch.no_grad()
def test_packed_equals_plain_on_real_pairs(smollm2, products, tolerance):
    model, tokenizer = smollm2
    pairs, renderer = load_pairs(str(shared('preferences_en.jsonl'))), get_renderer('chat_template', tokenizer)
    rows = encode_pairs(pairs.train, renderer, max_length=160)
    rows = sorted(rows, key=lambda row: -min(map(sum, (row.chosen_scored, row.rejected_scored))))[:3]
    assert min(sum(row.chosen_scored) for row in rows) > 100
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        plain = torch.stack([one_by_one(model, row) for row in rows], 1)
        packed = pair_logps(model, collate(rows))
        padded = pair_logps(model, collate(rows), layout='padded')
    finally: torch.set_float32_matmul_precision(before)
    assert plain.abs().max() > 100
    assert (packed - plain).abs().max() < tolerance and (padded - plain).abs().max() < tolerance


@pytest.mark.parametrize('name', ['llama', 'gemma2', 'gpt2'])
def test_packed_gradient_equals_plain(name):
    model, rows = random_model(name), random_rows(6)
    def gradient(f):
        model.zero_grad()
        f().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    weights = torch.randn(2, 6)
    packed = gradient(lambda: (pair_logps(model, collate(rows)) * weights).sum())
    restore_attention(model)
    plain = gradient(lambda: sum((one_by_one(model, row) * weights[:, i]).sum() for i, row in enumerate(rows)))
    assert (packed - plain).norm() / plain.norm() < 1e-4


@torch.no_grad()
def test_packing_order_and_budget_change_nothing():
    model, rows = random_model('llama', torch.float64), random_rows(20)
    whole = pair_logps(model, collate(rows))
    for budget in (1, 60, 150):
        packed = torch.cat([pair_logps(model, b) for b in pack(rows, budget)], 1)
        assert torch.allclose(packed, whole, atol=1e-10)
    order = torch.randperm(20).tolist()
    assert torch.allclose(pair_logps(model, collate([rows[i] for i in order])), whole[:, order], atol=1e-10)


def test_a_model_that_cannot_be_packed_says_so_once_and_gives_the_same_numbers():
    model, rows = random_model('mamba'), random_rows(6)
    with pytest.warns(UserWarning, match='MambaForCausalLM runs on plain padded rows'):
        packed = pair_logps(model, collate(rows)).detach()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = pair_logps(model, collate(rows)).detach()
    with torch.no_grad(): plain = torch.stack([one_by_one(model, row) for row in rows], 1)
    assert torch.allclose(packed, plain, atol=1e-4) and torch.equal(packed, again)


@torch.no_grad()
def test_autocast_is_refused_in_one_sentence():
    model, batch = random_model('llama'), collate(random_rows(4))
    with torch.autocast('cpu', torch.bfloat16):
        with pytest.raises(ValueError, match="dtype='bfloat16'.*layout='padded'"): token_logps(model, batch)
        assert token_logps(model, batch, layout='padded').shape == batch.targets.shape
    assert find_layout(model) == 'packed_fused'


def test_a_wrong_attention_is_caught_by_the_probe(monkeypatch):
    import dpo_lab.attention as A
    def rejected_sees_chosen(p, c, r, window=None, device=None): return torch.ones(p+c+r, p+c+r).tril().bool()
    monkeypatch.setattr(A, 'tree_mask', rejected_sees_chosen)
    model = random_model('llama')
    with pytest.warns(UserWarning, match='log-probs differ by'): assert find_layout(model) == 'padded'


def test_padded_inputs_are_the_rows_and_each_place_predicts_its_token():
    rows = random_rows(12)
    batch, bools = collate(rows), []
    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ('index', 'index_put_', 'nonzero'): bools.append(args)
            return func(*args, **kwargs or {})
    with Masks(): ids, mask, places = padded_inputs(batch)
    sides = [row.prompt + side for row in rows for side in (row.chosen, row.rejected)]
    assert [row[:n].tolist() for row, n in zip(ids, mask.sum(1))] == sides and ids.shape[1] == max(map(len, sides))
    assert torch.equal(ids.flatten()[places + 1], batch.targets)
    assert torch.equal(places // ids.shape[1], 2*batch.pairs + batch.sides)
    assert len(bools) <= 2                      # not some for each pair: a GPU would be waited for at every one


@torch.no_grad()
def test_an_adapter_on_the_head_takes_part():
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(random_model('llama'), LoraConfig(r=4, target_modules=['q_proj', 'lm_head'])).eval()
    batch = collate(random_rows(6))
    assert find_layout(model) == 'packed_logits'                # B is zero yet: the numbers alone would not tell
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pair_logps(model, batch), pair_logps(model, batch, layout='padded'), atol=1e-3)
    with pytest.raises(TypeError, match="the head is a Linear.*layout='packed_logits'"):
        token_logps(model, batch, layout='packed')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_cap_that_small_logits_do_not_show_is_kept(dtype):
    model, batch = random_model('gemma2', dtype), collate(random_rows(6))
    assert find_layout(model) == 'packed_logits'
    model.lm_head.weight.mul_(1000)                             # now it bites
    packed, padded = pair_logps(model, batch), pair_logps(model, batch, layout='padded')
    model.config.final_logit_softcapping = None
    assert (packed - padded).abs().max() < .02 * (padded - pair_logps(model, batch, layout='padded')).abs().max()


@pytest.mark.parametrize('name', AFTER_HEAD)
def test_what_a_configuration_does_to_logits_is_not_left_out(name):
    model, batch = random_model('llama'), collate(random_rows(2))
    setattr(model.config, name, .5)
    assert find_layout(model) == 'packed_logits'
    with pytest.raises(TypeError, match=f'the logits go through {name}'): token_logps(model, batch, layout='packed')


@torch.no_grad()
def test_a_window_that_a_layer_has_and_does_not_pass_on_is_looked_through():
    model, rows = random_model('qwen2_moe'), random_rows(12)
    assert max(len(row.prompt + row.chosen) for row in rows) > 2*model.config.sliding_window
    packed = pair_logps(model, collate(rows))
    assert find_layout(model).startswith('packed')
    assert torch.allclose(packed, torch.stack([one_by_one(model, row) for row in rows], 1), atol=1e-4)


@torch.no_grad()
def test_a_window_that_no_layer_tells_of_is_not_packed():
    model, rows = random_model('phimoe'), random_rows(8)
    with pytest.warns(UserWarning, match='does not say whether it looks through'):
        logps = pair_logps(model, collate(rows))
    assert torch.allclose(logps, torch.stack([one_by_one(model, row) for row in rows], 1), atol=1e-4)


def test_what_attention_over_pairs_cannot_add_is_refused():
    batch, layer = collate(random_rows(2)), random_model('llama').model.layers[0].self_attn
    x = torch.randn(1, 4, len(batch.input_ids), 8)
    with pytest.raises(ValueError, match="LlamaAttention asks for s_aux.*layout='padded'"):
        shared_prompt_attention(layer, x, x, x, None, original='sdpa', pair_batch=batch, s_aux=torch.zeros(4))


@pytest.mark.parametrize('rope', [
    dict(rope_type='dynamic', factor=2., rope_theta=1e4),
    dict(rope_type='longrope', short_factor=[1.]*4, long_factor=[4.]*4, rope_theta=1e4,
         original_max_position_embeddings=20)], ids=['dynamic', 'longrope'])
@torch.no_grad()
def test_positions_that_depend_on_the_neighbours_are_refused(rope):
    from transformers import LlamaConfig, LlamaForCausalLM
    most = 20 if rope['rope_type'] == 'dynamic' else 80
    config = LlamaConfig(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                         num_attention_heads=4, initializer_range=.3, max_position_embeddings=most,
                         rope_parameters=rope)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    def row(n): return PairRow([1, 2, 3], [4]*n, [5]*n, [True]*n, [True]*n)
    short = pair_logps(model, collate([row(16)]))
    assert torch.allclose(short, one_by_one(model, row(16))[:, None], atol=1e-3)
    beside = padded_token_logps(model, collate([row(16), row(40)]))[:32]        # on plain rows too
    assert (beside - padded_token_logps(model, collate([row(16)]))).abs().max() > 1e-2
    with pytest.raises(ValueError, match='a side of 43 tokens: beyond 20 .* max_length=20'):
        pair_logps(model, collate([row(16), row(40)]))


def test_a_model_that_changes_is_probed_again(monkeypatch):
    probed = []
    monkeypatch.setattr(L, 'probe', lambda model: probed.append(model.dtype) or probe(model))
    monkeypatch.setattr(L, 'find_attention', lambda model: ('flex' if model.dtype == torch.float64 else 'blocks', None))
    model = random_model('llama')
    def attention(): find_layout(model); return model.config._attn_implementation.split('_')[2]
    assert [attention(), attention()] == ['blocks']*2 and len(probed) == 1
    model.double()
    assert [attention(), attention()] == ['flex']*2 and len(probed) == 2
    adapted = add_lora(model, 4)
    assert [attention(), attention()] == ['flex']*2 and len(probed) == 3
    find_layout(adapted)
    assert len(probed) == 3


def test_an_attention_that_fails_inside_a_model_gives_way_to_blocks(monkeypatch):
    def broken(*_): raise RuntimeError('no kernel image')
    monkeypatch.setitem(ATTENTIONS, 'flex', broken)
    monkeypatch.setattr(L, 'find_attention', lambda model: ('flex', None))
    model = random_model('llama')
    with pytest.warns(UserWarning, match="LlamaForCausalLM attends in 'blocks'.*no kernel image"):
        assert find_layout(model) == 'packed_fused'
    assert 'blocks' in model.config._attn_implementation


@torch.no_grad()
def test_generation_is_untouched_by_packed_attention():
    model = random_model('llama')
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    before = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    pair_logps(model, collate(random_rows(4)))
    assert model.config._attn_implementation.startswith('shared_prompt_')
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), before)
    restore_attention(model)
    assert model.config._attn_implementation == 'sdpa' and model not in LAYOUTS


def test_gradient_checkpointing_gives_the_same_gradient():
    model, batch = random_model('llama'), collate(random_rows(6))
    def gradient():
        model.zero_grad(); pair_logps(model, batch).sum().backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()
    plain = gradient()
    model.gradient_checkpointing_enable(); model.train()
    assert torch.allclose(gradient(), plain, atol=1e-5)


@torch.no_grad()
def test_confidence_and_kl_agree_with_their_definitions():
    model, other, batch = random_model('llama'), random_model('qwen2'), collate(random_rows(5, empty_prompts=False))
    p, q = scored_log_softmax(model, batch), scored_log_softmax(other, batch)
    assert torch.allclose(p.gather(1, batch.targets[:, None]).squeeze(1), token_logps(model, batch), atol=1e-5)
    first = (batch.pairs == 0) & (batch.sides == 0)
    kl = torch.nn.functional.kl_div(p[first], q[first], log_target=True, reduction='sum')
    assert completion_kl(model, lambda b: q, batch)[0, 0].item() == pytest.approx(kl.item(), rel=1e-4)
    confidence = (token_logps(model, batch)[first] - p[first].exp().square().sum(-1).log()).mean()
    assert completion_confidence(model, batch)[0, 0].item() == pytest.approx(confidence.item(), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@torch.no_grad()
def test_packed_equals_plain_on_a_gpu():
    model, rows = random_model('llama').cuda(), random_rows(16)
    batch = collate(rows).to('cuda')
    assert torch.allclose(pair_logps(model, batch), pair_logps(model, batch, layout='padded'), atol=1e-3)


@pytest.mark.parametrize('layout', ['packed_fused', 'padded'])
@torch.no_grad()
def test_entropy_and_likeliest_token(layout, monkeypatch):
    model, batch = random_model('llama'), collate(random_rows(6))
    find_layout(model)
    monkeypatch.setitem(LAYOUTS, model, (LAYOUTS[model][0], layout))
    nats, first = token_entropy(model, batch)
    logits = padded_logits(model, batch)
    wanted = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(nats, wanted.entropy(), atol=1e-4)
    assert torch.equal(first, (logits.argmax(-1) == batch.targets).float())


def test_no_layout_is_used_that_gives_other_numbers():
    model = random_model('llama')
    model.config.final_logit_softcapping = 30.
    use_layout(model, 'padded')
    assert find_layout(model) == 'padded'
    with pytest.raises(ValueError, match='layout=packed: .* would get other numbers'): use_layout(model, 'packed')


def test_the_command_line_knows_all_layouts(): assert LAYOUT_NAMES == (*TOKEN_LOGPS,)


@pytest.mark.skipif(sys.platform != 'linux', reason='large pages are asked of Linux')
@pytest.mark.parametrize('asked, large', [(None, True), ('0', False)])
def test_importing_the_package_asks_for_large_pages_unless_told_not_to(asked, large):
    code = 'import dpo_lab, torch; print(torch.empty(2**24, dtype=torch.uint8).data_ptr() % 4096)'   # where one begins
    env = {k: v for k, v in os.environ.items() if k != 'THP_MEM_ALLOC_ENABLE'}
    if asked is not None: env['THP_MEM_ALLOC_ENABLE'] = asked
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    assert (done.stdout.strip() == '0') == large


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='freed memory is kept by glibc')
@pytest.mark.parametrize('own', [{}, {'GLIBC_TUNABLES': ''}])
def test_freed_memory_is_kept_and_given_back_unless_the_environment_is_of_its_own_mind(own):
    code = '''if True:
        import os, torch
        from dpo_lab.logprobs import give_memory_back, keep_freed_memory
        def resident(): return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20
        print(keep_freed_memory())
        before = resident()
        some = [torch.ones(2**20) for _ in range(64)]       # 256 MB
        del some
        print(resident() - before)
        give_memory_back()
        print(resident() - before)'''
    env = {k: v for k, v in os.environ.items() if k not in L.OWN_MIND} | own
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    kept, freed, trimmed = done.stdout.split()
    assert kept == str(not own) and (float(freed) > 200) == (not own) and float(trimmed) < 100


def test_a_timed_product_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try: assert L.product_seconds(torch.float32) > 0 and torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)

"Fused layers against the model's own, across architectures, dtypes and adapters."
import weakref
from inspect import unwrap

import pytest
import torch
from conftest import random_model, random_rows
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_lab.batches import collate
from dpo_lab.fused import _with_rotary, fused_layers, fusible, rotary
from dpo_lab.logprobs import (
    TOKEN_LOGPS, find_layout, packed_inputs, places_read, scored_head, target_logps, tied_lookup,
)
from dpo_lab.models import add_lora

NORM_AND_MLP = ['llama', 'qwen2', 'qwen3', 'mistral', 'olmo2', 'smollm3']
OWN_WAY = ['gemma2', 'gemma3', 'phi', 'gpt_neox', 'gpt2']       # other norms, activations, biases


def kinds(model): return {type(module).__name__.removeprefix(type(model).__name__.split('For')[0])
                          for module, _ in fusible(model)}

def gradients(model, batch, layout):
    find_layout(model)
    model.zero_grad()
    tokens = TOKEN_LOGPS[layout](model, batch)
    (tokens * torch.linspace(-1, 1, len(tokens), dtype=tokens.dtype)).sum().backward()
    return tokens.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize('name', NORM_AND_MLP + OWN_WAY)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_fused_equals_plain_layers(name, dtype, tolerance):
    if (name, dtype) == ('gemma2', torch.float64): tolerance = 1e-6     # its own attention is float32 there
    model, batch = random_model(name, dtype), collate(random_rows(8))
    if name == 'gemma2': model.config.final_logit_softcapping = None    # else the head is its own
    (plain, plain_grad), (fused, fused_grad) = (gradients(model, batch, way) for way in ('packed', 'packed_fused'))
    assert (fused - plain).abs().max() < 10*tolerance
    assert (fused_grad - plain_grad).norm() < tolerance * plain_grad.norm()
    if dtype == torch.float32:      # in float64 Llama norms in float32, and ours does not
        expected = {'RMSNorm', 'MLP', 'Attention'} if name in NORM_AND_MLP else {'Attention'}
        assert kinds(model) == (expected if name != 'gpt2' else set())      # it has learned positions


def adapted(**kind):
    "A Llama with adapters that do something."
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(random_model('llama'), LoraConfig(r=4, lora_alpha=8, target_modules='all-linear', **kind))
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data.normal_(std=.1, generator=g)
    return model.eval()

@pytest.mark.parametrize('name', ['llama', 'qwen2'])            # without and with biases
def test_fused_equals_plain_layers_with_adapters(name):
    model, batch = add_lora(random_model(name), 4), collate(random_rows(8))
    for weight, p in model.named_parameters():
        if 'lora_B' in weight: torch.nn.init.normal_(p, std=.1)
    (plain, plain_grad), (fused, fused_grad) = (gradients(model, batch, way) for way in ('packed', 'packed_fused'))
    assert (fused - plain).abs().max() < 1e-4 and (fused_grad - plain_grad).norm() < 1e-5 * plain_grad.norm()
    assert all(p.grad is None for weight, p in model.named_parameters() if 'lora_' not in weight)
    assert 'Linear' in {type(module).__name__ for module, _ in fusible(model.get_base_model())}


def off_float32(exact, model):
    "Error of a model's gradient, plain and fused, relative to that of `exact`: root mean square over batches."
    off = []
    for seed in range(8):
        batch = collate(random_rows(8, seed))
        _, want = gradients(exact, batch, 'packed')
        found = [gradients(model, batch, way)[1].float() for way in ('packed', 'packed_fused')]
        off.append(torch.stack([(grad - want).norm() / want.norm() for grad in found]))
    return torch.stack(off).square().mean(0).sqrt().tolist()

def test_fused_adapters_in_bfloat16_are_near_to_float32():
    model = adapted()
    for name, p in model.named_parameters():
        if 'lora_' not in name: p.data = p.data.bfloat16()
    plain, fused = off_float32(adapted(), model)
    assert fused < 2 * plain and fused < .03       # the plain ones multiply thin weights in float32


def switched_off(model): model.base_model.disable_adapter_layers()
def merged(model): model.merge_adapter()
def two(model):
    model.add_adapter('more', model.peft_config['default'])
    model.base_model.set_adapter(['default', 'more'])
def unfrozen(model): model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_()

@pytest.mark.parametrize('kind, change', [
    ({}, switched_off), ({}, merged), ({}, two), ({}, unfrozen),
    (dict(use_dora=True), None), (dict(lora_bias=True), None), (dict(use_rslora=True), None)],
    ids=['off', 'merged', 'two', 'unfrozen', 'dora', 'bias', 'rslora'])
def test_adapters_that_are_not_plain_run_as_peft_runs_them(kind, change):
    model, batch = adapted(**kind), collate(random_rows(6))
    if change: change(model)
    find_layout(model)
    params = [p for p in model.parameters() if p.requires_grad]
    found = []
    for layout in ('packed', 'packed_fused'):
        tokens = TOKEN_LOGPS[layout](model, batch)
        grads = torch.autograd.grad(tokens.sum(), params, allow_unused=True) if tokens.requires_grad else []
        found.append((tokens, torch.cat([grad.flatten() for grad in grads if grad is not None] or [tokens])))
    for plain, fused in zip(*found): assert (plain - fused).norm() < 1e-4 * plain.norm()


def test_dropout_of_adapters_is_not_fused_away():
    model, batch = adapted(lora_dropout=.5), collate(random_rows(6))
    find_layout(model)
    model.train()
    with torch.no_grad(): first, second = (TOKEN_LOGPS['packed_fused'](model, batch) for _ in range(2))
    assert (first - second).abs().max() > 1e-4


def test_fused_layers_in_bfloat16_are_as_near_to_float32_as_plain_ones():
    plain, fused = off_float32(random_model('llama'), random_model('llama').bfloat16())
    assert fused < 1.2 * plain and fused < .01

def test_a_tied_table_in_bfloat16_is_as_near_to_float32_as_two_uses_apart():
    plain, fused = off_float32(random_model('smollm3'), random_model('smollm3').bfloat16())
    assert fused < 1.2 * plain and fused < .02


def test_a_bias_that_is_zero_now_is_not_lost():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, mlp_bias=True)
    model = LlamaForCausalLM(config)
    assert not model.model.layers[0].mlp.up_proj.bias.any() and kinds(model) == {'RMSNorm', 'Attention'}


def test_nothing_is_left_on_the_model_also_after_an_error():
    model = random_model('llama')
    before = torch.get_rng_state()
    assert len(fusible(model)) and torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ZeroDivisionError), fused_layers(model):
        assert 'forward' in vars(model.model.norm)
        raise ZeroDivisionError
    assert not any('forward' in vars(module) for module in model.modules())


def test_a_layer_that_somebody_changed_stays_as_it_is():
    model = random_model('llama')
    mine = model.model.norm.forward = lambda x: 2*x
    assert model.model.norm not in [module for module, _ in fusible(model)]
    with fused_layers(model): pass
    assert model.model.norm.forward is mine


def test_layers_that_come_later_are_found():
    model = random_model('llama')
    assert 'Linear' not in kinds(model)
    adapted = add_lora(model, 4)
    assert 'Linear' in kinds(model) and fusible(model) is fusible(model)
    adapted.unload()
    assert 'Linear' not in kinds(model)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.bfloat16, 3e-3)])
def test_rotary_turns_as_the_decoder_does(dtype, tolerance):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    g = torch.Generator().manual_seed(0)
    q, k, *more = (torch.randn(2, *shape, 8, generator=g, dtype=torch.float64).to(dtype)
                   for shape in ((4, 7), (2, 7), (7,), (7,), (4, 7), (2, 7)))
    def outcome(turn, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k)]
        cos, sin, *grads = (x.to(dtype) for x in more)
        out = turn(*leaves, cos, sin)
        return [*out, *torch.autograd.grad(out, leaves, grads)]
    for found, want in zip(outcome(rotary, dtype), outcome(apply_rotary_pos_emb, torch.float64)):
        assert (found - want).norm() < tolerance * want.norm()

def test_an_attention_that_turns_in_another_way_keeps_its_own(monkeypatch):
    from transformers.models.llama import modeling_llama
    model = random_model('llama')
    assert 'Attention' in kinds(model)
    forward = unwrap(modeling_llama.LlamaAttention.forward)
    def between(q, k, cos, sin): return q*cos + q.flip(-1)*sin, k*cos + k.flip(-1)*sin
    monkeypatch.setitem(forward.__globals__, 'apply_rotary_pos_emb', between)
    assert _with_rotary.__wrapped__(forward) is None


def test_the_last_mlp_runs_where_it_is_read():
    model, batch = random_model('llama'), collate(random_rows(8))
    find_layout(model)
    read = places_read(batch)
    @torch.no_grad()
    def states(*read):
        with fused_layers(model, *read): return model.model(**packed_inputs(batch)).last_hidden_state[0]
    off = (states(read) - states()).abs().amax(-1)
    unread = torch.ones(len(off), dtype=bool).index_fill(0, read, False)
    assert off[read].max() < 1e-5 and off[unread].min() > 1e-3 and 0 < len(read) < len(batch.predictors)


@pytest.mark.parametrize('walks, asked', [(1, ['table']), (2, ['table']), (1, ['deep', 'table']), (1, ['deep'])])
def test_a_tied_table_gets_the_gradient_of_both_uses(walks, asked):
    model, batch = random_model('smollm3'), collate(random_rows(8))     # has an ignored row, which the pairs hold
    table, found = model.get_input_embeddings(), []
    assert tied_lookup(model, batch.input_ids[None]) and (batch.input_ids == table.padding_idx).any()
    weights = {'table': table.weight, 'deep': model.model.layers[1].mlp.up_proj.weight}
    find_layout(model)
    for layout in ('packed', 'packed_fused'):
        total = TOKEN_LOGPS[layout](model, batch).sum()
        for _ in range(walks): grads = torch.autograd.grad(total, [weights[name] for name in asked], retain_graph=True)
        found.append(torch.cat([grad.flatten() for grad in grads]))
    assert (found[0] - found[1]).norm() < 1e-6 * found[0].norm()

def test_what_is_not_one_trained_table_is_left_to_autograd():
    def asked(change, name='smollm3'):
        model = random_model(name)
        change(model)
        return tied_lookup(model, torch.tensor([[1, 2]]))
    assert asked(lambda model: None) and not asked(lambda model: None, 'llama')
    assert not asked(lambda model: model.requires_grad_(False))
    assert not asked(lambda model: model.get_input_embeddings().register_forward_hook(lambda *parts: None))
    with torch.no_grad(): assert not asked(lambda model: None)


def test_checkpointed_layers_are_not_fused():
    model, batch = random_model('llama'), collate(random_rows(6))
    _, plain = gradients(model, batch, 'packed_fused')
    model.gradient_checkpointing_enable(); model.train()
    _, again = gradients(model, batch, 'packed_fused')
    assert torch.allclose(again, plain, atol=1e-5)


ON_A_GPU = pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU'))

@pytest.mark.parametrize('device', ['cpu', ON_A_GPU])
@pytest.mark.parametrize('keep_bytes', [0, 10**9])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_the_gradient_of_the_scored_head(dtype, tolerance, keep_bytes, device):
    g = torch.Generator().manual_seed(0)
    def draw(*shape): return torch.randn(*shape, generator=g).to(device, dtype).requires_grad_()
    h, W, b = draw(50, 16), draw(300, 16), draw(300)
    targets, weights = torch.randint(300, (50,), generator=g).to(device), torch.randn(50, generator=g).to(device)
    sure = h.detach()[:10] @ W.detach().T                     # tokens the model is sure of: 1 - p must not cancel
    targets[:10] = sure.argmax(-1)
    exact = [x.detach().double().requires_grad_() for x in (h, W, b)]
    want = target_logps(F.linear(*exact), targets)
    found = scored_head(h, W, targets, b, chunk=7, keep_bytes=keep_bytes)
    assert (found - want).abs().max() < 1e-4
    want_grads = torch.autograd.grad((want * weights).sum(), exact)
    loss = (found * weights).sum()
    for _ in range(2):                                        # a graph may be walked twice
        for got, expected in zip(torch.autograd.grad(loss, [h, W, b], retain_graph=True), want_grads):
            assert (got.double() - expected).norm() < tolerance * expected.norm()


class Rows(TorchDispatchMode):
    "How many matrices that had their largest entries taken were there at once."
    def __init__(self): super().__init__(); self.seen, self.most = [], 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == 'amax':
            self.seen.append(weakref.ref(args[0]))
            self.most = max(self.most, sum(seen() is not None for seen in self.seen))
        return func(*args, **kwargs or {})


def test_without_gradients_the_scored_head_keeps_one_chunk_at_a_time():
    h, W, targets = torch.randn(50, 16), torch.randn(300, 16, requires_grad=True), torch.randint(300, (50,))
    with Rows() as kept: scored_head(h, W, targets, chunk=5)
    with torch.no_grad(), Rows() as not_kept: scored_head(h, W, targets, chunk=5)
    assert kept.most == 10 and not_kept.most <= 2

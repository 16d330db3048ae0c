"Models: what is loaded, trained, saved and said is what was asked for."
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpo_lab.models import (TINY, describe_model, draw, find_device, find_source, generate_texts, load_policy,
                            named_weights, reference_mode, save_policy, tiny_model, weights_fingerprint)
from dpo_lab.renderers import get_renderer

QUESTIONS = ('Review the film.', 'What did you think of the restaurant?', 'Hi',
             'Tell me about the park, and take your time over it.')
ASKED = [[dict(role='user', content=text)] for text in QUESTIONS]


@pytest.fixture(scope='module')
def tiny(): return tiny_model()

@pytest.fixture(scope='module')
def renderer(tiny): return get_renderer('role_colon', tiny[1])

def logits(model, tokenizer):
    ids = torch.tensor([tokenizer.encode('User: Review the film.\n\nAssistant: The plot was dull.')])
    with torch.no_grad(): return model(input_ids=ids.to(model.device)).logits

def shake(model):
    "As if trained: every adapter says something."
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if 'lora_B.default' in name: torch.nn.init.normal_(weight, std=.05)


# What a name means

@pytest.mark.parametrize('name', ['./nowhere', 'a/b/c', 'missing.gguf'])
def test_a_name_that_points_nowhere_is_refused(name):
    with pytest.raises(FileNotFoundError, match='is not here'): load_policy(name)

def test_a_hub_model_that_cannot_be_reached_gives_one_sentence(tmp_path):
    code = ("from dpo_lab.models import load_policy\n"
            "try: load_policy('nobody/nothing')\nexcept FileNotFoundError as e: print(e)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                         env=os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path)))
    assert 'cannot read nobody/nothing' in out.stdout and out.stdout.count('\n') == 1, out.stdout + out.stderr

def test_a_folder_without_config_or_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='config.json'): find_source(tmp_path)
    (tmp_path/'config.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match='model.safetensors is missing'): find_source(tmp_path)

def test_pickles_are_refused_and_the_line_that_converts_them_works(tiny, tmp_path):
    model, tokenizer = tiny
    save_policy(model, tokenizer, tmp_path/'m')
    (tmp_path/'m'/'model.safetensors').unlink()
    torch.save(model.state_dict(), tmp_path/'m'/'pytorch_model.bin')
    with pytest.raises(ValueError, match='pickles only') as refusal: load_policy(str(tmp_path/'m'))
    line = re.search(r'python -c .*', str(refusal.value))[0]
    subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True)
    again, _ = load_policy(str(tmp_path/'m'), device='cpu')
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))

def test_missing_weights_are_refused_rather_than_invented(tiny, tmp_path):
    from safetensors.torch import load_file, save_file
    save_policy(*tiny, tmp_path/'m')
    weights = load_file(tmp_path/'m'/'model.safetensors')
    del weights['model.layers.1.mlp.up_proj.weight']
    save_file(weights, tmp_path/'m'/'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='lacks 1 weights'): load_policy(str(tmp_path/'m'))

def test_code_in_a_model_folder_does_not_run_unless_asked(tiny, tmp_path):
    save_policy(*tiny, tmp_path/'m')
    config = json.loads((tmp_path/'m'/'config.json').read_text())
    config |= dict(model_type='homemade', auto_map=dict(AutoConfig='code.C', AutoModelForCausalLM='code.M'))
    (tmp_path/'m'/'config.json').write_text(json.dumps(config))
    (tmp_path/'m'/'code.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w')")
    with pytest.raises(ValueError, match='trust_remote_code=True'): load_policy(str(tmp_path/'m'))
    assert not (tmp_path/'ran').exists()

def test_a_tokenizer_of_another_model_is_refused(tiny, tmp_path):
    small = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2))
    save_policy(small, tiny[1], tmp_path/'m')
    with pytest.raises(ValueError, match='do not belong together'): load_policy(str(tmp_path/'m'))

def test_a_tokenizer_without_end_token_is_said_aloud(tiny, tmp_path):
    model, tokenizer = tiny
    folder = save_policy(model, tokenizer, tmp_path/'m')
    said = json.loads((folder/'tokenizer_config.json').read_text())
    del said['eos_token']
    (folder/'tokenizer_config.json').write_text(json.dumps(said))
    with pytest.warns(UserWarning, match='no end token'): load_policy(str(folder))

@pytest.mark.parametrize('knobs, says', [(dict(dtype='float16'), 'float16'), (dict(dtype='int8'), 'choose float32'),
                                         (dict(device='tpu'), 'not here'), (dict(device='cuda:x'), 'not here'),
                                         (dict(lora_rank=-1), 'lora_rank'), (dict(lora_alpha=8), 'no effect')])
def test_an_impossible_choice_is_refused(knobs, says):
    with pytest.raises(ValueError, match=says): load_policy('tiny', **knobs)


# What is loaded

def test_the_tiny_model_is_small_whole_and_steady(tiny):
    model, tokenizer = tiny
    facts = describe_model(model, tokenizer)
    assert facts['parameters'] == facts['trainable'] < 1_000_000
    assert facts['reference'] == 'the same weights before training' and facts['end_token'] == tokenizer.eos_token
    assert not model.training and len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert sum(f.stat().st_size for f in Path(TINY).parent.rglob('*') if f.is_file()) < 8_000_000

def test_dropout_is_off_and_the_pad_row_learns(tmp_path, tiny):
    from transformers import GPT2Config, GPT2LMHeadModel
    save_policy(GPT2LMHeadModel(GPT2Config(vocab_size=480, n_embd=16, n_layer=1, n_head=2)), tiny[1], tmp_path/'gpt')
    model, _ = load_policy(str(tmp_path/'gpt'), device='cpu')
    ids = torch.arange(20)[None]
    assert torch.equal(model.train()(input_ids=ids).logits, model(input_ids=ids).logits)
    model, tokenizer = load_policy('tiny', device='cpu')
    hidden = model.get_input_embeddings()(torch.tensor([tokenizer.pad_token_id]))
    hidden.sum().backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.pad_token_id].abs().sum() > 0

def test_bfloat16_keeps_adapters_in_float32():
    model, _ = load_policy('tiny', dtype='bfloat16', device='cpu', lora_rank=2)
    kinds = {('lora' in name): weight.dtype for name, weight in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16} and describe_model(model)['dtype'] == 'bfloat16'

def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        model, tokenizer = load_policy('tiny', device='cpu', lora_rank=2, gradient_checkpointing=on)
        shake(model)
        ids = torch.tensor([tokenizer.encode('The plot was dull.')])
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*grads, atol=1e-7)


# Adapters

def test_adapters_sit_on_every_linear_layer_but_the_head_and_start_at_nothing(tiny):
    state = torch.random.get_rng_state()
    model, tokenizer = load_policy('tiny', device='cpu', lora_rank=32)
    assert torch.equal(torch.random.get_rng_state(), state)  # loading draws from a stream of its own
    names = {name.split('.lora_A')[0].split('.')[-1] for name, _ in model.named_parameters() if 'lora_A' in name}
    assert names == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}
    assert model.peft_config['default'].lora_alpha == 32
    assert torch.equal(logits(model, tokenizer), logits(tiny[0], tokenizer))
    assert all(('lora' in name) == weight.requires_grad for name, weight in model.named_parameters())

def test_fresh_adapters_warn_of_nothing_that_a_user_could_change(recwarn):
    load_policy('tiny', lora_rank=2, device='cpu')
    assert not [w for w in recwarn if w.category is FutureWarning]


def test_the_seed_decides_the_first_adapter_weights():
    prints = [weights_fingerprint(load_policy('tiny', device='cpu', lora_rank=2, seed=seed)[0]) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]

def test_reference_mode_is_the_model_before_training(tiny):
    model, tokenizer = load_policy('tiny', device='cpu', lora_rank=4)
    shake(model)
    trained = logits(model, tokenizer)
    with reference_mode(model):
        assert torch.equal(logits(model, tokenizer), logits(tiny[0], tokenizer))
        assert weights_fingerprint(model) == weights_fingerprint(tiny[0])
    assert torch.equal(logits(model, tokenizer), trained)
    with pytest.raises(ValueError, match='no adapters'), reference_mode(tiny[0]): pass

def test_going_on_from_an_adapter_keeps_it_as_the_reference(tmp_path):
    first, tokenizer = load_policy('tiny', device='cpu', lora_rank=4)
    shake(first)
    start = logits(first, tokenizer)
    folder = str(save_policy(first, tokenizer, tmp_path/'a'))
    model, _ = load_policy('tiny', device='cpu', lora_rank=4, load_checkpoint_path=folder)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable and all('.default.' in name for name in trainable)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.).zero_grad()
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None: p -= p.grad
    assert not torch.allclose(logits(model, tokenizer), start)
    with reference_mode(model):
        assert torch.equal(logits(model, tokenizer), start) and weights_fingerprint(model) == weights_fingerprint(first)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trainable
    saved = json.loads((save_policy(model, tokenizer, tmp_path/'b')/'adapter_config.json').read_text())
    assert saved['r'] == 4 and not (tmp_path/'b'/'reference').exists()
    assert describe_model(model)['trainable'] == describe_model(first)['trainable']
    folded, _ = load_policy(folder, device='cpu')  # an adapter names its base; rank 0 folds it in
    assert torch.allclose(logits(folded, tokenizer), start, atol=1e-4) and not hasattr(folded, 'peft_config')
    with pytest.raises(ValueError, match='lora_rank=4'): load_policy('tiny', lora_rank=8, load_checkpoint_path=folder)
    with pytest.raises(ValueError, match='already'): load_policy(folder, load_checkpoint_path=folder)

def test_a_checkpoint_with_weights_is_where_training_starts(tiny, tmp_path):
    model, tokenizer = load_policy('tiny', device='cpu')
    with torch.no_grad(): model.lm_head.weight.mul_(1.1)
    folder = save_policy(model, tokenizer, tmp_path/'m')
    again, _ = load_policy('tiny', device='cpu', load_checkpoint_path=str(folder))
    assert weights_fingerprint(again) == weights_fingerprint(model) != weights_fingerprint(tiny[0])
    with pytest.raises(FileNotFoundError, match='not a folder'): load_policy('tiny', load_checkpoint_path='owner/name')


# What is saved

def test_a_saved_policy_loads_in_plain_transformers_and_says_the_same(tiny, renderer, tmp_path):
    model, tokenizer = tiny
    folder = save_policy(model, tokenizer, tmp_path/'m')
    plain, its = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight  # tied weights stay tied
    assert (its.pad_token_id, its.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    ids = renderer.build_generation_prompt(ASKED[0])
    said = plain.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30)[0, len(ids):]
    assert said[-1] == its.eos_token_id  # and it ends by itself
    ours = generate_texts(model, tokenizer, renderer, ASKED[:1], max_new_tokens=30, temperature=0)
    assert ours == [(renderer.parse_response(said.tolist())[0], 'stop')]

def test_adapters_are_saved_as_adapters_or_folded_in_and_stay_as_they_were(tmp_path):
    model, tokenizer = load_policy('tiny', device='cpu', lora_rank=4)
    shake(model)
    before, print_before = logits(model, tokenizer), weights_fingerprint(model)
    wrapped = AutoModelForCausalLM.from_pretrained(save_policy(model, tokenizer, tmp_path/'a'))
    merged = AutoModelForCausalLM.from_pretrained(save_policy(model, tokenizer, tmp_path/'b', merge=True))
    assert torch.equal(logits(model, tokenizer), before) and weights_fingerprint(model) == print_before
    assert torch.allclose(logits(wrapped, tokenizer), before, atol=1e-5)
    assert torch.allclose(logits(merged, tokenizer), before, atol=1e-4)
    assert not list((tmp_path/'b').glob('adapter*'))
    plain = model.merge_and_unload(adapter_names=['default'])
    assert named_weights(plain).keys() == named_weights(merged).keys()
    for name, weight in named_weights(merged).items():
        assert torch.allclose(weight, named_weights(plain)[name], atol=1e-6), name

def test_saving_replaces_a_folder_whole(tiny, tmp_path):
    (tmp_path/'m').mkdir()
    (tmp_path/'m'/'stale.txt').write_text('x')
    save_policy(*tiny, tmp_path/'m')
    assert [f.name for f in tmp_path.iterdir()] == ['m'] and not (tmp_path/'m'/'stale.txt').exists()

def test_a_fingerprint_sees_names_dtypes_and_single_bits(tiny):
    model, _ = load_policy('tiny', device='cpu')
    assert weights_fingerprint(model) == weights_fingerprint(tiny[0])
    assert weights_fingerprint(load_policy('tiny', dtype='bfloat16', device='cpu')[0]) != weights_fingerprint(model)
    with torch.no_grad(): model.model.norm.weight[0] = torch.nextafter(model.model.norm.weight[0], torch.tensor(9.))
    assert weights_fingerprint(model) != weights_fingerprint(tiny[0])


# What is said

def test_a_batch_says_what_each_prompt_says_alone(tiny, renderer):
    model, tokenizer = tiny
    for knobs in (dict(temperature=0), dict(seed=3), dict(seed=3, top_p=.8, temperature=.7)):
        said = [generate_texts(model, tokenizer, renderer, ASKED, 20, batch_size=n, **knobs) for n in (4, 3)]
        assert said[0] == said[1]
    assert generate_texts(model, tokenizer, renderer, ASKED, 20, 0.) == [
        generate_texts(model, tokenizer, renderer, [ask], 20, 0.)[0] for ask in ASKED]

def test_chance_belongs_to_the_seed_and_to_nothing_else(tiny, renderer):
    model, tokenizer = tiny
    model.train()
    state = torch.random.get_rng_state()
    once = generate_texts(model, tokenizer, renderer, ASKED[:1]*8, max_new_tokens=20, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    model.eval()
    assert once == generate_texts(model, tokenizer, renderer, ASKED[:1]*8, max_new_tokens=20, seed=0)
    assert once != generate_texts(model, tokenizer, renderer, ASKED[:1]*8, max_new_tokens=20, seed=1)
    assert len({message['content'] for message, _ in once}) > 4  # the same prompt, draws of their own

def test_an_answer_says_how_it_ended(tiny, renderer):
    model, tokenizer = tiny
    message, how = generate_texts(model, tokenizer, renderer, ASKED[:1], max_new_tokens=30, temperature=0)[0]
    assert how == 'stop' and message['content'].endswith('.') and 'User:' not in message['content']
    cut, how = generate_texts(model, tokenizer, renderer, ASKED[:1], max_new_tokens=3, temperature=0)[0]
    assert how == 'length' and message['content'].startswith(cut['content'])

def test_generation_settings_of_the_model_do_not_leak_in(renderer):
    model, tokenizer = load_policy('tiny', device='cpu')
    plain = generate_texts(model, tokenizer, renderer, ASKED, max_new_tokens=20, temperature=0)
    model.generation_config.update(repetition_penalty=3., no_repeat_ngram_size=1, min_new_tokens=18)
    assert generate_texts(model, tokenizer, renderer, ASKED, max_new_tokens=20, temperature=0) == plain
    assert model.generation_config.repetition_penalty == 3.

def test_draws_follow_the_probabilities():
    scores, n = torch.tensor([.5, .3, .15, .05]).log(), 8000
    stream = torch.Generator().manual_seed(0)
    rows = draw(scores.repeat(n, 1), [stream]*n).argmax(-1)
    assert torch.allclose(rows.bincount(minlength=4)/n, scores.exp(), atol=.02)
    rows = draw(scores.repeat(n, 1), [stream]*n, top_p=.7).argmax(-1)  # the token that crosses .7 stays, the rest goes
    assert torch.allclose(rows.bincount(minlength=4)/n, torch.tensor([.625, .375, 0, 0]), atol=.02)
    rows = draw(scores.repeat(n, 1), [stream]*n, top_k=3).argmax(-1)
    assert torch.allclose(rows.bincount(minlength=4)/n, torch.tensor([.5, .3, .15, 0])/.95, atol=.02)

@pytest.mark.parametrize('knobs, says', [(dict(top_k=-1), 'top_k'),
    (dict(temperature=-1), 'temperature'), (dict(top_p=0), 'top_p'),
    (dict(max_new_tokens=0), 'max_new_tokens'), (dict(max_new_tokens=2048), '2048')])
def test_an_impossible_generation_is_refused(tiny, renderer, knobs, says):
    with pytest.raises(ValueError, match=says): generate_texts(*tiny, renderer, ASKED, **knobs)

def test_no_prompts_give_no_answers(tiny, renderer): assert generate_texts(*tiny, renderer, []) == []

def test_find_device_takes_what_is_there():
    assert find_device().type in ('cuda', 'mps', 'cpu') and find_device('cpu').type == 'cpu'


# A real model

def test_a_gguf_file_keeps_its_facts_and_answers(smollm2, tmp_path):
    model, tokenizer = smollm2
    assert abs(model.config.rms_norm_eps/1e-5 - 1) < 1e-6
    assert model.model.norm.variance_epsilon == model.config.rms_norm_eps
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    assert tokenizer.eos_token == '<|im_end|>' and tokenizer.pad_token_id == 2
    assert describe_model(model)['parameters'] == 134_515_008
    renderer = get_renderer('chatml', tokenizer)
    ask = [[dict(role='user', content='What is the capital of France? Answer in one word.')]]
    (message, how), = generate_texts(model, tokenizer, renderer, ask, max_new_tokens=20, temperature=0)
    assert 'Paris' in message['content'] and how == 'stop'
    folder = save_policy(model, tokenizer, tmp_path/'m')
    again, its = load_policy(str(folder), device='cpu')
    assert weights_fingerprint(again) == weights_fingerprint(model)
    again_said = generate_texts(again, its, get_renderer('chatml', its), ask, max_new_tokens=20, temperature=0)
    assert again_said == [(message, how)]

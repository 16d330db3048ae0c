"The experiment and its command: run folders, resuming, interrupting, and mistakes answered before work."
import json
import math
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dpo_lab.runs import Run
from dpo_lab.train import LAYOUT_NAMES, Config, follow, load_model, main, run_dpo
from dpo_lab.training import StepMetrics

ROOT = Path(__file__).parent.parent


def quiet(line): pass


def weights(folder):
    "All final weights of a run, in one row."
    saved = load_file(folder/'final'/'model.safetensors')
    return torch.cat([saved[name].flatten() for name in sorted(saved)])


def short(path, **more): return Config(log_path=str(path), **(dict(max_steps=6, eval_every=3, save_every=2) | more))


def command(*words, **kwargs):
    return subprocess.Popen([sys.executable, '-m', 'dpo_lab.train', *words], cwd=ROOT, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A short run that nothing disturbed."
    path = tmp_path_factory.mktemp('whole')/'run'
    for _ in run_dpo(short(path), quiet): pass
    return Run(path)


def test_a_run_folder_holds_what_it_should(whole):
    m = whole.metrics
    assert m.step.tolist() == list(range(7)) and m.columns[0] == 'step'
    assert m.dpo_loss[0] == pytest.approx(math.log(2), abs=1e-5) and m.margin[0] == pytest.approx(0, abs=1e-5)
    assert m['test/accuracy'].notna().tolist() == [True, False, False, True, False, False, True]
    names = ('accuracy chosen_reward rejected_reward num_pairs num_tokens learning_rate progress batch_time grad_norm '
             'kl test/nll test/margin test/dpo_loss test/chosen_nll test/rejected_nll')
    assert {*names.split()} <= {*m.columns}
    assert [c['step'] for c in whole.checkpoints] == [4, 6]
    assert {'versions', 'git', 'dataset_fingerprint', 'reference_fingerprint', 'dpo_beta'} <= whole.config.keys()
    train = whole.pairs.query("split == 'train'")
    assert (train.groupby('step').size() == 16).all() and whole.audit['train_rows'] == {}
    assert set(whole.samples.step) == {0, 6}
    assert whole.events.event.tolist() == ['started', 'finished']


def test_metrics_open_to_their_pairs(whole):
    step = whole.pairs.query("split == 'train' and step == 3")
    margins = .1*(step.chosen_logratio - step.rejected_logratio)
    assert whole.metrics.margin[3] == pytest.approx(margins.mean(), abs=1e-5)


def test_the_saved_model_loads_in_plain_transformers_and_speaks(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (cls.from_pretrained(whole.path/'final') for cls in (AutoModelForCausalLM, AutoTokenizer))
    inputs = tokenizer('User: How was the cafe?\n\nAssistant:', return_tensors='pt', add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1]:]
    assert tokenizer.decode(ids).startswith(' The ')


def test_left_early_and_resumed_equals_undisturbed(whole, tmp_path):
    for metrics in run_dpo(short(tmp_path/'run'), quiet):
        if metrics.step == 5: break
    assert not (tmp_path/'run'/'final').exists()
    resumed = run_dpo(short(tmp_path/'run', behavior_if_log_dir_exists='resume'), quiet)
    assert resumed.start == 4 and [m.step for m in resumed] == [4, 5, 6]
    assert torch.equal(weights(tmp_path/'run'), weights(whole.path))
    again, first = resumed.run.metrics, whole.metrics
    assert again.step.tolist() == first.step.tolist() and (again.dpo_loss.dropna() == first.dpo_loss.dropna()).all()
    assert len(resumed.run.pairs) == len(whole.pairs)


def test_killed_in_the_middle_and_resumed_equals_undisturbed(whole, tmp_path):
    process = command(f'log_path={tmp_path}/run', 'max_steps=6', 'eval_every=3', 'save_every=2')
    wait_for(tmp_path/'run'/'checkpoints'/'000002', process)
    process.kill(); process.communicate()
    with open(tmp_path/'run'/'metrics.jsonl', 'a') as f: f.write('{"step": 99, "dpo')   # half a line
    for _ in run_dpo(short(tmp_path/'run', behavior_if_log_dir_exists='resume'), quiet): pass
    assert torch.equal(weights(tmp_path/'run'), weights(whole.path))
    assert Run(tmp_path/'run').metrics.step.tolist() == list(range(7))


def wait_for(path, process, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(.05)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_continue(tmp_path):
    process = command(f'log_path={tmp_path}/run', 'max_steps=2000', 'num_epochs=100', 'eval_every=0', 'save_every=0')
    wait_for(tmp_path/'run'/'metrics.jsonl', process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    run = Run(tmp_path/'run')
    assert process.returncode == 130, err
    assert 'stopping after this step' in out and f'log_path={tmp_path}/run behavior_if_log_dir_exists=resume' in out
    assert run.checkpoints[-1]['step'] == run.metrics.step.max()
    assert run.events.event.tolist() == ['started', 'interrupted']


def interrupt_next_step(monkeypatch):
    "Ctrl-C in the middle of the next gradient."
    import dpo_lab.training as T
    clip = torch.nn.utils.clip_grad_norm_
    def interrupted(*args):
        monkeypatch.setattr(T.nn.utils, 'clip_grad_norm_', clip)
        os.kill(os.getpid(), signal.SIGINT)
        return clip(*args)
    monkeypatch.setattr(T.nn.utils, 'clip_grad_norm_', interrupted)


def test_a_run_interrupted_in_a_loop_goes_on_in_the_next(tmp_path, monkeypatch):
    run, steps = run_dpo(short(tmp_path/'run', eval_every=0), quiet), []
    with pytest.raises(KeyboardInterrupt):
        for metrics in run:
            steps.append(metrics.step)
            if metrics.step == 2: interrupt_next_step(monkeypatch)
    steps += [metrics.step for metrics in run]
    assert steps == list(range(7))


def test_a_run_that_was_stopped_by_max_steps_can_be_extended(tmp_path):
    for _ in run_dpo(short(tmp_path/'run', max_steps=3), quiet): pass
    said = []
    config = Config(log_path=str(tmp_path/'run'), max_steps=5, behavior_if_log_dir_exists='resume')
    longer = run_dpo(config, said.append)
    assert [m.step for m in longer] == [3, 4, 5] and 'changed    max_steps: 3 -> 5' in said
    assert longer.run.config['eval_every'] == 3                # what was not given again is as the run began
    assert longer.run.metrics.step.tolist() == list(range(6))


def test_a_run_runs_inside_an_event_loop(tmp_path):
    import asyncio
    async def cell(): return [m.step for m in run_dpo(short(tmp_path/'run', max_steps=2), quiet)]
    assert asyncio.run(cell()) == [0, 1, 2]


@pytest.mark.parametrize('loss', [
    'tdpo2', 'beta_dpo', 'bco_pair', 'aot', 'sigmoid(ld_alpha=0.5)', 'sigmoid(wpo=true)', 'sigmoid(f_divergence=js)',
    'sigmoid(length_normalized=true)', 'simpo(gamma=0.5)', 'sigmoid + 0.2*sft', 'test_train:squared'])
def test_losses_and_their_knobs_work_from_the_command_line(loss, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main([f'log_path={tmp_path}/run', f'loss={loss}', 'max_steps=2', 'eval_every=0', 'token_budget=200']) == 0
    metrics = Run(tmp_path/'run').metrics
    assert metrics.dpo_loss.dropna().map(math.isfinite).all() and len(metrics) == 3


def squared(logps, beta=.1): return (beta*logps.delta - 1)**2      # somebody's own loss


def test_a_moving_reference_is_remembered_by_its_checkpoint(tmp_path):
    config = dict(reference_refresh_every=2, reference_refresh_mix=1., learning_rate=1e-3, max_steps=5, eval_every=1,
                  save_every=3)
    for _ in run_dpo(short(tmp_path/'a', **config), quiet): pass
    for metrics in run_dpo(short(tmp_path/'b', **config), quiet):
        if metrics.step == 4: break
    for _ in run_dpo(short(tmp_path/'b', **config, behavior_if_log_dir_exists='resume'), quiet): pass
    a, b = Run(tmp_path/'a'), Run(tmp_path/'b')
    assert torch.equal(weights(a.path), weights(b.path)) and (a.metrics['test/kl'] == b.metrics['test/kl']).all()
    kl = a.metrics['test/kl']
    assert kl[3] < kl[2]                # after step 2 the policy stood where its reference stands


def test_beta_moves_along_a_line_when_asked(tmp_path):
    steps = list(run_dpo(short(tmp_path/'run', dpo_beta=.1, beta_end=.5, eval_every=0, max_steps=4), quiet))
    assert [s['beta'] for s in steps[:4]] == pytest.approx([.1, .2, .3, .4])


def test_another_reference_is_honoured(tmp_path, whole):
    config = short(tmp_path/'run', reference_model_name=str(whole.path/'final'), max_steps=2, eval_every=0)
    steps = list(run_dpo(config, quiet))
    assert steps[0]['dpo_loss'] != pytest.approx(math.log(2), abs=1e-4) and abs(steps[0]['margin']) > 1e-4
    assert Run(tmp_path/'run').config['reference'] == str(whole.path/'final')


def test_starting_from_a_checkpoint_makes_it_the_reference(tmp_path, whole):
    config = short(tmp_path/'run', load_checkpoint_path=str(whole.path/'final'), max_steps=2, eval_every=0)
    steps = list(run_dpo(config, quiet))
    assert steps[0]['dpo_loss'] == pytest.approx(math.log(2), abs=1e-5)
    assert Run(tmp_path/'run').config['reference_fingerprint'] != whole.config['reference_fingerprint']


def test_adapters_train_alone_share_the_reference_and_are_merged_at_the_end(tmp_path, whole):
    for _ in run_dpo(short(tmp_path/'run', lora_rank=4, learning_rate=1e-3), quiet): pass
    run = Run(tmp_path/'run')
    assert run.config['reference_fingerprint'] == whole.config['reference_fingerprint']
    assert (run.path/'adapter'/'adapter_model.safetensors').exists()
    assert not torch.equal(weights(run.path), weights(whole.path))
    assert run.metrics.dpo_loss[0] == pytest.approx(math.log(2), abs=1e-5)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip('tensorboard', reason='the tracker extra is not installed')
    for _ in run_dpo(short(tmp_path/'run', tracker='tensorboard', max_steps=2), quiet): pass
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path/'run'/'tensorboard')).Reload()
    assert [e.step for e in events.Scalars('dpo_loss')] == [0, 1]


def test_a_tracker_is_finished_with_its_run_and_opened_again_if_that_goes_on(tmp_path, monkeypatch, trackio):
    run = run_dpo(short(tmp_path/'run', tracker='trackio', eval_every=0), quiet)
    interrupt_next_step(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        for _ in run: pass
    assert [(told.steps, told.open) for told in trackio] == [([0], False)]
    for _ in run: pass
    assert [(told.steps, told.open) for told in trackio] == [([0], False), ([1, 2, 3, 4, 5, 6], False)]


MISTAKES = {
    'learning_rat=1e-5': "Did you mean 'learning_rate'",
    'dpo_beta=0': 'dpo_beta=0.0: must be above 0',
    'loss=sigmoyd': "Did you mean 'sigmoid'",
    'loss=hinge label_smoothing=0.1': 'label_smoothing',
    'dataset=hhhh': "Did you mean 'hhh'",
    'renderer_name=role_colom': 'role_colon',
    'lr_schedule=cosin': "Did you mean 'cosine'",
    'batch_size=100000': '800 training pairs are fewer than one batch of 100000',
    'layout=pcaked': 'layout=pcaked: choose one of packed_fused',
    'max_length=3': 'leaves none of 800 pairs',
    'model_name=nowhere/at-all': 'nowhere/at-all',
    'dataset=nothing.jsonl': 'nothing.jsonl',
    'log_path=/proc/run': 'cannot write there',
    'loss=simpo reference_model_name=tiny': 'it compares with no reference',
    'device=cudaa': 'cudaa',
    'tracker=tensorbord': "Did you mean 'tensorboard'",
    'nonsense': 'key=value',
}


@pytest.mark.parametrize('words', MISTAKES)
def test_a_mistake_is_one_plain_sentence_before_any_work(words, tmp_path, capsys):
    where = [] if 'log_path' in words else [f'log_path={tmp_path}/run']
    assert main([*where, *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and MISTAKES[words] in err and 'Traceback' not in err
    assert not (tmp_path/'run'/'metrics.jsonl').exists()


@pytest.mark.parametrize('layout', LAYOUT_NAMES)
def test_every_layout_trains_the_same(whole, tmp_path, layout):
    for _ in run_dpo(short(tmp_path/layout, layout=layout), quiet): pass
    run = Run(tmp_path/layout)
    assert layout in run.config['reference_fingerprint']
    for metric in ('dpo_loss', 'grad_norm', 'test/margin'):
        assert (run.metrics[metric] - whole.metrics[metric]).abs().max() < 1e-3


def test_an_existing_run_is_not_overwritten(whole, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: False)
    assert main([f'log_path={whole.path}']) == 2
    assert 'behavior_if_log_dir_exists=resume' in capsys.readouterr().err and (whole.path/'final').exists()


def test_a_folder_of_something_else_is_never_deleted(tmp_path, capsys):
    (tmp_path/'thesis.tex').write_text('precious')
    assert main([f'log_path={tmp_path}', 'behavior_if_log_dir_exists=delete']) == 2
    assert (tmp_path/'thesis.tex').read_text() == 'precious'


def test_resuming_with_another_model_size_says_what_differs(whole, capsys):
    assert main([f'log_path={whole.path}', 'behavior_if_log_dir_exists=resume', 'lora_rank=8']) == 2
    assert 'lora_rank (was 0, now 8)' in capsys.readouterr().err


def test_help_is_quick_and_goes_to_the_screen():
    start = time.monotonic()
    out, _ = command('--help').communicate()
    assert 'dpo_beta' in out and 'pull towards the reference' in out
    assert time.monotonic() - start < 30            # a hang, not a benchmark


def test_the_installed_command_knows_its_commands(capsys):
    from dpo_lab.train import cli
    assert cli([]) == 0 and 'train' in capsys.readouterr().out
    assert cli(['trian']) == 2 and "Did you mean 'train'" in capsys.readouterr().err


def test_the_installed_command_finds_a_loss_of_ones_own_where_one_is(tmp_path):
    script = Path(sys.executable).with_name('dpo_lab')
    if not script.exists(): pytest.skip('the command dpo_lab is not installed: pip install -e .')
    (tmp_path/'mine.py').write_text('def square(logps, beta=.1): return (beta*logps.delta - 1)**2\n')
    done = subprocess.run([script, 'train', 'loss=mine:square', 'log_path=run', 'max_steps=1', 'eval_every=0'],
                          cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path/'run').metrics.dpo_loss[0] == pytest.approx(1)


def test_without_held_out_pairs_nothing_is_evaluated_or_answered(tmp_path):
    rows = [dict(prompt=f'{i}?', chosen='Yes.', rejected='No.') for i in range(8)]
    (tmp_path/'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    said = []
    run = run_dpo(short(tmp_path/'run', dataset=f'{tmp_path}/pairs.jsonl(test_fraction=0)', batch_size=4, max_steps=2),
                  said.append)
    for _ in run: pass
    assert any('nothing is held out' in str(line) for line in said)
    assert not [name for name in run.run.metrics if name.startswith('test/')] and not len(run.run.samples)


SMOLLM2 = os.environ.get('DPO_LAB_SMOLLM2')


@pytest.mark.skipif(not SMOLLM2, reason='DPO_LAB_SMOLLM2 does not name the GGUF file of SmolLM2-135M-Instruct')
def test_a_real_model_learns_a_few_real_pairs(tmp_path):
    def said(role, text): return [dict(role=role, content=text)]
    pairs = [dict(prompt=said('user', q), chosen=said('assistant', a), rejected=said('assistant', b)) for q, a, b in [
        ('Name a colour.', 'Blue.', 'Tuesday.'), ('What is two plus two?', 'Four.', 'A bird.'),
        ('Name an animal.', 'A horse.', 'Seven.'), ('Where is Paris?', 'In France.', 'Under the table.')]]
    (tmp_path/'pairs.jsonl').write_text(''.join(json.dumps(p) + '\n' for p in pairs*2))
    config = Config(log_path=str(tmp_path/'run'), model_name=SMOLLM2, dataset=f'{tmp_path}/pairs.jsonl', batch_size=4,
                    lora_rank=8, learning_rate=1e-3, num_epochs=2, eval_every=0, renderer_name='chat_template')
    steps = list(run_dpo(config, quiet))
    assert steps[0]['dpo_loss'] == pytest.approx(math.log(2), abs=1e-4) and steps[3]['dpo_loss'] < .6


def test_every_room_that_is_a_command_is_one_of_dpo_lab(capsys):
    from dpo_lab.train import cli
    rooms = {p.stem for p in (ROOT/'dpo_lab').glob('*.py') if 'sys.exit(main())' in p.read_text()}
    assert cli(['--help']) == 0
    shown = capsys.readouterr().out.split('commands: ')[1].split()
    assert rooms <= {name.strip(',') for name in shown} and 'search' in rooms


@pytest.mark.parametrize('slip, told', [(dict(dataset='pears.jsonl'), "no file or folder 'pears.jsonl'"),
                                        (dict(dataset='hhh', dataset_path='pears'), "no file or folder 'pears'"),
                                        (dict(dataset='helpster3'), 'helpsteer3')])
def test_a_misspelt_data_set_is_told_before_a_model_is_loaded(slip, told, tmp_path, monkeypatch):
    monkeypatch.setattr('dpo_lab.models.load_policy', lambda *words: pytest.fail('a model was loaded'))
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        [*run_dpo(Config(log_path=f'{tmp_path}/run', **slip))]


@pytest.mark.parametrize('dtype, times, told', [
    ('bfloat16', 50., True), ('bfloat16', .5, False), ('float32', 50., False)])
def test_a_dtype_that_the_cpu_is_slow_in_is_told(tmp_path, monkeypatch, dtype, times, told):
    monkeypatch.setattr('dpo_lab.logprobs.product_seconds', {torch.bfloat16: times, torch.float32: 1.}.get)
    config, lines = short(tmp_path, model_name='tiny', dtype=dtype, device='cpu'), []
    load_model(SimpleNamespace(config=config, say=lines.append, path=tmp_path))
    said = [line.partition(' ones')[0] for line in lines if line.startswith('dtype')]
    assert said == ['dtype      bfloat16 products take 50 times as long here as float32']*told


class Steps:
    "Two steps, as `follow` knows an experiment; held-out pairs are measured at the first."
    start, total, say = 0, 1, staticmethod(quiet)
    def __iter__(self):
        yield StepMetrics(0, {'test/nll': .5, 'test/nll_low': .4, 'test/nll_high': .6, 'dpo_loss': .7})
        yield StepMetrics(1, {'dpo_loss': .6})


def test_the_table_says_when_an_older_number_was_measured():
    screen = StringIO()
    follow(Steps(), Console(file=screen, width=80), every=0.)
    rows = [line.split('│')[1:3] for line in screen.getvalue().splitlines() if '│' in line]
    def table(loss, then): return [('dpo_loss', loss), ('test/nll', f'0.5  [0.4, 0.6]{then}')]
    assert [tuple(map(str.strip, row)) for row in rows] == table('0.7', '') + table('0.6', '  (step 0)')

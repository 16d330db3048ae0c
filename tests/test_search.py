"Searches: what is asked, what is pruned, what a kill leaves, the command."
import os
import signal
import subprocess
import sys
import time

import pytest

import dpo_lab.data
from dpo_lab.runs import Run
from dpo_lab.search import main, open_study, parse_search, run_search, search, spaces
from dpo_lab.train import Config

optuna = pytest.importorskip('optuna', reason='optuna is not installed')
RANGE = dict(learning_rate=(1e-6, 1e-3))


def short(path, **more):
    return Config(log_path=str(path), **(dict(max_steps=6, eval_every=2, infrequent_eval_every=0, save_every=1) | more))


def test_halving_stops_what_falls_behind_and_the_rows_say_so(tmp_path, trackio):
    config = short(tmp_path/'s', tracker='trackio')
    found = search(config, trials=6, metric='margin', sampler='random', **RANGE)
    t = found.table
    assert len(t) == 6 and {*t.status} == {'finished', 'pruned'}
    assert len(trackio) == 6 and not any(told.open for told in trackio)
    for row in t.to_dict('records'):
        run = Run(row['path'])
        assert ('pruned' in [*run.events.event]) == (row['status'] == 'pruned')
        assert run.metrics['test/margin'].dropna().iloc[-1] == pytest.approx(row['test/margin'])
        assert row['step'] == (6 if row['status'] == 'finished' else 2)
    best = t[t.status == 'finished']['test/margin'].max()
    rate = found.study.best_params['learning_rate']
    assert found.study.best_value == best and f'learning_rate={rate}' in found.command
    again = search(config, trials=7, metric='margin', sampler='random', **RANGE).table      # one more, and another
    assert len(again) == 7 and again.learning_rate.nunique() == 7 and again[:6].equals(t)


def test_a_failed_trial_is_a_row_with_its_error(tmp_path):
    config = short(tmp_path/'s', max_steps=2)
    t = search(config, trials=6, sampler=optuna.samplers.RandomSampler(seed=0), pruner='none',
               learning_rate=[1e-4, 1e30]).table
    assert len(t) == 6 and t.learning_rate.nunique() == 2
    failed = t[t.learning_rate == 1e30]
    assert {*failed.status} == {'failed'} and failed.error.str.contains('FloatingPointError').all()
    assert {*t[t.learning_rate == 1e-4].status} == {'finished'}


def test_a_second_search_reads_its_pairs_again(tmp_path, monkeypatch):
    read, load = [], dpo_lab.data.load_pairs
    monkeypatch.setattr(dpo_lab.data, 'load_pairs', lambda *args, **more: read.append(args) or load(*args, **more))
    for name in 'ab': search(short(tmp_path/name, max_steps=1), trials=1, pruner='none', dpo_beta=[.1])
    assert len(read) == 2


def begun(tmp_path, *, output):
    "A search in a process of its own, three steps into its first trial."
    words = [f'log_path={tmp_path}/s', 'trials=2', 'pruner=none', 'learning_rate=1e-5..1e-3', 'max_steps=40',
             'eval_every=20', 'infrequent_eval_every=0', 'save_every=1']
    process = subprocess.Popen([sys.executable, '-m', 'dpo_lab.search', *words], stdout=output, text=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    deadline = time.monotonic() + 120
    while not [*tmp_path.glob('s/*/checkpoints/000003')]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.02)
    return process


def test_a_killed_search_continues_the_trial_it_was_at(tmp_path):
    process = begun(tmp_path, output=subprocess.DEVNULL)
    with pytest.raises(FileExistsError, match='another process is training here'):
        search(short(tmp_path/'s', max_steps=40, eval_every=20), trials=2, pruner='none', learning_rate=(1e-5, 1e-3))
    process.send_signal(signal.SIGKILL); process.wait()
    first = next(tmp_path.glob('s/learning_rate=*'))
    config = short(tmp_path/'s', max_steps=40, eval_every=20)
    t = search(config, trials=2, pruner='none', learning_rate=(1e-5, 1e-3)).table
    assert t.status.tolist() == ['finished']*2 and t.path[0] == str(first)
    assert [*Run(first).events.event] == ['started', 'resumed', 'finished']


def test_ctrl_c_says_how_to_continue(tmp_path):
    process = begun(tmp_path, output=subprocess.PIPE)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    command = said.splitlines()[-1].split()
    assert command[:4] == ['python', '-m', 'dpo_lab.search', f'log_path={tmp_path}/s'] and 'trials=2' in command
    assert main(command[3:]) == 0
    assert sorted(path.name for path in tmp_path.glob('s/learning_rate=*')) == sorted(
        {f'learning_rate={t.params["learning_rate"]}' for t in open_study(tmp_path/'s', 'accuracy').trials})
    assert len([*tmp_path.glob('s/learning_rate=*')]) == 2


def test_a_dry_run_says_what_is_searched_and_leaves_nothing(tmp_path, capsys):
    words = [f'log_path={tmp_path}/s', 'dry_run=true', 'trials=7', 'learning_rate=1e-6..1e-2', 'dpo_beta=0.05,0.1']
    assert main(words) == 0
    said = {line[:22].strip(): line[23:] for line in capsys.readouterr().out.splitlines()}
    assert said['learning_rate'] == '1e-06 .. 0.01, log' and said['dpo_beta'] == '0.05, 0.1'
    assert '7 to go' in said['trials'] and {'time', 'disk', 'measured'} <= {*said} and not (tmp_path/'s').exists()


def test_ranges_and_choices():
    asked, axes = parse_search(['learning_rate=1e-6..1e-2', 'dpo_beta=0.05,0.1', 'trials=3'])
    found = spaces(axes)
    assert asked.trials == 3 and found['dpo_beta'].choices == (.05, .1)
    assert (found['learning_rate'].low, found['learning_rate'].high, found['learning_rate'].log) == (1e-6, 1e-2, True)


MISTAKES = {
    'dpo_bta=0.1,0.2': "Did you mean 'dpo_beta'", 'learning_rate=1e-2..1e-4': 'low < high', 'seed=1..9': 'give a list',
    'trials=3': 'nothing varies', 'dpo_beta=0.1,0.2 trials=0': 'at least 1', 'dpo_beta=0.1,0.2 eval_every=0': 'pruner',
    'dpo_beta=0.1,0.2 metric=luck': 'choose one of', 'dpo_beta=0.1,0.2 sampler=tpu': 'choose one of',
    'dpo_beta=0.1,0.2 pruner=axe': 'choose one of', 'dpo_beta=0.1,-1 trials=2': 'must be above 0',
}


@pytest.mark.parametrize('words', MISTAKES)
def test_a_mistake_is_one_sentence_before_any_work(words, tmp_path, capsys):
    assert main([f'log_path={tmp_path}/s', *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and MISTAKES[words] in err and not (tmp_path/'s').exists()


def test_the_command_prints_a_line_for_each_trial_and_the_winner(tmp_path, capsys):
    assert main([f'log_path={tmp_path}/s', 'trials=2', 'learning_rate=1e-5..1e-3', 'max_steps=2', 'eval_every=1']) == 0
    out = capsys.readouterr().out
    assert '[1/2] ' in out and '[2/2] ' in out and 'python -m dpo_lab.train log_path=' in out


def test_a_grid_is_sent_to_sweep(tmp_path):
    sampler = optuna.samplers.GridSampler({'learning_rate': [1e-4, 1e-3]})
    with pytest.raises(ValueError, match='`sweep`'):
        search(short(tmp_path/'s'), sampler=sampler, learning_rate=[1e-4, 1e-3])


def test_no_optuna_is_an_error_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match=r'dpo_lab\[search\]'): next(run_search(short(tmp_path/'s'), **RANGE))

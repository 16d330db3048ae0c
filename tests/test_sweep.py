"Sweeps: grids, what points share, continuing, failures, executors, verdicts, the command."
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chz
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dpo_lab.batches
import dpo_lab.reference
from dpo_lab.batches import Rows
from dpo_lab.runs import Run, append_jsonl, read_jsonl, write_json
from dpo_lab.sweep import (Sweep, begin_sweep, estimate, interval, main, plan_text, point_name, processes, report,
                           run_lane, shared_rows, sweep, train_points)
from dpo_lab.train import Config, parse, resolve, run_dpo

ROOT = Path(__file__).parent.parent


def short(path, **more): return Config(log_path=str(path), **(dict(max_steps=2, eval_every=0, save_every=1) | more))


@pytest.fixture(scope='module')
def four(tmp_path_factory):
    "A small sweep, and how often each piece of shared work was done for it."
    done = {'reference': 0, 'tokens': 0}
    def counted(what, f):
        def g(*args, **kwargs): done[what] += 1; return f(*args, **kwargs)
        return g
    path = tmp_path_factory.mktemp('sweep')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('DPO_LAB_CACHE', str(path/'cache'))
        patch.setattr(dpo_lab.reference, 'compute_reference', counted('reference', dpo_lab.reference.compute_reference))
        patch.setattr(dpo_lab.batches, 'encode_pairs', counted('tokens', dpo_lab.batches.encode_pairs))
        result = sweep(short(path/'sweep', max_steps=3), loss=['sigmoid', 'ipo'], learning_rate=[1e-4], seed=[0, 1])
    return result, done


def test_points_share_one_reference_pass_and_one_tokenisation(four):
    _, done = four
    assert done == {'reference': 2, 'tokens': 2}        # train and test, once for four points


def test_rows_are_read_once_whatever_the_order_of_the_axes_and_a_batch_must_still_fit(tmp_path, monkeypatch):
    read, encode = [], dpo_lab.batches.encode_pairs
    monkeypatch.setattr(dpo_lab.batches, 'encode_pairs', lambda *args: read.append(args) or encode(*args))
    t = sweep(short(tmp_path/'sweep', max_steps=1), dpo_beta=[.1, .2], batch_size=[16, 9999]).table
    assert len(read) == 2                               # train and test
    assert t.status.tolist() == ['finished', 'failed']*2
    assert '800 training pairs are fewer than one batch of 9999' in t.error[1]


def test_a_dry_run_counts_how_often_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr('dpo_lab.sweep.estimate', lambda *args: dict(seconds=0, shared=0, bytes=0, measured='not'))
    config = Config(log_path=str(tmp_path/'sweep'))
    assert 'audited once' in plan_text(config, dict(dpo_beta=[.1, .2], batch_size=[8, 16]))
    assert '2 reference passes' in (text := plan_text(config, dict(dpo_beta=[.1, .2], max_length=[32, 64])))
    assert 'audited 2 times' in text


def test_rows_of_another_call_are_not_taken(monkeypatch):
    monkeypatch.setattr('dpo_lab.sweep.load_rows', lambda *args: (None, None, Rows(range(99), {}), Rows((), {}), {}))
    def rows(load): return load(Config(), None, None, lambda line: None)
    for one, other, same in ((shared_rows('a'), shared_rows('a'), True), (shared_rows('a'), shared_rows('b'), False),
                             (shared_rows(), shared_rows(), False)):
        assert (rows(one) is rows(other)) == same and rows(other) is rows(other)


def test_the_table_is_tidy(four):
    result, _ = four
    t = result.table
    assert t.columns[:3].tolist() == ['loss', 'learning_rate', 'seed'] and len(t) == 4
    assert (t.status == 'finished').all() and (t.error == '').all() and (t.step == 3).all() and (t.seconds > 0).all()
    for row in t.to_dict('records'):
        last = Run(row['path']).metrics.iloc[-1]
        assert row['test/accuracy'] == last['test/accuracy']
        assert row['test/accuracy_low'] < row['test/accuracy'] < row['test/accuracy_high']
    assert Path(t.path[0]).name == 'loss=sigmoid,learning_rate=0.0001,seed=0'
    assert '4 finished' in repr(result) and 'ipo' in result._repr_html_()


def test_a_point_is_the_run_it_would_be_alone(four, tmp_path):
    result, _ = four
    alone = list(run_dpo(short(tmp_path/'run', max_steps=3, loss='ipo', learning_rate=1e-4, seed=1), lambda line: None))
    point = result.runs['loss=ipo,learning_rate=0.0001,seed=1'].metrics
    for name in ('dpo_loss', 'margin', 'grad_norm'):
        assert [m[name] for m in alone[:3]] == point[name][:3].tolist()
    assert alone[-1]['test/margin'] == point['test/margin'].iloc[-1]


def test_scores_are_those_of_the_runs(four):
    result, _ = four
    for metric in ('accuracy', 'margin', 'dpo_loss'):
        verdict = result.verdict(metric)
        means = result.table.groupby('loss')[f'test/{metric}'].mean()
        for setting, score in verdict.scores.score.items():
            loss = setting.split(',')[0].removeprefix('loss=')
            assert score == pytest.approx(means[loss], abs=1e-5)
        assert verdict.seeds == 2 and verdict.pairs == 200
        assert ('ruler' in str(verdict)) == (metric != 'accuracy')


def test_the_winners_command_is_the_winners_config(four):
    result, _ = four
    words = result.command().removeprefix('python -m dpo_lab.train ').split()
    config, winner = parse(Config, words), result.verdict().best + ',seed=0'
    assert chz.replace(config, log_path='x') == chz.replace(
        result.configs[winner], log_path='x', behavior_if_log_dir_exists='ask')


def test_a_finished_sweep_asked_again_trains_nothing(four):
    result, _ = four
    before = read_jsonl(result.path/'points.jsonl')
    again = sweep(result.config, **result.axes)
    assert read_jsonl(again.path/'points.jsonl') == before


def test_more_values_extend_a_sweep(four, tmp_path):
    shutil.copytree(four[0].path, tmp_path/'sweep')
    config = chz.replace(four[0].config, log_path=str(tmp_path/'sweep'))
    more = begin_sweep(config, four[0].axes | {'seed': [0, 1, 2]})
    assert more.table.status.value_counts().to_dict() == {'finished': 4, 'new': 2}


def test_a_sample_is_trained_and_a_larger_one_goes_on_from_it(tmp_path, capsys):
    words = [f'log_path={tmp_path}/sweep', 'dpo_beta=0.05,0.1,0.2,0.4', 'learning_rate=1e-4,2e-4', 'max_steps=1']
    assert main([*words, 'samples=1']) == 0
    first = [*Sweep(tmp_path/'sweep').points]
    assert '1 points in' in capsys.readouterr().out and len(first) == 1
    assert main([*words, 'samples=2']) == 0
    assert '2 points in' in (out := capsys.readouterr().out) and '1 are finished, 1 to train' in out
    both = Sweep(tmp_path/'sweep').table
    assert both.status.tolist() == ['finished']*2 and Path(both.path[0]).name == first[0]


def test_left_in_the_middle_it_continues_where_it_was(tmp_path):
    config = short(tmp_path/'sweep', max_steps=3)
    begun = begin_sweep(config, dict(seed=[0, 1]))
    next(train_points(begun))                               # one point, then the loop is left
    for metrics in run_dpo(begun.configs['seed=1'], lambda line: None):
        if metrics.step == 2: break                         # and the second is left half-way
    assert begun.table.status.tolist() == ['finished', 'unfinished']
    (tmp_path/'sweep'/'seed=0'/'mark').touch()
    result = sweep(config, seed=[0, 1])
    assert result.table.status.tolist() == ['finished']*2 and (tmp_path/'sweep'/'seed=0'/'mark').exists()
    assert [r['point'] for r in read_jsonl(result.path/'points.jsonl')] == ['seed=0', 'seed=1']
    assert result.runs['seed=1'].events.event.tolist() == ['started', 'resumed', 'finished']


def wait_for(what, process, seconds=120):
    until = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(.05)


def test_a_killed_sweep_continues(tmp_path):
    words = [f'log_path={tmp_path}/sweep', 'seed=0,1', 'max_steps=30', 'eval_every=0', 'save_every=5']
    process = subprocess.Popen([sys.executable, '-m', 'dpo_lab.sweep', *words], cwd=ROOT, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path/'sweep'/'seed=0'/'checkpoints'/'000005').exists, process)
    with pytest.raises(FileExistsError, match='another process'):
        for _ in train_points(Sweep(tmp_path/'sweep')): pass
    process.kill(); process.communicate()
    begun = Sweep(tmp_path/'sweep')
    assert begun.table.status.tolist() == ['unfinished', 'new']
    (tmp_path/'sweep'/'seed=1').mkdir()                     # as if killed while it loaded
    (tmp_path/'sweep'/'seed=1'/'audit.json').write_text('{}')
    assert main(words) == 0
    assert begun.table.status.tolist() == ['finished']*2
    assert begun.runs['seed=0'].metrics.step.tolist() == list(range(31))


def test_ctrl_c_says_how_to_continue(tmp_path):
    words = [f'log_path={tmp_path}/sweep', 'dpo_beta=0.1,0.2', 'max_steps=2000', 'num_epochs=99', 'eval_every=0']
    process = subprocess.Popen([sys.executable, '-m', 'dpo_lab.sweep', *words], cwd=ROOT, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path/'sweep'/'dpo_beta=0.1'/'metrics.jsonl').exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in err
    assert f'python -m dpo_lab.sweep log_path={tmp_path}/sweep dpo_beta=0.1,0.2' in out


def test_ctrl_c_ends_the_workers_and_starts_no_other_point(tmp_path):
    words = [f'log_path={tmp_path}/sweep', 'seed=0,1,2,3,4,5', 'max_steps=2000', 'num_epochs=99', 'eval_every=0',
             'infrequent_eval_every=0', 'save_every=1', 'workers=2']
    process = subprocess.Popen([sys.executable, '-m', 'dpo_lab.sweep', *words], cwd=ROOT, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    begun = [tmp_path/'sweep'/f'seed={seed}' for seed in (0, 1)]
    try:
        wait_for(lambda: all([*path.glob('checkpoints/0*')] for path in begun), process)
        os.killpg(process.pid, signal.SIGINT)           # as a terminal does
        out, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL); raise
    assert process.returncode == 130 and 'Continue with' in out and 'Traceback' not in err and 'leaked' not in err
    assert Sweep(tmp_path/'sweep').table.status.tolist() == ['unfinished']*2 + ['new']*4
    steps = [path.read_text() for path in tmp_path.glob('sweep/*/metrics.jsonl')]
    time.sleep(1)
    assert [path.read_text() for path in tmp_path.glob('sweep/*/metrics.jsonl')] == steps
    for path in begun:                                  # whatever a worker was writing, its newest checkpoint is whole
        newest = path/Run(path).checkpoints[-1]['path']
        assert load_file(newest/'trainable.safetensors') and (newest/'state.json').read_text()[-1] == '}'


def test_a_failed_point_is_a_row_and_the_others_go_on(tmp_path, capsys):
    assert main([f'log_path={tmp_path}/sweep', 'learning_rate=1e30,1e-4', 'max_steps=3', 'eval_every=0']) == 1
    t = Sweep(tmp_path/'sweep').table
    assert t.status.tolist() == ['failed', 'finished'] and 'FloatingPointError' in t.error[0] and t.error[1] == ''
    assert math.isnan(t['test/accuracy'][0])
    assert 'Traceback' in read_jsonl(tmp_path/'sweep'/'points.jsonl')[0]['traceback']
    out = capsys.readouterr().out
    assert 'FloatingPointError' in out and 'learning_rate=0.0001 has the best' in out


def test_each_point_has_a_tracker_of_its_own_also_where_one_fails(tmp_path, trackio):
    sweep(short(tmp_path/'sweep', tracker='trackio'), learning_rate=[1e30, 1e-4])
    assert [(told.name, told.open) for told in trackio] == [('learning_rate=1e+30', False),
                                                            ('learning_rate=0.0001', False)]
    assert trackio[1].steps == [0, 1, 2]


def test_two_processes_give_the_same_numbers_and_share_the_reference(four, tmp_path, monkeypatch):
    monkeypatch.setenv('DPO_LAB_CACHE', str(tmp_path/'cache'))
    config = chz.replace(four[0].config, log_path=str(tmp_path/'sweep'))
    with processes(2) as executor:
        result = sweep(config, executor, loss=['sigmoid'], learning_rate=[1e-4], seed=[0, 1])
        threads = executor.submit(eval, '__import__("torch").get_num_threads()').result()
    same = four[0].table.query("loss == 'sigmoid'")
    assert result.table['test/margin'].tolist() == pytest.approx(same['test/margin'].tolist(), abs=1e-6)
    assert len([*(tmp_path/'cache'/'reference').glob('*.safetensors')]) == 2
    assert threads <= max(1, (os.cpu_count() or 2)//2)


def test_threads_do_not_mix_their_points(four, tmp_path):
    config = chz.replace(four[0].config, log_path=str(tmp_path/'sweep'))
    with ThreadPoolExecutor(2) as executor: result = sweep(config, executor, **four[0].axes)
    assert result.table['test/margin'].tolist() == pytest.approx(four[0].table['test/margin'].tolist(), abs=1e-6)


class Dying:
    "An executor whose first worker dies."
    def __init__(self): self.jobs, self.cancelled = 0, 0
    def submit(self, f, *args):
        self.jobs += 1
        return Future(self, f, args, dies=self.jobs == 1)


class Future:
    "As little as another executor may promise."
    def __init__(self, pool, f, args, dies): self.pool, self.f, self.args, self.dies = pool, f, args, dies
    def done(self): return True
    def cancel(self): self.pool.cancelled += 1
    def result(self):
        if self.dies: raise RuntimeError('the worker died')
        return self.f(*self.args)


def test_a_dead_worker_is_a_row_and_any_executor_will_do(tmp_path):
    result = sweep(short(tmp_path/'sweep'), Dying(), seed=[0, 1])
    assert result.table.status.tolist() == ['failed', 'finished'] and 'the worker died' in result.table.error[0]
    assert sweep(short(tmp_path/'sweep'), seed=[0, 1]).table.status.tolist() == ['finished']*2


def test_leaving_the_loop_cancels_what_waits(tmp_path):
    executor = Dying()
    points = train_points(begin_sweep(short(tmp_path/'sweep'), dict(seed=[0, 1, 2])), executor)
    next(points); points.close()
    assert executor.cancelled == 2


def threads_of_a_worker(tmp_path):
    "For a worker: the threads after a point that fails before it has a model, since a tiny model takes one thread."
    config = short(tmp_path/'one', model_name=str(tmp_path/'none'))
    def ask():
        assert run_lane({'a': config}, threads=3)['a']['error']
        return torch.get_num_threads()
    return ask


def test_dask_workers_train_points_and_one_is_killed_in_the_middle(tmp_path):
    distributed = pytest.importorskip('distributed', reason='dask.distributed is not installed')
    def begin(*words):
        return subprocess.Popen([sys.executable, '-m', 'distributed.cli.' + words[0], *words[1:]], cwd=ROOT,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    where = ['--scheduler-file', str(tmp_path/'scheduler.json')]
    started = [begin('dask_scheduler', '--host', '127.0.0.1', '--port', '0', '--no-dashboard', *where)]
    try:
        wait_for((tmp_path/'scheduler.json').exists, started[0])
        for name in ('first', 'second'):
            words = ['--nthreads', '1', '--no-nanny', '--no-dashboard', '--name', name]
            started.append(begin('dask_worker', *where, *words))
        with distributed.Client(scheduler_file=where[1]) as client:
            client.wait_for_workers(2, timeout=120)
            config = short(tmp_path/'sweep', max_steps=80, num_epochs=9)
            points = train_points(begin_sweep(config, dict(seed=[0, 1])), client.get_executor(), threads=3)
            def kill():
                saved = [tmp_path/'sweep'/f'seed={seed}'/'checkpoints' for seed in (0, 1)]     # the first do not stay
                while not all([*path.glob('0*')] for path in saved): time.sleep(.02)
                started[1].kill()
            threading.Thread(target=kill, daemon=True).start()
            for _ in points: pass
            assert client.submit(threads_of_a_worker(tmp_path)).result() == 3
            workers = [w['name'] for w in client.scheduler_info()['workers'].values()]
        result = Sweep(tmp_path/'sweep')
        assert workers == ['second'] and started[1].wait(10) == -signal.SIGKILL
        assert result.table.status.tolist() == ['finished']*2
        events = sorted(run.events.event.tolist() for run in result.runs.values())
        assert events == [['started', 'finished'], ['started', 'resumed', 'finished']]
    finally:
        for process in started: process.kill(); process.wait()


def test_submitit_jobs_train_points(tmp_path):
    submitit = pytest.importorskip('submitit', reason='submitit is not installed')
    executor = submitit.LocalExecutor(tmp_path/'jobs')
    executor.update_parameters(timeout_min=5)
    assert sweep(short(tmp_path/'sweep'), executor, seed=[0, 1]).table.status.tolist() == ['finished']*2
    assert executor.submit(threads_of_a_worker(tmp_path)).result() == 3


MISTAKES = {
    'dpo_bta=0.1,0.2': "Did you mean 'dpo_beta'",
    'dpo_beta=0.1,0': 'must be above 0',
    'dpo_beta=0.1,x': 'dpo_beta',
    'dpo_beta=0.1,0.1': 'twice',
    'seed=0,1 loss=sigmoyd': "Did you mean 'sigmoid'",
    'loss=sigmoid,sigmoyd': "Did you mean 'sigmoid'",
    'loss=sigmoid,simpo reference_model_name=tiny': 'compares with no reference',
    'learning_rate=logspace(1e-4,1e-6,3)': '0 < low < high',
    'seed=0,1 metric=acuracy': "Did you mean 'accuracy'",
    'dataset=toy,hhh': 'set test_dataset',
    'dataset_revision=a,b dataset=hhh dry_run=true': 'set test_dataset',
    'test_dataset=toy,hhh': 'have other held-out pairs',
    'seed=0,1 samples=0': 'at least 1',
    'seed=0,1 together=0': 'must be at least 1', 'seed=0,1 together=2 beta_end=0.5': 'train the points apart',
    'seed=0,1 workers=0': 'at least 1',
    'seed=0,1 workers=0 dry_run=true': 'at least 1',
    'seed=3': 'nothing varies',
    'nonsense': 'key=value',
}


@pytest.mark.parametrize('words', MISTAKES)
def test_a_mistake_is_one_sentence_before_any_work(words, tmp_path, capsys):
    assert main([f'log_path={tmp_path}/sweep', *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and MISTAKES[words] in err and 'Traceback' not in err
    assert not (tmp_path/'sweep').exists()


def test_another_config_is_never_taken_for_a_point(four, tmp_path):
    shutil.copytree(four[0].path, tmp_path/'sweep')
    config = chz.replace(four[0].config, log_path=str(tmp_path/'sweep'), max_steps=4)
    with pytest.raises(ValueError, match=r'max_steps \(was 3, now 4\)'): sweep(config, **four[0].axes)
    deleted = begin_sweep(chz.replace(config, behavior_if_log_dir_exists='delete'), four[0].axes)
    assert deleted.table.status.tolist() == ['new']*4
    with pytest.raises(FileExistsError, match='already holds a sweep'):
        begin_sweep(chz.replace(config, behavior_if_log_dir_exists='raise'), four[0].axes)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path/'thesis.tex').write_text('precious')
    for behavior in ('ask', 'delete'):
        with pytest.raises(FileExistsError, match='no sweep'):
            sweep(short(tmp_path, behavior_if_log_dir_exists=behavior), seed=[0, 1])
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_names_of_points_tell_them_apart_and_are_one_folder_deep():
    values = ['sigmoid + 0.2*sft', 'sigmoid+0.2*sft', 'a/b', 'a%2Fb', 'simpo(gamma=1.0,x=2)', None, 'None ']
    names = [point_name({'loss': value}) for value in values]
    assert len({*names}) == len(values) and not any('/' in name or '*' in name for name in names)


def test_dry_run_touches_nothing_and_says_how_it_measured(tmp_path, capsys):
    words = [f'log_path={tmp_path}/sweep', 'dpo_beta=0.1,0.2', 'seed=0,1', 'max_steps=2', 'eval_every=0']
    assert main([*words, 'dry_run=true']) == 0
    out = capsys.readouterr().out
    assert '4: 4 new' in out and '1 reference pass;' in out and 'by a probe of 4 steps' in out
    assert not (tmp_path/'sweep').exists()


def test_a_probe_has_the_cores_of_a_worker_and_gives_them_back(tmp_path, monkeypatch):
    seen, before, four = [], torch.get_num_threads(), {str(i): short(tmp_path/str(i)) for i in range(4)}
    def opened(*args): seen.append(torch.get_num_threads()); raise KeyboardInterrupt
    monkeypatch.setattr('dpo_lab.sweep.open_run', opened)
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: range(12), raising=False)
    for workers in (1, 4):
        with pytest.raises(KeyboardInterrupt): estimate(four, tmp_path, workers)
    assert seen == [before, 3] and torch.get_num_threads() == before


def test_past_points_are_a_better_measure_than_a_probe(four, monkeypatch):
    result, _ = four
    monkeypatch.setattr('dpo_lab.sweep.probe', None)
    more = result.axes | {'seed': [0, 1, 2]}
    text = plan_text(result.config, more)
    assert '6: 4 finished, 2 new' in text and 'from 4 finished points' in text
    assert estimate(result.configs, result.path)['measured'] == 'nothing is left to do'


def made_up(path, scores, n=400):
    "A sweep folder with made-up held-out pairs: setting -> seed -> chance that a pair is won."
    rng = np.random.default_rng(0)
    config, axes = Config(log_path=str(path)), {'dpo_beta': [*scores], 'seed': [*next(iter(scores.values()))]}
    made, easy = begin_sweep(config, axes), rng.random(n)
    for c in made.configs.values():
        won = easy < scores[c.dpo_beta][c.seed]
        pairs = [dict(step=1, split='test', pair=i, beta=c.dpo_beta, loss=0., chosen_logratio=float(w),
                      rejected_logratio=.5) for i, w in enumerate(won)]
        run = Path(c.log_path)
        run.mkdir(parents=True)
        write_json(run/'config.json', {})
        append_jsonl(run/'pairs.jsonl', pairs)
        append_jsonl(run/'events.jsonl', [dict(step=1, event='finished')])
        append_jsonl(run/'metrics.jsonl', [dict(step=1, **{'test/accuracy': float(won.mean())})])
    return made


def test_a_clear_winner_is_called_one(tmp_path):
    verdict = made_up(tmp_path/'s', {.1: {0: .5}, .2: {0: .9}, .4: {0: .7}}).verdict()
    assert verdict.best == 'dpo_beta=0.2' and verdict.tied == [] and 'better than all 2' in str(verdict)
    assert 'One seed' in str(verdict)


def test_the_same_pairs_decide_what_overlapping_intervals_hide(tmp_path):
    scores = made_up(tmp_path/'s', {.1: {0: .80}, .2: {0: .77}}).verdict().scores
    assert scores.low.iloc[0] < scores.high.iloc[1] and not scores.tied.iloc[1]


def test_seeds_that_disagree_make_a_tie(tmp_path):
    verdict = made_up(tmp_path/'s', {.1: {0: .9, 1: .6}, .2: {0: .6, 1: .8}}).verdict()
    assert verdict.tied and 'cannot be told apart from 1 of 1' in str(verdict) and 'One seed' not in str(verdict)


def test_a_perfect_score_is_not_certain(tmp_path):
    top = made_up(tmp_path/'s', {.1: {0: 1.1}, .2: {0: .99}}).verdict().scores.iloc[0]
    assert top.score == 1 and top.low < 1 and top.high == 1


def test_the_truly_best_is_hardly_ever_ruled_out():
    "Twenty equal settings, 300 times: the one we look at may be called worse in one of twenty."
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        values = rng.normal(size=100) + rng.normal(size=(20, 1, 100))
        best = values.mean((1, 2)).argmax()
        wrong += bool(best) and interval(values[best] - values[0], 1 - .05/19)[1] > 0
    assert wrong/300 <= .05


def test_other_held_out_pairs_are_not_compared(tmp_path):
    result = begin_sweep(short(tmp_path/'sweep'), dict(dataset=['toy', 'hhh']))
    with pytest.raises(ValueError, match='set test_dataset'): result.verdict()


def test_without_held_out_pairs_the_table_stands_alone(tmp_path, capsys):
    def said(role, text): return [dict(role=role, content=text)]
    pair = dict(prompt=said('user', 'Name a colour.'), chosen=said('assistant', 'Blue.'),
                rejected=said('assistant', 'Tuesday.'))
    append_jsonl(tmp_path/'pairs.jsonl', [pair]*4)
    words = [f'log_path={tmp_path}/sweep', f'dataset={tmp_path}/pairs.jsonl', 'batch_size=4', 'max_steps=1', 'seed=0,1']
    assert main(words) == 0
    out = capsys.readouterr().out
    assert 'accuracy not measured' in out and 'no verdict: seed=0 has no held-out pairs: set test_dataset' in out


def test_all_points_failing_is_the_failure_of_the_points(tmp_path, capsys):
    assert main([f'log_path={tmp_path}/sweep', 'batch_size=9998,9999']) == 1
    assert 'no verdict: ' in (out := capsys.readouterr().out) and 'fewer than one batch' in out


def test_reading_a_sweep_needs_no_torch(four):
    code = f'''import sys; from dpo_lab.sweep import Sweep
s = Sweep({str(four[0].path)!r}); print(s.table, s.verdict()); sys.exit("torch" in sys.modules)'''
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_help_names_its_own_words(capsys):
    with pytest.raises(SystemExit): main(['--help'])
    out = capsys.readouterr().out
    assert 'dry_run' in out and 'workers' in out and 'dpo_beta' in out


def test_a_failed_point_that_is_tried_again_is_no_longer_called_failed(tmp_path):
    begun = begin_sweep(Config(log_path=str(tmp_path/'grid'), max_steps=1, eval_every=0, infrequent_eval_every=0),
                        dict(dpo_beta=[.1, .5]))
    name = next(iter(begun.points))
    report(begun, name, {'seconds': 1., 'error': 'MemoryError: no room', 'traceback': ''})
    assert [*begun.table.status] == ['failed', 'new']
    event = dict(step=0, event='started', time='2999-01-01T00:00:00')
    write_json(begun.path/name/'config.json', chz.asdict(resolve(begun.configs[name])))
    append_jsonl(begun.path/name/'events.jsonl', [event])
    assert [*begun.table.status] == ['unfinished', 'new'] and not any(begun.table.error)
    report(begun, name, {'seconds': 1., 'time': '2999-01-02T00:00:00', 'error': 'MemoryError: no room'})
    assert [*begun.table.status] == ['failed', 'new']

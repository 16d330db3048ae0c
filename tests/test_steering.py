"A hand on a run under way: the same weights as a loop that does it itself, and every change written down."
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dpo_lab.runs import Run, read_jsonl
from dpo_lab.steering import LiveRun, Tail, fork, rewind, steer
from dpo_lab.train import Config, course, run_dpo


def quiet(line): pass


def asked(path, **more): return Config(log_path=str(path), **(dict(max_steps=8, eval_every=0, save_every=3) | more))


def weights(path):
    saved = load_file(path/'final'/'model.safetensors')
    return torch.cat([saved[name].flatten() for name in sorted(saved)])


def by_hand(path, at, **fields):
    "Train, and set objective and rate in the body of the loop after step `at - 1`."
    run = run_dpo(asked(path), quiet)
    for metrics in run:
        if metrics.step == at - 1:
            run.objective.beta = fields['dpo_beta']
    return weights(path)


@pytest.fixture(scope='module')
def turned(tmp_path_factory):
    "A run whose beta was changed from step 5 on, by a person at step 4."
    path = tmp_path_factory.mktemp('turned')/'run'
    def watch(metrics):
        if metrics.step == 4: live.change(dpo_beta=2.)
    live = LiveRun(asked(path), watch).start()
    live.join()
    assert live.state == 'finished'
    return path


def test_a_changed_beta_gives_the_weights_of_a_loop_that_changes_it(turned, tmp_path):
    assert torch.equal(weights(turned), by_hand(tmp_path/'run', 5, dpo_beta=2.))
    assert Run(turned).metrics.beta[:8].tolist() == [.1]*5 + [2.]*3


def test_events_hold_the_change(turned):
    event = [e for e in read_jsonl(turned/'events.jsonl') if e['event'] == 'changed']
    assert len(event) == 1 and event[0]['step'] == 5 and event[0]['changed'] == {'dpo_beta': [.1, 2.]}


@pytest.mark.parametrize('left_at', [4, 7])     # before and after the change; checkpoints are of 3 and 6
def test_a_steered_run_that_was_killed_takes_the_same_turns(turned, tmp_path, left_at):
    run = run_dpo(asked(tmp_path/'run'), quiet)
    steer(run, 5, dpo_beta=2.)
    for metrics in run:
        if metrics.step == left_at: break
    for _ in run_dpo(asked(tmp_path/'run', behavior_if_log_dir_exists='resume'), quiet): pass
    assert torch.equal(weights(turned), weights(tmp_path/'run'))


def test_a_changed_rate_and_loss_count_from_their_step(tmp_path):
    run = run_dpo(asked(tmp_path/'run', lr_schedule='constant'), quiet)
    steer(run, 3, learning_rate=5e-4, loss='ipo_sum')
    steps = list(run)[:8]
    assert [m['learning_rate'] for m in steps] == [2e-4]*3 + [5e-4]*5
    assert steps[2]['dpo_loss'] < 1 < steps[3]['dpo_loss']          # ipo_sum begins at 1/(2 beta)**2 = 25


def test_rewinding_forgets_what_came_after_and_arrives_where_an_undisturbed_run_does(tmp_path):
    run = run_dpo(asked(tmp_path/'run'), quiet)
    for metrics in run:
        if metrics.step == 4: steer(run, 5, dpo_beta=3.)
        if metrics.step == 6: break
    with pytest.raises(ValueError, match='no checkpoint of step 5: choose one of 3, 6'): rewind(run, 5)
    rewind(run, 3)
    assert [m.step for m in run] == list(range(3, 9))
    for _ in run_dpo(asked(tmp_path/'plain'), quiet): pass
    assert torch.equal(weights(tmp_path/'run'), weights(tmp_path/'plain'))
    assert Run(tmp_path/'run').metrics.step.tolist() == list(range(9))


def test_a_fork_leaves_its_source_alone_and_goes_its_own_way(turned, tmp_path):
    before = (turned/'metrics.jsonl').read_bytes()
    run = fork(turned, tmp_path/'fork', 6, dpo_beta=.1)
    steps = list(run)
    assert [m.step for m in steps] == [6, 7, 8] and steps[0]['beta'] == .1
    assert Run(tmp_path/'fork').metrics.beta[:8].tolist() == [.1]*5 + [2.] + [.1]*2
    assert (turned/'metrics.jsonl').read_bytes() == before
    with pytest.raises(FileExistsError, match='already holds'): fork(turned, tmp_path/'fork')
    with pytest.raises(ValueError, match='above 0'): fork(turned, tmp_path/'refused', 6, learning_rate=-3.)
    assert not (tmp_path/'refused').exists()


@pytest.mark.parametrize('fields, why', [(dict(dpo_beta=0.), 'above 0'), (dict(seed=3), 'cannot change'),
                                         (dict(loss='sigmod'), 'sigmoid'), (dict(loss='odpo'), "column 'offset'"),
                                         (dict(loss='tdpo1'), 'live reference'), (dict(learning_rate=-1.), 'above 0')])
def test_what_cannot_work_is_refused_before_it_is_written(tmp_path, fields, why):
    run = run_dpo(asked(tmp_path/'run'), quiet)
    with pytest.raises(ValueError, match=why): steer(run, 0, **fields)
    assert [e['event'] for e in read_jsonl(tmp_path/'run'/'events.jsonl')] == ['started']


def test_pause_holds_the_run_and_requests_are_carried_out_meanwhile(tmp_path):
    live = LiveRun(asked(tmp_path/'run'), lambda m: m.step == 2 and live.pause()).start()
    until(lambda: live.state == 'paused')
    live.checkpoint(); live.change(dpo_beta=.7)
    until(lambda: 'dpo_beta' in live.note)
    assert live.step == 2 and [c['step'] for c in live.source.run.checkpoints] == [2]
    live.start(); live.join()
    assert live.state == 'finished' and Run(live.path).metrics.beta[2:5].tolist() == [.1, .7, .7]


def test_a_stopped_run_can_be_continued_here_or_by_the_command(tmp_path):
    live = LiveRun(asked(tmp_path/'run'), lambda m: m.step == 4 and live.stop()).start()
    live.join()
    assert live.state == 'stopped' and live.source.run.checkpoints[-1]['step'] == 4
    live.start(); live.join()
    assert live.state == 'finished'
    for _ in run_dpo(asked(tmp_path/'plain'), quiet): pass
    assert torch.equal(weights(tmp_path/'run'), weights(tmp_path/'plain'))


def test_steps_of_a_plain_generator_pause_and_stop_but_cannot_be_steered():
    from dpo_lab.training import StepMetrics
    steps = (StepMetrics(i, {"margin": 1.}) for i in range(10**9))
    live = LiveRun(steps, lambda m: m.step == 5 and live.stop()).start()
    live.join()
    assert (live.state, live.step) == ('stopped', 5)
    with pytest.raises(ValueError, match='loop of their own'): live.change(dpo_beta=1.)


def test_a_failed_run_goes_on_from_a_checkpoint(tmp_path):
    def fail_once(metrics):
        if metrics.step == 5 and live.state == 'running' and not live.note: raise FloatingPointError('not finite')
    live = LiveRun(asked(tmp_path/'run'), fail_once).start()
    live.join()
    assert live.state == 'failed' and 'not finite' in live.note
    live.rewind(3)
    assert live.state == 'stopped'
    live.start(); live.join()
    assert live.state == 'finished' and Run(live.path).metrics.step.tolist() == list(range(9))


def test_a_cell_run_again_never_trains_twice_in_one_folder(tmp_path):
    first = LiveRun(asked(tmp_path/'run', max_steps=10**4)).start()
    until(lambda: first.step)
    again = LiveRun(asked(tmp_path/'run', behavior_if_log_dir_exists='delete', dpo_beta=.5)).start()
    again.join()
    assert (first.state, again.state) == ('stopped', 'finished')
    assert Run(tmp_path/'run').metrics.step.tolist() == list(range(9))
    # a run of a plain loop lets go too, and cannot go on
    plain = run_dpo(asked(tmp_path/'plain'), quiet)
    next(plain)
    for _ in run_dpo(asked(tmp_path/'plain', behavior_if_log_dir_exists='delete'), quiet): pass
    with pytest.raises(FileExistsError, match='newer run of this process'): next(plain)
    assert Run(tmp_path/'plain').metrics.step.tolist() == list(range(9))


def test_a_folder_that_another_process_trains_is_left_alone(tmp_path):
    run = run_dpo(asked(tmp_path/'run'), quiet)
    next(run)
    words = f"log_path={tmp_path/'run'} behavior_if_log_dir_exists=delete max_steps=2"
    command = [sys.executable, '-m', 'dpo_lab.train', *words.split()]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and 'another process trains this run' in refused.stderr
    for _ in run: pass
    assert Run(tmp_path/'run').metrics.step.tolist() == list(range(9))


def test_a_failing_step_is_reported_not_lost():
    def steps():
        yield from ()
        raise FloatingPointError('step 3: dpo_loss not finite')
    live = LiveRun(steps()).start()
    live.join()
    assert live.state == 'failed' and 'dpo_loss not finite' in live.note


def test_a_later_word_takes_the_place_of_what_was_planned():
    def changed(step, **fields): return dict(step=step, event='changed', changed={f: [0, v] for f, v in fields.items()})
    events = [changed(5, dpo_beta=1., loss='ipo'), changed(3, dpo_beta=2.)]
    assert course(events) == [(5, {'loss': 'ipo'}), (3, {'dpo_beta': 2.})]
    assert course([*events, dict(step=4, event='rewound')]) == [(3, {'dpo_beta': 2.})]


def test_a_tail_leaves_half_a_line_for_later(tmp_path):
    tail, path = Tail(tmp_path/'t.jsonl'), tmp_path/'t.jsonl'
    assert tail.new() == ([], False)
    path.write_text('{"step": 0}\n{"st')
    assert tail.new() == ([{'step': 0}], False) and tail.new() == ([], False)
    with open(path, 'a') as f: f.write('ep": 1}\n')
    assert tail.new() == ([{'step': 1}], False)


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.01)

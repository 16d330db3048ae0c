"Widgets without a browser and without a kernel: messages in, state out. JavaScript's losses against chapter `losses`."
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip('anywidget', reason="needs the lab extra: pip install 'dpo_lab[lab]'")

from dpo_lab.diagnostics import counterfactual, open_run, pair_frame, thinned
from dpo_lab.losses import LOSSES, PairLogps
from dpo_lab.models import tiny_model
from dpo_lab.runs import Run, RunWriter, read_jsonl, write_json
from dpo_lab.sweep import sweep
from dpo_lab.train import Config, parse, run_dpo
from dpo_lab.widgets import DRAWN, LossExplorer, PairBrowser, SweepPanel, TrainMonitor, script

WIDGETS = dict(loss_explorer=('loss_math', 'loss_explorer'), train_monitor=('train_monitor',),
               sweep_panel=('sweep_panel',), pair_browser=('pair_browser',))


def quiet(line): pass


def asked(path, **more): return Config(log_path=str(path), **(dict(max_steps=8, eval_every=4, save_every=3) | more))


def press(widget, do, **more):
    "What a click in the browser sends."
    widget._handle_msg({'content': {'data': {'method': 'custom', 'content': {'do': do, **more}}}, 'buffers': []})


def set_state(widget, **state):
    widget._handle_msg({'content': {'data': {'method': 'update', 'state': state, 'buffer_paths': []}}, 'buffers': []})


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.02)


def node(code):
    if not shutil.which('node'): pytest.skip('needs node to run JavaScript outside a browser')
    out = subprocess.run(['node', '--input-type=module'], input=code, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout or 'null')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp('widgets')/'run'
    for _ in run_dpo(asked(path), quiet): pass
    return Run(path)


@pytest.mark.parametrize('names', WIDGETS.values(), ids=WIDGETS)
def test_a_script_is_one_module_that_fetches_nothing(names):
    text = script(*names)
    assert text.count('export default') == 1 and 'import ' not in text and 'http' not in text and 'require(' not in text
    node(text.replace('export default', 'const widget =') + '\nconsole.log(JSON.stringify(typeof widget.render))')


@pytest.mark.parametrize('beta', [.01, .1, 2.])
def test_losses_in_javascript_are_those_of_the_chapter(beta):
    draw = torch.Generator().manual_seed(1)
    n, policy = 40, -20 + 6*torch.randn(2, 40, generator=draw, dtype=torch.float64).clamp(-3, 3)
    lengths = torch.randint(5, 40, (2, n), generator=draw)
    logps = PairLogps(policy, policy - 4*torch.randn(2, n, generator=draw, dtype=torch.float64), lengths)
    rows = [dict(zip(('w', 'l', 'pw', 'pl', 'nw', 'nl'), row)) for row in
            torch.cat([logps.logratios, policy, lengths.double()]).T.tolist()]
    got = node(script('loss_math') + f'''
        const pairs = {json.dumps(rows)}, z = zeroPoints(pairs), out = {{}};
        for (const name in LOSS) out[name] = pairs.map(p => LOSS[name](p, {beta}, 0.1, z));
        console.log(JSON.stringify(out));''')
    assert sorted(got) == sorted(DRAWN)
    for name in DRAWN:
        smoothed = {'label_smoothing': .1} if 'label_smoothing' in LOSSES[name].knobs else {}
        want = LOSSES[name](logps, beta, **smoothed)
        assert torch.allclose(torch.tensor(got[name], dtype=torch.float64), want, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize('loss', ['sigmoid', 'ipo', 'simpo', 'dpop'])
def test_the_counterfactual_in_javascript_is_that_of_diagnostics(run, loss):
    explorer, frame = LossExplorer(run), pair_frame(run, 'test', step=-1)
    got = node(script('loss_math') + f'''
        const pairs = {json.dumps(explorer.pairs)}.map(([w, l, pw, pl, nw, nl]) => ({{w, l, pw, pl, nw, nl}}));
        console.log(JSON.stringify(counterfactual('{loss}', pairs, 0.7, 0)));''')
    want = counterfactual(frame, .7, loss)
    for name, value in got.items(): assert value == pytest.approx(want[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize('make, drawn', [(LossExplorer, 'pairs'), (TrainMonitor, 'points'), (PairBrowser, 'columns')])
def test_state_is_plain_json_and_holds_all_that_is_drawn(run, make, drawn):
    more = {'record': 1} if make is PairBrowser else {}
    state = make(run, **more).get_state()
    kept = json.loads(json.dumps({k: v for k, v in state.items() if k != 'layout'}, allow_nan=False))
    assert kept[drawn] == state[drawn] and len(state[drawn]) and kept['_esm'] == make._esm


def test_a_slider_sets_beta_and_an_unknown_loss_is_refused(run):
    explorer = LossExplorer(run)
    assert explorer.beta == .1
    set_state(explorer, beta=.5)
    assert explorer.beta == .5
    with pytest.raises(ValueError, match='no curve here'): LossExplorer(selected=['aot'])


def test_a_monitor_steers_what_it_trains(tmp_path):
    monitor = TrainMonitor(asked(tmp_path/'run', max_steps=60), start=False)
    assert monitor.status['state'] == 'ready'
    press(monitor, 'start')
    until(lambda: monitor.points and monitor.points[-1][0] >= 3)
    press(monitor, 'pause'); until(lambda: monitor.status['state'] == 'paused')
    press(monitor, 'change', dpo_beta='0.4', learning_rate='2e-4', loss='sigmoid')
    until(lambda: monitor.fields['dpo_beta'] == .4)
    press(monitor, 'checkpoint'); until(lambda: monitor.live.step in monitor.checkpoints)
    at = monitor.live.step
    press(monitor, 'start'); until(lambda: monitor.points[-1][0] > at)
    press(monitor, 'stop'); until(lambda: monitor.status['state'] == 'stopped')
    until(lambda: monitor.points[-1][0] == monitor.live.step)
    betas = {step: metrics.get('beta') for step, metrics, _ in monitor.points}
    assert betas[at] == .1 and betas[at + 1] == .4
    assert [e['text'] for e in monitor.events] == ['started', 'beta 0.4', 'stopped']
    assert read_jsonl(tmp_path/'run'/'events.jsonl')[1]['changed'] == {'dpo_beta': [.1, .4]}
    assert all(len(p[2]['margin']) == 5 for p in monitor.points)
    # the cell run again finds the run, and does not begin another
    again = TrainMonitor(asked(tmp_path/'run', max_steps=60), start=False)
    assert again.live is monitor.live and again.points == monitor.points


def test_a_monitor_shows_what_was_last_written(run, tmp_path):
    shutil.copytree(run.path, path := tmp_path/'run')
    (path/'events.jsonl').write_text('')        # as if it went on
    monitor, last = TrainMonitor(path), run.samples[run.samples.step == run.samples.step.max()].to_dict('records')[:4]
    assert [(s['step'], s['asked'], s['answer'], s['ended']) for s in monitor.samples] == [
        (s['step'], s['prompt'][-1]['content'], s['answer'], s['ended']) for s in last] and monitor.samples
    RunWriter(path).samples([dict(step=99, prompt=[dict(role='user', content='Hello?')], answer='Hi', ended='eos')])
    until(lambda: monitor.samples == [dict(step=99, asked='Hello?', answer='Hi', ended='eos')])


def test_a_mistake_is_said_in_the_widget_and_changes_nothing(tmp_path):
    monitor = TrainMonitor(asked(tmp_path/'run'), start=False)
    for value, why in (('-1', 'above 0'), ('much', 'float')):
        press(monitor, 'change', dpo_beta=value, learning_rate='2e-4', loss='sigmoid')
        assert why in monitor.status['note']
    press(monitor, 'change', dpo_beta='0.1', learning_rate='2e-4', loss='sigmod')
    assert 'sigmoid' in monitor.status['note']
    assert [e['event'] for e in monitor.events] == ['started']


def test_a_monitor_follows_a_folder_that_another_process_writes(run, tmp_path):
    shutil.copytree(run.path, path := tmp_path/'run')
    RunWriter(path).rewind(4); (path/'events.jsonl').write_text('')
    monitor = TrainMonitor(path)
    assert [p[0] for p in monitor.points] == [0, 1, 2, 3] and monitor.status['state'] == 'following'
    assert not monitor.status['live']
    RunWriter(path).metrics(4, {'margin': 1., 'test/accuracy': .5})
    until(lambda: monitor.points[-1] == [4, {'margin': 1., 'test/accuracy': .5}, {}])
    RunWriter(path).rewind(2)       # the other process went back
    until(lambda: [p[0] for p in monitor.points] == [0, 1])
    RunWriter(path).event(2, 'finished')
    until(lambda: monitor.status['state'] == 'finished')


def test_a_folder_that_is_written_anew_is_followed_on(run, tmp_path):
    shutil.copytree(run.path, path := tmp_path/'run')
    (path/'events.jsonl').write_text('')
    monitor = TrainMonitor(path)
    path.rename(aside := tmp_path/'aside')
    until(lambda: 'FileNotFoundError' in monitor.status['note'])
    aside.rename(path)
    RunWriter(path).metrics(9, {'margin': 1.})
    until(lambda: monitor.points[-1][0] == 9 and 'Error' not in monitor.status['note'])


def test_an_explorer_begins_with_the_loss_of_its_run(run, tmp_path):
    shutil.copytree(run.path, path := tmp_path/'run')
    write_json(path/'config.json', run.config | {'loss': 'hinge', 'label_smoothing': .2})
    explorer = LossExplorer(path)
    assert (explorer.selected, explorer.label_smoothing) == (['hinge'], .2)
    assert LossExplorer().selected == ['sigmoid'] and LossExplorer(path, selected=['ipo']).selected == ['ipo']


def test_an_explorer_says_what_it_leaves_out(run):
    records = read_jsonl(run.path/'pairs.jsonl')
    with pytest.warns(UserWarning, match='carry soft_label'): LossExplorer([r | {'soft_label': .9} for r in records])


def test_a_followed_run_that_has_gone_silent_says_so(run, tmp_path):
    shutil.copytree(run.path, path := tmp_path/'run')
    (path/'events.jsonl').write_text('')
    for file in path.iterdir(): os.utime(file, (time.time() - 3600,)*2)
    monitor = TrainMonitor(path)
    assert monitor.status['note'] == 'nothing new for 60 minutes'
    RunWriter(path).metrics(8, {'margin': 1.})
    until(lambda: monitor.status['note'] == '')


def test_a_monitor_takes_the_steps_of_any_loop(tiny_rows):
    from dpo_lab.models import tiny_model
    from dpo_lab.training import train_dpo
    monitor = TrainMonitor(train_dpo(tiny_model()[0], tiny_rows[0], max_steps=3))
    until(lambda: monitor.status['state'] == 'finished' and len(monitor.points) == 3)
    press(monitor, 'change', dpo_beta='1', learning_rate='1', loss='ipo')
    assert 'loop of their own' in monitor.status['note']


def test_the_line_of_a_monitor_names_what_is_drawn_behind(run):
    monitor = TrainMonitor(run, overlays=[run, str(run.path)])
    assert monitor.code == f"TrainMonitor({str(run.path)!r}, overlays=[{str(run.path)!r}, {str(run.path)!r}])"
    again = eval(monitor.code)
    assert again.code == monitor.code and again.overlays == monitor.overlays
    for widget in (monitor, again): widget.close()


def test_new_points_are_messages_and_a_browser_that_missed_some_gets_all(run):
    monitor, sent = TrainMonitor(run), []
    monitor.send = lambda message, buffers=None: sent.append(message)
    press(monitor, 'sync')
    assert sent[0]['again'] and len(sent[0]['points']) == len(monitor.points) == 9


def test_a_click_is_heard_where_the_browser_sent_it_though_the_last_request_has_gone(monkeypatch):
    import comm
    Comm = pytest.importorskip('ipykernel.comm').Comm
    if not hasattr(Comm, '_reply_subshell_for'): pytest.skip('this ipykernel goes by the message alone')
    monkeypatch.setattr(comm, 'create_comm', lambda *args, **more: Comm(*args, show_warning=False, **more))
    explorer = LossExplorer()
    explorer.comm._reply_subshell_id = 'gone'
    assert isinstance(explorer.comm, Comm) and explorer.comm._reply_subshell_for({}, 'here') == 'here'


def test_a_fork_that_is_refused_leaves_nothing_behind(tmp_path):
    monitor = TrainMonitor(asked(tmp_path/'run', max_steps=30))
    until(lambda: monitor.points)
    press(monitor, 'stop'); until(lambda: monitor.status['state'] == 'stopped')
    press(monitor, 'fork', path=str(tmp_path/'fork'), dpo_beta='0.4', learning_rate='-3', loss='sigmoid')
    assert 'above 0' in monitor.status['note'] and not (tmp_path/'fork').exists()
    press(monitor, 'fork', path=str(tmp_path/'fork'), dpo_beta='0.4', learning_rate='2e-4', loss='sigmoid')
    until(lambda: (tmp_path/'fork'/'final').exists())
    at = monitor.live.step
    assert Run(tmp_path/'fork').metrics.beta[:30].tolist() == [.1]*at + [.4]*(30 - at)
    # from a run that is done, of the checkpoint that is chosen
    press(monitor, 'start'); until(lambda: monitor.status['state'] == 'finished')
    press(monitor, 'fork', path=str(tmp_path/'late'), step=30)
    assert 'step 30 is the end of the run' in monitor.status['note']
    at = monitor.checkpoints[-2]
    press(monitor, 'fork', path=str(tmp_path/'late'), step=at, dpo_beta='0.4')
    until(lambda: (tmp_path/'late'/'final').exists())
    assert Run(tmp_path/'late').metrics.beta[:30].tolist() == [.1]*at + [.4]*(30 - at)


def test_what_is_drawn_of_a_long_run_is_spread_over_its_steps():
    kept = []
    for step in range(20_000):
        kept.append([step, {'margin': 0.} | ({'test/margin': 0.} if step % 5000 == 1 else {}), {}])
        if len(kept) > 3000: kept, every = thinned(kept)
    steps = [p[0] for p in kept]
    assert steps[0] == 0 and steps[-1] == 19_999 and {1, 5001, 10_001, 15_001} <= {*steps}
    assert every == 16 and max(b - a for a, b in zip(steps, steps[1:])) < 2*every


def test_a_panel_fills_and_exports_a_point(tmp_path):
    grid = sweep(asked(tmp_path/'grid', max_steps=4, eval_every=2, infrequent_eval_every=0), dpo_beta=[.1, .5],
                 learning_rate=[1e-4], seed=[0, 1])
    panel = SweepPanel(grid)
    assert [p['status'] for p in panel.points] == ['finished']*4 and panel.axes['dpo_beta'] == [.1, .5]
    assert [c[0] for c in panel.points[1]['curve']] == list(range(5))
    python, command = (panel.points[3][kind] for kind in ('python', 'command'))
    made, same = eval(re.search(r'Config\(.*\)\)', python)[0][:-1]), parse(Config, shlex.split(command)[3:])
    assert (made.dpo_beta, made.learning_rate, made.seed) == (.5, 1e-4, 1) and made == same
    exec(python.replace(str(tmp_path), str(tmp_path/'again')))
    assert weights(Path(f'{tmp_path}/again/grid-best')) == weights(grid.path/panel.points[3]['name'])
    assert json.dumps(panel.get_state(), default=str)


def weights(path): return (path/'final'/'model.safetensors').read_bytes()


def test_a_panel_without_a_verdict_says_why(tmp_path, monkeypatch):
    grid = sweep(asked(tmp_path/'grid', max_steps=1, eval_every=0, infrequent_eval_every=0), max_length=[32, 48])
    def refuse(self, metric): raise ValueError('other pairs')
    monkeypatch.setattr('dpo_lab.sweep.Sweep.verdict', refuse)
    assert SweepPanel(grid).status['verdict'] == 'no verdict: other pairs'


def test_a_panel_made_again_finds_the_sweep_that_runs(tmp_path):
    config = asked(tmp_path/'grid', max_steps=6, eval_every=3, infrequent_eval_every=0)
    first = SweepPanel(config, workers=1, dpo_beta=[.1, .5])
    press(first, 'start', asked=first.asked)
    again = SweepPanel(config, workers=1, dpo_beta=[.1, .5])
    assert again.live is first.live and again.status['state'] == 'running' and len(again.points) == 2
    press(again, 'stop'); until(lambda: first.status['state'] == 'stopped')


def test_what_failed_stays_in_sight_while_the_run_goes_on(tmp_path):
    monitor = TrainMonitor(asked(tmp_path/'run', max_steps=500))
    until(lambda: monitor.points)
    press(monitor, 'change', dpo_beta='-1', learning_rate='2e-4', loss='sigmoid')
    seen = monitor.points[-1][0]
    until(lambda: monitor.points[-1][0] > seen + 2)
    assert 'above 0' in monitor.status['note']
    press(monitor, 'stop')
    until(lambda: monitor.status['state'] == 'stopped' and not monitor.status['note'])


def test_a_panel_refuses_what_a_sweep_would(tmp_path):
    panel = SweepPanel(asked(tmp_path/'grid'))
    wrong = [({'dpo_beta': '0, 1'}, 'above 0'), ({'dpo_beta': 'x'}, 'float'), ({'more': 'los=ipo'}, 'Did you mean'),
             ({}, 'nothing varies'), ({'more': 'ipo'}, 'field=value')]
    for typed, why in wrong:
        press(panel, 'start', asked=typed)
        assert panel.status['error'] and why in panel.status['note'], typed
    assert panel.live is None and not (tmp_path/'grid').exists()


@pytest.mark.parametrize('together', ['', '2'])
def test_a_panel_starts_stops_and_goes_on(tmp_path, together):
    panel = SweepPanel(asked(tmp_path/'grid', max_steps=None, eval_every=5, infrequent_eval_every=0), workers=1)
    typed = dict(dpo_beta='0.1, 0.5', learning_rate='2e-4', seed='', max_steps='12', samples='', more='',
                 together=together)
    press(panel, 'start', asked=typed)
    until(lambda: (all if together else any)(p['curve'] for p in panel.points), 120)
    press(panel, 'stop'); until(lambda: panel.status['state'] == 'stopped')
    press(panel, 'start', asked=typed)
    until(lambda: panel.status['state'] == 'finished', 120)
    assert panel.status['verdict'].startswith('dpo_beta=') and [p['progress'] for p in panel.points] == [1., 1.]
    assert 'sweep(Config(' in panel.code and 'learning_rate=[0.0002]' in panel.code
    assert ('together=2' in panel.code) == bool(together)


def test_a_browser_lists_pairs_and_opens_one_to_its_tokens(run):
    browser = PairBrowser(run)
    frame = pair_frame(run, 'train')
    assert len(browser.columns['pair']) == frame.pair.nunique() and all(browser.columns['prompt'])
    pair = browser.columns['pair'][3]
    press(browser, 'open', pair=pair)
    until(lambda: browser.detail.get('pair') == pair)
    total = sum(nats for _, nats in browser.detail['chosen'] if nats is not None)
    assert math.isfinite(total) and 'User:' in browser.detail['prompt'] and 'credit_map' in browser.code


def test_the_colours_of_a_pair_are_plain_differences_of_log_probs(run):
    "Also where a completion spells out a special token: its characters are ordinary tokens."
    opened, browser = open_run(run), PairBrowser(run)
    base = tiny_model()[0]
    odd = [row for row in opened['train'] if '<|bos|>' in opened['tokenizer'].decode(row.rejected)]
    assert odd
    for row in (odd[0], opened['train'][0]):
        for side in ('chosen', 'rejected'):
            prompt, tokens = list(row.prompt), list(getattr(row, side))
            ids = torch.tensor([prompt + tokens])
            with torch.no_grad():
                now, then = (m(ids).logits[0].log_softmax(-1)[len(prompt)-1:-1].gather(1, torch.tensor(tokens)[:, None])
                             for m in (opened['model'], base))
            shown = [nats for _, nats in browser.read(row.index)[side]]
            assert shown == pytest.approx((now - then)[:, 0].tolist(), abs=2e-4)


def test_a_pair_that_cannot_be_read_says_why(run, tmp_path):
    shutil.copytree(run.path, tmp_path/'run')
    shutil.rmtree(tmp_path/'run'/'final')
    browser = PairBrowser(tmp_path/'run')
    press(browser, 'open', pair=browser.columns['pair'][0])
    until(lambda: 'no final/' in browser.detail.get('error', ''))


def test_a_rewind_in_the_widget_takes_the_curve_back(tmp_path):
    monitor = TrainMonitor(asked(tmp_path/'run'))
    until(lambda: monitor.status['state'] == 'finished' and monitor.points[-1][0] == 8)
    press(monitor, 'rewind', step=6)
    until(lambda: monitor.points[-1][0] == 5)
    press(monitor, 'start')
    until(lambda: monitor.status['state'] == 'finished' and monitor.points[-1][0] == 8)
    assert [p[0] for p in monitor.points] == list(range(9))

"The widgets in a real JupyterLab and Notebook 7, under a real pointer: headless Chromium opens the tutorial and works."
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip('playwright', reason="needs playwright: pip install 'dpo_lab[dev]'")
pytest.importorskip('jupyterlab', reason="needs jupyterlab: pip install 'dpo_lab[lab]'")


def find_chromium():
    "One that is installed, or playwright's own."
    from playwright.sync_api import sync_playwright
    found = os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser')
    with sync_playwright() as p: own = p.chromium.executable_path
    return found or (own if Path(own).exists() else None)


CHROMIUM = find_chromium()
if not CHROMIUM: pytest.skip('needs Chromium: install it, set CHROMIUM to its path, or `playwright install chromium`',
                             allow_module_level=True)

SHOTS = os.environ.get('DPO_LAB_SCREENSHOTS')   # a folder for pictures of what the test saw


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def shorten(notebook, folder):
    "A copy of the tutorial whose run takes 60 steps, and whose 3 x 3 points 10 steps each, on few pairs."
    for split, n in dict(train=64, test=16).items():
        rows = (ROOT/'dpo_lab'/'assets'/'toy'/f'{split}.jsonl').read_text().splitlines(keepends=True)
        (folder/f'{split}.jsonl').write_text(''.join(rows[:n]))
    plain = json.loads(notebook.read_text())
    plain['metadata'].pop('widgets')        # what its page shows without a kernel
    for cell in plain['cells']: cell.update({'outputs': []} if cell['cell_type'] == 'code' else {})
    text = json.dumps(plain)
    few = f"dataset='{folder/'train.jsonl'}', test_dataset='{folder/'test.jsonl'}'"
    for long, short in {'max_steps=60, eval_every=10': f'max_steps=10, eval_every=10, {few}',
                        'num_epochs=4': 'max_steps=60'}.items():
        assert text.count(long) == 1, f'the tutorial has no {long}'
        text = text.replace(long, short)
    (folder/notebook.name).write_text(text)


# module, path of a notebook, what keeps it quiet
APPS = {'JupyterLab': ('jupyterlab', 'lab/tree', ['--LabApp.news_url=None', '--LabApp.check_for_updates_class='
                                                  'jupyterlab.NeverCheckForUpdate']),
        'Notebook': ('notebook', 'notebooks', [])}


@pytest.fixture(scope='module', params=APPS)
def lab(request, tmp_path_factory):
    "Address of a Jupyter server, and of a copy of the tutorial there."
    module, path, quiet = APPS[request.param]
    pytest.importorskip(module, reason=f"needs {module}: pip install 'dpo_lab[dev]'")
    folder, port = tmp_path_factory.mktemp('lab'), free_port()
    shorten(ROOT/'nbs'/'tutorials'/'under_the_hand.ipynb', folder)
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1',
                            JUPYTER_CONFIG_DIR=str(folder/'config'), JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'))
    words = ['--no-browser', '--allow-root', '--IdentityProvider.token=', f'--ServerApp.port={port}',
             f'--ServerApp.root_dir={folder}', '--expose-app-in-browser', *quiet]
    news = folder/'settings'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')
    command = [sys.executable, '-m', module, *words]
    with open(folder/'log', 'w') as log: server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(120):
            try: urllib.request.urlopen(f'{address}/api', timeout=1); break
            except OSError: time.sleep(.5)
        yield address, f'{address}/{path}/under_the_hand.ipynb'
    finally: server.terminate(); server.wait(20)


@pytest.fixture(scope='module')
def context():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        args = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
        browser = p.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser.new_context(viewport=dict(width=1400, height=1500))
        browser.close()


@pytest.fixture(scope='module')
def page(lab, context):
    (address, notebook), page = lab, context.new_page()
    page.notebook = notebook
    page.set_default_timeout(120_000)
    page.problems = []
    page.on('pageerror', lambda e: page.problems.append(str(e)))
    def asked(r):
        if not r.url.startswith((address, 'data:', 'blob:')): page.problems.append(f'fetched {r.url}')
    page.on('request', asked)
    page.add_init_script(CLICKS)
    yes = page.locator('.jp-Dialog button.jp-mod-accept:not(.jp-mod-warn)').last     # JupyterLab asks something
    page.add_locator_handler(yes, lambda: yes.click())
    enter(page)
    yield page
    page.close()


def enter(page):
    "Open the notebook; what Jupyter itself says while it starts is none of ours."
    page.goto(page.notebook)
    page.wait_for_function(READY)
    page.problems.clear()


# when a button was clicked, and how long until the widget's state said so
CLICKS = """addEventListener('click', e => {
  const pill = e.target.closest('.dl')?.querySelector('.pill'), was = pill?.textContent, at = performance.now();
  if (!pill || !e.target.closest('button')) return;
  window.click = { at: Date.now() };
  const watch = new MutationObserver(() => {
    if (pill.textContent !== was) { window.click.shown = performance.now() - at; watch.disconnect(); } });
  watch.observe(pill, { childList: true, characterData: true, subtree: true });
}, true)"""


def shot(page, name, widget=None):
    if not SHOTS: return
    Path(SHOTS).mkdir(parents=True, exist_ok=True)
    (widget or page).screenshot(path=f'{SHOTS}/{name}.png')


def widget(page, label):
    found = page.locator(f'.dl[aria-label="{label}"]').first
    found.wait_for(state='visible')
    return found


def until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.1)


def step(monitor): return int(monitor.locator('.num').first.inner_text().split()[1].replace('–', '-1'))
def state(box): return box.locator('.pill').inner_text()


def press(page, monitor, name, reached, answers):
    "Click, wait for the state, note how long screen and training thread took; the step it was reached at."
    monitor.get_by_role('button', name=name).click()
    until(lambda: state(monitor) == reached)
    click, told = page.evaluate('window.click'), float(monitor.locator('.pill').get_attribute('data-told'))
    answers[f'{name}, {len(answers)}'] = round(click['shown']), round(1000*told - click['at'])
    page.wait_for_timeout(400)      # points that were on their way
    return step(monitor)


def theme(page, dark):
    change = "name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})"
    page.evaluate(change, f"JupyterLab {'Dark' if dark else 'Light'}")
    page.wait_for_timeout(1200)


# a command given before the kernel answers is forgotten
READY = """() => { const s = window.jupyterapp?.shell?.currentWidget?.context?.sessionContext;
  return s?.isReady && s.session?.kernel?.status === 'idle' }"""


WITHOUT_KERNEL = """async ([esm, state]) => {
  const module = await import(URL.createObjectURL(new Blob([esm], { type: 'text/javascript' })));
  const heard = {}, model = { get: k => state[k], set: (k, v) => { state[k] = v; }, save_changes() {}, off() {},
    send() {}, on: (event, f) => (heard[event] ??= []).push(f) };
  const drawn = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  const timed = async (work, again = 5) => {
    const took = [];
    for (let i = 0; i < again; i++) {
      const t = performance.now(); work(i); await drawn(); took.push(performance.now() - t); }
    return took.sort((a, b) => a - b)[Math.floor(again / 2)];
  };
  const render = () => { document.body.replaceChildren(); module.default.render({ model, el: document.body }); };
  const out = { draw: await timed(render) };
  const find = label => document.querySelector(`[aria-label="${label}"]`), list = document.querySelector('.list');
  out.sort = await timed(() => find('Sort by margin').click());
  const end = find('The last 160 characters of the prompt contain');
  const type = text => { end.value = text; end.oninput(); };
  out.filter = await timed(i => type('9'.repeat(i % 3 + 1))); type('');
  out.scroll = await timed(i => { list.scrollTop = 40000 * (i + 1); }, 9);
  const tokens = n => Array.from({ length: n }, (_, i) => ['word ', Math.sin(i)]);
  out.open = await timed(i => {
    document.querySelectorAll('.lines .line')[i].click();
    state.detail = { pair: i, prompt: 'a word '.repeat(300), chosen: tokens(400), rejected: tokens(400) };
    heard['change:detail'].forEach(f => f());
  });
  return out;
}"""


def test_ten_thousand_pairs_stay_fluid(context):
    from dpo_lab.widgets import PairBrowser
    draw, n = random.Random(0), 10_000
    def record(pair):
        chosen, rejected = draw.gauss(.5, 1), draw.gauss(-.5, 1)
        return {'pair': pair, 'step': pair//16, 'split': 'train', 'beta': .1, 'loss': .6, 'chosen_logps': -40 + chosen,
                'rejected_logps': -42 + rejected, 'chosen_logratio': chosen, 'rejected_logratio': rejected,
                'chosen_length': draw.randint(5, 60), 'rejected_length': draw.randint(5, 60)}
    prompts = [f'{i}: {"what do you think of it? "*3}' for i in range(n)]
    browser = PairBrowser([record(i) for i in range(n)], prompts=prompts)
    state = {k: v for k, v in browser.get_state().items() if k not in ('layout', '_esm', '_css')}
    page = context.new_page()
    took = page.evaluate(WITHOUT_KERNEL, [browser._esm, state])
    print(f'payload {len(json.dumps(state))/1e6:.1f} MB; ms:', {name: round(ms) for name, ms in took.items()})
    assert page.locator('.lines .line').count() < 40 and f'{n} pairs' in page.locator('.dl').inner_text()
    assert page.locator('.lines .line').first.inner_text() != ''
    assert page.locator('.tok.scored').count() == 800       # one is open
    shot(page, 'ten-thousand')
    page.close()
    assert took['scroll'] < 150 and max(took['sort'], took['filter'], took['open']) < 400       # busy cores
    assert took['draw'] < 1000


# What anywidget's front-end module protocol promises and no more, on pages that fetch nothing: mount() in each of them
HOST = """
addEventListener('error', e => host.problems.push(e.message));
addEventListener('unhandledrejection', e => host.problems.push(`${e.reason}`));
addEventListener('securitypolicyviolation', e => host.problems.push(`fetched ${e.blockedURI}`));
const heard = {}, tell = (event, ...values) => (heard[event] ?? []).forEach(f => f(...values));
window.host = { problems: [], sent: [], heard, tell };
window.mount = async ([esm, state, shadow]) => {
  const { default: widget } = await import(URL.createObjectURL(new Blob([esm], { type: 'text/javascript' })));
  const promised = { get: k => state[k], set: (k, v) => { state[k] = v; tell(`change:${k}`); }, save_changes() {},
    on: (event, f) => (heard[event] ??= []).push(f), send: message => host.sent.push(message), widget_manager: {},
    off: (event, f) => { heard[event] = heard[event].filter(g => g !== f); } };
  const model = new Proxy(promised, { get: (t, k) => { if (k in t) return t[k]; throw Error(`model.${String(k)}`); } });
  const div = document.body.appendChild(document.createElement('div'));
  const el = shadow ? div.attachShadow({ mode: 'open' }).appendChild(document.createElement('div')) : div;
  Object.assign(host, { model, state, leave: await widget.render({ model, el }) });
}"""
CLOSED = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src blob: 'unsafe-inline';
  style-src 'unsafe-inline'">"""

# a page, whether it draws in a shadow root, how it says that it is dark and light
FRONT_ENDS = {
    'VS Code': (f'{CLOSED}<body style="background:transparent">', False,
                ["document.body.className = 'vscode-dark'", "document.body.className = 'vscode-high-contrast'"],
                ["document.body.className = 'vscode-light'",
                 "document.body.className = 'vscode-high-contrast vscode-high-contrast-light'"]),
    'Colab': (f"<iframe sandbox='allow-scripts' style='width:1000px; height:1200px' srcdoc='{CLOSED}<body>'></iframe>",
              False, ["document.documentElement.setAttribute('theme', 'dark')"],
              ["document.documentElement.setAttribute('theme', 'light')"]),
    'shadow root': (f'{CLOSED}<body>', True, ["document.body.style.background = '#111'"],
                    ["document.body.style.background = '#fff'"]),
}


@pytest.fixture(scope='module')
def shown(tmp_path_factory):
    "A widget of each kind, with the run and the sweep it shows."
    from dpo_lab.sweep import sweep
    from dpo_lab.train import Config
    from dpo_lab.widgets import LossExplorer, PairBrowser, SweepPanel, TrainMonitor
    config = Config(log_path=str(tmp_path_factory.mktemp('hosts')/'grid'), max_steps=4, eval_every=2,
                    infrequent_eval_every=0)
    grid = sweep(config, dpo_beta=[.1, .5], learning_rate=[1e-4, 2e-4], seed=[0, 1])
    run = next(iter(grid.runs.values()))
    return {'Loss explorer': LossExplorer(run), 'Training monitor': TrainMonitor(run), 'Sweep panel': SweepPanel(grid),
            'Pair browser': PairBrowser(run, record=1)}


def turn_the_losses(frame, box):
    slider, before = box.get_by_label('beta, logarithmic'), box.locator('table').inner_text()
    slider.focus()
    for _ in range(40): slider.press('ArrowRight')
    until(lambda: box.locator('table').inner_text() != before and frame.evaluate('host.state.beta') > .2, 10)
    box.get_by_role('checkbox', name='ipo', exact=True).check()
    until(lambda: box.locator('table tr').count() == 3, 10)


def steer_a_run(frame, box):
    frame.evaluate("host.model.set('status', { ...host.state.status, live: true, steerable: true, state: 'running' })")
    beta = box.get_by_label('beta from the next step')
    beta.focus()
    frame.evaluate("host.model.set('fields', { dpo_beta: .7, learning_rate: 1, loss: 'ipo' })")
    assert beta.input_value() == '0.1'      # under the hand
    beta.fill('0.3')
    def sent(): return frame.evaluate('host.sent')[-1]
    apply = {'do': 'change', 'dpo_beta': '0.3'}
    for button, message in (('Pause the training', {'do': 'pause'}), ('Apply beta', apply)):
        box.get_by_role('button', name=button).click()
        assert sent() == message
    # a finished run is not cut short by one click, and is forked where it is told
    frame.evaluate("host.model.set('checkpoints', [2, 4])")
    frame.evaluate("host.model.set('status', { ...host.state.status, state: 'finished' })")
    box.get_by_label('Checkpoint to rewind to').select_option(index=0)
    rewind, last = box.get_by_label('Rewind to the chosen'), sent()
    rewind.click()
    assert sent() == last and 'lose what came after' in rewind.inner_text()
    rewind.click()
    assert sent() == {'do': 'rewind', 'step': 2}
    box.get_by_role('button', name='Fork from the chosen checkpoint').click()
    assert sent() == {'do': 'fork', 'path': '', 'step': 2, 'dpo_beta': '0.3'}
    frame.evaluate("""host.tell('msg:custom', { type: 'points', id: 1, start: host.state.points.length,
                                                points: [[99, { margin: 7 }, {}]] })""")
    until(lambda: 'Newest: margin 7' in box.locator('canvas').first.get_attribute('aria-label'), 10)


def choose_a_point(frame, box):
    cell = box.locator('.heat .cell')
    cell.nth(1).focus()
    frame.evaluate("host.tell('msg:custom', { type: 'grown', points: [] })")
    frame.wait_for_timeout(200)
    assert box.locator('.heat .cell:focus').count() == 1    # drawn anew, and the keyboard is still there
    cell.nth(1).press('ArrowDown')
    box.locator('.heat .cell:focus').press('Enter')
    until(lambda: 'python -m dpo_lab.train' in box.inner_text(), 10)
    assert 'dpo_beta=0.5' in frame.evaluate('host.state.chosen')
    lines, said = box.get_by_label('Parallel coordinates'), []
    lines.focus()
    for _ in range(2):
        lines.press('ArrowDown')
        until(lambda: box.locator('.plot .sr').last.inner_text() not in ('', *said), 10)
        said.append(box.locator('.plot .sr').last.inner_text())
    assert float(said[0].split()[-1]) >= float(said[1].split()[-1])     # from the best to the worst
    lines.press('Enter')
    until(lambda: frame.evaluate('host.state.chosen') == said[1].split(': ')[0], 10)
    # a pointer on a line chooses it too, and so do the keys on the curves
    def chosen(): return frame.evaluate('host.state.chosen')
    for y in range(30, 160, 5):
        lines.click(position={'x': lines.bounding_box()['width']/2, 'y': y})
        if chosen() != said[1].split(': ')[0]: break
    curves, clicked = box.get_by_label('Up and down arrows go from curve to curve'), chosen()
    assert clicked != said[1].split(': ')[0] and clicked in frame.evaluate('host.state.points.map(p => p.name)')
    curves.focus()
    for _ in range(8):
        curves.press('ArrowDown')
        curves.press('Enter')
        if chosen() != clicked: break
    assert chosen() != clicked
    copy = box.get_by_role('button', name='Copy the line of Python').first
    copy.click()
    until(lambda: copy.inner_text() in ('Copied', 'Selected'), 10)


def open_a_pair(frame, box):
    assert box.locator('.tok.scored').count()
    text = box.get_by_label('chosen completion')
    text.focus()
    text.press('ArrowRight')
    assert text.locator('.tok.here').count() == 1
    until(lambda: 'nats' in box.locator('.sides .sr').first.inner_text(), 10)
    box.locator('.lines .line').nth(1).click()
    assert frame.evaluate('host.sent')[-1] == {'do': 'open', 'pair': frame.evaluate('host.state.opened')}
    frame.evaluate("host.model.set('detail', { ...host.state.details[0], prompt: 'And now?' })")
    until(lambda: 'And now?' in box.inner_text(), 10)


USED = {'Loss explorer': turn_the_losses, 'Training monitor': steer_a_run, 'Sweep panel': choose_a_point,
        'Pair browser': open_a_pair}


@pytest.mark.parametrize('front_end', FRONT_ENDS)
@pytest.mark.parametrize('label', USED)
def test_a_widget_asks_of_a_front_end_what_the_protocol_promises(context, shown, label, front_end):
    html, shadow, dark, light = FRONT_ENDS[front_end]
    state = {k: v for k, v in shown[label].get_state().items() if k not in ('layout', '_esm', '_css')}
    page = context.new_page()
    page.add_init_script(HOST)
    page.goto('about:blank')
    page.set_content(html)
    frame = page.frames[-1]
    frame.evaluate('all => mount(all)', [shown[label]._esm, json.loads(json.dumps(state)), shadow])
    box = frame.locator(f'.dl[aria-label="{label}"]')
    for theme, other, ways in (('dl dark', 'light', dark), ('dl', 'dark', light)):
        page.emulate_media(color_scheme=other)      # what the browser would rather have
        for way in ways:
            frame.evaluate(f'() => {{ {way} }}')
            frame.locator(f'[class="{theme}"][aria-label="{label}"]').wait_for(timeout=10_000)
            shot(page, f'{front_end} {label} {theme}')
    USED[label](frame, box)
    frame.evaluate('host.leave()')
    assert not frame.evaluate("(host.heard['msg:custom'] ?? []).length")
    assert frame.evaluate('host.problems') == []
    page.close()


def test_a_person_works_with_the_tutorial(page):
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    monitor = widget(page, 'Training monitor')
    monitor.scroll_into_view_if_needed()
    until(lambda: step(monitor) > 4)
    # another beta in the middle
    monitor.get_by_label('beta from the next step').fill('0.6')
    monitor.get_by_role('button', name='Apply beta').click()
    until(lambda: 'dpo_beta 0.1 → 0.6' in monitor.inner_text())
    # pause, and nothing moves; continue, and it does
    answers = {}
    held = press(page, monitor, 'Pause the training', 'paused', answers)
    page.wait_for_timeout(600)
    assert step(monitor) == held
    shot(page, 'monitor-light', monitor)
    theme(page, dark=True)
    until(lambda: 'dark' in monitor.get_attribute('class'))
    shot(page, 'monitor-dark', monitor)
    press(page, monitor, 'Continue the training', 'running', answers)
    until(lambda: step(monitor) > max(held, 21))     # past the first held-out measurement
    stopped = press(page, monitor, 'Stop the training', 'stopped', answers)
    press(page, monitor, 'Continue the training', 'running', answers)
    until(lambda: step(monitor) > stopped)
    until(lambda: state(monitor) == 'finished')
    print('ms from a click to the screen, and to the training thread:', answers)
    assert not page.problems
    if SHOTS: Path(SHOTS, 'answers.txt').write_text(str(answers))
    assert median(shown for shown, _ in answers.values()) < 200     # a busy machine may delay one of them


def test_the_keyboard_reads_a_curve(page):
    monitor = widget(page, 'Training monitor')
    curve = monitor.locator('canvas').first
    curve.focus()
    for _ in range(3): curve.press('ArrowLeft')
    assert 'margin' in monitor.locator('.plot .sr').first.inner_text()
    assert 'Newest: margin' in curve.get_attribute('aria-label')


def test_the_pointer_reads_zooms_and_smooths(page):
    monitor = widget(page, 'Training monitor')
    curve, tip = monitor.locator('canvas').first, monitor.locator('.tip').first
    curve.scroll_into_view_if_needed()
    box = curve.bounding_box()
    def read(x):
        page.mouse.move(box['x'] + x, box['y'] + 60)
        until(lambda: 'margin' in tip.inner_text())
        return int(tip.inner_text().split()[1])
    def drag(a, b): page.mouse.move(box['x'] + a, box['y'] + 60); page.mouse.down(); read(b); page.mouse.up()
    first = read(50)
    drag(130, 180)
    until(lambda: read(50) > first)
    page.mouse.dblclick(box['x'] + 50, box['y'] + 60)
    until(lambda: read(50) == first)
    slider = monitor.get_by_label('smoothing of the curves')
    slider.focus()
    for _ in range(40): slider.press('ArrowRight')
    until(lambda: slider.input_value() == '0.8')
    axis = monitor.get_by_role('button', name='margin: vertical axis is linear')
    axis.click()
    monitor.get_by_role('button', name='margin: vertical axis is logarithmic').click()
    shot(page, 'smoothed-light', monitor)


def test_keys_stay_in_the_widget_that_has_them(page):
    monitor, notebook = widget(page, 'Training monitor'), 'window.jupyterapp.shell.currentWidget.content'
    cells = page.evaluate(f'{notebook}.widgets.length')
    for key in 'ddxb': monitor.get_by_role('button', name='Show all steps').press(key)      # would delete, cut, insert
    monitor.get_by_label('Checkpoint to rewind to').press('ArrowUp')
    assert page.evaluate(f'{notebook}.widgets.length') == cells
    assert page.evaluate('document.activeElement.getAttribute("aria-label")') == 'Checkpoint to rewind to'
    unnamed = '''() => [...document.querySelectorAll('.dl :is(button, input, select, canvas, progress, [tabindex])')]
        .filter(n => !(n.ariaLabel || n.labels?.length || n.tagName === 'BUTTON' && n.textContent))
        .filter(n => !n.matches('.text')).map(n => n.outerHTML)'''
    assert page.evaluate(unnamed) == []


def test_a_sweep_is_started_watched_stopped_continued_and_chosen_from(page):
    panel = widget(page, 'Sweep panel')
    panel.scroll_into_view_if_needed()
    panel.get_by_label('most steps of a point').fill('5')
    panel.get_by_role('button', name='Start').click()
    until(lambda: panel.locator('.heat .cell').count() == 9)
    until(lambda: any(cell[:1].isdigit() for cell in panel.locator('.heat .cell').all_inner_texts()))   # a value came
    panel.get_by_role('button', name='Stop').press('Enter')
    until(lambda: state(panel) == 'stopped')
    assert panel.locator('button:focus').count() == 1       # Stop switched itself off; the keyboard is still here
    panel.get_by_role('button', name='Continue').click()
    until(lambda: state(panel) == 'finished', 200)
    assert panel.locator('.heat').inner_text().count('done') == 9
    cell = panel.locator('.heat .cell').nth(4)
    cell.click()
    until(lambda: 'run_dpo(Config(' in panel.inner_text() and 'python -m dpo_lab.train' in panel.inner_text())
    assert 'dpo_beta=0.1' in panel.inner_text() and 'best held-out accuracy' in panel.inner_text()
    curve = panel.locator('.plot canvas').first.bounding_box()
    page.mouse.move(curve['x'] + curve['width'] - 20, curve['y'] + 60)      # a curve under the pointer lights its cell
    until(lambda: panel.locator('.heat .cell.lit').count() == 1)
    shot(page, 'sweep-dark', panel)
    theme(page, dark=False)
    until(lambda: 'dark' not in panel.get_attribute('class'))
    shot(page, 'sweep-light', panel)
    assert not page.problems


def test_a_pair_opens_to_its_tokens(page):
    browser = widget(page, 'Pair browser')
    browser.scroll_into_view_if_needed()
    assert browser.locator('.lines .line').count() < 40 and ' pairs' in browser.inner_text()
    for kind in ('flipped', 'suspect'):
        box = browser.get_by_role('checkbox', name=kind)
        n = re.search(r'\d+', browser.locator('label', has_text=kind).inner_text())[0]
        box.check()
        assert browser.get_by_role('status').first.inner_text().startswith(f'{n} of ')
        box.uncheck()
    for header in browser.get_by_role('columnheader').all():
        header.get_by_role('button').click()
        assert header.get_attribute('aria-sort') in ('ascending', 'descending')
    browser.get_by_role('button', name='Sort by delta').click()
    deltas = [float(row.locator('span').nth(3).inner_text()) for row in browser.locator('.lines .line').all()]
    assert deltas == sorted(deltas)
    grid = browser.get_by_role('grid')
    grid.focus(); grid.press('ArrowDown'); grid.press('Enter')
    browser.locator('.tok.scored').first.wait_for()
    assert 'nats since the reference' in browser.inner_text() and 'credit_map' in browser.inner_text()
    shot(page, 'pairs-light', browser)
    theme(page, dark=True); shot(page, 'pairs-dark', browser)


def test_a_slider_turns_the_losses(page):
    explorer = page.locator('.dl[aria-label="Loss explorer"]').nth(1)
    explorer.scroll_into_view_if_needed()
    before = explorer.locator('table').inner_text()
    slider = explorer.get_by_label('beta, logarithmic')
    slider.focus()
    for _ in range(40): slider.press('ArrowRight')
    until(lambda: explorer.locator('table').inner_text() != before)
    shot(page, 'losses-dark', explorer)
    theme(page, dark=False); shot(page, 'losses-light', explorer)
    assert not page.problems


def records(path): return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_is_taken_back_changed_found_in_a_reopened_notebook_and_forked(page):
    monitor = widget(page, 'Training monitor')
    run = Path(monitor.locator('.num').first.inner_text().split(' · ')[1])
    def taken(path=run): return [record['step'] for record in records(path/'metrics.jsonl')]
    def rewind(monitor):
        kept = monitor.get_by_label('Checkpoint to rewind to')
        kept.select_option(index=0)
        button = monitor.get_by_label('Rewind to the chosen')
        button.click()
        if 'lose what came after' in button.inner_text(): button.click()
        until(lambda: 'back at step' in monitor.inner_text())
        return int(kept.input_value())
    until(lambda: monitor.locator('.pill').inner_text() in ('finished', 'stopped', 'paused'))
    at = rewind(monitor)
    until(lambda: step(monitor) == at - 1)
    # another rate and loss from the next step
    monitor.get_by_label('learning rate from the next step').fill('0.0005')
    monitor.get_by_label('loss from the next step', exact=True).fill('ipo')
    monitor.get_by_role('button', name='Apply beta').click()
    until(lambda: 'loss sigmoid → ipo' in monitor.inner_text())
    monitor.get_by_role('button', name='Continue the training').click()
    # it goes on while the notebook is closed, and answers when it is open again
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    lab = '/lab/' in page.notebook
    if lab: page.evaluate("window.jupyterapp.shell.currentWidget.close()")
    else:
        assert not page.problems
        page.goto('about:blank')
    until(lambda: not page.locator('.dl').count())
    until(lambda: max(taken()) > at + 2)
    changed = [e for e in records(run/'events.jsonl') if e['event'] == 'changed'][-1]
    assert changed['step'] == at and changed['changed'] == {'learning_rate': [2e-4, 5e-4], 'loss': ['sigmoid', 'ipo']}
    rates = {record['step']: record['learning_rate'] for record in records(run/'metrics.jsonl')}
    assert rates[at] > 2*rates[at - 1]
    if lab: page.evaluate("void window.jupyterapp.commands.execute('docmanager:open', {path: 'under_the_hand.ipynb'})")
    else: enter(page)
    monitor = widget(page, 'Training monitor')
    until(lambda: step(monitor) >= at)
    assert rewind(monitor) == at
    # a fork trains on in a folder of its own, the source stays one run
    monitor.get_by_label('Folder of the fork').fill(str(run.with_name('fork')))
    monitor.get_by_role('button', name='Fork from here').click()
    until(lambda: 'forked into' in monitor.inner_text())
    begun = [e['step'] for e in records(run.with_name('fork')/'events.jsonl') if e['event'] == 'forked'][0]
    until(lambda: max(taken(run.with_name('fork'))) > begun)
    assert len(taken()) == len(set(taken())) and [e['event'] for e in records(run/'events.jsonl')].count('started') == 1
    assert not page.problems

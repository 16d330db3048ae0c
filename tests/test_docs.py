"The documentation site: every page renders, every link leads somewhere, every public name is there, widgets live."
import ast
import base64
import json
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip('latex2mathml', reason="the site needs latex2mathml: pip install 'dpo_lab[dev]'")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'.ci'))
docs = runpy.run_path(str(ROOT/'.ci'/'docs.py'))


class Reader(HTMLParser):
    "What a page links to, what can be linked to, its pictures, and whether its tags close."
    alone = {*'meta link img br hr input mspace col path rect line circle use source'.split()}

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.loads, self.images, self.open, self.text = [], set(), [], [], [], []
        self.twice = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if given.get('id') in self.ids: self.twice.append(given['id'])
        if 'id' in given: self.ids.add(given['id'])
        if tag == 'a' and given.get('href'): self.links.append(given['href'])
        if tag in ('script', 'img', 'link'): self.loads += [given[k] for k in ('src', 'href') if given.get(k)]
        if tag == 'img': self.images.append(given['src'])
        if tag not in self.alone: self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.alone: self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.alone: return
        if tag in self.open:
            while self.open.pop() != tag: pass

    def handle_data(self, data): self.text.append(data)


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    docs['build'](folder)
    return folder


@pytest.fixture(scope='session')
def pages(site):
    return {p.relative_to(site).as_posix(): Reader(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}


def test_every_notebook_has_a_page(pages):
    for nb in (ROOT/'nbs').rglob('*.ipynb'):
        if {'.ipynb_checkpoints', 'runs'} & {*nb.parts}: continue
        assert nb.relative_to(ROOT/'nbs').with_suffix('.html').as_posix() in pages


def test_every_public_name_has_an_entry_with_its_source(pages):
    for module in (ROOT/'dpo_lab').glob('[a-z]*.py'):
        tree = ast.parse(module.read_text())
        names = next(ast.literal_eval(n.value) for n in tree.body
                     if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__')
        page = pages[f'api/{module.stem}.html']
        assert not [name for name in names if name not in page.ids], module.stem
        lines = pages[f'source/{module.stem}.html'].ids
        assert {f'L{n.lineno}' for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))} <= lines


def test_an_entry_has_signature_comments_and_defaults(pages):
    text = re.sub(r'\s+', ' ', ''.join(pages['api/losses.html'].text))
    assert 'dpo_loss(logps: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor' in text
    assert 'Negative log-likelihood that the chosen completion wins.' in text
    assert 'chance that a label is flipped, in [0, 0.5)' in text
    of_a_config = 'pull towards the reference: larger stays closer'
    assert of_a_config in ''.join(pages['api/train.html'].text)


def test_every_link_leads_somewhere(pages, site):
    lost = []
    for url, page in pages.items():
        for link in page.links + page.loads:
            at = urlsplit(link)
            if at.scheme in ('http', 'https', 'data', 'mailto'): continue
            target = (site/url).parent/unquote(at.path) if at.path else site/url
            if not target.resolve().is_file(): lost.append((url, link)); continue
            name = target.resolve().relative_to(site.resolve()).as_posix()
            if at.fragment and name in pages and unquote(at.fragment) not in pages[name].ids: lost.append((url, link))
    assert not lost, lost[:20]


def test_the_link_test_sees_a_broken_link(pages, site):
    with pytest.raises(AssertionError, match='nowhere'):
        test_every_link_leads_somewhere(pages | {'x.html': Reader('<a href="nowhere.html">x</a>')}, site)


def test_nothing_is_loaded_from_elsewhere(pages, site):
    for url, page in pages.items():
        assert not [link for link in page.loads if urlsplit(link).scheme in ('http', 'https')], url
        assert not re.search(r'(import\(?\s*|from\s+)[\'"]https?:', (site/url).read_text(encoding='utf-8')), url
    afar = r'(@import|url\(|fetch\(|import\()\s*[\'"]?https?:'
    for file in [*site.glob('*.css'), *site.glob('site.js'), *site.glob('widgets.js')]:
        assert not re.search(afar, file.read_text(encoding='utf-8')), file.name


def test_pages_are_whole_and_light(pages, site):
    for url, page in pages.items():
        size = (site/url).stat().st_size
        assert size < 2_000_000, f'{url} has {size} bytes'
        assert not page.open, f'{url} leaves {page.open} open'
        assert not page.twice, f'{url} gives the same id to two places: {page.twice}'
        text = ''.join(page.text)
        assert 'Traceback (most recent call last)' not in text, url
        assert len(text.split()) > 100, f'{url} says nearly nothing'


def colours(png):
    "Whether the pixels of a PNG differ at all: an empty picture is one repeated row of one repeated pixel."
    assert png[:8] == b'\x89PNG\r\n\x1a\n'
    at, data = 8, b''
    while at < len(png):
        size, kind = struct.unpack('>I4s', png[at:at+8])
        if kind == b'IHDR': width, height, depth, colour = struct.unpack('>IIBB', png[at+8:at+18])
        if kind == b'IDAT': data += png[at+8:at+8+size]
        at += size + 12
    raw, channels = zlib.decompress(data), {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = len(raw)//height
    rows = {raw[i*row+1:(i+1)*row] for i in range(height)}
    return len(rows) + max(len({r[i:i+channels] for i in range(0, len(r), channels)}) for r in rows)


def test_no_picture_is_empty(pages, site):
    seen = 0
    for url, page in pages.items():
        for source in page.images:
            if source.startswith('data:image/png'): png = base64.b64decode(source.split(',', 1)[1])
            elif source.endswith('.png'): png = ((site/url).parent/source).read_bytes()
            else: continue
            seen += 1
            assert colours(png) > 8, f'{url}: an empty picture'
    assert seen > 20


def test_an_empty_picture_is_seen():
    def number(n): return struct.pack('>I', n)
    def chunk(kind, data): return number(len(data)) + kind + data + number(zlib.crc32(kind + data))
    white = zlib.compress((b'\0' + b'\xff'*30)*10)
    head = struct.pack('>IIBBBBB', 10, 10, 8, 2, 0, 0, 0)
    assert colours(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', white) + chunk(b'IEND', b'')) <= 8


def test_formulas_are_set(pages, site):
    text = (site/'00_losses.html').read_text(encoding='utf-8')
    assert text.count('<math') > 50
    for url in pages:
        if url.startswith('source/'): continue
        words = re.sub(r'<(pre|code|script|style)\b.*?</\1>', '', (site/url).read_text(encoding='utf-8'), flags=re.S)
        assert not re.findall(r'\$[^$\s][^$\n]{0,80}\$|\\(?:frac|log|sigma|beta)\b', re.sub(r'<[^>]+>', '', words)), url


def test_the_teachers_page_has_sixty_lines():
    notebook = json.loads((ROOT/'nbs/tutorials/dpo_from_scratch.ipynb').read_text())
    cells = [''.join(c['source']) for c in notebook['cells'] if c['cell_type'] == 'code']
    ours = [source for source in cells if 'dpo_lab' not in source and 'theirs' not in source
            and 'Shell' not in source and 'shell' not in source]
    lines = [line for source in ours for line in source.splitlines() if line.strip() and not line.startswith('#|')]
    assert len(lines) <= 60, len(lines)
    assert {line.split()[1].split('.')[0] for line in lines if re.match(r'(import|from) ', line)} <= {'torch', 'copy'}


def test_quarto_would_find_its_settings():
    import yaml
    settings = yaml.safe_load((ROOT/'nbs'/'_quarto.yml').read_text())
    assert settings['project']['type'] == 'website'
    assert settings['metadata-files'] == ['nbdev.yml']
    named = [item['href'] if isinstance(item, dict) else item for item in re.findall(r'[\w/]+\.ipynb', str(settings))]
    assert named and not [name for name in named if not (ROOT/'nbs'/name).is_file()]


def test_nbdevs_own_docs_command_gets_as_far_as_quarto(tmp_path):
    for name in ('nbs', 'dpo_lab', 'pyproject.toml', 'settings.ini', 'README.md'):
        copy = shutil.copytree if (ROOT/name).is_dir() else shutil.copy
        copy(ROOT/name, tmp_path/name)
    nbdev = Path(sys.executable).with_name('nbdev-proc-nbs')
    done = subprocess.run([nbdev], cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(tmp_path)}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob('_proc/*.ipynb'))) == len(list((ROOT/'nbs').glob('*.ipynb')))


# -- widgets without a kernel

SLIDER = '''
export default { render({ model, el }) {
  el.innerHTML = '<input type="range" min="0" max="10" step="1"><output></output>'
  const slider = el.querySelector('input'), shown = el.querySelector('output')
  const draw = () => { shown.textContent = 'twice ' + 2*model.get('value'); slider.value = model.get('value') }
  slider.oninput = () => { model.set('value', Number(slider.value)); model.save_changes() }
  model.on('change:value', draw)
  draw()
} }'''


@pytest.fixture(scope='module')         # its event loop must be gone when tests elsewhere start theirs
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='needs playwright: pip install playwright')
    path = os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which('google-chrome')
    with sync_api.sync_playwright() as p:
        flags = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
        try: opened = p.chromium.launch(executable_path=path, args=flags)
        except sync_api.Error as e: pytest.skip(f'no browser: {str(e).splitlines()[0]}; set CHROMIUM to one')
        yield opened
        opened.close()


@pytest.fixture(scope='session')
def widget_page(site):
    "A page of two linked views of one anywidget in a box, with bytes in its state, as a saved notebook holds it."
    anywidget = pytest.importorskip('anywidget', reason="needs anywidget: pip install 'dpo_lab[lab]'")
    import ipywidgets
    import nbformat
    import traitlets
    class Twice(anywidget.AnyWidget):
        _esm = SLIDER
        value = traitlets.Int(3).tag(sync=True)
        raw = traitlets.Bytes(b'\1\2\3').tag(sync=True)
    one = Twice()
    box = ipywidgets.VBox([one, ipywidgets.HTML('<b>under it</b>')])
    state = ipywidgets.Widget.get_manager_state(widgets=None)
    view = 'application/vnd.jupyter.widget-view+json'
    cells = [nbformat.v4.new_markdown_cell('# Widgets')] + [nbformat.v4.new_code_cell('show()', outputs=[
        nbformat.v4.new_output('display_data', {view: {'model_id': w.model_id}})]) for w in (box, one)]
    nb = nbformat.v4.new_notebook(cells=cells)
    nb.metadata['widgets'] = {'application/vnd.jupyter.widget-state+json': state}
    nbformat.write(nb, site/'widgets.ipynb')
    page = docs['notebook_page'](site/'widgets.ipynb', 'widgets-test.html', 'Tutorials', {})
    docs['write_page'](page, [page], site)
    return site/'widgets-test.html'


def test_a_slider_moves_without_a_kernel(browser, widget_page):
    page, errors = watched(browser)
    page.goto(widget_page.as_uri())
    page.wait_for_selector('output')
    assert page.locator('output').all_inner_texts() == ['twice 6', 'twice 6']
    assert page.get_by_text('under it').is_visible()
    drag(page, page.locator('input[type=range]').first, .95)
    assert page.locator('output').all_inner_texts() == ['twice 20', 'twice 20']     # two views of one model
    assert not errors


def drag(page, slider, share):
    "Take the handle of a slider where it is and let go at a share of its width."
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    low, high, now = (float(slider.evaluate(f'e => {what}')) for what in ('e.min || 0', 'e.max || 100', 'e.value'))
    page.mouse.move(box['x'] + 8 + (box['width'] - 16)*(now - low)/(high - low), box['y'] + box['height']/2)
    page.mouse.down()
    page.mouse.move(box['x'] + box['width']*share, box['y'] + box['height']/2, steps=8)
    page.mouse.up()


def watched(browser):
    "A new page, and what goes wrong in it."
    page, errors = browser.new_page(), []
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.on('request', lambda r: errors.append(r.url) if r.url.startswith('http') else None)
    return page, errors


def test_the_beta_slider_of_the_docs_moves(browser, site, pages):
    shown = [url for url in pages if 'class="widget"' in (site/url).read_text(encoding='utf-8')]
    shown = [url for url in shown if url != 'widgets-test.html']
    if not shown: pytest.skip('no page of the notebooks shows a widget yet')
    moved = 0
    for url in shown:
        page, errors = watched(browser)
        page.goto((site/url).as_uri())
        page.wait_for_timeout(500)
        for slider in page.locator('.widget input[type=range]:visible').all()[:1]:
            widget = slider.locator('xpath=ancestor::*[@class="widget"]').last
            before, value = widget.screenshot(), slider.input_value()
            low = slider.evaluate('e => e.value - (e.min || 0) < .6*((e.max || 100) - (e.min || 0))')
            drag(page, slider, .9 if low else .1)
            assert slider.input_value() != value and widget.screenshot() != before, url
            moved += 1
        assert not errors, (url, errors)
        page.close()
    assert moved, f'none of {shown} has a slider'


def test_search_finds_a_name_and_theme_turns(browser, site):
    page = browser.new_page(color_scheme='light')
    page.goto((site/'index.html').as_uri())
    page.fill('#site-search', 'dpo_loss')
    page.wait_for_selector('#site-found a')
    assert page.locator('#site-found a').first.get_attribute('href') == 'api/losses.html#dpo_loss'
    page.keyboard.press('Enter')
    page.wait_for_url('**/api/losses.html#dpo_loss')
    paper = 'getComputedStyle(document.body).backgroundColor'
    light = page.evaluate(paper)
    page.click('#site-theme')
    assert page.evaluate(paper) != light
    page.reload()
    assert page.evaluate(paper) != light                # it is remembered


def test_pages_fit_a_phone(browser, site):
    page = browser.new_page(viewport=dict(width=390, height=800))
    for url in ('index.html', '00_losses.html', 'api/train.html', 'tutorials/dpo_from_scratch.html'):
        page.goto((site/url).as_uri())
        assert page.evaluate('document.documentElement.scrollWidth') <= 390, url
    page.click('#site-open-menu')
    assert page.get_by_role('link', name='The story').is_visible()


def test_a_copy_button_copies(browser, site):
    context = browser.new_context(permissions=['clipboard-read', 'clipboard-write'])
    page = context.new_page()
    page.goto((site/'tutorials/dpo_from_scratch.html').as_uri())
    page.locator('main .code').first.hover()
    page.locator('main .code .copy').first.click()
    assert page.evaluate('navigator.clipboard.readText()').startswith('import copy\nimport torch')

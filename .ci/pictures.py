"Draws the widgets saved with the chapter `widgets`, without a kernel, into nbs/images/: python .ci/pictures.py"
import json
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
NAMED = {'Training monitor': 'monitor', 'Sweep panel': 'sweep_panel', 'Loss explorer': 'loss_explorer',
         'Pair browser': 'pair_browser'}
SHIM = """async ([esm, state, dark]) => {
  document.body.style.background = dark ? '#111' : '#fff';
  const module = await import(URL.createObjectURL(new Blob([esm], { type: 'text/javascript' })));
  const model = { get: k => state[k], set: (k, v) => { state[k] = v; }, on() {}, off() {}, save_changes() {} };
  document.body.replaceChildren(); module.default.render({ model, el: document.body });
}"""


def main():
    notebook = json.loads((ROOT/'nbs'/'17_widgets.ipynb').read_text())
    kept = notebook['metadata']['widgets']['application/vnd.jupyter.widget-state+json']['state'].values()
    with sync_playwright() as p:
        chromium = os.environ.get('CHROMIUM') or shutil.which('chromium')
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1100, height=900))
        page.on('pageerror', lambda e: print('error:', e))
        for state in (s['state'] for s in kept if '_esm' in s['state']):
            for dark in (False, True):
                page.goto('about:blank')
                page.evaluate(SHIM, [state['_esm'], state, dark])
                page.wait_for_timeout(700)
                box = page.locator('.dl')
                name = NAMED[box.get_attribute('aria-label')]
                box.screenshot(path=ROOT/'nbs'/'images'/f"{name}{'_dark'*dark}.png")
        browser.close()


if __name__ == '__main__': main()

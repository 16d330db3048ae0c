"Draws the widgets saved with the chapter `widgets`, without a kernel, into nbs/images/: python .ci/pictures.py"
import os
import shutil

from docs import ROOT, pictured
from playwright.sync_api import sync_playwright

SHIM = """async ([esm, state, dark]) => {
  document.body.style.background = dark ? '#111' : '#fff';
  const module = await import(URL.createObjectURL(new Blob([esm], { type: 'text/javascript' })));
  const model = { get: k => state[k], set: (k, v) => { state[k] = v; }, on() {}, off() {}, save_changes() {} };
  document.body.replaceChildren(); module.default.render({ model, el: document.body });
}"""


def main():
    with sync_playwright() as p:
        chromium = os.environ.get('CHROMIUM') or shutil.which('chromium')
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1100, height=900))
        page.on('pageerror', lambda e: print('error:', e))
        for picture, (name, models) in pictured().items():
            state = models[name]['state']
            for dark in (False, True):
                page.goto('about:blank')
                page.evaluate(SHIM, [state['_esm'], state, dark])
                page.wait_for_timeout(700)
                box = page.locator('.dl')
                box.screenshot(path=ROOT/'nbs'/'images'/f"{picture}{'_dark'*dark}.png")
        browser.close()


if __name__ == '__main__': main()

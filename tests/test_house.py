"The house: floors, versions, packaging, what is committed."
import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def sources(notebook): return [''.join(cell['source']) for cell in json.loads(notebook.read_text())['cells']]


CHAPTERS = {m[1]: nb for nb in sorted((ROOT/'nbs').glob('*.ipynb'))
            if (m := re.search(r'^#\|\s*default_exp (\S+)', '\n'.join(sources(nb)), re.M))}
FLOOR = {module: (int(nb.name[:2]), nb.name[2:].split('_')[0]) for module, nb in CHAPTERS.items()}     # 15b: (15, 'b')
SETTINGS = configparser.ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini')


def imports(module):
    "Modules of the package that a module imports, anywhere in it."
    for node in ast.walk(ast.parse((ROOT/'dpo_lab'/f'{module}.py').read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('dpo_lab.')):
            yield (node.module or '').removeprefix('dpo_lab.')


@pytest.mark.parametrize('module', FLOOR)
def test_a_chapter_imports_lower_floors_only(module):
    others = [other for other in imports(module) if other in FLOOR and other != module]
    upward = [other for other in others if FLOOR[other] >= FLOOR[module]]
    assert not upward, f'{module} (floor {FLOOR[module]}) imports {upward}'


@pytest.mark.parametrize('module', FLOOR)
def test_only_plots_and_widgets_draw(module):
    text = (ROOT/'dpo_lab'/f'{module}.py').read_text()
    if module != 'widgets': assert not re.search(r'^\s*(import|from) (ipywidgets|anywidget)', text, re.M)
    if module not in ('plots', 'widgets'): assert not re.search(r'^\s*(import|from) (matplotlib|seaborn)', text, re.M)


def test_runs_imports_no_torch():
    code = 'import sys, dpo_lab.runs; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_the_command_line_answers_without_torch():
    code = 'import sys, dpo_lab.train; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_versions_agree():
    import dpo_lab
    assert dpo_lab.__version__ == SETTINGS['DEFAULT']['version']


def test_no_chapter_is_committed_with_a_traceback_or_a_large_output():
    for nb in (ROOT/'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in nb.parts or 'runs' in nb.parts: continue
        for cell in json.loads(nb.read_text())['cells']:
            for output in cell.get('outputs', []):
                assert output['output_type'] != 'error', f'{nb.name}: a traceback'
                assert len(json.dumps(output)) < 400_000, f'{nb.name}: an output of {len(json.dumps(output))} bytes'


def test_exported_cells_fit_on_a_screen():
    for nb in CHAPTERS.values():
        for source in sources(nb):
            if re.search(r'^#\|\s*export', source, re.M):
                lines = [line for line in source.splitlines() if line.strip() and not line.startswith('#|')]
                assert len(lines) <= 60, f'{nb.name}: an exported cell of {len(lines)} lines begins {lines[0]!r}'


def test_every_public_function_says_what_comes_back():
    for module in CHAPTERS:
        for node in ast.parse((ROOT/'dpo_lab'/f'{module}.py').read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
                assert ast.get_docstring(node), f'{module}.{node.name} has no docstring'


def test_the_readme_is_the_index():
    import runpy
    assert (ROOT/'README.md').read_text() == runpy.run_path(str(ROOT/'.ci'/'readme.py'))['readme'](), 'run: make readme'


@pytest.mark.parametrize('page', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'])
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r'\]\((?!\w+:|#)([^)#]+)', (ROOT/page).read_text())
    assert not [link for link in links if not (ROOT/link).exists()]


def test_run_all_in_a_notebook_starts_no_command():
    guards = [line for path in (ROOT/'nbs').glob('*.ipynb') for line in path.read_text().splitlines()
              if "if __name__ == '__main__'" in line]
    assert guards and all("'__file__' in globals()" in line for line in guards)

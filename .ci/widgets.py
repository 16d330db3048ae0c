"""Runs notebooks and keeps what their widgets show, so that they live on the site: `python .ci/widgets.py nbs/X.ipynb`.

Cells that show a widget with JavaScript of its own get their new outputs, and the notebook the state of those widgets;
all else stays as it is. JupyterLab does the same under Settings > Save Widget State Automatically.
"""
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from docs import ROOT, STATE, VIEW, state_of
from nbclient import NotebookClient


def run(path):
    "The notebook with the outputs of now."
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == 'code' and re.search(r'^#\|\s*eval:\s*false', cell.source, re.M): cell.source = ''
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    folder = {'metadata': {'path': str(path.parent)}}
    return NotebookClient(nb, timeout=600, kernel_name='python3', resources=folder).execute()


def with_widgets(path):
    "The notebook as it is, with the outputs and the state of its widgets."
    kept, ran, shown = nbformat.read(path, 4), run(path), {}
    models = ran.metadata.get('widgets', {}).get(STATE, {}).get('state', {})
    def lives(output): # whether it shows a widget that needs no kernel; a progress bar is none
        state = state_of(models, [output.data[VIEW]['model_id']]) if VIEW in output.get('data', {}) else {}
        found = any('_esm' in model['state'] for model in state.values())
        if found: shown.update(state)
        return found
    for cell, fresh in zip(kept.cells, ran.cells):
        outputs = [output for output in fresh.get('outputs', []) if lives(output)]
        if not outputs: continue
        for output in outputs:
            output['metadata'] = {}
            if 'execution_count' in output: output['execution_count'] = None
        others = [o for o in fresh.outputs if VIEW not in o.get('data', {}) and o.get('name') != 'stderr']
        cell.outputs = [o for o in fresh.outputs if o in outputs or o in others]
    kept.metadata['widgets'] = {STATE: dict(state=shown, version_major=2, version_minor=0)}
    return kept


if __name__ == '__main__':
    for path in map(Path, sys.argv[1:]):
        notebook = with_widgets(path.resolve())
        text = json.dumps(json.loads(nbformat.writes(notebook)), indent=1, sort_keys=True, ensure_ascii=False) + '\n'
        text = re.sub(rf'{re.escape(tempfile.gettempdir())}/tmp\w+/', '', text)     # folders of this machine
        path.write_text(text, encoding='utf-8')
        print(f'{path}: {len(notebook.metadata.widgets[STATE].state)} models, {len(text)//1000} kB')

"Writes README.md from nbs/index.ipynb, the one source of both: `python .ci/readme.py`."
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def text_of(output):
    "What an output says, without colours."
    data = output.get('data', {}).get('text/plain', output.get('text', ''))
    return re.sub(r'\x1b\[[0-9;]*m', '', ''.join(data)).rstrip()


def readme():
    "The text of README.md: Markdown as it is, shown code fenced, printed outputs fenced, links from the root."
    parts = []
    for cell in json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(source); continue
        if not re.search(r'^#\|\s*(hide|echo: false)', source, re.M): parts.append(f'```python\n{source}\n```')
        printed = '\n'.join(filter(None, map(text_of, cell['outputs'])))
        if printed and not printed.startswith('<Figure'): parts.append(f'```\n{printed}\n```')
    def from_root(link): return f"]({link[1].removeprefix('../') if link[1].startswith('../') else f'nbs/{link[1]}'})"
    return re.sub(r'\]\((?!\w+:|#)([^)]+)\)', from_root, '\n\n'.join(parts)) + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(readme())

"""Builds the documentation site from the notebooks and the modules: `python .ci/docs.py [folder]`, into `_docs/`.

Everything a page needs lies beside it: formulas become MathML here, search and widgets are two small scripts, and no
page asks another machine for anything. `docs_api` reads the API, `site/` holds the template, styles and scripts.
"""
import html
import json
import re
import shutil
import sys
import time
from functools import cache
from pathlib import Path

import nbformat
from docs_api import public
from latex2mathml.converter import convert
from nbconvert.filters import ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer, get_lexer_by_name

ROOT, HERE = Path(__file__).parent.parent, Path(__file__).parent/'site'
VIEW = 'application/vnd.jupyter.widget-view+json'
STATE = 'application/vnd.jupyter.widget-state+json'
PICTURES = {'Training monitor': 'monitor', 'Sweep panel': 'sweep_panel', 'Loss explorer': 'loss_explorer',
            'Pair browser': 'pair_browser'}


class Page:
    "One page: where it lies, what it is called, its body, and what search finds in it."
    def __init__(self, url, title, body='', group='', sections=(), widgets=None):
        self.url, self.title, self.body, self.group = url, title, body, group
        self.sections, self.widgets = list(sections), widgets or {}
        self.up = '../'*url.count('/')


def slug(text): return re.sub(r'[^\w]+', '-', re.sub(r'<[^>]*>', '', text).lower()).strip('-') or 'section'


def plain(markdown):
    "Text without marks, for search and titles."
    text = re.sub(r'```.*?```|\$\$.*?\$\$|!?\[([^\]]*)\]\([^)]*\)', r'\1', markdown, flags=re.S)
    return re.sub(r'\s+', ' ', re.sub(r'[`*#>|$\\]', '', text)).strip()


def code_html(source, language='python'):
    return highlight(source, get_lexer_by_name(language), HtmlFormatter(cssclass='code'))


class Prose(IPythonRenderer):
    "Markdown to HTML: formulas to MathML, headings with anchors, names in backticks to their place."
    def __init__(self, links, page):
        super().__init__(escape=False)
        self.links, self.page, self.seen, self.heads = links, page, set(), []

    def math(self, body, display):
        try: return convert(html.unescape(body).strip(), display=display)
        except Exception as e: raise ValueError(f'{self.page.url}: cannot set the formula {body!r}: {e}') from e
    def block_math(self, body): return f'<div class="formula">{self.math(body, "block")}</div>'
    def inline_math(self, body): return self.math(body, 'inline')
    def latex_environment(self, name, body): return self.block_math(f'\\begin{{{name}}}{body}\\end{{{name}}}')

    def heading(self, text, level, **attrs):
        anchor, n = slug(text), 2
        while anchor in self.seen: anchor, n = f'{slug(text)}-{n}', n + 1
        self.seen.add(anchor)
        self.heads.append((level, anchor, text))
        return (f'<h{level} id="{anchor}">{text}<a class="anchor" href="#{anchor}" aria-label="link to here">#</a>'
                f'</h{level}>\n')

    def codespan(self, text):
        link = self.links.get(html.unescape(text).removesuffix('()').removeprefix('dpo_lab.'))
        code = f'<code>{html.escape(html.unescape(text), quote=False)}</code>'
        return f'<a class="name" href="{self.page.up}{link}">{code}</a>' if link and link != self.page.url else code

    def block_code(self, code, info=None):
        language = (info or 'text').split()[0]
        return code_html(code, 'bash' if language in ('sh', 'shell') else language)

    def link(self, text, url, title=None):
        if url.startswith('tests/'): return text        # not on the site
        url = re.sub(r'^(?:\.\./)*([A-Z]+)\.md$', lambda m: f'{self.page.up}{m[1].lower()}.html', url)
        url = re.sub(r'^(?:nbs/)?([^:#]*)\.ipynb(#.*)?$', r'\1.html\2', url)
        return super().link(text, url, title)

    def table(self, text): return f'<div class="wide"><table>{text}</table></div>\n'

    def image(self, text, url, title=None):
        "A picture; on the story page the picture of a widget is the widget itself."
        found = pictured().get(Path(url).stem) if self.page.url == 'index.html' else None
        if not found: return super().image(text, url, title)
        name, models = found
        self.page.widgets |= state_of(models, [name])
        return f'<span class="widget" style="display:block" data-model="{name}"></span><em>{text}</em>'


def prose(text, page, links, renderer=None): return MarkdownWithMath(renderer=renderer or Prose(links, page))(text)


def state_of(models, wanted):
    "The saved models that a page shows, and those that they hold."
    found, todo = {}, list(wanted)
    while todo:
        name = todo.pop()
        if name in found or name not in models: continue
        found[name] = models[name]
        todo += re.findall(r'IPY_MODEL_(\w+)', json.dumps(models[name]['state']))
    return found


@cache
def pictured():
    "Picture -> the widget of the chapter `widgets` that it shows, the fullest of its kind, and all saved models."
    kept = nbformat.read(ROOT/'nbs'/'17_widgets.ipynb', 4).metadata.get('widgets', {}).get(STATE, {}).get('state', {})
    found = {}
    for name, model in sorted(kept.items(), key=lambda item: len(json.dumps(item[1]))):
        label = re.search(r"frame\(host, '([^']+)'", model['state'].get('_esm', ''))
        if label: found[PICTURES[label[1]]] = name, kept
    return found


def output_html(output, page, links, models):
    "An output of a cell, at its richest."
    if output.output_type == 'stream': return f'<pre class="output">{ansi2html(output.text.rstrip())}</pre>'
    if output.output_type == 'error': raise ValueError(f'{page.url}: a cell ends in {output.ename}: {output.evalue}')
    data = output.data
    if VIEW in data:
        model = data[VIEW]['model_id']
        ended = re.search(r'\d+%\||(it/s|s/it)\]|^Output\(\)$', data.get('text/plain', ''))
        if ended: return ''         # a progress bar that has come to its end
        if model not in models:     # `.ci/widgets.py`, or `Settings > Save Widget State` in JupyterLab, keeps it
            print(f'{page.url}: a widget without saved state, shown as a line of text')
            return '<p class="output"><em>A widget: open this notebook to use it.</em></p>'
        page.widgets |= state_of(models, [model])
        return f'<div class="widget" data-model="{model}"></div>'
    if 'text/html' in data: return f'<div class="output wide">{data["text/html"]}</div>'
    if 'text/markdown' in data: return f'<div class="output">{prose(data["text/markdown"], page, links)}</div>'
    for kind in ('image/svg+xml', 'image/png', 'image/jpeg'):
        if kind not in data: continue
        if kind.endswith('xml'): return f'<figure>{data[kind]}</figure>'
        says = html.escape(' '.join(data.get('text/plain', 'figure').split())[:80])
        return f'<figure><img src="data:{kind};base64,{"".join(data[kind].split())}" alt="{says}"></figure>'
    return f'<pre class="output">{ansi2html(data.get("text/plain", ""))}</pre>'


def directives(source): return dict(re.findall(r'^#\|\s*([\w-]+):?[ \t]*(\S*)', source, re.M))


def cell_html(cell, page, links, renderer, models):
    "A cell as a reader sees it: hidden ones are gone, silent ones show their output only."
    if cell.cell_type == 'markdown': return prose(cell.source, page, links, renderer)
    if cell.cell_type != 'code': return ''
    told = directives(cell.source)
    if {'hide', 'default_exp'} & {*told} or told.get('include') == 'false': return ''
    source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    parts, exported = [], 'export' in told
    if source and told.get('echo') != 'false':
        names = re.findall(r'^(?:def|class) ([A-Za-z]\w*)', source, re.M) if exported else []
        names = [name for name in dict.fromkeys(names) if name not in renderer.seen]
        renderer.seen |= {*names}
        marks = ''.join(f'<a id="{name}"></a>' for name in names)
        parts.append(f'{marks}<div class="cell{" exported" if exported else ""}">{code_html(source)}</div>')
    parts += [output_html(o, page, links, models) for o in cell.outputs]
    return '\n'.join(parts)


def sections_of(page, heads, cells):
    "(title, url, text) of each section of a notebook, for search."
    found, anchors = [], iter(heads)
    for cell in cells:
        if cell.cell_type != 'markdown': continue
        for part in re.split(r'^(?=#{1,4} )', re.sub(r'^```.*?^```', '', cell.source, flags=re.M|re.S), flags=re.M):
            if re.match(r'#{1,4} ', part):
                _, anchor, title = next(anchors)
                found.append([re.sub(r'<[^>]*>', '', title), f'{page.url}#{anchor}', plain(part.split('\n', 1)[-1])])
            elif found: found[-1][2] += ' ' + plain(part)
    return [(title, url, text[:700]) for title, url, text in found]


def notebook_page(path, url, group, links):
    "A notebook as a page."
    nb = nbformat.read(path, 4)
    page = Page(url, '', group=group)
    renderer, models = Prose(links, page), nb.metadata.get('widgets', {}).get(STATE, {}).get('state', {})
    parts = [cell_html(cell, page, links, renderer, models) for cell in nb.cells]
    page.title = html.unescape(re.sub(r'<[^>]*>', '', renderer.heads[0][2])) if renderer.heads else path.stem
    if url == 'index.html': page.title = 'The story'
    page.body = contents(renderer.heads) + '\n'.join(filter(None, parts))
    page.sections = sections_of(page, renderer.heads, nb.cells)
    return page


def markdown_page(name, links):
    "A page of the repository, such as CONTRIBUTING.md."
    text = (ROOT/f'{name}.md').read_text(encoding='utf-8')
    page = Page(f'{name.lower()}.html', name.capitalize(), group='More')
    renderer = Prose(links, page)
    page.body = prose(text, page, links, renderer)
    page.body = contents(renderer.heads) + page.body
    page.sections = sections_of(page, renderer.heads, [nbformat.v4.new_markdown_cell(text)])
    return page


def contents(heads):
    "The sections of a page, as links."
    items = ''.join(f'<li class="h{level}"><a href="#{anchor}">{re.sub("</?a[^>]*>", "", text)}</a></li>'
                    for level, anchor, text in heads if level in (2, 3))
    return f'<nav class="contents" aria-label="on this page"><ul>{items}</ul></nav>' if items else ''


def entry_html(entry, module, chapter, page, links):
    "A public name: signature, what it says, its parameters, where it comes from."
    level = 'h3' if '.' in entry.name else 'h2'
    def text(words): return re.sub(r'^<p>|</p>\s*$', '', prose(words, page, links)) if words else ''
    rows = [*entry.rows, *([('<b>gives</b>', entry.gives[0], '', entry.gives[1])] if any(entry.gives) else [])]
    typed = ''.join(f'<tr><td>{name if "<" in name else code(name)}</td><td>{code(kind)}</td>'
                    f'<td>{code(default)}</td><td>{text(says)}</td></tr>' for name, kind, default, says in rows)
    head = '<thead><tr><th></th><th>type</th><th>default</th><th></th></tr></thead>'
    table = f'<div class="wide"><table class="parameters">{head}<tbody>{typed}</tbody></table></div>' if typed else ''
    if not entry.rows: table = f'<p>Gives {text(entry.gives[1])}</p>' if entry.gives[1] else ''
    told = f' · <a href="{page.up}{chapter}#{entry.name}">chapter</a>' if entry.kind in ('function', 'class') else ''
    where = f'<span class="from"><a href="{page.up}source/{module}.html#L{entry.line}">source</a>{told}</span>'
    says = f'<p>{text(entry.says)}</p>' if entry.says else ''
    return '\n'.join([
        f'<{level} id="{entry.name}" class="entry"><code>{entry.name}</code><span class="kind">{entry.kind}</span>'
        f'{where}<a class="anchor" href="#{entry.name}" aria-label="link to here">#</a></{level}>',
        code_html(entry.code), says, table, *(entry_html(m, module, chapter, page, links) for m in entry.members)])


def code(text): return f'<code>{html.escape(text)}</code>' if text else ''


def api_pages(links, chapters):
    "A page for each module, and one for its source."
    for module, url in chapters.items():
        file = ROOT/'dpo_lab'/f'{module}.py'
        says, names = public(file)
        page = Page(f'api/{module}.html', module, group='API')
        listed = ' '.join(f'<a href="#{name}"><code>{name}</code></a>' for name in names)
        entries = list({id(entry): (name, entry) for name, entry in names.items()}.values())
        also = {id(entry): [n for n, e in names.items() if e is entry and n != entry.name] for entry in names.values()}
        body = ''.join(''.join(f'<a id="{n}"></a>' for n in also[id(entry)])
                       + entry_html(entry, module, url, page, links) for _, entry in entries)
        page.body = (f'<h1><code>dpo_lab.{module}</code></h1><p class="lead">{html.escape(says or "")} '
                     f'<a href="../{url}">Read the chapter.</a></p><p class="names">{listed}</p>{body}')
        page.sections = [(name, f'{page.url}#{name}', entry.says) for name, entry in names.items()]
        yield page
        lines = HtmlFormatter(linenos='inline', lineanchors='L', anchorlinenos=True, cssclass='code source')
        text = re.sub(r'(id|name|href)="(#?)L-(\d+)"', r'\1="\2L\3"', highlight(file.read_text(), PythonLexer(), lines))
        text = re.sub(r' name="L\d+"', '', text)
        yield Page(f'source/{module}.html', f'{module}.py', f'<h1>dpo_lab/{module}.py</h1>'
                   f'<p>Exported from <a href="../{url}">the chapter</a>; documented in <a href="../{page.url}">the API'
                   f'</a>.</p>{text}')


def find_pages():
    "Every page of the site, in reading order."
    notebooks = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if not {'.ipynb_checkpoints', 'runs'} & {*p.parts}]
    chapters = {}
    for path in notebooks:
        told = re.search(r'#\|\s*default_exp (\w+)', path.read_text(encoding='utf-8'))
        if told: chapters[told[1]] = f'{path.stem}.html'
    links = {name: f'api/{module}.html#{name}' for module in reversed(chapters)
             for name, entry in public(ROOT/'dpo_lab'/f'{module}.py')[1].items()} | chapters
    def group(path):
        if path.parent.name in ('tutorials', 'benchmarks'): return 'Tutorials'
        return 'Chapters' if path.stem[0].isdigit() else ''
    pages = [notebook_page(p, str(p.relative_to(ROOT/'nbs').with_suffix('.html')), group(p), links) for p in notebooks]
    story = (ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8')
    def place(page):        # the story first; tutorials in the order in which it names them
        named = story.find(page.url.replace('.html', '.ipynb')) if page.group == 'Tutorials' else 0
        return page.group != '', named % len(story)
    return sorted(pages, key=place) + [*api_pages(links, chapters)] + [
        markdown_page(name, links) for name in ('CONTRIBUTING', 'CHANGELOG')]


def anchor(page, here, marks, text): return f'<a href="{here.up}{page.url}"{marks}>{text}</a>'


def menu(pages, here):
    "The list of pages, by group."
    parts, groups = [], ('', 'Tutorials', 'Chapters', 'API', 'More')
    for name in groups:
        items = ''.join(
            f'<li>{anchor(page, here, " aria-current=page" if page is here else "", html.escape(page.title))}</li>'
            for page in pages if page.group == name and not page.url.startswith('source/'))
        if items: parts.append((f'<h2>{name}</h2>' if name else '') + f'<ul>{items}</ul>')
    return ''.join(parts)


def turn(pages, here):
    "Links to the page before and the page after."
    same = [page for page in pages if page.group == here.group and not page.url.startswith('source/')]
    if here not in same: return ''
    at = same.index(here)
    before, after = same[at-1] if at else None, same[at+1] if at + 1 < len(same) else None
    left = anchor(before, here, ' rel=prev', f'← {html.escape(before.title)}') if before else '<span></span>'
    right = anchor(after, here, ' rel=next', f'{html.escape(after.title)} →') if after else ''
    return f'<nav class="turn" aria-label="next page">{left}{right}</nav>'


def write_page(page, pages, site):
    "Fill the template."
    widgets = ''
    if page.widgets:
        saved = json.dumps(page.widgets).replace('</', '<\\/')
        widgets = (f'<script type="application/json" id="widget-state">{saved}</script>'
                   f'<script defer src="{page.up}widgets.js"></script>')
    fields = dict(title=html.escape(page.title), up=page.up, menu=menu(pages, page), body=page.body,
                  turn=turn(pages, page), widgets=widgets)
    text = re.sub(r'\{\{(\w+)\}\}', lambda m: fields[m[1]], (HERE/'page.html').read_text(encoding='utf-8'))
    (site/page.url).parent.mkdir(parents=True, exist_ok=True)
    (site/page.url).write_text(text, encoding='utf-8')


def build(site):
    "Write the whole site into a folder; gives its pages."
    pages = find_pages()
    shutil.rmtree(site, ignore_errors=True)
    for page in pages: write_page(page, pages, site)
    index = [dict(title=title, url=url, page=page.title, text=text, api=page.group == 'API')
             for page in pages for title, url, text in page.sections]
    listed = f'window.searchIndex = {json.dumps(index, ensure_ascii=False)}'
    (site/'search-index.js').write_text(listed, encoding='utf-8')
    light, dark = (HtmlFormatter(style=style).get_style_defs(where) for style, where in
                   (('friendly', '.code'), ('github-dark', '[data-theme=dark] .code')))
    (site/'site.css').write_text('\n'.join([(HERE/'site.css').read_text(), light, dark]), encoding='utf-8')
    for name in ('site.js', 'widgets.js', 'math.woff2', 'math-font-licence.txt'): shutil.copy2(HERE/name, site/name)
    for picture in (ROOT/'nbs').rglob('images/*'):
        place = site/picture.relative_to(ROOT/'nbs')
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(picture, place)
    (site/'.nojekyll').touch()
    return pages


if __name__ == '__main__':
    began, site = time.monotonic(), Path(sys.argv[1]) if sys.argv[1:] else ROOT/'_docs'
    pages = build(site)
    print(f'{len(pages)} pages in {time.monotonic() - began:.1f} s: open {site}/index.html')

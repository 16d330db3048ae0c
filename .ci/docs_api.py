"What the API pages say, read from the source: no module is imported."
import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Entry:
    "A public name of a module."
    name: str               # as one writes it; a method is `Class.method`
    kind: str               # function, class, method or value
    line: int               # where it begins
    code: str               # the line as one reads it: a signature, or a value
    says: str = ''          # its docstring
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)     # parameter, type, default, comment
    gives: tuple[str, str] = ('', '')                                       # type and comment of what comes back
    members: list['Entry'] = field(default_factory=list)                    # methods and properties of a class


def comments(text):
    "The comment that ends a line, for each line that has one."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith('#|'):
            found[token.start[0]] = token.string.lstrip('# ')
    return found


def parameters(node, said):
    "(name, type, default, comment) of each parameter of a function."
    a, rows = node.args, []
    plain = a.posonlyargs + a.args
    defaults = [None]*(len(plain) - len(a.defaults)) + a.defaults
    listed = [('', *pair) for pair in zip(plain, defaults)]
    listed += [('*', a.vararg, None)]*bool(a.vararg) + [('', *pair) for pair in zip(a.kwonlyargs, a.kw_defaults)]
    listed += [('**', a.kwarg, None)]*bool(a.kwarg)
    lines = [arg.lineno for _, arg, _ in listed]
    for star, arg, default in listed:
        if arg.arg in ('self', 'cls'): continue
        last = max(arg.end_lineno, default.end_lineno if default else 0)
        comment = said.get(last, '') if lines.count(arg.lineno) == 1 and last < node.body[0].lineno else ''
        rows.append((star + arg.arg, ast.unparse(arg.annotation) if arg.annotation else '',
                     ast.unparse(default) if default else '', comment))
    return rows


def function(node, said, prefix=''):
    "The entry of a function or a method."
    kind = 'method' if prefix else 'function'
    if any('property' in ast.unparse(d) for d in node.decorator_list): kind = 'property'
    head = range(node.lineno, node.body[0].lineno + (node.body[0].lineno == node.lineno))
    rows = parameters(node, said)
    taken = {row[3] for row in rows}
    comment = next((said[line] for line in reversed(head) if line in said and said[line] not in taken), '')
    gives = ast.unparse(node.returns) if node.returns else ''
    args = [f'{n}: {t} = {d}' if t and d else f'{n}: {t}' if t else f'{n}={d}' if d else n for n, t, d, _ in rows]
    code = f"{prefix}{node.name}({', '.join(args)})" if kind != 'property' else f'{prefix}{node.name}'
    if len(code) > 100: code = f"{prefix}{node.name}(\n    " + ',\n    '.join(args) + ')'
    code += f' -> {gives}' if gives else ''
    return Entry(prefix + node.name, kind, node.lineno, code, ast.get_docstring(node) or '', rows, (gives, comment))


def fields(node, said):
    "The fields of a dataclass or a chz class: their sentence is a comment or the words of `field(...)`."
    for item in node.body:
        if not isinstance(item, ast.AnnAssign): continue
        value, says = item.value, said.get(item.end_lineno, '')
        default = ast.unparse(value) if value else ''
        if isinstance(value, ast.Call) and ast.unparse(value.func) == 'field' and len(value.args) == 2:
            default, says = ast.unparse(value.args[0]), ast.literal_eval(value.args[1])
        yield item.target.id, ast.unparse(item.annotation), default, says


def entry(node, said, text):
    "The entry of a top-level statement; None if it names nothing."
    if isinstance(node, ast.FunctionDef): return function(node, said)
    if isinstance(node, ast.ClassDef):
        bases = ', '.join(map(ast.unparse, node.bases))
        made = Entry(node.name, 'class', node.lineno, f'class {node.name}' + (f'({bases})' if bases else ''),
                     ast.get_docstring(node) or '', [*fields(node, said)])
        defs = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        start = next((n for n in defs if n.name == '__init__'), None)
        if start: made.rows += parameters(start, said)
        made.members = [function(n, said, f'{node.name}.') for n in defs
                        if not n.name.startswith('_') or n.name in ('__call__', '__iter__') and ast.get_docstring(n)]
        return made
    names = [ast.unparse(target) for target in getattr(node, 'targets', [getattr(node, 'target', None)]) if target]
    code = '\n'.join(text.splitlines()[node.lineno-1:node.end_lineno])
    return Entry(' '.join(names).strip('()'), 'value', node.lineno, code, said.get(node.end_lineno, ''))


def public(module: Path):
    "(docstring of a module, entries of every name in its `__all__`, in the order of the chapter)."
    text = module.read_text(encoding='utf-8')
    tree, said = ast.parse(text), comments(text)
    exported = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)
                     and ast.unparse(n.targets[0]) == '__all__'), [])
    found = {}
    for node in tree.body:
        made = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)) and entry(node, said, text)
        for name in re.split(r'[,\s]+', made.name) if made else ():
            if name in exported: found.setdefault(name, made)
    if lost := [name for name in exported if name not in found]: raise ValueError(f'{module}: no definition of {lost}')
    return ast.get_docstring(tree), found

"""What the notebooks export, described as nbdev does it: a heading, a signature, a table.

Parameters are spelled as their source spells them; what they mean comes from the docments.
"""
import ast
import configparser
import html
import inspect
import json
import re
import textwrap
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
REFERENCE = "Reference"
# columns of a table, in percent: name, type, default, meaning; name, value, meaning
PARAMETER_WIDTHS = (15, 15, 10, 60)
CONSTANT_WIDTHS = (20, 30, 50)


def settings():
    "What nbdev's settings say."
    parser = configparser.ConfigParser()
    parser.read(ROOT/"settings.ini")
    return parser["DEFAULT"]


INI = settings()
BLOB = f"{INI['git_url']}/blob/{INI['branch']}"


# Text that holds no markup, in pandoc and in mkdocs

def plain(text):
    "Text in which no character is markup."
    escaped = html.escape(text, quote=False)
    return re.sub(r"[*_\[\]`|\\]", lambda m: f"&#{ord(m[0])};", escaped)


def code(text):
    "Code in a table, where backticks may hold no bars; pandoc would curl quotes and join dots."
    kept = re.sub(r"""["'.-]""", lambda m: f"&#{ord(m[0])};", plain(text or ""))
    return f"<code>{kept}</code>" if text else ""


def prose(text):
    "Text whose only markup is code between backticks."
    parts = enumerate(re.split(r"(`[^`]*`)", text or ""))
    return "".join(code(p[1:-1]) if i % 2 else plain(p) for i, p in parts)


def table(rows, widths, head=None):
    """A pipe table with columns of relative `widths`, which pandoc reads from the dash row.

    It does so if a line is longer than 72 characters: the dash row is, where they sum to 100.
    """
    dashes = "|" + "|".join("-"*width for width in widths) + "|"
    named = head or [""]*len(widths)
    lines = [" | ".join(" ".join(cell.split()) for cell in cells) for cells in rows]
    return "\n".join([f"| {' | '.join(named)} |", dashes, *(f"| {line} |" for line in lines)])


# What the source says

class Sources:
    "The definitions of a module: `inspect` would parse the module again for each one."
    nodes = {}
    lines = {}

    @classmethod
    def add(cls, name, text):
        cls.lines[name] = text.splitlines(True)
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                cls.nodes[name, node.name] = node
            if isinstance(node, ast.ClassDef):
                methods = [f for f in node.body if isinstance(f, ast.FunctionDef)]
                cls.nodes |= {(name, f"{node.name}.{f.name}"): f for f in methods}

    @classmethod
    def node(cls, obj):
        return cls.nodes.get((obj.__module__, obj.__qualname__))

    @classmethod
    def source(cls, obj):
        node = cls.node(obj)
        if node is None:
            return inspect.getsource(obj)
        lines = cls.lines[obj.__module__][cls.first(node) - 1:node.end_lineno]
        return textwrap.dedent("".join(lines))

    @staticmethod
    def first(node):
        return min([node.lineno, *(d.lineno for d in node.decorator_list)])


class Parameter(NamedTuple):
    "As the source spells it; `help` is what a command line says of it."
    name: str
    type: str = ""
    default: str = ""
    help: str = ""


def spelled(node):
    return ast.unparse(node) if node else ""


def is_call_of(node, name):
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == name


def parameter(name, annotation, default):
    kind = getattr(getattr(annotation, "value", None), "id", "")
    if isinstance(annotation, ast.Subscript) and kind == "Annotated":
        # of typer: the type, and what the command line says of it
        first, *options = annotation.slice.elts
        said = [k for option in options for k in getattr(option, "keywords", [])]
        helps = [k.value.value for k in said if k.arg == "help"]
        return Parameter(name, spelled(first), spelled(default), "".join(helps))
    if is_call_of(default, "field"):
        said = (k.value for k in default.keywords if k.arg in ("default", "default_factory"))
        default = next(said, None)
    return Parameter(name, spelled(annotation), spelled(default))


def attributes(cls, node):
    "Of a dataclass: its bases' fields, then its own."
    known = {f.name for f in fields(cls)} if is_dataclass(cls) else set()
    annotated = [a for a in node.body if isinstance(a, ast.AnnAssign) and a.target.id in known]
    own = [parameter(a.target.id, a.annotation, a.value) for a in annotated]
    names = {p.name for p in own}
    inherited = [p for base in cls.__bases__ for p in parameters(base)[0] if p.name not in names]
    return inherited + own


def arguments(args):
    "Of a function, with the star that stands before what is named only."
    front = args.posonlyargs + args.args
    defaults = [None]*(len(front) - len(args.defaults)) + args.defaults
    rows = [parameter(a.arg, a.annotation, d) for a, d in zip(front, defaults)]
    if args.vararg:
        rows.append(parameter("*" + args.vararg.arg, args.vararg.annotation, None))
    elif args.kwonlyargs:
        rows.append(Parameter("*"))
    named = zip(args.kwonlyargs, args.kw_defaults)
    rows += [parameter(a.arg, a.annotation, d) for a, d in named]
    if args.kwarg:
        rows.append(parameter("**" + args.kwarg.arg, args.kwarg.annotation, None))
    return [r for r in rows if r.name not in ("self", "cls")]


def parameters(obj):
    "Of a function or class: its parameters, and the type that it returns."
    node = Sources.node(obj)
    if node is None:
        return [], None
    if isinstance(node, ast.ClassDef):
        own = [f for f in node.body if isinstance(f, ast.FunctionDef)]
        init = next((f for f in own if f.name == "__init__"), None)
        if init is None:
            return attributes(obj, node), None
        node = init
    return arguments(node.args), spelled(node.returns) or None


class Constant(NamedTuple):
    "Its value, if that is short, and the comment beside or above it."
    value: str = ""
    comment: str = ""


def assigned(node):
    "Names that a statement gives a value, each with its own where several are given at once."
    if isinstance(node, ast.AnnAssign):
        return [(node.target, node.value)]
    if not isinstance(node, ast.Assign):
        return []
    target, value = node.targets[0], node.value
    if not isinstance(target, ast.Tuple):
        return [(target, value)]
    is_paired = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
    return [*zip(target.elts, value.elts if is_paired else [None]*len(target.elts))]


def comment_of(node, lines):
    "What stands behind a statement or, if nothing does, right above it."
    trailing = re.search(r"\s# (.*)$", lines[node.end_lineno - 1][node.end_col_offset:])
    if trailing:
        return trailing[1]
    above = []
    for line in reversed(lines[:node.lineno - 1]):
        is_of_the_reader = line.startswith("# ") and not line.startswith("# %%")
        if not is_of_the_reader:
            break
        above.insert(0, line[2:].strip())
    return " ".join(above)


def short(value, lines):
    "How a value is spelled, on one line; nothing if it is long."
    if value is None:
        return ""
    spelling = ast.unparse(value)
    if value.lineno == value.end_lineno:
        # as it is written: columns count bytes
        line = lines[value.lineno - 1].encode()
        spelling = line[value.col_offset:value.end_col_offset].decode()
    return spelling if len(spelling) < 80 else ""


def constants(source):
    "What a module assigns at its top; of a comment on several names, each has its part."
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        pairs = assigned(node)
        comment = comment_of(node, lines) if pairs else ""
        parts = comment.split("; ")
        comments = parts if len(parts) == len(pairs) else [comment]*len(pairs)
        for (target, value), said in zip(pairs, comments):
            found[getattr(target, "id", "")] = Constant(short(value, lines), said)
    return found


# What is shown of it

def signature(name, rows, returns, kind=""):
    shown = [f"{r.name}={r.default}" if r.default else r.name for r in rows]
    tail = f") -> {returns}" if returns and returns != "None" else ")"
    line = f"{kind}{name}({', '.join(shown)}{tail}"
    if len(line) <= 96:
        return line
    return f"{kind}{name}(\n" + "".join(f"    {s},\n" for s in shown) + tail


def parameter_table(rows, returns, docs):
    "What each parameter is, in Markdown; nothing if nobody says it."
    def details(name, said=""):
        return prose((docs.get(name.lstrip("*")) or {}).get("docment") or said)

    shown = [
        (code(r.name), code(r.type), code(r.default), details(r.name, r.help))
        for r in rows if r.name != "*"
    ]
    if returns and (said := details("return")):
        shown.append(("*returns*", code(returns), "", said))
    if not any(kind or said for _, kind, _, said in shown):
        return []
    text = table(shown, PARAMETER_WIDTHS, ("", "type", "default", ""))
    return ["::: {.parameters}", text, ":::"]


def entry(sym, shown, docs, name, level):
    "A heading, the source, the signature, the docstring and the parameters."
    node = Sources.node(shown)
    rows, returns = parameters(shown)
    if isinstance(sym, property):
        line = f"{name} -> {returns}"
    else:
        kind = "class " if inspect.isclass(shown) else ""
        line = signature(name, rows, returns, kind)
    file = shown.__module__.replace(".", "/") + ".py"
    out = [
        f"{'#'*level} {plain(name)} {{#{name}}}",
        f"[source]({BLOB}/{file}#L{Sources.first(node)})",
        f"```python\n{line}\n```",
    ]
    if shown.__doc__:
        out.append(prose(inspect.cleandoc(shown.__doc__)))
    return "\n\n".join(out + parameter_table(rows, returns, docs))


def card(sym, name, level):
    "nbdev's `show_doc`, with the docments as a table."
    from nbdev.showdoc import BasicMarkdownRenderer, show_doc

    class Card(BasicMarkdownRenderer):
        def _repr_markdown_(self):
            return entry(sym, self.sym, self.dm.dm, name, level)

    return show_doc(sym, renderer=Card, name=name)._repr_markdown_()


def described(obj):
    "The first paragraph of its docstring, which says what it is."
    doc = inspect.cleandoc(getattr(obj, "fget", obj).__doc__ or "")
    return " ".join(doc.split("\n\n")[0].split())


def methods(cls):
    "Public methods and properties that say what they do."
    for name, held in vars(cls).items():
        found = getattr(held, "__func__", held)
        is_shown = inspect.isfunction(found) or isinstance(found, property)
        if not name.startswith("_") and is_shown and getattr(found, "fget", found).__doc__:
            yield name, found


# What a notebook exports

def first_match(pattern, cells, otherwise=None):
    "The group that a pattern finds at the start of a cell."
    found = (re.match(pattern, "".join(c["source"])) for c in cells)
    return next((m[1] for m in found if m), otherwise)


class Module:
    "What a notebook exports."

    def __init__(self, path, root):
        cells = json.loads(path.read_text())["cells"]
        exported = [c for c in cells if c["cell_type"] == "code"]
        module = first_match(r"#\|\s*default_exp\s+(\S+)", exported)
        self.page = path.relative_to(root/"nbs").as_posix()
        self.title = first_match(r"#\s+(.*)", cells, path.stem)
        self.name = f"{INI['lib_name']}.{module}" if module else None
        self.constants = {}
        self.symbols = {}
        if module:
            self._sort(import_module(self.name))
        self.anchors = {*self.symbols, *self.constants}
        classes = {n: o for n, o in self.symbols.items() if inspect.isclass(o)}
        self.anchors |= {f"{n}.{m}" for n, o in classes.items() for m, _ in methods(o)}

    def _sort(self, module):
        "Functions and classes of its own, and the rest with its value and its comment."
        source = Path(module.__file__).read_text()
        Sources.add(self.name, source)
        others = constants(source)
        for name in getattr(module, "__all__", []):
            obj = getattr(module, name)
            is_defined = inspect.isfunction(obj) or inspect.isclass(obj)
            if is_defined and obj.__module__ == self.name:
                self.symbols[name] = obj
            else:
                self.constants[name] = others.get(name, Constant())

    def _constant(self, name):
        value, comment = self.constants[name]
        return f"<span id='{name}'>{code(name)}</span>", code(value), prose(comment)

    def said(self, name):
        "The line that says what a name is."
        if name in self.symbols:
            return described(self.symbols[name])
        return self.constants[name].comment

    def reference(self):
        "Every public name, in Markdown."
        if not self.anchors:
            return None
        out = [f"## {REFERENCE} {{#reference}}", f"What `{self.name}` exports."]
        for name, obj in self.symbols.items():
            out.append(card(obj, name, 3))
            if inspect.isclass(obj):
                out += [card(f, f"{name}.{m}", 4) for m, f in methods(obj)]
        if self.constants:
            rows = [self._constant(n) for n in self.constants]
            text = table(rows, CONSTANT_WIDTHS, ("", "value", ""))
            out += ["### Constants {#constants}", "::: {.parameters}", text, ":::"]
        return "\n\n".join(out)

"""The site: `python tests/docs.py OUT` writes OUT/pages, the processed notebooks that Quarto publishes, and OUT/site, the same pages by mkdocs.

Quarto is in no package registry, so the tests and offline readers get the second; `--pages` stops after the first.
"""
import ast
import configparser
import html
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from base64 import b64decode
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

import yaml

ROOT = Path(__file__).parents[1]
INI = configparser.ConfigParser(); INI.read(ROOT/"settings.ini"); INI = INI["DEFAULT"]
BLOB = f"{INI['git_url']}/blob/{INI['branch']}"
FENCED = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)
TOKENS = re.compile(r"^#{1,6} .*?$|```.*?```|\[[^\]\n]*\]\([^)\n]*\)|\$\$.*?\$\$|\$[^$\n]+\$|`(?P<name>[A-Za-z_][\w.]*)(?P<call>\(\))?`", re.S | re.M)
REFERENCE = "Reference"


def sidebar(contents):
    "The sidebar of _quarto.yml as mkdocs' nav."
    return [c.replace(".ipynb", ".md") if isinstance(c, str) else {c["section"]: sidebar(c["contents"])} for c in contents]


def quarto(root): return yaml.safe_load((root/"_quarto.yml").read_text())["website"]
def notebooks(root): return sorted(p for p in (root/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
def slug(text): return re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", re.sub(r"\$[^$]*\$", "", text)).strip().lower()).lstrip("0123456789-._") or "section"
def plain(text): return re.sub(r"[*_\[\]`|\\]", lambda m: f"&#{ord(m[0])};", html.escape(text, quote=False))      # no markup, in pandoc and in mkdocs
def code(text): return f"<code>{plain(text)}</code>" if text else ""
def prose(text): return "".join(code(p[1:-1]) if i % 2 else plain(p) for i, p in enumerate(re.split(r"(`[^`]*`)", text or "")))


# What is exported, as nbdev shows it

class Sources:
    "The definitions of a module: `inspect` would parse the module again for each one."
    nodes, lines = {}, {}
    @classmethod
    def add(cls, name, text):
        cls.lines[name] = text.splitlines(True)
        for node in ast.parse(text).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
            cls.nodes[name, node.name] = node
            cls.nodes |= {(name, f"{node.name}.{f.name}"): f for f in node.body if isinstance(f, ast.FunctionDef)} if isinstance(node, ast.ClassDef) else {}
    @classmethod
    def node(cls, obj): return cls.nodes.get((obj.__module__, obj.__qualname__))
    @classmethod
    def source(cls, obj):
        node = cls.node(obj)
        return textwrap.dedent("".join(cls.lines[obj.__module__][cls.first(node) - 1:node.end_lineno])) if node else inspect.getsource(obj)
    @staticmethod
    def first(node): return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def parameters(obj):
    "Of a function or class: (name, type, default, help) as its source spells them, and the type that it returns."
    def row(name, anno, default):
        if isinstance(anno, ast.Subscript) and getattr(anno.value, "id", "") == "Annotated":      # of typer: the type, and what the command line says of it
            texts = [k.value.value for e in anno.slice.elts[1:] for k in getattr(e, "keywords", []) if k.arg == "help"]
            return name, ast.unparse(anno.slice.elts[0]), ast.unparse(default) if default else "", "".join(texts)
        if isinstance(default, ast.Call) and getattr(default.func, "id", "") == "field":
            default = next((k.value for k in default.keywords if k.arg in ("default", "default_factory")), None)
        return name, ast.unparse(anno) if anno else "", ast.unparse(default) if default else "", ""
    node = Sources.node(obj)
    if node is None: return [], None
    if isinstance(node, ast.ClassDef):
        init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        if init is None:
            own = [row(a.target.id, a.annotation, a.value) for a in node.body if isinstance(a, ast.AnnAssign) and is_dataclass(obj) and a.target.id in {f.name for f in fields(obj)}]
            return [p for base in obj.__bases__ for p in parameters(base)[0] if p[0] not in {o[0] for o in own}] + own, None
        node = init
    a = node.args; front = a.posonlyargs + a.args
    rows = [row(p.arg, p.annotation, d) for p, d in zip(front, [None]*(len(front) - len(a.defaults)) + a.defaults)]
    if a.vararg: rows.append(row("*" + a.vararg.arg, a.vararg.annotation, None))
    elif a.kwonlyargs: rows.append(("*", "", "", ""))
    rows += [row(p.arg, p.annotation, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)] + ([row("**" + a.kwarg.arg, a.kwarg.annotation, None)] if a.kwarg else [])
    return [r for r in rows if r[0] not in ("self", "cls")], ast.unparse(node.returns) if node.returns else None


def signature(name, rows, returns, kind=""):
    shown = [f"{n}={d}" if d else n for n, _, d, _ in rows]
    tail = f") -> {returns}" if returns and returns != "None" else ")"
    line = f"{kind}{name}({', '.join(shown)}{tail}"
    return line if len(line) <= 96 else f"{kind}{name}(\n" + "".join(f"    {s},\n" for s in shown) + tail


def card(sym, name, level):
    "nbdev's `show_doc`, with the docments as a table."
    from nbdev.showdoc import BasicMarkdownRenderer, show_doc

    class Card(BasicMarkdownRenderer):
        def _repr_markdown_(self):
            node, docs = Sources.node(self.sym), self.dm.dm
            rows, returns = parameters(self.sym)
            kind = "class " if inspect.isclass(self.sym) else ""
            line = f"{name} -> {returns}" if isinstance(sym, property) else signature(name, rows, returns, kind)
            out = [f"{'#'*level} {plain(name)} {{#{name}}}", f"[source]({BLOB}/{self.sym.__module__.replace('.', '/')}.py#L{Sources.first(node)})", f"```python\n{line}\n```"]
            if self.sym.__doc__: out.append(prose(inspect.cleandoc(self.sym.__doc__)))
            def details(n, said): return prose((docs.get(n.lstrip("*")) or {}).get("docment") or said)
            table = [(code(n), code(t), code(d), details(n, said)) for n, t, d, said in rows if n != "*"]
            if returns and (said := details("return", "")): table.append(("*returns*", code(returns), "", said))
            if any(t or said for _, t, _, said in table): out += ["::: {.parameters}", "\n".join(["| | type | default | |", "|---|---|---|---|", *("| " + " | ".join(r) + " |" for r in table)]), ":::"]
            return "\n\n".join(out)
    return show_doc(sym, renderer=Card, name=name)._repr_markdown_()


def described(obj):
    "The line that says what it is."
    return inspect.cleandoc((getattr(obj, "fget", obj)).__doc__ or "").split("\n")[0]


def methods(cls):
    "Public methods that say what they do."
    for n, f in vars(cls).items():
        f = getattr(f, "__func__", f)
        if not n.startswith("_") and (inspect.isfunction(f) or isinstance(f, property)) and (f.fget if isinstance(f, property) else f).__doc__: yield n, f


class Module:
    "What a notebook exports."
    def __init__(self, path, root):
        nb = json.loads(path.read_text())
        found = [m[1] for c in nb["cells"] if c["cell_type"] == "code" and (m := re.match(r"#\|\s*default_exp\s+(\S+)", "".join(c["source"])))]
        self.page, self.title = path.relative_to(root/"nbs").as_posix(), next((m[1] for c in nb["cells"] if (m := re.match(r"#\s+(.*)", "".join(c["source"])))), path.stem)
        self.name = f"{INI['lib_name']}.{found[0]}" if found else None
        mod = import_module(self.name) if found else None
        source = Path(mod.__file__).read_text() if found else ""
        Sources.add(self.name, source)
        self.constants, self.symbols = {}, {}
        for n in getattr(mod, "__all__", []):
            obj = getattr(mod, n)
            if (inspect.isfunction(obj) or inspect.isclass(obj)) and obj.__module__ == self.name: self.symbols[n] = obj
            else: self.constants[n] = re.search(rf"^(?:.*;\s*)?{n}\b[^=\n]*=\s*(.*?)(?:\s+#\s(.*))?$", source, re.M)
        self.anchors = {*self.symbols, *self.constants, *(f"{n}.{m}" for n, o in self.symbols.items() if inspect.isclass(o) for m, _ in methods(o))}

    def reference(self):
        "Every public name, in Markdown."
        if not self.anchors: return None
        out = [f"## {REFERENCE} {{#reference}}", f"What `{self.name}` exports."]
        for n, obj in self.symbols.items():
            out.append(card(obj, n, 3))
            if inspect.isclass(obj): out += [card(f, f"{n}.{m}", 4) for m, f in methods(obj)]
        if self.constants:
            rows = [f"| <span id='{n}'>{code(n)}</span> | {code(m[1]) if m and len(m[1]) < 80 and m[1][-1] not in '([{,' else ''} | {prose(m[2]) if m else ''} |" for n, m in self.constants.items()]
            out += ["### Constants {#constants}", "\n".join(["| | value | |", "|---|---|---|", *rows])]
        return "\n\n".join(out)


# The processed notebooks

class Book:
    "The notebooks of `root`, and where each public name is described."
    def __init__(self, root):
        import fastcore.docments
        fastcore.docments.getsource = Sources.source
        self.root, self.modules = root, {m.page: m for m in (Module(p, root) for p in notebooks(root))}
        self.public = set(import_module(INI["lib_name"]).__all__)

    def where(self, name, call, page):
        "Page and anchor of a name in prose; a plain word is meant as one on its own page only, or if it is called."
        if name in self.modules[page].anchors: return page, name
        found = [m for m in self.modules.values() if name in m.anchors and (name not in self.public or getattr(m.symbols.get(name), "__module__", "") == m.name)]
        named = name in self.public or call or "_" in name or "." in name or name[:1].isupper() and not name.isupper()
        return (found[0].page, name) if named and len(found) == 1 else None

    def prose(self, text, page, seen):
        "Headings with ids, lists that pandoc sees, and public names that are links."
        linked = set()
        def token(m):
            if m[0].startswith("#"):
                if "{#" in m[0] or m[0].startswith("# "): return m[0]
                level, _, title = m[0].partition(" "); anchor = name = slug(title); k = 1
                while anchor in seen: k += 1; anchor = f"{name}-{k}"
                seen.add(anchor)
                return f"{level} {title} {{#{anchor}}}"
            if not m["name"] or m["name"] in linked or not (at := self.where(m["name"], m["call"], page)): return m[0]
            linked.add(m["name"])
            return f"[{m[0]}]({'' if at[0] == page else os.path.relpath(at[0], Path(page).parent)}#{at[1]})"
        text = TOKENS.sub(token, text)
        return "".join(p if i % 2 else re.sub(r"^((?![ ]*(?:[-*]|\d+\.) )[^\n]*\S[^\n]*)\n(?=(?:[-*]|\d+\.) )", r"\1\n\n", p, flags=re.M) for i, p in enumerate(FENCED.split(text)))

    def process(self, path, out):
        "nbdev's processors, but exported code stays beside its derivation; its reference is the last section."
        from execnb.nbio import mk_cell, read_nb, write_nb
        from nbdev.frontmatter import FrontmatterProc
        from nbdev.process import NBProcessor, Processor
        from nbdev.processors import clean_magics, hide_, hide_line, rm_header_dash, strip_ansi, strip_hidden_metadata
        page = path.relative_to(self.root/"nbs").as_posix(); module, book = self.modules[page], self
        nb = read_nb(path)
        for i, c in reversed([*enumerate(nb.cells)]):      # commands that a notebook hands to the shell are shown as what one types
            if c.cell_type == "code" and (m := SHELL.fullmatch(c.source.strip())):
                c.source = f"#| echo: false\n{c.source}"; nb.cells.insert(i, mk_cell(fence((m[1] or m[2]).strip(), "sh"), "markdown"))

        class Chapter(Processor):
            def begin(self):
                first = self.nb.cells[0]
                title, sub, rest = re.match(r"(#\s[^\n]*\n*)(>[^\n]*\n*)?(.*)", first.source, re.S).groups()
                first.source = title + (sub or "")
                links = [f"[Run on Binder](https://mybinder.org/v2/gh/{INI['user']}/{INI['repo']}/{INI['branch']}?labpath={quote(f'nbs/{page}', safe='')})",
                         f"[Edit the notebook]({INI['git_url']}/edit/{INI['branch']}/nbs/{page})"]
                self.nb.cells[1:1] = [mk_cell(f"<small>{' · '.join(links)}</small>", "markdown"), mk_cell(rest, "markdown")]
                self.seen, self.heading = set(module.anchors) | {"reference", "constants"}, title.strip("# \n")
            def cell(self, cell):
                if cell.cell_type == "markdown":
                    cell.source = book.prose(cell.source, page, self.seen)
                    self.heading = ([self.heading] + re.findall(r"^#+ (.*?)(?: \{#.*)?$", cell.source, re.M))[-1]
                elif cell.cell_type == "code":
                    if {"hide", "default_exp"} & set(cell.directives_): cell.source = None; return
                    if any("image/png" in o.get("data", {}) or "image/gif" in o.get("data", {}) for o in cell.outputs) and "fig-alt:" not in cell.directives_:
                        cell.source = f"#| fig-alt: {json.dumps(alt(cell.source) or self.heading, ensure_ascii=False)}\n{cell.source}"
                    if "code-fold:" not in cell.directives_ and only_imports(cell.source): cell.source = f"#| code-fold: true\n#| code-summary: imports\n{cell.source}"
                    if "hide_input" in cell.directives_: cell.source = f"#| echo: false\n{cell.source}"
            def end(self):
                if text := module.reference(): self.nb.cells.append(mk_cell(text, "markdown"))

        NBProcessor(nb=nb, procs=[Chapter, FrontmatterProc, strip_ansi, hide_line, rm_header_dash, clean_magics, hide_, strip_hidden_metadata]).process()
        (out/page).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, out/page)

    def index(self):
        "A page of every public name."
        out = ["---\ntitle: Every public name\ndescription: What the library exports, by chapter\nrepo-actions: false\n---"]
        def row(m, n):
            text = described(m.symbols[n]) if n in m.symbols else (m.constants[n][2] or "") if m.constants[n] else ""
            return f"| [{code(n)}]({m.page}#{n}) | {prose(text)} |"
        head = ["| | |", "|---|---|"]
        mods = [m for m in self.modules.values() if m.anchors]
        out.append(f"## From `{INI['lib_name']}` {{#public}}\n\n" + "\n".join(head + sorted(row(m, n) for m in mods for n in m.symbols if n in self.public and m.symbols[n].__module__ == m.name)))
        out += [f"## [{m.title}]({m.page}) {{#{m.name}}}\n\n`{m.name}`\n\n" + "\n".join(head + [row(m, n) for n in (*m.symbols, *m.constants)]) for m in mods]
        return out


def only_imports(source):
    "A cell that readers may skip: imports, perhaps with a seed."
    try: body = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body
    except SyntaxError: return False
    return bool(body) and isinstance(body[0], (ast.Import, ast.ImportFrom)) and all(isinstance(s, (ast.Import, ast.ImportFrom)) or re.match(r"[\w.]*(seed|set_num_threads|filterwarnings|default_dtype|rcParams)", ast.unparse(s)) for s in body)


def alt(source):
    "What a picture shows: the titles that its cell gives it."
    def text(e): return e.value if isinstance(e, ast.Constant) else "".join(v.value if isinstance(v, ast.Constant) else "…" for v in e.values) if isinstance(e, ast.JoinedStr) else None
    try: calls = [c for c in ast.walk(ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M))) if isinstance(c, ast.Call)]
    except SyntaxError: return ""
    found = [text(e) for c in sorted(calls, key=lambda c: (c.lineno, c.col_offset)) for e in ([c.args[0]] if getattr(c.func, "attr", "") in ("set_title", "suptitle", "title") and c.args else []) + [k.value for k in c.keywords if k.arg in ("title", "suptitle")]]
    return "; ".join(dict.fromkeys(" ".join(t.split()) for t in found if isinstance(t, str)))


SHELL = re.compile(r'sh\(r?(?:"""((?:(?!""").)*)"""|"([^"\\]*)")(?:, code=\d+)?\)', re.S)      # the whole cell


def pages(root, out):
    "Processed notebooks and what they need, for Quarto: `quarto render OUT/pages`."
    book = Book(root)
    for path in notebooks(root): book.process(path, out)
    cells = [{"cell_type": "raw" if i == 0 else "markdown", "id": f"api{i}", "metadata": {}, "source": s} for i, s in enumerate(book.index())]
    (out/"api.ipynb").write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}))
    for f in (root/"nbs").rglob("*"):
        if f.suffix in (".svg", ".png", ".gif", ".css", ".scss", ".bib", ".yml") and ".ipynb_checkpoints" not in f.parts: (out/f.relative_to(root/"nbs")).parent.mkdir(parents=True, exist_ok=True); shutil.copy(f, out/f.relative_to(root/"nbs"))
    shutil.copy(root/"llms.txt", out)
    return out


# The same pages without Quarto

def mathml(text):
    "LaTeX between dollar signs, outside code, as MathML: formulas need no script and no network."
    from latex2mathml.converter import convert
    signs = {"lvert": "|", "rvert": "|", "lVert": "‖", "rVert": "‖", "langle": "⟨", "rangle": "⟩"}
    def known(tex):      # what latex2mathml would show as it stands
        return re.sub(r"\\(left|right|[bB]igg?[lr]?)\\([lr](?:vert|Vert|angle))(?![A-Za-z])", lambda m: f"\\{m[1]}{signs[m[2]]}", re.sub(r"\\math(bb|cal) ?([A-Z])", r"\\math\1{\2}", tex)).replace(r"\arg", r"\operatorname{arg}")
    def shown(tex, display): return re.sub(r">([^<]+)<", lambda m: ">" + re.sub(r"[*_\[\]`|\\]", lambda c: f"&#{ord(c[0])};", m[1]) + "<", convert(known(tex), display=display).replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;'))
    def block(m): return f'<span class="formula">{shown(m[1], "block")}</span>'
    def inline(m): return broken(shown(m[1], "inline")) if len(m[1]) > 25 else shown(m[1], "inline")
    return "".join(p if i % 2 else re.sub(r"\$([^$\n]+?)\$", inline, re.sub(r"\$\$(.+?)\$\$", block, p, flags=re.S)) for i, p in enumerate(FENCED.split(text)))


def broken(math):
    "An inline formula as several, so that lines can break after its relations and sums: browsers break no MathML."
    rows = re.fullmatch(r"(<math[^>]*>)<mrow>(.*)</mrow></math>", math, re.S)
    if not rows: return math
    parts, start, depth = [], 0, 0
    for m in re.finditer(r"<(/?)(\w+)[^>]*?(/?)>", rows[2]):
        depth += 0 if m[3] else -1 if m[1] else 1
        if not depth and m[2] == "mo" and re.search(r">(?:=|<|>|\+|,|;|&#x(?:0003D|02264|02265|02192|02208|02248|02212|0002B|0002C|0003C|0003E|021A6|02261|0223C);)</mo>$", rows[2][:m.end()]): parts.append(rows[2][start:m.end()]); start = m.end()
    return "<wbr>".join(f"{rows[1]}<mrow>{p}</mrow></math>" for p in parts + [rows[2][start:]] if p)


def fence(text, info):
    ticks = "`"*max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{ticks}{info}\n{text.rstrip()}\n{ticks}"


def outputs(cell, caption, save):
    "The outputs of a cell, in Markdown; what was said to stderr is not shown."
    for o in cell.get("outputs", []):
        data = {k: "".join(v) if isinstance(v, list) else v for k, v in o.get("data", {}).items()}
        kind = next((k for k in ("image/svg+xml", "image/png", "image/jpeg", "image/gif") if k in data), None)
        if kind:
            name = save(data[kind] if "svg" in kind else b64decode(data[kind]), {"image/svg+xml": "svg", "image/jpeg": "jpg"}.get(kind, kind[6:]))
            yield f'<p class="picture"><img src="{name}" alt="{html.escape(caption)}" loading="lazy"></p>'
        elif "text/html" in data: yield f'<div class="output">{data["text/html"]}</div>'
        elif "text/markdown" in data: yield mathml(data["text/markdown"])
        elif "text/plain" in data: yield fence(data["text/plain"], " { .text .output }")
        elif o["output_type"] == "stream" and o["name"] == "stdout": yield fence("".join(o["text"]), " { .text .output }")


def markdown(path, to):
    "A processed notebook as the Markdown that mkdocs reads, with its pictures in files."
    out, k = [], 0
    def save(data, ext):
        nonlocal k
        k += 1; to.parent.mkdir(parents=True, exist_ok=True)
        name = f"{to.stem}-{k}.{ext}"
        (to.parent/name).write_text(data) if isinstance(data, str) else (to.parent/name).write_bytes(data)
        return name
    for c in json.loads(path.read_text())["cells"]:
        text = "".join(c["source"])
        if c["cell_type"] == "raw":
            meta = yaml.safe_load(text.strip().strip("-"))
            out += [f"# {meta['title']}", f"<p class='lead'>{prose(meta['description'])}</p>" if meta.get("description") else ""]
        elif c["cell_type"] == "markdown":
            text = re.sub(r"\]\((?!https?:)([^)#]*)\.ipynb(#[^)]*)?\)", lambda m: f"]({m[1]}.md{m[2] or ''})", text)
            text = re.sub(r"^::: \{\.(\w+)\}$", r'<div class="\1" markdown="1">', re.sub(r"^:::$", "</div>", text, flags=re.M), flags=re.M)
            out.append(re.sub(r"^\[source\]\((.*)\)$", r'<a class="source" href="\1">source</a>', mathml(text), flags=re.M))
        else:
            says = dict(re.findall(r"^#\|\s*([\w-]+):\s*(.*)$", text, re.M))
            code = re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip()
            if code and says.get("echo") != "false": out.append(f'<details class="code" markdown="1"><summary>{html.escape(says.get("code-summary", "code").strip(chr(34)))}</summary>\n\n{fence(code, "python")}\n\n</details>' if says.get("code-fold") == "true" else fence(code, "python"))
            out += outputs(c, json.loads(says["fig-alt"]) if says.get("fig-alt", "").startswith('"') else says.get("fig-alt", ""), save)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("\n\n".join(out) + "\n")


HEAD = """{% extends "base.html" %}
{% block extrahead %}
<meta property="og:title" content="{{ page.title | striptags if page else config.site_name }}">
<meta property="og:description" content="{{ config.site_description }}">
<meta property="og:image" content="{{ config.site_url }}images/social.png">
<meta name="twitter:card" content="summary_large_image">
{% endblock %}
"""


def site(root, processed, out):
    "The processed notebooks as a site in OUT/site, by mkdocs, strictly."
    web, src = quarto(root), out/"docs"
    for path in processed.rglob("*.ipynb"): markdown(path, (src/path.relative_to(processed)).with_suffix(".md"))
    for d in ("images", "styles.css", "llms.txt"): (shutil.copytree if (processed/d).is_dir() else shutil.copy)(processed/d, src/d)
    (out/"theme").mkdir(exist_ok=True); (out/"theme"/"main.html").write_text(HEAD)
    def palette(scheme, icon, to): return {"scheme": scheme, "primary": "custom", "accent": "custom", "media": f"(prefers-color-scheme: {'dark' if scheme == 'slate' else 'light'})", "toggle": {"icon": f"material/{icon}", "name": f"Switch to {to} mode"}}
    config = {"site_name": web["title"], "site_description": web["description"], "site_url": web["site-url"] + "/", "docs_dir": str(src), "site_dir": str(out/"site"), "strict": True,
              "use_directory_urls": False, "copyright": web["page-footer"]["left"], "nav": sidebar(web["sidebar"]["contents"]), "extra_css": ["styles.css"], "extra": {"generator": False, "social": [{"icon": "fontawesome/brands/github", "link": web["repo-url"], "name": "Source"}]},
              "theme": {"name": "material", "custom_dir": str(out/"theme"), "font": False, "favicon": "images/favicon.svg", "logo": "images/favicon.svg",
                        "palette": [palette("default", "weather-night", "dark"), palette("slate", "weather-sunny", "light")],
                        "features": ["navigation.footer", "navigation.top", "navigation.sections", "content.code.copy", "search.highlight", "toc.follow"]},
              "markdown_extensions": ["attr_list", "md_in_html", "tables", {"toc": {"permalink": True, "toc_depth": "2-3"}}, {"pymdownx.highlight": {"use_pygments": True}}, "pymdownx.superfences"],
              "validation": {"links": {"not_found": "warn", "anchors": "warn"}, "nav": {"omitted_files": "warn", "not_found": "warn"}}, "plugins": ["search"]}
    (out/"mkdocs.yml").write_text(yaml.safe_dump(config, allow_unicode=True))
    r = subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(out/"mkdocs.yml")], cwd=out, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return out/"site"


if __name__ == "__main__":
    out = Path(sys.argv[1])
    pages(ROOT, out/"pages")
    if "--pages" not in sys.argv: print(site(ROOT, out/"pages", out))

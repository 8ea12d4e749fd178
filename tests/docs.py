"""The site: `python tests/docs.py OUT` writes OUT/pages, the processed notebooks that Quarto
publishes, and OUT/site, the same pages by mkdocs.

Quarto is in no package registry, so the tests and offline readers get the second; `--pages` stops
after the first.
"""
import ast
import json
import os
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

import offline
from offline import FENCED, joined
from reference import INI, ROOT, Module, Sources, code, prose, table

TOKENS = re.compile(
    r"^#{1,6} .*?$"
    r"|```.*?```"
    r"|\[[^\]\n]*\]\([^)\n]*\)"
    r"|\$\$.*?\$\$"
    r"|\$[^$\n]+\$"
    r"|`(?P<name>[A-Za-z_][\w.]*)(?P<call>\(\))?`",
    re.S | re.M,
)
# the whole cell
SHELL = re.compile(r'sh\(r?(?:"""((?:(?!""").)*)"""|"([^"\\]*)")(?:, code=\d+)?\)', re.S)
# a line of a paragraph with a list right below it
PARAGRAPH = re.compile(
    r"^((?![ ]*(?:[-*]|\d+\.) )[^\n]*\S[^\n]*)\n(?=(?:[-*]|\d+\.) )", re.M
)
# a pipe table: the row of names, the dash row, the others
TABLE = re.compile(r"^(\|.*\|\n)(\|(?:[ :]*-+[ :]*\|)+\n)((?:\|.*\|(?:\n|$))+)", re.M)
BLOCKS = re.compile(r"(^```.*?^```$)", re.S | re.M)
MARKUP = re.compile(r"\]\([^)]*\)|\\[A-Za-z]+|[`*$\[{}\\]")
# characters of a column that ask for more of a table's width
NARROW, WIDE = 4, 45
SETTINGS = re.compile(
    r"[\w.]*(seed|set_num_threads|filterwarnings|default_dtype|rcParams)"
)
BY_FORMAT = """::: {{.content-visible when-format="html"}}

{}

:::

::: {{.content-visible unless-format="html"}}

{}

:::"""
# columns of the page of every public name, in percent: name, meaning
INDEX_WIDTHS = (30, 70)
COPIED = (".svg", ".png", ".gif", ".css", ".scss", ".bib", ".yml")


def notebooks(root):
    found = (root/"nbs").rglob("*.ipynb")
    return sorted(p for p in found if ".ipynb_checkpoints" not in p.parts)


def slug(text):
    "The anchor that pandoc gives to a heading."
    words = re.sub(r"\$[^$]*\$", "", text)
    words = re.sub(r"[^\w\s.-]", "", words).strip().lower()
    return re.sub(r"\s+", "-", words).lstrip("0123456789-._") or "section"


# What a cell is

def parsed(source):
    "The statements of a cell without its magics; None if it is no Python."
    try:
        return ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M))
    except SyntaxError:
        return None


def only_imports(source):
    "A cell that readers may skip: imports, perhaps with a seed."
    tree = parsed(source)
    imports = (ast.Import, ast.ImportFrom)
    if tree is None or not tree.body or not isinstance(tree.body[0], imports):
        return False
    others = [s for s in tree.body if not isinstance(s, imports)]
    return all(SETTINGS.match(ast.unparse(s)) for s in others)


def literal(node):
    "The text of a string, with … for what is filled in; None of anything else."
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    return None


def titles(call):
    "What a call gives as a title."
    is_title = getattr(call.func, "attr", "") in ("set_title", "suptitle", "title")
    first = call.args[:1] if is_title else []
    return first + [k.value for k in call.keywords if k.arg in ("title", "suptitle")]


def alt(source):
    "What a picture shows: the titles that its cell gives it."
    tree = parsed(source)
    if tree is None:
        return ""
    calls = [c for c in ast.walk(tree) if isinstance(c, ast.Call)]
    calls.sort(key=lambda c: (c.lineno, c.col_offset))
    found = [literal(title) for call in calls for title in titles(call)]
    said = [" ".join(t.split()) for t in found if isinstance(t, str)]
    return "; ".join(dict.fromkeys(said))


def has_picture(cell):
    kinds = {kind for o in cell.outputs for kind in o.get("data", {})}
    return bool(kinds & {"image/png", "image/gif"})


def show_commands(nb):
    "Commands that a notebook hands to the shell are shown as what one types."
    from execnb.nbio import mk_cell
    for i, cell in reversed([*enumerate(nb.cells)]):
        found = SHELL.fullmatch(cell.source.strip()) if cell.cell_type == "code" else None
        if found:
            typed = (found[1] or found[2]).strip()
            cell.source = f"#| echo: false\n{cell.source}"
            nb.cells.insert(i, mk_cell(offline.fence(typed, "sh"), "markdown"))


def direct(cell, heading):
    "Say to Quarto how a cell of code is shown."
    directives = cell.directives_
    if has_picture(cell) and "fig-alt:" not in directives:
        said = json.dumps(alt(cell.source) or heading, ensure_ascii=False)
        cell.source = f"#| fig-alt: {said}\n{cell.source}"
    if "code-fold:" not in directives and only_imports(cell.source):
        cell.source = f"#| code-fold: true\n#| code-summary: imports\n{cell.source}"
    if "hide_input" in directives:
        cell.source = f"#| echo: false\n{cell.source}"


def without_html(data):
    """HTML that a cell returned as raw Markdown, and as plain text where a format is not HTML.

    Quarto loads scripts from other sites on every page with an output of HTML.
    """
    shown = offline.fence(joined(data.pop("text/html")), "{=html}")
    said = offline.fence(joined(data.get("text/plain", "")), "")
    return BY_FORMAT.format(shown, said)


def prepare(output):
    "What a cell returned, as Quarto shows it best."
    data = output.get("data", {})
    if "text/html" in data:
        data["text/markdown"] = without_html(data)
    elif "text/markdown" in data:
        data["text/markdown"] = proportioned(joined(data["text/markdown"]))


def cells_of(row):
    return re.split(r"(?<!\\)\|", row.strip())[1:-1]


def dashes(table):
    """A pipe table with a dash row in proportion to its columns' longest cells.

    pandoc takes the widths from it: with as many dashes for each, numbers get as much as sentences.
    """
    names, row, others = table.groups()
    marks = cells_of(row)
    rows = [cells_of(line) for line in (names + others).strip().split("\n")]
    if any(len(cells) != len(marks) for cells in rows):
        return table[0]
    letters = [max(len(MARKUP.sub("", c).strip()) for c in column) for column in zip(*rows)]
    widths = [min(max(n, NARROW), WIDE) for n in letters]
    shares = [max(3, round(100*w/sum(widths))) for w in widths]
    drawn = (re.sub("-+", "-"*n, mark.strip()) for n, mark in zip(shares, marks))
    return f"{names}|{'|'.join(drawn)}|\n{others}"


def proportioned(text):
    "Markdown whose tables give each column the width that it needs."
    parts = enumerate(BLOCKS.split(text))
    return "".join(p if i % 2 else TABLE.sub(dashes, p) for i, p in parts)


# The processed notebooks

def chapter(book, page):
    "The processor of nbdev that makes a page of a notebook."
    from execnb.nbio import mk_cell
    from nbdev.process import Processor
    module = book.modules[page]

    class Chapter(Processor):
        def begin(self):
            first = self.nb.cells[0]
            parts = re.match(r"(#\s[^\n]*\n*)(>[^\n]*\n*)?(.*)", first.source, re.S)
            title, subtitle, rest = parts.groups()
            first.source = title + (subtitle or "")
            added = (f"<small>{links(page)}</small>", rest)
            self.nb.cells[1:1] = [mk_cell(text, "markdown") for text in added]
            self.seen = set(module.anchors) | {"reference", "constants"}
            self.heading = title.strip("# \n")

        def cell(self, cell):
            if cell.cell_type == "markdown":
                cell.source = book.prose(cell.source, page, self.seen)
                found = re.findall(r"^#+ (.*?)(?: \{#.*)?$", cell.source, re.M)
                self.heading = [self.heading, *found][-1]
            elif cell.cell_type == "code" and {"hide", "default_exp"} & set(cell.directives_):
                cell.source = None
            elif cell.cell_type == "code":
                direct(cell, self.heading)
                for output in cell.outputs:
                    prepare(output)

        def end(self):
            if text := module.reference():
                self.nb.cells.append(mk_cell(text, "markdown"))

    return Chapter


def links(page):
    "Where a reader runs a notebook, and where they edit it."
    path = quote(f"nbs/{page}", safe="")
    repository = f"{INI['user']}/{INI['repo']}/{INI['branch']}"
    return " · ".join([
        f"[Run on Binder](https://mybinder.org/v2/gh/{repository}?labpath={path})",
        f"[Edit the notebook]({INI['git_url']}/edit/{INI['branch']}/nbs/{page})",
    ])


class Book:
    "The notebooks of `root`, and where each public name is described."

    def __init__(self, root):
        import fastcore.docments
        fastcore.docments.getsource = Sources.source
        self.root = root
        self.modules = {m.page: m for m in (Module(p, root) for p in notebooks(root))}
        self.public = set(import_module(INI["lib_name"]).__all__)

    def where(self, name, call, page):
        """Page and anchor of a name in prose.

        A plain word is meant as a name on its own page only, or if it is called.
        """
        if name in self.modules[page].anchors:
            return page, name
        found = [m for m in self.modules.values() if self._defines(m, name)]
        is_marked = name in self.public or call or "_" in name or "." in name
        is_class = name[:1].isupper() and not name.isupper()
        return (found[0].page, name) if (is_marked or is_class) and len(found) == 1 else None

    def _defines(self, module, name):
        "Whether it is the one to link to: public names may be exported by several."
        if name not in self.public:
            return name in module.anchors
        origin = getattr(module.symbols.get(name), "__module__", "")
        return name in module.anchors and origin == module.name

    def prose(self, text, page, seen):
        "Headings with ids, lists that pandoc sees, and public names that are links."
        linked = set()

        def token(found):
            if found[0].startswith("#"):
                return with_id(found[0], seen)
            name = found["name"]
            at = self.where(name, found["call"], page) if name and name not in linked else None
            if not at:
                return found[0]
            linked.add(name)
            to = "" if at[0] == page else os.path.relpath(at[0], Path(page).parent)
            return f"[{found[0]}]({to}#{at[1]})"

        text = TOKENS.sub(token, proportioned(text))
        parts = enumerate(FENCED.split(text))
        return "".join(p if i % 2 else PARAGRAPH.sub(r"\1\n\n", p) for i, p in parts)

    def process(self, path, out):
        """nbdev's processors, but exported code stays beside its derivation.

        Its reference is the last section.
        """
        from execnb.nbio import read_nb, write_nb
        from nbdev import processors as by
        from nbdev.frontmatter import FrontmatterProc
        from nbdev.process import NBProcessor
        page = path.relative_to(self.root/"nbs").as_posix()
        nb = read_nb(path)
        show_commands(nb)
        procs = [
            chapter(self, page), FrontmatterProc, by.strip_ansi, by.hide_line, by.rm_header_dash,
            by.clean_magics, by.hide_, by.strip_hidden_metadata,
        ]
        NBProcessor(nb=nb, procs=procs).process()
        (out/page).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, out/page)

    def index(self):
        "A page of every public name."
        front = [
            "---",
            "title: Every public name",
            "description: What the library exports, by chapter",
            "output-file: api.html",
            "repo-actions: false",
            "---",
        ]
        out = ["\n".join(front)]
        mods = [m for m in self.modules.values() if m.anchors]
        public = [
            index_row(m, n) for m in mods for n, o in m.symbols.items()
            if n in self.public and o.__module__ == m.name
        ]
        title = f"## From `{INI['lib_name']}` {{#public}}\n\n"
        out.append(title + table(sorted(public), INDEX_WIDTHS))
        for m in mods:
            rows = [index_row(m, n) for n in (*m.symbols, *m.constants)]
            title = f"## [{m.title}]({m.page}) {{#{m.name}}}\n\n`{m.name}`\n\n"
            out.append(title + table(rows, INDEX_WIDTHS))
        return out


def with_id(heading, seen):
    "A heading with the id that pandoc would give it, so that mkdocs gives it the same."
    if "{#" in heading or heading.startswith("# "):
        return heading
    level, _, title = heading.partition(" ")
    name = anchor = slug(title)
    k = 1
    while anchor in seen:
        k += 1
        anchor = f"{name}-{k}"
    seen.add(anchor)
    return f"{level} {title} {{#{anchor}}}"


def index_row(module, name):
    return f"[{code(name)}]({module.page}#{name})", prose(module.said(name))


def index_notebook(texts):
    """The page of every public name, as a notebook.

    A cell is a list of lines: of one string, Quarto makes a single heading.
    """
    cells = [
        {
            "cell_type": "raw" if i == 0 else "markdown",
            "id": f"api{i}",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
        for i, text in enumerate(texts)
    ]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    meta = {"kernelspec": kernel}
    return {"cells": cells, "metadata": meta, "nbformat": 4, "nbformat_minor": 5}


def pages(root, out):
    "Processed notebooks and what they need, for Quarto: `quarto render OUT/pages`."
    book = Book(root)
    for path in notebooks(root):
        book.process(path, out)
    (out/"api.ipynb").write_text(json.dumps(index_notebook(book.index())))
    for file in (root/"nbs").rglob("*"):
        if file.suffix in COPIED and ".ipynb_checkpoints" not in file.parts:
            to = out/file.relative_to(root/"nbs")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to)
    shutil.copy(root/"llms.txt", out)
    return out


if __name__ == "__main__":
    out = Path(sys.argv[1])
    pages(ROOT, out/"pages")
    if "--pages" not in sys.argv:
        print(offline.site(ROOT, out/"pages", out))

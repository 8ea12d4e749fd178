"""The processed notebooks without Quarto: Markdown for mkdocs, with formulas in MathML."""
import html
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode

import yaml
from reference import prose

FENCED = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)


def quarto(root):
    "What _quarto.yml says of the site."
    return yaml.safe_load((root/"_quarto.yml").read_text())["website"]


def sidebar(contents):
    "The sidebar of _quarto.yml as mkdocs' nav."
    return [
        c.replace(".ipynb", ".md") if isinstance(c, str)
        else {c["section"]: sidebar(c["contents"])}
        for c in contents
    ]


# Formulas

SIGNS = {"lvert": "|", "rvert": "|", "lVert": "‖", "rVert": "‖", "langle": "⟨", "rangle": "⟩"}
SIZED = re.compile(r"\\(left|right|[bB]igg?[lr]?)\\([lr](?:vert|Vert|angle))(?![A-Za-z])")
# the relations, sums and commas after which a line may break
BREAKS = re.compile(
    r">(?:=|<|>|\+|,|;|&#x(?:0003D|02264|02265|02192|02208|02248|02212|0002B|0002C|0003C|0003E"
    r"|021A6|02261|0223C);)</mo>$"
)


def known(tex):
    "TeX without what latex2mathml would show as it stands."
    tex = re.sub(r"\\math(bb|cal) ?([A-Z])", r"\\math\1{\2}", tex)
    tex = SIZED.sub(lambda m: f"\\{m[1]}{SIGNS[m[2]]}", tex)
    return tex.replace(r"\arg", r"\operatorname{arg}")


def formula(tex, display):
    "A formula in MathML that holds no markup of Markdown's."
    from latex2mathml.converter import convert

    def plain(found):
        said = re.sub(r"[*_\[\]`|\\]", lambda c: f"&#{ord(c[0])};", found[1])
        return f">{said}<"

    shown = re.sub(r">([^<]+)<", plain, convert(known(tex), display=display))
    return shown.replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;')


def mathml(text):
    "LaTeX between dollar signs, outside code, as MathML: formulas need no script and no network."
    def block(found):
        return f'<span class="formula">{formula(found[1], "block")}</span>'

    def inline(found):
        shown = formula(found[1], "inline")
        return broken(shown) if len(found[1]) > 25 else shown

    def rendered(part):
        part = re.sub(r"\$\$(.+?)\$\$", block, part, flags=re.S)
        return re.sub(r"\$([^$\n]+?)\$", inline, part)

    return "".join(p if i % 2 else rendered(p) for i, p in enumerate(FENCED.split(text)))


def broken(math):
    """An inline formula as several, so that lines can break after its relations and sums.

    Browsers break no MathML.
    """
    rows = re.fullmatch(r"(<math[^>]*>)<mrow>(.*)</mrow></math>", math, re.S)
    if not rows:
        return math
    parts = []
    start = depth = 0
    for m in re.finditer(r"<(/?)(\w+)[^>]*?(/?)>", rows[2]):
        is_alone = m[3]
        is_end = m[1]
        depth += 0 if is_alone else -1 if is_end else 1
        if not depth and m[2] == "mo" and BREAKS.search(rows[2][:m.end()]):
            parts.append(rows[2][start:m.end()])
            start = m.end()
    parts.append(rows[2][start:])
    return "<wbr>".join(f"{rows[1]}<mrow>{p}</mrow></math>" for p in parts if p)


# Markdown

def fence(text, info):
    "A block of code, between more backticks than it holds."
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    ticks = "`"*max(3, 1 + longest)
    return f"{ticks}{info}\n{text.rstrip()}\n{ticks}"


PICTURES = {
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/gif": "gif",
}


# raw HTML, which the output was before it was made Markdown for Quarto
HTML = re.compile(r"^(```+)\{=html\}\n(.*?)\n\1$", re.S | re.M)


def joined(value):
    return "".join(value) if isinstance(value, list) else value


def outputs(cell, caption, save):
    "The outputs of a cell, in Markdown; what was said to stderr is not shown."
    for o in cell.get("outputs", []):
        data = {k: joined(v) for k, v in o.get("data", {}).items()}
        kind = next((k for k in PICTURES if k in data), None)
        if kind:
            content = data[kind] if "svg" in kind else b64decode(data[kind])
            name = save(content, PICTURES[kind])
            alt = html.escape(caption)
            yield f'<p class="picture"><img src="{name}" alt="{alt}" loading="lazy"></p>'
        elif "text/markdown" in data:
            text = data["text/markdown"]
            raw = HTML.search(text)
            yield f'<div class="output">{raw[2]}</div>' if raw else mathml(text)
        elif "text/plain" in data:
            yield fence(data["text/plain"], " { .text .output }")
        elif o["output_type"] == "stream" and o["name"] == "stdout":
            yield fence("".join(o["text"]), " { .text .output }")


def front(text):
    "The title and its line, from what Quarto reads at the top of a notebook."
    meta = yaml.safe_load(text.strip().strip("-"))
    said = meta.get("description")
    return [f"# {meta['title']}", f"<p class='lead'>{prose(said)}</p>" if said else ""]


def written(text):
    "A cell of Markdown: links to pages, divisions as HTML, formulas as MathML."
    def page(found):
        return f"]({found[1]}.md{found[2] or ''})"

    text = re.sub(r"\]\((?!https?:)([^)#]*)\.ipynb(#[^)]*)?\)", page, text)
    text = re.sub(r"^:::$", "</div>", text, flags=re.M)
    text = re.sub(r"^::: \{\.(\w+)\}$", r'<div class="\1" markdown="1">', text, flags=re.M)
    link = r'<a class="source" href="\1">source</a>'
    return re.sub(r"^\[source\]\((.*)\)$", link, mathml(text), flags=re.M)


def computed(cell, text, save):
    "A cell of code, folded if it says so, and what it returned."
    says = dict(re.findall(r"^#\|\s*([\w-]+):\s*(.*)$", text, re.M))
    code = re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip()
    if code and says.get("echo") != "false":
        shown = fence(code, "python")
        if says.get("code-fold") == "true":
            summary = html.escape(says.get("code-summary", "code").strip('"'))
            opening = f'<details class="code" markdown="1"><summary>{summary}</summary>'
            shown = f"{opening}\n\n{shown}\n\n</details>"
        yield shown
    caption = says.get("fig-alt", "")
    yield from outputs(cell, json.loads(caption) if caption.startswith('"') else caption, save)


def markdown(path, to):
    "A processed notebook as the Markdown that mkdocs reads, with its pictures in files."
    to.parent.mkdir(parents=True, exist_ok=True)
    out = []
    saved = []

    def save(data, ext):
        saved.append(f"{to.stem}-{len(saved) + 1}.{ext}")
        file = to.parent/saved[-1]
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        return file.name

    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "raw":
            out += front(text)
        elif cell["cell_type"] == "markdown":
            out.append(written(text))
        else:
            out += computed(cell, text, save)
    to.write_text("\n\n".join(out) + "\n")


# The site

HEAD = """{% extends "base.html" %}
{% block extrahead %}
<meta property="og:title" content="{{ page.title | striptags if page else config.site_name }}">
<meta property="og:description" content="{{ config.site_description }}">
<meta property="og:image" content="{{ config.site_url }}images/social.png">
<meta property="og:image:alt" content="{{ config.extra.image_alt }}">
<meta name="twitter:card" content="summary_large_image">
<meta name="twitter:image" content="{{ config.site_url }}images/social.png">
<meta name="twitter:image:alt" content="{{ config.extra.image_alt }}">
{% endblock %}
"""


def palette(scheme, icon, to):
    dark = "dark" if scheme == "slate" else "light"
    return {
        "scheme": scheme,
        "primary": "custom",
        "accent": "custom",
        "media": f"(prefers-color-scheme: {dark})",
        "toggle": {"icon": f"material/{icon}", "name": f"Switch to {to} mode"},
    }


def theme(folder):
    day = palette("default", "weather-night", "dark")
    night = palette("slate", "weather-sunny", "light")
    return {
        "name": "material",
        "custom_dir": str(folder),
        "font": False,
        "favicon": "images/favicon.svg",
        "logo": "images/favicon.svg",
        "palette": [day, night],
        "features": [
            "navigation.footer", "navigation.top", "navigation.sections", "content.code.copy",
            "search.highlight", "toc.follow",
        ],
    }


def config(web, out):
    "What mkdocs is told: as strict as it can be, and what _quarto.yml says."
    github = {"icon": "fontawesome/brands/github", "link": web["repo-url"], "name": "Source"}
    alt = web["open-graph"]["image-alt"]
    return {
        "site_name": web["title"],
        "site_description": web["description"],
        "site_url": web["site-url"] + "/",
        "docs_dir": str(out/"docs"),
        "site_dir": str(out/"site"),
        "strict": True,
        "use_directory_urls": False,
        "copyright": web["page-footer"]["left"],
        "nav": sidebar(web["sidebar"]["contents"]),
        "extra_css": ["styles.css"],
        "extra": {"generator": False, "social": [github], "image_alt": alt},
        "theme": theme(out/"theme"),
        "markdown_extensions": [
            "attr_list",
            "md_in_html",
            "tables",
            {"toc": {"permalink": True, "toc_depth": "2-3"}},
            {"pymdownx.highlight": {"use_pygments": True}},
            "pymdownx.superfences",
        ],
        "validation": {
            "links": {"not_found": "warn", "anchors": "warn"},
            "nav": {"omitted_files": "warn", "not_found": "warn"},
        },
        "plugins": ["search"],
    }


def site(root, processed, out):
    "The processed notebooks as a site in OUT/site, by mkdocs, strictly."
    for path in processed.rglob("*.ipynb"):
        markdown(path, (out/"docs"/path.relative_to(processed)).with_suffix(".md"))
    for name in ("images", "styles.css", "llms.txt"):
        copy = shutil.copytree if (processed/name).is_dir() else shutil.copy
        copy(processed/name, out/"docs"/name)
    (out/"theme").mkdir(exist_ok=True)
    (out/"theme"/"main.html").write_text(HEAD)
    said = yaml.safe_dump(config(quarto(root), out), allow_unicode=True)
    (out/"mkdocs.yml").write_text(said)
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(out/"mkdocs.yml")]
    r = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return out/"site"

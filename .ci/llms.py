"""llms.txt (llmstxt.org) from the sidebar of `_quarto.yml`: `python .ci/llms.py` writes it, and
`--check` fails if it is stale.

Each page is named by its H1 and described by its subtitle, so that a new page needs no line of its
own. What is linked is its twin in Markdown, which Quarto writes beside it.
"""
import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
ALSO = {
    "ARCHITECTURE.md": "how data flows through the modules, and where a line of code belongs",
    "CONTRIBUTING.md": "set up, edit a notebook, test, add a geometry",
    "CHANGELOG.md": "what changed, and how to move over",
    "RELEASING.md": "how a release is made",
    "bench": "the scripts behind every measured number, and their results",
}
# pages that are made with the site; see tests/docs.py
MADE = {"api.ipynb": ("Every public name", "what the library exports, by chapter")}
ABOUT = (
    "a PyTorch library that merges checkpoints and LoRA adapters from disk to disk, where a "
    "geometry is a chart into a space, and each one is derived in a notebook."
)
INTERFACE = (
    "`from frechet_merge import merge, frechet_mean, load, check_geometry, Geometry, Euclidean, "
    "Sphere, Span, LoRA` is the Python interface; `frechet-merge merge A B -o OUT` the command "
    "line. Code comes from the notebooks: edit `nbs/*.ipynb`, not the modules that name one."
)


def title(name):
    "H1 and subtitle of a notebook."
    if name in MADE:
        return MADE[name]
    cells = json.loads((ROOT/"nbs"/name).read_text())["cells"]
    text = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    heading = re.search(r"^# (.+)$", text, re.M)
    subtitle = re.search(r"^> (.+)$", text, re.M)
    return heading[1].strip(), subtitle[1].strip()


def page(name):
    "Where the site has a notebook: nbdev drops the number in front of its name."
    stem = name.removesuffix(".ipynb").lower()
    return re.sub(r"(^|/)\d+[a-zA-Z0-9]*_", r"\1", stem) + ".html"


def twin(name):
    "Where the site has its Markdown: the same address with .md behind it."
    return page(name) + ".md"


def section(heading, names, site):
    lines = []
    for name in names:
        h1, what = title(name)
        lines.append(f"- [{h1}]({site}/{twin(name)}): {what}")
    return f"## {heading}\n\n" + "\n".join(lines)


def optional(repository):
    lines = []
    for name, what in ALSO.items():
        kind = "blob" if "." in name else "tree"
        lines.append(f"- [{name}]({repository}/{kind}/main/{name}): {what}")
    return "## Optional\n\n" + "\n".join(lines)


def render():
    web = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]
    h1, what = title("index.ipynb")
    out = [f"# {h1}", f"> {what}: {ABOUT}", INTERFACE]
    contents = web["sidebar"]["contents"]
    pages = {"section": "Pages", "contents": [held for held in contents if isinstance(held, str)]}
    for part in [pages, *(held for held in contents if isinstance(held, dict))]:
        out.append(section(part["section"], part["contents"], web["site-url"]))
    out.append(optional(web["repo-url"]))
    return "\n\n".join(out) + "\n"


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv:
        is_fresh = (ROOT/"llms.txt").read_text() == text
        assert is_fresh, "llms.txt is not what the sidebar says: run python .ci/llms.py"
    else:
        (ROOT/"llms.txt").write_text(text)

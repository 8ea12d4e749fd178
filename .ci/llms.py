"""llms.txt (llmstxt.org) from the sidebar of `_quarto.yml`: `python .ci/llms.py` writes it, `--check` fails if it is stale.

Each page is named by its H1 and described by its subtitle, so that a new page needs no line of its own.
"""
import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
ALSO = [("ARCHITECTURE.md", "how data flows through the modules, and where a line of code belongs"),
        ("CONTRIBUTING.md", "set up, edit a notebook, test, add a geometry"),
        ("CHANGELOG.md", "what changed, and how to move over"),
        ("RELEASING.md", "how a release is made"),
        ("bench", "the scripts behind every measured number, and their results")]


MADE = {"api.ipynb": ("Every public name", "what the library exports, by chapter")}     # with the site; see tests/docs.py


def title(name):
    "H1 and subtitle of a notebook."
    if name in MADE: return MADE[name]
    text = next("".join(c["source"]) for c in json.loads((ROOT/"nbs"/name).read_text())["cells"] if c["cell_type"] == "markdown")
    return re.search(r"^# (.+)$", text, re.M)[1].strip(), re.search(r"^> (.+)$", text, re.M)[1].strip()


def page(name):
    "Where the site has a notebook: nbdev drops the number in front of its name."
    return re.sub(r"(^|/)\d+[a-zA-Z0-9]*_", r"\1", name.removesuffix(".ipynb").lower()) + ".html"


def render():
    web = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]
    def lines(names):
        for n in names:
            h1, what = title(n)
            yield f"- [{h1}]({web['site-url']}/{page(n)}): {what}"
    h1, what = title("index.ipynb")
    out = [f"# {h1}", f"> {what}: a PyTorch library that merges checkpoints and LoRA adapters from disk to disk, where a geometry is a chart into "
           "a space, and each one is derived in a notebook.",
           "`from frechet_merge import merge, frechet_mean, load, check_geometry, Geometry, Euclidean, Sphere, Span, LoRA` is the Python interface; "
           "`frechet-merge merge A B -o OUT` the command line. Code comes from the notebooks: edit `nbs/*.ipynb`, not the modules that name one."]
    for s in web["sidebar"]["contents"]:
        s = {"section": "Pages", "contents": [s]} if isinstance(s, str) else s
        out.append(f"## {s['section']}\n\n" + "\n".join(lines(s["contents"])))
    repo = web["repo-url"]
    out.append("## Optional\n\n" + "\n".join(f"- [{n}]({repo}/{'blob' if '.' in n else 'tree'}/main/{n}): {what}" for n, what in ALSO))
    return "\n\n".join(out) + "\n"


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv: assert (ROOT/"llms.txt").read_text() == text, "llms.txt is not what the sidebar says: run python .ci/llms.py"
    else: (ROOT/"llms.txt").write_text(text)

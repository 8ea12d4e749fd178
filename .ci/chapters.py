"""The tables of nbs/chapters.ipynb from the sidebar: `python .ci/chapters.py` writes them, and
`--check` fails if they are not what the sidebar and the chapters' own first lines say.

What stands above a table is written by hand, in the cell that the sidebar's section names.
"""

import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT/"nbs"/"chapters.ipynb"
MADE = ("api.ipynb",)  # pages that are no chapters


def row(name):
    "A chapter's title and subtitle."
    text = "".join(json.loads((ROOT/"nbs"/name).read_text())["cells"][0]["source"])
    title, subtitle = re.match(r"# (.+)\n\n> (.+)", text).groups()
    return f"| [{title}]({name}) | {subtitle} |"


def table(names):
    return "\n".join(["| chapter | |", "|---|---|", *map(row, names)])


def sections():
    "Name → chapters, in the order of the sidebar."
    web = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]
    found = {}
    for held in web["sidebar"]["contents"]:
        if isinstance(held, dict):
            found[held["section"]] = [n for n in held["contents"] if n not in MADE]
    return found


def render():
    held = json.loads(PAGE.read_text())
    parts = sections()
    for cell in held["cells"]:
        text = "".join(cell["source"])
        if not text.startswith("## "):
            continue
        above = text.partition("\n\n| ")[0]
        names = parts.pop(above.splitlines()[0].removeprefix("## "))
        cell["source"] = f"{above}\n\n{table(names)}".splitlines(True)
    assert not parts, f"nbs/chapters.ipynb lacks the sections {[*parts]}: add a cell for each"
    return json.dumps(held, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv:
        is_fresh = PAGE.read_text() == text
        assert is_fresh, "nbs/chapters.ipynb is not the sidebar: run python .ci/chapters.py"
    else:
        PAGE.write_text(text)

"""README.md from nbs/index.ipynb: `python .ci/readme.py` writes it, `--check` fails if it is not
what the notebook says.

nbdev's own `nbdev_readme` needs the Quarto program, which no package registry carries.
"""

import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = "nbs/"


def render():
    out, pictures = [], {}
    for cell in json.loads((ROOT/"nbs"/"index.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            out.append(re.sub(r"\]\((?!https?:|#)([\w/]+\.ipynb)", rf"]({SITE}\1", source))
            continue
        hidden = source.startswith("#| hide")
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if hidden:
            continue
        if code and "#| echo: false" not in source:
            out.append(f"```python\n{code}\n```")
        for o in cell["outputs"]:
            data = o.get("data", {})
            if "image/png" in data:
                name = f"picture-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                out.append(f"![](nbs/images/{name})")
            elif "text/markdown" in data:
                out.append("".join(data["text/markdown"]))
            elif "text/plain" in data or "text" in o:
                out.append(
                    "```\n" + "".join(data.get("text/plain") or o["text"]).rstrip() + "\n```"
                )
    return "\n\n".join(out) + "\n", pictures


if __name__ == "__main__":
    text, pictures = render()
    if "--check" in sys.argv:
        assert (ROOT/"README.md").read_text() == text, (
            "README.md is not what nbs/index.ipynb says: run python .ci/readme.py"
        )
        for name, png in pictures.items():
            assert (ROOT/"nbs"/"images"/name).read_bytes() == png, (
                f"{name} is not what nbs/index.ipynb shows: run python .ci/readme.py"
            )
    else:
        (ROOT/"README.md").write_text(text)
        (ROOT/"nbs"/"images").mkdir(exist_ok=True)
        for name, png in pictures.items():
            (ROOT/"nbs"/"images"/name).write_bytes(png)

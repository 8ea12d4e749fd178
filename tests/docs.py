"""The documentation as mkdocs renders it: `python tests/docs.py OUT` builds the site into OUT/site.

Quarto publishes the site (`_quarto.yml`); where it is not installed, this builds the same notebooks, strictly, and so finds
broken links and pages that do not render.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

import latex2mathml.converter
import yaml


def pages(contents):
    "The sidebar of _quarto.yml as mkdocs' nav."
    for c in contents:
        if isinstance(c, str): yield c
        else: yield {c["section"]: list(pages(c["contents"]))}


def mathml(text):
    "LaTeX between dollar signs, outside code, as MathML: formulas need no script and no network."
    def show(m): return latex2mathml.converter.convert(m[1], display="block")
    def inline(m): return latex2mathml.converter.convert(m[1])
    parts = re.split(r"(```.*?```|`[^`]*`)", text, flags=re.S)
    return "".join(p if i % 2 else re.sub(r"\$([^$\n]+?)\$", inline, re.sub(r"\$\$(.+?)\$\$", show, p, flags=re.S)) for i, p in enumerate(parts))


def build(root: Path, out: Path) -> Path:
    site = yaml.safe_load((root/"_quarto.yml").read_text())["website"]
    src = out/"docs"
    for path in (root/"nbs").rglob("*.ipynb"):
        nb = json.loads(path.read_text()); cells = []
        for c in nb["cells"]:
            text = "".join(c["source"])
            if c["cell_type"] == "code":
                if re.match(r"#\|\s*(hide|default_exp)", text): continue
                if re.search(r"^#\|\s*echo:\s*false", text, re.M): c["metadata"]["tags"] = ["hide_code"]
                c["source"] = re.sub(r"^#\|.*\n?", "", text, flags=re.M)
            else: c["source"] = mathml(text) if c["cell_type"] == "markdown" else c["source"]
            cells.append(c)
        nb["cells"] = cells
        (src/path.relative_to(root/"nbs")).parent.mkdir(parents=True, exist_ok=True)
        (src/path.relative_to(root/"nbs")).write_text(json.dumps(nb))
    config = {"site_name": site["title"], "docs_dir": str(src), "site_dir": str(out/"site"), "strict": True, "theme": {"name": "material"},
              "nav": list(pages(site["sidebar"]["contents"])), "validation": {"links": {"not_found": "warn"}, "nav": {"omitted_files": "warn"}},
              "plugins": ["search", {"mkdocs-jupyter": {"execute": False, "include_source": False, "remove_tag_config": {"remove_input_tags": ["hide_code"]}}}]}
    (out/"mkdocs.yml").write_text(yaml.safe_dump(config))
    r = subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(out/"mkdocs.yml")], cwd=out, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return out/"site"


if __name__ == "__main__": print(build(Path(__file__).parents[1], Path(sys.argv[1])))

"""The offline site holds what it promises, and the checker of rendered pages finds no fault in it.

The checker's headless Chromium walks every page and photographs it. SCREENSHOTS=FOLDER photographs
whole pages, light and dark; by default the first screen of each goes to _screenshots. CHROMIUM
names the browser.
"""
import inspect
import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import docs
import offline
import pytest
import reference
import rendered
import yaml
from conftest import ROOT

pytestmark = pytest.mark.xdist_group("site")  # which is built once
MB = 2**20


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Built once, in a process of its own."
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, docs.__file__, out]
    r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return out/"site"


@pytest.fixture(scope="module")
def pages(site):
    return rendered.read(site)


@pytest.fixture(scope="module")
def modules():
    "What the notebooks export, with the page that says so."
    return [reference.Module(p, ROOT) for p in docs.notebooks(ROOT)]


def html_of(page):
    return page.replace(".ipynb", ".html")


def without_tags(html):
    return unescape(re.sub(r"<[^>]+>", "", html))


def without_space(text):
    return re.sub(r"\s", "", text)


# What the pages hold

def flat(contents):
    "The pages of mkdocs' nav."
    if isinstance(contents, str):
        return [contents]
    parts = contents if isinstance(contents, list) else contents.values()
    return [page for part in parts for page in flat(part)]


def test_every_notebook_is_a_page_of_the_sidebar(pages):
    listed = flat(offline.sidebar(offline.quarto(ROOT)["sidebar"]["contents"]))
    assert len(set(listed)) == len(listed)
    names = {p.relative_to(ROOT/"nbs").as_posix() for p in docs.notebooks(ROOT)}
    expected = {html_of(name) for name in names} | {"api.html"}
    assert {name.replace(".md", ".html") for name in listed} == set(pages) == expected


def test_links_into_the_repository_lead_to_what_is_there(pages):
    kinds = rf"/(?:blob|edit|tree|raw)/{reference.INI['branch']}/([^#?]+)"
    repository = re.compile(re.escape(reference.INI["git_url"]) + kinds)
    named = {
        (name, unquote(found[1]))
        for name, page in pages.items()
        for href in page.links
        if (found := repository.match(href))
    }
    broken = [(name, path) for name, path in named if not (ROOT/path).exists()]
    assert len(named) > len(pages) and not broken, broken


def undescribed(name, symbol, html):
    "What the card of a name lacks: the spelling of its parameters, its source."
    card = re.split(r"<h[23]", html.split(f'id="{name}"')[1])[0]
    said = without_space(without_tags(card))
    is_error = isinstance(symbol, type) and issubclass(symbol, BaseException)
    rows = [] if is_error else reference.parameters(symbol)[0]
    asked = [x for row in rows for x in (row.name, row.type, row.default)]
    lacking = [x for x in asked if without_space(x) not in said]
    source = f"{reference.BLOB}/{symbol.__module__.replace('.', '/')}.py#L"
    return lacking + ([] if source in card else ["source"])


def test_every_public_name_is_described(pages, modules):
    """On its page and in the index.

    On its page it is a heading or a row that links can reach, the signature, the docments and the
    source.
    """
    missing = []
    for m in modules:
        name = html_of(m.page)
        page = pages[name]
        missing += [(m.name, n) for n in m.anchors if n not in page.ids]
        linked = pages["api.html"].links
        names = (*m.symbols, *m.constants)
        missing += [(m.name, n, "index") for n in names if f"{name}#{n}" not in linked]
        html = page.path.read_text()
        for n, symbol in m.symbols.items():
            missing += [(m.name, n, x) for x in undescribed(n, symbol, html)]
    assert not missing, missing


def test_a_card_says_what_the_docments_say(pages):
    html = pages["spaces/mean.html"].path.read_text()
    said = without_tags(html.split('id="frechet_mean"')[1].split("<h3")[0])
    for x in ("tol=1e-10", "on the residual", "Geometry", "source", "Karcher 1977"):
        assert x in said, x


def test_exported_code_stays_beside_its_derivation(pages, modules):
    for m in modules:
        html = re.sub(r"<[^>]+>", "", pages[html_of(m.page)].path.read_text())
        text = re.sub(r"\s|&#\w+;|&\w+;", "", html)
        for n, symbol in m.symbols.items():
            kind = "class" if inspect.isclass(symbol) else "def"
            assert f"{kind}{n}" in text, (m.name, n)


def test_no_page_is_heavy(pages, site):
    "The page with its pictures, styles and scripts, uncompressed."
    address = offline.quarto(ROOT)["site-url"]
    for name, page in pages.items():
        found = {rendered.located(a, name, address) for a in page.assets}
        files = {site/at[0] for at in found if at} | {page.path}
        weight = sum(f.stat().st_size for f in files if f.suffix != ".html" or f == page.path)
        assert weight <= 2*MB, f"{name}: {weight/MB:.2f} MB"


def test_every_picture_says_what_it_shows(pages):
    silent = [
        (name, picture.get("src"))
        for name, page in pages.items()
        for picture in page.pictures
        if not picture.get("alt") and "favicon" not in picture.get("src", "")
    ]
    assert not silent, f"give the cell a title or `#| fig-alt:`: {silent}"


def test_icons_and_the_social_picture(site, pages):
    import matplotlib.image

    assert matplotlib.image.imread(site/"images"/"social.png").shape[:2] == (630, 1200)
    assert (site/"images"/"favicon.svg").stat().st_size < 2000
    html = pages["index.html"].path.read_text()
    assert "images/favicon.svg" in html and "twitter:card" in html


# What Quarto gets

def lines_of(cell):
    return "".join(cell["source"])


def test_quarto_gets_the_same_pages(site):
    "The processed notebooks keep front matter, opening paragraphs, exported code and reference."
    processed = site.parent/"pages"
    beside = ("_quarto.yml", "styles.css", "theme.scss", "llms.txt", "images/social.png")
    assert all((processed/name).is_file() for name in beside)
    for path in docs.notebooks(ROOT):
        cells = json.loads((processed/path.relative_to(ROOT/"nbs")).read_text())["cells"]
        front, *others = map(lines_of, cells)
        rest = "\n".join(others)
        words = re.sub(r"\]\([^)]*\)|\W", "", rest)    # without the links of public names
        assert cells[0]["cell_type"] == "raw" and "title:" in front and "output-file:" in front
        first = json.loads(path.read_text())["cells"][0]
        opening = lines_of(first).strip().split("\n\n")[-1]
        assert re.sub(r"\]\([^)]*\)|\W", "", opening)[:40] in words, path
        assert not re.search(r"^#\|\s*(?:export|hide|default_exp)", rest, re.M), path


def test_quarto_gets_lines_and_nothing_that_loads_scripts(site):
    "Of a cell of one string it makes one heading; for an output of HTML it loads two scripts."
    found = sorted((site.parent/"pages").rglob("*.ipynb"))
    assert len(found) == len(docs.notebooks(ROOT)) + 1
    for path in found:
        for cell in json.loads(path.read_text())["cells"]:
            assert isinstance(cell["source"], list), path
            assert all("\n" not in line[:-1] for line in cell["source"]), path
            kinds = [kind for o in cell.get("outputs", []) for kind in o.get("data", {})]
            assert not {"text/html", "application/javascript"} & set(kinds), path


def test_quarto_takes_widths_from_dash_rows(site):
    text = (site.parent/"pages"/"spaces/mean.ipynb").read_text()
    rows = re.findall(r"type \| default \|  \|\\n\",\s*\"\|([-|]+)\|", text)
    assert rows and all([*map(len, row.split("|"))] == [15, 15, 10, 60] for row in rows)


TABLE = """
| law | what it says |
|:--:|---|
| 1 | a sentence that needs [its](room.ipynb) room |

```
| not | a table |
|---|---|
| 1 | 2 |
```
"""


def test_columns_are_as_wide_as_what_they_hold():
    said = docs.proportioned(TABLE)
    _, dash_row, *_ = said.strip().split("\n")
    left, right = dash_row.strip("|").split("|")
    assert left.startswith(":") and left.endswith(":")
    assert len(right) > 5*len(left) and 90 < len(dash_row) < 110
    assert said.replace(dash_row, "|:--:|---|") == TABLE


def test_the_published_site_loads_nothing_from_elsewhere_and_shows_its_picture():
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text())
    page = config["format"]["html"]
    assert page["html-math-method"] == "mathml"
    assert all(names[-1] == "theme.scss" for names in page["theme"].values())
    assert "$web-font-path: false;" in (ROOT/"nbs"/"theme.scss").read_text()

    web = config["website"]
    cards = [web["open-graph"], web["twitter-card"]]
    assert {card["image"] for card in cards} == {web["image"]} == {"/images/social.png"}
    assert {card["image-alt"] for card in cards} == {config["image-alt"]}
    assert (ROOT/"nbs"/web["image"].lstrip("/")).exists()
    assert web["image"].lstrip("/") in config["project"]["resources"]


CONSTANTS = '''
# %% ../nbs/a.ipynb #1
A = 3  # beside it

# above it,
# in two lines
B = 1.0
# of the first; of the second
C, D = (1, 2), "d"
E: int = 5
F = [
    "long",
]
'''


def test_constants_have_their_comments_from_beside_or_above():
    found = reference.constants(CONSTANTS)
    assert found == {
        "A": ("3", "beside it"),
        "B": ("1.0", "above it, in two lines"),
        "C": ("(1, 2)", "of the first"),
        "D": ('"d"', "of the second"),
        "E": ("5", ""),
        "F": ("['long']", ""),
    }


# In a browser

@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api")
    if not rendered.chromium():
        pytest.skip("no Chromium: `apt-get install chromium`, or name one in CHROMIUM")
    with rendered.opened() as b:
        yield b


# Of each kind of element, one whose letters stand out too little from their ground.
CONTRAST = r"""() => {
  const rgb = c => c.match(/[\d.]+/g).map(Number);
  const linear = v => (v /= 255) <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4;
  const light = c => {
    const [r, g, b] = c.map(linear);
    return .2126*r + .7152*g + .0722*b;
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const b = rgb(getComputedStyle(e).backgroundColor);
      if ((b.length > 3 ? b[3] : 1) > .5) return b.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const looked = ['p', 'li', 'td', 'pre span', 'h1', 'h2', 'mi', 'a', 'p span'];
  const kinds = new Map();
  for (const e of document.querySelectorAll(looked.map(s => 'article ' + s).join())) {
    const parent = e.parentElement;
    const own = [e.tagName, e.className, e.getAttribute('style')];
    const kind = [...own, parent.tagName, parent.className].join();
    if (!kinds.has(kind) && e.textContent.trim() && e.getClientRects().length) kinds.set(kind, e);
  }
  const bad = [];
  for (const e of kinds.values()) {
    const hasText = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!hasText || e.matches('.headerlink, .md-icon')) continue;
    const a = light(rgb(getComputedStyle(e).color));
    const b = light(ground(e));
    const ratio = (Math.max(a, b) + .05)/(Math.min(a, b) + .05);
    const said = e.tagName + ' ' + e.textContent.trim().slice(0, 30);
    if (ratio < 3) bad.push(said + ' ' + ratio.toFixed(1));
  }
  return {bad: bad.slice(0, 5), ground: light(ground(document.querySelector('article')))};
}"""
SET_SCHEME = "s => document.body.setAttribute('data-md-color-scheme', s)"
SCHEMES = {"light": "default", "dark": "slate"}


def index_once(site):
    "A page indexes the whole site when it opens: once is enough, below."
    index = json.loads((site/"search"/"search_index.json").read_text())
    short = {**index, "docs": index["docs"][:1]}

    def prepare(context):
        context.route("**/search_index.json", lambda route: route.fulfill(json=short))

    return prepare


def contrast(tab, scheme):
    "What cannot be read in a scheme of colours."
    look = tab.evaluate(CONTRAST)
    if look["bad"]:
        yield f"contrast in {scheme}", look["bad"]
    if (look["ground"] < .2) != (scheme == "dark"):
        yield f"not {scheme}", look["ground"]


def photographer(folder, is_whole):
    "Looks at a page in both schemes, and photographs it."
    def look(tab, name, width):
        is_desk = width == rendered.DESKTOP[0]
        for scheme in SCHEMES if is_whole or is_desk else ["light"]:
            tab.evaluate(SET_SCHEME, SCHEMES[scheme])
            if is_desk:
                yield from contrast(tab, scheme)
            if is_whole or scheme == "light":
                file = f"{name.removesuffix('.html').replace('/', '.')}.{width}.{scheme}.jpg"
                tab.screenshot(path=folder/file, type="jpeg", quality=70, full_page=is_whole)

    return look


def test_walk(browser, site):
    "The checker finds nothing on any page, and light and dark can be read."
    folder = Path(os.environ.get("SCREENSHOTS", ROOT/"_screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    look = photographer(folder, is_whole="SCREENSHOTS" in os.environ)
    address = offline.quarto(ROOT)["site-url"]
    faults = rendered.check(site, address, browser, prepare=index_once(site), also=look)
    assert not faults, "\n".join(map(str, faults))


def test_search_and_dark_mode_by_hand(browser, site):
    "What a reader does: switch to dark, turn a page, search, follow the first hit."
    with rendered.served(site) as address:
        width, height = rendered.DESKTOP
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, color_scheme="light")
        tab = context.new_page()
        tab.goto(address + "/index.html")

        def scheme():
            return tab.evaluate("document.body.getAttribute('data-md-color-scheme')")

        assert scheme() == "default"
        tab.click("label[title='Switch to dark mode']")
        assert scheme() == "slate"
        tab.goto(address + "/spaces/mean.html")
        assert scheme() == "slate"

        is_open = tab.is_visible("input.md-search__input")
        tab.click("input.md-search__input" if is_open else "label[for='__search']")
        tab.fill("input.md-search__input", "geodesic")
        tab.wait_for_selector(".md-search-result__item a")
        tab.click(".md-search-result__item a")
        tab.wait_for_load_state()
        assert "geodesic" in tab.inner_text("article").lower()
        context.close()

"""The site, as mkdocs renders it, holds what it promises; a headless Chromium walks every page and photographs it.

SCREENSHOTS=FOLDER photographs whole pages, light and dark; by default the first screen of each goes to _screenshots. CHROMIUM names the browser.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import docs
import offline
import pytest
import reference
from conftest import ROOT

pytestmark = pytest.mark.xdist_group("site")      # which is built once
MB = 2**20
DESKTOP, PHONE = (1440, 900), (390, 844)      # CSS pixels
RAW = re.compile(r"\\(?:frac|sum|log|exp|mathbb|mathrm|operatorname|lVert|langle|theta|begin|text|left|cdot)|\$\$|\$[^$\n]{1,80}\$|^#\||^---$|:::", re.M)
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    "What a page holds: its text outside code, ids, links, pictures, assets."
    def __init__(self, path):
        super().__init__(); self.path, self.ids, self.links, self.pictures, self.assets, self.words, self.math, self.inside = path, set(), [], [], [], [], [], []
        self.feed(path.read_text()); self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a: self.ids.add(a["id"])
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag == "img": self.pictures.append(a); self.assets.append(a.get("src", ""))
        if tag == "script" and a.get("src"): self.assets.append(a["src"])
        if tag == "link" and a.get("rel") in ("stylesheet", "icon"): self.assets.append(a["href"])
        if tag in ("script", "style", "pre", "code", "math") : self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag: self.inside.pop()

    def handle_data(self, data):
        if not self.inside: self.words.append(data)
        elif "math" in self.inside: self.math.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Built once, in a process of its own."
    out = tmp_path_factory.mktemp("site")
    r = subprocess.run([sys.executable, docs.__file__, out], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return out/"site"


@pytest.fixture(scope="module")
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob("*.html")) if p.name != "404.html"}


def page_of(notebook): return notebook.relative_to(ROOT/"nbs").with_suffix(".html").as_posix()
def inside(href, name): return not urlparse(href).scheme and not href.startswith("//") and urldefrag(urljoin(name, unquote(href)))


def test_every_notebook_is_a_page_of_the_sidebar(pages):
    def flat(c): return [c] if isinstance(c, str) else [y for x in (c if isinstance(c, list) else c.values()) for y in flat(x)]
    listed = flat(offline.sidebar(offline.quarto(ROOT)["sidebar"]["contents"]))
    assert len(set(listed)) == len(listed)
    assert {x.replace(".md", ".html") for x in listed} == set(pages) == {page_of(p) for p in docs.notebooks(ROOT)} | {"api.html"}


def test_no_link_is_broken(pages, site):
    "Pages, anchors and files of the site; and what points into the repository is there."
    broken, repository = [], re.compile(re.escape(reference.INI["git_url"]) + rf"/(?:blob|edit|tree|raw)/{reference.INI['branch']}/([^#?]+)")
    for name, page in pages.items():
        for href in page.links + page.assets:
            if m := repository.match(href): broken += [] if (ROOT/unquote(m[1])).exists() else [(name, href)]
            elif at := inside(href, name):
                target = at.url or name
                ok = target in pages and (not at.fragment or at.fragment in pages[target].ids) if target.endswith(".html") or not at.url else (site/target).exists()
                broken += [] if ok or href in (".", "./", "..", "../") else [(name, href)]
    assert not broken, broken


def test_formulas_and_directives_are_rendered(pages):
    seen = {n: m[0] for n, p in pages.items() if (m := RAW.search(p.text))}
    assert not seen, seen
    unknown = {n: found for n, p in pages.items() if (found := re.findall(r"\\[A-Za-z]+|\$", " ".join(p.math)))}
    assert not unknown, f"commands that latex2mathml does not know: {unknown}"
    for n, p in pages.items():
        html = p.path.read_text(); prose = re.sub(r"<(script|style|pre|code|div class=.highlight).*?</\1.*?>|<[^>]+>", "", html, flags=re.S)
        assert "<h1" in html and "#|" not in prose and "$" not in prose and "\\frac" not in prose, n
    leftover = {n: m[0] for n, p in pages.items() if (m := re.search(r"(?:^|>)\s*#\|.*", p.path.read_text(), re.M))}
    assert not leftover, leftover


def test_every_public_name_is_described(pages):
    "On its page: a heading or a row that links can reach, the signature, the docments and the source; and in the index."
    missing = []
    for m in (reference.Module(p, ROOT) for p in docs.notebooks(ROOT)):
        page, index = pages[m.page.replace(".ipynb", ".html")], pages["api.html"]
        missing += [(m.name, n) for n in m.anchors if n not in page.ids]
        missing += [(m.name, n, "index") for n in (*m.symbols, *m.constants) if f"{m.page.replace('.ipynb', '.html')}#{n}" not in index.links]
        html = page.path.read_text()
        for n, o in m.symbols.items():
            card = re.split(r"<h[23]", html.split(f'id="{n}"')[1])[0]
            said = unescape(re.sub(r"<[^>]+>", "", card))
            rows, returns = ([], None) if isinstance(o, type) and issubclass(o, BaseException) else reference.parameters(o)
            missing += [(m.name, n, x) for name, kind, default, _ in rows for x in (name, kind, default) if re.sub(r"\s", "", x) not in re.sub(r"\s", "", said)]
            missing += [] if f"{reference.BLOB}/{m.name.replace('.', '/')}.py#L" in card else [(m.name, n, "source")]
    assert not missing, missing
    said = unescape(re.sub(r"<[^>]+>", "", pages["03_mean.html"].path.read_text().split('id="frechet_mean"')[1].split("<h3")[0]))
    for x in ("tol=1e-10", "on the residual", "Geometry", "source", "Karcher 1977"): assert x in said, x


def test_exported_code_stays_beside_its_derivation(pages):
    import inspect
    for m in (reference.Module(p, ROOT) for p in docs.notebooks(ROOT)):
        text = re.sub(r"\s|&#\w+;|&\w+;", "", re.sub(r"<[^>]+>", "", pages[m.page.replace(".ipynb", ".html")].path.read_text()))
        for n, o in m.symbols.items(): assert re.sub(r"\s", "", f"{'class' if inspect.isclass(o) else 'def'} {n}") in text, (m.name, n)


def test_no_page_is_heavy(pages, site):
    "The page with its pictures, styles and scripts, uncompressed."
    weights = {n: p.path.stat().st_size + sum((site/at.url).stat().st_size for at in {inside(a, n) for a in p.assets} if at and (site/at.url).is_file()) for n, p in pages.items()}
    heavy = {n: f"{w/MB:.2f} MB" for n, w in weights.items() if w > 2*MB}
    assert not heavy, heavy


def test_every_picture_says_what_it_shows(pages):
    silent = [(n, a.get("src")) for n, p in pages.items() for a in p.pictures if not a.get("alt") and "logo" not in a.get("src", "") and "favicon" not in a.get("src", "")]
    assert not silent, f"give the cell a title or `#| fig-alt:`: {silent}"


def test_icons_and_the_social_picture(site, pages):
    import matplotlib.image
    assert matplotlib.image.imread(site/"images"/"social.png").shape[:2] == (630, 1200)
    assert (site/"images"/"favicon.svg").stat().st_size < 2000
    html = pages["index.html"].path.read_text()
    assert "og:image" in html and "images/social.png" in html and "images/favicon.svg" in html and "twitter:card" in html


def test_quarto_gets_the_same_pages(site):
    "The processed notebooks keep front matter, opening paragraphs, exported code and reference."
    processed = site.parent/"pages"
    assert (processed/"_quarto.yml").exists() and (processed/"styles.css").exists()
    for path in docs.notebooks(ROOT):
        cells = json.loads((processed/path.relative_to(ROOT/"nbs")).read_text())["cells"]
        first = "".join(cells[0]["source"]); rest = "\n".join("".join(c["source"]) for c in cells[1:])
        assert cells[0]["cell_type"] == "raw" and "title:" in first and "output-file:" in first
        opening = "".join(json.loads(path.read_text())["cells"][0]["source"]).strip().split("\n\n")
        assert re.sub(r"\W", "", opening[-1])[:40] in re.sub(r"\W", "", rest), path
        assert not re.search(r"^#\|\s*(?:export|hide|default_exp)", rest, re.M), path


# In a browser

def chromium(): return os.environ.get("CHROMIUM") or next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not (path := chromium()): pytest.skip("no Chromium: `apt-get install chromium`, or name one in CHROMIUM")
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield b
        b.close()


LOOK = r"""() => {
  const article = document.querySelector('article'), width = document.documentElement.clientWidth, shown = e => e.getClientRects().length > 0;
  const scrolls = e => { for (e = e.parentElement; e && e !== document.body; e = e.parentElement) if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return true; return false; };
  const wide = [...article.querySelectorAll('*')].filter(e => shown(e) && e.getBoundingClientRect().right > width + 1 && !scrolls(e)).slice(0, 3).map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 60));
  const text = article.cloneNode(true); text.querySelectorAll('pre, code, math, script, style').forEach(e => e.remove());
  return {width: document.documentElement.scrollWidth, wide, text: text.textContent, letters: parseFloat(getComputedStyle(article).fontSize),
          maths: [...article.querySelectorAll('math')].filter(m => shown(m) && m.getBoundingClientRect().width < 2).length};
}"""
PICTURES = """async () => { document.querySelectorAll('img').forEach(i => i.loading = 'eager'); const all = [...document.images]; await Promise.all(all.map(i => i.decode().catch(() => 0))); return all.filter(i => !i.naturalWidth).map(i => i.src); }"""
CONTRAST = r"""() => {
  const rgb = c => c.match(/[\d.]+/g).map(Number), light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b; };
  const ground = e => { for (; e; e = e.parentElement) { const b = rgb(getComputedStyle(e).backgroundColor); if ((b.length > 3 ? b[3] : 1) > .5) return b.slice(0, 3); } return [255, 255, 255]; };
  const kinds = new Map(), bad = [];      // one of each kind of element: what it is, and where
  for (const e of document.querySelectorAll('article p, article li, article td, article pre span, article h1, article h2, article mi, article a, article p span')) {
    const kind = [e.tagName, e.className, e.getAttribute('style'), e.parentElement.tagName, e.parentElement.className].join();
    if (!kinds.has(kind) && e.textContent.trim() && e.getClientRects().length) kinds.set(kind, e);
  }
  for (const e of kinds.values()) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.matches('.headerlink, .md-icon')) continue;
    const a = light(rgb(getComputedStyle(e).color)), b = light(ground(e)), ratio = (Math.max(a, b) + .05)/(Math.min(a, b) + .05);
    if (ratio < 3) bad.push(e.tagName + ' ' + e.textContent.trim().slice(0, 30) + ' ' + ratio.toFixed(1));
  }
  return {bad: bad.slice(0, 5), ground: light(ground(document.querySelector('article')))};
}"""


def test_walk(browser, address, pages, site):
    "Every page at both widths: nothing missing, nothing raw, nothing said on the console, nothing wider than the screen; light and dark can be read."
    folder = Path(os.environ.get("SCREENSHOTS", ROOT/"_screenshots")); whole = "SCREENSHOTS" in os.environ
    folder.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(color_scheme="light", reduced_motion="reduce")
    index = json.loads((site/"search"/"search_index.json").read_text())
    context.route("**/search_index.json", lambda r: r.fulfill(json={**index, "docs": index["docs"][:1]}))      # a page indexes the whole site when it opens: once is enough, below
    tab, faults, here = context.new_page(), [], []
    def fault(*what): faults.append((*here, *what))
    tab.on("console", lambda m: m.type in ("error", "warning") and fault("console", m.text))
    tab.on("pageerror", lambda e: fault("script", str(e)))
    tab.on("requestfailed", lambda r: fault("request", r.url))
    tab.on("response", lambda r: r.status >= 400 and fault("status", r.status, r.url))
    tab.on("request", lambda r: not r.url.startswith((address, "data:", "blob:")) and fault("leaves the site", r.url))
    for name in pages:
        for width, height in (DESKTOP, PHONE):
            here[:] = name, width
            tab.set_viewport_size({"width": width, "height": height})
            if width == DESKTOP[0]:
                tab.goto(f"{address}/{name}", wait_until="load")
                if missing := tab.evaluate(PICTURES): fault("missing pictures", missing)
            seen = tab.evaluate(LOOK)
            if seen["width"] > width: fault("wider than the screen", seen["width"])
            if seen["wide"]: fault("out of the screen", seen["wide"])
            if seen["letters"] < 12: fault("letters of", seen["letters"], "px")
            if seen["maths"]: fault("formulas without width", seen["maths"])
            if m := RAW.search(seen["text"]): fault("raw", m[0])
            for scheme in ("light", "dark") if whole or width == DESKTOP[0] else ("light",):
                tab.evaluate("s => document.body.setAttribute('data-md-color-scheme', s)", "slate" if scheme == "dark" else "default")
                if width == DESKTOP[0]:
                    look = tab.evaluate(CONTRAST)
                    if look["bad"]: fault("contrast", scheme, look["bad"])
                    if (look["ground"] < .2) != (scheme == "dark"): fault("not", scheme, look["ground"])
                if whole or scheme == "light": tab.screenshot(path=folder/f"{name[:-5].replace('/', '.')}.{width}.{scheme}.jpg", type="jpeg", quality=70, full_page=whole)
    context.close()
    assert not faults, "\n".join(map(str, faults))


def test_search_and_dark_mode_by_hand(browser, address):
    "What a reader does: switch to dark, turn a page, search, follow the first hit."
    context = browser.new_context(viewport=dict(zip(("width", "height"), DESKTOP)), color_scheme="light")
    tab = context.new_page(); tab.goto(address + "/index.html")
    def scheme(): return tab.evaluate("document.body.getAttribute('data-md-color-scheme')")
    assert scheme() == "default"
    tab.click("label[title='Switch to dark mode']"); assert scheme() == "slate"
    tab.goto(address + "/03_mean.html"); assert scheme() == "slate"
    tab.click("label[for='__search']") if not tab.is_visible("input.md-search__input") else tab.click("input.md-search__input")
    tab.fill("input.md-search__input", "geodesic")
    tab.wait_for_selector(".md-search-result__item a"); tab.click(".md-search-result__item a")
    tab.wait_for_load_state(); assert "geodesic" in tab.inner_text("article").lower()
    context.close()

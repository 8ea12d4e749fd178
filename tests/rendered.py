"""Rendered pages, checked: `python tests/rendered.py FOLDER` reads them and walks them in Chromium.

It finds links and anchors that lead nowhere, markup that was left raw, headings and social
pictures that are missing, pages wider than a desk or a phone shows, errors on the console, and
requests that leave the site. The tests run it on the offline pages, the workflow on Quarto's before
it publishes them. `--site` is the address of the published pages, by default what _quarto.yml says;
the environment's CHROMIUM names the browser.
"""
import argparse
import os
import re
import shutil
import sys
import threading
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

DESKTOP = (1400, 900)  # CSS pixels
PHONE = (390, 844)
SMALLEST_LETTERS = 12
LONGEST_HEADING = 120  # characters
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
CODE = ("script", "style", "pre", "code", "math", "annotation")
# tags within a line: others begin a new one
INLINE = (
    "a", "abbr", "b", "cite", "code", "del", "em", "i", "kbd", "mark", "q", "s", "small", "span",
    "strong", "sub", "sup", "u", "wbr",
)
SOCIAL = ("og:image", "twitter:image")
RAW = re.compile(
    r"\$(?!\d)"
    r"|\\[()\[\]]"
    r"|\\(?:frac|sum|log|exp|math\w+|operatorname|lVert|langle|theta|begin|text|left|cdot)"
    r"|:::"
    r"|\{\{<"
    r"|\{[#.][\w-]+\}"
    r"|\]\("
    r"|\*\*"
    r"|```"
    r"|^#\|"
    r"|^#{1,6} \S"
    r"|^\|.*\|$"
    r"|^---$",
    re.M,
)
DIRECTIVE = re.compile(r"^\s*#\| ?[\w-]+", re.M)
UNKNOWN_TEX = re.compile(r"\\[A-Za-z]+|\$")


class Fault(NamedTuple):
    "What is wrong with a page."
    page: str
    kind: str
    detail: str

    def __str__(self):
        return f"{self.page}: {self.kind}: {self.detail}"


# What can be read without a browser

class Page(HTMLParser):
    "What a page holds: ids, links, pictures, files that it needs, and its text outside code."

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.ids = set()
        self.links = []
        self.pictures = []
        self.assets = []
        self.meta = {}
        self.headings = []
        self.words = []
        self.code = []
        self.math = []
        self.inside = []
        self.in_heading = False
        self.feed(path.read_text())
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        said = dict(attrs)
        if said.get("id"):
            self.ids.add(said["id"])
        self.refer(tag, said)
        if tag == "meta":
            self.meta[said.get("property") or said.get("name")] = said.get("content") or ""
        if tag in HEADINGS:
            self.headings.append([tag, ""])
            self.in_heading = True
        if tag not in INLINE:
            self.words.append("\n")
        if tag in CODE:
            self.inside.append(tag)

    def refer(self, tag, said):
        "Keep what a tag leads to or needs."
        href, src = said.get("href"), said.get("src")
        if tag == "a" and said.get("name"):
            self.ids.add(said["name"])
        if tag in ("a", "area") and href:
            self.links.append(href)
        if tag == "img":
            self.pictures.append(said)
        if tag in ("img", "script", "source") and src:
            self.assets.append(src)
        if tag == "link" and href:
            self.assets.append(href)

    def handle_endtag(self, tag):
        self.in_heading &= tag not in HEADINGS
        if tag not in INLINE:
            self.words.append("\n")
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if self.in_heading and "annotation" not in self.inside:
            self.headings[-1][1] += data
        if not self.inside:
            self.words.append(data)
        elif self.inside[-1] in ("pre", "code"):
            self.code.append(data)
        elif self.inside[-1] == "math":
            self.math.append(data)


def read(folder):
    "The pages of a folder, by the names that links know them by."
    found = sorted(p for p in folder.rglob("*.html") if p.name != "404.html")
    return {p.relative_to(folder).as_posix(): Page(p) for p in found}


NOWHERE = "outside of the site"


def located(href, page, site):
    "File and anchor of the site that an address on `page` leads to; None if it leads elsewhere."
    there = urlsplit(urljoin(f"{site}/{page}", href))
    root = urlsplit(site)
    path = unquote(there.path)
    is_same_host = (there.scheme, there.netloc) == (root.scheme, root.netloc)
    if is_same_host and f"{path}/".startswith(f"{root.path}/"):
        file = path[len(root.path):].lstrip("/")
        is_folder = not file or file.endswith("/")
        return file + "index.html" if is_folder else file, unquote(there.fragment)

    asked = urlsplit(href)
    is_relative = not asked.scheme and not asked.netloc
    return (NOWHERE, "") if is_relative else None


def broken_links(pages, folder, site):
    "Links and files that are not there, and anchors that their page lacks."
    for name, page in pages.items():
        for href in page.links + page.assets:
            at = located(href, name, site)
            if at is None:
                continue
            file, anchor = at
            if not (folder/file).is_file():
                yield Fault(name, "broken link", href)
            elif anchor and file in pages and anchor not in pages[file].ids:
                yield Fault(name, "missing anchor", href)


def broken_texts(folder, site, texts):
    "Links of plain texts, such as llms.txt, to what the site lacks."
    for name in texts:
        if not (folder/name).is_file():
            yield Fault(name, "missing", "the site should hold it")
            continue
        for href in re.findall(r"\]\(([^)\s]+)\)", (folder/name).read_text()):
            at = located(href, name, site)
            if at and not (folder/at[0]).is_file():
                yield Fault(name, "broken link", href)


def raw_markup(pages):
    "Markup that readers would see, directives of cells in shown code, and unknown TeX in formulas."
    for name, page in pages.items():
        looks = [
            (RAW, page.text),
            (DIRECTIVE, "".join(page.code)),
            (UNKNOWN_TEX, " ".join(page.math)),
        ]
        for pattern, text in looks:
            if found := pattern.search(text):
                around = text[max(0, found.start() - 20):found.end() + 40]
                yield Fault(name, "raw markup", " ".join(around.split()))


def odd_headings(pages):
    "Pages without a title, and headings that swallowed what should stand below them."
    for name, page in pages.items():
        if "h1" not in (level for level, _ in page.headings):
            yield Fault(name, "no title", "an h1 is asked for")
        for level, text in page.headings:
            if len(text) > LONGEST_HEADING:
                yield Fault(name, "long heading", f"{level} of {len(text)}: {text.strip()[:60]}")


def missing_social(pages, folder, site):
    "Pages whose cards on social media would lack their picture: it needs a whole address."
    for name, page in pages.items():
        for key in SOCIAL:
            said = page.meta.get(key, "")
            at = located(said, name, site) if urlsplit(said).netloc else None
            if at is None or not (folder/at[0]).is_file():
                yield Fault(name, "social picture", f"{key} is {said!r}")


# What needs a browser

def chromium():
    "Path of a browser: the one in CHROMIUM, the system's, or the one that Playwright installed."
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, names)]
    return next(filter(None, found), None)


@contextmanager
def opened():
    "A headless Chromium, which resolves no address but this machine's."
    from playwright.sync_api import sync_playwright
    args = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    if os.getuid() == 0:
        args.append("--no-sandbox")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=args)
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    "Serves files and says nothing."

    def log_message(self, *args):
        pass


@contextmanager
def served(folder):
    "The address of a folder, on this machine, while it is served."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


PICTURES = """async () => {
  const all = [...document.images];
  all.forEach(i => i.loading = 'eager');
  await Promise.all(all.map(i => i.decode().catch(() => 0)));
  return all.filter(i => !i.naturalWidth).map(i => i.src);
}"""

# The article is what the page is about: navigation may slide in from beyond the screen.
# What stands in a box that scrolls may be wider than the screen.
LOOK = r"""() => {
  const article = document.querySelector('article')
    || document.querySelector('main') || document.body;
  const width = document.documentElement.clientWidth;
  const isShown = e => e.getClientRects().length > 0;
  const scrolls = e => {
    for (e = e.parentElement; e && e !== document.body; e = e.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  };
  const isWide = e =>
    isShown(e) && e.getBoundingClientRect().right > width + 1 && !scrolls(e);
  const isFlat = m => isShown(m) && m.getBoundingClientRect().width < 2;
  const say = e => e.tagName + ' ' + e.textContent.trim().slice(0, 60);
  return {
    width: document.documentElement.scrollWidth,
    wide: [...article.querySelectorAll('*')].filter(isWide).slice(0, 3).map(say),
    letters: parseFloat(getComputedStyle(article).fontSize),
    flat: [...article.querySelectorAll('math')].filter(isFlat).map(say),
  };
}"""


class Walk:
    "Pages opened one after the other in one tab, and what was wrong with them."

    def __init__(self, context, address):
        self.tab = context.new_page()
        self.address = address
        self.page = ""
        self.faults = []
        self.tab.on("console", self.hear)
        self.tab.on("pageerror", lambda e: self.find("console error", e))
        self.tab.on("request", self.ask)
        self.tab.on("requestfailed", self.fail)
        self.tab.on("response", self.answer)

    def find(self, kind, detail):
        self.faults.append(Fault(self.page, kind, str(detail)))

    def is_here(self, url):
        return url.startswith((f"{self.address}/", "data:", "blob:", "about:"))

    def hear(self, message):
        # a file that could not be loaded is found below, with its address
        is_said_below = message.text.startswith("Failed to load resource")
        if message.type == "error" and not is_said_below:
            self.find("console error", message.text)

    def ask(self, request):
        if not self.is_here(request.url):
            self.find("request leaves the site", request.url)

    def fail(self, request):
        # a browser that goes on to the next page gives up what it no longer needs
        if self.is_here(request.url) and request.failure != "net::ERR_ABORTED":
            self.find("request failed", request.url)

    def answer(self, response):
        # what leaves the site is found when it is asked for, whatever a proxy answers and when
        if response.status >= 400 and self.is_here(response.url):
            self.find("request failed", f"{response.status} {response.url}")

    def open(self, page):
        self.page = page
        self.resize(DESKTOP)
        self.tab.goto(f"{self.address}/{page}", wait_until="load")
        if missing := self.tab.evaluate(PICTURES):
            self.find("missing pictures", missing)

    def resize(self, size):
        width, height = size
        self.tab.set_viewport_size({"width": width, "height": height})

    def look(self, width):
        seen = self.tab.evaluate(LOOK)
        if seen["width"] > width:
            self.find("wider than the screen", f"{seen['width']} > {width}: {seen['wide']}")
        elif seen["wide"]:
            self.find("out of the screen", f"at {width}: {seen['wide']}")
        if seen["letters"] < SMALLEST_LETTERS:
            self.find("small letters", f"{seen['letters']} px at {width}")
        if seen["flat"]:
            self.find("formulas without width", seen["flat"])


def walk(folder, pages, browser, prepare=None, also=None):
    """Faults that show in a browser, at both widths.

    `prepare(context)` runs once before the pages are opened; `also(tab, page, width)` looks at
    each as it stands, and yields pairs of a kind and a detail.
    """
    with served(folder) as address:
        context = browser.new_context(color_scheme="light", reduced_motion="reduce")
        if prepare:
            prepare(context)
        walker = Walk(context, address)
        for name in pages:
            walker.open(name)
            for size in (DESKTOP, PHONE):
                walker.resize(size)
                walker.look(size[0])
                for kind, detail in also(walker.tab, name, size[0]) if also else ():
                    walker.find(kind, detail)
        context.close()
    return walker.faults


# Both

def check(folder, site, browser, texts=(), prepare=None, also=None):
    "All faults of a folder of rendered pages that `site` is the published address of."
    folder = Path(folder)
    pages = read(folder)
    if not pages:
        return [Fault(str(folder), "missing", "no page is there")]
    return [
        *broken_links(pages, folder, site),
        *broken_texts(folder, site, texts),
        *raw_markup(pages),
        *odd_headings(pages),
        *missing_social(pages, folder, site),
        *walk(folder, pages, browser, prepare, also),
    ]


def published():
    "Where _quarto.yml says that the pages will be."
    import yaml
    config = Path(__file__).parents[1]/"_quarto.yml"
    return yaml.safe_load(config.read_text())["website"]["site-url"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--site", default=published(), help="the address of the published pages")
    asked = parser.parse_args()
    with opened() as browser:
        faults = check(asked.folder, asked.site, browser, texts=("llms.txt",))
    print(*faults, f"{len(faults)} faults", sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

"""The checker of rendered pages finds each kind of fault.

And on pages as Quarto writes them, the styles keep what is wide within the screen.
"""
import base64
import subprocess
import sys

import pytest
import rendered
import yaml
from conftest import ROOT

pytestmark = pytest.mark.xdist_group("rendered")  # whose browser is opened once
SITE = "https://example.org/book"
DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGD4DwABBAEAX+XDSwAAAABJRU5E"
    "rkJggg=="
)
SOCIAL = f"""
<meta property="og:image" content="{SITE}/images/social.png">
<meta name="twitter:image" content="{SITE}/images/social.png">"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>A page</title>{head}
<link rel="icon" href="images/social.png">
</head><body>{body}</body></html>"""


def page(body, title="<h1>A page</h1>", head=SOCIAL):
    return PAGE.format(head=head, body=f"<main class='content'>{title}{body}</main>")


def write(folder, index, **others):
    "A folder of rendered pages."
    (folder/"images").mkdir(parents=True)
    (folder/"images"/"social.png").write_bytes(DOT)
    (folder/"index.html").write_text(index)
    for name, text in others.items():
        (folder/f"{name}.html").write_text(text)
    return folder


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api")
    if not rendered.chromium():
        pytest.skip("no Chromium: `apt-get install chromium`, or name one in CHROMIUM")
    with rendered.opened() as b:
        yield b


def kinds(folder, browser, **options):
    return {f.kind for f in rendered.check(folder, SITE, browser, **options)}


SOUND = """
<h2 id="there">Here</h2>
<p><a href="#there">There</a>, <a href="other.html#a">another</a>, <a href="./">home</a>,
<a href="https://example.org/elsewhere">elsewhere</a>, <a href="mailto:a@example.org">post</a>,
<a href="https://example.org/book/other.html?q=1#a">the same by its whole address</a>.</p>
<p>Prices are $3 and [1, 2), <code>$x$ **kwargs ::: [](x)</code>.</p>
<pre><code>a = "{{< not an include >}}"  #| not a directive</code></pre>
<p><math display="block"><semantics><mi>x</mi>
<annotation encoding="application/x-tex">\\frac{x}{1}</annotation></semantics></math></p>
<p><img src="images/social.png" alt="a dot"></p>"""


def test_a_sound_page_has_no_fault(tmp_path, browser):
    other = page("<p id='a'>Another</p>")
    folder = write(tmp_path/"site", page(SOUND), other=other)
    assert rendered.check(folder, SITE, browser) == []


DEFECTS = [
    ("<a href='absent.html'>there</a>", {"broken link"}),
    ("<a href='folder/'>a folder without a page</a>", {"broken link"}),
    ("<a href='notebook.ipynb'>not rendered</a>", {"broken link"}),
    (f"<a href='{SITE}/absent.html'>by its whole address</a>", {"broken link"}),
    ("<a href='/index.html'>the root of another site</a>", {"broken link"}),
    ("<a href='#nowhere'>there</a>", {"missing anchor"}),
    ("<a href='other.html#nowhere'>there</a>", {"missing anchor"}),
    ("<script src='absent.js'></script>", {"broken link", "request failed"}),
    ("<img src='absent.png'>", {"broken link", "missing pictures", "request failed"}),
    ("<img src='index.html'>", {"missing pictures"}),
    ("<p>$$x^2$$</p>", {"raw markup"}),
    ("<p>where $x_i$ is</p>", {"raw markup"}),
    (r"<p>where \(x\) is</p>", {"raw markup"}),
    (r"<p>\frac</p>", {"raw markup"}),
    ("<p>::: {.note}</p>", {"raw markup"}),
    ("<p>A heading {#with-id}</p>", {"raw markup"}),
    ("<p>#| hide</p>", {"raw markup"}),
    ("<pre><code><span>#| export</span>\nx = 1</code></pre>", {"raw markup"}),
    ("<p>{{&lt; include a.qmd &gt;}}</p>", {"raw markup"}),
    ("<p>[](other.html)</p>", {"raw markup"}),
    ("<p>[there](other.html)</p>", {"raw markup"}),
    ("<p>**bold**</p>", {"raw markup"}),
    ("<p>```python</p>", {"raw markup"}),
    ("<p>## A heading</p>", {"raw markup"}),
    ("<p>| a | b |</p>", {"raw markup"}),
    (r"<math><mi>x</mi><mtext>\unknown</mtext></math>", {"raw markup"}),
    ("<h2>" + "All that should stand below. "*9 + "</h2>", {"long heading"}),
    ("<div style='width: 600px'>wider than a phone</div>", {"wider than the screen"}),
    ("<div style='width: 1600px'>wider than a desk</div>", {"wider than the screen"}),
    ("<p style='font-size: 9px'><math></math></p>", {"formulas without width"}),
    ("<style>main { font-size: 9px }</style>", {"small letters"}),
    ("<script>console.error('no')</script>", {"console error"}),
    ("<script>throw new Error('no')</script>", {"console error"}),
    ("<script src='https://example.com/a.js'></script>", {"request leaves the site"}),
    ("<style>@import url(https://example.com/a.css)</style>", {"request leaves the site"}),
    ("<script>fetch('https://example.com').catch(() => 0)</script>", {"request leaves the site"}),
]


@pytest.fixture(scope="module")
def defects(tmp_path_factory, browser):
    "What is found in a folder with a page for each defect: page → kinds."
    pages = {f"defect-{i}": page(body) for i, (body, _) in enumerate(DEFECTS)}
    other = page("<p id='a'>Another</p>")
    folder = write(tmp_path_factory.mktemp("defects")/"site", page(""), other=other, **pages)
    found = {}
    for fault in rendered.check(folder, SITE, browser):
        found.setdefault(fault.page.removesuffix(".html"), set()).add(fault.kind)
    return found


@pytest.mark.parametrize("i", range(len(DEFECTS)), ids=[body[:40] for body, _ in DEFECTS])
def test_each_defect_is_found(defects, i):
    assert defects.get(f"defect-{i}", set()) == DEFECTS[i][1]


def test_no_page_is_blamed_for_another(defects):
    assert set(defects) == {f"defect-{i}" for i in range(len(DEFECTS))}


def test_what_a_page_lacks_is_found(tmp_path, browser):
    assert kinds(tmp_path, browser) == {"missing"}
    untitled = write(tmp_path/"untitled", page("", title=""))
    assert kinds(untitled, browser) == {"no title"}
    unshown = write(tmp_path/"unshown", page("", head=""))
    assert kinds(unshown, browser) == {"social picture"}
    beside = SOCIAL.replace("/images", "/tutorials/images")
    misplaced = write(tmp_path/"misplaced", page("", head=beside))
    assert kinds(misplaced, browser) == {"social picture"}


def test_links_of_plain_texts_are_followed(tmp_path, browser):
    folder = write(tmp_path/"site", page(""))
    assert kinds(folder, browser, texts=["llms.txt"]) == {"missing"}
    (folder/"llms.txt").write_text(f"- [A page]({SITE}/index.html.md): its twin")
    assert kinds(folder, browser, texts=["llms.txt"]) == {"broken link"}
    (folder/"index.html.md").write_text("# A page")
    assert kinds(folder, browser, texts=["llms.txt"]) == set()


def test_the_command_fails_where_there_is_a_fault(tmp_path, browser):
    folder = write(tmp_path/"site", page(""))
    (folder/"llms.txt").write_text("nothing")
    command = [sys.executable, rendered.__file__, folder, "--site", SITE]
    sound = subprocess.run(command, capture_output=True, text=True)
    assert (sound.returncode, sound.stdout) == (0, "0 faults\n"), sound.stderr

    (folder/"index.html").write_text(page("<a href='absent.html'>there</a>"))
    broken = subprocess.run(command, capture_output=True, text=True)
    expected = "index.html: broken link: absent.html\n1 faults\n"
    assert (broken.returncode, broken.stdout) == (1, expected), broken.stderr


def test_quarto_publishes_only_what_was_checked():
    said = yaml.safe_load((ROOT/".github"/"workflows"/"site.yml").read_text())
    steps = [s.get("run") or s.get("uses") or "" for s in said["jobs"]["publish"]["steps"]]

    def first(word):
        return next(i for i, step in enumerate(steps) if word in step)

    assert first("quarto render") < first("tests/rendered.py") < first("upload-pages-artifact")
    assert first("install --with-deps chromium") < first("tests/rendered.py")


# As Quarto writes them

TERM = "<mi>x</mi><mo>+</mo>"
BLOCK = f"<math display='block'><semantics><mrow>{TERM*60}</mrow></semantics></math>"
LINE = f"<math display='inline'><semantics><mrow>{TERM*20}</mrow></semantics></math>"
CELLS = "".join(f"<td><code>a_name_of_{i}</code></td>" for i in range(9))
LONG = "word"*100
COLUMNS = "".join(f"<col style='width: {w}%'>" for w in (15, 15, 10, 60))
ROW = f"<td><code>{LONG}</code></td><td><code>int</code></td><td></td><td>{LONG}</td>"
FRAGMENTS = {
    "a formula": f"<p>{BLOCK}</p>",
    "a formula in a sentence": f"<p>It is {BLOCK} where y is small.</p>",
    "a formula in a list": f"<ul><li>{BLOCK}</li></ul>",
    "a formula in a line": f"<p>It is {LINE}, where y is small.</p>",
    "a table": f"<table class='caption-top table'><tbody><tr>{CELLS}</tr></tbody></table>",
    "parameters": f"""<div class='parameters'><table class='caption-top table'>
        <colgroup>{COLUMNS}</colgroup><tbody><tr>{ROW}</tr></tbody></table></div>""",
    "a word": f"<p>{LONG}</p>",
    "a word in a list": f"<ul><li>{LONG}</li></ul>",
    "a heading": f"<h2>{LONG[:80]}</h2>",
    "code in a sentence": f"<p>Call <code>{LONG}</code>.</p>",
}


@pytest.fixture(scope="module")
def quarto(tmp_path_factory):
    "A page for each fragment, with our styles and without."
    styles = (ROOT/"nbs"/"styles.css").read_text()
    folder = write(tmp_path_factory.mktemp("quarto")/"site", page(""))
    (folder/"styles.css").write_text(styles)
    styled = SOCIAL + "<link rel='stylesheet' href='styles.css'>"
    for i, body in enumerate(FRAGMENTS.values()):
        (folder/f"styled-{i}.html").write_text(page(body, head=styled))
        (folder/f"plain-{i}.html").write_text(page(body))
    return folder


def test_what_is_wide_scrolls_or_breaks_on_quartos_pages(quarto, browser):
    found = rendered.check(quarto, SITE, browser)
    assert {f.kind for f in found} == {"wider than the screen"}
    assert {f.page for f in found} == {f"plain-{i}.html" for i in range(len(FRAGMENTS))}


def test_the_logo_is_of_one_size(tmp_path, browser):
    "Quarto's stands beside the chapters, as wide as they are if nobody says otherwise."
    (tmp_path/"styles.css").write_text((ROOT/"nbs"/"styles.css").read_text())
    (tmp_path/"logo.svg").write_text((ROOT/"nbs"/"images"/"favicon.svg").read_text())
    head = "<link rel='stylesheet' href='styles.css'>"
    logo = "<nav><img src='logo.svg' alt='' class='sidebar-logo py-0 d-lg-inline d-none'></nav>"
    (tmp_path/"index.html").write_text(page(logo, head=head))
    with rendered.served(tmp_path) as address:
        tab = browser.new_page()
        tab.goto(f"{address}/index.html")
        box = tab.locator("img").bounding_box()
        tab.close()
    assert (box["width"], box["height"]) == (56, 56)

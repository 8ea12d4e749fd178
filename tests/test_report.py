"""The report of a merge: what it says, that names are never markup in it, and that a browser sorts,
filters and shows it on a phone without an error."""

import json
import re
from html.parser import HTMLParser

import pytest
import rendered
import torch
from conftest import cli, save, tensors

from frechet_merge import MergeError, merge
from frechet_merge.diagnostics.drawings import breakable
from frechet_merge.diagnostics.pages import SCRIPT, STYLES, hash_of
from frechet_merge.diagnostics.report import Seen, by_layer, report_of, write_report
from frechet_merge.merging.record import NAME, Record

HOSTILE = [
    "</script><script>window.broken = 1</script>",
    '" onmouseover="window.broken = 1',
    "<img src=x onerror='window.broken = 1'>",
    "a\nb\u202ec\x00d",
    "{{ x }} ${y} `z` %s",
]


def mean(i, **changes):
    squares = [1.0*i, 2.0*i, 6.0*i]
    said = {"residual": 1e-9*i, "iterations": i % 7, "converged": True, "variance": 3.0*i}
    return said | {"unique": True, "lost": 0, "squares": squares} | changes


def record_of(names, **changes):
    "A record of three models with a mean for each name."
    models = ["org/a", "/data/b", "/data/<b>c</b>"]
    said = {
        "means": {name: mean(i + 1) for i, name in enumerate(names)},
        "inputs": {"models": [{"name": m, "files": {"w": "sha256:1"}} for m in models]},
        "command": "frechet-merge merge org/a",
    }
    return Record({"models": models, "weights": [1.0, 2.0, 1.0]}, **(said | changes))


LAYERS = [f"model.layers.{i}.{k}.weight" for i in range(12) for k in ("q_proj", "k_proj", "norm")]
SEEN = {
    "sources": ["base", "org/a", "org/b"],
    "distance": [3.0, 4.0],
    "cosine": [[1.0, 0.0], [0.0, 1.0]],
    "eta": [{"name": LAYERS[0], "eta": 0.5, "F": 1.0, "share": 1.0}],
    "collapse": [
        {"merge": "sphere", "layer": f"layers.{i}", "variance": 0.9, "rank": None} for i in range(3)
    ],
}


class Reader(HTMLParser):
    "The rows of a table of blocks, and all tags and attributes."

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.words.append(data)


def test_it_says_what_the_record_knows(tmp_path):
    models = [save(tmp_path/n, tensors(i), {}) for i, n in enumerate("abc")]
    out = merge(models, out=tmp_path/"o", weights=[2, 1, 1]).out
    place = write_report(out)
    text = place.read_text()
    assert place == out/"report.html"
    record = json.loads((out/NAME).read_text())
    for name in record["means"]:
        assert f">{breakable(name)}</td>" in text
    for c in record["inputs"]["models"]:
        assert breakable(c["name"]) in text
        assert all(h in text for h in c["files"].values())
    assert "8×11" in text and "3 models" in text and "Nothing needs a look" in text
    # a number is sorted by all of its digits
    assert f'data-v="{record["means"]["q.weight"]["variance"]!r}"' in text


def test_shapes_of_adapters(tmp_path):
    from test_card import adapter

    out = merge([adapter(tmp_path/n, i) for i, n in enumerate("ab")], out=tmp_path/"o").out
    assert "8×11" in write_report(out).read_text()


def test_warnings_come_first():
    said = ["<b>look</b> here", "and there"]
    odd = {LAYERS[3]: mean(1, lost=1, residual=None, variance=None)}
    record = record_of(LAYERS, doubtful="one mean", warnings=said)
    record.means.update(odd)
    text = report_of(record, "x")
    assert text.index("3 things need a look") < text.index("What was merged")
    assert "&lt;b&gt;look&lt;/b&gt; here" in text and "no mean" in text
    assert "only those that need a look" in text


def test_a_choice_of_geometries_has_a_column():
    by = {"*norm*": "sphere", "*": "euclidean"}
    from frechet_merge.merging.recipe import Recipe

    data = Recipe.of({"models": ["a", "b", "c"], "geometry": by}).as_data()
    record = record_of(LAYERS)
    record.recipe["geometry"] = data["geometry"]
    text = report_of(record, "x")
    assert ">sphere</td>" in text and ">euclidean</td>" in text
    assert ">euclidean</td>" not in report_of(record_of(LAYERS), "x")


def test_what_was_seen_is_drawn(tmp_path):
    record = record_of(LAYERS)
    plain, more = report_of(record, "x"), report_of(record, "x", seen=Seen.of(SEEN))
    assert (plain.count("<figure"), more.count("<figure")) == (2, 5)
    assert "100 % of the squared distances" in more and 'data-v="0.5"' in more


def test_layers_are_in_order_and_few():
    names = [f"h.{i}.w" for i in (0, 10, 2, 1)]
    assert [label for label, _ in by_layer(["wte.weight", *names])] == ["wte", "0", "1", "2", "10"]
    many = by_layer([f"h.{i}.w" for i in range(1000)])
    assert len(many) <= 150 and sum(len(x) for _, x in many) == 1000


def test_no_name_is_markup():
    names = [*HOSTILE, *(f"layers.{i}.{h}" for i, h in enumerate(HOSTILE))]
    strange = record_of(
        names,
        warnings=HOSTILE,
        doubtful=HOSTILE[0],
        geometry=HOSTILE[0],
        command=HOSTILE[0],
        inputs={"models": [{"name": h, "files": {h: h}} for h in HOSTILE[:3]]},
        about=[{"name": HOSTILE[0], "license": [HOSTILE[1]]}],
        versions={HOSTILE[0]: HOSTILE[0]},
    )
    strange.recipe["models"] = HOSTILE[:3]
    seen = SEEN | {"sources": HOSTILE[:3]}
    seen["collapse"] = [{"merge": h, "layer": h, "variance": 0.5} for h in HOSTILE]
    text = report_of(strange, HOSTILE[0], seen=Seen.of(seen))
    usual = [f"layers.{i}.weight" for i in range(len(names))]
    plain = report_of(record_of(usual, warnings=["a"], about=[]), "x", seen=Seen.of(SEEN))
    a, b = Reader(text), Reader(plain)
    assert set(a.tags) <= set(b.tags) and a.attributes <= b.attributes
    assert a.tags.count("script") == 1
    assert all(c.isprintable() or c == "\n" for c in text)


def test_the_page_allows_nothing_but_itself():
    text = report_of(record_of(LAYERS), "x", seen=Seen.of(SEEN))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy
    assert hash_of(STYLES) in policy and hash_of(SCRIPT) in policy
    asked = r"(?:https?:)?//\w|url\(|@import|<link(?! rel=\"icon\")|\ssrc=|style="
    assert not re.search(asked, text)


FAULTS = {
    "{": "cannot be read",
    "[]": "not an object",
    '{"eta": 3}': "inspect --json",
    '{"sources": ["a"], "eta": [{"name": "a"}]}': "inspect --json",
    '{"sources": ["a", "b"], "collapse": [1]}': "inspect --json",
}


@pytest.mark.parametrize("held", FAULTS)
def test_what_was_seen_is_refused_by_name(tmp_path, models, held):
    out = merge(models, out=tmp_path/"o").out
    (tmp_path/"seen.json").write_text(held)
    code, _, said = cli("report", out, "--seen", tmp_path/"seen.json")
    assert code == 1 and FAULTS[held] in said and "seen.json" in said
    assert len(said.splitlines()) <= 3 and not (out/"report.html").exists()


class TestTheCommands:
    def test_report(self, tmp_path, models):
        out = merge(models, out=tmp_path/"o").out
        code, said, _ = cli("inspect", *models, "--json")
        (tmp_path/"seen.json").write_text(said)
        for _ in range(2):
            code, said, err = cli("report", out, "--seen", tmp_path/"seen.json")
            assert code == 0 and said.strip() == str(out/"report.html"), err
        assert (out/"report.html").read_text().count("<figure") == 3

    def test_a_folder_without_a_record(self, tmp_path, models):
        code, _, err = cli("report", models[0])
        assert code == 1 and NAME in err and len(err.splitlines()) <= 3
        with pytest.raises(MergeError, match="Name the folder of a merge"):
            write_report(tmp_path/"absent")

    def test_a_damaged_record(self, tmp_path, models):
        out = merge(models, out=tmp_path/"o").out
        held = json.loads((out/NAME).read_text())
        held["means"] = {"q": {"residual": 1}}
        (out/NAME).write_text(json.dumps(held))
        code, _, err = cli("report", out)
        assert code == 1 and "is damaged" in err

    def test_merge_and_run(self, tmp_path, models):
        code, said, err = cli("merge", *models, "-o", tmp_path/"o", "--report")
        assert code == 0 and f"report: {tmp_path/'o'/'report.html'}" in said, err
        code, said, err = cli("run", tmp_path/"o", "-o", tmp_path/"p", "--report")
        assert code == 0 and (tmp_path/"p"/"report.html").is_file(), err
        code, _, err = cli("merge", *models, "-o", tmp_path/"q", "--report", "--dry-run")
        assert code == 2 and "--report" in err and not (tmp_path/"q").exists()

    def test_of_a_single_file(self, tmp_path):
        from test_dialects import flux_file

        files = [tmp_path/f"{n}.safetensors" for n in "ab"]
        for i, f in enumerate(files):
            flux_file(f, i)
        code, said, err = cli("merge", *files, "-o", tmp_path/"o.safetensors", "--report")
        assert code == 0 and f"report: {tmp_path/'o.report.html'}" in said, err
        code, _, err = cli("merge", *files, "-o", tmp_path/"o.safetensors", "--report")
        assert code == 1 and "exists already" in err
        code, _, err = cli("report", tmp_path/"o.safetensors")
        assert code == 1 and "merge --report" in err

    def test_it_is_not_carried_into_the_next_merge(self, tmp_path, models):
        out = merge(models, out=tmp_path/"o").out
        write_report(out)
        again = merge([out, models[0]], out=tmp_path/"p").out
        assert not (again/"report.html").exists()


# In a browser

pytestmark = pytest.mark.xdist_group("rendered")


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api")
    if not rendered.chromium():
        pytest.skip("no Chromium: `apt-get install chromium`, or name one in CHROMIUM")
    with rendered.opened() as b:
        yield b


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Pages of a merge with all that is known, of hostile names, and of 5,000 blocks."
    folder = tmp_path_factory.mktemp("site")
    odd = record_of(LAYERS, warnings=["look"])
    odd.means[LAYERS[3]] = mean(1, lost=1, residual=None, variance=None)
    (folder/"full.html").write_text(report_of(odd, "full", seen=Seen.of(SEEN)))
    strange = record_of([*HOSTILE, "a"*300], warnings=["w"*300], command="c"*300)
    (folder/"strange.html").write_text(report_of(strange, "t"*300))
    many = [f"model.layers.{i}.mlp.experts.{k}.w" for i in range(50) for k in range(100)]
    (folder/"large.html").write_text(report_of(record_of(many), "large"))
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wrong_in_a_browser(site, browser, scheme):
    "No error, no request, nothing wider than a desk or a phone."

    def also(tab, name, width):
        if tab.evaluate("window.broken"):
            yield "a name ran", name
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", background)[:3])) > 384
        if light != (scheme == "light"):
            yield "the wrong scheme", background

    def prepare(context):
        context.on("page", lambda tab: tab.emulate_media(color_scheme=scheme))

    pages = ["full.html", "strange.html", "large.html"]
    assert rendered.walk(site, pages, browser, prepare, also) == []


@pytest.fixture
def tab(site, browser):
    "The page with all that is known; an error fails the test."
    page = browser.new_page()
    errors = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto((site/"full.html").as_uri())
    yield page
    page.close()
    assert errors == []


def shown(tab, column):
    "The cells of a column in the rows that are seen."
    return tab.evaluate(
        """n => [...document.querySelectorAll('.sortable tbody tr')].filter(r => !r.hidden)
        .map(r => r.cells[n].textContent)""",
        column,
    )


def test_columns_sort_by_mouse_and_by_keyboard(tab):
    head = tab.locator(".sortable thead th").nth(3)
    button = head.get_by_role("button", name="variance")
    assert head.get_attribute("aria-sort") is None
    button.click()
    down = shown(tab, 3)
    assert head.get_attribute("aria-sort") == "descending"
    assert down[0] == "108" and down[-1] == "–"
    button.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    # what is not known stays last
    assert shown(tab, 3) == [*down[-2::-1], "–"]
    tab.locator(".sortable thead th").nth(1).get_by_role("button").press("Space")
    assert shown(tab, 1) == sorted(LAYERS) and head.get_attribute("aria-sort") is None
    tab.locator(".sortable thead th").nth(0).get_by_role("button").click()
    assert shown(tab, 1) == LAYERS[::-1]


def test_rows_filter(tab):
    field = tab.get_by_label("Filter by name")
    field.fill("Q_PROJ .1")
    assert shown(tab, 1) == [n for n in LAYERS if "q_proj" in n and ".1" in n]
    assert tab.get_by_role("status").text_content() == "3 of 36 blocks"
    field.fill("")
    tab.get_by_label("only those that need a look").check()
    assert shown(tab, 1) == [LAYERS[3]]
    assert tab.get_by_role("status").text_content() == "1 of 36 blocks"


def test_all_is_reached_by_the_keyboard(tab):
    reached = set()
    for _ in range(40):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.textContent.trim().slice(0, 9)"))
        reached.add(tab.evaluate("document.activeElement.tagName"))
    assert {"BUTTON", "INPUT", "SUMMARY", "variance", "block"} <= reached


def test_a_large_page_shows_some_and_finds_all(site, browser):
    page = browser.new_page()
    page.goto((site/"large.html").as_uri())
    assert len(shown(page, 1)) == 300
    assert page.get_by_role("status").text_content() == "5,000 of 5,000 blocks, the first 300 shown"
    for _ in range(2):
        page.get_by_role("button", name="variance").click()
    assert shown(page, 0)[:2] == ["1", "2"]
    # which a browser would pass again for each row that is moved
    between = "document.querySelector('.sortable tbody').childNodes.length"
    assert page.evaluate(between) == 5000
    page.get_by_role("button", name="Show 1,000 more").click()
    assert len(shown(page, 1)) == 1300
    page.get_by_label("Filter by name").fill("layers.49. experts.99.")
    assert shown(page, 1) == ["model.layers.49.mlp.experts.99.w"]
    page.close()


def test_it_reads_without_a_script(site, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((site/"full.html").as_uri())
    assert page.locator(".sortable tbody tr").count() == len(LAYERS)
    assert page.locator(".sortable tbody tr").last.is_visible()
    assert not page.get_by_label("Filter by name").is_visible()
    context.close()


def test_tensors_of_a_dtype_that_is_written(tmp_path):
    states = [{"layers.0.w": torch.full((2, 2), float(i))} for i in range(2)]
    out = merge(states, out=tmp_path/"o", dtype="bf16").out
    assert "bfloat16" in write_report(out).read_text()

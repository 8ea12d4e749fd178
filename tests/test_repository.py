"""The repository is what its notebooks say: export and clean leave no diff, the README is the
index, the site builds."""

import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

BIN = Path(sys.executable).parent


def tracked():
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if names.returncode:
        pytest.fail("not a git checkout")
    return [n for n in names.stdout.split("\0") if n and (ROOT/n).exists()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the checkout that tools may write to."
    to = tmp_path_factory.mktemp("copy")/"frechet_merge"
    for n in tracked():
        (to/n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/n, to/n, follow_symlinks=False)
    return to


def run(*args, cwd):
    r = subprocess.run(
        [BIN/args[0], *args[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
    )
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return r.stdout


def test_export_and_clean_leave_no_diff(copy):
    run("nbdev_export", cwd=copy)
    run("nbdev_clean", cwd=copy)
    differ = [
        n
        for n in tracked()
        if not (ROOT/n).is_symlink()
        and (ROOT/n).is_file()
        and not filecmp.cmp(ROOT/n, copy/n, shallow=False)
    ]
    assert not differ, f"run nbdev_export && nbdev_clean: {differ}"
    new = {str(p.relative_to(copy)) for p in copy.rglob("*.py")} - set(tracked())
    assert not new, f"export makes files that are not committed: {new}"


def test_the_readme_is_the_index():
    run("python", ".ci/readme.py", "--check", cwd=ROOT)


def test_the_readme_holds_the_command_that_ci_runs():
    readme = (ROOT/"README.md").read_text()
    assert len(re.findall(r"^python3\.11 -m venv", readme, re.M)) == 2
    assert re.search(r"^python3.11 -m venv .venv-test.*pytest .*$", readme, re.M)


def test_versions_and_requirements_agree():
    import configparser
    import tomllib

    import frechet_merge

    ini, toml = configparser.ConfigParser(), tomllib.loads((ROOT/"pyproject.toml").read_text())
    ini.read(ROOT/"settings.ini")
    assert ini["DEFAULT"]["version"] == frechet_merge.__version__

    def names(reqs):
        return sorted(re.match(r"[\w-]+", r)[0] for r in reqs)

    assert names(ini["DEFAULT"]["requirements"].split()) == names(toml["project"]["dependencies"])


def test_no_output_names_a_place_of_the_machine_it_ran_on():
    for nb in (ROOT/"nbs").rglob("*.ipynb"):
        said = json.dumps([c.get("outputs", []) for c in json.loads(nb.read_text())["cells"]])
        assert not re.search(r"site-packages|/home/\w|/root/|/Users/\w|ipykernel_", said), nb.name


def test_every_notebook_was_run():
    "No cell shows an error, and each that ends in a value shows it."
    for path in (ROOT/"nbs").rglob("*.ipynb"):
        for c in json.loads(path.read_text())["cells"]:
            if c["cell_type"] != "code":
                continue
            source = "".join(c["source"])
            assert not any(o["output_type"] == "error" for o in c["outputs"]), f"{path}: {source}"
            if source.startswith("#| "):
                continue
            last = ast.parse(
                "".join(x for x in source.splitlines(True) if not x.startswith("%"))
            ).body[-1]
            shows = (
                isinstance(last, ast.Expr)
                and not isinstance(last.value, ast.Call)
                and not source.rstrip().endswith(";")
            )
            assert c["outputs"] or not shows, f"{path}: {source}"


def test_the_map_calls_pages_by_their_names():
    text = "\n".join(
        "".join(c["source"])
        for c in json.loads((ROOT/"nbs"/"index.ipynb").read_text())["cells"]
    )
    rows = re.findall(r"^\| \[(.*?)\]\((.*?\.ipynb)\)", text, re.M)
    assert len(rows) > 20 and all(
        "".join(json.loads((ROOT/"nbs"/p).read_text())["cells"][0]["source"]).splitlines()[0]
        == f"# {t}"
        for t, p in rows
    )


def imported(path):
    "(module, name) of what a script takes from this library."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("frechet_merge"):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT/"bench").glob("*.py")), ids=lambda path: path.stem)
def test_benches_import_what_there_is(path):
    for module, name in imported(path):
        found = import_module(module)
        is_module = find_spec(f"{module}.{name}") if hasattr(found, "__path__") else None
        assert hasattr(found, name) or is_module, f"{module} has no {name}"

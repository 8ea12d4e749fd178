"""The environment that a page names, without pip: a folder of links to what an extra asks for.

`environment("demo")` is what `pip install '.[demo]'` makes: a virtual environment that holds the
distributions that the extra requires, those that these require, and no others. The files are those
of the environment that the tests run in, and so are their versions."""

import csv
import os
import sys
import tempfile
import venv
from collections import defaultdict
from functools import cache
from importlib import metadata
from pathlib import Path

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import frechet_merge

try:
    import tomllib
# Python 3.10; pytest brings it
except ImportError:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
OURS = canonicalize_name(PROJECT["name"])
# what `python -m venv` puts into every environment
BRINGS = ["pip"]
SCRIPT = """#!{python}
import sys
from frechet_merge.cli import main
sys.exit(main())
"""


def _required(name: str, extras: frozenset[str]) -> list[Requirement]:
    "What a distribution with these extras asks for here."
    if name == OURS:
        optional = PROJECT["optional-dependencies"]
        lines = [*PROJECT["dependencies"], *(r for e in extras for r in optional[e])]
    else:
        lines = metadata.distribution(name).requires or []
    asked = map(Requirement, lines)
    environments = [{"extra": e} for e in ("", *extras)]
    return [r for r in asked if not r.marker or any(map(r.marker.evaluate, environments))]


@cache
def closure(extra: str) -> frozenset[str]:
    "Names of the distributions that `pip install '.[extra]'` brings, other than our own."
    todo = [(OURS, frozenset([extra])), *((name, frozenset()) for name in BRINGS)]
    done = set()
    while todo:
        at = todo.pop()
        if at in done:
            continue
        done.add(at)
        asked = _required(*at)
        todo += [(canonicalize_name(r.name), frozenset(r.extras)) for r in asked]
    return frozenset(name for name, _ in done) - {OURS}


def _files(dist: metadata.Distribution) -> list[str]:
    "Its files, seen from site-packages: what `dist.files` says, without a look at each of them."
    return [row[0] for row in csv.reader((dist.read_text("RECORD") or "").splitlines())]


def _top(file: str) -> str:
    return file.partition("/")[0]


@cache
def _owners() -> dict[str, set[str]]:
    "Top-level name in site-packages → the distributions that have files of it."
    owners = defaultdict(set)
    for dist in metadata.distributions():
        for top in set(map(_top, _files(dist))):
            owners[top].add(canonicalize_name(dist.metadata["Name"]))
    return owners


def _link(source: Path, target: Path, python: Path) -> None:
    "A link to a file or folder; of a script a copy that the new environment's Python runs."
    if target.exists() or target.is_symlink() or not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.parent == python.parent and source.open("rb").read(2) == b"#!":
        _, _, body = source.read_text().partition("\n")
        target.write_text(f"#!{python}\n{body}")
        target.chmod(0o755)
    else:
        target.symlink_to(source)


def _install(name: str, site: Path, python: Path) -> None:
    "Put a distribution into a folder of packages: whole folders where they are its own."
    dist = metadata.distribution(name)
    files = _files(dist)
    if not files:
        raise RuntimeError(f"{name}: has no list of its files; install it with pip")
    # scripts and data of Jupyter lie outside of site-packages
    own = {top for top, names in _owners().items() if names == {name} and top != ".."}
    for part in sorted({_top(file) if _top(file) in own else file for file in files}):
        _link(Path(str(dist.locate_file(part))), Path(os.path.normpath(site/part)), python)


def _install_ours(site: Path, python: Path) -> None:
    "The checkout, with its entry points and its command."
    (site/"frechet_merge").symlink_to(ROOT/"frechet_merge")
    version = frechet_merge.__version__
    info = site/f"frechet_merge-{version}.dist-info"
    info.mkdir()
    (info/"METADATA").write_text(
        f"Metadata-Version: 2.1\nName: frechet_merge\nVersion: {version}\n"
    )
    lines = []
    for group, points in PROJECT["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {at}" for name, at in points.items())]
    (info/"entry_points.txt").write_text("\n".join(lines) + "\n")
    command(python.parent, python)


def command(folder: Path, python: Path) -> None:
    "Our command in a folder, run by this Python."
    script = folder/"frechet-merge"
    script.write_text(SCRIPT.format(python=python))
    script.chmod(0o755)


@cache
def _home() -> tempfile.TemporaryDirectory:
    "Where the environments are; it goes when the tests end."
    return tempfile.TemporaryDirectory(prefix="frechet-merge-tests-")


@cache
def environment(extra: str) -> Path:
    "A virtual environment with what this extra brings; its folder."
    to = Path(_home().name)/extra
    venv.create(to, symlinks=True)
    python = to/"bin"/"python"
    site = to/"lib"/"python{}.{}".format(*sys.version_info)/"site-packages"
    for name in sorted(closure(extra)):
        try:
            _install(name, site, python)
        except metadata.PackageNotFoundError:
            raise RuntimeError(
                f"[{extra}] brings {name}, which is not installed here: pip install -e '.[dev]'"
            ) from None
    _install_ours(site, python)
    return to


def variables(home: Path) -> dict[str, str]:
    "Those of a shell in which an environment was just activated."
    dropped = ("PYTHON", "VIRTUAL_ENV", "JUPYTER", "MPLBACKEND")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return kept | {
        "PATH": f"{home/'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(home),
        "HF_HUB_OFFLINE": "1",
        # kernels are its own, and none that the user has installed
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_DATA_DIR": str(home/"share"/"jupyter"),
    }

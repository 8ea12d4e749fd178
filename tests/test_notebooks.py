"""Every notebook runs, and its assertions hold. The outputs that are committed are not compared
with those of this run. Tutorials run in the environment that the README names for notebooks, and
the commands that they show in the one that it names for commands."""

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from environment import command, environment, variables

NOTEBOOKS = sorted(
    p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)


@pytest.fixture(autouse=True)
def own_settings():
    "A notebook is a program of its own; what it sets for torch ends with it."
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def run_as_a_reader(path):
    "A tutorial in [notebooks], whose commands are run in [demo]."
    home = environment("notebooks")
    command(home/"bin", environment("demo")/"bin"/"python")
    r = subprocess.run(
        [home/"bin"/"jupyter-execute", path.name],
        cwd=path.parent,
        env=variables(home),
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-5000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/"nbs")))
def test_notebook(path, monkeypatch):
    if path.parent.name == "tutorials":
        return run_as_a_reader(path)
    from nbdev.test import test_nb

    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("MPLBACKEND", "agg")
    ok, seconds = test_nb(Path(path), do_print=False, showerr=True)
    assert ok, f"a cell of {path.name} failed: its traceback is above"

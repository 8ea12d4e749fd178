"""Every notebook runs, and its assertions hold. The outputs that are committed are not compared
with those of this run."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT

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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/"nbs")))
def test_notebook(path, monkeypatch):
    from nbdev.test import test_nb

    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("MPLBACKEND", "agg")
    ok, seconds = test_nb(Path(path), do_print=False, showerr=True)
    assert ok, f"a cell of {path.name} failed: its traceback is above"

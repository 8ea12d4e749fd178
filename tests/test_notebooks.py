"""Every notebook runs, and says only what a run of it says."""
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/"nbs")))
def test_notebook(path, monkeypatch):
    from nbdev.test import test_nb
    monkeypatch.chdir(path.parent); monkeypatch.setenv("MPLBACKEND", "agg")
    ok, seconds = test_nb(Path(path), do_print=False, showerr=True)
    assert ok, f"a cell of {path.name} failed: its traceback is above"

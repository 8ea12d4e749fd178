"""Standard streams that are closed or full change nothing of what a command writes."""

import subprocess
import sys

import pytest
from conftest import ROOT, save, tensors


@pytest.fixture
def models(tmp_path):
    for i, name in enumerate("ab"):
        save(tmp_path/name, tensors(i), {"model_type": "none"})
    return tmp_path


def shell(folder, words, redirected):
    "A command of ours, with the streams that a shell gives it."
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    line = f"exec {sys.executable} -m frechet_merge {words} {redirected}"
    return subprocess.run(["sh", "-c", line], cwd=folder, env=env, capture_output=True, text=True)


def contents(folder):
    "The tensors' bytes, and which files are there."
    names = sorted(p.name for p in folder.iterdir())
    return names, (folder/"model.safetensors").read_bytes()


def test_closed_streams(models):
    assert shell(models, "merge a b -o usual", "").returncode == 0
    for closed in ("<&- >&- 2>&-", ">&-", "2>&-"):
        heard = shell(models, "merge a b -o out", closed)
        assert heard.returncode == 0, heard
        assert "Traceback" not in heard.stdout + heard.stderr
        assert contents(models/"out") == contents(models/"usual")
        (models/"out").rename(models/f"was {len(closed)}")


@pytest.mark.parametrize("words", ["inspect a b --json", "merge a b -o out"])
def test_a_full_standard_output(models, words):
    heard = shell(models, words, ">/dev/full")
    assert heard.returncode == 1
    first, remedy = heard.stderr.splitlines()
    assert first == "error: standard output: No space left on device."
    assert remedy.startswith("Free some space")
    # what was written before is whole
    assert shell(models, "inspect a out" if "merge" in words else "inspect a b", "").returncode == 0

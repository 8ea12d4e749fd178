"""On a full disk every command that writes says so and leaves nothing behind, and what it writes on
another has the modes that the user's mask leaves."""

import errno
import os
import shutil

import pytest
from mutated import MODELS, adapter, full, run, warm, wrong_with
from test_examples import make, write

from frechet_merge import MergeError
from frechet_merge.cli.commands import _saved

WRITTEN = {
    "merge": "merge a b -o out",
    "report": "merge a b --report -o out",
    "adapters": "merge x y -o out",
    "file": "merge x y -o out.safetensors --to mlx",
    "extract": "extract a --base b --rank 1 -o out",
    "resize": "resize x --rank 1 -o out",
    "convert": "convert x --to mlx -o out",
    "mixture": "mixture a b --gate random -o out",
    "curvature": "curvature small texts.jsonl --max-samples 4 -o out.safetensors",
    "basis": "basis a b --base c -k 1 -o out.safetensors",
    "suggest": "suggest a b --base c -o out.yaml",
}
PICTURE = "inspect small small --data texts.jsonl --max-samples 4 --plot out.png"
# runs a model, for which a library writes files of its own
BESIDE = {"curvature": 2500}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "What the commands read."
    warm()
    folder = tmp_path_factory.mktemp("whole")
    for i, name in enumerate((*MODELS, "c")):
        full(folder/name, i % 2)
    adapter(folder/"x", 0)
    adapter(folder/"y", 1)
    make("llama", folder/"small")
    write(folder/"texts.jsonl")
    return folder


@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_is_said(whole, tmp_path, name):
    folder = shutil.copytree(whole, tmp_path/"all")
    heard = run(tuple(WRITTEN[name].split()), folder, largest=BESIDE.get(name, 300))
    assert (heard.code, wrong_with(heard, folder)) == (1, ""), heard
    assert "error: out" in heard.text and "File too large" in heard.text
    assert "Free some space" in heard.text


@pytest.mark.parametrize("name", ["merge", "adapters", "extract", "convert", "basis", "suggest"])
@pytest.mark.parametrize("mask", [0o002, 0o077], ids=["a group's", "one's own"])
def test_modes_are_those_of_the_mask(whole, tmp_path, name, mask):
    folder = shutil.copytree(whole, tmp_path/"all")
    heard = run(tuple(WRITTEN[name].split()), folder, mask=mask)
    assert heard.code == 0, heard
    (out,) = folder.glob("out*")
    for place in (out, *out.rglob("*")):
        usual = 0o777 if place.is_dir() else 0o666
        assert place.stat().st_mode & 0o777 == usual & ~mask, place


def test_a_picture_in_the_place_of_a_pipe(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path/"all")
    os.mkfifo(folder/"out.png")
    heard = run(tuple(PICTURE.split()), folder)
    assert heard.code == 1 and "is a pipe or a device" in heard.text, heard


def test_a_picture_is_whole_or_absent(tmp_path):
    class Figure:
        def savefig(self, place, **_):
            place.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(MergeError, match="No space left on device"):
        _saved(Figure(), tmp_path/"out.png")
    assert not [*tmp_path.iterdir()]

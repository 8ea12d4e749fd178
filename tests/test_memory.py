"Under a budget: the same bytes, read once; and what is too large is refused by name."
import re

import pytest
import torch
from conftest import cli, save
from test_preview import deep

from frechet_merge import MergeError, merge
from frechet_merge.files.tensors import FileTensor
from frechet_merge.merging.memory import HELD, KEPT, KEPT_WITHIN, MMAP_THRESHOLD, frugal
from frechet_merge.merging.preview import preview
from frechet_merge.merging.recipe import Recipe, Run


@pytest.fixture
def folders(tmp_path):
    return [save(tmp_path/n, deep(i)) for i, n in enumerate("abc")]


@pytest.fixture
def read(monkeypatch):
    "Bytes that are read of tensors in files."
    count = [0]
    pread = FileTensor._pread

    def counted(self, out, start):
        count[0] += out.numel()*out.dtype.itemsize
        return pread(self, out, start)

    monkeypatch.setattr(FileTensor, "_pread", counted)
    return count


def weights(folder):
    "The bytes of the tensors' files."
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@pytest.mark.parametrize("geometry", ["sphere", "ties", "stock", {"attn": "sphere"}])
def test_read_once(folders, read, geometry, tmp_path):
    base, *models = folders
    plain = merge(models, geometry, base, out=tmp_path/"plain")
    stored = sum(x.numel*x.dtype.itemsize for x in plain.tensors.lazy.values())
    twice, read[0] = read[0], 0
    once = merge(models, geometry, base, out=tmp_path/"once", memory=10**9)
    if isinstance(geometry, str):
        assert read[0] == 3*stored < twice
    recipe = Recipe.of({"models": models, "geometry": geometry, "base": base})
    told = preview(recipe, run=Run(memory=10**9)).read
    assert read[0] <= told < preview(recipe).read
    assert weights(plain.out) == weights(once.out)


def test_too_large(folders, tmp_path):
    a, b, base = folders
    asked = "merge", a, b, "--base", base, "--geometry", "ties", "-o", tmp_path/"o"
    code, _, err = cli(*asked, "--memory", "500")
    assert code == 1 and len(err.strip().splitlines()) <= 3, err
    assert re.search(r"tensor '[\w.]+': merging it by Trimmed", err) and not (tmp_path/"o").exists()
    remedy = re.search(r"--memory (\w+)", err)
    code, _, err = cli(*asked, "--memory", remedy[1])
    assert code == 0, err


def test_no_size(folders, tmp_path):
    code, _, err = cli("merge", *folders, "-o", tmp_path/"o", "--memory", "lots")
    assert code == 2 and "'lots' is not a size" in err


def test_in_memory(folders):
    plain, kept = (merge(folders, "sphere", memory=m).tensors for m in (None, 10**8))
    assert all(torch.equal(plain[n], kept[n]) for n in plain)
    with pytest.raises(MergeError, match="takes about"):
        merge(folders, "sphere", memory=10)


def test_experts_of_one_tensor_are_held_one_by_one(tmp_path):
    each, beside = HELD["tensor"]
    name, held = "model.layers.0.mlp.experts.down_proj", 4*(2*each + beside)*16*12
    made = (torch.Generator().manual_seed(i) for i in range(3))
    states = [{name: torch.randn(8, 16, 12, generator=g)} for g in made]
    base, *models = [save(tmp_path/n, state) for n, state in zip("abc", states)]
    merge(models, "ties", base, memory=held, executor="serial")
    with pytest.raises(MergeError, match="down_proj"):
        merge(models, "ties", base, memory=held - 1, executor="serial")


@pytest.mark.parametrize("memory", [None, 10**8])
def test_only_a_budget_hands_blocks_back(folders, memory, monkeypatch):
    asked = []
    monkeypatch.setattr("frechet_merge.merging.memory._of_c", lambda *given: asked.append(given))
    merge(folders, memory=memory)
    back = [("mallopt", MMAP_THRESHOLD, n) for n in (KEPT_WITHIN, KEPT)]
    assert asked == (back if memory else [])


def test_the_last_of_several_merges_ends_a_budget(monkeypatch):
    asked = []
    monkeypatch.setattr("frechet_merge.merging.memory._of_c", lambda *given: asked.append(given[2]))
    with frugal(True):
        with frugal(True), frugal(False):
            pass
        assert KEPT not in asked
    assert asked[-1] == KEPT

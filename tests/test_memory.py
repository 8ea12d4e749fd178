"Under a budget: the same bytes, read once; and what is too large is refused by name."
import re
from types import SimpleNamespace

import pytest
import torch
from alone import Alone
from conftest import cli, save
from test_preview import deep

from frechet_merge import MergeError, merge
from frechet_merge.files.tensors import FileTensor, MemoryTensor
from frechet_merge.geometries.geometry import Needs, together
from frechet_merge.geometries.registry import geometries, geometry_named
from frechet_merge.execution import executors, memory
from frechet_merge.execution.block import Copy
from frechet_merge.execution.memory import KEPT, KEPT_WITHIN, MMAP_THRESHOLD, frugal
from frechet_merge.merging.preview import preview
from frechet_merge.merging.recipe import Recipe
from frechet_merge.execution.executors import Run
from frechet_merge.execution.run import Plan


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
    told = preview(recipe, run=Run(memory=10**9)).bytes_read
    assert read[0] <= told < preview(recipe).bytes_read
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
    each, beside = geometry_named("ties").needs.held
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
    monkeypatch.setattr("frechet_merge.execution.memory._of_c", lambda *given: asked.append(given))
    merge(folders, memory=memory)
    back = [("mallopt", MMAP_THRESHOLD, n) for n in (KEPT_WITHIN, KEPT)]
    assert asked == (back if memory else [])


def test_the_last_of_several_merges_ends_a_budget(monkeypatch):
    asked = []
    here = "frechet_merge.execution.memory._of_c"
    monkeypatch.setattr(here, lambda *given: asked.append(given[2]))
    with frugal(True):
        with frugal(True), frugal(False):
            pass
        assert KEPT not in asked
    assert asked[-1] == KEPT


class TestWorkersShareABudget:
    "Of four jobs no two fit: whoever does them, no two are at once."

    @pytest.fixture
    def large(self, tmp_path):
        made = (torch.Generator().manual_seed(i) for i in range(2))
        states = [{f"w{k}": torch.randn(260, 260, generator=g) for k in range(6)} for g in made]
        return [save(tmp_path/n, state) for n, state in zip("mn", states)]

    def one_by_one(self, large, tmp_path, executor, memory):
        (tmp_path/executor).mkdir()
        g = Alone(str(tmp_path/executor))
        merge(large, g, out=tmp_path/f"out-{executor}", executor=executor, memory=memory)
        return not (tmp_path/executor/"two").exists()

    @pytest.mark.parametrize("executor", ["threads", "processes"])
    def test_of_one_machine(self, large, tmp_path, executor):
        each, beside = Alone.needs.held
        held = 4*(2*each + beside)*260*260
        assert self.one_by_one(large, tmp_path, executor, int(1.9*held))

    @pytest.mark.skipif(executors.cores() < 2, reason="one job is done at a time")
    def test_where_all_have_room_two_are_at_once(self, large, tmp_path):
        assert not self.one_by_one(large, tmp_path, "threads", 1 << 30)

    def test_what_a_worker_held_is_handed_back(self, monkeypatch):
        "In the process of the worker, and before it says that it is done."
        asked = []
        monkeypatch.setattr(memory, "_of_c", lambda *given: asked.append(given))
        monkeypatch.setattr(memory, "LARGE", 0)
        site = executors.Site.of(Plan({"w": ((2,), torch.float32)}, []), None, is_frugal=True)
        job = Copy("w", MemoryTensor(torch.zeros(1 << 20)))
        executors.Bench(site).run(job, lambda *_: asked.append("wrote"))
        back = ("mallopt", MMAP_THRESHOLD, KEPT)
        begun = ("mallopt", MMAP_THRESHOLD, KEPT_WITHIN)
        assert asked == [begun, *["wrote"]*4, ("malloc_trim", 0), back]


def test_of_several_geometries_the_most_is_held():
    each = [SimpleNamespace(needs=Needs(held=held)) for held in [(3, 4), (2, 40)]]
    assert together(each).held == (3, 40)


def test_geometries_of_whole_tensors_say_how_many_they_hold():
    for name in (*geometries(), "slerp:axis=0", "stock:axis=-1"):
        needs = geometry_named(name).needs
        takes_whole = needs.of == "matrix" or needs.entries and needs.of == "tensor"
        # some take whole tensors for their metrics alone
        is_whole = takes_whole and not needs.pieces or needs.whole
        assert any(needs.held) == is_whole, name

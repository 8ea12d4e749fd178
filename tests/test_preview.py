"""What a merge would do is told from headers, writes nothing, and is what the merge then does."""
import json
from dataclasses import dataclass

import pytest
import torch
from conftest import cli, save
from test_recipe_files import deep, written

from frechet_merge import Euclidean, Geometry, load, merge
from frechet_merge.files.tensors import FileTensor
from frechet_merge.merging import estimate
from frechet_merge.merging.plan import open_recipe, plan_recipe
from frechet_merge.merging.preview import preview
from frechet_merge.merging.recipe import Output, Recipe
from frechet_merge.execution.executors import Run


@pytest.fixture
def folders(tmp_path):
    return [save(tmp_path/n, deep(i)) for i, n in enumerate("abc")]


def test_bytes_written_are_those_of_the_merge(tmp_path, folders):
    for dtype in (None, torch.bfloat16):
        found = preview(Recipe.of({"models": folders}), Output(dtype=dtype))
        tensors = merge(folders, dtype=dtype).tensors.values()
        assert found.bytes_written == sum(x.numel()*x.dtype.itemsize for x in tensors)


def test_bytes_read_are_at_most_those(folders, monkeypatch):
    count = [0]
    into, read = FileTensor.into, FileTensor.read

    def counted_into(self, row, start):
        count[0] += len(row)*self.dtype.itemsize
        into(self, row, start)

    def counted_read(self, start=0, stop=None):
        x = read(self, start, stop)
        count[0] += x.numel()*x.dtype.itemsize
        return x

    monkeypatch.setattr(FileTensor, "into", counted_into)
    monkeypatch.setattr(FileTensor, "read", counted_read)
    base, *models = folders
    for geometry in ("euclidean", "sphere", "ties", "stock"):
        recipe = Recipe.of({"models": models, "geometry": geometry, "base": base})
        count[0] = 0
        found = preview(recipe)
        assert count[0] == 0, "a preview reads no tensor"
        merge(models, geometry, base)
        assert 0 < count[0] <= found.bytes_read, geometry


def test_nothing_is_written(tmp_path, folders):
    a, b, _ = folders
    before = sorted(tmp_path.rglob("*"))
    code, out, err = cli("merge", a, b, "-o", tmp_path/"o", "--dry-run", "--scale", "1")
    assert code == 0 and sorted(tmp_path.rglob("*")) == before, err
    assert "3 × h.*.mlp.weight 4×4 float32: Euclidean() of 2" in out
    code, out, _ = cli("merge", a, b, "-o", tmp_path/"o", "--dry-run", "--json")
    held = json.loads(out)
    assert code == 0 and held["bytes_written"] == sum(
        x.numel*x.dtype.itemsize for x in load(a).lazy.values()
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_of_a_recipe_file(tmp_path, folders):
    a, b, _ = folders
    text = f"models: [{a}, {b}]\ngeometry: [{{filter: attn, value: sphere}}]\nweights: [1, 3]"
    path = written(tmp_path, text)
    code, out, err = cli("run", path, "--dry-run")
    assert code == 0, err
    assert "h.*.attn.weight 4×4 float32: Span(Sphere()) of 2, weights 0.25,0.75" in out
    path = written(tmp_path, text.replace("attn", "atn"))
    code, out, err = cli("run", path, "--dry-run")
    assert code == 1 and "line 2" in err and out == ""


def test_what_the_merge_refuses_the_preview_refuses(tmp_path, folders):
    odd = save(tmp_path/"odd", {k: v[:, :2] for k, v in deep(0).items()})
    one = cli("merge", folders[0], odd, "-o", tmp_path/"o")
    two = cli("merge", folders[0], odd, "-o", tmp_path/"o", "--dry-run")
    assert one[0] == two[0] == 1 and one[2] == two[2]
    save(tmp_path/"taken", deep(0))
    code, _, err = cli("merge", *folders, "-o", tmp_path/"taken", "--dry-run")
    assert code == 1 and "taken" in err


def test_of_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    for i in range(2):
        torch.manual_seed(i)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
        config = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(tmp_path/f"m{i}")
    code, out, err = cli("merge", tmp_path/"m0", tmp_path/"m1", "-o", tmp_path/"o", "--dry-run")
    assert code == 0 and "rank 4 of 2" in out, out + err


@dataclass(frozen=True)
class Whole(Geometry):
    "Somebody's geometry of whole tensors."

    def chart(self, thetas, Gs=None):
        return Euclidean().chart([*thetas], Gs)


def rates(monkeypatch, each=1.0, number=0.0):
    "Jobs take seconds for each and for each number, and so it is whatever the machine does."

    def timed(job, write):
        job.run(write)
        return each + number*job.size

    monkeypatch.setattr(estimate, "timed", timed)
    monkeypatch.setattr(estimate, "seconds_a_byte", lambda out: 0.0)


def seconds(models, layers, geometry="euclidean", **more):
    "Of a merge of models of so many equal layers."
    given = [
        {f"h.{i}.weight": torch.randn(*layers[1:]) for i in range(layers[0])} for _ in range(models)
    ]
    base = {f"h.{i}.weight": torch.zeros(*layers[1:]) for i in range(layers[0])}
    more_given = {"base": base} if geometry == "epimer" else {}
    recipe = Recipe.of({"models": given, "geometry": geometry} | more_given)
    plan = plan_recipe(open_recipe(recipe))
    return estimate.estimate([plan], Output(), Run(executor="serial", **more)).seconds


@pytest.mark.parametrize("geometry", ["euclidean", "sphere", "epimer", Whole()])
def test_the_time_grows_with_equal_layers(monkeypatch, geometry):
    rates(monkeypatch)
    assert [seconds(2, (n, 8, 6), geometry) for n in (1, 3, 6)] == [1.0, 3.0, 6.0]


def test_the_time_grows_with_numbers_that_were_not_read(monkeypatch):
    rates(monkeypatch, each=2.0, number=1e-6)
    assert seconds(2, (3, 2048, 1024)) == pytest.approx(3*(2 + 1e-6*2048*1024), rel=0.01)


def test_no_time_is_made_up(monkeypatch):
    rates(monkeypatch)
    monkeypatch.setattr(estimate, "WHOLE", 47)
    assert seconds(2, (3, 8, 6)) == 3.0
    assert seconds(2, (3, 8, 6), "epimer") is None, "a matrix that is too large to be tried"
    assert seconds(2, (3, 8, 6), Whole()) is None, "whose cost nobody knows"
    assert seconds(2, (3, 8, 6), resume=True) is None, "of which some may be done"
    monkeypatch.setattr(estimate, "SECONDS", -1.0)
    assert seconds(2, (3, 8, 6)) is None, "nothing was measured"


def test_what_cannot_be_tried_has_no_time(tmp_path, folders):
    broken = {k: v.clone() for k, v in deep(0).items()}
    for x in broken.values():
        x.fill_(torch.nan)
    given = {"models": [folders[0], save(tmp_path/"nan", broken)]}
    assert preview(Recipe.of(given), timed=True).seconds is None
    assert preview(Recipe.of(given | {"models": folders}), timed=True).seconds > 0


def test_the_time_is_told_and_leaves_nothing(tmp_path, folders):
    before = sorted(tmp_path.rglob("*"))
    for geometry in ("euclidean", "sphere", "ties", "stock"):
        words = "merge", *folders[1:], "--base", folders[0], "--geometry", geometry
        code, out, err = cli(*words, "-o", tmp_path/"o", "--dry-run", "--json")
        held = json.loads(out)
        assert code == 0 and held["seconds"] > 0 and 0 < held["measured"] <= 1, err
        assert sorted(tmp_path.rglob("*")) == before
    out = cli(*words, "-o", tmp_path/"o", "--dry-run")[1]
    assert " % of the numbers)" in out
    words = *words, "--resume", "-o", tmp_path/"o", "--dry-run"
    assert json.loads(cli(*words, "--json")[1])["seconds"] is None
    assert "how long it takes is not known" in cli(*words)[1]


def test_few_numbers_are_read_for_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "ENOUGH", 1 << 10)
    monkeypatch.setattr(estimate, "CHUNK", 1 << 10)
    layers = {f"h.{i}.weight": torch.randn(256, 64) for i in range(9)}
    models = [save(tmp_path/n, layers) for n in "ab"]
    count, read = [0], FileTensor.read

    def counted(self, start=0, stop=None):
        x = read(self, start, stop)
        count[0] += x.numel()
        return x

    monkeypatch.setattr(FileTensor, "read", counted)
    preview(Recipe.of({"models": models}), timed=True)
    assert 0 < count[0] <= 2*(2*1024 + 64)

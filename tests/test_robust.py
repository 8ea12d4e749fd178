"""Means that a bad model cannot move, as one solver with a loss, and as merges."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from frechet_merge import merge
from frechet_merge.files.tensors import FileTensor
from frechet_merge.geometries.lora import LoRA
from frechet_merge.merging.preview import preview
from frechet_merge.merging.recipe import Recipe
from frechet_merge.merging.record import Record
from frechet_merge.spaces.mean import frechet_mean
from frechet_merge.spaces.robust import Cauchy, Huber, Median, loss_named, settle
from frechet_merge.spaces.space import FLAT, Point

# it says so, and one test asks for it
pytestmark = pytest.mark.filterwarnings("ignore:.* counts for")
LOSSES = [Median(), Huber(), Cauchy()]


def model(seed, size=1.0, shape=(12, 8)):
    torch.manual_seed(seed)
    return {"q": size*torch.randn(shape), "b": size*torch.randn(shape[0])}


def five(size=100.0):
    return [*(model(s) for s in range(4)), model(9, size)]


def adapter(folder, seed, size):
    "A PEFT folder of two layers."
    torch.manual_seed(seed)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q", "k"]}
    (folder/"adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name in ("q", "k"):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 8)
        tensors[f"base_model.model.{name}.lora_B.weight"] = size*torch.randn(6, 2)
    save_file(tensors, folder/"adapter_model.safetensors")
    return str(folder)


def distance(a, b):
    return float(sum(((a[n] - b[n])**2).sum() for n in a)**0.5)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda g: type(g).__name__)
def test_a_point_is_stationary_for_its_loss(loss):
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64)
    x[0] *= 30
    mean = frechet_mean(FLAT, [*map(Point, x)], loss=loss)
    unit = mean.counted.unit
    y = mean.x.clone().requires_grad_()
    d = (x - y).norm(dim=1)/unit
    rho = {
        Median: lambda: d,
        Huber: lambda: torch.where(d < loss.k, d**2, 2*loss.k*d - loss.k**2),
        Cauchy: lambda: loss.c**2*torch.log1p((d/loss.c)**2),
    }[type(loss)]()
    slope = torch.autograd.grad(rho.sum(), y)[0]
    assert float(slope.norm())*unit < 1e-4


@pytest.mark.parametrize("loss", LOSSES, ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("per", ["model", "block"])
def test_noise_of_any_size_moves_a_merge_by_little(loss, per):
    centre = merge(five()[:4]).tensors
    named = f"{type(loss).__name__.lower()}:per={per}"
    near, far = (
        distance(merge(five(size), loss=named).tensors, centre) for size in (1e2, 1e6)
    )
    size = distance(centre, {n: 0*x for n, x in centre.items()})
    assert near < size and far < 1.5*size
    assert distance(merge(five(1e2)).tensors, centre) > 10*size


def test_a_bad_model_is_named_and_recorded(tmp_path):
    for i, tensors in enumerate(five()):
        save_file(tensors, tmp_path/f"{i}.safetensors")
    files = [str(tmp_path/f"{i}.safetensors") for i in range(5)]
    with pytest.warns(UserWarning, match="4.safetensors counts for .* of its weight"):
        merge(files, loss="huber", out=tmp_path/"out")
    record = Record.read(tmp_path/"out")
    assert record.counted["shares"][:4] == [1.0]*4 and record.counted["shares"][4] < 0.1
    assert "--loss huber" in record.command
    assert record.again().loss == Huber()
    with pytest.warns(UserWarning):
        again = merge(**{k: getattr(record.again(), k) for k in ("models", "loss")})
    want = load_file(tmp_path/"out"/"model.safetensors")
    assert want and all(torch.equal(again.tensors[n], x) for n, x in want.items())


def test_shares_are_of_whole_models_and_a_block_has_its_own():
    models = [model(s) for s in range(5)]
    # one tensor of one model is broken, and the tensor is a small part of it
    models[2]["b"] = 100*models[2]["b"]
    whole = merge(models, loss="huber", executor="serial").record.counted
    assert whole["shares"][2] < 0.5
    by_block = merge(models, loss="huber:per=block").means
    assert by_block["b"].counted.shares[2] < 0.5
    assert by_block["q"].counted.shares[2] == 1.0


def test_adapters_on_their_quotient_have_losses_too(tmp_path):
    folders = [adapter(tmp_path/str(i), seed=i, size=1 if i else 50) for i in range(5)]
    plain = merge(folders[1:], LoRA()).tensors
    for loss in ("median", "cauchy", "cauchy:per=block"):
        got = merge(folders, LoRA(), loss=loss)
        names = [n for n in plain if "lora_A" in n]
        for a in names:
            b = a.replace("lora_A", "lora_B")
            want = plain[b] @ plain[a]
            assert (got.tensors[b] @ got.tensors[a] - want).norm() < want.norm()


def test_two_models_have_no_majority():
    with pytest.raises(ValueError, match="three models"):
        merge(five()[:2], loss="median")
    with pytest.raises(ValueError, match="three models"):
        settle(Huber(), lambda q: q, [0.5, 0.5, 0.0])


def test_a_recipe_keeps_its_loss_as_text():
    recipe = Recipe(["a", "b", "c"], loss=Cauchy(c=3.0))
    data = json.loads(json.dumps(recipe.as_data()))
    assert data["loss"] == "cauchy:c=3.0" and Recipe.from_data(data) == recipe
    with pytest.raises(ValueError, match="Did you mean 'cauchy'"):
        loss_named("cauchi")


def test_models_that_most_agree_with_are_the_answer():
    x = torch.ones(4, 3, dtype=torch.float64)
    x[0] = 7
    for loss in LOSSES:
        mean = frechet_mean(FLAT, [*map(Point, x)], loss=loss)
        assert np.allclose(mean.x, 1, atol=1e-2)


@pytest.mark.parametrize("geometry", ["euclidean", "sphere", "slerp"])
@pytest.mark.parametrize("per", ["model", "block"])
def test_versions_in_their_span_are_as_far_as_all_of_them(geometry, per, monkeypatch):
    "What inner products say is what passes over all numbers say."
    models = five(30.0)
    base = model(20)
    for m in [base, *models]:
        m["inv_freq"] = torch.ones(4)
    args = models, geometry, None if geometry == "slerp" else base
    found = merge(*args, loss=Huber(per=per)).tensors
    monkeypatch.setattr("frechet_merge.merging.robust.is_spanned", lambda job: False)
    want = merge(*args, loss=Huber(per=per)).tensors
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-5)


def test_files_are_read_twice_however_many_rounds_it_takes(tmp_path, monkeypatch):
    read = []
    into = FileTensor.into

    def counted(self, row, start):
        read.append(len(row))
        into(self, row, start)

    monkeypatch.setattr(FileTensor, "into", counted)
    for i, tensors in enumerate(five(30.0)):
        save_file(tensors, tmp_path/f"{i}.safetensors")
    paths = [tmp_path/f"{i}.safetensors" for i in range(5)]
    merge(paths, loss="median", out=tmp_path/"o")
    assert Record.read(tmp_path/"o").counted["rounds"] > 2
    assert sum(read) == 2*5*(12*8 + 12)
    planned = preview(Recipe.of({"models": paths, "loss": "median"}), timed=True)
    assert planned.bytes_read == 4*sum(read) and planned.seconds is None and not planned.warnings


def test_a_plan_says_what_it_does_not_count(tmp_path):
    models = [adapter(tmp_path/f"a{i}", i, 1.0) for i in range(3)]
    (note,) = preview(Recipe.of({"models": models, "loss": "median"})).warnings
    assert "rounds of the loss" in note

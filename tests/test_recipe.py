"""A merge is data: its record runs again to the same bytes, its jobs can be sent elsewhere."""

import json
import pickle

import pytest
import torch
from conftest import save
from safetensors.torch import save_file

from frechet_merge import LoRA, Span, Sphere, load, merge
from frechet_merge.merging.merge import make
from frechet_merge.merging.plan import open_recipe, plan_recipe
from frechet_merge.merging.recipe import Recipe
from frechet_merge.merging.record import Record


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(7, 4, generator=g),
        "layers.0.q.weight": torch.randn(6, 4, generator=g),
        "layers.0.q.bias": torch.randn(6, generator=g),
        "steps": torch.tensor(3),
    }


@pytest.fixture
def whole(tmp_path):
    "A base and two models."
    config = {"model_type": "none"}
    return [save(tmp_path/n, tensors(i), config) for i, n in enumerate(("base", "a", "b"))]


@pytest.fixture
def adapters(tmp_path):
    "Two adapters of ranks 2 and 3."
    made = []
    for seed, r in enumerate((2, 3)):
        g = torch.Generator().manual_seed(seed)
        key = "base_model.model.layers.{}.q.lora_{}.weight"
        shapes = {"A": (r, 4), "B": (6, r)}
        state = {
            key.format(i, side): torch.randn(shape, generator=g)
            for i in range(2)
            for side, shape in shapes.items()
        }
        folder = tmp_path/f"adapter{seed}"
        folder.mkdir()
        save_file(state, folder/"adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_modules": ["q"]}
        (folder/"adapter_config.json").write_text(json.dumps(said))
        made.append(folder)
    return made


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def made_again(out, to):
    "From what a merge wrote beside its weights, and from nothing else."
    record = Record.read(out)
    make(record.again(), record.output(to))
    assert bytes_of(to) == bytes_of(out) and bytes_of(out)
    assert Record.read(to).recipe == record.recipe


class TestARecordRunsAgain:
    def test_of_models(self, tmp_path, whole):
        base, *models = whole
        how = {"base": base, "weights": [3, 1], "scale": {"layers.*": 0.5}, "drop": ["steps"]}
        merge(models, Span(Sphere()), out=tmp_path/"o", dtype="bf16", shard_size=100, **how)
        assert len(bytes_of(tmp_path/"o")) > 1
        made_again(tmp_path/"o", tmp_path/"again")

    def test_of_adapters(self, tmp_path, adapters):
        merge(adapters, "lora:rank=2", out=tmp_path/"o", scale=-1)
        made_again(tmp_path/"o", tmp_path/"again")

    def test_of_a_merge_in_memory(self, tmp_path, whole):
        found = merge(whole, weights=[1, 2, 3])
        again = make(found.record.again())
        assert all(torch.equal(again.tensors[n], found.tensors[n]) for n in found.tensors)


@pytest.mark.parametrize("what", ["whole", "adapters"])
def test_jobs_can_be_sent_to_another_process(request, what):
    models = request.getfixturevalue(what)
    geometry = LoRA() if what == "adapters" else Span(Sphere())
    plan = plan_recipe(open_recipe(Recipe(models, geometry)))

    def done(job):
        wrote = {}
        job.run(lambda name, start, x: wrote.update({(name, start): x.clone()}))
        return wrote

    for job in plan.jobs:
        here, there = done(job), done(pickle.loads(pickle.dumps(job)))
        assert here.keys() == there.keys()
        assert all(torch.equal(here[k], there[k]) for k in here)


class TestTakingAModelAway:
    "No mean has a negative weight; the message says what to do instead, and that is right."

    def test_adapters(self, tmp_path, adapters):
        with pytest.raises(ValueError, match="must not be negative.*\n.*--sum 1,-1 "):
            merge(adapters, LoRA(), weights=[1, -1])
        found = merge(adapters, LoRA(), sum=[1, -1], out=tmp_path/"o").out
        a, b, out = (updates_of(f) for f in (*adapters, found))
        for name in a:
            torch.testing.assert_close(out[name], a[name] - b[name], rtol=0, atol=1e-5)

    def test_models(self, whole):
        base, a, b = whole
        with pytest.raises(ValueError, match="whole models with their base"):
            merge([a, b], base=base, weights=[1, -1])
        found = merge([a, b], base=base, sum=[1, -1])
        for name in ("embed.weight", "layers.0.q.bias"):
            want = load(base)[name] + load(a)[name] - load(b)[name]
            torch.testing.assert_close(found.tensors[name], want, rtol=0, atol=1e-5)

    def test_a_sum_by_itself(self, tmp_path, adapters):
        "TSV-M is one already: a model is taken away in two steps, which its message names."
        with pytest.raises(ValueError, match="alone with --scale -1"):
            merge(adapters, "tsvm", sum=[1, -1])
        minus = merge(adapters[1:], "tsvm", scale=-1, out=tmp_path/"minus").out
        a, b, out = (updates_of(f) for f in (adapters[0], adapters[1], minus))
        assert merge([adapters[0], minus], "tsvm").means
        for name in b:
            torch.testing.assert_close(out[name], -b[name], rtol=0, atol=1e-5)


def updates_of(folder):
    from frechet_merge.adapters.peft import layers

    return {n: x.factors().delta() for n, x in layers(load(folder))[0].items()}

"""What `suggest` names is a recipe that runs as it is; where nothing was measured it says so, and
what would decide; and its table decides for every kind of models."""

import itertools
import json
import warnings

import pytest
import torch
from conftest import cli, save
from safetensors.torch import save_file
from test_examples import make, write
from test_tune import WORDS, moved

from frechet_merge import load, merge
from frechet_merge.geometries.registry import geometry_named
from frechet_merge.huggingface.models import collect
from frechet_merge.recipes.written import read_recipe, run_recipe
from frechet_merge.messages import MergeError
from frechet_merge.tuning.suggest import OUTPUTS, PARTS, RULES, decided, suggest
from frechet_merge.tuning.tune import tune


def adapter(folder, seed, r=2):
    g = torch.Generator().manual_seed(seed)
    names = {"A": (r, 6), "B": (8, r)}
    state = {
        f"base_model.model.{layer}.lora_{k}.weight": 0.1*torch.randn(*s, generator=g)
        for layer in ("q", "v")
        for k, s in names.items()
    }
    folder.mkdir()
    save_file(state, folder/"adapter_model.safetensors")
    config = dict(peft_type="LORA", r=r, lora_alpha=r, target_modules=["q", "v"])
    (folder/"adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "base"})
    )
    return folder


def weights(seed=None):
    "A base, or with a seed a fine-tune of it."
    g = torch.Generator().manual_seed(0)
    state = {f"{k}.weight": torch.randn(8, 6, generator=g) for k in ("q", "v")}
    if seed is not None:
        g = torch.Generator().manual_seed(seed)
        state = {k: x + 0.02*torch.randn(x.shape, generator=g) for k, x in state.items()}
    return state


@pytest.fixture
def folders(tmp_path):
    "A base, fine-tunes of it, and adapters."
    save(tmp_path/"base", weights(), {"vocab_size": 8})
    for i in range(2):
        save(tmp_path/f"m{i}", weights(i + 1), {"vocab_size": 8})
        adapter(tmp_path/f"a{i}", i)
    return tmp_path


@pytest.mark.parametrize(
    "asked, same",
    [
        (["a0", "a1"], dict(models=["a0", "a1"], geometry="tsvm", scale=0.7)),
        (
            ["m0", "m1", "--base", "base"],
            dict(models=["m0", "m1"], base="base", geometry="epimer", scale=1.4),
        ),
        (
            ["a0", "a1", "--base", "base"],
            dict(models=["base+a0", "base+a1"], base="base", geometry="epimer", scale=0.7),
        ),
    ],
    ids=["adapters", "full models", "adapters with their base"],
)
def test_the_recipe_runs_as_it_is(folders, monkeypatch, asked, same):
    code, out, err = cli("suggest", *asked, "-o", "r.yaml", cwd=folders)
    assert code == 0, err
    assert out == (folders/"r.yaml").read_text() and out.startswith("# geometry: ")
    code, _, err = cli("run", "r.yaml", "-o", "out", cwd=folders)
    assert code == 0, err
    monkeypatch.chdir(folders)
    wanted = merge(**same).tensors
    written = load(folders/"out")
    assert {*wanted} == {*written}
    assert all(torch.equal(written[k], x) for k, x in wanted.items())


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    "A classifier, two fine-tunes, examples and statistics of each."
    tmp = tmp_path_factory.mktemp("suggest")
    make("bert", tmp/"bert")
    for i in range(2):
        moved(tmp/"bert", tmp/f"bert{i}", i)
        rows = [{"text": f"{a} {b}"} for a in WORDS[i::2] for b in WORDS]
        write(tmp/f"{i}.jsonl", rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            collect(tmp/f"bert{i}", tmp/f"{i}.jsonl", tmp/f"s{i}.safetensors")
    return tmp


@pytest.mark.filterwarnings(
    "ignore:no metric for", "ignore:.*at an end", "ignore:.*the metrics have seen"
)
@pytest.mark.parametrize("has_metrics", [True, False])
def test_on_examples_it_is_what_tune_finds(encoders, tmp_path, has_metrics):
    models = [encoders/f"bert{i}" for i in range(2)]
    data = [encoders/f"{i}.jsonl" for i in range(2)]
    metrics = [encoders/f"s{i}.safetensors" for i in range(2)] if has_metrics else None
    found = suggest(models, encoders/"bert", metrics, data)
    wanted = ["pullback:share=right"] if has_metrics else ["epimer"]
    best = tune(models, data, encoders/"bert", wanted, metrics).best
    assert (found.recipe["geometry"], found.recipe["scale"]) == (best.name, best.scale)
    asked = read_recipe(found.write(tmp_path/"r.yaml"))
    tensors = run_recipe(asked, asked.output).tensors
    again = merge(models, best.geometry, encoders/"bert", scale=best.scale, metrics=metrics)
    assert all(torch.equal(tensors[k], x) for k, x in again.tensors.items())


@pytest.mark.filterwarnings("ignore:no metric for")
def test_without_examples_the_anchor_is_of_the_table(encoders):
    models = [encoders/f"bert{i}" for i in range(2)]
    metrics = [encoders/f"s{i}.safetensors" for i in range(2)]
    found = suggest(models, encoders/"bert", metrics)
    assert geometry_named(found.recipe["geometry"]).anchor == 2 and found.tuned is None


def test_it_abstains_and_writes_nothing(folders):
    apart = save(folders/"apart", {k: -x for k, x in weights().items()})
    for asked, why in (
        (["m0", "--base", "base"], "one model"),
        (["m0", "m1"], "--base"),
        (["m0", apart], "align"),
        (["a0", "a0"], "the same way"),
    ):
        code, out, err = cli("suggest", *asked, "-o", "r.yaml", cwd=folders)
        assert code == 1 and out.startswith("no suggestion: ") and why in out, (asked, out, err)
        assert not (folders/"r.yaml").exists()
    code, out, _ = cli("suggest", "m0", "m1", "--json", cwd=folders)
    held = json.loads(out)
    assert code == 1 and held["recipe"] is None and "--base" in held["abstains"]


def test_what_cannot_be_merged_gets_no_suggestion(folders):
    save(folders/"odd", {"q.weight": torch.ones(3)})
    found = suggest([folders/"m0", folders/"odd"], folders/"base")
    assert found.recipe is None and "inspect" in found.abstains and "v.weight" in found.abstains
    with pytest.raises(MergeError, match="no such folder"):
        suggest([folders/"m0", folders/"m9/x/y"], folders/"base")
    with pytest.raises(ValueError, match="--base"):
        suggest([folders/"m0", folders/"m1"], data=["x.jsonl"])
    with pytest.raises(ValueError, match="no suggestion"):
        found.yaml()
    code, _, err = cli("suggest", "m0", "m1", "--base", "base", "-o", "base", cwd=folders)
    assert code == 1 and "is a folder" in err


KNOWN = {
    "models": [1, 2, 3, 6],
    "files": ["adapters", "full models"],
    "rank": ["low", "full"],
    "base": [True, False],
    "reads": ["text", "pictures", "unknown"],
    "knows": ["nothing", "metrics", "examples", "both"],
    "mergeable": [True, False],
    "distance": [None, 0.01, 1.4],
    "cosine": [None, 0.0, 0.9],
    "size": [None, 0.1, 0.6],
}


def test_the_table_decides_for_every_kind_of_models():
    "A rule holds for each decision, its reason can be told, and its geometry is one."
    used = set()
    for values in itertools.product(*KNOWN.values()):
        facts = dict(zip(KNOWN, values), cut=8, kept=0.5, obstacle="")
        reasons = decided(facts)
        used |= {(r.of, r.measured, str(r.says)) for r in reasons}
        geometry = reasons[0].says
        assert [r.of for r in reasons[1:]] == [*PARTS.get(geometry, ())]
        assert geometry is None or geometry_named(geometry)
        for r in reasons[1:]:
            # what is searched for is searched for on examples
            assert r.says != OUTPUTS or facts["knows"] in ("examples", "both")
    never = [r for r in RULES if (r.of, r.measured, str(r.says)) not in used]
    assert not never


def test_models_trained_apart_are_told_so_and_the_remedy_runs(tmp_path):
    for seed, name in enumerate("ab"):
        make("bert", tmp_path/name, seed)
    write(tmp_path/"texts.jsonl", [{"text": f"{x} {y}"} for x in WORDS for y in WORDS[:3]])
    code, out, err = cli("suggest", "a", "b", cwd=tmp_path)
    said = " ".join((out + err).split())
    assert code == 1 and "trained apart" in said and "--residual and --data" in said
    how = ("--residual", "--data", "texts.jsonl", "--max-samples", "16")
    code, out, err = cli("align", "a", "b", "-o", "gauge", *how, cwd=tmp_path)
    assert code == 0, err
    code, out, err = cli("merge", "gauge/a", "gauge/b", "-o", "merged", cwd=tmp_path)
    assert code == 0, err

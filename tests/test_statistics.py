"Statistics are used for the tensors that they are of, or refused by name: never for some of them."

import json
import warnings

import pytest
import torch
from conftest import save
from test_examples import make, write

from frechet_merge import load, merge
from frechet_merge.messages import MergeError
from frechet_merge.curvature.collecting import Statistics, curvature
from frechet_merge.diagnostics.inspection import inspect
from frechet_merge.huggingface.models import collect

transformers = pytest.importorskip("transformers")
SHAPES = {"embed.weight": (7, 4), "layer.0.query.weight": (4, 4), "classifier.weight": (3, 4)}


def models(shapes=SHAPES):
    return [{n: torch.randn(*s) for n, s in shapes.items()} for _ in range(2)]


def diagonals(names, **about):
    "Statistics of all models, under these names; shapes are those of the tensors they stand for."
    return [Statistics({n: torch.rand(*s) for n, s in names.items()}, about) for _ in range(2)]


def factors(names):
    sides = {
        f"{n}.{side}": torch.eye(k)
        for n, shape in names.items()
        for side, k in zip(("left", "right"), shape)
    }
    return [Statistics(sides)]*2


def renamed(old, new, shapes=SHAPES):
    return {n.replace(old, new): s for n, s in shapes.items()}


@pytest.mark.parametrize("form", [diagonals, factors])
def test_a_name_that_fits_no_tensor_is_refused(form):
    metrics = form(renamed("layer.0.query", "layers.0.q_proj"))
    with pytest.raises(MergeError) as e:
        merge(models(), metrics=metrics)
    said = str(e.value)
    assert "no tensor of the models is called 'layers.0.q_proj.weight'" in said
    assert "'layer.0.query.weight' of the same shape would be merged without a metric" in said
    assert len(said.splitlines()) <= 3
    with pytest.raises(MergeError, match="layers.0.q_proj"):
        inspect(models(), metrics=metrics)


def test_how_many_there_are_is_said():
    shapes = {f"layer.{i}.query.weight": (4, 4) for i in range(3)}
    metrics = diagonals(renamed("query", "q_proj", shapes) | {"embed.weight": (7, 4)})
    with pytest.raises(MergeError, match=r"'layer.0.q_proj.weight' \(and 2 more\)"):
        merge(models(SHAPES | shapes), metrics=metrics)


@pytest.mark.parametrize("form", [diagonals, factors])
def test_a_part_that_was_left_out_is_merged_with_a_remark(form):
    part = {n: s for n, s in SHAPES.items() if "query" in n}
    with pytest.warns(UserWarning, match="no metric for 2 tensors, .*: embed.weight, classifier"):
        merge(models(), metrics=form(part))


def test_what_the_collector_skipped_for_a_reason_is_merged_with_a_remark():
    "Its metric may be there under another name: who collected it knew of the tensor."
    names = renamed("layer.0.query", "layers.0.q_proj")
    metrics = diagonals(names, skipped={"layer.0.query.weight": "it is used elsewhere too"})
    with pytest.warns(UserWarning, match="no metric for 1 tensors, .*: layer.0.query.weight"):
        merge(models(), metrics=metrics)


def test_statistics_of_a_head_that_is_dropped_are_no_sign():
    part = {n: s for n, s in SHAPES.items() if "embed" not in n}
    with pytest.warns(UserWarning, match="no metric for 1 tensors, .*: embed.weight"):
        merge(models(), metrics=diagonals(part), drop=["classifier*"])


def test_the_second_name_of_a_tied_tensor_is_no_sign():
    "The module has both names, the file one; another tensor of that shape has no metric."
    shapes = {"embed.weight": (7, 4), "other.weight": (7, 4)}
    metrics = [Statistics({"embed.weight": x, "head.weight": x}) for x in torch.rand(2, 7, 4)]
    with pytest.warns(UserWarning, match="no metric for 1 tensors, .*: other.weight"):
        merge(models(shapes), metrics=metrics)


def vit():
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def dinov2():
    config = transformers.Dinov2Config(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.Dinov2ForImageClassification(config)


def swin():
    config = transformers.SwinConfig(
        image_size=8,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=2,
        num_labels=3,
    )
    return transformers.SwinForImageClassification(config)


# an attention over windows does not have its samples first
PARAMETERS = {swin: ["*mlp*weight", "classifier.weight"]}


@pytest.mark.filterwarnings("ignore:no metric for")
@pytest.mark.parametrize("form", ["kronecker", "diagonal"])
@pytest.mark.parametrize("make", [vit, dinov2, swin])
def test_modules_that_the_file_calls_otherwise(make, form, tmp_path):
    "What transformers 5 writes has other names than what it runs; a mean of state dicts has not."
    modules = [make() for _ in range(2)]
    folders = [tmp_path/str(i) for i in range(2)]
    for module, folder in zip(modules, folders):
        module.save_pretrained(folder)
    batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    how = dict(parameters=PARAMETERS.get(make))
    metrics = [curvature(m, [batch], form, "empirical", **how) for m in modules]
    stems = {n.removesuffix(".left").removesuffix(".right") for n in metrics[0]}
    if stems <= set(load(folders[0])):
        pytest.skip("this transformers calls them alike")
    with pytest.raises(MergeError, match="no tensor of the models is called '"):
        merge(folders, "curved:damping=0.1", metrics=metrics)
    states = [m.state_dict() for m in modules]
    with_metrics = merge(states, "curved:damping=0.1", metrics=metrics).tensors
    plain = merge(states).tensors
    differ = [n for n in stems if not torch.equal(states[0][n], states[1][n])]
    assert differ and not any(torch.equal(with_metrics[n], plain[n]) for n in differ)


@pytest.mark.filterwarnings("ignore:no metric for")
def test_old_names_of_a_file(tmp_path):
    "A published BERT calls scales gamma: its module does not, and the collector for files does."
    folders = [old_names(make("bert", tmp_path/n, seed=i)) for i, n in enumerate("ab")]
    data = write(tmp_path/"a.jsonl")
    files = [tmp_path/f"{f.name}.safetensors" for f in folders]
    for folder, file in zip(folders, files):
        collect(folder, data, file, "diagonal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(folders, "curved:damping=0.1", metrics=files)
    new = [
        Statistics({n.replace("gamma", "weight"): x for n, x in Statistics.load(f).items()})
        for f in files
    ]
    with pytest.raises(MergeError, match="LayerNorm.weight.*LayerNorm.gamma"):
        merge(folders, "curved:damping=0.1", metrics=new)


def old_names(folder):
    state = {n: load(folder)[n] for n in load(folder)}
    state = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): x for n, x in state.items()}
    return save(folder, state, json.loads((folder/"config.json").read_text()))

"""Adapters of diffusion pipelines, put on their folders, against diffusers' own `fuse_lora`."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from test_dialects import dotted, flux_file, kohya, parts_of, pipeline

from frechet_merge import LoRA, load, merge
from frechet_merge.messages import MergeError


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fused(kind, *files):
    "Every weight of a pipeline on which the mean of files was put, by diffusers."
    pipe = copy.deepcopy(pipeline(kind))
    for i, file in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=f"a{i}")
    pipe.set_adapters([f"a{i}" for i in range(len(files))], [1/len(files)]*len(files))
    pipe.fuse_lora(
        components=[*parts_of(pipe)], adapter_names=[f"a{i}" for i in range(len(files))]
    )
    pipe.unload_lora_weights()
    return {part: model.state_dict() for part, model in parts_of(pipe).items()}


def folder(tmp_path, kind):
    pipeline(kind).save_pretrained(tmp_path/"pipeline")
    return tmp_path/"pipeline"


def opened(out, kind):
    "The parts of a folder as their libraries open them."
    found = {}
    for part, model in parts_of(pipeline(kind)).items():
        found[part] = type(model).from_pretrained(out/part).state_dict()
    return found


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for part in wanted:
        assert found[part].keys() == wanted[part].keys()
        for name, x in wanted[part].items():
            torch.testing.assert_close(found[part][name], x, rtol=1e-6, atol=1e-6)


def test_a_helper_changes_something(tmp_path):
    file = kohya(tmp_path/"a.safetensors", "sd", 1)
    plain = {part: m.state_dict() for part, m in parts_of(pipeline("sd")).items()}
    with pytest.raises(AssertionError):
        same(fused("sd", file), plain)


@pytest.mark.parametrize("write", [kohya, dotted])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_mean_on_a_pipeline(tmp_path, kind, write):
    files = [write(tmp_path/f"{i}.safetensors", kind, i) for i in (1, 2)]
    base = folder(tmp_path, kind)
    merge(files, LoRA(), bake=base, out=tmp_path/"out")
    same(opened(tmp_path/"out", kind), fused(kind, *files))


@pytest.mark.parametrize("write", [kohya, dotted])
def test_one_file_on_a_unet(tmp_path, write):
    file = write(tmp_path/"a.safetensors", "sd", 1, parts=("unet",))
    base = folder(tmp_path, "sd")
    merge([file], LoRA(), bake=base/"unet", out=tmp_path/"out"/"unet")
    found = type(pipeline("sd").unet).from_pretrained(tmp_path/"out"/"unet").state_dict()
    same({"unet": found}, {"unet": fused("sd", file)["unet"]})


def test_base_and_adapter_by_a_sign(tmp_path):
    file = kohya(tmp_path/"a.safetensors", "sd", 1, parts=("unet",))
    base = folder(tmp_path, "sd")
    found = load(f"{base/'unet'}+{file}")
    want = fused("sd", file)["unet"]
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dot", [False, True])
def test_fused_matrices_of_flux(tmp_path, dot):
    lead = "diffusion_model.double_blocks.0." if dot else "lora_unet_double_blocks_0_"
    file = flux_file(tmp_path/"a.safetensors", 1, lead, dot)
    base = folder(tmp_path, "flux")
    merge([file], LoRA(), bake=base/"transformer", out=tmp_path/"out")
    found = type(pipeline("flux").transformer).from_pretrained(tmp_path/"out").state_dict()
    same({"transformer": found}, {"transformer": fused("flux", file)["transformer"]})


def test_layers_of_a_text_encoder_need_the_pipeline(tmp_path):
    file = kohya(tmp_path/"a.safetensors", "sd", 1)
    base = folder(tmp_path, "sd")
    with pytest.raises(MergeError, match="lora_te1_.*\n.*whole pipeline") as e:
        merge([file], LoRA(), bake=base/"unet", out=tmp_path/"out")
    assert "'lora_te1_*'" in str(e.value)
    # both remedies
    merge([file], LoRA(), bake=base/"unet", out=tmp_path/"unet", drop=["lora_te1_*"])
    merge([file], LoRA(), bake=base, out=tmp_path/"whole")
    found = type(pipeline("sd").unet).from_pretrained(tmp_path/"unet").state_dict()
    want = fused("sd", file)
    same({"unet": found}, {"unet": want["unet"]})
    same(opened(tmp_path/"whole", "sd"), want)


def test_a_layer_that_is_not_there_is_named(tmp_path):
    base = folder(tmp_path, "sd")
    stem = "lora_unet_down_blocks_7_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 8, 1, 1)}
    tensors[f"{stem}.lora_up.weight"] = torch.ones(8, 2, 1, 1)
    save_file(tensors, tmp_path/"a.safetensors")
    with pytest.raises(MergeError, match="down_blocks.7"):
        merge([tmp_path/"a.safetensors"], LoRA(), bake=base, out=tmp_path/"out")

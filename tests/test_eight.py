"""A merge that is written in fp8 is what transformers reads, within half a step."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from frechet_merge import load, merge
from frechet_merge.execution.eight import BLOCK
from frechet_merge.messages import MergeError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {
    "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "num_experts": 2,
    "moe_intermediate_size": 128, "num_experts_per_tok": 1, "decoder_sparse_step": 1,
}


def pair(tmp_path, kind="llama", **more):
    "Two random models, in folders."
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(kind, **SMALL | more)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path/str(seed))
        folders.append(tmp_path/str(seed))
    return folders


def check_half_a_step(found, want, scale=None):
    "Half of e4m3's step, of normal numbers and of the smallest."
    largest = want.abs().max()/448 if scale is None else scale
    step = torch.maximum(want.abs()/16, largest/2**10)
    assert ((found.float() - want).abs() <= step*1.01 + want.abs()/256).all()


def check_which_are_coded(stored):
    "Weights of layers, and no embedding, head or norm."
    codes = {n for n, x in stored.items() if x.dtype == torch.float8_e4m3fn}
    assert codes and all(stored[f"{n}_scale_inv"].dtype == torch.float32 for n in codes)
    assert not any("embed" in n or "lm_head" in n or "norm" in n for n in codes)


@pytest.mark.parametrize("kind, more", [
    ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen3", {}), ("qwen3_moe", {}),
])
def test_transformers_reads_it(tmp_path, kind, more):
    models = pair(tmp_path, kind, **more)
    merge(models, out=tmp_path/"eight", dtype="fp8")
    merge(models, out=tmp_path/"whole")
    stored = load_file(tmp_path/"eight"/"model.safetensors")
    check_which_are_coded(stored)
    said = json.loads((tmp_path/"eight"/"config.json").read_text())
    assert said["quantization_config"]["weight_block_size"] == [BLOCK, BLOCK]
    assert (said.get("dtype") or said.get("torch_dtype")) == "bfloat16"
    # without a GPU transformers dequantises
    opened, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path/"eight", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/"whole").state_dict()
    for name, x in opened.state_dict().items():
        check_half_a_step(x, want[name])
    # and our own view
    whole = load(tmp_path/"whole")
    read = load(tmp_path/"eight")
    assert set(read) == set(whole)
    for name in whole:
        check_half_a_step(read[name], whole[name].float())


def test_blocks_have_the_scales_of_the_format(tmp_path):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    models = pair(tmp_path)
    merge(models, out=tmp_path/"eight", dtype="fp8", shard_size=1 << 20)
    merge(models, out=tmp_path/"whole")
    stored = {}
    for file in (tmp_path/"eight").glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            stored |= {n: f.get_tensor(n) for n in f.keys()}
    whole = load(tmp_path/"whole")
    for name in [n for n in stored if n.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        want = whole[weight].float()
        blocks = want.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        torch.testing.assert_close(stored[name], blocks.abs().amax((1, 3))/448)
        read = fp8.Fp8Dequantize(None)._dequantize_one(stored[weight], stored[name], torch.float32)
        scale = stored[name].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        check_half_a_step(read, want, scale)


def test_sizes_that_are_no_blocks_stay_and_are_named(tmp_path):
    models = pair(tmp_path, intermediate_size=192)
    merge(models, out=tmp_path/"eight", dtype="fp8")
    said = json.loads((tmp_path/"eight"/"config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.up_proj" in said["modules_to_not_convert"]
    stored = load_file(tmp_path/"eight"/"model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path/"eight")


def test_it_can_be_merged_again(tmp_path):
    models = pair(tmp_path)
    merge(models, out=tmp_path/"eight", dtype="fp8")
    merge([tmp_path/"eight", models[0]], out=tmp_path/"out")
    said = json.loads((tmp_path/"out"/"config.json").read_text())
    assert "quantization_config" not in said
    merge([tmp_path/"eight", models[0]], out=tmp_path/"again", dtype="fp8")
    said = json.loads((tmp_path/"again"/"config.json").read_text())
    assert said["quantization_config"]["quant_method"] == "fp8"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path/"again")


def test_where_it_cannot_be_written_it_is_refused(tmp_path):
    models = pair(tmp_path)
    with pytest.raises(ValueError, match="name a folder"):
        merge(models, dtype="fp8")
    state = [{"w": torch.randn(4, 4)}, {"w": torch.randn(4, 4)}]
    with pytest.raises(MergeError, match="fp8 is for the linear layers.*\n.*--dtype bf16"):
        merge(state, out=tmp_path/"out", dtype="fp8")
    merge(state, out=tmp_path/"out", dtype="bf16")

"One architecture, written in several ways, against what transformers makes of each."

import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", minversion="5")

from frechet_merge import MergeError, load, merge  # noqa: E402

TEXT = dict(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=32,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MOE = dict(
    TEXT,
    moe_intermediate_size=8,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
)
SEES = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
QWEN_EYES = dict(
    depth=1,
    hidden_size=16,
    embed_dim=16,
    num_heads=2,
    intermediate_size=32,
    out_hidden_size=16,
    patch_size=4,
    fullatt_block_indexes=[0],
    window_size=8,
    deepstack_visual_indexes=[0],
    num_position_embeddings=16,
)
MROPE = dict(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})


def qwen_config(name, **more):
    cls = getattr(transformers, name)
    eyes = dict(QWEN_EYES)
    if name == "Qwen2VLConfig":
        eyes["hidden_size"] = 16
    return cls(
        text_config={**TEXT, **MROPE, **more, "tie_word_embeddings": False},
        vision_config=eyes,
        tie_word_embeddings=False,
        image_token_id=50,
        video_token_id=51,
        vision_start_token_id=52,
        vision_end_token_id=53,
    )


def llava_config(name, text, vision="siglip_vision_model", **more):
    from transformers import AutoConfig

    cls = getattr(transformers, name)
    sub = AutoConfig.for_model(text, **TEXT)
    eyes = AutoConfig.for_model(vision, **SEES)
    return cls(text_config=sub, vision_config=eyes, tie_word_embeddings=False, **more)


def made(cls, config, seed):
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(config).eval()
    # norms and biases are the same in all new models
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p)*0.1)
    return model


SEEING = {
    "Qwen2VLForConditionalGeneration": lambda: qwen_config("Qwen2VLConfig"),
    "Qwen2_5_VLForConditionalGeneration": lambda: qwen_config("Qwen2_5_VLConfig"),
    "Qwen3VLForConditionalGeneration": lambda: qwen_config("Qwen3VLConfig"),
    "LlavaForConditionalGeneration": lambda: llava_config("LlavaConfig", "llama"),
    "LlavaNextForConditionalGeneration": lambda: llava_config("LlavaNextConfig", "mistral"),
    "LlavaOnevisionForConditionalGeneration": lambda: llava_config(
        "LlavaOnevisionConfig", "qwen2"
    ),
    "Gemma3ForConditionalGeneration": lambda: llava_config(
        "Gemma3Config", "gemma3_text", mm_tokens_per_image=4
    ),
    "Mistral3ForConditionalGeneration": lambda: llava_config(
        "Mistral3Config", "mistral", "pixtral"
    ),
    "PaliGemmaForConditionalGeneration": lambda: llava_config(
        "PaliGemmaConfig", "gemma", projection_dim=16
    ),
    "InternVLForConditionalGeneration": lambda: llava_config(
        "InternVLConfig", "qwen2", "internvl_vision"
    ),
}
EXPERTS = {
    "MixtralForCausalLM": "MixtralConfig",
    "Qwen2MoeForCausalLM": "Qwen2MoeConfig",
    "Qwen3MoeForCausalLM": "Qwen3MoeConfig",
    "OlmoeForCausalLM": "OlmoeConfig",
    "PhimoeForCausalLM": "PhimoeConfig",
    "GraniteMoeForCausalLM": "GraniteMoeConfig",
    "DeepseekV2ForCausalLM": "DeepseekV2Config",
    "DeepseekV3ForCausalLM": "DeepseekV3Config",
}
DEEPSEEK = dict(
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_key_value_heads=2,
)


def moe_config(name):
    more = DEEPSEEK if name.startswith("Deepseek") else {}
    return getattr(transformers, name)(**{**MOE, **more})


ALL = {**SEEING, **{k: lambda v=v: moe_config(v) for k, v in EXPERTS.items()}}


def old(name, prefixes):
    "A name as versions before 4.52 wrote those of models of the LLaVA family."
    for new, before in prefixes:
        if name.startswith(new):
            return before + name.removeprefix(new)
    return name


def saved(folder, model, layout):
    "A model as it is written by default, as its module is called, or as it once was."
    size = "20KB" if layout == "shards" else "5GB"
    model.save_pretrained(
        folder, save_original_format=layout != "module", max_shard_size=size
    )
    return str(folder)


def means(out, cls, *states):
    "What transformers reads is the mean of what it would read of each."
    model, info = getattr(transformers, cls).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, x in model.state_dict().items():
        want = sum(s[name].double() for s in states)/len(states)
        torch.testing.assert_close(x.double(), want, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("order", [0, 1], ids=["module second", "module first"])
def test_two_ways_to_write_one_model(tmp_path, cls, order):
    a, b = (made(cls, ALL[cls](), k) for k in (0, 1))
    folders = [saved(tmp_path/"a", a, "shards"), saved(tmp_path/"b", b, "module")]
    if order:
        folders.reverse()
    merge(folders, out=tmp_path/"o")
    means(tmp_path/"o", cls, a.state_dict(), b.state_dict())
    # in the layout of the first
    assert {*load(tmp_path/"o")} == {*load(folders[0])}


@pytest.mark.parametrize("cls", ["Qwen2_5_VLForConditionalGeneration", "MixtralForCausalLM"])
@pytest.mark.parametrize("layouts", ["module original", "original module"])
def test_a_base_of_another_layout(tmp_path, cls, layouts):
    base, a, b = (made(cls, ALL[cls](), k) for k in range(3))
    first, second = layouts.split()
    folders = [saved(tmp_path/"a", a, second), saved(tmp_path/"b", b, first)]
    merge(folders, base=saved(tmp_path/"base", base, first), scale=0.5, out=tmp_path/"o")
    s0, s1, s2 = (m.state_dict() for m in (base, a, b))
    want = {n: s0[n] + 0.5*((s1[n] + s2[n])/2 - s0[n]) for n in s0}
    means(tmp_path/"o", cls, want)

"One architecture, written in several ways, against what transformers makes of each."

import ast
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


def means(out, cls, *states, but=()):
    "What transformers reads is the mean of what it would read of each, but for some of its names."
    model, info = getattr(transformers, cls).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, x in model.state_dict().items():
        if name not in but:
            want = sum(s[name].double() for s in states)/len(states)
            torch.testing.assert_close(x.double(), want, atol=1e-6, rtol=1e-5, msg=name)
    return model


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


def vae(seed=0):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)


def before_0_12(folder, model):
    "A VAE as the first versions of diffusers wrote its attention."
    model.save_pretrained(folder)
    file = folder/"diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, once in words.items():
        tensors = {n.replace(f".0.{new}.", f".0.{once}."): x for n, x in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("first", ["old", "new"])
@pytest.mark.parametrize("based", [False, True], ids=["alone", "with a base"])
def test_the_attention_of_an_old_vae(tmp_path, first, based):
    from diffusers import AutoencoderKL

    a, b, base = (vae(i) for i in range(3))
    folders = [before_0_12(tmp_path/"a", a), tmp_path/"b"]
    b.save_pretrained(tmp_path/"b")
    how = {"base": before_0_12(tmp_path/"base", base), "scale": 0.5} if based else {}
    merge(folders if first == "old" else folders[::-1], out=tmp_path/"o", **how)
    assert {*load(tmp_path/"o")} == {*load(tmp_path/("a" if first == "old" else "b"))}
    found = AutoencoderKL.from_pretrained(tmp_path/"o").state_dict()
    states = [m.state_dict() for m in (a, b, base)]
    for name, x in found.items():
        mean = (states[0][name] + states[1][name])/2
        want = (mean + states[2][name])/2 if based else mean
        torch.testing.assert_close(x, want, msg=name)


@pytest.mark.parametrize("geometry", ["sphere", "epimer", "euclidean"])
@pytest.mark.parametrize("cls", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_apart_and_fused_have_one_merge(tmp_path, cls, geometry):
    base, a, b = (made(cls, ALL[cls](), k) for k in range(3))
    found = []
    for layout in ("original", "module"):
        names = "abc"
        folders = [saved(tmp_path/layout/n, m, layout) for n, m in zip(names, (a, b, base))]
        out = tmp_path/layout/"o"
        merge(folders[:2], geometry, base=folders[2], out=out)
        model = getattr(transformers, cls).from_pretrained(out)
        found.append(model.state_dict())
    apart, fused = found
    for name, x in apart.items():
        torch.testing.assert_close(fused[name], x, atol=2e-5, rtol=1e-4, msg=name)


def test_diagonal_metrics_of_fused_experts(tmp_path):
    cls = "MixtralForCausalLM"
    a, b = (made(cls, ALL[cls](), k) for k in (0, 1))
    folders = [saved(tmp_path/n, m, "module") for n, m in zip("ab", (a, b))]
    states = [m.state_dict() for m in (a, b)]
    metrics = [{n: torch.rand_like(x) + 0.5 for n, x in s.items()} for s in states]
    out = merge(folders, "curved", metrics=metrics).tensors
    for name in states[0]:
        x, y = (s[name] for s in states)
        g, h = (m[name] for m in metrics)
        torch.testing.assert_close(out[name], (g*x + h*y)/(g + h), atol=1e-5, rtol=1e-4)


def rewritten(folder, to):
    "A folder with other names in its files."
    for file in Path(folder).glob("*.safetensors"):
        tensors = {to(n): x for n, x in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return str(folder)


# what versions before 4.52 wrote
LLAVA = [
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
]
QWEN = [("model.language_model.", "model."), ("model.visual.", "visual.")]
BEFORE = {
    "LlavaForConditionalGeneration": LLAVA,
    "LlavaNextForConditionalGeneration": LLAVA,
    "LlavaOnevisionForConditionalGeneration": LLAVA,
    "Mistral3ForConditionalGeneration": LLAVA,
    "Gemma3ForConditionalGeneration": LLAVA,
    "PaliGemmaForConditionalGeneration": LLAVA,
    "Qwen2VLForConditionalGeneration": QWEN,
    "Qwen2_5_VLForConditionalGeneration": QWEN,
}


@pytest.mark.parametrize("cls", BEFORE)
@pytest.mark.parametrize("order", [0, 1], ids=["old first", "new first"])
def test_names_of_versions_before_4_52(tmp_path, cls, order):
    a, b = (made(cls, ALL[cls](), k) for k in (0, 1))
    folders = [saved(tmp_path/n, m, "module") for n, m in zip("ab", (a, b))]
    rewritten(folders[0], lambda n: old(n, BEFORE[cls]))
    assert not {n for n in load(folders[0]) if ".0." in n} & {*load(folders[1])}
    if order:
        folders.reverse()
    merge(folders, out=tmp_path/"o")
    means(tmp_path/"o", cls, a.state_dict(), b.state_dict())


def test_weight_norm_in_both_spellings(tmp_path):
    config = transformers.Wav2Vec2Config(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8, 8],
        conv_kernel=[3, 3],
        conv_stride=[2, 2],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    cls = "Wav2Vec2ForCTC"
    a, b = (made(cls, config, k) for k in (0, 1))
    spelled = ("parametrizations.weight.original0", "weight_g")
    again = ("parametrizations.weight.original1", "weight_v")
    for old_one in (0, 1):
        home = tmp_path/str(old_one)
        folders = [saved(home/n, m, "module") for n, m in zip("ab", (a, b))]
        names = {*load(folders[0])}
        assert any(n.endswith(spelled[0]) for n in names)
        rewritten(folders[old_one], lambda n: n.replace(*spelled).replace(*again))
        merge(folders, out=home/"o")
        parts = [n for n in a.state_dict() if "parametrizations" in n]
        m = means(home/"o", cls, a.state_dict(), b.state_dict(), but=parts)
        # lengths and directions have no means of their own; the weight that they make has
        found, *of_each = (x.wav2vec2.encoder.pos_conv_embed.conv.weight for x in (m, a, b))
        torch.testing.assert_close(found, sum(of_each)/2)


WRAPPED = [
    "module.",
    "_orig_mod.",
    "model.",
    "_fsdp_wrapped_module.",
    "base_model.model.",
    "module._orig_mod.",
    "_forward_module.",
]


@pytest.mark.parametrize("lead", WRAPPED)
@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_wrappers_are_never_written(tmp_path, lead, which):
    cls, config = "LlamaForCausalLM", transformers.LlamaConfig(**TEXT)
    a, b = (made(cls, config, k) for k in (0, 1))
    folders = [saved(tmp_path/n, m, "original") for n, m in zip("ab", (a, b))]
    for i in {"first": [0], "second": [1], "both": [0, 1]}[which]:
        rewritten(folders[i], lambda n: lead + n)
    merge(folders, out=tmp_path/"o")
    means(tmp_path/"o", cls, a.state_dict(), b.state_dict())
    assert {*load(tmp_path/"o")} == {*a.state_dict()}


@pytest.mark.parametrize("lead", ["model.", "net."])
@pytest.mark.parametrize("wrapped", [0, 1])
def test_what_a_trainer_calls_its_model_is_not_written(lead, wrapped):
    a, b = ({"conv.weight": torch.randn(3, 2), "fc.1.weight": torch.randn(2, 2)} for _ in "ab")
    models = [a, b]
    models[wrapped] = {lead + n: x for n, x in models[wrapped].items()}
    out = merge(models).tensors
    assert {*out} == {*a}
    torch.testing.assert_close(out["conv.weight"], (a["conv.weight"] + b["conv.weight"])/2)


TOWERS = {
    "Qwen2_5_VLForConditionalGeneration": ("Qwen2ForCausalLM", "Qwen2Config"),
    "Qwen2VLForConditionalGeneration": ("Qwen2ForCausalLM", "Qwen2Config"),
    "Qwen3VLForConditionalGeneration": ("Qwen3ForCausalLM", "Qwen3Config"),
    "Mistral3ForConditionalGeneration": ("MistralForCausalLM", "MistralConfig"),
    "LlavaForConditionalGeneration": ("LlamaForCausalLM", "LlamaConfig"),
    "Gemma3ForConditionalGeneration": ("Gemma3ForCausalLM", "Gemma3TextConfig"),
}


def in_words(name):
    "What a tensor of a tower is called in the model of text."
    return re.sub(r"^model\.language_model\.", "model.", name)


@pytest.mark.parametrize("cls", TOWERS)
@pytest.mark.parametrize("order", [0, 1], ids=["text second", "text first"])
@pytest.mark.parametrize("layout", ["original", "module"])
def test_a_model_of_text_goes_into_the_tower(tmp_path, cls, order, layout):
    text_cls, text_config = TOWERS[cls]
    whole = made(cls, ALL[cls](), 0)
    config = getattr(transformers, text_config)(**TEXT, tie_word_embeddings=False)
    text = made(text_cls, config, 1)
    folders = [saved(tmp_path/"a", whole, layout), saved(tmp_path/"b", text, "original")]
    if order:
        folders.reverse()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merge(folders, out=tmp_path/"o")
    assert any("is a model of text, and is merged into" in str(w.message) for w in said)
    words = text.state_dict()
    state = whole.state_dict()
    both = {n for n in state if in_words(n) in words}
    assert len(both) == len(words)
    want = {n: (x + words[in_words(n)])/2 if n in both else x for n, x in state.items()}
    means(tmp_path/"o", cls, want)


def test_two_that_see_and_one_of_text(tmp_path):
    cls = "Mistral3ForConditionalGeneration"
    a, b, base = (made(cls, ALL[cls](), k) for k in range(3))
    text = made("MistralForCausalLM", transformers.MistralConfig(**TEXT), 9)
    pairs = [("a", a, "original"), ("t", text, "original"), ("b", b, "module")]
    folders = [saved(tmp_path/n, m, how) for n, m, how in pairs]
    with pytest.warns(UserWarning, match="is a model of text"):
        merge(folders, base=saved(tmp_path/"base", base, "module"), scale=0.5, out=tmp_path/"o")
    s0, s1, s2, words = (m.state_dict() for m in (base, a, b, text))
    want = {}
    for n, x in s0.items():
        others = [s1[n], s2[n]] + [words[k] for k in [in_words(n)] if k in words]
        want[n] = x + 0.5*(sum(others)/len(others) - x)
    means(tmp_path/"o", cls, want)


def test_a_model_of_text_of_another_kind_is_refused(tmp_path):
    whole = made("LlavaForConditionalGeneration", ALL["LlavaForConditionalGeneration"](), 0)
    deeper = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 3})
    text = made("LlamaForCausalLM", deeper, 1)
    folders = [saved(tmp_path/"a", whole, "original"), saved(tmp_path/"b", text, "original")]
    with pytest.raises(MergeError, match="its layers are not those of the part of"):
        merge(folders, out=tmp_path/"o")
    # another architecture altogether is not taken for a tower
    other = made("MistralForCausalLM", transformers.MistralConfig(**TEXT), 1)
    with pytest.raises(MergeError):
        merge([folders[0], saved(tmp_path/"c", other, "original")], out=tmp_path/"o")
    assert not (tmp_path/"o").exists()

def test_what_has_no_place_in_a_tower_is_left_out(tmp_path):
    whole = made("LlavaForConditionalGeneration", ALL["LlavaForConditionalGeneration"](), 0)
    text = made("LlamaForCausalLM", transformers.LlamaConfig(**TEXT), 1)
    folders = [saved(tmp_path/"a", whole, "original"), saved(tmp_path/"b", text, "original")]
    # the value of training by rewards
    file = tmp_path/"b"/"model.safetensors"
    more = {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    for order in (folders, folders[::-1]):
        with pytest.raises(MergeError, match="has no place in .*\n.*--drop") as e:
            merge(order, out=tmp_path/"o")
        assert len(str(e.value).splitlines()) <= 3
    patterns = str(e.value).rpartition("(drop=")[2].partition(", --drop")[0]
    merge(folders, drop=ast.literal_eval(patterns), out=tmp_path/"o")
    found = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path/"o").state_dict()
    ours, theirs = whole.state_dict(), text.state_dict()
    for name, x in found.items():
        # lm_head is called alike
        own = theirs.get(name.replace("model.language_model.", "model."), ours[name])
        torch.testing.assert_close(x, (ours[name] + own)/2, msg=name)

"""Adapters put on bases that are written in another layout than the module's, held to PEFT's own
`merge_and_unload`."""

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")

from test_layouts import EXPERTS, SEEING, TEXT, made, moe_config  # noqa: E402

from safetensors.torch import load_file, save_file  # noqa: E402

from frechet_merge import MergeError, load, merge  # noqa: E402
from frechet_merge.adapters.baking import bake  # noqa: E402

VIT = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    image_size=16, patch_size=4,
)
OTHERS = {
    "ViTForImageClassification": lambda: transformers.ViTConfig(**VIT, num_labels=3),
    "BertForSequenceClassification": lambda: transformers.BertConfig(
        **{k: TEXT[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")},
        num_attention_heads=2, intermediate_size=32, num_labels=3,
    ),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=60
    ),
    "GPTNeoXForCausalLM": lambda: transformers.GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=60,
    ),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=60
    ),
}
KINDS = {
    **SEEING,
    **{cls: (lambda name=name: moe_config(name)) for cls, name in EXPERTS.items()},
    **OTHERS,
}


def adapted(kind, config, seed, **how):
    "A model with an adapter of random numbers on all its linear layers."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"target_modules": "all-linear", "r": 2, "lora_alpha": 4, **how}
        model = peft.get_peft_model(made(kind, config, 0), peft.LoraConfig(**settings))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(0.2*torch.randn(x.shape, generator=g))
    return model.eval()


def state(model):
    return {n: x.double() for n, x in model.state_dict().items() if x.is_floating_point()}


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_on_the_base_as_it_is_saved(kind, tmp_path):
    config = KINDS[kind]()
    made(kind, config, 0).save_pretrained(tmp_path/"base")
    model = adapted(kind, config, 1)
    model.save_pretrained(tmp_path/"a")
    merge([tmp_path/"a"], bake=tmp_path/"base", out=tmp_path/"out")
    cls = getattr(transformers, kind)
    got, info = cls.from_pretrained(tmp_path/"out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    want, got = state(model.merge_and_unload()), state(got)
    before = state(made(kind, config, 0))
    assert want.keys() == got.keys()
    moved = 0
    for name, x in want.items():
        assert torch.allclose(got[name], x, atol=1e-5), name
        moved += not torch.allclose(x, before[name], atol=1e-5)
    assert moved > 3


def test_what_no_update_reaches_is_the_bases_own(tmp_path):
    config = KINDS["Qwen3MoeForCausalLM"]()
    made("Qwen3MoeForCausalLM", config, 0).save_pretrained(tmp_path/"base")
    model = adapted("Qwen3MoeForCausalLM", config, 1, target_parameters=["experts.down_proj"],
                    target_modules=["q_proj"])
    model.save_pretrained(tmp_path/"a")
    base = load(tmp_path/"base")
    full = bake(base, load(tmp_path/"a"))
    assert {*full} == {*base} and any(".experts.0." in n for n in full)
    for name, x in full.lazy.items():
        reached = "down_proj" in name or "q_proj" in name
        assert (x is base.lazy[name]) != reached, name


@pytest.mark.parametrize("spelled", ["mlp.gate", "block_sparse_moe.gate"])
@pytest.mark.parametrize("is_known", [True, False], ids=["with its config", "without"])
def test_a_router_that_was_saved_whole(tmp_path, spelled, is_known):
    "It replaces the base's router, whose file has another name for it, or is refused by name."
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path/"base")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["gate"])
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.5*torch.randn_like(p))
    adapted.save_pretrained(tmp_path/"a")
    file = tmp_path/"a"/"adapter_model.safetensors"
    held = {n.replace("mlp.gate", spelled): x for n, x in load_file(file).items()}
    save_file(held, file, {"format": "pt"})
    if not is_known:
        (tmp_path/"base"/"config.json").unlink()
    if not is_known and spelled == "mlp.gate":
        with pytest.raises(MergeError, match="saved 'model.layers.0.mlp.gate.weight' whole, which"):
            load(f"{tmp_path/'base'}+{tmp_path/'a'}")
        return
    merge([f"{tmp_path/'base'}+{tmp_path/'a'}"], out=tmp_path/"out")
    assert {*load(tmp_path/"out")} == {*load(tmp_path/"base")}
    if is_known:
        found = transformers.MixtralForCausalLM.from_pretrained(tmp_path/"out").eval()
        words = torch.arange(8)[None]
        with torch.no_grad():
            torch.testing.assert_close(found(words).logits, adapted(words).logits)

"""Adapters of experts that are one tensor: what PEFT's `target_parameters` mean here."""

import json
import warnings

import pytest
import torch

from frechet_merge import MergeError, merge
from frechet_merge.adapters.baking import bake
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.files.open import load
from frechet_merge.geometries.lora import LoRA

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=48
)
KINDS = {
    "mixtral": dict(intermediate_size=24, num_local_experts=3, num_experts_per_tok=2),
    "qwen3_moe": dict(
        moe_intermediate_size=12,
        num_experts=3,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        head_dim=8,
    ),
    "olmoe": dict(intermediate_size=12, num_experts=3, num_experts_per_tok=2),
    "gpt_oss": dict(
        intermediate_size=16, num_local_experts=3, num_experts_per_tok=2, head_dim=8,
        layer_types=["full_attention"],
    ),
}


def base_of(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    return transformers.AutoModelForCausalLM.from_config(config)


def adapted(kind, seed, **how):
    "A model with an adapter of random numbers."
    settings = dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_of(kind), peft.LoraConfig(**{**settings, **how}))
    # near each other, so that there is one mean in every geometry
    common, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(0.3*torch.randn(x.shape, generator=common))
                x.add_(0.05*torch.randn(x.shape, generator=own))
    return model.eval()


def full(model):
    "PEFT's own merge, by names of modules."
    return {n: x.double() for n, x in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", ["lora", "lora:metric=mix", "tsvm"])
def test_the_mean_is_one_of_each_expert(kind, geometry, tmp_path):
    for i in range(2):
        adapted(kind, i).save_pretrained(tmp_path/str(i))
    merge([tmp_path/"0", tmp_path/"1"], geometry, out=tmp_path/"out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = full(peft.PeftModel.from_pretrained(base_of(kind), tmp_path/"out"))
    base = {n: x.double() for n, x in base_of(kind).state_dict().items()}
    of_each = [
        full(peft.PeftModel.from_pretrained(base_of(kind), tmp_path/str(i))) for i in range(2)
    ]
    experts = [n for n in base if "experts." in n and base[n].dim() == 3]
    assert len(experts) == 2
    for name in experts:
        for e in range(3):
            updates = [each[name][e] - base[name][e] for each in of_each]
            want = updates_mean(updates, geometry)
            assert torch.allclose(got[name][e] - base[name][e], want, atol=1e-5), (name, e)


def updates_mean(updates, geometry):
    "What an adapter of this update alone is merged to."
    from frechet_merge.algebra.factors import Factors
    from frechet_merge.geometries.registry import geometry_named
    from frechet_merge.spaces.mean import frechet_mean

    def factored(x):
        U, S, Vt = torch.linalg.svd(x)
        return Factors(U[:, :4]*S[:4], Vt[:4])

    g = LoRA.of(geometry_named(geometry))
    chart = g.chart([factored(x) for x in updates])
    f = chart.lift(frechet_mean(chart.space, chart.points, [0.5, 0.5], warn=False).x)
    return f.B @ f.A


@pytest.mark.parametrize("kind", KINDS)
def test_baking_on_a_fused_base_is_pefts_merge(kind, tmp_path):
    model = adapted(kind, 3)
    model.save_pretrained(tmp_path/"a")
    base = from_state_dict(dict(base_of(kind).state_dict()), "base")
    got = bake(base, load(tmp_path/"a"))
    want = full(model)
    for name, x in want.items():
        assert torch.allclose(got[name].double(), x, atol=1e-5), name
    # in ranges that begin and end within an expert
    name = next(n for n in want if n.endswith("gate_up_proj"))
    flat = torch.cat([got.lazy[name].read(i, i + 37) for i in range(0, want[name].numel(), 37)])
    assert torch.allclose(flat.double(), want[name].flatten(), atol=1e-5)


def test_all_linear_means_parameters_of_other_ranks(tmp_path):
    for i in range(2):
        model = adapted("mixtral", i, target_modules="all-linear", target_parameters=None)
        model.save_pretrained(tmp_path/str(i))
    config = json.loads((tmp_path/"0"/"adapter_config.json").read_text())
    assert "gate_up_proj" in config["target_parameters"] and config["rank_pattern"]
    merge([tmp_path/"0", tmp_path/"1"], out=tmp_path/"out")
    of = [
        full(peft.PeftModel.from_pretrained(base_of("mixtral"), tmp_path/n))
        for n in ("0", "1", "out")
    ]
    for name, x in of[2].items():
        assert torch.allclose(x, (of[0][name] + of[1][name])/2, atol=1e-5), name


def test_adapters_of_other_parameters_are_refused(tmp_path):
    adapted("mixtral", 0).save_pretrained(tmp_path/"0")
    one = adapted("mixtral", 1, target_parameters=["mlp.experts.down_proj"])
    one.save_pretrained(tmp_path/"1")
    with pytest.raises(MergeError, match="BASE\\+ADAPTER|was one of them saved"):
        merge([tmp_path/"0", tmp_path/"1"])

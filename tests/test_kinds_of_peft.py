"""Adapters of PEFT that are no update ΔW = s·B·A: each is refused with what can be done, and that
is done here with PEFT, whose adapted model is what the full one is held to."""

import dataclasses

import pytest
import torch
from conftest import LLAMA

from frechet_merge import load, merge
from frechet_merge.adapters.dialects import OF_INPUTS, OF_RUNS, UPDATES
from frechet_merge.messages import MergeError

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TUNERS = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
# what a kind needs for a model of this size
SIZES = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["v_proj"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 4, "r": 0},
    "POLY": {"r": 2, "n_tasks": 3, "n_skills": 2},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"num_vectors": 8, "vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
}
WITH_FULL_MODELS = sorted(
    kind.value
    for kind in TUNERS
    if kind.value not in (*OF_INPUTS, *OF_RUNS, *UPDATES, "TRAINABLE_TOKENS")
)
TOKENS = torch.arange(12).view(2, 6)


def fresh(biases=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, attention_bias=biases)
    return transformers.LlamaForCausalLM(config)


def adapted(kind, folder, biases=False):
    "A base and an adapter of this kind in folders; the adapted model."
    fresh(biases).save_pretrained(folder/"base")
    make = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    asked = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    asked |= SIZES.get(kind, {})
    known = {field.name for field in dataclasses.fields(make)}
    torch.manual_seed(1)
    config = make(**{k: v for k, v in asked.items() if k in known})
    model = peft.get_peft_model(fresh(biases), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p)*0.3)
    model.save_pretrained(folder/"adapter")
    return model.eval()


def refused(folder):
    "What is said of the adapter, alone and on its base."
    with pytest.raises(MergeError) as alone:
        load(folder/"adapter")
    with pytest.raises(MergeError) as based:
        merge([f"{folder/'base'}+{folder/'adapter'}"])
    assert str(alone.value) == str(based.value)
    return str(alone.value)


def put_on(folder):
    "The adapter on its base, as the remedy says."
    base = transformers.LlamaForCausalLM.from_pretrained(folder/"base")
    model = peft.PeftModel.from_pretrained(base, folder/"adapter")
    model.merge_and_unload().save_pretrained(folder/"full")


@pytest.mark.parametrize("kind", WITH_FULL_MODELS)
def test_the_full_model_that_peft_makes_is_the_adapter_and_is_merged(tmp_path, kind):
    # biases are what BEFT trains
    model = adapted(kind, tmp_path, biases=kind == "BEFT")
    said = refused(tmp_path)
    assert kind in said and "merge_and_unload()" in said and "--base" in said
    put_on(tmp_path)
    merge([tmp_path/"full"]*2, base=tmp_path/"base", out=tmp_path/"out")
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path/"out").eval()
    want = model(TOKENS).logits
    assert (want - fresh(kind == "BEFT").eval()(TOKENS).logits).abs().max() > 1e-3
    torch.testing.assert_close(found(TOKENS).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OF_RUNS)
def test_what_peft_cannot_put_on_a_base_has_no_such_remedy(tmp_path, kind):
    adapted(kind, tmp_path)
    said = refused(tmp_path)
    assert kind in said and "no full model" in said and "merge_and_unload" not in said
    with pytest.raises(NotImplementedError):
        put_on(tmp_path)


def test_biases_need_a_base_that_has_some(tmp_path):
    adapted("BEFT", tmp_path)
    assert "if its layers have biases" in refused(tmp_path)
    with pytest.raises(ValueError, match="no bias"):
        put_on(tmp_path)


@pytest.mark.parametrize("kind", sorted({*WITH_FULL_MODELS, *UPDATES, *OF_RUNS}))
def test_a_model_saved_with_peft_around_it_is_refused_and_the_remedies_work(tmp_path, kind):
    "As a trainer leaves it: all tensors of the wrapped model, under PEFT's names."
    model = adapted(kind, tmp_path, biases=kind == "BEFT")
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    with pytest.raises(MergeError) as e:
        merge([state, state])
    assert "no adapter_config.json" in str(e.value) or "its library" in str(e.value) or (
        "merge_and_unload()" in str(e.value) and "save_pretrained" in str(e.value)
    )
    # the adapter alone is read, or has an answer of its own
    if kind in UPDATES:
        merge([tmp_path/"adapter"]*2)
    if kind not in OF_RUNS:
        put_on(tmp_path)
        merge([tmp_path/"full"]*2, base=tmp_path/"base", out=tmp_path/"out")
        found = transformers.LlamaForCausalLM.from_pretrained(tmp_path/"out").eval()
        torch.testing.assert_close(
            found(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_a_prompt_saved_with_its_model(tmp_path, kind):
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    model = peft.get_peft_model(fresh(), config(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(MergeError, match="a soft prompt.*does not touch.*\nThere is no full model"):
        merge([model.state_dict()]*2)

"""A DoRA of PEFT on its base is what `merge_and_unload` makes; two of them have no mean."""

import peft
import pytest
import torch
import transformers

from frechet_merge import LoRA, load, merge
from frechet_merge.messages import MergeError


def model(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)
        return transformers.GPT2LMHeadModel(config)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=40)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def saved(tmp_path, kind, seed=0):
    "A base, an adapter on it, and the model that PEFT makes of both."
    base, place = tmp_path/"base", tmp_path/f"adapter{seed}"
    model(kind).save_pretrained(base)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_dora=True,
        target_modules="all-linear",
        base_model_name_or_path="base",
    )
    adapted = peft.get_peft_model(model(kind), config)
    gen = torch.Generator().manual_seed(seed + 1)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            noise = torch.randn(p.shape, generator=gen)
            p.data = p.data*(1 + 0.2*noise) if "magnitude" in name else 0.3*noise
    adapted.save_pretrained(place)
    return base, place, adapted.merge_and_unload()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_on_its_base_it_is_what_peft_makes(tmp_path, kind):
    base, place, want = saved(tmp_path, kind)
    merge([f"{base}+{place}"], out=tmp_path/"out")
    found = type(want).from_pretrained(tmp_path/"out").state_dict()
    plain, changed = model(kind).state_dict(), 0
    for name, x in want.state_dict().items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(x, plain[name])
    assert changed >= 8


def test_any_range_is_part_of_the_whole(tmp_path):
    base, place, _ = saved(tmp_path, "llama")
    c = load(f"{base}+{place}")
    x = c.lazy["model.layers.0.mlp.up_proj.weight"]
    whole = x.tensor().flatten()
    for i, j in ((0, 5), (7, 40), (300, 384)):
        torch.testing.assert_close(x.read(i, j), whole[i:j])


def test_two_are_merged_on_their_base_only(tmp_path):
    base, one, _ = saved(tmp_path, "llama", 0)
    _, two, _ = saved(tmp_path, "llama", 1)
    with pytest.raises(MergeError, match="BASE[+]ADAPTER") as e:
        merge([one, two], LoRA(), out=tmp_path/"no")
    assert "use_dora" in str(e.value)
    out = merge([f"{base}+{one}", f"{base}+{two}"], base=base, out=tmp_path/"out").tensors
    each = [load(f"{base}+{x}") for x in (one, two)]
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(out[name], (each[0][name] + each[1][name])/2)


def test_without_its_magnitudes_it_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base, place, _ = saved(tmp_path, "llama")
    file = place/"adapter_model.safetensors"
    kept = {n: x for n, x in load_file(file).items() if "magnitude" not in n}
    save_file(kept, file)
    with pytest.raises(MergeError, match="magnitudes"):
        load(f"{base}+{place}")

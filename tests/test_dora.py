"""A DoRA on its base is what its library makes of both; two of them have no mean."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

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


MODULES = {"linear": lambda: torch.nn.Linear(12, 20), "conv": lambda: torch.nn.Conv2d(8, 12, 3)}


class TestLycoris:
    "`dora_scale` beside the updates of a file in kohya's spelling."

    NAMES = {"linear": "mid_block.attentions.0.proj_in", "conv": "mid_block.resnets.0.conv1"}

    def made(self, tmp_path, kind, layer, on_out, seed=0, **more):
        "A UNet's folder of one layer, a file for it, and what LyCORIS makes of both."
        modules = pytest.importorskip("lycoris.modules")
        of = {"loha": modules.LohaModule, "lokr": modules.LokrModule, "locon": modules.LoConModule}
        name = self.NAMES[layer]
        torch.manual_seed(5)
        plain = MODULES[layer]()
        how = dict(lora_dim=2, alpha=1, weight_decompose=True, wd_on_out=on_out, **more)
        flat = f"lora_unet_{name.replace('.', '_')}"
        module = of[kind](flat, plain, 1.0, **how)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, p in module.named_parameters():
                if "org" not in key and p.dim():
                    p.copy_(p*(1 + 0.1*torch.rand(p.shape)) if "dora" in key else
                            0.3*torch.randn(p.shape))
        base = tmp_path/"unet"
        base.mkdir(exist_ok=True)
        state = {f"{name}.{n}": x.detach().clone() for n, x in plain.state_dict().items()}
        save_file(state, base/"diffusion_pytorch_model.safetensors")
        (base/"config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
        file = tmp_path/f"{seed}.safetensors"
        found = module.custom_state_dict().items()
        save_file({f"{flat}.{n}": x.detach().clone().contiguous() for n, x in found}, file)
        # what its forward adds; `get_diff_weight` of products has the scaling twice
        delta = module.get_diff_weight()[0] if kind == "locon" else module.get_weight(module.shape)
        whole = plain.weight + delta.view(plain.weight.shape)
        return base, file, f"{name}.weight", module.apply_weight_decompose(whole).detach()

    @pytest.mark.parametrize("on_out", [True, False])
    @pytest.mark.parametrize("layer", MODULES)
    @pytest.mark.parametrize("kind", ["locon", "loha", "lokr"])
    def test_on_its_base_it_is_what_lycoris_makes(self, tmp_path, kind, layer, on_out):
        base, file, name, want = self.made(tmp_path, kind, layer, on_out)
        found = load(f"{base}+{file}")[name]
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, load(base)[name], rtol=1e-2)

    def test_two_are_merged_on_their_base_only(self, tmp_path):
        base, one, name, a = self.made(tmp_path, "locon", "linear", True, 1)
        _, two, _, b = self.made(tmp_path, "locon", "linear", False, 2)
        with pytest.raises(MergeError, match="is a DoRA.*dora_scale.*\\n.*BASE[+]ADAPTER"):
            merge([one, two], LoRA())
        out = merge([f"{base}+{one}", f"{base}+{two}"], base=base, out=tmp_path/"out").tensors
        torch.testing.assert_close(out[name], (a + b)/2, rtol=1e-5, atol=1e-6)

    def test_lengths_that_do_not_fit_are_named(self, tmp_path):
        base, file, _, _ = self.made(tmp_path, "locon", "linear", True)
        state = load_file(file)
        key = next(k for k in state if "dora" in k)
        save_file({**state, key: torch.ones(3, 1)}, file)
        with pytest.raises(MergeError, match="magnitudes of 'lora_unet_mid_block"):
            load(f"{base}+{file}")


class TestDiffusers:
    "A DoRA as diffusers saves it: with lengths among its tensors, and a word in its header."

    @pytest.mark.parametrize("says", [True, False])
    def test_on_its_base_it_is_what_diffusers_fuses(self, tmp_path, says):
        diffusers = pytest.importorskip("diffusers")
        from test_dialects import flux

        model = flux()
        model.save_pretrained(tmp_path/"transformer")
        config = peft.LoraConfig(
            r=2, lora_alpha=3 if says else 2, use_dora=True, target_modules=["to_q", "proj_mlp"]
        )
        model.add_adapter(config)
        gen = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(p.shape, generator=gen)
                p.data = p.data*(1 + 0.2*noise) if "magnitude" in name else 0.3*noise
        layers = peft.get_peft_model_state_dict(model)
        said = {"transformer_lora_adapter_metadata": config.to_dict()} if says else {}
        diffusers.FluxPipeline.save_lora_weights(
            tmp_path/"a", transformer_lora_layers=layers, **said
        )
        found = load(f"{tmp_path/'transformer'}+{tmp_path/'a'}")
        model.fuse_lora()
        want = model.state_dict()
        name = "single_transformer_blocks.0.{}.weight"
        for module in ("attn.to_q", "proj_mlp", "attn.to_k"):
            stem = f"single_transformer_blocks.0.{module}"
            x = want.get(f"{stem}.base_layer.weight", want.get(name.format(module)))
            torch.testing.assert_close(found[name.format(module)], x, rtol=1e-5, atol=1e-6)
        with pytest.raises(MergeError, match="DoRA.*\\n.*BASE[+]ADAPTER"):
            merge([tmp_path/"a"]*2)

"""A LoRA on the single file of a diffusion model, as most programs for pictures keep one: what
diffusers reads of the result is what it reads of the file, with the update."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from frechet_merge import MergeError, load, merge

pytest.importorskip("diffusers")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))/3


def are_same(found, want):
    for name, x in found.items():
        torch.testing.assert_close(x, want[name], atol=1e-6, rtol=1e-5)


RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
BLOCK = re.compile(
    r"(down|up|mid)_blocks?[.](?:(\d)[.])?"
    r"(attentions|resnets|downsamplers|upsamplers)[.](\d)[.](.+)"
)


def original(name):
    "What the file of Stable Diffusion calls a tensor of diffusers' UNet of two layers a block."
    lead = next((x for x in AROUND if name.startswith(f"{x}.")), None)
    if lead is not None:
        return name.replace(lead, AROUND[lead])
    side, block, kind, layer, rest = BLOCK.fullmatch(name).groups()
    block, layer, is_attention = int(block or 0), int(layer), kind == "attentions"
    if kind == "downsamplers":
        return f"input_blocks.{3*block + 3}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3*block + 2}.{2 if block else 1}.{rest}"
    if kind == "resnets":
        first, _, end = rest.partition(".")
        rest = f"{RESNET[first]}.{end}"
    if side == "mid":
        return f"middle_block.{1 if is_attention else 2*layer}.{rest}"
    number = 3*block + layer + (side == "down")
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(is_attention)}.{rest}"


@pytest.fixture(scope="module")
def unet():
    "A UNet of the shape of Stable Diffusion's."
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )


def flat_lora(stem, weight, seed):
    rows, *inputs = weight.shape
    up = randn(rows, 2, *[1]*(len(inputs) - 1), seed=seed + 50)
    pair = {"lora_down.weight": randn(2, *inputs, seed=seed), "lora_up.weight": up}
    return {f"{stem}.{end}": x for end, x in (pair | {"alpha": torch.tensor(1.0)}).items()}


def moved(state, stem, weight):
    "A weight with the update of a flat name, of rank 2 and alpha 1."
    down, up = (state[f"{stem}.lora_{end}.weight"].flatten(1) for end in ("down", "up"))
    return weight + 0.5*(up @ down).view_as(weight)


class TestSingleFiles:
    ADAPTED = (
        "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q",
        "up_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.1.attentions.2.proj_out",
        "down_blocks.3.resnets.0.conv1",
    )
    TEXT = "text_model.encoder.layers.0.self_attn.q_proj"

    @pytest.mark.parametrize("names", [str, original])
    def test_a_lora_on_a_file_of_stable_diffusion(self, tmp_path, unet, names):
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        state, prefix = unet.state_dict(), "model.diffusion_model."
        text = f"cond_stage_model.transformer.{self.TEXT}.weight"
        file = {prefix + original(n): x.clone() for n, x in state.items()}
        save_file(file | {text: randn(8, 8)}, tmp_path/"model.safetensors")
        lora = flat_lora(f"lora_te_{self.TEXT.replace('.', '_')}", randn(8, 8), 7)
        want = dict(state)
        for i, module in enumerate(self.ADAPTED):
            called = names(f"{module}.weight").removesuffix(".weight")
            stem = "lora_unet_" + called.replace(".", "_")
            weight = state[f"{module}.weight"]
            lora |= flat_lora(stem, weight, i)
            want[f"{module}.weight"] = moved(lora, stem, weight)
        save_file(lora, tmp_path/"lora.safetensors")
        merge([tmp_path/"lora.safetensors"], bake=tmp_path/"model.safetensors", out=tmp_path/"o")
        found = load_file(tmp_path/"o"/"model.safetensors")
        read = convert_ldm_unet_checkpoint(
            {n: x for n, x in found.items() if n.startswith(prefix)}, dict(unet.config)
        )
        are_same(read, want)
        stem = f"lora_te_{self.TEXT.replace('.', '_')}"
        torch.testing.assert_close(found[text], moved(lora, stem, randn(8, 8)))

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize("dotted", [True, False])
    def test_a_lora_on_a_file_of_flux(self, tmp_path, prefix, dotted):
        modules = {"double_blocks.0.img_attn.qkv": (24, 8), "single_blocks.0.linear1": (56, 8)}
        file = {f"{n}.weight": randn(*shape) for n, shape in modules.items()}
        file["img_in.weight"] = randn(8, 4)
        save_file({prefix + n: x for n, x in file.items()}, tmp_path/"model.safetensors")
        lora, want = {}, dict(file)
        for i, n in enumerate(modules):
            stem = f"lora_unet_{n.replace('.', '_')}"
            state = flat_lora(stem, file[f"{n}.weight"], i)
            want[f"{n}.weight"] = moved(state, stem, file[f"{n}.weight"])
            if dotted:
                down, up = state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"]
                stem = f"diffusion_model.{n}"
                state = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": 0.5*up}
            lora |= state
        save_file(lora, tmp_path/"lora.safetensors")
        found = load(f"{tmp_path/'model.safetensors'}+{tmp_path/'lora.safetensors'}")
        are_same({n: found[prefix + n] for n in want}, want)

    def test_a_text_encoder_that_is_fused_is_left_out(self, tmp_path):
        unet = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
        fused = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
        file = {f"model.diffusion_model.{unet}.weight": randn(8, 8), fused: randn(24, 8)}
        save_file(file, tmp_path/"model.safetensors")
        stem = f"lora_unet_{unet.replace('.', '_')}"
        text = flat_lora(f"lora_te2_{self.TEXT.replace('.', '_')}", randn(8, 8), 3)
        lora = flat_lora(stem, randn(8, 8), 1)
        save_file(lora | text, tmp_path/"lora.safetensors")
        models, base = [tmp_path/"lora.safetensors"], tmp_path/"model.safetensors"
        with pytest.raises(MergeError, match="(?s)lora_te2_.*not in .*--drop"):
            merge(models, bake=base)
        found = merge(models, bake=base, drop="lora_te2_*").tensors
        want = moved(lora, stem, file[f"model.diffusion_model.{unet}.weight"])
        torch.testing.assert_close(found[f"model.diffusion_model.{unet}.weight"], want)
        torch.testing.assert_close(found[fused], file[fused])

    @pytest.mark.parametrize("how", ["bake", "plus"])
    def test_what_lies_beside_a_file_is_not_copied(self, tmp_path, how):
        unet = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
        stem = f"lora_unet_{unet.replace('.', '_')}"
        (tmp_path/"models").mkdir()
        base, adapter = tmp_path/"models"/"model.safetensors", tmp_path/"lora.safetensors"
        for name in ("model", "other"):
            state = {f"model.diffusion_model.{unet}.weight": randn(8, 8)}
            save_file(state, base.with_stem(name))
        for name in ("notes.txt", "other.png"):
            (tmp_path/"models"/name).write_text("mine")
        save_file(flat_lora(stem, randn(8, 8), 1), adapter)
        if how == "bake":
            out = merge([adapter], bake=base, out=tmp_path/"out").out
        else:
            out = merge([f"{base}+{adapter}"]*2, out=tmp_path/"out").out
        found = {f.name for f in out.iterdir()}
        assert found == {"README.md", "frechet_merge.json", "model.safetensors"}

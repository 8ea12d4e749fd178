"""The table of original names is what diffusers does, and Flux is written as trainers read it."""

import re

import pytest
import torch
from test_dialects import in_memory, randn

from frechet_merge import LoRA, merge
from frechet_merge.adapters.originals import ORIGINALS, originals
from frechet_merge.merging.convert import convert
from frechet_merge.messages import MergeError

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity(60)
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")


class Generous(dict):
    "A checkpoint that has whatever is asked for."

    def pop(self, key, *default):
        return super().pop(key, *(default or (torch.zeros(12, 1),)))


def name_of(template):
    return template.replace("#", "0")


# model → who converts its checkpoints, and its width
CONVERTERS = {
    "Flux": ("convert_flux_transformer_checkpoint_to_diffusers", 3072),
    "HunyuanVideo": ("convert_hunyuan_video_transformer_to_diffusers", 3072),
    "Stable Diffusion 3": ("convert_sd3_transformer_checkpoint_to_diffusers", 4),
    "Wan": ("convert_wan_transformer_to_diffusers", 4),
    "Z-Image": ("convert_z_image_transformer_checkpoint_to_diffusers", 4),
    "Lumina 2": ("convert_lumina2_to_diffusers", 2304),
    "Cosmos": ("convert_cosmos_transformer_checkpoint_to_diffusers", 4),
    "Krea 2": ("convert_krea2_transformer_checkpoint_to_diffusers", 4),
    "LTX": ("convert_ltx2_transformer_to_diffusers", 4),
}
# what the original checkpoints do not have
ABSENT = r"distilled_guidance|attention\.to_"


def size(name, model, width):
    "Outputs and inputs of a module, in proportions that its model has."
    if name.endswith("qkv"):
        return (3840 if model == "Lumina 2" else 3*width), width
    if name.endswith("linear1"):
        return 7*width, width
    if name.endswith("linear2"):
        return width, 5*width
    if "mlp" in name and name.endswith(("0", "fc1")):
        return 4*width, width
    # in the last of two blocks of Stable Diffusion 3 it is another layer
    return (6 if name.startswith("joint_blocks.0") else 2)*width, width


@pytest.mark.parametrize("model", CONVERTERS)
def test_the_table_says_what_diffusers_does(model):
    how, width = CONVERTERS[model]
    names = [name_of(t) for t in ORIGINALS[model] if not re.search(ABSENT, t)]
    if model == "Stable Diffusion 3":
        names.append("joint_blocks.1.context_block.adaLN_modulation.1")
    sized = [(n, *size(n, model, width)) for n in names]
    state, more = Generous(), {}
    for i, (name, rows, _) in enumerate(sized):
        numbers = i*100_000 + torch.arange(rows).double()
        state[f"{name}.weight"] = numbers.view(-1, 1)
        state[f"{name}.bias"] = torch.zeros(rows)
        more |= {i: name}
    found = getattr(single_file, how)(state)
    want = {}
    for key, x in found.items():
        stem, is_weight, _ = key.rpartition(".weight")
        if is_weight and float(x.max()) > 0:
            i = int(x[0, 0])//100_000
            want[f"transformer.{stem}"] = more[i], tuple((x.flatten() - i*100_000).int().tolist())
    flat = [(f"lora_unet_{n.replace('.', '_')}", *both) for n, *both in sized]
    dotted = [(f"diffusion_model.{n}", *both) for n, *both in sized]
    for asked in (flat, dotted):
        got = originals(asked)
        back = {m: n for (m, *_), n in zip(asked, names)}
        assert {k: (back[m], rows) for k, (m, rows) in got.items()} == want


def pair(stem, ends, m, n, seed, r=2, alpha=None):
    state = {stem + ends[0]: randn(r, n, seed=seed), stem + ends[1]: randn(m, r, seed=seed + 1)}
    return state if alpha is None else {**state, f"{stem}.alpha": torch.tensor(alpha)}


A, DOWN = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")


def read_by_flux(state, x):
    "What diffusers adds to the output of each layer of Flux, of the same input."
    found = diffusers.loaders.FluxLoraLoaderMixin.lora_state_dict(dict(state))
    found = found[0] if isinstance(found, tuple) else found
    stems = {k.split(".lora_")[0] for k in found}
    up, down = ".lora_B.weight", ".lora_A.weight"
    given = {s: x[: found[s + down].shape[1]] for s in stems}
    return {s: found[s + up].double() @ (found[s + down].double() @ given[s]) for s in stems}


H = 3072
OF_FLUX = {
    "transformer_blocks.1.attn.to_q": (H, H),
    "transformer_blocks.1.attn.add_v_proj": (H, H),
    "transformer_blocks.1.ff.net.0.proj": (4*H, H),
    "transformer_blocks.0.ff_context.net.2": (H, 4*H),
    "single_transformer_blocks.2.attn.to_k": (H, H),
    "single_transformer_blocks.2.proj_mlp": (4*H, H),
    "single_transformer_blocks.2.proj_out": (H, 5*H),
    "single_transformer_blocks.2.norm.linear": (3*H, H),
}


def flux(seed, without=()):
    state = {}
    for i, (name, (m, n)) in enumerate(OF_FLUX.items()):
        if name not in without:
            state |= pair(f"transformer.{name}", A, m, n, seed + 10*i)
    return state


class TestFlux:
    def test_is_written_in_the_names_that_its_trainers_read(self):
        x, state = torch.randn(5*H).double(), flux(1)
        out = convert(state, "kohya").tensors
        stems = {k.split(".")[0] for k in out}
        assert stems == {
            "lora_unet_double_blocks_1_img_attn_qkv",
            "lora_unet_double_blocks_1_txt_attn_qkv",
            "lora_unet_double_blocks_1_img_mlp_0",
            "lora_unet_double_blocks_0_txt_mlp_2",
            "lora_unet_single_blocks_2_linear1",
            "lora_unet_single_blocks_2_linear2",
            "lora_unet_single_blocks_2_modulation_lin",
        }
        want, got = read_by_flux(state, x), read_by_flux(out, x)
        assert want.keys() <= got.keys()
        for name, y in got.items():
            # what is in a fused matrix and is not adapted stays as it is
            torch.testing.assert_close(y, want.get(name, 0*y), rtol=1e-4, atol=1e-4)
        back = convert(dict(out), "diffusers").tensors
        for name, y in read_by_flux(back, x).items():
            torch.testing.assert_close(y, want.get(name, 0*y), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("first", [0, 1])
    def test_with_layers_that_the_other_file_lacks(self, first):
        x = torch.randn(5*H).double()
        theirs = pair("lora_unet_double_blocks_1_img_attn_qkv", DOWN, 3*H, H, 1, alpha=1.0)
        ours = flux(50)
        a, b = read_by_flux(theirs, x), read_by_flux(ours, x)
        models = [(theirs, ours), (ours, theirs)][first]
        out = merge(models, LoRA(rank=12)).tensors
        assert ("lora_unet_double_blocks_1_img_mlp_0.alpha" in out) == (first == 0)
        for name, y in read_by_flux(out, x).items():
            want = (a.get(name, 0*y) + b.get(name, 0*y))/2
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


CASES = {
    "wan, one matrix": ("blocks.3.self_attn.q", 8, 8, {"blocks.3.attn1.to_q": 8}),
    "wan, pictures": ("blocks.0.cross_attn.k_img", 8, 8, {"blocks.0.attn2.add_k_proj": 8}),
    "sd3": (
        "joint_blocks.3.x_block.attn2.qkv",
        24,
        8,
        {f"transformer_blocks.3.attn2.to_{x}": 8 for x in "qkv"},
    ),
    "qwen": ("transformer_blocks.2.attn.to_q", 8, 8, {"transformer_blocks.2.attn.to_q": 8}),
    "ltx": ("transformer_blocks.2.attn1.to_q", 8, 8, {"transformer_blocks.2.attn1.to_q": 8}),
    "z-image": (
        "noise_refiner.1.attention.qkv",
        24,
        8,
        {f"noise_refiner.1.attention.to_{x}": 8 for x in "qkv"},
    ),
    "lumina": (
        "context_refiner.1.attention.qkv",
        40,
        24,
        dict(zip((f"context_refiner.1.attn.to_{x}" for x in "qkv"), (24, 8, 8))),
    ),
}


class TestNames:
    @pytest.mark.parametrize("style", ["flat", "comfy", "comfy, down and up", "bare"])
    @pytest.mark.parametrize("case", CASES)
    def test_into_those_of_diffusers(self, case, style):
        name, m, n, want = CASES[case]
        stem = {"flat": f"lora_unet_{name.replace('.', '_')}", "bare": name}
        ends = A if style == "comfy" else DOWN
        stem = stem.get(style, f"diffusion_model.{name}")
        state = pair(stem, ends, m, n, 1, alpha=1.0)
        out = convert(state, "diffusers").tensors
        # no reader of these names looks for a number beside them
        assert not any(key.endswith(".alpha") for key in out)
        found, whole = in_memory(out), in_memory(state)[stem]
        assert [*found] == [f"transformer.{x}" for x in want]
        torch.testing.assert_close(torch.cat([*found.values()]), whole)
        assert [len(x) for x in found.values()] == [*want.values()]

    def test_the_third_text_encoder_is_the_second_of_flux(self):
        text = "encoder.block.0.layer.0.SelfAttention.q"
        te3 = pair(f"lora_te3_{text.replace('.', '_')}", DOWN, 8, 8, 1, alpha=1.0)
        of = {
            "double_blocks_0_img_attn_proj": ("Flux", H),
            "joint_blocks_0_x_block_attn_proj": ("SD 3", 1536),
        }
        for name, (model, width) in of.items():
            state = {**te3, **pair(f"lora_unet_{name}", DOWN, width, width, 5, alpha=1.0)}
            out = in_memory(convert(state, "diffusers").tensors)
            place = "text_encoder_2" if model == "Flux" else "text_encoder_3"
            assert f"{place}.{text}" in out

    def test_what_two_models_have_is_not_guessed(self):
        state = pair("diffusion_model.layers.0.feed_forward.w1", A, 8, 4, 1)
        with pytest.raises(MergeError, match="not known here"):
            convert(state, "diffusers")
        assert len(merge([state, state]).tensors) == 2

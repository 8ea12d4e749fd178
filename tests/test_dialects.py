"""What a file means to diffusers and lycoris is what it means here, in every dialect."""

import json
import warnings
from functools import lru_cache

import pytest
import torch
from conftest import cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from frechet_merge import LoRA, merge
from frechet_merge.adapters.dialects import layers
from frechet_merge.files.open import load
from frechet_merge.messages import MergeError

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def randn(*shape, seed=0):
    return 0.3*torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(xl):
    torch.manual_seed(0)
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    down = (plain, cross, cross) if xl else (cross, plain)
    up = tuple(b.replace("Down", "Up") for b in reversed(down))
    more = dict(
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36,
    )
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(8, 16, 16) if xl else (8, 16),
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        **(more if xl else {}),
    )


def clip(projects=False):
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        projection_dim=12,
        max_position_embeddings=16,
    )
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    return kind(config)


def flux():
    torch.manual_seed(2)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    )


@lru_cache
def pipeline(kind):
    "A tiny pipeline, of which nothing is ever run."
    common = dict(vae=None, text_encoder=clip(), tokenizer=None, scheduler=None)
    if kind == "sdxl":
        more = dict(text_encoder_2=clip(True), tokenizer_2=None, unet=unet(True))
        return diffusers.StableDiffusionXLPipeline(**common, **more)
    if kind == "flux":
        more = dict(text_encoder_2=None, tokenizer_2=None, transformer=flux())
        return diffusers.FluxPipeline(**common, **more)
    return diffusers.StableDiffusionPipeline(
        **common,
        unet=unet(False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def parts_of(pipe):
    return {p: m for p in PARTS if isinstance(m := getattr(pipe, p, None), torch.nn.Module)}


def deltas(kind, file):
    "What diffusers adds to each weight of a pipeline, of a file."
    pipe = pipeline(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(str(file))
    found = {}
    for part, model in parts_of(pipe).items():
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight") and module.active_adapters[0] in module.lora_A:
                delta = module.get_delta_weight(module.active_adapters[0])
                found[f"{part}.{name}"] = delta.detach().double()
    pipe.unload_lora_weights()
    return found


def deltas_names(kind, file):
    return {n.removeprefix("transformer.") for n in deltas(kind, file)}


def close(found, wanted, eps=1e-5):
    assert found.keys() == wanted.keys() and found
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=eps, atol=eps*float(x.abs().max()))


def mean(a, b, wa=0.5, wb=0.5):
    names = dict.fromkeys([*a, *b])
    zero = {n: 0*(a if n in a else b)[n] for n in names}
    return {n: wa*a.get(n, zero[n]) + wb*b.get(n, zero[n]) for n in names}


def modules(kind, parts=PARTS, only=("Linear", "Conv2d")):
    "Name and weight of what an adapter adapts."
    for part, model in parts_of(pipeline(kind)).items():
        for name, module in model.named_modules():
            is_inside = ".attentions." in name or "resnets" in name or "layers." in name
            is_inside = is_inside or "blocks." in name
            if part in parts and is_inside and type(module).__name__ in only:
                yield part, name, module.weight


def pair(weight, r, seed):
    "down and up for a weight."
    m, *inputs = weight.shape
    kernel = (1,)*(len(inputs) - 1)
    return randn(r, *inputs, seed=seed), randn(m, r, *kernel, seed=seed + 1)


LEADS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def in_full(name):
    return name.replace("encoder.layers", "text_model.encoder.layers").replace(
        "text_model.text_model", "text_model"
    )


def kohya(path, kind, seed, r=4, alpha=2.0, rename=str, **kw):
    "A file as kohya's trainers write it."
    state = {}
    for i, (part, name, weight) in enumerate(modules(kind, **kw)):
        flat = rename(LEADS[part] + in_full(name).replace(".", "_"))
        down, up = pair(weight, r, 10*i + seed)
        state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        if alpha is not None:
            state[f"{flat}.alpha"] = torch.tensor(alpha)
    header = {"ss_network_dim": str(r), "ss_network_alpha": str(alpha), "ss_base_model_version": kind}
    tags = {"10_pet": {f"tag {seed}": 3}}
    save_file(state, path, {**header, "ss_tag_frequency": json.dumps(tags), "sshs_model_hash": "1"})
    return path


def dotted(path, kind, seed, r=4, ends=(".lora_A.weight", ".lora_B.weight"), **kw):
    "A file as diffusers writes it."
    state = {}
    for i, (part, name, weight) in enumerate(modules(kind, **kw)):
        down, up = pair(weight, r, 10*i + seed)
        stem = f"{part}.{in_full(name)}"
        state |= {stem + ends[0]: down, stem + ends[1]: up}
    save_file(state, path)
    return path


class TestKohya:
    @pytest.mark.parametrize("kind", ["sd", "sdxl"])
    def test_mean_of_two_files_is_that_of_what_diffusers_loads(self, tmp_path, kind):
        a = kohya(tmp_path/"a.safetensors", kind, 1)
        b = kohya(tmp_path/"b.safetensors", kind, 5000, r=3, alpha=3.0)
        out = merge([a, b], weights=[3, 1], out=tmp_path/"out.safetensors").out
        close(deltas(kind, out), mean(deltas(kind, a), deltas(kind, b), 0.75, 0.25))

    def test_without_alpha_the_scaling_is_1(self, tmp_path):
        a = kohya(tmp_path/"a.safetensors", "sd", 1, alpha=None)
        out = merge([a, a], out=tmp_path/"out.safetensors").out
        close(deltas("sd", out), deltas("sd", a))


class TestDiffusers:
    @pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
    def test_mean_of_two_files_is_that_of_what_diffusers_loads(self, tmp_path, kind):
        a = dotted(tmp_path/"a.safetensors", kind, 1, only=("Linear",))
        b = dotted(tmp_path/"b.safetensors", kind, 5000, r=3, only=("Linear",))
        out = merge([a, b], out=tmp_path/"out.safetensors").out
        close(deltas(kind, out), mean(deltas(kind, a), deltas(kind, b)))


class TestMixed:
    @pytest.mark.parametrize("kind", ["sd", "sdxl"])
    @pytest.mark.parametrize("first", ["kohya", "diffusers"])
    def test_two_dialects_are_lined_up(self, tmp_path, kind, first):
        a = kohya(tmp_path/"a.safetensors", kind, 1)
        b = dotted(tmp_path/"b.safetensors", kind, 5000)
        want = mean(deltas(kind, a), deltas(kind, b))
        models = [a, b] if first == "kohya" else [b, a]
        out = merge(models, out=tmp_path/"out.safetensors").out
        assert (load(out).adapter or {})["dialect"] == first
        close(deltas(kind, out), want)


# the same modules as Stability's original UNet calls them
LDM = [
    ("input_blocks_4_1_", "down_blocks_1_attentions_0_"),
    ("input_blocks_7_1_", "down_blocks_2_attentions_0_"),
    ("middle_block_1_", "mid_block_attentions_0_"),
    ("output_blocks_0_1_", "up_blocks_0_attentions_0_"),
    ("output_blocks_3_1_", "up_blocks_1_attentions_0_"),
]


def ldm(module):
    for theirs, ours in LDM:
        module = module.replace(ours, theirs)
    return module


class TestNames:
    "Two spellings of one layer."

    def files(self, tmp_path):
        "A file in the names of the original UNet, and the same layers in diffusers' names."
        state = {}
        for i, (_, name, weight) in enumerate(modules("sdxl", ("unet",), ("Linear",))):
            flat = ldm("lora_unet_" + name.replace(".", "_"))
            if any(theirs in flat for theirs, _ in LDM):
                down, up = pair(weight, 4, 10*i + 1)
                state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        save_file(state, tmp_path/"ldm.safetensors")
        return tmp_path/"ldm.safetensors", dotted(tmp_path/"b.safetensors", "sdxl", 5000)

    @pytest.mark.parametrize("first", [0, 1])
    def test_of_the_original_unet_and_diffusers(self, tmp_path, first):
        a, b = self.files(tmp_path)
        want = mean(deltas("sdxl", a), deltas("sdxl", b))
        out = merge([(a, b), (b, a)][first], out=tmp_path/"out.safetensors").out
        close(deltas("sdxl", out), want)

    def test_two_files_of_kohya_with_both(self, tmp_path):
        a, _ = self.files(tmp_path)
        b = kohya(tmp_path/"k.safetensors", "sdxl", 5000)
        want = mean(deltas("sdxl", a), deltas("sdxl", b))
        out = merge([a, b], out=tmp_path/"out.safetensors").out
        close(deltas("sdxl", out), want)

    def test_original_names_stay_where_all_have_them(self, tmp_path):
        a, _ = self.files(tmp_path)
        state = {n: 2*x for n, x in load_file(a).items() if "attn1" in n}
        save_file(state, tmp_path/"b.safetensors")
        out = merge([a, tmp_path/"b.safetensors"], out=tmp_path/"out.safetensors").out
        found = {n.split(".")[0] for n in load_file(out)}
        assert found == {n.split(".")[0] for n in load_file(a)}

    def test_older_names_of_diffusers(self, tmp_path):
        a = dotted(tmp_path/"a.safetensors", "sd", 1, only=("Linear",))
        state = {}
        for name, x in load_file(a).items():
            old = name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
            if "text_encoder" in old:
                old = old.replace(".lora.", ".lora_linear_layer.")
            for word in ("to_q", "to_k", "to_v", "to_out.0"):
                new = f"processor.{word.removesuffix('.0')}_lora."
                old = old.replace(f"{word}.lora.", new)
            state[old] = x
        save_file(state, tmp_path/"old.safetensors")
        close(deltas("sd", tmp_path/"old.safetensors"), deltas("sd", a))
        b = kohya(tmp_path/"b.safetensors", "sd", 5000)
        want = mean(deltas("sd", a), deltas("sd", b))
        for models in ([tmp_path/"old.safetensors", b], [b, tmp_path/"old.safetensors"]):
            out = merge(models, out=tmp_path/"out.safetensors").out
            close(deltas("sd", out), want)
            out.unlink()
        same = merge([tmp_path/"old.safetensors"]*2, out=tmp_path/"out.safetensors").out
        assert set(load_file(same)) == set(state)
        close(deltas("sd", same), deltas("sd", a))


FUSED = {"img_attn_qkv": 48, "txt_attn_qkv": 48, "img_mlp_0": 64, "img_attn_proj": 16}


def flux_file(path, seed, lead="lora_unet_double_blocks_0_", dot=False, alpha=2.0):
    "The first block of Flux in the original's names, where three matrices are one."
    state = {}
    for i, (name, m) in enumerate(FUSED.items()):
        stem = lead + name
        if dot:
            stem = f"diffusion_model.double_blocks.0.{name.replace('_', '.', 2)}"
            stem = stem.replace("img.attn", "img_attn").replace("txt.attn", "txt_attn")
            stem = stem.replace("img.mlp", "img_mlp")
        state[f"{stem}.lora_down.weight"] = randn(4, 16, seed=seed + 10*i)
        state[f"{stem}.lora_up.weight"] = randn(m, 4, seed=seed + 10*i + 5)
        if alpha is not None:
            state[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return path


class TestFlux:
    @pytest.mark.parametrize("dot", [False, True], ids=["kohya", "comfy"])
    def test_fused_matrices_stay_fused(self, tmp_path, dot):
        files = [flux_file(tmp_path/f"{s}.safetensors", s, dot=dot) for s in (1, 500)]
        out = merge(files, out=tmp_path/"out.safetensors").out
        assert set(load_file(out)) == set(load_file(files[0]))
        close(deltas("flux", out), mean(*(deltas("flux", f) for f in files)))

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("dot", [False, True], ids=["kohya", "comfy"])
    def test_fused_matrices_and_diffusers(self, tmp_path, dot, first):
        a = flux_file(tmp_path/"a.safetensors", 1, dot=dot)
        b = dotted(tmp_path/"b.safetensors", "flux", 5000, parts=("transformer",))
        inside = {n.split(".lora_")[0] for n in load_file(b)} & {
            f"transformer.{n}" for n in deltas_names("flux", a)
        }
        state = {n: x for n, x in load_file(b).items() if n.split(".lora_")[0] in inside}
        save_file({n: x for n, x in state.items() if "to_k" not in n}, b)
        want = mean(deltas("flux", a), deltas("flux", b))
        out = merge([(a, b), (b, a)][first], out=tmp_path/"out.safetensors").out
        close(deltas("flux", out), want)
        fused = {n for n in load_file(out) if "qkv" in n}
        assert bool(fused) == (first == 0)

    def test_layers_without_a_place_are_named_with_a_way_out(self, tmp_path):
        a = flux_file(tmp_path/"a.safetensors", 1)
        b = dotted(tmp_path/"b.safetensors", "flux", 5000, parts=("transformer",))
        with pytest.raises(MergeError, match="diffusers does not read.*\\n.*--to diffusers"):
            merge([a, b])
        out = merge([a, b], to="diffusers", out=tmp_path/"out.safetensors").out
        close(deltas("flux", out), mean(deltas("flux", a), deltas("flux", b)))

    def test_the_config_in_the_header_scales(self, tmp_path):
        a = dotted(tmp_path/"a.safetensors", "flux", 1, parts=("transformer",))
        state = load_file(a)
        bare = {n.split(".lora_")[0].removeprefix("transformer.") for n in state}
        config = dict(r=4, lora_alpha=8, target_modules=sorted(bare), alpha_pattern={"to_q": 3})
        said = json.dumps({f"transformer.{k}": v for k, v in config.items()})
        save_file(state, a, {"format": "pt", "lora_adapter_metadata": said})
        b = dotted(tmp_path/"b.safetensors", "flux", 5000, r=3, parts=("transformer",))
        out = merge([a, b], out=tmp_path/"out.safetensors").out
        close(deltas("flux", out), mean(deltas("flux", a), deltas("flux", b)))
        with safe_open(out, "pt") as f:
            assert json.loads(f.metadata()["lora_adapter_metadata"])["transformer.r"] == 7

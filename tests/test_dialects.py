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
from frechet_merge.adapters.extract import resize
from frechet_merge.files.open import load
from frechet_merge.merging.convert import convert
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
    header = {"ss_network_dim": str(r), "ss_network_alpha": str(alpha), "sshs_model_hash": "1"}
    header["ss_base_model_version"] = kind
    header["ss_tag_frequency"] = json.dumps({"10_pet": {f"tag {seed}": 3}})
    save_file(state, path, header)
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


def in_memory(state):
    "Updates of an adapter in memory, by module."
    return {n: x.factors().delta() for n, x in layers(load(state))[0].items()}


MODULES = {
    "linear": lambda: torch.nn.Linear(12, 20, bias=False),
    "conv": lambda: torch.nn.Conv2d(8, 12, 3, bias=False),
}


def lycoris_state(kind, layer, seed, **more):
    "What LyCORIS saves of one module, its state dict, and the update that it makes of it."
    modules = pytest.importorskip("lycoris.modules")
    torch.manual_seed(seed)
    of = {"loha": modules.LohaModule, "lokr": modules.LokrModule, "locon": modules.LoConModule}
    module = of[kind]("lora_unet_q", MODULES[layer](), 1.0, **more)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() and "org" not in str(p):
                p.copy_(0.5*torch.randn(p.shape))
    state = {f"lora_unet_q.{n}": x.detach().clone() for n, x in module.custom_state_dict().items()}
    # what its forward adds; `get_diff_weight` of products has the scaling twice
    delta = module.get_diff_weight()[0] if kind == "locon" else module.get_weight(module.shape)
    return state, delta.detach().double().flatten(1)


class TestLycoris:
    @pytest.mark.parametrize(
        "kind, layer, more",
        [
            ("locon", "linear", dict(lora_dim=3, alpha=2)),
            ("locon", "conv", dict(lora_dim=3, alpha=2)),
            ("locon", "conv", dict(lora_dim=3, alpha=2, use_tucker=True)),
            ("loha", "linear", dict(lora_dim=3, alpha=2)),
            ("loha", "linear", dict(lora_dim=3, alpha=2, rs_lora=True)),
            ("loha", "conv", dict(lora_dim=3, alpha=2)),
            ("loha", "conv", dict(lora_dim=3, alpha=2, use_tucker=True)),
            ("lokr", "linear", dict(lora_dim=2, alpha=1)),
            ("lokr", "linear", dict(lora_dim=2, alpha=1, decompose_both=True, factor=4)),
            ("lokr", "linear", dict(lora_dim=10000, alpha=1)),
            ("lokr", "conv", dict(lora_dim=1, alpha=1)),
            ("lokr", "conv", dict(lora_dim=1, alpha=1, use_tucker=True)),
            ("lokr", "conv", dict(lora_dim=10000, alpha=1)),
        ],
        ids=str,
    )
    def test_updates_are_those_that_it_makes(self, kind, layer, more):
        state, delta = lycoris_state(kind, layer, 0, **more)
        close(in_memory(state), {"lora_unet_q": delta})

    @pytest.mark.parametrize("kind", ["loha", "lokr"])
    def test_products_are_merged_with_a_lora(self, kind):
        product, delta = lycoris_state(kind, "linear", 0, lora_dim=2, alpha=1)
        lora, other = lycoris_state("locon", "linear", 1, lora_dim=3, alpha=2)
        for models in ([product, lora], [lora, product]):
            out = merge(models).tensors
            assert {n.rpartition(".lora_")[2] for n in out} >= {"up.weight", "down.weight"}
            close(in_memory(out), {"lora_unet_q": (delta + other)/2})

    def test_what_is_cut_is_said(self):
        product, delta = lycoris_state("loha", "linear", 0, lora_dim=3, alpha=2)
        with pytest.warns(UserWarning, match="cut to rank 2, by which at most .* is lost"):
            out = in_memory(merge([product], LoRA(rank=2)).tensors)["lora_unet_q"]
        U, S, Vh = torch.linalg.svd(delta)
        torch.testing.assert_close(out, (U[:, :2]*S[:2]) @ Vh[:2], rtol=1e-5, atol=1e-6)

    def test_a_whole_difference_is_an_update(self):
        state = {"lora_unet_q.diff": randn(4, 6), "lora_unet_q.diff_b": randn(4)}
        out = merge([state, {n: 3*x for n, x in state.items()}]).tensors
        close(in_memory(out), {"lora_unet_q": 2*state["lora_unet_q.diff"].double()})
        torch.testing.assert_close(out["lora_unet_q.diff_b"], 2*state["lora_unet_q.diff_b"])


class TestPeft:
    "Adapters of PEFT that are no LoRA, and names that training left."

    def model(self):
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"q": torch.nn.Linear(12, 20), "c": torch.nn.Conv2d(4, 6, 3)})

    def saved(self, folder, config, seed):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(self.model(), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(0.5*torch.randn(p.shape))
        model.save_pretrained(folder)
        return {
            n.removeprefix("base_model.model."): m.get_delta_weight("default").double().flatten(1)
            for n, m in model.named_modules()
            if hasattr(m, "get_delta_weight")
        }

    @pytest.mark.parametrize(
        "kind, more",
        [
            ("LoHaConfig", dict(r=3, alpha=2, target_modules=["q"])),
            ("LoKrConfig", dict(r=2, alpha=3, target_modules=["q"])),
            ("LoKrConfig", dict(r=2, alpha=3, target_modules=["q"], decompose_both=True)),
            ("LoKrConfig", dict(r=64, alpha=3, target_modules=["q"])),
            ("LoHaConfig", dict(r=3, alpha=2, target_modules=["c"], use_effective_conv2d=True)),
            ("AdaLoraConfig", dict(init_r=4, target_r=2, lora_alpha=3, total_step=9)),
        ],
        ids=str,
    )
    def test_other_updates_are_those_that_peft_adds(self, tmp_path, kind, more):
        peft = pytest.importorskip("peft")
        config = getattr(peft, kind)(**{"target_modules": ["q"], **more})
        want = self.saved(tmp_path/"a", config, 1)
        lora = self.saved(tmp_path/"b", peft.LoraConfig(r=2, target_modules=["q"]), 2)
        close({n: x.factors().delta() for n, x in layers(load(tmp_path/"a"))[0].items()}, want)
        if "q" not in want:
            return
        out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"out").out
        model = peft.PeftModel.from_pretrained(self.model(), str(out))
        found = model.base_model.model["q"].get_delta_weight("default").detach().double()
        torch.testing.assert_close(found, (want["q"] + lora["q"])/2, rtol=1e-5, atol=1e-5)

    def test_directions_that_adalora_has_dropped(self, tmp_path):
        peft = pytest.importorskip("peft")

        def plain():
            torch.manual_seed(0)
            return torch.nn.ModuleDict({"q": torch.nn.Linear(12, 20), "p": torch.nn.Linear(4, 6)})

        how = dict(init_r=4, target_r=2, lora_alpha=3, total_step=9, target_modules=["q", "p"])
        model = peft.get_peft_model(plain(), peft.AdaLoraConfig(**how))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(0.5*torch.randn(p.shape))
        masks = {"q": [True, False, True, False], "p": [False]*4}
        left = {f"{name}.lora_E": mask for name, mask in masks.items()}
        model.peft_config["default"].rank_pattern = left
        model.save_pretrained(tmp_path/"a")
        again = peft.PeftModel.from_pretrained(plain(), str(tmp_path/"a"))
        want = again.base_model.model["q"].get_delta_weight("default").detach().double()
        found = layers(load(tmp_path/"a"))[0]
        close({n: x.factors().delta() for n, x in found.items()}, {"q": want})
        assert found["q"].rank == 2

    def test_what_zero_3_did_not_gather_is_named(self, tmp_path):
        peft = pytest.importorskip("peft")
        self.saved(tmp_path/"a", peft.LoraConfig(r=2, target_modules=["q"]), 1)
        file = tmp_path/"a"/"adapter_model.safetensors"
        state = {n: torch.empty(0) if "lora_B" in n else x for n, x in load_file(file).items()}
        save_file(state, file)
        with pytest.raises(MergeError, match="q.lora_B.weight' without a number in it.*ZeRO-3"):
            merge([tmp_path/"a"])


def mlx(folder, seed, r=3, scale=20.0):
    folder.mkdir()
    state = {}
    for i in range(2):
        name = f"model.layers.{i}.self_attn.q_proj"
        state[f"{name}.lora_a"] = randn(6, r, seed=seed + 2*i)
        state[f"{name}.lora_b"] = randn(r, 4, seed=seed + 2*i + 1)
    save_file(state, folder/"adapters.safetensors")
    said = {"rank": r, "scale": scale, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": said}
    (folder/"adapter_config.json").write_text(json.dumps(config))
    return folder


def mlx_deltas(folder):
    "y = x·W + scale·(x·a)·b, and so the update of W is transposed."
    state = load_file(folder/"adapters.safetensors")
    config = json.loads((folder/"adapter_config.json").read_text())["lora_parameters"]
    found = {}
    for name, a in state.items():
        if name.endswith(".lora_a"):
            assert a.shape[1] == config["rank"]
            b = state[name.removesuffix("a") + "b"]
            delta = config["scale"]*(a.double() @ b.double()).mT
            found[name.removesuffix(".lora_a")] = delta
    return found


class TestMlx:
    def test_mean_of_two_folders(self, tmp_path):
        a, b = mlx(tmp_path/"a", 1), mlx(tmp_path/"b", 50, r=2, scale=3.0)
        out = merge([a, b], out=tmp_path/"out").out
        close(mlx_deltas(out), mean(mlx_deltas(a), mlx_deltas(b)))

    def test_into_peft_and_back(self, tmp_path):
        a = mlx(tmp_path/"a", 1)
        out = convert(a, "peft", tmp_path/"peft").out
        found = {n: x.factors().delta() for n, x in layers(load(out))[0].items()}
        close(found, mlx_deltas(a))
        back = convert(out, "mlx", tmp_path/"back").out
        close(mlx_deltas(back), mlx_deltas(a))

    def test_without_its_config_nothing_is_guessed(self, tmp_path):
        a = mlx(tmp_path/"a", 1)
        (a/"adapter_config.json").unlink()
        with pytest.raises(MergeError, match="has no scale in the adapter_config.json"):
            merge([a])

    def test_with_peft(self, tmp_path):
        a = mlx(tmp_path/"a", 1)
        b = convert(mlx(tmp_path/"b", 50), "peft", tmp_path/"peft").out
        out = merge([a, b], out=tmp_path/"out").out
        close(mlx_deltas(out), mean(mlx_deltas(a), mlx_deltas(tmp_path/"b")))


def turned(state, seed, ends, transposed=False):
    "The same updates, in a gauge of condition 1000."
    found = dict(state)
    g = torch.Generator().manual_seed(seed)
    for name in state:
        if not name.endswith(ends[0]):
            continue
        other = name.removesuffix(ends[0]) + ends[1]
        A, B = state[name].double(), state[other].double()
        r = A.shape[-1] if transposed else A.shape[0]
        Q, _ = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.double))
        M = Q*torch.logspace(0, 3, r, dtype=torch.double)
        inverse = torch.linalg.inv(M)
        if transposed:
            A, B = A @ M, inverse @ B
        else:
            A = (M @ A.flatten(1)).view(A.shape)
            B = (B.flatten(1) @ inverse).view(B.shape)
        found[name], found[other] = A.to(state[name].dtype), B.to(state[name].dtype)
    return found


GAUGES = {
    "peft": ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"),
    "kohya": ("lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight"),
    "diffusers": ("unet.q.lora_A.weight", "unet.q.lora_B.weight"),
    "older diffusers": ("unet.q.lora.down.weight", "unet.q.lora.up.weight"),
    "comfy": ("diffusion_model.q.lora_down.weight", "diffusion_model.q.lora_up.weight"),
    "mlx": ("q.lora_a", "q.lora_b"),
    "torchtune": ("q.lora_a.weight", "q.lora_b.weight"),
}


class TestGauges:
    "The numbers of the factors are not what is merged, whatever they are called."

    @pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
    @pytest.mark.parametrize("dialect", GAUGES)
    def test_move_no_merge(self, tmp_path, dialect, dtype, eps):
        ends, moved = GAUGES[dialect], []
        config = dict(peft_type="LORA", r=4, lora_alpha=4, target_modules=["q"])
        if dialect == "mlx":
            config = dict(lora_parameters=dict(rank=4, scale=1.0))
        for k, gauge in enumerate((None, None, 1, 2)):
            A, B = randn(4, 12, seed=k % 2).to(dtype), randn(10, 4, seed=9 + k % 2).to(dtype)
            is_mlx = dialect == "mlx"
            pair = (A.mT.contiguous(), B.mT.contiguous()) if is_mlx else (A, B)
            state = dict(zip(ends, pair))
            if gauge is not None:
                state = turned(state, gauge, ends, is_mlx)
            folder = tmp_path/str(k)
            folder.mkdir()
            save_file(state, folder/"adapter_model.safetensors")
            if dialect in ("peft", "mlx", "torchtune"):
                (folder/"adapter_config.json").write_text(json.dumps(config))
            moved.append(folder)
        plain = merge(moved[:2], out=tmp_path/"plain").out
        gauged = merge(moved[2:], out=tmp_path/"gauged").out
        x, y = (layers(load(out))[0] for out in (plain, gauged))
        for name in x:
            a, b = x[name].factors().delta(), y[name].factors().delta()
            assert float((a - b).norm()/a.norm()) <= eps


class TestConvert:
    @pytest.mark.parametrize("kind", ["sd", "sdxl"])
    def test_between_kohya_and_diffusers(self, tmp_path, kind):
        a = kohya(tmp_path/"a.safetensors", kind, 1)
        there = convert(a, "diffusers", tmp_path/"b.safetensors").out
        close(deltas(kind, there), deltas(kind, a))
        back = convert(there, "kohya", tmp_path/"c.safetensors").out
        close(deltas(kind, back), deltas(kind, a))
        # the input factors are the same numbers
        found, first = load_file(back), load_file(a)
        for name, x in first.items():
            if "lora_down" in name and "_te1_" not in name:
                assert torch.equal(found[name], x)

    def test_of_one_part_into_peft(self, tmp_path):
        peft = pytest.importorskip("peft")
        a = kohya(tmp_path/"a.safetensors", "sd", 1, parts=("unet",))
        want = deltas("sd", a)
        out = convert(a, "peft", tmp_path/"peft").out
        model = peft.PeftModel.from_pretrained(unet(False), str(out))
        found = {
            "unet." + n.removeprefix("base_model.model."): m.get_delta_weight("default").double()
            for n, m in model.named_modules()
            if hasattr(m, "get_delta_weight")
        }
        close({n: x.detach() for n, x in found.items()}, want)
        again = convert(out, "kohya", tmp_path/"k.safetensors").out
        close(deltas("sd", again), want)

    def test_of_two_parts_into_peft_is_refused_with_a_way_out(self, tmp_path):
        a = kohya(tmp_path/"a.safetensors", "sd", 1)
        code, _, err = cli("convert", a, "--to", "peft", "-o", tmp_path/"out")
        assert code == 1 and "is of text_encoder, unet" in err and "--to diffusers" in err
        out = tmp_path/"out.safetensors"
        code, said, err = cli("convert", a, "--to", "diffusers", "-o", out)
        assert code == 0, err
        close(deltas("sd", out), deltas("sd", a))

    def test_a_rank_says_what_it_costs(self, tmp_path):
        a = kohya(tmp_path/"a.safetensors", "sd", 1, parts=("text_encoder",))
        with pytest.warns(UserWarning, match="12 of 12 layers are cut to rank 2, and lose"):
            out = convert(a, "kohya", tmp_path/"b.safetensors", rank=2).out
        assert {x.shape[0] for n, x in load_file(out).items() if "down" in n} == {2}


class TestHeaders:
    def test_are_true_of_what_is_written(self, tmp_path):
        a = kohya(tmp_path/"a.safetensors", "sd", 1, parts=("text_encoder",))
        b = kohya(tmp_path/"b.safetensors", "sd", 2, r=3, parts=("text_encoder",))
        out = merge([a, b], out=tmp_path/"out.safetensors").out
        with safe_open(out, "pt") as f:
            said = f.metadata()
        ranks = {x.shape[0] for n, x in load_file(out).items() if "lora_down" in n}
        alphas = {float(x) for n, x in load_file(out).items() if n.endswith(".alpha")}
        assert said["ss_network_dim"] == str(*ranks) and said["ss_network_alpha"] == "7"
        assert alphas == {7.0} and said["ss_base_model_version"] == "sd"
        assert json.loads(said["ss_tag_frequency"]) == {"10_pet": {"tag 1": 3, "tag 2": 3}}
        assert "sshs_model_hash" not in said
        made_of = json.loads(said["frechet_merge"])
        assert made_of["models"] == ["a.safetensors", "b.safetensors"]

    def test_a_folder_gets_the_usual_file(self, tmp_path):
        a = dotted(tmp_path/"a.safetensors", "sd", 1, parts=("text_encoder",))
        out = merge([a], out=tmp_path/"out").out
        assert (out/"pytorch_lora_weights.safetensors").is_file()
        assert not (out/"adapter_config.json").exists()
        close(deltas("sd", out), deltas("sd", a))


class TestRefusals:
    def refuse(self, state, says, tmp_path):
        save_file(state, tmp_path/"x.safetensors")
        code, _, err = cli("merge", "x.safetensors", "x.safetensors", "-o", "o", cwd=tmp_path)
        assert code == 1 and says in err and len(err.splitlines()) <= 3, err
        assert not (tmp_path/"o").exists()

    kohya = {"lora_te_q.lora_down.weight": randn(2, 4), "lora_te_q.lora_up.weight": randn(5, 2)}

    @pytest.mark.parametrize(
        "more, says",
        [
            ({"lora_te_q.dora_scale": randn(5)}, "DoRA"),
            ({"lora_te_n.w_norm": randn(5)}, "'lora_te_n.w_norm'"),
            ({"lora_te_k.oft_blocks": randn(2, 2, 2)}, "OFT"),
            ({"lora_te_k.lora_down.weight": randn(2, 4)}, "lora_te_k.lora_down.weight"),
            ({"unet.k.lora_A.weight": randn(2, 4)}, "in two spellings"),
            ({"text_model.embeddings.weight": randn(2, 4)}, "'text_model.embeddings.weight'"),
            ({"lora_te_q.lokr_w1": randn(2, 2)}, "parts of two kinds"),
        ],
        ids=str,
    )
    def test_name_what_is_no_update(self, tmp_path, more, says):
        self.refuse({**self.kohya, **more}, says, tmp_path)

    def test_a_strange_name_can_be_left_out(self, tmp_path):
        state = {**self.kohya, "lora_te_n.w_norm": randn(5)}
        with pytest.raises(MergeError, match="drop="):
            merge([state, state])
        assert len(merge([state, state], drop=["lora_te_n.w_norm"]).tensors) == 3

    def test_a_config_beside_alphas_can_be_moved_away(self, tmp_path):
        name = "transformer.transformer_blocks.0.attn.to_q"
        state = {f"{name}.lora_A.weight": randn(2, 4), f"{name}.lora_B.weight": randn(5, 2)}
        save_file({**state, f"{name}.alpha": torch.tensor(1.0)}, tmp_path/"x.safetensors")
        config = dict(peft_type="LORA", r=2, lora_alpha=2, target_modules=["to_q"])
        (tmp_path/"adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(MergeError, match="alpha.*\n.*Move adapter_config.json away|Move"):
            merge([tmp_path/"x.safetensors"])
        (tmp_path/"adapter_config.json").rename(tmp_path/"away.json")
        found = in_memory(merge([tmp_path/"x.safetensors"]).tensors)[name]
        want = 0.5*state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        torch.testing.assert_close(found, want.double(), rtol=1e-5, atol=1e-6)

    def test_peft_without_its_config_stays_refused(self):
        state = {"model.q.lora_A.weight": randn(2, 4), "model.q.lora_B.weight": randn(5, 2)}
        with pytest.raises(MergeError, match="no adapter_config.json"):
            merge([state, state])


def updates_of(name, ends, seed=0, alpha=None):
    state = {name + ends[0]: randn(2, 8, seed=seed), name + ends[1]: randn(8, 2, seed=seed + 1)}
    return state if alpha is None else {**state, f"{name}.alpha": torch.tensor(alpha)}


class TestOtherPipelines:
    "Names of other models than those that are small enough to be loaded here."

    A, DOWN = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")

    @pytest.mark.parametrize("first", [0, 1])
    def test_wan_of_comfy_and_diffusers(self, first):
        pairs = [("blocks.0.self_attn.q", "blocks.0.attn1.to_q")]
        pairs.append(("blocks.0.ffn.0", "blocks.0.ffn.net.0.proj"))
        comfy, ours = {}, {}
        for i, (theirs, name) in enumerate(pairs):
            comfy |= updates_of(f"diffusion_model.{theirs}", self.A, 10*i)
            ours |= updates_of(f"transformer.{name}", self.A, 10*i + 5)
        models = [(comfy, ours), (ours, comfy)][first]
        found = in_memory(merge(models).tensors)
        assert found.keys() == in_memory(models[0]).keys()
        for x, a, b in zip(found.values(), *(in_memory(m).values() for m in models)):
            torch.testing.assert_close(x, (a + b)/2, rtol=1e-5, atol=1e-6)

    def test_qwen_without_a_prefix_and_diffusers(self):
        name = "transformer_blocks.0.img_mlp.net.2"
        theirs = updates_of(name, self.DOWN, 1, 1.0)
        ours = updates_of(f"transformer.{name}", self.A)
        found = in_memory(merge([theirs, ours]).tensors)
        want = (in_memory(theirs)[name] + in_memory(ours)[f"transformer.{name}"])/2
        close(found, {name: want})

    def test_a_flat_name_that_nobody_knows_is_not_guessed(self):
        theirs = updates_of("lora_unet_joint_blocks_0_x_block_attn_qkv", self.DOWN, 1, 1.0)
        ours = updates_of("transformer.transformer_blocks.0.attn.to_q", self.A)
        with pytest.raises(MergeError, match="x_block_attn_qkv.*not known.*\\n.*attn.to_q'"):
            merge([theirs, ours])
        assert len(merge([theirs, theirs]).tensors) == 3

    def test_into_the_spelling_of_diffusers(self):
        state = updates_of("diffusion_model.double_blocks.0.img_mlp.0", self.DOWN, 1, 1.0)
        found = in_memory(convert(state, "diffusers").tensors)
        want = in_memory(state)["diffusion_model.double_blocks.0.img_mlp.0"]
        close(found, {"transformer.transformer_blocks.0.ff.net.0.proj": want})

    # three matrices in one, and the first of a pair, which Flux.2 cuts in another way
    BFL = {"img_attn.qkv": 48, "img_mlp.0": 64}

    @pytest.mark.parametrize("first", [0, 1])
    def test_flux_of_comfy_with_factors_as_peft_names_them(self, first):
        theirs, ours, want = {}, {}, {}
        for i, (name, m) in enumerate(self.BFL.items()):
            stem = f"diffusion_model.double_blocks.0.{name}"
            theirs[f"{stem}.lora_A.weight"] = randn(4, 16, seed=i)
            theirs[f"{stem}.lora_B.weight"] = randn(m, 4, seed=i + 5)
        lead = "transformer.transformer_blocks.0"
        for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "ff.net.0.proj")):
            m = 64 if "ff" in name else 16
            ours[f"{lead}.{name}.lora_A.weight"] = randn(3, 16, seed=i + 20)
            ours[f"{lead}.{name}.lora_B.weight"] = randn(m, 3, seed=i + 30)
        a, b = in_memory(theirs), in_memory(ours)
        qkv = torch.cat([b[f"{lead}.attn.to_{x}"] for x in "qkv"])
        stem = "diffusion_model.double_blocks.0"
        fused = (a[f"{stem}.img_attn.qkv"] + qkv)/2
        want[f"{stem}.img_attn.qkv"] = fused
        want[f"{stem}.img_mlp.0"] = (a[f"{stem}.img_mlp.0"] + b[f"{lead}.ff.net.0.proj"])/2
        if first:
            parts = zip("qkv", fused.split(16))
            ff = want[f"{stem}.img_mlp.0"]
            want = {f"{lead}.attn.to_{x}": part for x, part in parts}
            want[f"{lead}.ff.net.0.proj"] = ff
        models = [(theirs, ours), (ours, theirs)][first]
        close(in_memory(merge(models, LoRA(rank=16)).tensors), want)

    def test_flux_2_is_no_flux(self):
        state = updates_of("diffusion_model.double_blocks.0.img_mlp.0", self.A)
        state["diffusion_model.double_blocks.0.img_mlp.0.lora_B.weight"] = randn(48, 2)
        found = in_memory(convert(state, "diffusers").tensors)
        assert [*found] == ["transformer.transformer_blocks.0.ff.linear_in"]

    def test_text_encoders_without_their_last_projection(self):
        names = [f"lora_te{i}_text_model_encoder_layers_0_self_attn_q_proj" for i in (1, 2)]
        state = {k: x for n in names for k, x in updates_of(n, self.DOWN, 1, 1.0).items()}
        found = in_memory(convert(state, "diffusers").tensors)
        inside = "text_model.encoder.layers.0.self_attn.q_proj"
        assert {*found} == {f"text_encoder.{inside}", f"text_encoder_2.{inside}"}

    def test_a_norm_beside_the_updates_is_named_and_can_be_left_out(self):
        state = updates_of("diffusion_model.blocks.0.self_attn.q", self.DOWN, 1, 1.0)
        more = {"diffusion_model.blocks.0.self_attn.norm_q.diff": randn(8)}
        with pytest.raises(MergeError, match="whole vector.*norm_q") as said:
            merge([{**state, **more}]*2)
        drop = str(said.value).partition("drop='")[2].partition("'")[0]
        close(in_memory(merge([{**state, **more}]*2, drop=[drop]).tensors), in_memory(state))

    @pytest.mark.parametrize("pattern", ["unet.up_blocks.*", "up_blocks.*", "text_encoder.*"])
    def test_blocks_are_meant_in_flat_names_too(self, pattern):
        up = "lora_unet_up_blocks_0_attentions_0_proj_in"
        te = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
        meant = te if "text" in pattern else up

        def made(seed):
            names = (up, te, te.replace("te1", "te2"))
            return {k: x for n in names for k, x in updates_of(n, self.DOWN, seed, 1.0).items()}

        a, b = made(1), made(7)
        found = in_memory(merge([a, b], LoRA(rank=4), weights={pattern: [1, 0]}).tensors)
        for name, x in found.items():
            u, v = in_memory(a)[name], in_memory(b)[name]
            torch.testing.assert_close(x, u if name == meant else (u + v)/2, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("first", [0, 1])
    def test_a_kernel_of_1_is_a_linear_layer(self, first):
        name = "lora_unet_mid_block_attentions_0_proj_in"
        flat = updates_of(name, self.DOWN, 1, 1.0)
        conv = updates_of(name, self.DOWN, 5, 1.0)
        conv = {k: x[..., None, None] if x.dim() else x for k, x in conv.items()}
        models = [(flat, conv), (conv, flat)][first]
        found = merge(models, LoRA(rank=4)).tensors
        down = f"{name}.lora_down.weight"
        assert found[down].dim() == models[0][down].dim()
        want = sum(in_memory(m)[name].flatten(1) for m in models)/2
        close({name: in_memory(found)[name].flatten(1)}, {name: want})


class TestResize:
    @pytest.mark.parametrize("asked", [{"rank": 2}, {"energy": 0.9}])
    def test_a_file_of_kohya_keeps_its_spelling_and_the_best_updates(self, tmp_path, asked):
        a = kohya(tmp_path/"a.safetensors", "sd", 1, r=6)
        found = resize(a, **asked, out=tmp_path/"out.safetensors")
        assert set(load_file(found.out)) == set(load_file(a))
        before, after = deltas("sd", a), deltas("sd", found.out)
        errors = []
        for name, x in before.items():
            S = torch.linalg.svdvals(x.flatten(1).double())
            near = after[name].flatten(1).double()
            errors.append(float((near - x.flatten(1)).norm()/x.norm()))
            r = int(torch.linalg.matrix_rank(near, atol=1e-5*float(S[0])))
            best = float((S[r:].square().sum()/S.square().sum()).sqrt())
            assert r <= asked.get("rank", 6) and errors[-1] <= best*1.001 + 1e-5
        if "energy" in asked:
            assert max(errors)**2 <= 0.1 + 1e-6
        said = sorted(k.error for k in found.kept.values())
        assert sorted(errors) == pytest.approx(said, abs=1e-4)

    def test_a_folder_of_mlx(self, tmp_path):
        a = mlx(tmp_path/"a", 1)
        found = resize(a, 2, out=tmp_path/"out")
        for name, x in mlx_deltas(tmp_path/"out").items():
            U, S, V = torch.linalg.svd(mlx_deltas(tmp_path/"a")[name].double())
            torch.testing.assert_close(x.double(), U[:, :2]*S[:2] @ V[:2], rtol=1e-4, atol=1e-5)
        assert {k.rank for k in found.kept.values()} == {2}

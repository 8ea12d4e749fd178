"""Files as other programs write them: merged as their readers see them, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from frechet_merge import LoRA, merge
from frechet_merge.merging.convert import convert
from frechet_merge.messages import MergeError

pytest.importorskip("diffusers")

KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
X_LABS = (".down.weight", ".up.weight")
DIFFSYNTH = (".lora_A.default.weight", ".lora_B.default.weight")


def randn(*shape, seed=0):
    return 0.3*torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(modules, ends, seed=0, r=3, alpha=None):
    "A file of a LoRA; `modules` has the rows and inputs of each."
    state = {}
    for i, (name, (m, n)) in enumerate(modules.items()):
        state[name + ends[0]] = randn(r, n, seed=seed + 10*i)
        state[name + ends[1]] = randn(m, r, seed=seed + 10*i + 5)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(float(alpha))
    return state


def delta(state, name):
    "The update of a module as ComfyUI reads it."
    for down, up in (KOHYA, PEFT, X_LABS, DIFFSYNTH):
        if name + down in state:
            A, B = state[name + down].double(), state[name + up].double()
            alpha = float(state.get(f"{name}.alpha", torch.tensor(float(len(A)))))
            return alpha/len(A)*B @ A
    raise KeyError(name)


def close(x, y, eps=1e-5):
    torch.testing.assert_close(x.double(), y.double(), rtol=eps, atol=eps*float(y.abs().max()))


def save(state, path):
    save_file({k: x.contiguous() for k, x in state.items()}, path)
    return path


def weights(out):
    files = [out] if out.is_file() else out.glob("*.safetensors")
    return {k: x for file in files for k, x in load_file(file).items()}


class TestFactorsInOtherWords:
    "The mean of factors is no factor of the mean: none is taken for weights of a model."

    CASES = [
        {"unet:0:up": randn(8, 2), "unet:0:down": randn(2, 8)},
        {
            "decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight": randn(2, 8),
            "decoder.layers.0.mlp.linear_fc1.adapter.linear_out.weight": randn(8, 2),
        },
        {
            "model.layers.0.adapter_layer.lora_kqv_adapter.linear_in.weight": randn(2, 8),
            "model.layers.0.adapter_layer.lora_kqv_adapter.linear_out.weight": randn(8, 2),
        },
        {
            "language_model.layers.0.q_proj.A": randn(8, 2),
            "language_model.layers.0.q_proj.B": randn(2, 8),
        },
    ]

    @pytest.mark.parametrize("state", CASES, ids=lambda state: next(iter(state)))
    def test_are_refused_with_what_is_left(self, tmp_path, state):
        file = save(state, tmp_path/"x.safetensors")
        with pytest.raises(MergeError, match="by its library alone.\\n.*on its base"):
            merge([file, file])

    def test_beside_a_config_of_mlx(self, tmp_path):
        save(self.CASES[-1], tmp_path/"adapters.safetensors")
        (tmp_path/"adapter_config.json").write_text(json.dumps({"rank": 2, "alpha": 4}))
        with pytest.raises(MergeError, match="by its library alone"):
            merge([tmp_path, tmp_path])

    def test_matrices_of_a_model_may_be_called_so(self):
        state = {"ssm.A": randn(4, 2), "ssm.B": randn(2, 4), "norm.weight": randn(4)}
        assert merge([state, state]).tensors.keys() == state.keys()

    def test_whole_layers_of_mlx_are_called_so(self, tmp_path):
        save({"model.layers.0.q_proj.weight": randn(8, 8)}, tmp_path/"adapters.safetensors")
        said = json.dumps({"fine_tune_type": "full", "num_layers": 1})
        (tmp_path/"adapter_config.json").write_text(said)
        with pytest.raises(MergeError, match="fine_tune_type = 'full'.*whole.*\\n.*on its base"):
            merge([tmp_path, tmp_path])


WIDE = 3072


class TestTwoTrainers:
    "One layer under the names of two trainers in one dialect."

    def both(self, first, second, names):
        a, b = lora(first, KOHYA, 1, alpha=1), lora(second, KOHYA, 500, alpha=3)
        found = merge([a, b], LoRA(rank=6)).tensors
        assert {n.partition(".")[0] for n in found} == {*first}
        for ours, theirs in names.items():
            close(delta(found, ours), (delta(a, ours) + delta(b, theirs))/2)

    KOHYAS = {
        "lora_unet_double_blocks_0_img_mlp_0": (4*WIDE, WIDE),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (24, 8),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (8, 8),
    }
    ONE_TRAINERS = {
        "lora_transformer_transformer_blocks_0_ff_net_0_proj": (4*WIDE, WIDE),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (24, 8),
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q": (8, 8),
    }

    @pytest.mark.parametrize("first", [0, 1])
    def test_flux_with_its_second_text_encoder(self, first):
        two = [self.KOHYAS, self.ONE_TRAINERS]
        names = [*zip(*two)]
        self.both(two[first], two[1 - first], {x[first]: x[1 - first] for x in names})

    @pytest.mark.parametrize("lead", ["lora_unet_", "lora_transformer_"])
    def test_names_that_differ_in_what_is_in_front(self, lead):
        rest = "mid_block_attentions_0_proj_in" if "unet" in lead else "layers_3_attention_to_q"
        ours, theirs = {f"lycoris_{rest}": (8, 8)}, {f"{lead}{rest}": (8, 8)}
        self.both(ours, theirs, {f"lycoris_{rest}": f"{lead}{rest}"})

    def test_of_a_part_that_no_two_share_it_is_said(self):
        text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (24, 8)}
        a = lora({**text, "lora_unet_strange_0_q": (8, 8)}, KOHYA, 1, alpha=1)
        b = lora({**text, "lora_unet_other_0_query": (8, 8)}, KOHYA, 2, alpha=1)
        with pytest.warns(UserWarning, match="no layer of the denoiser.*strange.*other"):
            merge([a, b])


    @pytest.mark.parametrize("names", [("wan_HighNoise", "wan_low_noise"), ("v1_high", "v2_high")])
    def test_of_files_for_two_denoisers_it_is_said(self, tmp_path, names, recwarn):
        layers = {"lora_unet_blocks_0_self_attn_q": (8, 8)}
        paths = [tmp_path/f"{name}.safetensors" for name in names]
        for i, path in enumerate(paths):
            save_file(lora(layers, KOHYA, i, alpha=1), path)
        merge(paths)
        said = [str(w.message) for w in recwarn if "high and of low noise" in str(w.message)]
        assert len(said) == ("Noise" in names[0])


class TestNamesWithoutALead:
    "Adapters of diffusion models whose names say it by their attention alone."

    Z_IMAGE = {"layers.0.attention.to_q": (8, 8), "layers.0.feed_forward.w1": (16, 8)}

    @pytest.mark.parametrize("ends", [PEFT, DIFFSYNTH], ids=["plain", "diffsynth"])
    def test_z_image(self, ends):
        a, b = lora(self.Z_IMAGE, ends, 1), lora(self.Z_IMAGE, ends, 50)
        found = merge([a, b], LoRA(rank=6)).tensors
        for name in self.Z_IMAGE:
            close(delta(found, name), (delta(a, name) + delta(b, name))/2)

    def test_with_the_same_of_comfy(self):
        a = lora(self.Z_IMAGE, DIFFSYNTH, 1)
        b = lora({f"diffusion_model.{n}": x for n, x in self.Z_IMAGE.items()}, PEFT, 50)
        found = merge([a, b], LoRA(rank=6)).tensors
        for name in self.Z_IMAGE:
            both = delta(a, name) + delta(b, f"diffusion_model.{name}")
            close(delta(found, name), both/2)

    def test_hunyuan_of_its_first_trainers(self):
        names = {"transformer.double_blocks.0.img_attn_qkv": (24, 8)}
        a, b = lora(names, PEFT, 1), lora(names, PEFT, 50)
        found = merge([a, b], LoRA(rank=6)).tensors
        close(delta(found, *names), (delta(a, *names) + delta(b, *names))/2)

    def test_of_peft_without_its_config_stay_refused(self):
        names = {"base_model.model.layers.0.attention.to_q": (8, 8)}
        with pytest.raises(MergeError, match="no adapter_config.json"):
            merge([lora(names, PEFT, 1), lora(names, PEFT, 2)])


FLUX = {
    "double_blocks.0.img_attn.qkv": (24, 8),
    "double_blocks.0.img_attn.proj": (8, 8),
    "double_blocks.0.img_mlp.0": (32, 8),
    "single_blocks.0.linear1": (56, 8),
}
# the first block in diffusers' names, one row of which is a third of the fused matrix
APART = {
    **{f"transformer_blocks.0.attn.to_{x}": (8, 8) for x in "qkv"},
    "transformer_blocks.0.attn.to_out.0": (8, 8),
    "transformer_blocks.0.ff.net.0.proj": (32, 8),
}


class TestOntoAFile:
    "An adapter on the file of a model, which has the names of the original."

    def baked(self, tmp_path, base, adapter):
        files = save(base, tmp_path/"base.safetensors"), save(adapter, tmp_path/"a.safetensors")
        found = weights(merge(["+".join(map(str, files))], out=tmp_path/"out", dtype="fp32").out)
        assert found.keys() == base.keys()
        return {n.removesuffix(".weight"): x - base[n] for n, x in found.items()}

    def base(self, modules, lead=""):
        return {f"{lead}{n}.weight": randn(*s, seed=9) for n, s in modules.items()}

    @pytest.mark.parametrize("lead", ["", "model.diffusion_model."])
    @pytest.mark.parametrize("how", ["diffusers", "onetrainer", "lycoris"])
    def test_flux_in_the_names_of_diffusers(self, tmp_path, lead, how):
        style = {
            "diffusers": (lambda n: f"transformer.{n}", PEFT, None),
            "onetrainer": (lambda n: "lora_transformer_" + n.replace(".", "_"), KOHYA, 1),
            "lycoris": (lambda n: "lycoris_" + n.replace(".", "_"), KOHYA, 1),
        }
        rename, ends, alpha = style[how]
        adapter = lora({rename(n): s for n, s in APART.items()}, ends, 1, alpha=alpha)
        found = self.baked(tmp_path, self.base(FLUX, lead), adapter)
        apart = {n: delta(adapter, rename(n)) for n in APART}
        qkv = torch.cat([apart[f"transformer_blocks.0.attn.to_{x}"] for x in "qkv"])
        close(found[f"{lead}double_blocks.0.img_attn.qkv"], qkv, 1e-4)
        close(
            found[f"{lead}double_blocks.0.img_attn.proj"],
            apart["transformer_blocks.0.attn.to_out.0"],
            1e-4,
        )
        assert not found[f"{lead}single_blocks.0.linear1"].any()

    @pytest.mark.parametrize("lead", ["", "model.diffusion_model."])
    def test_flux_of_x_labs(self, tmp_path, lead):
        names = {"qkv_lora1": "img_attn.qkv", "proj_lora1": "img_attn.proj"}
        stem = "double_blocks.0."
        modules = {f"{stem}processor.{n}": FLUX[stem + x] for n, x in names.items()}
        adapter = lora(modules, X_LABS, 1)
        found = self.baked(tmp_path, self.base(FLUX, lead), adapter)
        for theirs, ours in names.items():
            close(found[f"{lead}{stem}{ours}"], delta(adapter, f"{stem}processor.{theirs}"), 1e-4)

    OTHERS = {
        "wan": ({"blocks.0.self_attn.q": (8, 8), "blocks.0.ffn.0": (16, 8)}, "blocks.0.attn1.to_q"),
        "qwen": ({"transformer_blocks.0.attn.to_q": (8, 8)}, "transformer_blocks.0.attn.to_q"),
        "z-image": ({"layers.0.attention.to_q": (8, 8)}, "layers.0.attention.to_q"),
    }

    @pytest.mark.parametrize("lead", ["", "model.diffusion_model."])
    @pytest.mark.parametrize("model", OTHERS)
    def test_flat_names_and_those_of_diffusers(self, tmp_path, lead, model):
        modules, dotted = self.OTHERS[model]
        base = self.base(modules, lead)
        flat = {"lora_unet_" + n.replace(".", "_"): s for n, s in modules.items()}
        adapter = lora(flat, KOHYA, 1, alpha=1)
        found = self.baked(tmp_path, base, adapter)
        for name, x in found.items():
            stem = "lora_unet_" + name.removeprefix(lead).replace(".", "_")
            close(x, delta(adapter, stem), 1e-4)
        adapter = lora({f"transformer.{dotted}": (8, 8)}, PEFT, 1)
        (tmp_path/"more").mkdir()
        found = self.baked(tmp_path/"more", base, adapter)
        close(found[f"{lead}{next(iter(modules))}"], delta(adapter, f"transformer.{dotted}"), 1e-4)


class TestWhatIsNoWeight:
    def test_numbers_of_positions_are_not_averaged(self, tmp_path):
        files = []
        for i, odd in enumerate((5.0, 4.0)):
            numbers = torch.arange(8.0)
            numbers[5] = odd
            state = {"text_model.embeddings.position_ids": numbers[None], "w": randn(4, 4, seed=i)}
            files.append(save(state, tmp_path/f"{i}.safetensors"))
        with pytest.warns(UserWarning, match="position_ids: is computed and not trained"):
            found = weights(merge(files, out=tmp_path/"out").out)
        assert found["text_model.embeddings.position_ids"][0].tolist() == [*range(8)]

    @pytest.mark.parametrize("first", [0, 1])
    def test_a_model_of_velocity_is_no_model_of_noise(self, tmp_path, first):
        plain = {"model.diffusion_model.q.weight": randn(4, 4)}
        marked = {**plain, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
        states = [marked, plain] if first else [plain, marked]
        files = [save(x, tmp_path/f"{i}.safetensors") for i, x in enumerate(states)]
        with pytest.raises(MergeError, match="velocity.*renormalise"):
            merge(files)
        found = weights(merge(files, absent="renormalise", out=tmp_path/"out").out)
        assert found.keys() == marked.keys()


def listed(said):
    "The patterns that an error offers."
    found = str(said.value).partition("drop=")[2].partition("]")[0]
    return json.loads(found.replace("'", '"') + "]")


class TestLeftovers:
    MODULE = "lora_unet_mid_block_attentions_0_proj_in"

    def state(self, **more):
        parts = {f"{self.MODULE}.{k}": x for k, x in more.items()}
        return {**lora({self.MODULE: (8, 8)}, KOHYA, 1, alpha=1), **parts}

    @pytest.mark.parametrize("part", ["scalar", "scale", "bias_values", "set_weight"])
    def test_what_an_update_is_not_without_is_not_to_be_left_out(self, part):
        state = self.state(**{part: randn(1)})
        with pytest.raises(MergeError, match=f"{part}.*\\n.*on its base") as said:
            merge([state, state])
        assert "drop" not in str(said.value)

    def test_several_can_be_left_out_at_once(self):
        more = {f"bundle_emb.<v1.0>.{x}": randn(2, 4) for x in ("clip_l", "clip_g", "t5", "t5_out")}
        state = {**self.state(), **more}
        with pytest.raises(MergeError, match="bundle_emb") as said:
            merge([state, state])
        drop = str(said.value).partition("drop='")[2].partition("'")[0]
        assert merge([state, state], drop=[drop]).tensors.keys() == self.state().keys()

        state = self.state(w_norm=randn(8), b_norm=randn(8))
        with pytest.raises(MergeError, match="_norm") as said:
            merge([state, state])
        drop = listed(said)
        assert merge([state, state], drop=drop).tensors.keys() == self.state().keys()

    @pytest.mark.parametrize("lead", ["diffusion_model.blocks.{}.", "lora_unet_blocks_{}_"])
    def test_vectors_of_all_blocks_can_be_left_out_at_once(self, lead):
        names = [lead.format(i) + "ffn" for i in range(3)]
        state = lora({n: (8, 8) for n in names}, KOHYA, 1, alpha=1)
        state |= {f"{n}.diff_b": randn(8) for n in names}
        ends = ("norm3.diff", "norm3.diff_b", "norm_q.diff", "norm_k.diff")
        vectors = {lead.format(i) + end: randn(8) for i in range(3) for end in ends}
        vectors[lead.format(0) + "q.diff_b"] = randn(8)
        with pytest.raises(MergeError, match="vectors") as said:
            merge([{**state, **vectors}]*2)
        drop = listed(said)
        assert merge([{**state, **vectors}]*2, drop=drop).tensors.keys() == state.keys()


def test_an_embedding_of_mlx_is_no_embedding_of_peft(tmp_path):
    state = {"model.embed_tokens.lora_a": randn(20, 2), "model.embed_tokens.lora_b": randn(2, 8)}
    save(state, tmp_path/"adapters.safetensors")
    said = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0, "rank": 2}}
    (tmp_path/"adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(MergeError, match="embed_tokens.*\\n.*BASE\\+ADAPTER"):
        convert(tmp_path, "peft")
    (tmp_path/"b").mkdir()
    base = save({"model.embed_tokens.weight": randn(20, 8)}, tmp_path/"b"/"model.safetensors")
    found = weights(merge([f"{base}+{tmp_path}"], out=tmp_path/"out").out)
    want = randn(20, 8) + 2*state["model.embed_tokens.lora_a"] @ state["model.embed_tokens.lora_b"]
    close(found["model.embed_tokens.weight"], want)


def test_a_word_for_another_kind_of_lora_is_not_passed_over(tmp_path):
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save(lora({module: (8, 8)}, PEFT, 1), tmp_path/"adapter_model.safetensors")
    said = dict(peft_type="LORA", r=3, lora_alpha=3, target_modules=["q_proj"])
    config = tmp_path/"adapter_config.json"
    config.write_text(json.dumps({**said, "use_something": True}))
    with pytest.raises(MergeError, match="use_something.*\\n.*merge_and_unload"):
        merge([tmp_path, tmp_path])
    config.write_text(json.dumps({**said, "use_something": False, "use_rslora": True}))
    assert merge([tmp_path, tmp_path]).tensors


class TestFlatNamesOfDiffusers:
    "A loader that takes them for another model's makes names that no model has."

    NAMES = (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.add_q_proj",
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.0.ff.net.0.proj",
        "single_transformer_blocks.1.attn.to_q",
        "single_transformer_blocks.1.proj_mlp",
    )

    @pytest.mark.parametrize("lead", ["lora_unet_", "lora_transformer_", "lycoris_"])
    @pytest.mark.parametrize("few", [2, 3, 4, 5, 6])
    def test_have_one_reading(self, lead, few):
        names = self.NAMES[-few:]
        state = lora({lead + n.replace(".", "_"): (8, 8) for n in names}, KOHYA, 1, alpha=2)
        found = convert(state, "diffusers").tensors
        for name in names:
            flat = lead + name.replace(".", "_")
            close(delta(found, f"transformer.{name}"), delta(state, flat))
        assert len(found) == 2*few


class TestLeavingOutOnABase:
    "What an error offers to leave out is left out of BASE+ADAPTER, too."

    BASE = {"double_blocks.0.img_attn.proj.weight": randn(8, 8, seed=9)}
    NAME = "transformer.transformer_blocks.0.attn.to_out.0"
    TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"

    def test_a_part_that_the_base_has_not(self, tmp_path):
        state = lora({self.NAME: (8, 8), self.TEXT: (16, 8)}, PEFT, 1)
        (tmp_path/"base").mkdir()
        base = save(self.BASE, tmp_path/"base"/"model.safetensors")
        model = f"{base}+{save(state, tmp_path/'a.safetensors')}"
        with pytest.raises(MergeError, match="fc1.*\\n.*drop='text_encoder.") as said:
            merge([model, model])
        drop = str(said.value).partition("drop='")[2].partition("'")[0]
        found = weights(merge([model, model], drop=[drop], out=tmp_path/"out").out)
        for name, x in self.BASE.items():
            close(found[name] - x, delta(state, self.NAME), 1e-4)
        with pytest.raises(ValueError, match="no model has a tensor"):
            merge([model, model], drop=[drop, "nothing.*"])


class TestModelsWithoutATable:
    "Two spellings of a model that nobody has a table for differ in their dots alone."

    DOTS = {f"diffusion_model.blocks.{i}.self_attn.q_proj": (8, 8) for i in range(2)}

    @pytest.mark.parametrize("first", [0, 1])
    def test_kohya_and_comfy(self, first):
        flat = {n: "lora_unet_" + n.split(".", 1)[1].replace(".", "_") for n in self.DOTS}
        a = lora(self.DOTS, PEFT, 1)
        b = lora(dict.fromkeys(flat.values(), (8, 8)), KOHYA, 5, alpha=1)
        found = merge([(a, b), (b, a)][first], LoRA(rank=6)).tensors
        for ours, theirs in flat.items():
            both = delta(a, ours) + delta(b, theirs)
            close(delta(found, (ours, theirs)[first]), both/2)

    def test_a_layer_that_the_first_has_not_is_named(self):
        flat = {"lora_unet_blocks_0_self_attn_q_proj": (8, 8), "lora_unet_blocks_7_strange": (8, 8)}
        with pytest.raises(MergeError, match="is not known"):
            merge([lora(self.DOTS, PEFT, 1), lora(flat, KOHYA, 5, alpha=1)])


class TestInFront:
    "The same layers, with what a trainer leaves in front of their names or within them."

    # loader of diffusers → names of the model that it trained on, and of diffusers
    MODELS = {
        "QwenImage": ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
        "LTXVideo": ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q"),
        "LTX2": ("adaln_single.linear", "time_embed.linear"),
        "Anima": ("blocks.0.self_attn.output_proj", "transformer_blocks.0.attn1.to_out.0"),
        "Krea2": ("blocks.0.attn.gate", "transformer_blocks.0.attn.to_gate"),
        "Flux2": ("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"),
        "Wan": ("blocks.0.self_attn.q", "blocks.0.attn1.to_q"),
    }
    # more of it, by which the model is known
    BESIDE = {
        "LTX2": {"transformer_blocks.0.audio_attn1.to_q": "transformer_blocks.0.audio_attn1.to_q"},
        "Krea2": {"blocks.0.attn.wq": "transformer_blocks.0.attn.to_q"},
        "Flux2": {
            "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.linear_in",
            "single_blocks.0.linear2": "single_transformer_blocks.0.attn.to_out",
        },
    }
    WAYS = {
        "comfy": ("diffusion_model.", PEFT, 0),
        "peft": ("base_model.model.", PEFT, 0),
        "diffsynth": ("", DIFFSYNTH, 0),
        "kohya": ("lora_unet_", KOHYA, 0),
        "diffusers": ("transformer.", PEFT, 1),
    }

    def modules(self, model, way):
        names = dict([self.MODELS[model]]) | self.BESIDE.get(model, {})
        lead, ends, of_diffusers = self.WAYS[way]
        result = {}
        for both in names.items():
            stem = both[of_diffusers].replace(".", "_" if way == "kohya" else ".")
            result[lead + stem] = (48, 8) if "mlp.0" in both[0] else (8, 8)
        return result, ends

    @pytest.mark.parametrize("second", WAYS)
    @pytest.mark.parametrize("first", WAYS)
    @pytest.mark.parametrize("model", MODELS)
    def test_they_are_one_layer_and_keep_the_first_ones_names(self, model, first, second):
        (ours, ends), (theirs, others) = self.modules(model, first), self.modules(model, second)
        alphas = [1 if way == "kohya" else None for way in (first, second)]
        a, b = lora(ours, ends, 1, alpha=alphas[0]), lora(theirs, others, 500, alpha=alphas[1])
        found = merge([a, b], LoRA(rank=6)).tensors
        assert {*found} == {*a}
        for one, other in zip(ours, theirs):
            close(delta(found, one), (delta(a, one) + delta(b, other))/2)

    @pytest.mark.parametrize("model, way", [
        ("QwenImage", "diffsynth"), ("Flux2", "peft"), ("Krea2", "peft"), ("Anima", "comfy"),
    ])
    def test_diffusers_reads_what_it_read_before(self, model, way):
        import diffusers

        def read(state):
            loader = getattr(diffusers.loaders, f"{model}LoraLoaderMixin")
            found = loader.lora_state_dict(dict(state))
            found = found[0] if isinstance(found, tuple) else found
            stems = {n.partition(".lora_")[0] for n in found}
            return {stem: delta(found, stem) for stem in stems}

        modules, ends = self.modules(model, way)
        a, b = lora(modules, ends, 1), lora(modules, ends, 500)
        found = read(merge([a, b], LoRA(rank=6)).tensors)
        one, other = read(a), read(b)
        assert found.keys() == one.keys() and all(n.startswith("transformer.") for n in found)
        for name, x in found.items():
            close(x, (one[name] + other[name])/2)

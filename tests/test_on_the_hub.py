"""Full models as they lie on the hub: what only a few programs write, and what their remedies do.

The oracle is the library that reads the result, or the plain mean.
"""

import json
import warnings

import pytest
import torch
from conftest import save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from frechet_merge import MergeError, load, merge
from frechet_merge.matching.function import unlike

ONE = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16)
TEXT = dict(**ONE, vocab_size=30)
IMAGE = dict(**ONE, image_size=8, patch_size=4)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(folder, kind, config, seed=0):
    "A model of random numbers, saved, and its numbers."
    torch.manual_seed(seed)
    model = kind(config)
    model.save_pretrained(folder)
    return model.state_dict()


def opened(kind, folder):
    "The numbers that transformers or diffusers finds, none of them missing or left over."
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.state_dict()


def are_means(found, a, b):
    return all(torch.allclose(x, (a[n] + b[n])/2, atol=1e-6) for n, x in found.items())


class TestBesideTheWeights:
    STEP = "policy_preprocessor_step_3_normalizer_processor.safetensors"

    @pytest.mark.parametrize("are_alike", [True, False])
    def test_what_a_policy_of_lerobot_scales_by(self, tmp_path, are_alike):
        step = {"registry_name": "normalizer_processor", "state_file": self.STEP}
        for i, n in enumerate("ab"):
            folder = save(tmp_path/n, {"w": randn(2, seed=i)}, {"type": "act"})
            (folder/"policy_preprocessor.json").write_text(json.dumps({"steps": [step]}))
            spread = torch.ones(3)*(1 if are_alike else i)
            save_file({"observation.state.std": spread}, folder/self.STEP)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
        said = " ".join(str(w.message) for w in heard)
        assert "left behind" not in said and ("are scaled by" in said) != are_alike
        # the file that policy_preprocessor.json names
        assert (tmp_path/"o"/self.STEP).read_bytes() == (tmp_path/"a"/self.STEP).read_bytes()

    @pytest.mark.parametrize(
        "theirs", ['{"vae": {}}', '{"vae":{}}\n', '{"vae": {"timestep": true}}', "{", None]
    )
    def test_the_config_in_the_header_of_a_model_of_videos(self, tmp_path, theirs):
        ours = '{"vae": {}}'
        for n, text in (("a", ours), ("b", theirs)):
            said = {} if text is None else {"config": text}
            save_file({"w": torch.ones(2)}, tmp_path/f"{n}.safetensors", said)
        files = [tmp_path/f"{n}.safetensors" for n in "ab"]
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            out = merge(files, out=tmp_path/"o").out
        is_told = any("configs in their headers" in str(w.message) for w in heard)
        assert is_told == (theirs is not None and "".join(theirs.split()) != '{"vae":{}}')
        assert safe_open(out/"model.safetensors", "pt").metadata()["config"] == ours
        merge(files[::-1], out=tmp_path/"p")
        found = safe_open(tmp_path/"p"/"model.safetensors", "pt").metadata()
        assert found["config"] == (theirs or ours)

    @pytest.mark.parametrize("order", ["ab", "ba"])
    def test_the_config_in_a_header_beside_a_pickle(self, tmp_path, order):
        save_file({"w": torch.ones(2)}, tmp_path/"a.safetensors", {"config": "{}"})
        torch.save({"w": torch.ones(2)}, tmp_path/"b.ckpt")
        files = {"a": tmp_path/"a.safetensors", "b": tmp_path/"b.ckpt"}
        merge([files[n] for n in order], out=tmp_path/"o", allow_pickle=True)
        assert safe_open(tmp_path/"o"/"model.safetensors", "pt").metadata()["config"] == "{}"

    @pytest.mark.parametrize(
        "file, ours, theirs, key",
        [
            ("video_preprocessor_config.json", {"image_mean": [0.5]}, {"image_mean": [0.4]}, "im"),
            ("preprocessor_config.json", {"merge_size": 2}, {"merge_size": 1}, "merge_size"),
            (
                "config_sentence_transformers.json",
                {"do_query_expansion": True},
                {"do_query_expansion": False},
                "do_query_expansion",
            ),
        ],
    )
    def test_what_is_done_with_inputs(self, tmp_path, file, ours, theirs, key):
        for n, held in (("a", ours), ("b", theirs)):
            save(tmp_path/n, {"w": torch.ones(2)}, {"model_type": "own"})
            (tmp_path/n/file).write_text(json.dumps(held))
        assert key in unlike([load(tmp_path/n) for n in "ab"])[0]

    @pytest.mark.parametrize(
        "file, held",
        [
            ("config.json", {"architecture": "vit", "model_args": {"depth": 1}}),
            ("open_clip_config.json", {"model_cfg": {"embed_dim": 8}}),
            ("open_clip_config.json", {"model_cfg": {"custom_text": True}}),
        ],
    )
    def test_a_file_without_a_config_says_nothing_else(self, tmp_path, file, held):
        for n in "ab":
            save(tmp_path/n, {"w": torch.ones(2)})
        (tmp_path/"a"/file).write_text(json.dumps(held))
        assert unlike([load(tmp_path/"a"), load(tmp_path/"b")]) == []
        if "model_cfg" in held and "custom_text" in held["model_cfg"]:
            (tmp_path/"b"/file).write_text(json.dumps({"model_cfg": {}}))
            assert unlike([load(tmp_path/"a"), load(tmp_path/"b")]) == []


    def test_numbered_weights_that_are_not_of_mlx_are_named(self, tmp_path):
        for i, n in enumerate("ab"):
            folder = save(tmp_path/n, {"w": randn(2, seed=i)}, {"model_type": "own"})
            save_file({"w": randn(2)}, folder/"1_model.safetensors")
        with pytest.warns(UserWarning, match="a: 1_model.safetensors left behind"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")


class TestCounts:
    "Whole numbers that training leaves among the weights."

    @pytest.mark.parametrize("name", ["step", "queue_ptr", "ema.num_updates", "train_metric.total"])
    def test_of_the_first_are_kept(self, name):
        # as ema_pytorch, MoCo and torchmetrics write them
        models = [{"w": randn(2, seed=i), name: torch.tensor([5 + i])} for i in (0, 1)]
        with pytest.warns(UserWarning, match=f"{name}: is computed and not trained"):
            m = merge(models).tensors
        assert m[name].item() == 5
        torch.testing.assert_close(m["w"], (models[0]["w"] + models[1]["w"])/2)
        del models[0][name]
        assert merge(models).tensors[name].item() == 6

    def test_a_size_of_steps_is_a_weight(self):
        models = [{"act.step": torch.tensor([float(i)])} for i in (0, 1)]
        assert merge(models).tensors["act.step"].item() == 0.5

    # codes, and what is set
    @pytest.mark.parametrize("name", ["fc.zero_point", "scheduler.max_steps", "model.num_steps"])
    def test_of_others_are_refused_still(self, name):
        models = [{name: torch.tensor([5 + i])} for i in (0, 1)]
        with pytest.raises(MergeError, match="integers have no mean"):
            merge(models)


class TestNames:
    @pytest.mark.parametrize("order", ["ab", "ba"])
    def test_a_tower_of_its_own_for_texts(self, tmp_path, order):
        "As open_clip calls it where custom_text is asked for."
        names = ("text_projection", "token_embedding.weight", "transformer.resblocks.0.ln_1.weight")
        for i, (n, lead) in enumerate((("a", ""), ("b", "text."))):
            state = {f"{lead}{name}": randn(4, 4, seed=10*i + j) for j, name in enumerate(names)}
            save(tmp_path/n, {**state, "visual.proj": randn(4, 4, seed=20 + i)})
        m = merge([tmp_path/n for n in order]).tensors
        lead = "text." if order == "ba" else ""
        for j, name in enumerate(names):
            want = (randn(4, 4, seed=j) + randn(4, 4, seed=10 + j))/2
            torch.testing.assert_close(m[lead + name], want)
        assert len(m) == 4

    def test_others_of_the_same_size_are_no_tower(self, tmp_path):
        for n, names in (("a", ("x.0.w", "y.w")), ("b", ("x.0.w", "text.y.w", "text.z.w"))):
            save(tmp_path/n, {name: torch.ones(2) for name in names})
        with pytest.raises(MergeError):
            merge([tmp_path/"a", tmp_path/"b"])

    @pytest.mark.parametrize("order", ["ab", "ba"])
    @pytest.mark.parametrize("how", [{}, {"absent": "renormalise"}])
    def test_parts_of_one_shape_are_other_parts(self, order, how):
        "A head, and one beside it; layers that encode, and layers that decode."
        both = ("enc.0.w", "enc.1.w")
        for lead, names in (
            ("aux.", ("head.weight", "head.bias")),
            ("text.", ("head.weight", "head.bias")),
            ("decoder.", ("layers.0.w", "layers.1.w")),
        ):
            a = {n: randn(4, seed=i) for i, n in enumerate((*both, *names))}
            b = {n: randn(4, seed=i) for i, n in enumerate((*both, *(lead + n for n in names)))}
            models = {"a": a, "b": b}
            try:
                m = merge([models[n] for n in order], **how).tensors
            except MergeError:
                continue
            assert {*m} == {*a, *b}

    def test_mamba_as_its_authors_call_it(self, tmp_path):
        config = MambaConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, state_size=4)
        a, b = (made(tmp_path/n, MambaForCausalLM, config, i) for i, n in enumerate("ab"))
        file = tmp_path/"b"/"model.safetensors"
        held = load_file(file)
        theirs = {n.replace("embeddings.", "embedding."): x for n, x in held.items()}
        save_file(theirs, file, {"format": "pt"})
        (tmp_path/"b"/"config.json").write_text('{"d_model": 8, "n_layer": 1, "ssm_cfg": {}}')
        merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
        assert are_means(opened(MambaForCausalLM, tmp_path/"o"), a, b)
        merge([tmp_path/"b", tmp_path/"a"], out=tmp_path/"p")
        assert {*load_file(tmp_path/"p"/"model.safetensors")} == {*theirs}

    def test_one_name_in_the_one_and_another_in_the_other(self, tmp_path):
        for i, name in enumerate(("embed.weight", "embedding.weight")):
            save(tmp_path/"ab"[i], {"w": torch.ones(2), name: randn(4, 4, seed=i)})
        with pytest.raises(MergeError, match="or rename it: ") as e:
            merge([tmp_path/"a", tmp_path/"b"])
        import safetensors.torch

        typed = str(e.value).partition("or rename it: ")[2].removesuffix(".")
        where = {"FILE": tmp_path/"b"/"model.safetensors", "OTHER": tmp_path/"c.safetensors"}
        exec(typed, {"safetensors": safetensors, **where})
        m = merge([tmp_path/"a", tmp_path/"c.safetensors"]).tensors
        want = (randn(4, 4) + randn(4, 4, seed=1))/2
        torch.testing.assert_close(m["embed.weight"], want)

    @pytest.mark.parametrize("order", ["ab", "ba"])
    def test_an_encoder_of_texts_beside_one_of_pictures_of_its_shapes(self, tmp_path, order):
        a = made(tmp_path/"a", CLIPTextModel, CLIPTextConfig(**TEXT))
        config = CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=8)
        b = made(tmp_path/"b", CLIPModel, config, seed=1)
        with pytest.warns(UserWarning, match="is merged into 'text_model'"):
            merge([tmp_path/n for n in order], out=tmp_path/"o")
        found = opened(CLIPModel, tmp_path/"o")
        for name, x in found.items():
            mine = a.get(name, a.get(name.removeprefix("text_model.")))
            want = b[name] if mine is None else (mine + b[name])/2
            torch.testing.assert_close(x, want)


    @pytest.mark.parametrize("original", [True, False])
    @pytest.mark.parametrize("order", ["ab", "ba"])
    def test_an_output_layer_of_its_own_in_a_model_that_ties(self, tmp_path, order, original):
        "Its place is the library's, and not beside the layers that read text."
        a = made(tmp_path/"a", LlamaForCausalLM, LlamaConfig(**TEXT, tie_word_embeddings=False))
        text = LlamaConfig(**TEXT, tie_word_embeddings=True)
        sees = CLIPVisionConfig(**{**IMAGE, "num_hidden_layers": 2})
        config = LlavaConfig(text_config=text, vision_config=sees, image_token_index=5)
        config.tie_word_embeddings = True
        whole = LlavaForConditionalGeneration(config)
        whole.save_pretrained(tmp_path/"b", save_original_format=original)
        b = whole.state_dict()
        with pytest.warns(UserWarning, match="is a model of text"):
            merge([tmp_path/n for n in order], out=tmp_path/"o")
        found = opened(LlavaForConditionalGeneration, tmp_path/"o")
        embedding = "model.language_model.embed_tokens.weight"
        want = {"lm_head.weight": "lm_head.weight", embedding: "model.embed_tokens.weight"}
        for name, theirs in want.items():
            torch.testing.assert_close(found[name], (a[theirs] + b[name])/2)


class TestRemedies:
    @pytest.mark.parametrize("order", ["ab", "ba"])
    @pytest.mark.parametrize("how", [{"drop": ["head*"]}, {"absent": "renormalise"}])
    def test_a_part_that_a_setting_makes(self, tmp_path, order, how):
        "Of a vision tower, whose pooling models that read pictures leave out."
        for i, n in enumerate("ab"):
            config = SiglipVisionConfig(**IMAGE, vision_use_head=n == "a")
            made(tmp_path/n, SiglipVisionModel, config, i)
        with pytest.raises(MergeError, match="--drop 'head.'.*--absent renormalise") as e:
            merge([tmp_path/n for n in order])
        # either has to be first for one of the two remedies
        said = str(e.value).partition("\n")[2]
        with_drop, _, with_absent = said.partition("; or ")
        part = with_drop if "drop" in how else with_absent
        first = next((n for n in "ab" if f"{tmp_path/n} named first" in part), order[0])
        merge([tmp_path/first, tmp_path/("a" if first == "b" else "b")], out=tmp_path/"o", **how)
        opened(SiglipVisionModel, tmp_path/"o")

    def test_a_number_of_guidance(self, tmp_path):
        diffusers = pytest.importorskip("diffusers")
        sizes = dict(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )
        kind = diffusers.FluxTransformer2DModel
        for n in "ab":
            kind(**sizes, guidance_embeds=n == "a").save_pretrained(tmp_path/n)
        with pytest.raises(MergeError, match=f"{tmp_path/'b'} named first, whose config"):
            merge([tmp_path/"a", tmp_path/"b"])
        drop = ["time_text_embed.guidance_embedder.*"]
        merge([tmp_path/"b", tmp_path/"a"], drop=drop, out=tmp_path/"o")
        opened(kind, tmp_path/"o")

    def test_normalisation_in_a_convolution(self):
        conv = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, bias=False), torch.nn.BatchNorm2d(2))
        whole = conv.eval().state_dict()
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv[0], conv[1])
        folded = {f"0.{n}": x for n, x in fused.state_dict().items()}
        for models in ([whole, folded], [folded, whole]):
            with pytest.raises(MergeError, match="normalisation in its convolutions.*\nGive the"):
                merge(models)
        merge([whole, whole])

    def test_normalisation_by_groups_is_in_no_convolution(self):
        conv = {"conv.weight": randn(2, 2, 3, 3), "norm.weight": randn(2), "fc.weight": randn(3, 2)}
        batches = {**conv, "norm.running_mean": randn(2)}
        with pytest.raises(MergeError, match="renormalise"):
            merge([batches, {**conv, "fc.bias": randn(3)}])

    @pytest.mark.parametrize(
        "kind, config, key",
        [
            (LlamaForCausalLM, lambda n: LlamaConfig(**{**TEXT, "hidden_size": n}), "hidden_size"),
            (
                WhisperForConditionalGeneration,
                lambda n: WhisperConfig(
                    num_mel_bins=n, d_model=16, encoder_layers=1, decoder_layers=1,
                    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                    decoder_ffn_dim=16, vocab_size=60, pad_token_id=1, eos_token_id=2,
                    decoder_start_token_id=3, max_source_positions=8, max_target_positions=8,
                ),
                "num_mel_bins",
            ),
        ],
    )
    def test_a_setting_says_why_shapes_differ(self, tmp_path, kind, config, key):
        for n, size in (("a", 16), ("b", 32)):
            made(tmp_path/n, kind, config(size))
        with pytest.raises(MergeError, match=f"{key} = 16 and 32: merge models of one size"):
            merge([tmp_path/"a", tmp_path/"b"])
        merge([tmp_path/"a", tmp_path/"a"])

    def test_matrices_of_mlx_are_as_those_of_torch(self, tmp_path):
        save_file({"fc.weight": randn(8, 4)}, tmp_path/"a.safetensors", {"format": "mlx"})
        save_file({"fc.weight": randn(4, 8)}, tmp_path/"b.safetensors", {"format": "pt"})
        with pytest.raises(MergeError, match="the other way round.*square ones, too"):
            merge([tmp_path/"a.safetensors", tmp_path/"b.safetensors"])

    def test_matrices_the_other_way_round(self):
        ours, theirs = {"c_fc.weight": randn(4, 16)}, {"c_fc.weight": randn(16, 4)}
        with pytest.raises(MergeError, match="the other way round.*held.NAME..T"):
            merge([ours, theirs])
        held = {n: x.T.contiguous() for n, x in theirs.items()}
        m = merge([ours, held]).tensors["c_fc.weight"]
        torch.testing.assert_close(m, (randn(4, 16) + randn(16, 4).T)/2)

    def test_convolutions_of_mlx(self, tmp_path):
        save_file({"conv1d.weight": randn(8, 4, 1)}, tmp_path/"a.safetensors", {"format": "mlx"})
        save_file({"conv1d.weight": randn(8, 1, 4)}, tmp_path/"b.safetensors", {"format": "pt"})
        with pytest.raises(MergeError, match="a.safetensors was written by MLX"):
            merge([tmp_path/"a.safetensors", tmp_path/"b.safetensors"])
        merge([tmp_path/"b.safetensors", tmp_path/"b.safetensors"])

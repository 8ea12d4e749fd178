"""What stands beside the weights, and makes another function of them: settings that only some
models read, rules of a tokenizer, names of classes in a pickle, the noise of a schedule.

The oracle is the library that reads it, or the same model written in another way.
"""

import json
import warnings

import pytest
import torch
from conftest import save
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    EsmConfig,
    EsmModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2Model,
    Phi3Config,
    Phi3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from frechet_merge import MergeError, load, merge
from frechet_merge.matching.function import unlike

ONE = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16)
TEXT = dict(**ONE, vocab_size=30, pad_token_id=0)
STRETCHED = {"type": "longrope", "short_factor": [1.0]*4, "long_factor": [2.0]*4}
# what is computed, a setting, and its two values: class, config, what both have, key, values
SETTINGS = {
    "padding of RoBERTa": (
        RobertaModel, RobertaConfig, {**TEXT, "max_position_embeddings": 40}, "pad_token_id", (1, 0)
    ),
    "the longest text of a stretched rotary": (
        Phi3ForCausalLM,
        Phi3Config,
        {**TEXT, "original_max_position_embeddings": 32, "rope_scaling": STRETCHED},
        "max_position_embeddings",
        (64, 256),
    ),
    "the longest text of a dynamic rotary": (
        LlamaForCausalLM,
        LlamaConfig,
        {**TEXT, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "max_position_embeddings",
        (4, 16),
    ),
    "masks of ESM": (
        EsmModel,
        EsmConfig,
        {**TEXT, "max_position_embeddings": 40, "mask_token_id": 3},
        "token_dropout",
        (True, False),
    ),
    "the stride of a network of convolutions": (
        MobileNetV2Model, MobileNetV2Config, {"depth_multiplier": 0.25}, "output_stride", (32, 8)
    ),
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def answered(model):
    "What a model says of some tokens, or of a picture."
    if model.main_input_name == "pixel_values":
        return model(randn(1, 3, 64, 64))[0]
    return model(input_ids=torch.arange(5, 25)[None])[0]


class TestSettings:
    @pytest.mark.parametrize("case", SETTINGS)
    def test_that_change_what_is_computed_are_said(self, tmp_path, case):
        kind, config, sizes, key, values = SETTINGS[case]
        torch.manual_seed(0)
        found = [kind(config(**{**sizes, key: x})).eval() for x in values]
        found[1].load_state_dict(found[0].state_dict())
        ours, theirs = map(answered, found)
        assert ours.shape != theirs.shape or not torch.equal(ours, theirs)
        for n, m in zip("ab", found):
            m.save_pretrained(tmp_path/n)
        said = " ".join(unlike([load(tmp_path/n) for n in "ab"]))
        assert f"{key} = {values[0]!r} and {values[1]!r}" in said

    @pytest.mark.parametrize("key", ["pad_token_id", "max_position_embeddings"])
    def test_that_others_compute_the_same_with_are_not(self, tmp_path, key):
        for n, x in (("a", 3), ("b", 5)):
            LlamaForCausalLM(LlamaConfig(**{**TEXT, key: x})).save_pretrained(tmp_path/n)
        assert not unlike([load(tmp_path/n) for n in "ab"])

    @pytest.mark.parametrize(
        "ours, theirs, says",
        [
            ({"rotary_emb_base": 1e4}, {"rotary_emb_base": 1e6}, "rotary_emb_base"),
            ({"layers": {"norm": "post"}}, {"layers": {"norm": "pre"}}, "layers.norm"),
            ({"run_name": "a", "seed": 1}, {"run_name": "b", "seed": 2}, ""),
            ({"alpha": 1.0}, {}, ""),
            # two spellings of nearly one function
            ({"hidden_act": "gelu"}, {"hidden_act": "gelu_new"}, ""),
        ],
    )
    @pytest.mark.parametrize("more", [{"auto_map": {"AutoModel": "m.M"}}, {}])
    def test_of_somebodys_own_code(self, tmp_path, ours, theirs, says, more):
        for n, held in (("a", ours), ("b", theirs)):
            save(tmp_path/n, {"w": torch.ones(2)}, {"model_type": "own", **more, **held})
        said = " ".join(unlike([load(tmp_path/n) for n in "ab"]))
        assert says in said and bool(says) == bool(said)


def of_pieces(pairs=(("a", "b"), ("ab", "c")), lower=False, begins=False):
    "A tokenizer of a few pieces."
    tokens = ["a", "b", "c", "ab", "bc", "abc", "<s>", "<unk>"]
    t = Tokenizer(models.BPE({x: i for i, x in enumerate(tokens)}, [*pairs], unk_token="<unk>"))
    t.add_special_tokens(["<s>", "<unk>"])
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    if begins:
        t.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 6)])
    return t


class TestTokenizers:
    "Of one vocabulary."

    def said(self, tmp_path, *texts, flags=({}, {})):
        for n, text, held in zip("ab", texts, flags):
            folder = save(tmp_path/n, {"w": torch.ones(2)}, {"model_type": "own"})
            (folder/"tokenizer.json").write_text(text)
            (folder/"tokenizer_config.json").write_text(json.dumps(held))
        return " ".join(unlike([load(tmp_path/n) for n in "ab"]))

    @pytest.mark.parametrize(
        "more, says",
        [
            ({"lower": True}, "normalizer"),
            ({"begins": True}, "post_processor"),
            ({"pairs": (("b", "c"), ("a", "bc"))}, "merges of 8 pieces"),
        ],
    )
    def test_that_make_other_tokens_of_a_text_are_said(self, tmp_path, more, says):
        ours, theirs = of_pieces(), of_pieces(**more)
        assert ours.encode("ab bc AB").ids != theirs.encode("ab bc AB").ids
        assert ours.get_vocab() == theirs.get_vocab()
        assert says in self.said(tmp_path, ours.to_str(), theirs.to_str())

    def test_that_a_config_sets(self, tmp_path):
        text, flags = of_pieces().to_str(), ({"do_lower_case": True}, {"do_lower_case": False})
        assert "do_lower_case = True and False" in self.said(tmp_path, text, text, flags=flags)

    def test_in_the_spellings_of_two_versions_are_one(self, tmp_path):
        t = of_pieces()
        t.pre_tokenizer = pre_tokenizers.Metaspace()
        new = json.loads(t.to_str())
        old = json.loads(t.to_str())
        # as tokenizers before 0.15 wrote it
        old["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
        old["model"]["merges"] = [" ".join(pair) for pair in new["model"]["merges"]]
        texts = [json.dumps(held) for held in (new, old)]
        asked = [Tokenizer.from_str(text).encode("ab abc").ids for text in texts]
        assert asked[0] == asked[1] and not self.said(tmp_path, *texts)

    def test_of_llama_as_transformers_4_and_5_write_it(self, tmp_path):
        pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"]
        pairs = [("▁", "a"), ("a", "b"), ("▁a", "b")]
        vocab = {x: i for i, x in enumerate(pieces)}
        t = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True))
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        t.add_special_tokens(["<unk>", "<s>", "</s>"])
        t.normalizer = normalizers.Sequence(spaces)
        t.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        old = tmp_path/"old"
        old.mkdir()
        t.save(str(old/"tokenizer.json"))
        marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        said = {"tokenizer_class": "LlamaTokenizer", "legacy": True, **marks}
        (old/"tokenizer_config.json").write_text(json.dumps(said))
        AutoTokenizer.from_pretrained(old).save_pretrained(tmp_path/"new")
        files = [tmp_path/n/"tokenizer.json" for n in ("old", "new")]
        asked = [Tokenizer.from_file(str(file)) for file in files]
        for text in ("ab ab", "ab  a b", "b</s>a"):
            assert asked[0].encode(text).ids == asked[1].encode(text).ids
        assert not self.said(tmp_path, *(file.read_text() for file in files))

    def test_that_put_nothing_around_a_text_are_one(self, tmp_path):
        ours, theirs = of_pieces(), of_pieces(begins=True)
        begins = theirs.post_processor
        byte_level = processors.ByteLevel(trim_offsets=False)
        for x in (byte_level, processors.TemplateProcessing("$A")):
            alike = of_pieces()
            alike.post_processor = x
            assert not self.said(tmp_path, ours.to_str(), alike.to_str())
            alike.post_processor = processors.Sequence([x, begins])
            assert alike.encode("ab").ids == theirs.encode("ab").ids
            assert not self.said(tmp_path, theirs.to_str(), alike.to_str())
            assert self.said(tmp_path, ours.to_str(), alike.to_str())

    def test_whose_patterns_are_large_take_no_time(self, tmp_path):
        "A stranger's pattern is compared, and neither compiled nor run."
        deep = "a"
        for _ in range(9):
            deep = f"(?:{deep}){{999}}"
        held = json.loads(of_pieces().to_str())
        split = {"type": "Split", "pattern": {"Regex": deep}, "behavior": "Isolated"}
        held["pre_tokenizer"] = {**split, "invert": False}
        assert "pre_tokenizer" in self.said(tmp_path, json.dumps(held), of_pieces().to_str())

    @pytest.mark.parametrize("text", ["[]", "{", '{"normalizer": 3, "model": 4}', '{"model": []}'])
    def test_that_are_damaged_stop_nothing_here(self, tmp_path, text):
        self.said(tmp_path, text, of_pieces().to_str())


NAMES = ["O", "B", "I"]


class TestLabels:
    def heads(self, order):
        "A classifier of tokens with a CRF, whose labels are in this order."
        w, b, t = randn(3, 8), randn(3, seed=1), randn(3, 3, seed=2)
        return {
            "classifier.weight": w[order],
            "classifier.bias": b[order],
            "crf.transitions": t[order][:, order],
        }

    def test_of_a_crf_are_refused_and_the_remedy_works(self, tmp_path):
        for n, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
            named = {str(i): NAMES[j] for i, j in enumerate(order)}
            config = {"model_type": "bert", "architectures": ["BertCRF"], "id2label": named}
            save(tmp_path/n, {"w": randn(2, seed=ord(n)), **self.heads(order)}, config)
        with pytest.raises(MergeError, match="crf.transitions.*\n.*--drop 'crf") as e:
            merge([tmp_path/"a", tmp_path/"b"])
        patterns = str(e.value).split("--drop ")[1:]
        drop = [p.split("'")[1] for p in patterns]
        assert {*merge([tmp_path/"a", tmp_path/"b"], drop=drop).tensors} == {"w"}

    def test_of_a_crf_in_one_order(self, tmp_path):
        for n in "ab":
            config = {"id2label": dict(enumerate(NAMES))}
            save(tmp_path/n, self.heads([0, 1, 2]), config)
        m = merge([tmp_path/"a", tmp_path/"b"]).tensors
        torch.testing.assert_close(m["crf.transitions"], self.heads([0, 1, 2])["crf.transitions"])

    def test_in_the_config_of_an_encoder(self, tmp_path):
        w = randn(3, 8)
        for n, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
            named = {str(i): NAMES[j] for i, j in enumerate(order)}
            config = {"model_type": "span-marker", "encoder": {"id2label": named}}
            save(tmp_path/n, {"classifier.weight": w[order]}, config)
        m = merge([tmp_path/"a", tmp_path/"b"]).tensors
        torch.testing.assert_close(m["classifier.weight"], w)

    def test_of_a_backbone_are_none(self, tmp_path):
        for n, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
            named = {str(i): NAMES[j] for i, j in enumerate(order)}
            config = {"model_type": "own", "backbone_config": {"id2label": named}}
            save(tmp_path/n, {"classifier.weight": randn(3, 8, seed=ord(n))}, config)
        a, b = (load_file(tmp_path/n/"model.safetensors")["classifier.weight"] for n in "ab")
        m = merge([tmp_path/"a", tmp_path/"b"]).tensors
        torch.testing.assert_close(m["classifier.weight"], (a + b)/2)

    def test_of_no_head_that_is_known_are_said(self, tmp_path):
        for n, named in (("a", ["cat", "dog"]), ("b", ["car", "bus"])):
            config = {"model_type": "own", "id2label": dict(enumerate(named))}
            save(tmp_path/n, {"w": randn(5, 8)}, config)
        with pytest.warns(UserWarning, match="cat, dog and car, bus.*by number"):
            merge([tmp_path/"a", tmp_path/"b"])

    @pytest.mark.parametrize(
        "kept",
        [
            lambda named: {"class_to_idx": {x: i for i, x in enumerate(named)}},
            lambda named: {"idx_to_class": dict(enumerate(named))},
            lambda named: {"meta": {"CLASSES": tuple(named)}},
            lambda named: {"hyper_parameters": {"class_names": [*named]}},
        ],
        ids=["torchvision", "numbers", "OpenMMLab", "Lightning"],
    )
    def test_in_a_pickle(self, tmp_path, kept):
        w = randn(3, 8)
        for n, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
            state = {"fc.weight": w[order]}
            held = {"state_dict": state, **kept([NAMES[j] for j in order])}
            torch.save(held, tmp_path/f"{n}.pth")
        torch.save({"state_dict": {"fc.weight": w}, **kept(["x", "y", "z"])}, tmp_path/"c.pth")
        a, b, c = (tmp_path/f"{n}.pth" for n in "abc")
        m = merge([a, b], allow_pickle=True).tensors
        torch.testing.assert_close(m["fc.weight"], w)
        with pytest.raises(MergeError, match="O, B, I and x, y, z: heads of different tasks"):
            merge([a, c], allow_pickle=True)

    def test_in_a_text_of_their_own_are_said(self, tmp_path):
        for n, text in (("a", "cat\ndog\n"), ("b", "dog\ncat\n"), ("c", "cat\ndog\n")):
            save(tmp_path/n, {"fc.weight": randn(2, 8)}, {"model_type": "own"})
            (tmp_path/n/"labels.txt").write_text(text)
        with pytest.warns(UserWarning, match="labels.txt: says what rows stand for"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merge([tmp_path/"a", tmp_path/"c"], out=tmp_path/"p")


class TestOtherLibraries:
    @pytest.mark.parametrize("key, values", [("shift", (1.0, 3.0)), ("beta_end", (0.012, 0.02))])
    def test_the_noise_of_a_pipeline(self, tmp_path, key, values):
        index = {"_class_name": "Pipe", "unet": ["diffusers", "UNet"]}
        for n, x in zip("ab", values):
            config = {"_class_name": "UNet"}
            save(tmp_path/n/"unet", {"w": randn(2, seed=ord(n))}, config)
            file = tmp_path/n/"unet"/"model.safetensors"
            file.rename(file.with_name("diffusion_pytorch_model.safetensors"))
            (tmp_path/n/"scheduler").mkdir()
            (tmp_path/n/"scheduler"/"scheduler_config.json").write_text(json.dumps({key: x}))
            (tmp_path/n/"model_index.json").write_text(json.dumps(index))
        with pytest.warns(UserWarning, match=f"{key} = {values[0]} and {values[1]}"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")

    @pytest.mark.parametrize(
        "key, values, is_said",
        [("boundary_ratio", (0.875, 0.9), True), ("requires_safety_checker", (True, False), False)],
    )
    def test_what_a_pipeline_does_with_its_parts(self, tmp_path, key, values, is_said):
        index = {"_class_name": "Pipe", "unet": ["diffusers", "UNet"]}
        for n, x in zip("ab", values):
            save(tmp_path/n/"unet", {"w": randn(2)}, {"_class_name": "UNet"})
            (tmp_path/n/"model_index.json").write_text(json.dumps({**index, key: x}))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
        assert any(f"{key} = {values[0]}" in str(x.message) for x in heard) == is_said

    def test_a_pooling_that_leaves_out_the_prompt(self, tmp_path):
        listed = [{"path": "", "type": "T"}, {"path": "1_Pooling", "type": "models.Pooling"}]
        for n in "ab":
            save(tmp_path/n, {"w": torch.ones(2)}, {"model_type": "own"})
            (tmp_path/n/"modules.json").write_text(json.dumps(listed))
            (tmp_path/n/"1_Pooling").mkdir()
            held = {"pooling_mode_mean_tokens": True, "include_prompt": n == "a"}
            (tmp_path/n/"1_Pooling"/"config.json").write_text(json.dumps(held))
        says = "mean, and Pooling of mean without prompts.\nIf both were trained with one"
        with pytest.raises(MergeError, match=says):
            merge([tmp_path/"a", tmp_path/"b"])
        (tmp_path/"a"/"1_Pooling"/"config.json").write_text(json.dumps(held))
        assert {*merge([tmp_path/"a", tmp_path/"b"]).tensors} == {"w"}


class TestRemedies:
    def test_complex_numbers(self, tmp_path):
        spectral = [torch.complex(randn(4, 4, seed=i), randn(4, 4, seed=9 + i)) for i in (0, 1)]
        for n, x in zip("ab", spectral):
            torch.save({"spectral": x}, tmp_path/f"{n}.pt")
        with pytest.raises(MergeError, match="real numbers.\n.*view_as_real.*view_as_complex"):
            merge([tmp_path/"a.pt", tmp_path/"b.pt"], allow_pickle=True)
        for n, x in zip("ab", spectral):
            save(tmp_path/n, {"spectral": torch.view_as_real(x)})
        m = merge([tmp_path/"a", tmp_path/"b"]).tensors
        torch.testing.assert_close(torch.view_as_complex(m["spectral"]), sum(spectral)/2)

    def test_complex_numbers_of_safetensors(self, tmp_path):
        from safetensors.torch import save_file

        spectral = torch.complex(randn(4, 4), randn(4, 4, seed=1))
        save_file({"spectral": spectral}, tmp_path/"a.safetensors")
        with pytest.raises(MergeError, match="'spectral' is complex.*\n.*view_as_real"):
            merge([tmp_path/"a.safetensors"]*2)
        save(tmp_path/"b", {"spectral": torch.view_as_real(spectral)})
        m = merge([tmp_path/"b", tmp_path/"b"]).tensors
        torch.testing.assert_close(torch.view_as_complex(m["spectral"]), spectral)

    def test_several_parts_of_one_model_in_a_pickle(self, tmp_path):
        "As an IP-Adapter is written, and as diffusers reads one of safetensors."
        held = [
            {"image_proj": {"w": randn(3, seed=i)}, "ip_adapter": {"1.k": randn(3, seed=5 + i)}}
            for i in (0, 1)
        ]
        for n, state in zip("ab", held):
            torch.save(state, tmp_path/f"{n}.bin")
        with pytest.raises(MergeError, match="Or all, if they are parts of one model") as e:
            merge([tmp_path/"a.bin", tmp_path/"b.bin"], allow_pickle=True)
        typed = str(e.value).partition("one model: ")[2].removesuffix(".")
        for n, STATE in zip("ab", held):
            given = {"torch": torch, "STATE": STATE, "OTHER": tmp_path/f"{n}2.bin"}
            exec(typed, given)
        m = merge([tmp_path/"a2.bin", tmp_path/"b2.bin"], allow_pickle=True).tensors
        want = (held[0]["ip_adapter"]["1.k"] + held[1]["ip_adapter"]["1.k"])/2
        torch.testing.assert_close(m["ip_adapter.1.k"], want)
        assert {*m} == {"image_proj.w", "ip_adapter.1.k"}

    def test_tensors_that_are_spread_over_processes(self, tmp_path):
        import torch.distributed as dist
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            whole = [randn(4, 4, seed=i) for i in (0, 1)]
            held = [{"w": distribute_tensor(x, mesh, [Shard(0)])} for x in whole]
            for n, state in zip("ab", held):
                torch.save(state, tmp_path/f"{n}.pt")
            with pytest.raises(MergeError, match="spread over processes") as e:
                merge([tmp_path/"a.pt", tmp_path/"b.pt"], allow_pickle=True)
            typed = str(e.value).partition("holds: ")[2].removesuffix(".")
            for n, STATE in zip("ab", held):
                exec(typed, {"torch": torch, "STATE": STATE, "OTHER": tmp_path/f"{n}2.pt"})
        finally:
            dist.destroy_process_group()
        m = merge([tmp_path/"a2.pt", tmp_path/"b2.pt"], allow_pickle=True).tensors
        torch.testing.assert_close(m["w"], sum(whole)/2)

    def test_positions_of_pictures_are_resized_by_transformers(self, tmp_path):
        for n, size in (("a", 8), ("b", 16)):
            torch.manual_seed(ord(n))
            ViTModel(ViTConfig(**ONE, image_size=size, patch_size=4)).save_pretrained(tmp_path/n)
        with pytest.raises(MergeError, match="interpolate_pos_encoding of transformers"):
            merge([tmp_path/"a", tmp_path/"b"])
        m = ViTModel.from_pretrained(tmp_path/"a").eval()
        pixels = randn(1, 3, 16, 16)
        with torch.no_grad():
            want = m(pixels, interpolate_pos_encoding=True)[0]
        inner = m.embeddings
        wide = inner.interpolate_pos_encoding(torch.empty(1, 17, 16), 16, 16)
        inner.position_embeddings = torch.nn.Parameter(wide.detach())
        m.config.image_size = 16
        m.save_pretrained(tmp_path/"c")
        with torch.no_grad():
            torch.testing.assert_close(ViTModel.from_pretrained(tmp_path/"c")(pixels)[0], want)
        merge([tmp_path/"c", tmp_path/"b"], out=tmp_path/"o")
        _, info = ViTModel.from_pretrained(tmp_path/"o", output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]


class TestNoWeights:
    "Tensors in a file that no training moves by a gradient."

    @pytest.mark.parametrize(
        "name",
        [
            "preprocessor.featurizer.fb",
            "preprocessor.featurizer.window",
            "mel.mel_scale.fb",
            "spectrogram.window",
            "head.istft.window",
            "rope.freqs",
            "blocks.0.rope.freqs_cos",
            "alibi",
            "pixel_std",
            "input_conditioner.norm_mean",
            "model.24.anchors",
        ],
    )
    def test_what_is_computed_is_the_first_models_and_said(self, tmp_path, name):
        for n, x in (("a", 0.25), ("b", 0.5)):
            save(tmp_path/n, {"w": torch.ones(2), name: torch.full((3,), x)})
        with pytest.warns(UserWarning, match=f"{name}: is computed and not trained, and differs"):
            m = merge([tmp_path/"a", tmp_path/"b"]).tensors
        torch.testing.assert_close(m[name], torch.full((3,), 0.25))

    @pytest.mark.parametrize(
        "name",
        [
            "bn._variance",
            "obs.running_std",
            "obs_rms.var",
            "quantizer.codebook.cluster_size",
            "normalize_inputs.buffer_observation_state.std",
            "target_normalizer.std",
        ],
    )
    def test_spreads_and_counts_stay_between_those_of_the_models(self, tmp_path, name):
        for n, x in (("x", 50.0), ("a", 2.0), ("b", 1.0)):
            save(tmp_path/n, {"w": torch.full((2,), x), name: torch.full((3,), x)})
        m = merge([tmp_path/"a", tmp_path/"b"], base=tmp_path/"x", scale=1.5).tensors
        torch.testing.assert_close(m[name], torch.full((3,), 1.5))
        torch.testing.assert_close(m["w"], torch.full((2,), 50 + 1.5*(1.5 - 50)))


# what trainers write of a run
OF_A_RUN = {
    "warmup_ratio": 0.1,
    "max_grad_norm": 1.0,
    "adam_epsilon": 1e-8,
    "optim": "adamw",
    "lr_scheduler_type": "cosine",
    "wandb_project": "a",
    "run": "a",
    "world_size": 8,
    "best_metric": 0.5,
    "bf16": True,
    "n_head": 4,
}
OF_ANOTHER = {k: f"{x} else" for k, x in OF_A_RUN.items()} | {"n_head": 4}


class TestArguments:
    "Of a module, where there is no config."

    @pytest.mark.parametrize(
        "ours, theirs, says",
        [
            ({"model_args": {"n_head": 4}}, {"model_args": {"n_head": 8}}, "model_args.n_head"),
            ({"hyper_parameters": {"act": "a"}}, {"hyper_parameters": {"act": "b"}}, "act = 'a'"),
            ({"hyper_parameters": {"lr": 1.0}}, {"hyper_parameters": {"lr": 2.0}}, ""),
            ({"hparams": {"n": torch.ones(1)}}, {"hparams": {"n": torch.ones(2)}}, ""),
            ({"hyper_parameters": OF_A_RUN}, {"hyper_parameters": OF_ANOTHER}, ""),
        ],
    )
    def test_in_a_pickle(self, tmp_path, ours, theirs, says):
        for n, held in (("a", ours), ("b", theirs)):
            torch.save({"state_dict": {"w": torch.ones(2)}, **held}, tmp_path/f"{n}.ckpt")
        said = " ".join(unlike([load(tmp_path/f"{n}.ckpt", allow_pickle=True) for n in "ab"]))
        assert says in said and bool(says) == bool(said)

    def test_in_the_file_of_their_makers(self, tmp_path):
        for n, x in (("a", 1e4), ("b", 1e6)):
            save(tmp_path/n, {"w": torch.ones(2)})
            (tmp_path/n/"params.json").write_text(json.dumps({"dim": 4, "rope_theta": x}))
        assert "rope_theta = 10000.0 and 1000000.0" in unlike([load(tmp_path/n) for n in "ab"])[0]

    def test_a_run_leaves_no_setting_of_a_model(self, tmp_path):
        for n, held in (("a", OF_A_RUN), ("b", OF_ANOTHER)):
            save(tmp_path/n, {"w": torch.ones(2)}, {"model_type": "own", **held})
        assert unlike([load(tmp_path/n) for n in "ab"]) == []

    @pytest.mark.parametrize("is_own", [True, False])
    def test_code_of_their_own(self, tmp_path, is_own):
        config = {"model_type": "own", **({"auto_map": {"AutoModel": "m.M"}} if is_own else {})}
        for n in "ab":
            save(tmp_path/n, {"w": torch.ones(2)}, config)
            (tmp_path/n/"m.py").write_text(f"# of {n}")
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
        assert any("m.py: is what computes" in str(x.message) for x in heard) == is_own
        assert (tmp_path/"o"/"m.py").read_text() == "# of a"


@pytest.mark.parametrize(
    "odd",
    [{"rope_scaling": {"type": []}}, {"position_buckets": "256"}, {"position_buckets": [1]}]
    + [{"": 1}, {"_class_name": "AutoencoderKL", "": 1}],
)
def test_settings_of_an_odd_kind_are_compared_as_all_others(tmp_path, odd):
    for n, config in (("a", odd), ("b", {"model_type": "own"})):
        save(tmp_path/n, {"w": torch.ones(2)}, {"model_type": "own", **config})
    torch.testing.assert_close(merge([tmp_path/"a", tmp_path/"b"]).tensors["w"], torch.ones(2))


def test_a_setting_without_a_name_beside_parts(tmp_path):
    for n in "ab":
        save(tmp_path/n/"unet", {"w": torch.ones(2)}, {"_class_name": "UNet2DConditionModel"})
        index = {"_class_name": "P", "unet": ["diffusers", "UNet2DConditionModel"], "": n}
        (tmp_path/n/"model_index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="use their parts otherwise.* = 'a' and 'b'"):
        assert merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out == tmp_path/"o"


def test_layers_of_a_pipeline_are_no_slices_of_zero(tmp_path):
    for i in (0, 2):
        torch.save({"w": torch.ones(2)}, tmp_path/f"layer_0{i}-model_00-model_states.pt")
    torch.save({}, tmp_path/"mp_rank_00_model_states.pt")
    with pytest.raises(MergeError, match="pipelines, in a file for each layer.*\n.*convert_neox"):
        load(tmp_path, allow_pickle=True)


def test_lists_in_a_config_explain_rows_too(tmp_path):
    "As many filters as letters: it is no row of a letter."
    letters = ["<pad>", "a", "b", "c", "d", "e", "f", "g"]
    orders = {"a": [*range(8)], "b": [0, 2, 1, 3, 4, 5, 6, 7]}
    head = randn(8, 4)
    for n, order in orders.items():
        folder = tmp_path/n
        state = {"conv.weight": randn(8, 3), "lm_head.weight": head[order]}
        save(folder, state, {"model_type": "own", "vocab_size": 8, "conv_dim": [8, 8]})
        (folder/"vocab.json").write_text(json.dumps({letters[j]: i for i, j in enumerate(order)}))
    m = merge([tmp_path/"a", tmp_path/"b"], tokenizer="union").tensors
    torch.testing.assert_close(m["lm_head.weight"], head)
    torch.testing.assert_close(m["conv.weight"], randn(8, 3))

"""Folders of other libraries than transformers: what each of them looks for is what it finds, and
what decides the function beside the weights is told apart."""

import json
import sys

import pytest
import torch
from conftest import save
from safetensors.torch import load_file, save_file

from frechet_merge import MergeError, load, merge
from frechet_merge.matching.function import unlike


def is_mean(found, a, b):
    "Whether a state dict is the mean of two."
    return found.keys() == a.keys() and all(
        torch.allclose(found[n], (a[n] + b[n])/2) for n in found if found[n].is_floating_point()
    )


def encoder(folder, seed=0, projection=True, length=16):
    "A sentence encoder: a tiny BERT, a pooling, and a projection."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as st
    from transformers import BertConfig, BertModel, BertTokenizerFast

    inner = folder.parent/f"{folder.name} as BERT"
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=25, intermediate_size=32, max_position_embeddings=20, **sizes)
    BertModel(config).save_pretrained(inner)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
    (inner/"vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(inner/"vocab.txt")).save_pretrained(inner)
    parts = [st.Transformer(str(inner), max_seq_length=length), st.Pooling(16)]
    made = SentenceTransformer(
        modules=[*parts, *([st.Dense(16, 8)] if projection else [])], device="cpu"
    )
    made.save_pretrained(str(folder))
    return made


def projections(tmp_path):
    "Two models of a matrix of layers, with a projection and a head of FlagEmbedding."
    listed = [{"type": "models.Transformer", "path": ""}, {"type": "Dense", "path": "2_Dense"}]
    for i, n in enumerate("ab"):
        x = torch.full((4,), float(i))
        save(tmp_path/n, {"layers.0.w": x, "layers.1.w": x.clone()}, {"model_type": "toy"})
        save(tmp_path/n/"2_Dense", {"linear.weight": x}, {"in_features": 2})
        torch.save({"weight": x}, tmp_path/n/"sparse_linear.pt")
        (tmp_path/n/"modules.json").write_text(json.dumps(listed))
    return [tmp_path/n for n in "ab"]


def numbers_in(folder):
    "The one number that each tensor of a folder holds, by its place."
    state = {"": load_file(folder/"model.safetensors")}
    state["2_Dense/"] = load_file(folder/"2_Dense"/"model.safetensors")
    state["sparse_linear.pt/"] = torch.load(folder/"sparse_linear.pt")
    return {place + n: round(float(x[0]), 4) for place, s in state.items() for n, x in s.items()}


class TestNumbersByName:
    "Weights, scales and coefficients by pattern reach the modules and heads beside a model."

    names = ("layers.0.w", "layers.1.w", "2_Dense/linear.weight", "sparse_linear.pt/weight")

    @pytest.mark.parametrize(
        "weights, want",
        [
            ({"*": [1, 3]}, (0.75, 0.75, 0.75, 0.75)),
            ({"2_Dense*": [1, 3]}, (0.5, 0.5, 0.75, 0.5)),
            ({"2_Dense/*": [0, 1], "layers.0.*": [1, 3]}, (0.75, 0.5, 1.0, 0.5)),
            ({"layers.0.w": [1, 3]}, (0.75, 0.5, 0.5, 0.5)),
            ({"sparse_linear.pt/weight": [1, 0], "*": [0, 1]}, (1.0, 1.0, 1.0, 0.0)),
        ],
        ids=str,
    )
    def test_weights(self, tmp_path, weights, want):
        merge(projections(tmp_path), weights=weights, out=tmp_path/"o", allow_pickle=True)
        assert numbers_in(tmp_path/"o") == dict(zip(self.names, want))

    def test_scales_and_sums(self, tmp_path):
        a, b = projections(tmp_path)
        how = {"base": a, "out": tmp_path/"o", "allow_pickle": True}
        merge([b], scale={"2_Dense/*": 0.5, "layers.1*": 2}, **how)
        assert numbers_in(tmp_path/"o") == dict(zip(self.names, (1.0, 2.0, 0.5, 1.0)))
        how["out"] = tmp_path/"p"
        merge([a, b], sum={"2_Dense/*": [0, 0.5], "*": [1, -1]}, **how)
        assert numbers_in(tmp_path/"p") == dict(zip(self.names, (-1.0, -1.0, 0.5, -1.0)))

    def test_what_matches_nothing_or_comes_too_late(self, tmp_path):
        models = projections(tmp_path)
        how = {"out": tmp_path/"o", "allow_pickle": True}
        with pytest.raises(ValueError, match="'3_Dense' matches no tensor"):
            merge(models, weights={"3_Dense": [1, 1]}, **how)
        with pytest.raises(ValueError, match="'2_Dense/\\*' decides nothing"):
            merge(models, weights={"*": [1, 1], "2_Dense/*": [1, 3]}, **how)
        with pytest.raises(ValueError, match="no pattern gives coefficients to 'layers.0.w'"):
            merge(models, base=models[0], sum={"2_Dense/*": [1, 1]}, **how)
        assert not (tmp_path/"o").exists()

    def test_a_sum_by_part_of_a_pipeline(self, tmp_path):
        listed = {"unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
        for i, n in enumerate("ab"):
            for part in listed:
                save(tmp_path/n/part, {"w": torch.full((2,), float(i))})
            (tmp_path/n/"model_index.json").write_text(json.dumps(listed))
        models = [tmp_path/"a", tmp_path/"b"]
        held = merge(models, base=models[0], sum={"unet/*": [1, 2], "vae/*": [0, -1]}).tensors
        assert {n: float(x[0]) for n, x in held.items()} == {"unet/w": 2.0, "vae/w": -1.0}


class TestWholeFiles:
    "A library that looks for one file gets one, whatever size of shards is asked for."

    def test_a_module_of_sentence_transformers(self, tmp_path):
        from sentence_transformers import SentenceTransformer

        a, b = (encoder(tmp_path/n, i) for i, n in enumerate("ab"))
        with pytest.warns(match="model.safetensors is written whole.*sentence-transformers reads"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o", shard_size=300)
        found = SentenceTransformer(str(tmp_path/"o"), device="cpu")
        assert is_mean(found.state_dict(), a.state_dict(), b.state_dict())
        assert (tmp_path/"o"/"model.safetensors.index.json").exists()

    @pytest.mark.parametrize(
        "file, config, weights, reader",
        [
            ("config.json", {"architecture": "resnet10t"}, "model", "timm"),
            ("open_clip_config.json", {"model_cfg": {}}, "open_clip_model", "open_clip"),
            ("gliner_config.json", {"span_mode": "markerV0"}, "model", "a library of its own"),
            ("config.json", {"hidden": 3}, "model", "a library of its own"),
        ],
        ids=["timm", "open_clip", "gliner", "mixin of the hub"],
    )
    def test_other_libraries(self, tmp_path, file, config, weights, reader):
        for i, n in enumerate("ab"):
            (tmp_path/n).mkdir()
            state = {"u": torch.full((8,), float(i)), "v": torch.full((8,), float(i))}
            save_file(state, tmp_path/n/f"{weights}.safetensors")
            (tmp_path/n/file).write_text(json.dumps(config))
        with pytest.warns(match=f"written whole.*{reader} reads one file"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o", shard_size=40)
        assert set(load_file(tmp_path/"o"/f"{weights}.safetensors")) == {"u", "v"}

    def test_a_model_that_is_given_as_a_file(self, tmp_path):
        "A single file of Stable Diffusion goes into programs that open one."
        for i, n in enumerate("ab"):
            save_file({"u": torch.ones(8)*i, "v": torch.ones(8)*i}, tmp_path/f"{n}.safetensors")
        with pytest.warns(match="opens a model as one file"):
            merge(
                [tmp_path/"a.safetensors", tmp_path/"b.safetensors"],
                out=tmp_path/"o",
                shard_size=40,
            )
        assert set(load_file(tmp_path/"o"/"model.safetensors")) == {"u", "v"}

    def test_what_came_in_shards_goes_in_shards(self, tmp_path):
        save(tmp_path/"a", {"u": torch.ones(8), "v": torch.ones(8)}, {"model_type": "toy"})
        for n, sizes in (("o", 40), ("p", 40)):
            merge([tmp_path/"a" if n == "o" else tmp_path/"o"], out=tmp_path/n, shard_size=sizes)
            assert (tmp_path/n/"model.safetensors.index.json").exists()


LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "rope_theta": 10000.0,
}
VIT = {"hidden_size": 8, "num_attention_heads": 2, "layer_norm_eps": 1e-6}
CLIP = {"model_type": "clip", "vision_config": VIT}
TIMM = {"architecture": "vit_tiny", "model_args": {"num_classes": 3}, "global_pool": "avg"}


class TestSettings:
    "What makes of the same weights another function is said by its name, and nothing else is."

    def said(self, tmp_path, ours, theirs, file="config.json"):
        "The warnings of a merge of two folders of these configs, in both orders alike."
        for n, held in (("a", ours), ("b", theirs)):
            save(tmp_path/n, {"w": torch.ones(2)})
            (tmp_path/n/file).parent.mkdir(exist_ok=True)
            (tmp_path/n/file).write_text(json.dumps(held))
        found = [unlike([load(tmp_path/x), load(tmp_path/y)]) for x, y in ("ab", "ba")]
        assert len(found[0]) == len(found[1])
        return " ".join(found[0])

    @pytest.mark.parametrize(
        "change, says",
        [
            ({"rope_theta": 5e5}, "rope_theta = 10000.0 and 500000.0"),
            ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "factor = None and 4.0"),
            ({"num_attention_heads": 4}, "num_attention_heads = 2 and 4"),
            ({"hidden_act": "gelu"}, "hidden_act = 'silu' and 'gelu'"),
            ({"rms_norm_eps": 1e-3}, "rms_norm_eps = 1e-06 and 0.001"),
            ({"problem_type": "multi_label_classification"}, ""),
            ({"attention_dropout": 0.5, "torch_dtype": "float16", "use_cache": False}, ""),
            ({"eos_token_id": 3, "trained_by": "me", "tie_word_embeddings": True}, ""),
            ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}}, ""),
            ({"hidden_act": "swish"}, ""),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_of_transformers(self, tmp_path, change, says):
        found = self.said(tmp_path, LLAMA, {**LLAMA, **change})
        assert says in found and bool(says) == bool(found)

    def test_in_a_part_of_a_model(self, tmp_path):
        other = {"model_type": "clip", "vision_config": {**VIT, "num_attention_heads": 4}}
        assert "vision_config.num_attention_heads = 2 and 4" in self.said(tmp_path, CLIP, other)

    def test_what_follows_from_the_problem(self, tmp_path):
        kinds = ("single_label_classification", "multi_label_classification")
        ours, theirs = ({"model_type": "bert", "problem_type": k} for k in kinds)
        assert "problem_type" in self.said(tmp_path, ours, theirs)

    def test_of_diffusers_with_defaults(self, tmp_path):
        unet = {"_class_name": "UNet2DModel", "_diffusers_version": "0.1", "sample_size": 8}
        other = {**unet, "act_fn": "gelu", "_diffusers_version": "0.2"}
        assert "act_fn = 'silu' and 'gelu'" in self.said(tmp_path, unet, other)

    def test_of_a_model_that_nobody_knows(self, tmp_path):
        ours, theirs = ({"model_type": "toy", "rope_theta": x, "steps": x} for x in (1.0, 2.0))
        found = self.said(tmp_path, ours, theirs)
        assert "rope_theta = 1.0 and 2.0" in found and "steps" not in found

    @pytest.mark.parametrize(
        "change, says",
        [
            ({"model_args": {"act_layer": "relu"}}, "act_layer = None and 'relu'"),
            ({"global_pool": "token"}, "global_pool = 'avg' and 'token'"),
            ({"model_args": {"num_classes": 3, "img_size": [32, 32]}}, ""),
        ],
        ids=["activation", "pooling", "what newer versions write"],
    )
    def test_of_timm(self, tmp_path, change, says):
        found = self.said(tmp_path, TIMM, {**TIMM, **change})
        assert says in found and bool(says) == bool(found)

    @pytest.mark.parametrize("key, part", [("quick_gelu", None), ("heads", "text_cfg")])
    def test_of_open_clip_where_only_one_says_it(self, tmp_path, key, part):
        ours = {"model_cfg": {"embed_dim": 4, "vision_cfg": {"layers": 1}, "text_cfg": {}}}
        theirs = json.loads(json.dumps(ours))
        (theirs["model_cfg"][part] if part else theirs["model_cfg"])[key] = 2
        assert f"{key} = None and 2" in self.said(tmp_path, ours, theirs, "open_clip_config.json")

    @pytest.mark.parametrize(
        "file, ours, theirs, says",
        [
            ("sentence_bert_config.json", {"max_seq_length": 8}, {"max_seq_length": 9}, "8 and 9"),
            (
                "config_sentence_transformers.json",
                {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
                {"prompts": {"query": "Q "}, "default_prompt_name": "query"},
                "prompts = {'query': 'q: '} and {'query': 'Q '}",
            ),
            (
                "config_sentence_transformers.json",
                {"activation_fn": "torch.nn.modules.linear.Identity"},
                {"activation_fn": "torch.nn.modules.activation.Sigmoid"},
                "activation_fn",
            ),
            ("gliner_config.json", {"span_mode": "a"}, {"span_mode": "b"}, "span_mode"),
            (
                "processor_config.json",
                {"image_processor": {"image_mean": [0.5]}},
                {"image_processor": {"image_mean": [0.4]}},
                "image_mean = [0.5] and [0.4]",
            ),
        ],
        ids=["length", "prompts", "activation", "spans", "pictures"],
    )
    def test_beside_the_config(self, tmp_path, file, ours, theirs, says):
        assert says in self.said(tmp_path, ours, theirs, file)

    def test_the_scores_of_words_are_pooled_otherwise(self, tmp_path):
        listed = [{"path": ""}, {"path": "1_Pool", "type": "models.SpladePooling"}]
        for n, how in (("a", "max"), ("b", "sum")):
            save(tmp_path/n, {"w": torch.ones(2)}, {"model_type": "toy"})
            (tmp_path/n/"1_Pool").mkdir()
            (tmp_path/n/"1_Pool"/"config.json").write_text(json.dumps({"pooling_strategy": how}))
            (tmp_path/n/"modules.json").write_text(json.dumps(listed))
        with pytest.raises(MergeError, match="SpladePooling of max.*SpladePooling of sum"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")


class TestOlderTransformers:
    "Versions before 5 have no tables of layouts: what they cannot line up is refused by name."

    def test_names_are_left_without_a_table(self, monkeypatch):
        from frechet_merge.matching.layouts import Layout, _stored_name

        monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
        assert _stored_name("w", Layout(None, {"u": "v"}, {}, ())) == "w"

    @pytest.mark.parametrize("version, offers", [("4.56.2", True), ("5.23.0", False)])
    def test_two_layouts(self, tmp_path, monkeypatch, version, offers):
        import transformers

        monkeypatch.setattr(transformers, "__version__", version)
        for n, lead in (("a", "tower.layers"), ("b", "model.tower.blocks")):
            state = {f"{lead}.{i}.w": torch.ones(4)*i for i in range(3)}
            save(tmp_path/n, state, {"model_type": "toy"})
        with pytest.raises(MergeError, match="one architecture in two layouts") as e:
            merge([tmp_path/"a", tmp_path/"b"])
        assert ("pip install 'transformers>=5'" in str(e.value)) == offers


def test_labels_of_timm_as_numbers_of_names(tmp_path):
    "timm writes a list of labels, or a mapping from their numbers."
    for i, (n, names) in enumerate((("a", {"0": "x", "1": "y"}), ("b", ["y", "x"]))):
        rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        config = {"architecture": "vit_tiny", "num_classes": 2, "label_names": names}
        save(tmp_path/n, {"head.weight": rows.flip(0) if i else rows}, config)
    held = merge([tmp_path/"a", tmp_path/"b"]).tensors["head.weight"]
    assert held.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_stray_shard_without_an_index(tmp_path):
    "One shard is no model: the remedy is not to name it, and the one that is offered works."
    state = {n: torch.full((2,), float(i)) for i, n in enumerate("uvx")}
    for n in "ab":
        (tmp_path/n).mkdir()
        for i, name in enumerate("uv", 1):
            file = tmp_path/n/f"model-{i:05d}-of-00002.safetensors"
            save_file({name: state[name]}, file)
    stray = tmp_path/"a"/"model-00003-of-00004.safetensors"
    save_file({"x": state["x"]}, stray)
    with pytest.raises(MergeError, match="Take out of the folder those that are not"):
        merge([tmp_path/"a", tmp_path/"b"])
    stray.unlink()
    assert set(merge([tmp_path/"a", tmp_path/"b"]).tensors) == {"u", "v"}

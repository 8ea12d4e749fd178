"""Folders of other libraries than transformers: what each of them looks for is what it finds, and
what decides the function beside the weights is told apart."""

import json

import pytest
import torch
from conftest import save
from safetensors.torch import load_file, save_file

from frechet_merge import merge


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

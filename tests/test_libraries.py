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

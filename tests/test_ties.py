"""Names of one tensor stay one, whichever of them a file stores; a layer that has its own numbers
keeps them. transformers is asked what a merge of its models is, and is the oracle of the result."""

import json
import time

import pytest
import torch
from conftest import save
from safetensors.torch import load_file, save_file

from frechet_merge import MergeError, load, merge
from frechet_merge.matching.ties import known_of

transformers = pytest.importorskip("transformers")
SMALL = dict(vocab_size=40, max_position_embeddings=32)
HEADS = dict(encoder_attention_heads=2, decoder_attention_heads=2)
SEQ = dict(
    d_model=8,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=2,
    **HEADS,
)
ENCODER = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0
)
KINDS = {
    "gpt2": ("GPT2", "LMHeadModel", dict(n_embd=8, n_layer=1, n_head=2, vocab_size=40)),
    "bart": ("Bart", "ForConditionalGeneration", SEQ | SMALL),
    "led": (
        "LED",
        "ForConditionalGeneration",
        SEQ | dict(vocab_size=40, attention_window=4, max_decoder_position_embeddings=32),
    ),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        dict(vocab_size=40, d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=1),
    ),
    "bert": ("Bert", "ForMaskedLM", ENCODER | SMALL),
    "luke": ("Luke", "ForMaskedLM", ENCODER | SMALL | dict(entity_vocab_size=9)),
}


def model(kind, seed):
    "A model of random numbers, biases included."
    name, task, sizes = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**sizes)
    made = getattr(transformers, f"{name}{task}")(config)
    with torch.no_grad():
        for x in made.parameters():
            x.copy_(torch.randn(x.shape))
    return made


def put(made, folder, copies=False):
    "A folder of `save_pretrained`, or with a copy of every tied tensor."
    made.save_pretrained(folder)
    if copies:
        state = {n: x.contiguous().clone() for n, x in made.state_dict().items()}
        save_file(state, folder/"model.safetensors", {"format": "pt"})
    return folder


def opened(kind, folder):
    "A model, and what did not fit when it was opened."
    name, task, _ = KINDS[kind]
    cls = getattr(transformers, f"{name}{task}")
    made, said = cls.from_pretrained(folder, output_loading_info=True)
    return made, {k: v for k, v in said.items() if v}


def groups(made):
    "Names that are one parameter."
    found = {}
    for name, x in made.named_parameters(remove_duplicate=False):
        found.setdefault(id(x), set()).add(name)
    return {frozenset(names) for names in found.values()}


def is_the_mean(kind, out, a, b):
    "Whether a folder is, to transformers, the mean of two models, tied as they are."
    merged, odd = opened(kind, out)
    assert not odd and groups(merged) == groups(a)
    ours, theirs, state = a.state_dict(), b.state_dict(), merged.state_dict()
    assert state.keys() == ours.keys()
    for name, x in state.items():
        torch.testing.assert_close(x, (ours[name] + theirs[name])/2)
    return True


class TestStored:
    "It is no matter which of the names of a tensor a file stores."

    @pytest.mark.parametrize("stored", [(False, False), (False, True), (True, False), (True, True)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_copies_are_ties(self, tmp_path, kind, stored):
        a, b = model(kind, 0), model(kind, 1)
        folders = [put(m, tmp_path/n, c) for m, n, c in zip((a, b), "ab", stored)]
        out = merge(folders, out=tmp_path/"o").out
        assert is_the_mean(kind, out, a, b)
        said = json.loads((out/"config.json").read_text())
        assert said == json.loads((tmp_path/"a"/"config.json").read_text()) | {
            k: said[k] for k in ("dtype", "torch_dtype") if k in said
        }

    def test_a_base_that_stores_copies(self, tmp_path):
        models = [model("bart", k) for k in range(3)]
        folders = [put(m, tmp_path/str(k), copies=k == 2) for k, m in enumerate(models)]
        out = merge(folders[:2], base=folders[2], out=tmp_path/"o").out
        assert is_the_mean("bart", out, *models[:2])

    def test_of_a_class_that_nobody_knows(self, tmp_path):
        config = {"model_type": "mine", "vocab_size": 9}
        states = [{"emb.weight": torch.randn(9, 4), "w": torch.randn(4)} for _ in range(2)]
        a = save(tmp_path/"a", states[0], config)
        b = save(
            tmp_path/"b", states[1] | {"lm_head.weight": states[1]["emb.weight"].clone()}, config
        )
        for models in ([a, b], [b, a]):
            merged = merge(models).tensors
            assert torch.equal(merged["lm_head.weight"], merged["emb.weight"])

    def test_ones_are_no_copies(self, tmp_path):
        "A head of zeros, before any training, is no evidence."
        config = {"model_type": "mine", "vocab_size": 9}
        a = save(tmp_path/"a", {"emb.weight": torch.zeros(9, 4), "w": torch.ones(4)}, config)
        more = {"emb.weight": torch.zeros(9, 4), "lm_head.weight": torch.zeros(9, 4)}
        b = save(tmp_path/"b", more | {"w": torch.ones(4)}, config)
        with pytest.raises(MergeError, match="has no tensor 'lm_head.weight'"):
            merge([a, b])

    def test_layers_that_are_copies_are_layers(self):
        "A model that was made deeper by doubling its layers."
        w = torch.randn(4, 4)
        deep = {"layers.0.q.weight": w, "layers.1.q.weight": w.clone(), "n": torch.randn(4)}
        flat = {"layers.0.q.weight": torch.randn(4, 4), "n": torch.randn(4)}
        with pytest.raises(MergeError, match="2 and 1 layers"):
            merge([deep, flat])


class TestUntied:
    "An output layer of its own beside one that is tied."

    @pytest.mark.parametrize("order", [[0, 1], [1, 0]])
    @pytest.mark.parametrize("kind", ["gpt2", "bart", "t5"])
    def test_is_merged_and_said(self, tmp_path, kind, order):
        a, b = model(kind, 0), model(kind, 1)
        folders = [put(a, tmp_path/"a"), put(b, tmp_path/"b", copies=True)]
        state = load_file(folders[1]/"model.safetensors")
        own = torch.randn_like(state["lm_head.weight"])
        save_file(state | {"lm_head.weight": own}, folders[1]/"model.safetensors")
        # as on the hub
        for folder in folders:
            config = json.loads((folder/"config.json").read_text())
            config.pop("tie_word_embeddings", None)
            (folder/"config.json").write_text(json.dumps(config))
        with pytest.warns(UserWarning, match="ties its output layer"):
            out = merge([folders[k] for k in order], out=tmp_path/"o").out
        merged, odd = opened(kind, out)
        assert not odd
        said = json.loads((out/"config.json").read_text())
        # which T5 understands otherwise
        assert said.get("tie_word_embeddings") is (None if kind == "t5" else False)
        embedding = a.get_input_embeddings().weight
        other = b.get_input_embeddings().weight
        head = merged.get_output_embeddings().weight
        torch.testing.assert_close(head, (embedding + own)/2)
        for name, x in merged.named_parameters():
            if "embed_tokens" in name or "shared" in name or "wte" in name:
                torch.testing.assert_close(x, (embedding + other)/2)

    def test_in_both_is_said_where_the_config_ties(self, tmp_path):
        folders = []
        for k, name in enumerate("ab"):
            folders.append(put(model("gpt2", k), tmp_path/name, copies=True))
            state = load_file(folders[k]/"model.safetensors")
            own = {"lm_head.weight": torch.randn(40, 8)}
            save_file(state | own, folders[k]/"model.safetensors")
        out = merge(folders, out=tmp_path/"o").out
        heads = [load_file(f/"model.safetensors")["lm_head.weight"] for f in folders]
        merged, odd = opened("gpt2", out)
        assert not odd
        torch.testing.assert_close(merged.lm_head.weight.detach(), sum(heads)/2)
        assert json.loads((out/"config.json").read_text())["tie_word_embeddings"] is False

    def test_the_parts_of_a_config_say_it_too(self, tmp_path):
        "transformers 4 and vLLM ask the text model's."
        config = {
            "model_type": "mine",
            "tie_word_embeddings": True,
            "text_config": {"vocab_size": 9, "tie_word_embeddings": True},
        }
        states = [{"emb.weight": torch.randn(9, 4)} for _ in range(2)]
        states[1]["lm_head.weight"] = torch.randn(9, 4)
        models = [save(tmp_path/n, s, config) for n, s in zip("ab", states)]
        merge(models, out=tmp_path/"o")
        said = json.loads((tmp_path/"o"/"config.json").read_text())
        assert said["tie_word_embeddings"] is said["text_config"]["tie_word_embeddings"] is False

    @pytest.mark.parametrize("order", [[0, 1], [1, 0]])
    def test_is_not_made_up_where_the_config_says_that_there_is_one(self, tmp_path, order):
        "One of two untied models was saved without its output layer."
        config = {"model_type": "llama", "vocab_size": 9, "tie_word_embeddings": False}
        states = [{"emb.weight": torch.randn(9, 4)} for _ in range(2)]
        states[1]["lm_head.weight"] = states[1]["emb.weight"].clone()
        models = [save(tmp_path/n, s, config) for n, s in zip("ab", states)]
        models = [models[k] for k in order]
        with pytest.raises(MergeError, match=r"drop='lm_head\.\*'"):
            merge(models)
        # the remedy
        merged = merge(models, drop="lm_head.*").tensors
        assert set(merged) == {"emb.weight"}
        want = (states[0]["emb.weight"] + states[1]["emb.weight"])/2
        torch.testing.assert_close(merged["emb.weight"], want)


class TestAsked:
    "What transformers is asked, and what it is not."

    def test_a_config_without_end_is_not_built(self):
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        assert known_of(config) is not None
        since = time.monotonic()
        assert known_of(config | {"n_layer": 10**9}) is None
        assert known_of(config | {"part": {"num_layers": 10**9}}) is None
        assert time.monotonic() - since < 60

    @pytest.mark.parametrize(
        "architectures", [None, 3, [], [3], ["os"], ["AutoModel"], ["GPT2Config"], ["no such"]]
    )
    def test_what_is_no_model_is_not_made(self, architectures):
        assert known_of({"model_type": "gpt2", "architectures": architectures}) is None

    def test_models_that_agree_are_not_asked_about(self, tmp_path, monkeypatch):
        import frechet_merge.matching.ties as ties

        folders = [put(model("gpt2", k), tmp_path/str(k)) for k in range(2)]
        monkeypatch.setattr(ties, "hollow", lambda config, named: pytest.fail("asked"))
        merge(folders, out=tmp_path/"o")


class TestConstants:
    "What a library computes is copied."

    def test_the_same_in_all_is_not_rounded(self):
        "Three weights of a third do not add up to one."
        inv = torch.rand(16)
        states = [{"rotary_emb.inv_freq": inv, "w": torch.randn(2)} for _ in range(3)]
        merged = merge(states, weights=[1, 1, 1]).tensors
        assert torch.equal(merged["rotary_emb.inv_freq"], inv)

    @pytest.mark.parametrize("order", [[0, 1], [1, 0]])
    def test_of_another_length_is_the_first_models_and_is_said(self, order):
        states = [
            {"embeddings.position_ids": torch.arange(n)[None], "w": torch.randn(2)} for n in (4, 6)
        ]
        models = [states[k] for k in order]
        with pytest.warns(UserWarning, match="position_ids.*is computed and not trained"):
            merged = merge(models).tensors
        name = "embeddings.position_ids"
        assert torch.equal(merged[name], models[0][name])

    def test_of_another_kind_or_other_numbers_too(self):
        mask = torch.ones(1, 1, 4, 4).tril()
        states = [
            {"h.0.attn.bias": mask.bool(), "position_ids": torch.arange(4), "w": torch.ones(2)},
            {"h.0.attn.bias": mask, "position_ids": torch.arange(1, 5), "w": torch.ones(2)},
        ]
        with pytest.warns(UserWarning):
            merged = merge(states).tensors
        assert torch.equal(merged["h.0.attn.bias"], mask.bool())
        assert torch.equal(merged["position_ids"], torch.arange(4))

    def test_the_bases_are_taken_if_there_is_one(self):
        states = [{"position_ids": torch.arange(n), "w": torch.randn(2)} for n in (4, 4, 6)]
        with pytest.warns(UserWarning, match="is computed"):
            merged = merge(states[:2], base=states[2]).tensors
        assert len(merged["position_ids"]) == 6

    def test_other_integers_are_refused_still(self):
        states = [{"ids": torch.arange(n, n + 3), "w": torch.randn(2)} for n in (0, 1)]
        with pytest.raises(MergeError, match="integers"):
            merge(states)

    def test_bounds_that_were_never_set(self, tmp_path):
        "Gemma's encoder of sound clips to them."
        high = torch.tensor(torch.inf)
        bound = {"ffw.input_max": high, "ffw.input_min": -high}
        models = [save(tmp_path/n, bound | {"w": torch.randn(3)}) for n in "ab"]
        out = merge(models, out=tmp_path/"o").out
        found = load(out)
        assert found["ffw.input_max"] == torch.inf and found["ffw.input_min"] == -torch.inf

    def test_other_infinities_are_refused_still(self):
        for name in ("w", "input_max_gain"):
            states = [{name: torch.tensor([1.0, torch.inf])} for _ in range(2)]
            with pytest.raises(MergeError, match="inf"):
                merge(states)

    def test_what_is_not_a_number_is_refused_still(self):
        states = [{"rotary_emb.inv_freq": torch.tensor([1.0, torch.nan])} for _ in range(2)]
        with pytest.raises(MergeError, match="nan"):
            merge(states)

"""Models of different vocabularies: rows are matched by token, and transformers opens the result.

The oracle is the mean of the state dicts, written out token by token.
"""
import json

import pytest
import torch
from conftest import cli, save
from safetensors.torch import load_file
from test_meaning import randn
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from frechet_merge import load, merge
from frechet_merge.diagnostics.inspection import inspect
from frechet_merge.merging.merge import make
from frechet_merge.merging.record import Record
from frechet_merge.messages import MergeError

SIZES = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
)
EMBEDDING = "model.embed_tokens.weight"
WORDS = [f"w{i}" for i in range(30)]


def model(folder, seed, vocab, rows=None, **config):
    "A tiny language model with a tokenizer, whose last token ends a text."
    torch.manual_seed(seed)
    n = len(vocab) if rows is None else rows
    said = {**SIZES, "vocab_size": n, "eos_token_id": len(vocab) - 1, **config}
    LlamaForCausalLM(LlamaConfig(**said)).save_pretrained(folder)
    numbers = {t: i for i, t in enumerate(vocab)}
    (folder/"tokenizer.json").write_text(json.dumps({"model": {"vocab": numbers}}))
    return folder


def states(*folders):
    "The tensors that transformers finds in folders, nothing missing."
    found = []
    for f in folders:
        m, info = AutoModelForCausalLM.from_pretrained(f, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        found.append(m.state_dict())
    return found


def config(folder):
    return json.loads((folder/"config.json").read_text())


class TestLonger:
    "One vocabulary goes on where the other ends: nothing is to be chosen."

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("first", ["short", "long"])
    def test_known_rows_are_averaged_and_new_ones_kept(self, tmp_path, first, tied):
        short = model(tmp_path/"short", 0, WORDS, tie_word_embeddings=tied)
        long = model(tmp_path/"long", 1, [*WORDS, "<a>", "<b>"], tie_word_embeddings=tied)
        order = [short, long] if first == "short" else [long, short]
        with pytest.warns(UserWarning, match="a row that some models lack"):
            merge(order, out=tmp_path/"o")
        a, b, m = states(short, long, tmp_path/"o")
        for name in m:
            x = torch.cat([a[name], b[name][30:]]) if len(a[name]) == 30 else a[name]
            torch.testing.assert_close(m[name], (x + b[name])/2, msg=name)
        assert config(tmp_path/"o")["vocab_size"] == 32
        assert config(tmp_path/"o")["eos_token_id"] == 31
        assert "<b>" in (tmp_path/"o"/"tokenizer.json").read_text()

    def test_weights_of_those_who_know(self, tmp_path):
        models = [
            model(tmp_path/"a", 0, WORDS),
            model(tmp_path/"b", 1, [*WORDS, "<x>"]),
            model(tmp_path/"c", 2, [*WORDS, "<x>"]),
        ]
        with pytest.warns(UserWarning, match="a row that some models lack"):
            m = merge(models, weights=[5, 1, 3]).tensors
        _, b, c = states(*models)
        want = (b[EMBEDDING][30] + 3*c[EMBEDDING][30])/4
        torch.testing.assert_close(m[EMBEDDING][30], want)

    def test_a_row_that_the_base_lacks_is_not_scaled(self, tmp_path):
        base = model(tmp_path/"base", 0, WORDS)
        a, b = model(tmp_path/"a", 1, WORDS), model(tmp_path/"b", 2, [*WORDS, "<x>"])
        with pytest.warns(UserWarning, match="a row that some models lack"):
            merge([a, b], base=base, scale=0.5, out=tmp_path/"o")
        z, x, y, m = states(base, a, b, tmp_path/"o")
        torch.testing.assert_close(m[EMBEDDING][30], y[EMBEDDING][30])
        mean = (x[EMBEDDING][:30] + y[EMBEDDING][:30])/2
        torch.testing.assert_close(m[EMBEDDING][:30], (z[EMBEDDING] + mean[:30])/2)

    def test_a_row_that_only_the_base_has_stays(self, tmp_path):
        "Neither scaled away nor zero, whoever asks for it."
        base = model(tmp_path/"base", 0, [*WORDS, "<x>"])
        a, b = model(tmp_path/"a", 1, WORDS), model(tmp_path/"b", 2, WORDS)
        for i, given in enumerate(({}, {"tokenizer": "base"}, {"geometry": "sphere"})):
            with pytest.warns(UserWarning, match="a row that some models lack"):
                merge([a, b], base=base, out=tmp_path/f"o{i}", **given)
            z, m = states(base, tmp_path/f"o{i}")
            torch.testing.assert_close(m[EMBEDDING][30], z[EMBEDDING][30])

    def test_padding_is_no_token(self, tmp_path):
        "Two matrices of one size: what one has in a row that the other left free is a token."
        a, b = model(tmp_path/"a", 0, WORDS, rows=32), model(tmp_path/"b", 1, [*WORDS, "<x>"], 32)
        for order in ([a, b], [b, a]):
            with pytest.warns(UserWarning, match="a row that some models lack"):
                m = merge(order, out=tmp_path/order[0].name/"o").out
            x, y, found = states(a, b, m)
            torch.testing.assert_close(found[EMBEDDING][30], y[EMBEDDING][30])
            torch.testing.assert_close(found[EMBEDDING][31], (x[EMBEDDING] + y[EMBEDDING])[31]/2)
            assert "<x>" in (m/"tokenizer.json").read_text()

    def test_the_most_rows_are_not_the_most_tokens(self, tmp_path):
        a, b = model(tmp_path/"a", 0, WORDS, rows=40), model(tmp_path/"b", 1, [*WORDS, "<x>"])
        with pytest.warns(UserWarning, match="a row that some models lack"):
            merge([a, b], out=tmp_path/"o")
        y, m = states(b, tmp_path/"o")
        torch.testing.assert_close(m[EMBEDDING][30], y[EMBEDDING][30])
        assert len(m[EMBEDDING]) == 31

    def test_more_rows_of_which_nobody_knows(self, tmp_path):
        a, b = model(tmp_path/"a", 0, WORDS), model(tmp_path/"b", 1, WORDS, rows=40)
        (b/"tokenizer.json").unlink()
        with pytest.raises(MergeError, match="no tokenizer beside it says"):
            merge([a, b])

    def test_each_has_a_token_that_the_other_lacks(self, tmp_path):
        a, b = model(tmp_path/"a", 0, [*WORDS, "<x>"], 33), model(tmp_path/"b", 1, WORDS, 33)
        numbers = {**{t: i for i, t in enumerate(WORDS)}, "<y>": 31}
        (b/"tokenizer.json").write_text(json.dumps({"model": {"vocab": numbers}}))
        with pytest.raises(MergeError, match="no model knows the tokens of all"):
            merge([a, b])

    def test_padding(self, tmp_path):
        "Rows without a token are matched by number."
        a, b = model(tmp_path/"a", 0, WORDS, rows=32), model(tmp_path/"b", 1, WORDS, rows=40)
        with pytest.warns(UserWarning, match="a row that some models lack"):
            merge([a, b], out=tmp_path/"o")
        x, y, m = states(a, b, tmp_path/"o")
        torch.testing.assert_close(m[EMBEDDING][:32], (x[EMBEDDING] + y[EMBEDDING][:32])/2)
        torch.testing.assert_close(m[EMBEDDING][32:], y[EMBEDDING][32:])

    @pytest.mark.parametrize("geometry", ["sphere", "euclidean", "epimer"])
    def test_every_geometry(self, tmp_path, geometry):
        base = model(tmp_path/"base", 0, WORDS)
        a, b = model(tmp_path/"a", 1, WORDS), model(tmp_path/"b", 2, [*WORDS, "<x>"])
        given = {"base": base} if geometry == "epimer" else {}
        with pytest.warns(UserWarning, match="a row that some models lack"):
            m = merge([a, b], geometry, out=tmp_path/"o", **given)
        assert m.tensors[EMBEDDING].shape == (31, 16)
        states(tmp_path/"o")

    def test_biases_of_an_output_layer(self, tmp_path):
        "BART has one in a row of its own."
        sizes = dict(
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
            encoder_ffn_dim=12,
            decoder_ffn_dim=12,
            max_position_embeddings=9,
        )
        for i, n in enumerate((50, 53)):
            torch.manual_seed(i)
            m = BartForConditionalGeneration(BartConfig(vocab_size=n, **sizes))
            m.final_logits_bias += torch.arange(n)
            m.save_pretrained(tmp_path/f"m{i}")
        with pytest.warns(UserWarning, match="a row that some models lack"):
            merge([tmp_path/"m0", tmp_path/"m1"], out=tmp_path/"o")
        m = BartForConditionalGeneration.from_pretrained(tmp_path/"o")
        assert m.model.shared.weight.shape == (53, 8)
        torch.testing.assert_close(m.final_logits_bias, torch.arange(53.0)[None])


class TestChosen:
    "Vocabularies that contradict each other."

    @pytest.fixture
    def two(self, tmp_path):
        "The second has the words the other way round, and a token more."
        return model(tmp_path/"a", 0, WORDS), model(tmp_path/"b", 1, [*WORDS[::-1], "<x>"])

    @pytest.mark.parametrize("choice", ["a", "b", "union"])
    def test_rows_of_one_token_are_averaged(self, two, tmp_path, choice):
        a, b = two
        named = {"a": a, "b": b, "union": "union"}[choice]
        m = merge([a, b], tokenizer=named, out=tmp_path/"o").tensors
        x, y, m = states(a, b, tmp_path/"o")
        vocab = WORDS if choice == "a" else [*WORDS[::-1], "<x>"]
        for name in (EMBEDDING, "lm_head.weight"):
            assert len(m[name]) == len(vocab)
            for i, token in enumerate(vocab):
                at = [[*WORDS].index(token)] if token in WORDS else []
                rows = [y[name][[*WORDS[::-1], "<x>"].index(token)], *x[name][at]]
                torch.testing.assert_close(m[name][i], sum(rows)/len(rows), msg=token)
        norm = "model.norm.weight"
        torch.testing.assert_close(m[norm], (x[norm] + y[norm])/2)
        saved = config(tmp_path/"o")
        assert saved["eos_token_id"] == len(vocab) - 1 and saved["vocab_size"] == len(vocab)
        tokenizer = json.loads((tmp_path/"o"/"tokenizer.json").read_text())
        assert [*tokenizer["model"]["vocab"]] == vocab

    def test_the_base(self, two, tmp_path):
        base = model(tmp_path/"base", 2, WORDS)
        merge([*two], base=base, tokenizer="base", out=tmp_path/"o")
        merge([*two], base=base, tokenizer=two[0], out=tmp_path/"p")
        for name, x in load_file(tmp_path/"o"/"model.safetensors").items():
            torch.testing.assert_close(load(tmp_path/"p")[name], x)

    def test_without_a_choice_the_error_says_how(self, two, tmp_path):
        reverse = model(tmp_path/"c", 2, WORDS[::-1])
        for other in (two[1], reverse):
            with pytest.raises(MergeError, match="number 0 for 'w0' and for 'w29'") as e:
                merge([two[0], other])
            assert "--tokenizer" in str(e.value)
        code, _, said = cli("merge", "a", "b", "-o", "o", "--tokenizer", "a", cwd=tmp_path)
        assert code == 0, said
        states(tmp_path/"o")

    def test_no_model_knows_all(self, two, tmp_path):
        c = model(tmp_path/"c", 3, [*WORDS, "<y>"])
        with pytest.raises(MergeError, match="no model knows the tokens of all") as e:
            merge([two[1], c], tokenizer="union")
        named = str(e.value).split("tokenizer='")[1].split("'")[0]
        merge([two[1], c], tokenizer=named)

    def test_a_record_says_it(self, two, tmp_path):
        merge([*two], tokenizer=two[1], out=tmp_path/"o")
        again = make(Record.read(tmp_path/"o").again()).tensors
        for name, x in load_file(tmp_path/"o"/"model.safetensors").items():
            assert torch.equal(again[name], x), name

    @pytest.mark.parametrize(
        "choice, says", [("nobody", "is none of"), ("base", "give base=")]
    )
    def test_other_names(self, two, choice, says):
        with pytest.raises(ValueError, match=says):
            merge([*two], tokenizer=choice)

    def test_the_base_s_is_that_of_a_base(self, two):
        with pytest.raises(ValueError, match=r"give base= \(--base\) too"):
            merge([*two], tokenizer="base")
        merge([*two], tokenizer="base", base=two[1], out=two[0].parent/"o")
        found = (two[0].parent/"o"/"tokenizer.json").read_bytes()
        assert found == (two[1]/"tokenizer.json").read_bytes()

    def test_a_model_without_a_tokenizer(self, two):
        (two[1]/"tokenizer.json").unlink()
        with pytest.raises(MergeError, match="no tokenizer of a kind"):
            merge([*two], tokenizer=two[0])

    def test_a_matrix_of_which_nobody_knows(self, tmp_path):
        "A number of rows is not left to be a coincidence."
        folders = []
        for i, vocab in enumerate((["a", "b", "c"], ["c", "b", "a"])):
            state = {"wte.weight": randn(3, 2, seed=i), "odd.weight": randn(3, 5, seed=i)}
            f = save(tmp_path/str(i), state, {"vocab_size": 3})
            (f/"vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
            folders.append(f)
        with pytest.raises(MergeError, match="'odd.weight' has 3 rows"):
            merge(folders, tokenizer=folders[0])


def speaker(folder, seed, words, added=(), rows=None, **config):
    "A tiny language model with a tokenizer that transformers opens, and special tokens added."
    numbers = {t: i for i, t in enumerate(["<unk>", *words])}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    torch.manual_seed(seed)
    n = len(tokenizer) if rows is None else rows
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": n, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check_rows(out, folders, weights):
    "Each token's row is the weighted mean of those that know it."
    vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
    known = [AutoTokenizer.from_pretrained(f).get_vocab() for f in folders]
    assert {*vocabulary} == {t for v in known for t in v}
    *every, m = states(*folders, out)
    for name in {EMBEDDING, "lm_head.weight"}:
        for token, i in vocabulary.items():
            rows = [(w, s[name][v[token]]) for w, s, v in zip(weights, every, known) if token in v]
            want = sum(w*x for w, x in rows)/sum(w for w, _ in rows)
            torch.testing.assert_close(m[name][i], want, msg=f"{name} {token}")


class TestUnion:
    "No model knows the tokens of all."

    @pytest.mark.parametrize("tied", [False, True])
    def test_each_added_tokens(self, tmp_path, tied):
        more = {"tie_word_embeddings": tied, "eos_token_id": 3}
        folders = [
            speaker(tmp_path/"a", 0, WORDS, ["<x>"], **more),
            speaker(tmp_path/"b", 1, WORDS, ["<y>", "<x>"], **{**more, "eos_token_id": 4}),
            speaker(tmp_path/"c", 2, WORDS, ["<z>"], 40, **more),
        ]
        for order in ([0, 1, 2], [2, 0, 1]):
            out, found = tmp_path/f"o{order[0]}", [folders[i] for i in order]
            merge(found, weights=[1, 2, 3], tokenizer="union", out=out)
            check_rows(out, found, [1, 2, 3])
            tokenizer = AutoTokenizer.from_pretrained(out)
            first = AutoTokenizer.from_pretrained(found[0]).get_vocab()
            assert first.items() <= tokenizer.get_vocab().items()
            special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
            assert {"<x>", "<y>", "<z>"} <= special
            assert config(out)["eos_token_id"] == config(found[0])["eos_token_id"]
            assert config(out)["vocab_size"] == (34 if order[0] == 0 else 40)
            ids = tokenizer("w1 <z> w2 <y>").input_ids
            assert ids == tokenizer.convert_tokens_to_ids(["w1", "<z>", "w2", "<y>"])

    def test_words_of_another_tokenizer_are_said(self, tmp_path):
        folders = [
            speaker(tmp_path/"a", 0, ["two", *WORDS]),
            speaker(tmp_path/"b", 1, ["one", *WORDS[::-1]]),
        ]
        with pytest.warns(UserWarning, match="come into the union"):
            merge(folders, tokenizer="union", out=tmp_path/"o")
        check_rows(tmp_path/"o", folders, [1, 1])

    def test_it_is_the_remedy_where_tokens_share_a_number(self, tmp_path):
        for name, token in (("a", "<x>"), ("b", "<y>")):
            speaker(tmp_path/name, 0, WORDS, [token])
        with pytest.raises(MergeError, match="tokenizer='union'"):
            merge([tmp_path/"a", tmp_path/"b"])
        code, _, said = cli("merge", "a", "b", "-o", "o", "--tokenizer", "union", cwd=tmp_path)
        assert code == 0, said
        check_rows(tmp_path/"o", [tmp_path/"a", tmp_path/"b"], [1, 1])


class TestPadding:
    "The number of rows is to be a multiple of a number."

    @pytest.mark.parametrize("choice", [None, "union"])
    def test_new_rows_are_means(self, tmp_path, choice):
        added = (["<x>"], ["<x>"]) if choice is None else (["<x>"], ["<y>"])
        folders = [speaker(tmp_path/"ab"[i], i, WORDS, added[i]) for i in range(2)]
        out = tmp_path/"o"
        with pytest.warns(UserWarning, match="the mean of the other rows"):
            merge(folders, tokenizer=choice, pad_to_multiple_of=20, out=out)
        check_rows(out, folders, [1, 1])
        a, b, m = states(*folders, out)
        assert len(m[EMBEDDING]) == 40 == config(out)["vocab_size"]
        want = (a[EMBEDDING].mean(0) + b[EMBEDDING].mean(0))/2
        torch.testing.assert_close(m[EMBEDDING][39], want)

    def test_on_the_command_line(self, tmp_path):
        for i, name in enumerate("ab"):
            speaker(tmp_path/name, i, WORDS)
        words = ["merge", "a", "b", "-o", "o", "--pad-to-multiple-of", "16"]
        code, _, said = cli(*words, cwd=tmp_path)
        assert code == 0, said
        assert config(tmp_path/"o")["vocab_size"] == 32
        assert "--pad-to-multiple-of 16" in Record.read(tmp_path/"o").command


def test_inspect_compares_rows_of_one_token(tmp_path):
    "As `merge` merges them."
    models = [model(tmp_path/"a", 0, WORDS), model(tmp_path/"b", 1, [*WORDS, "<x>"])]
    with pytest.warns(UserWarning, match="a row that some models lack"):
        found = inspect(models)
    assert found.mergeable and not found.shapes
    other = model(tmp_path/"c", 2, WORDS[::-1])
    assert not inspect([models[0], other]).mergeable


def test_without_a_tokenizer_no_row_has_a_token(tmp_path):
    "Both remedies are taken, and give the plain mean, which numbers and tokens agree on."
    a, b = (model(tmp_path/n, i, WORDS) for i, n in enumerate("ab"))
    kept = (b/"tokenizer.json").read_text()
    (b/"tokenizer.json").unlink()
    with pytest.raises(MergeError, match="b: has no tokenizer of a kind .*\n.*; or choose none"):
        merge([a, b], tokenizer=str(a))
    one = merge([a, b]).tensors
    (b/"tokenizer.json").write_text(kept)
    two = merge([a, b], tokenizer=str(a)).tensors
    by_hand = (load(a)[EMBEDDING] + load(b)[EMBEDDING])/2
    for found in (one, two):
        torch.testing.assert_close(found[EMBEDDING], by_hand)

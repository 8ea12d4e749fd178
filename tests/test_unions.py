"""A union of real tokenizers: transformers opens it, and texts of either model get the right rows.

The oracles are transformers' own tokenizers, and the mean of the rows token by token.
"""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from spoken import (
    KINDS,
    byte_fallback,
    byte_level,
    in_files,
    model_for,
    opened,
    sentencepieces,
    talker,
    unigram,
    with_tokens,
    word_piece,
)
from test_vocabularies import EMBEDDING, check_rows, config, states
from transformers import (
    BertTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from frechet_merge import merge
from frechet_merge.vocabularies.tokenizers import read_tokens
from frechet_merge.messages import MergeError

ONE, OTHER = "abcdefgh", "efghijkl"  # letters of two models


def two(tmp_path, make, letters=(ONE, OTHER), **more):
    "Two models with tokenizers of a kind, each with a special token."
    every = zip("ab", letters, ("<|x|>", "<|y|>"))
    return [
        talker(tmp_path/name, with_tokens(make(known), [token]), i, **more)
        for i, (name, known, token) in enumerate(every)
    ]


def check_texts(out, folders, texts):
    "The first model's numbers stay, and texts are split into tokens that either model has."
    union, first = opened(out), opened(folders[0])
    assert first.get_vocab().items() <= union.get_vocab().items()
    known = set().union(*(opened(f).get_vocab() for f in folders))
    for text in texts:
        assert {*union.tokenize(text)} <= known, text
        assert union(text).input_ids == union.convert_tokens_to_ids(union(text).tokens())


class TestKinds:
    "Byte-level BPE, BPE that falls back to bytes, Unigram and WordPiece."

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tied", [False, True])
    def test_rows_and_texts(self, tmp_path, kind, tied):
        folders = two(tmp_path, KINDS[kind], tie_word_embeddings=tied)
        with pytest.warns(UserWarning, match="come into the union"):
            merge(folders, weights=[1, 3], tokenizer="union", out=tmp_path/"o")
        check_rows(tmp_path/"o", folders, [1, 3])
        check_texts(tmp_path/"o", folders, ["abc feg<|x|>hh", "ijk efl <|y|>hh"])
        a, b = map(opened, folders)
        union = opened(tmp_path/"o")
        assert union.tokenize("abcd<|x|>ba") == a.tokenize("abcd<|x|>ba")
        assert union.tokenize("ijkl<|y|>kl") == b.tokenize("ijkl<|y|>kl")
        assert config(tmp_path/"o")["vocab_size"] == len(union)
        assert union.eos_token == a.eos_token and union.eos_token_id == a.eos_token_id

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_three(self, tmp_path, kind):
        folders = two(tmp_path, KINDS[kind])
        third = with_tokens(KINDS[kind]("mnop"), ["<|z|>", "<|x|>"])
        folders.append(talker(tmp_path/"c", third, 2))
        merge(folders, tokenizer="union", out=tmp_path/"o")
        check_rows(tmp_path/"o", folders, [1, 1, 1])
        check_texts(tmp_path/"o", folders, ["abc<|x|>", "ijk<|y|>", "mno<|z|>"])

    @pytest.mark.parametrize("kind", ["byte_level", "word_piece"])
    def test_other_letters_are_split_as_each_did(self, tmp_path, kind):
        "Two models that were given words of their own: the union splits both as before."
        folders = two(tmp_path, KINDS[kind], ("abcd", "mnop"))
        with pytest.warns(UserWarning, match="come into the union") as said:
            merge(folders, tokenizer="union", out=tmp_path/"o")
        text = next(str(w.message) for w in said if "come into" in str(w.message))
        assert re.findall(r"(\d+) of \d+ otherwise", text) == ["0", "0"]
        for folder, words in zip(folders, ("abca dcba", "mnop ponm")):
            assert opened(tmp_path/"o").tokenize(words) == opened(folder).tokenize(words)

    def test_a_tokenizer_that_grew(self, tmp_path):
        "One has all pieces of the other and more, and another order of merges."
        small, large = byte_level(ONE, 290), byte_level(ONE, 330)
        assert {*small.get_vocab()} < {*large.get_vocab()}
        folders = [
            talker(tmp_path/"a", with_tokens(small, ["<|x|>"]), 0),
            talker(tmp_path/"b", with_tokens(large, ["<|y|>"]), 1),
        ]
        merge(folders, tokenizer="union", out=tmp_path/"o")
        check_rows(tmp_path/"o", folders, [1, 1])
        texts = ["abcde fghab cdefg", "hgfed cbaab bcd"]
        for text in texts:
            assert opened(tmp_path/"o").tokenize(text) == opened(folders[1]).tokenize(text)

    @pytest.mark.parametrize("other", [byte_fallback, unigram, word_piece])
    def test_of_two_kinds_there_is_none(self, tmp_path, other):
        a = talker(tmp_path/"a", with_tokens(byte_level(ONE), ["<|x|>"]), 0)
        b = talker(tmp_path/"b", with_tokens(other(ONE), ["<|y|>"]), 1)
        with pytest.raises(MergeError, match="spelled in two ways") as e:
            merge([a, b], tokenizer="union")
        assert len(str(e.value).splitlines()) <= 3
        named = str(e.value).split("tokenizer='")[1].split("'")[0]
        merge([a, b], tokenizer=named, out=tmp_path/"o")
        assert opened(tmp_path/"o").get_vocab() == opened(named).get_vocab()


class TestClasses:
    "Classes of tokenizers that make their own tokenizer of the pieces in a file."

    @pytest.mark.parametrize(
        "cls, make, said",
        [
            (GPT2Tokenizer, byte_level, {}),
            (LlamaTokenizer, byte_fallback, {}),
            (BertTokenizer, word_piece, {}),
            (T5Tokenizer, unigram, {"extra_ids": 3}),
            (XLMRobertaTokenizer, unigram, {}),
        ],
    )
    def test_the_class_opens_it(self, tmp_path, cls, make, said):
        folders = []
        for i, (letters, token) in enumerate(((ONE, "<|x|>"), (OTHER, "<|y|>"))):
            held = json.loads(make(letters).backend_tokenizer.to_str())["model"]
            pieces = {"vocab": held["vocab"]}
            if isinstance(held["vocab"], list):
                pieces["vocab"] = [tuple(x) for x in held["vocab"]]
            if "merges" in held:
                pieces["merges"] = [tuple(m) for m in held["merges"]]
            tokenizer = with_tokens(cls(**pieces, **said), [token])
            tokenizer.save_pretrained(tmp_path/"ab"[i])
            folders.append(model_for(tmp_path/"ab"[i], i))
        assert type(opened(folders[0])) is cls
        merge(folders, tokenizer="union", out=tmp_path/"o")
        check_rows(tmp_path/"o", folders, [1, 1])
        check_texts(tmp_path/"o", folders, ["abc feg<|x|>hh", "ijk efl<|y|>hh"])


class TestOldFiles:
    "Folders without a tokenizer.json."

    @pytest.mark.parametrize("make", [byte_level, word_piece])
    @pytest.mark.parametrize("both", [True, False])
    def test_vocab_json_or_txt(self, tmp_path, make, both):
        a = model_for(in_files(tmp_path/"a", make(ONE), "<|x|>"), 0)
        if both:
            b = model_for(in_files(tmp_path/"b", make(OTHER), "<|y|>"), 1)
        else:
            b = talker(tmp_path/"b", with_tokens(make(OTHER), ["<|y|>"]), 1)
        for order in ([a, b], [b, a]):
            out = tmp_path/f"o{order[0].name}"
            merge(order, tokenizer="union", out=out)
            check_rows(out, order, [1, 1])
            check_texts(out, order, ["abc feg<|x|>hh", "ijk efl<|y|>hh"])

    @pytest.mark.parametrize(
        "cls, name, kind",
        [
            ("LlamaTokenizer", "tokenizer.model", "bpe"),
            ("T5Tokenizer", "spiece.model", "unigram"),
            ("MBartTokenizer", "sentencepiece.bpe.model", "unigram"),
            ("NllbTokenizer", "sentencepiece.bpe.model", "bpe"),
            ("XLMRobertaTokenizer", "sentencepiece.bpe.model", "unigram"),
        ],
    )
    def test_sentencepiece_alone(self, tmp_path, cls, name, kind):
        pytest.importorskip("google.protobuf")
        folders = []
        for i, letters in enumerate((ONE, OTHER)):
            # as T5 numbers its first pieces
            first = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1) if name == "spiece.model" else {}
            f = sentencepieces(tmp_path/"ab"[i], name, letters, kind, 50, **first)
            said = {"tokenizer_class": cls}
            (f/"tokenizer_config.json").write_text(json.dumps(said))
            assert read_tokens(f) == opened(f).get_vocab()
            folders.append(model_for(f, i))
        merge(folders, tokenizer="union", out=tmp_path/"o")
        check_rows(tmp_path/"o", folders, [1, 1])
        check_texts(tmp_path/"o", folders, ["abc feg hh", "ijk efl hh"])

    def test_what_is_not_installed_is_named(self, tmp_path, monkeypatch):
        from frechet_merge.vocabularies import tokenizers

        monkeypatch.setattr(tokenizers, "_has", lambda module: False)
        monkeypatch.setattr(tokenizers, "AS_PIECES", ())
        folders = []
        for i, letters in enumerate((ONE, OTHER)):
            f = sentencepieces(tmp_path/"ab"[i], "spm.model", letters, "unigram", 50)
            folders.append(f)
            talker(f, byte_level(ONE), i)
            (f/"tokenizer.json").unlink()
        with pytest.raises(MergeError, match="protobuf, which is not installed"):
            merge(folders, tokenizer="union")


class TestSpecial:
    def test_a_special_token_that_is_letters_elsewhere(self, tmp_path):
        "In the union it is found as it stands."
        a, b = byte_level(ONE), byte_level(ONE)
        token = next(t for t in a.get_vocab() if re.fullmatch("[a-h]{2}", t))
        folders = [
            talker(tmp_path/"a", with_tokens(a, ["<|x|>"]), 0),
            talker(tmp_path/"b", with_tokens(b, [token, "<|y|>"]), 1),
        ]
        merge(folders, tokenizer="union", out=tmp_path/"o")
        check_rows(tmp_path/"o", folders, [1, 1])
        union = opened(tmp_path/"o")
        assert union.convert_tokens_to_ids(token) == opened(folders[0]).get_vocab()[token]
        assert token in union.tokenize(f"cc{token}cc")

    def test_other_ends_are_said(self, tmp_path):
        a = talker(tmp_path/"a", with_tokens(byte_level(ONE), ["<|x|>"]), 0)
        t = with_tokens(byte_level(ONE), ["<|im_end|>"])
        t.eos_token = "<|im_end|>"
        b = talker(tmp_path/"b", t, 1)
        with pytest.warns(UserWarning, match="ends a text with '<.im_end.>'.*name .* first"):
            merge([a, b], tokenizer="union", out=tmp_path/"o")
        merge([b, a], tokenizer="union", out=tmp_path/"p")
        for out, folder in (("o", a), ("p", b)):
            ends = config(tmp_path/out)["eos_token_id"]
            assert ends == config(folder)["eos_token_id"]
            token = opened(folder).eos_token
            assert opened(tmp_path/out).convert_tokens_to_ids(token) == ends

    def test_rows_beyond_the_tokens(self, tmp_path):
        "Rows that are padding are given to the other's tokens, and are their rows."
        a = talker(tmp_path/"a", with_tokens(byte_level(ONE), ["<|x|>"]), 0, rows=384)
        b = talker(tmp_path/"b", with_tokens(byte_level(ONE), ["<|y|>"]), 1, rows=384)
        merge([a, b], tokenizer="union", out=tmp_path/"o")
        check_rows(tmp_path/"o", [a, b], [1, 1])
        x, y, m = states(a, b, tmp_path/"o")
        assert len(m[EMBEDDING]) == 384
        torch.testing.assert_close(m[EMBEDDING][383], (x[EMBEDDING] + y[EMBEDDING])[383]/2)


def test_a_folder_that_a_kill_has_left_is_named_and_removed(tmp_path):
    "A tokenizer's folder lasts as long as what reads it, and no longer than the next run."
    code = (
        "import os\nfrom frechet_merge.files.checkpoint import Checkpoint\n"
        "from frechet_merge.vocabularies.union import place_for\n"
        "made = place_for(Checkpoint({}, 'x'), 3, False)\n"
        "assert made.folder.is_dir()\n"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = [sys.executable, "-c", code]
    assert subprocess.run(ended, env=env, check=True).returncode == 0
    assert not [*tmp_path.iterdir()]
    killed = [sys.executable, "-c", code + "os.kill(os.getpid(), 9)"]
    assert subprocess.run(killed, env=env).returncode == -9
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    found = subprocess.run(ended, env=env, capture_output=True, text=True)
    assert found.returncode == 0 and "is removed" in found.stderr, found.stderr
    assert not [*tmp_path.iterdir()]


def test_rows_that_no_config_counts_are_not_padded(tmp_path):
    "The option did nothing; with the number that the remedy asks for, it does."
    folders = two(tmp_path, word_piece, (ONE, ONE))
    said = {f: json.loads((f/"config.json").read_text()) for f in folders}
    for f, known in said.items():
        less = {k: v for k, v in known.items() if k != "vocab_size"}
        (f/"config.json").write_text(json.dumps(less))
    with pytest.raises(MergeError, match="does not say how many rows.*\n.*vocab_size"):
        merge([folders[0]]*2, pad_to_multiple_of=64)
    for f, known in said.items():
        (f/"config.json").write_text(json.dumps(known))
    merged = merge([folders[0]]*2, pad_to_multiple_of=64).tensors
    assert len(merged[EMBEDDING]) % 64 == 0 != said[folders[0]]["vocab_size"] % 64

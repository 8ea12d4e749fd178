"""Token → number is what the library that opens the folder says, whichever file holds it.

The oracles are sentencepiece, and transformers where it opens the folder.
"""
import base64
import json
import random

import pytest
import sentencepiece
import torch
from test_vocabularies import EMBEDDING, SIZES, WORDS, model, speaker, states
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from frechet_merge import merge
from frechet_merge.vocabularies.tokenizers import read_tokens
from frechet_merge.messages import MergeError


def trained(folder, letters, kind="unigram", size=40):
    "A sentencepiece model of random words of these letters: its file."
    rng = random.Random(0)
    words = ["".join(rng.choices(letters, k=rng.randint(2, 5))) for _ in range(1500)]
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(folder/"made"),
        vocab_size=size,
        model_type=kind,
        minloglevel=2,
    )
    (folder/"made.vocab").unlink()
    return folder/"made.model"


def pieces(file):
    held = sentencepiece.SentencePieceProcessor(model_file=str(file))
    return [held.id_to_piece(i) for i in range(len(held))]


def put(folder, file, held=None, **beside):
    "A folder with one tokenizer file, and JSON beside it."
    folder.mkdir(parents=True, exist_ok=True)
    if held is not None:
        (folder/file).write_bytes(held)
    for name, x in beside.items():
        (folder/f"{name}.json").write_text(json.dumps(x))
    return folder


class TestSentencepiece:
    @pytest.mark.parametrize("kind", ["unigram", "bpe"])
    @pytest.mark.parametrize("file", ["tokenizer.model", "spiece.model"])
    def test_numbers_are_those_of_the_pieces(self, tmp_path, file, kind):
        made = trained(tmp_path/"sp", "abcdefgh", kind)
        f = put(tmp_path/"f", file, made.read_bytes(), config={"model_type": "llama"})
        assert read_tokens(f) == {t: i for i, t in enumerate(pieces(made))}

    @pytest.mark.parametrize(
        "said",
        [
            {"tokenizer_config": {"tokenizer_class": "XLMRobertaTokenizer"}},
            {"config": {"model_type": "xlm-roberta"}},
        ],
    )
    def test_xlm_roberta_counts_one_further(self, tmp_path, said):
        made = trained(tmp_path/"sp", "abcdefgh")
        f = put(tmp_path/"f", "sentencepiece.bpe.model", made.read_bytes(), **said)
        found, every = read_tokens(f), pieces(made)
        assert all(found[t] == i + 1 for i, t in enumerate(every) if i > 2)
        assert [found[t] for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
        assert found["<mask>"] == len(every) + 1

    def test_added_tokens(self, tmp_path):
        made = trained(tmp_path/"sp", "abcdefgh")
        f = put(
            tmp_path/"f",
            "tokenizer.model",
            made.read_bytes(),
            tokenizer_config={
                "tokenizer_class": "LlamaTokenizer",
                "added_tokens_decoder": {"40": {"content": "<|im_start|>"}},
                "pad_token": "<pad>",
            },
            added_tokens={"<|im_end|>": 41},
        )
        found = read_tokens(f)
        assert [found[t] for t in ("<|im_start|>", "<|im_end|>", "<pad>")] == [40, 41, 42]

    def test_rows_are_matched_by_piece(self, tmp_path):
        folders = []
        for i, letters in enumerate(("abcdefgh", "ghabcdxy")):
            made = trained(tmp_path/f"sp{i}", letters)
            f = put(tmp_path/f"m{i}", "tokenizer.model", made.read_bytes())
            torch.manual_seed(i)
            LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=40)).save_pretrained(f)
            folders.append(f)
        with pytest.raises(MergeError, match="use token number"):
            merge(folders)
        merge(folders, tokenizer=folders[0], out=tmp_path/"o")
        a, b, m = states(*folders, tmp_path/"o")
        ours, theirs = (pieces(tmp_path/f"sp{i}"/"made.model") for i in range(2))
        shared = [t for t in ours if t in theirs]
        assert any(ours.index(t) != theirs.index(t) for t in shared)
        for t in shared:
            i, j = ours.index(t), theirs.index(t)
            want = (a[EMBEDDING][i] + b[EMBEDDING][j])/2
            torch.testing.assert_close(m[EMBEDDING][i], want, msg=t)

    def test_the_same_tokens_in_two_kinds_of_files(self, tmp_path):
        made = trained(tmp_path/"sp", "abcdefgh")
        known = {t: i for i, t in enumerate(pieces(made))}
        folders = [model(tmp_path/name, i, [*known]) for i, name in enumerate("ab")]
        (folders[1]/"tokenizer.json").unlink()
        put(folders[1], "tokenizer.model", made.read_bytes())
        merge(folders, out=tmp_path/"o")
        a, b, m = states(*folders, tmp_path/"o")
        torch.testing.assert_close(m[EMBEDDING], (a[EMBEDDING] + b[EMBEDDING])/2)


class TestAdded:
    "Of all the places where a token may stand."

    def test_as_transformers_numbers_them(self, tmp_path):
        f = speaker(tmp_path/"a", 0, WORDS, ["<x>", "<y>"])
        assert read_tokens(f) == AutoTokenizer.from_pretrained(f).get_vocab()

    def test_a_special_token_that_has_no_number(self, tmp_path):
        f = speaker(tmp_path/"a", 0, WORDS, ["<x>"])
        said = json.loads((f/"tokenizer_config.json").read_text())
        (f/"tokenizer_config.json").write_text(json.dumps({**said, "pad_token": "<pad>"}))
        tokens = AutoTokenizer.from_pretrained(f).get_vocab()
        assert read_tokens(f) == tokens and tokens["<pad>"] == len(tokens) - 1

    def test_only_the_config_of_the_tokenizer_knows_it(self, tmp_path):
        "Two models give one number to two tokens, which no vocabulary says."
        folders = []
        for i, token in enumerate(("<x>", "<y>")):
            f = model(tmp_path/"ab"[i], i, WORDS, rows=31)
            said = {"added_tokens_decoder": {"30": {"content": token}}}
            put(f, "", tokenizer_config=said)
            folders.append(f)
        with pytest.raises(MergeError, match="number 30 for '<x>' and for '<y>'"):
            merge(folders)

    def test_a_template_is_no_token(self, tmp_path, recwarn):
        folders = [model(tmp_path/"ab"[i], i, WORDS) for i in range(2)]
        put(folders[1], "", tokenizer_config={"chat_template": "{{ messages }}"})
        merge(folders)
        assert not [w for w in recwarn if "lacks" in str(w.message)]


class TestTekken:
    @staticmethod
    def write(folder, tokens):
        held = [
            {"rank": i, "token_bytes": base64.b64encode(t.encode()).decode(), "token_str": t}
            for i, t in enumerate(tokens)
        ]
        config = {"default_num_special_tokens": 2, "default_vocab_size": 2 + len(tokens)}
        special = [{"rank": i, "token_str": t} for i, t in enumerate(["<unk>", "<s>"])]
        put(folder, "", tekken={"config": config, "vocab": held, "special_tokens": special})

    def test_rows_are_matched(self, tmp_path):
        every = [["a", "b", " c"], [" c", "a", "b"]]
        folders = []
        for i, tokens in enumerate(every):
            f = model(tmp_path/"ab"[i], i, ["<unk>", "<s>", *tokens])
            (f/"tokenizer.json").unlink()
            self.write(f, tokens)
            folders.append(f)
        with pytest.raises(MergeError, match="number 2 for 'a' and for 'Ġc'"):
            merge(folders)
        merge(folders, tokenizer=folders[0], out=tmp_path/"o")
        a, b, m = states(*folders, tmp_path/"o")
        want = (a[EMBEDDING] + b[EMBEDDING][[0, 1, 3, 4, 2]])/2
        torch.testing.assert_close(m[EMBEDDING], want)


class TestUnread:
    "A file that nobody here can read."

    @pytest.fixture
    def two(self, tmp_path):
        folders = [model(tmp_path/"ab"[i], i, WORDS) for i in range(2)]
        for f in folders:
            (f/"tokenizer.json").unlink()
            (f/"qwen.tiktoken").write_bytes(b"what nobody reads")
        return folders

    def test_other_bytes_are_said_by_name(self, two):
        (two[1]/"qwen.tiktoken").write_bytes(b"something else")
        with pytest.warns(UserWarning, match="cannot be read here.*merged by number"):
            merge(two)

    def test_the_same_bytes_are_the_same_tokens(self, two, recwarn):
        merge(two)
        assert not [w for w in recwarn if "by number" in str(w.message)]

    def test_a_model_without_a_tokenizer_is_nothing_to_say(self, two, recwarn):
        (two[1]/"qwen.tiktoken").unlink()
        (two[0]/"qwen.tiktoken").unlink()
        merge(two)
        assert not [w for w in recwarn if "by number" in str(w.message)]

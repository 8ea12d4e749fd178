"""What people have: models of many libraries whose vocabularies differ a little.

The oracle is the mean of each token's rows in the state dicts that transformers loads, and that it
opens the result with nothing missing.
"""
import json
import shutil

import pytest
import torch
from spoken import SIZES, byte_fallback, byte_level, opened, talker, unigram, with_tokens
from spoken import word_piece
from test_vocabularies import config
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from frechet_merge import load, merge
from frechet_merge.messages import MergeError

ENCODER = dict(encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24)
DECODER = dict(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24)
VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=16,
)
BERT = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)
# class of the model → its tokenizer's kind, and a config of so many tokens
MODELS = {
    "bert": (BertForMaskedLM, word_piece, lambda n: BertConfig(vocab_size=n, **BERT)),
    "distilbert": (
        DistilBertForMaskedLM,
        word_piece,
        lambda n: DistilBertConfig(vocab_size=n, dim=16, hidden_dim=24, n_layers=1, n_heads=2),
    ),
    "xlnet": (
        XLNetLMHeadModel,
        unigram,
        lambda n: XLNetConfig(vocab_size=n, d_model=16, n_layer=1, n_head=2, d_inner=24),
    ),
    "gptj": (
        GPTJForCausalLM,
        byte_level,
        lambda n: GPTJConfig(vocab_size=n, n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
    ),
    "t5": (
        T5ForConditionalGeneration,
        unigram,
        lambda n: T5Config(vocab_size=n, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2),
    ),
    "t5, untied": (
        T5ForConditionalGeneration,
        unigram,
        lambda n: T5Config(
            vocab_size=n,
            d_model=16,
            d_ff=24,
            d_kv=8,
            num_layers=1,
            num_heads=2,
            tie_word_embeddings=False,
        ),
    ),
    "marian": (
        MarianMTModel,
        unigram,
        lambda n: MarianConfig(vocab_size=n, d_model=16, pad_token_id=0, **ENCODER, **DECODER),
    ),
    "clip": (
        CLIPModel,
        byte_level,
        lambda n: CLIPConfig(
            text_config=dict(vocab_size=n, eos_token_id=n - 1, **BERT), vision_config=VISION
        ),
    ),
}


def put(folder, cls, said, tokenizer, seed):
    "A model with random numbers, biases as well, and its tokenizer."
    torch.manual_seed(seed)
    m = cls(said)
    for x in m.parameters():
        x.data = torch.randn_like(x)*0.2
    for name, x in m.named_buffers():
        if name == "final_logits_bias":
            x.copy_(torch.randn_like(x))
    m.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_rows(x, count):
    "A tensor with tokens first; None if it has no row for each."
    if x.dim() > 1 and x.shape[0] == 1 and x.shape[1] == count:
        return x.T
    return x if x.dim() and x.shape[0] == count else None


def check(cls, out, folders):
    "Every tensor is the mean of the models', by token where it has rows of tokens."
    m, info = cls.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    every = [cls.from_pretrained(f).state_dict() for f in folders]
    known, union = [opened(f).get_vocab() for f in folders], opened(out).get_vocab()
    moved = 0
    for name, x in m.state_dict().items():
        versions = [s[name] for s in every]
        mine = in_rows(x, len(union))
        if mine is None:
            if x.dtype.is_floating_point:
                torch.testing.assert_close(x, sum(versions)/len(versions), msg=name)
            continue
        moved += 1
        theirs = [in_rows(y, len(v)) for y, v in zip(versions, known)]
        for token, i in union.items():
            rows = [y[v[token]] for y, v in zip(theirs, known) if token in v]
            torch.testing.assert_close(mine[i], sum(rows)/len(rows), msg=f"{name} {token}")
    assert moved
    return m


@pytest.mark.parametrize("kind", MODELS)
def test_a_union_of(tmp_path, kind):
    "Embeddings, output layers, biases, under the names of each architecture."
    cls, make, said = MODELS[kind]
    folders = []
    for i, (letters, token) in enumerate((("abcdefgh", "<|x|>"), ("efghijkl", "<|y|>"))):
        tokenizer = with_tokens(make(letters), [token])
        folders.append(put(tmp_path/"ab"[i], cls, said(len(tokenizer)), tokenizer, i))
    merge(folders, tokenizer="union", out=tmp_path/"o")
    check(cls, tmp_path/"o", folders)


def test_whisper_with_a_language_more(tmp_path):
    "Its numbers of languages are in the config of generation."
    every = (["<|en|>", "<|fr|>", "<|0.00|>"], ["<|en|>", "<|yue|>", "<|fr|>", "<|0.00|>"])
    folders = []
    for i, tokens in enumerate(every):
        t = with_tokens(byte_level("abcd", 280), tokens)
        sizes = dict(d_model=16, num_mel_bins=8, max_source_positions=20, max_target_positions=20)
        ids = dict(pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2)
        said = WhisperConfig(vocab_size=len(t), **sizes, **ids, **ENCODER, **DECODER)
        f = put(tmp_path/"ab"[i], WhisperForConditionalGeneration, said, t, i)
        file = f/"generation_config.json"
        numbers = {x: t.convert_tokens_to_ids(x) for x in tokens[:-1]}
        more = {"lang_to_id": numbers, "suppress_tokens": [t.convert_tokens_to_ids(tokens[-1])]}
        file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
        folders.append(f)
    with pytest.raises(MergeError, match="number 281 for '<.fr.>' and for '<.yue.>'"):
        merge(folders)
    merge(folders, tokenizer=folders[1], out=tmp_path/"o")
    check(WhisperForConditionalGeneration, tmp_path/"o", folders)
    said = json.loads((tmp_path/"o"/"generation_config.json").read_text())
    vocabulary = opened(tmp_path/"o").get_vocab()
    assert said["lang_to_id"] == {t: vocabulary[t] for t in every[1][:-1]}
    assert said["suppress_tokens"] == [vocabulary["<|0.00|>"]]


@pytest.mark.parametrize("choice", [None, "b", "union"])
def test_a_model_that_sees(tmp_path, choice):
    "Its vocabulary is in a part of its config, and its image is a token."
    folders = []
    for i, tokens in enumerate((["<image>"], ["<|x|>", "<image>"])):
        t = with_tokens(byte_level("abcd", 280), tokens)
        text = dict(model_type="llama", **SIZES, vocab_size=len(t), pad_token_id=None)
        vision = dict(model_type="clip_vision_model", **VISION)
        image = t.convert_tokens_to_ids("<image>")
        said = LlavaConfig(text_config=text, vision_config=vision, image_token_index=image)
        cls = LlavaForConditionalGeneration
        folders.append(put(tmp_path/"ab"[i], cls, said, t, i))
    if choice is None:
        with pytest.raises(MergeError, match="number 280 for '<image>' and for '<.x.>'"):
            merge(folders)
        return
    named = folders[1] if choice == "b" else choice
    merge(folders, tokenizer=named, out=tmp_path/"o")
    m = check(LlavaForConditionalGeneration, tmp_path/"o", folders)
    number = opened(tmp_path/"o").convert_tokens_to_ids("<image>")
    assert m.config.image_token_id == number and m.config.text_config.vocab_size == 282


class TestLlama:
    @pytest.mark.parametrize("first", "ab")
    def test_one_ties_its_output_layer(self, tmp_path, first):
        "A token that it lacks has two rows in the other, an input and an output."
        for i, name in enumerate("ab"):
            tokenizer = with_tokens(byte_level("abcd", 280), [f"<|{name}|>"])
            talker(tmp_path/name, tokenizer, i, tie_word_embeddings=name == "a")
        order = [tmp_path/n for n in (first, *{"a", "b"} - {first})]
        with pytest.warns(UserWarning, match="a ties its output layer to its embedding"):
            merge(order, tokenizer="union", out=tmp_path/"o")
        check(LlamaForCausalLM, tmp_path/"o", order)
        assert config(tmp_path/"o")["tie_word_embeddings"] is False

    @pytest.mark.parametrize("first", "ab")
    def test_a_token_for_padding(self, tmp_path, first):
        "One has it. Its number is that of the tokenizer that is written, or there is none."
        for i, name in enumerate("ab"):
            t = with_tokens(byte_level("abcd", 280), ["<|x|>", *(["<pad>"] if i else [])])
            talker(tmp_path/name, t, i, pad_token_id=281 if i else None)
        order = [tmp_path/n for n in (first, *{"a", "b"} - {first})]
        for choice, pad in ((None, 281), (tmp_path/"b", 281), (tmp_path/"a", None)):
            out = tmp_path/f"o{pad}{choice is None}"
            merge(order, tokenizer=choice, out=out)
            m = LlamaForCausalLM.from_pretrained(out)
            assert m.config.pad_token_id == pad
            assert m.get_input_embeddings().weight.shape[0] == len(opened(out))

    def test_special_tokens_swapped(self, tmp_path):
        for i, name in enumerate("ab"):
            held = json.loads(byte_fallback("abcd").backend_tokenizer.to_str())
            v = held["model"]["vocab"]
            if i:
                v["<s>"], v["</s>"] = v["</s>"], v["<s>"]
            added = [{**t, "id": v[t["content"]]} for t in held["added_tokens"]]
            held |= {"added_tokens": sorted(added, key=lambda t: t["id"]), "post_processor": None}
            inner = Tokenizer.from_str(json.dumps(held))
            t = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
            talker(tmp_path/name, t, i, bos_token_id=t.bos_token_id)
        two = [tmp_path/"a", tmp_path/"b"]
        with pytest.raises(MergeError, match="number 1 for '<s>' and for '</s>'"):
            merge(two)
        for choice in ("union", two[0], two[1]):
            out = tmp_path/f"o{getattr(choice, 'name', choice)}"
            merge(two, tokenizer=choice, out=out)
            check(LlamaForCausalLM, out, two)
            t = opened(out)
            assert config(out)["eos_token_id"] == t.convert_tokens_to_ids("</s>")
            assert config(out)["bos_token_id"] == t.convert_tokens_to_ids("<s>")

    def test_reserved_tokens_that_one_named(self, tmp_path):
        free = [f"<|reserved_special_token_{i}|>" for i in range(2)]
        for i, tokens in enumerate((free, ["<|im_start|>", "<|im_end|>"])):
            talker(tmp_path/"ab"[i], with_tokens(byte_level("abcd", 280), tokens), i)
        two = [tmp_path/"a", tmp_path/"b"]
        merge(two, out=tmp_path/"o")
        check(LlamaForCausalLM, tmp_path/"o", two)
        assert "<|im_end|>" in opened(tmp_path/"o").get_vocab()

    def test_added_tokens_in_a_file_of_their_own(self, tmp_path):
        plain = byte_level("abcd", 280)
        a = talker(tmp_path/"a", plain, 0, rows=281)
        (a/"added_tokens.json").write_text(json.dumps({"<|q|>": 280}))
        b = talker(tmp_path/"b", with_tokens(byte_level("abcd", 280), ["<|z|>"]), 1)
        assert opened(a).convert_tokens_to_ids("<|q|>") == 280
        with pytest.raises(MergeError, match="number 280 for '<.q.>' and for '<.z.>'"):
            merge([a, b])
        merge([a, b], tokenizer="union", out=tmp_path/"o")
        check(LlamaForCausalLM, tmp_path/"o", [a, b])

    def test_the_first_has_no_tokenizer(self, tmp_path):
        for i, name in enumerate("ab"):
            talker(tmp_path/name, with_tokens(byte_level("abcd", 280), ["<|x|>"]), i)
        for file in (tmp_path/"a").glob("tokenizer*"):
            file.unlink()
        with pytest.warns(UserWarning, match="a has no tokenizer: that of .*b is written"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
        assert opened(tmp_path/"o").get_vocab() == opened(tmp_path/"b").get_vocab()


def test_an_embedding_that_is_longer_than_its_vocabulary(tmp_path):
    "As Moshi's and Mllama's are: no row is given to a token by guessing."
    for i, name in enumerate("ab"):
        letters = ["abcd", "abce"][i]
        talker(tmp_path/name, byte_level(letters, 280), i, rows=281)
        file = tmp_path/name/"config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 280}))
    with pytest.raises(MergeError, match="has 281 rows, and the config says that there are 280"):
        merge([tmp_path/"a", tmp_path/"b"], tokenizer=tmp_path/"a")
    # models that have one tokenizer
    shutil.copy(tmp_path/"a"/"tokenizer.json", tmp_path/"b")
    found = merge([tmp_path/"a", tmp_path/"b"]).tensors
    both = [load(tmp_path/n) for n in "ab"]
    for n, x in found.items():
        torch.testing.assert_close(x, (both[0][n] + both[1][n])/2, msg=n)


def test_a_number_of_the_whole_that_is_old(tmp_path):
    "Beside a part of the config that was resized, transformers leaves the old one."
    folders = []
    for i, token in enumerate(("<|x|>", "<|y|>")):
        t = with_tokens(byte_level("abcd", 280), ["<image>", token])
        text = dict(model_type="llama", **SIZES, vocab_size=len(t), pad_token_id=None)
        vision = dict(model_type="clip_vision_model", **VISION)
        said = LlavaConfig(text_config=text, vision_config=vision, image_token_index=280)
        f = put(tmp_path/"ab"[i], LlavaForConditionalGeneration, said, t, i)
        file = f/"config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 281}))
        folders.append(f)
    with pytest.raises(MergeError, match="number 281 for '<.x.>' and for '<.y.>'"):
        merge(folders)
    merge(folders, tokenizer="union", out=tmp_path/"o")
    check(LlavaForConditionalGeneration, tmp_path/"o", folders)


def test_tune_is_told_how_to_bring_models_to_one_vocabulary(tmp_path):
    "Its remedy, done as it is written, lets it run."
    import shlex

    from conftest import cli
    from spoken import texts

    from frechet_merge.tuning.tune import tune

    for i, (name, token) in enumerate((("base", "<|x|>"), ("a", "<|x|>"), ("b", "<|y|>"))):
        t = with_tokens(byte_level("abcd", 280), [token])
        t.pad_token = "<|endoftext|>"
        talker(tmp_path/name, t, i)
    (tmp_path/"d.txt").write_text("\n".join(texts("abcd")[:10]))
    given = dict(base=str(tmp_path/"base"), geometries=["euclidean"], max_samples=8)
    data = [str(tmp_path/"d.txt")]
    with pytest.raises(MergeError, match="280 for '<.x.>' and for '<.y.>'") as e:
        tune([str(tmp_path/"a"), str(tmp_path/"b")], data, **given)
    command = str(e.value).splitlines()[1].partition(": ")[2].rstrip(".")
    words = command.replace("MODEL", "b").replace("BASE", "base").replace("NEW", "c")
    code, _, said = cli(*shlex.split(words)[1:], cwd=tmp_path)
    assert code == 0, said
    assert tune([str(tmp_path/"a"), str(tmp_path/"c")], data, **given).settings

"""Tiny real tokenizers of every kind, trained here, and language models that have them.

Each has special tokens as its family has them, and files as its library writes them.
"""
import json
import random

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
)


def words(letters, n=600, seed=0):
    "Random words of these letters."
    rng = random.Random(seed)
    return ["".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(n)]


def texts(letters, seed=0):
    "Random texts of these letters."
    every = words(letters, seed=seed)
    return [" ".join(every[i : i + 6]) for i in range(0, len(every), 6)]


def byte_level(letters, size=330):
    "BPE on bytes, as GPT-2, Llama 3 and Qwen have it."
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(texts(letters), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|endoftext|>")


def byte_fallback(letters, size=330):
    "BPE of pieces with ▁ that falls back to bytes, as Llama 2 and Mistral have it."
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    t.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    # words are learned one by one
    t.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    t.train_from_iterator(texts(letters), trainer)
    t.pre_tokenizer = None
    held = json.loads(t.to_str())
    held["added_tokens"] = [x for x in held["added_tokens"] if not x["content"].startswith("<0x")]
    t = Tokenizer.from_str(json.dumps(held))
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=t, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def unigram(letters, size=60):
    "Pieces with scores, as T5 and XLM-R have them."
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.NFKC()
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    t.train_from_iterator(texts(letters), trainer)
    t.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=t, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


def word_piece(letters, size=90):
    "The longest piece first, as BERT has it."
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer(lowercase=True)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=special, show_progress=False
    )
    t.train_from_iterator(texts(letters), trainer)
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    held = {f"{n}_token": s for n, s in zip(names, special)}
    return PreTrainedTokenizerFast(tokenizer_object=t, **held)


KINDS = dict(
    byte_level=byte_level, byte_fallback=byte_fallback, unigram=unigram, word_piece=word_piece
)


def with_tokens(tokenizer, tokens, special=True):
    "A tokenizer with tokens added at its end."
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in tokens])
    return tokenizer


def talker(folder, tokenizer, seed, rows=None, **config):
    "A tiny language model with a tokenizer in its folder."
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    n = len(tokenizer) if rows is None else rows
    ends = tokenizer.eos_token_id
    said = {**SIZES, "vocab_size": n, "eos_token_id": ends, "pad_token_id": None, **config}
    LlamaForCausalLM(LlamaConfig(**said)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentencepieces(folder, name, letters, kind="bpe", size=330, **more):
    "A sentencepiece model of random texts in a folder, and nothing else."
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(letters)),
        model_prefix=str(folder/"made"),
        vocab_size=size,
        model_type=kind,
        minloglevel=2,
        hard_vocab_limit=False,
        **more,
    )
    (folder/"made.vocab").unlink()
    (folder/"made.model").rename(folder/name)
    return folder


def opened(folder):
    return AutoTokenizer.from_pretrained(folder)


def in_files(folder, tokenizer, *added):
    "The old files of a tokenizer, without a tokenizer.json: vocab.json and merges, or vocab.txt."
    folder.mkdir(parents=True, exist_ok=True)
    held = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    numbers = held["vocab"]
    if held["type"] == "BPE":
        lines = ["#version: 0.2", *(" ".join(m) for m in held["merges"]), ""]
        (folder/"vocab.json").write_text(json.dumps(numbers))
        (folder/"merges.txt").write_text("\n".join(lines))
        said = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    else:
        every = sorted(numbers, key=numbers.__getitem__)
        (folder/"vocab.txt").write_text("\n".join(every) + "\n")
        said = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    more = {t: len(numbers) + i for i, t in enumerate(added)}
    (folder/"added_tokens.json").write_text(json.dumps(more))
    (folder/"tokenizer_config.json").write_text(json.dumps(said))
    return folder


def model_for(folder, seed, rows=None, **config):
    "A tiny language model beside the tokenizer that a folder has."
    tokenizer = opened(folder)
    torch.manual_seed(seed)
    n = len(tokenizer) if rows is None else rows
    said = {**SIZES, "vocab_size": n, "eos_token_id": tokenizer.eos_token_id, **config}
    LlamaForCausalLM(LlamaConfig(**{"pad_token_id": None, **said})).save_pretrained(folder)
    return folder

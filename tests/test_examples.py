"""Tables of any kind become records; folders of Hugging Face become modules whose parameters have
the names of the checkpoint."""

import bz2
import csv
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import warnings
from importlib import import_module

import pytest
import torch
from conftest import ROOT, save

from frechet_merge import load
from frechet_merge.messages import MergeError
from frechet_merge.cli.demo import DATA, base_folder
from frechet_merge.huggingface.examples import _of_datasets, _of_file, batches, columns, examples
from frechet_merge.huggingface.models import open_model

WORDS = "the a cat dog sat ran on mat good bad film very".split()
ROWS = [
    {"sentence": f"{WORDS[i % 12]} {WORDS[(5 * i) % 12]}", "label": i % 3, "n": i}
    for i in range(40)
]


def tokenizer(**special):
    "Whole words; the special tokens come first."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate([*special.values(), *WORDS])},
            unk_token=special["unk_token"],
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def make(kind, folder, seed=0):
    "A tiny random model of this kind, with its tokenizer, as a user would save it."
    import transformers as T

    torch.manual_seed(seed)
    small = dict(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    gpt = dict(
        vocab_size=20,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
    )
    m = {
        "bert": lambda: T.BertForSequenceClassification(T.BertConfig(**small, num_labels=3)),
        "bert-encoder": lambda: T.BertModel(T.BertConfig(**small)),
        "bert-mlm": lambda: T.BertForMaskedLM(T.BertConfig(**small)),
        "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**gpt)),
        "gpt2-without-prefix": lambda: T.GPT2Model(T.GPT2Config(**gpt)),
        "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**small, num_key_value_heads=1)),
        "llama-classifier": lambda: T.LlamaForSequenceClassification(
            T.LlamaConfig(**small, num_key_value_heads=1, num_labels=3)
        ),
        "roberta": lambda: T.RobertaForSequenceClassification(
            T.RobertaConfig(**small, num_labels=3)
        ),
    }[kind]()
    m.save_pretrained(folder)
    if kind == "gpt2-without-prefix":
        (folder/"config.json").write_text(
            json.dumps(
                json.loads((folder/"config.json").read_text())
                | {"architectures": ["GPT2LMHeadModel"]}
            )
        )
    tok = (
        tokenizer(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
        if "bert" in kind
        else tokenizer(unk_token="<unk>", eos_token="<eos>")
    )
    tok.save_pretrained(folder)
    return folder


PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def write(path, rows=ROWS):
    kind = path.name.partition(".")[2].partition(".")[0]
    with PACKED.get(path.suffix, open)(path, "wt") as f:
        if kind == "jsonl":
            f.writelines(json.dumps(r) + "\n" for r in rows)
        if kind == "json":
            json.dump(rows, f)
        if kind in ("csv", "tsv"):
            w = csv.DictWriter(f, rows[0], delimiter="\t" if kind == "tsv" else ",")
            w.writeheader()
            w.writerows(rows)
    if kind == "parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


RECORDS = [{"text": r["sentence"], "label": r["label"]} for r in ROWS]


def test_parquet_by_datasets(tmp_path):
    assert examples(write(tmp_path/"a.parquet")) == RECORDS


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "A.JSONL", "a [1].jsonl"),
        *("a.jsonl.gz", "a.csv.bz2", "a.json.xz"),
    ],
)
def test_formats_that_need_nothing_but_python(tmp_path, monkeypatch, name):
    for library in ("datasets", "pandas", "pyarrow"):
        monkeypatch.setitem(sys.modules, library, None)
    path = write(tmp_path/name.lower().replace("ndjson", "jsonl")).rename(tmp_path/name)
    assert examples(path) == RECORDS
    assert examples(path, "train[10%:20%]") == RECORDS[4:8]
    assert examples(path, "train[-3:]") == RECORDS[-3:]


# what people's files hold, and `datasets` reads as we do
TRICKY = {
    "blank.jsonl": '{"text": "a", "label": 1}\n\n{"text": "b\\nc", "x": null}\n',
    "mark.jsonl": '\ufeff{"text": "é", "label": 1.5}\n{"text": "b", "label": 2}\n',
    "list.json": '[\n{"text": "a"},\n{"text": "b"}]',
    "texts.json": '["one", "two"]',
    "spread.json": '{\n"text": "a"}\n{"text":\n"b"}\n',
    "chats.jsonl": '{"messages": [{"role": "user", "content": "x"}]}\n{"messages": []}\n',
    "quotes.csv": 'text,label\n"a, ""q"" b",1\n"two\nlines",0\nnull,1\n',
    "types.csv": "\ufefftext,label,ok,w\nNA,007,True,1.5\nx,-3,False,2\n",
    "windows.csv": "text,label\r\na,1\r\n\r\nb,\r\n",
    "twice.csv": ",text,text\n0,a,b\n1,c,d\n",
    "stray.csv": 'text,label\n"He said "hi" to me",1\n5" disk,0\n',
    "long.csv": f"text,label\n{'x' * 200_000},1\n",
    "lines.txt": "one\n\n two \r\nthree",
}


@pytest.mark.parametrize("name", TRICKY)
def test_rows_are_those_of_datasets(tmp_path, name):
    path = tmp_path/name
    path.write_text(TRICKY[name], encoding="utf-8", newline="")
    ours = _of_file(path, "train")
    with _of_datasets(path, "train") as theirs:
        at = range(theirs.size), list(theirs.kinds)
        assert ours.size == theirs.size and ours.take(*at) == theirs.take(*at)
        same = {"large_string": "string", "List": "list"}
        assert ours.kinds == {c: same.get(kind, kind) for c, kind in theirs.kinds.items()}


def test_an_object_of_columns(tmp_path):
    (tmp_path/"a.json").write_text(json.dumps({"text": ["a", "b"], "label": [1, 0]}, indent=1))
    assert examples(tmp_path/"a.json") == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]


def test_texts_that_look_like_dates_are_texts(tmp_path):
    (tmp_path/"a.jsonl").write_text('{"text": "2020-01-01 00:00:00"}\n')
    assert examples(tmp_path/"a.jsonl") == [{"text": "2020-01-01 00:00:00"}]


def test_rows_are_not_held(tmp_path, monkeypatch):
    "Of a long file only the rows that are asked for are in memory."
    e = import_module("frechet_merge.huggingface.examples")
    path, alive = write(tmp_path/"a.jsonl", [{"text": "a"*1000}]*3000), []

    class Row(dict):
        def __init__(self, *args):
            super().__init__(*args)
            alive.append(None)

        def __del__(self):
            alive.pop()

    rows, most = e._rows, []

    def watched(path):
        for row in rows(path):
            yield Row(row)
            most.append(len(alive))

    monkeypatch.setattr(e, "_rows", watched)
    assert len(examples(path, max_samples=10)) == 10 and max(most) < 5


def test_folders(tmp_path):
    import datasets

    (tmp_path/"f").mkdir()
    write(tmp_path/"f"/"train.jsonl", ROWS[:30])
    write(tmp_path/"f"/"test.jsonl", ROWS[30:])
    assert (
        len(examples(tmp_path/"f")) == 30
        and len(examples(tmp_path/"f", split="test")) == 10
        and len(examples(tmp_path/"f", split="train[:5]")) == 5
    )
    with pytest.raises(MergeError, match=r"Unknown split.*train.*test"):
        examples(tmp_path/"f", split="dev")
    d = datasets.Dataset.from_list(ROWS)
    d.save_to_disk(tmp_path/"one")
    datasets.DatasetDict(train=d).save_to_disk(tmp_path/"many")
    assert (
        examples(tmp_path/"one")
        == examples(tmp_path/"many")
        == examples(write(tmp_path/"a.jsonl"))
    )
    with pytest.raises(MergeError, match=r"no split 'test'.\nThere are: train"):
        examples(tmp_path/"many", split="test")


def test_a_plain_text_file_has_one_text_a_line(tmp_path):
    (tmp_path/"a.txt").write_text("one\ntwo\n")
    assert examples(tmp_path/"a.txt") == [{"text": "one"}, {"text": "two"}]


def test_a_subset_is_random_repeatable_and_nested(tmp_path):
    f = write(tmp_path/"a.jsonl", [{"text": str(i)} for i in range(200)])
    few, more, other = (
        examples(f, max_samples=20),
        examples(f, max_samples=50),
        examples(f, max_samples=20, seed=1),
    )
    assert (
        len(few) == 20
        and few == more[:20]
        and few != other
        and max(int(r["text"]) for r in few) > 100
        and len({r["text"] for r in more}) == 50
    )
    assert examples(f, max_samples=1000) == examples(f)


S, I = "string", "int64"


@pytest.mark.parametrize(
    "kinds, found",
    [
        (dict(text=S, title=S, label=I), dict(text="text", label="label")),
        (dict(id=I, body=S), dict(text="body")),
        (
            dict(sentence1=S, sentence2=S, labels=I),
            dict(text="sentence1", pair="sentence2", label="labels"),
        ),
        (dict(premise=S, hypothesis=S), dict(text="premise", pair="hypothesis")),
        (dict(review=S, author=S, label=S), dict(text="review", label="label")),
        (dict(messages="List", source=S), dict(text="messages")),
        (dict(prompt=S, completion=S), dict(text="prompt", pair="completion")),
        (
            dict(question=S, sentence=S, label=I),
            dict(text="question", pair="sentence", label="label"),
        ),
        (dict(body="large_string", label=S), dict(text="body", label="label")),
    ],
)
def test_columns_are_guessed(kinds, found):
    assert columns(kinds) == found


@pytest.mark.parametrize(
    "kinds, asked, says",
    [
        (dict(a=S, b=S), {}, "which column is the text"),
        (dict(a=I), {}, "no column of texts"),
        (dict(text=S), dict(text="txt"), "no column 'txt'"),
        (dict(text=S), dict(label="y"), "no column 'y'"),
    ],
)
def test_columns_that_cannot_be_guessed_are_listed(kinds, asked, says):
    with pytest.raises(MergeError, match=says) as e:
        columns(kinds, **asked)
    assert all(c in str(e.value) for c in kinds)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", "", "holds no examples"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"cannot be read \(line 2: "),
        ("a.jsonl", '{"text": "a"}\n5\n', r"cannot be read \(row 2 has no columns"),
        ("a.jsonl.gz", "nonsense", "cannot be read"),
        ("a.csv", 'text\n"a\nb\n', r"cannot be read \(a quotation mark is not closed"),
        ("a.csv", '"text\na\n', r"cannot be read \(a quotation mark is not closed"),
        ("a.csv", "text,label\na, b,1\n", r"cannot be read \(line 2: 3 fields"),
        ("a.csv", "", "holds no examples"),
        ("a.csv", "text\n", "holds no examples"),
        ("a.parquet", "nonsense", "cannot be read"),
        ("a.pickle", "x", "ends in .pickle"),
        ("a", "x", "no ending"),
        ("a.jsonl", '{"text": ""}\n', "no text in any"),
        ("a.jsonl", '{"text": ["a", "b"]}\n', "holds list, not texts or chats"),
        ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}\n', "holds list or string, not texts or"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, says):
    (tmp_path/name).write_text(content)
    with pytest.raises(MergeError, match=says) as e:
        examples(tmp_path/name)
    assert len(str(e.value).splitlines()) <= 3 and name in str(e.value)


def test_absent_files_and_data_sets(tmp_path):
    with pytest.raises(MergeError, match="there is no such file"):
        examples(tmp_path/"a.jsonl")
    # offline, by conftest
    with pytest.raises(
        MergeError, match="^org/absent: not a file here, and the hub did not give it"
    ):
        examples("org/absent")


def test_texts_that_pandas_takes_for_nothing(tmp_path):
    (tmp_path/"a.csv").write_text("text,label\nnull,1\nNA,0\n,1\n")
    with pytest.warns(UserWarning, match="1 of 3 examples have no text"):
        assert [r["text"] for r in examples(tmp_path/"a.csv")] == ["null", "NA"]


def test_reading_is_quiet_and_leaves_nothing(tmp_path):
    import datasets

    before = datasets.utils.logging.get_verbosity(), datasets.utils.are_progress_bars_disabled()
    examples(write(tmp_path/"a.jsonl"))
    assert (
        datasets.utils.logging.get_verbosity(),
        datasets.utils.are_progress_bars_disabled(),
    ) == before
    code = "from frechet_merge.huggingface.examples import examples; examples('a.jsonl')"
    r = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path/"home"), "PYTHONPATH": str(ROOT)},
    )
    assert (r.returncode, r.stdout, r.stderr) == (0, "", "") and sorted(
        p.name for p in tmp_path.iterdir()
    ) in (["a.jsonl"], ["a.jsonl", "home"])
    assert not list((tmp_path/"home").rglob("*.arrow"))


@pytest.mark.parametrize("what", ["a.parquet", "folder", "org/name", "a.jsonl.zst", "a sum"])
def test_without_datasets(monkeypatch, tmp_path, what):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path/"folder").mkdir()
    for name in ("a.parquet", "a.jsonl.zst", "a sum"):
        (tmp_path/name).touch()
    split = "train"
    if what == "a sum":
        what, split = str(write(tmp_path/"a.jsonl")), "train[:5]+train[-5:]"
    with pytest.raises(MergeError, match=r"datasets is not installed") as e:
        examples(what, split)
    first, second = str(e.value).splitlines()
    assert what in first and "pip install 'frechet_merge[hf]'" in second
    assert ("not a file or folder here" in first) == (what == "org/name")


def test_a_file_has_one_split(tmp_path):
    path = write(tmp_path/"a.jsonl")
    assert examples(path, "train[:5]+train[-5:]") == RECORDS[:5] + RECORDS[-5:]
    with pytest.raises(MergeError, match="one file has no split 'test'.\nIts only split is train"):
        examples(path, "test")
    with pytest.raises(MergeError, match="holds no examples"):
        examples(path, "train[:0]")


def test_an_absent_data_set_shows_no_pages_of_the_hub():
    with pytest.raises(MergeError) as e:
        examples("org/absent")
    assert e.value.__cause__ is None and e.value.__suppress_context__


@pytest.mark.parametrize(
    "kind, outputs",
    [
        ("bert", "classifier"),
        ("roberta", "classifier"),
        ("llama-classifier", "classifier"),
        ("gpt2", "causal"),
        ("gpt2-without-prefix", "causal"),
        ("llama", "causal"),
        ("bert-encoder", "encoder"),
        ("bert-mlm", "encoder"),
    ],
)
def test_names_are_the_checkpoints(tmp_path, kind, outputs):
    m, held = open_model(make(kind, tmp_path/"m")), load(tmp_path/"m")
    assert m.kind == outputs and set(m.names.values()) <= set(held.lazy) and not m.model.training
    for n, p in m.model.named_parameters():
        if n in m.names:
            assert torch.equal(p, held[m.names[n]])
        else:
            assert "pooler" in n
    assert len(m.names) >= len(held.lazy) - (5 if kind == "bert-mlm" else 0)
    records = [{"text": r["sentence"], "label": r["label"]} for r in ROWS]
    for b in batches(m.kind, m.tokenizer, records, 16):
        y = b.pop("labels")
        assert m.logits(m.model, b).shape[: y.dim()] == y.shape


def test_padding_does_not_change_outputs(tmp_path):
    for kind in ("bert", "gpt2", "llama-classifier", "bert-encoder"):
        m = open_model(make(kind, tmp_path/kind))
        (alone,), (both,) = (
            batches(m.kind, m.tokenizer, [{"text": t} for t in texts])
            for texts in (["cat dog"], ["cat dog", "the dog sat on the mat"])
        )
        i, n = (
            int((both["attention_mask"].sum(1) < both["attention_mask"].shape[1]).nonzero()),
            alone["input_ids"].shape[1],
        )
        a, b = (
            m.logits(m.model, {k: v for k, v in x.items() if k != "labels"}) for x in (alone, both)
        )
        torch.testing.assert_close(a[0], b[i, :n] if m.kind == "causal" else b[i])


def test_long_texts_are_cut_where_the_model_ends(tmp_path):
    for kind, room in (("bert", 32), ("roberta", 32 - 2), ("gpt2", 32)):
        m = open_model(make(kind, tmp_path/kind))
        with pytest.warns(
            UserWarning, match=f"1 of 2 texts are longer than {m.tokenizer.model_max_length} tokens"
        ):
            b = batches(m.kind, m.tokenizer, [{"text": "cat "*100}, {"text": "dog sat"}])
        assert b[0]["input_ids"].shape[1] == m.tokenizer.model_max_length <= room
        b[0].pop("labels", None)
        m.logits(m.model, b[0])


def test_batches_are_of_like_length_and_in_repeatable_order(tmp_path):
    m = open_model(make("gpt2", tmp_path/"m"))
    records = [{"text": " ".join(["cat"]*(2 + i % 13))} for i in range(64)]
    found, again, other = (batches(m.kind, m.tokenizer, records, 8, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, again)) and any(
        a["input_ids"].shape != b["input_ids"].shape for a, b in zip(found, other)
    )
    real, room = (
        sum(int(b["attention_mask"].sum()) for b in found),
        sum(b["attention_mask"].numel() for b in found),
    )
    assert real > 0.9*room and sum(len(b["input_ids"]) for b in found) == 64
    with pytest.warns(UserWarning, match="1 of 2 texts"):
        assert (
            len(
                batches(m.kind, m.tokenizer, [{"text": "cat"}, {"text": "cat dog"}])[0]["input_ids"]
            )
            == 1
        )
    with pytest.raises(MergeError, match="no text has"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches(m.kind, m.tokenizer, [{"text": "cat"}])


def test_pairs_and_chats(tmp_path):
    m = open_model(make("bert", tmp_path/"b"))
    (b,) = batches(m.kind, m.tokenizer, [{"text": "cat", "pair": "dog sat"}])
    assert b["input_ids"].shape[1] == len(m.tokenizer("cat", "dog sat")["input_ids"])
    m = open_model(make("gpt2", tmp_path/"g"))
    (b,) = batches(m.kind, m.tokenizer, [{"text": "cat", "pair": "dog sat"}])
    assert b["input_ids"].tolist() == [m.tokenizer("cat dog sat")["input_ids"]]
    chat = [
        {"text": [{"role": "user", "content": "cat dog"}, {"role": "assistant", "content": "sat"}]}
    ]
    with pytest.raises(MergeError, match="no chat template"):
        batches(m.kind, m.tokenizer, chat)
    m.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert batches(m.kind, m.tokenizer, chat)[0]["input_ids"].tolist() == [
        m.tokenizer("cat dog sat")["input_ids"]
    ]


def break_(folder, kind):
    config = json.loads((folder/"config.json").read_text())
    if kind == "no tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    if kind == "no config":
        (folder/"config.json").unlink()
    if kind == "seq2seq":
        config |= {"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}
    if kind == "vision":
        small = dict(hidden_size=16, num_hidden_layers=1, intermediate_size=16)
        small["num_attention_heads"] = 2
        config = {"architectures": ["ViTForImageClassification"], "model_type": "vit", **small}
    if kind == "no architecture":
        config.pop("architectures")
    if kind == "unknown":
        config |= {"model_type": "unheard_of"}
    if kind == "no head":
        config |= {"architectures": ["BertForSequenceClassification"]}
    if kind != "no config":
        (folder/"config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "kind, says",
    [
        ("no tokenizer", "has no tokenizer"),
        ("no config", "not a folder with a config.json"),
        ("seq2seq", "only causal LMs"),
        ("vision", "is a ViTForImageClassification"),
        ("no architecture", "names no architecture"),
        ("unknown", "cannot open it"),
        ("no head", "has no 'classifier.bias' and 1 more"),
    ],
)
def test_folders_that_cannot_be_opened(tmp_path, kind, says):
    break_(make("bert-encoder", tmp_path/"m"), kind)
    with pytest.raises(MergeError, match=says) as e:
        open_model(tmp_path/"m")
    assert len(str(e.value).splitlines()) <= 3 and "\n" in str(e.value)


def test_the_tokenizer_may_be_elsewhere_and_must_be_the_models(tmp_path):
    a, b = make("bert", tmp_path/"a"), make("bert", tmp_path/"b")
    break_(a, "no tokenizer")
    assert open_model(a, tokenizer=b).tokenizer.cls_token == "[CLS]"
    with pytest.raises(MergeError, match="embeds 20 tokens"):
        open_model(a, tokenizer=base_folder())


def test_a_head_makes_an_encoder_a_classifier(tmp_path):
    # the encoder inside a classifier
    m = make("bert", tmp_path/"m")
    W, bias = torch.randn(4, 16), torch.randn(4)
    save(tmp_path/"h", {"x.weight": W, "x.bias": bias, "flat.weight": W[:, :5].contiguous()})
    head = tmp_path/"h"/"model.safetensors"
    o = open_model(m, head=f"{head}:x")
    (b,) = batches(o.kind, o.tokenizer, [{"text": "cat dog"}, {"text": "the mat"}])
    assert o.kind == "encoder" and all(v.startswith("bert.") for v in o.names.values())
    torch.testing.assert_close(
        o.logits(o.model, b),
        open_model(m, head=f"{head}:x").model(**b).last_hidden_state.mean(1) @ W.T + bias,
    )
    for name, says in (
        (f"{head}", "holds no head 'weight'"),
        (f"{head}:y", "holds no head 'y.weight'"),
        (f"{head}:flat", "embeddings of width 5"),
        (f"{head}.no", "no such file"),
    ):
        with pytest.raises(MergeError, match=says):
            open_model(m, head=name)


def test_first_token_pooling_is_read_from_the_folder(tmp_path):
    m = make("bert-encoder", tmp_path/"m")
    (m/"1_Pooling").mkdir()
    for how, first in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True),
        ({"pooling_mode_mean_tokens": True}, False),
    ):
        (m/"1_Pooling"/"config.json").write_text(json.dumps(how))
        o = open_model(m)
        (b,) = batches(o.kind, o.tokenizer, [{"text": "cat dog"}])
        h = o.model(**b).last_hidden_state
        torch.testing.assert_close(o.logits(o.model, b), h[:, 0] if first else h.mean(1))
    (m/"1_Pooling"/"config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(MergeError, match="'max_tokens'"):
        open_model(m)


def test_adapters_on_their_base(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    m = open_model(f"{base_folder()}+{DATA / 'movie'}")
    baked = load(f"{base_folder()}+{DATA / 'movie'}")
    assert (
        all(
            torch.equal(p, baked[m.names[n]]) for n, p in m.model.named_parameters() if n in m.names
        )
        and len(m.names) == 103
    )
    with pytest.raises(MergeError, match=r"is an adapter.\nName its base too: .*MiniLM.*movie"):
        open_model(DATA/"movie")
    for kind, cls, task, more, targets in (
        *(
            (
                kind,
                AutoModelForSequenceClassification,
                "SEQ_CLS",
                {"num_labels": 5, "ignore_mismatched_sizes": True},
                ["query"],
            )
            for kind in ("bert-encoder", "bert", "roberta")
        ),
        ("gpt2", AutoModelForCausalLM, "CAUSAL_LM", {}, ["c_attn"]),
    ):
        base = make(kind, tmp_path/kind)
        torch.manual_seed(1)
        peft = get_peft_model(
            cls.from_pretrained(base, **more),
            LoraConfig(
                r=2,
                task_type=task,
                target_modules=targets,
                init_lora_weights=False,
                fan_in_fan_out=kind == "gpt2",
            ),
        )
        peft.save_pretrained(tmp_path/f"{kind}-adapter")
        theirs = (
            PeftModel.from_pretrained(
                cls.from_pretrained(base, **more), tmp_path/f"{kind}-adapter"
            )
            .merge_and_unload()
            .eval()
        )
        ours = open_model(f"{base}+{tmp_path / f'{kind}-adapter'}")
        (b,) = batches(ours.kind, ours.tokenizer, [{"text": "cat dog"}, {"text": "the mat"}])
        b.pop("labels", None)
        torch.testing.assert_close(ours.logits(ours.model, b), theirs(**b).logits)


def test_a_config_that_contradicts_the_weights_is_refused_under_an_adapter_too(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = make("bert-encoder", tmp_path/"base")
    get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=5),
        LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]),
    ).save_pretrained(tmp_path/"a")
    open_model(f"{base}+{tmp_path / 'a'}")
    (base/"config.json").write_text(
        json.dumps(json.loads((base/"config.json").read_text()) | {"intermediate_size": 48})
    )
    with pytest.raises(MergeError, match="intermediate"):
        open_model(f"{base}+{tmp_path / 'a'}")


def test_shards_and_old_names(tmp_path):
    m = make("bert", tmp_path/"m")
    held = load(m)
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): held[k]
        for k in held
    }
    shutil.copytree(m, tmp_path/"old")
    save(tmp_path/"old", old)
    o = open_model(tmp_path/"old")
    assert set(o.names.values()) == set(old)
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(m).save_pretrained(
        tmp_path/"s", max_shard_size="10kB"
    )
    tokenizer(unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path/"s")
    assert len(list((tmp_path/"s").glob("*.safetensors"))) > 1 and set(
        open_model(tmp_path/"s").names.values()
    ) == set(held)


def test_a_length_that_leaves_no_room_beside_special_tokens_is_refused():
    from transformers import AutoTokenizer

    # [CLS] and [SEP] around each text
    tok = AutoTokenizer.from_pretrained(base_folder())
    for kind, rows, least in (
        ("encoder", [{"text": "good film"}], 3),
        ("classifier", [{"text": "good", "pair": "bad film"}], 4),
    ):
        for n in (1, least - 1):
            with pytest.raises(
                ValueError,
                match=f"cut at {n} tokens, and {least} are the least.*adds {least - 1} of its own",
            ) as e:
                batches(kind, tok, rows, max_length=n)
            assert not isinstance(e.value, MergeError)
        with pytest.warns(UserWarning, match="are cut there"):
            assert batches(kind, tok, rows, max_length=least)[0]["input_ids"].shape == (1, least)

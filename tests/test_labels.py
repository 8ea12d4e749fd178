"""Heads of classifiers: rows are matched by label, and transformers opens the result.

The oracle is the classifier itself, written with its labels in another order.
"""
import json

import pytest
import torch
from conftest import cli, save
from test_meaning import randn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from frechet_merge import merge
from frechet_merge.diagnostics.inspection import inspect
from frechet_merge.messages import MergeError

ONE = dict(num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
TEXT = dict(**ONE, vocab_size=30, hidden_size=4)
BART = dict(
    vocab_size=30,
    d_model=4,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=1,
    decoder_attention_heads=1,
    encoder_ffn_dim=8,
    decoder_ffn_dim=8,
    max_position_embeddings=12,
)
IMAGE = dict(**ONE, hidden_size=4, image_size=8, patch_size=4)
AUDIO = dict(**ONE, hidden_size=4, max_length=16, num_mel_bins=16, patch_size=8)
# class → what to make it of, and its rows of labels
CLASSES = [
    (BertForSequenceClassification, BertConfig, TEXT, ["classifier"]),
    (BertForTokenClassification, BertConfig, TEXT, ["classifier"]),
    # as many labels as hidden units: the name alone does not tell the two layers apart
    (RobertaForSequenceClassification, RobertaConfig, TEXT, ["classifier.out_proj"]),
    (LlamaForSequenceClassification, LlamaConfig, TEXT, ["score"]),
    (BartForSequenceClassification, BartConfig, BART, ["classification_head.out_proj"]),
    (
        DeiTForImageClassificationWithTeacher,
        DeiTConfig,
        IMAGE,
        ["cls_classifier", "distillation_classifier"],
    ),
    (ASTForAudioClassification, ASTConfig, AUDIO, ["classifier.dense"]),
]
LABELS = ["a", "b", "c", "d"]


def write(folder, kind, config, sizes, named, state=None, seed=0, **more):
    "A classifier with labels of these names, and another's numbers."
    torch.manual_seed(seed)
    said = {"id2label": dict(enumerate(named)), "label2id": {x: i for i, x in enumerate(named)}}
    m = kind(config(**sizes, **said, **more))
    if state is not None:
        m.load_state_dict(state)
    m.save_pretrained(folder)
    return m.state_dict()


def reordered(state, heads, order):
    "The same classifier, with its labels in another order."
    rows = [f"{h}.{part}" for h in heads for part in ("weight", "bias")]
    return {k: x[order] if k in rows else x for k, x in state.items()}


def name_of(value):
    "Of a class, for the name of a test."
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("kind, config, sizes, heads", CLASSES, ids=name_of)
def test_one_classifier_written_twice_is_its_own_mean(tmp_path, kind, config, sizes, heads):
    order = [2, 0, 3, 1]
    state = write(tmp_path/"a", kind, config, sizes, LABELS)
    named = [LABELS[i] for i in order]
    write(tmp_path/"b", kind, config, sizes, named, reordered(state, heads, order))
    for first, second in ("ab", "ba"):
        out = tmp_path/f"o{first}"
        merge([tmp_path/first, tmp_path/second], out=out)
        m, info = kind.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        want = kind.from_pretrained(tmp_path/first)
        assert m.config.id2label == want.config.id2label
        for name, x in want.state_dict().items():
            torch.testing.assert_close(m.state_dict()[name], x, msg=name)


class TestOrders:
    "Of a classifier of text."

    def of(self, folder, named, seed=0, **more):
        sizes = {**TEXT, **more}
        return write(folder, BertForSequenceClassification, BertConfig, sizes, named, seed=seed)

    def test_of_two_models_and_a_base(self, tmp_path):
        "A difference from a base is a difference of rows."
        states = [self.of(tmp_path/"abc"[i], LABELS[i:] + LABELS[:i], i) for i in range(3)]
        m = merge([tmp_path/"b", tmp_path/"c"], base=tmp_path/"a", scale=0.5).tensors
        name = "classifier.weight"
        # row 0 is label b, the first of the first model
        z, x, y = (s[name][[1 - i, 2 - i, 3 - i, -i]] for i, s in enumerate(states))
        torch.testing.assert_close(m[name], z + 0.5*((x + y)/2 - z))

    def test_with_weights_that_differ(self, tmp_path):
        x, y = self.of(tmp_path/"a", LABELS), self.of(tmp_path/"b", LABELS[::-1], 1)
        m = merge([tmp_path/"a", tmp_path/"b"], weights=[3, 1]).tensors
        for name in ("classifier.weight", "classifier.bias"):
            torch.testing.assert_close(m[name], 0.75*x[name] + 0.25*y[name].flip(0))

    def test_label2id_alone(self, tmp_path):
        self.of(tmp_path/"a", LABELS)
        y = self.of(tmp_path/"b", LABELS[::-1], 1)
        file = tmp_path/"b"/"config.json"
        config = json.loads(file.read_text())
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(4)}
        for change in (lambda: None, lambda: config.pop("id2label")):
            change()
            file.write_text(json.dumps(config))
            m = merge([tmp_path/"a", tmp_path/"b"], weights=[0, 1]).tensors
            torch.testing.assert_close(m["classifier.weight"], y["classifier.weight"].flip(0))

    def test_a_config_with_two_orders(self, tmp_path):
        self.of(tmp_path/"a", LABELS)
        self.of(tmp_path/"b", LABELS[::-1], 1)
        file = tmp_path/"b"/"config.json"
        config = json.loads(file.read_text())
        config["label2id"] = {x: i for i, x in enumerate(LABELS)}
        file.write_text(json.dumps(config))
        with pytest.raises(MergeError, match="has two"):
            merge([tmp_path/"a", tmp_path/"b"])

    def test_names_beside_none(self, tmp_path):
        "Nobody can know: by number, and said."
        x = self.of(tmp_path/"a", LABELS)
        y = self.of(tmp_path/"b", [f"LABEL_{i}" for i in range(4)], 1)
        for order in ("ab", "ba"):
            with pytest.warns(UserWarning, match="b does not name its labels"):
                m = merge([tmp_path/k for k in order]).tensors
            name = "classifier.weight"
            torch.testing.assert_close(m[name], (x[name] + y[name])/2)

    def test_two_orders_and_one_without_names(self, tmp_path):
        self.of(tmp_path/"a", [f"LABEL_{i}" for i in range(4)])
        self.of(tmp_path/"b", LABELS, 1)
        self.of(tmp_path/"c", LABELS[::-1], 2)
        models = [tmp_path/k for k in "abc"]
        with pytest.raises(MergeError, match="does not say which"):
            merge(models)
        assert "classifier.weight" not in merge(models, drop="classifier*").tensors

    @pytest.mark.parametrize("other", [["w", "x", "y", "z"], ["a", "b"]], ids=["set", "count"])
    def test_other_labels_are_refused_and_the_remedy_works(self, tmp_path, other):
        self.of(tmp_path/"a", LABELS)
        self.of(tmp_path/"b", other, 1)
        with pytest.raises(MergeError, match="heads of different tasks") as e:
            merge([tmp_path/"a", tmp_path/"b"])
        typed = str(e.value).split("--drop '")[1].split("'")[0]
        code, _, said = cli("merge", "a", "b", "-o", "o", "--drop", typed, cwd=tmp_path)
        assert code == 0, said
        _, info = BertForSequenceClassification.from_pretrained(
            tmp_path/"o", output_loading_info=True
        )
        assert {*info["missing_keys"]} == {"classifier.weight", "classifier.bias"}

    def test_two_heads_of_one_model(self, tmp_path):
        "The remedy leaves out both."
        for name, named in (("a", LABELS), ("b", ["w", "x", "y", "z"])):
            write(tmp_path/name, *CLASSES[5][:3], named)
        with pytest.raises(MergeError, match="heads of different tasks") as e:
            merge([tmp_path/"a", tmp_path/"b"])
        line = str(e.value).splitlines()[1]
        drop = [p for p in line.split("'") if p.endswith("*")]
        merged = merge([tmp_path/"a", tmp_path/"b"], drop=[*{*drop}]).tensors
        assert not any("classifier" in n for n in merged)

    def test_a_regression_has_no_names(self, tmp_path):
        for i, name in enumerate("ab"):
            self.of(tmp_path/name, ["LABEL_0"], i, problem_type="regression")
        merge([tmp_path/"a", tmp_path/"b"])

    def test_metrics_move_with_their_rows(self, tmp_path):
        states = [self.of(tmp_path/"a", LABELS), self.of(tmp_path/"b", LABELS[::-1], 1)]
        ones = [{k: torch.rand_like(x) + 0.1 for k, x in s.items()} for s in states]
        m = merge([tmp_path/"a", tmp_path/"b"], "curved", metrics=ones).tensors
        for name in ("classifier.weight", "classifier.bias"):
            (x, y), (c, d) = ([s[name] for s in every] for every in (states, ones))
            want = (c*x + d.flip(0)*y.flip(0))/(c + d.flip(0))
            torch.testing.assert_close(m[name], want)

    def test_inspect_compares_rows_of_one_label(self, tmp_path):
        state = self.of(tmp_path/"a", LABELS)
        order = [3, 2, 1, 0]
        write(
            tmp_path/"b",
            BertForSequenceClassification,
            BertConfig,
            TEXT,
            LABELS[::-1],
            reordered(state, ["classifier"], order),
        )
        found = inspect([tmp_path/"a", tmp_path/"b"])
        assert found.mergeable and found.distance == [0.0]
        self.of(tmp_path/"c", ["w", "x", "y", "z"])
        assert not inspect([tmp_path/"a", tmp_path/"c"]).mergeable


@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("key", ["label_names", "labels"])
def test_a_model_that_transformers_does_not_know(tmp_path, key, is_inside):
    "As timm writes it, in its two places and under its two names."
    states = []
    for i, named in enumerate((LABELS, LABELS[::-1])):
        state = {"stem.weight": randn(4, 4, seed=i), "head.fc.weight": randn(4, 4, seed=i)}
        said = {"pretrained_cfg": {key: named}} if is_inside else {key: named}
        save(tmp_path/"ab"[i], state, {"architecture": "resnet0", **said})
        states.append(state["head.fc.weight"])
    m = merge([tmp_path/"a", tmp_path/"b"]).tensors
    torch.testing.assert_close(m["head.fc.weight"], (states[0] + states[1].flip(0))/2)

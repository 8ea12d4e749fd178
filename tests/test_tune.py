"""Anchors and scales by the distance of outputs: on tiny models of each kind, wrong arguments, and
what is left behind."""

import math
import shutil
import warnings
from importlib import import_module

import pytest
import torch
from conftest import cli
from safetensors.torch import load_file, save_file
from test_examples import make, write

from frechet_merge import load, merge
from frechet_merge.messages import MergeError
from frechet_merge.huggingface.models import collect, open_model
from frechet_merge.files.output import OURS
from frechet_merge.tuning.tune import SKETCH, OutputDistance, _sketch, nearest, tune

WORDS = ["cat", "dog", "bird", "fish"]


def moved(base, folder, seed, size=0.05):
    "A copy of a model, its matrices moved a little."
    shutil.copytree(base, folder)
    g = torch.Generator().manual_seed(seed)
    save_file(
        {
            k: v + size*torch.randn(v.shape, generator=g) if v.dim() == 2 else v
            for k, v in load_file(base/"model.safetensors").items()
        },
        folder/"model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("tune")
    for kind in ("bert", "gpt2", "bert-encoder"):
        make(kind, tmp/kind)
        for i in range(2):
            moved(tmp/kind, tmp/f"{kind}{i}", i)
    for i in range(2):
        write(
            tmp/f"{i}.jsonl",
            [{"text": f"{a} {b}", "label": "nonsense"} for a in WORDS[i::2] for b in WORDS],
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(2):
            collect(tmp/f"bert{i}", tmp/f"{i}.jsonl", tmp/f"s{i}.safetensors")
    return tmp


def ask(work, kind, merged):
    "The same distances, measured from outside."
    d, at = OutputDistance(), [open_model(work/f"{kind}{i}") for i in range(2)]
    for i, m in enumerate(at):
        rows = [f"{a} {b}" for a in WORDS[i::2] for b in WORDS]
        d.add(m.model, [dict(m.tokenizer(rows, padding=True, return_tensors="pt"))], m.logits)
    unit, there = (d(open_model(x).model) for x in (work/kind, merged))
    return [a/b for a, b in zip(there, unit)]


@pytest.mark.parametrize(
    "kind, how",
    [
        ("bert", {}),
        ("bert", {"metrics": True}),
        ("gpt2", {}),
        ("gpt2", {"geometries": ["euclidean", "sphere"]}),
        ("bert-encoder", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
@pytest.mark.filterwarnings(
    "ignore:no metric for",
    "ignore:.*at an end",
    "ignore:.*at an end",
    "ignore:.*the metrics have seen",
)
def test_what_is_written_is_what_was_found(work, tmp_path, kind, how):
    if "metrics" in how:
        how = {"metrics": [work/f"s{i}.safetensors" for i in range(2)]}
    models = [work/f"{kind}{i}" for i in range(2)]
    found = tune(
        models, [work/"0.jsonl", work/"1.jsonl"], work/kind, out=tmp_path/"out", **how
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert found.settings == sorted(found.settings, key=lambda s: s.distance)
    for s in found.settings:
        assert s.distance == min(s.tried.values()) == pytest.approx(sum(s.distances)/2)
    assert ask(work, kind, tmp_path/"out") == pytest.approx(found.best.distances, rel=1e-3)
    # what it names is what it wrote
    again = merge(
        models, found.best.geometry, work/kind, scale=found.best.scale, metrics=how.get("metrics")
    ).tensors
    assert all(torch.equal(again[k], x) for k, x in load(tmp_path/"out").items())



@pytest.mark.filterwarnings(
    "ignore:no metric for", "ignore:.*at an end", "ignore:.*the metrics have seen"
)
def test_with_metrics_it_tries_both_sides_and_their_anchors(work):
    models, data = [work/f"bert{i}" for i in range(2)], [work/"0.jsonl", work/"1.jsonl"]
    metrics = [work/f"s{i}.safetensors" for i in range(2)]
    found = tune(models, data, work/"bert", metrics=metrics)
    assert {s.geometry.share for s in found.settings} == {"left", "right"}
    assert all(s.scale == 1 and s.geometry.anchor in s.tried for s in found.settings)


FAR = dict(geometries=["euclidean"], bounds=(12, 16))


@pytest.mark.filterwarnings("ignore:.*at an end")
def test_what_is_no_nearer_than_the_base_is_not_written(work, tmp_path):
    models, data = [work/f"bert{i}" for i in range(2)], [work/"0.jsonl", work/"1.jsonl"]
    says = "euclidean: the nearest merge is as far from the models as the base is, or farther"
    with pytest.warns(UserWarning, match=rf"{says} .*\nNothing is written to .*out:"):
        found = tune(models, data, work/"bert", out=tmp_path/"out", **FAR)
    assert found.best.distance >= 1 and found.merged is None and not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=rf"{says} .*\nDo not use it:"):
        assert tune(models, data, work/"bert", **FAR).merged is None


def test_weights_and_no_out(work, tmp_path):
    models, data = [work/f"bert{i}" for i in range(2)], [work/"0.jsonl", work/"1.jsonl"]
    first, second = (
        tune(models, data, work/"bert", ["euclidean"], weights=w, bounds=(0.5, 4))
        for w in ([1, 0], [1, 1])
    )
    assert first.merged is None and not list(tmp_path.iterdir())
    # alone, it is the model itself
    assert (
        first.best.scale == pytest.approx(1, abs=0.08)
        and first.best.distance < 0.01 < second.best.distance
    )


def test_adapters(tmp_path, work):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    for i in range(2):
        torch.manual_seed(i)
        m = get_peft_model(
            GPT2LMHeadModel.from_pretrained(work/"gpt2"),
            LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True),
        )
        for n, p in m.named_parameters():
            if "lora_B" in n:
                p.data = 0.3*torch.randn_like(p)
        m.save_pretrained(tmp_path/f"a{i}")
    found = tune(
        [tmp_path/f"a{i}" for i in range(2)],
        work/"0.jsonl",
        work/"gpt2",
        ["lora:rank=4", "tsvm"],
        out=tmp_path/"out",
    )
    assert load(tmp_path/"out").adapter["r"] in (4, 2) and found.best.distance < 1
    apart = tune(
        [f"{work / 'gpt2'}+{tmp_path / f'a{i}'}" for i in range(2)],
        [work/"0.jsonl"],
        work/"gpt2",
        ["euclidean"],
    )
    lora = next(s for s in found.settings if "lora" in s.name)
    # a mean at full rank is the mean of full models
    assert (
        lora.distance == pytest.approx(apart.best.distance, rel=1e-3)
        and lora.scale == apart.best.scale
    )


@pytest.mark.filterwarnings("ignore:.*at an end", "ignore:.*saved whole")
def test_what_adapters_save_whole_has_no_scale(tmp_path, work):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    for i in range(2):
        torch.manual_seed(i)
        m = get_peft_model(
            GPT2LMHeadModel.from_pretrained(work/"gpt2"),
            LoraConfig(
                r=2,
                target_modules=["c_attn"],
                modules_to_save=["ln_f"],
                task_type="CAUSAL_LM",
                fan_in_fan_out=True,
            ),
        )
        with torch.no_grad():
            for n, p in m.named_parameters():
                if "lora_B" in n or "modules_to_save" in n:
                    p.add_(0.3*torch.randn_like(p))
        m.save_pretrained(tmp_path/f"a{i}")
    found = tune(
        [tmp_path/f"a{i}" for i in range(2)],
        work/"0.jsonl",
        work/"gpt2",
        ["lora"],
        out=tmp_path/"out",
        bounds=(2.0, 8.0),
        max_samples=8,
    )
    d = OutputDistance()
    rows = [f"{a} {b}" for a in WORDS[::2] for b in WORDS]
    for m in (open_model(f"{work / 'gpt2'}+{tmp_path / f'a{i}'}") for i in range(2)):
        d.add(m.model, [dict(m.tokenizer(rows, padding=True, return_tensors="pt"))], m.logits)
    unit, there = (
        d(open_model(x).model) for x in (work/"gpt2", f"{work / 'gpt2'}+{tmp_path / 'out'}")
    )
    assert found.best.scale >= 2 and [a/b for a, b in zip(there, unit)] == pytest.approx(
        found.best.distances, rel=0.02
    )


def test_folders_of_runs_that_were_killed_go(work, tmp_path):
    (tmp_path/".out.k3l5m7_x.partial").mkdir()
    (tmp_path/".out.k3l5m7_x.partial"/"lock").write_bytes(OURS)
    (tmp_path/".out.k3l5m7_x.partial"/"m").write_text("half")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tune(
            [work/"gpt20", work/"gpt21"],
            [work/"0.jsonl", work/"1.jsonl"],
            work/"gpt2",
            ["euclidean"],
            out=tmp_path/"out",
        )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "change, says, code",
    [
        ({"data": ["0.jsonl"]*3}, "3 data sets for 2 models", 2),
        ({"heads": ["h"]*3}, "3 heads for 2 models", 2),
        ({"data": ["absent.jsonl"]}, "no such file", 1),
        ({"models": ["bert", "bert0"]}, "its outputs are those of the base", 1),
        ({"models": ["bert0", "gpt20"]}, "two architectures", 1),
        ({"base": "absent"}, "not a folder here", 1),
        ({"geometries": ["nothing"]}, "no geometry is called", 2),
        ({"weights": [1]}, "1 weights", 2),
        ({"bounds": (2, 1)}, "bounds", 2),
        ({"geometries": ["lora"]}, "merges adapters", 2),
        ({"out": "bert0"}, "exists already", 1),
        ({"out": "no/out"}, "its folder does not exist", 1),
        ({"geometries": ["pullback"]}, "made of the models' metrics", 2),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_refusals(work, tmp_path, monkeypatch, change, says, code):
    monkeypatch.chdir(work)
    before = sorted(work.rglob("*"))
    args = {
        "models": ["bert0", "bert1"],
        "data": ["0.jsonl", "1.jsonl"],
        "base": "bert",
        "out": tmp_path/"out",
    } | change
    with pytest.raises(ValueError, match=says) as e, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tune(**args)
    assert isinstance(e.value, MergeError) == (code == 1) and len(str(e.value).splitlines()) <= 3
    assert sorted(work.rglob("*")) == before and not list(tmp_path.iterdir())


def test_on_the_command_line(work, tmp_path):
    code, out, err = cli(
        "tune",
        "bert0",
        "bert1",
        "--base",
        "bert",
        "--data",
        "0.jsonl,1.jsonl",
        "--geometry",
        "epimer",
        "--geometry",
        "euclidean",
        "-o",
        tmp_path/"out",
        "-q",
        cwd=work,
    )
    assert (
        code == 0
        and "euclidean" in out
        and "epimer" in out
        and "The nearest: --geometry e" in out
        and f"→ {tmp_path}/out" in out.replace("\n", "")
    ), err
    assert "scale:" in (tmp_path/"out"/"README.md").read_text()
    code, out, err = cli(
        "tune",
        "bert0",
        "bert1",
        "--base",
        "bert",
        "--data",
        "0.jsonl,1.jsonl",
        "--geometry",
        "euclidean",
        "--bounds",
        "12,16",
        "-q",
        cwd=work,
    )
    assert (
        code == 0
        and "is at an end, 1" in err
        and "--bounds" in err
        and "the nearest merge is as far from the models as the base is, or farther" in err
    ), err
    code, out, err = cli("tune", "bert0", "bert1", "--base", "bert", "--data", "0.jsonl,", cwd=work)
    assert code == 2 and err.startswith("error: --data '0.jsonl,' has an empty name")


def test_the_command_line_names_no_output_that_is_not_there(work, tmp_path):
    far = "tune bert0 bert1 --base bert --data 0.jsonl,1.jsonl --geometry euclidean --bounds 12,16"
    code, out, err = cli(*far.split(), "-q", "-o", tmp_path/"far", cwd=work)
    assert code == 1 and f"Nothing is written to {tmp_path}/far" in err and "→" not in out
    assert not (tmp_path/"far").exists()


def test_distance_of_wide_and_masked_outputs():
    "A sketch keeps squared distances on average; padding does not count; labels do not either."
    torch.manual_seed(0)
    x, y = torch.randn(2, 400, 3000)
    assert _sketch(x).shape == (400, SKETCH) and torch.equal(_sketch(x[:, :9]), x[:, :9])
    assert float(
        (_sketch(x) - _sketch(y)).square().sum()/(x - y).square().sum()
    ) == pytest.approx(1, abs=0.02)
    emb = torch.nn.Embedding(7, 3)

    def forward(m, b):
        return m(b["input_ids"])

    ids = torch.tensor([[1, 2, 0], [3, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": ids != 0}
    d, other = OutputDistance().add(emb, [batch], forward), torch.nn.Embedding(7, 3)
    expected = (emb.weight[1:4] - other.weight[1:4]).square().sum(1).mean()
    assert d(other)[0] == pytest.approx(float(expected.detach()), rel=1e-5) and d(emb) == [0.0]
    with torch.no_grad():
        other.weight[2] = math.nan
    assert d(other) == [math.inf]
    with pytest.raises(ValueError, match="not finite"):
        OutputDistance().add(other, [batch], forward)
    with pytest.raises(ValueError, match="batches are empty"):
        OutputDistance().add(emb, [], forward)
    with pytest.raises(ValueError, match="must be"):
        OutputDistance().add(emb, [batch], lambda m, b: m(b["input_ids"])[0, 0])


def test_search_survives_what_is_not_finite():
    x, tried = nearest(lambda x: math.inf if x > 3 else (math.log2(x) - 1)**2)
    assert x == pytest.approx(2, rel=0.08) and len(tried) < 25
    assert all(float(f"{k:.3g}") == k for k in tried)
    assert nearest(lambda x: math.nan if x < 1 else (math.log2(x) - 1)**2)[0] == pytest.approx(
        2, rel=0.08
    )


def test_it_asks_what_the_metrics_have_not_seen(work, tmp_path, monkeypatch):
    """With the metrics' own seed, since the command line's may differ; seen ones only if there are
    no others, and with a word."""
    t = import_module("frechet_merge.tuning.tune")
    rows = [{"text": f"{a} {b} {c}"} for a in WORDS for b in WORDS for c in WORDS[:2]]
    data = write(tmp_path/"d.jsonl", rows)
    s = tmp_path/"s.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collect(work/"bert0", data, s, max_samples=20, seed=3)
    seen = {r["text"] for r in t.examples(data, max_samples=20, seed=3)}
    folder = tmp_path/"stats"
    folder.mkdir()
    shutil.copy(s, folder/"model.safetensors")
    for k, at in ((None, s), (64, s), (10, s), (64, folder)):
        asked = {r["text"] for r in t._unseen(data, at, "train", None, None, k, 0)}
        assert not asked & seen and len(asked) == min(12, k or 12)
    assert {r["text"] for r in t._unseen(data, None, "train", None, None, None, 0)} > seen
    with pytest.warns(UserWarning, match="fewer than 8 others"):
        assert (
            len(t._unseen(write(tmp_path/"few.jsonl", rows[:22]), s, "train", None, None, 64, 0))
            == 22
        )
    with pytest.raises(MergeError, match="no such file"):
        t._unseen(tmp_path/"absent.jsonl", s, "train", None, None, 64, 0)


@pytest.mark.filterwarnings("ignore:.*at an end")
def test_layers_that_one_adapter_lacks(tmp_path, work):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    for i, layers in enumerate((["c_attn"], ["c_attn", "c_fc"])):
        torch.manual_seed(i)
        get_peft_model(
            GPT2LMHeadModel.from_pretrained(work/"gpt2"),
            LoraConfig(r=2, target_modules=layers, init_lora_weights=False, fan_in_fan_out=True),
        ).save_pretrained(tmp_path/f"a{i}")
    models = [tmp_path/"a0", tmp_path/"a1"]
    for absent in ("renormalise", None):
        found = tune(
            models,
            work/"0.jsonl",
            work/"gpt2",
            ["lora"],
            out=tmp_path/f"{absent}",
            absent=absent,
            max_samples=8,
        )
        want = merge(models, "lora", scale=found.best.scale, absent=absent).tensors
        assert all(torch.equal(x, want[k]) for k, x in load(tmp_path/f"{absent}").items())
    c_fc = next(k for k in want if "c_fc" in k and "lora_B" in k)
    assert not torch.equal(load(tmp_path/"renormalise")[c_fc], want[c_fc])
    told = []
    with pytest.raises(ValueError, match="absent = 'zero'"):
        tune(
            [work/"gpt20", work/"gpt21"],
            work/"0.jsonl",
            work/"gpt2",
            absent="zero",
            say=told.append,
        )
    # before anything runs
    assert not told
    with pytest.raises(ValueError, match="absent = 'none'"):
        tune(models, work/"0.jsonl", work/"gpt2", ["lora"], absent="none")

"""PEFT adapters in, a PEFT adapter out: whatever LoRA can be in PEFT, the update that PEFT reads
from the result is the mean of those that it reads from the inputs."""

import copy
import json
import math
import re
import shutil
import warnings

import peft
import pytest
import torch
from conftest import cli
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from frechet_merge import LoRA, MergeError, Span, Sphere, load, merge
from frechet_merge.adapters.peft import layers
from frechet_merge.geometries.baselines import KnOTS, TSVM

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Toy(nn.Module):
    "One of each layer that LoRA adapts."

    def __init__(self):
        super().__init__()
        self.emb, self.q, self.v, self.out = (
            nn.Embedding(11, 8),
            nn.Linear(8, 12),
            nn.Linear(8, 12),
            nn.Linear(12, 8, bias=False),
        )
        self.fan, self.c1, self.c2, self.c3 = (
            Conv1D(7, 8),
            nn.Conv1d(8, 6, 3, padding=1),
            nn.Conv2d(1, 5, (3, 2), padding=1),
            nn.Conv3d(1, 4, 2, padding=1),
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.emb(ids)
        y = self.norm(x + self.out(self.q(x)*self.v(x)))
        return (
            self.head(y).sum(1),
            self.fan(y),
            self.c1(y.mT),
            self.c2(y[:, None]),
            self.c3(y[:, None, None]),
        )


IDS = torch.arange(10).view(2, 5)
ALL = ["emb", "q", "v", "out", "c1", "c2", "c3"]


def toy():
    torch.manual_seed(0)
    return Toy().eval()


@pytest.fixture
def make(tmp_path):
    """make(name, seed, **LoraConfig) saves a random adapter of the toy with PEFT, and returns its
    folder."""

    def make(name, seed, dtype=None, **cfg):
        model = get_peft_model(
            toy(), LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["q", "v"], **cfg})
        )
        gen = torch.Generator().manual_seed(seed)
        for n, p in model.named_parameters():
            if "lora_" in n or p.requires_grad:
                p.data = torch.randn(p.shape, generator=gen)/2
        model.save_pretrained(tmp_path/name)
        file = tmp_path/name/"adapter_model.safetensors"
        if dtype:
            save_file(
                {k: v.to(dtype) for k, v in load_file(file).items()},
                file,
                metadata={"format": "pt"},
            )
        return tmp_path/name

    return make


def read(folder):
    "module → ΔW as PEFT computes it, and the model itself."
    model = PeftModel.from_pretrained(toy(), str(folder)).eval()
    return {
        n.removeprefix("base_model.model."): m.get_delta_weight("default").detach().double()
        for n, m in model.named_modules()
        if hasattr(m, "get_delta_weight")
    }, model


def mean(folders, ws, zero=True):
    found, out = [read(f)[0] for f in folders], {}
    for n in {n: 0 for d in found for n in d}:
        has = [(w, d[n]) for w, d in zip(ws, found) if n in d]
        out[n] = sum(w*d for w, d in has)/(sum(ws) if zero else sum(w for w, _ in has))
    return out


def close(got, want, tol=1e-5):
    assert got.keys() == want.keys()
    for n in want:
        assert (got[n] - want[n]).norm() <= tol*want[n].norm(), n


PAIRS = {
    "plain": ({}, {}),
    "alpha": ({"lora_alpha": 5}, {"lora_alpha": 1}),
    "rslora": ({"use_rslora": True}, {}),
    "ranks": ({"r": 2}, {"r": 5, "use_rslora": True}),
    "patterns": (
        {"rank_pattern": {"q": 5}, "alpha_pattern": {"v": 9}},
        {"rank_pattern": {"v": 1}, "alpha_pattern": {"^q": 2}, "use_rslora": True},
    ),
    "targets": ({"target_modules": ["q", "out"]}, {"target_modules": ["v", "out"], "r": 2}),
    "regex": ({"target_modules": "q|v"}, {"target_modules": ["q"]}),
    "every kind": ({"target_modules": ALL}, {"target_modules": ALL, "r": 2, "lora_alpha": 3}),
    "fan_in_fan_out": (
        {"target_modules": ["fan"], "fan_in_fan_out": True},
        {"target_modules": ["fan"], "fan_in_fan_out": True, "r": 2},
    ),
    "ranks beyond the layer": (
        {"target_modules": ["c2", "c3"], "r": 4},
        {"target_modules": ["c2", "c3"], "r": 4},
    ),
    "zero": ({"init_lora_weights": True}, {}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_mean_of_what_peft_reads(name, make, tmp_path):
    folders = [
        make(f"a{i}", i, **cfg) for i, cfg in enumerate((*PAIRS[name], {"r": 1, **PAIRS[name][0]}))
    ]
    if name == "zero":
        t = load_file(folders[0]/"adapter_model.safetensors")
        save_file(
            {k: v*("lora_A" in k) for k, v in t.items()},
            folders[0]/"adapter_model.safetensors",
            metadata={"format": "pt"},
        )
    out = merge(folders, weights=[0.5, 0.3, 0.2], out=tmp_path/"out").out
    with warnings.catch_warnings():
        # PEFT warns of missing and unexpected keys
        warnings.simplefilter("error")
        got, _ = read(out)
    close(got, mean(folders, [0.5, 0.3, 0.2]))


def test_absent_layers_are_zero_or_not_there(make, tmp_path):
    folders = [make("a", 0, target_modules=["q", "out"]), make("b", 1, target_modules=["v", "out"])]
    for absent in ("zero", "renormalise"):
        merged = merge(folders, weights=[3, 1], absent=absent, out=tmp_path/absent)
        close(read(merged.out)[0], mean(folders, [3, 1], absent == "zero"))
    with pytest.raises(ValueError, match="absent = 'skip'"):
        merge(folders, absent="skip")
    with pytest.raises(ValueError, match="all have weight 0"):
        merge(folders, weights=[0, 1], absent="renormalise")
    close(
        {
            k: v
            for k, v in read(merge(folders, weights=[0, 1], out=tmp_path/"w0").out)[0].items()
            if k != "q"
        },
        mean(folders[1:], [1]),
    )


@pytest.mark.parametrize(
    "cfg",
    [
        {"modules_to_save": ["head", "norm"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_what_is_saved_whole_is_averaged(cfg, make, tmp_path):
    """The whole model, run: all its outputs are linear in one linear layer, in its bias, and in the
    norm's and the head's own."""
    folders = [
        make("a", 0, target_modules=["fan"], fan_in_fan_out=True, **cfg),
        make("b", 1, target_modules=["fan"], fan_in_fan_out=True, r=2, **cfg),
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = merge(folders, weights=[3, 1], out=tmp_path/"out").out
    heads = [str(w.message) for w in said if "saved whole beside the adapters" in str(w.message)]
    assert [h.split(":")[0] for h in heads] == (
        ["base_model.model.head.weight"] if "modules_to_save" in cfg else []
    )
    a, b, m = (read(f)[1] for f in (*folders, out))
    linear = 1 if "modules_to_save" not in cfg and cfg.get("bias") != "all" else None
    if linear:
        with torch.no_grad():
            for x, y, z in zip(a(IDS), b(IDS), m(IDS)):
                torch.testing.assert_close(z, 0.75*x + 0.25*y, rtol=0, atol=2e-5)
    for n, p in m.named_parameters():
        if "lora_" in n:
            continue
        q = [dict(x.named_parameters())[n] for x in (a, b)]
        torch.testing.assert_close(p, 0.75*q[0] + 0.25*q[1], msg=n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, make, tmp_path):
    folders = [make(f"a{i}", i, dtype) for i in range(2)]
    merged = merge(folders, out=tmp_path/"out")
    assert all(x.dtype == dtype for x in merged.tensors.values())
    want = {
        n: sum(layers(load(f))[0][n].factors().delta() for f in folders)/2 for n in ("q", "v")
    }
    close(
        {n: x.factors().delta() for n, x in layers(load(merged.out))[0].items()},
        want,
        40*torch.finfo(dtype).eps,
    )
    wide = merge(folders, dtype="fp32")
    close({n: x.factors().delta() for n, x in layers(wide.tensors)[0].items()}, want, 1e-6)


def gauged(folder, to, seed, cond, dtype):
    "The adapter with each layer in another gauge, on disk."
    t, gen = load_file(folder/"adapter_model.safetensors"), torch.Generator().manual_seed(seed)
    to.mkdir(parents=True)
    (to/"adapter_config.json").write_text((folder/"adapter_config.json").read_text())
    for k in [k for k in t if "lora_A" in k]:
        b = k.replace("lora_A", "lora_B")
        r = len(t[k])
        U, V = (
            torch.linalg.qr(torch.randn(r, r, generator=gen, dtype=torch.float64))[0]
            for _ in range(2)
        )
        d = torch.logspace(0, math.log10(cond), r, dtype=torch.float64)/math.sqrt(cond)
        t[k], t[b] = (
            ((V*d) @ U.T @ t[k].double().flatten(1)).view_as(t[k]).to(dtype),
            (t[b].double().flatten(1) @ (U/d @ V.T)).view_as(t[b]).to(dtype),
        )
    save_file(
        {k: v.contiguous() for k, v in t.items()},
        to/"adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return to


GEOMETRIES = {
    "flat": LoRA(),
    "rank 3": LoRA(rank=3),
    "mix": LoRA(metric="mix"),
    "inv": LoRA(metric="inv"),
    "wasserstein": LoRA(metric="wasserstein"),
    "pinned": LoRA(pinned=0.05),
    "sphere": Span(Sphere()),
    "KnOTS": KnOTS(),
    "TSV-M": TSVM(),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_gauges_on_disk_do_not_move_the_merge(name, dtype, tol, make, tmp_path):
    """Close adapters (for the intrinsic means), each in two gauges of condition up to 1000; in
    float32 beside what rounding the gauged factors did to the inputs."""
    g, near = GEOMETRIES[name], make("m", 0, torch.float64)
    folders = []
    for i in range(3):
        t = load_file(near/"adapter_model.safetensors")
        gen = torch.Generator().manual_seed(i)
        (tmp_path/f"n{i}").mkdir()
        (tmp_path/f"n{i}"/"adapter_config.json").write_text(
            (near/"adapter_config.json").read_text()
        )
        save_file(
            {k: v + 0.1*torch.randn(v.shape, generator=gen, dtype=v.dtype) for k, v in t.items()},
            tmp_path/f"n{i}"/"adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        folders.append(tmp_path/f"n{i}")

    def run(paths, tag):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = merge(paths, g, weights=[0.5, 0.3, 0.2], out=tmp_path/tag, dtype=dtype).out
        return {n: x.factors().delta() for n, x in layers(load(out))[0].items()}

    for cond in (10, 1e3):
        a = [gauged(f, tmp_path/f"a{i}{cond}", i, cond, dtype) for i, f in enumerate(folders)]
        if dtype == torch.float64:
            b = folders
        # the same rounded updates, as float64 files in their own gauge: what is left is the merge's
        # own error
        else:
            b = [gauged(f, tmp_path/f"b{i}{cond}", 9, 1, torch.float64) for i, f in enumerate(a)]
        close(run(a, f"x{cond}"), run(b, f"y{cond}"), tol)


def test_in_and_out_needs_no_base(make, tmp_path):
    folders = [make(f"a{i}", i) for i in range(2)]
    for f in folders:
        cfg = json.loads((f/"adapter_config.json").read_text()) | {
            "base_model_name_or_path": "nobody/has-this"
        }
        (f/"adapter_config.json").write_text(json.dumps(cfg))
    rc, out, err = cli("merge", *folders, "-o", tmp_path/"out")
    assert rc == 0 and "2 models merged" in out, err
    cfg = json.loads((tmp_path/"out"/"adapter_config.json").read_text())
    assert (
        cfg["base_model_name_or_path"] == "nobody/has-this" and cfg["r"] == cfg["lora_alpha"] == 6
    )
    assert "base_model: nobody/has-this" in (tmp_path/"out"/"README.md").read_text()
    # a merge can be merged, and the mean of one is that one
    again = merge([tmp_path/"out"], out=tmp_path/"again")
    close(read(again.out)[0], mean(folders, [1, 1]))
    rc, _, err = cli("merge", *folders, "-o", tmp_path/"r", "--geometry", "lora:rank=2")
    assert rc == 0 and all(
        len(v) == 2
        for k, v in load_file(tmp_path/"r"/"adapter_model.safetensors").items()
        if "lora_A" in k
    ), err
    assert LoraConfig.from_pretrained(tmp_path/"r").r == 2


def test_adapters_of_other_bases(make, tmp_path):
    folders = [make(f"a{i}", i) for i in range(2)]
    for f, b in zip(folders, ("org/one", "org/two")):
        (f/"adapter_config.json").write_text(
            json.dumps(
                json.loads((f/"adapter_config.json").read_text()) | {"base_model_name_or_path": b}
            )
        )
    rc, _, err = cli("merge", *folders, "-o", tmp_path/"out")
    assert (
        rc == 1
        and "org/one" in err
        and "org/two" in err
        and "--any-base" in err
        and not (tmp_path/"out").exists()
    )
    assert cli("merge", *folders, "-o", tmp_path/"out", "--any-base")[0] == 0


def test_baked(make, tmp_path):
    "A merged adapter on its base is what PEFT's merge_and_unload makes of it."
    cfg = dict(
        target_modules=["q", "v", "emb", "c1", "c2", "c3"],
        modules_to_save=["head"],
        lora_bias=False,
    )
    folders = [make("a", 0, **cfg), make("b", 1, r=2, **cfg)]
    save_file(
        {k: v.contiguous() for k, v in toy().state_dict().items()}, tmp_path/"base.safetensors"
    )
    out = merge(folders, out=tmp_path/"out").out
    want = PeftModel.from_pretrained(toy(), str(out)).merge_and_unload().state_dict()
    rc, _, err = cli(
        "merge",
        *folders,
        "-o",
        tmp_path/"full",
        "--bake",
        tmp_path/"base.safetensors",
        "--geometry",
        "lora",
    )
    assert rc == 0, err
    got = load(tmp_path/"full")
    assert set(got) == set(want)
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=0, atol=1e-5, msg=k)
    assert (
        "bake:" in (tmp_path/"full"/"README.md").read_text()
        and not (tmp_path/"full"/"adapter_config.json").exists()
    )
    # and the mean of baked adapters is the baked mean
    each = merge([f"{tmp_path / 'base.safetensors'}+{f}" for f in folders])
    for k in want:
        torch.testing.assert_close(each.tensors[k], want[k], rtol=0, atol=1e-5, msg=k)


def test_baked_fan_in_fan_out(make, tmp_path):
    folders = [make(f"a{i}", i, target_modules=["fan"], fan_in_fan_out=True) for i in range(2)]
    out = merge(folders, out=tmp_path/"out").out
    want = PeftModel.from_pretrained(toy(), str(out)).merge_and_unload().state_dict()
    got = merge(folders, bake=toy().state_dict()).tensors
    torch.testing.assert_close(got["fan.weight"], want["fan.weight"], rtol=0, atol=1e-5)


def test_scale_and_patterns(make, tmp_path):
    folders = [make(f"a{i}", i) for i in range(2)]
    want = mean(folders, [1, 1])
    close(
        read(merge(folders, scale={"q": -2.0, "v": 0.5}, out=tmp_path/"out").out)[0],
        {"q": -2*want["q"], "v": 0.5*want["v"]},
    )
    with pytest.raises(ValueError, match="'k' matches no tensor"):
        merge(folders, scale={"k": 2.0})
    close(
        read(merge(folders, weights={"q": [1, 0]}, out=tmp_path/"w").out)[0],
        {"q": mean(folders[:1], [1])["q"], "v": want["v"]},
    )


def test_batches_do_not_change_the_result(make, monkeypatch):

    folders = [make(f"a{i}", i) for i in range(3)]
    for g in (LoRA(), LoRA(metric="wasserstein"), TSVM()):
        one = merge(folders, g).tensors
        monkeypatch.setattr("frechet_merge.merging.plan.BATCH", 1)
        for k, x in merge(folders, g, executor="serial").tensors.items():
            torch.testing.assert_close(x, one[k], msg=k)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "cfg, says",
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"trainable_token_indices": {"emb": [1]}}, "trainable_token_indices"),
    ],
    ids=str,
)
def test_what_peft_makes_that_is_not_an_update_is_refused(cfg, says, make):
    with pytest.raises(ValueError, match=says):
        merge([make("a", 0), make("b", 1, **cfg)])


def test_other_methods_are_refused(tmp_path, make):
    get_peft_model(toy(), peft.VeraConfig(r=2, target_modules=["q"])).save_pretrained(
        tmp_path/"vera"
    )
    with pytest.raises(ValueError, match="peft_type = 'VERA'"):
        merge([make("a", 0), tmp_path/"vera"])


def test_grouped_convolutions_are_refused(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(4, 8, 3, groups=2)

    get_peft_model(Net(), LoraConfig(r=4, target_modules=["c"])).save_pretrained(tmp_path/"g")
    with pytest.raises(ValueError, match="grouped convolutions"):
        merge([tmp_path/"g"])


def test_kinds_are_not_mixed(make, tmp_path):
    a = make("a", 0)
    with pytest.raises(ValueError, match="full model"):
        merge([a, toy().state_dict()])
    with pytest.raises(ValueError, match="leave base= .--base. out"):
        merge([a], base=toy().state_dict())
    with pytest.raises(ValueError, match="these are full models"):
        merge([toy().state_dict()], LoRA())
    with pytest.raises(ValueError, match="metrics are for"):
        merge([a], metrics=[{}])
    b = copy.deepcopy(a)
    t = load_file(b/"adapter_model.safetensors")
    k = next(k for k in t if "lora_B" in k)
    t[k][0, 0] = math.nan
    save_file(t, b/"adapter_model.safetensors", metadata={"format": "pt"})
    # and names the broken one alone
    with pytest.raises(
        ValueError,
        match=f"^{re.escape(str(b))}: tensor {k!r} has 1 values that are NaN or infinite",
    ):
        merge([make("sound", 1), b])


def test_baking_rounds_once(make):
    """bfloat16 adapters on a float32 base: the merged factors are not rounded to bfloat16 on the
    way."""
    folders = [make(f"a{i}", i, torch.bfloat16) for i in range(3)]
    base = toy().state_dict()
    got, want = (
        merge(folders, bake=base).tensors,
        {n: sum(layers(load(f))[0][n].factors().delta() for f in folders)/3 for n in ("q", "v")},
    )
    for n in want:
        assert (
            (got[f"{n}.weight"] - base[f"{n}.weight"]).double() - want[n]
        ).norm() <= 1e-6*want[n].norm()


def _held(**extra):
    c = load(
        {
            "base_model.model.l.lora_A.weight": torch.randn(2, 6),
            "base_model.model.l.lora_B.weight": torch.randn(4, 2),
            **{f"base_model.model.{k}": v for k, v in extra.items()},
        }
    )
    c.adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "x"}
    return c


def test_counters_that_are_saved_whole():
    m = merge(
        [
            _held(
                **{
                    "bn.num_batches_tracked": torch.tensor(5),
                    "bn.running_mean": torch.full((3,), float(i)),
                }
            )
            for i in range(2)
        ]
    ).tensors
    assert m["base_model.model.bn.num_batches_tracked"] == 5 and torch.equal(
        m["base_model.model.bn.running_mean"], torch.full((3,), 0.5)
    )


def test_a_base_of_eight_bits():
    w, ad = torch.randn(4, 6).to(torch.float8_e4m3fn), _held()
    out = merge([ad], bake=load({"l.weight": w})).tensors["l.weight"]
    want = (
        w.float() + ad["base_model.model.l.lora_B.weight"] @ ad["base_model.model.l.lora_A.weight"]
    )
    assert out.dtype == w.dtype and torch.equal(out.float(), want.to(w.dtype).float())


TINY = {
    "llama": dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=False,
    ),
    "gpt2": dict(
        n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=40, num_labels=3, pad_token_id=0
    ),
}


def _saved(kind, tmp, **lora):
    "A tiny model of transformers on disk, an adapter on it, and PEFT's own weights of both."
    import transformers

    torch.manual_seed(0)
    cfg = transformers.AutoConfig.for_model(kind, **TINY[kind])
    model = (
        transformers.GPT2ForSequenceClassification
        if kind == "gpt2"
        else transformers.AutoModelForCausalLM.from_config
    )(cfg).eval()
    model.save_pretrained(tmp/"base")
    m = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **lora))
    with torch.no_grad():
        for n, p in m.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape)*0.3)
    m.save_pretrained(tmp/"adapter", save_embedding_layers="auto")
    return m.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "kind, lora",
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"target_modules": ["lm_head", "v_proj"]}),
        ("gpt2", {"target_modules": ["attn.c_proj", "score"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    ],
    ids=["embedding", "lm_head", "square Conv1D and linear", "Conv1D"],
)
def test_baked_as_peft_bakes(kind, lora, tmp_path):
    want = _saved(kind, tmp_path, **lora)
    for got in (
        load(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"),
        merge([tmp_path/"adapter"], LoRA(), bake=tmp_path/"base").tensors,
    ):
        moved = 0
        for k, w in load(tmp_path/"base").items():
            moved += not torch.equal(got[k], w)
            torch.testing.assert_close(got[k].float(), want[k].float(), rtol=1e-5, atol=1e-5)
        assert moved


def test_a_layer_that_is_called_an_embedding_and_is_none():
    c = load(
        {
            "base_model.model.time_embedding.linear.lora_A.weight": torch.randn(2, 6),
            "base_model.model.time_embedding.linear.lora_B.weight": torch.randn(6, 2),
        }
    )
    c.adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    w = torch.randn(6, 6)
    A, B = (c[f"base_model.model.time_embedding.linear.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(
        merge([c], bake=load({"time_embedding.linear.weight": w})).tensors[
            "time_embedding.linear.weight"
        ],
        w + B @ A,
    )


def test_an_embedding_of_the_base_that_one_adapter_saved_along(tmp_path):
    _saved("llama", tmp_path/"a", target_modules=["q_proj", "embed_tokens"])
    _saved("llama", tmp_path/"b", target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = (
            merge([tmp_path/x/"adapter", tmp_path/y/"adapter"], any_base=True).tensors
            for x, y in ("ab", "aa")
        )
    assert not any("base_layer" in k for k in one) and any("base_layer" in k for k in two)


@pytest.mark.parametrize("kind, embedding", [("gpt2", "wte"), ("llama", "embed_tokens")])
@pytest.mark.parametrize("target", ["embedding", "lm_head"])
def test_one_of_two_that_are_tied_is_adapted_alone(tmp_path, kind, embedding, target):
    import transformers

    torch.manual_seed(0)
    name = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[kind]
    config = {"gpt2": transformers.GPT2Config, "llama": transformers.LlamaConfig}[kind]
    cls = getattr(transformers, name)
    model = cls(config(**TINY[kind] | {"tie_word_embeddings": True}))
    model.save_pretrained(tmp_path/"base")
    targets = [embedding if target == "embedding" else target]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets)).eval()
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape))
        ids = torch.arange(6)[None]
        want = adapted(ids).logits
    adapted.save_pretrained(tmp_path/"a", save_embedding_layers=False)
    merge([tmp_path/"a"], bake=tmp_path/"base", out=tmp_path/"out")
    found, said = cls.from_pretrained(tmp_path/"out", output_loading_info=True)
    assert not said["missing_keys"] and not found.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_factors_that_peft_ties_to_one_another(tmp_path):
    import transformers
    from peft import PeftModel

    def tied():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**TINY["llama"] | {"tie_word_embeddings": True})
        return transformers.LlamaForCausalLM(config).eval()

    config = dict(r=2, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    tied().save_pretrained(tmp_path/"base")
    each = []
    for seed in (1, 2):
        model = get_peft_model(tied(), LoraConfig(**config))
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape))
        model.save_pretrained(tmp_path/str(seed), save_embedding_layers=False)
        each.append(model)
    merge([tmp_path/"1", tmp_path/"2"], out=tmp_path/"m")
    mean = PeftModel.from_pretrained(tied(), tmp_path/"m").eval()
    for name in ("model.embed_tokens", "lm_head"):
        a, b, m = (
            x.base_model.model.get_submodule(name).get_delta_weight(x.active_adapter)
            for x in (*each, mean)
        )
        torch.testing.assert_close(m, (a + b)/2, rtol=1e-4, atol=1e-4)
    merge([tmp_path/"m"], bake=tmp_path/"base", out=tmp_path/"out")
    found, ids = transformers.LlamaForCausalLM.from_pretrained(tmp_path/"out"), torch.arange(6)
    with torch.no_grad():
        logits = [x(ids[None]).logits for x in (found.eval(), mean)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "base_labels", [None, 3], ids=["a base without a head", "a base with another head"]
)
def test_an_adapter_brings_its_classes(base_labels, tmp_path):
    "RoBERTa's head has two layers; the config beside the weights is the base's."
    import transformers
    from frechet_merge.adapters.baking import bake

    cfg, own = (
        dict(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        ),
        ["classifier"],
    )
    first = (
        transformers.RobertaForMaskedLM(transformers.RobertaConfig(**cfg))
        if base_labels is None
        else transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**cfg, num_labels=base_labels)
        )
    )
    first.save_pretrained(tmp_path/"base")
    kept = []
    for i in range(2):
        torch.manual_seed(i)
        m = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path/"base", num_labels=5, ignore_mismatched_sizes=True
        )
        m = get_peft_model(
            m,
            LoraConfig(
                r=2,
                task_type="SEQ_CLS",
                target_modules=["query"],
                modules_to_save=own,
                init_lora_weights=False,
            ),
        )
        m.save_pretrained(tmp_path/f"a{i}")
        kept.append(m.merge_and_unload().eval())
    x = torch.arange(12).view(2, 6) + 4
    for out in (
        merge([tmp_path/"a0"], LoRA(), bake=tmp_path/"base", out=tmp_path/"baked").out,
        merge([f"{tmp_path / 'base'}+{tmp_path / 'a0'}"], out=tmp_path/"full").out,
    ):
        got = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
        assert got.config.num_labels == 5
        with torch.no_grad():
            torch.testing.assert_close(got(x).logits, kept[0](x).logits, rtol=1e-4, atol=1e-5)
    assert bake(load(tmp_path/"base"), load(tmp_path/"a1"))[
        "classifier.out_proj.weight"
    ].shape == (5, 16)


def test_factors_without_a_config_are_not_averaged(make):
    "Neither as tensors in memory, by the names of PEFT's own functions, nor as a file."
    from peft import get_peft_model_state_dict

    a = [get_peft_model(toy(), LoraConfig(r=2, target_modules=["q"])) for _ in range(2)]
    for states in ([m.state_dict() for m in a], [get_peft_model_state_dict(m) for m in a]):
        with pytest.raises(
            ValueError, match=r"factors of LoRA and no adapter_config.json.*\n.*merge_and_unload"
        ):
            merge(states)
    with pytest.raises(ValueError, match="save_pretrained"):
        merge(a)


def test_the_folder_that_a_trainer_leaves(make, tmp_path):
    a = make("a", 0)
    for n in (500, 1000):
        shutil.copytree(a, tmp_path/"run"/f"checkpoint-{n}")
    (tmp_path/"run"/"checkpoint-2000").mkdir()
    shutil.copytree(a, tmp_path/"run"/"samples")
    with pytest.raises(
        ValueError, match="run: holds no weights, but .*checkpoint-1000 does.\nName that folder"
    ):
        merge([a, tmp_path/"run"])


def test_the_card_says_how_and_what_is_in_doubt(make, tmp_path):
    import yaml

    models = [make("a", 0, r=2), make("b", 1, r=2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge(models, LoRA(metric="mix"), weights=[2, 1], out=tmp_path/"out")
    recipe = yaml.safe_load(
        (tmp_path/"out"/"README.md").read_text().split("```")[1].removeprefix("yaml")
    )
    assert recipe["command"] == (
        "frechet-merge merge a b -o out --geometry lora:metric=mix --weights 2,1"
    )
    assert "no single shortest path" in recipe["doubtful"] and "lora:rank" in recipe["doubtful"]


def test_heads_of_two_adapters_and_half_a_head_are_refused():
    base = load(
        {
            "layer.weight": torch.randn(4, 4),
            "classifier.weight": torch.randn(2, 4),
            "classifier.bias": torch.zeros(2),
        }
    )

    def adapter(rows, width=4, bias=True):
        c = _held(
            **{
                "classifier.weight": torch.randn(rows, width),
                **({"classifier.bias": torch.zeros(rows)} if bias else {}),
            }
        )
        c.lazy = {k.replace("model.l.", "model.layer."): x for k, x in c.lazy.items()}
        return c

    from frechet_merge.adapters.baking import bake

    a3, a5 = adapter(3), adapter(5)
    three = load(
        {**{k: x.tensor() for k, x in base.lazy.items()}, **{"layer.weight": torch.randn(4, 6)}}
    )
    assert bake(three, a3)["classifier.weight"].shape == (3, 4)
    for wrong, says in (
        (lambda: bake(bake(three, a3), a5), "saved 'classifier"),
        (lambda: bake(three, adapter(5, 6)), "saved 'classifier.weight'"),
        (lambda: bake(three, adapter(5, bias=False)), "different numbers of rows"),
    ):
        with pytest.raises(ValueError, match=says):
            wrong()


def test_the_config_of_another_number_of_classes(tmp_path):
    from frechet_merge.merging.companions import Says, write_companions

    (tmp_path/"base").mkdir()
    for cfg in (
        {"problem_type": "regression", "id2label": {"0": "x"}, "num_labels": 1},
        {"num_labels": 5},
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
    ):
        (tmp_path/"base"/"config.json").write_text(json.dumps(cfg))
        out = tmp_path/str(len(list(tmp_path.iterdir())))
        out.mkdir()
        write_companions(out, [tmp_path/"base"], Says(classes=3))
        got = json.loads((out/"config.json").read_text())
        assert (
            len(got["id2label"]) == 3
            and "num_labels" not in got
            and "problem_type" not in got
            and (got == cfg) == ("a" in cfg.get("id2label", {}).values())
        )


def test_the_command_of_a_card_has_every_digit(make, tmp_path):
    import yaml

    models = [make("a", 0, r=2), make("b", 1, r=2)]

    def said(**how):
        return yaml.safe_load(
            (
                merge(models, LoRA(), out=tmp_path/str(len(list(tmp_path.iterdir()))), **how).out
                / "README.md"
            )
            .read_text()
            .split("```")[1]
            .removeprefix("yaml")
        ).get("command")

    assert said(weights=[1/3, 0.123456789], scale=0.123456789123).endswith(
        f"--weights {1 / 3!r},0.123456789 --scale 0.123456789123"
    )
    # in memory, there is nothing to name
    assert (
        said(scale=2).endswith("--scale 2")
        and said(bake={"q.weight": torch.zeros(12, 8), "v.weight": torch.zeros(12, 8)}) is None
    )


def test_whether_it_fits_is_known_before_the_merge(make, tmp_path, monkeypatch):
    a = make("a", 0)
    save_file(
        {k: torch.zeros(7, 7) if k == "q.weight" else v for k, v in toy().state_dict().items()},
        tmp_path/"odd.safetensors",
    )
    for way in ("in_memory", "into_folder"):
        made = f"frechet_merge.merging.merge.{way}"
        monkeypatch.setattr(made, lambda *_, **__: pytest.fail("the merge was made"))
    with pytest.raises(MergeError, match="does not fit 'q.weight'"):
        merge([a, a], bake=tmp_path/"odd.safetensors", out=tmp_path/"out")


def test_what_is_no_number_is_copied_beside_adapters_too(make):
    base, a = toy().state_dict(), make("a", 0, modules_to_save=["head"])
    base["norm.bias"][2] = torch.nan
    file = a/"adapter_model.safetensors"
    save_file(
        {
            k: v.masked_fill(torch.eye(*v.shape).bool(), -torch.inf)
            if k.endswith("head.weight")
            else v
            for k, v in load_file(file).items()
        },
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(MergeError, match="allow_nonfinite"):
        merge([a, a])
    head = next(
        v
        for k, v in merge([a, a], allow_nonfinite=True).tensors.items()
        if k.endswith("head.weight")
    )
    assert torch.equal(head.isinf(), torch.eye(*head.shape).bool())
    with pytest.raises(MergeError, match="allow_nonfinite"):
        merge([a, a], bake=base)
    baked = merge([a, a], bake=base, allow_nonfinite=True).tensors
    assert baked["norm.bias"].isnan().tolist() == [i == 2 for i in range(8)] and torch.equal(
        baked["head.weight"].isinf(), torch.eye(*head.shape).bool()
    )


def test_a_leading_part_is_no_other_layer(make, tmp_path):
    """One was trained inside a classifier (`bert.q`), one by itself (`q`): PEFT reads their mean in
    the first's model."""
    a, b = make("a", 0), make("b", 1)

    def renamed(name, lead):
        shutil.copytree(b, tmp_path/name)
        file = tmp_path/name/"adapter_model.safetensors"
        save_file(
            {
                k.replace("base_model.model.", "base_model.model." + lead): v
                for k, v in load_file(file).items()
            },
            file,
            metadata={"format": "pt"},
        )
        return tmp_path/name

    want = {k: v for k, v in merge([a, b]).tensors.items()}
    got = merge([a, renamed("inside", "bert.")])
    assert set(got.means) == {"q", "v"}
    close({k: v for k, v in got.tensors.items()}, want)
    other = merge([renamed("first", "bert."), a]).tensors
    assert set(other) == {k.replace("base_model.model.", "base_model.model.bert.") for k in want}
    apart = [make("q", 2, target_modules=["q"]), make("v", 3, target_modules=["v"])]
    with pytest.warns(UserWarning, match="no layer is adapted by more than one"):
        merge(apart)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(apart, absent="renormalise")


def test_heads_of_different_tasks_can_be_left_out(make, tmp_path):
    a, b = make("a", 0, modules_to_save=["head"], task_type="SEQ_CLS"), make("b", 1)
    with pytest.raises(MergeError, match=r"(?s)b: did not save .*head.*, and .*a did.*--drop"):
        merge([a, b])
    m = merge([a, b], drop="head*", out=tmp_path/"out")
    # PEFT would look for the head of a task
    assert m.tensors.adapter["task_type"] is None and m.tensors.adapter["modules_to_save"] is None
    assert (
        not any("head" in k for k in m.tensors)
        and "--drop 'head*'" in (tmp_path/"out"/"README.md").read_text()
    )
    close(
        read(tmp_path/"out")[0], {n: (x + merged_layer(a, n))/2 for n, x in read(b)[0].items()}
    )
    with pytest.raises(ValueError, match="no model has a tensor of this name"):
        merge([a, b], drop=["haed*"])


def merged_layer(folder, name):
    "ΔW by hand, where PEFT would want a head."
    t, cfg = (
        load_file(folder/"adapter_model.safetensors"),
        json.loads((folder/"adapter_config.json").read_text()),
    )
    return (
        (
            t[f"base_model.model.{name}.lora_B.weight"]
            @ t[f"base_model.model.{name}.lora_A.weight"]
        ).double()
        * cfg["lora_alpha"]
        / cfg["r"]
    )

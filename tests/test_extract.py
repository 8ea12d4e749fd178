"""What is extracted from a full fine-tune is, to PEFT, the best adapter of its rank."""

import json
import warnings

import pytest
import torch
from conftest import LLAMA, cli
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification

from frechet_merge import MergeError, merge
from frechet_merge.adapters.extract import extract, resize
from frechet_merge.algebra import truncation
from frechet_merge.algebra.truncation import truncated

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.arange(3, 13).view(1, 10)
SMALL = {
    "llama": LLAMA,
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, vocab_size=48, n_positions=32),
    "mixtral": {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def saved(folder, kind="llama", cls=AutoModelForCausalLM, seed=0, **kw):
    torch.manual_seed(seed)
    model = cls.from_config(AutoConfig.for_model(kind, **{**SMALL.get(kind, {}), **kw}))
    model.save_pretrained(folder)
    return folder


def tuned(base, folder, cls=AutoModelForCausalLM, only="", size=0.1):
    "A copy in which the parameters of these names moved."
    model = cls.from_pretrained(base)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p += size*torch.randn(p.shape, generator=gen)
    model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        found = model.eval()(IDS)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def with_adapter(base, adapter, cls=AutoModelForCausalLM):
    return PeftModel.from_pretrained(cls.from_pretrained(base), str(adapter))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_full_rank_and_whole_modules_are_the_model(tmp_path, kind):
    base = saved(tmp_path/"base", kind)
    # biases of adapted layers are no part of an adapter
    only = "weight"
    tuned(base, tmp_path/"tuned", only=only)
    extract(tmp_path/"tuned", base, energy=1.0, out=tmp_path/"out", whole=["*"])
    ours = logits(with_adapter(base, tmp_path/"out"))
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path/"tuned"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_each_update_is_the_best_of_its_rank(tmp_path):
    base = saved(tmp_path/"base")
    tuned(base, tmp_path/"tuned", only="proj")
    found = extract(tmp_path/"tuned", base, rank=3, out=tmp_path/"out")
    a, b = (load_file(tmp_path/n/"model.safetensors") for n in ("base", "tuned"))
    layers = {
        n: m.get_delta_weight("default").detach()
        for n, m in with_adapter(base, tmp_path/"out").named_modules()
        if hasattr(m, "get_delta_weight")
    }
    assert len(layers) == len(found.kept) == 14
    for n, delta in layers.items():
        name = n.removeprefix("base_model.model.")
        D = (b[f"{name}.weight"] - a[f"{name}.weight"]).double()
        U, S, Vt = torch.linalg.svd(D)
        torch.testing.assert_close(delta.double(), (U[:, :3]*S[:3]) @ Vt[:3], rtol=1e-4, atol=1e-5)
        assert found.kept[name].error == pytest.approx(float(S[3:].norm()/S.norm()), rel=1e-5)


def test_what_was_baked_comes_back(tmp_path):
    base = saved(tmp_path/"base")
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path/"a")
    merge([tmp_path/"a"], bake=base, out=tmp_path/"tuned")
    found = extract(tmp_path/"tuned", base, energy=0.999999, out=tmp_path/"out")
    assert {k.rank for k in found.kept.values()} == {2}
    assert found.config["target_modules"] == ["q_proj", "v_proj"]
    torch.testing.assert_close(
        logits(with_adapter(base, tmp_path/"out")), logits(model), rtol=1e-4, atol=1e-4
    )


def test_a_head_that_the_base_lacks_comes_along(tmp_path):
    small = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=48,
    )
    base = saved(tmp_path/"base", "bert", AutoModel, **small)
    head = AutoModelForSequenceClassification
    tuned(base, tmp_path/"tuned", head, only="weight")
    found = extract(tmp_path/"tuned", base, energy=1.0, out=tmp_path/"out", whole=["*"])
    assert "classifier" in found.whole and found.config["task_type"] == "SEQ_CLS"
    torch.testing.assert_close(
        logits(with_adapter(base, tmp_path/"out", head)),
        logits(head.from_pretrained(tmp_path/"tuned")),
        rtol=1e-4,
        atol=1e-4,
    )


def test_changes_that_are_left_out_are_named(tmp_path):
    base = saved(tmp_path/"base")
    tuned(base, tmp_path/"tuned")
    with pytest.warns(UserWarning, match="embed_tokens.weight"):
        found = extract(tmp_path/"tuned", base, rank=2)
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= found.left.keys()
    assert not any("norm" in n or "embed" in n for n in found.tensors)


def test_fused_experts_are_refused_and_the_remedy_works(tmp_path):
    base = saved(tmp_path/"base", "mixtral")
    tuned(base, tmp_path/"tuned")
    exclude = []
    for _ in range(4):
        try:
            extract(tmp_path/"tuned", base, rank=2, out=tmp_path/"out", exclude=exclude)
            break
        except MergeError as e:
            assert "expert" in str(e)
            exclude.append(str(e).rpartition("--exclude '")[2].partition("'")[0])
    assert exclude
    with_adapter(base, tmp_path/"out")


def test_a_resized_vocabulary_is_refused_and_the_remedy_works(tmp_path):
    base = saved(tmp_path/"base")
    model = AutoModelForCausalLM.from_pretrained(tuned(base, tmp_path/"t", only="proj"))
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path/"tuned")
    out = ["extract", tmp_path/"tuned", "--base", base, "--rank", 2, "-o", tmp_path/"out"]
    for _ in range(2):
        code, _, said = cli(*out)
        assert code == 1 and "vocabulary" in said
        out += ["--exclude", said.rpartition("--exclude '")[2].partition("'")[0]]
    assert cli(*out)[0] == 0
    with_adapter(base, tmp_path/"out")


def test_full_models_are_told_to_extract(tmp_path):
    base = saved(tmp_path/"base")
    tuned(base, tmp_path/"tuned", only="proj")
    lora = ("--base", base, "--geometry", "lora:rank=4")
    code, _, said = cli("merge", tmp_path/"tuned", *lora, "-o", tmp_path/"x")
    assert code == 2 and "frechet-merge extract" in said and len(said.splitlines()) <= 3
    code, said, _ = cli(
        "extract", tmp_path/"tuned", "--base", base, "--rank", 4, "-o", tmp_path/"out"
    )
    assert code == 0 and "14 layers, rank 4" in said
    assert cli("merge", tmp_path/"out", "-o", tmp_path/"y", "--geometry", "lora:rank=4")[0] == 0
    assert str(tmp_path) not in json.dumps(
        json.loads((tmp_path/"out"/"adapter_config.json").read_text())
    )


@pytest.mark.parametrize("sides", [("left", "right"), ("right",)])
def test_a_metric_decides_what_is_kept(sides):
    torch.manual_seed(0)
    W, D = torch.randn(12, 9), torch.randn(12, 9)
    A, B = (torch.randn(k, k).double() for k in (9, 12))
    moments = {"right": A @ A.T, "left": B @ B.T}
    metrics = {f"x.q.weight.{s}": moments[s].float() for s in sides}
    base, model = {"x.q.weight": W}, {"x.q.weight": W + D}

    def loss(found):
        f = found.tensors
        X = (f["base_model.model.x.q.lora_B.weight"] @ f["base_model.model.x.q.lora_A.weight"])
        L = moments["left"] if "left" in sides else torch.eye(12).double()
        return float((L @ (X - D).double() @ moments["right"] @ (X - D).double().T).trace())

    plain = extract(model, base, rank=3)
    best = extract(model, base, rank=3, metrics=metrics, damping=0)
    assert loss(best) < 0.95*loss(plain)
    far = extract(model, base, rank=3, metrics=metrics, damping=1e7)
    assert loss(far) == pytest.approx(loss(plain), rel=1e-3)


def test_large_matrices_are_cut_as_well_as_small_ones(monkeypatch):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(x, 400))[0] for x in (500, 400))
    D = (U*torch.arange(1.0, 401)**-0.6) @ V.T
    exact = truncated(D, 12)
    monkeypatch.setattr(truncation, "EXACT", 100)
    near = truncated(D, 12)
    assert near.slack > 0
    assert exact.error <= near.error*(1 + 1e-12) and near.error <= exact.error*(1 + 1e-5)
    X = (near.U*near.S) @ near.V.T
    assert float((D.double() - X).norm()/D.norm()) == pytest.approx(near.error, rel=1e-5)
    assert len(truncated(D, energy=0.6).S) == len(
        (lambda s: s[: int((s.square().cumsum(0) < 0.6*s.square().sum()).sum()) + 1])(
            torch.linalg.svdvals(D.double())
        )
    )


@pytest.mark.parametrize("asked", [{"rank": 2}, {"energy": 0.9}])
def test_resize_keeps_the_best_of_each_layer(tmp_path, asked):
    base = saved(tmp_path/"base")
    config = LoraConfig(
        r=6, lora_alpha=3, use_rslora=True, target_modules="all-linear", rank_pattern={"q_proj": 4}
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path/"a")
    found = resize(tmp_path/"a", **asked, out=tmp_path/"out")
    before, after = (
        {
            n: m.get_delta_weight("default").detach().double()
            for n, m in with_adapter(base, tmp_path/x).named_modules()
            if hasattr(m, "get_delta_weight")
        }
        for x in ("a", "out")
    )
    for n, W in before.items():
        kept = found.kept[n.removeprefix("base_model.model.")]
        U, S, Vt = torch.linalg.svd(W)
        r = kept.rank
        torch.testing.assert_close(after[n], (U[:, :r]*S[:r]) @ Vt[:r], rtol=1e-4, atol=1e-5)
        share = S.square().cumsum(0)/S.square().sum()
        if "energy" in asked:
            assert share[r - 1] >= 0.9 - 1e-6 and (r == 1 or share[r - 2] < 0.9 + 1e-6)


def test_nothing_appears_unless_all_does(tmp_path):
    base = saved(tmp_path/"base")
    state = load_file(base/"model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    (tmp_path/"bad").mkdir()
    save_file(state, tmp_path/"bad"/"model.safetensors", {"format": "pt"})
    (tmp_path/"bad"/"config.json").write_text((base/"config.json").read_text())
    with pytest.raises(MergeError, match="up_proj"):
        extract(tmp_path/"bad", base, rank=2, out=tmp_path/"out")
    assert not (tmp_path/"out").exists()
    with warnings.catch_warnings(), pytest.raises(MergeError, match="differs from"):
        extract(base, base, rank=2, out=tmp_path/"out")

"""Mixtures of experts: made smaller, and made of dense models; transformers is the oracle."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from conftest import cli
from frechet_merge import MergeError, load, merge
from frechet_merge.files.tensors import FileTensor
from frechet_merge.huggingface.routing import TextFeed
from frechet_merge.matching.gauges import align_gauges, in_one_gauge
from frechet_merge.matching.mixtures import mixtures_in, routes_of
from frechet_merge.merging import fewer
from frechet_merge.merging.fewer import fewer_experts, of_weights, plan_fewer, reduced
from frechet_merge.merging.record import Record

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SIZES = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=48,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
E, K = 8, 4
KINDS = {
    "mixtral": dict(intermediate_size=24, num_local_experts=E),
    "qwen3_moe": dict(
        moe_intermediate_size=12,
        intermediate_size=20,
        num_experts=E,
        head_dim=8,
        norm_topk_prob=True,
    ),
    "qwen2_moe": dict(
        moe_intermediate_size=12,
        intermediate_size=20,
        num_experts=E,
        shared_expert_intermediate_size=16,
    ),
    "olmoe": dict(intermediate_size=12, num_experts=E),
    "glm4_moe": dict(
        moe_intermediate_size=12,
        intermediate_size=20,
        n_routed_experts=E,
        head_dim=8,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
}
TOKENS = torch.arange(40).view(4, 10)


def mixture(kind, seed=0, copies=False, **more):
    "A tiny mixture of random numbers; of copies, experts e and e + 4 are one function."
    torch.manual_seed(seed)
    said = {**SIZES, **KINDS[kind], "num_experts_per_tok": 4, **more}
    config = transformers.AutoConfig.for_model(kind, **said)
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in net.model.layers:
            experts = getattr(layer.mlp, "experts", None)
            if experts is None:
                continue
            router = layer.mlp.gate
            router.weight.normal_(std=0.5)
            experts.gate_up_proj.normal_(std=0.3)
            experts.down_proj.normal_(std=0.3)
            bias = getattr(router, "e_score_correction_bias", None)
            if bias is not None:
                bias.copy_(0.1*torch.rand(len(bias)))
            if copies:
                copy_experts(experts, router.weight, bias)
    return net


def copy_experts(experts, *of_router):
    "The second half is the first in another order of units, and another scale."
    half, h = E//2, experts.gate_up_proj.shape[1]//2
    for rows in of_router:
        if rows is not None:
            rows[half:] = rows[:half]
    for e in range(half):
        gate, up = experts.gate_up_proj[e].chunk(2)
        order, c = torch.randperm(h), 0.5 + torch.rand(h)
        experts.gate_up_proj[half + e] = torch.cat([gate[order], c[:, None]*up[order]])
        experts.down_proj[half + e] = experts.down_proj[e][:, order]/c


def put(net, folder, fused=False):
    "Save a model as transformers does, or with experts in one tensor and a tokenizer."
    net.save_pretrained(folder)
    if fused:
        for f in folder.glob("model*"):
            f.unlink()
        state = {k: v.contiguous().clone() for k, v in net.state_dict().items()}
        save_file(state, folder/"model.safetensors", metadata={"format": "pt"})
    words = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 48)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def opened(folder):
    "What transformers loads, which has nothing to remark."
    net, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return net.eval()


@torch.no_grad()
def logits(folder):
    return opened(folder)(TOKENS).logits


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_become_one_and_the_function_stays(kind, fused, tmp_path):
    model = put(mixture(kind, copies=True), tmp_path/"m", fused)
    made = fewer_experts(model, K, tmp_path/"out", per_token=2).record.made
    for layer in made["layers"].values():
        assert layer["groups"] == [[e, e + K] for e in range(K)]
    before, after = logits(model), logits(tmp_path/"out")
    assert (after - before).abs().max() <= 1e-5*before.abs().max()
    config = opened(tmp_path/"out").config
    count = getattr(config, "num_local_experts", None) or config.num_experts
    assert (count, config.num_experts_per_tok) == (K, 2)
    # stored as the model is
    names = {n.replace(".7.", ".3.") for n in load(model)}
    assert {*load(tmp_path/"out")} <= names
    assert any(n.endswith("gate_up_proj") for n in load(tmp_path/"out")) == fused


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_as_many_as_before_are_picked_unless_fewer_are_left(kind, tmp_path):
    model = put(mixture(kind, copies=True, num_experts_per_tok=E), tmp_path/"m")
    fewer_experts(model, K, tmp_path/"out")
    assert opened(tmp_path/"out").config.num_experts_per_tok == K
    # all are picked, before and after, with shares of a sum of one
    before, after = logits(model), logits(tmp_path/"out")
    assert (after - before).abs().max() <= 1e-5*before.abs().max()


def test_more_experts_than_the_copies_of_one_are_another_function(tmp_path):
    model = put(mixture("mixtral", copies=True), tmp_path/"m")
    fewer_experts(model, K, tmp_path/"out")
    assert opened(tmp_path/"out").config.num_experts_per_tok == 4
    before, after = logits(model), logits(tmp_path/"out")
    assert (after - before).abs().max() > 1e-3*before.abs().max()


def test_layers_without_experts_stay(tmp_path):
    model = put(mixture("qwen3_moe", mlp_only_layers=[0]), tmp_path/"m")
    fewer_experts(model, 3, tmp_path/"out")
    held, was = load(tmp_path/"out"), load(model)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(held[name], was[name])
    assert held["model.layers.1.mlp.gate.weight"].shape[0] == 3
    opened(tmp_path/"out")


@pytest.mark.parametrize("geometry", ["euclidean", "sphere", "{mix}"])
def test_a_group_is_the_mean_in_any_geometry(geometry, tmp_path):
    asked = {"*w1*": "sphere", "*": "euclidean"} if geometry == "{mix}" else geometry
    model = put(mixture("mixtral", 5), tmp_path/"m")
    made = fewer_experts(model, K, tmp_path/"out", asked).record.made
    c, out = load(model), load(tmp_path/"out")
    for m in mixtures_in(c):
        groups = made["layers"][m.place]["groups"]
        k = next(k for k, g in enumerate(groups) if len(g) > 1)
        experts = [m.expert(c, i) for i in groups[k]]
        # as one gauge has them
        found = align_gauges(experts, [m.units])
        seen = [dict(e) for e in in_one_gauge(experts, [m.units], found)]
        for role, spot in m.experts[k].items():
            is_round = geometry == "sphere" or geometry == "{mix}" and role == "gate"
            one = "sphere" if is_round else "euclidean"
            want = merge([{role: s[role]} for s in seen], one).tensors[role]
            assert torch.allclose(out[spot.tensor], want, atol=1e-6), (spot.tensor, role)
        rows = c[f"{m.place}.gate.weight"][groups[k]].mean(0)
        assert torch.allclose(out[f"{m.place}.gate.weight"][k], rows, atol=1e-6)


def texts(folder, n=12):
    gen = torch.Generator().manual_seed(0)
    numbers = [torch.randint(2, 48, (5 + j%4,), generator=gen).tolist() for j in range(n)]
    rows = [" ".join(f"w{i}" for i in row) for row in numbers]
    place = folder/"texts.jsonl"
    place.write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    return place, rows


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "glm4_moe"])
def test_experts_weigh_as_often_as_they_are_picked(kind, tmp_path):
    model = put(mixture(kind, 2), tmp_path/"m")
    data, rows = texts(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = fewer_experts(model, K, tmp_path/"out", by="router", data=data).record.made
    net = opened(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = [torch.tensor([tokenizer(r)["input_ids"]]) for r in rows]
    picked = {}
    for i, layer in enumerate(net.model.layers):
        router = getattr(layer.mlp, "gate", None)
        if isinstance(router, torch.nn.Module) and hasattr(layer.mlp, "experts"):
            router.register_forward_hook(
                lambda _, x, y, i=i: picked.setdefault(i, []).append(y[-1].flatten())
            )
    with torch.no_grad():
        for t in tokens:
            net(t)
    out, c = load(tmp_path/"out"), load(model)
    for m in mixtures_in(c):
        said = made["layers"][m.place]
        counts = torch.bincount(torch.cat(picked[m.layer]), minlength=E).clamp(min=1).double()
        weights = torch.tensor(said["weights"]).double()
        assert torch.allclose(weights, counts/counts.sum(), atol=1e-6)
        for name in m.router:
            for k, g in enumerate(said["groups"]):
                w = counts[g]/counts[g].sum()
                want = torch.tensordot(w, c[name][g].double(), 1)
                assert torch.allclose(out[name][k].double(), want, atol=1e-6)


def test_experts_that_answer_alike_are_grouped_by_outputs(tmp_path):
    net = mixture("mixtral", 1)
    with torch.no_grad():
        for layer in net.model.layers:
            experts = layer.mlp.experts
            for e in range(K):
                # the same answers, though no order of units makes them the same weights
                experts.gate_up_proj[e + K] = experts.gate_up_proj[e]
                experts.down_proj[e + K] = 1.01*experts.down_proj[e]
    model = put(net, tmp_path/"m")
    data, _ = texts(tmp_path)
    feed = TextFeed(data, max_samples=8, batch_size=3)
    made = fewer_experts(model, K, tmp_path/"out", by="outputs", data=feed).record.made
    for layer in made["layers"].values():
        assert layer["groups"] == [[e, e + K] for e in range(K)]


def test_distances_are_those_of_the_nearest_order(tmp_path, monkeypatch):
    model = put(mixture("mixtral", copies=True), tmp_path/"m")
    c = load(model)
    m = mixtures_in(c)[0]
    D = of_weights(c, m)
    assert D.diag().abs().max() == 0 and torch.equal(D, D.mT)
    assert D[0, K] < 1e-8*D[0, 1]
    # read again for each pair, where a layer does not fit
    monkeypatch.setattr(fewer, "HELD", 0)
    assert torch.equal(of_weights(c, m), D)


def test_dtype_shards_and_ties(tmp_path):
    net = mixture("qwen3_moe", tie_word_embeddings=True)
    model = put(net.bfloat16(), tmp_path/"m")
    fewer_experts(model, 5, tmp_path/"out", dtype="fp32", shard_size=20_000)
    assert len([*(tmp_path/"out").glob("*.safetensors")]) > 1
    assert {x.dtype for x in load(tmp_path/"out").lazy.values()} == {torch.float32}
    net = opened(tmp_path/"out")
    assert net.config.tie_word_embeddings
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert (tmp_path/"out"/"tokenizer.json").exists()


def test_nothing_else_is_read_before_it_is_written(tmp_path, monkeypatch):
    model = put(mixture("mixtral", copies=True), tmp_path/"m")
    c, read, was = load(model), [], FileTensor.read

    def noting(self, start=0, stop=None):
        read.append(self)
        return was(self, start, stop)

    monkeypatch.setattr(FileTensor, "read", noting)
    plan = plan_fewer(c, reduced(c, routes_of(c), K))
    names = {n for n, x in c.lazy.items() if any(x is r for r in read)}
    assert names and all(".experts." in n for n in names)
    assert plan.nbytes < sum(x.numel*x.dtype.itemsize for x in c.lazy.values())


def test_shares_that_are_not_normalised_are_told_and_the_remedy_holds(tmp_path):
    model = put(mixture("olmoe", copies=True), tmp_path/"m")
    with pytest.warns(UserWarning, match=r"per_token = 2 \(--per-token\)"):
        fewer_experts(model, K, tmp_path/"loud")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fewer_experts(model, K, tmp_path/"out", per_token=2)
    before, after = logits(model), logits(tmp_path/"out")
    assert (after - before).abs().max() <= 1e-5*before.abs().max()


def changed(model, **more):
    config = json.loads((model/"config.json").read_text()) | more
    (model/"config.json").write_text(json.dumps(config))
    return model


WRONG = {
    "keep": (dict(keep=E), ValueError, "keep 1 to 7"),
    "none": (dict(keep=0), ValueError, "keep 1 to 7"),
    "per_token": (dict(per_token=5), ValueError, "1 to 4"),
    "by": (dict(by="size"), ValueError, "weights, router, outputs"),
    "outputs": (dict(by="outputs"), ValueError, "--data"),
    "base": (dict(geometry="ties"), ValueError, "base"),
    "adapters": (dict(geometry="lora"), ValueError, "adapters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_cannot_be_are_refused(case, tmp_path):
    how, error, words = WRONG[case]
    model = put(mixture("mixtral"), tmp_path/"m")
    with pytest.raises(error, match=words) as e:
        fewer_experts(model, **{"keep": K, "out": tmp_path/"out", **how})
    assert len(str(e.value).splitlines()) <= 3 and not (tmp_path/"out").exists()


def test_models_that_cannot_be_are_refused(tmp_path):
    model = put(mixture("mixtral"), tmp_path/"m")
    with pytest.raises(MergeError, match="a llama routes"):
        fewer_experts(changed(model, model_type="llama"), K, tmp_path/"out")
    with pytest.raises(MergeError, match="has 8 experts, and its config says 9"):
        fewer_experts(changed(model, model_type="mixtral", num_local_experts=9), K, tmp_path/"out")
    glm = put(mixture("glm4_moe"), tmp_path/"glm")
    with pytest.raises(MergeError, match="n_group"):
        fewer_experts(changed(glm, n_group=2), K, tmp_path/"out")
    with pytest.raises(MergeError, match="in memory"):
        c = load(put(mixture("mixtral"), tmp_path/"n"))
        fewer_experts(c.view(files=()), K, data=texts(tmp_path)[0])
    dense = transformers.AutoConfig.for_model("qwen3_moe", **SIZES, mlp_only_layers=[0, 1])
    transformers.AutoModelForCausalLM.from_config(dense).save_pretrained(tmp_path/"dense")
    with pytest.raises(MergeError, match="has no experts"):
        fewer_experts(tmp_path/"dense", K, tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_a_transposed_layout_is_refused_by_name(tmp_path):
    model = put(mixture("qwen3_moe"), tmp_path/"m", fused=True)
    held = {n: x.mT.contiguous() if ".experts." in n else x for n, x in load(model).items()}
    save_file(held, model/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="save_pretrained"):
        fewer_experts(model, K, tmp_path/"out")


def test_the_record_says_what_was_done_and_is_no_recipe(tmp_path):
    model = put(mixture("mixtral"), tmp_path/"m")
    fewer_experts(str(model), K, tmp_path/"out", "sphere")
    record = Record.read(tmp_path/"out")
    assert record.made["keep"] == K and "--keep 4" in record.command
    assert "groups" in (tmp_path/"out"/"README.md").read_text()
    with pytest.raises(MergeError, match="frechet-merge experts"):
        record.again()


def test_the_command_line(tmp_path):
    put(mixture("mixtral"), tmp_path/"m")
    texts(tmp_path)
    asked = ("experts", "m", "--keep", "3", "--data", "texts.jsonl", "--max-samples", "5")
    code, out, err = cli(*asked, "-o", "out", "--by", "outputs", cwd=tmp_path)
    assert code == 0, err
    assert "3 of 8 experts in 2 layers, 3 for each token" in out
    # what is recorded can be typed
    words = Record.read(tmp_path/"out").command.split()[1:]
    words[words.index("-o") + 1] = "again"
    assert cli(*words, cwd=tmp_path)[0] == 0
    a, b = load(tmp_path/"out"), load(tmp_path/"again")
    assert all(torch.equal(a[n], b[n]) for n in a)
    code, out, err = cli("experts", "m", "--keep", "9", "-o", "no", cwd=tmp_path)
    assert code == 2 and "keep 1 to 7" in err and not (tmp_path/"no").exists()

"""Mixtures of experts: made smaller, and made of dense models; transformers is the oracle."""

import json
import shlex
import warnings

import pytest
import torch
from safetensors.torch import save_file

from conftest import cli
from frechet_merge import MergeError, load, merge
from frechet_merge.files.tensors import FileTensor
from frechet_merge.huggingface.routing import TextFeed
from frechet_merge.symmetries.gauges import align_gauges, in_one_gauge
from frechet_merge.symmetries.mixtures import mixtures_in, routes_of
from frechet_merge.merging import fewer
from frechet_merge.merging.fewer import fewer_experts, of_weights, plan_fewer, reduced
from frechet_merge.recipes.written import read_recipe
from frechet_merge.merging.record import Record
from frechet_merge.merging.upcycled import mixture

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


def sparse(kind, seed=0, copies=False, **more):
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
    model = put(sparse(kind, copies=True), tmp_path/"m", fused)
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
    model = put(sparse(kind, copies=True, num_experts_per_tok=E), tmp_path/"m")
    fewer_experts(model, K, tmp_path/"out")
    assert opened(tmp_path/"out").config.num_experts_per_tok == K
    # all are picked, before and after, with shares of a sum of one
    before, after = logits(model), logits(tmp_path/"out")
    assert (after - before).abs().max() <= 1e-5*before.abs().max()


def test_more_experts_than_the_copies_of_one_are_another_function(tmp_path):
    model = put(sparse("mixtral", copies=True), tmp_path/"m")
    fewer_experts(model, K, tmp_path/"out")
    assert opened(tmp_path/"out").config.num_experts_per_tok == 4
    before, after = logits(model), logits(tmp_path/"out")
    assert (after - before).abs().max() > 1e-3*before.abs().max()


def test_layers_without_experts_stay(tmp_path):
    model = put(sparse("qwen3_moe", mlp_only_layers=[0]), tmp_path/"m")
    fewer_experts(model, 3, tmp_path/"out")
    held, was = load(tmp_path/"out"), load(model)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(held[name], was[name])
    assert held["model.layers.1.mlp.gate.weight"].shape[0] == 3
    opened(tmp_path/"out")


@pytest.mark.parametrize("geometry", ["euclidean", "sphere", "{mix}"])
def test_a_group_is_the_mean_in_any_geometry(geometry, tmp_path):
    asked = {"*w1*": "sphere", "*": "euclidean"} if geometry == "{mix}" else geometry
    model = put(sparse("mixtral", 5), tmp_path/"m")
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
    model = put(sparse(kind, 2), tmp_path/"m")
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
    net = sparse("mixtral", 1)
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
    model = put(sparse("mixtral", copies=True), tmp_path/"m")
    c = load(model)
    m = mixtures_in(c)[0]
    D = of_weights(c, m)
    assert D.diag().abs().max() == 0 and torch.equal(D, D.mT)
    assert D[0, K] < 1e-8*D[0, 1]
    # read again for each pair, where a layer does not fit
    monkeypatch.setattr(fewer, "HELD", 0)
    assert torch.equal(of_weights(c, m), D)


def test_sketches_of_wide_experts_find_the_same_groups(tmp_path, monkeypatch):
    c = load(put(sparse("mixtral", copies=True), tmp_path/"m"))
    m = mixtures_in(c)[0]
    D = of_weights(c, m)
    monkeypatch.setattr(fewer, "EXACT", 0)
    found = of_weights(c, m)
    assert found.diag().abs().max() == 0 and torch.equal(found, found.mT)
    assert found[0, K] < 1e-8*found[0, 1]
    ws = torch.ones(len(D))
    assert fewer.grouped(found, ws, K) == fewer.grouped(D, ws, K)
    apart = D > 1e-6*D.max()
    assert float(((found/D)[apart] - 1).abs().max()) < 0.5


@pytest.mark.parametrize("h", [1, 5, 1300])
def test_partners_are_a_permutation_and_of_copies_the_right_one(h):
    g = torch.Generator().manual_seed(h)
    x, order = torch.randn(h, 40, generator=g), torch.randperm(h, generator=g)
    assert torch.equal(x[order][fewer.partners(x @ x[order].mT)], x)
    strangers = fewer.partners(torch.randn(h, h, generator=g))
    assert torch.equal(strangers.sort().values, torch.arange(h))
    # all alike: no one is preferred
    assert torch.equal(fewer.partners(torch.zeros(h, h)).sort().values, torch.arange(h))


def test_dtype_shards_and_ties(tmp_path):
    net = sparse("qwen3_moe", tie_word_embeddings=True)
    model = put(net.bfloat16(), tmp_path/"m")
    fewer_experts(model, 5, tmp_path/"out", dtype="fp32", shard_size=20_000)
    assert len([*(tmp_path/"out").glob("*.safetensors")]) > 1
    assert {x.dtype for x in load(tmp_path/"out").lazy.values()} == {torch.float32}
    net = opened(tmp_path/"out")
    assert net.config.tie_word_embeddings
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert (tmp_path/"out"/"tokenizer.json").exists()


def test_nothing_else_is_read_before_it_is_written(tmp_path, monkeypatch):
    model = put(sparse("mixtral", copies=True), tmp_path/"m")
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
    model = put(sparse("olmoe", copies=True), tmp_path/"m")
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
    model = put(sparse("mixtral"), tmp_path/"m")
    with pytest.raises(error, match=words) as e:
        fewer_experts(model, **{"keep": K, "out": tmp_path/"out", **how})
    assert len(str(e.value).splitlines()) <= 3 and not (tmp_path/"out").exists()


def test_models_that_cannot_be_are_refused(tmp_path):
    model = put(sparse("mixtral"), tmp_path/"m")
    with pytest.raises(MergeError, match="a llama routes"):
        fewer_experts(changed(model, model_type="llama"), K, tmp_path/"out")
    # whose gates alternate with what they multiply, and have biases
    with pytest.raises(MergeError, match="a gpt_oss routes tokens is not known here"):
        fewer_experts(changed(model, model_type="gpt_oss"), K, tmp_path/"out")
    with pytest.raises(MergeError, match="has 8 experts, and its config says 9"):
        fewer_experts(changed(model, model_type="mixtral", num_local_experts=9), K, tmp_path/"out")
    # mended, it is what it was
    assert fewer_experts(changed(model, num_local_experts=E), K).record.made["experts"] == E
    glm = put(sparse("glm4_moe"), tmp_path/"glm")
    with pytest.raises(MergeError, match="n_group"):
        fewer_experts(changed(glm, n_group=2), K, tmp_path/"out")
    with pytest.raises(MergeError, match="in memory"):
        c = load(put(sparse("mixtral"), tmp_path/"n"))
        fewer_experts(c.view(files=()), K, data=texts(tmp_path)[0])
    fewer_experts(c.view(files=()), K)
    fewer_experts(tmp_path/"n", K, data=texts(tmp_path)[0])
    dense = transformers.AutoConfig.for_model("qwen3_moe", **SIZES, mlp_only_layers=[0, 1])
    transformers.AutoModelForCausalLM.from_config(dense).save_pretrained(tmp_path/"dense")
    with pytest.raises(MergeError, match="has no experts"):
        fewer_experts(tmp_path/"dense", K, tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_a_transposed_layout_is_refused_by_name(tmp_path):
    model = put(sparse("qwen3_moe"), tmp_path/"m", fused=True)
    held = {n: x.mT.contiguous() if ".experts." in n else x for n, x in load(model).items()}
    save_file(held, model/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="save_pretrained"):
        fewer_experts(model, K, tmp_path/"out")


def test_the_record_says_what_was_done_and_is_no_recipe(tmp_path):
    model = put(sparse("mixtral"), tmp_path/"m")
    fewer_experts(str(model), K, tmp_path/"out", "sphere")
    record = Record.read(tmp_path/"out")
    assert record.made["keep"] == K and "--keep 4" in record.command
    assert "groups" in (tmp_path/"out"/"README.md").read_text()
    with pytest.raises(MergeError, match="frechet-merge experts.*\nRun that again: ") as e:
        record.again()
    program, *words = shlex.split(str(e.value).partition("again: ")[2])
    place = words.index("-o") + 1
    words[place] = str(tmp_path/"again")
    code, _, err = cli(*words)
    assert program == "frechet-merge" and code == 0, err
    once, twice = (dict(load(tmp_path/n)) for n in ("out", "again"))
    assert all(torch.equal(x, twice[n]) for n, x in once.items())


def test_the_command_line(tmp_path):
    put(sparse("mixtral"), tmp_path/"m")
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


DENSE = {"llama": {}, "mistral": {}, "qwen3": {"head_dim": 8}}
PROMPTS = [["w3 w4 w5", "w6 w7"], ["w8 w9 w10 w11"]]
AGAINST = [[], ["w20 w21"]]


def dense(kind, folder, seed=0, **more):
    "A tiny dense model of random numbers, with a tokenizer of words."
    torch.manual_seed(seed)
    said = {**SIZES, "intermediate_size": 24, **DENSE.get(kind, {}), **more}
    config = transformers.AutoConfig.for_model(kind, **said)
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2*torch.randn_like(p))
    return put(net, folder)


@pytest.fixture
def family(tmp_path):
    "A base and two models, as Llamas."
    return [dense("llama", tmp_path/f"m{i}", i) for i in range(3)]


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("around", [{"base": True}, {}, {"base": True, "geometry": "sphere"}])
def test_a_mixture_of_one_model_is_that_model(kind, around, tmp_path):
    model = dense(kind, tmp_path/"m", tie_word_embeddings=kind == "qwen3", rms_norm_eps=1e-3)
    around = dict(around)
    if around.pop("base", False):
        around["base"] = model
    mixture([model]*3, tmp_path/"out", gate="random", per_token=2, **around)
    before, after = logits(model), logits(tmp_path/"out")
    assert (after - before).abs().max() <= 1e-5*before.abs().max()
    config = opened(tmp_path/"out").config
    assert config.model_type == ("qwen3_moe" if kind == "qwen3" else "mixtral")
    assert (config.num_local_experts, config.num_experts_per_tok) == (3, 2)
    assert (tmp_path/"out"/"tokenizer.json").exists()


def test_what_a_config_leaves_to_its_defaults_is_kept(tmp_path):
    "A Llama and a Mixtral mean different numbers by saying nothing."
    model = dense("llama", tmp_path/"m")
    config = json.loads((model/"config.json").read_text())
    for key in ("rope_parameters", "rms_norm_eps", "sliding_window", "head_dim", "hidden_act"):
        config.pop(key, None)
    (model/"config.json").write_text(json.dumps(config))
    mixture([model, model], tmp_path/"out", gate="random")
    before, after = logits(model), logits(tmp_path/"out")
    assert (after - before).abs().max() <= 1e-5*before.abs().max()
    said = json.loads((tmp_path/"out"/"config.json").read_text())
    assert said["rope_theta"] == 10000.0 and said["rms_norm_eps"] == 1e-6
    assert "id2label" not in said


SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 500000.0,
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_positions_are_scaled_as_they_were(kind, tmp_path):
    model = dense("llama", tmp_path/"m", rope_parameters=SCALED[kind])
    mixture([model, model], tmp_path/"out", gate="random")
    before, after = logits(model), logits(tmp_path/"out")
    assert (after - before).abs().max() <= 1e-5*before.abs().max()


def test_a_window_stays(tmp_path):
    model = dense("mistral", tmp_path/"m", sliding_window=3)
    mixture([model, model], tmp_path/"out", gate="random")
    before, after = logits(model), logits(tmp_path/"out")
    assert (after - before).abs().max() <= 1e-5*before.abs().max()
    some = dense(
        "qwen3", tmp_path/"q", use_sliding_window=True, sliding_window=3, max_window_layers=1
    )
    with pytest.raises(MergeError, match="use_sliding_window"):
        mixture([some, some], tmp_path/"no", gate="random")


def test_mlps_are_copied_and_the_rest_is_the_bases_or_the_mean(family, tmp_path):
    base, *models = family
    held, (a, b) = load(base), map(load, models)
    of_base = mixture(models, base=base, gate="random").tensors
    of_mean = mixture(models, gate="random").tensors
    of_ties = mixture(models, base=base, geometry="ties:density=0.5", gate="random").tensors
    ties = merge(models, "ties:density=0.5", base=base).tensors
    for name, x in held.items():
        if ".mlp." in name:
            continue
        assert torch.equal(of_base[name], x)
        assert torch.allclose(of_mean[name], (a[name] + b[name])/2, atol=1e-6)
        assert torch.allclose(of_ties[name], ties[name], atol=1e-6)
    for layer in range(2):
        lead = f"model.layers.{layer}."
        for e, c in enumerate((a, b)):
            for end, role in {"w1": "gate", "w3": "up", "w2": "down"}.items():
                got = of_base[f"{lead}block_sparse_moe.experts.{e}.{end}.weight"]
                assert torch.equal(got, c[f"{lead}mlp.{role}_proj.weight"])


def unit(x):
    return x/x.norm()


def test_rows_of_cheap_embed_are_sums_of_embeddings(family):
    base, *models = family
    found = mixture(
        models, base=base, gate="cheap_embed", prompts=PROMPTS, against=AGAINST
    ).tensors
    E_ = load(base)["model.embed_tokens.weight"]
    want = [
        unit(E_[[3, 4, 5, 6, 7]].sum(0)),
        unit(unit(E_[[8, 9, 10, 11]].sum(0)) - unit(E_[[20, 21]].sum(0))),
    ]
    for layer in range(2):
        got = found[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert torch.allclose(got, torch.stack(want), atol=1e-6)


@torch.no_grad()
def test_rows_of_hidden_are_states_of_the_last_tokens(family):
    base, *models = family
    found = mixture(models, base=base, gate="hidden", prompts=PROMPTS, against=AGAINST).tensors
    net = opened(base)

    def state(tokens, layer):
        fed = torch.tensor([tokens])
        return net(fed, output_hidden_states=True).hidden_states[layer][0, -1]

    for layer in range(2):
        first = (state([3, 4, 5], layer) + state([6, 7], layer))/2
        second = state([8, 9, 10, 11], layer) - state([20, 21], layer)
        want = torch.stack([unit(first), unit(second)])
        got = found[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert torch.allclose(got, want, atol=1e-5)


def test_random_rows_are_those_of_their_seed(family):
    name = "model.layers.1.block_sparse_moe.gate.weight"
    rows = [mixture(family[1:], gate="random", seed=s).tensors[name] for s in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert 0.5 < rows[0].std() < 1.5


NO_MIXTURE = {
    "one": (dict(models=slice(1, 2)), ValueError, "two or more"),
    "picked": (dict(per_token=3), ValueError, "1 to 2"),
    "gate": (dict(gate="sparse"), ValueError, "hidden, cheap_embed, random"),
    "prompts": (dict(gate="hidden"), ValueError, "expert 0 has none"),
    "some": (dict(gate="hidden", prompts=[["w3"], []]), ValueError, "expert 1 has none"),
    "base": (dict(gate="hidden", prompts=PROMPTS, base=None), ValueError, "--base"),
    "same": (
        dict(gate="cheap_embed", prompts=PROMPTS, against=PROMPTS), MergeError, "no direction"
    ),
}


@pytest.mark.parametrize("case", NO_MIXTURE)
def test_mixtures_that_cannot_be_are_refused(case, family, tmp_path):
    how, error, words = NO_MIXTURE[case]
    how = {"gate": "random", "base": family[0], **how}
    models = family[how.pop("models", slice(1, 3))]
    with pytest.raises(error, match=words) as e:
        mixture(models, tmp_path/"out", **how)
    assert len(str(e.value).splitlines()) <= 3 and not (tmp_path/"out").exists()


def test_models_that_become_no_mixture_are_refused(family, tmp_path):
    wide = dense("llama", tmp_path/"wide", intermediate_size=32)
    with pytest.raises(MergeError, match="one shape"):
        mixture([family[1], wide], tmp_path/"out", family[0], gate="random")
    deep = dense("llama", tmp_path/"deep", num_hidden_layers=3)
    with pytest.raises(MergeError, match="missing"):
        mixture([family[1], deep], tmp_path/"out", family[0], gate="random")
    qwen = dense("qwen2", tmp_path/"qwen")
    with pytest.raises(MergeError, match="of a qwen2"):
        mixture([qwen, qwen], tmp_path/"out", gate="random")
    biased = dense("llama", tmp_path/"biased", attention_bias=True)
    with pytest.raises(MergeError, match="no biases"):
        mixture([biased, biased], tmp_path/"out", gate="random")
    odd = dense("llama", tmp_path/"odd", vocab_size=52)
    with pytest.raises(MergeError):
        mixture([family[1], odd], tmp_path/"out", gate="random")
    # as is said there
    mixture([family[1], odd], tmp_path/"ok", family[0], gate="random")
    assert opened(tmp_path/"ok").config.vocab_size == 48
    assert not (tmp_path/"out").exists()


MOE = """
base_model: m0
gate_mode: hidden
dtype: float32
experts:
  - source_model: m1
    positive_prompts: ["w3 w4 w5", "w6 w7"]
  - source_model: m2
    positive_prompts: ["w8 w9 w10 w11"]
    negative_prompts: ["w20 w21"]
"""


def test_a_recipe_of_mergekit_moe_runs(family, tmp_path):
    (tmp_path/"moe.yml").write_text(MOE)
    code, out, err = cli("run", "moe.yml", "-o", "out", "--resume", cwd=tmp_path)
    assert code and "this is a mixture: run it without" in err and not (tmp_path/"out").exists()
    code, out, err = cli("run", "moe.yml", "-o", "out", cwd=tmp_path)
    assert code == 0, err
    assert "out: a mixtral of 2 experts, 2 for each token" in out and "merged" not in out
    opened(tmp_path/"out")
    want = mixture(family[1:], base=family[0], prompts=PROMPTS, against=AGAINST).tensors
    found = load(tmp_path/"out")
    assert {*found} == {*want} and all(torch.equal(found[n], want[n]) for n in want)
    assert Record.read(tmp_path/"out").made["prompts"] == PROMPTS
    code, out, err = cli("run", "moe.yml", "-o", "dry", "--dry-run", cwd=tmp_path)
    assert code == 1 and "run it without" in err and not (tmp_path/"dry").exists()


ODD = {
    "shared": (MOE + "shared_experts: []", "line 11.*leave it"),
    "architecture": (MOE + "architecture: qwen", "line 11.*left out"),
    "mode": (MOE.replace("hidden", "sparse"), "line 3.*cheap_embed"),
    "prompts": (MOE.replace('positive_prompts: ["w8', 'prompts: ["w8'), "line 9.*positive"),
    "none": (MOE.replace('    positive_prompts: ["w8 w9 w10 w11"]\n', ""), "line 8.*has no pos"),
    "scale": (MOE + "    residual_scale: 0.1\n", "line 11.*passthrough"),
    "base": (MOE.replace("base_model: m0\n", ""), "needs a base_model"),
    "picked": (MOE + "experts_per_token: 3", "line 11.*name more"),
    "method": (MOE + "merge_method: linear", "line 11.*merged first"),
    "dtype": (MOE.replace("float32", "int4"), "line 4.*bf16"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_a_recipe_cannot_have_is_refused_with_its_line(case, tmp_path):
    words, match = ODD[case]
    (tmp_path/"moe.yml").write_text(words)
    with pytest.raises(MergeError, match="(?s)" + match) as e:
        read_recipe(tmp_path/"moe.yml")
    assert len(str(e.value).splitlines()) <= 3


def test_the_command_line_makes_a_mixture(family, tmp_path):
    for i, texts_ in enumerate(PROMPTS):
        (tmp_path/f"{i}.txt").write_text("\n".join(texts_) + "\n")
    asked = ("mixture", "m1", "m2", "-o", "out", "--base", "m0")
    read = ("--prompts", "0.txt", "--prompts", "1.txt")
    code, out, err = cli(*asked, *read, cwd=tmp_path)
    assert code == 0, err
    assert "a mixtral of 2 experts, 2 for each token" in out
    assert "\n- moe\n" in (tmp_path/"out"/"README.md").read_text()
    want = mixture(family[1:], base=family[0], prompts=PROMPTS).tensors
    assert all(torch.equal(x, want[n]) for n, x in load(tmp_path/"out").items())
    code, out, err = cli(*asked[:4], "no", "--gate", "random", "--seed", "3", cwd=tmp_path)
    assert code == 0, err
    words = Record.read(tmp_path/"no").command.split()[1:]
    words[words.index("-o") + 1] = "again"
    assert cli(*words, cwd=tmp_path)[0] == 0
    a, b = load(tmp_path/"no"), load(tmp_path/"again")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_mixture_can_be_made_smaller(family, tmp_path):
    base, *models = family
    mixture([*models, *models], tmp_path/"four", base, gate="random", per_token=4)
    fewer_experts(tmp_path/"four", 2, tmp_path/"two")
    assert opened(tmp_path/"two").config.num_local_experts == 2

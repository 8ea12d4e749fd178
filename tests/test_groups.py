"""Networks in another gauge are the same network: copies merge to what they are copies of, no gauge
moves a merge, and what is no symmetry is refused by name."""

import json
from dataclasses import replace
from itertools import permutations, product

import pytest
import torch
from conftest import cli
from torch import nn

from frechet_merge import MergeError, Sphere, load, merge
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.geometries.permutation import Symmetric
from frechet_merge.symmetries.behaviour import match_activations
from frechet_merge.symmetries.families import derived, groups_of
from frechet_merge.symmetries.gauges import align_gauges, in_one_gauge, neighbours, variance
from frechet_merge.symmetries.gauges import Descent, shortened
from frechet_merge.symmetries.groups import Element, Group, Member, Part, check_groups, dense
from frechet_merge.symmetries.groups import gauged, random_element
from frechet_merge.symmetries.traced import traced
from frechet_merge.merging.align import align

tf = pytest.importorskip("transformers")


def mlp(seed, dtype=torch.float64, widths=(12, 40, 30, 20, 5)):
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o) for i, o in zip(widths, widths[1:])]
    return nn.Sequential(*[x for y in layers for x in (y, nn.ReLU())][:-1]).to(dtype)


GROUPS = dense(["0.weight", "2.weight", "4.weight", "6.weight"], [40, 30, 20], homogeneous=True)


def elsewhere(c, groups, seed):
    gen = torch.Generator().manual_seed(seed)
    moved = gauged(c, groups, {g.name: random_element(g, gen) for g in groups})
    return c.view(lazy=from_state_dict(dict(moved)).lazy)


def run(net, state, x):
    with torch.no_grad():
        return torch.func.functional_call(net, dict(state), x)


def gap(x, y):
    return float((x - y).detach().abs().max()/y.detach().abs().max())


@pytest.mark.parametrize("T", [2, 3, 5])
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_permuted_and_rescaled_copies_merge_to_the_network(T, dtype, limit):
    net = mlp(0, dtype)
    c = from_state_dict(net.state_dict())
    copies = [c, *(elsewhere(c, GROUPS, seed) for seed in range(1, T))]
    x = torch.randn(50, 12, dtype=dtype)
    assert gap(run(net, copies[1], x), net(x)) < limit
    views = in_one_gauge(copies, GROUPS, align_gauges(copies, GROUPS))
    assert gap(run(net, merge(views).tensors, x), net(x)) < limit
    assert gap(run(net, merge(copies).tensors, x), net(x)) > 0.1


def test_the_variance_falls_at_every_sweep_and_is_what_is_said():
    models = [from_state_dict(mlp(seed).state_dict()) for seed in range(4)]
    ws = [0.4, 0.3, 0.2, 0.1]
    descent = Descent(models, GROUPS, ws, [shortened(c, GROUPS) for c in models])
    start = [{g.name: Element.one(g) for g in GROUPS} for _ in models]
    found = descent.run(start, GROUPS)
    assert found.rests and len(found.variances) > 2
    for before, after in zip(found.variances, found.variances[1:]):
        assert after <= before*(1 + 1e-12)
    at_end = variance(models, GROUPS, ws, found.gauges)
    assert found.variances[-1] == pytest.approx(at_end, rel=1e-8)
    assert at_end < 0.8*found.variances[0]


def test_one_hidden_layer_of_two_models_has_no_better_order():
    groups = dense(["0.weight", "2.weight"], [5])
    models = [from_state_dict(mlp(seed, widths=(4, 5, 3)).state_dict()) for seed in (0, 1)]
    found = align_gauges(models, groups).variances[-1]
    a, b = (torch.cat([c["0.weight"], c["0.bias"][:, None], c["2.weight"].T], 1) for c in models)
    best = min(float((a - b[list(p)]).square().sum()) for p in permutations(range(5)))
    assert found == pytest.approx(best/4, rel=1e-10)


def test_restarts_are_never_worse():
    models = [from_state_dict(mlp(seed).state_dict()) for seed in range(2)]
    one, several = (align_gauges(models, GROUPS, restarts=n).variances[-1] for n in (0, 4))
    assert several <= one


def test_a_unit_that_is_dead_stays_dead():
    net = mlp(3)
    with torch.no_grad():
        net[0].weight[7] = 0
        net[0].bias[7] = 0
        net[2].weight[:, [7, 9]] = 0
    c = from_state_dict(net.state_dict())
    copies = [c, elsewhere(c, GROUPS, 1)]
    views = in_one_gauge(copies, GROUPS, align_gauges(copies, GROUPS))
    x = torch.randn(50, 12, dtype=torch.float64)
    assert gap(run(net, merge(views).tensors, x), net(x)) < 1e-9


WIDE = dict(hidden_size=32, intermediate_size=40, num_attention_heads=4, vocab_size=99)
OSS = dict(num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**WIDE, num_hidden_layers=2, num_key_value_heads=2)
    ),
    "qwen2": lambda: tf.Qwen2ForCausalLM(
        tf.Qwen2Config(**WIDE, num_hidden_layers=2, num_key_value_heads=2)
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(
        tf.Phi3Config(**WIDE, num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=99)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**WIDE, num_hidden_layers=2)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(
            **WIDE, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4
        )
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**WIDE, **OSS, num_hidden_layers=2, layer_types=["full_attention"]*2)
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05*torch.randn_like(p))
    model.save_pretrained(tmp_path/"a")
    return tmp_path/"a"


def logits(folder):
    model = tf.AutoModelForCausalLM
    if "MaskedLM" in json.loads((folder/"config.json").read_text())["architectures"][0]:
        model = tf.AutoModelForMaskedLM
    with torch.no_grad():
        return model.from_pretrained(folder).eval()(torch.arange(3, 40)[None]).logits


def test_gauges_do_not_move_the_merge(family, tmp_path):
    a = load(family)
    groups = groups_of(a)
    near = {
        n: x + 0.02*torch.randn_like(x) if x.is_floating_point() else x for n, x in a.items()
    }
    b = a.view(lazy=from_state_dict(near).lazy, files=())
    merge([a, b], out=tmp_path/"plain", align=True)
    for seed in (1, 2):
        other = [elsewhere(a, groups, seed), elsewhere(b, groups, 10 + seed)]
        if seed == 1:
            other[0] = a
        merge(other, out=tmp_path/f"o{seed}", align=True)
        assert gap(logits(tmp_path/f"o{seed}"), logits(tmp_path/"plain")) < 1e-5
        merge(other, out=tmp_path/f"n{seed}")
        assert gap(logits(tmp_path/f"n{seed}"), logits(tmp_path/"plain")) > 1e-2
    merge([a, a.view(lazy=elsewhere(a, groups, 5).lazy)], out=tmp_path/"copies", align=True)
    assert gap(logits(tmp_path/"copies"), logits(family)) < 1e-5


def test_align_writes_models_that_load_and_do_the_same(tmp_path):
    torch.manual_seed(0)
    for name in ("a", "b"):
        FAMILIES["llama"]().save_pretrained(tmp_path/name)
    code, out, err = cli("align", "a", "b", "-o", "one", "--dtype", "fp32", cwd=tmp_path)
    assert code == 0, err
    assert "2 models in one gauge, 4 groups, variance" in out
    for name in ("a", "b"):
        assert gap(logits(tmp_path/"one"/name), logits(tmp_path/name)) < 1e-5
    a, first = load(tmp_path/"a"), load(tmp_path/"one"/"a")
    assert all(torch.equal(a[n], first[n]) for n in a)
    code, out, err = cli("merge", "a", "b", "-o", "m", "--align", cwd=tmp_path)
    assert code == 0, err
    record = json.loads((tmp_path/"m"/"frechet_merge.json").read_text())
    assert record["aligned"]["groups"] == 4 and "--align" in record["command"]
    assert record["aligned"]["variances"][-1] < record["aligned"]["variances"][0]
    mean = merge([tmp_path/"one"/"a", tmp_path/"one"/"b"]).tensors
    merged = load(tmp_path/"m")
    assert all(torch.allclose(mean[n], merged[n], atol=1e-6) for n in merged)


def test_a_base_gives_the_gauge(tmp_path):
    torch.manual_seed(0)
    for name in ("base", "b"):
        FAMILIES["llama"]().save_pretrained(tmp_path/name)
    base = load(tmp_path/"base")
    other = elsewhere(base, groups_of(base), 3)
    seen, _ = align([other], base=tmp_path/"base")
    assert max(float((seen[0][n] - base[n]).abs().max()) for n in base) < 1e-5


def test_what_cannot_be_aligned_is_refused(tmp_path):
    with pytest.raises(MergeError, match="no symmetry is known"):
        merge([{"w": torch.ones(2, 2)}]*2, align=True)
    with pytest.raises(ValueError, match="align the models first"):
        merge([{"w": torch.ones(2, 2)}]*2, Symmetric())
    with pytest.raises(ValueError, match="use still, scaling"):
        Symmetric("turning")
    torch.manual_seed(0)
    FAMILIES["llama"]().save_pretrained(tmp_path/"a")
    config = json.loads((tmp_path/"a"/"config.json").read_text())
    config |= {"model_type": "unheard_of", "architectures": ["Unheard"]}
    (tmp_path/"a"/"config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="unheard_of.*\n.*check_groups"):
        merge([tmp_path/"a"]*2, align=True, out=tmp_path/"o")
    assert not (tmp_path/"o").exists()
    # without aligning, or with groups that are said
    found, want = merge([tmp_path/"a"]*2).tensors, load(tmp_path/"a")
    assert all(torch.allclose(found[n], want[n]) for n in want)


def test_an_adapter_is_sent_to_its_geometry(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        FAMILIES["llama"](), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path/"x")
    with pytest.raises(MergeError, match="is an adapter.*\n.*without align"):
        merge([tmp_path/"x"]*2, align=True)
    merge([tmp_path/"x"]*2)


def test_groups_that_are_wrong_are_refused_by_name():
    net = mlp(0)
    x = torch.randn(9, 12, dtype=torch.float64)
    check_groups(net, GROUPS, x)
    bad = Group("half", 40, (Part("still", (Member("0.weight"),), (Member("2.weight", 1),)),))
    with pytest.raises(MergeError, match="'half'.*no symmetry"):
        check_groups(net, [*GROUPS, bad], x)
    c = from_state_dict(net.state_dict())
    far = Group("far", 41, bad.parts)
    with pytest.raises(MergeError, match="'far' moves 41 units"):
        align_gauges([c, c], [far])
    with pytest.raises(MergeError, match="has no 'nowhere'"):
        align_gauges([c, c], [Group("g", 2, (Part("still", (Member("nowhere"),)),))])


def test_a_moved_tensor_reads_any_range():
    c = load({"w": torch.randn(12, 10), "o": torch.randn(6, 12)})
    g = Group("h", 3, (Part("linear", (Member("w"),), (Member("o", 1),), 4),))
    moved = gauged(c, [g], {"h": random_element(g)})
    for name in ("w", "o"):
        whole = moved[name].flatten()
        for i in range(0, whole.numel(), 7):
            for n in (1, 3, 29):
                assert torch.allclose(moved.lazy[name].read(i, i + n), whole[i : i + n])
    assert not torch.equal(moved["w"], c["w"])
    assert torch.allclose(moved["o"] @ moved["w"], c["o"] @ c["w"], atol=1e-4)


def test_stacked_experts_move_each_on_its_own():
    x, o = torch.randn(3, 8, 5), torch.randn(3, 5, 4)
    c = load({"experts.gate_up_proj": x, "experts.down_proj": o})
    groups = derived(c)
    assert [g.size for g in groups] == [4]*3 and not any(neighbours(groups).values())
    moved = gauged(c, groups, {groups[1].name: random_element(groups[1])})
    assert torch.equal(moved["experts.down_proj"][[0, 2]], o[[0, 2]])
    assert not torch.equal(moved["experts.down_proj"][1], o[1])
    up = torch.einsum("eoi,eij->eoj", o, x[:, 4:])
    after = torch.einsum(
        "eoi,eij->eoj", moved["experts.down_proj"], moved["experts.gate_up_proj"][:, 4:]
    )
    assert torch.allclose(up, after, atol=1e-4)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6*16, 3)
        self.one, self.two = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.norm, self.pool = nn.BatchNorm2d(8), nn.MaxPool2d(2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.two(torch.relu(self.norm(self.one(x))))
        return self.head(torch.flatten(self.pool(torch.relu(x)), 1))


def test_a_network_with_a_residual_stream_comes_back():
    torch.manual_seed(0)
    net, x = Residual().double().eval(), torch.randn(20, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for b in (*net.parameters(), net.norm.running_mean, net.norm.running_var):
            b.add_(0.3*torch.rand_like(b))
    groups = traced(net, x)
    assert {g.name: g.size for g in groups} == {"stem": 6, "one": 8}
    c = from_state_dict(net.state_dict())
    copies = [c, elsewhere(c, groups, 1), elsewhere(c, groups, 2)]
    views = in_one_gauge(copies, groups, align_gauges(copies, groups))
    assert gap(run(net, merge(views).tensors, x), net(x)) < 1e-9
    assert gap(run(net, merge(views, Sphere()).tensors, x), net(x)) < 1e-9


GROUPED = dict(hidden_size=64, intermediate_size=24, num_attention_heads=8, vocab_size=99)
GROUPED |= dict(num_key_value_heads=2, num_hidden_layers=2)


def shuffled_heads(state, layers, kv, queries, d, seed):
    "Key–value heads and the queries of each in another order: by hand, without a group."
    gen, found = torch.Generator().manual_seed(seed), dict(state)
    for i in range(layers):
        heads = torch.randperm(kv, generator=gen)
        own = [h*queries + torch.randperm(queries, generator=gen) for h in heads]
        of_q, of_k = (
            (x[:, None]*d + torch.arange(d)).flatten() for x in (torch.cat(own), heads)
        )
        at = f"model.layers.{i}.self_attn"
        for name, rows in (("q", of_q), ("k", of_k), ("v", of_k)):
            found[f"{at}.{name}_proj.weight"] = state[f"{at}.{name}_proj.weight"][rows]
        found[f"{at}.o_proj.weight"] = state[f"{at}.o_proj.weight"][:, of_q]
    return found


def by_activations(net, copies, groups, ids):
    "What units say tells their orders: each copy is run."
    nets = [tf.LlamaForCausalLM(net.config).to(net.dtype).eval() for _ in copies]
    for one, c in zip(nets, copies):
        one.load_state_dict(dict(c))
    batches = [{"input_ids": some} for some in ids.split(3)]
    return match_activations(nets, batches, groups, models=copies)


def by_weights(net, copies, groups, ids):
    return align_gauges(copies, groups)


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("find", [by_weights, by_activations])
def test_shuffled_queries_of_a_grouped_head_come_back(tmp_path, dtype, limit, find):
    torch.manual_seed(0)
    net = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).to(dtype).eval()
    net.save_pretrained(tmp_path/"a")
    groups = [g for g in groups_of(load(tmp_path/"a")) if "attn" in g.name]
    assert [(g.size, g.sharers) for g in groups] == [(2, 4)]*2
    states = [net.state_dict()]
    states += [shuffled_heads(states[0], 2, 2, 4, 8, seed) for seed in (1, 2)]
    copies = [from_state_dict(state) for state in states]
    ids = torch.randint(99, (6, 30))

    def off(state):
        return gap(run(net, state, ids).logits, run(net, states[0], ids).logits)

    assert off(states[1]) < limit and off(merge(copies).tensors) > 0.1
    views = in_one_gauge(copies, groups, find(net, copies, groups, ids))
    assert max(gap(c[n], states[0][n]) for c in views for n in states[0]) < limit
    assert off(merge(views).tensors) < limit


H, SHARERS, WIDTH = 2, 3, 4
HEADS = Group(
    "heads",
    H,
    (
        Part("still", (Member("q", copies=SHARERS, shared=True), Member("k"))),
        Part("still", (Member("v"),), (Member("o", 1, copies=SHARERS, shared=True),)),
    ),
    sharers=SHARERS,
)
SHAPES = {"q": (H*SHARERS, WIDTH), "k": (H, WIDTH), "v": (H, WIDTH), "o": (WIDTH, H*SHARERS)}


def drawn_heads(seed):
    gen = torch.Generator().manual_seed(seed)
    return from_state_dict({k: torch.randn(z, generator=gen) for k, z in SHAPES.items()})


def test_an_order_of_units_and_sharers_has_no_better_one():
    a, b = drawn_heads(0), drawn_heads(1)

    def far(order, within):
        at = torch.cat([i*SHARERS + torch.tensor(w) for i, w in zip(order, within)])
        every = [a["q"] - b["q"][at], a["o"] - b["o"][:, at]]
        every += [a[k] - b[k][list(order)] for k in ("k", "v")]
        return sum(float(x.square().sum()) for x in every)/4

    orders, choices = permutations(range(H)), [*product(permutations(range(SHARERS)), repeat=H)]
    best = min(far(order, within) for order in orders for within in choices)
    assert align_gauges([a, b], [HEADS]).variances[-1] == pytest.approx(best, rel=1e-6)


def test_elements_with_sharers_are_a_group():
    c = drawn_heads(0)
    e, f = (random_element(HEADS, torch.Generator().manual_seed(i)) for i in (3, 4))
    twice = gauged(gauged(c, [HEADS], {"heads": e}), [HEADS], {"heads": f})
    for element, wanted in ((e.back().after(e), c), (f.after(e), twice)):
        once = gauged(c, [HEADS], {"heads": element})
        assert all(torch.equal(once[k], wanted[k]) for k in SHAPES)
    assert not torch.equal(twice["q"], c["q"])


def test_runs_that_are_not_those_of_sharers_are_refused():
    member = Member("q", copies=3, shared=True)
    with pytest.raises(ValueError, match="3 runs of 'q' cannot be those of 2 sharers"):
        Group("g", 2, (Part("still", (member,)),), sharers=2)


def test_sinks_move_with_their_query_heads(tmp_path):
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        **GROUPED, head_dim=8, num_local_experts=4, layer_types=["full_attention"]*2
    )
    tf.GptOssForCausalLM(config).save_pretrained(tmp_path/"a")
    groups = [g for g in groups_of(load(tmp_path/"a")) if "attn" in g.name]
    assert [(g.size, g.sharers, g.permutes) for g in groups] == [(2, 4, True)]*2
    assert any(m.tensor.endswith("sinks") for _, m, _ in groups[0].members)


def gpt_oss(seed, units=40, dtype=torch.float32):
    "A small GPT-OSS with numbers in all its tensors, so that what a rule forgets is seen."
    torch.manual_seed(seed)
    config = tf.GptOssConfig(
        **(WIDE | OSS | dict(intermediate_size=units)),
        num_hidden_layers=1,
        layer_types=["full_attention"],
    )
    net = tf.GptOssForCausalLM(config).to(dtype).eval()
    net.set_experts_implementation("eager")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2*torch.randn_like(p))
    return net


def shuffled_units(state, seed):
    "Units of each expert of GPT-OSS in another order, by hand: gate and up alternate."
    gen, found = torch.Generator().manual_seed(seed), {n: x.clone() for n, x in state.items()}
    at = "model.layers.0.mlp.experts"
    for e, down in enumerate(state[f"{at}.down_proj"]):
        order = torch.randperm(len(down), generator=gen)
        both = torch.stack([2*order, 2*order + 1], 1).flatten()
        found[f"{at}.down_proj"][e] = down[order]
        found[f"{at}.gate_up_proj"][e] = state[f"{at}.gate_up_proj"][e][:, both]
        found[f"{at}.gate_up_proj_bias"][e] = state[f"{at}.gate_up_proj_bias"][e][both]
    return found


def experts_of(groups):
    return [g for g in groups if ".experts." in g.name]


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_shuffled_experts_of_gpt_oss_come_back(tmp_path, dtype, limit):
    net = gpt_oss(0, dtype=dtype)
    net.save_pretrained(tmp_path/"a")
    groups = experts_of(groups_of(load(tmp_path/"a")))
    assert [(g.size, g.kind) for g in groups] == [(40, "permutation")]*4
    states = [net.state_dict(), *(shuffled_units(net.state_dict(), seed) for seed in (1, 2))]
    copies, ids = [from_state_dict(state) for state in states], torch.randint(99, (4, 20))

    def off(state):
        return gap(run(net, state, ids).logits, run(net, states[0], ids).logits)

    assert off(states[1]) < limit and off(merge(copies).tensors) > 0.1
    views = in_one_gauge(copies, groups, align_gauges(copies, groups))
    assert max(gap(c[n], states[0][n]) for c in views for n in states[0]) < limit
    assert off(merge(views).tensors) < limit


def test_the_order_of_units_of_gpt_oss_is_the_best_of_all(tmp_path):
    nets = [gpt_oss(seed, units=5) for seed in (0, 1)]
    nets[0].save_pretrained(tmp_path/"a")
    groups = experts_of(groups_of(load(tmp_path/"a")))
    models = [from_state_dict(net.state_dict()) for net in nets]
    found = align_gauges(models, groups).gauges[1]
    at = "model.layers.0.mlp.experts"
    assert len(groups) == 4

    def units(c, e):
        into = [c[f"{at}.gate_up_proj"][e].T, c[f"{at}.gate_up_proj_bias"][e][:, None]]
        into = [x.unflatten(0, (-1, 2)).flatten(1) for x in into]
        return torch.cat([*into, c[f"{at}.down_proj"][e]], 1)

    for e, g in enumerate(groups):
        a, b = (units(c, e) for c in models)
        best = min(permutations(range(5)), key=lambda p: float((a - b[list(p)]).square().sum()))
        assert found[g.name].source.tolist() == [*best]


def test_experts_that_lie_the_other_way_round_are_known(tmp_path):
    # one half of the columns and then the other, without biases: units of Llama 4 have a scale
    torch.manual_seed(0)
    config = tf.Llama4TextConfig(
        **WIDE, num_hidden_layers=1, num_key_value_heads=2, head_dim=8, num_local_experts=2,
        intermediate_size_mlp=40, interleave_moe_layer_step=1, layer_types=["full_attention"],
    )  # fmt: skip
    tf.Llama4ForCausalLM(config).save_pretrained(tmp_path/"a")
    groups = experts_of(groups_of(load(tmp_path/"a")))
    assert [(g.size, g.kind) for g in groups] == [(40, "permutation+scaling")]*2


def test_units_that_are_clipped_have_no_scale(tmp_path):
    torch.manual_seed(0)
    narrow = dict(head_dim=16, q_lora_rank=16, o_lora_rank=8, o_groups=2, qk_rope_head_dim=8)
    sizes = WIDE | narrow | dict(index_n_heads=2, index_head_dim=8, moe_intermediate_size=40)
    config = tf.DeepseekV4Config(**sizes, num_hidden_layers=2, n_routed_experts=4)
    net = tf.DeepseekV4ForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(20)
    net.save_pretrained(tmp_path/"a")
    c = load(tmp_path/"a")
    groups = groups_of(c)
    assert len(groups) == 10 and {g.kind for g in groups} == {"permutation"}
    assert any("shared_experts" in g.name for g in groups)
    # far beyond the limit, where the order is free and no scale is
    free = [replace(g, parts=(replace(g.parts[0], kind="scaling"), *g.parts[1:])) for g in groups]
    merge([elsewhere(c, groups, 1)], out=tmp_path/"b")
    merge([elsewhere(c, free, 1)], out=tmp_path/"c")

    def says(name):
        net = tf.DeepseekV4ForCausalLM.from_pretrained(tmp_path/name, dtype=torch.float64).eval()
        net.set_experts_implementation("eager")
        with torch.no_grad():
            return net(torch.arange(3, 40)[None]).logits

    assert gap(says("b"), says("a")) < 1e-6
    assert gap(says("c"), says("a")) > 1e-2


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ({}, "permutation+scaling"),
        ({"swiglu_limit": None}, "permutation+scaling"),
        ({"swiglu_limits": [0.0, None], "swiglu_limits_shared": None}, "permutation+scaling"),
        ({"swiglu_limit": 10.0}, "permutation"),
        ({"swiglu_limits": [0.0, None, 16.0]}, "permutation"),
        ({"text_config": {"swiglu_limit": 7.0}}, "permutation"),
    ],
)
def test_a_limit_is_one_if_a_config_says_how_large(says, kind):
    apart = {"gate_proj.weight": (4, 3), "up_proj.weight": (4, 3), "down_proj.weight": (3, 4)}
    fused = {"gate_up_proj": (2, 8, 3), "down_proj": (2, 3, 4)}
    for shapes, n in ((apart, 1), (fused, 2)):
        c = from_state_dict({f"mlp.{name}": torch.ones(s) for name, s in shapes.items()})
        assert [g.kind for g in derived(c.view(says=says))] == [kind]*n


def test_a_limit_of_some_layers_is_not_tried_away(tmp_path):
    # the small model has two layers, and only the last of three clips
    torch.manual_seed(0)
    sizes = dict(WIDE, num_hidden_layers=3, num_key_value_heads=2, head_dim=8, sliding_window=16)
    for limit, kind in ((0.0, "permutation+scaling"), (16.0, "permutation")):
        config = tf.Step3p7TextConfig(
            **sizes, mlp_layer_types=["dense"]*3, swiglu_limits_shared=[0.0, 0.0, limit]
        )
        tf.Step3p7TextModel(config).save_pretrained(tmp_path/str(limit))
        units = [g for g in groups_of(load(tmp_path/str(limit))) if g.name.endswith(".mlp")]
        assert [g.kind for g in units] == [kind]*3


def test_a_text_model_within_another_is_read_as_what_it_is(tmp_path):
    text = tf.GptOssConfig(**WIDE, **OSS, num_hidden_layers=1, layer_types=["full_attention"])
    seen = tf.InternVLVisionConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1,
        image_size=[28, 28], patch_size=[14, 14],
    )  # fmt: skip
    config = tf.InternVLConfig(text_config=text, vision_config=seen, image_token_id=5)
    tf.InternVLForConditionalGeneration(config).save_pretrained(tmp_path/"a")
    found = experts_of(derived(load(tmp_path/"a")))
    assert [g.kind for g in found] == ["permutation"]*4
    up, gate = (p.into[0] for p in found[0].parts)
    assert (up.start, up.stride, gate.start, gate.stride) == (1, 2, 0, 2)


def test_heads_whose_values_are_clipped_keep_their_own_bases(tmp_path):
    torch.manual_seed(0)
    for limit, kind in ((None, "permutation+linear+rotary"), (8.0, "permutation")):
        config = tf.OlmoConfig(**WIDE, num_hidden_layers=1, clip_qkv=limit, eos_token_id=1)
        tf.OlmoForCausalLM(config).save_pretrained(tmp_path/str(limit))
        groups = groups_of(load(tmp_path/str(limit)))
        assert [g.kind for g in groups if "attn" in g.name] == [kind]


def test_what_is_clipped_beyond_what_a_module_says_is_refused():
    net = nn.Sequential(nn.Linear(5, 8), nn.Hardtanh(-1e3, 1e3), nn.Linear(8, 3))
    x, scaled = torch.randn(9, 5), dense(["0.weight", "2.weight"], [8], homogeneous=True)
    with pytest.raises(MergeError, match="'0'.*no symmetry"):
        check_groups(net.double(), scaled, x)
    check_groups(net, dense(["0.weight", "2.weight"], [8]), x)


def test_sides_of_other_sizes_are_computed_in_one_dtype(tmp_path, monkeypatch):
    # of grouped queries the outputs can be large where the values are not, as in Llama 3.2 1B
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).save_pretrained(tmp_path/"a")
    c = load(tmp_path/"a")
    groups = groups_of(c)
    copies = [c, elsewhere(c, groups, 1)]
    monkeypatch.setattr("frechet_merge.symmetries.gauges.LARGE", 2000)
    views = in_one_gauge(copies, groups, align_gauges(copies, groups))
    assert max(gap(views[1][n], c[n]) for n in c) < 1e-5


def test_a_rule_that_forgets_what_is_zero_is_refused():
    # a fresh network has biases of zero, and one that has learnt has not
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    nn.init.zeros_(net[0].bias)
    x = torch.randn(9, 5, dtype=torch.float64)
    check_groups(net, dense(["0.weight", "2.weight"], [8], homogeneous=True), x)
    with pytest.raises(MergeError, match="'0'.*no symmetry"):
        check_groups(net, dense(["0.weight", "2.weight"], [8], bias=False), x)
    assert not net[0].bias.any()


def test_a_module_is_tried_in_eval_mode_and_comes_back_as_it_was():
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
    net = nn.Sequential(*net, nn.Linear(8, 3)).train()
    before = {n: p.clone() for n, p in net.state_dict().items()}
    assert [g.name for g in traced(net, torch.randn(9, 5))] == ["0"]
    assert net.training and all(torch.equal(p, before[n]) for n, p in net.state_dict().items())


def test_tied_weights_have_one_order_for_both():
    x = torch.randn(9, 6)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))
    net[4].weight = net[0].weight
    # outputs are rows of a tensor whose rows are hidden units elsewhere: only 6 units are left
    assert [(g.name, g.size) for g in traced(net, x)] == []
    layer = nn.Linear(6, 6)
    twice = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 4), nn.Tanh())
    assert traced(nn.Sequential(*twice, nn.Linear(4, 2)), x)[0].name == "4"
    square = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), layer)
    square[2].weight = square[0].weight
    c = from_state_dict(square.state_dict())
    with pytest.raises(MergeError, match="is moved twice.*\n.*each row in it once"):
        align_gauges([c, c], dense(["0.weight", "2.weight", "4.weight"], [6, 6]))


def test_what_has_no_gauge_is_refused_by_name(tmp_path):
    c = from_state_dict(mlp(0).state_dict())
    twice = [GROUPS[0], Group("again", 40, GROUPS[0].parts)]
    with pytest.raises(MergeError, match="'0' and 'again': row 0 of '0.weight', axis 0"):
        align_gauges([c, c], twice)
    with pytest.raises(ValueError, match="1 weights .* for 2 models"):
        align_gauges([c, c], GROUPS, [1])
    with pytest.raises(ValueError, match="no models"):
        align_gauges([], GROUPS)
    bad = mlp(0)
    with torch.no_grad():
        bad[2].weight[0, 0] = torch.nan
    with pytest.raises(MergeError, match="'2.weight' holds NaN.*\n.*all finite"):
        align_gauges([c, from_state_dict(bad.state_dict())], GROUPS)
    align_gauges([c, c], GROUPS, [1, 2])
    config = tf.LlamaConfig(**WIDE, num_hidden_layers=1)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path/"a")
    config.attention_bias = True
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path/"b")
    a, b = tmp_path/"a", tmp_path/"b"
    with pytest.raises(MergeError, match="a: has no tensor '.*bias', which .*b has.\nAlign models"):
        align([a, b])


def test_a_bias_that_would_stay_while_its_head_moves_is_refused(tmp_path):
    for name, bias in (("a", False), ("b", True)):
        config = tf.LlamaConfig(**WIDE, num_hidden_layers=1, attention_bias=bias)
        tf.LlamaForCausalLM(config).save_pretrained(tmp_path/name)
    models = [tmp_path/"a", tmp_path/"b"]
    for order in (models, models[::-1]):
        with pytest.raises(MergeError, match="a: has no .*bias.*would move with"):
            merge(order, align=True, absent="renormalise")
        with pytest.warns(UserWarning, match="attention_bias"):
            merge(order, absent="renormalise")
    # a head is of no unit that moves
    c = load(tmp_path/"a")
    state = {n: c[n] for n in c if n != "lm_head.weight"}
    less = c.view(lazy=from_state_dict(state).lazy, files=())
    merge([c, less], align=True, drop="lm_head.*")

"""The residual stream of transformers may change its order, with everything that touches it: copies
merge to the network, and what forbids it is refused by name."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from frechet_merge import Geometry, MergeError, check_geometry, load, merge
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.geometries.geometry import Chart
from frechet_merge.symmetries.behaviour import match_activations
from frechet_merge.symmetries.families import groups_of
from frechet_merge.symmetries.gauges import Site, align_gauges, in_one_gauge, neighbours, paired
from frechet_merge.symmetries.groups import Element, Group, Member, Part, dense, gauged
from frechet_merge.symmetries.groups import random_element
from frechet_merge.symmetries.stream import STREAM, groups_with_stream, stream_of
from frechet_merge.merging.alignment import Alignment
from frechet_merge.spaces.space import Point

tf = pytest.importorskip("transformers")
WIDE = dict(hidden_size=32, intermediate_size=40, num_attention_heads=4, vocab_size=99)
TWO = dict(WIDE, num_hidden_layers=2)
FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TWO, num_key_value_heads=2)),
    "llama, tied": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**TWO, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**TWO, num_key_value_heads=2)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=99)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**TWO)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**TWO, num_key_value_heads=2, num_local_experts=4)
    ),
}


def random_numbers(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05*torch.randn_like(p))
    return net.eval()


def elsewhere(c, groups, seed):
    gen = torch.Generator().manual_seed(seed)
    moved = gauged(c, groups, {g.name: random_element(g, gen) for g in groups})
    return c.view(lazy=from_state_dict(dict(moved)).lazy)


def in_double(c):
    held = {n: x.tensor().double() for n, x in c.lazy.items()}
    return c.view(lazy=from_state_dict(held).lazy)


def gap(a, b):
    return float((a - b).abs().max()/b.abs().max())


def logits(folder):
    auto = tf.AutoModelForCausalLM
    if "MaskedLM" in json.loads((folder/"config.json").read_text())["architectures"][0]:
        auto = tf.AutoModelForMaskedLM
    with torch.no_grad():
        return auto.from_pretrained(folder).eval()(torch.arange(3, 40)[None]).logits


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    torch.manual_seed(0)
    random_numbers(FAMILIES[request.param]()).save_pretrained(tmp_path/"a")
    return tmp_path/"a"


def test_copies_merge_to_the_network(family, tmp_path):
    c = load(family)
    groups = groups_with_stream(c)
    assert [g.name for g in groups].count(STREAM) == 1
    other = elsewhere(c, groups, 1)
    merge([other], out=tmp_path/"other")
    # in another order it is the same function: nothing was forgotten
    assert gap(logits(tmp_path/"other"), logits(family)) < 1e-5
    how = Alignment(residual=True)
    merge([family, tmp_path/"other"], out=tmp_path/"m", align=how)
    assert gap(logits(tmp_path/"m"), logits(family)) < 1e-5
    merge([family, tmp_path/"other"], out=tmp_path/"n", align=True)
    assert gap(logits(tmp_path/"n"), logits(family)) > 1e-2
    # number by number, in float64
    models = [in_double(c)]
    models += [elsewhere(models[0], groups, seed) for seed in (2, 3)]
    for seen in in_one_gauge(models, groups, align_gauges(models, groups))[1:]:
        assert max(gap(seen[n], models[0][n]) for n in c) < 1e-10


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_copies_come_back_by_what_they_say(name, tmp_path):
    torch.manual_seed(0)
    net = random_numbers(FAMILIES[name]())
    net.save_pretrained(tmp_path/"a")
    c = load(tmp_path/"a")
    groups = groups_with_stream(c)
    other = elsewhere(c, groups, 1)
    merge([other], out=tmp_path/"b")
    nets = [net, type(net).from_pretrained(tmp_path/"b").eval()]
    fed = torch.randint(3, 90, (8, 20)).split(4)
    found = match_activations(nets, [{"input_ids": t} for t in fed], groups, models=[c, other])
    seen = in_one_gauge([c, other], groups, found)[1]
    assert max(gap(seen[n], c[n]) for n in c) < 1e-4


REFUSED = {
    "its outputs are the stream itself": lambda: tf.BertModel(tf.BertConfig(**TWO)),
    "embed_positions.weights is a fixed table": lambda: tf.M2M100ForConditionalGeneration(
        tf.M2M100Config(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=40, decoder_ffn_dim=40,
            encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=99,
        )
    ),
    "its config names no width": lambda: tf.CLIPModel(
        tf.CLIPConfig(
            text_config=dict(TWO, projection_dim=16), vision_config=dict(TWO, projection_dim=16)
        )
    ),
    "nothing is known of transformer.h.#.self_attention.dense": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=99)
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_forbids_it_is_named(why, tmp_path):
    REFUSED[why]().save_pretrained(tmp_path)
    with pytest.raises(MergeError, match=f"residual stream cannot be moved: .*{why}"):
        stream_of(load(tmp_path))


def test_a_tensor_of_ones_own_is_refused_and_the_remedy_works(tmp_path):
    torch.manual_seed(0)
    FAMILIES["llama"]().save_pretrained(tmp_path)
    c = load(tmp_path)
    more = dict(c) | {"model.layers.1.own.weight": torch.ones(32)}
    c = c.view(lazy=from_state_dict(more).lazy)
    with pytest.raises(MergeError, match="'model.layers.1.own.weight' is in no small model") as e:
        groups_with_stream(c)
    assert "without the stream" in str(e.value)
    assert groups_of(c)


def test_sizes_that_are_as_large_as_the_stream_are_told_apart(tmp_path):
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4,
        num_hidden_layers=2, vocab_size=64,
    )
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    axes = {m.tensor: m.axis for m in stream_of(load(tmp_path)).parts[0].members}
    assert axes["model.embed_tokens.weight"] == axes["model.layers.0.self_attn.q_proj.weight"] == 1
    assert axes["model.layers.1.mlp.down_proj.weight"] == 0


def test_a_stack_moves_whole_and_by_slice():
    x, o = torch.randn(3, 8, 5), torch.randn(3, 5, 4)
    c = from_state_dict({"x": x, "o": o})
    one = [
        Group(f"{e}", 4, (Part("still", (Member("x", index=e), Member("o", 1, index=e))),))
        for e in range(3)
    ]
    whole = Group("s", 5, (Part("still", (Member("x", 2), Member("o", 1))),))
    order, swap = torch.randperm(5), torch.randperm(4)
    gauge = {"s": Element(order, (None,)), "1": Element(swap, (None,))}
    moved = gauged(c, [*one, whole], gauge)
    assert torch.equal(moved["x"][1, :4], x[1, :4][swap][:, order])
    assert torch.equal(moved["o"][1], o[1][:, swap][order])
    assert torch.equal(moved["o"][0], o[0][order])
    flat = moved["x"].flatten()
    assert torch.equal(moved.lazy["x"].read(37, 93), flat[37:93])
    linked = neighbours([*one, whole])
    assert linked["s"] == {"0", "1", "2"} and linked["0"] == {"s"}


def test_pairs_say_what_units_say():
    torch.manual_seed(0)
    groups = dense(["0.weight", "2.weight"], [6])
    states = [
        {"0.weight": torch.randn(6, 40), "0.bias": torch.randn(6), "2.weight": torch.randn(9, 6)}
        for _ in range(3)
    ]
    models = [from_state_dict({n: x.double() for n, x in s.items()}) for s in states]
    one = [{g.name: Element.one(g) for g in groups}]*3
    args = models, groups, groups[0], [0.5, 0.3, 0.2], one
    long, short = Site.of(*args), paired(*args)
    es = [Element(torch.randperm(6), (None,)) for _ in range(3)]
    assert long.value(es) == pytest.approx(short.value(es), rel=1e-12)
    for t, others in ((0, [1, 2]), (2, [0, 1])):
        a, b = (s.best(t, s.middle(es, others)) for s in (long, short))
        assert torch.equal(a.source, b.source)
        gains = [s.gain(t, a, s.middle(es, others)) for s in (long, short)]
        assert gains[0] == pytest.approx(gains[1], rel=1e-12)


@dataclass(frozen=True)
class Networks(Geometry):
    "Whole networks, as vectors: brought into one gauge, and averaged."

    net: Any = field(repr=False)  # whose numbers they are
    groups: Any = field(repr=False)

    def state(self, theta):
        "A network of a vector."
        held = dict(self.net.named_parameters())
        parts = theta.split([p.numel() for p in held.values()])
        return {n: x.view(p.shape) for (n, p), x in zip(held.items(), parts)}

    def vector(self, state):
        return torch.cat([state[n].flatten() for n, _ in self.net.named_parameters()])

    def chart(self, thetas, Gs=None):
        models = [from_state_dict(self.state(t)) for t in thetas]
        seen = in_one_gauge(models, self.groups, align_gauges(models, self.groups))
        points = [Point(self.vector(dict(c)), 1.0) for c in seen]
        return Chart(points, lambda m: m)


def held_to_the_laws(net, groups, run, aligned=None):
    "Networks near each other, each in a gauge of its own: what the laws say of their mean."
    g = Networks(net, groups if aligned is None else aligned)
    middle = g.vector(dict(net.named_parameters())).detach()
    gen = torch.Generator().manual_seed(0)

    def act(theta):
        gauge = {one.name: random_element(one, gen) for one in groups}
        return g.vector(dict(gauged(from_state_dict(g.state(theta)), groups, gauge)))

    def same(theta):
        with torch.no_grad():
            return torch.func.functional_call(net, g.state(theta), (), run)

    def outputs(theta):
        y = same(theta)
        return getattr(y, "logits", y)

    noise = torch.randn(3, len(middle), dtype=middle.dtype)
    thetas = [act(middle + 0.01*middle.std()*x) for x in noise]
    # rotations of heads of three models come to rest by and by
    return check_geometry(g, thetas, act=act, same=outputs, tol=1e-6)


def test_the_laws_hold_of_networks_with_their_stream(tmp_path):
    torch.manual_seed(0)
    config = tf.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=99, tie_word_embeddings=False)
    net = random_numbers(tf.GPT2LMHeadModel(config)).double()
    net.save_pretrained(tmp_path)
    groups = groups_with_stream(load(tmp_path))
    errors = held_to_the_laws(net, groups, {"input_ids": torch.arange(3, 20)[None]})
    assert set(errors) == set(range(1, 11))
    # without the stream, it is no mean of orbits
    with pytest.raises(AssertionError, match="breaks law"):
        held_to_the_laws(net, groups, {"input_ids": torch.arange(3, 20)[None]}, groups[1:])


def test_the_laws_hold_of_a_chain_with_its_scales():
    torch.manual_seed(0)
    shape = [torch.nn.Linear(6, 20), torch.nn.ReLU(), torch.nn.Linear(20, 15), torch.nn.ReLU()]
    net = torch.nn.Sequential(*shape, torch.nn.Linear(15, 4)).double()
    groups = dense(["0.weight", "2.weight", "4.weight"], [20, 15], homogeneous=True)
    errors = held_to_the_laws(net, groups, {"input": torch.randn(30, 6, dtype=torch.float64)})
    assert errors[5] < 1e-10

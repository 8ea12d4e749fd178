"""Units are paired by what they say on examples: copies come back, networks that were trained apart
come nearer, and what is not heard is said."""

import json
import warnings
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import cli
from test_groups import Residual, elsewhere
from torch import nn

from frechet_merge import MergeError
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.symmetries import behaviour
from frechet_merge.symmetries.behaviour import Crossed, match_activations, readers_of
from frechet_merge.symmetries.gauges import in_one_gauge
from frechet_merge.symmetries.groups import dense
from frechet_merge.symmetries.traced import traced


def mlp(seed, dtype=torch.float64, inplace=False):
    torch.manual_seed(seed)
    shape = [nn.Linear(12, 40), nn.ReLU(inplace), nn.Linear(40, 30), nn.ReLU(inplace)]
    return nn.Sequential(*shape, nn.Linear(30, 5)).to(dtype).eval()


GROUPS = dense(["0.weight", "2.weight", "4.weight"], [40, 30], homogeneous=True)


def copies_of(net, groups, T):
    "Copies in other gauges: checkpoints, and modules."
    first = from_state_dict(net.state_dict())
    models = [first, *(elsewhere(first, groups, seed) for seed in range(1, T))]
    return models, [filled(net, c) for c in models]


def filled(net, c):
    made = deepcopy(net)
    made.load_state_dict(dict(c), strict=False)
    return made


def gap(a, b):
    return max(float((a[n] - b[n]).abs().max()/b[n].abs().max().clamp(min=1)) for n in b)


@pytest.mark.parametrize("T", [2, 4])
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_copies_of_an_mlp_come_back_number_by_number(T, dtype, limit):
    models, nets = copies_of(mlp(0, dtype), GROUPS, T)
    x = torch.randn(300, 12, dtype=dtype)
    found = match_activations(nets, x.split(70), GROUPS)
    assert all(gap(c, models[0]) < limit for c in in_one_gauge(models, GROUPS, found))
    assert gap(models[1], models[0]) > 0.1
    assert found.variances[-1] < 1e-6*found.variances[0]


def test_what_is_changed_in_place_was_read_before():
    for inplace in (False, True):
        models, nets = copies_of(mlp(0, inplace=inplace), GROUPS, 2)
        found = match_activations(nets, [torch.randn(300, 12).double()], GROUPS)
        assert gap(in_one_gauge(models, GROUPS, found)[1], models[0]) < 1e-10


def test_copies_of_a_cnn_come_back_with_its_residual_stream():
    torch.manual_seed(0)
    net, x = Residual().double().eval(), torch.randn(40, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for b in (*net.parameters(), net.norm.running_mean, net.norm.running_var):
            b.add_(0.3*torch.rand_like(b))
    groups = traced(net, x)
    # the stream is read by a convolution and, flattened, by the head
    assert [(r.group.name, r.layer) for r in readers_of(net, groups)] == [
        ("stem", "one"), ("stem", "head"), ("one", "two"),
    ]
    models, nets = copies_of(net, groups, 3)
    found = match_activations(nets, x.split(20), groups)
    assert all(gap(c, models[0]) < 1e-9 for c in in_one_gauge(models, groups, found))


def test_modes_come_back():
    net = mlp(0).train()
    net[1].eval()
    match_activations([net, mlp(1)], [torch.randn(50, 12).double()], GROUPS)
    assert net.training and not net[1].training


def test_less_room_takes_more_passes_and_finds_the_same(monkeypatch):
    nets = [mlp(seed) for seed in range(3)]
    x = torch.randn(200, 12, dtype=torch.float64).split(50)
    whole = match_activations(nets, x, GROUPS)
    monkeypatch.setattr(behaviour, "ROOM", 1)
    apart = match_activations(nets, x, GROUPS)
    for a, b in zip(whole.gauges, apart.gauges):
        assert all(torch.equal(a[n].source, b[n].source) for n in a)


def test_batches_of_any_size_are_the_same_moments():
    x, y = torch.randn(2, 90, 4, 2, dtype=torch.float64)
    found = []
    for sizes in ([90], [1, 2, 30, 57]):
        kept = Crossed(4, 2)
        for a, b in zip(x.flatten(1).split(sizes), y.flatten(1).split(sizes)):
            kept.add([5 + a, b])
        found.append(kept)
    assert torch.allclose(found[0].cross[0, 1], found[1].cross[0, 1])
    assert torch.allclose(found[0].own[0], found[1].own[0])
    centred = x - x.mean(0)
    assert torch.allclose(found[1].own[0], torch.einsum("nia,nib->iab", centred, centred))


def test_networks_that_learnt_apart_come_nearer():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data).float()/16, torch.tensor(digits.target)

    def trained(seed):
        torch.manual_seed(seed)
        shape = [nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)]
        net = nn.Sequential(*shape)
        adam = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(12):
            for rows in torch.randperm(1400).chunk(14):
                adam.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                adam.step()
        return net.eval()

    nets = [trained(seed) for seed in range(2)]
    models = [from_state_dict(m.state_dict()) for m in nets]
    groups = traced(nets[0], x[:5])

    def loss(state):
        with torch.no_grad():
            out = torch.func.functional_call(nets[0], state, x[1400:])
            return float(nn.functional.cross_entropy(out, y[1400:]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = match_activations(nets, x[:1400].split(200), groups)
    ends = sum(loss(dict(c)) for c in models)/2
    together = in_one_gauge(models, groups, found)
    naive, aligned = (
        loss({n: (a[n] + b[n])/2 for n in a}) - ends for a, b in (models, together)
    )
    assert aligned < naive/4, (aligned, naive)


def test_silent_units_and_missing_examples_are_said():
    net = mlp(0)
    with torch.no_grad():
        net[0].bias[:3] = -1e3
    x = torch.randn(100, 12, dtype=torch.float64)
    with pytest.warns(UserWarning, match="3 units say the same to all examples, most of them in 0"):
        match_activations([net, mlp(1)], [x], GROUPS)
    with pytest.raises(MergeError, match="there are no examples.*\n.*at least two"):
        match_activations([net, mlp(1)], [], GROUPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = match_activations([net, mlp(1)], [x[:2]], GROUPS)
    assert found
    with torch.no_grad():
        net[0].bias[4] = float("nan")
    with pytest.raises(MergeError, match="layer '2'.*not finite"):
        match_activations([net, mlp(1)], [x], GROUPS)


tf = pytest.importorskip("transformers")
WIDE = dict(hidden_size=32, intermediate_size=40, num_attention_heads=4, vocab_size=99)
FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**WIDE, num_hidden_layers=2, num_key_value_heads=2)
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
}


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_of_transformers_come_back(name, tmp_path, recwarn):
    from frechet_merge import load, merge
    from frechet_merge.symmetries.families import groups_of

    torch.manual_seed(0)
    net = FAMILIES[name]().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05*torch.randn_like(p))
    net.save_pretrained(tmp_path/"0")
    first = load(tmp_path/"0")
    groups = groups_of(first)
    models = [first, elsewhere(first, groups, 1), elsewhere(first, groups, 2)]
    nets = []
    for i, c in enumerate(models):
        if i:
            merge([c], out=tmp_path/str(i))
        nets.append(type(net).from_pretrained(tmp_path/str(i)).eval())
    tokens = torch.randint(3, 90, (8, 20))
    mask = torch.ones(8, 20, dtype=torch.long)
    mask[:4, 12:] = 0
    fed = [{"input_ids": t, "attention_mask": m} for t, m in zip(tokens.split(4), mask.split(4))]
    found = match_activations(nets, fed, groups, models=models)
    # values and outputs come back; queries and keys have phases, in float32 of a file
    assert all(gap(c, first) < 1e-4 for c in in_one_gauge(models, groups, found))
    said = [str(w.message) for w in recwarn if "matched by their weights" in str(w.message)]
    assert len(said) == (1 if name == "mixtral" else 0)


@pytest.fixture
def talkers(tmp_path):
    "A small model, the same one in another gauge, its stream too, and texts."
    from spoken import byte_level, talker, texts

    from frechet_merge import load, merge
    from frechet_merge.symmetries.stream import groups_with_stream

    tokenizer = byte_level("abcd")
    talker(tmp_path/"a", tokenizer, 0, num_hidden_layers=2)
    a = load(tmp_path/"a")
    merge([elsewhere(a, groups_with_stream(a), 1)], out=tmp_path/"b", dtype="fp32")
    tokenizer.save_pretrained(tmp_path/"b")
    lines = [json.dumps({"text": t}) for t in texts("abcd")]
    (tmp_path/"texts.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_commands_align_by_what_models_say(talkers):
    from frechet_merge import load

    args = ["a", "b", "-o", "one", "--data", "texts.jsonl", "--residual", "--max-samples", "40"]
    code, out, err = cli("align", *args, cwd=talkers)
    assert code == 0, err
    a, b = load(talkers/"a"), load(talkers/"one"/"b")
    assert gap(b, a) < 1e-4 < gap(load(talkers/"b"), a)
    args = ["a", "b", "-o", "m", "--align", "--align-data", "texts.jsonl", "--align-residual"]
    code, out, err = cli("merge", *args, cwd=talkers)
    assert code == 0, err
    assert gap(load(talkers/"m"), a) < 1e-4
    record = json.loads((talkers/"m"/"frechet_merge.json").read_text())
    assert record["aligned"]["data"] == "texts.jsonl" and record["aligned"]["residual"]
    # what it says to type is what was typed, and it can be run again
    assert "--align --align-data texts.jsonl --align-residual" in record["command"]
    code, out, err = cli("run", "m", "-o", "again", cwd=talkers)
    assert code == 0, err
    assert gap(load(talkers/"again"), load(talkers/"m")) == 0


def test_what_cannot_be_run_is_refused_and_the_remedy_works(talkers):
    from spoken import byte_level, talker

    from frechet_merge import load, merge
    from frechet_merge.merging.align import align
    from frechet_merge.merging.alignment import Alignment

    how = Alignment(str(talkers/"texts.jsonl"))
    held = [dict(load(talkers/n)) for n in ("a", "b")]
    with pytest.raises(MergeError, match="cannot be tried here"):
        merge(held, align=how)
    groups = dense(["x.weight", "y.weight"], [4], bias=False)
    states = [{"x.weight": torch.randn(4, 3), "y.weight": torch.randn(2, 4)} for _ in range(2)]
    with pytest.raises(MergeError, match=r"models\[0\] is in memory.*\n.*without data"):
        align(states, groups=groups, how=how)
    align(states, groups=groups)
    talker(talkers/"other", byte_level("efgh"), 1, num_hidden_layers=2)
    pair = [talkers/"a", talkers/"other"]
    with pytest.raises(MergeError, match="other: knows other tokens.*\n.*by their weights"):
        align(pair, how=how)
    align(pair)
    with pytest.raises(ValueError, match="restarts= are of weights"):
        align([talkers/"a", talkers/"b"], how=replace(how, restarts=2))
    with pytest.raises(ValueError, match="have the stream in groups"):
        align(states, groups=groups, how=Alignment(residual=True))
    code, out, err = cli("merge", "a", "b", "-o", "m", "--align-data", "t.jsonl", cwd=talkers)
    assert code == 2 and "give --align, too" in err

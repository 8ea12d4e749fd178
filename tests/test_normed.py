"""Weight norm that one model has and another has folded: each is read as the first is written, held
to what transformers loads and torch folds."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from frechet_merge import load, merge
from frechet_merge.matching.normed import normed_like
from frechet_merge.messages import MergeError
from frechet_merge.spaces.robust import Huber

transformers = pytest.importorskip("transformers", minversion="5")
STEM = "wav2vec2.encoder.pos_conv_embed.conv."
NEW = ("parametrizations.weight.original0", "parametrizations.weight.original1")
OLD = ("weight_g", "weight_v")
SMALL = dict(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=32, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3),
    num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
)  # fmt: skip


def written(folder, state):
    save_file(state, folder/"model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    "A model as transformers writes it, as it wrote it before, and folded; and another."
    home = tmp_path_factory.mktemp("speech")
    for seed, name in enumerate(("new", "other")):
        torch.manual_seed(seed)
        config = transformers.Wav2Vec2Config(**SMALL)
        model = transformers.Wav2Vec2ForCTC(config)
        conv = model.wav2vec2.encoder.pos_conv_embed.conv
        with torch.no_grad():
            # directions whose length says nothing
            conv.parametrizations.weight.original1.mul_(3.0)
        model.save_pretrained(home/name)
    state = load_file(home/"new"/"model.safetensors")
    old = shutil.copytree(home/"new", home/"old")
    renamed = {STEM + a: STEM + b for a, b in zip(NEW, OLD)}
    written(old, {renamed.get(n, n): x for n, x in state.items()})
    # as transformers loads it, and torch folds it
    model = transformers.Wav2Vec2ForCTC.from_pretrained(old)
    conv = model.wav2vec2.encoder.pos_conv_embed.conv
    torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")
    folded = {n: x for n, x in state.items() if not n.startswith(STEM + "param")}
    folded[STEM + "weight"] = conv.weight.detach().clone()
    written(shutil.copytree(home/"new", home/"folded"), folded)
    return home


def weight_of(state, stem=STEM):
    "The weight that a model has, however it is written."
    if stem + "weight" in state:
        return state[stem + "weight"]
    spelled = next(s for s in (NEW, OLD) if stem + s[0] in state)
    g, v = (state[stem + end].float() for end in spelled)
    sides = [i for i, n in enumerate(g.shape) if n != 1]
    return v*g/v.norm() if not sides else torch._weight_norm(v, g, sides[0])


def seen(state):
    "What a network sees of a model."
    parts = {STEM + end for spelled in (NEW, OLD) for end in (*spelled, "weight")}
    rest = {n: x for n, x in state.items() if n not in parts}
    return {**rest, STEM + "weight": weight_of(state)}


@pytest.mark.parametrize("first", ["new", "old", "folded"])
@pytest.mark.parametrize("second", ["new", "old", "folded"])
def test_the_mean_of_copies_is_the_copy(speech, tmp_path, first, second):
    merge([speech/first, speech/second], out=tmp_path/"out")
    found = load_file(tmp_path/"out"/"model.safetensors")
    want = load_file(speech/first/"model.safetensors")
    assert {*found} == {*want}
    for name, x in seen(want).items():
        torch.testing.assert_close(seen(found)[name], x, rtol=1e-5, atol=1e-6)


def fold(state, stem=STEM):
    "The same model without weight norm."
    ends = [end for spelled in (NEW, OLD) for end in spelled]
    rest = {n: x for n, x in state.items() if n not in {stem + end for end in ends}}
    return {**rest, stem + "weight": weight_of(state, stem)}


HOW = {
    "a mean": {},
    "weights": {"weights": [0.2, 0.5, 0.3]},
    "ties": {"geometry": "ties", "base": True},
    "a sum": {"sum": [0.7, -0.3, 0.5], "base": True},
    "slerp": {"geometry": "slerp", "models": 2},
    "a loss": {"loss": "median"},
    "a loss of blocks": {"loss": Huber(per="block")},
    "sphere": {"geometry": "sphere"},
    "epimer": {"geometry": "epimer", "base": True},
    "a scale": {"scale": 0.4, "base": True},
    "serial": {"executor": "serial"},
    "processes": {"executor": "processes"},
}


@pytest.mark.parametrize("spelled", ["new", "old"])
@pytest.mark.parametrize("how", HOW)
def test_the_weight_is_merged_as_if_there_were_no_weight_norm(trained, tmp_path, how, spelled):
    asked = {**HOW[how]}
    n = asked.pop("models", 3)
    made = {}
    for kind in (spelled, "folded"):
        models = [trained/f"{kind}{i}" for i in range(n)]
        more = {**asked, "base": trained/f"{kind}3"} if "base" in asked else asked
        made[kind] = merge(models, out=tmp_path/kind, **more)
    found, want = (load_file(tmp_path/kind/"model.safetensors") for kind in made)
    assert {*found} == {*load_file(trained/f"{spelled}0"/"model.safetensors")}
    for name, x in seen(want).items():
        torch.testing.assert_close(seen(found)[name], x, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def trained(speech, tmp_path_factory):
    "Four models that differ, each in three spellings; the last is their base."
    home = tmp_path_factory.mktemp("trained")
    start = load_file(speech/"new"/"model.safetensors")
    renamed = {STEM + a: STEM + b for a, b in zip(NEW, OLD)}
    for i in range(4):
        draw = torch.Generator().manual_seed(i)
        state = {n: x + 0.3*torch.randn(x.shape, generator=draw) for n, x in start.items()}
        # directions of any length, and lengths of any sign
        state[STEM + NEW[1]] *= 10.0**(i - 1)
        state[STEM + NEW[0]][0, 0, 0] *= -1
        written(shutil.copytree(speech/"new", home/f"new{i}"), state)
        old = {renamed.get(n, n): x for n, x in state.items()}
        written(shutil.copytree(speech/"new", home/f"old{i}"), old)
        written(shutil.copytree(speech/"new", home/f"folded{i}"), fold(state))
    return home


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_is_the_mean_of_weights_in_any_precision(trained, tmp_path, dtype):
    models, weights = [], []
    for i in range(3):
        state = load_file(trained/f"new{i}"/"model.safetensors")
        state = {n: x.to(dtype) for n, x in state.items()}
        models.append(written(shutil.copytree(trained/f"new{i}", tmp_path/str(i)), state))
        g, v = (state[STEM + end].double() for end in NEW)
        weights.append(torch._weight_norm(v, g, 2))
    merge(models, out=tmp_path/"out")
    found = load_file(tmp_path/"out"/"model.safetensors")
    assert found[STEM + NEW[0]].dtype == found[STEM + NEW[1]].dtype == dtype
    g, v = (found[STEM + end].double() for end in NEW)
    w, want = torch._weight_norm(v, g, 2), sum(weights)/3
    assert (w - want).norm() <= 2*max(torch.finfo(dtype).eps, 1e-7)*want.norm()


@pytest.mark.parametrize("dim", [0, 1, None])
def test_torch_norms_along_any_side(tmp_path, dim):
    models, weights = [], []
    for i in range(2):
        torch.manual_seed(i)
        layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4), dim=dim)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1 + i)
        models.append(layer.state_dict())
        weights.append(layer.weight.detach())
    merged = merge(models).tensors
    layer.load_state_dict({n: merged[n] for n in merged})
    torch.testing.assert_close(layer.weight.detach(), sum(weights)/2)


def test_spellings_differ_in_a_module_that_transformers_does_not_know():
    torch.manual_seed(0)
    old, new = {"c.weight_g": torch.rand(4, 1), "c.weight_v": torch.randn(4, 3)}, {}
    for a, b in zip(OLD, NEW):
        new[f"c.{b}"] = old[f"c.{a}"]*2
    for pair in ([old, new], [new, old]):
        merged = merge(pair).tensors
        assert {*merged} == {*pair[0]}
        w = weight_of({n: merged[n] for n in merged}, "c.")
        torch.testing.assert_close(w, weight_of(old, "c.")*1.5)


@pytest.mark.parametrize("library", [torch.nn.utils, torch.nn.utils.parametrizations])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_weight_of_another_name(library):
    name, states, weights = "weight_hh_l0", [], []
    for i in range(2):
        torch.manual_seed(i)
        layer = library.weight_norm(torch.nn.LSTM(3, 4), name)
        states.append(layer.state_dict())
        layer(torch.zeros(1, 3))
        weights.append(getattr(layer, name).detach())
    merged = merge(states).tensors
    layer.load_state_dict({n: merged[n] for n in merged})
    layer(torch.zeros(1, 3))
    torch.testing.assert_close(getattr(layer, name).detach(), sum(weights)/2)


def test_a_length_of_zero_is_refused_and_the_remedy_works():
    "Directions of a weight that is zero have none, and torch divides by their length."
    states = []
    for i in range(2):
        torch.manual_seed(i)
        layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 4))
        with torch.no_grad():
            layer.parametrizations.weight.original0[1] = 0
        states.append(layer.state_dict())
        weight = layer.weight.detach()
    with pytest.raises(MergeError, match="is zero, and weight norm divides by it.*\nFold"):
        merge(states)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    found = merge([layer.state_dict(), states[1]]).tensors["weight"]
    torch.testing.assert_close(found, weight)


def test_vectors_that_are_called_alike_are_no_weight_norm():
    states = [{"time_mix_g": torch.rand(1, 1, 4), "time_mix_v": torch.rand(1, 1, 4)} for _ in "ab"]
    merged = merge(states).tensors
    for name in merged:
        torch.testing.assert_close(merged[name], (states[0][name] + states[1][name])/2)


def test_what_is_asked_for_lengths_alone_is_told(trained, recwarn):
    models = [trained/f"new{i}" for i in range(2)]
    of_lengths, of_weight = f"*{NEW[0]}", f"*{NEW[1]}"
    merge(models, weights={f"*{STEM}*": [0.2, 0.8], "*": [1, 1]})
    assert not [w for w in recwarn if "what is asked for it is not used" in str(w.message)]
    for of in ({"weights": {of_lengths: [1, 0], "*": [1, 1]}},
               {"geometry": {of_weight: "sphere", "*": "euclidean"}}):
        with pytest.warns(UserWarning, match="original0: its weight is merged as .*original1 is"):
            merge(models, **of)


def test_one_model_stays_as_it_is(speech, tmp_path):
    merge([speech/"new"], out=tmp_path/"out")
    found = load_file(tmp_path/"out"/"model.safetensors")
    for name, x in load_file(speech/"new"/"model.safetensors").items():
        assert torch.equal(found[name], x)


def test_a_metric_of_a_part_is_refused_and_the_remedy_works(trained):
    models = [trained/f"new{i}" for i in range(2)]
    state = load_file(models[0]/"model.safetensors")
    metrics = [{n: torch.ones_like(x) for n, x in state.items()} for _ in models]
    with pytest.raises(MergeError, match="weight norm.*\nLeave the lengths and directions out"):
        merge(models, metrics=metrics)
    less = [{n: x for n, x in m.items() if n not in {STEM + e for e in NEW}} for m in metrics]
    merge(models, metrics=less)


def test_what_is_written_is_loaded_whole(speech, tmp_path):
    merge([speech/"other", speech/"folded"], out=tmp_path/"out")
    model, said = transformers.Wav2Vec2ForCTC.from_pretrained(
        tmp_path/"out", output_loading_info=True
    )
    assert not said["missing_keys"] and not said["unexpected_keys"]
    found = load_file(tmp_path/"out"/"model.safetensors")
    conv = model.wav2vec2.encoder.pos_conv_embed.conv
    torch.testing.assert_close(conv.weight.detach(), weight_of(found))


def test_names_alone_are_no_weight_norm(speech):
    c = load(speech/"new")
    assert normed_like(c, c) is c
    less = c.view(lazy={n: x for n, x in c.lazy.items() if not n.startswith(STEM)})
    assert normed_like(less, c) is less

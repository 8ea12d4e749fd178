"""Weight norm that one model has and another has folded: each is read as the first is written, held
to what transformers loads and torch folds."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from frechet_merge import load, merge
from frechet_merge.matching.views import normed_like

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


def weight_of(state):
    "The weight that a model has, however it is written."
    if STEM + "weight" in state:
        return state[STEM + "weight"]
    spelled = next(s for s in (NEW, OLD) if STEM + s[0] in state)
    g, v = (state[STEM + end] for end in spelled)
    return torch._weight_norm(v, g, 2)


@pytest.mark.parametrize("first", ["new", "old", "folded"])
@pytest.mark.parametrize("second", ["new", "old", "folded"])
def test_the_mean_of_copies_is_the_copy(speech, tmp_path, first, second):
    merge([speech/first, speech/second], out=tmp_path/"out")
    found = load_file(tmp_path/"out"/"model.safetensors")
    want = load_file(speech/first/"model.safetensors")
    assert {*found} == {*want}
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-6)


def test_a_folded_model_counts_as_the_one_that_it_was_folded_from(speech, tmp_path):
    made = {}
    for second in ("new", "folded"):
        merge([speech/"other", speech/second], out=tmp_path/second)
        made[second] = load_file(tmp_path/second/"model.safetensors")
    names = {*made["new"]} - {STEM + end for end in NEW}
    assert all(torch.equal(made["new"][n], made["folded"][n]) for n in names)
    # of directions, the mean is of those as long as the first's
    other = load_file(speech/"other"/"model.safetensors")
    v, w = other[STEM + NEW[1]], weight_of(load_file(speech/"new"/"model.safetensors"))
    lengths = v.norm(dim=(0, 1), keepdim=True)
    want = (v + w*lengths/w.norm(dim=(0, 1), keepdim=True))/2
    torch.testing.assert_close(made["folded"][STEM + NEW[1]], want, rtol=1e-5, atol=1e-6)


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

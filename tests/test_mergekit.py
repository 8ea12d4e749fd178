"""Recipes of mergekit give what its documentation says, and are refused by name where they cannot.
That its own tensors come out is measured in bench/mergekit_recipes.py."""
import json

import pytest
import torch
from conftest import ROOT, cli, save
from safetensors.torch import save_file
from spoken import byte_level, talker, with_tokens
from test_recipe_files import deep, digest, ran, written

from frechet_merge import MergeError, merge
from frechet_merge.files.open import load
from frechet_merge.recipes.lines import read_page
from frechet_merge.recipes.mergekit import translated, with_names
from frechet_merge.recipes.written import read_recipe
from frechet_merge.merging.recipe import Recipe

NAME = "h.1.mlp.weight"
DEPTH = "[0, 1]"


@pytest.fixture
def folders(tmp_path):
    "Models a, b and c of three layers, and their base."
    base, config = deep(9), {"model_type": "toy", "n_layer": 3}
    found = {"base": save(tmp_path/"base", base, config)}
    for i, n in enumerate("abc"):
        state = {k: v + 0.1*deep(i)[k] for k, v in base.items()}
        found[n] = save(tmp_path/n, state, config)
    return found


def filled(text, folders):
    for name, folder in folders.items():
        text = text.replace(f"${name}", str(folder))
    return text


def merged(tmp_path, text, folders):
    tmp_path.mkdir(exist_ok=True)
    return ran(written(tmp_path, filled(text, folders)), tmp_path/"o").tensors


TWO = "models: [{model: $a, parameters: {weight: 1}}, {model: $b, parameters: {weight: %s}}]\n"


def tensor(folder, name=NAME):
    return load(folder)[name]


def test_linear(tmp_path, folders):
    a, b = tensor(folders["a"]), tensor(folders["b"])
    out = merged(tmp_path, TWO % 3 + "merge_method: linear", folders)[NAME]
    torch.testing.assert_close(out, (a + 3*b)/4)


@pytest.mark.parametrize(
    "weight, more, by_hand",
    [
        ("-0.5", "", lambda a, b: 2*a - b),
        ("0.5", "parameters: {normalize: false}", lambda a, b: a + 0.5*b),
        ("-0.5", "parameters: {normalize: true}", lambda a, b: 2*a - b),
        ("[0, 2]", "", lambda a, b: (a + b)/2),
        ("[{filter: attn, value: 7}, {value: 3}]", "", lambda a, b: (a + 3*b)/4),
        ("[{filter: mlp, value: 7}]", "parameters: {weight: 2}", lambda a, b: (a + 7*b)/8),
    ],
)
def test_weights_of_any_kind(tmp_path, folders, weight, more, by_hand):
    text = TWO % weight + f"merge_method: linear\n{more}"
    out = merged(tmp_path, text, folders)[NAME]
    torch.testing.assert_close(out, by_hand(tensor(folders["a"]), tensor(folders["b"])))


def test_a_list_over_depth_gives_its_first_value_outside_of_layers(tmp_path, folders):
    text = TWO % "[0, 9]" + "merge_method: linear"
    out = merged(tmp_path, text, folders)
    assert torch.equal(out["embed.weight"], tensor(folders["a"], "embed.weight"))
    assert torch.equal(out["h.0.attn.weight"], tensor(folders["a"], "h.0.attn.weight"))
    a, b = (tensor(folders[n], "h.2.attn.weight") for n in "ab")
    torch.testing.assert_close(out["h.2.attn.weight"], 0.1*a + 0.9*b)


def test_task_arithmetic_is_a_sum(tmp_path, folders):
    text = "models: [{model: $base}, {model: $a, parameters: {weight: 0.7}},"
    text += " {model: $b, parameters: {weight: -0.4}}]\nbase_model: $base\n"
    text += "merge_method: task_arithmetic\nparameters: {lambda: 0.5}"
    a, b, base = (tensor(folders[n]) for n in ("a", "b", "base"))
    out = merged(tmp_path, text, folders)[NAME]
    torch.testing.assert_close(out, base + 0.5*(0.7*(a - base) - 0.4*(b - base)))


def test_a_model_of_weight_zero_has_no_say(tmp_path, folders):
    "Nor where the others were trimmed, and it alone would be left."
    text = "models: [{model: $a, parameters: {weight: 1, density: 0.5}},"
    text += " {model: $b, parameters: {weight: %s}}]\nbase_model: $base\nmerge_method: ties"
    alone = text.partition(" {model: $b")[0] + "]\nbase_model: $base\nmerge_method: ties"
    both = merged(tmp_path, text % "[{filter: attn, value: 1}, {value: 0}]", folders)[NAME]
    torch.testing.assert_close(both, merged(tmp_path/"alone", alone, folders)[NAME])


def test_normalised_sums_without_an_election_are_over_all(tmp_path, folders):
    "Zeros count: what was trimmed from one model is averaged with what is left of the others."
    text = "models: [{model: $a, parameters: {weight: 1, density: 0.5, gamma: 0}},"
    text += " {model: $b, parameters: {weight: 3}}]\nbase_model: $base\n"
    text += "merge_method: breadcrumbs\nparameters: {normalize: true, density: 1}"
    a, b, base = (tensor(folders[n]) for n in ("a", "b", "base"))
    x = a - base
    kept = x*(x.abs() >= x.abs().flatten().sort(descending=True).values[7])
    out = merged(tmp_path, text, folders)[NAME]
    torch.testing.assert_close(out, base + (kept + 3*(b - base))/4)


def test_slerp_begins_at_the_base(tmp_path, folders):
    text = "models: [{model: $b}, {model: $a}]\nbase_model: $a\nmerge_method: slerp\n"
    out = merged(tmp_path, text + "parameters: {t: 0}", folders)[NAME]
    torch.testing.assert_close(out, tensor(folders["a"]))


def test_fusion_takes_what_stands_out(tmp_path, folders):
    "By the definition, on its own numbers: quantiles as sorted lists have them."
    text = "models: [{model: $a}]\nbase_model: $base\nmerge_method: arcee_fusion\n"
    base, a = tensor(folders["base"]), tensor(folders["a"])
    out = merged(tmp_path, text, folders)[NAME]
    p, q = a.softmax(-1), base.softmax(-1)
    scores = (a - base).abs()*(p*(p/q).log()).sum(-1, keepdim=True)
    low, middle, high = (
        torch.quantile(scores, share, interpolation="lower") for share in (0.25, 0.5, 0.75)
    )
    taken = scores > middle + 1.5*(high - low)
    assert 0 < taken.sum() < taken.numel()/2
    torch.testing.assert_close(out, torch.where(taken, a, base))


@pytest.mark.parametrize(
    "method, more, factor",
    [
        ("ram", "epsilon: 0.05", 1),
        ("ramplus_tl", "epsilon: 0.05", 1.02),
        ("ramplus_tl", "epsilon: 0.05, r: 0.5, alpha: 9, lambda: 3", None),
    ],
)
def test_changes_of_one_agent_are_not_divided(tmp_path, folders, method, more, factor):
    "By the definition: the mean over those who changed an entry, more of what is unique."
    text = "models: [{model: $a}, {model: $b}, {model: $c}]\nbase_model: $base\n"
    text += f"merge_method: {method}\nparameters: {{{more}}}"
    base = tensor(folders["base"])
    deltas = torch.stack([tensor(folders[n]) - base for n in "abc"])
    changed = deltas.abs() > 0.05
    many = changed.sum(0)
    assert {0, 1, 2} <= {*many.flatten().tolist()}
    by_hand = torch.zeros_like(base)
    for x, M in zip(deltas, changed):
        unique, shared = M & (many == 1), M & (many > 1)
        f = factor or 1 + 0.5*float(shared.sum()/unique.sum())
        by_hand += torch.where(unique, x*f, 0) + torch.where(shared, x/many.clamp(min=1), 0)
    out = merged(tmp_path, text, folders)[NAME]
    torch.testing.assert_close(out, base + by_hand)


def test_fusion_says_what_does_nothing(tmp_path, folders):
    text = "models: [{model: $a}]\nbase_model: $base\nmerge_method: arcee_fusion\n"
    text += "parameters: {normalize: true, int8_mask: true, rescale: false}"
    path = written(tmp_path, filled(text, folders))
    code, _, err = cli("run", path, "-o", tmp_path/"o")
    assert code == 0 and "normalize does nothing in arcee_fusion" in err
    code, _, err = cli("run", tmp_path/"o"/"frechet_merge.json", "-o", tmp_path/"again")
    assert code == 0, err
    assert digest(tmp_path/"o") == digest(tmp_path/"again")


def test_a_stack_of_layers(tmp_path, folders):
    text = """
slices:
  - sources: [{model: $a, layer_range: [0, 2]}]
  - sources: [{model: $b, layer_range: [1, 3]}]
merge_method: passthrough
"""
    out = merged(tmp_path, text, folders)
    for i, (n, j) in enumerate([("a", 0), ("a", 1), ("b", 1), ("b", 2)]):
        for part in ("attn", "mlp"):
            of = tensor(folders[n], f"h.{j}.{part}.weight")
            assert torch.equal(out[f"h.{i}.{part}.weight"], of)
    assert json.loads((tmp_path/"o"/"config.json").read_text())["n_layer"] == 4
    # also by its name, and from what was written
    name = f"{folders['a']}[0:2]|{folders['b']}[1:3]"
    assert cli("merge", name, "-o", tmp_path/"named")[0] == 0
    assert cli("run", tmp_path/"o", "-o", tmp_path/"again")[0] == 0
    assert digest(tmp_path/"named") == digest(tmp_path/"again") == digest(tmp_path/"o")


SLICED = """
slices:
  - sources:
      - {model: $a, layer_range: [0, 2], parameters: {weight: [1, 3]}}
      - {model: $b, layer_range: [0, 2]}
    parameters: {weight: 2}
  - sources:
      - {model: $a, layer_range: [2, 3], parameters: {weight: [{filter: mlp, value: 0}]}}
      - {model: $c, layer_range: [0, 1], parameters: {weight: 0.5}}
merge_method: linear
parameters: {normalize: %s, weight: 4}
"""


@pytest.mark.parametrize("normalize", ["true", "false"])
def test_slices_have_parameters_of_their_own(tmp_path, folders, normalize):
    "A list over depth begins anew in each slice, and the embedding is of the first."
    out = merged(tmp_path, SLICED % normalize, folders)
    expected = {  # name: weights, and models with the names of their tensors
        "embed.weight": [(1, "a", "embed.weight"), (2, "b", "embed.weight")],
        "h.0.mlp.weight": [(1, "a", "h.0.mlp.weight"), (2, "b", "h.0.mlp.weight")],
        "h.1.attn.weight": [(3, "a", "h.1.attn.weight"), (2, "b", "h.1.attn.weight")],
        "h.2.attn.weight": [(4, "a", "h.2.attn.weight"), (0.5, "c", "h.0.attn.weight")],
        "h.2.mlp.weight": [(0.5, "c", "h.0.mlp.weight")],
    }
    for name, parts in expected.items():
        total = sum(w for w, _, _ in parts) if normalize == "true" else 1
        by_hand = sum(w*tensor(folders[m], of) for w, m, of in parts)/total
        torch.testing.assert_close(out[name], by_hand)


def test_a_slice_may_be_turned_down(tmp_path, folders):
    "As people lengthen a model by copies of layers that do nothing at first."
    text = """
slices:
  - sources: [{model: $a, layer_range: [0, 2]}]
  - sources:
      - model: $a
        layer_range: [1, 2]
        parameters: {scale: [{filter: attn, value: 0}, {filter: mlp, value: 0.5}, {value: 1}]}
  - sources: [{model: $a, layer_range: [2, 3]}]
merge_method: passthrough
"""
    path = written(tmp_path, filled(text, folders))
    assert cli("run", path, "-o", tmp_path/"o")[0] == 0
    out, a = load(tmp_path/"o"), load(folders["a"])
    assert not out["h.2.attn.weight"].any()
    assert torch.equal(out["h.2.mlp.weight"], 0.5*a["h.1.mlp.weight"])
    assert torch.equal(out["h.1.attn.weight"], a["h.1.attn.weight"])
    assert torch.equal(out["h.3.mlp.weight"], a["h.2.mlp.weight"])
    code, _, err = cli("run", tmp_path/"o"/"frechet_merge.json", "-o", tmp_path/"again")
    assert code == 0, err
    assert digest(tmp_path/"o") == digest(tmp_path/"again")


BY_FILTER = "[{filter: mlp, value: true}, {value: false}]"
SUMMED = "base_model: $base\nmerge_method: task_arithmetic\n"
# a switch that is on in MLPs, and what two methods give with it and without
SWITCHED = {
    "linear": (
        f"merge_method: linear\nparameters: {{normalize: {BY_FILTER}}}",
        lambda z, a, b: (a + 3*b)/4,
        lambda z, a, b: a + 3*b,
    ),
    "a sum": (
        f"{SUMMED}parameters: {{normalize: [{{filter: mlp, value: 1}}]}}",
        lambda z, a, b: (a + 3*b)/4,
        lambda z, a, b: z + (a - z) + 3*(b - z),
    ),
    "multislerp": (
        f"merge_method: multislerp\nparameters: {{normalize_weights: {BY_FILTER}}}",
        lambda z, a, b: along(a, b),
        lambda z, a, b: 4*along(a, b),
    ),
}


def along(a, b):
    "The mean direction with the weights 1 and 3, of the mean norm."
    total = a/a.norm() + 3*b/b.norm()
    return (a.norm() + 3*b.norm())/4*total/total.norm()


@pytest.mark.parametrize("what", SWITCHED)
def test_a_switch_by_filters(tmp_path, folders, what):
    "And the record says it again."
    more, on, off = SWITCHED[what]
    path = written(tmp_path, filled(TWO % 3 + more, folders))
    assert cli("run", path, "-o", tmp_path/"o")[0] == 0
    for name, x in load(tmp_path/"o").items():
        z, a, b = (tensor(folders[n], name).double() for n in ("base", "a", "b"))
        by_hand = (on if "mlp" in name else off)(z, a, b)
        torch.testing.assert_close(x.double(), by_hand, rtol=1e-5, atol=1e-6)
    assert cli("run", tmp_path/"o"/"frechet_merge.json", "-o", tmp_path/"again")[0] == 0
    assert digest(tmp_path/"o") == digest(tmp_path/"again")


@pytest.mark.parametrize(
    "method, switch, more",
    [
        ("ties", "normalize", "density: 0.5"),
        ("ties", "rescale", "density: 0.5"),
        ("breadcrumbs", "normalize", "density: 0.7, gamma: 0.1"),
        ("dare_linear", "rescale", "density: 0.5"),
        ("model_stock", "filter_wise", ""),
        ("nuslerp", "nuslerp_flatten", ""),
        ("nuslerp", "nuslerp_row_wise", "nuslerp_flatten: false"),
    ],
)
def test_a_switch_by_filters_is_each_of_both(tmp_path, folders, method, switch, more):
    "Where it is on the tensors are those of a recipe that has it on, and elsewhere of the other."
    text = TWO % 3 + f"merge_method: {method}\nparameters: {{%s: %s, {more}}}\n"
    # the differences of these lie too far apart for one mean direction
    text += "" if method == "nuslerp" else "base_model: $base\n"
    found = {}
    for said in ("true", "false", BY_FILTER):
        found[said] = merged(tmp_path/said[:4], text % (switch, said), folders)
    for name, x in found[BY_FILTER].items():
        same = found["true" if "mlp" in name else "false"][name]
        torch.testing.assert_close(x, same, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(found["true"][NAME], found["false"][NAME])


# a switch that is none, what is said of it, and what the error offers
NO_SWITCH = {
    "over depth": ("normalize: [0, 1]", "over depth is of numbers", f"normalize: {BY_FILTER}"),
    "over depth, by filter": (
        "normalize: [{filter: mlp, value: [0, 1]}]",
        "over depth is of numbers",
        f"normalize: {BY_FILTER}",
    ),
    "a share": ("normalize: 0.3", "0.3 must be true or false", 'normalize: "True"'),
}


@pytest.mark.parametrize("what", NO_SWITCH)
def test_what_is_no_switch(tmp_path, folders, what):
    wrong, said, right = NO_SWITCH[what]
    text = TWO % 3 + "merge_method: linear\nparameters: {%s}"
    with pytest.raises(MergeError, match=f"line 3: parameters.normalize: .*{said}"):
        merged(tmp_path/"no", text % wrong, folders)
    assert NAME in merged(tmp_path/"yes", text % right, folders)


def test_weights_by_filters_are_not_divided_in_places(tmp_path, folders):
    text = TWO % "%s" + f"merge_method: linear\nparameters: {{normalize: {BY_FILTER}}}"
    with pytest.raises(MergeError, match="need plain numbers as weights"):
        merged(tmp_path/"no", text % "[{filter: mlp, value: 1}, {value: 2}]", folders)
    assert NAME in merged(tmp_path/"yes", text % 2, folders)


def test_two_switches_by_filters_cannot_both_turn(tmp_path, folders):
    "The remedy is taken: one of them is for all tensors."
    text = TWO % 3 + "merge_method: nuslerp\nparameters: {nuslerp_row_wise: %s, "
    text += f"nuslerp_flatten: {BY_FILTER}}}"
    with pytest.raises(MergeError, match="have filters both: give one of them to all"):
        merged(tmp_path/"no", text % BY_FILTER, folders)
    assert NAME in merged(tmp_path/"yes", text % "true", folders)


@pytest.mark.parametrize("said, number", [("true", 1), ("false", 0), ("[true, 3]", "[1, 3]")])
def test_true_counts_as_one(tmp_path, folders, said, number):
    "As in mergekit, which was run."
    text = TWO + "merge_method: linear"
    found, same = (merged(tmp_path/n, text % x, folders) for n, x in (("x", said), ("y", number)))
    assert all(torch.equal(found[n], same[n]) for n in same)


# where anchors stand beside a recipe
HOLDERS = {
    "a mapping": "shared: &w {weight: 3}\n" + TWO.replace("{weight: %s}", "*w"),
    "numbers": "_all: [&x 2, &y 3]\n" + TWO.replace("%s", "*y"),
    "a number": "1: &w {weight: 3}\n" + TWO.replace("{weight: %s}", "*w"),
    "within another": "x-w: &x 3\nx-p: &p {weight: *x}\n" + TWO.replace("{weight: %s}", "*p"),
    "the fields themselves": "d: &d {models: [{model: $a, parameters: {weight: 1}}, {model: $b, "
    "parameters: {weight: 3}}]}\n<<: *d\n",
}


@pytest.mark.parametrize("what", HOLDERS)
def test_what_only_holds_anchors(tmp_path, folders, what):
    path = written(tmp_path, filled(HOLDERS[what] + "merge_method: linear\n", folders))
    code, _, err = cli("run", path, "-o", tmp_path/"o")
    assert code == 0 and "is read only where its anchors are used" in err, err
    out, a, b = (tensor(x) for x in (tmp_path/"o", folders["a"], folders["b"]))
    torch.testing.assert_close(out, (a + 3*b)/4)


@pytest.mark.parametrize(
    "text",
    [
        TWO % 3 + "shared: 3\n",
        TWO % 3 + "shared: &w 3\n",
        TWO % 3 + "shared: &w 3\nmore: *w\n",
        TWO.replace("{weight: %s}", "&p {weight: 3}") + "paramters: *p\n",
    ],
    ids=["no anchor", "nobody uses it", "no field uses it", "it uses one"],
)
def test_a_field_that_holds_nothing_for_others_is_unknown(tmp_path, text):
    with pytest.raises(MergeError, match="a recipe has no field '(shared|paramters)'"):
        read_recipe(written(tmp_path, text + "merge_method: linear\n"))


def test_a_switch_of_one_slice_is_no_switch_of_all(tmp_path, folders):
    text = TWO % 3 + "merge_method: linear"
    sliced = SLICED % "true"
    sliced = sliced.replace("    parameters: {weight: 2}", "    parameters: {normalize: false}")
    with pytest.raises(MergeError, match="the same in the whole recipe"):
        translated(read_page(filled(sliced, folders)))
    alone = text.replace("models:", "slices:\n- parameters: {normalize: false}\n  sources:")
    alone = alone.replace("}}", "}, layer_range: [0, 3]}")
    out = merged(tmp_path, alone, folders)[NAME]
    torch.testing.assert_close(out, tensor(folders["a"]) + 3*tensor(folders["b"]))


def seeing(seed, layers=2):
    "A toy with a tower that reads, one that sees, and what is between them."
    g = torch.Generator().manual_seed(seed)
    names = ["language_model.model.embed_tokens", "language_model.lm_head"]
    names += ["multi_modal_projector.linear_1", "vision_tower.patch_embed"]
    for i in range(layers):
        names += [f"language_model.model.layers.{i}.mlp", f"vision_tower.encoder.layers.{i}.mlp"]
    return {f"{n}.weight": torch.randn(4, 4, generator=g) for n in names}


@pytest.fixture
def towers(tmp_path):
    config = {"model_type": "toy", "vision_config": {}, "text_config": {}}
    return {n: save(tmp_path/n, seeing(i), config) for i, n in enumerate(("base", "a", "b"))}


MODULES = """
modules:
  text_decoder:
    models:
      - {model: $a, parameters: {weight: [0, 1]}}
      - {model: $b, parameters: {weight: 1}}
  vision_tower:
    slices:
      - sources: [{model: $a, layer_range: [0, 1]}]
      - sources: [{model: $b, layer_range: [1, 2]}, {model: $a, layer_range: [1, 2]}]
        parameters: {weight: [{filter: layers, value: 3}]}
    parameters: {weight: 2}
  multi_modal_projector:
    models: [{model: $b}]
merge_method: linear
parameters: {weight: 5}
"""


def test_modules_have_recipes_of_their_own(tmp_path, towers):
    path = written(tmp_path, filled(MODULES, towers))
    code, _, err = cli("run", path, "-o", tmp_path/"o")
    assert code == 0, err
    out, a, b = (load(x) for x in (tmp_path/"o", towers["a"], towers["b"]))
    # text: the list over depth is that of one tower, and gives its first value outside of it
    for name, of_a in [("embed_tokens", 0), ("layers.0.mlp", 0), ("layers.1.mlp", 0.5)]:
        name = f"language_model.model.{name}.weight"
        torch.testing.assert_close(out[name], of_a*a[name] + (1 - of_a)*b[name])
    assert torch.equal(out["language_model.lm_head.weight"], b["language_model.lm_head.weight"])
    for name in ("vision_tower.patch_embed.weight", "vision_tower.encoder.layers.0.mlp.weight"):
        assert torch.equal(out[name], a[name])
    name = "vision_tower.encoder.layers.1.mlp.weight"
    torch.testing.assert_close(out[name], (a[name] + b[name])/2)
    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(out[name], b[name])
    code, _, err = cli("run", tmp_path/"o"/"frechet_merge.json", "-o", tmp_path/"again")
    assert code == 0, err
    assert digest(tmp_path/"o") == digest(tmp_path/"again")


def test_a_module_that_is_only_the_base(tmp_path, towers):
    text = """
modules:
  text_decoder: {models: [{model: $a, parameters: {weight: 0.5}}, {model: $b}]}
  vision_tower: {models: [{model: $base}]}
  multi_modal_projector: {models: [{model: $b}]}
merge_method: task_arithmetic
base_model: $base
parameters: {weight: 1, lambda: 0.5, normalize: %s}
"""
    for normalize in ("false", "true"):
        out = merged(tmp_path/normalize, text % normalize, towers)
        base, a, b = (load(towers[n]) for n in ("base", "a", "b"))
        total = 1.5 if normalize == "true" else 1
        for name, of_a, of_b in (
            ("language_model.lm_head.weight", 0.25/total, 0.5/total),
            ("vision_tower.encoder.layers.0.mlp.weight", 0, 0),
            ("multi_modal_projector.linear_1.weight", 0, 0.5),
        ):
            by_hand = base[name] + of_a*(a[name] - base[name]) + of_b*(b[name] - base[name])
            torch.testing.assert_close(out[name], by_hand)


@pytest.mark.parametrize(
    "what, instead, said",
    [
        ("  multi_modal_projector:\n    models: [{model: $b}]\n", "", "nothing of multi_modal_p"),
        ("multi_modal_projector:", "projector:", "Did you mean 'multi_modal_projector'"),
        ("linear", "karcher", "karcher has no weights"),
        ("layers, value: 3", "lm_head, value: 3", "where it stands"),
    ],
)
def test_modules_that_are_not_those_of_the_models(tmp_path, towers, what, instead, said):
    text = MODULES.replace(what, instead)
    code, _, err = cli("run", written(tmp_path, filled(text, towers)), "-o", tmp_path/"o")
    assert code == 1 and said in err and "recipe.yml, line" in err, err
    assert len(err.splitlines()) <= 3 and not (tmp_path/"o").exists()


# layers of two parts stacked anew: three of text, of two inputs each, and two that see
ANEW = """
modules:
  text_decoder:
    slices:
      - sources:
          - {model: $base, layer_range: [0, 2]}
          - {model: $a, layer_range: [0, 2], parameters: {weight: [0.2, 0.4]}}
      - sources:
          - {model: $base, layer_range: [1, 2]}
          - {model: $b, layer_range: [1, 2], parameters: {weight: 0.5}}
  vision_tower:
    slices:
      - sources: [{model: $base, layer_range: [1, 2]}, {model: $b, layer_range: [1, 2]}]
      - sources: [{model: $base, layer_range: [0, 1]}, {model: $a, layer_range: [0, 1]}]
    parameters: {weight: 0.3}
  multi_modal_projector:
    models: [{model: $base}, {model: $b, parameters: {weight: 0.7}}]
base_model: $base
merge_method: task_arithmetic
"""


TEXT, SEES = "language_model.model.layers", "vision_tower.encoder.layers"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
PATCH, BETWEEN = "vision_tower.patch_embed.weight", "multi_modal_projector.linear_1.weight"
# name in the result → whose difference, how much of it, and the name there
OF_ANEW = {
    f"{TEXT}.0.mlp.weight": ("a", 0.2, f"{TEXT}.0.mlp.weight"),
    f"{TEXT}.1.mlp.weight": ("a", 0.4, f"{TEXT}.1.mlp.weight"),
    f"{TEXT}.2.mlp.weight": ("b", 0.5, f"{TEXT}.1.mlp.weight"),
    f"{SEES}.0.mlp.weight": ("b", 0.3, f"{SEES}.1.mlp.weight"),
    f"{SEES}.1.mlp.weight": ("a", 0.3, f"{SEES}.0.mlp.weight"),
    EMBEDDING: ("a", 0.2, EMBEDDING),
    HEAD: ("b", 0.5, HEAD),
    PATCH: ("b", 0.3, PATCH),
    BETWEEN: ("b", 0.7, BETWEEN),
}


def test_layers_of_a_module_are_stacked_anew(tmp_path, towers):
    "Each part by itself, with its count in its section of the config."
    config = {"text_config": {"num_hidden_layers": 2, "layer_types": ["x", "y"]}}
    config = {"model_type": "toy", "vision_config": {"depth": 2}, **config}
    for folder in towers.values():
        (folder/"config.json").write_text(json.dumps(config))
    path = written(tmp_path, filled(ANEW, towers))
    code, _, err = cli("run", path, "-o", tmp_path/"o")
    assert code == 0, err
    out, z = load(tmp_path/"o"), load(towers["base"])
    assert {*out} == {*OF_ANEW}
    for name, (model, share, there) in OF_ANEW.items():
        c = load(towers[model])
        torch.testing.assert_close(out[name], z[there] + share*(c[there] - z[there]), msg=name)
    said = json.loads((tmp_path/"o"/"config.json").read_text())
    assert said["text_config"] == {"num_hidden_layers": 3, "layer_types": ["x", "y", "y"]}
    assert said["vision_config"] == {"depth": 2}
    code, _, err = cli("run", tmp_path/"o"/"frechet_merge.json", "-o", tmp_path/"again")
    assert code == 0, err
    assert digest(tmp_path/"o") == digest(tmp_path/"again")


def test_the_only_module_of_a_model_may_be_a_stack(tmp_path):
    "`default` is the model itself: the same as slices without modules."
    names = [f"model.layers.{i}.mlp.weight" for i in range(3)]
    config = {"model_type": "toy", "num_hidden_layers": 3}
    g = torch.Generator().manual_seed(0)
    for name in "ab":
        save(tmp_path/name, {n: torch.randn(2, 2, generator=g) for n in names}, config)
    slices = "slices: [{sources: [{model: a, layer_range: [0, 2]}]}, "
    slices += "{sources: [{model: b, layer_range: [0, 3]}]}]"
    found = []
    for i, text in enumerate((slices, f"modules: {{default: {{{slices}}}}}")):
        (tmp_path/f"{i}.yml").write_text(f"merge_method: passthrough\n{text}\n")
        code, _, err = cli("run", f"{i}.yml", "-o", f"o{i}", cwd=tmp_path)
        assert code == 0, err
        found.append(dict(load(tmp_path/f"o{i}")))
        assert json.loads((tmp_path/f"o{i}"/"config.json").read_text())["num_hidden_layers"] == 5
    assert len(found[0]) == 5 and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


WRONG_STACKS = {
    "layers that are not there": ("[1, 2]}, {model: $b, lay", "[1, 3]}, {model: $b, lay", "length"),
    "of both": ("layer_range: [1, 2]", "layer_range: [2, 3]", "has layers vision_tower.encoder"),
    "a slice without the base": ("{model: $base, layer_range: [0, 1]}, ", "", "must have the base"),
    "a part that is not named": (
        "  multi_modal_projector:\n    models: [{model: $base}, {model: $b, parameters: "
        "{weight: 0.7}}]\n",
        "",
        "nothing of multi_modal_p",
    ),
}


@pytest.mark.parametrize("what", WRONG_STACKS)
def test_a_stack_of_a_module_that_cannot_be(tmp_path, towers, what):
    old, new, said = WRONG_STACKS[what]
    text = ANEW
    if what == "of both":
        start = text.index("vision_tower")
        text = text[:start] + text[start:].replace(old, new)
    else:
        assert old in text
        text = text.replace(old, new)
    code, _, err = cli("run", written(tmp_path, filled(text, towers)), "-o", tmp_path/"o")
    assert code == 1 and said in err, err
    assert len(err.splitlines()) <= 3 and not (tmp_path/"o").exists()


def test_parts_of_a_stack_by_name(towers):
    "As the recipe above writes them: every part is named, once, and is there."
    a = towers["a"]
    text = f"{a}[text_decoder=0:2]|{a}[text_decoder=1:2]"
    sees, between = f"{a}[vision_tower=:]", f"{a}[multi_modal_projector=:]"
    with pytest.raises(MergeError, match="says nothing of multi_modal_projector") as e:
        load(f"{text}|{sees}")
    named = str(e.value).split("Name it, too: ")[1].rstrip(".")
    assert named == between
    found, whole = load(f"{text}|{sees}|{named}"), load(a)
    lead = "language_model.model.layers."
    assert {*found} == {*whole, f"{lead}2.mlp.weight"}
    assert torch.equal(found[f"{lead}2.mlp.weight"], whole[f"{lead}1.mlp.weight"])
    with pytest.raises(MergeError, match="has no part 'audio'; it has multi_modal_projector, "):
        load(f"{text}|{sees}|{between}|{a}[audio=:]")
    with pytest.raises(MergeError, match="all of this part, and no other piece"):
        load(f"{text}|{sees}|{sees}|{between}")
    with pytest.raises(MergeError, match="no layers that are numbered"):
        load(f"{text}|{sees}|{a}[multi_modal_projector=0:1]")


def test_layers_that_no_section_of_a_config_counts(tmp_path):
    "An encoder and its decoder are counted side by side, in words of each architecture."
    names = [f"{part}.layers.{i}.mlp.weight" for part in ("encoder", "decoder") for i in range(2)]
    a = save(tmp_path/"a", {n: torch.ones(2, 2) for n in names}, {"is_encoder_decoder": True})
    with pytest.raises(MergeError, match="does not say how many layers its encoder has"):
        load(f"{a}[encoder=0:1]|{a}[encoder=0:2]|{a}[decoder=:]")
    assert {*load(f"{a}[encoder=:]|{a}[decoder=:]")} == {*names}


def test_a_filter_in_the_wrong_module(tmp_path, towers):
    "Moved to the module that has such tensors, it holds there."
    rule = "{filter: lm_head, value: 3}"
    wrong = MODULES.replace("{filter: layers, value: 3}", rule)
    code, _, err = cli("run", written(tmp_path, filled(wrong, towers)), "-o", tmp_path/"o")
    assert code == 1 and "Give it to the slice or module" in err
    right = MODULES.replace("weight: [0, 1]", f"weight: [{rule}, {{value: 1}}]")
    out, a, b = (merged(tmp_path, right, towers), load(towers["a"]), load(towers["b"]))
    name = "language_model.lm_head.weight"
    torch.testing.assert_close(out[name], (3*a[name] + b[name])/4)


def test_transformers_opens_a_stack(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    for i, n in enumerate("ab"):
        torch.manual_seed(i)
        config = transformers.Qwen2Config(**shape, num_hidden_layers=3, num_key_value_heads=2)
        transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path/n)
    name = f"{tmp_path/'a'}[0:3]|{tmp_path/'b'}[1:3]"
    assert cli("merge", name, "-o", tmp_path/"o")[0] == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path/"o", output_loading_info=True
    )
    assert len(model.model.layers) == 5 and not any(info.values())
    b = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/"b")
    x = model.model.layers[4].mlp.up_proj.weight
    assert torch.equal(x, b.model.layers[2].mlp.up_proj.weight)


def test_passthrough_scales_what_a_filter_means(tmp_path, folders):
    text = "models: [{model: $a, parameters: {scale: [{filter: mlp, value: 0.5}, {value: 1}]}}]\n"
    out = merged(tmp_path, text + "merge_method: passthrough", folders)
    assert torch.equal(out[NAME], 0.5*tensor(folders["a"]))
    assert torch.equal(out["embed.weight"], tensor(folders["a"], "embed.weight"))


EVERY = """
models:
  - model: $base
  - {model: $a, parameters: {weight: 0.7, density: [1, 0.5]}}
  - {model: $b, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0.2}], density: 0.5}}
base_model: $base
merge_method: %s
dtype: float32
"""


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "breadcrumbs"])
def test_what_was_written_runs_again(tmp_path, folders, method):
    path = written(tmp_path, filled(EVERY % method, folders))
    assert cli("run", path, "-o", tmp_path/"o")[0] == 0
    code, _, err = cli("run", tmp_path/"o"/"frechet_merge.json", "-o", tmp_path/"again")
    assert code == 0, err
    assert digest(tmp_path/"o") == digest(tmp_path/"again")


PLAIN = "models: [{model: base}, {model: a}, {model: b}]\nbase_model: base\n"
REFUSED = [
    (PLAIN + "merge_method: ranked_ties", "line 3", "The nearest is ties"),
    (PLAIN + "merge_method: sce\nparameters: {wieght: 1}", "line 4", "Did you mean 'weight'"),
    (PLAIN + "merge_method: arcee_fusion", "line 1", "takes 1 models"),
    (PLAIN + "merge_method: tie", "line 3", "Did you mean 'ties'"),
    (PLAIN + "merge_method: ties", "line 1", "a has no weight, which ties needs"),
    (PLAIN + "merge_method: sce\nparameters: {select_top: 1}", "line 4", "'select_topk'"),
    (PLAIN + "merge_method: sce\nparameter: {}", "line 4", "Did you mean 'parameters'"),
    (PLAIN + "merge_method: slerp\nparameters: {t: 0.5}", "line 1", "takes 1 models"),
    (PLAIN + "merge_method: sce\ndtype: int8", "line 4", "int8"),
    (PLAIN + "merge_method: sce\ntokenizer: {tokens: {x: {}}}", "line 4", "needs a source"),
    (
        PLAIN + "merge_method: sce\ntokenizer: {tokens: {x: {source: {kind: one}}}}",
        "line 4",
        "write model_token or zero",
    ),
    (
        PLAIN + "merge_method: sce\ntokenizer: {tokens: {x: {source: {kind: model_token}}}}",
        "line 4",
        "names no model",
    ),
    (
        PLAIN + "merge_method: sce\ntokenizer:\n  tokens:\n"
        "    x: {source: {kind: model_token, model: a, token: b, token_id: 1}}",
        "line 6",
        "by its token or by its number",
    ),
    (
        PLAIN + "merge_method: sce\ntokenizer:\n  tokens:\n"
        "    x: {source: {kind: model_token, model: a, token_id: -1}}",
        "line 6",
        "from 0 on",
    ),
    ("modules: {}\nmerge_method: linear", "line 1", "from modules to recipes"),
    (
        "modules: {default: {models: [{model: a}], merge_method: ties}}\nmerge_method: linear",
        "line 1",
        "the same for all modules",
    ),
    (
        "slices:\n- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]\n"
        "- sources: [{model: a, layer_range: [2, 4]}]\nmerge_method: karcher",
        "line 1",
        "karcher has no weights",
    ),
    (
        "slices:\n- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]\n"
        "merge_method: karcher",
        "line 2",
        "of different length",
    ),
    ("models: [{model: a}, {model: a}]\nmerge_method: karcher", "line 1", "named twice"),
    (
        "models: [{model: a}]\nmerge_method: linear\nparameters: {weight: 0, normalize: false}",
        "line 1",
        "at least one model must count",
    ),
    (
        "models: [{model: a, parameters: {weight: 1, normalize: false}}]\nmerge_method: linear",
        "line 1",
        "beside the models",
    ),
    ("models: [{model: a}]\nmerge_method: sce", "line 1", "needs a base_model"),
    ("merge_method: linear", "line 1", "models or slices, or modules"),
    (TWO.replace("$", "") % -1 + "merge_method: linear", "line 1", "sum to zero"),
    (
        "merge_method: slerp\nbase_model: a\nslices:\n- sources:\n  - {model: a}",
        "line 5",
        "its layer_range",
    ),
    (
        "models: [{model: a, parameters: {weight: 1}}]\nmerge_method: nuslerp\n"
        "parameters: {nuslerp_flatten: false}",
        "line 1",
        "takes 2 models",
    ),
    (
        "models: [{model: a, parameters: {wieght: 1}}]\nmerge_method: linear",
        "line 1",
        "wieght",
    ),
    (
        "models: [{model: a, parameters: {weight: [{pattern: mlp, value: 1}]}}]\n"
        "merge_method: linear",
        "line 1",
        "It is filter",
    ),
    (
        "base_model: z\nmodels: [{model: a, parameters: {weight: 1, density: 0.95}}]\n"
        "merge_method: della",
        "line 1",
        "between 0 and 1",
    ),
]


@pytest.mark.parametrize("text, line, said", REFUSED)
def test_what_is_refused_is_named(text, line, said):
    with pytest.raises(MergeError) as e:
        translated(read_page(text, "recipe.yml"))
    assert f"recipe.yml, {line}:" in str(e.value) and said in str(e.value), str(e.value)
    assert len(str(e.value).splitlines()) <= 3


def test_a_filter_that_means_nothing(tmp_path, folders):
    text = filled(TWO % "[{filter: mpl, value: 1}, {value: 2}]" + "merge_method: linear", folders)
    code, out, err = cli("run", written(tmp_path, text), "-o", tmp_path/"o")
    assert code == 1 and "matches no tensor" in err and "mlp" in err and not (tmp_path/"o").exists()


def test_around_the_weights():
    text = PLAIN + "merge_method: sce\ntokenizer: {source: union, pad_to_multiple_of: 64}\n"
    asked = translated(read_page(text + "dtype: float32\nout_dtype: bfloat16"))
    recipe = asked.recipe
    assert recipe.tokenizer == "union" and recipe.pad_to_multiple_of == 64
    assert asked.output.dtype == torch.bfloat16
    linear = (TWO % 1).replace("$", "") + "merge_method: linear\n"
    for source, is_read in (("model:a", "a"), ("base", "base"), ("union", "union")):
        text = f"{linear}tokenizer_source: {source}\nbase_model: z"
        assert translated(read_page(text)).recipe.tokenizer == is_read
    karcher = PLAIN + "merge_method: karcher\ntokenizer_source: base"
    assert translated(read_page(karcher)).recipe.tokenizer == "base"
    text = linear + 'chat_template: "{% for m in messages %}{{ m.content }}{% endfor %}"'
    assert translated(read_page(text)).recipe.chat_template.startswith("{% for")
    assert Recipe.from_data(recipe.as_data()) == recipe


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_a_base_that_is_not_merged_is_said_to_be_so(tmp_path, folders, method):
    plain = f"models: [{{model: $a}}, {{model: $b}}]\nmerge_method: {method}\n"
    plain += "parameters: {weight: 1}\n" if method == "linear" else ""
    alone = merged(tmp_path/"alone", plain, folders)[NAME]
    with pytest.warns(UserWarning, match="is not merged.*name it among the models"):
        found = merged(tmp_path/"o", plain + "base_model: $base", folders)[NAME]
    assert torch.equal(found, alone)


PARTS = """models:
- model: {model: {path: $a}, lora: null}
  parameters: {weight: 0.3}
- model:
    model: {path: $b}
  parameters: {weight: 0.7}
"""
# how people and programs spell one and the same recipe
SPELLED = {
    "models by their parts": PARTS,
    "parts in short": PARTS.replace("{path: $a}", "$a").replace("{path: $b}", "$b"),
    "anchors and merge keys": "models: [{model: $a, parameters: &w {weight: 0.3}}, "
    "{model: $b, parameters: {<<: *w, weight: 0.7}}]\n",
    "a list of merge keys": "models: [{model: $a, parameters: &w {weight: 0.3}}, "
    "{model: $b, parameters: {weight: 0.7, <<: [*w]}}]\n",
    "numbers as texts": PARTS.replace("0.3", "'0.3'").replace("0.7", "7e-1"),
    "a rule alone": PARTS.replace("weight: 0.3", "weight: {value: 0.3}"),
    "a filter of nothing": PARTS.replace("0.7", "[{filter: null, value: 0.7}]"),
    "layers beside models": PARTS.replace("\n  par", "\n  layer_range: [0, 2]\n  par"),
    "options of the command": PARTS + "random_seed: 0\nint8_mask: true\n",
    "a dtype of torch": PARTS + "dtype: torch.float32\n",
}


@pytest.mark.parametrize("how", SPELLED)
@pytest.mark.filterwarnings("ignore:.*does nothing")
def test_spellings_of_one_recipe(tmp_path, folders, how):
    text = SPELLED[how] + "merge_method: linear\n"
    found = merged(tmp_path, text, folders)
    hand = merge([folders["a"], folders["b"]], weights=[0.3, 0.7]).tensors
    assert all(torch.equal(found[n], hand[n]) for n in hand) and {*found} == {*hand}


def test_parts_of_names_everywhere():
    "Of a base, of tokens, of an adapter, with a revision; other mappings stay as they are."
    text = """
base_model: {model: {path: z, revision: v1}}
models: [{model: {model: a, lora: {path: b, revision: v2}}, parameters: {weight: {value: 1}}}]
tokenizer:
  source: {model: {path: z}}
  tokens: {x: {source: {kind: model_token, model: {model: {path: a}}, token: y}}}
merge_method: task_arithmetic
"""
    found = with_names(read_page(text)).data
    assert found["base_model"] == "z@v1" and found["models"][0]["model"] == "a+b@v2"
    assert found["models"][0]["parameters"] == {"weight": {"value": 1}}
    token = {"kind": "model_token", "model": "a", "token": "y"}
    assert found["tokenizer"] == {"source": "z", "tokens": {"x": {"source": token}}}
    for odd, said in (("{path: 3}", "3 must be a text"), ("{pth: a}", "no field 'pth'"),
                      ("{revision: a}", "names no model"), ("[a]", "must be a text"),
                      # a folder has no revisions
                      (f"{{path: {ROOT}, revision: v1}}", "leave it out")):
        with pytest.raises(MergeError, match=said):
            with_names(read_page(f"merge_method: x\nmodels: [{{model: {{model: {odd}}}}}]"))
    odd = "merge_method: x\nbase_model: {model: a, override_architecture: X}"
    with pytest.raises(MergeError, match="leave it out"):
        with_names(read_page(odd))


def test_weights_of_any_sign(tmp_path, folders):
    "Those that are normalised are divided by their sum; where shares are meant they are refused."
    text = "models: [{model: $a, parameters: {weight: -0.5}}, {model: $b, parameters: "
    text += "{weight: 2}}]\nbase_model: $base\n"
    a, b, z = (load(folders[n]) for n in ("a", "b", "base"))
    found = merged(tmp_path/"1", text + "merge_method: task_arithmetic\n"
                   "parameters: {normalize: true}\n", folders)
    for n in found:
        want = z[n] + (-0.5*(a[n] - z[n]) + 2*(b[n] - z[n]))/1.5
        torch.testing.assert_close(found[n], want)
    with pytest.raises(MergeError, match="normalize: false") as e:
        merged(tmp_path/"2", text + "merge_method: ties\n", folders)
    remedy = str(e.value).split("Have it add up: ")[1].rstrip(".")
    found = merged(tmp_path/"3", f"{text}{remedy}\nmerge_method: ties\n", folders)
    assert all(x.isfinite().all() for x in found.values())
    for method in ("nuslerp", "multislerp"):
        with pytest.raises(MergeError, match="shares of a turn"):
            merged(tmp_path/"4", f"{text}merge_method: {method}\n", folders)
    for t in ("1.5", "[0, -1]"):
        with pytest.raises(MergeError, match="between 0 and 1"):
            merged(tmp_path/"5", "models: [{model: $a}, {model: $b}]\nbase_model: $a\n"
                   f"merge_method: slerp\nparameters: {{t: {t}}}\n", folders)
    with pytest.raises(MergeError, match="above 0 and at most 1"):
        merged(tmp_path/"6", PLAIN_BASE + "merge_method: sce\n"
               "parameters: {select_topk: 0}\n", folders)


PLAIN_BASE = "models: [{model: $a}, {model: $b}]\nbase_model: $base\n"


class TestStacksThatSpeak:
    "A stack reads with the first model's tokens and writes with the last one's."

    def talkers(self, tmp_path, **tokens):
        made = {}
        for seed, (name, added) in enumerate(tokens.items()):
            tokenizer = with_tokens(byte_level("abc"), added) if added else byte_level("abc")
            made[name] = talker(tmp_path/name, tokenizer, seed, num_hidden_layers=2)
        return tmp_path/"a", tmp_path/"b"

    def layers(self, folder):
        transformers = pytest.importorskip("transformers")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True)
        assert not any(info.values()), info
        return len(model.model.layers)

    def test_a_chosen_tokenizer_leaves_the_count_of_layers(self, tmp_path):
        a, b = self.talkers(tmp_path, a=["<x>"], b=["<x>"])
        name = f"{a}[0:2]|{b}[1:2]"
        found = merge([name], tokenizer="union", out=tmp_path/"o").tensors
        assert self.layers(tmp_path/"o") == 3
        assert all(torch.equal(found[n], load(name)[n]) for n in found)
        merge([name], pad_to_multiple_of=64, out=tmp_path/"p")
        assert self.layers(tmp_path/"p") == 3

    def test_other_numbers_of_tokens_are_refused(self, tmp_path):
        "The remedy is run as it is printed."
        a, b = self.talkers(tmp_path, a=["<x>"], b=["<x>", "<y>"])
        with pytest.raises(MergeError, match="rows of tokens") as e:
            load(f"{a}[0:1]|{b}[0:2]")
        words = str(e.value).split("frechet-merge ")[1].rstrip(".").replace("OUT", "c").split()
        code, _, err = cli(*words, cwd=tmp_path)
        assert code == 0, err
        merge([f"{a}[0:1]|{tmp_path/'c'}[0:2]"], out=tmp_path/"o")
        assert self.layers(tmp_path/"o") == 3
        known, whole = load(tmp_path/"o"), load(b)
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(known[name], whole[name.replace("1", "0", 1)])

    def test_other_tokens_of_one_number_are_named(self, tmp_path):
        a, b = self.talkers(tmp_path, a=["<x>"], b=["<y>"])
        with pytest.warns(UserWarning, match="'<x>' in .*which reads, and '<y>' in .*which writes"):
            load(f"{a}[0:1]|{b}[0:2]")

    def test_a_tied_output_layer_behind_one_that_has_its_own(self, tmp_path):
        a = talker(tmp_path/"a", byte_level("abc"), 0, tie_word_embeddings=False)
        b = talker(tmp_path/"b", byte_level("abc"), 1, tie_word_embeddings=True)
        assert a is not b
        merge([f"{tmp_path/'a'}[0:1]|{tmp_path/'b'}[0:1]"], out=tmp_path/"o")
        assert self.layers(tmp_path/"o") == 2
        found, last = load(tmp_path/"o"), load(tmp_path/"b")
        assert torch.equal(found["lm_head.weight"], last["model.embed_tokens.weight"])
        first = load(tmp_path/"a")
        assert torch.equal(found["model.embed_tokens.weight"], first["model.embed_tokens.weight"])

    def test_an_output_layer_that_nobody_has(self, tmp_path):
        "A base model without its head is no model whose head is its embedding; the remedy is run."
        a = talker(tmp_path/"a", byte_level("abc"), 0, tie_word_embeddings=False)
        b = talker(tmp_path/"b", byte_level("abc"), 1, tie_word_embeddings=False)
        state = {n: x for n, x in load(b).items() if n != "lm_head.weight"}
        save_file(state, b/"model.safetensors", {"format": "pt"})
        with pytest.raises(MergeError, match="has no 'lm_head.weight'.*\nEnd it with layers of"):
            load(f"{a}[0:1]|{b}[0:1]")
        merge([f"{a}[0:1]|{b}[0:1]|{a}[0:1]"], out=tmp_path/"o")
        assert torch.equal(load(tmp_path/"o")["lm_head.weight"], load(a)["lm_head.weight"])

    @pytest.mark.parametrize("what", ["wider", "with biases"])
    def test_layers_of_other_models(self, tmp_path, what):
        "No class opens them on top of each other; of one architecture and size they are opened."
        transformers = pytest.importorskip("transformers")
        size = {"vocab_size": 11, "intermediate_size": 8, "num_attention_heads": 2}
        for name, width, biases in (("a", 8, False), ("same", 8, False), ("other", 8, True)):
            wide = 16 if name == "other" and what == "wider" else width
            has_biases = biases and what == "with biases"
            config = transformers.LlamaConfig(
                hidden_size=wide, **size, num_hidden_layers=2, attention_bias=has_biases
            )
            transformers.LlamaForCausalLM(config).save_pretrained(tmp_path/name)
        for pair in (("a", "other"), ("other", "a")):
            one, two = (tmp_path/name for name in pair)
            with pytest.raises(MergeError, match="of layer 1 is .*\nTake all of its layers from"):
                load(f"{one}[0:1]|{two}[1:2]")
        merge([f"{tmp_path/'a'}[0:1]|{tmp_path/'same'}[1:2]"], out=tmp_path/"o")
        opened = transformers.AutoModelForCausalLM.from_pretrained
        _, info = opened(tmp_path/"o", output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]

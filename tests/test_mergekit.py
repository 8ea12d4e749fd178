"""Recipes of mergekit give what its documentation says, and are refused by name where they cannot.
That its own tensors come out is measured in bench/mergekit_recipes.py."""
import json

import pytest
import torch
from conftest import cli, save
from test_recipe_files import deep, digest, ran, written

from frechet_merge import MergeError
from frechet_merge.files.open import load
from frechet_merge.merging.lines import read_page
from frechet_merge.merging.mergekit import translated
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
    (PLAIN + "merge_method: ram", "line 3", "The nearest is ties"),
    (PLAIN + "merge_method: arcee_fusion", "line 1", "takes 1 models"),
    (PLAIN + "merge_method: tie", "line 3", "Did you mean 'ties'"),
    (PLAIN + "merge_method: ties", "line 1", "a has no weight, which ties needs"),
    (PLAIN + "merge_method: sce\nparameters: {select_top: 1}", "line 4", "'select_topk'"),
    (PLAIN + "merge_method: sce\nparameter: {}", "line 4", "Did you mean 'parameters'"),
    (PLAIN + "merge_method: slerp\nparameters: {t: 0.5}", "line 1", "takes 1 models"),
    (PLAIN + "merge_method: sce\ndtype: int8", "line 4", "int8"),
    (PLAIN + "merge_method: sce\nchat_template: chatml", "line 4", "write its text"),
    (PLAIN + "merge_method: sce\ntokenizer: {tokens: {}}", "line 4", "leave tokens out"),
    (PLAIN + "merge_method: model_stock\nparameters: {filter_wise: true}", "line 4", "leave it"),
    ("modules: {}\nmerge_method: linear", "line 1", "merge each"),
    ("models: [{model: a}]\nmerge_method: sce", "line 1", "needs a base_model"),
    ("merge_method: linear", "line 1", "either models or slices"),
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
    for source, is_read in (("model:a", "a"), ("base", "a"), ("union", "union")):
        text = f"{linear}tokenizer_source: {source}\nbase_model: a"
        assert translated(read_page(text)).recipe.tokenizer == is_read
    text = linear + 'chat_template: "{% for m in messages %}{{ m.content }}{% endfor %}"'
    assert translated(read_page(text)).recipe.chat_template.startswith("{% for")
    assert Recipe.from_data(recipe.as_data()) == recipe

"""A recipe file gives the bytes of the same merge; what it should not say is refused, with its
line, before anything is written."""
import hashlib
import json
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import cli, save

from frechet_merge import Euclidean, MergeError, Sphere, Span, merge
from frechet_merge.recipes.lines import read_page
from frechet_merge.merging.recipe import Recipe
from frechet_merge.recipes.written import asked_by, read_recipe, recipe_of, run_recipe


def deep(seed, layers=3):
    g = torch.Generator().manual_seed(seed)
    state = {"embed.weight": torch.randn(6, 4, generator=g)}
    for i in range(layers):
        state[f"h.{i}.attn.weight"] = torch.randn(4, 4, generator=g)
        state[f"h.{i}.mlp.weight"] = torch.randn(4, 4, generator=g)
    return state


@pytest.fixture
def folders(tmp_path):
    return [save(tmp_path/n, deep(i)) for i, n in enumerate("abc")]


def written(tmp_path, text):
    path = tmp_path/"recipe.yml"
    path.write_text(text)
    return path


def digest(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).digest() for f in folder.glob("*.safetensors")}


def ran(path, out):
    asked = read_recipe(path)
    return run_recipe(asked, replace(asked.output, folder=out))


ALL = """
models:
  - model: {a}
    weight: [{{filter: mlp, value: [0, 1]}}, {{value: 0.5}}]
  - {{model: {b}, weight: 1.0}}
base: {c}
geometry:
  - {{filter: attn, value: sphere}}
  - {{value: euclidean}}
scale: {{mlp: 0.5, "*": 1}}
dtype: fp16
"""


def test_a_recipe_does_what_it_says(tmp_path, folders):
    a, b, c = folders
    merged = ran(written(tmp_path, ALL.format(a=a, b=b, c=c)), tmp_path/"o")
    A, B, C = (deep(i) for i in range(3))

    def mean(name, w, g=Euclidean(), scale=1.0):
        one = {name: A[name]}, {name: B[name]}
        weights = [w, 1.0]
        found = merge(one, g, {name: C[name]}, weights, scale).tensors[name]
        return found.half()

    for name, w, g, scale in (
        ("h.0.attn.weight", 0.5, Span(Sphere()), 1.0),
        ("h.1.mlp.weight", 0.5, Euclidean(), 0.5),
        ("h.2.mlp.weight", 1.0, Euclidean(), 0.5),
        ("embed.weight", 0.5, Euclidean(), 1.0),
    ):
        assert torch.equal(merged.tensors[name], mean(name, w, g, scale)), name
    assert torch.equal(merged.tensors["h.0.mlp.weight"], mean("h.0.mlp.weight", 0.0, scale=0.5))


def test_what_is_written_is_a_recipe_of_the_same_bytes(tmp_path, folders):
    a, b, c = folders
    path = written(tmp_path, ALL.format(a=a, b=b, c=c))
    assert cli("run", path, "-o", tmp_path/"o")[0] == 0
    for i, again in enumerate((tmp_path/"o", tmp_path/"o"/"frechet_merge.json")):
        code, out, err = cli("run", again, "-o", tmp_path/f"o{i}")
        assert code == 0, err
        assert digest(tmp_path/f"o{i}") == digest(tmp_path/"o")
    # the same words as JSON, which is YAML
    held = json.loads((tmp_path/"o"/"frechet_merge.json").read_text())
    said = {**held["recipe"], "dtype": held["dtype"]}
    ran(written(tmp_path, yaml.safe_dump(said, sort_keys=False)), tmp_path/"yaml")
    assert digest(tmp_path/"yaml") == digest(tmp_path/"o")


def test_geometry_by_name_is_each_geometry(folders):
    merged = merge(folders[:2], {"attn": "sphere", "mlp": Euclidean()}).tensors
    flat, round_ = merge(folders[:2]).tensors, merge(folders[:2], "sphere").tensors
    for name in flat:
        assert torch.equal(merged[name], (round_ if "attn" in name else flat)[name])
        assert not torch.equal(flat[name], round_[name])


def test_models_revisions_and_adapters_are_names(tmp_path):
    text = "models: [{model: org/a@v1.0}, 'b+adapter']\nweights: [1e-1, 2]"
    recipe, _ = recipe_of(read_page(text))
    assert recipe.models == ["org/a@v1.0", "b+adapter"] and recipe.weights == [0.1, 2.0]
    assert Recipe.from_data(json.loads(json.dumps(recipe.as_data()))) == recipe


GOOD = "models: [{a}, {b}]\n"
BAD = [
    ("wieghts: [1, 2]", 2, "Did you mean 'weights'"),
    ("weights: [1, much]", 2, "weights[1]: 'much' is no number"),
    ("weights: [1, true]", 2, "True is no number"),
    ("weights: 1", 2, "one number per model"),
    ("weights: [1]", 2, "1 weights [1.0] for 2 models"),
    ("scale:\n  - {filter: mpl, value: 1}\n  - {value: 2}\nbase: {a}", 3, "nearest name is 'mlp'"),
    ("scale: {mpl: 1}\nbase: {a}", 2, "nearest name is 'mlp'"),
    ("scale: [{filter: mlp, value: 1}]\nbase: {a}", 2, "no rule gives tensor 'embed.weight'"),
    ("scale: [{fliter: mlp, value: 1}]", 2, "Did you mean 'filter'"),
    ("scale: [{filter: mlp}]", 2, "no value"),
    ("geometry: spheer", 2, "Did you mean 'sphere'"),
    ("geometry: {name: curved, dampin: 1}", 2, "Did you mean 'damping'"),
    ("geometry: {name: curved, damping: -1}", 2, "damping=-1"),
    ("geometry: [{filter: atn, value: sphere}]", 2, "nearest name is 'attn'"),
    ("any_base: 1", 2, "true or false"),
    ("drop: [heads]", 2, "no model has a tensor"),
    ("dtype: f32", 2, "f32"),
    ("dtype: fp32\nout_dtype: bf16", 3, "Give one of them"),
    ("shard_size: 5 gallons", 2, "is not a size"),
    ("pad_to_multiple_of: 0", 2, "whole number"),
    ("models: [{a}]", 2, "given twice"),
    ("base_model: x", 2, "It is base"),
    ("calibrate: {dta: x}", 2, "Did you mean 'data'"),
    ("loss: hubr", 2, "hubr"),
    ("scale: [1", 2, "cannot be read as YAML"),
    ("---\nmodels: [a]", 3, "second recipe has no name"),
    ("scale: 1\ndtype: \x08fp32", 3, "special characters are not allowed"),
    ("? !!set {x: null}\n: 1", 2, "is no name"),
]


@pytest.mark.parametrize("text, line, said", BAD, ids=[x[0][:30] for x in BAD])
def test_what_a_recipe_should_not_say(tmp_path, folders, text, line, said):
    a, b, _ = folders
    whole = (GOOD + text).replace("{a}", str(a)).replace("{b}", str(b))
    path = written(tmp_path, whole)
    with pytest.raises(MergeError) as e:
        ran(path, tmp_path/"o")
    message = str(e.value)
    assert said in message and f"{path}, line {line}" in message, message
    assert len(message.splitlines()) <= 3 and not (tmp_path/"o").exists()


def test_the_command_line_says_it_and_writes_nothing(tmp_path, folders):
    path = written(tmp_path, f"models: [{folders[0]}, {folders[1]}]\nscales: 2\n")
    code, out, err = cli("run", path, "-o", tmp_path/"o")
    assert code == 1 and out == "" and not (tmp_path/"o").exists()
    assert err.splitlines() == [
        f"error: {path}, line 2: a recipe has no field 'scales'.",
        "Did you mean 'scale'?",
    ]
    code, _, err = cli("run", written(tmp_path, f"models: [{folders[0]}]"))
    assert code == 2 and "-o OUT" in err
    code, _, err = cli("run", tmp_path)
    assert code == 1 and "is a folder without frechet_merge.json" in err
    assert "models are merged by frechet-merge merge" in err
    assert cli("merge", folders[0], folders[1], "-o", tmp_path/"o")[0] == 0


@pytest.mark.parametrize(
    "entry, said",
    [
        ("{weight: 1}", "names no model"),
        ("{model: x, wieght: 1}", "Did you mean 'weight'"),
        ("{model: x, parameters: {weight: 1}}", "Its weight stands beside it"),
        ("3", "must be a text"),
    ],
)
def test_entries_of_models(entry, said):
    with pytest.raises(MergeError, match=said):
        recipe_of(read_page(f"models: [{entry}]"))


def test_a_weight_of_one_model_asks_for_the_others():
    with pytest.raises(MergeError, match="has no weight, and other models have one"):
        recipe_of(read_page("models: [{model: a, weight: 1}, b]"))
    with pytest.raises(MergeError, match="give it in one place"):
        recipe_of(read_page("models: [{model: a, weight: 1}]\nweights: [1]"))


def test_a_short_file_is_no_huge_one():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for i in range(1, 9):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}']*10)}]")
    with pytest.raises(MergeError, match="more than"):
        read_page("\n".join(lines))


def test_a_recipe_of_mergekit_with_nothing_beside_the_base(folders):
    text = f"merge_method: ties\nbase_model: {folders[0]}\nmodels: [{{model: {folders[0]}}}]"
    with pytest.raises(MergeError, match="at least 1 models beside the base, not 0"):
        asked_by(read_page(text))


class TestPasted:
    "Recipes are read in model cards, and pasted with what stands around them."

    def card(self, *texts, mark="```", word="yaml"):
        blocks = [f"{mark}{word}\n{text}{mark}\n" for text in texts]
        return "---\ntags: [merge]\nmodels: [x]\n---\n# M\n\nBy:\n\n" + "\nand\n".join(blocks)

    @pytest.mark.parametrize(
        "mark, word", [("```", "yaml"), ("~~~~", "YAML"), ("```", ""), ("```", "yml")]
    )
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_the_recipe_in_a_card(self, tmp_path, folders, mark, word, end):
        text = f"models: [{folders[0]}, {folders[1]}]\nweights: [1, 3]\n"
        path = tmp_path/"README.md"
        path.write_bytes(self.card(text, mark=mark, word=word).replace("\n", end).encode())
        want = merge(folders[:2], weights=[1, 3]).tensors
        found = ran(path, tmp_path/"out").tensors
        assert all(torch.equal(found[n], x) for n, x in want.items())

    def test_lines_are_those_of_the_card(self, tmp_path):
        path = tmp_path/"README.md"
        path.write_text(self.card("models: [a, b]\nwieghts: [1, 2]\n"))
        with pytest.raises(MergeError, match=r"README.md, line 11: .*'wieghts'"):
            read_recipe(path)

    def test_a_block_alone_that_was_pasted_with_its_fences(self, tmp_path, folders):
        path = written(tmp_path, f"\n```yaml\nmodels: [{folders[0]}, {folders[1]}]\n```\n")
        assert len(read_recipe(path).recipe.models) == 2

    def test_our_own_card_gives_the_same_bytes(self, tmp_path, folders):
        by_name = [str(f) for f in folders[:2]]
        merge(by_name, weights=[1, 3], out=tmp_path/"one", dtype="bf16")
        code, _, err = cli("run", "one/README.md", "two", cwd=tmp_path)
        assert code == 0, err
        assert digest(tmp_path/"one") == digest(tmp_path/"two")

    def test_which_of_several_is_for_the_user_to_say(self, tmp_path, folders):
        path, one = tmp_path/"README.md", f"models: [{folders[0]}, {folders[1]}]\n"
        path.write_text(self.card(one, one + "weights: [1, 3]\n"))
        with pytest.raises(MergeError, match="(?s)holds 2 recipes, the second at line 15.*Save"):
            read_recipe(path)
        assert read_recipe(written(tmp_path, one)).recipe.weights is None
        path.write_text(self.card("a: 1\n"))
        with pytest.raises(MergeError, match="holds no recipe"):
            read_recipe(path)
        path.write_text("```python\nmodels: [a, b]\n```\n```\nnot closed\nmodels: [a]\n")
        with pytest.raises(MergeError, match="holds no recipe"):
            read_recipe(path)

    def test_what_mergekit_wrote_is_made_again(self, tmp_path, folders):
        out = tmp_path/"old"
        out.mkdir()
        (out/"mergekit_config.yml").write_text(
            f"merge_method: linear\nmodels:\n- model: {folders[0]}\n- model: {folders[1]}\n"
            "parameters: {weight: 0.5}\n"
        )
        want = merge(folders[:2]).tensors
        found = ran(out, tmp_path/"new").tensors
        assert all(torch.equal(found[n], x) for n, x in want.items())

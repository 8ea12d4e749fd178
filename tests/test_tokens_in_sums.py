"""Differences from a base over vocabularies that differ: each row as mergekit fills it in.

The oracle is written out token by token in float64, with the formulas of the methods; that mergekit
gives the same is measured in `bench/mergekit_recipes.py`.
"""
import warnings

import pytest
import torch
from conftest import cli
from safetensors.torch import load_file
from test_trimmed import by_hand
from test_vocabularies import EMBEDDING, WORDS, config, speaker, states
from transformers import AutoTokenizer

from frechet_merge import merge

TABLES = (EMBEDDING, "lm_head.weight")
# what each adds to the words: <o> is of the base, <x> of two models, <y> and <z> of one
ADDED = {"base": ["<o>"], "a": ["<o>", "<x>"], "b": ["<y>", "<x>"], "c": ["<z>", "<o>"]}


@pytest.fixture
def four(tmp_path):
    "A base and three models, in folders."
    return [speaker(tmp_path/n, i, WORDS, more) for i, (n, more) in enumerate(ADDED.items())]


def vocabulary(folder):
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def filled(folders, name, tokens):
    "A table of base and models over tokens: a row that one lacks is the base's, or else a mean."
    known = [vocabulary(f) for f in folders]
    tables = [load_file(f/"model.safetensors")[name].double() for f in folders]
    found = [torch.zeros(len(tokens), tables[0].shape[1]).double() for _ in folders]
    for i, token in enumerate(tokens):
        rows = [t[v[token]] if token in v else None for t, v in zip(tables, known)]
        theirs = [r for r in rows[1:] if r is not None]
        own = rows[0] if rows[0] is not None else sum(theirs)/len(theirs)
        for x, row in zip(found, rows):
            x[i] = own if row is None else row
    return found


def check(out, folders, merged, even=()):
    "Both tables of a result are what `merged` makes of base and differences, token by token."
    numbers = vocabulary(out)
    tokens = sorted(numbers, key=numbers.__getitem__)
    assert [numbers[t] for t in tokens] == [*range(len(tokens))]
    (state,) = states(out)
    for name in TABLES:
        base, *models = filled(folders, name, tokens)
        for i in (tokens.index(t) for t in even):
            for x in models:
                x[i] = base[i]
        want = merged(base, [x - base for x in models])
        torch.testing.assert_close(state[name][: len(tokens)].double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("whose", ["union", "base", "a", "b"])
def test_a_sum(four, tmp_path, whose):
    "A model adds nothing to a row that it lacks; a row of one model alone is that model's."
    base, *models = four
    choice = whose if whose in ("union", "base") else str(tmp_path/whose)
    with pytest.warns(UserWarning, match="the base's, or else the mean of those that have it"):
        merge(models, base=base, sum=[0.7, 0.4, -0.3], tokenizer=choice, out=tmp_path/"o")
    check(tmp_path/"o", four, lambda z, ds: z + 0.7*ds[0] + 0.4*ds[1] - 0.3*ds[2])
    if whose == "union":
        (m,), numbers = states(tmp_path/"o"), vocabulary(tmp_path/"o")
        (c,), own = states(four[3]), vocabulary(four[3])
        for name in TABLES:
            assert torch.equal(m[name][numbers["<z>"]], c[name][own["<z>"]])


def test_a_sum_with_a_scale_and_fewer_rows(four, tmp_path):
    base, *models = four
    merge(models, base=base, sum=[1, 1, 1], scale=0.5, tokenizer="base", out=tmp_path/"o")
    assert config(tmp_path/"o")["vocab_size"] == config(base)["vocab_size"]
    check(tmp_path/"o", four, lambda z, ds: z + 0.5*sum(ds))


@pytest.mark.parametrize("weights", [[0.7, 0.4, 0.3], [1, 1, 1], [2, 2, 1]])
def test_ties(four, tmp_path, weights):
    "What two models of one weight know, and the base does not, is their mean: no sign wins."
    base, *models = four
    is_even = weights[0] == weights[1]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merge(
            models,
            "ties:density=0.5",
            base=base,
            weights=weights,
            tokenizer="union",
            out=tmp_path/"o",
        )
    texts = [str(w.message) for w in said if "lacks 1 tokens that several" in str(w.message)]
    assert len(texts) == is_even
    check(
        tmp_path/"o",
        four,
        lambda z, ds: z + by_hand(ds, weights, 0.5, 1),
        ["<x>"] if is_even else [],
    )


def test_a_row_given_by_hand_is_a_difference(four, tmp_path):
    "With the base's row given, those who have the token differ from it, and vote."
    base, a, b, c = four
    given = {"<x>": {"model": "base", "token": "w3"}}
    how = {"base": base, "tokenizer": "union", "tokens": given}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*several models of one weight")
        merge([a, b, c], "ties:density=1", weights=[1, 1, 1], out=tmp_path/"o", **how)
    (m,), numbers = states(tmp_path/"o"), vocabulary(tmp_path/"o")
    every, known = states(*four), [vocabulary(f) for f in four]
    for name in TABLES:
        own = every[0][name][known[0]["w3"]].double()
        has = [x[name][v["<x>"]].double() - own for x, v in zip(every[1:3], known[1:3])]
        want = own + by_hand([*has, 0*own], [1, 1, 1], 1, 1)
        torch.testing.assert_close(m[name][numbers["<x>"]].double(), want, atol=1e-6, rtol=1e-6)


def test_a_direction_of_differences(four, tmp_path):
    "nuslerp with a base: whoever lacks a row has not turned away from the base's."
    base, a, b, _ = four
    merge([a, b], "slerp", base=base, weights=[0.7, 0.4], tokenizer="union", out=tmp_path/"o")

    def turned(z, ds):
        x, y = ds
        t = 0.4/1.1
        angle = torch.acos((x*y).sum()/(x.norm()*y.norm()))
        ways = torch.sin((1 - t)*angle), torch.sin(t*angle)
        return z + (ways[0]*x + ways[1]*y)/torch.sin(angle)

    check(tmp_path/"o", [base, a, b], turned)


def test_a_mean_leaves_out_who_lacks_a_row(four, tmp_path):
    "A base does not change a mean: the same rows with one and without."
    base, *models = four
    for out, given in (("with", {"base": base}), ("without", {})):
        merge(models, weights=[5, 1, 3], tokenizer=str(four[3]), out=tmp_path/out, **given)
    one, two = states(tmp_path/"with", tmp_path/"without")
    for name in TABLES:
        torch.testing.assert_close(one[name], two[name])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "model_stock"])
def test_a_recipe_of_mergekit(four, tmp_path, method):
    "From the command line, as it stands."
    base, *models = four
    lines = [f"  - {{model: {f}, parameters: {{weight: 0.5, density: 0.8}}}}" for f in models]
    text = "\n".join([
        "models:",
        *lines,
        f"base_model: {base}",
        f"merge_method: {method}",
        "tokenizer_source: union",
        "dtype: float32",
    ])
    (tmp_path/"r.yml").write_text(text)
    code, _, err = cli("run", "r.yml", "-o", "o", cwd=tmp_path)
    assert code == 0, err
    (m,), numbers = states(tmp_path/"o"), vocabulary(tmp_path/"o")
    (c,), own = states(four[3]), vocabulary(four[3])
    torch.testing.assert_close(m[EMBEDDING][numbers["<z>"]], c[EMBEDDING][own["<z>"]])

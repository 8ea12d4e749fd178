"""What other programs take in silence, or answer with pages: here each is exit code 1, at most
three lines that name it, and nothing written."""

import os

import pytest
import torch
from conftest import cli, save, tensors

OURS = "models: [m0, m1]\n"
THEIRS = (
    "merge_method: linear\nmodels:\n- {model: m0, parameters: {weight: 1}}\n"
    "- {model: m1, parameters: {weight: 1}}\n"
)


def with_nan():
    found = tensors(1)
    found["q.weight"][2, 3] = torch.nan
    return found


def without_one():
    return {k: v for k, v in tensors(1).items() if k != "q.bias"}


CASES = {
    "one NaN in one input": (OURS, with_nan, "q.weight|NaN"),
    "one NaN, under a Karcher mean": (OURS + "geometry: sphere\n", with_nan, "q.weight|NaN"),
    "weights that sum to 0": (OURS + "weights: [0, 0]\n", None, "weights|sum to zero"),
    "weights that sum to 0, in mergekit's words": (
        THEIRS.replace("weight: 1", "weight: 0"), None, "zero",
    ),
    "a tensor that only one model has": (OURS, without_one, "q.bias|m1"),
    "an unknown key": (OURS + "mode: fast\n", None, "line 2|no field 'mode'"),
    "an unknown key, in mergekit's words": (THEIRS + "mode: fast\n", None, "no field 'mode'"),
    "a filter that matches nothing": (
        OURS + "scale: 1\nbase: m0\nweights: {'nothing.*': [1, 0]}\n", None, "nothing.*",
    ),
    "a filter that matches nothing, in mergekit's words": (
        THEIRS.replace("weight: 1}}\n", "weight: [{filter: mpl, value: 1}, {value: 2}]}}\n", 1),
        None,
        "mpl",
    ),
    "one NaN in one input, in mergekit's words": (
        THEIRS.replace("linear", "karcher").replace("weight: 1", ""), with_nan, "q.weight|NaN",
    ),
    "a tensor that only one model has, in mergekit's words": (THEIRS, without_one, "q.bias|m1"),
    "a misspelled weight": (
        THEIRS.replace("weight: 1", "wieght: 1", 1), None, "line 3|'wieght'|weight",
    ),
    "too few weights": (OURS + "weights: [1]\n", None, "1 weights|2 models"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_three_lines(tmp_path, case):
    text, second, says = CASES[case]
    config = {"model_type": "toy", "vocab_size": 11}
    save(tmp_path/"m0", tensors(0), config)
    save(tmp_path/"m1", tensors(1) if second is None else second(), config)
    (tmp_path/"r.yaml").write_text(text)
    before = sorted(os.listdir(tmp_path))
    code, _, err = cli("run", "r.yaml", "-o", "out", cwd=tmp_path)
    assert code == 1 and len(err.strip().splitlines()) <= 3, err
    assert all(word.lower() in err.lower() for word in says.split("|")), err
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_is_not_whole(tmp_path, damage):
    config = {"model_type": "toy", "vocab_size": 11}
    save(tmp_path/"m0", tensors(0), config)
    file = save(tmp_path/"m1", tensors(1), config)/"model.safetensors"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 5)
    else:
        file.unlink()
    code, _, err = cli("merge", "m0", "m1", "-o", "out", cwd=tmp_path)
    assert code == 1 and len(err.strip().splitlines()) <= 3 and "m1" in err, err
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize(
    "words, second, says",
    [
        ("", with_nan, "q.weight|NaN"),
        ("--geometry sphere", with_nan, "q.weight|NaN"),
        ("--weights 0,0", None, "sum to zero"),
        ("--weights 1", None, "1 weights|2 models"),
        ("--weights mpl=1,0 --weights 1,1", None, "mpl"),
        ("", without_one, "q.bias|m1"),
    ],
)
def test_it_is_refused_on_the_command_line_too(tmp_path, words, second, says):
    config = {"model_type": "toy", "vocab_size": 11}
    save(tmp_path/"m0", tensors(0), config)
    save(tmp_path/"m1", tensors(1) if second is None else second(), config)
    code, _, err = cli("merge", "m0", "m1", *words.split(), "-o", "out", cwd=tmp_path)
    assert code == 1 and len(err.strip().splitlines()) <= 3, err
    assert all(word.lower() in err.lower() for word in says.split("|")), err
    assert sorted(os.listdir(tmp_path)) == ["m0", "m1"]


def test_a_word_that_is_misspelled_is_wrong_usage(tmp_path):
    for name in ("m0", "m1"):
        save(tmp_path/name, tensors(0), {"model_type": "toy", "vocab_size": 11})
    words = ("--geometry", "sphere:wieghts=1", "-o", "out")
    code, _, err = cli("merge", "m0", "m1", *words, cwd=tmp_path)
    assert code == 2 and len(err.strip().splitlines()) <= 3 and "has no 'wieghts'" in err, err
    assert sorted(os.listdir(tmp_path)) == ["m0", "m1"]

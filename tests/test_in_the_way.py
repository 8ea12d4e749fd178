"""`inspect` says what models say of themselves, and names what is in the way of a merge with a
command that goes through: it is run here, on the models that were in the way."""

import json
import os
import shlex

import pytest
import torch
from conftest import cli, save
from test_suggest import adapter

from frechet_merge.diagnostics.inspection import inspect
from frechet_merge.diagnostics.mending import options_in, what_is_in_the_way
from frechet_merge.diagnostics.overview import BEGINNING, licence_in
from frechet_merge.merging.said import head_of


def toy(**more):
    g = torch.Generator().manual_seed(0)
    return {"q.weight": torch.randn(4, 4, generator=g), "ids": torch.arange(3)} | more


def missing(tmp_path):
    return [save(tmp_path/"a", toy()), save(tmp_path/"b", toy(**{"more.weight": torch.ones(2)}))]


def integers(tmp_path):
    return [save(tmp_path/"a", toy()), save(tmp_path/"b", toy(ids=torch.arange(3) + 1))]


def broken(tmp_path):
    bad = toy(**{"q.weight": torch.full((4, 4), torch.nan)})
    return [save(tmp_path/"a", toy()), save(tmp_path/"b", bad)]


def several(tmp_path):
    odd = toy(ids=torch.arange(3) + 1, **{"more.weight": torch.ones(2)})
    odd["q.weight"][0, 0] = torch.inf
    return [save(tmp_path/"a", toy()), save(tmp_path/"b", odd)]


def other_bases(tmp_path):
    folders = [adapter(tmp_path/n, i) for i, n in enumerate("ab")]
    config = folders[1]/"adapter_config.json"
    held = json.loads(config.read_text()) | {"base_model_name_or_path": "another"}
    config.write_text(json.dumps(held))
    return folders


@pytest.mark.parametrize(
    "situation, options",
    [
        (missing, ["--drop 'more.*'"]),
        (integers, ["--drop ids"]),
        (broken, ["--allow-nonfinite"]),
        (several, ["--allow-nonfinite", "--drop 'more.*'", "--drop ids"]),
        (other_bases, ["--any-base"]),
    ],
)
def test_what_is_in_the_way_is_mended_by_what_is_named(tmp_path, situation, options):
    models = situation(tmp_path)
    if situation is other_bases:
        found = what_is_in_the_way(models)
    else:
        code, out, _ = cli("inspect", *models, "--json")
        held = json.loads(out)
        assert code == 1 and not held["mergeable"]
        assert all(r["what"] and r["remedy"] for r in held["refusals"])
        found = inspect(models)
        assert held["command"] == found.command
        _, out, _ = cli("inspect", *models)
        assert out.count("in the way: ") == len(options) and f"goes through: {found.command}" in out
    assert sorted(r.option for r in found.refusals) == sorted(options)
    _, *words = shlex.split(found.command)
    words[words.index("OUT")] = str(tmp_path/"out")
    code, _, err = cli(*words)
    assert code == 0, err
    code, _, _ = cli("merge", *models, "-o", tmp_path/"none")
    assert code == 1, "without it there is no merge"


def test_what_nothing_mends_is_named_and_has_no_command(tmp_path):
    a, b = save(tmp_path/"a", toy()), save(tmp_path/"b", toy(**{"q.weight": torch.ones(5, 4)}))
    found = inspect([a, b])
    (refusal,) = found.refusals
    assert "q.weight" in refusal.what and not refusal.option and not found.command
    assert not found.mergeable


def test_nothing_is_in_the_way_of_what_can_be_merged(tmp_path):
    found = inspect([save(tmp_path/n, toy()) for n in "ab"])
    assert found.mergeable and not found.refusals and not found.command


@pytest.mark.parametrize(
    "card, said",
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit\n---\n", None),
        ("---\n- mit\n---\n", None),
        ("# a card\nlicense: mit\n", None),
        ("---\nlicense: !!python/object:os.system x\n---\n", None),
        ("---\nlicense: mit\x1b[31m\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_that_of_the_card(tmp_path, card, said):
    (tmp_path/"README.md").write_bytes(card.encode())
    assert licence_in(tmp_path) == said
    (tmp_path/"LICENSE").write_text("\n  Apache License\n Version 2.0\n")
    assert licence_in(tmp_path) == (said or "Apache License")


def test_only_the_beginning_of_a_card_is_read(tmp_path):
    with (tmp_path/"README.md").open("wb") as f:
        f.write(b"---\nlicense: mit\n---\n")
        f.truncate(1 << 33)
    assert licence_in(tmp_path) == "mit"
    (tmp_path/"README.md").write_text("---\n" + "#"*BEGINNING + "\nlicense: mit\n---\n")
    assert licence_in(tmp_path) is None


@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_a_pipe_says_nothing_and_nobody_waits_for_it(tmp_path, name):
    os.mkfifo(tmp_path/name)
    assert licence_in(tmp_path) is None


def test_what_they_say_of_themselves_is_told(tmp_path):
    config = {"model_type": "toy", "vocab_size": 11}
    a, b = (save(tmp_path/n, toy(), config) for n in "ab")
    (a/"README.md").write_text("---\nlicense: mit\n---\n")
    (b/"README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    code, out, _ = cli("inspect", a, b)
    assert code == 0 and "licences differ" in out and "gpl-3.0" in out
    _, out, _ = cli("inspect", a, b, "--json")
    first, second = json.loads(out)["said"]
    assert (first["kind"], first["tokens"], first["licence"]) == ("toy", 11, "mit")
    assert second["names"] == "as the first" and second["stored"] == "float32 int64"
    (b/"README.md").unlink()
    _, out, _ = cli("inspect", a, b)
    assert f"no licence found: {b}" in " ".join(out.split("\n"))


def test_options_are_read_as_they_are_typed():
    said = "Leave out (drop='a.*', --drop 'a.*'), --absent=zero, or --any-base; --help says more."
    assert options_in(said) == [("--drop", "a.*"), ("--absent", "zero"), ("--any-base", "")]
    assert head_of("---\na: 1\n---") == {"a": 1}

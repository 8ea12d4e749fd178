"""`inspect` says what a merge would do with tokens, and the command that it names does it."""
import json
import shlex

import pytest
from conftest import cli
from spoken import byte_fallback, byte_level, opened, talker, with_tokens
from test_vocabularies import WORDS, check_rows, config, model

from frechet_merge.diagnostics.inspection import inspect


@pytest.fixture
def two(tmp_path):
    for i, name in enumerate("ab"):
        t = with_tokens(byte_level("abcd", 280), ["<|s|>", f"<|{name}|>"])
        t.chat_template = f"{{{{ messages }}}}{name}"
        if i:
            t.eos_token = "<|b|>"
        talker(tmp_path/name, t, i, rows=288 if i else None)
    return tmp_path


def test_what_is_shared_lacking_and_otherwise(two):
    found = inspect([two/"a", two/"b"]).tokens
    a, b = str(two/"a"), str(two/"b")
    known = [opened(f).get_vocab() for f in (a, b)]
    assert found.shared == len(known[0].keys() & known[1].keys()) == 281
    assert found.union == 283
    assert found.tokens == {a: 282, b: 282} and found.rows == {a: 282, b: 288}
    assert found.lacks == {a: ["<|b|>"], b: ["<|a|>"]}
    assert found.contradictions == [f"number 281 is '<|a|>' in {a} and '<|b|>' in {b}"]
    assert found.special == {"eos_token": {a: "<|endoftext|>", b: "<|b|>"}}
    assert found.templates == {a: a, b: b}


def test_the_command_merges_them(two):
    code, out, said = cli("inspect", "a", "b", "--json", cwd=two)
    held = json.loads(out)
    assert held["refused"] and held["tokens"]["choices"].keys() == {"union", "a", "b"}
    words = shlex.split(held["tokens"]["command"].replace("OUT", "o"))
    code, _, said = cli(*words[1:], cwd=two)
    assert code == 0, said
    check_rows(two/"o", [two/"a", two/"b"], [1, 1])
    assert config(two/"o")["vocab_size"] >= held["tokens"]["union"]
    _, out, _ = cli("inspect", "a", "b", cwd=two)
    assert "merge them with: frechet-merge merge a b" in " ".join(out.split())


def test_two_kinds_have_no_union(tmp_path):
    talker(tmp_path/"a", byte_level("abcd", 280), 0)
    talker(tmp_path/"b", byte_fallback("abcd", 300), 1)
    _, out, _ = cli("inspect", "a", "b", "--json", cwd=tmp_path)
    found = json.loads(out)["tokens"]
    assert found["choices"].keys() == {"a", "b"}
    words = shlex.split(found["command"].replace("OUT", "o"))
    code, _, said = cli(*words[1:], cwd=tmp_path)
    assert code == 0, said


def test_with_a_base(tmp_path):
    model(tmp_path/"base", 0, WORDS)
    for i, name in enumerate("ab"):
        model(tmp_path/name, i, [*WORDS[::-1], f"<{name}>"])
    found = inspect([str(tmp_path/"a"), str(tmp_path/"b")], base=str(tmp_path/"base")).tokens
    assert found.choices.keys() == {"union", "base", str(tmp_path/"a"), str(tmp_path/"b")}
    assert f"--base {tmp_path/'base'}" in found.command


def test_nothing_is_said_of_one_vocabulary(tmp_path):
    models = [model(tmp_path/name, i, WORDS) for i, name in enumerate("ab")]
    assert inspect(models).tokens is None

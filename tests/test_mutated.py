"""Whatever is changed in what a command reads, it does its work or says in three lines what is in
the way: no traceback, no hang, no memory by a lying header, nothing read elsewhere, nothing left.
"""

import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutated import TARGETS, build, mutate, run, warm, wrong_with

EXAMPLES = 25  # of each command


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "What each command reads, unchanged."
    warm()
    found = {}
    for name, target in TARGETS.items():
        found[name] = tmp_path_factory.mktemp(name)
        build(found[name], target)
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_unchanged_is_done(whole, name, tmp_path):
    folder = shutil.copytree(whole[name], tmp_path/"all")
    heard = run(TARGETS[name].words, folder)
    assert (heard.code, wrong_with(heard, folder)) == (0, ""), heard


@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(rng=st.randoms(use_true_random=False))
def test_changed_is_done_or_refused(whole, name, rng):
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as tmp:
        folder = shutil.copytree(whole[name], Path(tmp)/"all")
        changed = mutate(folder/rng.choice(target.changed), rng)
        heard = run(target.words, folder)
        assert not (wrong := wrong_with(heard, folder)), f"{changed}: {wrong}\n{heard.text}"


def leads_elsewhere(folder):
    (elsewhere := folder.parent/"elsewhere.json").write_text("{}")
    # no model knows the tokens of all, and so a tokenizer is made
    tokens = folder/"a"/"tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"t5"', '"other"'))
    file = folder/"a"/"special_tokens_map.json"
    file.unlink(missing_ok=True)
    file.symlink_to(elsewhere)


def asks_for_too_much(folder):
    file = folder/"r"/"recipe.yaml"
    file.write_text(re.sub("scale: .*", "scale: 1.0e+308", file.read_text()))


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("union", leads_elsewhere, "special_tokens_map.json: is a link that leads out"),
        ("recipe", asks_for_too_much, "no 32-bit number is as large"),
    ],
)
def test_what_was_wrong_once(whole, name, change, says, tmp_path):
    folder = shutil.copytree(whole[name], tmp_path/"all")
    change(folder)
    heard = run(TARGETS[name].words, folder)
    assert (heard.code, wrong_with(heard, folder)) == (1, "") and says in heard.text, heard

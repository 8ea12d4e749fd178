"""Recipes of models on the hub, by their ids: which file is run, and that no more is fetched. And
what a card or a model of the hub may not say, with what whoever runs it can do about it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, cli, save, tensors
from hub import TOKEN, files_in, running
from test_hub import CONFIG, model
from test_pushing import hf

from frechet_merge import MergeError
from frechet_merge.recipes.written import read_recipe
from frechet_merge.recipes.strangers import id_in

WEIGHTS = "model.safetensors"
OURS = "models: [{model: org/a, weight: 0.3}, {model: org/b, weight: 0.7}]\nbase: org/a\n"
MERGEKIT = """merge_method: linear
models: [{model: org/a, parameters: {weight: 0.3}}, {model: org/b, parameters: {weight: 0.7}}]
"""
SEVERAL = f"name: first\n{OURS}---\nmodels: [first, org/b]\n"


def card(recipe):
    return f"---\nlicense: mit\n---\n# A merge\n\n```yaml\n{recipe}```\n"


# what lies in a repository → the recipe that is run
LAID = {
    "recipes.yml": {"recipes.yml": SEVERAL, "README.md": card(MERGEKIT)},
    "mergekit_config.yml": {"mergekit_config.yml": MERGEKIT, "README.md": card(OURS)},
    "README.md": {"README.md": card(OURS), "other.yml": "models: [org/x]"},
}


@pytest.fixture
def hub(tmp_path):
    with running() as found:
        for i, name in enumerate(("org/a", "org/b")):
            found.put(name, model(tmp_path, i))
        yield found


def ran(hub, tmp_path, *words, home="home", **how):
    "`run` in a folder of its own: exit code, output, errors, and what it wrote."
    env = hub.env(tmp_path/home, TOKEN, **how)
    shutil.rmtree(tmp_path/"OUT", ignore_errors=True)
    code, out, err = cli("run", *words, "-o", tmp_path/"OUT", "-q", cwd=tmp_path, env=env)
    held = tmp_path/"OUT"/WEIGHTS
    return code, out, err, held.read_bytes() if held.exists() else None


def of_repo(hub, name):
    "Which files of a model were fetched."
    got = [path for how, path in hub.asked if how == "GET"]
    found = [re.fullmatch(rf"/{name}/resolve/[^/]+/(.+)", path) for path in got]
    return {m[1] for m in found if m}


def laid(hub, files, name="org/m", branch="main"):
    "A model whose weights nobody should fetch, and these files beside them."
    held = {k: v.encode() for k, v in files.items()}
    return hub.put(name, {**held, WEIGHTS: b"weights", "tokenizer.json": b"{}"}, branch)


@pytest.mark.parametrize(
    "name, file", [*zip(("org/m", "org/m@main", "hf://org/m@main"), LAID, strict=True)]
)
def test_a_recipe_is_run_by_the_id_of_its_model(tmp_path, hub, name, file):
    laid(hub, LAID[file])
    (tmp_path/"here").mkdir()
    for path, text in LAID[file].items():
        (tmp_path/"here"/path).write_text(text)
    code, _, err, by_id = ran(hub, tmp_path, name)
    assert code == 0, err
    assert of_repo(hub, "org/m") <= LAID[file].keys() and file in of_repo(hub, "org/m")
    code, _, err, by_folder = ran(hub, tmp_path, "here")
    assert code == 0 and by_id == by_folder is not None, err


def test_what_was_pushed_is_made_again_by_its_id(tmp_path, hub):
    (tmp_path/"r.yml").write_text(OURS)
    assert ran(hub, tmp_path, "r.yml", "--push", "merged", "--yes")[0] == 0
    first = (tmp_path/"OUT"/WEIGHTS).read_bytes()
    # the branches go on
    for i, name in enumerate(("org/a", "org/b")):
        hub.put(name, model(tmp_path, 5 + i))
    code, _, err, again = ran(hub, tmp_path, "me/merged", home="other")
    assert code == 0 and again == first, err
    assert of_repo(hub, "me/merged") == {"frechet_merge.json", "README.md"}
    code, out, err, _ = ran(hub, tmp_path, "me/merged", "--dry-run")
    assert code == 0 and "of 2, weights 0.3,0.7" in out, err


def test_a_revision_is_the_recipe_of_then(tmp_path, hub):
    old = laid(hub, {"README.md": card(OURS)}, branch="v1")
    laid(hub, {"README.md": card(OURS.replace("0.3", "0.9"))})
    names = "org/m", "org/m@v1", f"hf://org/m@{old}"
    now, then, also = (ran(hub, tmp_path, name)[3] for name in names)
    assert None is not then == also != now


def test_offline_the_cache_is_read(tmp_path, hub):
    laid(hub, LAID["README.md"])
    first = ran(hub, tmp_path, "org/m")
    assert first[0] == 0
    asked = [*hub.asked]
    again = ran(hub, tmp_path, "org/m", offline=True)
    assert again[0] == 0 and again[3] == first[3] and hub.asked == asked, again[2]
    code, _, err, _ = ran(hub, tmp_path, "org/other", offline=True)
    assert code == 1 and "org/other: not a folder here, nor in the hub's cache" in err
    # a model that is in the cache without its recipe
    code, _, err, _ = ran(hub, tmp_path, "org/a", offline=True)
    assert code == 1 and "holds no recipe" in err, err


# a name → what is said of it
WRONG = {
    "org/typo": "org/typo: not a folder here|no model of this name",
    "hf://org/typo": "org/typo: not a folder here|no model of this name",
    "org/m@v9": "org/m has no revision 'v9'",
    "org/-m": "no hub id either",
    "hf://org/m/README.md": "Check the path",
    "org/locked": "gated",
    "org/plain": "org/plain/README.md: holds no recipe",
    "org/two": "org/two/README.md: holds 2 recipes",
    "org/wrong": "org/wrong/README.md, line 7: a recipe has no field 'modles'",
    "org/damaged": "has recipe = {'models': 3}|damaged",
}
# what each is refused with, and in how many seconds
ASKED = """
import json, sys, time
from frechet_merge import MergeError
from frechet_merge.recipes.written import read_recipe
found = {}
for name in sys.argv[1:]:
    start = time.time()
    try:
        read_recipe(name)
    except MergeError as e:
        found[name] = str(e), time.time() - start
print(json.dumps(found))
"""


def test_an_id_that_has_no_recipe_fails_in_seconds(tmp_path, hub):
    laid(hub, {"README.md": card(OURS)})
    hub.put("org/locked", {"README.md": card(OURS).encode()}, gated="manual")
    laid(hub, {"README.md": "# A model"}, "org/plain")
    laid(hub, {"README.md": card(OURS) + card(OURS)}, "org/two")
    laid(hub, {"README.md": card("modles: [org/a]\nmodels: [org/a]\n")}, "org/wrong")
    laid(hub, {"frechet_merge.json": json.dumps({"recipe": {"models": 3}})}, "org/damaged")
    words = [sys.executable, "-c", ASKED, *WRONG]
    env = hub.env(tmp_path/"home", PYTHONPATH=str(ROOT))
    found = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, check=True, text=True)
    for name, (said, seconds) in json.loads(found.stdout).items():
        assert all(word in said for word in WRONG[name].split("|")), said
        assert len(said.splitlines()) <= 3 and seconds < 10, (said, seconds)
    assert json.loads(found.stdout).keys() == WRONG.keys() and WEIGHTS not in hub.fetched()
    # as the command line
    code, _, err, _ = ran(hub, tmp_path, "org/typo")
    assert code == 1 and "org/typo: not a folder here" in err and "Traceback" not in err


def test_a_model_that_does_not_say_how_it_was_merged(tmp_path, hub):
    laid(hub, {}, "org/empty")
    code, _, err, _ = ran(hub, tmp_path, "org/empty")
    assert code == 1 and "org/empty: holds no recipe on the hub: none of recipes.yml" in err, err
    # as it says
    laid(hub, {"README.md": card(OURS)})
    (tmp_path/"mine.yml").write_text(OURS)
    assert ran(hub, tmp_path, "org/m")[0] == ran(hub, tmp_path, "mine.yml")[0] == 0


def test_a_hub_that_never_answers(tmp_path, hub):
    hub.is_silent = True
    start = time.time()
    code, _, err, _ = ran(hub, tmp_path, "org/m", HF_HUB_ETAG_TIMEOUT="1")
    assert code == 1 and "the hub did not give it" in err and time.time() - start < 20, err


def test_a_folder_here_wins(tmp_path, hub):
    laid(hub, {"README.md": card(OURS)})
    (tmp_path/"org"/"m").mkdir(parents=True)
    (tmp_path/"org"/"m"/"README.md").write_text(card(OURS.replace("0.3", "0.9")))
    code, _, err, here = ran(hub, tmp_path, "org/m")
    assert code == 0, err
    assert not of_repo(hub, "org/m")
    code, _, err, there = ran(hub, tmp_path, "hf://org/m")
    assert code == 0 and there != here, err
    code, _, err, also = ran(hub, tmp_path, "./org/m")
    assert code == 0 and also == here, err


def test_a_file_that_is_missing_is_no_id(tmp_path, hub):
    for name in ("org/r.yml", "r.yml", "./org/m", "~/org", "/org/m", "org/README.md"):
        hub.asked.clear()
        code, _, err, _ = ran(hub, tmp_path, name)
        assert code == 1 and "cannot be read" in err and not hub.asked, err
    assert id_in("gpt2") is None and id_in("hf://gpt2") == "gpt2"


def typed(err):
    "The words of the command that a message ends with."
    return shlex.split(err.strip().splitlines()[-1].partition(": ")[2])


@pytest.fixture
def secret(tmp_path):
    (tmp_path/"secret").write_text("a password")
    return tmp_path/"secret"


def with_tokenizers(hub, tmp_path):
    "The models, with tokenizers that a template can be written beside."
    for i, name in enumerate(("org/a", "org/b")):
        folder = tmp_path/f"of{i}"
        (folder/"tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
        hub.put(name, folder)


def test_a_card_writes_no_file_of_this_machine(tmp_path, hub, secret):
    with_tokenizers(hub, tmp_path)
    recipe = OURS + f"chat_template: {secret}\n"
    (tmp_path/"README.md").write_text(card(recipe))
    code, _, err, _ = ran(hub, tmp_path, "README.md")
    assert code == 1 and "README.md, line 9: chat_template:" in err, err
    assert "not taken from a model card" in err and len(err.splitlines()) <= 3
    assert not (tmp_path/"OUT").exists()
    # as it says: a file of one's own
    (tmp_path/"mine.yml").write_text(recipe)
    code, _, err, _ = ran(hub, tmp_path, "mine.yml")
    assert code == 0, err
    assert "a password" in "".join(f.read_text() for f in (tmp_path/"OUT").glob("*.json"))


@pytest.mark.parametrize(
    "file, text",
    [
        ("mergekit_config.yml", MERGEKIT),
        ("recipes.yml", "name: first\n" + OURS + "---\n" + OURS),
        ("frechet_merge.json", None),
        ("README.md", card(OURS)),
    ],
)
def test_a_model_of_the_hub_writes_no_file_of_this_machine(tmp_path, hub, secret, file, text):
    with_tokenizers(hub, tmp_path)
    if text is None:
        (tmp_path/"r.yml").write_text(OURS + f"chat_template: {secret}\n")
        assert ran(hub, tmp_path, "r.yml")[0] == 0
        text = (tmp_path/"OUT"/file).read_text()
    elif file == "README.md":
        text = card(OURS + f"chat_template: {secret}\n")
    else:
        text += f"chat_template: {secret}\n"
    laid(hub, {file: text})
    code, _, err, _ = ran(hub, tmp_path, "org/m")
    assert code == 1 and f"org/m/{file}" in err and "not taken from the hub" in err, err
    assert "chat_template: " in err and len(err.splitlines()) <= 3
    assert not (tmp_path/"OUT").exists()
    # as it says
    if file == "README.md":
        assert "save its recipe as a file of your own" in err
        (tmp_path/"mine.yml").write_text(OURS + f"chat_template: {secret}\n")
        mine = tmp_path/"mine.yml"
    else:
        words = typed(err)
        assert words[:4] == ["hf", "download", "org/m", file]
        hf(*words[1:], env=hub.env(tmp_path/"home", TOKEN), cwd=tmp_path)
        mine = tmp_path/"DIR"/file
    code, _, err, _ = ran(hub, tmp_path, mine)
    assert code == 0 and "a password" in (tmp_path/"OUT"/"tokenizer_config.json").read_text(), err


def test_a_template_that_is_no_file_is_taken(tmp_path, hub):
    with_tokenizers(hub, tmp_path)
    # of a model by its id, a text, and of a model in a folder here
    for recipe in (OURS + "chat_template: org/b\n", OURS + "chat_template: '{{ messages[0] }}'\n"):
        (tmp_path/"README.md").write_text(card(recipe))
        code, _, err, _ = ran(hub, tmp_path, "README.md")
        assert code == 0, err
    (tmp_path/"README.md").write_text(card("models: [of0, of1]\nchat_template: of1\n"))
    code, _, err, _ = ran(hub, tmp_path, "README.md")
    assert code == 0, err


@pytest.mark.parametrize("is_on_hub", [False, True])
def test_where_it_is_written_says_whoever_runs_it(tmp_path, hub, is_on_hub):
    text = card(OURS + f"output: {tmp_path/'elsewhere'}\n")
    laid(hub, {"README.md": text})
    (tmp_path/"README.md").write_text(text)
    name = "org/m" if is_on_hub else "README.md"
    env = hub.env(tmp_path/"home", TOKEN)
    code, _, err = cli("run", name, cwd=tmp_path, env=env)
    assert code == 1 and "line 9: output:" in err and "-o OUT" in err, err
    assert not (tmp_path/"elsewhere").exists()
    # as it says, and in either way to say it
    code, _, err, held = ran(hub, tmp_path, name)
    assert code == 0 and held, err
    code, _, err = cli("run", name, "PLACE", cwd=tmp_path, env=env)
    assert code == 0 and (tmp_path/"PLACE"/WEIGHTS).read_bytes() == held, err
    assert not (tmp_path/"elsewhere").exists()
    # of one's own file it is taken
    (tmp_path/"mine.yml").write_text(OURS + "output: mine\n")
    code, _, err = cli("run", "mine.yml", cwd=tmp_path, env=env)
    assert code == 0 and (tmp_path/"mine"/WEIGHTS).read_bytes() == held, err


def pickled(hub, tmp_path):
    "The models as pickles, and as files that are none."
    for i, name in enumerate(("org/a", "org/b")):
        folder = tmp_path/f"pickled{i}"
        folder.mkdir()
        torch.save(tensors(i), folder/"pytorch_model.bin")
        (folder/"config.json").write_text(json.dumps(CONFIG))
        hub.put(name, folder)


@pytest.mark.parametrize("file", ["recipes.yml", "frechet_merge.json"])
def test_a_model_of_the_hub_opens_no_pickles(tmp_path, hub, file):
    pickled(hub, tmp_path)
    recipe = OURS + "allow_pickle: true\n"
    (tmp_path/"mine.yml").write_text(recipe)
    code, _, err, held = ran(hub, tmp_path, "mine.yml")
    assert code == 0 and held, err
    several = f"name: first\n{recipe}---\n{recipe}"
    laid(hub, {file: several if file == "recipes.yml" else (tmp_path/"OUT"/file).read_text()})
    code, _, err, _ = ran(hub, tmp_path, "org/m")
    assert code == 1 and "allow_pickle: True is not taken from the hub" in err, err
    assert not (tmp_path/"OUT").exists()
    # as it says
    code, _, err, again = ran(hub, tmp_path, "org/m", "--allow-pickle")
    assert code == 0 and again == held, err


def test_a_card_opens_no_pickles(tmp_path, hub):
    pickled(hub, tmp_path)
    (tmp_path/"README.md").write_text(card(OURS + "allow_pickle: true\n"))
    code, _, err, _ = ran(hub, tmp_path, "README.md")
    assert code == 1 and "line 9: allow_pickle: True is not taken from a model card" in err, err
    # as it says
    code, _, err, held = ran(hub, tmp_path, "README.md", "--allow-pickle")
    assert code == 0 and held, err


@pytest.mark.parametrize("text", [OURS, MERGEKIT, SEVERAL])
def test_pickles_of_a_recipe_that_does_not_allow_them(tmp_path, hub, text):
    pickled(hub, tmp_path)
    (tmp_path/"mine.yml").write_text(text)
    code, _, err, _ = ran(hub, tmp_path, "mine.yml")
    assert code == 1 and "--allow-pickle" in err, err
    # as it says
    code, _, err, held = ran(hub, tmp_path, "mine.yml", "--allow-pickle")
    assert code == 0 and held, err


def test_a_mixture_of_pickles(tmp_path, hub):
    text = "base_model: org/a\ngate_mode: random\nexperts: [{source_model: org/a}]\n"
    (tmp_path/"moe.yml").write_text(text.replace("[{", "[{source_model: org/b}, {"))
    assert read_recipe(tmp_path/"moe.yml", allow_pickle=True).mixture.allow_pickle
    assert not read_recipe(tmp_path/"moe.yml").mixture.allow_pickle


@pytest.mark.parametrize("choice", ["a\0b", "x"*5000, 3, [], {"a": 1}, "~nobody/x", "\ud800"])
def test_odd_values_are_refused_or_read(tmp_path, choice):
    for field in ("chat_template", "output", "allow_pickle"):
        text = json.dumps({"models": ["org/a"], field: choice})
        (tmp_path/"README.md").write_text(f"```yaml\n{text}\n```\n")
        try:
            read_recipe(tmp_path/"README.md")
        except MergeError as e:
            assert len(str(e).splitlines()) <= 3 and len(str(e)) < 2000


def test_a_stranger_s_recipe_names_no_code(tmp_path, hub):
    for geometry in ('{"class": "os.system", "arguments": {"command": "touch x"}}', "os:system"):
        (tmp_path/"README.md").write_text(card(OURS + f"geometry: {geometry}\n"))
        code, _, err, _ = ran(hub, tmp_path, "README.md")
        assert code == 1 and "Traceback" not in err and not (tmp_path/"x").exists(), err


def test_only_what_is_needed_comes(tmp_path, hub):
    save(tmp_path/"big", tensors(3), CONFIG)
    hub.put("org/m", {**files_in(tmp_path/"big"), "README.md": card(OURS).encode()})
    code, _, err, _ = ran(hub, tmp_path, "org/m")
    assert code == 0 and of_repo(hub, "org/m") == {"README.md"}, err
    assert os.listdir(tmp_path/"home"/"hub"/"models--org--m"/"snapshots")

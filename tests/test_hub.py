"""Ids of the hub: what is downloaded, of which commit, what is said of those that are not there,
and what a push asks before it uploads.

The hub is one on this machine, or a cache without a network."""

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
from conftest import cli, save, tensors
from hub import TOKEN, files_in, running

from frechet_merge import MergeError
from frechet_merge.files.hub import Found, exact, ids_in, needed

CONFIG = {"model_type": "toy", "vocab_size": 11}


@pytest.fixture
def hub():
    with running() as found:
        yield found


def model(tmp_path, seed=0):
    return save(tmp_path/f"of{seed}", tensors(seed), CONFIG)


def merged(*args, cwd, env):
    return cli("merge", *args, "-q", cwd=cwd, env=env)


def fails(hub, *args, cwd, says, **how):
    "Refused with these words, in at most three lines, and nothing was fetched or written."
    before = sorted(cwd.iterdir())
    code, out, err = merged(*args, "-o", "OUT", cwd=cwd, env=hub.env(cwd/"home", **how))
    assert code == 1 and len(err.strip().splitlines()) <= 3, err
    for word in says.split("|"):
        assert word in err, err
    assert not hub.fetched()
    assert {f for f in cwd.iterdir() if f.name != "home"} == {*before} - {cwd/"home"}


def test_what_is_downloaded_is_what_is_read(tmp_path, hub):
    folder = model(tmp_path)
    extra = ["pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "optimizer.pt"]
    extra += ["checkpoint-5/model.safetensors", "checkpoint-5/config.json"]
    extra += ["model.fp16.safetensors"]
    for name in [*extra, "tokenizer.json", "README.md", "flax_model.msgpack"]:
        (folder/name).parent.mkdir(exist_ok=True)
        # a file of the same bytes would not be fetched twice
        (folder/name).write_text(json.dumps({"name": name}))
    hub.put("org/a", folder)
    code, _, err = merged("org/a", folder, "-o", "OUT", cwd=tmp_path, env=hub.env(tmp_path/"home"))
    assert code == 0, err
    assert hub.fetched() == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_shards_are_those_of_the_index(tmp_path):
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    listed = [*files, "other-00001-of-00001.safetensors", "config.json"]
    index = {"weight_map": {"a": files[0], "b": files[1]}}
    name = "model.safetensors.index.json"
    (tmp_path/name).write_text(json.dumps(index))
    assert needed("org/a", [*listed, name], tmp_path) == files


def test_a_pipeline_is_its_parts(tmp_path):
    (tmp_path/"model_index.json").write_text(
        json.dumps({"unet": ["diffusers", "U"], "vae": ["diffusers", "V"]})
    )
    files = ["model_index.json", "everything.safetensors", "vae/config.json"]
    for part in ("unet", "vae"):
        ends = ("safetensors", "fp16.safetensors", "bin")
        files += [f"{part}/diffusion_pytorch_model.{end}" for end in ends]
    found = needed("org/a", files, tmp_path)
    assert found == [f"{p}/diffusion_pytorch_model.safetensors" for p in ("unet", "vae")]


def test_pickles_are_fetched_only_where_they_are_allowed(tmp_path):
    files = ["config.json", "pytorch_model.bin"]
    with pytest.raises(MergeError, match="pickles only.*\n.*--allow-pickle"):
        needed("org/a", files, tmp_path)
    assert needed("org/a", files, tmp_path, True) == ["pytorch_model.bin"]
    both = [*files, "model.safetensors"]
    assert needed("org/a", both, tmp_path, True) == ["model.safetensors"]


def test_a_repository_of_several_models_names_a_way(tmp_path):
    with pytest.raises(MergeError, match="^org/loras: holds 2 .*\n.*hf download org/loras"):
        needed("org/loras", ["a.safetensors", "b.safetensors"], tmp_path)


def test_the_commit_is_recorded_and_run_repeats_the_bytes(tmp_path, hub):
    sha = hub.put("org/a", model(tmp_path, 0))
    hub.put("org/b", model(tmp_path, 1))
    env = hub.env(tmp_path/"home")
    names = ("org/a", "org/b@main", "--base", "org/a")
    code, _, err = merged(*names, "-o", "OUT", cwd=tmp_path, env=env)
    assert code == 0, err
    recipe = json.loads((tmp_path/"OUT"/"frechet_merge.json").read_text())["recipe"]
    assert recipe["models"][0] == recipe["base"] == f"org/a@{sha}"
    card = (tmp_path/"OUT"/"README.md").read_text()
    assert f"merge org/a@{sha} org/b@" in card
    # the branches go on
    hub.put("org/a", model(tmp_path, 2))
    hub.put("org/b", model(tmp_path, 3))
    shutil.rmtree(tmp_path/"home")
    code, _, err = cli("run", "OUT", "-o", "AGAIN", cwd=tmp_path, env=env)
    assert code == 0, err
    first, again = (tmp_path/x/"model.safetensors" for x in ("OUT", "AGAIN"))
    assert first.read_bytes() == again.read_bytes()
    code, _, err = merged(*names, "-o", "NEW", cwd=tmp_path, env=env)
    assert code == 0 and (tmp_path/"NEW"/"model.safetensors").read_bytes() != first.read_bytes()


def test_what_was_downloaded_is_read_offline_by_the_same_name(tmp_path, hub):
    hub.put("org/a", model(tmp_path))
    for offline in (False, True):
        env = hub.env(tmp_path/"home", offline=offline)
        code, _, err = merged("org/a", "org/a", "-o", f"OUT{offline}", cwd=tmp_path, env=env)
        assert code == 0, err


def test_revisions_in_names_and_in_recipes(tmp_path, hub):
    old = hub.put("org/a", model(tmp_path, 0), "v1")
    hub.put("org/a", model(tmp_path, 1))
    env = hub.env(tmp_path/"home")
    (tmp_path/"r.yaml").write_text(
        "models:\n- {model: org/a, revision: v1}\n- org/a\nbase: {model: org/a, revision: v1}\n"
    )
    code, _, err = cli("run", "r.yaml", "-o", "OUT", cwd=tmp_path, env=env)
    assert code == 0, err
    recipe = json.loads((tmp_path/"OUT"/"frechet_merge.json").read_text())["recipe"]
    assert recipe["models"][0] == recipe["base"] == f"org/a@{old}" != recipe["models"][1]


@pytest.mark.parametrize(
    "wrong, says",
    [
        ("org/typo", "org/typo: not a folder here|no model of this name|nobody is logged in"),
        ("org/a@v9", "org/a has no revision 'v9'|Check the path"),
        ("org/-a", "no hub id either"),
        ("org/a--b", "neither -- nor"),
        ("https://huggingface.co/org/a", "Write a hub id: OWNER/NAME"),
        ("org/locked", "gated|Accept its terms|hf auth login"),
        ("org/mine", "no model of this name|for a private model log in"),
    ],
)
def test_a_wrong_id_fails_before_anything_is_downloaded(tmp_path, hub, wrong, says):
    hub.put("org/a", model(tmp_path))
    hub.put("org/locked", {"config.json": b"{}"}, gated="manual")
    hub.put("org/mine", {"config.json": b"{}"}, private=True)
    fails(hub, "org/a", wrong, cwd=tmp_path, says=says)


def test_a_login_sees_what_is_private_or_gated(tmp_path, hub):
    hub.put("org/mine", model(tmp_path, 0), private=True)
    hub.put("org/locked", model(tmp_path, 1), gated="auto")
    fails(hub, "org/locked", "org/locked", cwd=tmp_path, says="Accept its terms|log in")
    env = hub.env(tmp_path/"home", TOKEN)
    code, _, err = merged("org/mine", "org/locked", "-o", "OUT", cwd=tmp_path, env=env)
    assert code == 0, err


def test_a_hub_that_never_answers(tmp_path, hub):
    hub.is_silent = True
    says = "org/a: not a folder here|the hub did not give it|Check the path or the id"
    fails(hub, "org/a", "org/b", cwd=tmp_path, says=says, HF_HUB_ETAG_TIMEOUT="1")


def test_the_cache_is_read_if_the_hub_is_away_and_that_is_said(tmp_path, hub):
    hub.put("org/a", model(tmp_path))
    env = hub.env(tmp_path/"home", HF_HUB_ETAG_TIMEOUT="1")
    assert merged("org/a", "org/a", "-o", "OUT", cwd=tmp_path, env=env)[0] == 0
    hub.is_silent = True
    code, _, err = merged("org/a", "org/a", "-o", "AGAIN", cwd=tmp_path, env=env)
    assert code == 0 and "org/a: the hub cannot be reached; commit" in err, err


def test_a_cache_without_the_weights_is_no_model(tmp_path, hub):
    hub.put("org/a", model(tmp_path))
    code = "from huggingface_hub import snapshot_download as f; f('org/a', allow_patterns='*.json')"
    subprocess.run([sys.executable, "-c", code], env=hub.env(tmp_path/"home"), check=True)
    hub.asked.clear()
    says = "commit|without its weights|HF_HUB_OFFLINE|hf download org/a"
    fails(hub, "org/a", "org/a", cwd=tmp_path, says=says, offline=True)
    says = "org/b: not a folder here, nor in the hub's cache|unset HF_HUB_OFFLINE"
    fails(hub, "org/b", "org/b", cwd=tmp_path, says=says, offline=True)


@pytest.mark.parametrize(
    "words",
    [
        "inspect org/none org/no",
        "align org/none org/no -o OUT",
        "extract org/none --base org/no -o OUT --rank 2",
        "curvature org/none texts.txt -o OUT",
        "convert org/none --to peft -o OUT",
        "resize org/none --rank 2 -o OUT",
        "basis org/none --base org/no -o OUT",
        "tune org/none org/no --base org/none --data texts.txt,texts.txt",
    ],
)
def test_ids_stand_where_paths_stand(tmp_path, hub, words):
    (tmp_path/"texts.txt").write_text("a\n")
    code, _, err = cli(*words.split(), cwd=tmp_path, env=hub.env(tmp_path/"home"))
    assert code == 1 and "org/none: not a folder here" in err, err


def test_a_base_and_its_adapters_have_commits_of_their_own():
    found = {"org/base": Found("org/base", None, "1"), "org/x@v": Found("org/x", "v", "2")}
    assert ids_in("org/base+org/x@v") == ["org/base", "org/x@v"]
    assert exact("org/base[0:2]|org/x@v[2:4]", found) == "org/base@1[0:2]|org/x@2[2:4]"
    assert exact(["org/base-7b", None, 3], found) == ["org/base-7b", None, 3]


def pushes(hub, tmp_path, *words, home="home", token=TOKEN, answer=None, **how):
    "Merge, and push; on a terminal if there is an answer."
    words = ["merge", tmp_path/"of0", tmp_path/"of1", "-o", tmp_path/"OUT", "-q", *words]
    env = hub.env(tmp_path/home, token, **how)
    if answer is None:
        return cli(*words, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL)
    master, slave = pty.openpty()
    os.write(master, answer)
    try:
        return cli(*words, cwd=tmp_path, env=env, stdin=slave)
    finally:
        os.close(master)
        os.close(slave)


@pytest.fixture
def two(tmp_path):
    return [model(tmp_path, 0), model(tmp_path, 1)]


def test_a_push_makes_a_private_model_of_the_whole_folder(tmp_path, hub, two):
    code, out, err = pushes(hub, tmp_path, "--push", "merged", "--yes")
    assert code == 0 and f"pushed to {hub.address}/me/merged" in out, err
    repo = hub.repos["me/merged"]
    files = repo.at("main")[1]
    files.pop(".gitattributes")
    assert files == files_in(tmp_path/"OUT") and repo.private


def test_a_public_one_has_to_be_asked_for(tmp_path, hub, two):
    hub.put("org/merged", {"a.txt": b"a"})
    code, _, err = pushes(hub, tmp_path, "--push", "org/merged", "--yes")
    assert code == 1 and "exists, and is public" in err and "--public" in err
    assert not (tmp_path/"OUT").exists()
    assert pushes(hub, tmp_path, "--push", "org/merged", "--yes", "--public")[0] == 0
    assert {"a.txt", "model.safetensors"} <= hub.repos["org/merged"].at("main")[1].keys()
    shutil.rmtree(tmp_path/"OUT")
    assert pushes(hub, tmp_path, "--push", "org/new", "--yes", "--public")[0] == 0
    assert not hub.repos["org/new"].private


@pytest.mark.parametrize("answer, is_pushed", [(b"y\n", True), (b"n\n", False), (b"\n", False)])
def test_a_terminal_is_asked_first(tmp_path, hub, two, answer, is_pushed):
    code, _, err = pushes(hub, tmp_path, "--push", "merged", answer=answer)
    assert "Push the merge to me/merged (new, private)? [y/N]" in err and str(two[0]) in err
    assert (code == 0) == is_pushed == ("me/merged" in hub.repos) == (tmp_path/"OUT").exists()
    assert is_pushed or "nothing was merged" in err


@pytest.mark.parametrize(
    "words, says, how",
    [
        ("--push merged", "no terminal to ask on|--yes", {}),
        ("--push me/-x --yes", "no id of a model|OWNER/NAME", {}),
        ("--push a/b/c --yes", "no id of a model|OWNER/NAME", {}),
        ("--push other/x --yes", "me may not write to other|me/x, org/x", {}),
        ("--push x --yes", "nobody is logged in|hf auth login", {"token": None}),
        ("--push x --yes", "does not know this login|hf auth login", {"token": "hf_old"}),
        ("--push x --yes", "HF_HUB_OFFLINE is set", {"offline": True}),
    ],
)
def test_what_would_stop_a_push_is_found_before_the_merge(tmp_path, hub, two, words, says, how):
    code, _, err = pushes(hub, tmp_path, *words.split(), **how)
    assert code == 1 and len(err.strip().splitlines()) <= 3, err
    assert all(word in err for word in says.split("|")), err
    assert not (tmp_path/"OUT").exists() and not hub.repos


def test_a_login_that_may_only_read_and_a_hub_that_is_away(tmp_path, hub, two):
    hub.role = "read"
    code, _, err = pushes(hub, tmp_path, "--push", "x", "--yes")
    assert code == 1 and "may only read" in err and not (tmp_path/"OUT").exists()
    hub.is_silent = True
    code, _, err = pushes(hub, tmp_path, "--push", "x", "--yes", HF_HUB_ETAG_TIMEOUT="1")
    assert code == 1 and "TimeoutError" in err and not (tmp_path/"OUT").exists()


def test_options_of_a_push_without_one(tmp_path, hub, two):
    for words in (["--yes"], ["--public"], ["--push", "x", "--yes", "--dry-run"]):
        code, _, err = pushes(hub, tmp_path, *words)
        assert code == 2 and "--push" in err


def test_a_push_that_is_refused_leaves_the_merge(tmp_path, hub, two):
    hub.put("me/full", {"a": b"a"}, private=True)
    hub.is_full = True
    code, _, err = pushes(hub, tmp_path, "--push", "full", "--yes")
    assert code == 1 and "is merged and whole" in err and "hf upload me/full" in err, err
    assert (tmp_path/"OUT"/"model.safetensors").exists()


def test_a_recipe_is_pushed_too(tmp_path, hub, two):
    (tmp_path/"r.yaml").write_text("models: [of0, of1]\noutput: OUT\n")
    env = hub.env(tmp_path/"home", TOKEN)
    code, out, err = cli("run", "r.yaml", "--push", "x", "--yes", "-q", cwd=tmp_path, env=env)
    assert code == 0 and "model.safetensors" in hub.repos["me/x"].at("main")[1], err

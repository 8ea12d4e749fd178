"""What arrives at a hub is what was merged, by both of its transports, in one commit; and after a
push that failed on the way, what the error says pushes it without another merge."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cli, save
from hub import TOKEN, files_in, running, sha256
from huggingface_hub import ModelCard
from test_dialects import flux_file
from test_hub import CONFIG, model, pushes

from frechet_merge.cli.pushing import why_of

WEIGHTS = "model.safetensors"


@pytest.fixture
def hub():
    with running() as found:
        yield found


@pytest.fixture
def two(tmp_path):
    return [model(tmp_path, 0), model(tmp_path, 1)]


@pytest.fixture
def hasty(tmp_path):
    "Where to find a module by which nobody waits before the hub is asked again."
    (tmp_path/"hasty").mkdir()
    (tmp_path/"hasty"/"sitecustomize.py").write_text("import time\ntime.sleep = lambda _: None\n")
    return {"PYTHONPATH": f"{Path(__file__).parents[1]}:{tmp_path/'hasty'}"}


def pushed(hub, repo):
    "The files of a model, but the hub's own; and how many commits it has after its first."
    files = dict(hub.repos[repo].at("main")[1])
    files.pop(".gitattributes", None)
    return files, len(hub.repos[repo].commits) - 1


def hf(*words, env, cwd=None):
    path = str(Path(sys.executable).with_name("hf"))
    subprocess.run([path, *map(str, words)], env=env, check=True, cwd=cwd, capture_output=True)


def check_named(hub, out):
    "The last commit names large files by the hashes and lengths of those that were merged."
    large = {name: held for name, held in files_in(out).items() if name.endswith(".safetensors")}
    assert hub.named.keys() == large.keys() and large
    for name, held in large.items():
        said = hub.named[name]
        assert (said["algo"], said["oid"], said["size"]) == ("sha256", sha256(held), len(held))


@pytest.mark.parametrize("piece", [None, 300, 100_000])
def test_large_files_arrive_as_the_commit_names_them(tmp_path, hub, two, piece):
    hub.piece = piece
    code, _, err = pushes(hub, tmp_path, "--push", "merged", "--yes")
    assert code == 0, err
    files, commits = pushed(hub, "me/merged")
    assert files == files_in(tmp_path/"OUT") and commits == 1
    check_named(hub, tmp_path/"OUT")
    puts = [path for how, path in hub.asked if how == "PUT"]
    assert (len(puts) > 1) == (piece == 300) and ("POST", "/store/verify") in hub.asked


def test_shards_are_one_commit(tmp_path, hub, two):
    code, _, err = pushes(hub, tmp_path, "--push", "merged", "--yes", "--shard-size", "400B")
    assert code == 0, err
    files, commits = pushed(hub, "me/merged")
    assert files == files_in(tmp_path/"OUT") and commits == 1
    assert sum(name.endswith(".safetensors") for name in files) > 2
    check_named(hub, tmp_path/"OUT")


def test_a_single_file_is_pushed_by_its_name(tmp_path, hub):
    for seed, name in enumerate("ab"):
        flux_file(tmp_path/f"{name}.safetensors", seed)
    words = ["merge", "a.safetensors", "b.safetensors", "-o", "one.safetensors", "-q"]
    env = hub.env(tmp_path/"home", TOKEN)
    code, _, err = cli(*words, "--push", "x", "--yes", cwd=tmp_path, env=env)
    assert code == 0, err
    held = (tmp_path/"one.safetensors").read_bytes()
    assert pushed(hub, "me/x") == ({"one.safetensors": held}, 1)


@pytest.mark.parametrize("answer", [(500, {}), (503, {}), "close"])
def test_what_fails_once_is_sent_once_more(tmp_path, hub, two, hasty, answer):
    hub.faults = {"PUT /store": [answer]}
    code, _, err = pushes(hub, tmp_path, "--push", "merged", "--yes", **hasty)
    assert code == 0, err
    assert pushed(hub, "me/merged") == (files_in(tmp_path/"OUT"), 1)


QUOTA = 403, {"error": "Private repository storage limit reached"}
# a step of a push → what the hub answers to it, and what is said
FAULTS = {
    "no room": ("PUT /store", [QUOTA], "403: Private repository storage limit reached"),
    "no store": ("PUT /store", [(500, {})]*9, "500"),
    "closed": ("PUT /store", ["close"]*9, "Error"),
    "no batch": ("POST /me/merged.git/info", [QUOTA], "403: Private repository storage"),
    "other bytes": ("POST /store/verify", [(404, {})], "404"),
    "not whole": ("/whole", [(400, {"error": "a part is missing"})], "400: a part is missing"),
    "no mode": ("preupload", [(500, {})]*9, "500"),
    "no commit": ("/commit/", [QUOTA], "403: Private repository storage"),
    "broken commit": ("/commit/", [(500, {})]*9, "500"),
    "closed commit": ("/commit/", ["close"]*9, "Error"),
    "no repository": ("repos/create", [(429, {"error": "too many today"})]*9, "429"),
    "an object": (
        "/objects/batch",
        [(200, {"objects": [{"oid": "0", "size": 1, "error": {"code": 507, "message": "full"}}]})],
        "full",
    ),
}


def without_retries(err):
    "The lines of an error, but what the hub's library says before it asks again."
    return [x for x in err.splitlines() if "Retrying" not in x and "thrown" not in x]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_that_fails_is_made_again_as_it_says(tmp_path, hub, two, hasty, fault):
    step, answers, says = FAULTS[fault]
    hub.piece, hub.faults = 700, {step: answers}
    here = tmp_path/"with space"
    here.mkdir()
    for folder in two:
        folder.rename(here/folder.name)
    code, out, err = pushes(hub, here, "--push", "merged", "--yes", **hasty)
    assert code == 1 and says in err and "is merged and whole" in err, err
    assert len(without_retries(err)) <= 3 and "Traceback" not in err, err
    merged = files_in(here/"OUT")
    assert "me/merged" not in hub.repos or pushed(hub, "me/merged") == ({}, 0)

    # as it says
    again = shlex.split(err.strip().splitlines()[-1].partition(": ")[2])
    assert again[:3] == ["hf", "upload", "me/merged"]
    hub.faults = {}
    hf(*again[1:], env=hub.env(here/"home", TOKEN), cwd="/")
    assert pushed(hub, "me/merged") == (merged, 1) and files_in(here/"OUT") == merged
    assert hub.repos["me/merged"].private
    check_named(hub, here/"OUT")


def test_what_arrived_is_not_sent_twice(tmp_path, hub, two, hasty):
    hub.faults = {"/commit/": [QUOTA]}
    assert pushes(hub, tmp_path, "--push", "merged", "--yes", **hasty)[0] == 1
    sent = [path for how, path in hub.asked if how == "PUT"]
    hf("upload", "me/merged", tmp_path/"OUT", env=hub.env(tmp_path/"home", TOKEN))
    assert [path for how, path in hub.asked if how == "PUT"] == sent
    assert pushed(hub, "me/merged") == (files_in(tmp_path/"OUT"), 1)


def test_what_a_gitignore_there_leaves_out_is_said(tmp_path, hub, two):
    hub.put("me/merged", {".gitignore": b"*.safetensors"}, private=True)
    hub.ignored = (WEIGHTS,)
    code, _, err = pushes(hub, tmp_path, "--push", "merged", "--yes")
    assert code == 1 and f"left out {WEIGHTS}, as a .gitignore in me/merged says" in err, err
    # as it says
    hub.ignored = ()
    hub.put("me/merged", {})
    again = shlex.split(err.strip().splitlines()[-1].partition(": ")[2])
    hf(*again[1:], env=hub.env(tmp_path/"home", TOKEN))
    assert pushed(hub, "me/merged")[0] == files_in(tmp_path/"OUT")


# reads a large file back, from where the library put it
BACK = """
import json, sys, hf_xet
source, store, to = sys.argv[1:]
found = hf_xet.hash_files([source])[0]
asked = hf_xet.PyXetDownloadInfo(to, found.hash, found.filesize)
hf_xet.download_files([asked], store, None, None, None)
"""


def by_xet(tmp_path, hub):
    "The environment in which large files go by Xet, into a folder that its library keeps."
    pytest.importorskip("hf_xet")
    hub.xet = f"local://{tmp_path/'xet'}"
    return {"HF_HUB_DISABLE_XET": "0"}


def test_large_files_arrive_by_xet(tmp_path, hub, two):
    how = by_xet(tmp_path, hub)
    code, _, err = pushes(hub, tmp_path, "--push", "merged", "--yes", **how)
    assert code == 0, err
    # the bytes of large files are in another store than the hub's, which knows their hashes
    files, commits = pushed(hub, "me/merged")
    assert files.keys() == files_in(tmp_path/"OUT").keys() and commits == 1
    assert not [path for how, path in hub.asked if how == "PUT"]
    check_named(hub, tmp_path/"OUT")
    words = [tmp_path/"OUT"/WEIGHTS, hub.xet, tmp_path/"back"]
    subprocess.run([sys.executable, "-c", BACK, *map(str, words)], check=True)
    assert (tmp_path/"back").read_bytes() == (tmp_path/"OUT"/WEIGHTS).read_bytes()


def test_many_shards_by_xet_are_one_commit_or_none(tmp_path, hub):
    how = by_xet(tmp_path, hub)
    for i in range(2):
        save(tmp_path/f"of{i}", {f"{n}.weight": torch.ones(4, 4)*n*i for n in range(30)}, CONFIG)
    words = ["--push", "merged", "--yes", "--shard-size", "64B"]
    # more files than twenty `upload_folder` would try again in smaller commits
    hub.faults = {"/commit/": [QUOTA]}
    code, _, err = pushes(hub, tmp_path, *words, **how)
    assert code == 1 and "403: Private repository storage" in err, err
    assert len(files_in(tmp_path/"OUT")) > 30 and pushed(hub, "me/merged") == ({}, 0)


def test_a_token_for_xet_that_is_refused(tmp_path, hub, two):
    how = by_xet(tmp_path, hub)
    hub.faults = {"xet-write-token": [QUOTA]*9}
    code, _, err = pushes(hub, tmp_path, "--push", "merged", "--yes", **how)
    assert code == 1 and "is merged and whole" in err and len(err.splitlines()) <= 3, err
    assert pushed(hub, "me/merged") == ({}, 0)
    again = shlex.split(err.strip().splitlines()[-1].partition(": ")[2])
    hub.faults = {}
    hf(*again[1:], env=hub.env(tmp_path/"home", TOKEN, **how))
    assert pushed(hub, "me/merged")[0].keys() == files_in(tmp_path/"OUT").keys()
    check_named(hub, tmp_path/"OUT")


def test_what_a_hub_says_is_one_line_without_control_characters():
    assert why_of(ValueError("one\ntwo \x1b[31mred")) == "ValueError: two \\x1b[31mred"
    assert json.dumps(why_of(OSError())) == '"OSError"'


FIRST = "name: first\nmodels: [{model: org/a, weight: 0.3}, {model: org/b, weight: 0.7}]\n"
LAST = "models: [first, {model: org/c, revision: v1}]\nbase: org/b\nweights: [1, 3]\n"


def of_several(tmp_path, hub, *texts):
    "A file of recipes, of models on the hub."
    for i, name in enumerate(("org/a", "org/b")):
        hub.put(name, model(tmp_path, i))
    hub.put("org/c", model(tmp_path, 2), "v1")
    hub.put("org/c", model(tmp_path, 7))
    path = tmp_path/"r.yaml"
    path.write_text("---\n".join(texts))
    return path


def test_several_recipes_are_pushed_with_all_that_makes_them_again(tmp_path, hub):
    path = of_several(tmp_path, hub, FIRST, LAST)
    env = hub.env(tmp_path/"home", TOKEN)
    words = ["run", path, "-o", "OUT", "-q", "--push", "merged", "--yes"]
    code, out, err = cli(*words, cwd=tmp_path, env=env)
    assert code == 0 and "made again" not in out, err
    files, commits = pushed(hub, "me/merged")
    assert files == files_in(tmp_path/"OUT") and commits == 1
    assert {"recipes.yml", "README.md", "frechet_merge.json"} <= files.keys()
    assert b"frechet-merge run recipes.yml -o OUT" in files["README.md"]
    said = files["recipes.yml"].decode()
    for x, branch in (("a", "main"), ("b", "main"), ("c", "v1")):
        assert f"org/{x}@{hub.repos[f'org/{x}'].at(branch)[0]}" in said
    assert "revision" not in said

    # the branches go on, and somebody else makes it again
    for i, name in enumerate(("org/a", "org/b")):
        hub.put(name, model(tmp_path, 10 + i))
    hub.put("org/c", model(tmp_path, 12), "v1")
    other = hub.env(tmp_path/"other", TOKEN)
    hf("download", "me/merged", "--local-dir", tmp_path/"there", env=other)
    for i, (words, cwd) in enumerate([(["there"], tmp_path), (["recipes.yml"], tmp_path/"there")]):
        code, _, err = cli("run", *words, "-o", tmp_path/f"again{i}", "-q", cwd=cwd, env=other)
        assert code == 0, err
        assert (tmp_path/f"again{i}"/WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_push_of_several_models_is_one_commit_of_folders(tmp_path, hub):
    path = of_several(tmp_path, hub, FIRST, "name: last\n" + LAST)
    env = hub.env(tmp_path/"home", TOKEN)
    words = ["run", path, "-o", "OUT", "-q"]
    assert cli(*words, "--push", "several", "--yes", cwd=tmp_path, env=env)[0] == 0
    assert pushed(hub, "me/several") == (files_in(tmp_path/"OUT"), 1)
    assert hub.repos["me/several"].private
    # what people see first says what is where
    card = (tmp_path/"OUT"/"README.md").read_text()
    head = ModelCard(card).data.to_dict()
    assert head["base_model"] == ["org/a", "org/b", "org/c"] and "merge" in head["tags"], head
    assert "[first](first/README.md)" in card and "[last](last/README.md)" in card
    assert "frechet-merge run recipes.yml -o OUT" in card and str(tmp_path) not in card
    again = cli("run", "OUT", "-o", "AGAIN", "-q", cwd=tmp_path, env=env)
    assert again[0] == 0 and files_in(tmp_path/"AGAIN")["README.md"].decode() == card.replace(
        "# OUT", "# AGAIN"
    )

    # the last alone, if it has no name
    path.write_text("---\n".join([FIRST, LAST]))
    words[3] = "ONE"
    assert cli(*words, "--push", "merged", "--yes", cwd=tmp_path, env=env)[0] == 0
    files, _ = pushed(hub, "me/merged")
    assert files[WEIGHTS] == (tmp_path/"OUT"/"last"/WEIGHTS).read_bytes()
    assert files["recipes.yml"] == (tmp_path/"ONE"/"recipes.yml").read_bytes()


def test_what_is_not_pushed_and_is_needed_is_said(tmp_path, hub, two):
    (tmp_path/"chat.jinja").write_text("{{ messages }}")
    recipe = "models: [of0, of1]\nbase: of0\nchat_template: chat.jinja\n"
    (tmp_path/"r.yaml").write_text("name: first\nmodels: [of0, of1]\n---\n" + recipe)
    words = ["run", "r.yaml", "-o", "OUT", "-q", "--push", "merged", "--yes"]
    code, out, err = cli(*words, cwd=tmp_path, env=hub.env(tmp_path/"home", TOKEN))
    assert code == 0 and "which were not pushed: of0, of1, chat.jinja" in out, err

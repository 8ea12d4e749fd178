"""Parts of a merge that several processes write are, put together, the bytes of one process."""

import json
import re
import shutil

import pytest
from conftest import cli, save, tensors
from test_faults import lora
from test_resume import contents, model

from frechet_merge import MergeError, Span, Sphere, merge
from frechet_merge.merging.record import NAME


@pytest.fixture
def models(tmp_path):
    return [model(tmp_path/name, seed) for seed, name in enumerate(("A", "B", "C"))]


def merged(models, out, **more):
    how = dict(executor="serial", shard_size=10_000) | more
    return merge(models, how.pop("geometry", Span(Sphere())), out=out, **how)


def parts(models, out, n, **more):
    return [merged(models, out, part=f"{i}/{n}", **more) for i in range(1, n + 1)]


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_together_they_are_the_merge(tmp_path, models, n):
    whole = merged(models, tmp_path/"whole")
    found = parts(models, tmp_path/"out", n)
    names = [name for part in found for name in part.tensors]
    assert sorted(names) == sorted(whole.tensors), "each tensor is of one part"
    assert not (tmp_path/"out").exists()
    joined = merged(models, tmp_path/"out", join=True)
    (tmp_path/"whole").rename(tmp_path/"first")
    (tmp_path/"out").rename(tmp_path/"whole")
    one, other = contents(tmp_path/"whole"), contents(tmp_path/"first")
    assert one[0].keys() == other[0].keys()
    for name in one[0].keys() - {"README.md"}:
        assert one[0][name] == other[0][name], name
    assert {k: vars(m) for k, m in joined.means.items()} == {
        k: vars(m) for k, m in whole.means.items()
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B", "C", "first", "whole"]


@pytest.mark.parametrize("more", [{"loss": "huber"}, {"geometry": "euclidean", "scale": 0.5}])
def test_of_other_merges(tmp_path, models, more):
    if "scale" in more:
        more = more | {"base": models[2]}
    merged(models[:3], tmp_path/"out", **more)
    want = contents(tmp_path/"out")
    shutil.rmtree(tmp_path/"out")
    parts(models[:3], tmp_path/"out", 2, **more)
    merged(models[:3], tmp_path/"out", join=True, **more)
    assert contents(tmp_path/"out") == want


def test_a_part_that_is_missing_is_named_and_can_be_run(tmp_path, models):
    merged(models, tmp_path/"out", part="1/3")
    merged(models, tmp_path/"out", part="3/3")
    with pytest.raises(MergeError, match="part-2-of-3: is not there") as e:
        merged(models, tmp_path/"out", join=True)
    (remedy,) = re.findall(r"--part (\S+)\.", str(e.value))
    merged(models, tmp_path/"out", part=remedy)
    merged(models, tmp_path/"out", join=True)
    assert (tmp_path/"out/model.safetensors.index.json").exists()


def test_a_part_that_is_done_is_not_done_again(tmp_path, models):
    merged(models, tmp_path/"out", part="1/2")
    before = (tmp_path/"out.part-1-of-2/model-00001-of-00004.safetensors").stat()
    with pytest.warns(UserWarning, match="is done already"):
        merged(models, tmp_path/"out", part="1/2")
    after = (tmp_path/"out.part-1-of-2/model-00001-of-00004.safetensors").stat()
    assert before == after


def test_parts_of_other_merges_are_refused(tmp_path, models):
    parts(models, tmp_path/"out", 2)
    with pytest.raises(MergeError, match="is no part of this merge"):
        merged(models, tmp_path/"out", join=True, scale=0.5, base=models[0])
    with pytest.raises(MergeError, match="no part of this merge.*\nRemove it, and run this part"):
        merged(models[:2], tmp_path/"out", part="2/2")
    for i in (1, 2):
        shutil.rmtree(tmp_path/f"out.part-{i}-of-2")
    parts(models[:2], tmp_path/"out", 2)
    merged(models[:2], tmp_path/"out", join=True)
    assert len(json.loads((tmp_path/"out"/NAME).read_text())["recipe"]["models"]) == 2
    shutil.rmtree(tmp_path/"out")
    parts(models, tmp_path/"out", 2)
    merged(models, tmp_path/"out", part="1/3")
    with pytest.raises(MergeError, match="are of several divisions"):
        merged(models, tmp_path/"out", join=True)
    with pytest.raises(MergeError, match="there are no parts"):
        merged(models, tmp_path/"other", join=True)


def test_what_was_damaged_is_merged_again(tmp_path, models):
    merged(models, tmp_path/"out")
    want = contents(tmp_path/"out")
    shutil.rmtree(tmp_path/"out")
    parts(models, tmp_path/"out", 2)
    file = tmp_path/"out.part-2-of-2/model-00002-of-00004.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    merged(models, tmp_path/"out", join=True)
    assert contents(tmp_path/"out") == want


def test_folders_of_several_models(tmp_path):
    "A pipeline: each part of the folder has files of its own."
    models = []
    for seed in range(2):
        folder = tmp_path/f"pipe{seed}"
        folder.mkdir()
        said = {"_class_name": "Pipe", "unet": ["diffusers", "A"], "vae": ["diffusers", "B"]}
        (folder/"model_index.json").write_text(json.dumps(said))
        for i, part in enumerate(("unet", "vae")):
            save(folder/part, tensors(2*seed + i), {"_class_name": part})
            weights = folder/part/"model.safetensors"
            weights.rename(folder/part/"diffusion_pytorch_model.safetensors")
        models.append(folder)
    merged(models, tmp_path/"out", geometry="euclidean", shard_size=300)
    want = {p.relative_to(tmp_path/"out"): p.read_bytes() for p in (tmp_path/"out").rglob("*.s*s")}
    assert len(want) > 3
    shutil.rmtree(tmp_path/"out")
    parts(models, tmp_path/"out", 2, geometry="euclidean", shard_size=300)
    merged(models, tmp_path/"out", geometry="euclidean", shard_size=300, join=True)
    got = {p.relative_to(tmp_path/"out"): p.read_bytes() for p in (tmp_path/"out").rglob("*.s*s")}
    assert got == want


def test_what_cannot_be_divided_is_refused(tmp_path, models):
    with pytest.raises(ValueError, match="some are in memory, or there is no folder"):
        merge(models, part="1/2")
    with pytest.raises(ValueError, match="give one"):
        merged(models, tmp_path/"out", part="1/2", join=True)
    with pytest.raises(ValueError, match="merged whole"):
        merge([lora(tmp_path/"x"), lora(tmp_path/"y", 1)], out=tmp_path/"out", part="1/2")
    with pytest.raises(ValueError, match="which of how many"):
        merged(models, tmp_path/"out", part="3/2")


def test_on_the_command_line(tmp_path, models):
    words = ("merge", *models, "-o", tmp_path/"out", "--shard-size", "10kB")
    for i in (1, 2):
        code, out, err = cli(*words, "--part", f"{i}/2")
        assert code == 0 and f"out.part-{i}-of-2: 3 models merged, 4 tensors" in out, out + err
    code, out, err = cli(*words, "--join")
    assert code == 0 and "out: 3 models merged, 8 tensors" in out, out + err
    for asked in (["--report"], ["--push", "me/merged", "--yes"]):
        code, out, err = cli(*words, "--part", "1/2", *asked)
        assert code == 2 and "give them with --join" in err and "Traceback" not in err
    code, out, err = cli(*words, "--part", "5/2")
    assert code == 2 and "which of how many" in err

"""A merge that was killed goes on where it stopped, and writes the bytes that it would have."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from frechet_merge import merge, MergeError, Span, Sphere
from frechet_merge.files.output import OURS
from frechet_merge.files.shards import save_tensors, ShardWriter
from frechet_merge.execution.block import MeanOf
from frechet_merge.merging.record import NAME

TENSORS = 8
pytestmark = pytest.mark.filterwarnings("ignore:.*what is done is kept")


def model(folder, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{i}.weight": torch.randn(40, 30, generator=g) for i in range(TENSORS)}
    folder.mkdir()
    save_tensors(folder/"model.safetensors", tensors)
    (folder/"config.json").write_text(json.dumps({"model_type": "none", "hidden": 30}))
    return str(folder)


@pytest.fixture
def models(tmp_path):
    return [model(tmp_path/name, seed) for seed, name in enumerate(("A", "B", "C"))]


@pytest.fixture
def made(monkeypatch):
    "Names of tensors whose mean was computed, in order; `kill` stops a merge before the n-th."
    names = []

    class Made(list):
        kill = None

    names = Made()
    real = MeanOf.run

    def run(self, write):
        if names.kill is not None and len(names) == names.kill:
            raise KeyboardInterrupt
        names.append(self.name)
        return real(self, write)

    monkeypatch.setattr(MeanOf, "run", run)
    return names


def contents(folder):
    "Every file's bytes, and the record without what a clock says."
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    record = json.loads(found.pop(NAME))
    record["seconds"] = 0
    return found, record


def merged(models, out, **more):
    return merge(models, Span(Sphere()), out=out, executor="serial", shard_size=20_000, **more)


def test_only_what_is_missing_is_done(tmp_path, models, made):
    merged(models, tmp_path/"out")
    undisturbed = contents(tmp_path/"out")
    (tmp_path/"out").rename(tmp_path/"first")
    made.clear()
    made.kill = 3
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="is kept: --resume"):
        merged(models, tmp_path/"out", resume=True)
    assert not (tmp_path/"out").exists()
    made.kill = None
    before = [*made]
    result = merged(models, tmp_path/"out", resume=True)
    assert len(made) == TENSORS and set(made[3:]).isdisjoint(before)
    assert contents(tmp_path/"out") == undisturbed
    # what is known of the means that another process found
    again = merged(models, tmp_path/"again")
    assert {n: vars(m) for n, m in result.means.items()} == {
        n: vars(m) for n, m in again.means.items()
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B", "C", "again", "first", "out"]


def test_what_is_whole_already_is_left_as_it_is(tmp_path, models, made):
    "A job of a cluster that is started once more; stopped just after its end, it left a lock."
    first = merged(models, tmp_path/"out", resume=True)
    undisturbed = contents(tmp_path/"out")
    left = tmp_path/".out.abcdefgh.partial"
    left.mkdir()
    (left/"lock").write_bytes(OURS)
    made.clear()
    second = merged(models, tmp_path/"out", resume=True)
    assert not made and contents(tmp_path/"out") == undisturbed
    assert {n: vars(m) for n, m in first.means.items()} == {
        n: vars(m) for n, m in second.means.items()
    }
    assert not left.exists()
    # but no other merge's, and not without being asked to
    with pytest.raises(MergeError, match="exists already"):
        merged(models[:2], tmp_path/"out", resume=True)
    with pytest.raises(MergeError, match="exists already"):
        merged(models, tmp_path/"out")


def test_without_resume_it_starts_anew_and_says_so(tmp_path, models, made):
    made.kill = 3
    with pytest.raises(KeyboardInterrupt):
        merged(models, tmp_path/"out", resume=True)
    made.kill = None
    made.clear()
    with pytest.warns(UserWarning, match="had left is removed .--resume goes on with it"):
        merged(models, tmp_path/"out")
    assert len(made) == TENSORS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B", "C", "out"]


@pytest.mark.parametrize("other", ["model", "config", "recipe", "dtype"])
def test_other_inputs_start_anew(tmp_path, models, made, other):
    made.kill = 3
    with pytest.raises(KeyboardInterrupt):
        merged(models, tmp_path/"out", resume=True)
    made.kill = None
    made.clear()
    more = {}
    if other == "model":
        model(tmp_path/"D", 9)
        os.replace(tmp_path/"D"/"model.safetensors", tmp_path/"B"/"model.safetensors")
    if other == "config":
        (tmp_path/"B"/"config.json").write_text(json.dumps({"model_type": "none", "hidden": 30}))
    if other == "recipe":
        more["weights"] = [1, 2, 3]
    if other == "dtype":
        more["dtype"] = "bf16"
    with pytest.warns(UserWarning, match="it was of other models, or of another recipe"):
        merged(models, tmp_path/"out", resume=True, **more)
    assert len(made) == TENSORS


@pytest.mark.parametrize("damage", ["bytes", "file", "line", "journal", "link"])
def test_what_was_left_is_not_believed(tmp_path, models, made, damage):
    merged(models, tmp_path/"out")
    undisturbed = contents(tmp_path/"out")
    (tmp_path/"out").rename(tmp_path/"first")
    made.clear()
    made.kill = 5
    with pytest.raises(KeyboardInterrupt):
        merged(models, tmp_path/"out", resume=True)
    made.kill = None
    (left,) = tmp_path.glob(".out.*.partial")
    shards = sorted((left/"merge").glob("*.safetensors"))
    journal = left/"journal"
    victim = tmp_path/"A"/"model.safetensors"
    held = victim.read_bytes()
    if damage == "bytes":
        for shard in shards:
            with open(shard, "r+b") as f:
                f.seek(-100, os.SEEK_END)
                f.write(b"\1"*100)
    if damage == "file":
        shards[0].unlink()
    if damage == "line":
        journal.write_bytes(journal.read_bytes()[:-20])
    if damage == "journal":
        journal.write_bytes(b"\xff\xfe{]\n[1]\n{}\n" + journal.read_bytes())
    if damage == "link":
        shards[0].unlink()
        shards[0].symlink_to(victim)
    merged(models, tmp_path/"out", resume=True)
    assert contents(tmp_path/"out") == undisturbed
    assert victim.read_bytes() == held
    assert not list(tmp_path.glob(".out.*"))


def test_an_error_leaves_nothing(tmp_path, models, monkeypatch):
    def run(self, write):
        raise MergeError("no")

    monkeypatch.setattr(MeanOf, "run", run)
    with pytest.raises(MergeError):
        merged(models, tmp_path/"out", resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B", "C"]


def test_models_in_memory_cannot_be_resumed(tmp_path, models):
    tensors = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match="models on disk"):
        merge([tensors, tensors], out=tmp_path/"out", resume=True)
    with pytest.raises(ValueError, match="models on disk"):
        merge(models, resume=True)


def test_warnings_are_given_again(tmp_path, models, made):
    "A job that warned is done again: who resumes hears it, too."
    opposite = {f"layer.{i}.weight": torch.ones(40, 30) for i in range(TENSORS)}
    for name, sign in (("A", 1), ("B", -1)):
        path = tmp_path/name/"model.safetensors"
        path.unlink()
        save_tensors(path, {n: sign*x for n, x in opposite.items()})
    made.kill = 4
    with pytest.raises(KeyboardInterrupt):
        merged(models[:2], tmp_path/"out", resume=True)
    made.kill = None
    with pytest.warns(UserWarning, match=f"{TENSORS} of {TENSORS} means need a look"):
        merged(models[:2], tmp_path/"out", resume=True)


def test_a_real_kill(tmp_path, models):
    "SIGKILL in the middle, from the command line."
    code = (
        "import os, signal, sys\n"
        "from frechet_merge.cli import commands\n"
        "from frechet_merge.files.shards import ShardWriter\n"
        "real, calls = ShardWriter.write, []\n"
        "def write(*a):\n"
        "    calls.append(a)\n"
        "    if len(calls) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*a)\n"
        "ShardWriter.write = write\n"
        "sys.argv = ['frechet-merge', 'merge', 'A', 'B', 'C', '-o', 'out', '--resume']\n"
        "commands.main()"
    )
    died = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert died.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".out.*.partial"))
    merge(models, out=tmp_path/"first")
    words = [sys.executable, "-m", "frechet_merge", "merge", "A", "B", "C", "-o", "out", "--resume"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    one, other = (tmp_path/n/"model.safetensors" for n in ("out", "first"))
    assert one.read_bytes() == other.read_bytes()
    assert not list(tmp_path.glob(".out.*"))


def test_a_file_that_is_there_is_refused_unless_resumed(tmp_path):
    (tmp_path/"model.safetensors").write_bytes(b"")
    layout = {"w": ((2,), torch.float32)}
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path, layout, 100)

"""What disks, signals and odd files do to a command: it says which file it was and what helps, and
leaves nothing behind."""

import errno
import importlib
import json
import os
import pickle
import resource
import shutil
import signal

import pytest
import torch
import transformers
from conftest import LLAMA, save, tensors
from mutated import MODELS, adapter, full, run, warm
from safetensors.torch import load_file, save_file

from frechet_merge import MergeError, load, merge
from frechet_merge.cli.commands import ENDING, _of_a_disk
from frechet_merge.curvature.collecting import _state_in
from frechet_merge.diagnostics.report import write_report
from frechet_merge.files import shards
from frechet_merge.files.checkpoint import refuse_changed_beside
from frechet_merge.files.shards import Unreadable, pieces_of
from frechet_merge.huggingface.models import open_model
from frechet_merge.merging.record import NAME
from frechet_merge.messages import say

# the package's `merge` is the function
merging = importlib.import_module("frechet_merge.merging.merge")
extracting = importlib.import_module("frechet_merge.adapters.extract")

SAID = os.strerror(errno.EIO)
# what is known of a mean
WHOLE = {"residual": 0.0, "iterations": 0, "converged": True, "variance": 1.0, "squares": [1.0]*3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Two models and two adapters."
    warm()
    folder = tmp_path_factory.mktemp("whole")
    for i, name in enumerate(MODELS):
        full(folder/name, i % 2)
    adapter(folder/"x", 0)
    adapter(folder/"y", 1)
    return folder


class TestReading:
    "A disk that fails is no damaged file, and says which file it was."

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_file_that_cannot_be_opened(self, models, monkeypatch, name):
        real = os.open

        def broken(path, *how, **more):
            if str(path).endswith(f"m1/{name}"):
                raise OSError(errno.EIO, SAID, str(path))
            return real(path, *how, **more)

        monkeypatch.setattr(os, "open", broken)
        with pytest.raises(MergeError, match=f"m1/{name}: cannot be read .{SAID}") as found:
            merge(models)
        assert isinstance(found.value, OSError) and found.value.errno == errno.EIO
        assert "damaged" not in str(found.value)
        sent = pickle.loads(pickle.dumps(found.value))
        assert (str(sent), sent.errno) == (str(found.value), errno.EIO)

    def test_numbers_that_cannot_be_read(self, models, tmp_path, monkeypatch):
        def broken(*_):
            raise OSError(errno.EIO, SAID)

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(Unreadable, match="model.safetensors: cannot be read"):
            merge(models, out=tmp_path/"out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1", "m2"]

    def test_a_shard_that_is_missing(self, whole, tmp_path):
        folder = shutil.copytree(whole/"b", tmp_path/"b")
        (folder/"model-00002-of-00002.safetensors").unlink()
        with pytest.raises(MergeError, match="00002-of-00002.*cannot be read.*\nCheck that it is"):
            load(folder)

    def test_a_text_that_fills_the_memory(self, models):
        with open(models[1]/"config.json", "w") as f:
            f.truncate(shards.MAX_TEXT + 1)
        with pytest.raises(MergeError, match="config.json: has more than 32 MiB"):
            merge(models)

    def test_a_file_that_grows_for_ever_is_copied_once(self, tmp_path):
        file = tmp_path/"log.json"
        file.write_bytes(b"1"*(3 << 20))
        found = []
        for piece in pieces_of(file):
            found.append(piece)
            with open(file, "ab") as f:
                f.write(piece)
        assert sum(map(len, found)) == 3 << 20

    def test_a_bad_disk_is_not_called_standard_output(self):
        said = _of_a_disk(OSError(errno.EIO, SAID))
        assert "standard output" not in said and SAID in said
        said = _of_a_disk(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        assert "ulimit -n" in said


def _made(folder):
    folder.mkdir(parents=True)
    return folder


class TestMeanwhile:
    "What stands beside the weights is held to what it was when the model was opened, too."

    @pytest.mark.parametrize("how", ["cut", "replaced", "gone"])
    def test_tokens_that_change(self, whole, tmp_path, monkeypatch, how):
        folder = shutil.copytree(whole, tmp_path/"all")
        tokens = folder/"a"/"tokenizer.json"

        def changed(*given, **more):
            if how == "cut":
                os.truncate(tokens, 10)
            elif how == "gone":
                tokens.unlink()
            else:
                (folder/"new").write_bytes(tokens.read_bytes())
                (folder/"new").replace(tokens)
            return real(*given, **more)

        real = merging.write_companions
        monkeypatch.setattr(merging, "write_companions", changed)
        with pytest.raises(MergeError, match="a/tokenizer.json: "):
            merge([folder/"a", folder/"b"], out=folder/"out")
        assert not [p for p in folder.iterdir() if "out" in p.name]

    def test_tokens_that_change_while_an_adapter_is_extracted(self, whole, tmp_path, monkeypatch):
        folder = shutil.copytree(whole, tmp_path/"all")

        def changed(*given, **more):
            os.truncate(folder/"a"/"tokenizer.json", 10)
            return real(*given, **more)

        real = extracting.save_tensors
        monkeypatch.setattr(extracting, "save_tensors", changed)
        with pytest.raises(MergeError, match="a/tokenizer.json: "):
            extracting.extract(folder/"a", folder/"b", rank=2, out=folder/"out")
        assert not [p for p in folder.iterdir() if "out" in p.name]

    @pytest.mark.parametrize("file", ["x/adapter_config.json", "pipe/tokenizer/vocab.json"])
    def test_what_parts_and_adapters_bring(self, whole, tmp_path, file):
        folder = shutil.copytree(whole, tmp_path/"all")
        save_file({"w": torch.ones(2)}, _made(folder/"pipe"/"unet")/"model.safetensors")
        (_made(folder/"pipe"/"tokenizer")/"vocab.json").write_text("{}")
        parts = {"unet": ["diffusers", "U"], "tokenizer": ["transformers", "T"]}
        (folder/"pipe"/"model_index.json").write_text(json.dumps(parts))
        c = load(folder/"pipe" if "pipe" in file else f"{folder/'a'}+{folder/'x'}")
        refuse_changed_beside(c)
        (folder/file).write_text("{ }")
        with pytest.raises(MergeError, match=f"{file}: was .* after the model was opened"):
            refuse_changed_beside(c)

    def test_a_pickle_that_is_cut(self, models, tmp_path, monkeypatch):
        pickled = tmp_path/"p"/"pytorch_model.bin"
        pickled.parent.mkdir()
        torch.save(load_file(models[0]/"model.safetensors"), pickled)

        def changed(*given, **more):
            with open(pickled, "r+b") as f:
                f.seek(-1, os.SEEK_END)
                f.truncate()
            return real(*given, **more)

        real = merging.write_companions
        monkeypatch.setattr(merging, "write_companions", changed)
        with pytest.raises(MergeError, match="pytorch_model.bin: was cut short after its header"):
            merge([pickled.parent, models[1]], out=tmp_path/"out", allow_pickle=True)

    def test_what_is_of_no_model_may_change(self, models, tmp_path, monkeypatch):
        def changed(*given, **more):
            (models[0]/"log.json").write_text("{}")
            return real(*given, **more)

        real = merging.write_companions
        monkeypatch.setattr(merging, "write_companions", changed)
        merge(models, out=tmp_path/"out")


@pytest.mark.parametrize(
    "key, value",
    [
        ("inputs", {"models": [{"name": "a"}]}),
        ("inputs", {"models": [{"name": "a", "files": {"x": 1}}]}),
        ("means", {"w": {"residual": 0.0}}),
        ("means", {"w": WHOLE | {"variance": "1"}}),
        ("means", {"w": WHOLE | {"squares": [[1.0]]}}),
        ("means", {"w": WHOLE | {"variance": 10**400}}),
        ("coefficients", [{"scale": "1", "tensors": 1, "first": "w"}]),
        ("about", [{"license": [1]}]),
        ("recipe", {"models": 3}),
    ],
)
def test_a_record_that_no_merge_wrote(models, tmp_path, key, value):
    merge(models, out=tmp_path/"out")
    held = json.loads((tmp_path/"out"/NAME).read_text())
    (tmp_path/"out"/NAME).write_text(json.dumps(held | {key: value}))
    with pytest.raises(MergeError, match=f"has {key} = .*which no merge wrote"):
        write_report(tmp_path/"out")


@pytest.mark.parametrize("kind", ["text", "pickle", "pipe", "empty"])
def test_a_state_that_no_run_left(tmp_path, kind):
    state = tmp_path/"state"
    if kind == "pipe":
        os.mkfifo(state)
    elif kind == "pickle":
        torch.save({"run": 1}, state)
    else:
        state.write_text("x"*(kind == "text"))
    remedy = "Put the file itself" if kind == "pipe" else "Delete it to start again"
    with pytest.raises(MergeError, match=f"state: is .*\n{remedy}"):
        _state_in(state, "cpu")


def test_no_room_for_temporary_files_is_no_fault_of_the_model(tmp_path, monkeypatch):
    save(tmp_path/"m", tensors(), {"model_type": "llama", **LLAMA})

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", full_disk)
    with pytest.raises(OSError) as found:
        open_model(str(tmp_path/"m"))
    said = _of_a_disk(found.value)
    assert "No space left on device" in said and "TMPDIR" in said


class TestDescriptors:
    "However few there are, what was begun is removed."

    @pytest.mark.parametrize("words", ["merge a b -o out", "merge x y -o out"])
    @pytest.mark.parametrize("more", [2, 5, 8, 12, 16])
    def test_few(self, whole, tmp_path, words, more):
        folder = shutil.copytree(whole, tmp_path/"all")
        used = len(os.listdir("/proc/self/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, hard))
        try:
            heard = run(tuple(words.split()), folder)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")], heard
        assert heard.code == 0 or not (folder/"out").exists()
        if "Too many open files" in heard.text:
            assert "ulimit -n" in heard.text


def test_what_ends_a_command_leaves_nothing():
    assert {signal.SIGQUIT, signal.SIGXCPU} <= {*ENDING}


def test_nothing_that_moves_a_cursor_is_printed(capsys):
    say("out\x1b[2J\x9b: größer\n\tso")
    assert capsys.readouterr().out == "out\\x1b[2J\\x9b: größer\n\tso\n"

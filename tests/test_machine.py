"""What a machine does to a command while it runs: readers that go, signals, kills, files that are
cut or replaced, and disks without room. No fault of it is taken for a fault of a model."""

import ast
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, cli, save, tensors
from mutated import MODELS, adapter, full, run, warm
from safetensors.torch import load_file, save_file
from test_examples import make, write

from frechet_merge import MergeError, load, merge
from frechet_merge.cli.commands import _of_a_disk, _unforeseen
from frechet_merge.files import output
from frechet_merge.files.devices import as_device
from frechet_merge.files.output import temporary
from frechet_merge.files.tensors import FileTensor
from frechet_merge.huggingface import models as opening
from frechet_merge.huggingface.examples import _rows, examples
from frechet_merge.huggingface.models import open_model
from frechet_merge.symmetries import families
from frechet_merge.messages import machine_error, pass_on

# the function of the same name hides it
reading = importlib.import_module("frechet_merge.huggingface.examples")

WRITTEN = {
    "merge": "merge a b -o out",
    "extract": "extract a --base b --rank 1 -o out",
    "convert": "convert x --to mlx -o out",
    "mixture": "mixture a b --gate random -o out",
    "align": "align small other -o out",
    "curvature": "curvature small texts.jsonl --max-samples 4 -o out.safetensors",
    "basis": "basis a b --base c -k 1 -o out.safetensors",
    "suggest": "suggest a b --base c -o out.yaml",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "What the commands read."
    warm()
    folder = tmp_path_factory.mktemp("whole")
    for i, name in enumerate((*MODELS, "c")):
        full(folder/name, i % 2)
    adapter(folder/"x", 0)
    for i, name in enumerate(("small", "other")):
        make("llama", folder/name, i)
    write(folder/"texts.jsonl")
    return folder


def left_in(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith((".", "out")))


def to_nobody(folder, *words, stream="stdout"):
    "A command whose reader has gone before it says anything; what the other stream says."
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
    command = [sys.executable, "-m", "frechet_merge", *words]
    found = subprocess.run(command, cwd=folder, text=True, **streams)
    os.close(writing)
    return found.returncode, (found.stderr if stream == "stdout" else found.stdout)


class TestReadersThatGo:
    "`head` has seen enough, and nothing is wrong with that."

    @pytest.mark.parametrize(
        "words, made",
        [
            ("inspect a b --json", None),
            ("merge --help", None),
            ("merge a b --report -o out", "out/report.html"),
            ("suggest a b --base c -o out.yaml", "out.yaml"),
        ],
    )
    def test_what_is_written_is_written(self, whole, tmp_path, words, made):
        folder = shutil.copytree(whole, tmp_path/"all")
        assert to_nobody(folder, *words.split()) == (0, "")
        assert made is None or (folder/made).stat().st_size

    def test_the_exit_code_is_that_of_what_was_asked(self, whole):
        code, said = to_nobody(whole, "inspect", "a", "small")
        assert code == 1 and "Traceback" not in said

    def test_errors_that_nobody_hears(self, whole):
        assert to_nobody(whole, "inspect", "a", "nowhere", stream="stderr") == (1, "")


def test_signals_that_interrupt_reading_change_no_byte(models, tmp_path):
    merge(models, out=tmp_path/"quiet")
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
    try:
        merge(models, out=tmp_path/"loud")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(heard) > 3
    quiet, loud = (tmp_path/n/"model.safetensors" for n in ("quiet", "loud"))
    assert quiet.read_bytes() == loud.read_bytes()


class TestKilled:
    "What was stopped before it had a name is not seen, is named, and goes with the next one."

    @pytest.mark.parametrize("name", WRITTEN)
    def test_while_it_is_written(self, whole, tmp_path, monkeypatch, name):
        folder, words = shutil.copytree(whole, tmp_path/"all"), tuple(WRITTEN[name].split())
        with monkeypatch.context() as patch:
            patch.setattr(output, "_flush", lambda _: os.kill(os.getpid(), signal.SIGKILL))
            assert run(words, folder).fault == "ended by signal 9"
        # a file is claimed by one, and written in another
        remains = left_in(folder)
        assert 1 <= len(remains) <= 2
        heard = run(words, folder)
        assert heard.code == 0, heard
        for left in remains:
            assert left.startswith(".out") and left.endswith(".partial")
            assert f"{left}: what a " in heard.text.replace("\n", " "), heard
        assert left_in(folder) == [words[-1]]

    def test_what_is_only_looked_at(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        child = os.fork()
        if child == 0:
            with temporary() as folder:
                (folder/"model.safetensors").write_bytes(b"x")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        (left,) = left_in(tmp_path)
        with pytest.warns(UserWarning, match=f"{left}: what a run that was stopped had left"):
            with temporary() as folder:
                # another run at the same time keeps its own
                with temporary() as other:
                    assert folder.is_dir() and other.is_dir() and other != folder
        assert not left_in(tmp_path)


class TestFaultsOfTheMachine:
    "A library may raise what it likes; a disk, a memory and descriptors are heard through it."

    def wrapped(self, inner):
        try:
            try:
                raise inner
            except type(inner):
                raise ValueError("this is no config") from None
        except ValueError as e:
            return e

    @pytest.mark.parametrize("number", [28, 27, 122, 5, 24])
    def test_a_disk_behind_what_was_said(self, number):
        found = machine_error(self.wrapped(OSError(number, os.strerror(number))))
        assert isinstance(found, OSError) and found.errno == number

    def test_what_other_languages_say(self):
        found = machine_error(RuntimeError("I/O error: No space left on device (os error 28)"))
        assert isinstance(found, OSError) and "No space left" in str(found)
        with pytest.raises(RuntimeError) as e:
            torch.empty(1 << 60, dtype=torch.uint8)
        assert isinstance(machine_error(e.value), MemoryError)
        assert "not enough memory" in _unforeseen(e.value)

    def test_what_is_no_fault_of_it(self):
        for e in (OSError("can't load the config"), FileNotFoundError(2, "x"), KeyError("x")):
            assert machine_error(e) is None
            pass_on(e)

    def test_nobody_swallows_it(self):
        "Whoever catches everything raises it again, hands it on, or lets such faults through."
        odd = set()
        for path in sorted((ROOT/"frechet_merge").glob("*/*.py")):
            functions = ast.walk(ast.parse(path.read_text()))
            # what the hub does not take is said, with what it answered
            for function in functions if path.stem != "pushing" else ():
                if not isinstance(function, ast.FunctionDef):
                    continue
                for node in ast.walk(function):
                    if isinstance(node, ast.ExceptHandler) and not lets_through(node):
                        odd.add(f"{path.stem}.{function.name}")
        assert odd <= HANDED_ON

    def test_no_room_to_try_symmetries(self, whole, tmp_path):
        folder = shutil.copytree(whole, tmp_path/"all")
        heard = run(("align", "small", "other", "-o", "out"), folder, largest=300)
        assert heard.code == 1 and "File too large" in heard.text, heard
        assert "TMPDIR" in heard.text and "symmetries" not in heard.text
        assert not left_in(folder)

    def test_a_small_model_that_no_library_makes_is_none(self, monkeypatch, tmp_path):
        def broken(*_):
            raise KeyError("what a library raises")

        monkeypatch.setattr(families, "_small_module", broken)
        assert families.Trial.of({"model_type": "llama"}, tmp_path) is None

    def test_no_place_for_temporary_files(self, monkeypatch):
        def none():
            raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

        monkeypatch.setattr("tempfile.gettempdir", none)
        with pytest.raises(MergeError, match="no place for temporary files.*\n.*TMPDIR"):
            with temporary():
                pass
        assert "No usable" in _of_a_disk(FileNotFoundError(2, "No usable temporary directory"))


# whoever hands what was raised to another thread or process, says it of a store, or is
# the last one
HANDED_ON = {
    "commands.main",
    "executors.attempt",
    "executors.sendable",
    "hub._ask",
    "hub.in_time",
    "hub.run",
    "ranges.asked",
}


def lets_through(handler):
    "Whether a handler of everything passes on what the machine says."
    caught = ast.unparse(handler.type) if handler.type else "BaseException"
    if caught not in ("Exception", "BaseException"):
        return True
    is_raised = any(isinstance(x, ast.Raise) and x.exc is None for x in handler.body)
    calls = {ast.unparse(x.func) for x in ast.walk(handler) if isinstance(x, ast.Call)}
    return is_raised or "pass_on" in calls


def repacked(source, to, how, change=lambda name, held: held, backwards=False):
    "A zip with the same files, packed by another program."
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(to, "w", how) as b:
        for record in a.infolist()[:: -1 if backwards else 1]:
            b.writestr(record.filename, change(record.filename, a.read(record.filename)))
    return to


def turned(name, held):
    "The numbers of float32 in the other order of bytes, as a machine of that kind writes them."
    if name.endswith("/byteorder"):
        return b"big"
    return np.frombuffer(held, "<f4").astype(">f4").tobytes() if "/data/" in name else held


def of_all_kinds():
    "Tensors that share numbers, stand across them, have none, and are of many types."
    x, e = (torch.randn(12, 5, generator=torch.Generator().manual_seed(i)) for i in range(2))
    found = {"a": x, "b": x, "t": x.T, "rows": x[3:7], "steps": x[:, ::2], "none": x[:0]}
    found |= {"p": torch.nn.Parameter(e), "one": torch.tensor(3.0), "i": torch.arange(5)}
    return found | {"bf": e.bfloat16(), "wide": torch.ones(1).expand(4), "is": e > 0}


class TestPickles:
    "They are read by ranges, so that nobody who cuts one ends the process."

    def same(self, c, state):
        for name, x in state.items():
            assert (c[name].dtype, c[name].shape) == (x.dtype, x.shape)
            assert torch.equal(c[name], x), name
        assert {*c} == {*state}

    def test_every_kind_of_tensor(self, tmp_path):
        state = of_all_kinds()
        torch.save(state, tmp_path/"m.bin")
        c = load(tmp_path/"m.bin", allow_pickle=True)
        self.same(c, state)
        assert c.tied == {"b": "a"}
        assert isinstance(c.lazy["a"], FileTensor) and isinstance(c.lazy["rows"], FileTensor)
        torch.save(state, tmp_path/"old.bin", _use_new_zipfile_serialization=False)
        self.same(load(tmp_path/"old.bin", allow_pickle=True), state)

    @pytest.mark.parametrize("how", ["deflated", "backwards", "stored", "turned"])
    def test_what_was_packed_again(self, tmp_path, how):
        state = of_all_kinds() if how != "turned" else {"a": torch.randn(3, 4)}
        torch.save(state, tmp_path/"m.bin")
        packed = zipfile.ZIP_DEFLATED if how == "deflated" else zipfile.ZIP_STORED
        more = {"change": turned} if how == "turned" else {"backwards": how == "backwards"}
        repacked(tmp_path/"m.bin", tmp_path/"n.bin", packed, **more)
        self.same(load(tmp_path/"n.bin", allow_pickle=True), state)

    @pytest.mark.parametrize("cut", [0, 1000])
    def test_one_that_is_cut_while_it_is_merged(self, models, tmp_path, monkeypatch, cut):
        pickled = tmp_path/"p"/"pytorch_model.bin"
        pickled.parent.mkdir()
        torch.save(load_file(models[0]/"model.safetensors"), pickled)
        real = output.hidden

        def later(*given, **more):
            os.truncate(pickled, cut)
            return real(*given, **more)

        monkeypatch.setattr(output, "hidden", later)
        with pytest.raises(MergeError, match="pytorch_model.bin: was cut short after its header"):
            merge([pickled.parent, models[1]], out=tmp_path/"out", allow_pickle=True)
        assert not left_in(tmp_path)

    def test_a_process_is_sent_a_place_and_no_numbers(self, models, tmp_path):
        torch.save(load_file(models[0]/"model.safetensors"), tmp_path/"m.bin")
        both = [tmp_path/"m.bin", models[1]/"model.safetensors"]
        few = merge(both, allow_pickle=True, executor="processes", out=tmp_path/"a").tensors
        one = merge(both, allow_pickle=True, executor="serial", out=tmp_path/"b").tensors
        assert all(torch.equal(few[n], one[n]) for n in one)


class TestWhatAFileIs:
    "Its bytes say it, to everybody."

    def test_safetensors_by_the_name_of_a_pickle(self, whole, tmp_path):
        folder = shutil.copytree(whole/"small", tmp_path/"small")
        (folder/"model.safetensors").rename(folder/"pytorch_model.bin")
        opened, usual = open_model(folder), open_model(whole/"small")
        for (n, x), (_, y) in zip(opened.model.named_parameters(), usual.model.named_parameters()):
            assert torch.equal(x, y), n
        code, _, err = cli("curvature", "small", whole/"texts.jsonl", "-o", "s", cwd=tmp_path)
        assert code == 0, err

    def test_shards_of_safetensors_by_names_of_pickles(self, whole, tmp_path):
        folder = shutil.copytree(whole/"small", tmp_path/"small")
        state, of = load_file(folder/"model.safetensors"), {}
        (folder/"model.safetensors").unlink()
        for i in (1, 2):
            part = {n: x for k, (n, x) in enumerate(sorted(state.items())) if k % 2 == i - 1}
            file = f"pytorch_model-{i:05d}-of-00002.bin"
            save_file(part, folder/file, {"format": "pt"})
            of |= dict.fromkeys(part, file)
        (folder/"pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": of}))
        opened = open_model(folder)
        assert torch.equal(dict(opened.model.named_parameters())["model.norm.weight"],
                           state["model.norm.weight"])

    def test_a_pickle_is_run_as_it_is_merged(self, whole, tmp_path):
        folder = shutil.copytree(whole/"small", tmp_path/"small")
        torch.save(load_file(folder/"model.safetensors"), folder/"pytorch_model.bin")
        (folder/"model.safetensors").unlink()
        opened, usual = open_model(folder, allow_pickle=True), open_model(whole/"small")
        for (n, x), (_, y) in zip(opened.model.named_parameters(), usual.model.named_parameters()):
            assert torch.equal(x, y), n
        with pytest.raises(MergeError, match="is a pickle"):
            open_model(folder)

    @pytest.mark.parametrize("indent", [None, 2])
    def test_a_header_that_is_indented(self, tmp_path, indent):
        save(tmp_path/"m", tensors())
        held = (tmp_path/"m"/"model.safetensors").read_bytes()
        n = int.from_bytes(held[:8], "little")
        header = json.dumps(json.loads(held[8 : 8 + n]), indent=indent).encode()
        file = tmp_path/"model.ckpt"
        file.write_bytes(len(header).to_bytes(8, "little") + header + held[8 + n :])
        assert torch.equal(load(file)["q.weight"], tensors()["q.weight"])


class TestInputsThatChange:
    "What is read in several steps is what it was at the first."

    @pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
    def test_while_a_model_is_opened(self, whole, tmp_path, monkeypatch, name):
        folder, real = shutil.copytree(whole/"small", tmp_path/"small"), opening._put

        def later(*given):
            held = (folder/name).read_bytes()
            (folder/name).write_bytes(held + (b"" if name.endswith("safetensors") else b" "))
            return real(*given)

        monkeypatch.setattr(opening, "_put", later)
        with pytest.raises(MergeError, match=f"{name}: was replaced or written to after the model"):
            open_model(folder)

    def test_examples_that_are_written_to(self, tmp_path, monkeypatch):
        write(tmp_path/"texts.jsonl")

        def later(path):
            yield from _rows(path)
            with open(path, "a") as f:
                f.write('{"sentence": "the cat", "label": 0, "n": 1}\n')

        monkeypatch.setattr(reading, "_rows", later)
        with pytest.raises(MergeError, match="texts.jsonl: was replaced or written to after it"):
            examples(tmp_path/"texts.jsonl")

    def test_layers_of_several_models(self, whole, tmp_path):
        folder = shutil.copytree(whole, tmp_path/"all")
        c = load(f"{folder/'a'}[0:1]|{folder/'b'}[1:2]")
        assert {f.parent.name for f in c.beside} == {"a", "b"}


def test_transformers_maps_no_pickle(whole, tmp_path, monkeypatch):
    "Where it did, a file that is cut would end the process."
    folder = shutil.copytree(whole/"small", tmp_path/"small")
    torch.save(load_file(folder/"model.safetensors"), folder/"pytorch_model.bin")
    (folder/"model.safetensors").unlink()
    real, seen = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k.get("mmap")) or real(*a, **k))
    assert transformers is not None
    open_model(folder, allow_pickle=True)
    assert seen and not any(seen)


def test_a_device_without_float64_is_refused(monkeypatch):
    "As the GPUs of Apple, of which torch says it in this way."

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch.Tensor, "double", double)
    with pytest.raises(ValueError, match="device 'cpu' has no float64.*use the CPU"):
        as_device("cpu")

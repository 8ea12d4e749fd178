"""Files that lie, change or lead elsewhere: a merge is right, or is refused by name before anything
is written, and touches nothing that is not its own."""

from dataclasses import dataclass
import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import warnings
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint

import pytest
import torch
from conftest import save, tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from frechet_merge import MergeError, Sphere, load, merge
from frechet_merge.files import output
from frechet_merge.geometries import registry
from frechet_merge.matching.views import in_front
from frechet_merge.messages import warn
from frechet_merge.cli.commands import ENDING, _end, main
from frechet_merge.curvature.collecting import Statistics
from frechet_merge.merging.companions import write_companions
from frechet_merge.execution.block import Job
from frechet_merge.execution.executors import Run
from frechet_merge.recipes.written import read_recipe, run_recipe
from frechet_merge.huggingface.models import open_model
from frechet_merge.execution.run import Plan, in_memory, into_folder, mapper
from frechet_merge.files.output import OURS, free, staged, staged_file
from frechet_merge.adapters.patterns import is_meant, matches
from frechet_merge.files.shards import ShardWriter, read_header, save_tensors


def lora(folder, seed=0, config=None, **more):
    "An adapter of two layers, the first of 4 outputs."
    g = torch.Generator().manual_seed(seed)
    state = {}
    for layer, n in (("a", 6), ("z", 5)):
        name = f"base_model.model.{layer}.lora_"
        state[f"{name}A.weight"] = torch.randn(2, n, generator=g)
        state[f"{name}B.weight"] = torch.randn(4, 2, generator=g)
    folder.mkdir()
    save_file(state | more, folder/"adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a", "z"]}
    (folder/"adapter_config.json").write_text(json.dumps(said | (config or {})))
    return folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())



@dataclass(frozen=True)
class Writes(Job):
    "A job that writes ones where it likes: (name, start, how many)."

    ranges: list
    name: str = "a"
    size: int = 6

    def run(self, write):
        for name, start, n in self.ranges:
            write(name, start, torch.ones(n))
        return {}


def carry_out(plan, out):
    "A plan into memory, or into a folder that is staged."
    if out is None:
        return in_memory(plan, Run("serial"))
    with staged(out) as part:
        return into_folder(plan, part, 10**9, Run("serial"))


class TestStaging:
    "What is written lies in a folder of its own, and nothing else is followed, emptied or removed."

    @pytest.mark.parametrize("name", [".out.partial", ".out.k3l5m7_x.partial", "out.part"])
    def test_links_are_not_followed(self, models, tmp_path, name):
        (tmp_path/"precious").mkdir()
        (tmp_path/"precious"/"thesis").write_text("years")
        (tmp_path/"precious"/"lock").write_bytes(OURS)
        (tmp_path/name).symlink_to("precious")
        merge(models, out=tmp_path/"out")
        assert names(tmp_path/"precious") == ["lock", "thesis"]
        assert (tmp_path/name).is_symlink() and not (tmp_path/"out").is_symlink()

    def test_a_file_is_not_written_through_a_link(self, tmp_path):
        (tmp_path/"thesis").write_text("years")
        (tmp_path/"s.st.part").symlink_to("thesis")
        Statistics({"w": torch.ones(3)}).save(tmp_path/"s.st")
        assert (tmp_path/"thesis").read_text() == "years"
        assert names(tmp_path) == ["s.st", "s.st.part", "thesis"]

    @pytest.mark.parametrize("lock", [None, b"", b"mine"])
    def test_what_only_looks_like_remains_stays(self, tmp_path, lock):
        other = tmp_path/".out.k3l5m7_x.partial"
        other.mkdir()
        (other/"thesis").write_text("years")
        if lock is not None:
            (other/"lock").write_bytes(lock)
        with staged(tmp_path/"out"):
            pass
        assert (other/"thesis").exists()

    def test_remains_of_a_kill_go_and_of_another_output_stay(self, tmp_path):
        for name in (".out.k3l5m7_x.partial", ".out.b.k3l5m7_x.partial"):
            (tmp_path/name/"merge").mkdir(parents=True)
            (tmp_path/name/"lock").write_bytes(OURS)
            (tmp_path/name/"merge"/"link").symlink_to(tmp_path)
        with staged(tmp_path/"out"):
            pass
        assert names(tmp_path) == [".out.b.k3l5m7_x.partial", "out"]

    def test_one_merge_at_a_time(self, tmp_path):
        with staged(tmp_path/"out") as part:
            (part/"x").write_text("x")
            with pytest.raises(MergeError, match="another merge is writing it"):
                with staged(tmp_path/"out"):
                    pass
        assert names(tmp_path) == ["out"] and names(tmp_path/"out") == ["x"]

    def test_two_may_write_one_file(self, tmp_path):
        with staged_file(tmp_path/"s") as one:
            one.write_text("one")
            with staged_file(tmp_path/"s") as two:
                two.write_text("two")
            assert (tmp_path/"s").read_text() == "two"
        assert (tmp_path/"s").read_text() == "one" and names(tmp_path) == ["s"]

    def test_what_appears_meanwhile_is_not_replaced(self, tmp_path):
        with pytest.raises(MergeError, match="was written to by something else"):
            with staged(tmp_path/"out"):
                (tmp_path/"out").mkdir()
                (tmp_path/"out"/"precious").write_text("mine")
        assert names(tmp_path) == ["out"] and names(tmp_path/"out") == ["precious"]

    def test_the_result_has_the_usual_modes(self, tmp_path):
        (tmp_path/"folder").mkdir()
        (tmp_path/"file").touch()
        with staged(tmp_path/"a"), staged_file(tmp_path/"b") as b:
            b.write_text("x")
        for made, usual in (("a", "folder"), ("b", "file")):
            assert (tmp_path/made).stat().st_mode == (tmp_path/usual).stat().st_mode

    def test_long_names(self, tmp_path):
        for name in ("x"*255, "ä"*120):
            with staged(tmp_path/name):
                pass
            assert (tmp_path/name).is_dir()

    def test_it_is_on_the_disk_before_it_has_its_name(self, tmp_path, monkeypatch):
        done = []
        sync, rename = os.fsync, os.rename
        monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.fstat(fd).st_ino), sync(fd)))
        monkeypatch.setattr(os, "rename", lambda *a: (done.append("renamed"), rename(*a)))
        with staged(tmp_path/"out") as part:
            (part/"sub").mkdir()
            (part/"sub"/"x").write_text("x")
        here = [tmp_path/"out"/"sub"/"x", tmp_path/"out"/"sub", tmp_path/"out"]
        assert done == [*(p.stat().st_ino for p in here), "renamed", tmp_path.stat().st_ino]

    def test_a_mounted_folder_is_refused_before_the_work(self, tmp_path, monkeypatch):
        (tmp_path/"out").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda p: str(p) == str(tmp_path/"out"))
        with pytest.raises(MergeError, match="where a disk is mounted.*\nName a folder in it"):
            free(tmp_path/"out")
        assert free(tmp_path/"out"/"in") == tmp_path/"out"/"in"

    @pytest.mark.skipif(not os.path.exists("/proc/self/mountinfo"), reason="of Linux")
    def test_mounts_are_those_of_the_kernel(self):
        assert output._is_mounted(output.Path("/proc")) and not output._is_mounted(
            output.Path("/proc/self")
        )

    def test_none_left_of_the_descriptors(self, tmp_path):
        "They are what removing a folder takes."
        code = (
            "import os, resource, sys\n"
            "from pathlib import Path\n"
            "from frechet_merge.files.output import staged\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
            "try:\n"
            "    with staged(Path('out')) as part:\n"
            "        (part/'sub'/'sub').mkdir(parents=True)\n"
            "        while True: os.open('/dev/null', os.O_RDONLY)\n"
            "except OSError as e: print(e.errno)\n"
        )
        r = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert r.stdout == f"{errno.EMFILE}\n" and not names(tmp_path), r.stderr

    @pytest.mark.parametrize("ignored", [False, True])
    def test_a_closed_terminal(self, monkeypatch, ignored):
        "It ends a run as SIGTERM does; under nohup it does not."
        was = {number: signal.getsignal(number) for number in ENDING}
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        ended = []
        monkeypatch.setattr(os, "_exit", ended.append)
        monkeypatch.setattr(
            "frechet_merge.cli.commands.app", lambda **_: os.kill(os.getpid(), signal.SIGHUP)
        )
        try:
            main()
        finally:
            for number, handler in was.items():
                signal.signal(number, handler)
        assert ended == [0 if ignored else 129]

    @pytest.mark.parametrize("number", ENDING)
    @pytest.mark.parametrize("is_imported", [False, True])
    def test_a_signal_ends_a_command_at_once_while_torch_is_imported(
        self, monkeypatch, number, is_imported
    ):
        spec = ModuleSpec("torch", None)
        spec._initializing = not is_imported
        monkeypatch.setattr(torch, "__spec__", spec)
        ended = []
        monkeypatch.setattr(os, "_exit", ended.append)
        with pytest.raises(SystemExit) as e:
            _end(number, None)
        assert e.value.code == 128 + number and ended == [128 + number]*(not is_imported)


class TestBounds:
    "No number is written beside its tensor."

    @pytest.mark.parametrize("n", [8, 50, 1, 0])
    @pytest.mark.parametrize("to", ["out", None])
    def test_a_bias_that_is_not_of_its_layer(self, tmp_path, n, to):
        key = "base_model.model.a.lora_B.bias"
        good, bad = lora(tmp_path/"good", 0, **{key: torch.ones(4)}), lora(tmp_path/"bad", 1)
        save_file(
            load_file(bad/"adapter_model.safetensors") | {key: torch.ones(n)},
            bad/"adapter_model.safetensors",
        )
        for both in ([good, bad], [bad, good]):
            with pytest.raises(MergeError, match=f"bad: tensor '{key}' has shape .{n}., .* 4 out"):
                merge(both, out=to and tmp_path/to)
        assert names(tmp_path) == ["bad", "good"]

    def test_a_bias_that_is_not_that_of_the_base(self, tmp_path):
        key = "base_model.model.a.lora_B.bias"
        ad = lora(tmp_path/"ad", 0, **{key: torch.ones(1)})
        base = {"a.weight": torch.randn(4, 6), "z.weight": torch.randn(4, 5)}
        save(tmp_path/"base", base | {"a.bias": torch.ones(4)})
        with pytest.raises(MergeError, match=re.escape("[1] to 'a.bias', which is [4]")):
            load(f"{tmp_path / 'base'}+{ad}")

    @pytest.mark.parametrize("start, n", [(0, 7), (1, 6), (-1, 2), (6, 1), (10**6, 1)])
    @pytest.mark.parametrize("to", ["out", None])
    def test_a_geometry_that_writes_beside(self, tmp_path, start, n, to):
        "As one of another package might."
        layout = {"a": ((6,), torch.float32), "b": ((6,), torch.float32)}

        writes = [("b", 0, 6), ("a", start, n)]
        with pytest.raises(MergeError, match="tensor 'a' has 6 elements"):
            carry_out(Plan(layout, [Writes(writes)]), to and tmp_path/to)
        assert not names(tmp_path)

    @pytest.mark.parametrize("to", ["out", None])
    def test_a_geometry_that_leaves_something_out(self, tmp_path, to):
        layout = {"a": ((6,), torch.float32)}
        with pytest.raises(MergeError, match="'a' has 6 elements, and 5 were written"):
            carry_out(Plan(layout, [Writes([("a", 0, 5)])]), to and tmp_path/to)
        assert not names(tmp_path)


class TestNames:
    "What a safetensors file cannot hold is refused, and what it can is written."

    @pytest.mark.parametrize("name", ["__metadata__", "\ud800", "a\udfffb"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_names_that_no_file_holds(self, tmp_path, name, tied):
        w = torch.ones(3)
        state = {"w": w, name: w if tied else torch.ones(2)}
        with pytest.raises(MergeError, match="has a name that safetensors files cannot hold"):
            merge([state]*2, out=tmp_path/"out")
        assert not names(tmp_path)
        assert set(merge([state]*2).tensors) == {"w", name}

    def test_a_pickle_with_such_a_name(self, tmp_path):
        (tmp_path/"m").mkdir()
        torch.save({"__metadata__": torch.ones(3)}, tmp_path/"m"/"pytorch_model.bin")
        with pytest.raises(MergeError, match="'__metadata__' has a name"):
            merge([tmp_path/"m"]*2, out=tmp_path/"out", allow_pickle=True)
        assert names(tmp_path) == ["m"]

    def test_a_tied_tensor_called_as_the_word_of_the_format(self, tmp_path):
        w = torch.ones(3)
        with pytest.raises(MergeError, match="'format' shares its memory"):
            merge([{"w": w, "format": w}]*2, out=tmp_path/"out")
        merge([{"format": torch.ones(3)}]*2, out=tmp_path/"out")
        assert torch.equal(load_file(tmp_path/"out"/"model.safetensors")["format"], w)

    def test_names_that_are_no_texts(self):
        with pytest.raises(ValueError, match="0 names a tensor, and is a int"):
            merge([{0: torch.ones(3)}]*2)

    @pytest.mark.parametrize("name", ["", "a\0b", "ä\n", "𝔊"])
    def test_odd_names_that_every_file_holds(self, tmp_path, name):
        merge([{name: torch.ones(3)}, {name: torch.zeros(3)}], out=tmp_path/"out")
        with safe_open(tmp_path/"out"/"model.safetensors", "pt") as f:
            assert [*f.keys()] == [name] and torch.equal(f.get_tensor(name), torch.full((3,), 0.5))

    def test_a_header_that_is_too_long(self, tmp_path, monkeypatch):
        monkeypatch.setattr("frechet_merge.files.shards.MAX_HEADER", 100)
        with pytest.raises(MergeError, match="has room for 100"):
            ShardWriter(tmp_path, {"x"*80: ((3,), torch.float32)}, 10**9)
        assert not names(tmp_path)

    @pytest.mark.parametrize(
        "header, says",
        [
            ({"a": [10**18]*300}, "'a' needs more bytes than any memory has"),
            ({"a": [0, 2**63]}, "'a' needs more bytes"),
            ({"a": [0, 10**400]}, "'a' needs more bytes"),
            ({"\ud800": [4]}, "half of a character"),
            ({"__metadata__": 0, "a": [4]}, "not a map of strings"),
            ({"__metadata__": [], "a": [4]}, "not a map of strings"),
            ({"__metadata__": {"x": "\ud800"}, "a": [4]}, "half of a character"),
        ],
        ids=range(7),
    )
    def test_headers_that_the_reference_refuses(self, tmp_path, header, says):
        n = 0 if 0 in header.get("a", [1]) else 16
        spec = {
            k: {"dtype": "F32", "shape": v, "data_offsets": [0, n]} if k != "__metadata__" else v
            for k, v in header.items()
        }
        for encoding in ("utf-8", "utf-16"):
            blob = json.dumps(spec).encode(encoding)
            (tmp_path/"x").write_bytes(struct.pack("<Q", len(blob)) + blob + bytes(n))
            with pytest.raises(MergeError, match=says if encoding == "utf-8" else "not valid JSON"):
                read_header(tmp_path/"x")

    def test_the_same_statistics_are_the_same_bytes(self, tmp_path):
        about = {f"fact{i}": i for i in range(12)}
        Statistics({"b": torch.ones(3), "a": torch.zeros(2)}, about).save(tmp_path/"s")
        Statistics({"a": torch.zeros(2), "b": torch.ones(3)}, about).save(tmp_path/"t")
        assert (tmp_path/"s").read_bytes() == (tmp_path/"t").read_bytes()
        with safe_open(tmp_path/"s", "pt") as f:
            assert [*f.keys()] == ["a", "b"] and f.metadata()["fact11"] == "11"
        back = Statistics.load(tmp_path/"s")
        assert back.about == about and torch.equal(back["b"], torch.ones(3))
        save_tensors(tmp_path/"u", {k: v for k, v in tensors().items()}, {"k": "v"})
        assert all(torch.equal(x, tensors()[k]) for k, x in load_file(tmp_path/"u").items())


class TestChanges:
    "What is read is the file whose header was read, or an error that names it."

    def replaced(self, path):
        x = load_file(path)
        save_file({f"0{k}": v for k, v in x.items()}, f"{path}.new")
        os.replace(f"{path}.new", path)

    def written_to(self, path):
        raw, t = path.read_bytes(), path.stat().st_mtime_ns
        with open(path, "r+b") as f:
            f.write(raw)
        os.utime(path, ns=(t + 1, t + 1))

    @pytest.mark.parametrize("how", ["replaced", "written_to"])
    @pytest.mark.parametrize("read", [False, True])
    def test_a_shard(self, models, how, read):
        c = load(models[0])
        before = c["s"] if read else None
        getattr(self, how)(models[0]/"model.safetensors")
        # a file that is open is not the one that took its place
        if read and how == "replaced":
            assert torch.equal(c["s"], before) and torch.equal(c["q.bias"], tensors(0)["q.bias"])
            return
        with pytest.raises(MergeError, match="m0/model.safetensors: was replaced or written to"):
            c["q.bias"]

    @pytest.mark.parametrize("which", ["model", "base"])
    def test_between_plan_and_work(self, tmp_path, monkeypatch, which):
        states = [{"x": torch.full((4,), i), "y": torch.zeros(4)} for i in (1.0, 2.0, 3.0)]
        models = [save(tmp_path/f"m{i}", state) for i, state in enumerate(states)]
        module = sys.modules["frechet_merge.execution.block"]
        real, path = module.merge_block, models[0]/"model.safetensors"

        def late(*a):
            if not (tmp_path/"done").exists():
                (tmp_path/"done").touch()
                self.replaced(path)
            return real(*a)

        monkeypatch.setattr(module, "merge_block", late)
        how = {"models": models} if which == "model" else {"models": models[1:], "base": models[0]}
        with pytest.raises(MergeError, match="m0/model.safetensors: was replaced"):
            merge(**how, out=tmp_path/"out", executor="serial")
        assert names(tmp_path) == ["done", "m0", "m1", "m2"]

    def test_before_it_is_hashed(self, models):
        "A card names the file that was read."
        c = load(models[0])
        c["s"]
        self.replaced(models[0]/"model.safetensors")
        with pytest.raises(MergeError, match="was replaced"):
            output.inputs(c)


class TestPlaces:
    "Only files are opened, and only those of the checkpoint are copied."

    @pytest.mark.parametrize(
        "name",
        [
            "model.safetensors",
            "model.safetensors.index.json",
            "config.json",
            "tokenizer.json",
            "generation_config.json",
            "modules.json",
        ],
    )
    def test_pipes(self, models, tmp_path, name):
        for m in models:
            (m/"tokenizer.json").write_text("{}")
        (models[0]/name).unlink(missing_ok=True)
        os.mkfifo(models[0]/name)
        with pytest.raises(MergeError, match=f"m0/{name}: is a pipe or a device"):
            merge(models, out=tmp_path/"out")
        assert "out" not in names(tmp_path)

    def test_pipes_in_an_adapter_and_for_a_pickle(self, tmp_path):
        ad = lora(tmp_path/"ad")
        (ad/"adapter_config.json").unlink()
        os.mkfifo(ad/"adapter_config.json")
        (tmp_path/"p").mkdir()
        os.mkfifo(tmp_path/"p"/"pytorch_model.bin")
        for m in (ad, tmp_path/"p"):
            with pytest.raises(MergeError, match="is a pipe or a device"):
                load(m, allow_pickle=True)

    @pytest.mark.parametrize("to", ["config.json", "nowhere"])
    def test_a_config_that_is_a_link_to_itself(self, models, tmp_path, to):
        (models[0]/"config.json").unlink()
        (models[0]/"config.json").symlink_to(to)
        with pytest.warns(UserWarning, match="config.json: is a link that leads .* nowhere"):
            merge(models[:1], out=tmp_path/"out")
        assert not (tmp_path/"out"/"config.json").exists()

    def test_links_that_lead_out(self, models, tmp_path):
        (tmp_path/"home").mkdir()
        (tmp_path/"home"/"key").write_text("PRIVATE")
        m = models[0]
        (m/"tokenizer.json").write_text("{}")
        (m/"vocab.json").symlink_to("tokenizer.json")
        for name in ("tokenizer_extra.json", "modeling_x.py"):
            (m/name).symlink_to("../home/key")
        (m/"vocab.txt").symlink_to("nowhere")
        (m/"1_Pooling"/"in").mkdir(parents=True)
        (m/"1_Pooling"/"in"/"x").write_text("x")
        (m/"1_Pooling"/"home").symlink_to("../../home")
        (m/"1_Pooling"/"key").symlink_to("../../home/key")
        (m/"2_Dense").symlink_to("../home")
        paths = ["1_Pooling", "2_Dense", f"../{m.name}/1_Pooling"]
        (m/"modules.json").write_text(json.dumps([{"path": p} for p in paths]))
        with pytest.warns(UserWarning) as said:
            merge(models, out=tmp_path/"out")
        left = ("tokenizer_extra.json", "modeling_x.py", "vocab.txt", "home", "key", "2_Dense")
        for name in left:
            assert any(f"/{name}: is " in str(w.message) for w in said), name
        copied = {str(p.relative_to(tmp_path/"out")) for p in (tmp_path/"out").rglob("*")}
        assert copied == {
            "1_Pooling",
            "1_Pooling/in",
            "1_Pooling/in/x",
            "frechet_merge.json",
            "README.md",
            "config.json",
            "model.safetensors",
            "modules.json",
            "tokenizer.json",
            "vocab.json",
        }
        assert not (tmp_path/"out"/"vocab.json").is_symlink()
        assert "out" in names(tmp_path) and not [n for n in names(tmp_path) if n.startswith(".")]

    @pytest.mark.parametrize("blobs", ["own", "other", "link"])
    def test_the_cache_of_the_hub(self, tmp_path, blobs):
        "A snapshot is made of links to its own blobs."
        repo, there = tmp_path/"models--o--m", tmp_path/"elsewhere"
        snapshot = repo/"snapshots"/"abc"
        snapshot.mkdir(parents=True)
        there.mkdir()
        if blobs == "link":
            (repo/"blobs").symlink_to(there)
        else:
            (repo/"blobs").mkdir()
        target = there if blobs == "other" else repo/"blobs"
        (target/"f00").write_text("{}")
        (snapshot/"tokenizer.json").symlink_to(target/"f00")
        (tmp_path/"out").mkdir()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            write_companions(tmp_path/"out", [snapshot])
        assert names(tmp_path/"out") == (["tokenizer.json"] if blobs == "own" else [])
        assert len(said) == (blobs != "own")

    def test_what_is_copied_is_ours(self, models, tmp_path):
        "A model that may only be read is no folder that may only be read."
        m = models[0]
        (m/"1_Pooling").mkdir()
        (m/"1_Pooling"/"config.json").write_text("{}")
        (m/"modules.json").write_text('[{"path": "1_Pooling"}]')
        for p in (m/"1_Pooling"/"config.json", m/"1_Pooling"):
            p.chmod(p.stat().st_mode & ~0o222)
        out = merge(models, out=tmp_path/"out").out
        (m/"1_Pooling").chmod(0o755)
        assert all(p.stat().st_mode & 0o200 for p in out.rglob("*"))


class TestJson:
    "A key of another kind is named, with its file."

    @pytest.mark.parametrize(
        "text",
        ["{", "3", "null", '{"a": 1}', '["x"]', '[{"path": 3}]', '[{"path": "p"}, {"path": "p"}]'],
    )
    def test_modules(self, models, tmp_path, text):
        (models[0]/"p").mkdir()
        (models[0]/"modules.json").write_text(text)
        with pytest.raises(MergeError, match="m0/modules.json: "):
            merge(models, out=tmp_path/"out")
        assert names(tmp_path) == ["m0", "m1", "m2"]

    @pytest.mark.parametrize(
        "key, value",
        [
            ("lora_alpha", 10**400),
            ("lora_alpha", "2"),
            ("rank_pattern", ["a"]),
            ("rank_pattern", {"a": "2"}),
            ("alpha_pattern", {"a": 10**400}),
            ("target_modules", True),
            ("target_modules", ["a", None]),
            ("modules_to_save", 3),
            ("modules_to_save", [["a"]]),
            ("base_model_name_or_path", ["x"]),
        ],
    )
    def test_adapters(self, tmp_path, key, value):
        ad = lora(tmp_path/"ad", config={key: value})
        with pytest.raises(MergeError, match=f"ad/adapter_config.json: has {key} = .* should be a"):
            load(ad)

    @pytest.mark.parametrize(
        "key, value",
        [
            ("model_type", 5),
            ("architectures", [["x"]]),
            ("vocab_size", [11]),
            ("num_labels", [2]),
            ("id2label", 2),
        ],
    )
    def test_configs(self, tmp_path, key, value):
        save(tmp_path/"m", tensors(), {key: value})
        with pytest.raises(MergeError, match=f"m/config.json: has {key} = "):
            load(tmp_path/"m")

    def test_a_part_of_a_config_that_counts_no_tokens(self, tmp_path):
        for name in ("a", "b"):
            save(tmp_path/name, tensors(), {"text_config": {"vocab_size": [11]}, "vocab_size": 11})
        assert merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"out").means

    def test_null_is_what_is_not_said(self, tmp_path):
        keys = ("rank_pattern", "alpha_pattern", "modules_to_save", "base_model_name_or_path")
        ads = [lora(tmp_path/f"a{i}", i, dict.fromkeys(keys)) for i in range(2)]
        assert merge(ads).means

    def test_tokens_that_are_numbers_and_texts(self, models):
        for m, vocab in zip(models, ([["q", 1], [7, 2], ["b", 1]], [[7, 2], ["b", 1], ["q", 1]])):
            (m/"tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
        with pytest.raises(MergeError, match="token number 0 for 'q' and for '7'"):
            merge(models[:2])


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    "Two small models, x and y, of other weights."
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llamas")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "</s>", "a", "b"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    for seed, name in enumerate("xy"):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder/name)
        tokenizer.save_pretrained(folder/name)
    return folder


class TestWeights:
    "What is measured are the weights that `load` read, whatever else lies beside them."

    def opened(self, folder, name, **kw):
        from frechet_merge.huggingface.models import open_model

        got = dict(open_model(folder, **kw).model.named_parameters())
        want = load_file(folder.parent/name/"model.safetensors")
        return all(torch.equal(got[k], x) for k, x in want.items()), len(want) > 10

    def beside(self, llamas, tmp_path):
        "Weights of x and, as a pickle, of y."
        folder = tmp_path/"odd"
        for name in "xy":
            (tmp_path/name).symlink_to(llamas/name)
        shutil.copytree(llamas/"x", folder)
        y = load_file(llamas/"y"/"model.safetensors")
        torch.save(y, folder/"pytorch_model.bin")
        return folder

    @pytest.mark.parametrize("allow", [False, True])
    def test_a_file_of_another_name(self, llamas, tmp_path, allow):
        folder = self.beside(llamas, tmp_path)
        (folder/"model.safetensors").rename(folder/"weights.safetensors")
        assert self.opened(folder, "x", allow_pickle=allow) == (True, True)

    def test_a_config_that_names_another_file(self, llamas, tmp_path):
        folder = self.beside(llamas, tmp_path)
        shutil.copy(llamas/"y"/"model.safetensors", folder/"y.safetensors")
        config = json.loads((folder/"config.json").read_text())
        config["transformers_weights"] = "y.safetensors"
        (folder/"config.json").write_text(json.dumps(config))
        assert self.opened(folder, "x") == (True, True)

    def test_shards_by_an_index_of_another_name(self, llamas, tmp_path):
        folder = self.beside(llamas, tmp_path)
        (folder/"model.safetensors").unlink()
        merge([llamas/"x"], out=tmp_path/"shards", shard_size=1000)
        for f in (tmp_path/"shards").glob("model*"):
            f.rename(folder/f.name.replace("model.safetensors.index", "w.safetensors.index"))
        assert self.opened(folder, "x") == (True, True)

    def test_pickles_that_were_allowed(self, llamas, tmp_path):
        folder = self.beside(llamas, tmp_path)
        (folder/"model.safetensors").unlink()
        with pytest.raises(MergeError, match="pytorch_model.bin: is a pickle"):
            self.opened(folder, "y")
        assert self.opened(folder, "y", allow_pickle=True) == (True, True)
        (folder/"pytorch_model.bin").unlink()
        y = load_file(llamas/"y"/"model.safetensors")
        where = {k: f"part-{i % 2}.bin" for i, k in enumerate(y)}
        for name in set(where.values()):
            torch.save({k: x for k, x in y.items() if where[k] == name}, folder/name)
        (folder/"w.bin.index.json").write_text(json.dumps({"weight_map": where}))
        assert self.opened(folder, "y", allow_pickle=True) == (True, True)

    def test_a_file_that_changes_while_it_is_opened(self, llamas, tmp_path, monkeypatch):
        import transformers

        folder = self.beside(llamas, tmp_path)
        auto = transformers.AutoModelForCausalLM
        real = auto.from_pretrained

        def late(*a, **kw):
            shutil.copy(llamas/"y"/"model.safetensors", folder/"new")
            os.replace(folder/"new", folder/"model.safetensors")
            return real(*a, **kw)

        monkeypatch.setattr(auto, "from_pretrained", late)
        with pytest.raises(MergeError, match="odd/model.safetensors: was replaced"):
            self.opened(folder, "x")


class TestPatterns:
    "The regular expressions of an adapter mean what they mean to PEFT, and come to an end."

    ENDLESS = ["(a+)+x", "(a|a)*x", "(a?){40}a{40}x", "a*"*20 + "x", "(((a+)+)+)+x"]

    @pytest.mark.parametrize("pattern", ENDLESS)
    def test_patterns_that_backtrack_for_ever(self, pattern):
        assert not is_meant(pattern, "h."*20 + "a"*60 + ".q")
        assert is_meant(pattern, "h." + "a"*60 + "x")

    @pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
    def test_an_adapter_with_one(self, tmp_path, key):
        layer = f"base_model.model.{'a' * 60}.b.lora_"
        more = {f"{layer}A.weight": torch.ones(2, 5), f"{layer}B.weight": torch.ones(4, 2)}
        ads = [lora(tmp_path/f"a{i}", i, {key: {"(a+)+x": 2}}, **more) for i in range(2)]
        assert len(merge(ads).means) == 3

    @pytest.mark.parametrize(
        "pattern, says",
        [
            ("(", "no regular expression"),
            ("\\9", "no regular expression"),
            ("a{4294967296}", "no regular expression"),
            (r"(a)\3*", "not followed here"),
            ("(?i:a)", "not followed here"),
            ("("*5000 + "a" + ")*"*5000, "no regular expression"),
        ],
        ids=range(6),
    )
    @pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
    def test_what_cannot_be_followed_is_named(self, tmp_path, key, pattern, says):
        ad = lora(tmp_path/"ad", config={key: {pattern: 2}})
        with pytest.raises(MergeError, match=f"(?s)ad: .*in {key} of adapter_config.json.*{says}"):
            merge([ad, ad])

    def test_too_many_steps(self, monkeypatch):
        monkeypatch.setattr("frechet_merge.adapters.patterns.STEPS", 10)
        with pytest.raises(ValueError, match="too many steps"):
            matches("(ab?)+(c|d)*" + "a"*20, "ab"*30)

    @pytest.mark.parametrize(
        "pattern",
        [
            "q_proj",
            "layers.1.q_proj",
            r"^model\.layers\.1\.self_attn\.q_proj",
            r"layers\.[0-9]+\.self_attn\.(q|v)_proj",
            r".*\.(1|2)\..*(?<!k)_proj",
            r"(?!.*mlp).*_proj",
            r"layers\.1[^0-9].*",
            r"\w+_proj\b",
            "a)|(model",
            "q_proj|k_proj",
        ],
    )
    def test_they_mean_what_they_mean_to_peft(self, pattern):
        from peft.utils.other import get_pattern_key

        for i in (1, 10, 2):
            for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "q_proj.x"):
                module = f"model.layers.{i}.{part}"
                theirs = get_pattern_key([pattern], module) == pattern
                assert is_meant(pattern, module) == theirs, module


class TestHostileNames:
    "What files call their tensors reaches neither the memory nor the terminal."

    def test_a_name_of_many_dots(self):
        "Nothing is kept of each of its endings."
        tracemalloc.start()
        try:
            assert in_front({"w"}, {"."*20_000}) is None
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
        finally:
            tracemalloc.stop()

    def test_escape_sequences_are_shown(self):
        error = MergeError("\x1b[2J'größer'\nsecond line")
        assert str(error) == "\\x1b[2J'größer'\nsecond line"
        with pytest.warns(UserWarning) as said:
            warn("\x1b]0;owned\x07")
        assert str(said[0].message) == "\\x1b]0;owned\\x07"

    def test_a_geometry_that_nobody_asked_for_is_not_imported(self, monkeypatch):
        def leave(self):
            raise SystemExit(7)

        entry = EntryPoint("leaving", "elsewhere:Leaving", "frechet_merge.geometries")
        monkeypatch.setattr(EntryPoint, "load", leave)
        monkeypatch.setattr(registry, "geometries", lambda: {"leaving": entry})
        assert registry.spelled(Sphere()) == repr(Sphere())


class TestWhatIsRun:
    "No code of a model, and the same arithmetic by every executor."

    def test_no_code_of_a_model_is_run(self, tmp_path, monkeypatch):
        "Nor is anybody asked whether it may be."
        config = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
        folder = save(tmp_path/"m", {"w": torch.ones(2)}, config)
        (folder/"own.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')\nclass C: pass\n")
        (folder/"vocab.txt").write_text("a\n")
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        with pytest.raises(MergeError, match="transformers cannot open it"):
            open_model(folder)
        assert not (tmp_path/"ran").exists()

    @pytest.mark.parametrize("executor", ["serial", "threads"])
    def test_torch_has_one_thread_in_a_job(self, executor, monkeypatch):
        "Sums in another order would be other bytes."
        before, seen = torch.get_num_threads(), []
        with mapper(executor) as over:
            assert [*over(lambda _: seen.append(torch.get_num_threads()), range(2))]
        assert seen == [1, 1] and torch.get_num_threads() == before

    @pytest.mark.parametrize(
        "odd, says",
        [
            (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
            (torch.ones(3, device="meta"), "on the meta device"),
            (torch.ones(3).to_sparse(), "sparse_coo"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_pickles_of_other_tensors(self, odd, says, tmp_path):
        "A quantised one ended the process."
        torch.save({"w": odd}, tmp_path/"pytorch_model.bin")
        with pytest.raises(MergeError, match=f"tensor 'w' is {says}"):
            load(tmp_path, allow_pickle=True)

    @pytest.mark.parametrize("version", ["2.5.1", "2.9.1+cpu"])
    def test_pickles_with_a_torch_that_may_run_them(self, version, tmp_path, monkeypatch):
        torch.save({"w": torch.ones(2)}, tmp_path/"pytorch_model.bin")
        assert "w" in load(tmp_path, allow_pickle=True)
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(MergeError, match="Install torch 2.10 or later"):
            load(tmp_path, allow_pickle=True)


def with_tokens(folder, seed=0, more=()):
    "A model of three tokens, whose tokenizer is in its folder."
    folder.mkdir()
    words = ["a", "b", "c"] if not more else [*more, "b", "a"]
    model = {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "a"}
    held = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps(held | nothing | {"model": model}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 3}')
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, generator=g)
    save_file({"model.embed_tokens.weight": x}, folder / "model.safetensors")
    return folder


SECRET = "nobody is to read this"


@pytest.mark.parametrize(
    "name",
    ["tokenizer_extra.json", "chat_template.jinja", "tokenizer_config.json", "vocab.txt"],
)
@pytest.mark.parametrize("how", ["union", "pad", "template"])
def test_no_choice_of_tokens_follows_a_link_out_of_the_folder(name, how, tmp_path):
    pytest.importorskip("transformers")
    a, b = with_tokens(tmp_path / "a"), with_tokens(tmp_path / "b", 1, more=["d"])
    said = {"chat_template": SECRET, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "secret").write_text(json.dumps(said))
    (a / name).unlink(missing_ok=True)
    (a / name).symlink_to("../secret")
    (b / "chat_template.jinja").write_text("x")
    options = {
        "union": {"tokenizer": "union"},
        "pad": {"pad_to_multiple_of": 8},
        "template": {"chat_template": str(a)},
    }[how]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            merge([a, b if how == "union" else a], out=tmp_path / "out", **options)
        except ValueError as e:
            assert name in str(e) or "has no chat template" in str(e)
    written = [f for f in (tmp_path / "out").rglob("*") if f.is_file()]
    assert not any(SECRET in f.read_text(errors="replace") for f in written)


def test_a_folder_of_templates_behind_a_link_is_not_written(tmp_path):
    a = with_tokens(tmp_path / "a")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "b.jinja").write_text(SECRET)
    (a / "chat_template.jinja").write_text("x")
    (a / "additional_chat_templates").symlink_to("../others")
    with pytest.warns(UserWarning, match="is not"):
        merge([a, a], out=tmp_path / "out", chat_template=str(a))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "x"
    assert not (tmp_path / "out" / "additional_chat_templates").exists()


@pytest.mark.parametrize("name", ["a\0b", "\ud800.safetensors", "x" * 5000])
def test_an_index_names_a_file_that_cannot_be(name, tmp_path):
    (tmp_path / "m").mkdir()
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(MergeError, match=re.escape(str(tmp_path / "m"))):
        load(tmp_path / "m")


@pytest.mark.parametrize("file", ["model_index.json", "modules.json"])
@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "/x", "**", "../a"])
def test_names_of_parts_that_no_folder_can_have(file, name, tmp_path):
    folder = tmp_path / "m"
    (folder / "unet").mkdir(parents=True)
    save_file({"w": torch.ones(3)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    held = {"unet": ["diffusers", "U"], name: ["diffusers", "MultiU"]}
    listed = [{"path": "unet"}, {"path": name}]
    (folder / file).write_text(json.dumps(held if file == "model_index.json" else listed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge([folder, folder], out=tmp_path / "out")
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("value", [5, [1], [["a"]], True])
def test_target_parameters_of_another_type(value, tmp_path):
    a = lora(tmp_path / "a", config={"target_parameters": value})
    with pytest.raises(MergeError, match="target_parameters"):
        merge([a, a])


def test_facts_of_statistics_that_are_too_deep(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "s.st", {"form": "[" * 50_000})
    with pytest.raises(MergeError, match="no JSON"):
        Statistics.load(tmp_path / "s.st")
    w = {"w": torch.ones(3)}
    merge([w, w], "curved", metrics=[tmp_path / "s.st"] * 2)


@pytest.mark.parametrize("number", [10**30, 1e300, -1])
def test_a_token_with_a_number_that_no_row_has(number, tmp_path):
    pytest.importorskip("transformers")
    a, b = with_tokens(tmp_path / "a"), with_tokens(tmp_path / "b", 1, more=["d"])
    held = json.loads((a / "tokenizer.json").read_text())
    held["model"]["vocab"]["c"] = number
    (a / "tokenizer.json").write_text(json.dumps(held))
    with pytest.raises(MergeError, match="/a"):
        merge([a, b], tokenizer="union", out=tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_a_template_that_is_no_text(tmp_path):
    a = with_tokens(tmp_path / "a")
    (a / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(MergeError, match="chat_template.jinja: is no text"):
        merge([a, a], out=tmp_path/"out", chat_template=str(a))


@pytest.mark.parametrize("kind", ["fifo", "dangling", "folder"])
def test_a_template_in_something_that_is_no_file(kind, tmp_path):
    a, place = with_tokens(tmp_path/"a"), tmp_path/"template"
    if kind == "dangling":
        place.symlink_to("nothing")
    else:
        {"fifo": os.mkfifo, "folder": os.mkdir}[kind](place)
    with pytest.raises(MergeError, match="template"):
        merge([a, a], out=tmp_path/"out", chat_template=str(place))


PLACES = ["loop", "loop/x", "~nobodyx/x", "x"*300, "/".join(["d"*200]*30), "\ud800"]


@pytest.mark.parametrize("name", PLACES, ids=range(len(PLACES)))
def test_a_place_that_cannot_be_is_refused_before_the_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    for folder in (True, False):
        with pytest.raises(MergeError, match="Name another place"):
            free(name, folder=folder)
    with pytest.raises(MergeError):
        load(name)


def test_names_are_printed_where_the_terminal_cannot_spell_them(tmp_path):
    for model in ("a", "b"):
        (tmp_path/model).mkdir()
        save_file({"wé→": torch.ones(3)}, tmp_path/model/"model.safetensors")
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    for words in (["inspect", "a", "b"], ["merge", "a", "b", "-o", "é→"]):
        command = [sys.executable, "-m", "frechet_merge", *words]
        ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
        assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("value", [5, [1], "x", None, {"a": 1}, {"models": 5}, {"models": [5]}])
def test_a_record_whose_recipe_is_none(value, tmp_path):
    for seed, model in enumerate("ab"):
        save(tmp_path/model, tensors(seed))
    merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"out")
    file = tmp_path/"out"/"frechet_merge.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"recipe": value}))
    with pytest.raises(MergeError, match="out"):
        asked = read_recipe(tmp_path/"out")
        run_recipe(asked, asked.output.into(tmp_path/"again"))
    for key in ("inputs", "means", "warnings", "versions", "seconds", "shard_size"):
        file.write_text(json.dumps(held | {key: "x"}))
        with pytest.raises(MergeError, match=f"out.*{key}"):
            read_recipe(tmp_path/"out")

"""Models in a store, through fsspec: what a merge reads and writes there is what it reads and
writes here, and no more.

The stores are memory, a web server on this machine, and moto's S3 where it is installed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import cli, save, tensors
from fsspec.implementations.memory import MemoryFileSystem
from hub import running
from served import serving

from frechet_merge import MergeError, load, merge
from frechet_merge.diagnostics.inspection import inspect
from frechet_merge.files import ranges, stores
from frechet_merge.files.hub import ids_in
from frechet_merge.files.output import free
from frechet_merge.files.ranges import Remote, driver, in_order, kept
from frechet_merge.files.shards import MAX_HEADER, read_header
from frechet_merge.files.uploads import in_order_of_sending
from frechet_merge.merging.companions import _carry_part
from frechet_merge.merging.preview import in_bytes, preview
from frechet_merge.merging.recipe import Output, Recipe
from frechet_merge.recipes.written import read_recipe, run_recipe
from frechet_merge.messages import redacted

CONFIG = {"model_type": "toy", "vocab_size": 11}
# what says where models were, and when
TOLD = ("README.md", "frechet_merge.json")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "A cache and a store of this test's own."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def models(tmp_path):
    "Two checkpoints with tokenizers and a config, of shards and of one file."
    found = [save(tmp_path/"local"/f"m{i}", large(i), CONFIG) for i in range(2)]
    for folder in found:
        (folder/"tokenizer.json").write_text(json.dumps({"version": "1.0", "of": 0}))
        (folder/"generation_config.json").write_text("{}")
    split(found[0])
    return found


def large(seed):
    "The small model without its integers, with a matrix of several chunks and more than a block."
    g = torch.Generator().manual_seed(seed)
    small = {n: x for n, x in tensors(seed).items() if x.is_floating_point()}
    return {**small, "big.weight": torch.randn(1500, 1000, generator=g)}


def split(folder):
    "The same model in two files with an index."
    from safetensors.torch import load_file, save_file

    held = load_file(folder/"model.safetensors")
    (folder/"model.safetensors").unlink()
    where = {}
    for k, names in enumerate((list(held)[:3], list(held)[3:]), 1):
        file = f"model-{k:05d}-of-00002.safetensors"
        save_file({n: held[n] for n in names}, folder/file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder/"model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def files(folder):
    "Name → bytes, but of what says where models were."
    every = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in TOLD]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in every}


def put(folders, root="memory://bucket"):
    "The same folders in a store, and their addresses."
    for folder in folders:
        for name, held in {**files(folder)}.items():
            fs, path = driver(f"{root}/{folder.name}/{name}")
            fs.pipe_file(path, held)
    return [f"{root}/{folder.name}" for folder in folders]


@pytest.fixture
def counted(monkeypatch):
    "How many bytes were asked for, of the files of weights."
    sent, read = [], Remote.read

    def counting(remote, start, stop):
        sent.append((remote.address, start, stop))
        return read(remote, start, stop)

    monkeypatch.setattr(Remote, "read", counting)
    return sent


def total(sent):
    return sum(stop - start for _, start, stop in sent)


def headers(folder):
    "Bytes of all headers in a folder, with their lengths."
    found = 0
    for f in folder.glob("*.safetensors"):
        found += 8 + int.from_bytes(f.read_bytes()[:8], "little")
    return found


class TestBytes:
    @pytest.mark.parametrize("executor", ["serial", "threads"])
    @pytest.mark.parametrize("geometry", ["euclidean", "sphere"])
    def test_a_merge_is_that_of_local_folders(self, models, tmp_path, executor, geometry):
        merge(models, geometry, out=tmp_path/"here", executor=executor)
        merge(put(models), geometry, out=tmp_path/"there", executor=executor)
        assert files(tmp_path/"there") == files(tmp_path/"here")

    def test_processes_do_not_see_the_memory_of_this_one(self, models, tmp_path):
        there = put(models)
        with pytest.raises(ValueError, match="is in the memory of this process.*\n.*'threads'"):
            merge(there, out=tmp_path/"OUT", executor="processes")
        assert not (tmp_path/"OUT").exists()
        merge(there, out=tmp_path/"OUT", executor="threads")

    @pytest.mark.parametrize("executor", ["serial", "threads", "processes"])
    def test_an_address_of_a_file_here_is_its_path(self, models, tmp_path, executor):
        named = [f"file://{m}" for m in models]
        merge(models, out=tmp_path/"here", executor=executor)
        merge(named, out=f"file://{tmp_path}/there", executor=executor)
        assert files(tmp_path/"there") == files(tmp_path/"here")
        assert ids_in(named[0]) == []

    @pytest.mark.parametrize("executor", ["serial", "threads", "processes"])
    def test_from_a_web_server(self, models, tmp_path, executor):
        pytest.importorskip("aiohttp", reason="the driver for http:// is not installed")
        merge(models, out=tmp_path/"here", executor=executor)
        with serving(tmp_path/"local") as served:
            there = [f"{served.address}/{m.name}" for m in models]
            merge(there, out=tmp_path/"there", executor=executor)
        assert files(tmp_path/"there") == files(tmp_path/"here")

    def test_a_base_and_a_sum(self, models, tmp_path):
        a, b = put(models)
        how = dict(sum=[1, -0.5])
        here = merge(models, base=models[1], **how).tensors
        there = merge([a, b], base=b, **how).tensors
        assert all(torch.equal(here[n], there[n]) for n in here)

    def test_layers_of_two(self, models, tmp_path):
        state = {f"model.layers.{i}.w": torch.randn(3, 3) for i in range(4)}
        folder = save(tmp_path/"local"/"deep", state, {"num_hidden_layers": 4})
        (there,) = put([folder])
        name = "{0}[0:2]|{0}[3:4]"
        assert ids_in(name.format(there)) == []
        here = load(name.format(folder))
        assert all(torch.equal(here[n], x) for n, x in load(name.format(there)).items())


class TestHowMuchIsRead:
    @pytest.mark.parametrize("geometry", ["euclidean", "sphere"])
    def test_a_merge_reads_each_byte_once(self, models, tmp_path, counted, geometry):
        there = put(models)
        merge(there, geometry, out=tmp_path/"OUT")
        held = sum(f.stat().st_size for m in models for f in m.glob("*.safetensors"))
        assert total(counted) == held
        assert len({*counted}) == len(counted)

    def test_a_plan_reads_headers(self, models, counted):
        found = preview(Recipe(put(models)), timed=True)
        assert total(counted) == sum(map(headers, models))
        assert found.seconds is None

    def test_integers_have_to_be_equal(self, tmp_path, counted):
        "And so a plan reads them: there is no mean of them."
        folders = [save(tmp_path/"local"/f"m{i}", tensors(i), CONFIG) for i in range(2)]
        preview(Recipe(put(folders)))
        assert total(counted) == sum(map(headers, folders)) + 2*11*8

    def test_names_are_compared_by_headers(self, models, counted):
        found = inspect(put(models), numbers=False)
        assert total(counted) == sum(map(headers, models)) and found.mergeable

    def test_what_is_known_is_not_asked_for_again(self, models, counted):
        there = put(models)
        load(there[0])
        counted.clear()
        load(there[0])
        assert not counted

    def test_in_order_and_out_of_order(self, monkeypatch):
        held = os.urandom(5000)
        fs, path = driver("memory://bucket/f")
        fs.pipe_file(path, held)
        remote = ranges.found("memory://bucket/f")
        monkeypatch.setattr(ranges, "BLOCK", 64)
        g = torch.Generator().manual_seed(0)
        at = 1000
        for jump in torch.randint(0, 12, (400,), generator=g).tolist():
            # mostly on, at times back, ahead, or to the beginning
            at = {0: 1000, 1: max(1000, at - 50), 2: min(3900, at + 90)}.get(jump, at)
            stop = min(4000, at + 7*jump + 1)
            assert in_order(remote, 1000, 4000, at, stop) == held[at:stop]
            at = stop if stop < 4000 else 1000


class TestWhatComesAlong:
    def test_a_file_that_is_named(self, models, tmp_path):
        there = put(models)
        merge([models[1]/"model.safetensors"], out=tmp_path/"here")
        merge([f"{there[1]}/model.safetensors"], out=tmp_path/"there")
        assert files(tmp_path/"there") == files(tmp_path/"here")
        index = "model.safetensors.index.json"
        held = load(f"{there[0]}/{index}")
        assert torch.equal(held["big.weight"], load(models[0]/index)["big.weight"])

    def test_parts_of_an_encoder(self, tmp_path):
        folders = []
        for i in range(2):
            folder = save(tmp_path/"local"/f"m{i}", tensors(i), CONFIG)
            save(folder/"1_Dense", {"w": torch.randn(3, 3)}, {})
            modules = json.dumps([{"path": ""}, {"path": "1_Dense"}])
            (folder/"modules.json").write_text(modules)
            folders.append(folder)
        there = put(folders)
        merge(folders, out=tmp_path/"here")
        merge(there, out=tmp_path/"there")
        assert "1_Dense/model.safetensors" in files(tmp_path/"there")
        assert files(tmp_path/"there") == files(tmp_path/"here")

    def test_what_is_copied_is_the_file_and_not_what_stands_in(self, models, tmp_path):
        home = load(put(models)[1]).folder
        (tmp_path/"out").mkdir()
        _carry_part(home.parent, home.name, tmp_path/"out", [])
        assert files(tmp_path/"out"/"m1") == files(models[1])

    def test_what_stays_behind_is_named(self, models):
        there = put(models)
        fs, path = driver(f"{there[0]}/notes.pdf")
        fs.pipe_file(path, b"%PDF")
        with pytest.warns(UserWarning, match="not read are notes.pdf"):
            load(there[0])

    def test_a_pickle_is_fetched_if_it_is_allowed(self, tmp_path):
        folder = tmp_path/"local"/"m"
        folder.mkdir(parents=True)
        torch.save({"w": torch.ones(2)}, folder/"pytorch_model.bin")
        (there,) = put([folder])
        with pytest.raises(MergeError, match="--allow-pickle"):
            load(there)
        assert load(there, allow_pickle=True)["w"].sum() == 2

    def test_a_file_for_another_library_is_whole(self, models):
        from safetensors.torch import load_file

        c = load(put(models)[1])
        with pytest.raises(Exception, match="header too large"):
            load_file(c.files[0])
        assert torch.equal(load_file(kept(c.files[0]))["q.weight"], c["q.weight"])
        read_header(c.files[0])


class TestFaults:
    def test_an_input_that_is_replaced_while_it_is_read(self, models, tmp_path, monkeypatch):
        there, read = put(models), Remote.read
        fs, path = driver(f"{there[1]}/model.safetensors")
        held = (models[1]/"model.safetensors").read_bytes()

        def replaced(remote, start, stop):
            found = read(remote, start, stop)
            if start > 8 and "m1" in remote.address and stop - start > 10**5:
                fs.pipe_file(path, held[:-4] + b"\0\0\0\0")
            return found

        monkeypatch.setattr(Remote, "read", replaced)
        with pytest.raises(MergeError, match="was replaced or written to after its header"):
            merge(there, out=tmp_path/"OUT")
        assert not (tmp_path/"OUT").exists()

    def test_an_input_that_grows_short(self, models):
        there = put(models)
        c = load(there[1])
        fs, path = driver(f"{there[1]}/model.safetensors")
        fs.pipe_file(path, fs.cat_file(path)[:-1000])
        with pytest.raises(MergeError, match="was replaced or written to after its header"):
            c["s"], c["q.weight"], c["big.weight"]

    def test_a_driver_that_is_not_installed(self, monkeypatch):
        def no_driver(address, **_):
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr("fsspec.core.url_to_fs", no_driver)
        with pytest.raises(MergeError, match=r"pip install 'frechet_merge\[store\]'"):
            load("s3://somewhere/a")
        with pytest.raises(MergeError, match="pip install gcsfs"):
            load("gs://somewhere/a")

    def test_an_address_in_an_address(self, models):
        (_, there) = put(models)
        with pytest.raises(MergeError, match="Name the inner one"):
            load(f"simplecache::{there}")
        load(there)

    def test_a_store_that_fails_once(self, models, tmp_path, monkeypatch):
        there, cat, left = put(models), MemoryFileSystem.cat_file, [3]

        def failing(self, *args, **kwargs):
            left[0] -= 1
            if left[0] in (0, 1):
                raise OSError("connection reset by peer")
            return cat(self, *args, **kwargs)

        monkeypatch.setattr(ranges, "PAUSES", (0.01, 0.01))
        monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
        assert torch.equal(load(there[1])["s"], load(models[1])["s"])

    def test_a_store_that_never_answers(self, models, monkeypatch):
        there = put(models)
        monkeypatch.setattr(ranges, "PATIENCE", 0.05)
        monkeypatch.setattr(ranges, "PAUSES", (0.01,))
        monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: time.sleep(5))
        start = time.monotonic()
        with pytest.raises(MergeError, match="does not answer .TimeoutError"):
            load(there[0])
        assert time.monotonic() - start < 3

    def test_names_that_lead_out(self, models, tmp_path, monkeypatch):
        (there, _), find = put(models), MemoryFileSystem.find

        def hostile(self, root, **how):
            found = find(self, root, **how)
            info = {"size": 3, "created": 1}
            return found | {f"{root}/../../../escaped.json": info, f"{root}//etc/x.json": info}

        monkeypatch.setattr(MemoryFileSystem, "find", hostile)
        load(there)
        assert not [*tmp_path.rglob("escaped.json")] and not [*tmp_path.rglob("x.json")]

    def test_a_header_that_lies(self, tmp_path):
        for n in (MAX_HEADER + 1, 10**6, 2**63):
            fs, path = driver("memory://bucket/lie/model.safetensors")
            fs.pipe_file(path, n.to_bytes(8, "little") + b"{}")
            with pytest.raises(MergeError, match="memory://bucket/lie/model.safetensors"):
                load("memory://bucket/lie")

    def test_what_stands_in_is_no_model(self, models, tmp_path):
        folder = load(put(models)[1]).folder
        ranges._standing.clear()
        with pytest.raises(MergeError, match="stands in for memory://bucket/m1.*\nName that"):
            load(folder)
        (tmp_path/"lie").mkdir()
        (tmp_path/"lie"/"model.safetensors").write_bytes(b"stand-in{]\n")
        with pytest.raises(MergeError, match="does not say for which"):
            load(tmp_path/"lie")
        load("memory://bucket/m1")

    def test_a_server_without_ranges(self, models, tmp_path):
        pytest.importorskip("aiohttp", reason="the driver for http:// is not installed")
        with serving(tmp_path/"local") as served:
            served.knows_ranges = False
            with pytest.raises(MergeError, match="does not send ranges"):
                load(f"{served.address}/m1")
            size = (models[1]/"model.safetensors").stat().st_size
            assert served.sent["model.safetensors"] <= 4*size


class Signed(MemoryFileSystem):
    "A store whose addresses hold what nobody is to read."

    protocol = "toy"

    @classmethod
    def _strip_protocol(cls, path):
        path = path.removeprefix("toy://").rpartition("@")[2].partition("?")[0]
        return "/" + path.strip("/")


class TestSecrets:
    @pytest.mark.parametrize(
        "address, shows",
        [
            ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
            ("https://secret@host/a b", "https://***@host/a b"),
            ("(https://h/a?X-Sig=secret)", "(https://h/a?***)"),
            ("https://u:se@cret@h/x", "https://***@h/x"),
            ("hf://org/name@main/x", "hf://org/name@main/x"),
            ("hf://gpt2@main", "hf://gpt2@main"),
            ("at http://h:80/x@y, and", "at http://h:80/x@y, and"),
            ("https://h/a?t=secret: is", "https://h/a?***: is"),
            ("is it https://h/a?", "is it https://h/a?"),
        ],
    )
    def test_redacted(self, address, shows):
        assert redacted(address) == shows

    def test_a_line_that_cannot_be_read(self, tmp_path):
        code, _, err = cli("report", "a", "https://me:word@host/x", cwd=tmp_path)
        assert code == 2 and "https://***@host/x" in err and "word" not in err

    def test_nothing_written_or_said_has_them(self, models, tmp_path, capsys, recwarn):
        fsspec.register_implementation("toy", Signed, clobber=True)
        put(models)
        named = ["toy://me:word@bucket/m0", "toy://bucket/m1/model.safetensors?signature=word"]
        out = merge(named, out=tmp_path/"OUT", full_hash=True)
        merge([models[0]], out="toy://me:word@bucket/new")
        preview(Recipe(named)).report()
        with pytest.raises(MergeError) as e:
            merge([named[0], "toy://me:word@bucket/none"])
        said = [repr(out), str(e.value), *map(str, recwarn), *capsys.readouterr()]
        held = [f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()]
        assert not any("word" in x for x in said) and not any(b"word" in x for x in held)
        assert "toy://***@bucket/m0" in (tmp_path/"OUT"/"frechet_merge.json").read_text()

    @pytest.mark.parametrize("name", ["", "name: last\n"])
    def test_recipes_that_are_written_have_none(self, models, tmp_path, name):
        fsspec.register_implementation("toy", Signed, clobber=True)
        put(models)
        path = tmp_path/"several.yml"
        path.write_text(
            "name: first\nmodels: ['toy://me:word@bucket/m0', "
            "'toy://bucket/m1/model.safetensors?signature=word']\n"
            f"---\n{name}models: [first, 'toy://me:word@bucket/m0']\n"
        )
        asked = read_recipe(path)
        path.unlink()
        run_recipe(asked, asked.output.into(tmp_path/"OUT"))
        held = [f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()]
        assert not any(b"word" in x for x in held)
        assert "toy://***@bucket/m0" in (tmp_path/"OUT"/"recipes.yml").read_text()

    def test_of_a_web_server(self, models, tmp_path):
        pytest.importorskip("aiohttp", reason="the driver for http:// is not installed")
        with serving(tmp_path/"local") as served:
            held = load(served.address.replace("//", "//me:word@") + "/m1")
            assert torch.equal(held["s"], load(models[1])["s"])
            served.token = "word"
            with pytest.warns(UserWarning, match=r"[?][*]{3}: its folder cannot be listed"):
                held = load(f"{served.address}/m1/model.safetensors?t=word")
            assert torch.equal(held["s"], load(models[1])["s"])
            index = f"{served.address}/m0/model.safetensors.index.json"
            held = load(f"{index}?t=word")
            assert torch.equal(held["s"], load(models[0])["s"]) and "word" not in held.source
            with pytest.raises(MergeError, match="there is no such"):
                load(index)


class TestWriting:
    def test_what_arrives_is_what_is_written_here(self, models, tmp_path):
        merge(models, out=tmp_path/"here", shard_size=4000)
        merged = merge(models, out="memory://bucket/there", shard_size=4000)
        fs, root = driver("memory://bucket/there")
        there = {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}
        for name in TOLD:
            assert there.pop(name)
        assert there == files(tmp_path/"here")
        assert merged.out == "memory://bucket/there"
        here = load(tmp_path/"here")
        assert all(torch.equal(x, here[n]) for n, x in merged.tensors.items())

    def test_the_config_is_last(self, models, tmp_path):
        merge(models, out=tmp_path/"here", shard_size=4000)
        sent = [f.name for f in in_order_of_sending(tmp_path/"here")]
        assert sent[-1] == "config.json" and sent[-2].endswith(".index.json")
        shards = [n for n in sent if n.endswith(".safetensors")]
        assert sent[-2 - len(shards) : -2] == shards

    @pytest.mark.parametrize("at", [1, 2, 5, 7])
    def test_a_store_that_fails_is_left_as_it_was(self, models, tmp_path, monkeypatch, at):
        put_file, left = MemoryFileSystem.put_file, [at]

        def failing(self, *args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise PermissionError("the quota is used up")
            return put_file(self, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, "put_file", failing)
        with pytest.raises(MergeError, match="this login may not"):
            merge(models, out="memory://bucket/there", shard_size=4000)
        assert not driver("memory://bucket/there")[0].find("/bucket/there")

    def test_a_merge_that_fails_leaves_nothing(self, models):
        with pytest.raises(MergeError):
            merge([models[0], {"other": torch.ones(1)}], out="memory://bucket/there")
        assert not driver("memory://bucket/there")[0].find("/bucket/there")

    def test_where_something_is(self, models):
        there = put(models)
        for do in (lambda: merge(models, out=there[0]), lambda: plan(models, there[0])):
            with pytest.raises(MergeError, match="exists already, and is not empty"):
                do()
        merge(models, out=f"{there[0]}/merged")

    def test_half_a_model_is_not_opened(self, models):
        there = put(models)
        fs, path = driver(f"{there[0]}/{stores.PARTIAL}")
        fs.pipe_file(path, b"")
        with pytest.raises(MergeError, match="is being written, or what wrote it was stopped"):
            load(there[0])

    @pytest.mark.parametrize("out", ["https://host/x", "hf://org/name"])
    def test_where_nothing_is_written(self, models, tmp_path, out):
        with pytest.raises(MergeError, match="is read, and not written to.\nName a folder here"):
            merge(models, out=out)
        merge(models, out=tmp_path/"OUT")

    def test_what_goes_on_is_here(self, models):
        for how in (dict(resume=True), dict(part="1/2"), dict(join=True)):
            with pytest.raises(ValueError, match="in a folder here"):
                merge(models, out="memory://bucket/there", **how)

    def test_a_path_is_no_address(self, models, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path/"here:").mkdir()
        with pytest.raises(MergeError, match="is an address"):
            merge(models, out=Path("s3://bucket/x"))
        merge(models, out=Path("x"))
        assert free("here:/x").name == "x"


def plan(models, out):
    given = dict(out=out, dtype=None, shard_size=10**9, full_hash=False)
    return preview(Recipe(models), Output.of(given))


class TestTheHub:
    "A plan of models on the hub: their weights stay there."

    @pytest.fixture
    def hub(self):
        with running() as found:
            yield found

    def named(self, hub, models):
        for folder in models:
            hub.put(f"org/{folder.name}", files(folder))
        return [f"org/{folder.name}" for folder in models]

    @pytest.mark.parametrize("command", ["merge --dry-run -o OUT", "inspect --headers"])
    def test_headers_alone(self, hub, models, tmp_path, command):
        ids = self.named(hub, models)
        words, env = command.split(), hub.env(tmp_path/"home", XDG_CACHE_HOME=str(tmp_path/"c"))
        code, out, err = cli(words[0], *ids, *words[1:], cwd=tmp_path, env=env)
        assert code == 0, err
        sent = sum(n for name, n in hub.sent.items() if name.endswith(".safetensors"))
        assert sent == sum(map(headers, models)), hub.sent
        assert "org/m0" in out or "big.weight" in out
        assert not [*(tmp_path/"home").rglob("*.safetensors")]

    def test_inspect_says_first_how_much_it_downloads(self, hub, models, tmp_path):
        ids, env = self.named(hub, models), hub.env(tmp_path/"home")
        env["XDG_CACHE_HOME"] = str(tmp_path/"c")
        held = sum(f.stat().st_size for m in models for f in m.glob("*.safetensors"))
        said = f"reading {in_bytes(held)} of weights over the network"
        code, out, err = cli("inspect", *ids, "--base", ids[0], cwd=tmp_path, env=env)
        assert code == 0 and err.startswith(said) and "--headers reads none" in err, err
        # what is in the cache is not announced again
        code, again, err = cli("inspect", *ids, "--base", ids[0], cwd=tmp_path, env=env)
        assert code == 0 and again == out and not err
        here = cli("inspect", *models, "--base", models[0], cwd=tmp_path)
        assert here[0] == 0 and not here[2]

    def test_a_merge_downloads_them(self, hub, models, tmp_path):
        ids, env = self.named(hub, models), hub.env(tmp_path/"home")
        code, _, err = cli("merge", *ids, "-o", "OUT", "-q", cwd=tmp_path, env=env)
        assert code == 0, err
        code, _, err = cli("merge", *ids, "-o", "O", "--dry-run", cwd=tmp_path, env=env)
        assert code == 0, err
        merge(models, out=tmp_path/"here")
        assert files(tmp_path/"OUT") == files(tmp_path/"here")

    def test_by_its_address_it_is_read_by_ranges(self, hub, models, tmp_path):
        ids, env = self.named(hub, models), hub.env(tmp_path/"home")
        env["XDG_CACHE_HOME"] = str(tmp_path/"c")
        named = [f"hf://{name}" for name in ids]
        code, _, err = cli("merge", *named, "-o", "OUT", "-q", cwd=tmp_path, env=env)
        assert code == 0, err
        merge(models, out=tmp_path/"here")
        assert files(tmp_path/"OUT") == files(tmp_path/"here")
        held = sum(f.stat().st_size for m in models for f in m.glob("*.safetensors"))
        sent = sum(n for name, n in hub.sent.items() if name.endswith(".safetensors"))
        assert sent == held


S3 = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class TestS3:
    @pytest.fixture
    def s3(self, tmp_path, monkeypatch):
        "A bucket of moto's server."
        pytest.importorskip("s3fs", reason="the driver for s3:// is not installed")
        pytest.importorskip("moto.server", reason="moto's server is not installed")
        login = {"AWS_ACCESS_KEY_ID": "of-a-test", "AWS_SECRET_ACCESS_KEY": "word-of-a-test"}
        for name, value in login.items():
            monkeypatch.setenv(name, value)
        server = subprocess.Popen(
            [sys.executable, "-c", S3], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        port = server.stdout.readline().strip()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        driver.cache_clear()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir("bucket")
        try:
            yield "s3://bucket"
        finally:
            server.kill()
            server.wait()

    @pytest.mark.parametrize("executor", ["serial", "threads", "processes"])
    def test_from_a_bucket_into_a_bucket(self, s3, models, tmp_path, executor, counted):
        merge(models, out=tmp_path/"here", executor=executor)
        there = put(models, s3)
        merged = merge(there, out=f"{s3}/merged", executor=executor)
        fs, root = driver(merged.out)
        held = {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}
        for name in TOLD:
            assert b"word-of-a-test" not in held.pop(name)
        assert held == files(tmp_path/"here")
        if executor != "processes":
            size = sum(f.stat().st_size for m in models for f in m.glob("*.safetensors"))
            assert total(x for x in counted if "merged" not in x[0]) == size

    def test_by_the_command(self, s3, models, tmp_path):
        there = put(models, s3)
        env = {**os.environ}
        code, out, err = cli("merge", *there, "-o", f"{s3}/new", "-q", cwd=tmp_path, env=env)
        assert code == 0 and f"{s3}/new: 2 models merged" in out, err
        code, out, err = cli("merge", *there, "-o", f"{s3}/new", "-q", cwd=tmp_path, env=env)
        assert code == 1 and "exists already" in err
        assert [*tmp_path.iterdir()] and not (tmp_path/"s3:").exists()

    def test_an_object_that_is_replaced(self, s3, models):
        there = put(models, s3)
        c = load(there[1])
        fs, path = driver(f"{there[1]}/model.safetensors")
        held = fs.cat_file(path)
        fs.pipe_file(path, held[:-4] + b"\0\0\0\0")
        with pytest.raises(MergeError, match="was replaced or written to"):
            ranges.refuse_changed(c.files)

    def test_a_bucket_that_is_not_there(self, s3):
        for address in ("s3://nowhere/a", f"{s3}/none"):
            with pytest.raises(MergeError, match="there is no such"):
                load(address)
        with pytest.raises(MergeError):
            merge([{"w": torch.ones(1)}], out="s3://nowhere/a")

"""What is small on the disk and large in memory, or takes for ever: packed data, tokenizers,
templates and pickles of strangers. And places and surroundings in which nothing can be done, which
are refused before the work."""

import gzip
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT
from hub import running
from mutated import adapter, run, told, warm, with_texts, wrong_with
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from frechet_merge import MergeError, load
from frechet_merge.adapters.extract import extract
from frechet_merge.cli.commands import _unforeseen
from frechet_merge.files.output import free, writable
from frechet_merge.huggingface.examples import batches, examples
from frechet_merge.huggingface.models import _growth
from frechet_merge.merging.record import Record

# the package of this name has the function
of_examples = importlib.import_module("frechet_merge.huggingface.examples")
ENV = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Two models with tokenizers, an adapter, texts and chats."
    warm()
    folder = with_texts(tmp_path_factory.mktemp("whole"))
    adapter(folder/"x", 0)
    return folder


@pytest.fixture
def here(whole, tmp_path):
    return shutil.copytree(whole, tmp_path/"all")


def refused(words, folder):
    heard = run(tuple(words.split()), folder)
    assert not wrong_with(heard, folder), heard
    assert heard.code == 1, heard
    return heard.text


class TestPickles:
    def in_two(self, folder, more):
        "A model in two files, which both have one tensor."
        state = {"u": torch.arange(4.0), "v": torch.ones(2)}
        folder.mkdir()
        for i, held in enumerate((state, {"v": state["v"] + more}), 1):
            torch.save(held, folder/f"pytorch_model-{i:05d}-of-00002.bin")
        return state

    def test_a_tensor_in_two_files(self, tmp_path):
        bad = tmp_path/"bad"
        state = self.in_two(bad, 1)
        with pytest.raises(MergeError, match="'v' is also in another shard, with other numbers"):
            load(bad, allow_pickle=True)
        # the remedy
        (bad/"pytorch_model-00002-of-00002.bin").unlink()
        (bad/"pytorch_model-00001-of-00002.bin").rename(bad/"pytorch_model.bin")
        found = load(bad, allow_pickle=True)
        assert all(torch.equal(found[n], x) for n, x in state.items())

    def test_the_same_numbers_in_two_files(self, tmp_path):
        self.in_two(tmp_path/"a", 0)
        assert sorted(load(tmp_path/"a", allow_pickle=True)) == ["u", "v"]

    def test_a_zip_that_unpacks_to_far_more(self, tmp_path):
        place, other = tmp_path/"w.bin", tmp_path/"other.bin"
        torch.save({"w": torch.zeros(10_000_000)}, other)
        with zipfile.ZipFile(other) as was, zipfile.ZipFile(place, "w") as made:
            for name in was.namelist():
                made.writestr(name, was.read(name), zipfile.ZIP_DEFLATED)
        assert os.path.getsize(place) < 100_000
        with pytest.raises(MergeError, match="unpacks to 4[0-9]{7}, which no weights do"):
            load(place, allow_pickle=True)
        # the remedy
        torch.save(torch.load(place, weights_only=True), other)
        assert load(other, allow_pickle=True).lazy["w"].shape == (10_000_000,)

    def test_a_tensor_that_repeats_a_number(self, tmp_path):
        torch.save({"w": torch.zeros(1).expand(2**28)}, tmp_path/"w.bin")
        with pytest.raises(MergeError, match="'w' is a few numbers that are repeated"):
            load(tmp_path/"w.bin", allow_pickle=True)


class TestData:
    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.csv.gz"])
    def test_a_line_without_an_end(self, tmp_path, monkeypatch, name):
        monkeypatch.setattr(of_examples, "LINE", 1 << 16)
        start = 'text,n\n"' if "csv" in name else '{"text":"'
        with gzip.open(tmp_path/name, "wt") as f:
            f.write(start + "a"*(1 << 20))
        with pytest.raises(MergeError, match=f"{name}: cannot be read .line . has more than 65536"):
            examples(tmp_path/name)

    def test_a_field_over_many_lines(self, tmp_path, monkeypatch):
        monkeypatch.setattr(of_examples, "LINE", 1 << 16)
        (tmp_path/"a.csv").write_text('text\n"' + "a\n"*(1 << 16))
        with pytest.raises(MergeError, match="field larger than field limit"):
            examples(tmp_path/"a.csv")

    def test_a_document_over_many_lines(self, tmp_path, monkeypatch):
        monkeypatch.setattr(of_examples._whole, "__defaults__", (1 << 10,))
        (tmp_path/"a.json").write_text("[\n" + '{"text": "a"},\n'*1000 + '{"text": "a"}]')
        with pytest.raises(MergeError, match="one document of more than 1024 characters"):
            examples(tmp_path/"a.json")

    def test_many_documents_take_no_square_of_time(self, tmp_path):
        (tmp_path/"a.json").write_text((json.dumps({"text": "a"*300}, indent=1) + "\n")*30_000)
        start = time.time()
        assert len(examples(tmp_path/"a.json")) == 30_000
        assert time.time() - start < 20

    def test_many_columns(self, tmp_path):
        names = ",".join(f"c{i}" for i in range(20_000))
        (tmp_path/"a.csv").write_text(f"{names}\n{names}\n")
        start = time.time()
        with pytest.raises(MergeError, match="c39 and 19960 more. Name one") as found:
            examples(tmp_path/"a.csv")
        assert len(str(found.value)) < 1000 and time.time() - start < 10

    @pytest.mark.parametrize("kind", ["pipe", "device"])
    def test_what_is_no_file(self, tmp_path, kind):
        place = tmp_path/"a.jsonl"
        os.mkfifo(place) if kind == "pipe" else place.symlink_to("/dev/zero")
        with pytest.raises(MergeError, match="is a pipe or a device"):
            examples(place)

    def test_a_folder_that_names_files_elsewhere(self, tmp_path):
        pytest.importorskip("datasets")
        (tmp_path/"secret.jsonl").write_text('{"text": "secret"}\n')
        folder = tmp_path/"data"
        folder.mkdir()
        (folder/"train.jsonl").symlink_to("../secret.jsonl")
        # a link is of whoever made the folder
        assert examples(folder) == [{"text": "secret"}]
        said = "configs:\n- config_name: default\n  data_files: ../secret.jsonl"
        (folder/"README.md").write_text(f"---\n{said}\n---\n")
        with pytest.raises(MergeError, match="README.md names .*, which is not in this folder"):
            examples(folder)

    def test_a_hub_that_never_answers(self, here):
        pytest.importorskip("datasets")
        with running() as hub:
            hub.is_silent = True
            more = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "1"}
            start = time.time()
            done = subprocess.run(
                [sys.executable, "-m", "frechet_merge", *"curvature a org/d -o out".split()],
                cwd=here, env=os.environ | ENV | more, capture_output=True, text=True,
            )  # fmt: skip
        assert done.returncode == 1 and "the hub did not give it" in done.stderr, done.stderr
        assert time.time() - start < 20


def tokenizer(**more):
    "One that knows a few words, of which one may be very long."
    inner = Tokenizer(models.WordLevel({"[U]": 0, "a": 1, "b": 2}, unk_token="[U]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[U]", pad_token="[U]", **more)


class TestTexts:
    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
    def test_of_a_book_as_much_is_split_as_is_kept(self, side, pair):
        tok = tokenizer(truncation_side=side)
        text = " ".join(["a", "b", "y"*5000]*200)
        records = [{"text": x} | ({"pair": x} if pair else {}) for x in (text, "a b")]
        lengths = []

        class Watched(PreTrainedTokenizerFast):
            def __call__(self, texts, *args, **how):
                for one in [texts] if isinstance(texts, str) else texts:
                    lengths.append(len(one))
                return super().__call__(texts, *args, **how)

        watched = Watched(tokenizer_object=tok.backend_tokenizer, unk_token="[U]", pad_token="[U]",
                          truncation_side=side)  # fmt: skip
        kind = "classifier" if pair else "causal"
        with pytest.warns(UserWarning, match="1 of 2 texts are longer than 16 tokens"):
            found = batches(kind, watched, records, max_length=16)
        whole = tok(text, text if pair else None, truncation=True, max_length=16)["input_ids"]
        rows = [row.tolist() for batch in found for row in batch["input_ids"]]
        assert whole in rows and max(lengths) < len(text)//10

    @pytest.mark.parametrize(
        "steps, times",
        [
            ([normalizers.Replace(" ", "▁"), normalizers.Prepend("▁"), normalizers.NFKC()], 1),
            ([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Replace("``", '"')], 1),
            ([normalizers.Replace("t", "tt")]*40, 2**40),
            ([normalizers.Replace(Regex("t*"), "x")]*8, 2**8),
            ([normalizers.Sequence([normalizers.Replace("ab", "c"*10)]*2)], 25),
        ],
    )
    def test_how_long_a_text_may_become(self, steps, times):
        said = normalizers.Sequence(steps).__getstate__()
        assert _growth(json.loads(said)) == times

    def test_a_normalizer_that_fills_the_memory(self, here):
        step = {"type": "Replace", "pattern": {"String": "t"}, "content": "tt"}
        steps = {"type": "Sequence", "normalizers": [step]*40}
        told(here/"a"/"tokenizer.json", normalizer=steps)
        said = refused("curvature a texts.jsonl -o out", here)
        assert "a: the normalizer in its tokenizer.json may make a text 1.1e+12 times" in said

    def test_numbers_that_only_a_post_processor_knows(self, here):
        new = {"SpecialToken": {"id": "<unk>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        table = {"<unk>": {"id": "<unk>", "ids": [99], "tokens": ["<unk>"]}}
        after = {"type": "TemplateProcessing", "single": [new, text], "pair": [new, text, text]}
        told(here/"a"/"tokenizer.json", post_processor=after | {"special_tokens": table})
        assert "as number 99, and a embeds 6" in refused("curvature a texts.jsonl -o out", here)


@pytest.mark.parametrize(
    "template, says",
    [
        ("{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}"
         "{% endfor %}{{ n.x }}", "1024 MiB"),
        ("{{ 'x'*(10**10) }}", "1024 MiB"),
        ("{{ '%0999999999d' % 3 }}", "1024 MiB"),
        ("{{ 9**(9**8) }}", "1 seconds"),
    ],
    ids=["doubles", "times", "format", "power"],
)  # fmt: skip
def test_one_line_of_a_template(here, monkeypatch, template, says):
    monkeypatch.setattr(of_examples, "PATIENCE", 1 if "seconds" in says else 15)
    told(here/"a"/"tokenizer_config.json", chat_template=template)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    said = refused("curvature a chats.jsonl -o out", here)
    assert f"the chat template of a cannot be used: it takes more than {says}" in said
    assert resource.getrlimit(resource.RLIMIT_AS) == limit


class TestPlaces:
    def test_a_link_that_leads_nowhere_is_no_file(self, tmp_path):
        (tmp_path/"out").symlink_to("nowhere")
        with pytest.raises(MergeError, match="out: exists already"):
            free(tmp_path/"out", folder=False)

    @pytest.mark.parametrize("kind", ["file", "link"])
    def test_below_what_is_no_folder(self, here, kind):
        (here/"f").symlink_to("nowhere") if kind == "link" else (here/"f").write_text("")
        said = refused("merge a b -o f/out/deep", here)
        assert "f/out/deep: cannot be written to" in said and "f is no folder" in said

    def test_what_cannot_be_written_is_said_before_the_work(self, here, monkeypatch):
        def no(*_, **more):
            raise PermissionError(13, "Permission denied", "out")

        monkeypatch.setattr("tempfile.mkdtemp", no)
        with pytest.raises(MergeError, match="Permission denied"):
            writable(here/"out")
        # before anything is read
        with pytest.raises(MergeError, match="Permission denied"):
            extract("no such model", "nor such a base", 1, out=here/"out")

    def test_to_ask_leaves_nothing(self, tmp_path):
        assert writable(tmp_path/"new"/"out") == tmp_path/"new"/"out"
        assert [*tmp_path.iterdir()] == []


class TestSurroundings:
    def ran(self, words, folder, before=""):
        code = f"import os, runpy, sys; {before}; sys.argv = {['x', *words.split()]}\n"
        code += "runpy.run_module('frechet_merge', run_name='__main__', alter_sys=True)"
        return subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | ENV,
                              capture_output=True, text=True)  # fmt: skip

    def test_a_folder_that_was_removed(self, here):
        (here/"gone").mkdir()
        words, before = f"merge {here}/a -o {here}/out", "os.chdir('gone'); os.rmdir('../gone')"
        done = self.ran(words, here, before)
        assert (done.returncode, done.stderr.splitlines()) == (
            1, ["error: the current folder was removed.", "Go to one that is there: cd."],
        )  # fmt: skip

    def test_no_more_threads(self):
        said = _unforeseen(RuntimeError("can't start new thread"))
        assert "no more threads or processes" in said and "ulimit -u" in said

    def test_modules_in_a_folder_of_models_are_not_run(self, here):
        for name in ("struct", "yaml", "zipfile"):
            (here/f"{name}.py").write_text("open('PWNED', 'w')")
        done = subprocess.run(
            [sys.executable, "-m", "frechet_merge", *"merge a b -o out".split()],
            cwd=here, env=os.environ | ENV, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and not (here/"PWNED").exists(), done.stderr

    def test_an_error_has_an_end(self):
        assert len(str(MergeError("shape " + "1, "*100_000 + "\nMend it."))) < 5000


def test_nothing_is_left_to_merge(here):
    heard = run(("merge", "a", "b", "--drop", "*", "-o", "out"), here)
    assert not wrong_with(heard, here) and "drop = *: leaves nothing to merge" in heard.text


def test_a_record_of_many_means_is_read_in_seconds(here):
    assert run(("merge", "a", "b", "-o", "out"), here).code == 0
    place = here/"out"/"frechet_merge.json"
    said = json.loads(place.read_text())
    one = next(iter(said["means"].values()))
    said["means"] |= {f"more.{i}": one for i in range(50_000)}
    place.write_text(json.dumps(said))
    start = time.time()
    assert len(Record.read(here/"out").means) > 50_000 and time.time() - start < 20

"""What a stranger's file makes a library do has an end: templates, patterns, depths and lengths.
And what the surroundings of a run say, such as a flag of Python, is said by name."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from mutated import adapter, run, told, warm, with_texts, wrong_with

from frechet_merge import MergeError
from frechet_merge.files.checkpoint import MANY, MAX_CONFIG, from_json, json_in
from frechet_merge.files.folders import snapshot_of
from frechet_merge.files.output import Staging, staged
from frechet_merge.execution.journal import Journal
from frechet_merge.recipes.lines import LONGEST, MOST, read_page, read_pages
from frechet_merge.execution.shares import shares_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Two models that split and pad texts, with texts and chats."
    warm()
    return with_texts(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def here(whole, tmp_path):
    "A copy of them, to be changed."
    return shutil.copytree(whole, tmp_path/"all")


def refused(words, folder):
    "What a command says that refuses its work as it should."
    heard = run(tuple(words.split()), folder)
    assert not wrong_with(heard, folder), heard
    assert heard.code == 1, heard
    return heard.text


class TestTemplates:
    WORDS = "curvature a chats.jsonl -o out"
    LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"

    def test_one_that_ends_is_used(self, here):
        template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        told(here/"a"/"tokenizer_config.json", chat_template=template)
        heard = run(tuple(self.WORDS.split()), here)
        assert heard.code == 0 and (here/"out").is_file(), heard

    @pytest.mark.parametrize(
        "template, says",
        [
            (LOOP, "more than 2000000 steps"),
            ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "maximum recursion"),
            ("{{ ''.__class__.__mro__ }}", "is unsafe"),
            ("{% include '/etc/passwd' %}", "no loader"),
            ("{% if %}", "Expected an expression"),
            ("{{ a.b.c }}", "'a' is undefined"),
            ("{{ raise_exception('\x1b[2Jno\nmore') }}", "no."),
            ("{{ 'x'*20000000 }}", "20000000 characters of one chat"),
        ],
        ids=["loop", "recursion", "attribute", "include", "syntax", "undefined", "raises", "long"],
    )
    def test_one_that_fails_or_does_not_end(self, here, template, says):
        told(here/"a"/"tokenizer_config.json", chat_template=template)
        said = refused(self.WORDS, here)
        assert "the chat template of a cannot be used: " in said and says in said

    def test_whoever_traces_goes_on(self):
        from frechet_merge.huggingface.examples import bounded

        def own(*_):
            return None

        before = sys.gettrace()
        sys.settrace(own)
        try:
            with bounded():
                pass
            assert sys.gettrace() is own
        finally:
            sys.settrace(before)


class TestPanics:
    "What ends a library in Rust is no `Exception`, and no traceback."

    def test_a_pattern_that_takes_for_ever(self, here):
        split = {"type": "Split", "pattern": {"Regex": "(t+)+$x"}, "behavior": "Isolated"}
        told(here/"a"/"tokenizer.json", pre_tokenizer=split | {"invert": False})
        (here/"texts.jsonl").write_text(json.dumps({"text": "t"*3000}) + "\n")
        said = refused("curvature a texts.jsonl -o out", here)
        assert "the tokenizer of a cannot split these texts" in said

    def test_a_table_that_is_none(self, here):
        odd = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        told(here/"a"/"tokenizer.json", normalizer=odd)
        said = refused("curvature a texts.jsonl -o out", here)
        assert "error: a: its tokenizer cannot be opened (Precompiled" in said

    def test_a_table_that_is_none_in_a_merge(self, here):
        "Which has rules of two tokenizers compared, and needs none of them."
        odd = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        for name in "ab":
            told(here/name/"tokenizer.json", normalizer=odd, of=name)
        assert run(("merge", "a", "b", "-o", "out"), here).code == 0

    def test_one_that_nobody_foresaw(self, here, monkeypatch, capsys):
        from frechet_merge.cli import commands

        class PanicException(BaseException):
            pass

        def panics(**_):
            raise PanicException("boom\nmore")

        ended = []
        monkeypatch.setattr(commands, "app", panics)
        monkeypatch.setattr(os, "_exit", ended.append)
        monkeypatch.setattr(sys, "argv", ["frechet-merge"])
        monkeypatch.setattr(commands, "ENDING", ())
        commands.main()
        assert ended == [1] and "error: RuntimeError: boom" in capsys.readouterr().err


class TestDepths:
    @pytest.mark.parametrize("deep", ["["*900 + "]"*900, '{"a":'*900 + "1" + "}"*900])
    @pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
    def test_of_json(self, here, file, deep):
        path = here/"a"/file
        path.write_text(path.read_text()[:-1] + f', "x": {deep}}}')
        for words in ("merge a b -o out", "curvature a texts.jsonl -o out"):
            heard = run(tuple(words.split()), here)
            assert not wrong_with(heard, here), heard
            assert heard.code == 0 or f"a/{file}: " in heard.text or "tokenizer" in heard.text

    @pytest.mark.parametrize("text", ["["*100_000, "["*101 + "]"*101, '{"a":'*101 + "1" + "}"*101])
    def test_of_texts(self, text):
        with pytest.raises(ValueError, match="too deep"):
            from_json(text)

    def test_what_is_not_deep(self):
        assert from_json("["*100 + "]"*100) and from_json("3") == 3


class TestLengths:
    def test_of_a_config(self, here):
        path = here/"a"/"config.json"
        path.write_text(path.read_text()[:-1] + ', "x": "' + "x"*MAX_CONFIG + '"}')
        assert "a/config.json: has more than 32 MiB" in refused("merge a b -o out", here)

    @pytest.mark.parametrize("file", ["a/config.json", "x/adapter_config.json"])
    def test_of_its_values(self, here, file):
        if file[0] == "x":
            adapter(here/"x", 0)
        path = here/file
        path.write_text(path.read_text()[:-1] + ', "x": [' + "1,"*MANY + "1]}")
        said = refused(f"merge {file[0]} {file[0]} -o out", here)
        assert f"{file}: has more than {MANY} values" in said

    def test_many_classes_are_no_damage(self, tmp_path):
        "As many as there are landmarks in the largest set of them."
        names = [f"a landmark, whose name is {i}" for i in range(203_000)]
        said = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        (tmp_path/"config.json").write_text(json.dumps(said, indent=2))
        assert len(json_in(tmp_path/"config.json")["label2id"]) == 203_000

    def test_of_a_recipe(self):
        with pytest.raises(MergeError, match=f"more than {LONGEST} characters"):
            read_pages("models: [a, b] # " + "x"*LONGEST)

    @pytest.mark.parametrize("text", ["[" + "1,"*(2*MOST) + "1]", "- "*(2*MOST) + "1"])
    def test_of_its_lists(self, text):
        with pytest.raises(MergeError, match=f"more than {MOST} values|recursion"):
            read_pages(f"models: {text}" if text[0] == "[" else text)

    def test_of_its_fields(self):
        start = time.time()
        assert len(read_page("\n".join(f"a{i}: {i}" for i in range(MOST//2))).data) == MOST//2
        assert time.time() - start < 20

    @pytest.mark.parametrize("text", ["- a\n- b", "[1, 2]", "a", "3"])
    def test_what_is_no_mapping(self, text):
        with pytest.raises(MergeError, match="a recipe is a mapping from fields to values"):
            read_page(text)

    @pytest.mark.parametrize("number", ["0x" + "f"*400, "-" + "9"*400, ":".join(["59"]*300)])
    def test_of_its_numbers(self, number):
        with pytest.raises(MergeError, match="line 2: a number is larger than any"):
            read_page(f"models: [a, b]\nscale: {number}")


class TestPlaces:
    @pytest.mark.parametrize("words", ["merge a b -o {}", "align a b -o {}"])
    def test_a_way_through_a_folder_that_is_not_there(self, here, words):
        said = refused(words.format("missing/../out"), here)
        assert "missing/../out: cannot be written to (there is no folder missing)" in said
        assert sorted(p.name for p in here.iterdir() if p.name in ("missing", "out")) == []

    def test_a_way_through_a_folder_that_is_there(self, here):
        assert run(("merge", "a", "b", "-o", "a/../out"), here).code == 0
        assert (here/"out"/"model.safetensors").is_file()

    @pytest.mark.parametrize("name", ["out.part-1-of-999999999999", "out.part-0-of-0"])
    def test_a_folder_that_is_called_like_a_part(self, tmp_path, name):
        (tmp_path/name).mkdir()
        with pytest.raises(MergeError, match="there are no parts of it"):
            shares_of(tmp_path/"out", "key")

    @pytest.mark.parametrize("main", [b"../../other", b"\xff\xfe", b"a\0b", b"/etc", b"x"*10_000])
    def test_a_revision_that_is_another_place(self, tmp_path, main):
        cache = tmp_path/"models--a--b"
        (tmp_path/"other").mkdir()
        (cache/"snapshots"/"abc").mkdir(parents=True)
        (cache/"refs").mkdir()
        (cache/"refs"/"main").write_bytes(main)
        assert snapshot_of(cache) == cache/"snapshots"/"abc"


def test_what_is_behind_a_link_in_remains_stays(tmp_path):
    precious = tmp_path/"precious"
    precious.mkdir()
    (precious/"thesis.txt").write_text("years of work")
    staging = Staging("key", resume=True, keeps=lambda e: True)
    with pytest.raises(MergeError), staged(tmp_path/"out", staging) as part:
        raise MergeError("stopped")
    part.rmdir()
    part.symlink_to(precious)
    with staged(tmp_path/"out", staging) as part:
        (part/"x").write_text("x")
    assert [p.name for p in precious.iterdir()] == ["thesis.txt"]
    assert [p.name for p in (tmp_path/"out").iterdir()] == ["x"]
    assert not (tmp_path/"out").is_symlink()


class TestParts:
    "What lies in a part, and is not what was written there, is no part of the output."

    def parts(self, here):
        words = ("merge", "a", "b", "-o", "out", "--shard-size", "300")
        assert run((*words[:4], "whole", *words[5:]), here).code == 0
        for i in (1, 2):
            assert run((*words, "--part", f"{i}/2"), here).code == 0
        return (*words, "--join"), here/"out.part-2-of-2"

    def written(self, folder):
        files = sorted(p for p in folder.rglob("*") if "safetensors" in p.name)
        return {p.relative_to(folder): p.read_bytes() for p in files}

    def test_a_file_that_is_longer(self, here):
        words, part = self.parts(here)
        file = sorted(part.glob("*.safetensors"))[0]
        file.write_bytes((here/"a"/"model.safetensors").read_bytes())
        heard = run(words, here)
        assert not wrong_with(heard, here) and heard.code == 0, heard
        assert self.written(here/"out") == self.written(here/"whole")

    def test_a_journal_that_is_a_pipe(self, here):
        words, part = self.parts(here)
        (part/"journal").unlink()
        os.mkfifo(part/"journal")
        heard = run(words, here)
        assert heard.code == 1 and "journal: is a pipe" in heard.text
        assert not (here/"out").exists() and part.is_dir()

    def test_one_that_another_run_left(self, tmp_path):
        os.mkfifo(tmp_path/"journal")
        with pytest.raises(MergeError, match="journal: is a pipe"):
            Journal.at(tmp_path/"journal")
        assert Journal.at(tmp_path/"none").lines == {}

    def test_files_of_others(self, here):
        words, part = self.parts(here)
        (part/"more").mkdir()
        for to in (part/"other.safetensors", part/"more"/"x.safetensors"):
            shutil.copy(here/"a"/"model.safetensors", to)
        heard = run(words, here)
        assert heard.code == 0 and "other.safetensors: lay in a part" in heard.text, heard
        assert self.written(here/"out") == self.written(here/"whole")


class TestSurroundings:
    def test_warnings_are_no_errors(self, here):
        flags = {"PYTHONWARNINGS": "error", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "frechet_merge", "merge", "a", "a", "-o", "out"],
            cwd=here, env=os.environ | flags, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and "warning: a is named 2 times" in done.stderr, done.stderr

    def test_no_docstrings(self, here):
        flags = {"PYTHONOPTIMIZE": "2", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        for words, code in (("curvature a texts.jsonl -o s", 1), ("merge a b -o out", 0)):
            done = subprocess.run(
                [sys.executable, "-m", "frechet_merge", *words.split()],
                cwd=here, env=os.environ | flags, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == code, done.stderr
            assert ("error: Python runs without docstrings" in done.stderr) == (code == 1)

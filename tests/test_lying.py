"""Configs, tokenizers, statistics and places that lie, and two runs that want one of them: what is
said costs neither memory nor time, and nothing of it is believed."""

import json
import os
import signal
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context

import pytest
import torch
from mutated import full
from safetensors.torch import load_file, save_file

from frechet_merge import MergeError, load, merge
from frechet_merge.cli.commands import Ending, app
from frechet_merge.cli.options import picture_path
from frechet_merge.curvature.collecting import Statistics
from frechet_merge.files import output
from frechet_merge.files.output import claimed, staged, staged_file
from frechet_merge.files.shards import read_bytes, same_bytes, save_tensors
from frechet_merge.huggingface.models import open_model
from frechet_merge.matching.bases import write_bases
from frechet_merge.symmetries.families import groups_of
from frechet_merge.matching.hollow import refuse_larger
from frechet_merge.matching.rows import lined_up
from frechet_merge.matching.statistics import facts
from frechet_merge.vocabularies.tokenizers import MANY
from frechet_merge.execution.journal import _lines
from frechet_merge.merging.upcycled import mixture
from frechet_merge.messages import as_here, by_name, called


def told(folder, **more):
    "Put keys into the config.json of a folder."
    file = folder/"config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return folder


LIES = [
    {"num_hidden_layers": 2**31},
    {"layer_types": ["full_attention"]*2000},
    {"hidden_size": 2**20},
    {"intermediate_size": 2**40},
    {"vocab_size": 2**40},
]


@pytest.fixture(scope="module", params=LIES, ids=lambda lie: next(iter(lie)))
def lying(request, tmp_path_factory):
    "A model whose config says something else than its files."
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("lying")/"m"
    full(folder, 0)
    return told(folder, **request.param)


class TestConfigs:
    "A library that makes what a config says is not asked to before the files have been looked at."

    def test_a_model_that_is_run(self, lying):
        with pytest.raises(MergeError, match="m: its config.json describes .* hold 340 numbers"):
            open_model(str(lying))

    def test_a_model_whose_symmetries_are_tried(self, lying):
        with pytest.raises(MergeError, match="its config.json describes a model of"):
            groups_of(load(lying))

    def test_a_mixture(self, lying, tmp_path):
        with pytest.raises(MergeError, match="its config.json describes a model of"):
            mixture([lying, lying], tmp_path/"out", gate="random")
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize("more", [{"num_attention_heads": 3}, {"num_hidden_layers": [[]]}])
    def test_a_config_that_no_class_takes(self, tmp_path, more):
        pytest.importorskip("transformers")
        full(tmp_path/"m", 0)
        told(tmp_path/"m", **more)
        with pytest.raises(MergeError, match="m: transformers does not understand its config.json"):
            mixture([tmp_path/"m"]*2, gate="random")

    def test_a_long_list_of_anything_else(self, tmp_path):
        pytest.importorskip("transformers")
        full(tmp_path/"m", 0)
        told(tmp_path/"m", suppress_tokens=[1]*20_000)
        refuse_larger(load(tmp_path/"m"))

    def test_no_config_of_transformers_is_of_too_many_layers(self):
        from frechet_merge.matching.hollow import _is_modest

        known = pytest.importorskip("transformers").CONFIG_MAPPING
        for kind in ("llama", "gemma3n", "gemma3n_text", "phi4_multimodal", "swin", "zoedepth"):
            assert _is_modest(known[kind]().to_dict()), kind

    def test_codes_are_fewer_than_numbers(self, tmp_path):
        pytest.importorskip("transformers")
        state = {"model.layers.0.mlp.up_proj.W_q": torch.zeros(4, 4, dtype=torch.uint8)}
        full(tmp_path/"m", 0)
        save_file(state, tmp_path/"m"/"model.safetensors")
        told(tmp_path/"m", vocab_size=2**20, quantization_config={"quant_method": "hqq"})
        with pytest.raises(MergeError, match="is quantised .hqq.*\nName the model of full"):
            refuse_larger(load(tmp_path/"m"))


class TestTokens:
    @pytest.mark.parametrize("count", [MANY + 1, 2**40])
    def test_a_vocabulary_that_no_memory_holds(self, tmp_path, count):
        for name in "ab":
            full(tmp_path/name, 0)
        told(tmp_path/"a", vocab_size=count)
        with pytest.raises(MergeError, match=f"a: has {count} tokens"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"out")

    def test_a_token_of_a_high_number_in_a_union(self, tmp_path):
        pytest.importorskip("transformers")
        for name in "ab":
            full(tmp_path/name, 0)
        file = tmp_path/"b"/"tokenizer.json"
        held = json.loads(file.read_text())
        held["added_tokens"].append(held["added_tokens"][0] | {"id": 2**31, "content": "<far>"})
        file.write_text(json.dumps(held))
        every = [load(tmp_path/name) for name in "ab"]
        with pytest.raises(MergeError, match="b: its tokenizer.*'<far>' has a number that no row"):
            lined_up(every, ["a", "b"], [0.5, 0.5], "union")

    @pytest.mark.parametrize("length", ["long", -1, [3], True])
    def test_a_length_that_is_none(self, tmp_path, length):
        pytest.importorskip("transformers")
        full(tmp_path/"m", 0)
        file = tmp_path/"m"/"tokenizer_config.json"
        said = {"model_max_length": length, "pad_token": "<unk>"}
        file.write_text(json.dumps(json.loads(file.read_text()) | said))
        with pytest.raises(MergeError, match="tokenizer_config.json has model_max_length = "):
            open_model(str(tmp_path/"m"))

    def test_sentinels_of_t5(self, tmp_path):
        from frechet_merge.vocabularies.tokenizers import _of_t5

        (tmp_path/"tokenizer_config.json").write_text(json.dumps({"extra_ids": 10**12}))
        with pytest.raises(MergeError, match="has 1000000000000 tokens"):
            _of_t5(["a"], tmp_path)


class TestStatistics:
    @pytest.mark.parametrize(
        "key, value",
        [
            ("skipped", "{"),
            ("skipped", 3),
            ("experts", [1]),
            ("samples", -1),
            ("samples", 0.5),
            ("samples", True),
            ("samples", 10**400),
            ("seed", "x"),
            ("asked", []),
            ("error", "big"),
            ("diagonal", [3]),
        ],
    )
    def test_facts_of_another_kind(self, tmp_path, key, value):
        file = tmp_path/"s.safetensors"
        save_tensors(file, {"w": torch.ones(3)}, {key: json.dumps(value)})
        for read in (lambda: Statistics.load(file), lambda: facts(file, load(file))):
            with pytest.raises(MergeError, match=f"s.safetensors: has {key} = "):
                read()

    def test_null_is_what_is_not_said(self, tmp_path):
        file = tmp_path/"s.safetensors"
        save_tensors(file, {"w": torch.ones(3)}, {"skipped": "null", "form": '"diagonal"'})
        assert Statistics.load(file).lacking() == ""
        assert facts(file, load(file)) == {"form": "diagonal", "format": "pt"}

    def test_what_was_saved_is_read(self, tmp_path):
        about = {"seed": -3, "samples": 4, "skipped": {"b": "why"}, "error": {"w": None}}
        Statistics({"w": torch.ones(3)}, about).save(tmp_path/"s")
        assert Statistics.load(tmp_path/"s").about == about


class TestFiles:
    def test_a_small_file_takes_little_memory(self, tmp_path):
        (tmp_path/"config.json").write_text("{}")
        tracemalloc.start()
        try:
            assert read_bytes(tmp_path/"config.json") == b"{}"
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()

    def test_large_files_are_compared_a_piece_at_a_time(self, tmp_path):
        for name, end in (("a", b"x"), ("b", b"x"), ("c", b"y")):
            with open(tmp_path/name, "wb") as f:
                f.truncate(20 << 20)
                f.seek(0, os.SEEK_END)
                f.write(end)
        tracemalloc.start()
        try:
            a, b, c = (tmp_path/name for name in "abc")
            assert same_bytes(a, b) and not same_bytes(a, c) and not same_bytes(a, __file__)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()

    def test_nobody_waits_for_a_pipe_beside_a_model(self, models, tmp_path):
        os.mkfifo(models[0]/"scaler.pkl")
        (models[1]/"scaler.pkl").write_bytes(b"x")
        with pytest.raises(MergeError, match="scaler.pkl: is a pipe"):
            merge(models, out=tmp_path/"out")
        assert not (tmp_path/"out").exists()

    def test_a_picture_whose_name_has_no_end(self, tmp_path):
        os.mkfifo(tmp_path/"a.png")
        with pytest.raises(MergeError, match="a.png: is a pipe"):
            picture_path(tmp_path/"a")
        assert picture_path(tmp_path/"b") == tmp_path/"b.png"

    @pytest.mark.parametrize(
        "odd",
        [
            b"["*100_000,
            b'{"job": "a"}',
            b'{"job": [], "wrote": [], "means": {}}',
            b'{"job": "a", "wrote": [{"name": "w", "start": -1, "count": 1}], "means": {}}',
            b'{"job": "a", "wrote": [{"name": 3, "start": 0, "count": 1}], "means": {}}',
            b'{"job": "a", "wrote": [{"name": "w", "start": 0, "count": 1e99}], "means": {}}',
            b'{"job": "a", "wrote": [], "means": {"w": {"counted": null}}}',
            b'{"job": "a", "wrote": [], "means": {"w": 3}}',
        ],
        ids=range(8),
    )
    def test_a_line_that_no_journal_has(self, tmp_path, odd):
        whole = b'{"job": "b", "wrote": [], "means": {}}'
        (tmp_path/"journal").write_bytes(odd + b"\n" + whole + b"\n")
        assert _lines(tmp_path/"journal") == {"b": json.loads(whole)}

    @pytest.mark.parametrize("to", ["o", "p"])
    def test_several_recipes_into_a_loop_of_links(self, models, tmp_path, to):
        file = tmp_path/"r.yaml"
        said = json.dumps({"models": [str(m) for m in models]})
        named = json.dumps({"name": "first", "models": [str(m) for m in models]})
        file.write_text(f"{named}\n---\n{said}\n")
        (tmp_path/"o").symlink_to(to)
        (tmp_path/"p").symlink_to("o")
        with pytest.raises(MergeError, match="o: cannot be written to"):
            app(["run", str(file), "-o", str(tmp_path/"o")], standalone_mode=False)


class TestTwoRuns:
    "A file is claimed before the work begins, and not only while it is written."

    # of models that are not there: nothing is read before
    WORDS = [
        "curvature nowhere none.jsonl -o {out}",
        "basis nowhere nobody --base none -o {out}",
        "suggest nowhere nobody --base none -o {out}",
    ]

    @pytest.mark.parametrize("words", WORDS, ids=lambda w: w.split()[0])
    def test_a_second_one_is_refused_at_once(self, tmp_path, words):
        out = tmp_path/"out"
        with claimed(out):
            with pytest.raises(MergeError, match="another run is writing it"):
                Context().run(app, words.format(out=out).split(), standalone_mode=False)
        assert not [*tmp_path.iterdir()]

    def test_where_nothing_can_be_written_nothing_is_read(self, tmp_path, monkeypatch):
        def full_disk(**_):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr("tempfile.mkdtemp", full_disk)
        with pytest.raises(MergeError, match="out: No space left on device"):
            write_bases(["nowhere"], "none", tmp_path/"out")

    def test_what_appeared_meanwhile_stays(self, models, tmp_path, monkeypatch):
        out = tmp_path/"out"
        with pytest.raises(MergeError, match="written to by something else"):
            with staged_file(out, replace=False) as part:
                part.write_text("ours")
                out.write_text("theirs")
        assert out.read_text() == "theirs"
        with pytest.raises(MergeError, match="written to by something else"):
            with staged_file(tmp_path/"link", replace=False) as part:
                part.write_text("ours")
                (tmp_path/"link").symlink_to("nowhere")

    def test_a_run_may_write_what_it_claimed(self, tmp_path):
        with claimed(tmp_path/"s"):
            with staged_file(tmp_path/"s", alone=True) as part:
                part.write_text("x")
        assert [p.name for p in tmp_path.iterdir()] == ["s"]

    def test_a_claim_is_of_one_place(self, tmp_path):
        with claimed(tmp_path/"a"), claimed(tmp_path/"b"), staged(tmp_path/"out") as part:
            (part/"x").write_text("x")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


class TestThreads:
    "Two merges in two threads know nothing of each other."

    def test_names_of_places(self):
        entered, left = threading.Barrier(2), threading.Barrier(2)

        def say(name, first):
            with called({"/place": name}):
                entered.wait(10)
                said = [by_name("/place")]
                if first:
                    left.wait(10)
            if not first:
                left.wait(10)
            return [*said, by_name("/place")]

        with ThreadPoolExecutor(2) as threads:
            found = [threads.submit(say, n, n == "one") for n in ("one", "two")]
        assert [f.result(10) for f in found] == [["one", "/place"], ["two", "/place"]]
        assert by_name("/place") == "/place"

    @pytest.mark.parametrize("executor", ["serial", "threads", lambda f, xs: [*map(f, xs)]])
    def test_a_job_says_what_its_merge_says(self, models, executor):
        state = load_file(models[1]/"model.safetensors")
        state["q.weight"][0, 0] = float("nan")
        save_file(state, models[1]/"model.safetensors")
        with called({str(models[1]): "the second"}), pytest.raises(MergeError) as found:
            merge(models, executor=executor)
        assert str(found.value).startswith("the second") and str(models[1]) not in str(found.value)

    def test_what_is_known_later_is_not_known(self):
        with called({"/place": "before"}):
            ask = as_here(by_name)
        with called({"/place": "after"}):
            assert ask("/place") == "before"


class TestEnding:
    "A signal that comes twice, or at a bad moment, ends a run once, and what it began is removed."

    @pytest.fixture
    def ending(self, monkeypatch):
        was = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGTERM)
        ending = Ending()
        signal.signal(signal.SIGTERM, ending)
        monkeypatch.setattr(sys, "unraisablehook", ending.dropped)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, was[0])
        signal.signal(signal.SIGTERM, was[1])

    def test_twice(self, ending, tmp_path, monkeypatch):
        real = output._remove

        def slow(folder):
            os.kill(os.getpid(), signal.SIGTERM)
            real(folder)

        monkeypatch.setattr(output, "_remove", slow)
        with pytest.raises(SystemExit) as found, staged(tmp_path/"out"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert found.value.code == 143 and not [*tmp_path.iterdir()]

    def test_again_later(self, ending, monkeypatch):
        monkeypatch.setattr("frechet_merge.cli.commands.GRACE", 0.0)
        for _ in range(2):
            with pytest.raises(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)

    def test_while_something_is_thrown_away(self, ending):
        class Dropped:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(SystemExit) as found:
            Dropped()
            time.sleep(5)
        assert found.value.code == 143

"""A file of several recipes gives what its merges give one after the other, and leaves no more;
what is wrong with any of them is said before the first."""

import errno
import itertools
import json
import os
import re
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import cli, save
from hub import TOKEN, files_in, running
from test_card import adapter
from test_dialects import flux_file
from test_mergekit import filled, folders
from test_recipe_files import deep, digest, written

from frechet_merge import MergeError, load, merge
from frechet_merge.geometries.directions import Slerp
from frechet_merge.execution.block import MeanOf
from frechet_merge.recipes.lines import read_page, read_pages
from frechet_merge.execution.executors import Run
from frechet_merge.recipes.written import read_recipe, run_recipe
from frechet_merge.merging.record import Record
from frechet_merge.execution.shares import Share
from frechet_merge.recipes.several import moved, steps_of

__all__ = ["folders"]
FIRST = """name: first
merge_method: linear
models: [{model: $a, parameters: {weight: 0.3}}, {model: $b, parameters: {weight: 0.7}}]
"""
SECOND = """name: second
merge_method: task_arithmetic
models: [{model: first, parameters: {weight: 0.5}}, {model: $c, parameters: {weight: 0.4}}]
base_model: $base
"""
LAST = """merge_method: slerp
models: [{model: first}, {model: second}]
base_model: first
parameters: {t: 0.3}
"""


def several(tmp_path, folders, *texts):
    return written(tmp_path, filled("---\n".join(texts), folders))


def by_hand(folders, to):
    one = merge([folders["a"], folders["b"]], weights=[0.3, 0.7], out=to/"1").out
    sums = dict(base=folders["base"], sum=[0.5, 0.4])
    two = merge([one, folders["c"]], out=to/"2", **sums).out
    return merge([one, two], Slerp(0.9995), weights=[0.7, 0.3])


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_the_order_in_the_file_does_not_matter(tmp_path, folders, order):
    path = several(tmp_path, folders, *[(FIRST, SECOND, LAST)[i] for i in order])
    before = {*os.listdir(tmp_path)}
    code, out, err = cli("run", path, tmp_path/"out", cwd=tmp_path)
    assert code == 0 and not err, err
    assert {*os.listdir(tmp_path)} == before | {"out"}
    mine, hand = load(tmp_path/"out"), by_hand(folders, tmp_path)
    assert all(torch.equal(mine[n], x) for n, x in hand.tensors.items())


def test_it_is_run_again_from_what_it_wrote(tmp_path, folders):
    path = several(tmp_path, folders, LAST, FIRST, SECOND)
    assert cli("run", path, "-o", tmp_path/"out", cwd=tmp_path)[0] == 0
    path.unlink()
    code, _, err = cli("run", tmp_path/"out", tmp_path/"again", cwd=tmp_path)
    assert code == 0, err
    assert digest(tmp_path/"out") == digest(tmp_path/"again")


def test_all_of_them_are_kept_if_all_have_names(tmp_path, folders):
    path = several(tmp_path, folders, FIRST, "name: deep/third\n" + LAST, SECOND)
    code, out, err = cli("run", path, "-o", tmp_path/"out", cwd=tmp_path)
    assert code == 0 and "out/deep/third: 3 models merged" in out, err
    kept = ["README.md", "deep", "first", "recipes.yml", "second"]
    assert sorted(os.listdir(tmp_path/"out")) == kept
    mine, hand = load(tmp_path/"out"/"deep"/"third"), by_hand(folders, tmp_path)
    assert all(torch.equal(mine[n], x) for n, x in hand.tensors.items())
    assert cli("run", tmp_path/"out", tmp_path/"again", cwd=tmp_path)[0] == 0
    for name in ("first", "second", "deep/third"):
        assert digest(tmp_path/"out"/name) == digest(tmp_path/"again"/name)


def test_recipes_of_both_kinds_read_each_other(tmp_path, folders):
    ours = "models: [first, {model: $c, weight: 3}]\n"
    ours = ours.replace("first", "{model: first, weight: 1}")
    path = several(tmp_path, folders, FIRST, ours)
    assert cli("run", path, tmp_path/"out", cwd=tmp_path)[0] == 0
    one = merge([folders["a"], folders["b"]], weights=[0.3, 0.7], out=tmp_path/"1").out
    hand = merge([one, folders["c"]], weights=[1, 3])
    assert all(torch.equal(load(tmp_path/"out")[n], x) for n, x in hand.tensors.items())


@pytest.mark.parametrize("text", [FIRST, "name: org/x:7\nmodels: [$a, $b]\n"])
def test_a_recipe_with_a_name_alone_is_a_recipe(tmp_path, folders, text):
    path = several(tmp_path, folders, text)
    assert cli("run", path, tmp_path/"out", cwd=tmp_path)[0] == 0
    assert "h.1.mlp.weight" in load(tmp_path/"out") and not (tmp_path/"out"/"recipes.yml").exists()


@pytest.mark.parametrize("last", [LAST, "name: deep/third\n" + LAST])
def test_into_a_folder_that_is_not_there_yet(tmp_path, folders, last):
    out = tmp_path/"deep"/"er"/"out"
    second = "name: second\nmodels: [first, $c]\nweights: [1, 2, 3]\n"
    path = several(tmp_path, folders, FIRST, second, last)
    before = sorted(os.listdir(tmp_path))
    code, _, err = cli("run", path, out, cwd=tmp_path)
    assert code == 1 and "3 weights" in err and sorted(os.listdir(tmp_path)) == before
    path = several(tmp_path, folders, FIRST, SECOND, last)
    assert cli("run", path, out, cwd=tmp_path)[0] == 0
    assert os.listdir(out.parent) == ["out"]
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "deep"])


def digest_of(folder):
    "The bytes of every file of weights of an output."
    files = sorted(folder.rglob("*.safetensors"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def told(folder):
    "Every file of an output but its weights, without how long it took."
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".safetensors"]
    held = {str(f.relative_to(folder)): f.read_text() for f in files}
    return {name: re.sub(r'"seconds": [0-9.e-]+', "", text) for name, text in held.items()}


@pytest.mark.parametrize("last", [LAST, "name: deep/third\n" + LAST])
def test_two_runs_write_the_same_and_name_no_hidden_folder(tmp_path, folders, last):
    path = several(tmp_path, folders, FIRST, SECOND, last)
    found = []
    for _ in range(2):
        assert cli("run", path, tmp_path/"out", cwd=tmp_path)[0] == 0
        found.append(told(tmp_path/"out"))
        assert not any(".partial" in text or "steps/" in text for text in found[-1].values())
        os.rename(tmp_path/"out", tmp_path/f"out{len(found)}")
    assert found[0] == found[1] and "frechet_merge.json" in str([*found[0]])


def test_a_step_that_is_kept_can_be_made_again(tmp_path, folders):
    path = several(tmp_path, folders, FIRST, SECOND)
    assert cli("run", path, tmp_path/"out", cwd=tmp_path)[0] == 0
    record = Record.read(tmp_path/"out"/"second")
    assert record.recipe["models"][0] == str(tmp_path/"out"/"first")
    assert f"merge {tmp_path/'out'/'first'} " in record.command
    code, _, err = cli("run", tmp_path/"out"/"second", tmp_path/"again", cwd=tmp_path)
    assert code == 0, err
    assert digest(tmp_path/"out"/"second") == digest(tmp_path/"again")


def test_an_output_without_its_steps_sends_to_the_recipes(tmp_path, folders):
    path = several(tmp_path, folders, FIRST.replace("first", "deep/first", 1),
                   LAST.replace("first", "deep/first").replace("second", "$c"))
    assert cli("run", path, tmp_path/"out", cwd=tmp_path)[0] == 0
    record, again = Record.read(tmp_path/"out"), "frechet-merge run recipes.yml -o OUT"
    assert record.recipe["models"][0] == "deep/first" and record.command == again
    with pytest.raises(MergeError, match=again):
        record.again()
    code, _, err = cli("run", tmp_path/"out"/"frechet_merge.json", tmp_path/"x", cwd=tmp_path)
    assert code == 1 and again in err
    card = (tmp_path/"out"/"README.md").read_text()
    assert card.count(again) == 2 and "frechet-merge merge" not in card
    assert "models:\n- deep/first" not in card and card.startswith("---\n")
    assert cli("run", "recipes.yml", tmp_path/"x", cwd=tmp_path/"out")[0] == 0


def test_several_are_not_written_to_a_file(tmp_path, folders):
    path = several(tmp_path, folders, FIRST, LAST.replace("second", "$c"))
    code, _, err = cli("run", path, tmp_path/"x.safetensors", cwd=tmp_path)
    assert code == 2 and "name a folder for the last of them, and not a file" in err


WRONG = {
    "two outputs": ([FIRST, LAST, LAST], "second recipe has no name"),
    "one name twice": ([FIRST, FIRST, LAST], "'first' is the name of another recipe"),
    "a circle": (
        [FIRST.replace("$a", "second"), SECOND, LAST], "line 1: first reads second, which reads it",
    ),
    "itself": ([FIRST.replace("$a", "first"), LAST], "first reads first"),
    "a field that does not fit": (
        ["name: first\nmodels: [$a, $c]\nweights: [1, 2, 3]\n", LAST.replace("second", "$c")],
        "line 3: 3 weights [1.0, 2.0, 3.0] for 2 models",
    ),
    "a name of ours": ([FIRST.replace("first", "recipes.yml", 1)], "be the name of a folder"),
    "a name that is too long": (
        ["name: x/" + "é"*128 + "\nmodels: [$a]\n"], "cannot be the name of a folder",
    ),
    "half a character": (['name: "\\uD800"\nmodels: [$a]\n'], "cannot be the name of a folder"),
    "a name with NUL": (['name: "a\\0b"\nmodels: [$a]\n'], "cannot be the name of a folder"),
    "a name in another": (
        [FIRST, FIRST.replace("first", "first/deeper", 1)],
        "'first/deeper' and 'first' would lie in each other",
    ),
    "a name around another": (
        [FIRST.replace("first", "first/deeper", 1), FIRST],
        "'first' and 'first/deeper' would lie in each other",
    ),
    "a place elsewhere": ([FIRST.replace("first", "../x", 1)], "cannot be the name of a folder"),
    "a model that is not there": (
        [FIRST, SECOND.replace("$c", "./nowhere"), LAST], "./nowhere: there is no such folder",
    ),
    "a method that there is not": (
        [FIRST, SECOND, LAST.replace("slerp", "slrp")], "line 10: merge_method: 'slrp'",
    ),
    "a weight misspelled": ([FIRST, SECOND.replace("weight: 0.4", "wieght: 0.4"), LAST], "wieght"),
    "an output": (["models: [$a, $b]\noutput: x\n", FIRST], "of the whole file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_the_first_merge(tmp_path, folders, case):
    texts, says = WRONG[case]
    texts = [*texts, *([LAST.replace("second", "$c")] if len(texts) == 1 else [])]
    path = several(tmp_path, folders, *texts)
    before = sorted(os.listdir(tmp_path))
    code, out, err = cli("run", path, tmp_path/"out", cwd=tmp_path)
    assert code == 1 and says in err and len(err.splitlines()) <= 3 and not out, err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_report_of_each_that_is_kept(tmp_path, folders):
    path = several(tmp_path, folders, FIRST, "name: deep/third\n" + LAST, SECOND)
    code, out, err = cli("run", path, tmp_path/"out", "--report", cwd=tmp_path)
    assert code == 0, err
    for name, count in (("first", 2), ("second", 2), ("deep/third", 3)):
        page = tmp_path/"out"/name/"report.html"
        assert f"report: {page}" in out and page.read_text().startswith("<!DOCTYPE html>")
        assert f"{tmp_path/'out'/name}: {count} models merged" in out
    code, _, err = cli("report", tmp_path/"out"/"second", cwd=tmp_path)
    assert code == 0, err
    path = several(tmp_path, folders, FIRST, SECOND, LAST)
    code, out, err = cli("run", path, tmp_path/"one", "--report", cwd=tmp_path)
    assert code == 0 and out.count("models merged") == 1, err
    page = (tmp_path/"one"/"report.html").read_text()
    assert "frechet-merge run recipes.yml -o OUT" in page and "models: [first" not in page


def pushed(tmp_path, path):
    "The files of a repository to which what a file of recipes makes was pushed."
    with running() as hub:
        words = "run", path, tmp_path/"out", "--push", "me/x", "--yes"
        code, _, err = cli(*words, cwd=tmp_path, env=hub.env(tmp_path/"home", TOKEN))
        assert code == 0, err
        files = hub.repos["me/x"].at("main")[1]
    return {name: text for name, text in files.items() if name != ".gitattributes"}


def test_all_that_are_kept_are_pushed_in_one_commit(tmp_path, folders):
    path = several(tmp_path, folders, FIRST, "name: third\n" + LAST, SECOND)
    files = pushed(tmp_path, path)
    assert files == files_in(tmp_path/"out")
    assert {"recipes.yml", "first/config.json", "third/model.safetensors"} <= {*files}


def test_the_last_one_is_pushed_if_it_has_no_name(tmp_path, folders):
    path = several(tmp_path, folders, FIRST, LAST, SECOND)
    files = pushed(tmp_path, path)
    assert files == files_in(tmp_path/"out") and "recipes.yml" in files
    assert not any("first" in name for name in files)


class TestDivided:
    """Machines write parts of each recipe whose models are there; what they have joined in the end
    is what one machine makes."""

    def on(self, path, out, run, **more):
        "One machine, which makes a file for every layer or so."
        asked = read_recipe(path)
        return run_recipe(asked, replace(asked.output.into(out), shard_size=200), run)

    def rounds(self, path, out, n=2):
        "Parts and joins until the output is there; what was said of each join."
        said = []
        for _ in range(6):
            for i in range(n, 0, -1):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.on(path, out, Run("serial", part=Share(i, n)))
                assert not out.exists()
            with warnings.catch_warnings(record=True) as w:
                warnings.simplefilter("always")
                found = self.on(path, out, Run("serial", join=True))
            said.append([str(x.message) for x in w])
            if out.exists():
                return found, said
        raise AssertionError(said)

    @pytest.mark.parametrize("last", [LAST, "name: deep/third\n" + LAST])
    def test_it_is_what_one_machine_makes(self, tmp_path, folders, last):
        path, out = several(tmp_path, folders, FIRST, SECOND, last), tmp_path/"out"
        self.on(path, out, Run("serial"))
        whole, weights = told(out), digest_of(out)
        shutil.rmtree(out)
        before = {*os.listdir(tmp_path)}
        found, said = self.rounds(path, out)
        assert [any("run all parts again" in x for x in one) for one in said] == [True, True, False]
        assert told(out) == whole and digest_of(out) == weights
        assert found.tensors["embed.weight"].shape == load(found.out)["embed.weight"].shape
        assert {*os.listdir(tmp_path)} == before | {"out"}
        again = self.on(path, out, Run("serial", join=True, resume=True))
        assert again.out == found.out and told(out) == whole

    def test_from_the_command_line(self, tmp_path, folders):
        path = several(tmp_path, folders, FIRST, LAST.replace("second", "$c"))
        words = "run", path, "-o", "out", "--shard-size", "200"
        code, _, err = cli(*words, "--join", cwd=tmp_path)
        assert code == 1 and "there are no parts of it" in err, err
        for _ in range(2):
            for how in (["--part", "2/2"], ["--part", "1/2"], ["--join", "--report"]):
                code, out, err = cli(*words, *how, cwd=tmp_path)
                assert code == 0, err
        assert (tmp_path/"out"/"report.html").exists() and "out: 3 models merged" in out
        assert cli("run", path, "-o", "one", cwd=tmp_path)[0] == 0
        one, two = load(tmp_path/"one"), load(tmp_path/"out")
        assert {*one} == {*two} and all(torch.equal(one[n], two[n]) for n in one)

    @pytest.mark.parametrize("last", [LAST, "name: last\n" + LAST], ids=["one", "all"])
    def test_places_are_told_as_they_were_typed(self, tmp_path, folders, last):
        path, out = several(tmp_path, folders, FIRST, last.replace("second", "$c")), []
        words = "run", path, "-o", "out", "--json"
        for how in [["--part", "1/1"], ["--part", "1/1"], ["--join"]]*2:
            code, said, err = cli(*words, *how, cwd=tmp_path)
            assert code == 0, err
            out.append(json.loads(said)["output"])
            if (tmp_path/"out").exists():
                break
        assert all(place.startswith("out.steps/") for place in out[:-1]), out
        assert out[-1] == ("out/last" if "name" in last else "out")

    def test_what_cannot_be_divided_is_made_by_the_one_that_joins(self, tmp_path, folders):
        a, b = (adapter(tmp_path/n, seed) for seed, n in enumerate("xy"))
        one = f"name: lora\nmodels: [{a}, {b}]\ngeometry: lora\n"
        two = f"name: two\nmodels: [lora, {a}]\ngeometry: lora\n"
        path = written(tmp_path, "---\n".join([one, two, filled(FIRST, folders)]))
        self.on(path, tmp_path/"one", Run("serial"))
        self.rounds(path, tmp_path/"out")
        for name in ("lora", "two", "first"):
            one, two = load(tmp_path/"one"/name), load(tmp_path/"out"/name)
            assert {*one} == {*two} and all(torch.equal(one[n], two[n]) for n in one)

    def test_recipes_that_have_changed_meanwhile(self, tmp_path, folders):
        "The remedy is run: what was joined before is removed."
        path, out = several(tmp_path, folders, FIRST, LAST.replace("second", "$c")), tmp_path/"out"
        for run in (Run(part=Share(1, 1)), Run(join=True)):
            with pytest.warns(UserWarning, match="reads first: when that is joined"):
                self.on(path, out, run)
        path.write_text(path.read_text().replace("0.3}", "0.4}", 1))
        with pytest.raises(MergeError, match="is of other models, or of other recipes") as e:
            self.on(path, out, Run(part=Share(1, 1)))
        shutil.rmtree(str(e.value).partition(": is of")[0].split(": ")[-1])
        self.rounds(path, out, 1)

    def test_a_mixture_alone_is_not_divided(self, tmp_path, folders):
        text = "base_model: $base\ngate_mode: random\n"
        text += "experts: [{source_model: $a}, {source_model: $b}]\n"
        asked = read_recipe(written(tmp_path, filled(text, folders)))
        for run in (Run(part=Share(1, 2)), Run(join=True)):
            with pytest.raises(MergeError, match="this is a mixture: run it without"):
                run_recipe(asked, asked.output.into(tmp_path/"out"), run)


class TestDryRun:
    "Each recipe is planned, also of what is not there yet, and nothing is written."

    @pytest.mark.parametrize("last", [LAST, "name: deep/third\n" + LAST])
    def test_every_recipe_is_planned_as_it_will_be_run(self, tmp_path, folders, last):
        path = several(tmp_path, folders, FIRST, SECOND, last)
        before = sorted(os.listdir(tmp_path))
        code, out, err = cli("run", path, tmp_path/"out", "--dry-run", "--json", cwd=tmp_path)
        assert code == 0 and not err and sorted(os.listdir(tmp_path)) == before, err
        found = json.loads(out)["recipes"]
        name = "" if last == LAST else "deep/third"
        assert [x["name"] for x in found] == ["first", "second", name]
        assert [x["reads"] for x in found] == [[], ["first"], ["first", "second"]]
        assert found[2]["plan"]["recipe"]["models"] == ["first", "second"]
        assert found[0]["plan"]["seconds"] is not None and found[2]["plan"]["seconds"] is None
        # as one who has made them plans them
        by_hand(folders, tmp_path)
        two = several(tmp_path, folders, *[
            x.replace("first", str(tmp_path/"1")).replace("second", str(tmp_path/"2")) for x in (
                SECOND.partition("\n")[2],)])
        alone = json.loads(cli("run", two, "--dry-run", "--json", cwd=tmp_path)[1])
        for key in ("lines", "bytes_read", "bytes_written", "bytes_in_memory"):
            assert found[1]["plan"][key] == alone[key]

    def test_it_is_told_in_short(self, tmp_path, folders):
        path = several(tmp_path, folders, FIRST, SECOND, LAST)
        code, out, err = cli("run", path, "--dry-run", cwd=tmp_path)
        assert code == 0 and "the output (reads first, second):" in out, err
        assert out.splitlines()[-1].startswith("3 merges: ") and "480 B stays" in out

    def test_what_does_not_fit_is_found_before_the_first_merge(self, tmp_path, folders):
        odd = save(tmp_path/"odd", deep(3) | {"more": torch.ones(2)})
        last = LAST.replace("second", str(odd))
        path = several(tmp_path, folders, FIRST, SECOND, last)
        code, out, err = cli("run", path, tmp_path/"out", "--dry-run", cwd=tmp_path)
        assert code == 1 and "'more'" in err and "line 10: " in err and not out, err
        code, _, err = cli("run", path, folders["a"], "--dry-run", cwd=tmp_path)
        assert code == 1 and "exists already" in err

    def test_a_mixture_and_what_reads_it_are_not_known(self, tmp_path, folders):
        mixture = """name: moe
base_model: $base
gate_mode: random
experts: [{source_model: $a}, {source_model: $b}]
"""
        path = several(tmp_path, folders, FIRST, mixture, "models: [moe, first]\n")
        code, out, err = cli("run", path, "--dry-run", "--json", cwd=tmp_path)
        found = json.loads(out)["recipes"]
        assert code == 0 and [x["plan"] is None for x in found] == [False, True, True]
        assert "mixture" in found[1]["why"] and "reads moe, which" in found[2]["why"]
        code, out, err = cli("run", path, "--dry-run", cwd=tmp_path)
        assert code == 0 and "not known: it is a mixture" in out and "3 merges" not in out

    def test_adapters_and_dtypes_and_vocabularies(self, tmp_path):
        "What a step writes is what it was foreseen to write: shapes and dtypes of every tensor."
        a, b = (adapter(tmp_path/n, seed) for seed, n in enumerate("ab"))
        first = f"name: first\nmodels: [{a}, {b}]\ngeometry: lora\ndtype: bf16\n"
        path = written(tmp_path, f"{first}---\nmodels: [first, {a}]\ngeometry: lora\n")
        code, out, err = cli("run", path, tmp_path/"out", "--dry-run", "--json", cwd=tmp_path)
        assert code == 0, err
        plan = json.loads(out)["recipes"][1]["plan"]
        code, _, err = cli("run", path, tmp_path/"out", cwd=tmp_path)
        assert code == 0, err
        assert plan["bytes_written"] == sum(x.nbytes for x in load(tmp_path/"out").values())

    def test_numbers_that_count_are_not_known(self, tmp_path):
        "kohya's alphas are tensors, and a LoRA means nothing without them."
        a, b = (flux_file(tmp_path/f"{i}.safetensors", i) for i in range(2))
        first = f"name: first\nmodels: [{a}, {b}]\ngeometry: lora\n"
        path = written(tmp_path, f"{first}---\nmodels: [first, {b}]\ngeometry: lora\n")
        code, out, err = cli("run", path, "--dry-run", cwd=tmp_path)
        assert code == 0 and "not known: the numbers of first count" in out, (out, err)


class TestResumed:
    """A file that was stopped goes on with the step that it was stopped in, and writes what it
    would have."""

    @pytest.fixture
    def made(self, monkeypatch):
        "How many means were computed so far; the one that is `kill`ed stops the run."
        count = SimpleNamespace(n=0, kill=None)
        real = MeanOf.run

        def run(job, write):
            if count.n == count.kill:
                raise KeyboardInterrupt
            count.n += 1
            return real(job, write)

        monkeypatch.setattr(MeanOf, "run", run)
        return count

    def run(self, path, out, resume=True):
        asked = read_recipe(path)
        return run_recipe(asked, asked.output.into(out), Run("serial", resume=resume))

    @pytest.mark.parametrize("last", [LAST, "name: deep/third\n" + LAST])
    @pytest.mark.parametrize("kill", [3, 8, 17])
    def test_what_is_whole_is_not_made_again(self, tmp_path, folders, made, last, kill):
        path, out = several(tmp_path, folders, FIRST, SECOND, last), tmp_path/"out"
        self.run(path, out, resume=False)
        whole, want = told(out), made.n
        shutil.rmtree(out)
        made.n, made.kill = 0, kill
        with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning) as said:
            self.run(path, out)
        assert not out.exists()
        assert not any(".partial" in str(w.message) for w in said)
        made.kill = None
        found = self.run(path, out)
        assert made.n == want and told(out) == whole
        hand = by_hand(folders, tmp_path).tensors
        assert all(torch.equal(x, hand[n]) for n, x in found.tensors.items())
        assert {p.name for p in tmp_path.iterdir() if "partial" in p.name} == set()

    @pytest.mark.filterwarnings("ignore:.*what is done is kept")
    def test_who_mends_the_last_recipe_pays_for_that_alone(self, tmp_path, folders, made):
        wrong = LAST.replace("second", str(save(tmp_path/"odd", deep(3) | {"x": torch.ones(2)})))
        path, out = several(tmp_path, folders, FIRST, SECOND, wrong), tmp_path/"out"
        with pytest.raises(MergeError, match="'x'"):
            self.run(path, out)
        spent = made.n
        assert not out.exists() and spent
        found = self.run(several(tmp_path, folders, FIRST, SECOND, LAST), out)
        hand = by_hand(folders, tmp_path).tensors
        assert all(torch.equal(x, hand[n]) for n, x in found.tensors.items())
        made.n = 0
        self.run(path, tmp_path/"other")
        assert made.n > spent

    @pytest.mark.filterwarnings("ignore:.*what is done is kept")
    def test_what_reads_a_changed_model_is_made_again(self, tmp_path, folders, made):
        path, out = several(tmp_path, folders, FIRST, SECOND, LAST), tmp_path/"out"
        made.kill = 17
        with pytest.raises(KeyboardInterrupt):
            self.run(path, out)
        made.kill = None
        save(folders["a"], {k: x + 1 for k, x in load(folders["a"]).items()},
             {"model_type": "toy", "n_layer": 3})
        with pytest.warns(UserWarning, match="first: is made again"):
            found = self.run(path, out)
        hand = by_hand(folders, tmp_path).tensors
        assert all(torch.equal(x, hand[n]) for n, x in found.tensors.items())

    def test_a_revision_that_has_moved_is_another_model(self, tmp_path):
        hub, env = tmp_path/"hub", {**os.environ, "HF_HUB_CACHE": str(tmp_path/"hub")}
        repo = hub/"models--org--toy"
        (repo/"refs").mkdir(parents=True)
        for i, (ref, commit) in enumerate({"main": "a", "dev": "b", "dev2": "c"}.items()):
            state = {"w": torch.full((2, 2), float(i))}
            save(repo/"snapshots"/(commit*40), state, {"model_type": "toy"})
            (repo/"refs"/ref).write_text(commit*40)
        path = written(tmp_path, "name: one\nmodels: [{model: org/toy, revision: dev}, org/toy]\n"
                       "---\nname: two\nmodels: [one, org/toy]\n")
        words = ("run", path, "-o", tmp_path/"out", "--resume")
        for _ in range(2):
            assert cli(*words, env=env)[0] == 0
        assert load(tmp_path/"out"/"one")["w"][0, 0] == 0.5
        (repo/"refs"/"dev").write_text("c"*40)
        code, _, err = cli(*words, env=env)
        assert code == 1 and "out: exists already" in err

    @pytest.mark.filterwarnings("ignore:.*what is done is kept")
    def test_what_lies_beside_a_template_is_of_no_recipe(self, tmp_path, folders, made):
        (tmp_path/"chat.jinja").write_text("{{ bos_token }}")
        first = FIRST + f"chat_template: {tmp_path/'chat.jinja'}\n"
        path, out = several(tmp_path, folders, first, SECOND, LAST), tmp_path/"out"
        made.kill = 17
        with pytest.raises(KeyboardInterrupt):
            self.run(path, out)
        made.kill, spent = None, made.n
        (tmp_path/"log.txt").write_text("said meanwhile")
        self.run(path, out)
        assert made.n - spent < 6
        (tmp_path/"chat.jinja").write_text("{{ eos_token }}")
        with pytest.raises(MergeError, match="out: exists already"):
            self.run(path, out)

    @pytest.mark.parametrize("last", [LAST, "name: deep/third\n" + LAST])
    def test_what_is_finished_is_left_as_it_is(self, tmp_path, folders, made, last):
        path, out = several(tmp_path, folders, FIRST, SECOND, last), tmp_path/"out"
        self.run(path, out)
        before, made.n = told(out), 0
        again = self.run(path, out)
        assert made.n == 0 and told(out) == before
        assert torch.equal(again.tensors["embed.weight"], load(again.out)["embed.weight"])
        with pytest.raises(MergeError, match="exists already"):
            self.run(path, out, resume=False)
        text = path.read_text().replace("0.3}", "0.4}")
        path.write_text(text)
        with pytest.raises(MergeError, match="exists already"):
            self.run(path, out)

    def test_without_resume_an_error_leaves_nothing(self, tmp_path, folders, made):
        path, out = several(tmp_path, folders, FIRST, SECOND, LAST), tmp_path/"out"
        before, made.kill = sorted(os.listdir(tmp_path)), 17
        with pytest.raises(KeyboardInterrupt):
            self.run(path, out, resume=False)
        assert sorted(os.listdir(tmp_path)) == before

    def test_a_full_disk_keeps_nothing(self, tmp_path, folders, monkeypatch):
        path, out = several(tmp_path, folders, FIRST, SECOND, LAST), tmp_path/"out"
        before, real = sorted(os.listdir(tmp_path)), os.posix_fallocate

        def fallocate(fd, start, size):
            if "second" in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, start, size)

        monkeypatch.setattr(os, "posix_fallocate", fallocate)
        with pytest.raises(MergeError, match="second: No space left.*\n.*nothing was left behind"):
            self.run(path, out)
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("last, called", [(LAST, "first"), ("name: x\n" + LAST, "$out/first")])
def test_errors_name_the_step_and_its_recipe(tmp_path, folders, last, called):
    odd = save(tmp_path/"odd", deep(3) | {"more": torch.ones(2)})
    path = several(tmp_path, folders, FIRST, SECOND.replace("$c", str(odd)), last)
    code, _, err = cli("run", path, tmp_path/"out", cwd=tmp_path)
    called = called.replace("$out", str(tmp_path/"out"))
    assert code == 1 and f"{path}, line 5, second: " in err and "'more'" in err, err
    assert ".partial" not in err and "steps" not in err
    torn = save(tmp_path/"torn", {k: x[:2] for k, x in deep(3).items()})
    second = f"name: second\nmodels: [first, {torn}]\n"
    path = several(tmp_path, folders, FIRST, second, last)
    code, _, err = cli("run", path, tmp_path/"out", cwd=tmp_path)
    assert code == 1 and f", in {called} it is" in err, err
    assert ".partial" not in err and "steps" not in err


def test_a_folder_here_of_the_name_of_a_step_is_not_read(tmp_path, folders):
    save(tmp_path/"first", deep(77), {"model_type": "toy", "n_layer": 3})
    path = several(tmp_path, folders, FIRST, SECOND, LAST)
    assert cli("run", path, tmp_path/"out", cwd=tmp_path)[0] == 0
    hand = by_hand(folders, tmp_path)
    assert all(torch.equal(load(tmp_path/"out")[n], x) for n, x in hand.tensors.items())


def test_a_step_that_fails_leaves_nothing(tmp_path, folders):
    save(tmp_path/"odd", deep(3) | {"more": torch.ones(2)}, {"model_type": "toy", "n_layer": 3})
    path = several(tmp_path, folders, FIRST, SECOND.replace("$c", str(tmp_path/"odd")), LAST)
    before = sorted(os.listdir(tmp_path))
    code, _, err = cli("run", path, tmp_path/"out", cwd=tmp_path)
    assert code == 1 and "'more'" in err and len(err.splitlines()) <= 3
    assert sorted(os.listdir(tmp_path)) == before
    assert cli("run", path, folders["a"], cwd=tmp_path)[0] == 1


def test_names_are_those_of_models_alone():
    said = {
        "merge_method": "linear", "tokenizer_source": "union", "tokenizer": {"source": "linear"},
        "slices": [{"sources": [{"model": "linear+lora", "layer_range": [0, 1]}]}],
        "base_model": "org/linear",
    }
    found = moved(said, {"linear": "/here", "union": "/there"})
    assert found["merge_method"] == "linear" and found["tokenizer_source"] == "union"
    assert found["tokenizer"] == {"source": "/here"} and found["base_model"] == "org/linear"
    assert found["slices"][0]["sources"][0]["model"] == "/here+lora"
    for address in ("s3://bucket/x", "simplecache::s3://s3/x"):
        assert moved(address, {"s3": "/here", "x": "/there"}, "model") == address
    assert moved("s3+s3://b/x|s3[0:2]", {"s3": "/h"}, "model") == "/h+s3://b/x|/h[0:2]"
    assert moved("linear[0:2]|b[2:3]", {"linear": "/here"}, "base") == "/here[0:2]|b[2:3]"


def test_one_page_is_one_recipe():
    assert read_page("a: 1\n---\n").data == {"a": 1}
    with pytest.raises(MergeError, match="line 3: here a second recipe begins"):
        read_page("a: 1\n---\nb: 2")
    pages = read_pages("name: x\nmodels: [a]\n---\n---\nmodels: [x]")
    assert [step.name for step in steps_of(pages)] == ["x", ""]


def test_no_recipe_is_no_file_of_several(tmp_path):
    with pytest.raises(MergeError, match="is no recipe"):
        read_recipe(written(tmp_path, "---\n---\n"))

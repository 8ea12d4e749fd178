"""What `--json` prints is one document, and says of each command what its files say."""

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, cli, save, tensors
from fastcore.docments import docments
from hub import TOKEN, running
from safetensors import safe_open
from safetensors.torch import save_file
from test_cli_help import place  # noqa: F401
from typer.main import get_command
from typer.testing import CliRunner

from frechet_merge.cli.commands import app
from frechet_merge.cli.helped import App
from frechet_merge.cli.outcomes import Merging, Outcome, document, keys_of, kinds_of, meaning_of
from inspect import unwrap

COMMANDS = get_command(app).commands
KINDS = {name: kinds_of(unwrap(command.callback)) for name, command in COMMANDS.items()}


def no_constant(word):
    raise AssertionError(f"{word} is no JSON")


def parsed(out):
    "A standard output that holds one document, and nothing else."
    assert out.endswith("}\n") and out.count("\n") == 1, out
    return json.loads(out, parse_constant=no_constant)


@pytest.fixture
def run(place, tmp_path, monkeypatch, capfd):  # noqa: F811
    "A command beside the models of the examples: the document that it prints."
    for f in place.iterdir():
        (tmp_path/f.name).symlink_to(f)
    monkeypatch.chdir(tmp_path)

    def said(*words, code=0):
        capfd.readouterr()
        found = app([*map(str, words), "--json"], standalone_mode=False)
        out, err = capfd.readouterr()
        assert (found or 0) == code, err
        data = parsed(out)
        is_dry = "--dry-run" in words
        kinds = [k for k in KINDS[words[0]] if ("Planned" in k.__name__) == is_dry]
        if is_dry:
            kinds = [k for k in kinds if (k.__name__ == "PlannedSteps") == ("recipes" in data)]
        assert data.keys() == {key for kind in kinds for key in keys_of(kind)} | {"warnings"}
        return data

    return said


def stored(*files):
    "Tensors, numbers and bytes in files, as safetensors reads them."
    count, numbers, size = 0, 0, 0
    for file in files:
        with safe_open(file, "pt") as f:
            every = [f.get_tensor(name) for name in f.keys()]
        count += len(every)
        numbers += sum(x.numel() for x in every)
        size += sum(x.nbytes for x in every)
    return count, numbers, size


def written(data):
    "What a document says of what was written."
    return data["tensors_written"], data["parameters_written"], data["bytes_written"]


def weights(folder):
    "The only file of weights in a folder."
    (file,) = Path(folder).glob("*.safetensors")
    return file


class TestAllCommands:
    @pytest.mark.parametrize("name", sorted(COMMANDS))
    def test_each_has_the_option_and_says_what_it_prints(self, name):
        (option,) = [p for p in COMMANDS[name].params if "--json" in p.opts]
        assert option.help.startswith("Print one JSON document: ") and len(option.help) > 40
        help = CliRunner().invoke(app, [name, "--help"]).output
        assert "--json" in help

    def test_a_new_one_cannot_lack_it(self):
        new = App()

        def silent():
            print("done")

        def of_text() -> Iterator[str]:
            yield "done"

        for command in (silent, of_text):
            with pytest.raises(TypeError, match="has to say what it yields"):
                new.command("new")(command)

    def test_each_is_run_here(self):
        text = Path(__file__).read_text()
        assert all(f'run("{name}"' in text for name in COMMANDS)

    def test_a_key_means_the_same_everywhere(self):
        said = {}
        for kinds in KINDS.values():
            for kind in kinds:
                for key, owner in keys_of(kind).items():
                    at_field = meaning_of(owner, key) or docments(owner).get(key)
                    what = at_field or getattr(owner, key).__doc__
                    said.setdefault(key, {})[what] = owner
        several = {key for key, texts in said.items() if len(texts) > 1}
        # that of a suggestion is a file for `run`
        assert several == {"recipe"}
        assert all(key.isidentifier() and key == key.lower() for key in said)


class TestMerges:
    def test_merge(self, run):
        data = run("merge", "math", "code", "-o", "out", "--weights", "1,3", "--report")
        assert data["output"] == "out" and written(data) == stored(weights("out"))
        assert 0 < data["seconds"] < 60 and data["models"] == ["math", "code"]
        record = json.loads(Path("out/frechet_merge.json").read_text())
        for key in ("recipe", "coefficients", "calibrated", "aligned", "made", "doubtful"):
            assert data[key] == record[key]
        assert data["coefficients"][0]["weights"] == [0.25, 0.75]
        assert Path(data["page"]).read_text().lstrip().startswith("<!DOCTYPE html>")
        assert data["pushed"] is None and data["beside"] == [] and data["warnings"] == []

    def test_what_is_planned_is_what_is_written(self, run):
        words = "merge", "math", "code", "-o", "out", "--dtype", "bf16"
        plan = run(*words, "--dry-run")
        assert plan["output"] == "out" and not Path("out").exists()
        data = run(*words)
        assert plan["bytes_written"] == data["bytes_written"] == stored(weights("out"))[2]
        assert plan["recipe"] == data["recipe"]
        assert sum(line["tensors"] for line in plan["lines"]) == data["tensors_written"]

    def test_shards_and_codes(self, run):
        data = run("merge", "math", "code", "-o", "out", "--shard-size", "9KB")
        files = [*Path("out").glob("*.safetensors")]
        assert len(files) > 1 and written(data) == stored(*files)
        big = {"model.layers.0.mlp.up_proj.weight": torch.randn(128, 256)}
        for name in "ab":
            save(name, big, {"model_type": "llama", "hidden_size": 256})
        words = "merge", "a", "b", "-o", "coded", "--dtype", "fp8"
        plan, data = run(*words, "--dry-run"), run(*words)
        # a byte each, and two scales
        assert data["bytes_written"] == 128*256 + 2*4 == stored(weights("coded"))[2]
        assert plan["bytes_written"] == data["bytes_written"]
        assert data["parameters_written"] == 128*256

    def test_a_folder_of_models(self, run):
        for i, name in enumerate("ab"):
            save(f"{name}/unet", tensors(i), {"_class_name": "UNet2DConditionModel"})
            save(f"{name}/text_encoder", tensors(i + 2), {"model_type": "clip_text_model"})
            parts = {"unet": ["diffusers", "UNet2DConditionModel"]}
            parts |= {"text_encoder": ["transformers", "CLIPTextModel"]}
            index = {"_class_name": "StableDiffusionPipeline", **parts}
            Path(name, "model_index.json").write_text(json.dumps(index))
        data = run("merge", "a", "b", "-o", "out")
        files = [*Path("out").rglob("*.safetensors")]
        assert len(files) == 2 and written(data) == stored(*files)

    def test_run(self, run):
        data = run("run", "recipe.yaml", "-o", "out")
        assert data["output"] == "out" and written(data) == stored(weights("out"))
        assert data["recipe"]["scale"] == 0.5 and data["recipe"]["base"] == "base"
        plan = run("run", "recipe.yaml", "-o", "again", "--dry-run")
        assert plan["recipe"] == data["recipe"] and plan["output"] == "again"

    def test_several_recipes(self, run):
        one = {"name": "one", "models": ["math", "code"]}
        two = {"name": "two", "models": ["one", "base"], "weights": [1, 1]}
        Path("several.yaml").write_text(yaml.safe_dump_all([one, two]))
        plan = run("run", "several.yaml", "-o", "out", "--dry-run")
        assert [x["name"] for x in plan["recipes"]] == ["one", "two"]
        data = run("run", "several.yaml", "-o", "out")
        (beside,) = data["beside"]
        for said, name in ((data, "two"), (beside, "one")):
            assert Path(said["output"]) == Path("out", name)
            assert written(said) == stored(weights(f"out/{name}"))
        assert [x["plan"]["bytes_written"] for x in plan["recipes"]] == [
            beside["bytes_written"], data["bytes_written"]
        ]

    def test_parts(self, run):
        words = "merge", "math", "code", "-o", "out", "--shard-size", "9KB"
        shares = [run(*words, "--part", f"{i}/2") for i in (1, 2)]
        whole = run(*words, "--join")
        assert whole["bytes_written"] == sum(share["bytes_written"] for share in shares)
        files = [*Path(shares[0]["output"]).rglob("*.safetensors")]
        assert files == [] and Path(whole["output"]) == Path("out")

    def test_mixture_and_experts(self, run):
        data = run("mixture", "math", "code", "base", "--gate", "random", "-o", "mixed")
        config = json.loads(Path("mixed/config.json").read_text())
        assert written(data) == stored(weights("mixed"))
        assert data["made"]["experts"] == config["num_local_experts"] == len(data["models"])
        assert data["made"]["per_token"] == config["num_experts_per_tok"]
        data = run("experts", "mixed", "--keep", "2", "-o", "fewer")
        config = json.loads(Path("fewer/config.json").read_text())
        assert written(data) == stored(weights("fewer")) and data["models"] == ["mixed"]
        assert data["made"]["keep"] == config["num_local_experts"] == 2
        assert len(data["made"]["layers"]) == config["num_hidden_layers"]

    def test_a_push(self, tmp_path):
        for i in range(2):
            save(tmp_path/f"m{i}", tensors(i), {"model_type": "toy", "vocab_size": 11})
        words = "merge", "m0", "m1", "-o", "out", "--push", "merged", "--yes", "--json"
        with running() as hub:
            env = hub.env(tmp_path/"home", TOKEN)
            code, out, err = cli(*words, cwd=tmp_path, env=env)
            assert code == 0 and parsed(out)["pushed"] == "me/merged", err
            assert "me/merged" in hub.repos


class TestAlignments:
    def test_align(self, run):
        data = run("align", "math", "code", "-o", "aligned")
        assert data["outputs"] == ["aligned/math", "aligned/code"]
        assert written(data) == stored(*map(weights, data["outputs"]))
        assert data["variances"] == sorted(data["variances"], reverse=True)
        assert data["rests"] is True and data["groups"] > 0

    def test_the_variance_is_that_of_what_moves(self, run):
        "Of a model and itself: nothing."
        data = run("align", "math", "math", "-o", "aligned")
        assert data["variances"] == [0.0, 0.0] and data["outputs"] == ["aligned/0", "aligned/1"]


def layers_of(folder):
    "The rank of each layer of an adapter in PEFT's dialect."
    with safe_open(weights(folder), "pt") as f:
        ends = {n: f.get_slice(n).get_shape()[0] for n in f.keys() if ".lora_A." in n}
    return {n.removeprefix("base_model.model.").partition(".lora_A")[0]: r for n, r in ends.items()}


class TestAdapters:
    def test_convert(self, run):
        data = run("convert", "math-lora", "--to", "mlx", "-o", "mlx")
        assert written(data) == stored(weights("mlx")) and data["dialect"] == "mlx"

    def test_convert_into_a_file(self, run):
        pytest.importorskip("diffusers")
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        pair = {"lora_down.weight": torch.randn(4, 8), "lora_up.weight": torch.randn(8, 4)}
        pair["alpha"] = torch.tensor(4.0)
        save_file({f"{name}.{end}": x for end, x in pair.items()}, "of_kohya.safetensors")
        data = run("convert", "of_kohya.safetensors", "--to", "diffusers", "-o", "one.safetensors")
        assert data["output"] == "one.safetensors" and data["dialect"] == "diffusers"
        assert written(data) == stored("one.safetensors")

    def test_extract(self, run):
        data = run("extract", "math", "--base", "base", "--energy", "0.5", "-o", "out")
        assert written(data) == stored(weights("out"))
        assert {n: kept["rank"] for n, kept in data["kept"].items()} == layers_of("out")
        known = json.loads(Path("out/extracted.json").read_text())
        assert all(data[key] == known[key] for key in ("kept", "whole", "left"))
        lost = sum((k["error"]*k["norm"])**2 for k in data["kept"].values())
        total = sum(k["norm"]**2 for k in data["kept"].values())
        assert data["energy"] == pytest.approx(1 - lost/total)
        (warning,) = data["warnings"]
        assert "tensors changed and are no part of the adapter" in warning

    def test_resize(self, run):
        data = run("resize", "math-lora", "--rank", "2", "-o", "out")
        assert written(data) == stored(weights("out")) and data["models"] == ["math-lora"]
        assert {n: kept["rank"] for n, kept in data["kept"].items()} == layers_of("out")
        assert {*layers_of("out").values()} == {2} and 0 < data["energy"] < 1


class TestOfModels:
    def test_inspect_and_report(self, run):
        data = run("inspect", "math", "code", "--base", "base")
        assert data["mergeable"] is True and data["sources"] == ["base", "math", "code"]
        assert data["collapse"] is None and data["picture"] is None
        Path("seen.json").write_text(json.dumps(data))
        page = run("report", "merged", "--seen", "seen.json")
        assert page["output"] == "merged/report.html"
        assert Path(page["output"]).read_text().lstrip().startswith("<!DOCTYPE html>")
        Path(page["output"]).unlink()

    def test_inspect_of_what_cannot_be_merged(self, run):
        odd = tensors(0) | {"q.bias": torch.full((8,), torch.nan)}
        for name, state in (("a", tensors(1)), ("b", odd)):
            save(name, state, {"model_type": "toy", "vocab_size": 11})
        data = run("inspect", "a", "b", code=1)
        assert data["mergeable"] is False and data["nonfinite"] == {"q.bias": [0, 8]}

    def test_inspect_with_texts_and_a_picture(self, run):
        words = "--data", "texts.jsonl", "--max-samples", "4", "--plot", "kept.png"
        data = run("inspect", "math", "code", *words)
        assert {row["merge"] for row in data["collapse"]} == {"euclidean"}
        assert data["picture"] == "kept.png"
        assert Path("kept.png").read_bytes().startswith(b"\x89PNG")

    def test_curvature(self, run):
        data = run("curvature", "math", "texts.jsonl", "-o", "math.st", "--max-samples", "8")
        assert data["output"] == "math.st" and data["models"] == ["math"]
        with safe_open("math.st", "pt") as f:
            said = f.metadata()
        names = "samples", "tokens", "form", "estimator", "error"
        facts = {name: json.loads(said[name]) for name in names}
        assert data["samples_seen"] == facts["samples"] == 8
        assert data["tokens_seen"] == facts["tokens"] == 8*5
        assert data["form"] == facts["form"] and data["estimator"] == facts["estimator"]
        assert data["error"] == facts["error"] and data["bytes_written"] == stored("math.st")[2]

    def test_an_error_that_is_not_known_is_null(self, run):
        data = run("curvature", "math", "texts.jsonl", "-o", "math.st", "--max-samples", "1")
        assert {*data["error"].values()} == {None}

    def test_basis(self, run):
        data = run("basis", "math", "code", "--base", "base", "-k", "4", "-o", "basis.st")
        with safe_open("basis.st", "pt") as f:
            shapes = {n: f.get_slice(n).get_shape() for n in f.keys()}
        assert data["matrices"] == len({n.rpartition(".")[0] for n in shapes})
        assert data["directions"] == max(shape[-1] for shape in shapes.values())
        assert written(data) == stored("basis.st")

    def test_tune(self, run):
        data = run("tune", "math", "code", "--base", "base", "--data", "texts.jsonl", "-o", "out")
        best = data["settings"][0]
        assert written(data) == stored(weights("out")) and data["output"] == "out"
        tried = {x["at"]: x["distance"] for x in best["tried"]}
        assert min(tried.values()) == best["distance"] == tried[best["scale"]]
        assert best["distance"] == pytest.approx(sum(best["distances"])/2)
        record = json.loads(Path("out/frechet_merge.json").read_text())
        assert record["recipe"]["scale"] == best["scale"]

    def test_tune_that_only_looks(self, run):
        data = run("tune", "math", "code", "--base", "base", "--data", "texts.jsonl")
        assert data["output"] is None and written(data) == (0, 0, 0)

    def test_suggest(self, run):
        words = "--data", "texts.jsonl", "-o", "suggested.yaml"
        data = run("suggest", "math", "code", "--base", "base", *words)
        assert data["output"] == "suggested.yaml" and data["abstains"] == ""
        assert data["recipe"] == yaml.safe_load(Path("suggested.yaml").read_text())
        assert data["tuned"][0]["distance"] < 1
        assert run("run", "suggested.yaml", "-o", "out")["bytes_written"] > 0

    def test_suggest_that_abstains(self, run):
        save("one", tensors(0), {"model_type": "toy", "vocab_size": 11})
        save("two", tensors(1), {"model_type": "toy", "vocab_size": 11})
        data = run("suggest", "one", "two", "-o", "no.yaml", code=1)
        assert data["recipe"] is None and data["abstains"] and data["output"] is None
        assert not Path("no.yaml").exists()


def test_demo(run, monkeypatch):
    "Whose numbers are made up here: the real ones take a minute."
    base = {"a": 0.5, "b": 0.7}
    made_up = {"base": base, "experts": {"a": 0.9, "b": 0.9}, "mean": {"a": 0.75, "b": 0.75}}
    monkeypatch.setattr("frechet_merge.cli.demo.demo", lambda say, texts: made_up)
    data = run("demo", "-o", "picture.png")
    assert data["accuracy"] == made_up and data["best"] == "mean"
    assert data["average"] == pytest.approx({"base": 0.6, "experts": 0.9, "mean": 0.75})
    assert Path(data["output"]).read_bytes().startswith(b"\x89PNG")


@dataclass(frozen=True)
class Number(Outcome):
    "A number."

    number: float

    def report(self):
        return [str(self.number)]


class TestTheDocument:
    def test_nothing_else_is_on_standard_output(self, capfd, monkeypatch):
        stdout = open(1, "w", closefd=False)
        monkeypatch.setattr(sys, "stdout", stdout)

        def loud():
            print("a library")
            stdout.write("that kept the stream\n")
            os.write(1, b"in C\n")
            subprocess.run(["echo", "another process"], check=True)
            yield Number(1.5)

        found = document(loud())
        print(found, flush=True)
        out, err = capfd.readouterr()
        assert out == f"{({'number': 1.5, 'warnings': []}, 0)}\n"
        for word in ("a library", "kept the stream", "in C", "another process"):
            assert word in err

    def test_what_is_no_number_is_null(self):
        def three():
            yield Number(math.nan)
            yield Number(-math.inf)

        assert document(three())[0]["number"] is None

    def test_warnings_are_those_that_were_shown(self):
        def warned():
            warnings.warn("seen", stacklevel=1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.warn("not seen", stacklevel=1)
            yield Number(1)

        shown = warnings.showwarning
        with pytest.warns(UserWarning):
            assert document(warned())[0]["warnings"] == ["seen"]
        assert warnings.showwarning is shown

    def test_an_error_prints_none(self):
        def broken():
            yield Number(1)
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            document(broken())

    def test_every_kind_is_plain(self):
        with pytest.raises(TypeError, match="Tensor"):
            document([Number(torch.ones(1))])


@pytest.fixture
def two(tmp_path):
    for i, name in enumerate("ab"):
        save(tmp_path/name, tensors(i), {"model_type": "toy", "vocab_size": 11})
    return tmp_path


class TestTheProgram:
    def test_warnings_and_exit_codes(self, two):
        code, out, err = cli("merge", "a", "-o", "out", "--json", cwd=two)
        said = [x.removeprefix("warning: ") for x in err.splitlines()]
        assert code == 0 and parsed(out)["warnings"] == said and "only model" in said[0]

    def test_errors_are_as_without(self, two):
        save(two/"odd", {"q.weight": torch.zeros(2, 2)}, {"model_type": "toy"})
        for words, code in (
            (("merge", "a", "odd", "-o", "out"), 1),
            (("merge", "a", "b", "-o", "out", "--geometry", "shpere"), 2),
            (("convert", "a", "--to", "mlx", "-o", "out"), 2),
            (("report", "a"), 1),
            (("resize", "a", "-o", "out"), 2),
        ):
            usual = cli(*words, cwd=two)
            as_json = cli(*words, "--json", cwd=two)
            assert usual[0] == as_json[0] == code and usual[2] == as_json[2]
            assert as_json[1] == "" and not (two/"out").exists()

    def test_names_that_no_encoding_has(self, two):
        odd = os.fsdecode(b"gr\xc3\xb6\xc3\x9fe \xff\"\\ \xf0\x9f\x98\x80")
        env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "frechet_merge", "merge", "a", "b", "--json", "-o", odd]
        r = subprocess.run(words, cwd=two, env=env, capture_output=True)
        assert r.returncode == 0, r.stderr
        output = parsed(r.stdout.decode("ascii"))["output"]
        assert os.fsencode(output) == os.fsencode(odd) and (two/output).is_dir()

    def test_home(self, two):
        env = {**os.environ, "HOME": str(two), "PYTHONPATH": str(ROOT)}
        _, out, err = cli("merge", "a", "b", "-o", "~/out", "--json", cwd=two, env=env)
        assert (two/"out").is_dir() and parsed(out)["output"] == str(two/"out"), err

    def test_an_address_without_its_password(self, two, monkeypatch):
        pytest.importorskip("fsspec")
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        words = "merge", "a", "b", "-o", f"file://me:secret@{two}/out", "--json"
        code, out, err = cli(*words, cwd=two, env=env)
        assert "secret" not in out + err


def test_merging_is_the_documentation_of_merge():
    assert KINDS["merge"][0] is Merging

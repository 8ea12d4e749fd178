"""From a folder and a file of examples to statistics, and from those to a merge, as users run
it."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, cli, save
from test_examples import ROWS, make, write

from frechet_merge import load, merge
from frechet_merge.messages import MergeError
from frechet_merge.curvature.collecting import STATE, Statistics
from frechet_merge.cli.demo import DATA, base_folder
from frechet_merge.huggingface.models import collect


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Tiny models and a file of examples."
    tmp = tmp_path_factory.mktemp("work")
    for kind in ("bert", "gpt2", "llama", "bert-encoder"):
        make(kind, tmp/kind)
    write(tmp/"a.jsonl")
    write(tmp/"unlabelled.jsonl", [{"text": r["sentence"]} for r in ROWS])
    g = torch.Generator().manual_seed(0)
    save(
        tmp/"head",
        {"x.weight": torch.randn(4, 16, generator=g), "x.bias": torch.randn(4, generator=g)},
    )
    return tmp


def run(*args):
    "The command in this process, since starting one takes longer than these models."
    from frechet_merge.cli.commands import app

    app([str(a) for a in args], standalone_mode=False)


def matrices(folder):
    return {n for n, x in load(folder).lazy.items() if len(x.shape) == 2}


@pytest.mark.parametrize(
    "kind, args",
    [
        ("bert", []),
        ("bert", ["--estimator", "true"]),
        ("bert", ["--estimator", "empirical"]),
        ("bert", ["--form", "diagonal"]),
        ("bert", ["--form", "inputs"]),
        ("gpt2", []),
        ("gpt2", ["--estimator", "empirical"]),
        ("llama", ["--form", "diagonal", "--estimator", "true"]),
        ("bert-encoder", []),
        ("bert-encoder", ["--head", "head/model.safetensors:x", "--estimator", "true"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x[1::2]).replace("/", "."),
)
@pytest.mark.filterwarnings("ignore:no metric for")
def test_statistics_of_every_kind(work, tmp_path, monkeypatch, capsys, kind, args):
    monkeypatch.chdir(work)
    capsys.readouterr()
    run("curvature", kind, "a.jsonl", "-o", tmp_path/"s.safetensors", *args)
    out, err = capsys.readouterr()
    assert err == ""
    says_what_was_done(out)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    held = load(tmp_path/"s.safetensors")
    about = Statistics.load(tmp_path/"s.safetensors").about
    assert about["samples"] == 40 and about["model"] == kind
    assert set(about["error"]) <= set(load(work/kind))
    stems = {n.removesuffix(".left").removesuffix(".right") for n in held}
    if "diagonal" in args:
        assert stems == set(load(work/kind))
    else:
        every = matrices(work/kind)
        assert stems <= every and len(stems) >= len(every) - 2
    assert all(held[n].isfinite().all() for n in held.lazy)


def says_what_was_done(out):
    first, second = out.strip().splitlines()
    assert all(what in first for what in ("40 samples", "tokens", "MB"))
    assert second.startswith("Relative standard error: ")
    assert "% in the worst (" in second and "160 samples" in second


@pytest.mark.filterwarnings("ignore:no metric for")
def test_what_comes_out_is_what_the_collector_says(work, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from frechet_merge.curvature.collecting import curvature
    from frechet_merge.huggingface.examples import batches, examples
    from frechet_merge.huggingface.models import open_model

    module = AutoModelForSequenceClassification.from_pretrained(work/"bert").eval()
    tokenizer = open_model(work/"bert").tokenizer
    fed = batches("classifier", tokenizer, examples(work/"a.jsonl"))
    names = ("input_ids", "attention_mask", "token_type_ids")
    direct = curvature(
        module, fed, forward=lambda model, b: model(**{n: b.get(n) for n in names}).logits
    )
    ours = collect(work/"bert", work/"a.jsonl", tmp_path/"s.safetensors")
    assert ours.keys() == direct.keys()
    for n in ours:
        torch.testing.assert_close(ours[n], direct[n])
    assert Statistics.load(tmp_path/"s.safetensors").about == ours.about


@pytest.mark.filterwarnings("ignore:no metric for")
def test_names_follow_the_file(work, tmp_path):
    "GPT-2's published file has no prefix; an encoder inside a classifier has one."
    bare = make("gpt2-without-prefix", tmp_path/"g")
    collect(bare, work/"a.jsonl", tmp_path/"g.safetensors")
    assert load(tmp_path/"g.safetensors")["h.0.attn.c_attn.weight.left"].shape == (16, 16)
    head = f"{work}/head/model.safetensors:x"
    collect(work/"bert", work/"a.jsonl", tmp_path/"b.safetensors", head=head)
    query = "bert.encoder.layer.0.attention.self.query.weight.left"
    assert query in load(tmp_path/"b.safetensors")


@pytest.mark.parametrize(
    "args, says, kind",
    [
        (["bert", "absent.jsonl"], "there is no such file", MergeError),
        (["absent/model", "a.jsonl"], "not a folder here", MergeError),
        (["bert", "a.jsonl", "--text", "txt"], "no column 'txt'", MergeError),
        (["bert", "a.jsonl", "--form", "kroneker"], "no form is called", ValueError),
        (["bert", "a.jsonl", "--estimator", "fisher"], "no estimator is called", ValueError),
        (["bert", "unlabelled.jsonl", "--estimator", "empirical"], "needs labels", MergeError),
        (["bert-encoder", "a.jsonl", "--estimator", "true"], "--head FILE:NAME", MergeError),
        (["bert", "a.jsonl", "--only", "nothing*"], "no parameter is called 'nothing", MergeError),
        (["bert", "a.jsonl", "--form", "projected"], "frechet-merge basis", ValueError),
        (["bert", "a.jsonl", "--basis", "x"], "form = projected only", ValueError),
        (["bert", "a.jsonl", "--split", "test"], "cannot be read|Unknown split", MergeError),
        (["bert", "a.jsonl", "--head", "head/model.safetensors:y"], "holds no head", MergeError),
        (["bert", "a.jsonl", "--device", "abacus"], "no device 'abacus'", ValueError),
        (["bert", "a.jsonl", "--dtype", "fp8"], "fp8", ValueError),
        (
            ["gpt2", "a.jsonl", "--max-length", "1"],
            "cut at 1 tokens, and 2 are the least(?s:.*)--max-length",
            ValueError,
        ),
    ],
    ids=lambda x: None if not isinstance(x, str) else "".join(c for c in x if c.isalnum()),
)
def test_mistakes_are_named_in_three_lines(work, tmp_path, monkeypatch, args, says, kind):
    "Inputs that make no sense are a MergeError, arguments that make none any other ValueError."
    monkeypatch.chdir(work)
    with pytest.raises(ValueError, match=says) as e, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run("curvature", *args, "-o", tmp_path/"s.safetensors")
    assert isinstance(e.value, MergeError) == (kind is MergeError)
    assert len(str(e.value).splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_exit_codes(work, tmp_path):
    needs = "error: unlabelled.jsonl: the empirical Fisher needs labels"
    for args, code, says in (
        (["unlabelled.jsonl", "--estimator", "empirical"], 1, needs),
        (["a.jsonl", "--form", "kroneker"], 2, "error: no form is called"),
        (["a.jsonl"], 0, ""),
    ):
        rc, out, err = cli("curvature", "bert", *args, "-o", tmp_path/"s.safetensors", cwd=work)
        assert rc == code and err.startswith(says) and len(err.splitlines()) <= 3, err
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"] and "40 samples" in out


def test_what_exists_is_kept(work, tmp_path):
    (tmp_path/"s.safetensors").write_text("mine")
    with pytest.raises(MergeError, match="exists already"):
        collect(work/"bert", work/"a.jsonl", tmp_path/"s.safetensors")
    assert (tmp_path/"s.safetensors").read_text() == "mine"
    with pytest.raises(MergeError, match="its folder does not exist"):
        collect(work/"bert", work/"a.jsonl", tmp_path/"no"/"s.safetensors")


def test_labels_are_read_only_if_they_are_needed(work, tmp_path):
    rows = [{"text": r["sentence"], "label": y} for r, y in zip(ROWS, ["odd", "even"]*20)]
    odd = write(tmp_path/"odd.jsonl", rows)
    collect(work/"bert", odd, tmp_path/"s.safetensors")
    numbers = write(tmp_path/"n.jsonl")
    none = write(tmp_path/"m.jsonl", [{"text": "cat", "label": -1}])

    def refused(data, says, **how):
        with pytest.raises(MergeError, match=says):
            collect(work/"bert", data, tmp_path/"t.safetensors", estimator="empirical", **how)

    refused(odd, "the label 'odd' is neither a whole number nor a class")
    refused(numbers, "a label is 39, and .*bert has 3 classes", label="n")
    refused(none, "not labelled")


def test_only_some_parameters(work, tmp_path):
    collect(work/"bert", work/"a.jsonl", tmp_path/"s.safetensors", only="*query.weight")
    assert {n.rpartition(".")[0] for n in load(tmp_path/"s.safetensors")} == {
        n for n in matrices(work/"bert") if n.endswith("query.weight")
    }


KILLED = """
import os, signal
import frechet_merge.curvature.collecting as c
from frechet_merge.cli import main

save = c.State.save

def then_die(self, every=0):
    save(self)
    if self.samples >= 24:
        c.State.save = save
        os.kill(os.getpid(), signal.SIGTERM)

c.State.save = then_die
main()
"""


@pytest.fixture
def long(tmp_path):
    "Eighty longer texts."
    rows = [
        {"text": " ".join(ROWS[(7*i + j) % 40]["sentence"] for j in range(6))} for i in range(80)
    ]
    return write(tmp_path/"long.jsonl", rows)


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_killed_run_goes_on(work, tmp_path, long):
    args = ["curvature", str(work/"bert"), str(long), "-q", "-o", "s.safetensors"]
    r = subprocess.run(
        [sys.executable, "-c", KILLED, *args],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert r.returncode == 143, r.stderr
    assert names_in(tmp_path) == ["long.jsonl", "s.safetensors.state"]
    state = torch.load(tmp_path/"s.safetensors.state", weights_only=True)
    assert state["done"][0] == 24
    whole = collect(work/"bert", long, tmp_path/"whole.safetensors")
    again = collect(work/"bert", long, tmp_path/"s.safetensors", resume=True)
    assert names_in(tmp_path) == ["long.jsonl", "s.safetensors", "whole.safetensors"]
    assert again.about["samples"] == 80
    for n in whole:
        torch.testing.assert_close(again[n], whole[n], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "how, says",
    [
        ({"form": "diagonal"}, "form 'kronecker'"),
        ({"seed": 1}, "seed 0"),
        ({"estimator": "true"}, "estimator 'pullback'"),
        (
            {"max_samples": 32, "only": "*query*", "max_length": 4},
            "max_samples 256, max_length 512, only None",
        ),
    ],
)
def test_what_is_finished_is_of_the_same_run(work, tmp_path, how, says):
    collect(work/"bert", work/"a.jsonl", tmp_path/"s.safetensors")
    with pytest.raises(ValueError, match=f"is finished, and of another run: {says}"):
        collect(work/"bert", work/"a.jsonl", tmp_path/"s.safetensors", resume=True, **how)


@pytest.mark.parametrize("form", ["kronecker", "inputs"])
def test_a_loop_that_was_killed_passes_over_what_is_finished(work, tmp_path, form):
    def collected():
        return collect(work/"bert", work/"a.jsonl", tmp_path/"s.safetensors", form, resume=True)

    first = collected()
    at = (tmp_path/"s.safetensors").stat().st_mtime_ns
    assert collected().about == first.about
    assert (tmp_path/"s.safetensors").stat().st_mtime_ns == at


@pytest.mark.filterwarnings("ignore:no metric for")
def test_pairs_that_are_not_there_and_labels_between_classes(work, tmp_path):
    from frechet_merge.huggingface.examples import examples

    rows = [
        {"sentence1": "cat dog", "sentence2": None if i % 2 else "dog", "label": i % 2 + 0.5}
        for i in range(8)
    ]
    data = write(tmp_path/"pairs.jsonl", rows)
    with pytest.warns(UserWarning, match="4 of 8 examples have no text or no pair"):
        found = examples(data)
    assert [r["pair"] for r in found] == ["dog"]*4
    with (
        pytest.raises(MergeError, match="label 0.5 is neither a whole number"),
        pytest.warns(UserWarning),
    ):
        collect(work/"bert", data, tmp_path/"s.safetensors", estimator="empirical")


@pytest.mark.parametrize(
    "args, says",
    [
        (dict(form="kroneker"), "no form is called 'kroneker'"),
        (dict(estimator="fisher"), "no estimator is called 'fisher'"),
    ],
)
def test_a_mistyped_name_is_said_before_anything_is_opened(tmp_path, args, says):
    with pytest.raises(ValueError, match=says):
        collect(tmp_path/"absent", tmp_path/"absent.jsonl", tmp_path/"s.safetensors", **args)


def test_a_tied_embedding_is_said_to_have_no_factors(work, tmp_path):
    said = (
        r"no metric for transformer\.wte\.weight: "
        r"it is shared by layers of different kinds \(embedding, linear\)"
    )
    with pytest.warns(UserWarning, match=said):
        collect(work/"gpt2", work/"a.jsonl", tmp_path/"s.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s = collect(work/"gpt2", work/"a.jsonl", tmp_path/"d.safetensors", form="diagonal")
    assert "transformer.wte.weight" in s


def test_the_state_of_another_run_is_refused(work, tmp_path):
    torch.save({**dict.fromkeys(STATE), "run": "another"}, tmp_path/"s.safetensors.state")
    with pytest.raises(ValueError, match="another run"):
        collect(work/"bert", work/"a.jsonl", tmp_path/"s.safetensors", resume=True)
    collect(work/"bert", work/"a.jsonl", tmp_path/"s.safetensors")
    assert [x.name for x in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.filterwarnings("ignore:no metric for")
@pytest.mark.parametrize(
    "kind, form",
    [("bert", "kronecker"), ("gpt2", "kronecker"), ("llama", "inputs"), ("bert", "diagonal")],
)
def test_statistics_merge(work, tmp_path, kind, form):
    "Two models, each best on its own side: the mean is a Fréchet mean in their metrics, and loads."
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from frechet_merge.geometries.fisher import Curved

    a, b = work/kind, make(kind, tmp_path/"b", seed=1)
    metrics = [tmp_path/f"{i}.safetensors" for i in range(2)]
    for model, file in zip((a, b), metrics):
        collect(model, work/"a.jsonl", file, form=form)
    merged = merge([a, b], Curved(damping=0.1), metrics=metrics, out=tmp_path/"merged").tensors
    assert all(merged[n].isfinite().all() for n in merged)
    flat = merge([a, b]).tensors
    attention = ("query.weight", "q_proj.weight", "c_attn.weight")
    name = next(n for n in merged if n.endswith(attention))
    assert not torch.allclose(merged[name], flat[name])
    auto = AutoModelForCausalLM
    if "Sequence" in AutoConfig.from_pretrained(a).architectures[0]:
        auto = AutoModelForSequenceClassification
    auto.from_pretrained(tmp_path/"merged")
    same = merge([a, a], Curved(damping=0.1), metrics=metrics[:1]*2)
    for n in same.tensors:
        torch.testing.assert_close(same.tensors[n], load(a)[n], rtol=1e-4, atol=1e-5)


def test_the_packaged_experts(tmp_path):
    from frechet_merge.cli.demo import tasks

    task = "movie"
    write(tmp_path/"movie.jsonl", [{"text": t, "label": y} for t, y in tasks()[task]["test"][:8]])
    with pytest.warns(UserWarning, match="no metric for pooler.dense.weight: no gradient reach"):
        collect(
            f"{base_folder()}+{DATA / task}",
            tmp_path/"movie.jsonl",
            tmp_path/"s.safetensors",
            head=f"{DATA / 'heads.safetensors'}:{task}",
        )
    s, base = load(tmp_path/"s.safetensors"), load(base_folder())
    for n in base.lazy:
        if n.endswith("dense.weight") and "pooler" not in n:
            rows, columns = base[n].shape
            assert s[f"{n}.left"].shape == (rows, rows)
            assert s[f"{n}.right"].shape == (columns, columns)
    json.dumps(Statistics.load(tmp_path/"s.safetensors").about)


@pytest.fixture
def projected(tmp_path, monkeypatch, work):
    "In this folder: two models, the basis of their encoders, and statistics in it. Their base."
    base = work/"bert"
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab", 1):
        make("bert", tmp_path/name, seed=seed)
    only = ["-k", 3, "--only", "*encoder*"]
    run("basis", "a", "b", "--base", base, *only, "-o", "basis.safetensors")
    how = ["--form", "projected", "--basis", "basis.safetensors"]
    for name in "ab":
        run("curvature", name, work/"a.jsonl", *how, "-o", f"{name}.safetensors")
    return base


def test_bases(projected, capsys):
    capsys.readouterr()
    only = ["-k", 3, "--only", "*encoder*"]
    run("basis", "a", "b", "--base", projected, *only, "-o", "again.safetensors")
    assert "12 matrices, at most 6 directions each" in capsys.readouterr().out
    with pytest.raises(MergeError, match="exists already"):
        run("basis", "a", "b", "--base", projected, "-o", "basis.safetensors")
    with pytest.raises(MergeError, match="differ from it in no matrix"):
        run("basis", projected, projected, "--base", projected, "-o", "none.safetensors")


def test_projected_statistics(projected):
    held = load("a.safetensors")
    shapes = {"projected": (6, 6), "sigma": (6,)}
    assert len(held.lazy) == 24
    assert all(held[n].shape == shapes[n.rpartition(".")[2]] for n in held)


@pytest.mark.filterwarnings("ignore:no metric for")
def test_projected_statistics_merge(projected):
    from frechet_merge.geometries.subspace import EpiMer

    metrics = ["a.safetensors", "b.safetensors"]
    merged = merge(["a", "b"], EpiMer(k=3), base=projected, metrics=metrics).tensors
    assert all(merged[n].isfinite().all() for n in merged)
    with pytest.raises(MergeError, match="tensor '.*order"):
        merge(["b", "a"], EpiMer(k=3), base=projected, metrics=metrics[::-1])


@pytest.mark.parametrize(
    "do", [("merge", "--geometry", "pullback", "-o", "no"), ("inspect",)], ids=["merge", "inspect"]
)
def test_projected_statistics_are_for_epimer(projected, do):
    command, *how = do
    with pytest.raises(MergeError, match="a.safetensors: the metric of tensor '.*' is projected"):
        metrics = ["--metrics", "a.safetensors, b.safetensors"]
        run(command, "a", "b", "--base", projected, *metrics, *how)


def test_a_basis_of_another_model(projected, work):
    with pytest.raises(MergeError, match="a basis for none"):
        collect(
            work/"gpt2", work/"a.jsonl", "t.safetensors", "projected", basis="basis.safetensors"
        )


@pytest.mark.filterwarnings("ignore:no metric for")
def test_home_is_where_statistics_are(work, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(work)
    made = collect("bert", "a.jsonl", "~/s.safetensors")
    assert (tmp_path/"s.safetensors").exists()
    assert Statistics.load("~/s.safetensors").about == made.about
    assert collect("bert", "a.jsonl", "~/s.safetensors", resume=True).about == made.about

"""Merges from disk to disk and in memory, against dense references."""

import json
import os
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from conftest import ROOT, cli, save, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model

from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge import Euclidean, LoRA, MergeError, load, merge
from frechet_merge.matching.function import unlike
from frechet_merge.files.tensors import FileTensor
from frechet_merge.diagnostics.inspection import inspect
from frechet_merge.geometries.sphere import karcher
from frechet_merge.execution.run import mapper, pool
from frechet_merge.algebra.gram import gram
from frechet_merge.files.stack import Stack


def floats(state):
    return {k: v for k, v in state.items() if v.is_floating_point()}


def karcher_reference(xs, ws):
    "The Karcher mean of directions and mean norm, dense in float64, by the textbook iteration."
    x = torch.stack([t.double().flatten() for t in xs])
    w = torch.tensor(ws, dtype=torch.float64)
    w = w/w.sum()
    n = x.norm(dim=1)
    u = x/n[:, None]
    m = (w[:, None]*u).sum(0)
    m = m/m.norm()
    for _ in range(200):
        c = (u @ m)[:, None]
        p = u - c*m
        s = p.norm(dim=1, keepdim=True)
        v = (w[:, None]*p*torch.where(s > 0, torch.atan2(s, c)/s.clamp(min=1e-300), 1)).sum(0)
        k = v.norm()
        if k < 1e-15:
            break
        m = k.cos()*m + k.sin()*v/k
    return ((w @ n)*m).view(xs[0].shape)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("executor", ["serial", "threads", map])
def test_linear_and_karcher_against_dense_float64(tmp_path, dtype, executor):
    states, ws = (
        [
            {
                k: (v + tensors(9)[k]).to(dtype) if v.is_floating_point() else v
                for k, v in tensors(i, torch.float64).items()
            }
            for i in range(4)
        ],
        [0.4, 0.3, 0.2, 0.1],
    )
    paths = [save(tmp_path/f"s{i}", s) for i, s in enumerate(states)]
    for g, reference in (
        (Euclidean(), lambda xs: sum(w*x.double() for w, x in zip(ws, xs))),
        (karcher(), lambda xs: karcher_reference(xs, ws)),
    ):
        merged = merge(paths, g, weights=ws, out=tmp_path/type(g).__name__, executor=executor)
        for k, x in floats(states[0]).items():
            want, got = reference([s[k] for s in states]), merged.tensors[k]
            assert got.dtype == dtype and got.shape == x.shape
            eps = {torch.float64: 1e-10}.get(dtype, torch.finfo(dtype).eps)
            assert (
                float((got.double() - want).abs().max()) <= 2*eps*float(want.abs().max())
                if x.numel()
                else True
            ), k
        assert torch.equal(merged.tensors["ids"], states[0]["ids"])


def test_bf16_error_is_that_of_rounding():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(300, 400, generator=g, dtype=torch.float64)
    xs = [
        (base + 0.1*torch.randn(300, 400, generator=g, dtype=torch.float64)).bfloat16()
        for _ in range(5)
    ]
    want = karcher_reference(xs, [1]*5)
    ours = merge([{"x": x} for x in xs], karcher()).tensors["x"].double()
    assert float((ours - want).norm()) <= 1.02*float((want.bfloat16().double() - want).norm())


def test_base_and_scale_are_task_arithmetic():
    base, a, b = tensors(0), tensors(1), tensors(2)
    merged = merge([a, b], base=base, scale=0.8)
    for k, x in floats(base).items():
        torch.testing.assert_close(merged.tensors[k], x + 0.4*((a[k] - x) + (b[k] - x)))
    by = merge([a, b], base=base, scale={"*.bias": 0.0, "q.weight": 2.0})
    assert torch.equal(by.tensors["q.bias"], base["q.bias"])
    torch.testing.assert_close(
        by.tensors["q.weight"], a["q.weight"] + b["q.weight"] - base["q.weight"]
    )
    torch.testing.assert_close(by.tensors["emb.weight"], (a["emb.weight"] + b["emb.weight"])/2)


def test_karcher_of_differences():
    # differences of scalars may be opposite
    base, a, b = (
        {k: v for k, v in tensors(i, torch.float64).items() if k != "s"} for i in range(3)
    )
    m = merge([a, b], karcher(), base=base, weights=[2, 1]).tensors["q.weight"]
    torch.testing.assert_close(
        m,
        base["q.weight"]
        + karcher_reference(
            [a["q.weight"] - base["q.weight"], b["q.weight"] - base["q.weight"]], [2, 1]
        ),
    )


def test_models_that_did_not_move_stay_at_the_base():
    base = {k: v.bfloat16() for k, v in floats(tensors(0)).items()}
    for g in (Euclidean(), karcher()):
        m = merge([dict(base), dict(base)], g, base=base, scale=0.7)
        for k, x in base.items():
            assert torch.equal(m.tensors[k], x)
        assert all(
            mean.converged and mean.unique and mean.variance == 0 for mean in m.means.values()
        )


def test_weights_by_name():
    a, b = tensors(1), tensors(2)
    m = merge([a, b], weights={"emb.*": [1, 0], "*": [0, 1]}).tensors
    assert torch.equal(m["emb.weight"], a["emb.weight"]) and torch.equal(m["q.bias"], b["q.bias"])


@pytest.fixture
def diagonals():
    "Three models and a positive diagonal metric of each."
    g, states = torch.Generator().manual_seed(0), [tensors(i) for i in range(3)]
    return states, [
        {k: torch.rand(v.shape, generator=g) for k, v in floats(s).items()} for s in states
    ]


def test_diagonal_metrics_from_files(tmp_path, diagonals):
    states, metrics = diagonals
    paths = [tmp_path/f"f{i}.safetensors" for i in range(3)]
    for path, f in zip(paths, metrics):
        save_file(f, path)
    m = merge(states, metrics=paths, weights=[3, 2, 1])
    for k in metrics[0]:
        pull = sum(w*f[k]*s[k] for w, f, s in zip([3, 2, 1], metrics, states))
        total = sum(w*f[k] for w, f in zip([3, 2, 1], metrics))
        torch.testing.assert_close(m.tensors[k], pull/total)


def test_diagonal_metrics_that_say_nothing_or_nonsense(diagonals):
    states, metrics = diagonals
    fewer = [{k: v for k, v in f.items() if k != "q.bias"} for f in metrics]
    with pytest.warns(UserWarning, match="no metric for 1 .*q.bias"):
        merge(states, metrics=fewer)
    for wrong, why in (
        ([*metrics[:2], fewer[2]], "'q.bias' is missing"),
        ([{"x": torch.ones(1)}]*3, "none of the tensors"),
        ([metrics[0] | {"q.bias": -torch.ones(8)}, *metrics[1:]], "tensor 'q.bias'.*>= 0"),
        (metrics[:2], "2 metrics for 3"),
    ):
        with pytest.raises(ValueError, match=why):
            merge(states, metrics=wrong)
    with pytest.raises(ValueError, match="one number per model"):
        merge(states, karcher(), metrics=metrics)


def test_means_report():
    m = merge([tensors(i) for i in range(3)], weights=[1, 2, 1])
    x = [tensors(i)["q.weight"] for i in range(3)]
    mean = m.means["q.weight"]
    assert mean.converged and mean.residual < 1e-5 and "ids" not in m.means
    want = sum(w*((a - m.tensors["q.weight"])**2).sum() for w, a in zip([0.25, 0.5, 0.25], x))
    assert abs(mean.variance - float(want)) < 1e-4*float(want)


def test_chunks_agree_with_one_piece(monkeypatch):
    xs = [{"x": torch.randn(1000, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    whole = {n: merge(xs, g).tensors["x"] for n, g in (("e", Euclidean()), ("s", karcher()))}
    monkeypatch.setattr("frechet_merge.files.stack.CHUNK", 64)
    for n, g in (("e", Euclidean()), ("s", karcher())):
        torch.testing.assert_close(merge(xs, g).tensors["x"], whole[n], rtol=0, atol=3e-7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 5000),
    T=st.integers(1, 8),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-25, 1e-3, 1, 1e25]),
)
def test_gram_matrix(n, T, seed, scale):
    x = scale*torch.randn(T, n, generator=torch.Generator().manual_seed(seed))
    K, L = gram(list(x))
    d = x.double()
    want = d @ d.T
    torch.testing.assert_close(L @ K @ L.T, want, rtol=0, atol=1e-6*float(want.diagonal().max()))


@pytest.mark.parametrize("scale", [1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_whose_first_chunk_is_unlike_the_rest(monkeypatch, dtype, scale):
    "Reserved rows of an embedding hardly move; norms read off them say nothing about the others."
    monkeypatch.setattr("frechet_merge.files.stack.CHUNK", 64)
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(1000, generator=g, dtype=torch.float64) for _ in range(3)]
    xs[0][:100] *= scale
    xs = [x.to(dtype) for x in xs]
    want = karcher_reference(xs, [0.5, 0.3, 0.2])
    got = merge([{"x": x} for x in xs], karcher(), weights=[0.5, 0.3, 0.2], dtype="fp64").tensors[
        "x"
    ]
    assert float((got - want).norm()) <= 1e-6*float(want.norm())


def test_a_model_near_the_midpoint_of_two_others():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5000, generator=g) for _ in range(2))
    c = (a + b)/2 + 1e-6*torch.randn(5000, generator=g)
    want, got = (
        karcher_reference([a, b, c], [1, 1, 1]),
        merge([{"x": x} for x in (a, b, c)], karcher()).tensors["x"],
    )
    assert float((got - want).norm()) <= 2*float((want.float().double() - want).norm())


def test_float8_and_mixed_dtypes():
    x, y = torch.randn(40), torch.randn(40)
    for d in (torch.float8_e4m3fn, torch.float8_e5m2):
        m = merge([{"x": x.to(d)}, {"x": y.to(d)}]).tensors["x"]
        assert m.dtype == d and torch.equal(
            m.float(), ((x.to(d).float() + y.to(d).float())/2).to(d).float()
        )
    m = merge(
        [{"x": x.bfloat16()}, {"x": y.to(torch.float8_e5m2)}, {"x": x.double()}], dtype="fp64"
    ).tensors["x"]
    torch.testing.assert_close(
        m, (x.bfloat16().double() + y.to(torch.float8_e5m2).double() + x.double())/3
    )


@pytest.mark.parametrize("as_base", [False, True])
def test_float8_does_not_cut_what_others_have(as_base):
    x, y = torch.randn(40).to(torch.float8_e4m3fn), torch.randn(40)
    more = {"base": {"x": x}} if as_base else {}
    models = [{"x": y}, {"x": y}] if as_base else [{"x": x}, {"x": y}]
    want = y if as_base else (x.float() + y)/2
    with pytest.warns(UserWarning, match="has eight bits where other models have more .x."):
        found = merge(models, **more).tensors["x"]
    torch.testing.assert_close(found, want.bfloat16())
    torch.testing.assert_close(merge(models, dtype="fp32", **more).tensors["x"], want)
    # the others' is kept as it is
    assert merge(models[::-1], **more).tensors["x"].dtype == (
        torch.bfloat16 if as_base else torch.float32
    )


def test_float8_of_adapters_does_not_cut_what_others_have():
    def adapter(dtype):
        stem = "base_model.model.q.lora_"
        state = {f"{stem}A.weight": torch.randn(2, 4), f"{stem}B.weight": torch.randn(3, 2)}
        c = from_state_dict({n: x.to(dtype) for n, x in state.items()})
        c.adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
        return c

    eight, wide = adapter(torch.float8_e4m3fn), adapter(torch.float32)
    found = merge([eight, wide]).tensors
    assert {found[n].dtype for n in found} == {torch.bfloat16}
    found = merge([eight, eight]).tensors
    assert {found[n].dtype for n in found} == {torch.float8_e4m3fn}


def test_a_transposed_tensor_and_an_executor_that_loses_some():
    x = torch.randn(30, 20)
    assert torch.equal(merge([{"x": x.T}, {"x": x.T}]).tensors["x"], x.T)
    with pytest.raises(ValueError, match="must act like `map`"):
        merge([{"x": x}], executor=lambda f, xs: [])


def test_what_only_the_base_has_stays():
    base, a = {"x": torch.ones(3), "y": torch.arange(3.0)}, {"x": torch.zeros(3)}
    m = merge([a, a], base=base, absent="renormalise").tensors
    assert torch.equal(m["y"], base["y"]) and torch.equal(m["x"], a["x"])


class TestTied:
    emb = torch.randn(11, 4)

    def test_shared_storage(self):
        a = {"emb.weight": self.emb, "lm_head.weight": self.emb}
        m = merge([a, a])
        assert m.tensors["lm_head.weight"].data_ptr() == m.tensors["emb.weight"].data_ptr()

    def test_written_once(self, tmp_path):
        a = {"emb.weight": self.emb, "lm_head.weight": self.emb}
        m = merge([a, a], out=tmp_path/"o")
        assert set(load_file(tmp_path/"o"/"model.safetensors")) == {"emb.weight"}
        assert torch.equal(load(tmp_path/"o")["lm_head.weight"], self.emb) and set(
            m.tensors
        ) == set(a)

    def test_note_of_safetensors_save_model(self, tmp_path):
        class M(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.emb = torch.nn.Embedding(11, 4)
                self.head = torch.nn.Linear(4, 11, bias=False)
                self.head.weight = self.emb.weight

        for i in range(2):
            (tmp_path/f"{i}").mkdir()
            save_model(M(), str(tmp_path/f"{i}"/"model.safetensors"))
        c = load(tmp_path/"0")
        assert len(c.tied) == 1 and len(c) == 2
        assert (
            len(
                load_file(
                    merge([tmp_path/"0", tmp_path/"1"], out=tmp_path/"o").out
                    / "model.safetensors"
                )
            )
            == 1
        )

    def test_stored_twice_though_the_config_says_tied(self, tmp_path):
        config = {"tie_word_embeddings": True, "vocab_size": 11}
        for i in range(2):
            save(
                tmp_path/f"{i}",
                {"model.embed_tokens.weight": self.emb + i, "lm_head.weight": self.emb.clone() + i},
                config,
            )
        m = merge([tmp_path/"0", tmp_path/"1"], out=tmp_path/"o")
        assert set(load_file(m.out/"model.safetensors")) == {"model.embed_tokens.weight"}

    def test_config_is_not_believed_against_the_bytes(self, tmp_path):
        save(
            tmp_path/"0",
            {"model.embed_tokens.weight": self.emb, "lm_head.weight": self.emb + 1},
            {"tie_word_embeddings": True, "vocab_size": 11},
        )
        assert not load(tmp_path/"0").tied

    def test_the_order_of_names_does_not_matter(self):
        a, b = (
            {"emb": self.emb, "head": self.emb},
            dict(reversed({"emb": (y := self.emb + 1), "head": y}.items())),
        )
        m = merge([a, b]).tensors
        assert m["emb"].data_ptr() == m["head"].data_ptr()
        torch.testing.assert_close(m["emb"], self.emb + 0.5)

    def test_tied_in_one_model_only(self, tmp_path):
        a, head = {"emb.weight": self.emb, "lm_head.weight": self.emb}, torch.randn(11, 4)
        m = merge([a, {"emb.weight": self.emb, "lm_head.weight": head}])
        torch.testing.assert_close(m.tensors["lm_head.weight"], (self.emb + head)/2)
        assert torch.equal(m.tensors["emb.weight"], self.emb)


class TestFolder:
    def test_companions_card_and_config(self, models, tmp_path):
        for f in (
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "chat_template.jinja",
            "model.safetensors.index.json.bak",
            "training_args.json",
        ):
            (models[0]/f).write_text("{}")
        rc, out, _ = cli(
            "merge",
            "m0",
            "m1",
            "-o",
            "out",
            "--dtype",
            "bf16",
            "--geometry",
            "sphere",
            "--weights",
            "2,1",
            cwd=tmp_path,
        )
        assert rc == 0 and "2 models merged, 6 tensors" in out
        assert sorted(os.listdir(tmp_path/"out")) == sorted(
            [
                "README.md",
                "chat_template.jinja",
                "config.json",
                "frechet_merge.json",
                "generation_config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
            ]
        )
        assert (
            json.loads((tmp_path/"out"/"config.json").read_text())["torch_dtype"] == "bfloat16"
        )
        import hashlib

        import yaml

        card = (tmp_path/"out"/"README.md").read_text()
        recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
        assert (
            recipe["weights"] == [2, 1]
            and "Sphere" in recipe["geometry"]
            and recipe["frechet_merge"]
        )
        assert (
            recipe["models"][0]["files"]["m0/model.safetensors"]
            == "sha256:"
            + hashlib.sha256((models[0]/"model.safetensors").read_bytes()).hexdigest()
        )

    def test_shards(self, models, tmp_path):
        m = merge(models, out=tmp_path/"out", shard_size=400)
        index = json.loads((m.out/"model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1 and set(index["weight_map"]) == set(
            m.tensors
        )
        assert all((m.out/f).exists() for f in index["weight_map"].values())
        again = merge([m.out]*2)
        for k in m.tensors:
            assert torch.equal(again.tensors[k], m.tensors[k])

    def test_order_of_models_does_not_change_the_bytes_of_a_linear_merge_of_two(self, models):
        a, b = merge(models[:2]).tensors, merge(models[1::-1]).tensors
        for k in a:
            assert torch.equal(a[k], b[k])

    def test_inspect(self, models, tmp_path):
        rc, out, _ = cli("inspect", "m0", "m1", "--json", cwd=tmp_path)
        found = json.loads(out)
        assert rc == 0 and found["mergeable"] and len(found["tensors"]) == 4
        row = next(r for r in found["tensors"] if r["name"] == "q.weight")
        x, y = tensors(0)["q.weight"], tensors(1)["q.weight"]
        assert (
            abs(row["norm"][1] - float(y.norm())) < 1e-4
            and abs(row["distance"][0] - float((y - x).norm()/x.norm())) < 1e-5
        )
        save(
            tmp_path/"odd",
            tensors() | {"q.bias": torch.randn(9), "more": torch.full((2,), torch.nan)},
        )
        rc, out, _ = cli("inspect", "m0", "odd", cwd=tmp_path)
        assert rc == 1 and "missing: more" in out and "shapes differ: q.bias" in out
        bad = tensors()
        bad["q.bias"][:3] = float("inf")
        assert inspect([tensors(), bad]).nonfinite == {"q.bias": [0, 3]}


class TestMemory:
    """A merge holds chunks, not tensors: peak memory above the imports, in MiB, measured in a
    process of its own."""

    CODE = """
import resource, sys, torch
from frechet_merge import merge
from frechet_merge.geometries.registry import geometry_named
r0 = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge([f"b{i}" for i in range(8)], geometry_named(sys.argv[1]), out="out-" + sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - r0)/1024)
"""

    @pytest.mark.parametrize("geometry", ["euclidean", "sphere"])
    def test_eight_models(self, tmp_path, geometry):
        """Less than one tensor of 128 MiB, and no more for it than for one of 32 MiB, but for what
        varies from run to run."""
        from frechet_merge.files.shards import ShardWriter

        peak = {}
        for n in (1 << 24, 1 << 26):
            (tmp_path/f"{n}").mkdir()
            for i in range(8):
                (tmp_path/f"{n}"/f"b{i}").mkdir()
                w = ShardWriter(tmp_path/f"{n}"/f"b{i}", {"w": ((n,), torch.bfloat16)}, 10**10)
                w.write("w", 0, torch.full((1 << 20,), 1 + i/8))
                w.close()
            r = subprocess.run(
                [sys.executable, "-c", self.CODE, geometry],
                cwd=tmp_path/f"{n}",
                capture_output=True,
                text=True,
            )
            assert r.returncode == 0, r.stderr
            peak[n] = float(r.stdout)
        assert peak[1 << 26] < 128 and peak[1 << 26] - peak[1 << 24] < 32, peak


def test_the_import_is_light():
    "Importing the library loads neither the notebooks' tools nor anything heavy beside torch."
    code = (
        "import sys, frechet_merge; print([m for m in ('nbdev', 'fastcore', "
        "'geomstats', 'peft', 'transformers', 'matplotlib', 'scipy', "
        "'huggingface_hub', 'typer') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
        == "[]"
    )


def test_stack_of_differences_reads_one_model_at_a_time():
    base, xs = torch.randn(4, 5), [torch.randn(4, 5) for _ in range(3)]
    from frechet_merge.files.tensors import MemoryTensor

    s = Stack([MemoryTensor(x) for x in xs], MemoryTensor(base))
    assert (
        torch.equal(s[1], xs[1] - base)
        and len(list(s)) == 3
        and torch.equal(s.rows(3, 7)[2], (xs[2] - base).flatten()[3:7])
    )


class TestNames:
    "What transformers would load as one model is merged as one."

    def of(self, **more):
        return {
            "bert.a.LayerNorm.weight": torch.full((3,), 2.0),
            "bert.a.LayerNorm.bias": torch.ones(3),
            "bert.b.weight": torch.ones(2, 3),
            **more,
        }

    @pytest.mark.parametrize(
        "old",
        [
            lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ),
            lambda n: n.removeprefix("bert."),
            lambda n: (
                n.removeprefix("bert.")
                .replace("LayerNorm.weight", "LayerNorm.gamma")
                .replace("LayerNorm.bias", "LayerNorm.beta")
            ),
            lambda n: "model." + n,
        ],
        ids=["gamma", "no part", "neither", "more parts"],
    )
    def test_a_base_of_other_names(self, old):
        a, b, base = (
            self.of(),
            {k: 3*v for k, v in self.of().items()},
            {old(k): 0*v for k, v in self.of().items()},
        )
        m = merge([a, b], base=base, scale=0.5).tensors
        assert set(m) == set(a) and all(torch.equal(m[k], a[k]) for k in a)
        again = merge([a, {old(k): v for k, v in b.items()}]).tensors
        assert set(again) == set(a) and all(torch.equal(again[k], 2*a[k]) for k in a)

    def test_a_head_that_the_base_lacks(self):
        a, base = (
            self.of(**{"head.weight": torch.ones(2, 3)}),
            {k.removeprefix("bert."): 0*v for k, v in self.of().items()},
        )
        m = merge([a, a], base=base, scale=0.5, absent="renormalise").tensors
        assert (
            set(m) == set(a)
            and torch.equal(m["bert.b.weight"], a["bert.b.weight"]/2)
            and torch.equal(m["head.weight"], a["head.weight"])
        )

    def test_names_that_could_be_two_parts_of_a_model(self):
        both = {f"{p}.{k}": torch.ones(2) for p in ("encoder", "decoder") for k in ("w", "b")}
        with pytest.raises(MergeError, match="has no tensor"):
            merge([both, {k: torch.ones(2) for k in ("w", "b")}])

    def test_a_base_that_is_another_model(self):
        with pytest.raises(
            MergeError,
            match=r"(?s)has no tensor '.*Name the model that .* was trained from",
        ):
            merge([self.of()]*2, base={"x": torch.ones(3)}, absent="renormalise")


@pytest.mark.filterwarnings("ignore")
def test_codes_are_not_averaged():
    codes = torch.randn(4, 4).to(torch.float8_e4m3fn)
    two = [{"w.weight": codes, "w.weight_scale_inv": torch.full((1, 1), s)} for s in (1.0, 3.0)]
    found = merge(two).tensors
    assert {*found} == {"w.weight"}
    torch.testing.assert_close(found["w.weight"].float(), 2*codes.float(), atol=0.05, rtol=0.02)


def test_one_file_wins_over_an_old_index(tmp_path):
    for name, x in (("old", 1.0), ("new", 2.0)):
        merge(
            [{"w": torch.full((64,), x), "v": torch.full((64,), x)}],
            out=tmp_path/name,
            shard_size=300 if name == "old" else 10**9,
        )
    for f in (tmp_path/"old").iterdir():
        (tmp_path/"new"/f.name).write_bytes(f.read_bytes()) if f.name != "README.md" else None
    assert (
        len(list((tmp_path/"new").glob("*.safetensors"))) == 3
        and load(tmp_path/"new")["w"][0] == 2
    )


def test_companions_come_from_the_models(models, tmp_path):
    for name, said in (("base", "base"), ("m0", "a model")):
        f = models[0].parent/name if name == "base" else models[0]
        if name == "base":
            save(f, dict(load(models[0]).items()))
        (f/"config.json").write_text(json.dumps({"said": said, "torch_dtype": "bfloat16"}))
        (f/"modeling_x.py").write_text(said)
    out = merge(models, base=models[0].parent/"base", out=tmp_path/"o").out
    config = json.loads((out/"config.json").read_text())
    assert (
        config["said"] == "a model"
        and config["torch_dtype"] == str(load(out)["q.weight"].dtype).removeprefix("torch.")
        and (out/"modeling_x.py").read_text() == "a model"
    )
    for m in models:
        (m/"config.json").unlink()
    # no model has one
    assert (
        json.loads(
            (
                merge(models, base=models[0].parent/"base", out=tmp_path/"p").out
                / "config.json"
            ).read_text()
        )["said"]
        == "base"
    )


def test_a_baked_adapter_leaves_the_base_its_dtype(tmp_path):
    save(
        tmp_path/"base",
        {"l.weight": torch.randn(4, 6).bfloat16()},
        {"model_type": "toy", "torch_dtype": "bfloat16"},
    )
    a = load(
        {
            "base_model.model.l.lora_A.weight": torch.randn(2, 6),
            "base_model.model.l.lora_B.weight": torch.randn(4, 2),
        }
    )
    a.adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    for dtype in (None, "fp32"):
        out = merge([a], LoRA(), bake=tmp_path/"base", out=tmp_path/str(dtype), dtype=dtype).out
        assert (
            json.loads((out/"config.json").read_text())["torch_dtype"]
            == str(load(out)["l.weight"].dtype).removeprefix("torch.")
            == ("float32" if dtype else "bfloat16")
        )
    with pytest.raises(ValueError, match="differences from their base already"):
        inspect([a, a], base=tmp_path/"base")


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["wte", "emb"])
def test_a_tied_head_that_one_model_saved_along(tmp_path, order, name):
    w = torch.randn(11, 4)
    config = {"vocab_size": 11, "tie_word_embeddings": True}
    both = [
        save(tmp_path/"a", {f"{name}.weight": w}, config),
        save(tmp_path/"b", {f"{name}.weight": 3*w, "lm_head.weight": 3*w}, config),
    ]
    m = merge(both[::order]).tensors
    torch.testing.assert_close(m[f"{name}.weight"], 2*w)
    assert set(m.lazy) == {f"{name}.weight"}


def test_the_hub_learns_what_a_merge_is_made_of(models, tmp_path):
    import yaml

    def head(*sources):
        cs = [load(m) for m in models[: len(sources)]]
        for c, name in zip(cs, sources):
            c.source = name
        return yaml.safe_load(
            (merge(cs, out=tmp_path/str(len(os.listdir(tmp_path)))).out/"README.md")
            .read_text()
            .split("---")[1]
        )

    assert head("org/a", "org/b@main") == {
        "library_name": "transformers",
        "base_model": ["org/a", "org/b"],
        "base_model_relation": "merge",
        "tags": ["merge", "frechet_merge", "euclidean"],
    }
    assert "base_model" not in head("org/a", "./b") and "base_model" not in head(
        "org/a+org/b", "org/c"
    )


def test_home_is_where_a_model_is_written(models, tmp_path, monkeypatch):
    "`~` is home for what writes, as it is for what reads."
    home = tmp_path/"home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    m = merge(models, out="~/merged")
    assert (
        (home/"merged"/"model.safetensors").exists()
        and not (tmp_path/"~").exists()
        and m.out == home/"merged"
    )
    torch.testing.assert_close(m.tensors["q.bias"], sum(tensors(i)["q.bias"] for i in range(3))/3)


def test_a_taken_place_is_refused_before_anything_is_read(models, tmp_path, monkeypatch):
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"mine").write_text("mine")
    monkeypatch.setattr(FileTensor, "_pread", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(
        "frechet_merge.files.output.fingerprint", lambda *_: pytest.fail("a file was hashed")
    )
    with pytest.raises(MergeError, match="not an empty folder"):
        merge(models, out=tmp_path/"out", full_hash=True)


def test_what_is_no_number_is_copied_if_that_is_asked_for(models, tmp_path):
    "A mask of -inf that all models have, or only the base, is that mask; what differs is NaN."
    mask = torch.tensor([0.0, -torch.inf, -torch.inf, 1.0])
    both, one = [tensors(i) | {"mask": mask} for i in range(2)], [tensors(i) for i in range(2)]
    base = tensors(5) | {"mask": mask}
    with pytest.raises(MergeError, match="(?s)'mask' is -inf.*allow_nonfinite"):
        merge(one, base=base, absent="renormalise")
    assert torch.equal(merge(both, allow_nonfinite=True).tensors["mask"], mask) and torch.equal(
        merge(
            one, base=base, absent="renormalise", allow_nonfinite=True, out=tmp_path/"o"
        ).tensors["mask"],
        mask,
    )
    both[1]["mask"] = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    found = merge(both, allow_nonfinite=True).tensors["mask"]
    assert found[0] == 0 and found[1].isnan() and found[2] == -torch.inf and found[3].isnan()


def test_merges_beside_each_other_give_the_threads_back():
    """The first to begin is not the last to end; workers have one thread each, and no more of them
    run than may."""
    before, found = torch.get_num_threads(), {}
    torch.set_num_threads(2)
    begun, ended = threading.Event(), threading.Event()

    def other():
        begun.wait(10)
        with mapper("threads") as over:
            found["worker"] = [*over(lambda _: torch.get_num_threads(), range(3))]
            ended.wait(10)
        found["other"] = torch.get_num_threads()

    t = threading.Thread(target=other)
    t.start()
    try:
        with mapper("threads") as over:
            begun.set()
            list(over(lambda _: torch.ones(9).sum(), range(3)))
            time.sleep(0.2)
        found["first"] = torch.get_num_threads()
        ended.set()
        t.join()
        assert found == {"worker": [1, 1, 1], "other": 2, "first": 2}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_workers_are_as_many_as_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    with pool() as threads:
        assert threads._max_workers == 3


def llama(folder, seed, tied, **config):
    g = torch.Generator().manual_seed(seed)
    state = {
        "model.embed_tokens.weight": torch.randn(11, 8, generator=g),
        "model.norm.weight": torch.randn(8, generator=g),
    } | ({} if tied else {"lm_head.weight": torch.randn(11, 8, generator=g)})
    return save(
        folder,
        state,
        {
            "model_type": "llama",
            "vocab_size": 11,
            "tie_word_embeddings": tied,
            "num_attention_heads": 2,
            **config,
        },
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_head_that_one_model_ties_to_its_embedding(tmp_path, order):
    "It is there, though not in the file; the mean has a head of its own, and its config says so."
    a, b = llama(tmp_path/"a", 0, False), llama(tmp_path/"b", 1, True)
    x, y = load_file(a/"model.safetensors"), load_file(b/"model.safetensors")
    merge([(a, b)[i] for i in order], out=tmp_path/"out")
    got = load(tmp_path/"out")
    torch.testing.assert_close(
        got["lm_head.weight"], (x["lm_head.weight"] + y["model.embed_tokens.weight"])/2
    )
    torch.testing.assert_close(
        got["model.embed_tokens.weight"],
        (x["model.embed_tokens.weight"] + y["model.embed_tokens.weight"])/2,
    )
    assert got.config["tie_word_embeddings"] is False
    merge([b, b], out=tmp_path/"tied")
    assert load(tmp_path/"tied").config["tie_word_embeddings"] is True
    moved = merge([a], base=b, scale=0.5).tensors["lm_head.weight"]
    torch.testing.assert_close(moved, (x["lm_head.weight"] + y["model.embed_tokens.weight"])/2)


def test_configs_and_tokenizers_that_make_another_function(tmp_path):
    "The same shapes are not the same model."
    a, b, c = (
        llama(tmp_path/"a", 0, False),
        llama(tmp_path/"b", 1, False, num_attention_heads=4),
        llama(tmp_path/"c", 2, False),
    )
    for f, v in ((a, ["cat", "dog"]), (c, ["dog", "cat"])):
        (f/"vocab.txt").write_text("\n".join(v))
    with pytest.warns(
        UserWarning,
        match="a and .*b are not the same function of their weights: num_attention_heads = 2 and 4",
    ):
        merge([a, b])
    with pytest.raises(MergeError, match="use token number 0 for 'cat' and for 'dog' .vocab.txt."):
        merge([a, c])
    found = inspect([a, b])
    assert found.mergeable and len(found.unlike) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge([a, a])


def test_spellings_of_one_function_are_one(tmp_path):
    "As transformers saves configs that it read."
    for a, b in (
        (
            {"sliding_window": 131072, "use_sliding_window": False},
            {"sliding_window": None, "use_sliding_window": False},
        ),
        ({"head_dim": None, "hidden_size": 8}, {"head_dim": 4, "hidden_size": 8}),
        (
            {"model_type": "qwen2_vl"},
            {
                "model_type": "qwen2_vl",
                "text_config": {
                    "model_type": "qwen2_vl_text",
                    "num_attention_heads": 2,
                    "vocab_size": 11,
                    "tie_word_embeddings": False,
                },
            },
        ),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
        ({"text_config": "x"}, {}),
    ):
        assert (
            unlike(
                [
                    llama(tmp_path/"a", 0, False, **a) and load(tmp_path/"a"),
                    llama(tmp_path/"b", 0, False, **b) and load(tmp_path/"b"),
                ]
            )
            == []
        )
    # two functions, be they near
    near = [
        load(llama(tmp_path/act, 0, False, hidden_act=act)) for act in ("gelu", "gelu_pytorch_tanh")
    ]
    assert "hidden_act = 'gelu' and 'gelu_pytorch_tanh'" in unlike(near)[0]
    x, y = (
        load(
            llama(
                tmp_path/f"t{k}",
                0,
                False,
                model_type="qwen2_vl",
                text_config={"model_type": "qwen2_vl_text", "num_key_value_heads": k},
            )
        )
        for k in (1, 2)
    )
    assert "num_key_value_heads = 1 and 2" in unlike([x, y])[0]


def test_a_tied_head_in_a_text_config(tmp_path):
    a, b = llama(tmp_path/"a", 0, False), llama(tmp_path/"b", 1, True)
    (b/"config.json").write_text(
        json.dumps({"tie_word_embeddings": True, "text_config": {"vocab_size": 11}})
    )
    x, y = load_file(a/"model.safetensors"), load_file(b/"model.safetensors")
    torch.testing.assert_close(
        merge([a, b]).tensors["lm_head.weight"],
        (x["lm_head.weight"] + y["model.embed_tokens.weight"])/2,
    )
    assert inspect([a, b]).mergeable and inspect([b, a]).mergeable


def test_what_is_left_out(models):
    assert set(merge(models, drop=["q.*", "ids"]).tensors) == {"emb.weight", "s", "none"}
    with pytest.raises(ValueError, match="'p.*': no model"):
        merge(models, drop=["q.*", "p.*"])
    base = {**load(models[0]), "pooler.w": torch.ones(2)}
    assert set(merge(models, base=base, drop=["pooler*"]).tensors) == set(load(models[0]))
    e = torch.randn(3, 2)
    tied = merge([{"emb": e, "head": e, "b": e[0]}]*2, drop=["emb"]).tensors
    assert set(tied) == {"head", "b"} and torch.equal(tied["head"], e)


def test_a_mean_that_overflows_is_refused_beside_what_is_no_number():
    a = {"w": torch.tensor([3e38, torch.nan])}
    with pytest.raises(MergeError, match="larger than float32 can hold"):
        merge([a, a], base={"w": torch.zeros(2)}, scale=2.0, allow_nonfinite=True)
    big = torch.finfo(torch.float64).min
    assert (
        merge(
            [{"w": torch.ones(1)}],
            base={"w": torch.ones(1), "mask": torch.tensor([big], dtype=torch.float64)},
            absent="renormalise",
        ).tensors["mask"]
        == big
    )


def test_models_in_memory_are_not_printed(monkeypatch, tmp_path):
    "A name is wanted of each, and all numbers of a state dict as a text took most of the time."
    def printed(*_, **__):
        raise AssertionError("a tensor was printed")

    monkeypatch.setattr(torch.Tensor, "__repr__", printed)
    models = [{"w.weight": torch.ones(2, 2)*i} for i in range(3)]
    merge(models[1:], base=models[0], out=tmp_path/"out")

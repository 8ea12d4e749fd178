"""The LoRA quotient: a function of orbits, for any gauge, any ranks, and without an m×n matrix."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frechet_merge import check_geometry
from frechet_merge.algebra.factors import Factors
from frechet_merge.geometries.lora import LoRA
from frechet_merge.geometries.laws import LAWS, mean_of


def adapter(m, n, r, gen, s=1.0):
    return Factors(
        torch.randn(m, r, generator=gen, dtype=torch.float64),
        torch.randn(r, n, generator=gen, dtype=torch.float64),
        s,
    )


def gauge(f, cond, gen, dtype=torch.float64):
    "The same update in a random gauge M of condition number `cond`, rounded to `dtype`."
    U, V = (
        torch.linalg.qr(torch.randn(f.rank, f.rank, generator=gen, dtype=torch.float64))[0]
        for _ in range(2)
    )
    d = (
        torch.logspace(0, math.log10(cond), f.rank, dtype=torch.float64)/math.sqrt(cond)
        if f.rank > 1
        else torch.tensor([cond], dtype=torch.float64)
    )
    return Factors((f.B @ (U/d @ V.T)).to(dtype), ((V*d) @ U.T @ f.A).to(dtype), f.s)


ADAPTERS = dict(
    m=st.integers(2, 40),
    n=st.integers(2, 40),
    ranks=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    seed=st.integers(0, 2**31),
)


def draw(m, n, ranks, seed):
    gen = torch.Generator().manual_seed(seed)
    return [
        adapter(m, n, min(r, m, n), gen, s) for r, s in zip(ranks, (1.0, 2.0, 0.5, 4.0, 0.1))
    ], gen


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**ADAPTERS, cond=st.floats(1, 1e3), rank=st.sampled_from([None, 1, 4]))
def test_gauges_do_not_move_the_mean(m, n, ranks, seed, cond, rank):
    fs, gen = draw(m, n, ranks, seed)
    (a, _), (b, _) = mean_of(LoRA(), fs), mean_of(LoRA(), [gauge(f, cond, gen) for f in fs])
    assert (a.delta() - b.delta()).norm() <= 1e-10*a.delta().norm()
    # the truncation is a function of the mean, continuous where the singular values differ
    if rank:
        S = torch.linalg.svdvals(a.delta())
        if rank < len(S) and S[rank - 1] - S[rank] > 1e-3*S[0]:
            (a, _), (b, _) = (
                mean_of(LoRA(rank), fs),
                mean_of(LoRA(rank), [gauge(f, cond, gen) for f in fs]),
            )
            assert (a.delta() - b.delta()).norm() <= 1e-10*a.delta().norm()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**ADAPTERS, cond=st.floats(1, 1e3))
def test_gauges_in_float32(m, n, ranks, seed, cond):
    """What the merge adds to the rounding of the factors that it is given: the update that they
    hold in float64 is the reference."""
    fs, gen = draw(m, n, ranks, seed)
    written = [gauge(f, cond, gen, torch.float32) for f in fs]
    want = sum(f.s*f.B.double() @ f.A.double() for f in written)/len(fs)
    got, _ = mean_of(LoRA(), written)
    assert got.dtype == torch.float32
    scale = sum(float((f.s*f.B.double() @ f.A.double()).norm()) for f in fs)/len(fs)
    assert (got.s*got.B.double() @ got.A.double() - want).norm() <= 1e-5*scale


@settings(max_examples=30, deadline=None, derandomize=True)
@given(**ADAPTERS)
def test_laws(m, n, ranks, seed):
    fs, gen = draw(m, n, ranks, seed)
    assert (
        check_geometry(
            LoRA(), fs, act=lambda f: gauge(f, 100, gen), same=lambda f: f.delta()
        ).keys()
        == LAWS.keys()
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(**ADAPTERS)
def test_against_the_dense_mean_and_its_svd(m, n, ranks, seed):
    fs, _ = draw(m, n, ranks, seed)
    ws = [0.4, 0.3, 0.2, 0.1, 0.5][: len(fs)]
    dense = sum(w*f.delta() for w, f in zip(ws, fs))/sum(ws)
    merged, mean = mean_of(LoRA(), fs, ws)
    torch.testing.assert_close(merged.delta(), dense, rtol=0, atol=1e-10*float(dense.norm()))
    assert math.isclose(
        mean.variance,
        sum(w*float((f.delta() - dense).norm()**2) for w, f in zip(ws, fs))/sum(ws),
        rel_tol=1e-8,
    )
    U, S, Vt = torch.linalg.svd(dense)
    k = min(2, len(S))
    if k == len(S) or S[k - 1] - S[k] > 1e-3*S[0]:
        torch.testing.assert_close(
            mean_of(LoRA(2), fs, ws)[0].delta(),
            (U[:, :k]*S[:k]) @ Vt[:k],
            rtol=0,
            atol=1e-9*float(dense.norm()),
        )


def test_zero_and_rank_deficient_adapters():
    gen = torch.Generator().manual_seed(0)
    f, zero = (
        adapter(9, 7, 3, gen),
        Factors(
            torch.zeros(9, 2, dtype=torch.float64),
            torch.randn(2, 7, generator=gen, dtype=torch.float64),
        ),
    )
    torch.testing.assert_close(mean_of(LoRA(), [f, zero])[0].delta(), f.delta()/2)
    twice = Factors(torch.cat([f.B, f.B], 1), torch.cat([f.A, f.A]), 0.5)
    torch.testing.assert_close(mean_of(LoRA(), [f, twice])[0].delta(), f.delta())
    assert not mean_of(LoRA(), [zero, zero])[0].delta().any()


def test_shapes_that_do_not_fit():
    gen = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="different bases"):
        LoRA().chart([adapter(5, 4, 2, gen), adapter(5, 3, 2, gen)])


def test_no_dense_matrix_is_formed():
    """On a 30000×30000 layer, whose ΔW would take 3.4 GiB in float32, the mean takes less than 300
    MiB beyond the factors."""
    code = (
        "import resource, torch\n"
        "from frechet_merge.algebra.factors import Factors\n"
        "from frechet_merge import LoRA\n"
        "from frechet_merge.geometries.laws import mean_of\n"
        "fs = [Factors(torch.randn(30000, 8), torch.randn(8, 30000)) for _ in "
        "range(4)]\n"
        "r0 = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "mean_of(LoRA(), fs); mean_of(LoRA(8), fs)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - r0)/1024)"
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0 and float(r.stdout) < 300, r.stdout + r.stderr

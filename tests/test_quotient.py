"""The quotient at one rank: exact paths, the same for every gauge, and NaN where there is none."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from frechet_merge import check_geometry, frechet_mean
from frechet_merge.algebra.factors import Factors
from frechet_merge.geometries.lora import LoRA
from frechet_merge.geometries.quotient import FixedRank, Quotient, norm, regauge, speed2, sqrtm
from frechet_merge.geometries.laws import LAWS, mean_of

D, METRICS = torch.float64, ("mix", "inv")
both = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "For matrices this small a second thread only waits."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def randn(*shape, gen):
    return torch.randn(*shape, generator=gen, dtype=D)


def close(N, m, n, r, spread, T, gen):
    "N problems of T adapters, with singular values between 1 and 1/2, that differ by `spread`."
    U, V = (torch.linalg.qr(randn(N, k, r, gen=gen))[0] for k in (m, n))
    s = torch.linspace(1, 0.5, r, dtype=D).sqrt()
    return [
        Factors(
            (U + spread*randn(N, m, r, gen=gen)/m**0.5)*s,
            ((V + spread*randn(N, n, r, gen=gen)/n**0.5)*s).mT,
        )
        for _ in range(T)
    ]


def gauge(f, cond, gen):
    U, V = (torch.linalg.qr(randn(*f.B.shape[:-2], f.rank, f.rank, gen=gen))[0] for _ in range(2))
    d = (
        torch.logspace(0, math.log10(cond), f.rank, dtype=D)/math.sqrt(cond)
        if f.rank > 1
        else torch.tensor([cond], dtype=D)
    )
    return Factors(f.B @ (U/d @ V.mT), (V*d) @ U.mT @ f.A, f.s)


def means(g, fs, ws=None, **kw):
    chart = g.chart(fs)
    found = frechet_mean(chart.space, chart.points, ws, batch=len(fs[0].B), warn=False, **kw)
    return chart.lift(torch.stack([f.x for f in found])).delta(), found


def off(a, b):
    return float((torch.linalg.matrix_norm(a - b)/torch.linalg.matrix_norm(b)).max())


SHAPES = dict(
    m=st.integers(4, 14),
    n=st.integers(4, 14),
    r=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    metric=st.sampled_from(METRICS),
)


def few(n):
    return settings(max_examples=n, deadline=None, derandomize=True, phases=[Phase.generate])


@few(6)
@given(**SHAPES, cond=st.floats(1, 1e3), spread=st.floats(0.03, 0.12))
def test_gauges_do_not_move_the_mean(m, n, r, seed, metric, cond, spread):
    gen, g = torch.Generator().manual_seed(seed), Quotient(metric)
    fs = close(3, m, n, r, spread, 3, gen)
    (a, A), (b, B) = (
        means(g, fs, [0.5, 0.3, 0.2]),
        means(g, [gauge(f, cond, gen) for f in fs], [0.5, 0.3, 0.2]),
    )
    assert all(x.converged and not x.lost for x in A + B)
    assert off(b, a) <= 1e-10
    assert np.allclose([x.variance for x in A], [x.variance for x in B], rtol=1e-8)


@few(6)
@given(**SHAPES, cond=st.floats(1, 1e3))
def test_gauges_do_not_move_the_truncated_mean(m, n, r, seed, metric, cond):
    """Adapters with nothing in common, of which one has the opposite sign of another: no path, and
    the start is the answer."""
    gen, g = torch.Generator().manual_seed(seed), Quotient(metric)
    fs = close(3, m, n, r, 5.0, 2, gen)
    fs.append(Factors(-fs[0].B*1.5, fs[0].A))
    (a, A), (b, B) = means(g, fs), means(g, [gauge(f, cond, gen) for f in fs])
    flat = sum(f.delta() for f in fs)/3
    U, S, Vt = torch.linalg.svd(flat, full_matrices=False)
    assert all(x.lost for x in A + B)
    gap = torch.ones(3, dtype=bool) if r >= S.shape[-1] else S[:, r - 1] - S[:, r] > 1e-3*S[:, 0]
    if gap.any():
        assert (
            off(b[gap], a[gap]) <= 1e-10
            and off(a[gap], ((U[..., :r]*S[..., None, :r]) @ Vt[:, :r])[gap]) <= 1e-10
        )


@few(4)
@given(**SHAPES)
def test_batched_is_one_by_one(m, n, r, seed, metric):
    "Near and far problems in one batch: each has its own path, its own steps and its own verdict."
    gen, g = torch.Generator().manual_seed(seed), Quotient(metric)
    near, far = close(2, m, n, r, 0.05, 3, gen), close(1, m, n, r, 5.0, 3, gen)
    far[1] = Factors(-1.5*far[0].B, far[0].A)
    fs = [Factors(torch.cat([a.B, b.B]), torch.cat([a.A, b.A])) for a, b in zip(near, far)]
    together, found = means(g, fs, [0.5, 0.3, 0.2])
    assert [f.lost > 0 for f in found] == [False, False, True]
    for k in range(3):
        points, up = g.chart([Factors(f.B[k], f.A[k]) for f in fs])
        alone = frechet_mean(FixedRank(metric), points, [0.5, 0.3, 0.2], warn=False)
        assert off(together[k], up(alone.x).delta()) <= 1e-10 and alone.lost == found[k].lost
        assert (
            math.isclose(alone.variance, found[k].variance, rel_tol=1e-8, abs_tol=1e-20)
            or alone.lost
            and math.isnan(alone.variance)
            and math.isnan(found[k].variance)
        )


@few(10)
@given(**SHAPES, spread=st.floats(1e-3, 0.25))
def test_exp_undoes_log_and_distance_is_symmetric(m, n, r, seed, metric, spread):
    gen, g = torch.Generator().manual_seed(seed), FixedRank(metric)
    fs = close(8, m, n, r, spread, 2, gen)
    (a, b), up = Quotient(metric).chart(fs)
    a, b = a.x, b.x
    v, back = g.log(a, b), g.log(b, a)
    ok = (v + back).isfinite().flatten(1).all(1)
    assert ok.sum() >= (8 if spread < 0.12 else 1)
    assert off(up(g.exp(a, v)[ok]).delta(), fs[1].delta()[ok]) <= 1e-12
    # the tangent itself comes back
    assert (g.log(a, g.exp(a, v)) - v)[ok].abs().max() <= 1e-9*norm(v)[ok].max()
    assert ((norm(back)/norm(v) - 1).abs()[ok] <= 1e-6).all()
    if metric == "mix":
        chord = torch.linalg.matrix_norm(fs[0].delta() - fs[1].delta())[ok]
        assert (chord/2**0.5 <= norm(v)[ok]*(1 + 1e-9)).all()


@few(4)
@given(**SHAPES)
def test_orthogonal_maps_move_the_mean_along(m, n, r, seed, metric):
    gen, g = torch.Generator().manual_seed(seed), Quotient(metric)
    fs = close(2, m, n, r, 0.05, 3, gen)
    P, Q = (torch.linalg.qr(randn(k, k, gen=gen))[0] for k in (m, n))
    (a, _), (b, _) = means(g, fs), means(g, [Factors(P @ f.B, f.A @ Q.T) for f in fs])
    assert off(b, P @ a @ Q.T) <= 1e-10


def energy(metric, a, b, K):
    """Minimum over discrete paths of K pieces, and over b's gauge, of the energy of the pairs:
    twice continuously, K² Σ ⟨Δx, Δx⟩/K at midpoints."""
    t = torch.linspace(0, 1, K + 1, dtype=D)[1:, None, None, None]
    path, M = (
        ((1 - t)*a + t*b)[:-1].clone().requires_grad_(),
        torch.eye(a.shape[-1], dtype=D).requires_grad_(),
    )
    opt = torch.optim.LBFGS(
        [path, M],
        lr=1,
        max_iter=400,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def E():
        end = torch.stack([torch.linalg.solve(M, b[0], left=False), b[1] @ M.T])
        x = torch.cat([a[None], path, end[None]])
        return K*speed2(metric, (x[1:] + x[:-1])/2, x[1:] - x[:-1]).sum()

    def closure():
        opt.zero_grad()
        e = E()
        e.backward()
        return e

    opt.step(closure)
    return float(E().detach())


@both
@pytest.mark.parametrize("m, n, r", [(3, 3, 1), (4, 3, 2)])
def test_against_shortest_discrete_paths(metric, m, n, r):
    """An independent reference that knows the metric on pairs and no geodesic equation: error K⁻²
    before extrapolation."""
    gen = torch.Generator().manual_seed(m)
    (a, b), _ = Quotient(metric).chart(
        [Factors(f.B[0], f.A[0]) for f in close(1, m, n, r, 0.3, 2, gen)]
    )
    y = regauge(metric, a.x[None], b.x[None])[0][0]
    want = (4*energy(metric, a.x, y, 12) - energy(metric, a.x, y, 6))/3
    found = float(FixedRank(metric).log(a.x, b.x).norm())
    assert math.isclose(math.sqrt(want), found, rel_tol=1e-6)


@both
def test_rank_one_is_a_cone_or_a_product(metric):
    gen = torch.Generator().manual_seed(0)
    N = 2000
    spread = 0.1 + 2*torch.rand(N, 1, 1, generator=gen, dtype=D)
    a = Factors(randn(N, 6, 1, gen=gen), randn(N, 1, 5, gen=gen))
    b = Factors(a.B + spread*randn(N, 6, 1, gen=gen), a.A + spread*randn(N, 1, 5, gen=gen))
    (m, x), _ = Quotient(metric).chart([a, b])
    d = norm(FixedRank(metric).log(m.x, x.x))
    s, t = (z.x[:, 0].square().sum((-2, -1)) for z in (m, x))
    c = (m.x*x.x).sum((-2, -1))/(s*t).sqrt()[:, None]
    phi = torch.minimum(c.arccos().norm(dim=1), (-c).arccos().norm(dim=1))
    want = (
        ((s**2 + t**2 - 2*s*t*(2**0.5*phi).cos())/2).sqrt()
        if metric == "mix"
        else (phi**2 + (s/t).log()**2/2).sqrt()
    )
    found = d.isfinite()
    assert found[phi < 0.5].all() and found.sum() > 900
    torch.testing.assert_close(d[found], want[found], rtol=1e-8, atol=0)


def unpleasant():
    "An update of rank 3, and others to which there is no path, or only just."
    (f,) = close(1, 3, 3, 3, 0.1, 1, torch.Generator().manual_seed(0))
    odd = {
        "zero": Factors(f.B*0, f.A),
        "thin": Factors(f.B @ torch.diag(torch.tensor([1, 1, 1e-13], dtype=D)), f.A),
        # the determinant changes its sign
        "flip": Factors(f.B @ torch.diag(torch.tensor([1, 1, -1], dtype=D)), f.A),
    }
    sizes = {"nan": math.nan, "inf": math.inf, "tiny": 1e-200, "huge": 1e200}
    return f, odd | {name: Factors(f.B*z, f.A) for name, z in sizes.items()}


@both
def test_no_path_is_nan_and_no_exception(metric):
    (f, odd), space = unpleasant(), FixedRank(metric)
    x = [p.x for p in Quotient(metric).chart([f, *odd.values()]).points]
    for bad in x[1:6]:
        assert space.log(x[0], bad).isnan().all() and space.log(bad, x[0]).isnan().all()
    for far in x[6:]:
        v = space.log(x[0], far)
        assert v.isnan().all() or v.isfinite().all()
    for v in (x[0]*math.nan, x[0]*1e300):
        assert space.exp(x[0], v).isnan().all()
    # and none of them disturbs another
    every = space.log(x[0].repeat(len(x), 1, 1, 1), torch.cat(x))
    assert not every[0].any() and every[1:6].isnan().all()
    assert torch.equal(space.exp(x[1], x[1]*0), x[1])


@both
@pytest.mark.parametrize("name", ["zero", "thin", "flip"])
def test_where_there_is_no_path_it_stays(metric, name):
    f, odd = unpleasant()
    chart = Quotient(metric).chart([f, odd[name]])
    (mean,) = frechet_mean(chart.space, chart.points, [0.7, 0.3], warn=False, batch=1)
    assert mean.lost and "no single shortest path" in mean.problem
    want = (0.7*f.delta() + 0.3*odd[name].delta())[0]
    torch.testing.assert_close(chart.lift(mean.x).delta(), want, rtol=0, atol=1e-12)


@both
def test_what_is_not_finite_is_lost(metric):
    f, odd = unpleasant()
    chart = Quotient(metric).chart([f, odd["nan"]])
    mean = frechet_mean(chart.space, [chart.points[1]]*2, warn=False, batch=1)[0]
    assert mean.lost == 2


@both
def test_one_parameter(metric):
    g, p, ws = Quotient(metric), [2.0, 0.5, 3.0], [0.5, 0.3, 0.2]
    points, up = g.chart(
        [Factors(torch.tensor([[z]], dtype=D), torch.ones(1, 1, dtype=D)) for z in p]
    )
    m = frechet_mean(FixedRank(metric), points, ws)
    assert m.converged and math.isclose(
        float(up(m.x).delta()), {"mix": 1.75, "inv": 1.430969}[metric], rel_tol=1e-6
    )
    for z, q in zip(points[1:], p[1:]):
        assert math.isclose(
            float(FixedRank(metric).log(points[0].x, z.x).norm()),
            (abs(2 - q) if metric == "mix" else abs(math.log(2/q)))/2**0.5,
            rel_tol=1e-9,
        )


def test_square_roots_of_nonnormal_matrices():
    gen = torch.Generator().manual_seed(0)
    A = torch.cat(
        [
            torch.eye(5, dtype=D) + 0.4*randn(60, 5, 5, gen=gen),
            (torch.eye(5, dtype=D) + torch.ones(5, 5, dtype=D).triu(1))[None],
        ]
    )
    # a Jordan-like block, and a graded one
    S = torch.logspace(0, -4, 5, dtype=D)
    A = torch.cat([A, A[-1:]*S**3])
    A = A[(torch.linalg.eigvals(A).angle().abs() < 3.1).all(-1)]
    X = sqrtm(A)
    assert len(A) > 40 and off(X @ X, A) <= 1e-9
    for a, x in zip(A, X):
        np.testing.assert_allclose(
            x, scipy.linalg.sqrtm(a.numpy()).real, atol=1e-7*float(x.norm())
        )


@both
def test_laws(metric):
    gen = torch.Generator().manual_seed(0)
    fs = [Factors(f.B[0], f.A[0], 2.0) for f in close(1, 7, 5, 2, 0.04, 3, gen)]
    assert (
        check_geometry(
            Quotient(metric), fs, act=lambda f: gauge(f, 1e3, gen), same=lambda f: f.delta()
        ).keys()
        == LAWS.keys()
    )


@both
@pytest.mark.parametrize("whole", [lambda g: g, lambda g: LoRA(metric=g)], ids=["alone", "in LoRA"])
def test_the_unit_of_the_factors_does_not_matter(metric, whole):
    "Alone and in a batch of layers of very different size."
    gen, g, units = (
        torch.Generator().manual_seed(0),
        whole(Quotient(metric)),
        [1e-30, 1e-14, 1e-11, 1.0, 1e11, 1e14, 1e30],
    )
    fs = [Factors(f.B[0], f.A[0]) for f in close(1, 12, 9, 3, 0.05, 3, gen)]
    want, info = mean_of(g, fs, [0.5, 0.3, 0.2])
    for u in units:
        got, found = mean_of(g, [Factors(u*f.B, u*f.A) for f in fs], [0.5, 0.3, 0.2])
        assert (
            off(got.delta()/u**2, want.delta()) < 1e-10
            and found.iterations == info.iterations
            and math.isclose(
                found.variance, info.variance*(u**4 if metric == "mix" else 1), rel_tol=1e-8
            )
        )
    scale = torch.tensor(units, dtype=D)[:, None, None]
    got, found = means(g, [Factors(scale*f.B, scale*f.A) for f in fs], [0.5, 0.3, 0.2])
    assert off(got/scale**2, want.delta()) < 1e-10 and all(x.converged for x in found)


def test_what_it_refuses():
    gen = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="'mix' and 'inv'"):
        Quotient("flat")
    with pytest.raises(ValueError, match=r"ranks \[2, 3\].*metric='flat'"):
        Quotient().chart([close(1, 6, 5, r, 0.1, 1, gen)[0] for r in (2, 3)])

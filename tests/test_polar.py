"""The polar metric: true geodesics of (U, P, V) modulo rotations, the same for every gauge, and NaN
where no way is found."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frechet_merge import LoRA, MergeError, check_geometry, frechet_mean, merge
from frechet_merge.algebra.factors import Factors
from frechet_merge.geometries.laws import LAWS, mean_of
from frechet_merge.geometries.polar import Polar, Polar3, expm, frames, horizontal, point
from frechet_merge.geometries.polar import turned_frame
from frechet_merge.geometries.registry import geometry_named

D = torch.float64


def randn(*shape, gen):
    return torch.randn(*shape, generator=gen, dtype=D)


def family(T, gen, m=9, n=7, r=3, spread=0.3, least=0.2):
    U, V = (torch.linalg.qr(randn(k, r, gen=gen))[0] for k in (m, n))
    s = torch.logspace(0, math.log10(least), r, dtype=D).sqrt()

    def near(F):
        return F + spread*randn(*F.shape, gen=gen)/len(F)**0.5

    return [Factors(near(U)*s, (near(V)*s).mT) for _ in range(T)]


def gauge(f, cond, gen):
    U, V = (torch.linalg.qr(randn(f.rank, f.rank, gen=gen))[0] for _ in range(2))
    d = torch.logspace(0, math.log10(cond), f.rank, dtype=D)/cond**0.5
    return Factors(f.B @ (U/d @ V.mT), (V*d) @ U.mT @ f.A)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    m=st.integers(4, 12), n=st.integers(4, 12), r=st.integers(1, 3), seed=st.integers(0, 2**31)
)
def test_the_laws_in_gauges_of_condition_1000(m, n, r, seed):
    gen = torch.Generator().manual_seed(seed)
    fs = family(3, gen, m, n, r, 0.15)
    found = check_geometry(
        Polar(), fs, act=lambda f: gauge(f, 1e3, gen), same=lambda f: f.delta()
    )
    assert found.keys() == LAWS.keys()
    a, b = mean_of(Polar(), fs)[0], mean_of(Polar(), [gauge(f, 1e3, gen) for f in fs])[0]
    assert (a.delta() - b.delta()).norm() <= 1e-10*a.delta().norm()


def test_the_toy_is_the_geometric_mean():
    one = [Factors(torch.tensor([[p]], dtype=D), torch.ones(1, 1, dtype=D)) for p in (2, 0.5, 3)]
    got, mean = mean_of(Polar(), one, [0.5, 0.3, 0.2])
    assert math.isclose(float(got.delta()), 2**0.5*0.5**0.3*3**0.2, rel_tol=1e-10)
    assert math.isclose(float(got.delta()), 1.430969, rel_tol=1e-6) and mean.converged


def dense_geodesic(F, xi):
    shape = F.shape

    def equation(_, z):
        at, by = z.reshape(2, *shape)
        return np.concatenate([by, -at @ by.T @ by]).ravel()

    start = np.concatenate([F, xi]).ravel()
    way = scipy.integrate.solve_ivp(
        equation, (0, 1), start, method="DOP853", rtol=1e-12, atol=1e-13
    )
    return way.y[:, -1].reshape(2, *shape)[0]


def test_exp_is_the_dense_one():
    """Stiefel frames by an integrator of the geodesic equation, amounts by scipy's matrix functions
    in P itself."""
    gen = torch.Generator().manual_seed(3)
    f = family(1, gen)[0]
    x = point(f, 9, 3)
    F, s = frames(x[:2])
    X = randn(3, 3, gen=gen)
    xi, X = horizontal(F, s, 0.4*randn(2, 9, 3, gen=gen), 0.4*(X + X.mT))
    v = torch.cat([xi, torch.nn.functional.pad(X, (0, 0, 0, 6))[None]])
    y = Polar3().exp(x, v)
    got = y[0] @ y[1].mT
    U, V = (dense_geodesic(F[k].numpy(), xi[k].numpy()) for k in (0, 1))
    root = np.diag(s.sqrt().numpy())
    want = U @ (root @ scipy.linalg.expm(X.numpy()) @ root) @ V.T
    assert np.allclose(got.numpy(), want, atol=1e-9)


def test_horizontal_is_at_right_angles_to_every_rotation():
    gen = torch.Generator().manual_seed(4)
    x = point(family(1, gen)[0], 9, 3)
    F, s = frames(x[:2])
    X = randn(3, 3, gen=gen)
    xi, X = horizontal(F, s, randn(2, 9, 3, gen=gen), X + X.mT)
    half = torch.diag(s**-0.5)
    for _ in range(3):
        W = randn(3, 3, gen=gen)
        W, P = W - W.mT, torch.diag(s)
        inner = (xi*(F @ W)).sum() + (X*(half @ (P @ W - W @ P) @ half)).sum()
        assert abs(float(inner)) < 1e-12
    # and doing it again changes nothing
    again = horizontal(F, s, xi, X)
    assert torch.allclose(again[0], xi, atol=1e-13) and torch.allclose(again[1], X, atol=1e-13)


def shot(A, B):
    "Length of the geodesic between frames, by shooting: a least-squares problem."

    def tangent(z):
        z = z.reshape(A.shape)
        return z - A @ (A.T @ z + z.T @ A)/2

    def missed(z):
        # which the test above holds to an integrator
        end = turned_frame(torch.tensor(A), torch.tensor(tangent(z)))
        return (end.numpy() - B).ravel()

    found = scipy.optimize.least_squares(missed, (B - A).ravel(), xtol=1e-12)
    assert found.cost < 1e-16
    return np.linalg.norm(tangent(found.x))


def spd_metric(k):
    "The affine-invariant metric of geomstats."
    from frechet_merge.geometries.manifold import import_geomstats

    import_geomstats()
    from geomstats.geometry.spd_matrices import SPDAffineMetric, SPDMatrices

    space = SPDMatrices(k, equip=False)
    space.equip_with_metric(SPDAffineMetric)
    return space.metric


def test_no_way_nearby_in_the_fibre_is_shorter():
    """The distance against a search over rotations, upstairs: geodesics of Stiefel frames by their
    own boundary problem, amounts by geomstats."""
    gen = torch.Generator().manual_seed(5)
    x, y = (point(f, 6, 2) for f in family(2, gen, 6, 5, 2))
    (F, s), (G, t) = frames(x[:2]), frames(y[:2])
    metric = spd_metric(2)
    distance = float(Polar3().log(x, y).norm())

    def upstairs(angle):
        c, d = math.cos(angle), math.sin(angle)
        Q = np.array([[c, -d], [d, c]])*signs
        P = Q.T @ np.diag(t.numpy()) @ Q
        parts = [shot(F[k].numpy(), G[k].numpy() @ Q) for k in (0, 1)]
        return np.sqrt(sum(p**2 for p in parts) + metric.dist(np.diag(s.numpy()), P)**2)

    # signs of singular vectors are arbitrary: the component of O(2) in which they match
    overlap = (F.mT @ G).sum(0)
    U, _, Vt = torch.linalg.svd(overlap)
    best = (U @ Vt).mT
    signs = np.array([1.0, float(torch.linalg.det(best).sign())])
    near = best.numpy()/signs
    angle = math.atan2(near[1, 0], near[0, 0])
    found = scipy.optimize.minimize_scalar(
        upstairs, bounds=(angle - 0.3, angle + 0.3), method="bounded", options={"xatol": 1e-6}
    )
    assert math.isclose(found.fun, distance, rel_tol=1e-6)


def test_what_has_no_way_is_nan():
    one = torch.ones(1, 1, dtype=D)
    space = Polar3()
    plus, minus = (point(Factors(c*one, one), 1, 1) for c in (1, -1))
    assert space.log(plus, minus).isnan().all()
    gen = torch.Generator().manual_seed(6)
    f = family(1, gen)[0]
    low = Factors(f.B*torch.tensor([1, 1, 0]), f.A)
    assert space.log(point(f, 9, 3), point(low, 9, 3)).isnan().all()
    bad = Factors(f.B*math.nan, f.A)
    assert space.log(point(f, 9, 3), point(bad, 9, 3)).isnan().all()


def test_batched_is_one_by_one():
    gen = torch.Generator().manual_seed(7)
    near, far = family(3, gen), family(3, gen)
    far[1] = Factors(-1.5*far[0].B, far[0].A)
    fs = [Factors(torch.stack([a.B, b.B]), torch.stack([a.A, b.A])) for a, b in zip(near, far)]
    chart = Polar().chart(fs)
    together = frechet_mean(chart.space, chart.points, batch=2, warn=False)
    for k, some in enumerate((near, far)):
        alone = Polar().chart(some)
        mean = frechet_mean(alone.space, alone.points, warn=False)
        assert mean.lost == together[k].lost
        a, b = alone.lift(mean.x).delta(), alone.lift(together[k].x).delta()
        assert a.isfinite().all() and (a - b).norm() <= 1e-9*a.norm()


def test_units_do_not_count():
    gen = torch.Generator().manual_seed(8)
    fs = family(3, gen)
    a = mean_of(Polar(), fs)[0].delta()
    b = mean_of(Polar(), [Factors(1e4*f.B, f.A) for f in fs])[0].delta()
    assert (b - 1e4*a).norm() <= 1e-9*b.norm()


def test_by_name_and_through_merge():
    g = geometry_named("lora:metric=polar")
    assert g == LoRA(metric="polar")
    gen = torch.Generator().manual_seed(9)
    fs = family(2, gen)

    def adapter(f):
        stem = "base_model.model.q.lora_"
        return {f"{stem}A.weight": f.A, f"{stem}B.weight": f.B}

    from frechet_merge.files.checkpoint import from_state_dict

    config = dict(peft_type="LORA", r=3, lora_alpha=3, target_modules=["q"])

    def merged(some):
        every = [from_state_dict(adapter(f)).view(adapter=config) for f in some]
        got = merge(every, g).tensors
        B, A = (got[f"base_model.model.q.lora_{k}.weight"] for k in "BA")
        return B @ A

    want = mean_of(Polar(), fs)[0].delta()
    assert (merged(fs) - want).norm() <= 1e-10*want.norm()
    assert (merged([gauge(f, 1e3, gen) for f in fs]) - want).norm() <= 1e-10*want.norm()


def test_ranks_must_be_equal():
    gen = torch.Generator().manual_seed(10)
    a, b = family(1, gen)[0], family(1, gen, r=2)[0]
    with pytest.raises((MergeError, ValueError), match="ranks"):
        Polar().chart([a, b])
    # the remedy
    mean_of(LoRA(metric="flat"), [a, b])


@pytest.mark.parametrize("size", [1e-4, 0.01, 0.3, 3.0])
def test_the_exponential_is_scipys(size):
    gen = torch.Generator().manual_seed(11)
    M = size*randn(4, 5, 5, gen=gen)
    want = np.stack([scipy.linalg.expm(one.numpy()) for one in M])
    assert np.allclose(expm(M).numpy(), want, rtol=1e-12, atol=1e-13*np.abs(want).max())

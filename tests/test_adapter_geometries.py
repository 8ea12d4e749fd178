"""Pinned, Wasserstein, KnOTS and TSV-M on the cores of adapters: invariant, equivariant, batched,
and equal to dense oracles."""

import math
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from frechet_merge import FLAT, Euclidean, Point, check_geometry, frechet_mean
from frechet_merge.algebra.factors import Factors, core, svd
from frechet_merge.geometries.baselines import NARROW, TSVM, KnOTS
from frechet_merge.geometries.lora import LoRA
from frechet_merge.geometries.pinned import Pinned, tangent_metric
from frechet_merge.geometries.wasserstein import BuresWasserstein, Wasserstein
from frechet_merge.geometries.laws import LAWS, mean_of
from frechet_merge.metrics.kinds import Diagonal
from frechet_merge.metrics.operator import Operator, SolveWarning
from frechet_merge.metrics.units import as_numbers

F64 = torch.float64


@pytest.fixture(autouse=True)
def one_thread():
    "Small matrices: threads would only wait for each other."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


GEOMETRIES = {
    "Pinned": Pinned(),
    "Wasserstein": Wasserstein(),
    "KnOTS": KnOTS(),
    "KnOTS(.7)": KnOTS(0.7),
    "TSVM": TSVM(),
    "TSVM(1)": TSVM(1),
}
each = pytest.mark.parametrize("name", GEOMETRIES)
quick = settings(max_examples=10, deadline=None, derandomize=True)
ADAPTERS = dict(
    m=st.integers(6, 30),
    n=st.integers(6, 30),
    ranks=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    seed=st.integers(0, 2**31),
)
WEIGHTS = [0.5, 0.3, 0.2, 0.4]


def randn(*shape, gen):
    return torch.randn(*shape, generator=gen, dtype=F64)


def draw(m, n, ranks, seed, lead=(), spread=0.5):
    "Updates of several ranks around a common one, so that an alignment means something."
    gen = torch.Generator().manual_seed(seed)
    B, A = randn(*lead, m, 4, gen=gen), randn(*lead, 4, n, gen=gen)
    return [
        Factors(
            B[..., :r] + spread*randn(*lead, m, r, gen=gen),
            A[..., :r, :] + spread*randn(*lead, r, n, gen=gen),
            s,
        )
        for r, s in zip(ranks, (1.0, 2.0, 0.5, 4.0))
    ], gen


def gauge(f, cond, gen):
    "The same update in a random gauge of condition number `cond`."
    U, V = (torch.linalg.qr(randn(f.rank, f.rank, gen=gen))[0] for _ in range(2))
    d = (
        torch.logspace(0, math.log10(cond), f.rank, dtype=F64)/math.sqrt(cond)
        if f.rank > 1
        else torch.tensor([cond], dtype=F64)
    )
    return Factors(f.B @ (U/d @ V.T), (V*d) @ U.T @ f.A, f.s)


def read(g, fs):
    "Updates as the geometry reads them."
    return fs if g.needs.of == "factors" else [f.delta() for f in fs]


def matrix(x):
    return x.delta() if isinstance(x, Factors) else x


def inner(g, pairs, ws=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, info = mean_of(g, read(g, pairs), ws, warn=False)
    return matrix(x), info


def merged(g, fs, ws=None):
    "Through the QR cores, whose bases depend on the gauges."
    QG, QH, pairs = core(fs)
    return QG @ (QH @ inner(g, pairs, ws)[0].mT).mT


def close(a, b, tol):
    assert (a - b).norm() <= tol*b.norm(), float((a - b).norm()/b.norm())


@each
@quick
@given(**ADAPTERS, cond=st.floats(1, 1e3))
def test_gauges_do_not_move_the_result(name, m, n, ranks, seed, cond):
    (fs, gen), g = draw(m, n, ranks, seed), GEOMETRIES[name]
    close(merged(g, [gauge(f, cond, gen) for f in fs]), merged(g, fs), 1e-10)


@each
@quick
@given(**ADAPTERS)
def test_rotations_of_both_bases_come_back(name, m, n, ranks, seed):
    (fs, gen), g = draw(m, n, ranks, seed), GEOMETRIES[name]
    P, Q = torch.linalg.qr(randn(m, m, gen=gen))[0], torch.linalg.qr(randn(n, n, gen=gen))[0]
    turned = inner(g, [Factors(P @ f.B, f.A @ Q, f.s) for f in fs], WEIGHTS[: len(fs)])[0]
    close(turned, P @ inner(g, fs, WEIGHTS[: len(fs)])[0] @ Q, 1e-10)


@each
@quick
@given(**ADAPTERS, N=st.integers(1, 4))
def test_a_batch_is_its_problems_one_by_one(name, m, n, ranks, seed, N):
    (fs, _), g, ws = draw(m, n, ranks, seed, (N,)), GEOMETRIES[name], WEIGHTS[: len(ranks)]
    # layers of very different size
    fs = [Factors(f.B*torch.logspace(-6, 6, N, dtype=F64).view(-1, 1, 1), f.A, f.s) for f in fs]
    chart = g.chart(read(g, fs))
    means = frechet_mean(chart.space, chart.points, ws, batch=N, warn=False)
    got = matrix(chart.lift(torch.stack([x.x for x in means])))
    for i in range(N):
        want, info = inner(g, [Factors(f.B[i], f.A[i], f.s) for f in fs], ws)
        close(got[i], want, 1e-9)
        assert math.isclose(means[i].variance, info.variance, rel_tol=1e-9)


@each
@settings(quick, max_examples=4)
@given(**ADAPTERS)
def test_laws(name, m, n, ranks, seed):
    fs, gen = draw(m, n, ranks, seed)
    with warnings.catch_warnings():
        # TSVM, of copies
        warnings.simplefilter("ignore", UserWarning)
        found = check_geometry(
            LoRA(metric=GEOMETRIES[name]),
            fs,
            act=lambda f: gauge(f, 100, gen),
            same=lambda f: f.delta(),
        )
    assert found.keys() == LAWS.keys() - set(GEOMETRIES[name].waives)


@each
def test_zero_and_deficient_updates(name):
    """An adapter without effect, one whose factors hold the same direction twice, and the shape and
    dtype that come back."""
    (fs, gen), g = draw(12, 9, (2, 3), 0), GEOMETRIES[name]
    twice = Factors(torch.cat([fs[0].B, fs[0].B], 1), torch.cat([fs[0].A, fs[0].A]), fs[0].s/2)
    # TIES at its threshold would be ordered by rounding
    if name != "KnOTS":
        close(merged(g, [twice, fs[1]]), merged(g, fs), 1e-9)
    zero = Factors(torch.zeros(12, 2, dtype=F64), randn(2, 9, gen=gen))
    x = merged(g, [*fs, zero])
    assert x.isfinite().all() and x.any()
    assert not merged(g, [zero, zero]).any()
    small = [Factors(f.B.float(), f.A.float(), f.s) for f in fs]
    out = mean_of(g, read(g, small))[0]
    assert out.dtype == torch.float32 and tuple(out.shape) == (12, 9)
    close(matrix(out).double(), inner(g, fs)[0], 1e-4)
    with pytest.raises(ValueError, match="one number per model"):
        g.chart(read(g, fs), [torch.ones(3), 1.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each
def test_on_cuda(name):
    (fs, _), g = draw(12, 9, (2, 3, 1), 0, (3,)), GEOMETRIES[name]

    def run(fs):
        chart = g.chart(read(g, fs))
        means = frechet_mean(chart.space, chart.points, WEIGHTS[:3], batch=3)
        return matrix(chart.lift(torch.stack([x.x for x in means])))

    there = run([Factors(f.B.cuda(), f.A.cuda(), f.s) for f in fs])
    assert there.is_cuda
    close(there.cpu(), run(fs), 1e-9)


class TestOperator:
    @staticmethod
    def spd(n, cond, gen, rank=None):
        Q = torch.linalg.qr(randn(n, n, gen=gen))[0][:, :rank]
        return (Q*torch.logspace(0, -math.log10(cond), Q.shape[1], dtype=F64)) @ Q.T

    @quick
    @given(
        n=st.integers(1, 30),
        cond=st.floats(1, 1e6),
        seed=st.integers(0, 2**31),
        unit=st.sampled_from([1e-12, 1.0, 1e12]),
        dtype=st.sampled_from([F64, torch.float32]),
    )
    def test_sums_and_solutions(self, n, cond, seed, unit, dtype):
        gen = torch.Generator().manual_seed(seed)
        A, B, d, b = (
            self.spd(n, cond, gen),
            self.spd(n, cond, gen),
            torch.rand(n, generator=gen, dtype=F64),
            randn(n, gen=gen),
        )

        def op(A):
            A = (unit*A).to(dtype)
            return Operator(lambda v: A @ v)

        D = Diagonal((unit*d).to(dtype))
        eps = torch.finfo(dtype).eps
        for G, dense in (
            (op(A), A),
            (0.3*op(A) + 2.0*op(B), 0.3*A + 2*B),
            (op(A) + 0.5*D, A + 0.5*d.diag()),
            (0.5*D + op(A), A + 0.5*d.diag()),
            (op(A) + Diagonal(unit*2.0), A + 2*torch.eye(n, dtype=F64)),
        ):
            x = G.solve((unit*dense @ b).to(dtype)).double()
            assert (dense @ (x - b)).norm() <= 1e4*eps*b.norm()
            if dtype == F64:
                close(x, torch.linalg.solve(dense, dense @ b), 1e3*eps*cond)

    @quick
    @given(
        n=st.integers(4, 30), seed=st.integers(0, 2**31), noise=st.sampled_from([0.0, 1e-12, 1e-8])
    )
    def test_what_no_metric_reaches_is_left_alone(self, n, seed, noise):
        gen = torch.Generator().manual_seed(seed)
        A = self.spd(n, 50, gen, n//2)
        null = torch.linalg.eigh(A)[1][:, 0]
        want = randn(n, gen=gen)
        want = torch.linalg.pinv(A, hermitian=True) @ (A @ want)
        G = Operator(lambda v: A @ v)
        assert (G.solve(A @ want + noise*null) - want).norm() <= (
            1e-9 + 1e3*noise
        )*want.norm()
        assert (
            G.solve(1e-17*randn(n, gen=gen)).norm() < 1e-13
            and not G.solve(torch.zeros(n, dtype=F64)).any()
        )

    def test_each_problem_of_a_batch_has_its_own_tolerance(self):
        gen = torch.Generator().manual_seed(0)
        A = torch.stack([self.spd(12, c, gen) for c in (2.0, 100.0, 1e4)])
        b = randn(3, 12, gen=gen)*torch.tensor([[1e-12], [1.0], [1e12]], dtype=F64)
        x = Operator(lambda v: (A @ v[..., None])[..., 0], lead=1).solve(b)
        for i in range(3):
            assert (A[i] @ x[i] - b[i]).norm() <= 1e-10*b[i].norm()

    def test_a_diagonal_is_a_preconditioner(self):
        gen = torch.Generator().manual_seed(0)
        u = torch.logspace(0, 5, 30, dtype=F64)
        A = u[:, None]*self.spd(30, 10.0, gen)*u
        calls = []
        x = Operator(lambda v: (calls.append(1), A @ v)[1], A.diagonal()).solve(
            A @ torch.ones(30, dtype=F64)
        )
        close(x, torch.ones(30, dtype=F64), 1e-9)
        assert len(calls) < 80

    def test_what_is_wrong_is_said(self):
        A = self.spd(10, 10.0, torch.Generator().manual_seed(0))
        b = torch.ones(10, dtype=F64)
        with pytest.raises(ValueError, match="negative curvature"):
            Operator(lambda v: -(A @ v)).solve(b)
        ill = self.spd(40, 1e14, torch.Generator().manual_seed(0))
        with pytest.warns(SolveWarning, match="ill-conditioned"):
            Operator(lambda v: ill @ v).solve(torch.ones(40, dtype=F64))
        assert Operator(lambda v: A @ v).solve(torch.full((10,), math.nan, dtype=F64)).isnan().all()
        assert as_numbers(None, 2) == [1.0, 1.0]

    def test_a_mean_with_coupled_metrics(self):
        gen = torch.Generator().manual_seed(0)
        A = [self.spd(8, 100.0, gen) for _ in range(3)]
        x = [randn(8, gen=gen) for _ in A]
        got = frechet_mean(
            FLAT,
            [Point(y, Operator(lambda v, B=B: B @ v)) for y, B in zip(x, A)],
            WEIGHTS[:3],
        )
        assert got.converged
        close(
            got.x,
            torch.linalg.solve(
                sum(w*B for w, B in zip(WEIGHTS, A)),
                sum(w*B @ y for w, B, y in zip(WEIGHTS, A, x)),
            ),
            1e-10,
        )
        check_geometry(Euclidean(), x, Gs=[Operator(lambda v, B=B: B @ v) for B in A])


class TestPinned:
    @quick
    @given(
        m=st.integers(2, 8),
        n=st.integers(2, 8),
        ranks=st.lists(st.integers(1, 3), min_size=2, max_size=4),
        seed=st.integers(0, 2**31),
        mu=st.floats(1e-4, 10),
    )
    def test_against_kronecker_matrices(self, m, n, ranks, seed, mu):
        fs, _ = draw(m, n, [min(r, m, n) for r in ranks], seed)
        ws = [w/sum(WEIGHTS[: len(fs)]) for w in WEIGHTS[: len(fs)]]
        A = b = 0
        for w, f in zip(ws, fs):
            U, _, V = svd(f)
            PU, PV = U @ U.T, V @ V.T
            P = (
                torch.kron(PU, torch.eye(n, dtype=F64))
                + torch.kron(torch.eye(m, dtype=F64), PV)
                - 1.5*torch.kron(PU, PV)
            )
            close((tangent_metric(f) @ f.delta()).flatten(), P @ f.delta().flatten(), 1e-11)
            P = P + mu*torch.eye(m*n, dtype=F64)
            A = A + w*P
            b = b + w*P @ f.delta().flatten()
        close(inner(Pinned(mu), fs, ws)[0].flatten(), torch.linalg.solve(A, b), 1e-10)

    def test_limits(self):
        fs, gen = draw(9, 8, (2, 3), 1)
        plain = (fs[0].delta() + fs[1].delta())/2
        close(inner(Pinned(1e8), fs)[0], plain, 1e-6)
        P, Q = torch.linalg.qr(randn(9, 9, gen=gen))[0], torch.linalg.qr(randn(8, 8, gen=gen))[0]
        apart = [Factors(P[:, :2], Q[:2]), Factors(P[:, 2:5], Q[2:5])]
        close(inner(Pinned(1e-9), apart)[0], apart[0].delta() + apart[1].delta(), 1e-7)
        for mu in (1e-6, 0.05, 1e3):
            close(inner(Pinned(mu), [fs[0], gauge(fs[0], 1e3, gen)])[0], fs[0].delta(), 1e-10)
        toy = [
            Factors(torch.full((1, 1), p, dtype=F64), torch.ones(1, 1, dtype=F64))
            for p in (2.0, 0.5, 3.0)
        ]
        assert math.isclose(inner(Pinned(), toy, [0.5, 0.3, 0.2])[0].item(), 1.75, rel_tol=1e-12)

    @pytest.mark.parametrize("mu", [0.0, -1.0, math.nan])
    def test_no_damping_is_refused(self, mu):
        with pytest.raises(ValueError, match="must be > 0"):
            Pinned(mu)


class TestWasserstein:
    @quick
    @given(
        m=st.integers(1, 9),
        n=st.integers(1, 9),
        ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        seed=st.integers(0, 2**31),
    )
    def test_distance_is_bures(self, m, n, ranks, seed):
        fs, gen = draw(m, n, [min(r, m, n) for r in ranks], seed)

        def d2(fs):
            (a, b), _ = Wasserstein().chart(fs)
            return float((BuresWasserstein().log(a.x, b.x)**2).sum())

        Z = [torch.cat([U*S.sqrt(), V*S.sqrt()]) for U, S, V in map(svd, fs)]
        want = float(
            (Z[0]**2).sum() + (Z[1]**2).sum() - 2*torch.linalg.svdvals(Z[0].T @ Z[1]).sum()
        )
        unit = float((Z[0]**2).sum())
        assert (
            abs(d2(fs) - want) <= 1e-11*unit
            and abs(d2([gauge(f, 1e3, gen) for f in fs[::-1]]) - want) <= 1e-9*unit
        )

    def test_toy(self):
        toy = [
            Factors(torch.full((1, 1), p, dtype=F64), torch.ones(1, 1, dtype=F64))
            for p in (-2.0, -0.5, -3.0)
        ]
        assert math.isclose(
            inner(Wasserstein(), toy, [0.5, 0.3, 0.2])[0].item(),
            -((0.5*2**0.5 + 0.3*0.5**0.5 + 0.2*3**0.5)**2),
            rel_tol=1e-9,
        )

    def test_two_models_are_the_middle_of_a_geodesic(self):
        fs, _ = draw(9, 8, (3, 2), 1)
        space, (a, b) = BuresWasserstein(), Wasserstein().chart(fs).points
        m = frechet_mean(space, [a, b]).x
        d = [float(space.log(x, y).norm()) for x, y in ((a.x, m), (m, b.x), (a.x, b.x))]
        assert math.isclose(d[0], d[1], rel_tol=1e-8) and math.isclose(
            d[0] + d[1], d[2], rel_tol=1e-8
        )

    def test_rank_is_kept(self):
        fs, _ = draw(20, 15, (3, 3, 2), 0)
        assert (
            mean_of(LoRA(metric="wasserstein"), fs)[0].rank == 3
            and int(torch.linalg.matrix_rank(merged(Wasserstein(), fs))) == 3
        )

    def test_against_geomstats(self):
        import numpy as np

        from frechet_merge.geometries.manifold import import_geomstats

        import_geomstats()
        from geomstats.geometry.spd_matrices import SPDBuresWassersteinMetric, SPDMatrices
        from geomstats.learning.frechet_mean import FrechetMean

        gen = torch.Generator().manual_seed(0)
        base = randn(2, 2, 4, gen=gen)
        Z = [base + 0.3*randn(2, 2, 4, gen=gen) for _ in range(3)]
        space = SPDMatrices(4, equip=False)
        space.equip_with_metric(SPDBuresWassersteinMetric)

        def psd(z):
            z = z.flatten(0, 1)
            return (z @ z.T).numpy()

        oracle = FrechetMean(space)
        oracle.optimizer.epsilon, oracle.optimizer.max_iter = 1e-24, 500
        their = oracle.fit(
            np.stack([psd(z) for z in Z]), weights=np.array([0.5, 0.3, 0.2])
        ).estimate_
        np.testing.assert_allclose(
            psd(frechet_mean(BuresWasserstein(), [Point(z) for z in Z], [0.5, 0.3, 0.2]).x),
            their,
            atol=1e-8,
        )
        assert math.isclose(
            space.metric.squared_dist(psd(Z[0]), psd(Z[1])),
            float((BuresWasserstein().log(Z[0], Z[1])**2).sum()),
            rel_tol=1e-8,
        )


def ties_literally(X, density, ws):
    kept, out = [], torch.zeros_like(X[0])
    for x in X:
        large = sorted(x.abs().flatten().tolist(), reverse=True)[: max(1, int(density*x.numel()))]
        kept.append([v if abs(v) >= large[-1] else 0.0 for v in x.flatten().tolist()])
    for j, row in enumerate(zip(*kept)):
        sign = math.copysign(1, sum(row))
        agree = [(w, v) for w, v in zip(ws, row) if v*sign > 0]
        if agree:
            out.view(-1)[j] = sum(w*v for w, v in agree)/sum(w for w, _ in agree)
    return out


@quick
@given(**ADAPTERS, density=st.floats(0.05, 1))
def test_knots_is_literal_ties_in_the_joint_bases(m, n, ranks, seed, density):
    fs, _ = draw(m, n, ranks, seed)
    W, ws = [f.delta() for f in fs], WEIGHTS[: len(fs)]
    (U, S, _), (_, R, Vt) = torch.linalg.svd(torch.cat(W, 1)), torch.linalg.svd(torch.cat(W, 0))
    U, V = U[:, : int((S > 1e-6*S[0]).sum())], Vt[: int((R > 1e-6*R[0]).sum())].T
    close(
        merged(KnOTS(density), fs, ws),
        U @ ties_literally([U.T @ w @ V for w in W], density, ws) @ V.T,
        1e-9,
    )


def tsvm_dense(W, ks):
    """As published, with α = 1, on m×n matrices; and how far its polar factors are from not being
    unique."""
    parts = [torch.linalg.svd(w, full_matrices=False) for w in W]
    (P, D, Q), (R, E, S) = (
        torch.linalg.svd(X, full_matrices=False)
        for X in (
            torch.cat([p[0][:, :k] for p, k in zip(parts, ks)], 1),
            torch.cat([p[2][:k] for p, k in zip(parts, ks)]),
        )
    )
    return P @ Q @ torch.cat([p[1][:k] for p, k in zip(parts, ks)]).diag() @ R @ S, float(
        min(D[-1], E[-1])
    )


@quick
@given(**ADAPTERS, k=st.sampled_from([None, 1, 2]), spread=st.sampled_from([0.2, 1.0, 10.0]))
def test_tsvm_is_dense_tsvm(m, n, ranks, seed, k, spread):
    fs, _ = draw(m, n, ranks, seed, spread=spread)
    ks, room = [min(r, k or r) for r in ranks], min(m, n, sum(ranks))
    if sum(ks) > room:
        ks = [min(r, room//len(ks)) for r in ks]
    want, narrow = tsvm_dense([f.delta() for f in fs], ks)
    assume(narrow > 1e-3)
    close(merged(TSVM(k), fs), want, 1e-10)


def test_tsvm_on_updates_of_full_rank_is_the_published_rule():
    gen = torch.Generator().manual_seed(0)
    fs = [Factors(randn(9, 8, gen=gen), randn(8, 8, gen=gen)) for _ in range(3)]
    close(merged(TSVM(), fs), tsvm_dense([f.delta() for f in fs], [8//3]*3)[0], 1e-10)


def test_tsvm_names_the_copies_and_returns_the_copy():
    fs, gen = draw(12, 9, (2, 2), 0)
    three = core([fs[0], fs[1], gauge(fs[1], 1e3, gen)])[2]
    with pytest.warns(UserWarning, match="updates 1 and 2 have a direction in common"):
        TSVM().chart(three)
    close(merged(TSVM(), [fs[0]]*3), fs[0].delta(), 1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TSVM().chart(core(fs)[2])
    assert NARROW < 1e-3


@pytest.mark.parametrize(
    "wrong", [lambda: KnOTS(0), lambda: KnOTS(20), lambda: TSVM(0), lambda: TSVM(1.5)]
)
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match="keep"):
        wrong()


def test_knots_refuses_vectors():
    with pytest.raises(ValueError, match="needs matrices"):
        KnOTS().chart([torch.ones(3), torch.ones(3)])


@pytest.mark.parametrize("whole", [Wasserstein(), LoRA(metric="wasserstein")], ids=str)
@pytest.mark.parametrize("dtype, cond", [(F64, 1e3), (torch.float32, 3.0)], ids=str)
def test_adapters_that_cancel_have_no_wasserstein_mean(whole, dtype, cond):
    gen = torch.Generator().manual_seed(0)
    for _ in range(5):
        f = Factors(randn(9, 3, gen=gen), randn(3, 7, gen=gen))
        h = gauge(Factors(-f.B, f.A), cond, gen)
        m, info = mean_of(
            whole,
            [Factors(x.B.to(dtype), x.A.to(dtype)) for x in (gauge(f, cond, gen), h)],
            warn=False,
        )
        assert info.lost == 2 and not m.delta().any()
        # what is left of these is no rounding
        chart = whole.chart([f, Factors(-0.999*f.B, f.A)])
        start = chart.space.start(chart.points, [0.5, 0.5])
        close(chart.lift(start).delta(), 0.0005*f.delta(), 1e-9)


def test_adapters_at_right_angles_have_no_wasserstein_mean():
    """All rotations are equally good: what is returned must not depend on how the factors are
    written."""
    gen = torch.Generator().manual_seed(0)
    Q, R = (
        torch.linalg.qr(torch.randn(9, 9, generator=gen, dtype=torch.float64))[0] for _ in range(2)
    )
    fs = [
        Factors(
            Q[:, 2*t : 2*t + 2]*torch.tensor([3 - t, 2.5 - t], dtype=torch.float64),
            R[:, 2*t : 2*t + 2].T,
        )
        for t in range(2)
    ]
    M = torch.linalg.qr(torch.randn(2, 2, generator=gen, dtype=torch.float64))[0]*torch.tensor(
        [1.0, 10.0], dtype=torch.float64
    )
    other = [Factors(f.B @ M, torch.linalg.inv(M) @ f.A) for f in fs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (a, x), (b, _) = mean_of(Wasserstein(), fs), mean_of(Wasserstein(), other)
    assert x.lost == 1 and "no single shortest path" in x.problem
    torch.testing.assert_close(a.delta(), b.delta(), rtol=1e-9, atol=1e-9)
    # the start is zero, from which no way is the shortest
    opposite = [fs[0], Factors(-fs[0].B, fs[0].A)]
    got, mean = mean_of(Wasserstein(), opposite, warn=False)
    assert mean.lost == 2 and got.delta().norm() < 1e-12

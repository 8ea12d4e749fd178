"The labeled basis, EpiMer, and what curvature is worth in it."

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hs

from frechet_merge import MergeError, check_geometry, merge
from frechet_merge.algebra.factors import Factors
from frechet_merge.curvature.forms import projected_diagonal, projected_kronecker
from frechet_merge.geometries.baselines import TSVM
from frechet_merge.geometries.lora import LoRA
from frechet_merge.geometries.subspace import (
    LARGE,
    EpiMer,
    Eta,
    _projected,
    _turned,
    error_bound,
    eta,
    labeled_basis,
    top_svd,
)
from frechet_merge.geometries.geometry import Euclidean
from frechet_merge.spaces.space import Point
from frechet_merge.geometries.laws import mean_of
from frechet_merge.metrics.kinds import Dense, Diagonal
from frechet_merge.metrics.kronecker import Kronecker
from frechet_merge.metrics.operator import Operator
from frechet_merge.metrics.units import MetricWarning, as_metric
from frechet_merge.files.stack import Stack

SHAPES = [(9, 9), (14, 8), (8, 14)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def cov(n, rank=None):
    X = rand(n, rank or n)
    return X @ X.T/n


def gap(a, b):
    return float((a - b).norm()/b.norm())


def atoms(b):
    return torch.stack([torch.outer(u, v).flatten() for u, v in zip(b.U.T, b.V.T)], 1)


def dense(G, m, n):
    return torch.stack(
        [
            (as_metric(G) @ e).flatten()
            for e in torch.eye(m*n, dtype=torch.float64).view(-1, m, n)
        ],
        1,
    )


def published(deltas, k):
    "TSV-M by full decompositions."
    parts = [torch.linalg.svd(x.double(), full_matrices=False) for x in deltas]
    U, S, V = (
        torch.cat([p[0][:, :k] for p in parts], 1),
        torch.cat([p[1][:k] for p in parts]),
        torch.cat([p[2][:k] for p in parts], 0),
    )
    (P, _, Q), (R, _, B) = (torch.linalg.svd(X, full_matrices=False) for X in (U, V))
    return P @ Q @ S.diag() @ R @ B


def some_metrics(kind, m, n, T):
    return {
        "diagonal": lambda: rand(m, n)**2,
        "sparse": lambda: (rand(m, n)**2)*(rand(m, n) > 1),
        "number": lambda: float(torch.rand(())) + 0.1,
        "Kronecker": lambda: Kronecker((cov(m), cov(n))),
        "one side": lambda: Kronecker((None, cov(n))),
        "two and flat": lambda: Kronecker((cov(m), cov(n)), (None, cov(n)), flat=0.2),
        "diagonal factor": lambda: Kronecker((rand(m)**2, cov(n))),
        "operator": lambda: (lambda L, R: Operator(lambda x: L @ x @ R))(cov(m), cov(n)),
        "singular": lambda: Kronecker((cov(m, 2), cov(n, 2))),
    }, [kind]*T


def make(kind, m, n, T=3):
    kinds, names = some_metrics(kind, m, n, T)
    return [kinds[k]() for k in names]


KINDS = [
    "diagonal",
    "sparse",
    "number",
    "Kronecker",
    "one side",
    "two and flat",
    "diagonal factor",
    "operator",
    "singular",
]


@pytest.mark.parametrize("shape", [(40, 40), (60, 30), (30, 60)])
@pytest.mark.parametrize("k", [1, 5, 12, 30])
def test_top_svd_is_the_top_of_the_svd(shape, k):
    X = rand(*shape)
    U, S, V = top_svd(X, k)
    P, D, Qt = torch.linalg.svd(X, full_matrices=False)
    assert U.shape == (shape[0], k) and V.shape == (shape[1], k) and S.dtype == torch.float64
    torch.testing.assert_close(S, D[:k], rtol=1e-12, atol=0)
    torch.testing.assert_close((U*S) @ V.T, (P[:, :k]*D[:k]) @ Qt[:k], rtol=0, atol=1e-11)
    for A in (U, V):
        torch.testing.assert_close(A.T @ A, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_top_svd_at_any_scale(scale):
    X = rand(12, 9)
    S = top_svd(scale*X, 4)[1]
    torch.testing.assert_close(S/scale, torch.linalg.svdvals(X)[:4], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "spectrum",
    [
        0.5**torch.arange(40.0),
        10.0**-torch.arange(40.0),
        torch.ones(40),
        (torch.arange(40) < 3).float(),
    ],
)
def test_top_svd_where_the_gram_matrix_is_not_enough(spectrum):
    U, V = (torch.linalg.qr(rand(s, 40))[0] for s in (60, 40))
    X = (U*spectrum) @ V.T
    P, S, Q = top_svd(X, 20)
    assert float((S - spectrum.double()[:20]).abs().max()) < 1e-12
    for A in (P, Q):
        assert float((A.T @ A - torch.eye(20)).abs().max()) < 1e-9
    if spectrum[20] < 0.5:
        assert float(((P*S) @ Q.T - X).norm()) < float(spectrum[20:].norm()) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_top_svd_reads_any_dtype(dtype):
    X = rand(20, 10).to(dtype)
    torch.testing.assert_close(
        top_svd(X, 3)[1], torch.linalg.svdvals(X.double())[:3], rtol=1e-12, atol=0
    )


def test_top_svd_of_nothing_and_of_nan():
    U, S, V = top_svd(torch.zeros(6, 4), 2)
    assert not S.any() and torch.equal(U.T @ U, torch.eye(2).double()) and V.shape == (4, 2)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            top_svd(torch.full((6, 4), bad), 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", [1, 2, 3, 8])
def test_atoms_are_orthonormal_and_labeled(shape, T):
    W = [rand(*shape) for _ in range(T)]
    b, k = labeled_basis(W), min(shape)//T
    S = atoms(b)
    torch.testing.assert_close(S.T @ S, torch.eye(k*T, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (
        b.label.tolist() == [t for t in range(T) for _ in range(k)] and b.label.dtype == torch.long
    )
    torch.testing.assert_close(
        b.sigma, torch.cat([torch.linalg.svdvals(w)[:k] for w in W]), rtol=1e-10, atol=0
    )


@settings(max_examples=25, deadline=None)
@given(
    hs.integers(1, 5),
    hs.integers(5, 14),
    hs.integers(5, 14),
    hs.integers(1, 3),
    hs.integers(0, 10**6),
)
def test_without_metrics_it_is_tsvm(T, m, n, k, seed):
    torch.manual_seed(seed)
    W = [rand(m, n) for _ in range(T)]
    k = min(k, min(m, n)//T)
    want = published(W, k)
    assert gap(mean_of(EpiMer(k), W)[0], want) < 1e-12
    H = Kronecker((cov(m), cov(n)))
    # equal curvature, through the solver
    assert gap(mean_of(EpiMer(k), W, Gs=[H]*T)[0], want) < 1e-11
    assert (
        gap(
            mean_of(EpiMer(k, damping=1e14), W, Gs=[Kronecker((cov(m), cov(n))) for _ in range(T)])[
                0
            ],
            want,
        )
        < 1e-12
    )


def test_equal_curvature_is_tsvm_to_the_last_digits():
    W = [rand(14, 12) for _ in range(3)]
    H = cov(12) + torch.eye(12, dtype=torch.float64)
    tsvm = mean_of(EpiMer(), W)[0]
    for G in (Dense(H), Kronecker((cov(14), cov(12))), rand(14, 12)**2, 7.0):
        for damping in (0.0, 1e-2):
            assert gap(mean_of(EpiMer(damping=damping), W, Gs=[G]*3)[0], tsvm) < 1e-12
    assert gap(mean_of(EpiMer(coordinates="projected"), W, Gs=[Dense(H)]*3)[0], tsvm) > 1e-3
    assert (
        gap(
            mean_of(EpiMer(coordinates="projected"), W, Gs=[Dense(H)]*3)[0],
            mean_of(EpiMer(coordinates="projected"), W)[0],
        )
        < 1e-12
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_projects_as_if_written_out(kind, shape):
    b = labeled_basis([rand(*shape) for _ in range(3)], 2)
    S = atoms(b)
    p = len(b.sigma)
    G = make(kind, *shape, 1)[0]
    H = _projected(G, b)
    got = H.M if isinstance(H, Dense) else H.d*torch.eye(p, dtype=torch.float64)
    assert gap(got, S.T @ dense(G, *shape) @ S) < 1e-10
    torch.testing.assert_close(got, got.T)


def test_projections_by_name():
    b = labeled_basis([rand(14, 9) for _ in range(3)])
    v, L, R = rand(14, 9)**2, cov(14), cov(9)
    S = atoms(b)
    assert gap(projected_diagonal(v, b.U, b.V), S.T @ v.flatten().diag() @ S) < 1e-12
    assert gap(_projected(v.float(), b).M, S.T @ v.flatten().diag() @ S) < 1e-5
    assert gap(projected_kronecker(L, R, b.U, b.V), S.T @ torch.kron(L, R) @ S) < 1e-12
    assert (
        gap(
            projected_kronecker(None, R.diagonal(), b.U, b.V),
            S.T @ torch.kron(torch.eye(14).double(), R.diagonal().diag()) @ S,
        )
        < 1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coordinates", ["labeled", "projected"])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_formula(kind, coordinates, normalise):
    shape, ws = (14, 9), [0.5, 0.3, 0.2]
    W = [rand(*shape) for _ in ws]
    Gs = make(kind, *shape)
    b = labeled_basis(W)
    S = atoms(b)
    Hs = [S.T @ dense(G, *shape) @ S for G in Gs]
    if normalise:
        Hs = [H/H.diagonal().mean() for H in Hs]
    mu = 0.1*sum(H.diagonal().mean() for H in Hs)/3
    Hs = [H + mu*torch.eye(len(H), dtype=torch.float64) for H in Hs]
    xs = (
        [S.T @ w.flatten() for w in W]
        if coordinates == "projected"
        else [b.sigma*(b.label == t) for t in range(3)]
    )
    want = (
        0.7
        * 3
        * S
        @ torch.linalg.solve(
            sum(w*H for w, H in zip(ws, Hs)), sum(w*H @ x for w, H, x in zip(ws, Hs, xs))
        )
    )
    got, info = mean_of(
        EpiMer(coordinates=coordinates, alpha=0.7, damping=0.1, normalise=normalise), W, ws, Gs
    )
    assert gap(got, want.view(shape)) < 1e-9 and info.converged


def test_units():
    W, Gs = [rand(10, 9) for _ in range(3)], make("Kronecker", 10, 9)
    one = mean_of(EpiMer(), W, Gs=Gs)[0]
    assert gap(mean_of(EpiMer(), W, Gs=[1e6*G for G in Gs])[0], one) < 1e-9
    assert gap(mean_of(EpiMer(), W, Gs=[1e3*Gs[0], *Gs[1:]])[0], one) > 0.1
    assert (
        gap(
            mean_of(EpiMer(normalise=True), W, Gs=[1e3*Gs[0], *Gs[1:]])[0],
            mean_of(EpiMer(normalise=True), W, Gs=Gs)[0],
        )
        < 1e-9
    )


@settings(max_examples=40, deadline=None)
@given(
    hs.sampled_from(KINDS),
    hs.integers(1, 5),
    hs.integers(2, 7),
    hs.integers(2, 7),
    hs.integers(0, 10**6),
)
def test_eta_is_the_fall_of_the_surrogate(kind, T, m, n, seed):
    torch.manual_seed(seed)
    W, Gs, ws = [rand(m, n) for _ in range(T)], make(kind, m, n, T), torch.rand(T).add(0.1).tolist()
    ws = [w/sum(ws) for w in ws]

    def F(d):
        return sum(
            w*float(((d - x)*(as_metric(G) @ (d - x))).sum()) for w, x, G in zip(ws, W, Gs)
        )

    plain, found = sum(w*x for w, x in zip(ws, W)), eta([Point(x, G) for x, G in zip(W, Gs)], ws)
    A = sum(w*dense(G, m, n) for w, G in zip(ws, Gs))
    c = sum(w*(as_metric(G) @ (x - plain)) for w, x, G in zip(ws, W, Gs)).flatten()
    best = plain + (torch.linalg.pinv(A, rtol=1e-12, hermitian=True) @ c).view(m, n)
    unit = max(F(plain), 1e-300)
    assert (
        found.eta >= 0
        and abs(found.F - F(plain)) <= 1e-10*unit
        and abs(found.eta - (F(plain) - F(best))) <= 1e-9*unit
    )
    assert 0 <= found.ratio <= 1 + 1e-9


@settings(max_examples=25, deadline=None)
@given(hs.integers(2, 4), hs.integers(1, 6), hs.integers(0, 10**6))
def test_eta_in_the_basis_to_1e_12(T, rank, seed):
    torch.manual_seed(seed)
    W = [rand(12, 9) for _ in range(T)]
    points, _ = EpiMer(damping=1e-3).chart(
        W, [Kronecker((cov(12, rank), cov(9, rank))) for _ in range(T)]
    )
    A = sum(p.G.M for p in points)/T
    flat = sum(p.x for p in points)/T
    c = sum(p.G.M @ (p.x - flat) for p in points)/T
    best = flat + torch.linalg.solve(A, c)

    def F(d):
        return sum(float((d - p.x) @ p.G.M @ (d - p.x)) for p in points)/T

    found = eta(points)
    assert abs(found.eta - (F(flat) - F(best))) <= 1e-12*F(flat) and found.eta >= 0


def test_eta_is_zero_where_curvatures_agree_and_adds_up():
    W, H = [rand(6, 5) for _ in range(3)], rand(6, 5)**2
    assert eta([Point(x, H) for x in W]).ratio < 1e-25 and eta([Point(x) for x in W]).ratio < 1e-25
    a, b = (eta([Point(rand(6, 5), rand(6, 5)**2) for _ in range(3)]) for _ in range(2))
    assert sum([a, b]) == Eta(a.eta + b.eta, a.F + b.F) and Eta(0.0, 0.0).ratio == 0


@settings(max_examples=25, deadline=None)
@given(
    hs.sampled_from(["labeled", "projected"]),
    hs.sampled_from(["diagonal", "Kronecker", "singular", "two and flat"]),
    hs.integers(1, 3),
    hs.integers(0, 10**6),
)
def test_the_bound_holds_for_quadratic_losses(kind, metric, k, seed):
    torch.manual_seed(seed)
    W, Gs, ws = [rand(10, 9) for _ in range(3)], make(metric, 10, 9), [0.5, 0.3, 0.2]
    b = labeled_basis(W, k)
    V, R = error_bound(W, Gs, b, ws, kind)
    at = b.lift(
        mean_of(
            Euclidean(), b.coordinates(W, kind), ws, [_projected(G, b) for G in Gs], warn=False
        )[0]
    )
    lost = sum(
        w*0.5*float(((at - x)*(as_metric(G) @ (at - x))).sum()) for w, x, G in zip(ws, W, Gs)
    )
    assert V >= -1e-12 and R >= 0 and lost <= (V + R)*(1 + 1e-9)


def test_adapters_multiplied_out_are_tsvm_on_factors():
    for ranks in ((2, 2, 2), (1, 3, 2)):
        fs = [Factors(rand(14, r), rand(r, 12)) for r in ranks]
        want = mean_of(LoRA(metric=TSVM()), fs)[0].delta()
        assert gap(mean_of(EpiMer(), [f.delta() for f in fs])[0], want) < 1e-10
    fs = [Factors(rand(14, 2), rand(2, 12)) for _ in range(3)]
    assert (
        gap(
            mean_of(LoRA(metric=EpiMer()), fs)[0].delta(),
            mean_of(LoRA(metric=TSVM()), fs)[0].delta(),
        )
        < 1e-10
    )


@pytest.mark.filterwarnings("ignore:.*no room")
@pytest.mark.parametrize("shape", [(7,), (2, 9), (4, 3, 2, 2), (1, 1)])
def test_what_is_no_matrix_gets_the_mean(shape):
    W = [rand(*shape) for _ in range(3)]
    Gs = [rand(*shape)**2 + 0.1 for _ in range(3)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.testing.assert_close(
            mean_of(EpiMer(alpha=0.3), W, [0.5, 0.3, 0.2])[0], 0.5*W[0] + 0.3*W[1] + 0.2*W[2]
        )
        torch.testing.assert_close(
            mean_of(EpiMer(), W, Gs=Gs)[0], sum(G*w for G, w in zip(Gs, W))/sum(Gs)
        )
    assert len(said) == (2 if len(shape) == 2 else 0)


def test_zero_updates():
    zero = [torch.zeros(50, 8) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(mean_of(EpiMer(), zero)[0], zero[0]) and torch.equal(
            mean_of(EpiMer(), zero, Gs=[torch.ones(50, 8)]*3)[0], zero[0]
        )
        W = [rand(50, 8), torch.zeros(50, 8).double(), rand(50, 8)]
        b = labeled_basis(W)
        assert b.label.tolist() == [0, 0, 2, 2]
        assert gap(mean_of(EpiMer(), W)[0], published(W[::2], 2)) < 1e-12
        assert not len(labeled_basis(zero).sigma)


def test_duplicates_are_named():
    a, c = rand(9, 8), rand(9, 8)
    with pytest.warns(UserWarning, match="updates 0 and 2 have a direction in common"):
        b = labeled_basis([a, c, a])
    assert b.U.isfinite().all() and b.lift(b.sigma).isfinite().all()
    with pytest.warns(UserWarning, match="updates 0 and 1 .*1.0000000"):
        x = mean_of(EpiMer(2), [a, a])[0]
    # they share it
    k = torch.linalg.svd(a)
    assert gap(x, (k[0][:, :2]*k[1][:2]) @ k[2][:2]) < 1e-7


def test_k_is_capped_with_a_message():
    W = [rand(9, 8) for _ in range(3)]
    with pytest.warns(
        UserWarning, match=r"k = 5 triplets of each of 3 models do not fit into \[9, 8\].*first 2"
    ):
        b = labeled_basis(W, 5)
    assert len(b.sigma) == 6
    with pytest.raises(ValueError, match="no room for a direction of each of 9"):
        labeled_basis([rand(9, 8)]*9)
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="at least one"):
            EpiMer(bad)
    with pytest.raises(ValueError, match="labeled"):
        EpiMer(coordinates="both")


def test_metrics_that_do_not_fit_or_are_none():
    W = [rand(9, 8) for _ in range(3)]
    with pytest.raises(ValueError, match=r"projected metric of \[4, 4\] is not of a basis of 6"):
        EpiMer().chart(W, [Dense(cov(4))]*3)
    with pytest.warns(MetricWarning, match="the metric of model 0"):
        EpiMer().chart(W, [Dense(cov(6) - 0.5*torch.eye(6)), Dense(cov(6)), Dense(cov(6))])
    with pytest.raises(ValueError, match="finite"):
        EpiMer().chart(W, [Dense(cov(6)*math.nan)]*3)
    mixed = mean_of(EpiMer(), W, Gs=[2.0, rand(9, 8)**2, Kronecker((cov(9), None))])[1]
    assert mixed.converged


def test_a_large_ill_conditioned_basis_is_whitened_to_seven_digits():
    Q = torch.linalg.qr(rand(LARGE//3, 4))[0]
    for angle, sure in ((1e-3, True), (1.1e-4, True), (1e-5, True), (1e-8, False)):
        U = torch.stack(
            [Q[:, 0], angle*Q[:, 1] + Q[:, 0]*(1 - angle**2)**0.5, Q[:, 2], Q[:, 3]], 1
        )
        X, found = _turned(U)
        P, _, Qt = torch.linalg.svd(U, full_matrices=False)
        assert found == sure
        if sure:
            assert gap(X, P @ Qt) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_and_stacks(dtype):
    W = [rand(12, 9).to(dtype) for _ in range(3)]
    got, info = mean_of(EpiMer(), W)
    assert got.dtype == dtype and got.shape == (12, 9) and info.converged
    assert gap(got.double(), published(W, 3)) < max(1e-13, 4*torch.finfo(dtype).eps)
    lazy = mean_of(EpiMer(), Stack.of(W))[0]
    assert gap(lazy.double(), published(W, 3)) < 4e-7


@pytest.mark.parametrize(
    "g",
    [
        EpiMer(),
        EpiMer(1),
        EpiMer(coordinates="projected"),
        EpiMer(1, alpha=0.5, damping=0.0, normalise=True),
    ],
)
@pytest.mark.parametrize("kind", [None, "diagonal", "Kronecker"])
@pytest.mark.filterwarnings("ignore:.*direction in common")
def test_laws(g, kind):
    Gs = make(kind, 4, 6) if kind else None
    found = check_geometry(g, Gs=Gs)
    assert 1 in found and 7 in found and 3 not in found


@pytest.mark.filterwarnings("ignore:.*no room")
def test_merge_of_models():
    base = {
        "w": torch.zeros(12, 9),
        "head": torch.zeros(2, 9),
        "b": torch.zeros(5),
        "frozen": torch.ones(6, 6),
    }
    models = [
        {
            "w": torch.randn(12, 9),
            "head": torch.randn(2, 9),
            "b": torch.randn(5),
            "frozen": torch.ones(6, 6),
        }
        for _ in range(3)
    ]
    with pytest.warns(UserWarning, match="no room"):
        out = merge(models, EpiMer(), base=base).tensors
    assert gap(out["w"].double(), published([x["w"] for x in models], 3)) < 1e-6
    torch.testing.assert_close(out["b"], sum(x["b"] for x in models)/3)
    assert torch.equal(out["frozen"], base["frozen"])
    models[1]["w"][0, 0] = math.nan
    with pytest.raises(MergeError, match="'w' is nan"):
        merge(models, EpiMer(), base=base)


def test_diagonal_metrics_and_numbers_are_told_apart():
    b = labeled_basis([rand(9, 8) for _ in range(3)])
    assert isinstance(_projected(Diagonal(2.0), b), Diagonal) and isinstance(
        _projected(2*torch.ones(9, 8), b), Dense
    )

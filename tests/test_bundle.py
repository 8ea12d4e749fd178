"""The geomstats bundle of low-rank adapters: geomstats' own test cases on it, gauges, edges, and
the torch kernel against it."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from frechet_merge.algebra.factors import Factors
from frechet_merge.geometries.bundle import (
    AdapterMetric,
    FactorPairs,
    FixedRankMatrices,
    GLAction,
    InvariantMetric,
    gs,
)
from frechet_merge.geometries.quotient import Quotient
from frechet_merge.spaces.mean import frechet_mean
from geomstats.geometry.general_linear import GeneralLinear
from geomstats.learning.frechet_mean import FrechetMean
from geomstats.test.random import RandomDataGenerator

with warnings.catch_warnings():
    # of geomstats' own markers
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    from geomstats.test_cases.geometry.fiber_bundle import FiberBundleTestCase
    from geomstats.test_cases.geometry.group_action import GroupActionTestCase
    from geomstats.test_cases.geometry.manifold import ManifoldTestCase
    from geomstats.test_cases.geometry.quotient_metric import QuotientMetricTestCase
    from geomstats.test_cases.geometry.riemannian_metric import RiemannianMetricTestCase

KINDS, SHAPE = ("mix", "inv"), (4, 3, 2)


def adapters(kind, shape=SHAPE):
    return FixedRankMatrices(*shape, equip=False).equip_with_metric(AdapterMetric, kind=kind)


def parts(base):
    return base.metric._total_space, base.metric._total_space.fiber_bundle


def near(base, T, spread=0.1):
    total, bundle = parts(base)
    return bundle.riemannian_submersion(total.random_point() + spread*total.random_point(T))


def mean_in_geomstats(space, X, w=None, tol=1e-11):
    est = FrechetMean(space)
    est.optimizer.epsilon, est.optimizer.max_iter = tol**2/space.dim, 200
    return est.fit(X, weights=w).estimate_


@pytest.fixture(autouse=True)
def seed():
    gs.random.seed(0)


@pytest.fixture
def one_thread():
    "Tiny matrices: a second thread only waits."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


class Near(RandomDataGenerator):
    "Points and tangents near one point, so that all logarithms exist."

    def __init__(self, space, base):
        super().__init__(space)
        self.total, self.bundle = parts(base)
        self.anchor, self.down = self.total.random_point(), isinstance(space, FixedRankMatrices)

    def random_point(self, n_points=1):
        x = self.anchor + 0.1*self.total.random_point(n_points)
        return self.bundle.riemannian_submersion(x) if self.down else x

    def random_tangent_vec(self, base_point):
        return 0.1*self.space.random_tangent_vec(
            base_point, 1 if base_point.ndim == 2 else len(base_point)
        )


FIBRE = """
    riemannian_submersion_vec riemannian_submersion_belongs_to_base lift_vec
    lift_belongs_to_total_space riemannian_submersion_after_lift
    tangent_riemannian_submersion_vec tangent_riemannian_submersion_is_tangent align_vec
    log_after_align_is_horizontal horizontal_projection_vec
    horizontal_projection_is_horizontal vertical_projection_vec
    vertical_projection_is_vertical is_horizontal_vec is_vertical_vec horizontal_lift_vec
    tangent_riemannian_submersion_after_vertical_projection horizontal_lift_is_horizontal
    tangent_riemannian_submersion_after_horizontal_lift
""".split()
METRIC = """
    exp_belongs log_is_tangent exp_after_log log_after_exp geodesic_ivp_belongs
    geodesic_ivp_vec exp_geodesic_ivp inner_product_is_symmetric norm_is_positive
    normalize_is_unitary squared_dist_is_symmetric dist_is_log_norm
    dist_point_to_itself_is_zero dist_triangle_inequality
""".split()
SPACE = (
    "random_point_belongs random_point_shape to_tangent_vec to_tangent_is_tangent "
    "random_tangent_vec_is_tangent random_tangent_vec_shape"
).split()
CASES = [
    *[("bundle", c) for c in FIBRE],
    *[(s, c) for s in ("pairs", "base") for c in METRIC + SPACE],
    ("pairs", "geodesic_equation_vec"),
    ("base", "geodesic_bvp_vec"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on, case", CASES, ids=lambda s: s)
def test_geomstats_own_cases(on, case, kind):
    """What geomstats' test suite says of every fibre bundle, space and metric, on batches of one,
    two and three."""
    base = adapters(kind)
    total = parts(base)[0]
    space = base if on == "base" else total
    metric = {"base": QuotientMetricTestCase, "pairs": RiemannianMetricTestCase}
    if on == "bundle":
        suite = FiberBundleTestCase()
    else:
        suite = ManifoldTestCase() if case in SPACE else metric[on]()
    suite.space, suite.total_space, suite.base = space, total, base
    suite.data_generator, suite.base_data_generator = Near(space, base), Near(base, base)
    test = getattr(suite, f"test_{case}")
    takes = test.__code__.co_varnames[: test.__code__.co_argcount]
    for n in (1, 2) if "n_points" in takes and "dist" not in case else (2,):
        test(
            **{
                k: v
                for k, v in dict(n_points=n, n_reps=3, n_times=3, atol=1e-8).items()
                if k in takes
            }
        )


@pytest.mark.parametrize("case", ["identity_action", "action_vec", "inverse_action"])
def test_geomstats_own_cases_of_an_action(case):
    suite = GroupActionTestCase()
    suite.space, suite.group = FactorPairs(*SHAPE, equip=False), GeneralLinear(2, equip=False)
    suite.group_action = GLAction(suite.space)
    suite.setup_method()
    getattr(suite, f"test_{case}")(
        **{"atol": 1e-9, **({"n_reps": 3} if case == "action_vec" else {"n_points": 2})}
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 3, 2), (3, 5, 1), (2, 2, 2), (1, 1, 1), (2, 4, 2)], ids=str)
def test_distance_forgets_the_gauge(kind, shape):
    base = adapters(kind, shape)
    total, bundle = parts(base)
    W, V = near(base, 2)
    x, y = bundle.lift(W), bundle.lift(V)
    d = base.metric.dist(W, V)
    for _ in range(1):
        A, B = (expm(gs.random.normal(size=(shape[2],)*2)) for _ in range(2))
        x2, y2 = total.group_action(A, x), total.group_action(B, y)
        aligned = bundle.align(y2, x2)
        np.testing.assert_allclose(
            total.metric.norm(bundle.aligner.velocity(y2, x2), x2), d, rtol=1e-9
        )
        np.testing.assert_allclose(bundle.riemannian_submersion(aligned), V, atol=1e-9)
        # alignment is equivariant
        np.testing.assert_allclose(aligned, total.group_action(A, bundle.align(y, x)), atol=1e-8)
    # the unit of mix; inv has none
    np.testing.assert_allclose(
        base.metric.dist(3*W, 3*V), 3*d if kind == "mix" else d, rtol=1e-9
    )
    O, Q = (np.linalg.qr(gs.random.normal(size=(k, k)))[0] for k in shape[:2])
    np.testing.assert_allclose(base.metric.dist(O @ W @ Q.T, O @ V @ Q.T), d, rtol=1e-9)


@pytest.mark.parametrize("kind, mean", [("mix", 1.75), ("inv", 1.430969)])
def test_the_mean_of_two_parameters(kind, mean):
    X, w = np.array([2, 0.5, 3])[:, None, None], np.array([0.5, 0.3, 0.2])
    assert abs(float(mean_in_geomstats(adapters(kind, (1, 1, 1)), X, w)[0, 0]) - mean) < 1e-6


@pytest.mark.parametrize("unit", [1e-6, 1, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_no_scale_is_built_in(kind, unit):
    base = adapters(kind)
    W, V = near(base, 2)
    D = base.metric.log(V, W)
    np.testing.assert_allclose(
        base.metric.log(unit*V, unit*W)/unit, D, atol=1e-9*np.abs(D).max()
    )


def test_where_there_is_no_geodesic_the_answer_is_nan():
    line = adapters("mix", (1, 1, 1))
    one = np.ones((1, 1))
    assert (
        np.isnan(line.metric.exp(-2*one, one)).all()
        and np.isfinite(line.metric.exp(-0.9*one, one)).all()
    )
    for kind in KINDS:
        # -1 is in the other component
        D = adapters(kind, (1, 1, 1)).metric.log(np.stack([2*one, -one]), one)
        # and leaves the other alone
        assert np.isfinite(D[0]).all() and np.isnan(D[1]).all()
    with pytest.raises(ValueError, match="'euclid'"):
        InvariantMetric(FactorPairs(2, 2, 1, equip=False), "euclid")


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_kernel(kind, one_thread):
    """Logarithms, exponentials and stacked means of adapters in random gauges: to 1e-8, by a solver
    that shares no step with this one."""
    base = adapters(kind)
    total, bundle = parts(base)
    N, T = 2, 2
    w = np.array([0.7, 0.3])
    X = np.stack([near(base, T) for _ in range(N)])
    A = expm(0.5*gs.random.normal(size=(N, T, 2, 2)))
    B, H = total.split(total.group_action(A, bundle.lift(X)))
    chart = Quotient(kind).chart(
        [Factors(torch.as_tensor(B[:, t]), torch.as_tensor(H[:, t]).mT) for t in range(T)]
    )
    space, lift = chart.space, chart.lift
    x, y = (p.x[:1] for p in chart.points[:2])
    v, D = space.log(x, y), base.metric.log(X[0, 1], X[0, 0])
    np.testing.assert_allclose(float(v.norm()), base.metric.norm(D, X[0, 0]), rtol=1e-9)
    np.testing.assert_allclose(
        lift(space.exp(x, 0.4*v)).delta()[0].numpy(), base.metric.exp(0.4*D, X[0, 0]), atol=1e-9
    )
    found = frechet_mean(space, chart.points, list(w), batch=N)
    merged = lift(torch.stack([m.x for m in found])).delta().numpy()
    for i in range(N):
        np.testing.assert_allclose(merged[i], mean_in_geomstats(base, X[i], w), atol=1e-8)


def test_nothing_else_imports_geomstats():
    code = (
        "import sys, frechet_merge, frechet_merge.spaces.mean, "
        "frechet_merge.geometries.lora; assert not any(m.startswith('geomstats') for "
        "m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""The laws of a mean on every geometry: float64 and float32, ragged shapes, many models, with
hypothesis."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frechet_merge import FLAT, Euclidean, LoRA, Point, Span, Sphere, check_geometry
from frechet_merge import frechet_mean, merge
from frechet_merge.geometries.directions import Slerp
from frechet_merge.geometries.sphere import Cylinder, karcher
from frechet_merge.geometries.laws import LAWS, mean_of
from frechet_merge.geometries.manifold import Manifold, import_geomstats
from frechet_merge.geometries.registry import geometries
from frechet_merge.geometries.selected import RAM, Outliers, Times

GEOMETRIES = {
    "Euclidean": Euclidean(),
    "Span(Euclidean)": Span(Euclidean()),
    "Sphere": Sphere(),
    "Span(Sphere)": karcher(),
    "Slerp": Slerp(),
    "Slerp of rows": Slerp(axis=-1),
    "Slerp of columns": Slerp(axis=0),
}
SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).filter(lambda s: math.prod(s) > 3)


def draw(shape, T, seed, dtype, spread):
    "T tensors around a common one, within the convexity radius of a sphere."
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g, dtype=torch.float64)
    return [
        (
            base
            + spread
            * base.norm()
            * torch.nn.functional.normalize(
                torch.randn(shape, generator=g, dtype=torch.float64).flatten(), dim=0
            ).view(shape)
        ).to(dtype)
        for _ in range(T)
    ]


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=SHAPES,
    T=st.integers(2, 8),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-2, 0.1, 0.5]),
)
def test_laws(name, dtype, shape, T, seed, spread):
    thetas, gen = draw(shape, T, seed, dtype, spread), torch.Generator().manual_seed(seed)
    ws = [0.5, 0.3, 0.2, 0.4, 0.1, 0.6, 0.7, 0.2][:T]
    assert check_geometry(GEOMETRIES[name], thetas, ws).keys() == LAWS.keys() - {5}
    # the direction of the mean does not depend on the norms of the models
    if "Sphere" in name:
        found = check_geometry(
            GEOMETRIES[name],
            thetas,
            ws,
            act=lambda t: t*float(torch.rand(1, generator=gen) + 0.2)*3,
            same=lambda t: t/t.norm(),
        )
        assert found.keys() == LAWS.keys()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(shape=SHAPES, T=st.integers(2, 6), seed=st.integers(0, 2**31), zeros=st.floats(0, 0.9))
def test_laws_with_metrics(shape, T, seed, zeros):
    "Diagonal metrics, many of whose entries are zero in some or all models."
    thetas, g = draw(shape, T, seed, torch.float64, 0.3), torch.Generator().manual_seed(seed)
    Gs = [
        torch.rand(shape, generator=g, dtype=torch.float64)
        * (torch.rand(shape, generator=g) > zeros)
        for _ in range(T)
    ]
    check_geometry(Euclidean(), thetas, Gs=Gs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1e6, 1e12])
def test_the_unit_of_the_metrics_is_irrelevant(dtype, unit):
    x, G = (
        torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=dtype),
        torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=dtype),
    )
    for shift in (0, -2.25):
        m = frechet_mean(FLAT, [Point(a + shift, unit*b) for a, b in zip(x, G)])
        torch.testing.assert_close(m.x, torch.tensor([1.5, 4.25], dtype=dtype) + shift)
        assert m.converged and m.residual < 1e-5


@pytest.mark.parametrize("g", [Outliers(), RAM()], ids=repr)
def test_they_keep_all_laws_but_those_that_they_waive(g):
    found = check_geometry(g)
    assert set(found) == set(check_geometry(Euclidean())) - set(g.waives)


def test_every_installed_geometry_is_covered():
    import test_adapter_geometries
    import test_metrics_merge
    import test_trimmed

    found = {n: e.load()() for n, e in geometries().items()}
    # and `LoRA()` in test_lora.py, `Times()` in test_mergekit.py
    assert found and set(found.values()) <= {
        *GEOMETRIES.values(),
        *test_adapter_geometries.GEOMETRIES.values(),
        *test_metrics_merge.GEOMETRIES.values(),
        *test_trimmed.GEOMETRIES.values(),
        LoRA(),
        Times(),
        Outliers(),
        RAM(),
    }


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_merging_copies_gives_the_copy_in_any_dtype(name, dtype):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    merged = merge([{"x": x.clone()} for _ in range(3)], GEOMETRIES[name])
    assert (
        merged.tensors["x"].dtype == dtype
        and merged.tensors["x"].shape == x.shape
        and merged.means["x"].converged
    )
    torch.testing.assert_close(merged.tensors["x"], x, rtol=2*torch.finfo(dtype).eps, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_laws_on_cuda(name):
    check_geometry(GEOMETRIES[name], [t.cuda() for t in draw((4, 5), 3, 0, torch.float64, 0.3)])


class TestSphere:
    x = 1 + torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(
        t=st.floats(0, 1),
        phi=st.floats(1e-7, 3.1),
        na=st.floats(1e-3, 1e3),
        nb=st.floats(1e-3, 1e3),
    )
    def test_two_models_are_slerp(self, t, phi, na, nb):
        a = torch.tensor([1.0, 0, 0], dtype=torch.float64)
        b = torch.tensor([math.cos(phi), math.sin(phi), 0], dtype=torch.float64)
        if max(t, 1 - t)*phi > 3.1:
            return
        m, _ = mean_of(karcher(), [na*a, nb*b], [1 - t, t], warn=False)
        want = ((1 - t)*na + t*nb)*torch.tensor(
            [math.cos(t*phi), math.sin(t*phi), 0], dtype=torch.float64
        )
        torch.testing.assert_close(m, want, rtol=0, atol=1e-8*max(na, nb))

    def test_norm_is_the_weighted_mean_of_norms(self):
        w = [0.4, 0.3, 0.2, 0.1]
        m, _ = mean_of(karcher(), list(self.x), w)
        assert math.isclose(m.norm(), sum(a*b.norm() for a, b in zip(w, self.x)), rel_tol=1e-10)

    @pytest.mark.parametrize("ws", [[1.0, 0.0], [0.0, 1.0]], ids=str)
    def test_weight_zero_in_float32(self, ws):
        "All that pulls is at the mean, and the rest is rounding."
        x = torch.randn(2, 20000, generator=torch.Generator().manual_seed(0))
        m, mean = mean_of(Sphere(), list(x), ws, warn=False)
        assert mean.converged and torch.allclose(m, x[ws.index(1.0)], atol=1e-4)

    def test_identical_inputs(self):
        m, mean = mean_of(karcher(), [self.x[0]]*5)
        torch.testing.assert_close(m, self.x[0], rtol=1e-12, atol=1e-14)
        assert mean.variance < 1e-20

    def test_all_zero(self):
        m, _ = mean_of(karcher(), [torch.zeros(3, 4)]*3)
        assert m.shape == (3, 4) and not m.any()

    @pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
    def test_a_zero_tensor_shrinks_the_norm_and_has_no_direction(self, order):
        three = [self.x[0], 0*self.x[0], self.x[1]]
        m, _ = mean_of(karcher(), [three[i] for i in order])
        two, _ = mean_of(karcher(), [self.x[0], self.x[1]])
        torch.testing.assert_close(m/m.norm(), two/two.norm(), rtol=0, atol=1e-9)
        assert math.isclose(m.norm(), (self.x[0].norm() + self.x[1].norm())/3, rel_tol=1e-9)

    @pytest.mark.parametrize("tiny", [1e-3, 1e-8, 1e-18, 1e-30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_tiny_tensors_are_not_zero(self, tiny, dtype):
        x = [(tiny*t).to(dtype) for t in self.x[:2]]
        m, _ = mean_of(karcher(), x)
        want, _ = mean_of(karcher(), [t.double()/tiny for t in x])
        torch.testing.assert_close(
            m.double()/tiny,
            want,
            rtol=0,
            atol=4*torch.finfo(dtype).eps*float(want.abs().max()),
        )

    def test_huge_tensors_do_not_overflow(self):
        m, _ = mean_of(karcher(), [(1e30*t).float() for t in self.x[:2]])
        assert m.isfinite().all() and m.any()

    @pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-25, 1e19, 1e30, 1e37])
    @pytest.mark.parametrize("g", [Sphere(), karcher()], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_squares_need_not_be_float32_numbers(self, g, dtype, size):
        got, mean = mean_of(g, [(size*t).to(dtype) for t in self.x[:2]])
        want, _ = mean_of(g, self.x[:2])
        assert (
            mean.converged
            and mean.unique
            and (got.double()/size - want).norm() < 8*torch.finfo(dtype).eps*want.norm()
        )

    def test_antipodal_is_reported(self):
        _, mean = mean_of(karcher(), [self.x[0], -self.x[0]], warn=False)
        assert (
            not mean.unique
            and not mean.converged
            and "in general no mean" in mean.problem
            and math.isnan(mean.variance)
            and math.isnan(mean.residual)
        )

    def test_beyond_the_convexity_radius_is_reported(self):
        t = torch.tensor([0, 2, 4])*math.pi/3
        _, mean = mean_of(Sphere(), list(torch.stack([t.cos(), t.sin()], 1).double()), warn=False)
        assert not mean.unique

    @pytest.mark.parametrize("G", [0.1, 1.0, 1e4])
    def test_the_radius_is_in_radians_whatever_the_unit_of_the_metrics(self, G):
        t = torch.arange(3)*2*math.pi/3
        ring = torch.stack([t.cos(), t.sin(), 0*t], 1).double()
        for up, unique in ((0.0, False), (3.0, True)):
            x = ring + torch.tensor([0, 0, up], dtype=torch.float64)
            assert mean_of(Sphere(), list(x), Gs=[G]*3, warn=False)[1].unique == unique

    def test_diagonal_metrics_are_refused(self):
        with pytest.raises(ValueError, match="one number per model"):
            mean_of(karcher(), list(self.x), Gs=[torch.ones(50)]*4)

    def test_scalar_metrics_are_weights(self):
        a, _ = mean_of(karcher(), list(self.x[:2]), Gs=[2.0, 1.0])
        b, _ = mean_of(karcher(), list(self.x[:2]), [2, 1])
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    def test_against_geomstats_on_the_sphere_of_the_span(self):
        import numpy as np

        from frechet_merge.algebra.gram import coordinates, gram

        import_geomstats()
        from geomstats.geometry.hypersphere import Hypersphere
        from geomstats.learning.frechet_mean import FrechetMean

        for T in (3, 5, 8):
            g = torch.Generator().manual_seed(T)
            x = torch.randn(200, generator=g, dtype=torch.float64) + 0.7*torch.randn(
                T, 200, generator=g, dtype=torch.float64
            )
            w = torch.rand(T, generator=g, dtype=torch.float64)
            w /= w.sum()
            C, _ = coordinates(*gram(list(x)))
            U = C/C.norm(dim=1, keepdim=True)
            est = FrechetMean(Hypersphere(T - 1))
            est.optimizer.epsilon, est.optimizer.max_iter = 1e-30, 1000
            theirs = torch.as_tensor(est.fit(U.numpy(), weights=np.asarray(w)).estimate_)
            points, _ = karcher().chart(list(x))
            torch.testing.assert_close(
                frechet_mean(Cylinder(), points, w.tolist()).x[1:], theirs, rtol=0, atol=1e-10
            )
            again = frechet_mean(
                Manifold(Hypersphere(T - 1), radius=math.pi/2), [Point(u) for u in U], w.tolist()
            )
            torch.testing.assert_close(again.x, theirs, rtol=0, atol=1e-10)


def test_importing_geomstats_leaks_nothing():
    import numpy as np

    from frechet_merge.geometries.manifold import import_geomstats

    had = hasattr(np, "trapz")
    import_geomstats()
    assert torch.get_default_dtype() == torch.float32 and hasattr(np, "trapz") == had


@pytest.mark.parametrize("rel", [1e-16, 1e-14, 1e-12, 1e-10])
def test_models_that_are_almost_one(rel):
    worst, g = 0.0, torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(300, generator=g, dtype=torch.float64)
        xs = [
            x,
            *(x*(1 + rel*torch.randn(300, generator=g, dtype=torch.float64)) for _ in range(2)),
        ]
        worst = max(worst, float((mean_of(karcher(), xs)[0] - sum(xs)/3).norm()/x.norm()))
    assert worst < 1e-14


def test_pulls_that_cancel_as_a_whole_do_not_hide_weak_directions():
    xs, Gs = (
        [torch.tensor([1.0, 1, 1]), torch.tensor([-1.0, 2, 3])],
        [torch.tensor([1, 1e-6, 1e-6]), torch.tensor([1, 0, 1e-8])],
    )
    torch.testing.assert_close(
        mean_of(Euclidean(), xs, Gs=Gs)[0],
        mean_of(Euclidean(), [x.double() for x in xs], Gs=[G.double() for G in Gs])[0].float(),
    )
    # far from zero, and close together
    a = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[7:12] += 1e-3*torch.arange(1, 6)
    m = merge(
        [{"w": a}, {"w": b}], metrics=[{"w": torch.full_like(a, x)} for x in (1.0, 99.0)]
    ).tensors["w"]
    torch.testing.assert_close(
        (m - a)[7:12]/(b - a)[7:12], torch.full((5,), 0.99), rtol=1e-3, atol=0
    )


def test_a_slow_mean_is_not_called_converged_before_it_is():
    compared = 0
    # thirty steps and more in float64
    for seed in (62, 75, 76, 77, 126, 172, 178, 225, 287, 296):
        torch.manual_seed(seed)
        xs = [torch.randn(6) for _ in range(3)]
        want, got = (
            mean_of(Sphere(), [x.to(d) for x in xs], warn=False)
            for d in (torch.float64, torch.float32)
        )
        if want[1].converged and got[1].converged:
            compared += 1
            assert (got[0] - want[0]).norm() < 1e-4*want[0].norm()
    assert compared == 10


@pytest.mark.parametrize("T", [2, 6, 7, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_number_has_a_mean(T, dtype):
    mask = torch.tensor([0.0, torch.finfo(dtype).min], dtype=dtype)
    assert torch.equal(merge([{"mask": mask}]*T).tensors["mask"], mask)
    m = mean_of(Euclidean(), [torch.tensor([1e20, 1.0]), torch.tensor([3e20, 2.0])], Gs=[2.0, 1.0])
    assert not m[1].lost and torch.allclose(m[0], torch.tensor([5e20/3, 4/3]))


def test_spheres_of_sixteen_bits_are_computed_in_thirty_two():
    xs = [300*torch.randn(100_000, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    m, want = mean_of(Sphere(), [x.half() for x in xs])[0], mean_of(Sphere(), xs)[0]
    assert m.dtype == torch.float16 and (m.float() - want).norm() < 5e-4*want.norm()


def test_a_law_that_has_no_number_is_still_named():
    from frechet_merge.algebra.factors import Factors

    gen = torch.Generator().manual_seed(0)
    far = [
        Factors(
            torch.randn(8, 2, generator=gen, dtype=torch.float64),
            torch.randn(2, 7, generator=gen, dtype=torch.float64),
        )
        for _ in range(3)
    ]
    with pytest.raises(AssertionError, match="breaks law"):
        check_geometry(LoRA(metric="mix"), far, same=lambda f: f.delta())


def test_geometries_of_others_may_be_of_any_kind(monkeypatch):
    class Entry:
        module = "frechet_merge.of_others"

        def __init__(self, made):
            self.made = made

        def load(self):
            return self.made() if self.made is broken else self.made

    def broken():
        raise AttributeError("a plug-in that does not load")

    def free(**kw):
        return LoRA(**kw)

    module = __import__("sys").modules["frechet_merge.geometries.registry"]
    known = {**module.geometries(), "broken": Entry(broken), "free": Entry(free)}
    monkeypatch.setattr(module, "geometries", lambda: known)
    assert module.spelled(LoRA(rank=3)) == "lora:rank=3" and module.geometry_named(
        "free:rank=3"
    ) == LoRA(rank=3)


class TestWhatIsKnownOfAMean:
    def test_a_model_of_weight_zero_does_not_decide(self):
        x = torch.tensor([1.0, 0, 0], dtype=torch.float64)
        y = torch.tensor([0, 1.0, 0], dtype=torch.float64)
        assert (
            mean_of(Sphere(), [x, x + 0.1*y, -x + 0.2*y], [0.5, 0.5, 0])[1].unique
            and not mean_of(Sphere(), [x, x + 0.1*y, -x + 0.2*y], [0.5, 0.4, 0.1], warn=False)[
                1
            ].unique
        )

    def setup_method(self):
        import_geomstats()

    def test_opposite_points_of_a_geomstats_sphere_have_no_mean(self):
        from geomstats.geometry.hypersphere import Hypersphere

        p = torch.tensor([0.0, 0, 1], dtype=torch.float64)
        mean = frechet_mean(Manifold(Hypersphere(2)), [Point(p), Point(-p)], warn=False)
        assert mean.lost == 1 and not mean.converged and math.isnan(mean.variance)

    @pytest.mark.parametrize("c", [1e2, 1e4, 1e6])
    def test_ill_conditioned_points_of_a_manifold(self, c):
        from geomstats.geometry.spd_matrices import SPDMatrices

        X = [
            torch.diag(torch.tensor(d, dtype=torch.float64))
            for d in ([1, 1/c], [4, 2/c], [9, 0.3/c])
        ]
        m = frechet_mean(Manifold(SPDMatrices(2)), [Point(x) for x in X], warn=False)
        torch.testing.assert_close(
            m.x[0, 0], torch.tensor(36.0)**(1/3), check_dtype=False, rtol=1e-6, atol=0
        )
        assert m.unique is None

    def test_a_metric_that_float64_cannot_hold_is_refused(self):
        from geomstats.geometry.spd_matrices import SPDMatrices

        X = [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1, 1e-9], [4, 2e-9])]
        with pytest.raises(ValueError, match="more than float64 holds"):
            frechet_mean(Manifold(SPDMatrices(2)), [Point(x) for x in X])

"""A chart into a space, and what it needs: needs are held in every composition, and what was
written for version 0.1 still works."""

import importlib
import sys
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import save

import frechet_merge
from frechet_merge import FLAT, Chart, Euclidean, Geometry, LoRA, Needs, Point, Space, Span, Sphere
from frechet_merge import MergeError, check_geometry, frechet_mean, merge
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.algebra.factors import Factors
from frechet_merge.geometries.baselines import TSVM, KnOTS
from frechet_merge.geometries.directions import Chordal
from frechet_merge.geometries.fisher import Curved, pullback
from frechet_merge.geometries.pinned import Pinned
from frechet_merge.geometries.quotient import Quotient
from frechet_merge.geometries.subspace import EpiMer
from frechet_merge.geometries.wasserstein import Wasserstein
from frechet_merge.geometries.geometry import check_needs, space_of, written
from frechet_merge.geometries.laws import mean_of
from frechet_merge.files.tensors import MemoryTensor

# as it stood in the tutorial of version 0.1, to the letter
VERSION_01 = '''
from dataclasses import dataclass
import torch
from frechet_merge import Geometry, Point


@dataclass(frozen=True)
class Ratios(Geometry):
    "Weights as size and sign; sizes are compared by their ratio."

    separable = batched = True  # each weight on its own

    def chart(self, thetas, Gs=None):
        Gs = list(Gs or [1.0]*len(thetas))
        if not all(isinstance(G, (int, float)) for G in Gs):
            raise ValueError("a metric of Ratios is one number per model")
        points = []
        for t, G in zip(thetas, Gs):
            some = t != 0
            x = torch.stack([t.abs().where(some, 1).log(), t.sign()], -1)
            metric = torch.stack([some.to(t), torch.ones_like(t)], -1)
            points.append(Point(x, G*metric))
        return points, lambda m: m[..., 1]*m[..., 0].exp()

    def log(self, m, x):
        return x - m

    def exp(self, m, v):
        return m + v
'''


@dataclass(frozen=True)
class Now(Geometry):
    "The same, as it is written now."

    needs = Needs(pieces=True, stacks=True)

    def chart(self, thetas, Gs=None):
        points = []
        for t, G in zip(thetas, Gs or [1.0]*len(thetas)):
            some = t != 0
            x = torch.stack([t.abs().where(some, 1).log(), t.sign()], -1)
            metric = torch.stack([some.to(t), torch.ones_like(t)], -1)
            points.append(Point(x, G*metric))
        return Chart(points, lambda m: m[..., 1]*m[..., 0].exp())


@dataclass(frozen=True)
class Times(Geometry):
    "A composition whose author says nothing of needs."

    factor: float
    inner: Geometry

    def chart(self, thetas, Gs=None):
        inner = self.inner.chart([self.factor*t for t in thetas], Gs)
        return replace(inner, lift=lambda m: inner.lift(m)/self.factor)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @dataclass(frozen=True)
    class Around(Geometry):
        "A composition of version 0.1, which forwards what that version forwarded by hand."

        inner: Geometry
        radius = property(lambda self: self.inner.radius)
        laws_waived = property(lambda self: self.inner.laws_waived)

        def chart(self, thetas, Gs=None):
            return self.inner.chart(thetas, Gs)

        def log(self, m, x):
            return self.inner.log(m, x)

        def exp(self, m, v):
            return self.inner.exp(m, v)

        def start(self, points, ws):
            return self.inner.start(points, ws)

        def size(self, m):
            return self.inner.size(m)


@pytest.fixture
def ratios(tmp_path, monkeypatch):
    "The class of version 0.1, from a module of its own."
    (tmp_path/"ratios_01.py").write_text(VERSION_01)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(DeprecationWarning, match=r"Ratios has log and exp.*Chart") as said:
        module = importlib.import_module("ratios_01")
    assert said[0].filename == str(tmp_path/"ratios_01.py")
    yield module.Ratios
    del sys.modules["ratios_01"]


def draw(*shape, seed=0, T=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(T)]


def pairs(m=7, n=5, r=2, spread=0.05, T=3):
    "T adapters that are close to each other."
    B, A = draw(m, r, T=1)[0], draw(r, n, T=1, seed=1)[0]
    near = zip(draw(m, r, seed=2, T=T), draw(r, n, seed=3, T=T))
    return [Factors(B + spread*b, A + spread*a) for b, a in near]


def adapter(seed):
    c = from_state_dict(
        {
            f"base_model.model.q.lora_{k}.weight": draw(*s, seed=seed, T=1)[0]
            for k, s in (("A", (2, 5)), ("B", (6, 2)))
        }
    )
    c.adapter = dict(peft_type="LORA", r=2, lora_alpha=2)
    return c


BASE = {"w": draw(8, 6, seed=9, T=1)[0]}
MODELS = [{"w": BASE["w"] + 0.1*x} for x in draw(8, 6)]
METRICS = [{"w": x**2 + 0.1} for x in draw(8, 6, seed=5)]


class TestNeeds:
    @pytest.mark.parametrize(
        "g, given, name, remedy",
        [
            (Span(pullback()), {"base": BASE}, "Span(Curved(normalise=True", "metrics="),
            (Span(pullback()), {"base": BASE, "metrics": METRICS}, "Span(Curved(", "itself"),
            (Span(Curved(anchor=2.0)), {}, "Span(Curved(anchor=2.0))", "metrics="),
            (Span(Curved(damping=0.1)), {}, "Span(Curved(damping=0.1))", "metrics="),
            (Span(EpiMer()), {}, "Span(EpiMer())", "Use EpiMer() itself"),
            (Span(EpiMer()), {"base": BASE}, "Span(EpiMer())", "Use EpiMer() itself"),
            (Span(KnOTS()), {}, "Span(KnOTS())", "matrices"),
            (Span(Quotient()), {}, "Span(Quotient())", "of low-rank factors"),
            (Span(LoRA()), {}, "Span(LoRA())", "of low-rank factors"),
            (Span(Span(pullback())), {"base": BASE}, "Span(Span(Curved(", "metrics="),
            (Span(Span(EpiMer())), {"base": BASE}, "Span(Span(EpiMer()))", "Use EpiMer() itself"),
            (LoRA(metric=Span(EpiMer())), {}, "LoRA(metric=Span(EpiMer()))", "EpiMer() itself"),
            (LoRA(metric=pullback()), {"base": BASE}, "LoRA(metric=Curved(", "adapters"),
            (Times(2.0, pullback()), {"base": BASE}, "Times(2.0, Curved(", "metrics="),
            (Times(2.0, EpiMer()), {}, "Times(2.0, EpiMer())", "base="),
            (Times(2.0, Span(pullback())), {"base": BASE}, "Times(2.0, Span(", "metrics="),
            (Span(Times(2.0, Curved(anchor=2.0))), {}, "Span(Times(2.0, ", "Curved(anchor=2.0)"),
            (Around(pullback()), {"base": BASE}, "Around(Curved(", "metrics="),
            (Around(EpiMer()), {}, "Around(EpiMer())", "base="),
            (Span(Around(EpiMer())), {"base": BASE}, "Span(Around(EpiMer()))", "Around(EpiMer())"),
            ("lora", {}, "lora", "adapters"),
            ("epimer:k=2", {}, "epimer:k=2", "base="),
            ("curved:anchor=4,share=right", {"base": BASE}, "curved:anchor=4", "metrics="),
        ],
        ids=lambda x: "+".join(x) if isinstance(x, dict) else written(x),
    )
    def test_they_are_held_in_every_composition(self, tmp_path, g, given, name, remedy):
        with pytest.raises(ValueError) as e:
            merge(MODELS, g, out=tmp_path/"out", **given)
        assert str(e.value).startswith(name) and remedy in str(e.value)
        assert len(str(e.value).splitlines()) <= 3 and not (tmp_path/"out").exists()

    @pytest.mark.parametrize(
        "g",
        [pullback(), LoRA(metric=pullback()), Span(pullback()), LoRA(metric=Span(pullback()))],
        ids=written,
    )
    def test_adapters_have_no_metrics(self, g):
        with pytest.raises(ValueError, match=r"(?s)made of the models' metrics.*BASE\+ADAPTER"):
            merge([adapter(0), adapter(1)], g)

    def test_of_adapters_are_changes(self):
        for g in (EpiMer(), LoRA(metric=EpiMer())):
            assert not check_needs(LoRA.of(g), adapters=True).base
            assert merge([adapter(0), adapter(1)], g).means

    def test_nothing_is_read_before(self):
        class Unread(MemoryTensor):
            def read(self, start=0, stop=None):
                raise AssertionError("bytes were read")

        models = [from_state_dict(m) for m in MODELS]
        for m in models:
            m.lazy["w"] = Unread(m.lazy["w"].tensor())
        with pytest.raises(ValueError, match="made of the models' metrics"):
            merge(models, Span(Curved(anchor=2.0)), base=BASE)
        with pytest.raises(AssertionError, match="bytes were read"):
            merge(models, Euclidean(), base=BASE, executor="serial")

    def test_the_remedies_work(self):
        assert merge(MODELS, pullback(), base=BASE, metrics=METRICS).means["w"].converged
        assert merge(MODELS, EpiMer(), base=BASE).means["w"].converged
        assert merge(MODELS, Times(2.0, Curved()), metrics=METRICS).means["w"].converged
        assert merge(MODELS, Times(2.0, EpiMer()), base=BASE).means["w"].converged

    @pytest.mark.parametrize("g", [Span(Sphere()), Sphere(), KnOTS(), Now()], ids=written)
    def test_metrics_that_it_does_not_take_are_refused(self, g):
        with pytest.raises(MergeError, match="'w' is diagonal.*one number per model"):
            merge(MODELS, g, metrics=METRICS)

    def test_a_kind_that_it_does_not_take(self):
        @dataclass(frozen=True)
        class Squares(Geometry):
            needs = Needs(carries=frozenset({"kronecker"}))

            def chart(self, thetas, Gs=None):
                return Euclidean().chart(thetas, Gs)

        with pytest.raises(MergeError, match="'w' is diagonal, and this geometry takes kronecker"):
            merge(MODELS, Squares(), metrics=METRICS)
        stats = [{"w.left": torch.eye(8), "w.right": torch.eye(6)}]*3
        mean = sum(m["w"] for m in MODELS)/3
        torch.testing.assert_close(merge(MODELS, Squares(), metrics=stats).tensors["w"], mean)

    def test_promises_are_those_of_the_parts_only_where_they_hold(self):
        assert Euclidean().needs.pieces and not Span(Euclidean()).needs.pieces
        assert not Times(2.0, Euclidean()).needs.pieces
        assert LoRA().needs.stacks and not LoRA(metric=Span(Sphere())).needs.stacks
        assert LoRA(metric="mix").needs.keeps_rank and not LoRA().needs.keeps_rank
        assert pullback().needs.knob == "anchor" and Span(pullback()).needs.knob is None

    def test_a_geometry_is_named_as_one_writes_it(self):
        said = "LoRA(rank=4, metric=Span(Times(2.0, Sphere())))"
        assert written(eval(said)) == said
        assert written(Euclidean()) == "Euclidean()"


class TestOneMethod:
    def test_a_flat_chart_is_a_geometry(self):
        @dataclass(frozen=True)
        class Cubes(Geometry):
            def chart(self, thetas, Gs=None):
                return Chart([Point(t**3) for t in thetas], lambda m: m.abs()**(1/3)*m.sign())

        check_geometry(Cubes())
        out = merge(MODELS, Cubes()).tensors["w"]
        torch.testing.assert_close(out, mean_of(Cubes(), [m["w"] for m in MODELS])[0])

    def test_a_chart_is_a_pair_to_whom_wants_two(self):
        x = draw(2, 3)
        points, lift = Euclidean().chart(x)
        assert points[0].x is x[0] and lift(x[1]) is x[1]
        assert Euclidean().chart(x)[0] == points and Euclidean().chart(x).space is FLAT

    def test_a_chart_that_is_none_is_named(self):
        @dataclass(frozen=True)
        class Pair(Geometry):
            def chart(self, thetas, Gs=None):
                return [Point(t) for t in thetas], lambda m: m

        with pytest.raises(ValueError, match="Pair.chart must return Chart.*returned a tuple"):
            check_geometry(Pair())

    def test_the_names_are_public(self):
        for name in ("Space", "Chart", "Needs", "FLAT", "Point", "Geometry"):
            assert name in frechet_merge.__all__
        assert isinstance(FLAT, Space) and len(frechet_merge.__all__) <= 19


class TestVersion01:
    def test_it_merges_as_it_did(self, ratios, tmp_path):
        x = draw(4, 6)
        assert isinstance(ratios().chart(x), Chart) and ratios().needs == replace(
            Now().needs, carries=frozenset({"diagonal", "kronecker"})
        )
        points, lift = ratios().chart(x)
        assert len(points) == 3 and callable(lift)
        assert check_geometry(ratios(), x).keys() == check_geometry(Now(), x).keys()
        models = [{"w": t, "b": t[0]} for t in x]
        for base in (None, {"w": 0*x[0], "b": 0*x[0][0]}):
            a, b = (merge(models, g, base, [3, 2, 1]).tensors for g in (ratios(), Now()))
            for k in a:
                torch.testing.assert_close(a[k], b[k], rtol=1e-12, atol=1e-14)

    def test_it_is_found_by_its_name(self, ratios, tmp_path, monkeypatch):
        info = tmp_path/"ratios_01-0.1.dist-info"
        info.mkdir()
        (info/"METADATA").write_text("Metadata-Version: 2.1\nName: ratios_01\nVersion: 0.1\n")
        (info/"entry_points.txt").write_text(
            "[frechet_merge.geometries]\nratios01 = ratios_01:Ratios\n"
        )
        save(tmp_path/"a", MODELS[0])
        save(tmp_path/"b", MODELS[1])
        merged = merge([tmp_path/"a", tmp_path/"b"], "ratios01", out=tmp_path/"out")
        want = mean_of(Now(), [m["w"] for m in MODELS[:2]])[0]
        torch.testing.assert_close(merged.tensors["w"], want)
        assert "--geometry ratios01" in (tmp_path/"out"/"README.md").read_text()

    def test_it_is_composed(self, ratios):
        x = draw(4, 6)
        close = torch.testing.assert_close
        close(mean_of(Times(2.0, ratios()), x)[0], mean_of(Times(2.0, Now()), x)[0])
        fs = pairs()
        f, g = (mean_of(LoRA(metric=m), fs)[0].delta() for m in (ratios(), Now()))
        close(f, g)

    @pytest.mark.filterwarnings("ignore:.* is of version 0.1:DeprecationWarning")
    @pytest.mark.parametrize("g", [Euclidean(), Span(Sphere()), Sphere()], ids=written)
    def test_it_holds_those_of_now(self, g):
        x, ws = [1 + 0.3*t for t in draw(4, 6)], [0.5, 0.3, 0.2]
        (a, old), (b, new) = mean_of(Around(g), x, ws), mean_of(g, x, ws)
        assert torch.equal(a, b) and replace(old, x=None) == replace(new, x=None)
        assert old.unique and check_geometry(Around(g)).keys() == check_geometry(g).keys()

    def test_what_it_declared_is_what_it_needs(self):
        with pytest.warns(DeprecationWarning):

            @dataclass(frozen=True)
            class Declares(Geometry):
                separable = factors = differences = needs_metrics = keeps_rank = batched = True
                curved, radius, laws_waived = True, 2.0, (3, 9)

                def chart(self, thetas, Gs=None):
                    return [Point(t) for t in thetas], lambda m: m

                def log(self, m, x):
                    return x - m

                def exp(self, m, v):
                    return m + v

        g = Declares()
        want = dict(of="factors", base=True, metrics=True, pieces=True, stacks=True)
        assert {k: getattr(g.needs, k) for k in want} == want and not g.needs.whole
        assert g.needs.keeps_rank and g.waives == (3, 9)
        assert g.chart(pairs()).space.radius == 2.0

    def test_half_a_space_is_refused(self):
        with pytest.raises(TypeError, match="Half has one of log and exp"):

            class Half(Euclidean):
                def log(self, m, x):
                    return 2*(x - m)

    @pytest.mark.parametrize(
        "g",
        [
            Euclidean(),
            Curved(),
            Sphere(),
            Span(Sphere()),
            KnOTS(),
            EpiMer(),
            LoRA(),
            LoRA(metric="mix"),
            LoRA(metric="wasserstein"),
            Quotient("inv"),
            Wasserstein(),
            Pinned(),
            TSVM(),
        ],
        ids=written,
    )
    def test_a_geometry_in_the_place_of_its_space(self, g):
        "As in version 0.1: the same mean, and a note."
        ws, factors = [0.5, 0.3, 0.2], g.needs.of == "factors"
        chart = g.chart(pairs() if factors else [1 + 0.3*t for t in draw(5, 4)])
        want = frechet_mean(chart.space, chart.points, ws, warn=False)
        with pytest.warns(DeprecationWarning, match="chart.space") as said:
            found = frechet_mean(g, chart.points, ws, warn=False)
        assert said[0].filename == __file__
        assert torch.equal(found.x, want.x) and replace(found, x=None) == replace(want, x=None)
        assert type(space_of(g)) is type(chart.space)

    def test_what_was_read_from_a_geometry_is_still_found(self):
        with pytest.warns(DeprecationWarning, match="needs.of"):
            assert Quotient().factors is True
        with pytest.warns(DeprecationWarning, match="waives"):
            assert TSVM().laws_waived == TSVM().waives
        with pytest.warns(DeprecationWarning, match="space.log"):
            a, b = draw(3, T=2)
            assert torch.equal(Euclidean().log(a, b), b - a)
        with pytest.warns(DeprecationWarning, match="radius"):
            assert Sphere().radius == Span(Sphere()).radius
        with pytest.warns(DeprecationWarning, match="needs.pieces"):
            assert [g.separable for g in (Euclidean(), Curved(damping=1.0))] == [True, False]
        with pytest.raises(AttributeError, match="'Sphere' object has no attribute 'colour'"):
            _ = Sphere().colour
        assert not hasattr(Euclidean(), "colour")


class TestLongTensors:
    "A sphere divides by sums of millions of float32 numbers."

    @pytest.mark.parametrize("geometry", [Sphere(), Chordal()])
    def test_long_tensors_have_a_mean_of_mean_length(self, geometry):
        base = draw(1 << 22, T=1)[0]
        models = [(base + 0.1*x).float() for x in draw(1 << 22, seed=1)]
        merged, mean = mean_of(geometry, models)
        assert mean.converged
        assert mean.iterations < 10
        expected = sum(float(x.double().norm()) for x in models)/3
        assert abs(float(merged.double().norm())/expected - 1) < 1e-6


@pytest.mark.parametrize(
    "named, says",
    [
        ("clipped:t=1e300", "Clipped: t=1e[+]300 is larger than what is computed with"),
        ("epimer:alpha=9223372036854775808", "EpiMer: alpha=9223372036854775808 is larger"),
        ("slerp:straight=x", "straight='x'.: a cosine, or None"),
        ("times:factor=x", "factor='x'.: a number, or one per model"),
    ],
)
def test_arguments_that_nothing_is_computed_with_are_refused(named, says):
    models = [{"q.weight": torch.full((3, 3), float(i))} for i in range(3)]
    with pytest.raises(ValueError, match=says):
        merge(models[:2], geometry=named, base=models[2])


@pytest.mark.parametrize("seed", [2**63, 2**128, -(2**63)])
def test_seeds_are_as_large_as_one_likes(seed):
    models = [{"q.weight": torch.full((3, 3), float(i))} for i in range(3)]
    merge(models[:2], geometry=f"dare:seed={seed}", base=models[2])

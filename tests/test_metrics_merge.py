"Metrics of every form through the front door, against dense algebra in float64."
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from frechet_merge import merge
from frechet_merge.checkpoints import MergeError
from frechet_merge.diagnostics import inspect
from frechet_merge.geometries.fisher import Curved, pullback
from frechet_merge.geometries.subspace import EpiMer
from frechet_merge.geometry import Euclidean
from frechet_merge.laws import LAWS, check_geometry, mean_of
from frechet_merge.mean import frechet_mean
from frechet_merge.metrics import Kronecker, MetricWarning

GEOMETRIES = {"Curved": Curved(), "pullback": pullback(), "EpiMer": EpiMer()}      # EpiMer's own laws are in test_subspace.py
T, SHAPES = 3, {"q.weight": (6, 5), "conv.weight": (4, 3, 1, 1), "q.bias": (6,)}


def draw(seed, shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def spd(seed, n): X = draw(seed, (n, 2*n)); return X @ X.T/n


@pytest.fixture
def models(): return [{k: draw(10*i + j, s) for j, (k, s) in enumerate(SHAPES.items())} for i in range(T)]

@pytest.fixture
def base(): return {k: draw(100 + j, s) for j, (k, s) in enumerate(SHAPES.items())}

@pytest.fixture
def stats(): return [{f"{k}.{side}": spd(200 + 10*i + j, n) for j, (k, side, n) in enumerate((("q.weight", "left", 6), ("q.weight", "right", 5), ("conv.weight", "left", 4), ("conv.weight", "right", 3)))} for i in range(T)]


def solved(models, Ms, ws): return torch.linalg.solve(sum(w*M for w, M in zip(ws, Ms)), sum(w*M @ m.flatten() for w, M, m in zip(ws, Ms, models)))


@pytest.mark.parametrize("name", ["q.weight", "conv.weight"])
def test_factors_are_a_kronecker_metric(models, base, stats, name):
    ws = [.5, .3, .2]
    Ms = [torch.kron(s[f"{name}.left"], s[f"{name}.right"]) for s in stats]
    for g in ("euclidean", Curved()):
        m = merge(models, g, metrics=stats, weights=ws)
        torch.testing.assert_close(m.tensors[name].flatten(), solved([x[name] for x in models], Ms, ws), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(m.tensors["q.bias"], sum(w*x["q.bias"] for w, x in zip(ws, models)))
    u = [float(M.diagonal().mean()) for M in Ms]
    deltas = [x[name] - base[name] for x in models]
    unit, eye = [M/v for M, v in zip(Ms, u)], torch.eye(len(Ms[0]), dtype=torch.float64)
    want = solved([*deltas, 4*sum(deltas)], [*unit, eye], [1.0]*4)
    m = merge(models, pullback(share=None), base=base, metrics=stats)
    torch.testing.assert_close((m.tensors[name] - base[name]).flatten(), want, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(m.tensors["q.bias"], sum(x["q.bias"] for x in models)/T)


@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "one side"])
@pytest.mark.parametrize("g", [Curved(), Curved(normalise=True, damping=.1), Curved(damping=.1), Curved(share="right"), pullback(), pullback(share=None)], ids=repr)
def test_laws_with_metrics_of_every_form(g, kind):
    thetas = [draw(i, (6, 5)) for i in range(T)]
    Gs = {"diagonal": [draw(300 + i, (6, 5)).abs() for i in range(T)], "kronecker": [Kronecker((spd(400 + i, 6), spd(500 + i, 5))) for i in range(T)], "one side": [Kronecker((None, spd(500 + i, 5))) for i in range(T)]}[kind]
    assert check_geometry(g, thetas, Gs=Gs).keys() == LAWS.keys() - {5, *g.laws_waived}


def test_weights_count_in_the_anchor_too(models, base, stats):
    one = merge(models, "pullback", base=base, metrics=stats, weights=[1, 1, 0])
    deltas = [m["q.weight"] - base["q.weight"] for m in models]
    g = pullback(nu=1e9)
    m = merge(models, g, base=base, metrics=stats, weights=[1, 1, 0])
    torch.testing.assert_close(m.tensors["q.weight"] - base["q.weight"], 4*T*(deltas[0] + deltas[1])/2, atol=1e-6, rtol=1e-6)
    changed = [*models[:2], {k: v + 1 for k, v in models[2].items()}]      # a model without weight has no say
    torch.testing.assert_close(merge(changed, "pullback", base=base, metrics=stats, weights=[1, 1, 0]).tensors["q.weight"], one.tensors["q.weight"])


def test_regmean_has_one_side_only(models, stats):
    right = [{k: v for k, v in s.items() if k.endswith("right")} for s in stats]
    A = [s["q.weight.right"] for s in stats]
    want = sum(m["q.weight"] @ a for m, a in zip(models, A)) @ torch.linalg.inv(sum(A))
    torch.testing.assert_close(merge(models, metrics=right).tensors["q.weight"], want, atol=1e-9, rtol=1e-9)


def test_epimer_without_metrics_is_tsvm_and_with_equal_ones_too(models, base, stats):
    flat = merge(models, "epimer:k=1", base=base)
    equal = merge(models, EpiMer(1), base=base, metrics=[{k: torch.ones(s, dtype=torch.float64) for k, s in SHAPES.items()}]*T)
    torch.testing.assert_close(equal.tensors["q.weight"], flat.tensors["q.weight"], atol=1e-12, rtol=1e-12)
    m = merge(models, EpiMer(1), base=base, metrics=stats)
    assert not torch.allclose(m.tensors["q.weight"], flat.tensors["q.weight"])


def test_what_adds_changes_needs_a_base(models, stats):
    for g in ("pullback", "epimer"):
        with pytest.raises(ValueError, match="base="): merge(models, g, metrics=stats)


def test_negative_metrics_are_clipped_and_reported(models, stats):
    stats[1]["q.weight.left"] = stats[1]["q.weight.left"] - 3*torch.eye(6, dtype=torch.float64)
    with pytest.warns(MetricWarning, match=r"metrics\[1\]: the metric q.weight.left is not positive"): m = merge(models, Curved(damping=.1), metrics=stats, executor="serial")
    assert m.tensors["q.weight"].isfinite().all()
    stats[1]["q.weight.left"][0, 0] = float("nan")
    with pytest.raises((MergeError, ValueError), match="q.weight"): merge(models, metrics=stats)


def test_metrics_that_a_geometry_cannot_use_are_refused(models, stats):
    with pytest.raises(MergeError, match="q.weight.*Euclidean"): merge(models, "sphere", metrics=stats)


def test_eta_from_files_and_on_the_command_line(models, base, stats, tmp_path):
    found = inspect(models, base, metrics=stats, damping=0)
    rows = {r["name"]: r for r in found.eta}
    assert set(rows) == {"q.weight", "conv.weight"} and abs(sum(r["share"] for r in found.eta) - 1) < 1e-12
    for name, r in rows.items():
        u, xs = [s[f"{name}.right"].diagonal().mean() for s in stats], [m[name].flatten() for m in models]
        common = sum(s[f"{name}.right"]/v for s, v in zip(stats, u))/T
        Ms = [torch.kron(v*s[f"{name}.left"], common) for s, v in zip(stats, u)]
        def F(x, Ms=Ms, xs=xs): return sum((x - y) @ M @ (x - y) for M, y in zip(Ms, xs))/T
        assert abs(r["eta"] - (F(sum(xs)/T) - F(solved(xs, Ms, [1/T]*T)))) < 1e-6*r["eta"] and abs(r["F"] - F(sum(xs)/T)) < 1e-6*r["F"]
    for i in range(T):
        merge([models[i]], out=tmp_path/f"m{i}"); save_file(stats[i], tmp_path/f"s{i}.safetensors")
    run = subprocess.run([sys.executable, "-m", "frechet_merge", "inspect", "m0", "m1", "m2", "--metrics", "s0.safetensors,s1.safetensors,s2.safetensors", "--json", "--plot", "eta.png"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert said["verdict"].startswith("Curvature ") and 0 < said["gain"] <= 1 and (tmp_path/"eta.png").stat().st_size > 1000


@pytest.mark.parametrize("seed", [16, 54, 61, 63, 122, 141, 171])
def test_singular_metrics_that_leave_each_other_room(seed):
    "A point at distance zero of all models: there the pulls are rounding, and a solver that follows them walks away."
    gen = torch.Generator().manual_seed(seed)
    def size(a, b): return int(torch.randint(a, b, (), generator=gen))
    n, m, k = size(2, 6), size(2, 8), size(2, 8)
    def thin(k): X = torch.randn(k, size(1, k), generator=gen, dtype=torch.float64); return X @ X.T
    Gs = [Kronecker((thin(m), thin(k))) for _ in range(n)]
    xs = [torch.randn(m, k, generator=gen, dtype=torch.float64) for _ in range(n)]
    x, mean = mean_of(Euclidean(), xs, None, Gs)
    assert mean.converged
    def pulls(x): return [G @ (t - x) for G, t in zip(Gs, xs)]
    assert sum(pulls(x)).norm() <= 1e-9*sum(p.norm() for p in pulls(sum(xs)/n))


@pytest.mark.parametrize("share", ["right", None])
def test_an_anchor_below_the_rounding_of_the_steepest_direction_still_holds(share):
    "Second moments of correlated inputs have one large eigenvalue; what float32 cannot tell from zero beside it is where the anchor decides."
    g, n, T = torch.Generator().manual_seed(0), 300, 3
    v = torch.randn(n, 1, generator=g, dtype=torch.float64)
    def steep(): X = torch.randn(n, 4, generator=g, dtype=torch.float64); return v @ v.T + 1e-3*X @ X.T
    metrics, x = [(steep(), steep()) for _ in range(T)], [torch.randn(n, n, generator=g, dtype=torch.float64) for _ in range(T)]
    def mean(dtype):
        geometry = pullback(share=share)
        points, lift = geometry.chart([t.to(dtype) for t in x], [Kronecker((L.to(dtype), R.to(dtype))) for L, R in metrics])
        return lift(frechet_mean(geometry, points, [1.0]*T, warn=False).x).double()
    exact = mean(torch.float64)
    assert (mean(torch.float32) - exact).norm() <= 2e-3*exact.norm()

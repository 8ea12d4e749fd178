"Metrics of every form through the front door, against dense algebra in float64."

import json
import math
import warnings
from hashlib import sha256

import pytest
import torch
from conftest import cli
from safetensors.torch import save_file

from frechet_merge import FLAT, merge
from frechet_merge.matching.bases import bases
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.messages import MergeError
from frechet_merge.curvature.collecting import Statistics
from frechet_merge.diagnostics.inspection import Inspection, inspect
from frechet_merge.geometries.fisher import Curved, pullback
from frechet_merge.geometries.subspace import EpiMer
from frechet_merge.geometries.geometry import Euclidean
from frechet_merge.spaces.space import Point
from frechet_merge.geometries.laws import LAWS, check_geometry, mean_of
from frechet_merge.spaces.mean import frechet_mean
from frechet_merge.metrics.kinds import Dense, Diagonal
from frechet_merge.metrics.kronecker import Kronecker
from frechet_merge.metrics.units import MetricWarning

# EpiMer's own laws are in test_subspace.py
GEOMETRIES = {"Curved": Curved(), "pullback": pullback(), "EpiMer": EpiMer()}
T = 3
SHAPES = {"q.weight": (6, 5), "conv.weight": (4, 3, 1, 1), "q.bias": (6,)}


def draw(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(seed, n):
    X = draw(seed, (n, 2*n))
    return X @ X.T/n


@pytest.fixture
def models():
    return [{k: draw(10*i + j, s) for j, (k, s) in enumerate(SHAPES.items())} for i in range(T)]


@pytest.fixture
def base():
    return {k: draw(100 + j, s) for j, (k, s) in enumerate(SHAPES.items())}


SIDES = {
    "q.weight.left": 6,
    "q.weight.right": 5,
    "conv.weight.left": 4,
    "conv.weight.right": 3,
}


@pytest.fixture
def stats():
    return [
        {name: spd(200 + 10*i + j, n) for j, (name, n) in enumerate(SIDES.items())}
        for i in range(T)
    ]


def solved(models, Ms, ws):
    return torch.linalg.solve(
        sum(w*M for w, M in zip(ws, Ms)),
        sum(w*M @ m.flatten() for w, M, m in zip(ws, Ms, models)),
    )


@pytest.mark.parametrize("name", ["q.weight", "conv.weight"])
def test_factors_are_a_kronecker_metric(models, base, stats, name):
    ws = [0.5, 0.3, 0.2]
    Ms = [torch.kron(s[f"{name}.left"], s[f"{name}.right"]) for s in stats]
    want = solved([x[name] for x in models], Ms, ws)
    plain = sum(w*x["q.bias"] for w, x in zip(ws, models))
    for g in ("euclidean", Curved()):
        m = merge(models, g, metrics=stats, weights=ws).tensors
        torch.testing.assert_close(m[name].flatten(), want, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(m["q.bias"], plain)


@pytest.mark.parametrize("name", ["q.weight", "conv.weight"])
def test_an_anchor_is_one_more_model(models, base, stats, name):
    Ms = [torch.kron(s[f"{name}.left"], s[f"{name}.right"]) for s in stats]
    unit = [M/float(M.diagonal().mean()) for M in Ms]
    deltas = [x[name] - base[name] for x in models]
    eye = torch.eye(len(Ms[0]), dtype=torch.float64)
    want = solved([*deltas, 4*sum(deltas)], [*unit, eye], [1.0]*4)
    m = merge(models, pullback(share=None), base=base, metrics=stats).tensors
    torch.testing.assert_close((m[name] - base[name]).flatten(), want, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(m["q.bias"], sum(x["q.bias"] for x in models)/T)


@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "one side"])
@pytest.mark.parametrize(
    "g",
    [
        Curved(),
        Curved(normalise=True, damping=0.1),
        Curved(damping=0.1),
        Curved(share="right"),
        pullback(),
        pullback(share=None),
    ],
    ids=repr,
)
def test_laws_with_metrics_of_every_form(g, kind):
    thetas = [draw(i, (6, 5)) for i in range(T)]
    Gs = {
        "diagonal": [draw(300 + i, (6, 5)).abs() for i in range(T)],
        "kronecker": [Kronecker((spd(400 + i, 6), spd(500 + i, 5))) for i in range(T)],
        "one side": [Kronecker((None, spd(500 + i, 5))) for i in range(T)],
    }[kind]
    assert check_geometry(g, thetas, Gs=Gs).keys() == LAWS.keys() - {5, *g.waives}


def test_weights_count_in_the_anchor_too(models, base, stats):
    how = dict(base=base, metrics=stats, weights=[1, 1, 0])
    one = merge(models, "pullback", **how).tensors["q.weight"]
    deltas = [m["q.weight"] - base["q.weight"] for m in models]
    anchored = merge(models, pullback(nu=1e9), **how).tensors["q.weight"] - base["q.weight"]
    want = 4*T*(deltas[0] + deltas[1])/2
    torch.testing.assert_close(anchored, want, atol=1e-6, rtol=1e-6)
    # a model without weight has no say
    changed = [*models[:2], {k: v + 1 for k, v in models[2].items()}]
    torch.testing.assert_close(merge(changed, "pullback", **how).tensors["q.weight"], one)


def test_regmean_has_one_side_only(models, stats):
    right = [{k: v for k, v in s.items() if k.endswith("right")} for s in stats]
    A = [s["q.weight.right"] for s in stats]
    want = sum(m["q.weight"] @ a for m, a in zip(models, A)) @ torch.linalg.inv(sum(A))
    found = merge(models, metrics=right).tensors["q.weight"]
    torch.testing.assert_close(found, want, atol=1e-9, rtol=1e-9)


def test_epimer_without_metrics_is_tsvm_and_with_equal_ones_too(models, base, stats):
    flat = merge(models, "epimer:k=1", base=base).tensors["q.weight"]
    ones = {k: torch.ones(s, dtype=torch.float64) for k, s in SHAPES.items()}
    equal = merge(models, EpiMer(1), base=base, metrics=[ones]*T).tensors["q.weight"]
    torch.testing.assert_close(equal, flat, atol=1e-12, rtol=1e-12)
    unequal = merge(models, EpiMer(1), base=base, metrics=stats).tensors["q.weight"]
    assert not torch.allclose(unequal, flat)


def test_what_adds_changes_needs_a_base(models, stats):
    for g in ("pullback", "epimer"):
        with pytest.raises(ValueError, match="base="):
            merge(models, g, metrics=stats)


def test_negative_metrics_are_clipped_and_reported(models, stats):
    stats[1]["q.weight.left"] = stats[1]["q.weight.left"] - 3*torch.eye(6, dtype=torch.float64)
    said = r"metrics\[1\]: the metric q.weight.left is not positive"
    with pytest.warns(MetricWarning, match=said):
        m = merge(models, Curved(damping=0.1), metrics=stats, executor="serial")
    assert m.tensors["q.weight"].isfinite().all()
    stats[1]["q.weight.left"][0, 0] = float("nan")
    with pytest.raises((MergeError, ValueError), match="q.weight"):
        merge(models, metrics=stats)


def test_metrics_that_a_geometry_cannot_use_are_refused(models, stats):
    with pytest.raises(MergeError, match="q.weight.*Euclidean"):
        merge(models, "sphere", metrics=stats)


@pytest.mark.parametrize("name", ["q.weight", "conv.weight"])
def test_eta_is_what_the_mean_with_metrics_saves(models, base, stats, name):
    (row,) = (r for r in inspect(models, base, metrics=stats, damping=0).eta if r["name"] == name)
    units = [s[f"{name}.right"].diagonal().mean() for s in stats]
    common = sum(s[f"{name}.right"]/u for s, u in zip(stats, units))/T
    Ms = [torch.kron(u*s[f"{name}.left"], common) for s, u in zip(stats, units)]
    xs = [m[name].flatten() for m in models]

    def F(x):
        return sum((x - y) @ M @ (x - y) for M, y in zip(Ms, xs))/T

    plain, best = F(sum(xs)/T), F(solved(xs, Ms, [1/T]*T))
    assert abs(row["eta"] - (plain - best)) < 1e-6*row["eta"]
    assert abs(row["F"] - plain) < 1e-6*row["F"]


def test_shares_of_eta_are_of_all_tensors_with_metrics(models, base, stats):
    found = inspect(models, base, metrics=stats, damping=0).eta
    assert {r["name"] for r in found} == {"q.weight", "conv.weight"}
    assert abs(sum(r["share"] for r in found) - 1) < 1e-12


def test_eta_from_files_on_the_command_line(models, stats, tmp_path):
    for i in range(T):
        merge([models[i]], out=tmp_path/f"m{i}")
        save_file(stats[i], tmp_path/f"s{i}.safetensors")
    metrics = "s0.safetensors,s1.safetensors,s2.safetensors"
    how = ("--metrics", metrics, "--json", "--plot", "eta.png")
    rc, out, err = cli("inspect", "m0", "m1", "m2", *how, cwd=tmp_path)
    assert rc == 0, err
    said = json.loads(out)
    saves = "By the models' own parabolas the mean with metrics saves 17 % of F"
    assert said["verdict"].startswith(saves) and 0 < said["gain"] <= 1
    assert (tmp_path/"eta.png").stat().st_size > 1000


@pytest.mark.parametrize("seed", [16, 54, 61, 63, 122, 141, 171])
def test_singular_metrics_that_leave_each_other_room(seed):
    """A point at distance zero of all models: there the pulls are rounding, and a solver that
    follows them walks away."""
    gen = torch.Generator().manual_seed(seed)

    def size(a, b):
        return int(torch.randint(a, b, (), generator=gen))

    n, m, k = size(2, 6), size(2, 8), size(2, 8)

    def thin(k):
        X = torch.randn(k, size(1, k), generator=gen, dtype=torch.float64)
        return X @ X.T

    Gs = [Kronecker((thin(m), thin(k))) for _ in range(n)]
    xs = [torch.randn(m, k, generator=gen, dtype=torch.float64) for _ in range(n)]
    x, mean = mean_of(Euclidean(), xs, None, Gs)
    assert mean.converged

    def pulls(x):
        return [G @ (t - x) for G, t in zip(Gs, xs)]

    assert sum(pulls(x)).norm() <= 1e-9*sum(p.norm() for p in pulls(sum(xs)/n))


@pytest.mark.parametrize("share", ["right", None])
def test_an_anchor_below_the_rounding_of_the_steepest_direction_still_holds(share):
    """Second moments of correlated inputs have one large eigenvalue; what float32 cannot tell from
    zero beside it is where the anchor decides."""
    g = torch.Generator().manual_seed(0)
    n = 300
    v = torch.randn(n, 1, generator=g, dtype=torch.float64)

    def steep():
        X = torch.randn(n, 4, generator=g, dtype=torch.float64)
        return v @ v.T + 1e-3*X @ X.T

    metrics = [(steep(), steep()) for _ in range(T)]
    x = [torch.randn(n, n, generator=g, dtype=torch.float64) for _ in range(T)]

    def mean(dtype):
        geometry = pullback(share=share)
        Gs = [Kronecker((L.to(dtype), R.to(dtype))) for L, R in metrics]
        chart = geometry.chart([t.to(dtype) for t in x], Gs)
        found = frechet_mean(chart.space, chart.points, [1.0]*T, warn=False)
        return chart.lift(found.x).double()

    exact = mean(torch.float64)
    assert (mean(torch.float32) - exact).norm() <= 2e-3*exact.norm()


def spectrum(g, n, condition, near=0.0):
    "Eigenvalues from 1 to 1/condition, in a random basis, or in one near to the coordinates."
    X = torch.randn(n, n, generator=g, dtype=torch.float64)
    Q = torch.linalg.qr(torch.eye(n, dtype=torch.float64) + near*X if near else X)[0]
    return (Q*torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ Q.T


@pytest.mark.parametrize("near", [0.0, 0.02], ids=["unlike", "alike"])
@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("condition, within", [(1e2, 1e-4), (1e4, 2e-3), (1e6, 5e-2)])
# the steepest of these do not reach float32's tolerance, and say so
@pytest.mark.filterwarnings("ignore")
def test_undamped_products_in_float32(models, condition, within, near):
    """The directions in which one model rules are a millionth of another's steepest, and known all
    the same."""
    g = torch.Generator().manual_seed(0)
    n = 48

    def side():
        return spectrum(g, n, condition, near)

    metrics = [(side(), side()) for _ in range(models)]
    x = [torch.randn(n, n, generator=g, dtype=torch.float64) for _ in range(models)]

    def points(dtype):
        Gs = [Kronecker((L.to(dtype), R.to(dtype))) for L, R in metrics]
        return [Point(t.to(dtype), G) for t, G in zip(x, Gs)]

    exact = frechet_mean(FLAT, points(torch.float64)).x
    found = frechet_mean(FLAT, points(torch.float32), maxiter=6).x
    assert (found.double() - exact).norm() <= within*exact.norm()


@pytest.mark.parametrize("share", ["left", "right"])
def test_a_shared_factor_is_one_product(share):
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(4, 4, generator=g) for _ in range(3)]
    Gs = [Kronecker((spectrum(g, 4, 10), spectrum(g, 4, 10))) for _ in range(3)]
    points, _ = pullback(share=share).chart(x, Gs)
    assert len(sum((w*p.G for w, p in zip((0.5, 0.3, 0.2), points)), Kronecker()).terms) == 1


def test_small_metrics_are_metrics():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, generator=g)*1e-4
    F = torch.rand(3, 20, generator=g) + 0.1

    def mean(unit):
        return frechet_mean(FLAT, [Point(t, unit*f) for t, f in zip(x, F)]).x

    for unit in (1e-12, 1e-22, 1e-30):
        torch.testing.assert_close(mean(unit), mean(1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "g",
    [pullback(), pullback(share=None), Curved(normalise=True), Curved(normalise=True, damping=0.1)],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["diagonal", "dense", "left", "right", "both"])
@pytest.mark.parametrize("unit", [1e-20, 1e-30, 1e-39])
def test_normalised_metrics_may_be_below_what_float32_can_invert(g, kind, unit):
    gen = torch.Generator().manual_seed(0)
    xs = [torch.randn(4, 3, generator=gen) for _ in range(3)]

    def sym(k):
        X = torch.randn(k, 2*k, generator=gen)
        return X @ X.T/k

    pairs = [(sym(4), sym(3)) for _ in xs]

    def metrics(u):
        if kind == "diagonal":
            return [Diagonal(u*torch.outer(L.diagonal(), R.diagonal())) for L, R in pairs]
        if kind == "dense":
            return [Dense(u*torch.kron(L, R)) for L, R in pairs]
        left = u if kind in ("left", "both") else 1.0
        right = u if kind in ("right", "both") else 1.0
        return [Kronecker((left*L, right*R)) for L, R in pairs]

    small, large = mean_of(g, xs, Gs=metrics(unit))[0], mean_of(g, xs, Gs=metrics(1.0))[0]
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-4)


def test_sixteen_bits_are_computed_in_thirty_two():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, generator=g).bfloat16()
    F = torch.rand(3, 50, generator=g)
    got = frechet_mean(FLAT, [Point(t, f) for t, f in zip(x, F)])
    assert got.x.dtype == torch.bfloat16 and got.residual < 1e-5
    torch.testing.assert_close(got.x, ((F*x).sum(0)/F.sum(0)).bfloat16())


def test_a_step_that_is_not_finite_is_not_taken():
    class Broken(Diagonal):
        def __add__(self, other):
            return self

        def __rmul__(self, w):
            return self

        def solve(self, b):
            return b*math.nan

    points = [Point(torch.tensor([float(i)]), Broken(float(i + 1))) for i in range(3)]
    got = frechet_mean(FLAT, points, warn=False)
    assert got.x.isfinite().all()
    assert not got.converged and "did not converge" in got.problem


def test_parameters_and_nothing():
    p = [torch.nn.Parameter(torch.tensor(x)) for x in ([1.0, 2.0], [3.0, 4.0])]
    got = frechet_mean(FLAT, [Point(t) for t in p])
    assert not got.x.requires_grad and got.x.tolist() == [2, 3]
    with pytest.raises(ValueError, match="no points"):
        frechet_mean(FLAT, [])


@pytest.mark.parametrize(
    "g",
    [
        "pullback",
        Curved(anchor=1.0),
        Curved(normalise=True),
        Curved(damping=0.1),
        Curved(share="right"),
    ],
    ids=repr,
)
def test_what_is_made_of_metrics_is_refused_without_them(models, base, tmp_path, g):
    none = r"metrics, and there are none(?s:.*)"
    remedy = r"frechet-merge curvature(?s:.*)metrics=, --metrics"
    with pytest.raises(ValueError, match=none + remedy):
        merge(models, g, base=base, out=tmp_path/"out")
    assert not (tmp_path/"out").exists()
    stem = "base_model.model.q.lora_"
    shapes = {f"{stem}A.weight": (2, 5), f"{stem}B.weight": (6, 2)}
    adapter = from_state_dict({k: draw(i, s) for i, (k, s) in enumerate(shapes.items())})
    adapter.adapter = dict(peft_type="LORA", r=2, lora_alpha=2)
    with pytest.raises(ValueError, match=none + r"BASE\+ADAPTER"):
        merge([adapter, adapter], g)


def test_what_is_not_made_of_metrics_is_merged_without_them(models, base):
    plain = sum(m["q.weight"] for m in models)/T
    torch.testing.assert_close(merge(models, "curved").tensors["q.weight"], plain)
    assert merge(models, "epimer", base=base).tensors["q.weight"].isfinite().all()


def labelled(stats, tmp_path, **about):
    "Statistics in files that say where they are from."
    files = [tmp_path/f"s{i}.safetensors" for i in range(len(stats))]
    for i, f in enumerate(files):
        save_file(stats[i], f, metadata={k: json.dumps(v[i]) for k, v in about.items()})
    return files


def test_metrics_in_another_order_than_the_models(models, stats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(T):
        merge([models[i]], out=f"m{i}")
    s = labelled(stats, tmp_path, model=["m0", "m1", "m2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no metric for")
        warnings.filterwarnings("ignore", "sums of metrics with two factors")
        for names in (["m0", "m1", "m2"], ["./m0", tmp_path/"m1", "m2/"], models):
            merge(names, metrics=s)
    with pytest.warns(UserWarning, match="s1.safetensors: was collected from m1, and is .* for m0"):
        merge(["m0", "m1", "m2"], metrics=[s[1], s[0], s[2]])
    with pytest.warns(UserWarning, match="s2.safetensors: was collected from m2, and is .* for m1"):
        inspect(["m0", "m1", "m2"], metrics=[s[0], s[2], s[1]])


@pytest.mark.parametrize(
    "what, said",
    [
        ("form", ["kronecker", "kronecker", "inputs"]),
        ("estimator", ["pullback", "empirical", "pullback"]),
    ],
)
def test_statistics_of_mixed_kinds_are_refused(models, stats, tmp_path, what, said):
    one, other = dict.fromkeys(said)
    files = labelled(stats, tmp_path, **{what: said})
    with pytest.raises(MergeError, match=f"is of {what} '{one}' and .* is of {what} '{other}'"):
        merge(models, metrics=files)
    other_suffix = [f.rename(f.with_suffix(".st")) for f in files]
    with pytest.raises(MergeError, match=f"s0.st is of {what} '{one}'"):
        merge(models, metrics=other_suffix)
    held = [Statistics(s, {what: k}) for s, k in zip(stats, said)]
    with pytest.raises(MergeError, match=f"metrics.0. is of {what} '{one}'"):
        merge(models, metrics=held)
    merge(models, metrics=held[:1]*T)


def test_the_card_identifies_the_metrics(models, stats, tmp_path):
    s = labelled(stats, tmp_path)
    out = merge(models, metrics=[*s[:2], stats[2]], out=tmp_path/"out").out
    card = (out/"README.md").read_text()
    assert str(tmp_path.parent) not in card
    for f in s[:2]:
        assert f"- metrics: {f.name}\n" in card
        assert f"{tmp_path.name}/{f.name}: sha256:{sha256(f.read_bytes()).hexdigest()}" in card
    assert "- metrics: in memory" in card


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_what_a_tensor_warns_of_is_said_once_with_its_name(models, base, stats, executor):
    for m in (*models, base):
        m["k.weight"] = m["q.weight"] + 1
        m["narrow.weight"] = m["q.weight"][:2]

    def said(*args, **kw):
        with pytest.warns(UserWarning) as found:
            merge(*args, executor=executor, **kw)
        return [str(w.message) for w in found if "no metric for" not in str(w.message)]

    cut = [t for t in said(models, EpiMer(3), base=base) if "triplets" in t]
    assert [t.split(" triplets")[0] for t in cut] == ["k.weight, q.weight: k = 3"]
    assert said(models, EpiMer(1), base=base) == [
        f"narrow.weight: a matrix of [2, 5] has no room for a direction of each of {T} "
        "models: it is averaged."
    ]
    copies = [models[0], models[0], models[1]]
    common = "k.weight, q.weight: updates 0 and 1 have a direction in common"
    assert any(t.startswith(common) for t in said(copies, EpiMer(1), base=base))
    stats[1]["q.weight.left"] = stats[1]["q.weight.left"] - 3*torch.eye(6, dtype=torch.float64)
    (negative,) = said(models, Curved(damping=0.1), metrics=stats)
    assert negative.startswith("metrics[1]: the metric q.weight.left is not positive")


def test_projected_metrics_are_for_epimer(models, base):
    metrics = [{"q.weight.projected": spd(i, T)} for i in range(T)]
    assert merge(models, EpiMer(1), base=base, metrics=metrics).tensors["q.weight"].isfinite().all()
    refused = r"metrics.0.: the metric of tensor 'q.weight' is projected.*\n.*epimer"
    for do in (
        lambda: merge(models, "pullback", base=base, metrics=metrics),
        lambda: merge(models, metrics=metrics),
        lambda: inspect(models, base, metrics=metrics),
    ):
        with pytest.raises(MergeError, match=refused):
            do()


def test_projected_metrics_of_another_basis_are_refused(models, base):
    sigma = bases(models, base, k=1)["q.weight.sigma"]
    plain = [{"q.weight.projected": spd(i, T)} for i in range(T)]

    def merged(models, metrics):
        return merge(models, EpiMer(1), base=base, metrics=metrics).tensors["q.weight"]

    def known(sigma):
        return [m | {"q.weight.sigma": sigma} for m in plain]

    torch.testing.assert_close(merged(models, known(sigma)), merged(models, plain))
    with pytest.raises(MergeError, match="tensor 'q.weight'.*order"):
        merged(models[::-1], known(sigma))
    with pytest.raises(MergeError, match="tensor 'q.weight'.*order"):
        merged(models, known(sigma.flip(0)))


def test_the_verdict_says_what_is_known():
    shares = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    rows = [{"name": n, "eta": x, "F": 1.0, "share": x} for n, x in shares.items()]
    found = Inspection([], [], [], eta=rows)
    assert found.verdict == (
        "By the models' own parabolas the mean with metrics saves 25 % of F, which is "
        "what the plain mean loses, half of it in 2 of 4 tensors (a, b); only "
        "examples can say whether for the better."
    )
    small = Inspection([], [], [], eta=[r | {"eta": r["eta"]/10} for r in rows]).verdict
    assert "saves 2 % of F" in small and "little" in small
    assert not Inspection([], [], []).verdict
    for said in (found.verdict, small):
        assert said.count(".") == 1 and "worth its cost" not in said


def test_eta_is_not_left_out_in_silence(models, base, stats):
    with pytest.raises(ValueError, match="--headers"):
        inspect(models, base, numbers=False, metrics=stats)
    odd = [*models[:2], {k: v for k, v in models[2].items() if k != "q.bias"}]
    with pytest.warns(UserWarning, match="η was not computed: these models cannot be merged"):
        assert not inspect(odd, base, metrics=stats).eta


@pytest.mark.parametrize(
    "g", [Curved(), pullback(), pullback(share=None), Curved(damping=0.1)], ids=repr
)
def test_single_precision_metrics_of_double_precision_models(g):
    for seed in range(6):
        gen = torch.Generator().manual_seed(seed)

        def cov(n, gen=gen):
            x = torch.randn(8, n, generator=gen)
            return x.T @ x/8

        models = [{"w": torch.randn(24, 32, generator=gen, dtype=torch.float64)} for _ in range(3)]
        stats = [{"w.left": cov(24), "w.right": cov(32)} for _ in range(3)]

        def merged(dtype, models=models, stats=stats):
            models = [{"w": m["w"].to(dtype)} for m in models]
            base = {"w": torch.zeros(24, 32, dtype=dtype)}
            return merge(models, g, base, metrics=stats).tensors["w"].double()

        both = [merged(torch.float64), merged(torch.float32)]
        # metrics are semi-definite up to float32, and of rank 8
        assert all(x.isfinite().all() for x in both)
        # undamped, many points satisfy all models, and which one is found depends on rounding
        if g != Curved():
            assert (both[0] - both[1]).norm() < 0.02*both[0].norm()


def test_double_precision_metrics_of_single_precision_models():
    models = [{"w": torch.randn(4, 3)} for _ in range(2)]
    G = [torch.rand(4, 3, dtype=torch.float64) + 0.1 for _ in range(2)]
    m = merge(models, metrics=[{"w": g} for g in G]).tensors["w"]
    torch.testing.assert_close(m, (sum(g*x["w"] for g, x in zip(G, models))/sum(G)).float())


@pytest.mark.parametrize("share", ["right", "left"])
def test_who_cares_for_nothing_takes_no_part_in_what_is_shared(share):
    torch.manual_seed(0)
    X = [torch.randn(4, 3) for _ in range(2)]

    def both(how, *Gs):
        models, base = [{"w": x} for x in X], {"w": torch.zeros(4, 3)}
        metrics = [{"w.left": L, "w.right": R} for L, R in Gs]
        return merge(models, pullback(share=how), base, metrics=metrics).tensors["w"]

    nothing = (torch.zeros(4, 4), torch.zeros(3, 3))
    some = (torch.eye(4) + 0.5, torch.eye(3) + 0.2)
    torch.testing.assert_close(both(share, nothing, some), both(None, nothing, some))
    # a diagonal is the matrix that it stands for
    d = torch.tensor([0.5, 1.0, 2.0])
    short, long = (some[0], d), (some[0], d.diag())
    torch.testing.assert_close(both(share, some, short), both(share, some, long))


def test_one_file_for_two_models(models, stats, tmp_path):
    save_file(stats[0], tmp_path/"s.safetensors")
    with pytest.warns(UserWarning, match="s.safetensors: is given for two models"):
        merge(models, metrics=[tmp_path/"s.safetensors"]*3)


def test_sums_without_a_closed_form_are_named():
    "Undamped, of two factors each; not where damping or a shared side was chosen."
    x = [{"w": torch.randn(3, 2)} for _ in range(2)]
    G = [{"w.left": torch.eye(3)*(i + 1), "w.right": torch.eye(2)} for i in range(2)]
    with pytest.warns(UserWarning, match="have no closed form"):
        merge(x, metrics=G)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for g in (Curved(damping=0.1), Curved(share="right")):
            merge(x, g, metrics=G)

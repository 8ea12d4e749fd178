"""Trimmed means are the formulas of their papers, with weights that vote, and alike whenever they
are run."""
import pytest
import torch
from conftest import cli, save
from test_recipe_files import deep

from frechet_merge import MergeError, check_geometry, merge
from frechet_merge.files.stack import Stack
from frechet_merge.files.tensors import MemoryTensor
from frechet_merge.geometries.directions import Slerp
from frechet_merge.geometries.registry import geometry_named, spelled
from frechet_merge.spaces.mean import frechet_mean

NAMES = [
    "slerp",
    "slerp:straight=0.9995",
    "chordal",
    "ties:density=0.5",
    "dare:density=0.5",
    "della:density=0.5",
    "breadcrumbs:density=0.5,gamma=0.1",
    "stock",
    "sce:select=0.5",
    "clipped:t=0.1",
]
NAME = "h.1.mlp.weight"
# as they are without arguments
GEOMETRIES = {n: geometry_named(n) for n in (name.partition(":")[0] for name in NAMES)}


@pytest.fixture
def four():
    "A base and three models."
    base = deep(9)
    return base, [{k: v + 0.1*deep(i)[k] for k, v in base.items()} for i in range(3)]


@pytest.mark.parametrize("name", [*NAMES, *GEOMETRIES])
def test_laws_that_are_not_waived_hold(name):
    g = geometry_named(name)
    assert check_geometry(g)
    assert geometry_named(spelled(g)) == g


def by_hand(deltas, ws, density, scale):
    kept = []
    for x in deltas:
        k = int(density*x.numel())
        edge = x.abs().flatten().sort(descending=True).values[k - 1]
        kept.append(torch.where(x.abs() >= edge, x, 0))
    sign = sum(w*x for w, x in zip(ws, kept)).sign()
    agree = [(x.sign() == sign) & (x != 0) for x in kept]
    above = sum(w*x*M for w, x, M in zip(ws, kept, agree))
    below = sum(w*M.to(deltas[0]) for w, M in zip(ws, agree))
    return scale*torch.where(below > 0, above/below, 0)


@pytest.mark.parametrize("ws", [[1, 1, 1], [0.1, 0.2, 2.0], [1, 0, 3]])
def test_ties_votes_with_its_weights(four, ws):
    base, models = four
    found = merge(models, "ties:density=0.5", base, ws, 0.7).tensors[NAME]
    deltas = [m[NAME] - base[NAME] for m in models]
    torch.testing.assert_close(found, base[NAME] + by_hand(deltas, ws, 0.5, 0.7))


def test_a_sum_of_what_is_trimmed(four):
    base, models = four
    found = merge(models, "breadcrumbs:density=1.0", base, sum=[0.5, -0.3, 1.2]).tensors[NAME]
    deltas = [m[NAME] - base[NAME] for m in models]
    by_hand = base[NAME] + sum(c*d for c, d in zip([0.5, -0.3, 1.2], deltas))
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("name", ["dare:density=0.5,seed=3", "della:density=0.5,seed=3"])
def test_chance_is_the_same_in_every_run(four, name):
    base, models = four
    one = merge(models, name, base, executor="serial").tensors
    two = merge(models, name, base, executor="threads").tensors
    other = merge(models, name.replace("=3", "=4"), base).tensors
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one[NAME], other[NAME])


def test_dare_is_the_sum_in_expectation():
    base = {"w": torch.zeros(4, 4)}
    models = [{"w": deep(i)["h.0.mlp.weight"]} for i in range(2)]
    draws = [
        merge(models, f"dare:density=0.5,seed={s}", base, sum=[1, 1]).tensors["w"]
        for s in range(300)
    ]
    # what is kept is a half, and twice as large up to the luck of a draw
    close = torch.stack(draws).mean(0) - sum(m["w"] for m in models)
    assert close.abs().max() < 0.35


# of two chunks and more, in rows that do not fit into one evenly
BY_RANGES = [
    "ties:density=0.2",
    "breadcrumbs:density=0.5,gamma=0.1",
    "dare:density=0.5,seed=3",
    "dare:density=0.5,elect=True",
    "della:density=0.5,epsilon=0.2",
    "sce:select=0.3",
    "sce",
    "outliers",
    "ram",
    "ram:gain=0.1",
]


@pytest.mark.parametrize("name", BY_RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ranges_of_a_tensor_are_trimmed_as_the_whole_is(name, dtype):
    gen = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(530, 1000, generator=gen).to(dtype) for _ in range(4))
    g, ws = geometry_named(name), [0.5, 0.3, 0.2]
    base = base if g.needs.base else None
    found = merge(
        [{"w": x} for x in models], g, None if base is None else {"w": base}, ws, dtype="float64"
    ).tensors["w"]
    wide = torch.promote_types(dtype, torch.float32)
    thetas = [x.to(wide) - (0 if base is None else base.to(wide)) for x in models]
    stack = Stack([MemoryTensor(x) for x in thetas], name="w")
    Gs, weights = (ws, None) if g.needs.weighs else (None, ws)
    chart = g.ranges(stack, Gs)(0, thetas)
    want = chart.lift(frechet_mean(chart.space, chart.points, weights).x)
    want = want if base is None else base.to(wide) + want
    assert torch.equal(found, want.double())


@pytest.mark.parametrize("name", BY_RANGES)
def test_no_tensor_is_held_whole(name, monkeypatch):
    def whole(self, t):
        raise AssertionError("version read whole")

    needs = geometry_named(name).needs
    base, *models = ({"w": torch.randn(530, 1000)} for _ in range(4))
    monkeypatch.setattr(Stack, "__getitem__", whole)
    merge(models, name, base if needs.base else None, memory=40 << 20, executor="serial")


def test_ties_of_a_tensor_of_several_chunks():
    gen = torch.Generator().manual_seed(2)
    base, *deltas = torch.randn(4, 600, 1000, generator=gen, dtype=torch.float64)
    models = [{"w": base + x} for x in deltas]
    found = merge(models, "ties:density=0.3", {"w": base}, [0.5, 0.3, 0.2]).tensors["w"]
    deltas = [m["w"] - base for m in models]
    torch.testing.assert_close(found, base + by_hand(deltas, [0.5, 0.3, 0.2], 0.3, 1.0))


def test_slerp_is_the_great_circle_and_its_coefficients(four):
    base, models = four
    a, b = ({k: v*s for k, v in deep(i).items()} for i, s in ((1, 1.0), (2, 3.0)))
    found = merge([a, b], Slerp(), weights=[0.7, 0.3]).tensors[NAME].double()
    x, y = a[NAME].double(), b[NAME].double()
    phi = torch.acos((x*y).sum()/x.norm()/y.norm())
    by_hand = (torch.sin(0.7*phi)*x + torch.sin(0.3*phi)*y)/torch.sin(phi)
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-6)


def test_what_reads_entries_does_not_read_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    adapter.save_pretrained(tmp_path/"a")
    args = "merge", tmp_path/"a", tmp_path/"a", "-o", tmp_path/"o", "--geometry"
    code, _, err = cli(*args, "ties")
    assert code == 2 and "knots" in err and not (tmp_path/"o").exists()
    assert cli(*args, "knots")[0] == 0


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "sce"])
def test_parameters_are_charted_as_tensors_are(name):
    models = [torch.tensor([[1.0, 1.0, i, 2.0, 1.0]]) for i in (1.0, 3.0)]
    g = geometry_named(f"{name}:{'select' if name == 'sce' else 'density'}=0.5")
    want = g.chart(models).points
    found = g.chart([torch.nn.Parameter(x) for x in models]).points
    assert all(torch.equal(p.x, q.x) for p, q in zip(found, want))


@pytest.mark.parametrize("name", ["ties", "dare", "breadcrumbs"])
@pytest.mark.parametrize("weights", [[1, 1], [1, 0]])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_though_nothing_of_it_counts(name, weights, odd):
    base, a, b = ({"w": torch.tensor([[float(i), -2.0, 3.0, 4.0]])} for i in range(3))
    b["w"][0, 2] = odd
    with pytest.raises(MergeError, match="models.1.: tensor 'w' is (nan|inf) at element 2"):
        merge([a, b], base=base, geometry=name, weights=weights)


def test_a_base_is_asked_for(tmp_path):
    a, b = save(tmp_path/"a", deep(0)), save(tmp_path/"b", deep(1))
    code, _, err = cli("merge", a, b, "-o", tmp_path/"o", "--geometry", "ties:density=0.3")
    assert code == 2 and "--base" in err
    args = "merge", a, b, "-o", tmp_path/"o", "--geometry", "ties:density=0.3", "--base", a
    assert cli(*args)[0] == 0


@pytest.mark.parametrize("select", [0.01, 0.3, 0.9])
def test_sce_selects_among_the_entries_that_vary(four, select):
    "Training often leaves most entries as they are: a share of those would be none."
    base, models = four
    g = torch.Generator().manual_seed(0)
    still = {k: torch.rand(v.shape, generator=g) < 0.6 for k, v in base.items()}
    models = [{k: torch.where(still[k], base[k], v) for k, v in m.items()} for m in models]
    found = merge(models, f"sce:select={select}", base).tensors[NAME].double()
    X = torch.stack([m[NAME] - base[NAME] for m in models]).double()
    variance = X.var(0, unbiased=False)
    count = max(int(select*int((~still[NAME]).sum())), 1)
    kept = variance >= variance.flatten().sort(descending=True).values[count - 1]
    X = X*kept
    shares = (X**2).flatten(1).mean(1)
    agree = (X.sign() == X.sum(0).sign()) & (X != 0)
    ws = shares[:, None, None]*agree
    want = base[NAME].double() + torch.where(kept, (ws*X).sum(0)/ws.sum(0), 0)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "text, argument",
    [
        ("slerp:axis=7", "axis"),
        ("slerp:straight=0.9,axis=7", "axis"),
        ("slerp:axes=-1", "axis"),
        ("stock:axis=up", "axis"),
        ("ties:density=3", "density"),
        ("dare:density=0.5,seed=x", "seed"),
        ("breadcrumbs:density=0.5,gamma=2", "gamma"),
        ("sce:select=0", "select"),
        ("ties:nothing=1", "density"),
    ],
)
def test_the_hint_names_the_argument_that_is_wrong(text, argument):
    name = text.partition(":")[0]
    with pytest.raises(ValueError, match=f"write {name}:{argument}=…"):
        geometry_named(text)

"""A fine-tune that moved far: CHGNet 0.3.0 and what became of it on r2SCAN data, merged.

    python -m venv VENV && VENV/bin/pip install chgnet==0.4.2 -e '.[dev]'
    VENV/bin/python bench/crystals.py

CHGNet (Deng et al. 2023) is a graph network for crystals; its package carries three sets of
weights: 0.2.0, 0.3.0, and 0.3.0 fine-tuned on energies of another functional, r2SCAN. They are read
from where pip put them, and nothing of them is kept. Crystals are made here, strained and shaken;
half of them give metrics, from each model's own predictions, and the other half judge.

A merge is judged by its energies per atom and its forces, root mean square, in units of how far the
two parents are from each other. Nothing is nearer to both than 0.5 and 0.5, and a merge that is the
mean of what they say is 0 from that. The table of atomic reference energies is no part of the
network (each data set has its own, by linear regression), and is left out of weights and energies.

Aligning is tried twice: on the two as they are, and on the fine-tune with its units shuffled, which
is the same function. Units of angles stay, as they are on both axes of one matrix. Of a merge on
spheres each tensor is also put into the mean alone: which of them does the harm?

Writes bench/results/crystals.csv (the merges), crystals_segment.csv (how far what lies between the
two is from the mean of what they say), crystals_tensors.csv (single tensors of the sphere) and
crystals_layers.csv (what merges keep of the spread of each layer's outputs), and what they were
made with, the changes of the weights among it."""

import argparse
import math
import statistics
import warnings
from importlib.metadata import version

import numpy as np
import torch
from adapters import about, write_rows
from chgnet.model import CHGNet
from collapse import rescaled
from pymatgen.core import Lattice, Structure

from frechet_merge import merge
from frechet_merge.curvature.activations import activations, weighted
from frechet_merge.diagnostics.collapse import ratios
from frechet_merge.diagnostics.segment import between
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.geometries.fisher import Curved
from frechet_merge.symmetries.gauges import align_gauges, in_one_gauge
from frechet_merge.symmetries.groups import Group, Member, Part
from frechet_merge.symmetries.groups import check_groups, gauged, random_element
from frechet_merge.messages import MergeError

OLD, NEW = "0.3.0", "r2scan"
WIDTH = 64  # of every stream of this network
STEPS = 11  # points on a segment
SHAKE, STRAIN = 0.08, 0.02  # Å; relative
PROBES = 4  # random directions of outputs, for each crystal
CUBIC = {  # space group, lattice constant in Å, and one atom of each kind
    "NaCl": ("Fm-3m", 5.64, {"Na": (0, 0, 0), "Cl": (0.5, 0.5, 0.5)}),
    "MgO": ("Fm-3m", 4.21, {"Mg": (0, 0, 0), "O": (0.5, 0.5, 0.5)}),
    "LiF": ("Fm-3m", 4.03, {"Li": (0, 0, 0), "F": (0.5, 0.5, 0.5)}),
    "CaF2": ("Fm-3m", 5.46, {"Ca": (0, 0, 0), "F": (0.25, 0.25, 0.25)}),
    "Li2O": ("Fm-3m", 4.62, {"O": (0, 0, 0), "Li": (0.25, 0.25, 0.25)}),
    "CsCl": ("Pm-3m", 4.12, {"Cs": (0, 0, 0), "Cl": (0.5, 0.5, 0.5)}),
    "GaAs": ("F-43m", 5.65, {"Ga": (0, 0, 0), "As": (0.25, 0.25, 0.25)}),
    "ZnS": ("F-43m", 5.41, {"Zn": (0, 0, 0), "S": (0.25, 0.25, 0.25)}),
    "Si": ("Fd-3m", 5.43, {"Si": (0, 0, 0)}),
    "Al": ("Fm-3m", 4.05, {"Al": (0, 0, 0)}),
    "Fe": ("Im-3m", 2.87, {"Fe": (0, 0, 0)}),
    "SrTiO3": ("Pm-3m", 3.905, {"Sr": (0, 0, 0), "Ti": (0.5, 0.5, 0.5), "O": (0.5, 0.5, 0)}),
}


def crystals(seed, shake, strain):
    "Each of them, its lattice strained and its atoms shaken, by lengths in Å."
    rng = np.random.default_rng(seed)
    for group, a, atoms in CUBIC.values():
        found = Structure.from_spacegroup(group, Lattice.cubic(a), [*atoms], [*atoms.values()])
        bend = np.eye(3) + strain*rng.uniform(-1, 1, (3, 3))
        found = Structure(Lattice(found.lattice.matrix @ bend), found.species, found.frac_coords)
        for i in range(len(found)):
            found.translate_sites([i], shake*rng.standard_normal(3), frac_coords=False)
        yield found


def opened(name):
    "A network in the package, without its table of reference energies."
    model = CHGNet.load(model_name=name, use_device="cpu", verbose=False).eval()
    model.composition_model = None
    return model


def state_of(model):
    return {n: x.detach().clone() for n, x in model.state_dict().items()}


class Judge:
    "A network into which states are put, and the crystals on which it is run."

    def __init__(self, model, graphs):
        self.model, self.graphs = model, graphs

    def says(self, state):
        "Energies per atom (N,) in eV, and forces (atoms, 3) in eV/Å."
        self.model.load_state_dict(state)
        said = self.model(self.graphs, task="ef")
        return said["e"].detach().double(), torch.cat(said["f"]).detach().double()

    def spreads(self, state):
        "How the outputs of each layer are spread over atoms, bonds or angles."
        self.model.load_state_dict(state)
        fed = [self.graphs[i : i + 8] for i in range(0, len(self.graphs), 8)]
        # the last update of angles is read by nothing, and no fine-tuning moves it
        layers = [n for n in weighted(self.model) if not n.startswith(("angle_layers.2", "site"))]
        return activations(self.model, fed, layers, lambda model, batch: model(batch))


def rms(x):
    return float(x.square().mean().sqrt())


def far(said, a, b, t=0.5):
    "From the parents and from what lies at t between what they say, by energies and forces."
    found = {}
    for what, x, p, q in zip(("energy", "forces"), said, a, b):
        unit = rms(p - q)
        found[f"{what}_from_old"] = rms(x - p)/unit
        found[f"{what}_from_new"] = rms(x - q)/unit
        found[f"{what}_from_both"] = rms(x - ((1 - t)*p + t*q))/unit
    return found


def rounded(row):
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


# ---- metrics, from a model's own predictions


def inputs_and_back(model, graphs, objective):
    "Of each linear layer, what went in and what came back of an objective of its outputs."
    kept, handles = {}, []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}

    def keep(name):
        def hook(layer, args, out):
            kept[name] = args[0].detach(), out

        return hook

    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(keep(name)))
    try:
        said = model(graphs, return_site_energies=True)
    finally:
        for handle in handles:
            handle.remove()
    outs = [out for _, out in kept.values()]
    backs = torch.autograd.grad(objective(said), outs, allow_unused=True)
    return {n: (x, d) for (n, (x, _)), d in zip(kept.items(), backs) if d is not None}


def kronecker(model, graphs, generator):
    "Second moments of what goes into each linear layer, and of what site energies send back."
    left, right, rows = {}, {}, {}

    def noisy(said):
        sites = torch.cat(said["site_energies"])
        return (sites*torch.randn(sites.shape, generator=generator)).sum()

    for graph in graphs:
        for n, (x, d) in inputs_and_back(model, [graph], noisy).items():
            right[n] = right.get(n, 0) + x.T @ x
            left[n] = left.get(n, 0) + d.T @ d
            rows[n] = rows.get(n, 0) + len(x)
    both = {f"{n}.weight.right": x/rows[n] for n, x in right.items()}
    return both, both | {f"{n}.weight.left": x/len(graphs) for n, x in left.items()}


def diagonal(model, graphs, units, generator):
    "Squared gradients of energies and forces, in units of how far the parents are apart."
    found = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    params = dict(model.named_parameters())
    for graph in graphs:
        said = model([graph], task="ef")
        outputs = [said["e"].flatten()/units[0], torch.cat(said["f"]).flatten()/units[1]]
        for i in range(PROBES):
            noise = [torch.randn(x.shape, generator=generator)/len(x)**0.5 for x in outputs]
            z = sum((x*e).sum() for x, e in zip(outputs, noise))
            last = i == PROBES - 1
            grads = torch.autograd.grad(
                z, [*params.values()], allow_unused=True, retain_graph=not last
            )
            for n, g in zip(params, grads):
                if g is not None:
                    found[n] += g.square()/PROBES
    return found


def metrics_of(states, model, graphs, units):
    "Name of a kind → the metrics of both models."
    found = {"inputs": [], "Kronecker": [], "diagonal": []}
    for i, state in enumerate(states):
        model.load_state_dict(state)
        generator = torch.Generator().manual_seed(i)
        for p in model.parameters():
            p.requires_grad_(True)
        of_inputs, of_both = kronecker(model, graphs, generator)
        found["inputs"].append(of_inputs)
        found["Kronecker"].append(of_both)
        found["diagonal"].append(diagonal(model, graphs, units, generator))
    return found


# ---- what units may do


def rows(*names):
    "Members that lead into units: the rows of weights, and the numbers of vectors."
    return tuple(Member(n) for n in names)


def layer(*names):
    "Weight and bias of each."
    return [f"{name}.{end}" for name in names for end in ("weight", "bias")]


def gates(kind, count, inner):
    "The pairs of layers of every gated MLP of a kind."
    for i in range(count):
        for side in ("core", "gate"):
            yield f"{kind}_layers.{i}", f"{kind}_layers.{i}.{inner}.mlp_{side}.layers"


def columns(starts, kinds):
    "Where a stream is read: columns of the first layer of every gated MLP."
    found = []
    for kind, (count, inner, first) in kinds.items():
        for _, name in gates(kind, count, inner):
            found += [Member(f"{name}.{first}.weight", 1, start) for start in starts[kind]]
    return tuple(found)


KINDS = {
    "atom_conv": (4, "twoBody_atom", 0),
    "bond_conv": (3, "twoBody_bond", 0),
    "angle": (3, "twoBody_bond", 1),
}


def streams():
    "Atoms and bonds, each of them one order of its units in all layers."
    at = {"atom_conv": (0, 128), "bond_conv": (192,), "angle": (192,)}
    own = [f"atom_conv_layers.{i}.mlp_out.layers.1.weight" for i in range(4)]
    into = (Member("atom_embedding.embedding.weight", 1), *rows(*own, *layer("readout_norm")))
    out = (*columns(at, KINDS), Member("site_wise.weight", 1), Member("mlp.layers.0.weight", 1))
    yield Group("atoms", WIDTH, (Part("still", into, out),))
    at = {"atom_conv": (64,), "bond_conv": (0, 64), "angle": (0, 64)}
    own = [f"bond_conv_layers.{i}.mlp_out.layers.1.weight" for i in range(3)]
    into = rows("bond_embedding.weight", *own)
    yield Group("bonds", WIDTH, (Part("still", into, columns(at, KINDS)),))


def messages():
    "What gated MLPs put out, which all layers multiply by the same weights of bonds."
    for kind, count, inner, weights in (
        ("atom_conv", 4, "twoBody_atom", "bond_weights_ag.weight"),
        ("bond_conv", 3, "twoBody_bond", "bond_weights_bg.weight"),
    ):
        into, out = [], []
        for i in range(count):
            name = f"{kind}_layers.{i}"
            out.append(Member(f"{name}.mlp_out.layers.1.weight", 1))
            for side, norm in (("core", "bn1"), ("gate", "bn2")):
                into += layer(f"{name}.{inner}.mlp_{side}.layers.3", f"{name}.{inner}.{norm}")
        # for a bond its weight counts twice, and what scales it is no linear map
        if kind == "bond_conv":
            parts = [Part("still", rows(*into, weights), tuple(out))]
        else:
            parts = [Part("still", rows(*into)), Part("scaling", rows(weights), tuple(out))]
        yield Group(f"messages of {kind}", WIDTH, tuple(parts))


def hidden():
    "The units within each MLP."
    for kind in ("atom_conv", "bond_conv"):
        count, inner, _ = KINDS[kind]
        for _, name in gates(kind, count, inner):
            into, out = rows(*layer(f"{name}.0")), (Member(f"{name}.3.weight", 1),)
            yield Group(name, WIDTH, (Part("still", into, out),))
    for before, after in ((0, 2), (2, 4), (4, 7)):
        into, out = rows(*layer(f"mlp.layers.{before}")), (Member(f"mlp.layers.{after}.weight", 1),)
        yield Group(f"mlp.{before}", WIDTH, (Part("still", into, out),))


def in_doubles(graph):
    "A graph whose numbers are in float64, to try groups on."
    found = graph.to("cpu")
    for name, x in vars(found).items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            setattr(found, name, x.double())
    return found


def shuffled(state, groups, seed=0):
    "The same function, its units in another order and of other lengths."
    gen = torch.Generator().manual_seed(seed)
    gauge = {g.name: random_element(g, gen) for g in groups}
    found = gauged(from_state_dict(state), groups, gauge)
    return {n: found[n] for n in state}, gauge


def units_at_home(found, groups, gauge=None):
    "The share of units that come to stand where those of the first model do."
    right = total = 0
    for g in groups:
        source = found.gauges[1][g.name].source
        home = source if gauge is None else gauge[g.name].source[source]
        right += int((home == torch.arange(g.size)).sum())
        total += g.size
    return right/total


# ---- the tables


def moved(old, new):
    "How far the fine-tune is from what it was made of, relative to that."
    far2 = {n: float((new[n] - x).double().square().sum()) for n, x in old.items()}
    own2 = {n: float(x.double().square().sum()) for n, x in old.items()}
    each = [math.sqrt(far2[n]/own2[n]) for n, x in old.items() if x.dim() > 1 and far2[n]]
    return {
        "whole": math.sqrt(sum(far2.values())/sum(own2.values())),
        "median matrix": statistics.median(each),
        "largest matrix": max(each),
        "matrices": len(each),
    }


def strangers(old):
    "What 0.2.0 has in common with 0.3.0, and what a merge of them says."
    other = state_of(opened("0.2.0"))
    alike = sum(n in old and old[n].shape == x.shape for n, x in other.items())
    try:
        merge([other, old])
    except MergeError as e:
        return {"tensors": [len(other), len(old)], "of one shape": alike, "refused": str(e)}
    raise AssertionError("networks of different shapes were merged")


def merges(old, new, metrics):
    "Name → state."
    mean, sphere = between(old, new, 0.5), between(old, new, 0.5, "sphere")
    yield "mean", mean
    yield "sphere", sphere
    yield "sphere, matrices only", {n: (sphere if x.dim() > 1 else mean)[n] for n, x in old.items()}
    yield "norm-rescaled", rescaled([old, new])
    how = Curved(normalise=True, damping=0.1)
    for kind, of_both in metrics.items():
        yield f"curved, {kind}", dict(merge([old, new], how, metrics=of_both).tensors)


def length(state):
    return math.sqrt(sum(float(x.double().square().sum()) for x in state.values()))


class Study:
    "Two parents, what they say, and the crystals on which merges of them are judged."

    def __init__(self, judge, old, new):
        self.judge, self.old, self.new = judge, old, new
        self.a, self.b = judge.says(old), judge.says(new)
        self.apart = [rms(p - q) for p, q in zip(self.a, self.b)]
        self.spreads = [judge.spreads(s) for s in (old, new)]
        self.mean = between(old, new, 0.5)

    def gaps(self, state, t=0.5):
        return far(self.judge.says(state), self.a, self.b, t)

    def row(self, pair, name, state, spreads=None):
        "A line of the table, and what the merge keeps of each layer."
        here = ratios(self.judge.spreads(state), spreads or self.spreads, name)
        away = {n: state[n] - x for n, x in self.mean.items()}
        found = {"pair": pair, "merge": name, **self.gaps(state)}
        found["from_mean"] = length(away)/length(self.mean)
        found["least_variance"] = min(r["variance"] for r in here)
        print(rounded(found), flush=True)
        return found, here

    def alone(self, state):
        "What each tensor of a merge does to the mean, the most harmful first."
        found = []
        for n, x in self.mean.items():
            gap = self.gaps({**self.mean, n: state[n]})
            row = {"tensor": n, "longer": float(state[n].norm()/x.norm()) if x.norm() > 0 else 1.0}
            row |= {k: gap[f"{k}_from_both"] for k in ("energy", "forces")}
            found.append(rounded(row))
        return sorted(found, key=lambda r: -r["energy"])

    def aligned(self, groups):
        "Pairs of states by how they were put; of those in one gauge the share of units at home."
        shuffled_new, gauge = shuffled(self.new, groups)
        pairs, home = {}, {}
        for name, q in (("as they are", self.new), ("shuffled", shuffled_new)):
            both = [from_state_dict(self.old), from_state_dict(q)]
            found = align_gauges(both, groups)
            seen = in_one_gauge(both, groups, found)[1]
            pairs[name] = self.old, q
            pairs[f"{name}, aligned"] = self.old, {n: seen[n] for n in q}
            is_own = name == "as they are"
            home[f"{name}, aligned"] = units_at_home(found, groups, None if is_own else gauge)
        return pairs, home

    def segments(self, pairs):
        "How far what lies between two is from the mean of what they say."
        ways = {w: (pq, "euclidean") for w, pq in pairs.items()}
        ways["as they are, sphere"] = (self.old, self.new), "sphere"
        for way, ((p, q), geometry) in ways.items():
            for i in range(STEPS):
                t = i/(STEPS - 1)
                state = between(p, q, t, geometry) if 0 < t < 1 else (p if t == 0 else q)
                gap = self.gaps(state, t)
                row = {k: gap[f"{k}_from_both"] for k in ("energy", "forces")}
                yield rounded({"way": way, "t": t, **row})


def of_merges(study, metrics):
    "A row for each merge of the two as they are, and what it keeps of each layer."
    found, layers = [], []
    for name, state in merges(study.old, study.new, metrics):
        row, here = study.row("as they are", name, state)
        found.append(rounded(row | {"at_home": ""}))
        layers += map(rounded, here)
    return found, layers


def of_gauges(study, pairs, home):
    "The same for the mean of each other pair."
    found, layers = [], []
    for name, pair in pairs.items():
        if name != "as they are":
            spreads = [study.judge.spreads(s) for s in pair]
            row, here = study.row(name, "mean", between(*pair, 0.5), spreads)
            found.append(rounded(row | {"at_home": home.get(name, "")}))
            layers += [rounded({**r, "merge": f"mean, {name}"}) for r in here]
    return found, layers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=2, help="of each crystal, in each half")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    model = opened(NEW)
    old, new = state_of(opened(OLD)), state_of(model)
    seeds = range(2*arguments.copies)
    graphs = [model.graph_converter(c) for s in seeds for c in crystals(s, SHAKE, STRAIN)]
    half = len(graphs)//2
    study = Study(Judge(model, graphs[:half]), old, new)
    metrics = metrics_of([old, new], model, graphs[half:], study.apart)
    groups = [*streams(), *messages(), *hidden()]
    check_groups(model, groups, [in_doubles(g) for g in graphs[:6]])
    pairs, home = study.aligned(groups)
    said = about(
        f"python bench/crystals.py --copies {arguments.copies}",
        chgnet=version("chgnet"),
        crystals=half,
        parents_apart=dict(zip(("energy, eV per atom", "forces, eV/Å"), study.apart)),
        moved=moved(old, new),
        strangers=strangers(old),
        groups=len(groups),
        units=sum(g.size for g in groups),
    )
    found, layers = of_merges(study, metrics)
    more, of_more = of_gauges(study, pairs, home)
    write_rows("crystals", found + more, said)
    write_rows("crystals_layers", layers + of_more, said)
    write_rows("crystals_segment", [*study.segments(pairs)], said)
    few = Study(Judge(model, graphs[: len(CUBIC)]), old, new)
    write_rows("crystals_tensors", few.alone(between(old, new, 0.5, "sphere"))[:12], said)


if __name__ == "__main__":
    main()

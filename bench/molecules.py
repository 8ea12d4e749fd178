"""Eight networks that were trained apart, merged: the ensemble ANI-1x of torchani.

    python -m venv VENV && VENV/bin/pip install -e '.[dev]' ase lark-parser requests
    VENV/bin/pip install --no-deps torchani==2.2
    VENV/bin/python bench/molecules.py

ANI-1x (Smith et al. 2018) says the energy of a molecule eight times, each time with a network of
its own for each element, whose hidden layers have 96 to 160 units and CELU. Its package carries all
eight (this version of it: later ones download them); they are read from where pip put them, and
nothing of them is kept. Small molecules of ase are shaken; some repair, and others judge.

The eight are merged two, four and eight at a time: by the mean, on spheres, with norms rescaled, as
they are and in one gauge, and repaired. Beside them stands the ensemble: the mean of what they say.
What is right here is what all eight say together. Of each molecule's energies their own mean is
taken away, so that what is judged is how energy changes with shape; the error is relative to how
much that is, and 1 is the error of saying nothing. *variance* is the ratio of the merged network's
to its models' over the units of the last hidden layer, the least of the elements; of all layers in
molecules_layers.csv.

Writes bench/results/molecules.csv and molecules_layers.csv, and what they were made with."""

import argparse
import copy
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import ase.build
import numpy as np
import torch
import torchani
from adapters import about, write_rows
from collapse import rescaled
from torchani import neurochem

from frechet_merge import merge
from frechet_merge.curvature.repair import repair
from frechet_merge.diagnostics.collapse import collapse
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.symmetries.gauges import align_gauges, in_one_gauge
from frechet_merge.symmetries.groups import check_groups, dense

NAMES = (
    "CH4 H2O NH3 C2H6 C2H4 C2H2 CH3OH H2CO HCN CO2 N2 HCOOH CH3CHO C6H6 CH3CONH2 CH3CN "
    "H2O2 N2H4 CH3OCH3 C2H6NH"
).split()
SHAKE = 0.06  # Å
KCAL = 627.509  # of a hartree


class Shapes:
    "Molecules, each of them shaken several times, as what the networks read."

    def __init__(self, aev, species, copies, seed):
        rng = np.random.default_rng(seed)
        self.rows = {s: [] for s in species}
        self.owners = {s: [] for s in species}
        self.kinds = []
        for kind, name in enumerate(NAMES):
            molecule = ase.build.molecule(name)
            symbols = molecule.get_chemical_symbols()
            at = torch.tensor([[species.index(s) for s in symbols]])
            for _ in range(copies):
                x = molecule.positions + SHAKE*rng.standard_normal(molecule.positions.shape)
                found = aev((at, torch.tensor(x[None], dtype=torch.float32))).aevs[0]
                for symbol, row in zip(symbols, found):
                    self.rows[symbol].append(row)
                    self.owners[symbol].append(len(self.kinds))
                self.kinds.append(kind)
        self.rows = {s: torch.stack(r) for s, r in self.rows.items()}
        self.owners = {s: torch.tensor(o) for s, o in self.owners.items()}
        self.kinds = torch.tensor(self.kinds)

    @torch.no_grad()
    def energies(self, net):
        "(N,) in kcal/mol, less the mean of each molecule's."
        found = torch.zeros(len(self.kinds), dtype=torch.float64)
        for s, rows in self.rows.items():
            found.index_add_(0, self.owners[s], net[s](rows)[:, 0].double())
        of_kind = torch.zeros(len(NAMES), dtype=torch.float64)
        means = of_kind.index_reduce(0, self.kinds, found, "mean", include_self=False)
        return KCAL*(found - means[self.kinds])


def rms(x):
    return float(x.square().mean().sqrt())


def groups_of(net):
    "Hidden units of each element's network."
    found = []
    for s, chain in net.items():
        linear = [i for i, m in enumerate(chain) if isinstance(m, torch.nn.Linear)]
        sizes = [chain[i].out_features for i in linear[:-1]]
        found += dense([f"{s}.{i}.weight" for i in linear], sizes)
    return found


def filled(net, state):
    "A network of these numbers."
    made = copy.deepcopy(net)
    made.load_state_dict(state)
    return made


def merges(nets, groups, shapes):
    "Name → network."
    states = [n.state_dict() for n in nets]
    checkpoints = [from_state_dict(s) for s in states]
    seen = in_one_gauge(checkpoints, groups, align_gauges(checkpoints, groups))
    aligned = [{n: c[n] for n in states[0]} for c in seen]
    for way, these in (("", states), ("aligned, ", aligned)):
        yield f"{way}mean", filled(nets[0], dict(merge(these).tensors))
        yield f"{way}sphere", filled(nets[0], dict(merge(these, "sphere").tensors))
        yield f"{way}norm-rescaled", filled(nets[0], rescaled(these))
        made = filled(nets[0], dict(merge(these).tensors))
        parents = [filled(nets[0], s) for s in these]
        for s, rows in shapes.rows.items():
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
            repair(made[s], [p[s] for p in parents], rows[order].split(256))
        yield f"{way}repaired", made


def ratios(made, nets, shapes):
    "What a merge keeps of its models' layers, for each element."
    for s, rows in shapes.rows.items():
        hidden = [str(i) for i, m in enumerate(made[s]) if isinstance(m, torch.nn.Linear)][:-1]
        for r in collapse(made[s], [n[s] for n in nets], [rows], hidden).rows:
            yield {"element": s, "layer": r["layer"], "variance": r["variance"], "rank": r["rank"]}


def rows_of(nets, judge, other):
    "The table, and the ratios by layer."
    groups = groups_of(nets[0])
    for s, rows in judge.rows.items():
        check_groups(nets[0][s], stripped(groups_of({s: nets[0][s]}), s), rows[:9])
    truth = sum(judge.energies(n) for n in nets)/len(nets)
    unit = rms(truth)
    errors = [rms(judge.energies(n) - truth)/unit for n in nets]
    yield {"T": 1, "set": "", "merge": "one network", "error": sum(errors)/len(errors)}, []
    for T in (2, 4, 8):
        for k in range(len(nets)//T):
            some = nets[k*T : (k + 1)*T]
            said = sum(judge.energies(n) for n in some)/T
            start = {"T": T, "set": k}
            yield {**start, "merge": "ensemble", "error": rms(said - truth)/unit}, []
            for name, made in merges(some, groups, other):
                error = rms(judge.energies(made) - truth)/unit
                layers = [{**start, "merge": name, **r} for r in ratios(made, some, judge)]
                yield {**start, "merge": name, "error": error}, layers


def stripped(groups, element):
    "Groups of one element's network, under the names that it has alone."
    def short(m):
        return replace(m, tensor=m.tensor.removeprefix(f"{element}."))

    def part(p):
        return replace(p, into=tuple(map(short, p.into)), out=tuple(map(short, p.out)))

    return [replace(g, parts=tuple(map(part, g.parts))) for g in groups]


def summary(row, layers):
    "A line, with what the last hidden layer keeps."
    last = [r for r in layers if r["layer"] == max(x["layer"] for x in layers)]
    row["variance"] = min((r["variance"] for r in last), default="")
    row["rank"] = min((r["rank"] for r in last), default="")
    return rounded(row)


def rounded(row):
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=20, help="of each molecule, in each half")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    home = Path(torchani.__file__).parent/"resources"/"ani-1x_8x"
    consts = neurochem.Constants(str(home/"rHCNO-5.2R_16-3.5A_a4-8.params"))
    nets = [*neurochem.load_model_ensemble(consts.species, str(home/"train"), 8)]
    aev = torchani.AEVComputer(**consts)
    judge, other = (Shapes(aev, consts.species, arguments.copies, seed) for seed in range(2))
    found, by_layer = [], []
    for row, layers in rows_of(nets, judge, other):
        found.append(summary(row, layers))
        by_layer += map(rounded, layers)
        print(found[-1], flush=True)
    said = about(
        f"python bench/molecules.py --copies {arguments.copies}",
        torchani=version("torchani"),
        molecules=NAMES,
        shapes=len(judge.kinds),
        unit_kcal=rms(sum(judge.energies(n) for n in nets)/len(nets)),
    )
    write_rows("molecules", found, said)
    write_rows("molecules_layers", by_layer, said)


if __name__ == "__main__":
    main()

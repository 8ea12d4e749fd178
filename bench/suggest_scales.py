"""What a scale that nobody chose costs: TSV-M and task arithmetic at fixed scales, and what
inspection says of the models before any merge.

    python bench/suggest_scales.py NAME=FOLDER:TASKS[:HEADS] …       families of text, as in
        `quality.py`; frechet_merge/demo_data alone is in the repository

Reported is accuracy on the half of the examples that `quality.py` reports. *Size* is how large the
sum of the updates is: the ratio of its spectral norm and the weights', averaged over the matrices.
*Cosine* is the mean over pairs of models of the cosine between what they changed."""

import argparse
import gzip
import json
import warnings
from functools import partial

import torch
from adapters import about, write_rows
from experts import Text
from quality import adapter, bootstrap, every, matrices, mean, merged, minus, spectral, total

from frechet_merge.geometries.baselines import TSVM
from frechet_merge.geometries.subspace import EpiMer

FULL, LOW = (1.0, 1.2, 1.4, 1.7, 2.0), (0.35, 0.5, 0.7, 1.0)
SUMS = (0.3, 0.42, 0.6)


def cosine(ex):
    "Mean over pairs of models, of all matrices together."
    T = len(ex.names)
    K = torch.zeros(T, T, dtype=torch.float64)
    for k in ex.W:
        X = torch.stack([ex.delta[n][k].flatten() for n in ex.names]).double()
        K += X @ X.T
    d = K.diagonal().sqrt()
    C = K/(d[:, None]*d)
    return float((C.sum() - T)/(T*T - T))


def asked(ex):
    "Method, scale and difference of all that is tried."
    T, added = len(ex.names), total(ex, ex.names)
    yield "mean", 1.0, every(added, 1/T)
    for s in SUMS:
        yield "task arithmetic", s, every(added, s)
    dense = merged(ex, EpiMer())
    for s in LOW if ex.adapters else FULL:
        yield "TSV-M", s, matrices(dense, s)
    if ex.adapters:
        low = adapter(ex, TSVM())
        for s in LOW:
            yield "TSVM()", s, every(low, s)


def rows_of(name, ex):
    "A row for each method and scale, with the difference from the best of them."
    gen = torch.Generator().manual_seed(0)
    said = {"family": name, "T": len(ex.names), "size": round(spectral(ex, ex.names), 3)}
    said["cosine"] = round(cosine(ex), 3)
    found = []
    for method, scale, delta in asked(ex):
        right = {n: v[ex.fresh(n)] for n, v in ex.right(delta, 1).items()}
        found.append((method, scale, right))
        print(name, method, scale, round(mean(right), 4), flush=True)
    best = max((right for _, _, right in found), key=mean)
    error = partial(bootstrap, gen=gen, groups=ex.groups)
    for method, scale, right in found:
        d = minus(right, best)
        row = {"method": method, "scale": scale, "mean": round(mean(right), 4)}
        row |= {"from_best": round(mean(d), 4), "se_from": round(error([d]), 4)}
        yield said | row


class Demo(Text):
    "The packaged experts, whose test texts alone are there."

    def __init__(self, folder, tasks, heads=None):
        super().__init__(folder, tasks, heads)

    def unseen(self, task, n):
        return [], []

    def fresh(self, n):
        return slice(None)


def family(what):
    "Experts of FOLDER:TASKS[:HEADS]."
    _, tasks, *_ = what.split(":")
    held = json.load(gzip.open(tasks, "rt"))
    kind = Text if all("train" in task for task in held.values()) else Demo
    return kind(*what.split(":"))


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("families", nargs="+")
    args = a.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for given in args.families:
        name, _, what = given.partition("=")
        rows += rows_of(name, family(what))
        write_rows(
            "suggest_scales",
            rows,
            about("python bench/suggest_scales.py NAME=FOLDER:TASKS:HEADS …"),
        )


if __name__ == "__main__":
    main()

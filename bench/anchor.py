"""What is left for the anchor of `pullback()` to decide, and how large the updates are that it is a
multiple of.

    python bench/anchor.py NAME=KIND:FOLDER:TASKS[:HEADS] …       KIND: text, images; names as
        in `quality.py`

In the eigenbases of Σ B and of the mean Ā (metrics of mean eigenvalue one) the anchor has the share
ν/(λμ + ν) of a direction. Of each family, over all matrices that the experts changed: the anchor's
share of all directions, its share of the squared length of the sum of the updates, and, of the
updates of single experts, the share of squared length in directions where its own metric is below
the mean. Sizes are ratios, averaged over the matrices: of the Frobenius norms of one update and of
the base's weights, and of the spectral norms of the sum of the updates and of the weights."""

import argparse
import warnings

import torch
from adapters import about, write_rows
from experts import Images, Text
from quality import spectral

from frechet_merge.geometries.fisher import shared
from frechet_merge.metrics.kronecker import Kronecker
from frechet_merge.metrics.units import normalised


COLUMNS = (
    "anchor's share of directions",
    "anchor's share of the sum",
    "updates where their own metric is below its mean",
    "update / weights",
    "sum / weights, spectral",
)


def eigen(M):
    "Eigenvalues, none below zero, and eigenvectors."
    values, vectors = torch.linalg.eigh(M)
    return values.clamp(min=0), vectors


def below_its_mean(update, G):
    "Share of an update's squared length in directions where its metric is below its mean."
    (l, U), (m, V) = (torch.linalg.eigh(M) for M in G.pairs[0])
    squares = (U.mT @ update @ V)**2
    return float(squares[l[:, None]*m < 1].sum()/squares.sum())


def shares_of(updates, weight, Gs):
    "What the anchor decides of one matrix, and how large its updates are."
    (lam, Q), (mu, P) = eigen(sum(G.pairs[0][0] for G in Gs)), eigen(Gs[0].pairs[0][1])
    anchor = 1/(lam[:, None]*mu + 1)
    total = (Q.mT @ sum(updates) @ P)**2
    own = [below_its_mean(d, G) for d, G in zip(updates, Gs)]
    size = [float(d.norm()/weight.norm()) for d in updates]
    return (
        float(anchor.mean()),
        float((anchor*total).sum()/total.sum()),
        sum(own)/len(own),
        sum(size)/len(size),
    )


def shares(ex, stats):
    "One number for each of `COLUMNS`, averaged over all matrices that the experts changed."
    found = []
    for k, weight in ex.W.items():
        updates = [ex.delta[n][k] for n in ex.names]
        if updates[0].dim() != 2 or not any(d.any() for d in updates):
            continue
        Gs = [Kronecker((stats[n][f"{k}.left"], stats[n][f"{k}.right"])) for n in ex.names]
        found.append(shares_of(updates, weight, shared(normalised(Gs), "right")))
    return [*(sum(c)/len(found) for c in zip(*found)), spectral(ex, ex.names)]


def row(name, what):
    "Name and numbers of a family, as NAME=KIND:FOLDER:TASKS[:HEADS] has it."
    kind, *where = what.split(":")
    ex = {"text": Text, "images": Images}[kind](*where)
    found = shares(ex, {n: ex.statistics(n, "kronecker", "pullback") for n in ex.names})
    return {"family": name} | {k: round(v, 3) for k, v in zip(COLUMNS, found)}


if __name__ == "__main__":
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("families", nargs="+")
    args = a.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rows = []
    for family in args.families:
        rows.append(row(*family.split("=")))
        print(rows[-1], flush=True)
    write_rows("anchor", rows, about("python bench/anchor.py NAME=KIND:FOLDER:TASKS:HEADS …"))

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
from frechet_merge.metrics import Kronecker, normalised


def shares(ex, stats):
    found = []
    for k in ex.W:
        x = [ex.delta[n][k] for n in ex.names]
        if x[0].dim() != 2 or not any(d.any() for d in x):
            continue
        Gs = shared(
            normalised(
                [Kronecker((stats[n][f"{k}.left"], stats[n][f"{k}.right"])) for n in ex.names]
            ),
            "right",
        )
        (lam, Q), (mu, P) = (
            torch.linalg.eigh(sum(G.pairs[0][0] for G in Gs)),
            torch.linalg.eigh(Gs[0].pairs[0][1]),
        )
        anchor = 1/(lam.clamp(min=0)[:, None]*mu.clamp(min=0) + 1)
        total = (Q.mT @ sum(x) @ P)**2
        own = []
        for d, G in zip(x, Gs):
            (l, U), (m, V) = (torch.linalg.eigh(M) for M in G.pairs[0])
            z = (U.mT @ d @ V)**2
            own.append(float(z[l[:, None]*m < 1].sum()/z.sum()))
        found.append(
            (
                float(anchor.mean()),
                float((anchor*total).sum()/total.sum()),
                sum(own)/len(own),
                sum(float(d.norm()/ex.W[k].norm()) for d in x)/len(x),
            )
        )
    return [*(sum(c)/len(found) for c in zip(*found)), spectral(ex, ex.names)]


if __name__ == "__main__":
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("families", nargs="+")
    args = a.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rows = []
    for name, what in (f.split("=") for f in args.families):
        kind, *where = what.split(":")
        ex = {"text": Text, "images": Images}[kind](*where)
        found = shares(ex, {n: ex.statistics(n, "kronecker", "pullback") for n in ex.names})
        rows.append(
            {"family": name}
            | {
                k: round(v, 3)
                for k, v in zip(
                    (
                        "anchor's share of directions",
                        "anchor's share of the sum",
                        "updates where their own metric is below its mean",
                        "update / weights",
                        "sum / weights, spectral",
                    ),
                    found,
                )
            }
        )
        print(rows[-1], flush=True)
    write_rows("anchor", rows, about("python bench/anchor.py NAME=KIND:FOLDER:TASKS:HEADS …"))

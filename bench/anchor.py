"""What is left for the anchor of `pullback()` to decide, on full models and on adapters.

    python bench/anchor.py NAME=FOLDER … --tasks TASKS [--heads HEADS]

In the eigenbases of Σ B and of the mean Ā (metrics of mean eigenvalue one) the anchor has the share ν/(λμ + ν) of a direction. Of each
family, over all matrices that the experts changed: the anchor's share of all directions, its share of the squared length of the sum of
the updates, and, of the updates of single experts, the share of squared length in directions where its own metric is below the mean.
"""
import argparse
import warnings
from pathlib import Path

import torch
from adapters import about, write_rows
from experts import Text

from frechet_merge.geometries.fisher import shared
from frechet_merge.metrics import Kronecker, normalised


def shares(ex, stats):
    found = []
    for k in ex.W:
        x = [ex.delta[n][k] for n in ex.names]
        if x[0].dim() != 2 or not any(d.any() for d in x): continue
        Gs = shared(normalised([Kronecker((stats[n][f"{k}.left"], stats[n][f"{k}.right"])) for n in ex.names]), "right")
        (lam, Q), (mu, P) = torch.linalg.eigh(sum(G.pairs[0][0] for G in Gs)), torch.linalg.eigh(Gs[0].pairs[0][1])
        anchor = 1/(lam.clamp(min=0)[:, None]*mu.clamp(min=0) + 1); total = (Q.mT @ sum(x) @ P)**2
        own = []
        for d, G in zip(x, Gs): (l, U), (m, V) = (torch.linalg.eigh(M) for M in G.pairs[0]); z = (U.mT @ d @ V)**2; own.append(float(z[l[:, None]*m < 1].sum()/z.sum()))
        found.append((float(anchor.mean()), float((anchor*total).sum()/total.sum()), sum(own)/len(own)))
    return [sum(c)/len(found) for c in zip(*found)]


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("families", nargs="+"); a.add_argument("--tasks", type=Path, required=True); a.add_argument("--heads", type=Path)
    args = a.parse_args(); warnings.simplefilter("ignore"); torch.manual_seed(0); rows = []
    for name, folder in (f.split("=") for f in args.families):
        ex = Text(folder, args.tasks, args.heads)
        every, of_sum, own = shares(ex, {n: ex.statistics(n, "kronecker", "pullback") for n in ex.names})
        rows.append({"family": name, "anchor's share of directions": round(every, 3), "anchor's share of the sum": round(of_sum, 3), "updates where their own metric is below its mean": round(own, 3)}); print(rows[-1], flush=True)
    write_rows("anchor", rows, about("python bench/anchor.py experts_full=FULL experts_lora=LORA --tasks TASKS --heads HEADS"))

"""Whether more freedom, or going on in the distance itself, gains what the best pullback mean
leaves.

    python bench/further.py FOLDER --name NAME --tasks TASKS [--heads HEADS] [--kind images]

Begins at the pullback mean (share="right") whose anchor the outputs chose, as in `quality.py`, and
goes on in two ways, without labels:

- an anchor for each matrix: all of them at once make the distance of outputs small, by 15 steps
  of L-BFGS, on the examples that chose the one anchor;
- steps down the distance: its gradient on the examples that the metrics have seen, divided by the
  metrics' sum (Kronecker, of shared inputs)
  and a flat damping, which the other examples choose; two steps.

Reported are the distance from the experts on the other examples, in units of the base's, and
accuracy, whose difference from the beginning has its standard error from a paired bootstrap. One
thread."""

import argparse
import warnings
from pathlib import Path

import torch
from adapters import about, write_rows
from experts import SAMPLES, Images, Text
from quality import between, bootstrap, mean, merged, minus

from frechet_merge.geometries.fisher import pullback, shared
from frechet_merge.metrics.kronecker import Kronecker
from frechet_merge.tuning.tune import OutputDistance, nearest

# damping in units of the sum's mean eigenvalue over all matrices
FORM = ("kronecker", "pullback")
STEPS = 2
DAMPING = (2.0**8, 2.0**24)


def gradient(ex, delta, asked, unit, keys):
    "Mean distance over the tasks, each in units of the base's, and matrix → gradient."
    ex.put(delta)
    total = 0.0
    ps = dict(ex.model.named_parameters())
    for k, p in ps.items():
        p.requires_grad_(k in keys)
        p.grad = None
    for n, (fed, _, kept), u in zip(ex.names, asked.asked, unit):
        for b, z in zip(fed, kept):
            whole = sum(map(len, kept))*u*len(ex.names)
            d = (ex.logits(ex.model, n, b) - z).square().sum()/whole
            d.backward()
            total += float(d)
    return total, {k: ps[k].grad.clone() for k in keys}


def anchor_each(ex, line, c, keys):
    "The mean with an anchor of its own for each matrix, from c on, by L-BFGS."
    (a, b), (d, unit) = line, ex.distance
    x = torch.full((len(keys),), c).log().requires_grad_()

    def at(x):
        return a | {k: a[k] + e*(b[k] - a[k]) for k, e in zip(keys, x.exp())}

    def closure():
        loss, g = gradient(ex, at(x.detach()), d, unit, keys)
        by_anchor = [e*(g[k]*(b[k] - a[k])).sum() for k, e in zip(keys, x.detach().exp())]
        x.grad = torch.stack(by_anchor)
        return torch.tensor(loss)

    torch.optim.LBFGS([x], max_iter=15, line_search_fn="strong_wolfe").step(closure)
    return at(x.detach())


def eigen(M):
    values, vectors = torch.linalg.eigh(M)
    return values.clamp(min=0), vectors


def factors(ex, stats, unit, k):
    "Eigenvalues and vectors of both sides of a matrix's metric, summed over the models."
    Gs = [
        Kronecker((stats[n][f"{k}.left"].double()/u, stats[n][f"{k}.right"].double()))
        for n, u in zip(ex.names, unit)
    ]
    Gs = shared(Gs, "right")
    return eigen(sum(G.pairs[0][0] for G in Gs)/len(Gs)), eigen(Gs[0].pairs[0][1])


def descend(ex, delta, stats, seen, unit, keys):
    "Steps down the distance, each with the damping that it chose."
    F = {k: factors(ex, stats, unit, k) for k in keys}
    flat = sum(float(l.mean()*r.mean()) for (l, _), (r, _) in F.values())/len(F)
    for _ in range(STEPS):
        downhill = gradient(ex, delta, seen, unit, keys)[1]
        g = {k: U.mT @ downhill[k].double() @ V for k, ((_, U), (_, V)) in F.items()}

        def at(damping, delta=delta, g=g):
            steps = {
                k: U @ (g[k]/(l[:, None]*r + damping*flat)) @ V.mT/2
                for k, ((l, U), (r, V)) in F.items()
            }
            return delta | {k: delta[k] - step.float() for k, step in steps.items()}

        best, _ = nearest(lambda x: ex.lost(at(x), ex.names), DAMPING)
        delta = at(best)
        yield f"damping {best:.3g}", delta


class Table:
    "Rows of results, each compared with the first."

    def __init__(self, ex):
        self.ex = ex
        self.gen = torch.Generator().manual_seed(0)
        self.rows = []
        self.start = None

    def add(self, what, delta, found=""):
        ex = self.ex
        right = {n: v[ex.fresh(n)] for n, v in ex.right(delta, 1).items()}
        row = {
            "what": what,
            "found": found,
            "distance": round(ex.lost(delta, ex.names), 4),
            "mean": round(mean(right), 4),
            "from_start": "",
            "se_from": "",
        }
        if self.start is not None:
            d = minus(right, self.start)
            row["from_start"] = round(mean(d), 4)
            row["se_from"] = round(bootstrap([d], self.gen, ex.groups), 4)
        self.start = self.start or right
        self.rows.append(row)
        print(row, flush=True)


def arguments():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("folder")
    a.add_argument("--tasks", type=Path, required=True)
    a.add_argument("--heads", type=Path)
    a.add_argument("--kind", choices=("text", "images"), default="text")
    a.add_argument("--name", required=True)
    return a.parse_args()


def main():
    args = arguments()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ex = {"text": Text, "images": Images}[args.kind](args.folder, args.tasks, args.heads)
    stats = {n: ex.statistics(n, *FORM) for n in ex.names}
    # the distance on the examples that the statistics have seen
    seen = OutputDistance()
    for n in ex.names:
        ex.put(ex.delta[n])
        seen.add(ex.model, ex.unlabelled(n, SAMPLES), ex.run(n))
    ex.put({})
    unit = seen(ex.model)
    line = [merged(ex, pullback(c), stats) for c in (0.0, 1.0)]
    c, _ = nearest(lambda x: ex.lost(between(line, x), ex.names))
    start = between(line, c)
    keys = [k for k in start if f"{k}.right" in stats[ex.names[0]]]
    table = Table(ex)
    table.add("one anchor, by outputs", start, f"anchor {c:.3g}")
    table.add("an anchor for each matrix", anchor_each(ex, line, c, keys))
    for i, (found, delta) in enumerate(descend(ex, start, stats, seen, unit, keys), 1):
        table.add(f"{i} step{'s' * (i > 1)} down the distance", delta, found)
    command = f"python bench/further.py FOLDER --name {args.name} --kind {args.kind} --tasks TASKS"
    facts = about(command, tasks=ex.names, samples=SAMPLES)
    write_rows(f"further_{args.name}", table.rows, facts)


if __name__ == "__main__":
    main()

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
from frechet_merge.metrics import Kronecker
from frechet_merge.tune import OutputDistance, nearest

# damping in units of the sum's mean eigenvalue over all matrices
FORM, STEPS, DAMPING = ("kronecker", "pullback"), 2, (2.0**8, 2.0**24)


def gradient(ex, delta, asked, unit, keys):
    "Mean distance over the tasks, each in units of the base's, and matrix → gradient."
    ex.put(delta)
    total, ps = 0.0, dict(ex.model.named_parameters())
    for k, p in ps.items():
        p.requires_grad_(k in keys)
        p.grad = None
    for n, (fed, _, kept), u in zip(ex.names, asked.asked, unit):
        for b, z in zip(fed, kept):
            d = (ex.logits(ex.model, n, b) - z).square().sum()/(
                sum(map(len, kept))*u*len(ex.names)
            )
            d.backward()
            total += float(d)
    return total, {k: ps[k].grad.clone() for k in keys}


def anchor_each(ex, line, c, keys):
    (a, b), (d, unit) = line, ex.distance
    x = torch.full((len(keys),), c).log().requires_grad_()

    def at(x):
        return a | {k: a[k] + e*(b[k] - a[k]) for k, e in zip(keys, x.exp())}

    def closure():
        loss, g = gradient(ex, at(x.detach()), d, unit, keys)
        x.grad = torch.stack(
            [e*(g[k]*(b[k] - a[k])).sum() for k, e in zip(keys, x.detach().exp())]
        )
        return torch.tensor(loss)

    torch.optim.LBFGS([x], max_iter=15, line_search_fn="strong_wolfe").step(closure)
    return at(x.detach())


def descend(ex, delta, stats, seen, unit, keys):
    def factors(k):
        Gs = shared(
            [
                Kronecker((stats[n][f"{k}.left"].double()/u, stats[n][f"{k}.right"].double()))
                for n, u in zip(ex.names, unit)
            ],
            "right",
        )
        return [
            (e.clamp(min=0), Q)
            for e, Q in map(
                torch.linalg.eigh, (sum(G.pairs[0][0] for G in Gs)/len(Gs), Gs[0].pairs[0][1])
            )
        ]

    F = {k: factors(k) for k in keys}
    flat = sum(float(l.mean()*r.mean()) for (l, _), (r, _) in F.values())/len(F)
    for _ in range(STEPS):
        g = {
            k: F[k][0][1].mT @ v.double() @ F[k][1][1]
            for k, v in gradient(ex, delta, seen, unit, keys)[1].items()
        }

        def at(x, delta=delta, g=g):
            return delta | {
                k: delta[k] - (U @ (g[k]/(l[:, None]*r + x*flat)) @ V.mT/2).float()
                for k, ((l, U), (r, V)) in F.items()
            }

        best, tried = nearest(lambda x: ex.lost(at(x), ex.names), DAMPING)
        delta = at(best)
        yield f"damping {best:.3g}", delta


if __name__ == "__main__":
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("folder")
    a.add_argument("--tasks", type=Path, required=True)
    a.add_argument("--heads", type=Path)
    a.add_argument("--kind", choices=("text", "images"), default="text")
    a.add_argument("--name", required=True)
    args = a.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ex, gen, rows = (
        {"text": Text, "images": Images}[args.kind](args.folder, args.tasks, args.heads),
        torch.Generator().manual_seed(0),
        [],
    )
    stats, seen = {n: ex.statistics(n, *FORM) for n in ex.names}, OutputDistance()
    for n in ex.names:
        ex.put(ex.delta[n])
        seen.add(ex.model, ex.unlabelled(n, SAMPLES), lambda model, b, n=n: ex.logits(model, n, b))
    ex.put({})
    unit = seen(ex.model)

    def row(what, delta, found=""):
        r = {n: v[ex.fresh(n)] for n, v in ex.right(delta, 1).items()}
        d = minus(r, rows[0][1]) if rows else None
        rows.append(
            (
                {
                    "what": what,
                    "found": found,
                    "distance": round(ex.lost(delta, ex.names), 4),
                    "mean": round(mean(r), 4),
                    "from_start": "" if d is None else round(mean(d), 4),
                    "se_from": "" if d is None else round(bootstrap([d], gen, ex.groups), 4),
                },
                r,
            )
        )
        print(rows[-1][0], flush=True)

    line = [merged(ex, pullback(c), stats) for c in (0.0, 1.0)]
    c, _ = nearest(lambda x: ex.lost(between(line, x), ex.names))
    start = between(line, c)
    keys = [k for k in start if f"{k}.right" in stats[ex.names[0]]]
    row("one anchor, by outputs", start, f"anchor {c:.3g}")
    row("an anchor for each matrix", anchor_each(ex, line, c, keys))
    for i, (found, delta) in enumerate(descend(ex, start, stats, seen, unit, keys), 1):
        row(f"{i} step{'s' * (i > 1)} down the distance", delta, found)
    write_rows(
        f"further_{args.name}",
        [r for r, _ in rows],
        about(
            f"python bench/further.py FOLDER --name {args.name} --kind {args.kind} --tasks TASKS",
            tasks=ex.names,
            samples=SAMPLES,
        ),
    )

"""Does averaging collapse what real experts' layers say, and does the sphere repair it?

    python bench/collapse.py
    python bench/collapse.py --images IMAGES

The demo's five text experts as full models, and subsets of 2 to 5 of them. Each subset is merged by
the plain mean, on the sphere and by the norm-rescaled mean (the mean of each tensor, given the mean
norm of its versions), of whole weights and of differences from the base. All are run on the same
texts, `--texts` of each of the five tasks. What is reported, by block of the encoder: the ratios of
variance and effective rank (`frechet_merge.diagnostics.collapse`); and how far outputs are from the
base's, root mean square, relative to the experts' mean: what is left of what was learnt. Beside
them the mean accuracy on the subset's tasks (--judged test texts each), the angle between tensors,
and how far the merge is from the plain mean, both weighted by squared norms.

With --images, the same of a vision transformer's experts, which `images/tasks.py` and
`images/train.py --full` have written into IMAGES: run on --texts test pictures of each task, and
judged on all others. Writes bench/results/collapse.csv, or collapse_images.csv, and what it was
made with."""

import argparse
import itertools
import math
import random
import sys
import warnings
from pathlib import Path

import torch
from adapters import about, write_rows
from robust import experts
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from frechet_merge import load, merge
from frechet_merge.cli.demo import TOKENS, accuracy, base_folder, tasks
from frechet_merge.curvature.activations import Moments, blocks_of, rows_of, watching


def rescaled(models, base=None):
    "The mean of each tensor with the mean norm of its versions; of differences if there is a base."
    made = {}
    for n, first in models[0].items():
        if not first.is_floating_point():
            made[n] = first
            continue
        xs = [m[n].double() - (0 if base is None else base[n].double()) for m in models]
        mean = sum(xs)/len(xs)
        norm = sum(x.norm() for x in xs)/len(xs)
        mean = mean*norm/mean.norm() if mean.norm() > 0 else mean
        made[n] = (mean + (0 if base is None else base[n].double())).float()
    return made


def merges(models, base):
    "Name → state."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield "mean", dict(merge(models).tensors)
        yield "sphere", dict(merge(models, "sphere").tensors)
        yield "norm-rescaled", rescaled(models)
        yield "sphere of differences", dict(merge(models, "sphere", base).tensors)
        yield "norm-rescaled differences", rescaled(models, base)


@torch.no_grad()
def heard(model, calls):
    "Block → its outputs, a row a token; calls: of the model, each with its mask."
    found = {}
    for call, mask in calls:

        def see(name, layer, x, mask=mask):
            found.setdefault(name, []).append(rows_of(layer, x, mask))

        with watching(model, blocks_of(model), see):
            call()
    return {name: torch.cat(rows) for name, rows in found.items()}


class Judge:
    "A module into which states are put, and the texts on which it is run."

    def __init__(self, texts, judged):
        folder = base_folder()
        self.model = AutoModel.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.judged = judged
        found = [t for task in tasks().values() for t, _ in task["test"][-texts:]]
        how = dict(truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        self.batches = [self.tokenizer(found[i : i + 50], **how) for i in range(0, len(found), 50)]

    def outputs(self, state):
        "Block → its outputs, a row a token."
        self.model.load_state_dict(state, strict=False)
        fed = ((b, b["attention_mask"].bool()) for b in self.batches)
        return heard(self.model, ((lambda b=b: self.model(**b), mask) for b, mask in fed))

    def accuracy(self, state, names):
        self.model.load_state_dict(state, strict=False)
        found = accuracy(self.model, self.tokenizer, names, self.judged)
        return sum(found.values())/len(found)


class Pictures:
    "The same for experts of pictures: some are run on the module, and the others judge it."

    def __init__(self, folder, seen):
        # what images/train.py is made of
        sys.path.insert(0, str(Path(__file__).parent/"images"))
        import train

        self.model = AutoModel.from_pretrained(folder/"base").eval()
        self.names = sorted(f.name for f in (folder/"full").iterdir())
        self.tasks = {n: train.load_task(folder, n) for n in self.names}
        self.heads, self.made_of = load_file(folder/"heads.safetensors"), train
        self.run = [task["test_x"][:seen] for task in self.tasks.values()]
        self.left = slice(seen, None)

    def outputs(self, state):
        "Block → its outputs, a row a token."
        self.model.load_state_dict(state, strict=False)
        embed = self.made_of.embed
        return heard(self.model, ((lambda x=x: embed(self.model, x), None) for x in self.run))

    def accuracy(self, state, names):
        self.model.load_state_dict(state, strict=False)
        found = []
        for n in names:
            task = {k: self.tasks[n][k][self.left] for k in ("test_x", "test_y")}
            W, b = (self.heads[f"{n}.{k}"] for k in ("weight", "bias"))
            found.append(self.made_of.accuracy(self.model, task, W, b))
        return mean(found)


def pictured(folder):
    "Full models by the task, in memory, and their base."
    whole = load(folder/"base")
    names = sorted(f.name for f in (folder/"full").iterdir())
    every = {n: load(folder/"full"/n) for n in names}
    found = {n: {k: c[k].clone() for k in c} for n, c in every.items()}
    return found, {k: whole[k].clone() for k in next(iter(found.values()))}


def spread(rows):
    kept = Moments()
    kept.add(rows)
    return kept.spread()


def mean(values):
    values = list(values)
    return sum(values)/len(values)


def away(rows, of):
    "Root mean square distance of outputs."
    return float((rows - of).square().sum(1).mean().sqrt())


def angle(models):
    "The mean angle between two models' tensors, in degrees, weighted by squared norms."
    total = weight = 0.0
    for a, b in itertools.combinations(models, 2):
        for n, x in a.items():
            if x.is_floating_point() and x.norm() > 0:
                x, y = x.double().flatten(), b[n].double().flatten()
                u, v = x/x.norm(), y/y.norm()
                w = float(x.norm()**2)
                total += w*2*math.atan2(float((u - v).norm()), float((u + v).norm()))
                weight += w
    return math.degrees(total/weight)


def apart(state, other):
    "How far a state is from another, relative to it."
    both = [(state[n].double(), x.double()) for n, x in other.items() if x.is_floating_point()]
    return math.sqrt(sum(float((a - b).norm()**2) for a, b in both)/norm2(other))


def norm2(state):
    return sum(float(x.double().norm()**2) for x in state.values() if x.is_floating_point())


def rows_for(names, found, base, judge, seen, at_base):
    "All merges of a subset."
    models = [found[n] for n in names]
    turned, plain = angle(models), None
    for how, state in merges(models, base):
        plain = plain or state
        score = judge.accuracy(state, list(names))
        rows = judge.outputs(state)
        for layer, x in rows.items():
            of_experts = [seen[n][layer] for n in names]
            merged = spread(x)
            shift = mean(away(seen[n]["rows"][layer], at_base[layer]) for n in names)
            yield {
                "experts": " ".join(names),
                "T": len(names),
                "merge": how,
                "layer": layer,
                "variance": round(merged.total/mean(s.total for s in of_experts), 4),
                "rank": round(merged.rank/mean(s.rank for s in of_experts), 4),
                "moved": round(away(x, at_base[layer])/shift, 4),
                "accuracy": round(100*score, 2),
                "angle": round(turned, 3),
                "from the mean": float(f"{apart(state, plain):.3g}"),
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--judged", type=int, default=100)
    parser.add_argument("--subsets", type=int, default=1)
    parser.add_argument("--images", type=Path, help="folder of images/train.py")
    arguments = parser.parse_args()
    command = (
        f"python bench/collapse.py --texts {arguments.texts} --judged {arguments.judged} "
        f"--subsets {arguments.subsets}"
    )
    name = "collapse"
    if arguments.images is None:
        found, base = experts()
        judge = Judge(arguments.texts, arguments.judged)
    else:
        name += "_images"
        command = f"python bench/collapse.py --images IMAGES --texts {arguments.texts}"
        command += f" --subsets {arguments.subsets}"
        found, base = pictured(arguments.images)
        judge = Pictures(arguments.images, arguments.texts)
    at_base, seen = judge.outputs(base), {}
    for n, state in found.items():
        rows = judge.outputs(state)
        seen[n] = {layer: spread(x) for layer, x in rows.items()} | {"rows": rows}
    choose, rows = random.Random(0), []
    for T in range(2, len(found) + 1):
        every = [*itertools.combinations(found, T)]
        for names in sorted(choose.sample(every, min(arguments.subsets, len(every)))):
            rows += rows_for(names, found, base, judge, seen, at_base)
            for row in rows[-5*len(at_base) :: len(at_base)]:
                print(row, flush=True)
            write_rows(name, rows, about(command))


if __name__ == "__main__":
    main()

"""Two to eight networks that were trained apart, merged: of three kinds, on scikit-learn's digits.

    python bench/trained_apart.py perceptron
    python bench/trained_apart.py convolutions
    python bench/trained_apart.py transformer

A perceptron (three layers, ReLU), a convolutional network with BatchNorm and a small vision
transformer of transformers learn digits, eight times each, from another start and in another order.
T of them are merged: as they are, on spheres, in one gauge, and repaired on training digits without
their labels. The gauge of the first two kinds is traced; that of the transformer is derived (units
and heads), without and with its residual stream, which is added here: an order of its own that all
blocks share. Units are paired by their weights, and once more by what they say on training digits.
Beside them stands the ensemble, the mean of what the networks say.

All of it runs on one thread: in how many threads sums are made decides what such networks learn.

Reported are accuracy and loss on digits that no network has seen, the mean over up to --sets sets
of T networks, the least and the largest accuracy among these; the least of the ratios of variance
of layers (`frechet_merge.diagnostics.collapse`), and what aligning took in seconds. Writes
bench/results/trained_apart_KIND.csv and what it was made with."""

import argparse
import copy
import time
import warnings

import torch
from adapters import about, write_rows
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from frechet_merge import merge
from frechet_merge.curvature.activations import weighted
from frechet_merge.curvature.repair import repair
from frechet_merge.diagnostics.collapse import collapse
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.symmetries.behaviour import match_activations
from frechet_merge.symmetries.families import derived
from frechet_merge.symmetries.gauges import align_gauges, in_one_gauge
from frechet_merge.symmetries.groups import Group, Member, Part, check_groups
from frechet_merge.symmetries.traced import traced

NETWORKS, TRAIN = 8, 1300


def perceptron():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def convolutions():
    layers, channels = [], 1
    for width in (32, 64, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Transformer(nn.Module):
    "A vision transformer, called with pictures and returning logits."

    def __init__(self):
        super().__init__()
        config = ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
        )
        self.inner = ViTForImageClassification(config)

    def forward(self, x):
        return self.inner(pixel_values=x).logits


KINDS = {"perceptron": perceptron, "convolutions": convolutions, "transformer": Transformer}
LEARNING = {"perceptron": (20, 2e-3), "convolutions": (12, 2e-3), "transformer": (40, 2e-3)}


def trained(kind, seed, x, y):
    "A network from a start of its own, which sees the digits in an order of its own."
    torch.manual_seed(seed)
    net, (epochs, rate) = KINDS[kind](), LEARNING[kind]
    steps = epochs*len(range(0, len(x), 64))
    adam = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01)
    turns = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            adam.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            adam.step()
            turns.step()
    return net.eval()


def stream(net):
    "The residual stream of the transformer: LayerNorm leaves its units an order, and no scale."
    into, out = [], []
    for name, p in net.named_parameters():
        if name.endswith(("cls_token", "position_embeddings")):
            into.append(Member(name, 2))
        elif any(end in name for end in ("projection", "norm", "o_proj", "fc2")):
            into.append(Member(name))
        elif p.dim() > 1:
            out.append(Member(name, 1))
    return Group("stream", 64, (Part("still", tuple(into), tuple(out)),))


def gauges(kind, net, x):
    "Name → groups of a network, each of them tried."
    if kind != "transformer":
        return {"aligned": traced(net, x)}
    c = from_state_dict(net.state_dict()).view(says=net.inner.config.to_dict())
    found = derived(c)
    every = {"aligned within blocks": found, "aligned": [*found, stream(net)]}
    check_groups(net, every["aligned"], x)
    return every


def filled(net, state):
    made = copy.deepcopy(net)
    made.load_state_dict({n: state.get(n, p) for n, p in made.state_dict().items()})
    return made.eval()


def by_weights(nets, both, groups, x):
    return align_gauges(both, groups)


def by_activations(nets, both, groups, x):
    return match_activations(nets, x[:512].split(64), groups, models=both)


def merges(kind, nets, x):
    "Name → network, its parents, and the seconds that aligning took."
    states = [n.state_dict() for n in nets]
    ways = {"as they are": (states, 0.0)}
    for name, groups in gauges(kind, nets[0], x[:9]).items():
        for end, find in (("", by_weights), (" by activations", by_activations)):
            since, both = time.time(), [from_state_dict(s) for s in states]
            seen = in_one_gauge(both, groups, find(nets, both, groups, x))
            ways[name + end] = [{n: c[n] for n in states[0]} for c in seen], time.time() - since
    for way, (these, seconds) in ways.items():
        parents = [filled(nets[0], s) for s in these]
        for geometry in ("euclidean", "sphere"):
            made = filled(nets[0], dict(merge(these, geometry).tensors))
            yield way + ", sphere"*(geometry == "sphere"), made, parents, seconds
        made = filled(nets[0], dict(merge(these).tensors))
        repair(made, parents, x[:512].split(64))
        yield f"{way}, repaired", made, parents, seconds


def judged(logits, y):
    right = 100*float((logits.argmax(1) == y).float().mean())
    return right, float(nn.functional.cross_entropy(logits, y))


@torch.no_grad()
def rows_of_set(kind, nets, x, tx, ty):
    "A row for each way to merge a set of networks."
    for way, made, parents, seconds in merges(kind, nets, x):
        layers = weighted(made)[:-1]
        kept = [r["variance"] for r in collapse(made, parents, [tx], layers).rows]
        score, loss = judged(made(tx), ty)
        yield {"merge": way, "accuracy": score, "loss": loss, "variance": min(kept)} | {
            "seconds": seconds
        }
    every = torch.stack([n(tx).log_softmax(1) for n in nets])
    score, loss = judged(every.exp().mean(0).log(), ty)
    yield {"merge": "ensemble", "accuracy": score, "loss": loss, "variance": 1.0, "seconds": 0.0}
    each = [judged(n, ty) for n in every]
    score, loss = (sum(v)/len(v) for v in zip(*each))
    yield {"merge": "one network", "accuracy": score, "loss": loss, "variance": 1.0} | {
        "seconds": 0.0
    }


def summary(kind, T, sets):
    "One row for each way, over all sets."
    for several in zip(*sets):
        row = {"kind": kind, "T": T, "merge": several[0]["merge"], "sets": len(several)}
        for key in ("accuracy", "loss", "variance", "seconds"):
            row[key] = round(sum(r[key] for r in several)/len(several), 4)
        row["least"] = round(min(r["accuracy"] for r in several), 2)
        row["largest"] = round(max(r["accuracy"] for r in several), 2)
        yield row


def picks(T, sets):
    "Numbers of networks, in sets that have as little in common as can be."
    starts = range(0, NETWORKS, max(1, min(T, NETWORKS//sets)))
    every = [[(s + i)%NETWORKS for i in range(T)] for s in starts]
    return every[: sets if T < NETWORKS else 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--sets", type=int, default=2)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    held = load_digits()
    x = torch.tensor(held.images[:, None]/16, dtype=torch.float32)
    y = torch.tensor(held.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, ask = order[:TRAIN], order[TRAIN:]
    x, y, tx, ty = x[learn], y[learn], x[ask], y[ask]
    kind, rows = arguments.kind, []
    nets = [trained(kind, seed, x, y) for seed in range(NETWORKS)]
    for T in range(2, NETWORKS + 1):
        several = [[nets[i] for i in p] for p in picks(T, arguments.sets)]
        sets = [[*rows_of_set(kind, some, x, tx, ty)] for some in several]
        rows += summary(kind, T, sets)
        for row in rows[-len(sets[0]) :]:
            print(row, flush=True)
    said = about(f"python bench/trained_apart.py {kind} --sets {arguments.sets}", test=len(ty))
    write_rows(f"trained_apart_{kind}", rows, said)


if __name__ == "__main__":
    main()

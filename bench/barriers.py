"""Networks that are trained apart: the loss on the way from one to the other, as they are and in
one gauge; and what aligning costs, by width.

    python bench/barriers.py DATA

Two networks 784-512-512-10 learn the pictures in DATA, a folder with the four IDX files of
Fashion-MNIST or MNIST (as Debian's dataset-fashion-mnist has them; without it, scikit-learn's
digits, 64 pixels wide, take their place), from other starts and in other orders. The barrier is the
largest test loss on the segment between them, less the mean of its ends' (Frankle et al. 2020).
Beside it stand its value after aligning, as Git Re-Basin reports it, and with restarts.

The cost is the time to align one gated MLP of a transformer, of random numbers in float32, of
widths up to that of a model of a billion parameters (8192 units of 2048 inputs). Writes
bench/results/barriers.csv and barriers_cost.csv, and what they were made with beside them."""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from adapters import about, write_rows
from torch import nn

from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.matching.gauges import align_gauges, in_one_gauge
from frechet_merge.matching.groups import Group, Member, Part
from frechet_merge.matching.traced import traced

STEPS = 11  # points on a segment
WIDTHS = (512, 1024, 2048, 4096, 8192)


def idx(path):
    "The numbers of an IDX file: pictures (N, 784) in 0 … 1, or labels (N,)."
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dims = raw[3]
    shape = np.frombuffer(raw, ">i4", dims, 4)
    found = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4*dims).copy())
    found = found.view(*map(int, shape))
    return found.flatten(1).float()/255 if dims > 1 else found.long()


def digits():
    "scikit-learn's: a fifth of them is for the test."
    from sklearn.datasets import load_digits

    held = load_digits()
    x, y = torch.tensor(held.data).float()/16, torch.tensor(held.target)
    at = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = at[: len(x)//5], at[len(x)//5 :]
    return x[train], y[train], x[test], y[test]


def pictures(folder):
    "Training and test pictures, and their labels."
    if folder is None:
        return digits()
    found = []
    for split in ("train", "t10k"):
        for kind in ("images", "labels"):
            found.append(idx(next(Path(folder).rglob(f"{split}-{kind}*"))))
    return found


def trained(x, y, seed, epochs, width):
    "A network from a start of its own, which sees the pictures in an order of its own."
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(x.shape[1], width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    batches = max(len(x)//500, 1)
    turns = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-3, total_steps=epochs*batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: 500*batches].chunk(batches):
            adam.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            adam.step()
            turns.step()
    return net.eval()


def measured(net, state, x, y):
    "Test loss and accuracy of a network with these numbers."
    with torch.no_grad():
        out = torch.func.functional_call(net, state, x)
        right = (out.argmax(1) == y).float().mean()
        return float(nn.functional.cross_entropy(out, y)), float(right)


def segment(net, a, b, x, y):
    "Loss and accuracy from one to the other, in equal steps."
    found = []
    for i in range(STEPS):
        s = i/(STEPS - 1)
        found.append(measured(net, {n: (1 - s)*a[n] + s*b[n] for n in a}, x, y))
    return found


def barrier(losses):
    "The largest loss, less that of a straight line between the ends."
    ends = np.linspace(losses[0], losses[-1], len(losses))
    return float(np.max(np.array(losses) - ends))


def rows_of_barriers(folder, epochs, width, seeds):
    "A row for each pair of networks and each way to put them together."
    x, y, tx, ty = pictures(folder)
    rows = []
    for seed in range(seeds):
        nets = [trained(x, y, 2*seed + i, epochs, width) for i in range(2)]
        models = [from_state_dict(n.state_dict()) for n in nets]
        groups = traced(nets[0], tx[:9])
        still = [
            Group(g.name, g.size, tuple(Part("still", p.into, p.out) for p in g.parts))
            for g in groups
        ]
        for name, these, restarts in (
            ("as they are", None, 0),
            ("permuted", still, 0),
            ("permuted and rescaled", groups, 0),
            ("permuted, 3 restarts", still, 3),
        ):
            since = time.time()
            pair = models
            if these is not None:
                pair = in_one_gauge(models, these, align_gauges(models, these, restarts=restarts))
            seconds = time.time() - since
            found = segment(nets[0], dict(pair[0]), dict(pair[1]), tx, ty)
            losses = [loss for loss, _ in found]
            rows.append(
                {
                    "pair": seed,
                    "way": name,
                    "barrier": round(barrier(losses), 4),
                    "loss_of_ends": round((losses[0] + losses[-1])/2, 4),
                    "loss_in_the_middle": round(losses[STEPS//2], 4),
                    "accuracy_of_ends": round((found[0][1] + found[-1][1])/2, 4),
                    "accuracy_in_the_middle": round(found[STEPS//2][1], 4),
                    "seconds": round(seconds, 1),
                }
            )
            print(rows[-1], flush=True)
    return rows


def gated(h):
    "A gated MLP of h units, four times as many as it has inputs, and its group."
    n = h//4
    up, gate, down = Member("up"), Member("gate"), Member("down", 1)
    group = Group("mlp", h, (Part("scaling", (up,), (down,)), Part("still", (gate,))))
    return {"up": torch.randn(h, n), "gate": torch.randn(h, n), "down": torch.randn(n, h)}, group


def rows_of_cost(widths):
    "A row for each width: noisy copies in another order, and whether the order is found."
    rows = []
    for h in widths:
        torch.manual_seed(0)
        one, group = gated(h)
        order = torch.randperm(h)
        other = {"up": one["up"][order], "gate": one["gate"][order], "down": one["down"][:, order]}
        noisy = {k: x + torch.randn_like(x) for k, x in other.items()}
        since = time.time()
        found = align_gauges([from_state_dict(one), from_state_dict(noisy)], [group])
        seconds = time.time() - since
        right = (order[found.gauges[1]["mlp"].source] == torch.arange(h)).float().mean()
        rows.append(
            {"units": h, "inputs": h//4, "seconds": round(seconds, 1), "found": float(right)}
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="folder of the IDX files; default: digits")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    args = parser.parse_args()
    said = ["fashion-mnist/"] if args.data else []
    given = {k: v for k, v in vars(args).items() if k not in ("data", "widths")}
    odd = [f"--{k} {v}" for k, v in given.items() if v != parser.get_default(k)]
    words = " ".join(["python bench/barriers.py", *said, *odd])
    rows = rows_of_barriers(args.data, args.epochs, args.width, args.pairs)
    write_rows("barriers", rows, about(words))
    if args.widths:
        write_rows("barriers_cost", rows_of_cost(args.widths), about(words))

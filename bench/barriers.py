"""Networks that are trained apart: the loss on the way from one to the other, as they are and in
one gauge; and what aligning costs, by width.

    python bench/barriers.py DATA
    python bench/barriers.py --pairs 0 --stream 2 --widths 1024 2048 4096 8192
    python bench/barriers.py --pairs 0 --widths --whole 2

Two networks 784-512-512-10 learn the pictures in DATA, a folder with the four IDX files of
Fashion-MNIST or MNIST (as Debian's dataset-fashion-mnist has them; without it, scikit-learn's
digits, 64 pixels wide, take their place), from other starts and in other orders. The barrier is the
largest test loss on the segment between them, less the mean of its ends' (Frankle et al. 2020).
Beside it stand its value after aligning, as Git Re-Basin reports it, with restarts, and with units
that are matched by their activations on training pictures.

With --stream, pairs of small transformers do the same with scikit-learn's digits, read as 16 tokens
each: heads and hidden units alone, or the residual stream too.

The cost is what it takes to align one gated MLP of a transformer with 2048 inputs, of random
numbers in float32, of widths up to that of a model of a billion parameters (8192 units). Each width
runs in a process of its own, whose peak memory is told. Seconds are of the processor, so that what
else a machine does counts less. Of them `likeness` and `assignment` are told apart, also for an MLP
of other random numbers, whose assignment is harder; and `moments` are what matching by activations
takes in likeness' place, of 4096 tokens.

With --whole, `frechet-merge align` is run on two folders of a transformer of the shape of Llama 3.2
1B (random numbers in bfloat16, of as many layers as are said; it has 16), the second of which is
the first one in another gauge: units in another order, with other lengths, heads in another basis.
Told are seconds of a clock and of processors, the largest memory, which counts the pages of the
files that the system keeps at hand, and how far the second then is from the first: the largest
relative distance of a tensor.

All but that runs on one thread: in how many threads sums are made decides what such networks learn.
Writes bench/results/barriers.csv, barriers_stream.csv, barriers_cost.csv and barriers_whole.csv,
and what they were made with beside them."""

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from adapters import about, write_rows
from torch import nn

from frechet_merge import merge
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.files.open import load
from frechet_merge.geometries.permutation import assigned, likeness
from frechet_merge.symmetries import gauges
from frechet_merge.symmetries.behaviour import Crossed, match_activations
from frechet_merge.symmetries.families import groups_of
from frechet_merge.symmetries.gauges import align_gauges, in_one_gauge
from frechet_merge.symmetries.groups import Group, Member, Part, gauged, random_element
from frechet_merge.symmetries.stream import stream_of
from frechet_merge.symmetries.traced import traced

STEPS = 11  # points on a segment
WIDTHS = (1024, 2048, 4096, 8192)


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


def by_weights(nets, models, fed, groups):
    "The gauges that weights say."
    return align_gauges(models, groups)


def restarted(nets, models, fed, groups):
    "The same, from four starts."
    return align_gauges(models, groups, restarts=3)


def by_activations(nets, models, fed, groups):
    "The gauges that what units say tells."
    return match_activations(nets, fed, groups)


def row_of(found):
    "What is told of a segment."
    losses, rights = zip(*found)
    return {
        "barrier": round(barrier(losses), 4),
        "loss_of_ends": round((losses[0] + losses[-1])/2, 4),
        "loss_in_the_middle": round(losses[STEPS//2], 4),
        "accuracy_of_ends": round((rights[0] + rights[-1])/2, 4),
        "accuracy_in_the_middle": round(rights[STEPS//2], 4),
    }


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
        fed = x[:5000].split(500)
        for name, these, how in (
            ("as they are", None, None),
            ("permuted", still, by_weights),
            ("permuted and rescaled", groups, by_weights),
            ("permuted, 3 restarts", still, restarted),
            ("permuted, by activations", still, by_activations),
            ("both, by activations", groups, by_activations),
        ):
            since = time.time()
            pair = models
            if these is not None:
                pair = in_one_gauge(models, these, how(nets, models, fed, these))
            seconds = time.time() - since
            found = segment(nets[0], dict(pair[0]), dict(pair[1]), tx, ty)
            rows.append({"pair": seed, "way": name, **row_of(found), "seconds": round(seconds, 1)})
            print(rows[-1], flush=True)
    return rows


INPUTS = 2048  # of an MLP, as in a model of a billion parameters
TOKENS = 4096  # of which moments are taken


def gated(h, n):
    "A gated MLP of h units with n inputs, and its group."
    up, gate, down = Member("up"), Member("gate"), Member("down", 1)
    group = Group("mlp", h, (Part("scaling", (up,), (down,)), Part("still", (gate,))))
    return {"up": torch.randn(h, n), "gate": torch.randn(h, n), "down": torch.randn(n, h)}, group


def timed(call, into, name):
    "The same function, whose seconds of processor are added up."

    def run(*given):
        since = time.process_time()
        found = call(*given)
        into[name] = into.get(name, 0.0) + time.process_time() - since
        return found

    return run


def of_strangers(h):
    "What an assignment of MLPs that have nothing in common takes, and what moments take."
    one, other = gated(h, INPUTS)[0], gated(h, INPUTS)[0]
    C = sum(one[k] @ other[k].T for k in ("up", "gate")) + one["down"].T @ other["down"]
    del one, other
    said: dict = {}
    timed(assigned, said, "assignment")(C)
    del C
    timed(Crossed(h, 1).add, said, "moments")(torch.randn(2, TOKENS, h))
    return said


def cost(h):
    "Noisy copies in another order: what it takes to find the order, and whether it is found."
    torch.manual_seed(0)
    one, group = gated(h, INPUTS)
    order = torch.randperm(h)
    other = {"up": one["up"][order], "gate": one["gate"][order], "down": one["down"][:, order]}
    noisy = {k: x + torch.randn_like(x) for k, x in other.items()}
    # scipy is imported at the first
    assigned(torch.eye(2))
    parts: dict = {}
    gauges.likeness = timed(likeness, parts, "likeness")
    gauges.assigned = timed(assigned, parts, "assignment")
    since = time.process_time()
    found = align_gauges([from_state_dict(one), from_state_dict(noisy)], [group])
    seconds = time.process_time() - since
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    right = (order[found.gauges[1]["mlp"].source] == torch.arange(h)).float().mean()
    del noisy, other, found
    del one
    said = of_strangers(h)
    return {
        "units": h,
        "inputs": INPUTS,
        "seconds": round(seconds, 2),
        "likeness": round(parts["likeness"], 2),
        "assignment": round(parts["assignment"], 2),
        "share_of_assignment": round(parts["assignment"]/seconds, 3),
        "assignment_of_strangers": round(said["assignment"], 2),
        "moments": round(said["moments"], 2),
        "peak_mib": round(peak),
        "found": float(right),
    }


def rows_of_cost(widths):
    "A row for each width."
    rows = []
    for h in widths:
        call = [sys.executable, __file__, "--one", str(h)]
        done = subprocess.run(call, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    return rows


def billion(layers):
    "A transformer of the shape of Llama 3.2 1B, of random numbers."
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=INPUTS, intermediate_size=8192, num_hidden_layers=layers, vocab_size=128256,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).bfloat16()


def farthest(one, other):
    "The largest relative distance of a tensor of two folders."
    a, b = load(one), load(other)
    gaps = [float((a[n].float() - b[n].float()).norm()/a[n].float().norm()) for n in a.lazy]
    return max(gaps)


def row_of_whole(layers):
    "What it takes to bring two such models into one gauge, from disk to disk."
    with tempfile.TemporaryDirectory() as folder:
        a, b, out = (f"{folder}/{name}" for name in "abo")
        model = billion(layers)
        parameters = sum(p.numel() for p in model.parameters())
        model.save_pretrained(a)
        del model
        c = load(a)
        groups, gen = groups_of(c), torch.Generator().manual_seed(1)
        merge([gauged(c, groups, {g.name: random_element(g, gen) for g in groups})], out=b)
        before = farthest(a, b)
        since, used = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "frechet_merge", "align", a, b, "-o", out]
        subprocess.run(command, check=True, capture_output=True)
        seconds, after = time.time() - since, resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "parameters": parameters,
            "layers": layers,
            "groups": len(groups),
            "seconds": round(seconds),
            "of_processors": round(
                after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
            ),
            "peak_mib": round(after.ru_maxrss/1024),
            "apart_before": round(before, 3),
            "apart_after": float(f"{farthest(a, f'{out}/b'):.2g}"),
        }


def tokens():
    "scikit-learn's digits as 16 tokens of 17 each; a fifth of them is for the test."
    x, y, tx, ty = digits()
    pool = nn.functional.avg_pool2d
    few = [pool(16*p.view(-1, 1, 8, 8), 2).flatten(1).round().long() + 1 for p in (x, tx)]
    return few[0], y, few[1], ty


def reader(x, y, seed, epochs):
    "A small transformer that learnt to read them."
    import transformers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_embd=32, n_head=4, n_layer=2, vocab_size=18, n_positions=16, num_labels=10,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    net = transformers.GPT2ForSequenceClassification(config)
    adam = torch.optim.AdamW(net.parameters(), 3e-3)
    turns = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=epochs*14)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).chunk(14):
            adam.zero_grad()
            nn.functional.cross_entropy(net(x[rows]).logits, y[rows]).backward()
            adam.step()
            turns.step()
    return net.eval()


class Says(nn.Module):
    "A transformer that returns its logits alone."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).logits


def rows_of_stream(pairs, epochs=20):
    "A row for each pair of transformers and each way to put them together."
    x, y, tx, ty = tokens()
    rows = []
    for seed in range(pairs):
        nets = [reader(x, y, 2*seed + i, epochs) for i in range(2)]
        with tempfile.TemporaryDirectory() as folder:
            nets[0].save_pretrained(folder)
            held = load(folder)
            own, whole = groups_of(held), [stream_of(held), *groups_of(held)]
        models = [from_state_dict(n.state_dict()) for n in nets]
        fed = x.split(200)
        for name, these, how in (
            ("as they are", None, None),
            ("heads and units", own, by_weights),
            ("heads and units, by activations", own, by_activations),
            ("the stream too", whole, by_weights),
            ("the stream too, by activations", whole, by_activations),
        ):
            since = time.time()
            pair = models
            if these is not None:
                pair = in_one_gauge(models, these, how(nets, models, fed, these))
            seconds = time.time() - since
            a, b = ({f"net.{n}": p for n, p in dict(c).items()} for c in pair)
            found = segment(Says(nets[0]), a, b, tx, ty)
            rows.append({"pair": seed, "way": name, **row_of(found), "seconds": round(seconds, 1)})
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="folder of the IDX files; default: digits")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--stream", type=int, default=0, help="pairs of transformers")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--whole", type=int, help="layers of a wide transformer")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*say the same to all examples")
    if args.one:
        print(json.dumps(cost(args.one)))
        sys.exit()
    said = ["fashion-mnist/"] if args.data else []
    given = {k: v for k, v in vars(args).items() if k not in ("data", "widths", "whole", "one")}
    odd = [f"--{k} {v}" for k, v in given.items() if v != parser.get_default(k)]
    if args.widths != WIDTHS:
        odd.append(" ".join(["--widths", *map(str, args.widths)]))
    if args.whole:
        odd.append(f"--whole {args.whole}")
    words = " ".join(["python bench/barriers.py", *said, *odd])
    if args.pairs:
        rows = rows_of_barriers(args.data, args.epochs, args.width, args.pairs)
        write_rows("barriers", rows, about(words))
    if args.stream:
        write_rows("barriers_stream", rows_of_stream(args.stream), about(words))
    if args.widths:
        write_rows("barriers_cost", rows_of_cost(args.widths), about(words))
    if args.whole:
        write_rows("barriers_whole", [row_of_whole(args.whole)], about(words))

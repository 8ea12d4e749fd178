"""What statistics cost, in training steps, and next to exact Hessian columns.

    python bench/curvature_cost.py

writes bench/results/curvature_cost.csv, with versions and machine beside it. Seconds are of
processor time in one thread, the least of two runs (of the diagonal and the Kronecker form one). A
random BERT-base-shaped encoder (12 layers, 768 wide, MLP 3072, 12 heads) with a head of 3 classes;
4 batches of 8 sequences of 32 tokens; the projected form in random orthonormal bases of p = kT =
256 matrices for each of its 72 weights (k = 32, T = 8). A step is a forward and a backward pass
with gradients of all weights, no optimiser. `curvature` is timed as a user calls it, with its
rehearsal on two samples. A Hessian-vector product is timed on one batch, over all weights at once,
by differentiating the directional derivative of the loss twice (reverse over reverse; attention
without fused kernels), and counted for all batches.

One product with a direction in one layer gives one column of that layer's block, so that exact
blocks take p products a layer. A direction in all layers at once gives sums of columns over layers,
which are no blocks; `p products in all` is what it would cost if cross-layer terms were ignored,
and a lower bound. `ratio` is seconds over those of the steps; `of projected`, over those of the
projected form."""

import time

import torch
import transformers
from adapters import about, write_rows
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification

from frechet_merge.curvature.collecting import curvature

K, T, BATCHES, N, TOKENS, REPEATS = 32, 8, 4, 8, 32, 2


def random_batches():
    return [
        {
            "input_ids": torch.randint(5, 30000, (N, TOKENS)),
            "attention_mask": torch.ones(N, TOKENS, dtype=torch.long),
            "labels": torch.randint(0, 3, (N,)),
        }
        for _ in range(BATCHES)
    ]


def random_bases(weights):
    "K·T orthonormal directions of each side of each weight; sides of one length have the same."
    made = {}
    for w in weights.values():
        for d in w.shape:
            if d not in made:
                made[d] = torch.linalg.qr(torch.randn(d, K*T))[0]
    return {n: tuple(made[d].clone() for d in w.shape) for n, w in weights.items()}


def timed(f):
    start = time.process_time()
    f()
    return time.process_time() - start


def statistics_and_steps(model, batches, weights, basis):
    "Seconds of a training step on all batches, and of each form of statistics."

    def steps():
        for b in batches:
            torch.autograd.grad(model(**b).loss, list(model.parameters()))

    names = list(weights)
    runs = {
        "training step": steps,
        "projected": lambda: curvature(model, batches, "projected", basis=basis),
        "inputs": lambda: curvature(model, batches, "inputs", parameters=names),
        "kronecker": lambda: curvature(model, batches, "kronecker", parameters=names),
        "diagonal": lambda: curvature(model, batches, "diagonal", parameters=names),
    }
    steps()
    best = {}
    # in turns, so that a busy machine is busy for all
    for i in range(REPEATS):
        for name, f in runs.items():
            if name not in ("diagonal", "kronecker") or i == 0:
                best[name] = min(best.get(name, 1e9), timed(f))
    return best


def one_product(model, batch, weights, basis):
    "Seconds of a Hessian-vector product on one batch, over all weights at once."
    ws = list(weights.values())
    v = [torch.outer(U[:, 0], V[:, 0]) for U, V in basis.values()]
    model.requires_grad_(False)
    for w in ws:
        w.requires_grad = True

    def product():
        with sdpa_kernel(SDPBackend.MATH):
            g = torch.autograd.grad(model(**batch).loss, ws, create_graph=True)
            torch.autograd.grad(sum((a*b).sum() for a, b in zip(g, v)), ws)

    return min(timed(product), timed(product))


def row(what, seconds, best):
    return {
        "what": what,
        "CPU seconds": round(seconds, 2),
        "ratio": round(seconds/best["training step"], 3),
        "of projected": round(seconds/best["projected"], 3),
        "measured": "no, a multiple" if what.startswith("exact") else "yes",
    }


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = BertForSequenceClassification(BertConfig(num_labels=3)).eval()
    batches = random_batches()
    weights = {n: w for n, w in model.named_parameters() if "encoder.layer" in n and w.dim() == 2}
    basis = random_bases(weights)
    best = statistics_and_steps(model, batches, weights, basis)
    hvp = BATCHES*one_product(model, batches[0], weights, basis)
    best["one Hessian-vector product"] = hvp
    best["exact: p products in all"] = K*T*hvp
    best["exact: p products a layer"] = K*T*len(weights)*hvp
    rows = [row(what, seconds, best) for what, seconds in best.items()]
    for r in rows:
        print(*r.values(), sep="\t")
    facts = about(
        "python bench/curvature_cost.py",
        threads=1,
        transformers=transformers.__version__,
        layers=len(weights),
        p=K*T,
        samples=BATCHES*N,
        tokens=TOKENS,
    )
    write_rows("curvature_cost", rows, facts)


if __name__ == "__main__":
    main()

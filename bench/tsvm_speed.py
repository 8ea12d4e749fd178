"""TSV-M of eight tasks at the shapes of CLIP's ViT-B/32: full decompositions of every matrix, as
published, beside `EpiMer`.

    python bench/tsvm_speed.py

writes bench/results/tsvm_speed.csv, with versions and machine beside it. One layer of each shape is
merged and weighted by how often the vision model has it (12 blocks of four 768×768, one 3072×768,
one 768×3072). Updates are float32: Gaussian matrices, or random singular vectors with σ_i = i^-0.5,
which is near what the differences of fully fine-tuned small text encoders have (σ_4, σ_32, σ_128 at
0.5, 0.2, 0.1 of σ_1). Published is `torch.linalg.svd(full_matrices=False)` of each update and of
the singular vectors side by side, in the dtype of the checkpoint or in float64. Steps of the
methods alternate, on one thread; distances are relative Frobenius distances of all merged updates
from the published computation in float64."""

import os

for name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{name}_NUM_THREADS", "1")
import platform
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from adapters import write_rows

from frechet_merge.geometries import subspace

T, SHAPES = 8, {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
WAYS = {
    "float32": "full, in float32",
    "float64": "full, in float64",
    "EpiMer": "EpiMer(k)",
}


def update(shape, spectrum, gen):
    m, n = shape
    k = min(m, n)
    if spectrum == "Gaussian":
        return torch.randn(m, n, generator=gen)
    U, V = (torch.linalg.qr(torch.randn(s, k, generator=gen))[0] for s in shape)
    return (U*torch.arange(1, k + 1)**-0.5) @ V.T


def timed(clock, who, f, *args):
    start = time.perf_counter()
    out = f(*args)
    clock[who] = clock.get(who, 0.0) + time.perf_counter() - start
    return out


def added(parts, k):
    "TSV-M as published, from what `torch.linalg.svd` returned for each task."
    U = torch.cat([u[:, :k] for u, _, _ in parts], 1)
    S = torch.cat([s[:k] for _, s, _ in parts])
    V = torch.cat([v[:k] for _, _, v in parts], 0)
    (P, _, Q), (R, _, O) = (torch.linalg.svd(X, full_matrices=False) for X in (U, V))
    return torch.linalg.multi_dot((P, Q, S.diag(), R, O))


def whole(x, dtype):
    return torch.linalg.svd(x.to(dtype), full_matrices=False)


def merged(deltas, k):
    b = subspace.labeled_basis(deltas, k)
    return b.lift(b.sigma).float()


class Tally:
    "What was measured: (way, k) → seconds and squared distances; k → squared lengths."

    def __init__(self):
        self.seconds, self.off, self.size = Counter(), Counter(), Counter()

    def rows(self, spectrum, ks):
        for k in ks:
            for way, name in WAYS.items():
                ratio = self.seconds[way, k]/self.seconds["EpiMer", k]
                distance = (self.off[way, k]/self.size[k])**0.5
                yield {
                    "spectrum": spectrum,
                    "k": k,
                    "decompositions": name,
                    "seconds": f"{self.seconds[way, k]:.0f}",
                    "EpiMer is faster by": "" if way == "EpiMer" else f"{ratio:.1f}",
                    "distance": "0" if way == "float64" else f"{distance:.0e}",
                }


def decomposed(deltas, ks, clock):
    "Each update in turn by every way, so that they are timed beside each other."
    full, top = {name: [] for name in DTYPES}, {k: [] for k in ks}
    for x in deltas:
        for name, dtype in DTYPES.items():
            full[name].append(timed(clock, name, whole, x, dtype))
        for k in ks:
            top[k].append(timed(clock, k, subspace.top_svd, x, k))
    return full, top


def epimer(deltas, k, top, clock):
    "The merge, with the triplets that were found and timed beside the others."
    ready, real = iter(top), subspace.top_svd
    subspace.top_svd = lambda x, k: next(ready)
    try:
        return timed(clock, ("rest", k), merged, deltas, k)
    finally:
        subspace.top_svd = real


def one_shape(deltas, count, ks, tally):
    "A merge of a shape, counted as often as the model has it."
    clock = {}
    full, top = decomposed(deltas, ks, clock)
    for k in ks:
        made = {name: timed(clock, (name, k), added, full[name], k) for name in DTYPES}
        made["EpiMer"] = epimer(deltas, k, top[k], clock)
        for name in DTYPES:
            tally.seconds[name, k] += count*(clock[name] + clock[name, k])
        tally.seconds["EpiMer", k] += count*(clock[k] + clock["rest", k])
        want = made["float64"]
        tally.size[k] += count*float(want.norm())**2
        for name, x in made.items():
            tally.off[name, k] += count*float((x.double() - want).norm())**2
    return clock


def run(spectrum, ks=(32, 96)):
    gen, tally = torch.Generator().manual_seed(0), Tally()
    for shape, count in SHAPES.items():
        deltas = [update(shape, spectrum, gen) for _ in range(T)]
        clock = one_shape(deltas, count, ks, tally)
        seconds = {k: round(v, 2) for k, v in clock.items() if not isinstance(k, tuple)}
        print(spectrum, shape, seconds, flush=True)
    rows = list(tally.rows(spectrum, ks))
    for row in rows:
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    import scipy

    torch.set_num_threads(1)
    made = {
        "command": "python bench/tsvm_speed.py",
        "machine": platform.machine(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "seconds": "of one merge of each shape, times 48, 12 and 12",
    }
    write_rows("tsvm_speed", [r for s in ("Gaussian", "i^-0.5") for r in run(s)], made)

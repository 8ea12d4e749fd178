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
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from adapters import write_rows

from frechet_merge.geometries import subspace

T, SHAPES = 8, {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}


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
    U, S, V = (
        torch.cat([u[:, :k] for u, _, _ in parts], 1),
        torch.cat([s[:k] for _, s, _ in parts]),
        torch.cat([v[:k] for _, _, v in parts], 0),
    )
    (P, _, Q), (R, _, O) = (torch.linalg.svd(X, full_matrices=False) for X in (U, V))
    return torch.linalg.multi_dot((P, Q, S.diag(), R, O))


def whole(x, dtype):
    return torch.linalg.svd(x.to(dtype), full_matrices=False)


def merged(deltas, k):
    b = subspace.labeled_basis(deltas, k)
    return b.lift(b.sigma).float()


def run(spectrum, ks=(32, 96)):
    gen, rows = torch.Generator().manual_seed(0), []
    total, off, size = {}, {}, {}
    for shape, count in SHAPES.items():
        deltas = [update(shape, spectrum, gen) for _ in range(T)]
        clock, parts, top, real = {}, {32: [], 64: []}, {k: [] for k in ks}, subspace.top_svd
        for x in deltas:
            for bits, dtype in ((32, torch.float32), (64, torch.float64)):
                parts[bits].append(timed(clock, f"float{bits}", whole, x, dtype))
            for k in ks:
                top[k].append(timed(clock, f"k = {k}", real, x, k))
        for k in ks:
            want = timed(clock, ("added", 64), added, parts[64], k)
            total["float64", k] = total.get(("float64", k), 0) + count*(
                clock["float64"] + clock.pop(("added", 64))
            )
            got = timed(clock, ("added", 32), added, parts[32], k)
            total["float32", k] = total.get(("float32", k), 0) + count*(
                clock["float32"] + clock.pop(("added", 32))
            )
            # they were timed beside the others
            ready = iter(top[k])
            subspace.top_svd = lambda x, k, ready=ready: next(ready)
            ours = timed(clock, "rest", merged, deltas, k)
            subspace.top_svd = real
            total["EpiMer", k] = total.get(("EpiMer", k), 0) + count*(
                clock[f"k = {k}"] + clock.pop("rest")
            )
            size[k] = size.get(k, 0) + count*float(want.norm())**2
            for who, x in (("float32", got), ("EpiMer", ours)):
                off[who, k] = off.get((who, k), 0) + count*float((x.double() - want).norm())**2
        print(spectrum, shape, {k: round(v, 2) for k, v in clock.items()}, flush=True)
    for k in ks:
        for who, name in (
            ("float32", "full, in float32"),
            ("float64", "full, in float64"),
            ("EpiMer", "EpiMer(k)"),
        ):
            rows.append(
                {
                    "spectrum": spectrum,
                    "k": k,
                    "decompositions": name,
                    "seconds": f"{total[who, k]:.0f}",
                    "EpiMer is faster by": f"{total[who, k] / total['EpiMer', k]:.1f}"
                    if who != "EpiMer"
                    else "",
                    "distance": f"{(off[who, k] / size[k]) ** 0.5:.0e}"
                    if who != "float64"
                    else "0",
                }
            )
            print(rows[-1], flush=True)
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

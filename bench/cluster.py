"""What a part of a merge costs, predicted from two whole ones, and measured.

    python bench/cluster.py

Models of two sizes are merged by the command line, and the processor time of each gives what it
takes to start and how many bytes a second one core merges. From these two numbers it is predicted
what parts of the larger ones take (1/2, 1/4), and these are run. Times are of the processor, user
and system, and not of a clock: other work on the machine does not change them much.

Writes bench/results/cluster.csv (a row for each part) and cluster.json (the two numbers)."""

import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from adapters import about, write_rows

from frechet_merge.files.shards import save_tensors

FIELDS = ("geometry", "part", "predicted s", "measured s", "off")
T, SIDE = 3, 1024


def make(folder: Path, seed: int, tensors: int) -> None:
    "A model of 2 MB for each of its tensors."
    g = torch.Generator().manual_seed(seed)
    folder.mkdir()
    named = {f"l.{i}": torch.randn(SIDE, SIDE, generator=g).bfloat16() for i in range(tensors)}
    save_tensors(folder/"model.safetensors", named)


def seconds(work: Path, size: str, geometry: str, *more: str) -> float:
    "Processor time of a merge, the lowest of three."
    words = [sys.executable, "-m", "frechet_merge", "merge", *(f"{size}{i}" for i in range(T))]
    words += ["-o", "out", "--geometry", geometry, "--executor", "serial", "--shard-size", "8MB"]
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*words, *more], cwd=work, check=True, capture_output=True)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime)
        for out in work.glob("out*"):
            shutil.rmtree(out)
    return min(found)


def main():
    rows, known = [], {}
    counts = {"small": 4, "large": 256}
    nbytes = {size: 2*SIDE**2*n for size, n in counts.items()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for size, n in counts.items():
            for i in range(T):
                make(work/f"{size}{i}", i, n)
        for geometry in ("euclidean", "sphere"):
            small, large = (seconds(work, size, geometry) for size in counts)
            rate = T*(nbytes["large"] - nbytes["small"])/(large - small)
            start = small - T*nbytes["small"]/rate
            known[geometry] = {"start s": round(start, 3), "input bytes/s": round(rate)}
            for part in ("1/2", "1/4"):
                want = start + T*nbytes["large"]/int(part[2:])/rate
                found = seconds(work, "large", geometry, "--part", part)
                off = f"{found/want - 1:+.0%}"
                row = geometry, part, round(want, 2), round(found, 2), off
                rows.append(dict(zip(FIELDS, row)))
    write_rows("cluster", rows, about("python bench/cluster.py", T=T, **known))
    print(rows, known)


if __name__ == "__main__":
    main()

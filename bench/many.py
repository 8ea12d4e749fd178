"""How long a merge of a hundred thousand small tensors takes, and how much memory.

    python bench/many.py [--tensors 100000] [--models 3] [--geometry euclidean …]

The models have 32 numbers in each tensor, as a mixture of very many small experts might. Each row
is a process of its own: planning from the headers alone (`--dry-run`), and merging, in each
geometry. The time of the processor and the peak of memory are what the system says of the process
when it has ended. Writes bench/results/many.csv and many.json; rows of before that are not run
again stay.
"""

import argparse
import csv
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPE = (4, 8)


def model(folder, tensors, seed):
    "A folder with one file; all models are one plus a tenth of what is their own."
    count = tensors*SHAPE[0]*SHAPE[1]
    shared, own = (np.random.default_rng(s).standard_normal(count, "f4") for s in (0, seed))
    numbers = shared + 0.1*own
    each = 4*SHAPE[0]*SHAPE[1]
    header = {
        f"layers.{i//10}.experts.{i%10}.weight": {
            "dtype": "F32",
            "shape": SHAPE,
            "data_offsets": [i*each, (i + 1)*each],
        }
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder/"model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + numbers.astype("f4").tobytes())
    return folder


def run(what, *args):
    "Seconds and peak memory of Python with these arguments."
    start = time.time()
    process = subprocess.Popen([sys.executable, *map(str, args)])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{what}: ended with {status}")
    cpu = used.ru_utime + used.ru_stime
    peak = used.ru_maxrss/1024
    return {
        "what": what,
        "wall s": round(time.time() - start, 1),
        "CPU s": round(cpu, 1),
        "peak MiB": round(peak),
    }


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--tensors", type=int, default=100_000)
    p.add_argument("--models", type=int, default=3)
    p.add_argument("--geometry", nargs="+", default=["euclidean", "sphere"])
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        folders = [model(Path(d)/f"m{i}", a.tensors, i + 1) for i in range(a.models)]
        out = Path(d)/"out"
        rows = []
        for geometry in a.geometry:
            args = "-m", "frechet_merge", "merge", *folders, "-o", out, "--geometry", geometry
            rows.append(run(f"planning, {geometry}", *args, "--dry-run"))
            rows.append(run(f"merging, {geometry}", *args))
            shutil.rmtree(out)
    # a process begins with the memory of the one that starts it, so torch is imported only now
    from adapters import HERE, about, write_rows

    command = " ".join(["python bench/many.py", *sys.argv[1:]])
    before = csv.DictReader((HERE/"results"/"many.csv").read_text().splitlines())
    rows = [*{row["what"]: row for row in (*before, *rows)}.values()]
    earlier = json.loads((HERE/"results"/"many.json").read_text())["command"].split("; ")
    command = "; ".join(dict.fromkeys([*earlier, command]))
    # of the whole machine: others' work makes the processor slower, too
    write_rows("many", rows, about(command, load=round(os.getloadavg()[0], 1)))


if __name__ == "__main__":
    main()

"""Whole merges by this version and by an earlier one, in turn on the same files.

    python bench/before.py COMMIT [--runs 5] [--models 5]

Installs the package of the commit, without its dependencies, into a folder of its own, makes five
Llama-layout checkpoints (bench/llama.py), and times both versions. Writes bench/results/before.csv
(a row for each command and version: median, minimum and maximum seconds) and before.json. Read
ratios: both ran side by side on one machine. `no fsync` is this version where the kernel is not
asked to put the output on the disk before it is renamed."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llama
from adapters import about, write_rows

ROOT = Path(__file__).parents[1]
MAIN = "from frechet_merge.cli import main; main()"
NO_SYNC = "import os; os.fsync = lambda fd: None; "
SIZE = "0.5B"


def install(commit, folder):
    "The package of a commit, under a folder."
    source = folder/"source"
    source.mkdir()
    archive = subprocess.check_output(["git", "archive", commit], cwd=ROOT)
    subprocess.run(["tar", "x", "-C", source], input=archive, check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--target", folder/"package", source], check=True)
    return folder/"package"


def timed(code, path, args, out):
    "Seconds of one command."
    shutil.rmtree(out, ignore_errors=True)
    env = {**os.environ, "PYTHONPATH": str(path)}
    start = time.time()
    command = [sys.executable, "-c", code, *map(str, args)]
    subprocess.run(command, env=env, cwd=out.parent, check=True, capture_output=True)
    return time.time() - start


def commands(models, out):
    "What is timed: name → arguments of the command line."
    merge = ["merge", *models, "-o", out]
    return {
        "linear": merge,
        "Karcher": [*merge, "--geometry", "sphere"],
        "two small models": ["merge", out.parent/"small"/"m0", out.parent/"small"/"m1", "-o", out],
        "--version": ["--version"],
    }


def row(what, who, seconds):
    numbers = statistics.median(seconds), min(seconds), max(seconds)
    kinds = ("median s", "min s", "max s")
    return {"what": what, "who": who, **{k: round(x, 2) for k, x in zip(kinds, numbers)}}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("commit")
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--models", type=int, default=5)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        work = Path(d)
        old = install(a.commit, work)
        llama.make(work/"large", SIZE, a.models)
        llama.make(work/"small", "tiny", 2)
        models = [work/"large"/f"m{i}" for i in range(a.models)]
        who = {"before": (MAIN, old), "now": (MAIN, ROOT), "now, no fsync": (NO_SYNC + MAIN, ROOT)}
        seconds = {}
        for _ in range(a.runs):
            for what, args in commands(models, work/"out").items():
                for name, (code, path) in who.items():
                    one = timed(code, path, args, work/"out")
                    seconds.setdefault((what, name), []).append(one)
    rows = [row(*key, found) for key, found in seconds.items()]
    write_rows("before", rows, about(f"python bench/before.py {a.commit}"))


if __name__ == "__main__":
    main()

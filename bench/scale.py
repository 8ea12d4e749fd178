"""What a merge costs as models grow in number and in size, beside a copy and mergekit.

    python bench/scale.py [--sizes 0.1B 0.5B 1B 3B] [--models 2 4 8 16] [--runs 3]
                          [--mergekit MERGEKIT_YAML] [--disk 20] [--quick]

Each size is made, measured and removed before the next one (bench/llama.py; bfloat16). For each
number T of models, the average and the Karcher mean are timed by threads and with warm files. For
the one T of `--middle` they are timed by every executor, too, and with files that are not in the
memory of the kernel; so are the other geometries, by threads and with warm files, and mergekit.
Beside each stands what reads the inputs and copies one of them (`cat`, `cp`), on the same files, in
turn with it. Where T models of a size need more than `--disk` gigabytes, fewer are made, and
some are given more than once: the column `files` says how many are different.

Writes bench/results/scale.csv (a row for each command) and scale.json, after each size. Seconds are
the median of the runs; MB are read from and written to the disk as the kernel counts them. Read
ratios of one size, T and cache: they ran side by side on one machine."""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import llama
import peers
import torch
from adapters import HERE, about, write_rows

GEOMETRIES = {
    "linear": [],
    "Karcher": ["--geometry", "sphere"],
    # at one T
    "TIES": ["--geometry", "ties", "--base", "base"],
    "Huber": ["--loss", "huber"],
}
# of mergekit, the same two; what else it calls by these names computes something else
MERGEKIT = {"linear": "linear", "Karcher": "karcher"}
OUT = "out"
COPY = "cat + cp"


def parameters(size):
    "Numbers of a model."
    return sum(torch.Size(shape).numel() for _, shape in llama.layout(size))


def files_that_fit(size, most, disk):
    "Of how many different models, a base and two outputs there is room."
    return max(1, min(most, int(disk*1e9/(2*parameters(size))) - 3))


def ours(models, geometry, executor):
    "A merge by the command line."
    words = [sys.executable, "-m", "frechet_merge", "merge", *models, "-o", OUT, "--quiet"]
    return [*words, "--executor", executor, *GEOMETRIES[geometry]]


def copy(models):
    "Reads every input, and writes one."
    files = " ".join(f"{m}/*.safetensors" for m in models)
    return ["sh", "-c", f"cat {files} > /dev/null; cp -r {models[0]} {OUT}"]


def commands(asked, models, cache):
    "What is timed on these models: (who, geometry, executor) → words."
    found = {(COPY, "", ""): copy(models)}
    middle = len(models) == asked.middle
    for geometry in asked.geometries:
        is_first = geometry in MERGEKIT
        if not is_first and not (middle and cache == "warm"):
            continue
        for executor in asked.executors:
            if executor == "threads" or (middle and is_first):
                found["frechet-merge", geometry, executor] = ours(models, geometry, executor)
    if asked.mergekit and middle and cache == "warm":
        for geometry, method in MERGEKIT.items():
            if geometry in asked.geometries:
                # it takes the name of a folder for one of the hub
                paths = [str(Path(m).resolve()) for m in models]
                words = peers.mergekit_command(asked.mergekit, method, paths, OUT, Path.cwd())
                found["mergekit", geometry, ""] = words
    return found


def prepare(files, cache):
    "Have the kernel hold these files in memory, or not; only these are touched."
    os.sync()
    for file in files:
        if cache == "warm":
            subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
            continue
        with open(file, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(asked, words_of, cache, files):
    "What each command took in each run, all in turn."
    seen = {key: [] for key in words_of}
    for _ in range(asked.runs):
        for key, words in words_of.items():
            shutil.rmtree(OUT, ignore_errors=True)
            prepare(files, cache)
            try:
                seen[key].append(peers.measured(words, Path.cwd(), Path("log")))
            except SystemExit as e:
                # a peer that needs more memory than there is ends no bench
                if key[0] != "mergekit":
                    raise
                print(f"{key}: {str(e).splitlines()[-1]}", flush=True)
    shutil.rmtree(OUT, ignore_errors=True)
    return {key: found for key, found in seen.items() if found}


def row(size, models, cache, key, found):
    "A row of the table."
    seconds = [f["seconds"] for f in found]
    times = {"s": statistics.median(seconds), "min s": min(seconds), "max s": max(seconds)}
    times["cpu s"] = statistics.median(f["cpu s"] for f in found)
    moved = {k: round(max(f[k] for f in found)) for k in ("peak MiB", "read MB", "written MB")}
    return {
        "size": size,
        "parameters": parameters(size),
        "T": len(models),
        "files": len(set(models)),
        "cache": cache,
        **dict(zip(("who", "geometry", "executor"), key)),
        "runs": len(found),
        **{k: round(s, 3) for k, s in times.items()},
        **moved,
    }


def of_size(asked, size):
    "The rows of one size, in a folder that holds its models and is then removed."
    rows, here = [], Path.cwd()
    with tempfile.TemporaryDirectory(dir=asked.work) as folder:
        os.chdir(folder)
        files = files_that_fit(size, max(asked.models), asked.disk)
        llama.make(Path(), size, files)
        for number in asked.models:
            models = [f"m{i % files}" for i in range(number)]
            for cache in ("warm", "cold") if number == asked.middle else ("warm",):
                inputs = [str(f) for m in (*set(models), "base") for f in Path(m).iterdir()]
                seen = timed(asked, commands(asked, models, cache), cache, inputs)
                rows += [row(size, models, cache, *found) for found in seen.items()]
                print(f"{size}, {number} models, {cache}: {len(seen)} commands", flush=True)
        os.chdir(here)
    return rows


def arguments():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--sizes", nargs="+", default=["0.1B", "0.5B", "1B", "3B"], choices=llama.SIZES)
    p.add_argument("--models", nargs="+", type=int, default=[2, 4, 8, 16])
    p.add_argument("--middle", type=int, default=4, help="T at which everything is measured")
    p.add_argument("--geometries", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    p.add_argument("--executors", nargs="+", default=["threads", "serial"])
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--mergekit", help="path of mergekit-yaml; without it mergekit is left out")
    p.add_argument("--disk", type=float, default=20, help="gigabytes that may be used at once")
    p.add_argument("--add", action="store_true", help="let rows of other sizes stay")
    p.add_argument("--work", default=tempfile.gettempdir())
    p.add_argument("--quick", action="store_true", help="tiny models, once: does it run?")
    asked = p.parse_args()
    if asked.quick:
        asked.sizes, asked.models, asked.middle, asked.runs = ["tiny"], [2, 4], 4, 1
    return asked


def command(asked, sizes):
    "What makes the rows of these sizes again."
    words = ["python bench/scale.py --sizes", *sizes, "--models", *map(str, asked.models)]
    words += ["--middle", str(asked.middle), "--runs", str(asked.runs)]
    if asked.mergekit:
        words.append("--mergekit MERGEKIT_YAML")
    return " ".join([*words, "--disk", f"{asked.disk:g}"])


def kept(sizes):
    "Rows of before of other sizes, and what made them."
    with (HERE/"results"/"scale.csv").open() as f:
        rows = [r for r in csv.DictReader(f) if r["size"] not in sizes]
    return rows, json.loads((HERE/"results"/"scale.json").read_text())["command"]


def main():
    asked = arguments()
    rows, before = kept(asked.sizes) if asked.add else ([], "")
    for i, size in enumerate(asked.sizes):
        rows += of_size(asked, size)
        made = command(asked, asked.sizes[: i + 1])
        made = f"{before}; {made} --add" if before else made
        write_rows("scale", rows, about(made, mergekit=asked.mergekit and "0.1.5"))


if __name__ == "__main__":
    main()

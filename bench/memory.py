"""How much memory jobs hold, beside what the plan says of it, and whether a budget is kept.

    python bench/memory.py [--geometries euclidean sphere …] [--models 2 4]
    python bench/memory.py --executors processes ray [--geometries sphere ties] [--models 4]

Models have four matrices of 2048 × 2048 in bfloat16. Each row is two merges in processes of their
own. One is serial and without a budget: the most that it held above what it had before is beside
what the plan says of its largest job. One has threads and a budget with room for one such job, of
100 MiB at least. Small models of the same kind are merged first, so that what is imported counts as
had before. Linux only. Writes bench/results/memory.csv and memory.json; rows of before that are not
run again stay.

With `--executors` a row is a merge by other processes, under a budget for one job, and for two: the
most that all workers together held above the most that they held for small models, looked at every
few milliseconds. Writes bench/results/memory_workers.csv and memory_workers.json.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from itertools import product
from pathlib import Path

SIDE, SMALL, TENSORS = 2048, 64, 4
LEAST = 100 << 20  # bytes of a budget, for geometries that hold pieces only
NAMES = (
    *("euclidean", "sphere", "stock"),
    *("ties", "dare", "della", "breadcrumbs", "sce", "outliers", "ram"),
    *("epimer", "knots"),
)


def make(folder, side, models):
    "A base, and models that are near it."
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    base = {f"w{i}": torch.randn(side, side) for i in range(TENSORS)}
    for k in range(models + 1):
        state = {n: (x + 0.05*k*torch.randn(side, side)).bfloat16() for n, x in base.items()}
        (folder/f"m{k}").mkdir(parents=True)
        save_file(state, folder/f"m{k}"/"model.safetensors")


def status(key):
    "A number of bytes that the system says of this process."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024*int(line.split()[1]) for line in lines if line.startswith(key))


def recipe_of(folder, name, models):
    "T models of a folder, and their base where there has to be one."
    from frechet_merge.geometries.registry import geometry_named
    from frechet_merge.merging.recipe import Recipe

    base = {"base": str(folder/"m0")} if geometry_named(name).needs.base else {}
    paths = [str(folder/f"m{k + 1}") for k in range(models)]
    return Recipe.of({"models": paths, "geometry": name, **base})


def told(folder, name, models):
    "Bytes that the plan says the largest job holds."
    from frechet_merge.execution.memory import bytes_held
    from frechet_merge.merging.parts import plan_root
    from frechet_merge.merging.plan import open_recipe

    plan = plan_root(open_recipe(recipe_of(folder, name, models)))
    return max(map(bytes_held, plan.jobs))


def one(folder, name, models, memory):
    "In a process of its own: print the most that a merge holds above what there was before."
    from frechet_merge.merging.merge import make as merged
    from frechet_merge.merging.recipe import Output
    from frechet_merge.execution.executors import Run

    run = Run(memory=memory) if memory else Run(executor="serial")
    for size in ("small", "large"):
        with tempfile.TemporaryDirectory() as d:
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS:")
            recipe = recipe_of(folder/size, name, models)
            merged(recipe, Output(Path(d)/"out"), run if size == "large" else Run())
            peak = status("VmHWM:")
    print(peak - before)


def held(*args):
    "What `one` or `together` prints."
    command = [sys.executable, "-W", "ignore", __file__, "--one", *map(str, args)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [*map(int, out.split())]
    return found[0] if len(found) == 1 else found


def row(folder, name, models):
    "What is said, what is held, and what is held under a budget."
    says = told(folder/"large", name, models)
    budget = max(int(1.02*says), LEAST)
    free, bound = held(folder, name, models, 0), held(folder, name, models, budget)
    return {
        "geometry": name,
        "T": models,
        "told MiB": round(says/2**20),
        "held MiB": round(free/2**20),
        "budget MiB": round(budget/2**20),
        "held within it MiB": round(bound/2**20),
        "of the budget": f"{bound/budget:.0%}",
    }


def of_workers():
    "Bytes that all workers of this process have now, and how many there are."
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            # of Ray's own processes those that do tasks
            is_worker = "serve" in " ".join(child.cmdline()) or child.name().startswith("ray::")
            if is_worker:
                found.append(child.memory_info().rss)
        except psutil.Error:
            continue
    return sum(found), len(found)


@contextmanager
def watched():
    "The most that all workers had at once while this goes on, and the most of them: two numbers."
    found, over = [0, 0], threading.Event()

    def look():
        while not over.is_set():
            found[:] = map(max, found, of_workers())
            time.sleep(0.005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def together(folder, name, models, memory, executor):
    "In a process of its own: print what workers held above what small models take, and how many."
    from frechet_merge.merging.merge import make as merged
    from frechet_merge.merging.recipe import Output
    from frechet_merge.execution.executors import Run

    found = {}
    for size in ("small", "large"):
        with tempfile.TemporaryDirectory() as d, watched() as found[size]:
            run = Run(executor, memory=memory if size == "large" else None)
            merged(recipe_of(folder/size, name, models), Output(Path(d)/"out"), run)
    print(found["large"][0] - found["small"][0], found["large"][1])


def rows_of_workers(folder, name, models, executor):
    "What all workers held under a budget for one job, and for two."
    says = told(folder/"large", name, models)
    for jobs in (1, 2):
        budget = max(int(1.02*jobs*says), LEAST)
        bound, workers = held(folder, name, models, budget, executor)
        yield {
            "geometry": name,
            "T": models,
            "executor": executor,
            "workers": workers,
            "told MiB": round(says/2**20),
            "budget MiB": round(budget/2**20),
            "held within it MiB": round(bound/2**20),
            "of the budget": f"{bound/budget:.0%}",
        }


def kept(rows):
    "Rows of the file, those that were run again in their new form."
    from adapters import HERE

    file = HERE/"results"/"memory.csv"
    before = csv.DictReader(file.read_text().splitlines()) if file.exists() else []
    every = {(row["geometry"], str(row["T"])): row for row in (*before, *rows)}
    return [*every.values()]


def commands(command, name):
    "All commands that a file is of: this one, and those of the rows that stay."
    from adapters import HERE

    file = HERE/"results"/f"{name}.json"
    before = json.loads(file.read_text())["command"].split("; ") if file.exists() else []
    return "; ".join(dict.fromkeys([*before, command]))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--geometries", nargs="+", default=NAMES)
    p.add_argument("--models", type=int, nargs="+", default=[2, 4])
    p.add_argument("--executors", nargs="+", default=[])
    p.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        folder, name, models, memory, *executor = a.one
        measure = together if executor else one
        return measure(Path(folder), name, int(models), int(memory), *executor)
    from adapters import about, write_rows

    command = " ".join(["python bench/memory.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as d:
        for size, side in (("small", SMALL), ("large", SIDE)):
            make(Path(d)/size, side, max(a.models))
        rows = []
        for name, T, executor in product(a.geometries, a.models, a.executors):
            rows += rows_of_workers(Path(d), name, T, executor)
            write_rows("memory_workers", rows, about(command))
        if a.executors:
            return
        said = about(commands(command, "memory"))
        for name, T in product(a.geometries, a.models):
            rows.append(row(Path(d), name, T))
            write_rows("memory", kept(rows), said)


if __name__ == "__main__":
    main()

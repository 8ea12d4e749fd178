"""Means of one rank in three curved metrics, on the five packaged adapters.

    python bench/polar.py     writes bench/results/polar.csv

Each geometry merges the adapters once, in processor seconds of all threads. The merged update is
put on the base at several scales; the first half of each task's test texts chooses one, and what is
reported is the other half, beside the mean cut to the same rank (`LoRA(rank=4)`) and the whole mean
(`LoRA()`). A layer has a mean in a curved metric where a way leads to every adapter; where none
does, the merge stays where it started, at the cut. `no log` counts those layers. Then all adapters
are written in gauges of condition 1000, in float32, and merged again."""

import json
import tempfile
import time
import warnings
from pathlib import Path

import torch
from adapter_quality import Judge, Table, gauged, half
from adapters import about, write_rows

from frechet_merge import LoRA, load, merge
from frechet_merge.adapters.baking import bake
from frechet_merge.cli.demo import DATA
from frechet_merge.files.checkpoint import from_state_dict

METRICS = ("mix", "inv", "polar")
SCALES = [1.0, 2.0, 2.8, 4.0]


def methods(rank):
    found = {"LoRA()": LoRA(), f"LoRA(rank={rank})": LoRA(rank=rank)}
    return found | {f"LoRA(metric={m!r})": LoRA(metric=m) for m in METRICS}


def scaled(adapter, scale):
    "The adapter, its update times a number."
    tensors = {k: x*scale if "lora_B" in k else x for k, x in adapter.items()}
    return from_state_dict(tensors, "scaled").view(adapter=adapter.adapter)


def merged(folders, g):
    "The merge, its reports, and its processor seconds."
    start = time.process_time()
    made = merge(folders, g, dtype="fp32")
    return made.tensors, made.means.values(), time.process_time() - start


def add(table, judge, who, g, moved):
    "One row."
    adapter, means, seconds = merged(judge.folders, g)
    tried = {s: judge.predict(bake(judge.base, scaled(adapter, s))) for s in SCALES}
    best = max(SCALES, key=lambda s: half(judge.right(tried[s]), 0))
    other = merged(moved, g)[0]
    again = judge.predict(bake(judge.base, scaled(other, best)))
    flips = sum(int((again[n] != tried[best][n]).sum()) for n in again)/judge.texts
    lost = f"{sum(m.lost > 0 for m in means)}/{len(means)}"
    table.add(who, judge.right(tried[best]), best, f"{flips:.4f}", lost)
    table.rows[-1]["steps"] = max(m.iterations for m in means)
    table.rows[-1]["processor seconds"] = f"{seconds:.1f}"
    print(table.rows[-1], flush=True)


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    judge = Judge(DATA, DATA/"tests.json.gz", None)
    own = {}
    for n, f in zip(judge.tasks, judge.folders):
        own |= judge.right(judge.predict(bake(judge.base, load(f)), [n]))
    table = Table(own)
    rank = json.loads((judge.folders[0]/"adapter_config.json").read_text())["r"]
    with tempfile.TemporaryDirectory() as tmp:
        moved = [gauged(f, Path(tmp)/f.name, i) for i, f in enumerate(judge.folders)]
        for who, g in methods(rank).items():
            add(table, judge, who, g, moved)
    facts = about("python bench/polar.py", tasks=list(judge.tasks), texts=judge.texts, rank=rank)
    write_rows("polar", table.rows, facts)


if __name__ == "__main__":
    main()

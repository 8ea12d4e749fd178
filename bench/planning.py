"""How long a merge of models of 70B numbers is planned, from their headers alone.

    python bench/planning.py [--models 8] [--runs 5]

The models are sparse files: headers as of Llama 3 70B in 30 shards, and no numbers behind them. A
run opens all models, aligns and plans them in a process of its own, as `frechet-merge merge` does
before the first byte, and as `--dry-run` does, which merges a few of the numbers, too; beside it
runs what only reads the same headers, with safetensors. Writes bench/results/planning.csv (a row
for each: median, minimum and maximum seconds) and planning.json."""

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from adapters import about, write_rows

HIDDEN, MLP, LAYERS, VOCAB, KEYS = 8192, 28672, 80, 128256, 1024
SHARDS = 30
PLAN = """
import sys, time
from frechet_merge.merging.plan import open_recipe, plan_recipe
from frechet_merge.merging.recipe import Recipe
start = time.time()
plan = plan_recipe(open_recipe(Recipe(sys.argv[1:])))
assert len(plan.jobs) == 723, len(plan.jobs)
print(time.time() - start)
"""
PREVIEW = """
import sys, time
from frechet_merge.merging.preview import preview
from frechet_merge.merging.recipe import Recipe
start = time.time()
assert preview(Recipe(sys.argv[1:]), timed=True).seconds > 0
print(time.time() - start)
"""
READ = """
import sys, time
from pathlib import Path
from safetensors import safe_open
start = time.time()
for folder in sys.argv[1:]:
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                f.get_slice(name).get_shape()
print(time.time() - start)
"""


def layout():
    "Names and shapes of the tensors."
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for k, rows in (("q", HIDDEN), ("k", KEYS), ("v", KEYS), ("o", HIDDEN)):
            yield f"{p}self_attn.{k}_proj.weight", (rows, HIDDEN)
        yield f"{p}mlp.gate_proj.weight", (MLP, HIDDEN)
        yield f"{p}mlp.up_proj.weight", (MLP, HIDDEN)
        yield f"{p}mlp.down_proj.weight", (HIDDEN, MLP)
        for k in ("input", "post_attention"):
            yield f"{p}{k}_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def sparse(path, tensors):
    "A safetensors file with a header, and a hole where its numbers are."
    header, at = {}, 0
    for name, shape in tensors:
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)


def model(folder):
    "A folder as of Llama 3 70B, without numbers."
    folder.mkdir()
    every, files = [*layout()], {}
    each = -(-len(every)//SHARDS)
    for i in range(SHARDS):
        name = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = every[i*each : (i + 1)*each]
        sparse(folder/name, part)
        files |= {n: name for n, _ in part}
    (folder/"model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = {"model_type": "llama", "vocab_size": VOCAB, "tie_word_embeddings": False}
    (folder/"config.json").write_text(json.dumps(config))
    return folder


def timed(code, folders, runs):
    "Seconds of each run, in a process of its own."
    command = [sys.executable, "-c", code, *map(str, folders)]
    return [float(subprocess.check_output(command, text=True)) for _ in range(runs)]


def row(what, seconds):
    found = {"what": what, "median s": statistics.median(seconds)}
    found |= {"min s": min(seconds), "max s": max(seconds)}
    return {k: v if k == "what" else round(v, 3) for k, v in found.items()}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--models", type=int, default=8)
    p.add_argument("--runs", type=int, default=5)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        folders = [model(Path(d)/f"m{i}") for i in range(a.models)]
        rows = [
            row("reading the headers, with safetensors", timed(READ, folders, a.runs)),
            row(f"planning a merge of {a.models} models", timed(PLAN, folders, a.runs)),
            row("planning it, and telling the time", timed(PREVIEW, folders, a.runs)),
        ]
    write_rows("planning", rows, about("python bench/planning.py"))


if __name__ == "__main__":
    main()

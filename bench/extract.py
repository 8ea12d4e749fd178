"""What extracted adapters keep of real experts, by the plain cut and in the metric of each.

    python bench/extract.py quality     writes bench/results/extract_quality.csv
    python bench/extract.py cost        writes bench/results/extract_cost.csv

quality: each packaged expert is put on its base, as a full fine-tune, and extracted again at ranks
below its own. The metric is collected from 64 unlabelled training texts; outputs are compared on
test texts: the share of the change of the logits that is kept, 1 − Σ‖f(X) − f(expert)‖² /
Σ‖f(base) − f(expert)‖², and the share of predictions that are the expert's.

cost: rank 32 from a fine-tune with the shapes of Llama-7B, in bfloat16: as many whole layers as are
asked for, in a process of its own whose memory is measured."""

import json

import subprocess
import sys
import tempfile

import warnings
from pathlib import Path

import torch
from adapters import about, write_rows
from experts import Text
from safetensors.torch import save_file

from frechet_merge.adapters.extract import extract
from frechet_merge.cli.demo import DATA

HERE = Path(__file__).parent
RANKS = [1, 2]
# method → form of the metric, damping
METHODS = {
    "plain": (None, 0.0),
    "inputs": ("inputs", 0.01),
    "both, undamped": ("kronecker", 0.0),
    "both, 0.001": ("kronecker", 0.001),
    "both, 0.01": ("kronecker", 0.01),
    "both, 0.1": ("kronecker", 0.1),
    "both, 1": ("kronecker", 1.0),
}


@torch.no_grad()
def outputs(experts, name, delta):
    "Logits of a task's reported test texts."
    experts.put(delta)
    return torch.cat([experts.logits(experts.model, name, b) for _, b in experts.tests[name, 1]])


def cut(experts, name, rank, metrics, damping):
    "The change of an expert that an extracted adapter makes."
    base = {k: w for k, w in experts.W.items() if k in experts.delta[name]}
    model = {k: w + experts.delta[name][k] for k, w in base.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = extract(model, base, rank, metrics=metrics, damping=damping)
    stem = "base_model.model."
    return {
        f"{m}.weight": found.tensors[f"{stem}{m}.lora_B.weight"]
        @ found.tensors[f"{stem}{m}.lora_A.weight"]
        for m in found.kept
    }


def mean_of(rows):
    "Of the tasks."
    every = {k: [float(r[k]) for r in rows] for k in ("kept", "agrees")}
    return {k: f"{sum(x)/len(x):.4f}" for k, x in every.items()}


def quality():
    experts = Text(DATA, HERE/"demo"/"tasks.json.gz")
    rows = []
    for name in experts.names:
        forms = {f: experts.statistics(name, f) for f in ("inputs", "kronecker")}
        own = outputs(experts, name, experts.delta[name])
        unit = float((outputs(experts, name, {}) - own).square().sum())
        for rank in RANKS:
            for method, (form, damping) in METHODS.items():
                X = cut(experts, name, rank, forms.get(form), damping)
                found = outputs(experts, name, X)
                row = {
                    "task": name,
                    "rank": rank,
                    "method": method,
                    "kept": f"{1 - float((found - own).square().sum())/unit:.4f}",
                    "agrees": f"{float((found.argmax(1) == own.argmax(1)).float().mean()):.4f}",
                }
                rows.append(row)
        print(name, rows[-len(METHODS) :], flush=True)
    for rank in RANKS:
        for method in METHODS:
            some = [r for r in rows if (r["rank"], r["method"]) == (rank, method)]
            if some[0]["task"] != "mean":
                rows.append({"task": "mean", "rank": rank, "method": method, **mean_of(some)})
    write_rows("extract_quality", rows, about("python bench/extract.py quality"))


def shapes(layers):
    "Of Llama-7B, but for the number of layers."
    found = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096)}
    for i in range(layers):
        for n in "qkvo":
            found[f"model.layers.{i}.self_attn.{n}_proj.weight"] = (4096, 4096)
        found[f"model.layers.{i}.mlp.gate_proj.weight"] = (11008, 4096)
        found[f"model.layers.{i}.mlp.up_proj.weight"] = (11008, 4096)
        found[f"model.layers.{i}.mlp.down_proj.weight"] = (4096, 11008)
    return found


def made(folder, layers, seed):
    "A random model, a tensor a file; seed 1 moves every matrix along a decaying spectrum."
    folder.mkdir()
    gen, index = torch.Generator().manual_seed(0), {}
    for name, shape in shapes(layers).items():
        W = 0.02*torch.randn(shape, generator=gen)
        if seed and "embed" not in name:
            own = torch.Generator().manual_seed(sum(map(ord, name)))
            U, V = (torch.randn(k, 128, generator=own) for k in shape)
            W += 3e-5*(U*torch.arange(1.0, 129)**-0.7) @ V.T
            W += 2e-4*torch.randn(shape, generator=own)
        file = f"{len(index):04}.safetensors"
        save_file({name: W.bfloat16()}, folder/file)
        index[name] = file
    (folder/"model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


COST = """
import resource, sys, time, torch, warnings
warnings.simplefilter("ignore")
from frechet_merge.adapters.extract import extract
start = time.time()
found = extract(sys.argv[1], sys.argv[2], 32, out=sys.argv[3])
worst = max(k.slack for k in found.kept.values())
print(len(found.kept), time.time() - start, worst,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6)
"""


def cost(layers=2):
    with tempfile.TemporaryDirectory(dir=HERE) as tmp:
        tmp = Path(tmp)
        made(tmp/"base", layers, 0)
        made(tmp/"tuned", layers, 1)
        line = [sys.executable, "-c", COST, tmp/"tuned", tmp/"base", tmp/"out"]
        said = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
    row = {
        "layers": layers,
        "matrices": said[0],
        "seconds": f"{float(said[1]):.1f}",
        "worst slack": f"{float(said[2]):.1e}",
        "peak GB": f"{float(said[3]):.2f}",
    }
    print(row)
    write_rows("extract_cost", [row], about("python bench/extract.py cost"))


if __name__ == "__main__":
    {"quality": quality, "cost": cost}[sys.argv[1]]()

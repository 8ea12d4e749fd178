"""What extracted adapters keep of real experts, by the plain cut and in the metric of each; and
what an extraction costs.

    python bench/extract.py quality                  the packaged experts, of rank 4; writes
        bench/results/extract_quality.csv
    python bench/extract.py quality EXPERTS TASKS --name extract_quality_second
        others, as bench/demo/train.py --rank 8 makes them, with their heads.safetensors
    python bench/extract.py cost                     writes bench/results/extract_cost.csv
    python bench/extract.py cost --layers 1 --mergekit MERGEKIT-EXTRACT-LORA --name
        extract_cost_peers                           beside mergekit, on the layers alone

quality: each expert is put on its base, as a full fine-tune, and extracted again at a quarter and
at half of its rank. The metric is collected from 64 unlabelled training texts; outputs are compared
on test texts: the share of the change of the logits that is kept, 1 − Σ‖f(X) − f(expert)‖² /
Σ‖f(base) − f(expert)‖², and the share of predictions that are the expert's.

cost: rank 32 from a fine-tune with the shapes of Llama-7B, in bfloat16: as many whole layers as are
asked for, in a process of its own whose memory is measured. Errors are computed from what was
written, in float64."""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from adapters import about, write_rows
from experts import Text
from safetensors.torch import load_file, save_file

from frechet_merge.adapters.extract import extract
from frechet_merge.cli.demo import DATA

HERE = Path(__file__).parent
SIZES = 4096, 11008, 32000  # of Llama-7B: hidden, MLP, tokens
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


def of_task(experts, name, ranks):
    "Rows of one expert."
    forms = {f: experts.statistics(name, f) for f in ("inputs", "kronecker")}
    own = outputs(experts, name, experts.delta[name])
    unit = float((outputs(experts, name, {}) - own).square().sum())
    for rank in ranks:
        for method, (form, damping) in METHODS.items():
            X = cut(experts, name, rank, forms.get(form), damping)
            found = outputs(experts, name, X)
            yield {
                "task": name,
                "rank": rank,
                "method": method,
                "kept": f"{1 - float((found - own).square().sum())/unit:.4f}",
                "agrees": f"{float((found.argmax(1) == own.argmax(1)).float().mean()):.4f}",
            }


def quality(asked):
    experts = Text(asked.experts, asked.tasks)
    config = json.loads((experts.folders[0]/"adapter_config.json").read_text())
    ranks, rows = [config["r"]//4, config["r"]//2], []
    for name in experts.names:
        rows += of_task(experts, name, ranks)
        print(name, rows[-len(METHODS) :], flush=True)
    for rank in ranks:
        for method in METHODS:
            some = [r for r in rows if (r["rank"], r["method"]) == (rank, method)]
            rows.append({"task": "mean", "rank": rank, "method": method, **mean_of(some)})
    command = "python bench/extract.py quality"
    if asked.experts != DATA:
        command += f" EXPERTS TASKS --name {asked.name}"
    write_rows(asked.name, rows, about(command, of_rank=config["r"], tasks=experts.names))


def shapes(layers):
    "Of Llama-7B, but for the number of layers."
    wide, mlp, tokens = SIZES
    found = {"model.embed_tokens.weight": (tokens, wide), "lm_head.weight": (tokens, wide)}
    found["model.norm.weight"] = (wide,)
    for i in range(layers):
        stem = f"model.layers.{i}"
        for n in "qkvo":
            found[f"{stem}.self_attn.{n}_proj.weight"] = (wide, wide)
        found[f"{stem}.mlp.gate_proj.weight"] = (mlp, wide)
        found[f"{stem}.mlp.up_proj.weight"] = (mlp, wide)
        found[f"{stem}.mlp.down_proj.weight"] = (wide, mlp)
        for n in ("input_layernorm", "post_attention_layernorm"):
            found[f"{stem}.{n}.weight"] = (wide,)
    return found


def made(folder, layers, seed):
    "A random model, a tensor a file; seed 1 moves every matrix along a decaying spectrum."
    folder.mkdir()
    gen, index = torch.Generator().manual_seed(0), {}
    for name, shape in shapes(layers).items():
        W = 0.02*torch.randn(shape, generator=gen) if len(shape) == 2 else torch.ones(shape)
        if seed and len(shape) == 2 and "embed" not in name:
            own = torch.Generator().manual_seed(sum(map(ord, name)))
            U, V = (torch.randn(k, 128, generator=own) for k in shape)
            W += 1e-4*(U*torch.arange(1.0, 129)**-0.7) @ V.T
            W += 1e-5*torch.randn(shape, generator=own)
        file = f"{len(index):04}.safetensors"
        save_file({name: W.bfloat16()}, folder/file, {"format": "pt"})
        index[name] = file
    (folder/"model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": SIZES[0],
        "intermediate_size": SIZES[1],
        "num_attention_heads": 32,
        "num_hidden_layers": layers,
        "vocab_size": SIZES[2],
        "torch_dtype": "bfloat16",
    }
    (folder/"config.json").write_text(json.dumps(config))


def run(words):
    "Seconds, processor seconds, and the largest resident memory in GB, of a process."
    start, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # measured by a process of its own, since the children of this one share a maximum
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=sys.stderr); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    line = [sys.executable, "-c", code, *map(str, words)]
    said = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return time.time() - start, computed, int(said)/1e6


def errors(out, base, tuned):
    "Module → ‖X − Δ‖/‖Δ‖ of an adapter that was written."
    every = {}
    for file in sorted(out.glob("*.safetensors")):
        every |= load_file(file)
    config = json.loads((out/"adapter_config.json").read_text())
    index = json.loads((base/"model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for key in (k for k in every if k.endswith("lora_A.weight")):
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        W, V = (load_file(f/index[name])[name].double() for f in (base, tuned))
        A, B = every[key].double(), every[key.replace("lora_A", "lora_B")].double()
        D = V.sub_(W)
        del W
        alpha = {**{"": config["lora_alpha"]}, **config.get("alpha_pattern", {})}
        scale = alpha.get(name.removesuffix(".weight"), config["lora_alpha"])/len(A)
        unit = float(D.norm())
        found[name] = float(D.addmm_(B, A, alpha=-scale).norm())/unit
    return found


def row_of(who, layers, out, models, used):
    "What one run took, and how far its adapter is from the change."
    seconds, computed, peak = used
    far = errors(out, *models)
    return {
        "who": who,
        "layers": layers,
        "matrices": len(far),
        "seconds": f"{seconds:.1f}",
        "processor seconds": f"{computed:.1f}",
        "peak GB": f"{peak:.2f}",
        "mean error": f"{sum(far.values())/len(far):.6f}",
        "largest error": f"{max(far.values()):.6f}",
    }


def cost(asked):
    rows, only = [], asked.only
    with tempfile.TemporaryDirectory(dir=asked.work) as tmp:
        tmp = Path(tmp)
        base, tuned = models = tmp/"base", tmp/"tuned"
        made(base, asked.layers, 0)
        made(tuned, asked.layers, 1)
        ours = [sys.executable, "-m", "frechet_merge", "extract", tuned, "--base", base]
        ours += ["--rank", "32", "-o", tmp/"ours"]
        if asked.mergekit:
            others = [n for n in shapes(asked.layers) if not re.search(only, n)]
            ours += [x for n in others if not n.endswith("norm.weight") for x in ("--exclude", n)]
        rows.append(row_of("frechet-merge", asked.layers, tmp/"ours", models, run(ours)))
        print(rows[-1], flush=True)
        if asked.mergekit:
            theirs = [asked.mergekit, "--model", tuned, "--base-model", base]
            theirs += ["--out-path", tmp/"theirs", "--max-rank", "32"]
            theirs += ["--include-regex", f".*({only}).*", "--skip-undecomposable", "--quiet"]
            theirs += ["--exclude-regex", ".*(embed|head|norm).*"]
            rows.append(row_of("mergekit", asked.layers, tmp/"theirs", models, run(theirs)))
            print(rows[-1], flush=True)
    command = f"python bench/extract.py cost --layers {asked.layers}"
    if asked.mergekit:
        command += f" --mergekit MERGEKIT-EXTRACT-LORA --only '{only}' --name {asked.name}"
    write_rows(asked.name, rows, about(command))


def arguments():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("what", choices=("quality", "cost"))
    a.add_argument("experts", nargs="?", type=Path, default=DATA)
    a.add_argument("tasks", nargs="?", type=Path, default=HERE/"demo"/"tasks.json.gz")
    a.add_argument("--name", help="of the result")
    a.add_argument("--layers", type=int, default=2)
    a.add_argument("--mergekit", help="the command mergekit-extract-lora of an environment")
    a.add_argument("--only", default="layers", help="beside mergekit: which matrices, a pattern")
    a.add_argument("--work", help="where the models are written; default: the temporary folder")
    asked = a.parse_args()
    asked.name = asked.name or f"extract_{asked.what}"
    return asked


if __name__ == "__main__":
    asked = arguments()
    {"quality": quality, "cost": cost}[asked.what](asked)

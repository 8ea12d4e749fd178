"""Geometries as merge methods of mergekit, run by mergekit: are the tensors those of merge?

    python bench/within_mergekit.py PYTHON

PYTHON is the interpreter of an environment in which mergekit and frechet_merge are installed.
Models are random Llamas of two layers in float32. Writes bench/results/within_mergekit.json: the
largest difference of any entry, for each method.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from adapters import about
from transformers import LlamaConfig, LlamaForCausalLM

from frechet_merge import load, merge
from frechet_merge.recipes.within_mergekit import usable

HERE = Path(__file__).parent
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 40,
}
RECIPE = """merge_method: frechet_{name}
models:
- {{model: {a}, parameters: {{weight: 2}}}}
- {{model: {b}, parameters: {{weight: 1}}}}
{base}dtype: float32
parameters: {{scale: {scale}}}
"""
COMMAND = "from frechet_merge.recipes.within_mergekit import main; main()"


def models(folder):
    "A base and two models that were trained from it, as far as anybody can tell."
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    base.save_pretrained(folder/"base")
    for name in "ab":
        tuned = LlamaForCausalLM(LlamaConfig(**SIZES))
        with torch.no_grad():
            for p, q in zip(tuned.parameters(), base.parameters()):
                p.copy_(q + 0.3*p)
        tuned.save_pretrained(folder/name)
    return [folder/"a", folder/"b"], folder/"base"


def one(python, name, every, base, folder):
    "Run a method in mergekit; how far any entry is from what merge gives."
    scale = 1.0 if base is None else 0.5
    (a, b), out = every, folder/f"out-{name}-{base is None}"
    line = "" if base is None else f"base_model: {base}\n"
    recipe = folder/"recipe.yaml"
    recipe.write_text(RECIPE.format(name=name, a=a, b=b, base=line, scale=scale))
    words = [python, "-W", "ignore", "-c", COMMAND, recipe, out]
    r = subprocess.run([*map(str, words)], capture_output=True, text=True)
    if r.returncode:
        raise SystemExit(r.stderr[-2000:])
    ours = merge(every, name, base, [2, 1], scale).tensors
    theirs = load(out)
    assert {*theirs} == {*ours}
    return max(float((theirs[n] - x).abs().max()) for n, x in ours.items())


def main():
    python = sys.argv[1]
    code = "from importlib.metadata import version; print(version('mergekit'))"
    r = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    rows = {}
    with tempfile.TemporaryDirectory() as d:
        every, base = models(Path(d))
        for name, make in usable().items():
            # these are of one model
            if name in ("times", "clipped"):
                continue
            for has in [True] if make().needs.base else [True, False]:
                key = name if has else f"{name}, without a base"
                rows[key] = one(python, name, every, base if has else None, Path(d))
                print(key, rows[key], flush=True)
    command = "python bench/within_mergekit.py PYTHON"
    found = {"mergekit": r.stdout.strip(), "largest difference": rows, **about(command)}
    (HERE/"results"/"within_mergekit.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

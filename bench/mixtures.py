"""Recipes of mergekit-moe, run by mergekit-moe and by frechet-merge: are the tensors the same?

    python bench/mixtures.py PYTHON

PYTHON is the interpreter of an environment with mergekit, beside which its mergekit-moe stands.
Models are random Llamas and Mistrals of two layers in float32. Writes bench/results/mixtures.json.
"""
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from adapters import about

HERE = Path(__file__).parent
RECIPE = """base_model: $base
gate_mode: $mode
dtype: float32
experts:
  - source_model: $a
    positive_prompts: ["w3 w4 w5", "w6 w7"]
  - source_model: $b
    positive_prompts: ["w8 w9 w10 w11"]
    negative_prompts: ["w20 w21"]
"""
KINDS = ("llama", "mistral")
MODES = ("cheap_embed", "hidden", "random")


def dense(kind, folder, seed):
    "A random dense model, with a tokenizer of words."
    import tokenizers
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=48, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    net = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2*torch.randn_like(p))
    net.save_pretrained(folder)
    words = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 48)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def recipe_of(folder, kind, mode):
    "A recipe as a file."
    text = RECIPE.replace("$mode", mode)
    for name in ("base", "a", "b"):
        text = text.replace(f"${name}", str(folder/f"{kind}-{name}"))
    place = folder/f"{kind}-{mode}.yml"
    place.write_text(text)
    return place


def apart(c):
    "Routers, experts and the rest of a mixture, whatever a file calls them."
    from frechet_merge.symmetries.mixtures import mixtures_in

    layers, found = mixtures_in(c), {}
    for m in layers:
        found[f"{m.layer} rows"] = c[f"{m.place}.gate.weight"]
        for e in range(len(m.experts)):
            found |= {f"{m.layer} expert {e} {k}": x for k, x in m.expert(c, e).items()}
    mine = {n for m in layers for n in (*m.tensors, *m.router)}
    return found | {f"shared {n}": c[n] for n in c if n not in mine}


def compared(ours, theirs):
    "The largest difference of shared tensors, of experts, and of rows of routers."
    x, y = apart(ours), apart(theirs)
    if x.keys() != y.keys():
        raise SystemExit(f"other names: {sorted(x.keys() ^ y.keys())[:3]}")
    kinds = {k: "shared" if k.startswith("shared") else k.split()[1] for k in x}
    return {
        kind: max(float((x[k] - y[k]).abs().max()) for k in x if kinds[k] == kind)
        for kind in ("shared", "expert", "rows")
    }


def spread(c):
    "The standard deviation of all rows of routers."
    return float(torch.cat([x.flatten() for k, x in apart(c).items() if k.endswith("rows")]).std())


def main(python):
    warnings.simplefilter("ignore")
    from frechet_merge import load
    from frechet_merge.recipes.written import read_recipe, run_recipe

    tool = Path(python).with_name("mergekit-moe")
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for kind in KINDS:
            for i, name in enumerate(("base", "a", "b")):
                dense(kind, folder/f"{kind}-{name}", i)
            for mode in MODES:
                recipe = recipe_of(folder, kind, mode)
                out = folder/f"{kind}-{mode}"
                subprocess.run([tool, recipe, out, "--quiet"], check=True, env=quiet)
                asked = read_recipe(recipe)
                ours, theirs = run_recipe(asked, asked.output).tensors, load(out)
                mixed = ours.view(says={**load(out).config})
                row = compared(mixed, theirs)
                if mode == "random":
                    row |= {"rows": None, "spread": [spread(mixed), spread(theirs)]}
                found[f"{kind}, {mode}"] = row
                print(kind, mode, row, flush=True)
    said = about("python bench/mixtures.py PYTHON_WITH_MERGEKIT", recipes=found)
    (HERE/"results"/"mixtures.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

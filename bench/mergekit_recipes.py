"""Recipes of mergekit, run by mergekit and by frechet-merge: are the tensors the same?

    python bench/mergekit_recipes.py PYTHON [WORD…]

With words, only recipes whose names hold one of them are run, and the others keep what was found.
PYTHON is the interpreter of an environment with mergekit. Models are random Llamas of four layers
in float32. Methods that draw random numbers are compared in the mean and the number of entries kept
over a few seeds. Recipes of modules are for random Gemmas that see, in the layout of the hub;
adapters are PEFT's, of several kinds. A file of several recipes is run by mergekit-multi. Recipes
of tokens, and of differences where some models lack rows of the others, are for Llamas with
tokenizers of their own, and rows are compared by token. Chat
templates render random conversations.
Writes bench/results/mergekit_recipes.json.
"""
import json
import random
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from adapters import about
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
BOTH = "models: [{model: $a, parameters: {weight: 0.7}}, {model: $b, parameters: {weight: 0.5}}]"
THREE = """models:
  - model: $base
  - model: $a
    parameters: {weight: 0.7, density: 0.5}
  - model: $b
    parameters: {weight: [0.2, 0.8], density: [0.9, 0.3]}
  - model: $c
    parameters: {weight: [{filter: mlp, value: 0.6}, {value: 0.1}], density: 0.3}
base_model: $base
"""
SLICED = """slices:
  - sources:
      - {model: $x, layer_range: [0, 4]}
      - {model: $y, layer_range: [0, 4]}
base_model: $x
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
"""
STACK = """slices:
  - sources: [{model: $x, layer_range: [0, 3]}]
  - sources: [{model: $y, layer_range: [1, 4]}]
"""
TURNED = """slices:
  - sources:
      - model: $x
        layer_range: [0, 4]
        parameters: {scale: [{filter: down_proj, value: 0.5}, {value: 1}]}
"""
PLAIN = "models: [{model: $a}, {model: $b}, {model: $c}]\nbase_model: $base\n"
ALIKE = "models: [{model: $a}, {model: $b}, {model: $c}]\n"
FAR = "models: [{model: $x, parameters: {weight: 1}}, {model: $y, parameters: {weight: 3}}]\n"
EACH = """slices:
  - sources:
      - {model: $a, layer_range: [0, 1], parameters: {weight: 1}}
      - {model: $b, layer_range: [0, 1]}
    parameters: {weight: [{filter: mlp, value: 0.3}, {value: 0.6}]}
  - sources:
      - {model: $a, layer_range: [1, 4], parameters: {weight: [0.8, 0.2]}}
      - {model: $b, layer_range: [1, 4], parameters: {weight: [0.2, 0.8]}}
"""
DOWN = """slices:
  - sources: [{model: $x, layer_range: [0, 2]}]
  - sources:
      - model: $x
        layer_range: [1, 2]
        parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0}, {value: 1}]}
  - sources: [{model: $y, layer_range: [2, 4]}]
"""
MODULES = """modules:
  text_decoder:
    models:
      - {model: $ga, parameters: {weight: [0, 0.9]}}
      - {model: $gb, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 1}]}}
  vision_tower:
    slices:
      - sources: [{model: $ga, layer_range: [0, 2]}, {model: $gb, layer_range: [0, 2]}]
      - sources: [{model: $gb, layer_range: [2, 3]}]
    parameters: {weight: [1, 2, 3]}
  multi_modal_projector:
    models: [{model: $gb}]
parameters: {weight: 0.5}
"""
OF_BASE = """modules:
  text_decoder: {models: [{model: $ga}, {model: $gb}], parameters: {weight: [0.4, 0.9]}}
  vision_tower: {models: [{model: $gb, parameters: {weight: 0.5, density: 0.3}}]}
  multi_modal_projector: {models: [{model: $gbase}]}
base_model: $gbase
parameters: {density: 0.6}
"""
# layers of modules that are stacked anew
TOWER = """modules:
  text_decoder:
    slices:
      - sources: [{model: $ga, layer_range: [0, 3]}]
      - sources: [{model: $gb, layer_range: [1, 4]}]
  vision_tower: {models: [{model: $ga}]}
  multi_modal_projector: {models: [{model: $gb}]}
"""
TOWERS = """modules:
  text_decoder:
    slices:
      - sources:
          - {model: $ga, layer_range: [0, 3], parameters: {weight: 0.3}}
          - {model: $gb, layer_range: [1, 4], parameters: {weight: [0.7, 0.1]}}
      - sources: [{model: $gb, layer_range: [1, 4]}, {model: $gbase, layer_range: [0, 3]}]
  vision_tower:
    slices:
      - sources: [{model: $ga, layer_range: [0, 2]}]
      - sources: [{model: $gb, layer_range: [1, 3]}]
  multi_modal_projector: {models: [{model: $gb}, {model: $ga, parameters: {weight: 3}}]}
parameters: {weight: 1}
"""
TOWERS_OF_BASE = """modules:
  text_decoder:
    slices:
      - sources:
          - {model: $gbase, layer_range: [0, 3]}
          - {model: $gb, layer_range: [0, 3], parameters: {weight: 0.7}}
          - {model: $ga, layer_range: [0, 3], parameters: {weight: 0.4}}
      - sources:
          - {model: $gbase, layer_range: [1, 4]}
          - {model: $gb, layer_range: [1, 4], parameters: {weight: 0.7}}
  vision_tower: {models: [{model: $gbase}, {model: $ga, parameters: {weight: 0.5}}]}
  multi_modal_projector: {models: [{model: $gbase}, {model: $ga, parameters: {weight: 0.2}}]}
base_model: $gbase
"""
ADAPTED = """models:
  - {model: $base+$plain, parameters: {weight: 0.6, density: 0.5}}
  - {model: $base+$scaled, parameters: {weight: 0.4, density: 0.7}}
  - {model: $a, parameters: {weight: 0.3, density: 0.4}}
base_model: $base
"""
EVERY_KIND = """models:
  - {model: $base+$dora, parameters: {weight: 0.3}}
  - {model: $base+$saved, parameters: {weight: 0.2}}
  - {model: $base+$ranks, parameters: {weight: 0.5}}
"""
IN_SLICES = """slices:
  - sources: [{model: $base+$plain, layer_range: [0, 2]}]
  - sources: [{model: $x+$scaled, layer_range: [1, 4]}]
"""
SEVERAL = """merge_method: slerp
models: [{model: first}, {model: second}]
base_model: first
parameters: {t: 0.3}
dtype: float32
---
name: second
merge_method: task_arithmetic
models: [{model: first, parameters: {weight: 0.5}}, {model: $c, parameters: {weight: 0.4}}]
base_model: $base
dtype: float32
---
name: first
merge_method: linear
models: [{model: $a, parameters: {weight: 0.3}}, {model: $b, parameters: {weight: 0.7}}]
dtype: float32
"""
STACKED = """name: first
merge_method: ties
models:
  - {model: $a, parameters: {weight: 0.7, density: 0.5}}
  - {model: $b, parameters: {weight: 0.4, density: 0.6}}
base_model: $base
dtype: float32
---
slices:
  - sources: [{model: first, layer_range: [0, 3]}]
  - sources: [{model: first+$plain, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
"""
SPEAKING = """models:
  - {model: $ta, parameters: {weight: 1}}
  - {model: $tb, parameters: {weight: 3}}
merge_method: linear
dtype: float32
tokenizer:
  source: union
  tokens:
"""
A_CAT = "{kind: model_token, model: $ta, token: cat}"
# of models with tokenizers: title → whose rows, by token
TOKENS = {
    "tokens of a model": {"<x>": "{source: $ta}", "<z>": "{source: $tb}"},
    "tokens, forced": {"cat": "{source: $ta, force: true}", "<x>": "{source: $ta, force: true}"},
    "tokens that are new": {"<new>": f"{{source: {A_CAT}}}", "<y>": f"{{source: {A_CAT}}}"},
    "tokens of a number": {"<new>": "{source: {kind: model_token, model: $tb, token_id: 13}}"},
    "tokens of zeros": {"<x>": "{source: {kind: zero}}", "<new>": "{source: {kind: zero}}"},
    "tokens of zeros, forced": {"<x>": "{source: {kind: zero}, force: true}"},
}
LACKING = """models:
  - {model: $ta, parameters: {weight: 0.7, density: 0.5}}
  - {model: $tb, parameters: {weight: 0.4, density: 0.6}}
  - {model: $tc, parameters: {weight: -0.3, density: 0.4}}
base_model: $tbase
"""
# differences over vocabularies that differ: title → recipe, and whose tokens the result has
OF_TWO = LACKING.replace("  - {model: $tc, parameters: {weight: -0.3, density: 0.4}}\n", "")
PLUS = LACKING.replace("-0.3", "0.3")
LACKED = {
    "task_arithmetic, tokens that some lack": (LACKING, "union"),
    "task_arithmetic, tokens of the base": (LACKING, "base"),
    "task_arithmetic, tokens of a model": (LACKING, "$tc"),
    "ties, tokens that some lack": (PLUS, "union"),
    "breadcrumbs, tokens that some lack": (LACKING, "union"),
    "breadcrumbs_ties, tokens that some lack": (PLUS, "$tc"),
    "model_stock, tokens that some lack": (LACKING, "union"),
    "ram, tokens that some lack": (LACKING + "parameters: {epsilon: 0.02}\n", "union"),
    "sce, tokens that some lack": (OF_TWO + "parameters: {select_topk: 0.3}\n", "union"),
    "nuslerp, tokens that some lack": (OF_TWO, "union"),
    "nearswap, tokens that some lack": (
        "models: [{model: $tbase}, {model: $tb}]\nbase_model: $tbase\nparameters: {t: 0.01}\n",
        "union",
    ),
}
# of models with tokenizers, what each adds to the words
SPEAKERS = {"ta": ["<x>"], "tb": ["<y>", "<z>"], "tc": ["<o>", "<x>"], "tbase": ["<o>"]}
CHATS = 200  # random conversations that each template renders
# by mergekit-multi
FILES = {"several recipes": SEVERAL, "several recipes, slices of one with an adapter": STACKED}
# of PEFT, on the base
ADAPTERS = {
    "plain": {},
    "scaled": {"use_rslora": True, "r": 2, "target_modules": ["o_proj", "gate_proj", "lm_head"]},
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens", "q_proj"]},
    "ranks": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
}
BY_NAME = BOTH.replace("0.7", "[{filter: mlp, value: -0.2}, {value: 0.7}]")
RECIPES = {
    "linear": BOTH,
    "linear, not normalised": BOTH + "\nparameters: {normalize: false}",
    "linear, over depth": BOTH.replace("0.7", "[0, 1]"),
    "slerp, models far apart": SLICED,
    "slerp, models near": SLICED.replace("$x", "$a").replace("$y", "$b"),
    "nuslerp": FAR,
    "nuslerp, of differences": BOTH + "\nbase_model: $base",
    "nuslerp, columns": FAR + "parameters: {nuslerp_flatten: false}",
    "nuslerp, rows": FAR + "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}",
    "nuslerp, rows of differences": BOTH + "\nbase_model: $base\n"
    "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}",
    "multislerp": FAR,
    "multislerp, of differences": BOTH + "\nbase_model: $base",
    "multislerp, not normalised": BOTH + "\nparameters: {normalize_weights: false}",
    "karcher": ALIKE,
    "karcher, of smaller tolerance": ALIKE + "parameters: {tol: 1e-9, max_iter: 100}",
    "task_arithmetic": THREE + "parameters: {lambda: 0.8}",
    "task_arithmetic, normalised": THREE + "parameters: {normalize: true}",
    "ties": THREE,
    "ties, a sum": THREE + "parameters: {normalize: false, lambda: [0.5, 1], int8_mask: true}",
    "ties, rescaled": THREE + "parameters: {rescale: true}",
    "breadcrumbs": THREE,
    "breadcrumbs_ties": THREE + "parameters: {gamma: 0.1}",
    "model_stock": PLAIN,
    "model_stock, filter_wise": PLAIN + "parameters: {filter_wise: true}",
    "sce": PLAIN + "parameters: {select_topk: 0.3}",
    "nearswap": "models: [{model: $base}, {model: $a}]\nbase_model: $base\nparameters: {t: 0.01}",
    "arcee_fusion": "models: [{model: $a}]\nbase_model: $base",
    "arcee_fusion, models far apart": "models: [{model: $x}]\nbase_model: $base",
    "linear, slices with parameters of their own": EACH,
    "linear, a sum by filters": BY_NAME + "\nparameters: {normalize: false}",
    "linear, modules": MODULES,
    "task_arithmetic, modules": OF_BASE.replace("density: 0.6", "lambda: 0.8"),
    "ties, modules": OF_BASE,
    "ties, a weight of zero": THREE.replace("[0.2, 0.8]", "[0, 0.8]"),
    "breadcrumbs, normalised": THREE + "parameters: {normalize: true}",
    "ram": PLAIN + "parameters: {epsilon: 0.02}",
    "ramplus_tl": PLAIN + "parameters: {epsilon: 0.02, r: 0.3}",
    "linear, a base with adapters of each kind": EVERY_KIND,
    "task_arithmetic, a base with adapters": ADAPTED,
    "ties, a base with adapters": ADAPTED,
    "slerp, of an adapter": "models: [{model: $base+$plain}, {model: $a}]\nbase_model: $a\n"
    "parameters: {t: 0.4}",
    "passthrough, slices of adapters": IN_SLICES,
    "passthrough, a slice turned down": DOWN,
    "passthrough, slices": STACK,
    "passthrough, modules stacked anew": TOWER,
    "linear, modules stacked anew": TOWERS,
    "task_arithmetic, modules stacked anew": TOWERS_OF_BASE,
    "passthrough, scaled": TURNED,
    "dare_linear": THREE,
    "dare_ties": THREE,
    "della": THREE + "parameters: {epsilon: 0.05}",
    "della_linear": THREE + "parameters: {epsilon: 0.05}",
}
# one recipe in other words: as mergekit writes a model, with merge keys, texts and rules alone
SPELLED = """models:
- model: {model: {path: $a}, lora: null}
  layer_range: [0, 2]
  parameters: {<<: {weight: 0.3}, weight: '0.7'}
- model:
    model: {path: $base}
    lora: {path: $plain}
  parameters: {weight: {value: 5e-1}}
base_model: {model: {path: $a}}
random_seed: 0
int8_mask: true
"""
MINUS = "models: [{model: $a, parameters: {weight: -0.2}}, {model: $b, parameters: {weight: 1}}]\n"
MINUS += "base_model: $base\nparameters: {normalize: true}\n"
RECIPES |= {
    "linear, spelled in other words": SPELLED,
    "task_arithmetic, negative and normalised": MINUS,
    "task_arithmetic, rescaled": THREE + "parameters: {rescale: true}",
    "slerp, two numbers and filters": "models: [{model: $x}, {model: $y}]\nbase_model: $x\n"
    "parameters: {t: [{filter: mlp, value: [0, 1]}, {filter: null, value: [1, 0]}]}",
}
BY_FILTERS = "[{filter: mlp, value: true}, {value: false}]"
RECIPES |= {
    "linear, normalised by filters": BOTH + f"\nparameters: {{normalize: {BY_FILTERS}}}",
    "task_arithmetic, normalised by filters": THREE.replace("[0.2, 0.8]", "0.2").replace(
        "[{filter: mlp, value: 0.6}, {value: 0.1}]", "-0.4"
    ) + f"parameters: {{normalize: {BY_FILTERS}}}",
    "ties, normalised and rescaled by filters": THREE.replace("[0.2, 0.8]", "0.2").replace(
        "[{filter: mlp, value: 0.6}, {value: 0.1}]", "0.4"
    ) + f"parameters: {{normalize: {BY_FILTERS}, rescale: [{{filter: down_proj, value: true}}]}}",
    "nuslerp, flattened by filters": FAR + f"parameters: {{nuslerp_flatten: {BY_FILTERS}}}",
    "multislerp, normalised by filters": FAR + f"parameters: {{normalize_weights: {BY_FILTERS}}}",
    "model_stock, filter_wise by filters": PLAIN + f"parameters: {{filter_wise: {BY_FILTERS}}}",
    "linear, weights of true and false": BOTH.replace("0.7", f"[{BY_FILTERS[1:-1]}]").replace(
        "0.5", "true"
    ),
    "linear, anchors beside it": f"shared: &w 0.2\n{BOTH.replace('0.7', '*w')}",
}
# of encoders with decoders; of T5s with gates, which are those that mergekit reads
TWO_PARTS = """modules:
  encoder:
    slices:
      - sources: [{model: $t5a, layer_range: [0, 2]}]
      - sources: [{model: $t5b, layer_range: [1, 3]}]
  decoder:
    slices:
      - sources: [{model: $t5b, layer_range: [0, 2]}]
      - sources: [{model: $t5a, layer_range: [3, 4]}]
"""
BOTH_PARTS = """modules:
  encoder:
    slices:
      - sources:
          - {model: $t5a, layer_range: [0, 2], parameters: {weight: 0.3}}
          - {model: $t5b, layer_range: [0, 2], parameters: {weight: [0.2, 0.9]}}
      - sources: [{model: $t5a, layer_range: [1, 3]}, {model: $t5b, layer_range: [1, 3]}]
  decoder: {models: [{model: $t5a}, {model: $t5b, parameters: {weight: 3}}]}
parameters: {weight: 1}
"""
RECIPES |= {
    "passthrough, an encoder and its decoder": TWO_PARTS,
    "linear, an encoder and its decoder": BOTH_PARTS,
}
# what mergekit's results of these lack
LOST = {"shared.weight"}
RANDOM = ("dare", "della")
THEIRS = """
import json, sys, torch, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for recipe, out, seed, tokenizer in json.loads(sys.stdin.read()):
    config = MergeConfiguration.model_validate(yaml.safe_load(Path(recipe).read_text()))
    torch.manual_seed(seed)
    loras = str(Path(out).parent/"loras")
    how = {"copy_tokenizer": tokenizer, "quiet": True, "lora_merge_cache": loras}
    run_merge(config, out, options=MergeOptions(random_seed=seed, **how))
"""
SEEDS = 8


def llama(folder, seed, base=None):
    "A random Llama, near a base if there is one."
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads)).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p)*0.1 + (1 if "norm" in name else 0))
            if base is not None:
                p.copy_(base.state_dict()[name] + 0.2*(p - (1 if "norm" in name else 0)))
    model.save_pretrained(folder)
    return model


def gemma(folder, seed, base=None):
    "A random Gemma that sees, near a base if there is one, in the layout of the hub."
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    heads = {"num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    text = {**heads, "vocab_size": 64, "num_hidden_layers": 4, "num_key_value_heads": 1}
    seen = {**heads, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    tokens = {"image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62}
    text = {**text, "head_dim": 16}
    towers = {"text_config": text, "vision_config": seen}
    config = Gemma3Config(**towers, mm_tokens_per_image=4, **tokens)
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p)*0.1)
            if base is not None:
                p.copy_(base.state_dict()[name] + 0.2*p)
    model.save_pretrained(folder)
    state = load_file(folder/"model.safetensors")
    hub = {n.replace("vision_tower.", "vision_tower.vision_model."): x for n, x in state.items()}
    # what newer versions of transformers add, and no older model has
    hub = {n: x for n, x in hub.items() if ".head." not in n}
    save_file(hub, folder/"model.safetensors", {"format": "pt"})
    return model


def t5(folder, seed):
    "A random T5 with gates."
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    shape = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    layers = {"num_layers": 3, "num_decoder_layers": 4, "feed_forward_proj": "gated-gelu"}
    model = T5ForConditionalGeneration(T5Config(**shape, **layers)).float()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p)*0.1)
    model.save_pretrained(folder)


def adapter(folder, seed, base, how):
    "A random adapter of a model."
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    kind = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **how}
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(init_lora_weights=False, **kind))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05*torch.randn_like(p))
    model.save_pretrained(folder)


def written(folder):
    "Every recipe as a file."
    names = ("base", "a", "b", "c", "x", "y", "gbase", "ga", "gb", "t5a", "t5b", *ADAPTERS)
    base = llama(folder/"base", 0)
    seeing = gemma(folder/"gbase", 0)
    for i, name in enumerate(("ga", "gb")):
        gemma(folder/name, i + 1, seeing)
    for i, name in enumerate(names[1:6]):
        llama(folder/name, i + 1, base if name in "abc" else None)
    for i, (name, how) in enumerate(ADAPTERS.items()):
        adapter(folder/name, i, folder/"base", how)
    for i, name in enumerate(("t5a", "t5b")):
        t5(folder/name, i)
    found = {}
    for i, (title, body) in enumerate([*RECIPES.items(), *FILES.items()]):
        method = f"\nmerge_method: {title.partition(',')[0]}\ndtype: float32\n"
        text = body if title in FILES else body + method
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(f"${name}", str(folder/name))
        found[title] = folder/f"{i}.yml"
        found[title].write_text(text)
    return found


def ours(recipe, seed):
    "The tensors of a recipe."
    from frechet_merge.geometries.trimmed import Trimmed
    from frechet_merge.geometries.varied import Varied
    from frechet_merge.recipes.written import read_recipe, run_recipe

    asked = read_recipe(recipe)
    g = asked.recipe.geometry
    if isinstance(g, Varied) and isinstance(g.inner, Trimmed):
        g = replace(g, inner=replace(g.inner, seed=seed))
    elif isinstance(g, Trimmed):
        g = replace(g, seed=seed)
    return dict(run_recipe(replace(asked, recipe=replace(asked.recipe, geometry=g)), asked.output)
                .tensors)


def error(x, y):
    "The largest relative error of a tensor, and which; of all that mergekit has not lost."
    x = {k: v for k, v in x.items() if k in y or k not in LOST}
    if x.keys() != y.keys():
        return float("inf"), f"other names: {sorted(x.keys() ^ y.keys())[:3]}"
    return max((float((x[k].double() - y[k].double()).norm()/y[k].double().norm()), k) for k in y)


def drawn(xs, y0, ys):
    "In units of the spread: means over seeds apart, and shares of entries that moved."
    names = [k for k in ys[0] if ys[0][k].dim() == 2]
    flat = [torch.stack([torch.cat([s[k].flatten() for k in names]) for s in seeds])
            for seeds in (xs, ys)]
    still = torch.cat([y0[k].flatten() for k in names])
    spread = ((flat[0].var(0) + flat[1].var(0))/len(xs)).sqrt()
    moved = [float((f != still).float().mean()) for f in flat]
    z = (flat[0].mean(0) - flat[1].mean(0))[spread > 0]/spread[spread > 0]
    return {"z": float(z.pow(2).mean().sqrt()), "moved": moved}


def of_files(python, folder, recipes):
    "The tensors of files of several recipes, by both."
    from frechet_merge.recipes.written import read_recipe, run_recipe

    command = str(Path(python).parent/"mergekit-multi")
    for title in FILES:
        file = recipes[title]
        theirs, mine = folder/f"{file.stem}-theirs", folder/f"{file.stem}-ours"
        words = ["--intermediate-dir", folder/f"{file.stem}-steps", "--out-path", theirs]
        words += ["--lora-merge-cache", folder/"loras", "--no-copy-tokenizer", "--quiet"]
        subprocess.run([command, str(file), *map(str, words)], check=True)
        asked = read_recipe(file)
        run_recipe(asked, asked.output.into(mine))
        worst, name = error(*(load_file(x/"model.safetensors") for x in (mine, theirs)))
        yield title, {"error": worst, "tensor": name}


def speaking(folder, seed, added):
    "A random Llama with a tokenizer of a few words, to which tokens were added."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *"the a cat dog sat on mat and ran".split()]
    numbers = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), **shape, **heads)
    LlamaForCausalLM(config).float().save_pretrained(folder)


def by_token(folder):
    "The tensors of a model, in which each row of a token is one."
    from transformers import AutoTokenizer

    numbers = AutoTokenizer.from_pretrained(folder).get_vocab()
    found = load_file(folder/"model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = found.pop(name)
        found |= {f"{name} {token}": rows[i] for token, i in numbers.items()}
    return found


def row_error(x, y):
    "The largest error of a tensor or row, relative to its norm unless that is zero, and which."
    if x.keys() != y.keys():
        return float("inf"), f"other tokens: {sorted(x.keys() ^ y.keys())[:3]}"
    norms = {k: float(y[k].double().norm()) or 1.0 for k in y}
    return max((float((x[k].double() - y[k].double()).norm())/norms[k], k) for k in y)


def of_tokens(python, folder):
    "The rows of recipes that give rows to tokens, or fill them in, by both."
    from frechet_merge.recipes.written import read_recipe, run_recipe

    for i, (name, added) in enumerate(SPEAKERS.items()):
        speaking(folder/name, i, added)
    texts = {
        title: SPEAKING + "".join(f"    {t}: {how}\n" for t, how in tokens.items())
        for title, tokens in TOKENS.items()
    }
    for title, (text, source) in LACKED.items():
        method = title.partition(",")[0]
        texts[title] = f"{text}merge_method: {method}\ntokenizer_source: {source}\ndtype: float32\n"
    work = []
    for title, text in texts.items():
        for name in sorted(SPEAKERS, key=len, reverse=True):
            text = text.replace(f"${name}", str(folder/name))
        file = folder/f"{title}.yml"
        file.write_text(text)
        work.append((str(file), str(folder/f"{title}-theirs"), 0, True))
    subprocess.run([python, "-c", THEIRS], input=json.dumps(work), text=True, check=True)
    for (file, out, *_), title in zip(work, texts):
        asked = read_recipe(Path(file))
        run_recipe(asked, asked.output.into(folder/f"{title}-ours"))
        worst, name = row_error(by_token(folder/f"{title}-ours"), by_token(Path(out)))
        yield title, {"error": worst, "tensor": name}


def conversations():
    "Random ones: in turn, or of any roles in any order."
    draw = random.Random(0)
    texts = ["Hi", " a \n", "x\n\ny", ""]
    for _ in range(CHATS):
        count = draw.randint(1, 6)
        roles = [("user", "assistant")[i % 2] for i in range(count)]
        if draw.random() < 0.3:
            roles = draw.choices(["user", "assistant", "system", "tool"], k=count)
        elif draw.random() < 0.5:
            roles = ["system", *roles]
        chat = [{"role": role, "content": draw.choice(texts)} for role in roles]
        yield chat, draw.random() < 0.5


def rendered(folder):
    "What a template says of each conversation; None where it refuses."
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for chat, asks in conversations():
        how = {"tokenize": False, "add_generation_prompt": asks}
        try:
            found.append(tokenizer.apply_chat_template(chat, **how))
        except TemplateError:
            found.append(None)
    return found


def of_templates(python, folder):
    "How many conversations both render alike, by the names of templates."
    from frechet_merge.merging.formats import FORMATS
    from frechet_merge.recipes.written import read_recipe, run_recipe

    work = []
    for name in FORMATS:
        text = f"models: [{{model: {folder/'ta'}, parameters: {{weight: 1}}}}]\n"
        text += f"merge_method: linear\ndtype: float32\nchat_template: {name}\n"
        (folder/f"{name}.yml").write_text(text)
        work.append((str(folder/f"{name}.yml"), str(folder/f"{name}-theirs"), 0, True))
    subprocess.run([python, "-c", THEIRS], input=json.dumps(work), text=True, check=True)
    for (file, out, *_), name in zip(work, FORMATS):
        asked = read_recipe(Path(file))
        run_recipe(asked, asked.output.into(folder/f"{name}-ours"))
        both = zip(rendered(folder/f"{name}-ours"), rendered(Path(out)))
        yield name, {"alike": sum(x == y for x, y in both), "of": CHATS}


def some(python, words):
    "Recipes by name, beside what is known of the others."
    file = HERE/"results"/"mergekit_recipes.json"
    said = json.loads(file.read_text())
    for title in [t for t in RECIPES if not any(w in t for w in words)]:
        del RECIPES[title]
    with tempfile.TemporaryDirectory() as folder:
        said["recipes"] |= of_recipes(python, Path(folder), written(Path(folder)))
    file.write_text(json.dumps(said, indent=1) + "\n")


def of_recipes(python, folder, recipes):
    "What came of each recipe that is one file, by both."
    found = {}
    seeds = {t: SEEDS if t.startswith(RANDOM) else 1 for t in recipes}
    work = [(str(recipes[t]), str(folder/f"{recipes[t].stem}-{s}"), s, False)
            for t in RECIPES for s in range(seeds[t])]
    subprocess.run([python, "-c", THEIRS], input=json.dumps(work), text=True, check=True)
    base = load_file(folder/"base"/"model.safetensors")
    for title, recipe in ((t, recipes[t]) for t in RECIPES):
        theirs = [load_file(folder/f"{recipe.stem}-{s}"/"model.safetensors")
                  for s in range(seeds[title])]
        mine = [ours(recipe, s) for s in range(seeds[title])]
        if seeds[title] > 1:
            found[title] = drawn(mine, base, theirs)
        else:
            worst, name = error(mine[0], theirs[0])
            found[title] = {"error": worst, "tensor": name}
        print(title, found[title], flush=True)
    return found


def main(python):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        recipes = written(folder)
        found = of_recipes(python, folder, recipes)
        for title, seen in of_files(python, folder, recipes):
            found[title] = seen
            print(title, seen, flush=True)
        for title, seen in of_tokens(python, folder):
            found[title] = seen
            print(title, seen, flush=True)
        chats = dict(of_templates(python, folder))
        print(chats)
    how = "python bench/mergekit_recipes.py PYTHON_WITH_MERGEKIT"
    said = about(how, recipes=found, templates=chats)
    (HERE/"results"/"mergekit_recipes.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1]) if len(sys.argv) == 2 else some(sys.argv[1], sys.argv[2:])

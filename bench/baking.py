"""Adapters on all linear layers of every architecture of transformers, put on their base here and
by PEFT.

    python bench/baking.py [MODEL_TYPE …] [--again] [--seconds 120]

Of each architecture that `architectures.py` can make, a tiny random model is saved as its library
saves it, and PEFT gives it an adapter of random numbers (`target_modules="all-linear"`). Put on the
base as it is on the disk, and opened by transformers, every tensor has to be what PEFT's own
`merge_and_unload` makes of the model in memory. What is tied is untied there before: PEFT would
merge an update of the output layer into the embedding, too, where the adapter has none.

Writes bench/results/baking.csv (a row for each architecture: right, refused with the reason, wrong
with the tensor, or not made and why) and baking.json. A run goes on where the last one ended."""

import argparse
import csv
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import tiny
import torch
from adapters import HERE, about, write_rows
from architectures import class_of, classes, quiet, said_of

FIELDS = ("model type", "class", "verdict", "why", "adapted")


def adapted(model, seed=1):
    "The model with an adapter of random numbers on all its linear layers."
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in made.parameters():
            if x.requires_grad:
                x.add_(0.2*torch.randn(x.shape, generator=g))
    return made


def untied(model):
    "The model with a parameter of its own under every name: PEFT merges into all of them at once."
    seen = set()
    for name, x in [*model.named_parameters(remove_duplicate=False)]:
        if id(x) in seen:
            module, _, end = name.rpartition(".")
            setattr(model.get_submodule(module), end, torch.nn.Parameter(x.detach().clone()))
        seen.add(id(x))
    return model


def numbers(model):
    return {n: x.double().clone() for n, x in model.state_dict().items() if x.is_floating_point()}


def judged(cls, folder, want, before):
    "Verdict, reason, and how many tensors the adapter has changed."
    from frechet_merge import MergeError, merge

    try:
        merge([folder/"a"], bake=folder/"base", out=folder/"out")
    except MergeError as e:
        return "refused", str(e).replace(str(folder), "").split("\n")[0], 0
    got, said = cls.from_pretrained(folder/"out", output_loading_info=True, dtype=torch.float32)
    if odd := {k: v for k, v in said.items() if v and k != "error_msgs"}:
        return "wrong", f"does not load: {str(odd)[:150]}", 0
    got = numbers(got)
    for name, x in want.items():
        if not torch.allclose(got[name], x, atol=1e-4, rtol=1e-4, equal_nan=True):
            return "wrong", f"{name} is not PEFT's", 0
    moved = sum(not torch.equal(x, before.get(n, x)) for n, x in want.items())
    return ("right", "", moved) if moved else ("not made", "the adapter changes nothing", 0)


def tried(kind, names):
    "The row of one architecture."
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    cls = class_of(config_class, names)
    config, how = tiny.tiny(config_class, cls)
    if config is None:
        return {"verdict": "not made", "why": how[:200]}
    row = {"class": cls.__name__}
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        try:
            model = tiny.scattered(cls(config), 1)
            model.save_pretrained(folder/"base")
            model = cls.from_pretrained(folder/"base", dtype=torch.float32)
            before = numbers(model)
            made = adapted(model)
            made.save_pretrained(folder/"a")
            want = numbers(untied(made).merge_and_unload())
        except Exception as e:
            return row | {"verdict": "not made", "why": said_of(e)}
        verdict, why, moved = judged(cls, folder, want, before)
    return row | {"verdict": verdict, "why": why, "adapted": moved}


def in_a_fork(kind, names, seconds):
    "`tried`, in a process of its own that has the modules already, and so much time."
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(seconds)
        try:
            row = tried(kind, names)
        except Exception as e:
            row = {"verdict": "wrong", "why": said_of(e)}
        with os.fdopen(write, "w") as f:
            json.dump(row, f)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        said = f.read()
    os.waitpid(child, 0)
    row = json.loads(said) if said else {"verdict": "not made", "why": f"took {seconds} s"}
    return dict.fromkeys(FIELDS, "") | {"model type": kind} | row


def made_kinds():
    "Model types of which `architectures.py` has made a model."
    rows = csv.DictReader((HERE/"results"/"architectures.csv").open())
    return [r["model type"] for r in rows if r["verdict"] == "right"]


def known_rows():
    file = HERE/"results"/"baking.csv"
    return {r["model type"]: r for r in csv.DictReader(file.open())} if file.exists() else {}


def write(rows, every):
    import peft
    import transformers

    inner = [rows[k] for k in every if k in rows]
    said = about(
        "python bench/baking.py",
        transformers=transformers.__version__,
        peft=peft.__version__,
        verdicts=dict(Counter(r["verdict"] for r in inner)),
    )
    write_rows("baking", inner, said)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("kinds", nargs="*")
    p.add_argument("--again", action="store_true")
    p.add_argument("--seconds", type=int, default=120)
    a = p.parse_args()
    quiet()
    warnings.simplefilter("ignore")
    import peft  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    import frechet_merge  # noqa: F401

    rows, every, names = known_rows(), made_kinds(), classes()
    for kind in a.kinds or every:
        if kind in rows and not a.again and not a.kinds:
            continue
        start = time.time()
        rows[kind] = in_a_fork(kind, names[kind], a.seconds)
        row = rows[kind]
        seconds = time.time() - start
        print(f"{kind}: {row['verdict']} {row['why'][:150]} ({seconds:.1f} s)", flush=True)
        write(rows, every)


if __name__ == "__main__":
    sys.exit(main())

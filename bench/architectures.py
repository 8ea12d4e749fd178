"""The mean of two models of every architecture of transformers, as transformers itself opens it.

    python bench/architectures.py [MODEL_TYPE …] [--again] [--seconds 180]

Of each architecture a tiny random model is made twice, with other numbers (`tiny.py`), and saved in
each layout that the library writes: as `save_pretrained` does it, without the way back to older
names (`save_original_format=False`), in shards, and with a copy of every tied tensor, as parallel
training leaves it. The two are merged, and what comes out is opened by the library:

- every tensor of its state dict is the mean of the two models', or is copied, if it is no weight;
- what was tied is tied, and nothing is missing, unexpected, or of another shape;
- the config, and every other file beside the weights, is there and says the same.

Writes bench/results/architectures.csv (a row for each architecture: right, refused with the reason,
wrong with what is wrong, or not made and why) and architectures.json. A run goes on where the last
one ended; `--again` tries all that is named, or all, anew."""

import argparse
import csv
import json
import os
import re
import shutil
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

FIELDS = ("model type", "class", "verdict", "why", "layouts", "numbers", "config")
# tasks whose model classes are taken, the first that an architecture has; then any other
TASKS = (
    "FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "FOR_SPEECH_SEQ_2_SEQ",
    "FOR_IMAGE_TEXT_TO_TEXT",
    "FOR_MULTIMODAL_LM",
    "FOR_MASKED_LM",
    "FOR_CAUSAL_LM",
    "FOR_CTC",
)
LAST = ("FOR_PRETRAINING", "")
PART = "has no model class of its own: a part of another model"
# processors of images, and names under which a model is listed again
NO_TASKS = ("FOR_IMAGE", "FOR_BACKBONE", "FOR_TEXT_ENCODING")


def classes():
    "Model type → names of model classes, the best first."
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    ending = "_MAPPING_NAMES"
    tasks = {
        k.removeprefix("MODEL").removeprefix("_").removesuffix(ending): v
        for k, v in vars(modeling_auto).items()
        if k.startswith("MODEL_") and k.endswith(ending)
    }
    tasks[""] = tasks.pop("MAPPING_NAMES", tasks.pop("MAPPING", tasks.get("", {})))
    others = [t for t in tasks if t not in (*TASKS, *LAST, *NO_TASKS)]
    order = [*TASKS, *others, *LAST]

    def found(kind):
        names = [tasks[t][kind] for t in order if kind in tasks.get(t, {})]
        return [n for some in names for n in ([some] if isinstance(some, str) else some)]

    return {kind: found(kind) for kind in CONFIG_MAPPING_NAMES}


def class_of(config_class, names):
    "The first class that has this config as its own."
    import transformers

    every = [c for n in names if (c := getattr(transformers, n, None)) is not None]
    own = [c for c in every if getattr(c, "config_class", None) is config_class]
    return next(iter([*own, *every]), None)


def state_of(model):
    "The state dict, and names that are one tensor."
    state = model.state_dict()
    groups = {}
    for name, x in state.items():
        where = (x.data_ptr(), x.shape, x.stride()) if x.numel() else name
        groups.setdefault(where, []).append(name)
    tied = {frozenset(names) for names in groups.values() if len(names) > 1}
    return {n: x.clone() for n, x in state.items()}, tied


def opened(cls, folder):
    "A model as the library opens it: its state dict, its ties, and keys that do not fit."
    model, said = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    odd = {k: sorted(map(str, v)) for k, v in said.items() if v and k != "error_msgs"}
    return *state_of(model), odd


def copies(model, folder):
    "A copy of every tied tensor, as parallel training leaves it."
    from safetensors.torch import save_file

    whole = {n: x.contiguous().clone() for n, x in model.state_dict().items()}
    save_file(whole, folder/"model.safetensors", {"format": "pt"})


def save(model, folder, layout):
    if layout == "current":
        model.save_pretrained(folder, save_original_format=False)
    elif layout == "shards":
        half = max(2, sum(p.numel()*p.element_size() for p in model.parameters())//2)
        model.save_pretrained(folder, max_shard_size=half)
    elif layout == "copies":
        model.save_pretrained(folder, save_original_format=False)
        copies(model, folder)
    else:
        model.save_pretrained(folder)


def names_in(folder):
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}
    return found


def layouts_of(model, folder):
    "Layouts of one model that differ."
    save(model, folder/"library", "library")
    known = names_in(folder/"library")
    found = ["library", "shards"]
    try:
        save(model, folder/"current", "current")
        if names_in(folder/"current") != known:
            found.append("current")
    except Exception:
        pass
    if state_of(model)[1]:
        found += ["copies", "current+copies", "copies+current"]
    shutil.rmtree(folder)
    return found


def wrong_state(merged, a, b):
    "What is wrong with the state dict of a merge of two."
    if merged.keys() != a.keys():
        return f"has other tensors: {sorted(merged.keys() ^ a.keys())[:2]}"
    for name, x in merged.items():
        if not x.is_floating_point():
            fits = torch.equal(x, a[name])
        elif torch.equal(a[name], b[name]):
            fits = torch.equal(x, a[name])
        else:
            fits = torch.allclose(x, (a[name] + b[name])/2, atol=1e-5)
        if not fits:
            return f"{name} is not the mean"
    return ""


def said_in(folder, name="config.json"):
    held = json.loads((folder/name).read_text())
    return {k: v for k, v in held.items() if k not in ("dtype", "torch_dtype")}


def wrong_files(out, a):
    "What is wrong with what stands beside the weights."
    lost = {f.name for f in a.iterdir() if ".safetensors" not in f.name}
    lost -= {f.name for f in out.iterdir()}
    if lost:
        return f"lacks {sorted(lost)}"
    ours, theirs = said_in(out), said_in(a)
    odd = [k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)]
    return f"config.json says otherwise: {sorted(odd)}" if odd else ""


def said_of(e):
    said = " ".join(f"{type(e).__name__}: {e}".split())
    return re.sub(r"/tmp/\S*", "…", said)[:200]


def judged(cls, models, folder, layout):
    "Verdict and reason for one layout."
    from frechet_merge import MergeError, merge

    a, b, out = folder/"a", folder/"b", folder/"out"
    try:
        for model, place, its in zip(models, (a, b), layout.split("+")*2):
            save(model, place, its)
        (xa, ta, oa), (xb, _, ob) = opened(cls, a), opened(cls, b)
    except Exception as e:
        return "not made", f"transformers does not open what it saved ({said_of(e)})"
    if oa or ob:
        return "not made", f"transformers does not open all that it saved ({str(oa or ob)[:150]})"
    try:
        merge([a, b], out=out)
    except MergeError as e:
        return "refused", str(e).replace(str(folder), "").split("\n")[0]
    merged, tied, odd = opened(cls, out)
    if odd:
        return "wrong", f"does not load: {odd}"
    if tied != ta:
        return "wrong", f"other ties: {sorted(map(sorted, tied ^ ta))[:2]}"
    found = wrong_state(merged, xa, xb) or wrong_files(out, a)
    return ("wrong", found) if found else ("right", "")


def tried(kind, names):
    "The row of one architecture."
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not names:
        return {"verdict": "not made", "why": PART}
    config_class = CONFIG_MAPPING[kind]
    try:
        cls = class_of(config_class, names)
    except ImportError as e:
        return {"verdict": "not made", "why": said_of(e)}
    if cls is None:
        return {"verdict": "not made", "why": f"transformers does not export {names[0]}"}
    row = {"class": cls.__name__}
    config, how = tiny.tiny(config_class, cls)
    if config is None:
        return row | {"verdict": "not made", "why": how[:200]}
    try:
        models = [tiny.scattered(cls(config), seed) for seed in (1, 2)]
    except Exception as e:
        return row | {"verdict": "not made", "why": said_of(e)}
    row |= {"numbers": sum(p.numel() for p in models[0].parameters()), "config": how}
    done = []
    with tempfile.TemporaryDirectory() as d:
        try:
            layouts = layouts_of(models[0], Path(d)/"probe")
        except Exception as e:
            return row | {"verdict": "not made", "why": said_of(e)}
        for layout in layouts:
            folder = Path(d)/layout
            folder.mkdir()
            verdict, why = judged(cls, models, folder, layout)
            shutil.rmtree(folder)
            done.append(layout)
            if verdict != "right" or why:
                row |= {"why": f"{layout}: {why}"}
            if verdict != "right":
                break
    return row | {"verdict": verdict, "layouts": " ".join(done)}


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


def quiet():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def known_rows():
    file = HERE/"results"/"architectures.csv"
    return {r["model type"]: r for r in csv.DictReader(file.open())} if file.exists() else {}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("kinds", nargs="*")
    p.add_argument("--again", action="store_true")
    p.add_argument("--seconds", type=int, default=180)
    a = p.parse_args()
    quiet()
    import transformers.modeling_utils  # noqa: F401

    import frechet_merge

    rows, every = known_rows(), classes()
    assert frechet_merge.merge
    for kind in a.kinds or every:
        if kind in rows and not a.again and not a.kinds:
            continue
        start = time.time()
        row = in_a_fork(kind, every[kind], a.seconds)
        rows[kind] = row
        seconds = time.time() - start
        print(f"{kind}: {row['verdict']} {row['why'][:150]} ({seconds:.1f} s)", flush=True)
        write(rows, every)


def write(rows, every):
    inner = {k: rows[k] for k in every if k in rows}
    verdicts = Counter(r["verdict"] for r in inner.values())
    import transformers

    said = about(
        "python bench/architectures.py",
        transformers=transformers.__version__,
        verdicts=dict(verdicts),
    )
    write_rows("architectures", [*inner.values()], said)


if __name__ == "__main__":
    sys.exit(main())

"""What merges of real adapters keep, and what gauges do to them.

    python bench/adapter_quality.py frechet_merge/demo_data --tasks
        frechet_merge/demo_data/tests.json.gz     the packaged experts; writes
        bench/results/adapter_quality.csv

    python bench/demo/train.py --rank 8 --targets query,key,value,dense --out EXPERTS
        trains larger ones

Every method merges the same adapters and is put on the base. The scale of the merged update is
chosen on the first half of each task's test texts (those at even positions), and what is reported
is the other half: mean accuracy with its standard error (bootstrap over texts), the worst task
relative to its own expert, the paired difference from `LoRA()` with its standard error. Then each
adapter is written in another gauge, of condition 1000, in float32, and the share of all predictions
that change is counted."""

import argparse
import gzip
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from adapters import about, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from frechet_merge import LoRA, Span, Sphere, load, merge
from frechet_merge.adapters.baking import bake
from frechet_merge.cli.demo import base_folder, embed
from frechet_merge.geometries.baselines import KnOTS, TSVM

HERE = Path(__file__).parent
SCALES = [0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6]


def predict(state, model, tok, tasks, heads):
    "task → predicted class of each text."
    model.load_state_dict(dict(state), strict=False)
    return {
        n: F.linear(
            embed(model, tok, [t for t, _ in task["test"]]),
            heads[f"{n}.weight"],
            heads[f"{n}.bias"],
        ).argmax(1)
        for n, task in tasks.items()
    }


def gauged(folder, to, seed, cond=1e3):
    "The adapter, each layer in a random gauge of condition `cond`, in float32."
    t = load_file(folder/"adapter_model.safetensors")
    gen = torch.Generator().manual_seed(seed)
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    shutil.copy(folder/"adapter_config.json", to)
    for k in [k for k in t if "lora_A" in k]:
        b = k.replace("lora_A", "lora_B")
        r = len(t[k])
        U, V = (
            torch.linalg.qr(torch.randn(r, r, generator=gen, dtype=torch.float64))[0]
            for _ in range(2)
        )
        d = torch.logspace(0, torch.tensor(cond).log10().item(), r, dtype=torch.float64)/cond**0.5
        t[k], t[b] = (
            ((V*d) @ U.T @ t[k].double()).float(),
            (t[b].double() @ (U/d @ V.T)).float(),
        )
    save_file({k: v.contiguous() for k, v in t.items()}, to/"adapter_model.safetensors")
    return to


def peft_linear(folders, base, scale):
    "State of the base with PEFT's add_weighted_adapter(combination_type='linear') on it."
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        AutoModel.from_pretrained(base), str(folders[0]), adapter_name="a0"
    )
    for i, f in enumerate(folders[1:], 1):
        model.load_adapter(str(f), f"a{i}")
    model.add_weighted_adapter(
        [f"a{i}" for i in range(len(folders))],
        [scale/len(folders)]*len(folders),
        "m",
        combination_type="linear",
    )
    model.set_adapter("m")
    return model.merge_and_unload().state_dict()


if __name__ == "__main__":
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("experts", type=Path)
    a.add_argument("--tasks", type=Path, default=HERE/"demo"/"tasks.json.gz")
    a.add_argument("--heads", type=Path)
    a.add_argument("--name", default="adapter_quality")
    args = a.parse_args()
    warnings.simplefilter("ignore")
    folder = base_folder()
    base = load(folder)
    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    tasks = {
        k: v
        for k, v in json.load(gzip.open(args.tasks, "rt")).items()
        if (args.experts/k).is_dir()
    }
    heads = load_file(args.heads or args.experts/"heads.safetensors")
    folders = [args.experts/n for n in tasks]
    truth = {n: torch.tensor([y for _, y in t["test"]]) for n, t in tasks.items()}
    r = json.loads((folders[0]/"adapter_config.json").read_text())["r"]
    methods = {
        "PEFT linear": None,
        "LoRA()": LoRA(),
        f"LoRA(rank={r})": LoRA(rank=r),
        "LoRA(metric='mix')": LoRA(metric="mix"),
        "LoRA(metric='wasserstein')": LoRA(metric="wasserstein"),
        "LoRA(pinned=0.02)": LoRA(pinned=0.02),
        "Span(Sphere())": Span(Sphere()),
        "KnOTS()": KnOTS(),
        "TSVM()": TSVM(),
    }
    gen = torch.Generator().manual_seed(0)

    def right(p):
        return {n: (p[n] == truth[n]).float() for n in tasks}

    def half(c, k):
        return sum(float(v[k::2].mean()) for v in c.values())/len(c)

    def bootstrap(c):  # of the mean over tasks of the odd half
        return (
            torch.stack(
                [
                    torch.stack(
                        [
                            v[1::2][
                                torch.randint(len(v[1::2]), (len(v[1::2]),), generator=gen)
                            ].mean()
                            for v in c.values()
                        ]
                    ).mean()
                    for _ in range(1000)
                ]
            )
            .std()
            .item()
        )

    def state(g, fs, s):
        "State dict of the merge on its base, and the share of layers without a log."
        if g is None:
            return peft_linear(fs, folder, s), ""
        m = merge(fs, g, scale=s, dtype="fp32")
        return bake(base, m.tensors), f"{sum(x.lost > 0 for x in m.means.values())}/{len(m.means)}"

    own = {}
    for n, f in zip(tasks, folders):
        own[n] = (
            predict(bake(base, load(f)), model, tok, {n: tasks[n]}, heads)[n] == truth[n]
        ).float()
    rows, kept = [], {}
    none = right(predict(base, model, tok, tasks, heads))
    for who, c in (("base", none), ("experts", own)):
        rows.append(
            {
                "method": who,
                "scale": "",
                "accuracy": f"{half(c, 1):.4f}",
                "se": f"{bootstrap(c):.4f}",
                "worst / expert": f"{min(float(c[n][1::2].mean() / own[n][1::2].mean()) for n in tasks):.3f}",
                "minus LoRA()": "",
                "se of difference": "",
                "flipped by gauges": "",
                "no log": "",
            }
        )
    with tempfile.TemporaryDirectory() as tmp:
        moved = [gauged(f, Path(tmp)/f.name, i) for i, f in enumerate(folders)]
        for who, g in methods.items():
            tried = {}
            for s in SCALES:
                x, lost = state(g, folders, s)
                tried[s] = predict(x, model, tok, tasks, heads)
            s = max(SCALES, key=lambda s: half(right(tried[s]), 0))
            c = right(tried[s])
            kept[who] = c
            other = predict(state(g, moved, s)[0], model, tok, tasks, heads)
            flips = sum(int((other[n] != tried[s][n]).sum()) for n in tasks)/sum(
                len(x) for x in truth.values()
            )
            d = {n: c[n] - kept["LoRA()"][n] for n in tasks} if "LoRA()" in kept else None
            rows.append(
                {
                    "method": who,
                    "scale": s,
                    "accuracy": f"{half(c, 1):.4f}",
                    "se": f"{bootstrap(c):.4f}",
                    "worst / expert": f"{min(float(c[n][1::2].mean() / own[n][1::2].mean()) for n in tasks):.3f}",
                    "minus LoRA()": f"{half(d, 1):+.4f}" if d else "",
                    "se of difference": f"{bootstrap(d):.4f}" if d else "",
                    "flipped by gauges": f"{flips:.4f}",
                    "no log": lost,
                }
            )
            print(rows[-1], flush=True)
    write_rows(
        args.name,
        rows,
        about(
            "python bench/adapter_quality.py frechet_merge/demo_data --tasks "
            "frechet_merge/demo_data/tests.json.gz",
            tasks=list(tasks),
            texts=sum(len(x) for x in truth.values()),
            rank=r,
        ),
    )

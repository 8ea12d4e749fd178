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
        squares = [torch.randn(r, r, generator=gen, dtype=torch.float64) for _ in range(2)]
        U, V = (torch.linalg.qr(x)[0] for x in squares)
        d = torch.logspace(0, torch.tensor(cond).log10().item(), r, dtype=torch.float64)/cond**0.5
        t[k] = ((V*d) @ U.T @ t[k].double()).float()
        t[b] = (t[b].double() @ (U/d @ V.T)).float()
    save_file({k: v.contiguous() for k, v in t.items()}, to/"adapter_model.safetensors")
    return to


def peft_linear(folders, base, scale):
    "State of the base with PEFT's add_weighted_adapter(combination_type='linear') on it."
    from peft import PeftModel

    model = AutoModel.from_pretrained(base)
    model = PeftModel.from_pretrained(model, str(folders[0]), adapter_name="a0")
    for i, f in enumerate(folders[1:], 1):
        model.load_adapter(str(f), f"a{i}")
    names, weights = [f"a{i}" for i in range(len(folders))], [scale/len(folders)]*len(folders)
    model.add_weighted_adapter(names, weights, "m", combination_type="linear")
    model.set_adapter("m")
    return model.merge_and_unload().state_dict()


class Judge:
    "The base, its adapters and their tasks: what a state of the base predicts, and what is right."

    def __init__(self, experts, tasks, heads):
        self.folder = base_folder()
        self.base = load(self.folder)
        self.tok = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModel.from_pretrained(self.folder).eval()
        every = json.load(gzip.open(tasks, "rt"))
        self.tasks = {n: task for n, task in every.items() if (experts/n).is_dir()}
        self.heads = load_file(heads or experts/"heads.safetensors")
        self.folders = [experts/n for n in self.tasks]
        self.truth = {n: torch.tensor([y for _, y in t["test"]]) for n, t in self.tasks.items()}
        self.texts = sum(map(len, self.truth.values()))

    def predict(self, state, names=None):
        "task → predicted class of each text."
        self.model.load_state_dict(dict(state), strict=False)
        found = {}
        for n in names or self.tasks:
            e = embed(self.model, self.tok, [t for t, _ in self.tasks[n]["test"]])
            W, b = self.heads[f"{n}.weight"], self.heads[f"{n}.bias"]
            found[n] = F.linear(e, W, b).argmax(1)
        return found

    def right(self, found):
        return {n: (p == self.truth[n]).float() for n, p in found.items()}

    def merged(self, g, folders, scale):
        "State dict of the merge on its base, and the share of layers without a log."
        if g is None:
            return peft_linear(folders, self.folder, scale), ""
        m = merge(folders, g, scale=scale, dtype="fp32")
        lost = sum(x.lost > 0 for x in m.means.values())
        return bake(self.base, m.tensors), f"{lost}/{len(m.means)}"


def tuned(judge, g):
    "The scale that is best on the even half, what it predicts, and layers without a log."
    tried, lost = {}, ""
    for s in SCALES:
        state, lost = judge.merged(g, judge.folders, s)
        tried[s] = judge.predict(state)
    best = max(SCALES, key=lambda s: half(judge.right(tried[s]), 0))
    return best, tried[best], lost


def methods(r):
    "What is compared, and by which geometry; adapters are of rank r."
    return {
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


def half(c, k):
    "Mean over the tasks of the mean of a half of its texts."
    return sum(float(v[k::2].mean()) for v in c.values())/len(c)


def bootstrap(c, gen):
    "Standard error of the mean over tasks of the odd half."

    def again(v):
        return v[torch.randint(len(v), (len(v),), generator=gen)].mean()

    odd = [v[1::2] for v in c.values()]
    means = [torch.stack([again(v) for v in odd]).mean() for _ in range(1000)]
    return torch.stack(means).std().item()


class Table:
    "Rows of results, compared with the experts and with `LoRA()`."

    def __init__(self, own):
        self.own = own  # task → which of its texts its expert gets right
        self.gen = torch.Generator().manual_seed(0)
        self.rows = []
        self.lora = None

    def add(self, method, c, scale="", flips="", lost=""):
        row = {
            "method": method,
            "scale": scale,
            "accuracy": f"{half(c, 1):.4f}",
            "se": f"{bootstrap(c, self.gen):.4f}",
            "worst / expert": f"{min(map(self.relative(c), c)):.3f}",
            "minus LoRA()": "",
            "se of difference": "",
            "flipped by gauges": flips,
            "no log": lost,
        }
        if method == "LoRA()":
            self.lora = c
        if self.lora:
            d = {n: c[n] - self.lora[n] for n in c}
            row["minus LoRA()"] = f"{half(d, 1):+.4f}"
            row["se of difference"] = f"{bootstrap(d, self.gen):.4f}"
        self.rows.append(row)

    def relative(self, c):
        return lambda n: float(c[n][1::2].mean()/self.own[n][1::2].mean())


def arguments():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("experts", type=Path)
    a.add_argument("--tasks", type=Path, default=HERE/"demo"/"tasks.json.gz")
    a.add_argument("--heads", type=Path)
    a.add_argument("--name", default="adapter_quality")
    return a.parse_args()


def main():
    args = arguments()
    warnings.simplefilter("ignore")
    judge = Judge(args.experts, args.tasks, args.heads)
    own = {}
    for n, f in zip(judge.tasks, judge.folders):
        own |= judge.right(judge.predict(bake(judge.base, load(f)), [n]))
    table = Table(own)
    table.add("base", judge.right(judge.predict(judge.base)))
    table.add("experts", own)
    rank = json.loads((judge.folders[0]/"adapter_config.json").read_text())["r"]
    with tempfile.TemporaryDirectory() as tmp:
        moved = [gauged(f, Path(tmp)/f.name, i) for i, f in enumerate(judge.folders)]
        for who, g in methods(rank).items():
            scale, found, lost = tuned(judge, g)
            other = judge.predict(judge.merged(g, moved, scale)[0])
            flips = sum(int((other[n] != found[n]).sum()) for n in found)/judge.texts
            table.add(who, judge.right(found), scale, f"{flips:.4f}", lost)
            print(table.rows[-1], flush=True)
    command = (
        "python bench/adapter_quality.py frechet_merge/demo_data --tasks "
        "frechet_merge/demo_data/tests.json.gz"
    )
    facts = about(command, tasks=list(judge.tasks), texts=judge.texts, rank=rank)
    write_rows(args.name, table.rows, facts)


if __name__ == "__main__":
    main()

"""Train image experts of a DINOv2 ViT-S/14 (22M parameters), one per task, and the fixed heads.
First make base and tasks: tasks.py.

python bench/images/train.py OUT --full                                        OUT/full/NAME:
transformers folders python bench/images/train.py OUT --rank 8
OUT/lora/NAME: PEFT folders

Each task has a linear head that is never trained: the nearest-centroid classifier of the *base*
encoder's class token on eight labelled images a class (OUT/heads.safetensors). So an expert, and a
merge, is judged by its encoder alone. Embeddings and the last norm stay frozen; `encoder.*` is
trained. OUT/accuracy.csv gets a line per expert; an expert that is there is not trained again."""

import argparse
import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

SHOTS, BATCH, LR, FULL_LR = 8, 16, 1e-3, 1e-4
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def load_task(out, name):
    "train_x, test_x uint8 [n, 3, h, w], train_y, test_y int64 [n], and labels."
    file = Path(out)/"tasks"/f"{name}.safetensors"
    return load_file(file) | {"labels": json.loads(safe_open(file, "pt").metadata()["labels"])}


def embed(model, x):
    "The class token after the last norm: uint8 [n, 3, h, w] to [n, 384]."
    return model((x/255 - MEAN)/STD).last_hidden_state[:, 0]


@torch.no_grad()
def features(model, x):
    return torch.cat([embed(model.eval(), b) for b in x.split(50)])


def head(base, task):
    "Nearest centroids as a linear layer, scaled so that logits have a standard deviation of 2."
    classes = range(len(task["labels"]))
    shots = [task["train_x"][task["train_y"] == k][:SHOTS] for k in classes]
    feats = [features(base, x) for x in shots]
    C = torch.stack([f.mean(0) for f in feats])
    mu = C.mean(0)
    W = C - mu
    b = -0.5*(C.pow(2).sum(1) - mu.pow(2).sum())
    s = 2/F.linear(torch.cat(feats), W, b).std()
    return (W*s).contiguous(), (b*s).contiguous()


def accuracy(model, task, W, b):
    found = F.linear(features(model, task["test_x"]), W, b).argmax(1)
    return (found == task["test_y"]).float().mean().item()


@dataclass(frozen=True)
class How:
    "How experts are trained."

    rank: int | None  # of an adapter; None: all of the encoder's layers
    targets: list[str]  # of an adapter
    examples: int  # the first of each task
    epochs: int
    seed: int

    @property
    def kind(self):
        "The folder of experts that are trained so."
        seed = f"_seed{self.seed}" if self.seed else ""
        return ("full" if self.rank is None else "lora") + seed


def fresh(folder, how):
    "The base, with what is to be trained."
    model = AutoModel.from_pretrained(folder)
    if how.rank is None:
        model.requires_grad_(False)
        model.encoder.requires_grad_(True)
        return model
    config = LoraConfig(r=how.rank, lora_alpha=2*how.rank, target_modules=how.targets)
    return get_peft_model(model, config)


def train(folder, task, W, b, how):
    "An expert on a task, before the head (W, b)."
    torch.manual_seed(how.seed)
    gen = torch.Generator().manual_seed(how.seed)
    model = fresh(folder, how)
    x, y = task["train_x"][: how.examples], task["train_y"][: how.examples]
    live = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(live, lr=LR if how.rank else FULL_LR, weight_decay=0.01, fused=True)
    steps = how.epochs*-(-len(x)//BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min(1, (s + 1)/(0.1*steps))*max(0, 1 - s/steps)
    )
    model.train()
    for _ in range(how.epochs):
        for i in torch.randperm(len(x), generator=gen).split(BATCH):
            loss = F.cross_entropy(F.linear(embed(model, x[i]), W, b), y[i])
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
    return model.eval()


def save(model, base, folder, how):
    if how.rank is None:
        folder.mkdir(parents=True)
        base.config.save_pretrained(folder)
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder/"model.safetensors", metadata={"format": "pt"})
    else:
        model.peft_config["default"].base_model_name_or_path = "base"
        model.save_pretrained(folder)
        (folder/"README.md").unlink(missing_ok=True)


def append(row, file):
    is_new = not file.exists()
    with open(file, "a", newline="") as f:
        w = csv.DictWriter(f, row)
        if is_new:
            w.writeheader()
        w.writerow(row)


def expert(out, name, base, heads, how):
    "Train an expert, and note how good it is."
    task = load_task(out, name)
    W, b = heads[f"{name}.weight"], heads[f"{name}.bias"]
    start = time.process_time()
    model = train(out/"base", task, W, b, how)
    cpu = time.process_time() - start
    row = {
        "task": name,
        "kind": how.kind,
        "classes": len(W),
        "base": accuracy(base, task, W, b),
        "expert": accuracy(model, task, W, b),
        "cpu_s": round(cpu),
    }
    append(row, out/"accuracy.csv")
    save(model, base, out/how.kind/name, how)
    print(row, flush=True)


def arguments():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("out", type=Path)
    a.add_argument("--full", action="store_true")
    a.add_argument("--rank", type=int, default=8)
    a.add_argument("--targets", default="q_proj,k_proj,v_proj,o_proj,fc1,fc2")
    a.add_argument("--tasks", help="names, by comma; all without")
    a.add_argument("--examples", type=int, default=1000)
    a.add_argument("--epochs", type=int, default=2)
    a.add_argument("--seed", type=int, default=0)
    return a.parse_args()


def main():
    args = arguments()
    rank = None if args.full else args.rank
    how = How(rank, args.targets.split(","), args.examples, args.epochs, args.seed)
    names = sorted(f.stem for f in (args.out/"tasks").glob("*.safetensors"))
    if args.tasks:
        names = args.tasks.split(",")
    base = AutoModel.from_pretrained(args.out/"base").eval()
    file = args.out/"heads.safetensors"
    if not file.exists():
        made = {n: head(base, load_task(args.out, n)) for n in names}
        parts = ("weight", "bias")
        save_file({f"{n}.{k}": v for n, h in made.items() for k, v in zip(parts, h)}, file)
    heads = load_file(file)
    for name in names:
        if not (args.out/how.kind/name).exists():
            expert(args.out, name, base, heads, how)


if __name__ == "__main__":
    main()

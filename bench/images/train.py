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
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

SHOTS, BATCH, LR, FULL_LR = 8, 16, 1e-3, 1e-4
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


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
    feats = [
        features(base, task["train_x"][task["train_y"] == k][:SHOTS])
        for k in range(len(task["labels"]))
    ]
    C = torch.stack([f.mean(0) for f in feats])
    mu = C.mean(0)
    W, b = C - mu, -0.5*(C.pow(2).sum(1) - mu.pow(2).sum())
    s = 2/F.linear(torch.cat(feats), W, b).std()
    return (W*s).contiguous(), (b*s).contiguous()


def accuracy(model, task, W, b):
    return (
        (F.linear(features(model, task["test_x"]), W, b).argmax(1) == task["test_y"])
        .float()
        .mean()
        .item()
    )


def train(folder, task, W, b, rank, targets, examples, epochs, seed):
    "An adapter of this rank, or without a rank all of the encoder's layers."
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    model = AutoModel.from_pretrained(folder)
    x, y = task["train_x"][:examples], task["train_y"][:examples]
    if rank:
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2*rank, target_modules=targets)
        )
    else:
        model.requires_grad_(False)
        model.encoder.requires_grad_(True)
    opt = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=LR if rank else FULL_LR,
        weight_decay=0.01,
        fused=True,
    )
    steps = epochs*-(-len(x)//BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min(1, (s + 1)/(0.1*steps))*max(0, 1 - s/steps)
    )
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=gen).split(BATCH):
            loss = F.cross_entropy(F.linear(embed(model, x[i]), W, b), y[i])
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
    return model.eval()


if __name__ == "__main__":
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
    args = a.parse_args()
    kind = "full" if args.full else "lora"
    kind += f"_seed{args.seed}" if args.seed else ""
    names = (
        args.tasks.split(",")
        if args.tasks
        else sorted(f.stem for f in (args.out/"tasks").glob("*.safetensors"))
    )
    heads_file, base = (
        args.out/"heads.safetensors",
        AutoModel.from_pretrained(args.out/"base").eval(),
    )
    if not heads_file.exists():
        heads = {n: head(base, load_task(args.out, n)) for n in names}
        save_file(
            {f"{n}.{k}": v for n, h in heads.items() for k, v in zip(("weight", "bias"), h)},
            heads_file,
        )
    heads = load_file(heads_file)
    for name in names:
        folder, task = args.out/kind/name, load_task(args.out, name)
        if folder.exists():
            continue
        W, b = heads[f"{name}.weight"], heads[f"{name}.bias"]
        start = time.process_time()
        model = train(
            args.out/"base",
            task,
            W,
            b,
            None if args.full else args.rank,
            args.targets.split(","),
            args.examples,
            args.epochs,
            args.seed,
        )
        cpu = time.process_time() - start
        row = {
            "task": name,
            "kind": kind,
            "classes": len(W),
            "base": accuracy(base, task, W, b),
            "expert": accuracy(model, task, W, b),
            "cpu_s": round(cpu),
        }
        new = not (args.out/"accuracy.csv").exists()
        with open(args.out/"accuracy.csv", "a", newline="") as f:
            w = csv.DictWriter(f, row)
            new and w.writeheader()
            w.writerow(row)
        if args.full:
            folder.mkdir(parents=True)
            base.config.save_pretrained(folder)
            save_file(
                {k: v.contiguous() for k, v in model.state_dict().items()},
                folder/"model.safetensors",
                metadata={"format": "pt"},
            )
        else:
            model.peft_config["default"].base_model_name_or_path = "base"
            model.save_pretrained(folder)
            (folder/"README.md").unlink(missing_ok=True)
        print(row, flush=True)

"""Train the demo's experts: LoRA adapters (r = 4, query and value) of all-MiniLM-L6-v2, one per
task, and the fixed heads.

python bench/demo/train.py        writes frechet_merge/demo_data (3 to 5 minutes on two cores)
python bench/demo/train.py --rank 8 --targets query,key,value,dense --out EXPERTS        larger
ones, for bench/adapter_quality.py python bench/demo/train.py --full --share .6 --out EXPERTS
full models, for bench/quality.py

Each task has a linear head that is never trained: the nearest-centroid classifier of the *base*
encoder on eight labelled examples a class. So an expert, and a merge, is judged by its encoder
alone. `tasks.json.gz` beside this file holds the texts: {task: {labels, train: [[text, y]], test:
[[text, y]], source, license}}, at most 300 characters each. With a --share below 1, the last
training examples of each task are left out, and can test; OUT/seen.json says how many were seen.
"""

import argparse
import gzip
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from frechet_merge.demo import BASE_ID, REVISION, TOKENS, base_folder, embed

HERE, OUT = Path(__file__).parent, Path(__file__).parents[2]/"frechet_merge"/"demo_data"
SHOTS, TESTS, EPOCHS, BATCH, LR, FULL_LR, RANK = 8, 200, 3, 16, 2e-3, 1e-4, 4


def batches(tok, rows, gen):
    "Random batches of texts of like length."
    order = torch.randperm(len(rows), generator=gen).tolist()
    pools = [
        sorted(order[i : i + 8*BATCH], key=lambda j: len(rows[j][0]))
        for i in range(0, len(order), 8*BATCH)
    ]
    cut = [p[i : i + BATCH] for p in pools for i in range(0, len(p), BATCH)]
    for k in torch.randperm(len(cut), generator=gen).tolist():
        x = tok(
            [rows[j][0] for j in cut[k]],
            truncation=True,
            max_length=TOKENS,
            padding=True,
            return_tensors="pt",
        )
        yield x, torch.tensor([rows[j][1] for j in cut[k]])


def head(enc, tok, task):
    "Nearest centroids as a linear layer, scaled so that logits have a standard deviation of 2."
    feats = [
        embed(enc, tok, [t for t, y in task["train"] if y == k][:SHOTS])
        for k in range(len(task["labels"]))
    ]
    C = torch.stack([f.mean(0) for f in feats])
    mu = C.mean(0)
    W, b = C - mu, -0.5*(C.pow(2).sum(1) - mu.pow(2).sum())
    s = 2/F.linear(torch.cat(feats), W, b).std()
    return (W*s).contiguous(), (b*s).contiguous()


def train(base, tok, rows, W, b, rank, targets, epochs, seed):
    "An adapter of this rank, or without a rank all of the encoder's layers (not the embeddings)."
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    model = AutoModel.from_pretrained(base, add_pooling_layer=False)
    if rank:
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2*rank, target_modules=targets)
        )
        (
            model.peft_config["default"].base_model_name_or_path,
            model.peft_config["default"].revision,
        ) = BASE_ID, REVISION
    else:
        model.embeddings.requires_grad_(False)
    opt = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=LR if rank else FULL_LR,
        weight_decay=0.01,
    )
    steps = epochs*-(-len(rows)//BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min(1, (s + 1)/(0.1*steps))*max(0, 1 - s/steps)
    )
    for _ in range(epochs):
        for x, y in batches(tok, rows, gen):
            h, mask = model(**x).last_hidden_state, x["attention_mask"][..., None]
            loss = F.cross_entropy(F.linear((h*mask).sum(1)/mask.sum(1), W, b), y)
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
    return model


if __name__ == "__main__":
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--rank", type=int, default=RANK)
    a.add_argument("--targets", default="query,value")
    a.add_argument("--out", type=Path, default=OUT)
    a.add_argument("--full", action="store_true")
    a.add_argument("--share", type=float, default=1.0)
    a.add_argument("--epochs", type=int, default=EPOCHS)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--tasks", type=Path, default=HERE/"tasks.json.gz")
    a.add_argument("--heads", type=Path, help="use these fixed heads")
    args = a.parse_args()
    tasks, base = json.load(gzip.open(args.tasks, "rt")), base_folder()
    tok, enc, heads = (
        AutoTokenizer.from_pretrained(base),
        AutoModel.from_pretrained(base, add_pooling_layer=False).eval(),
        load_file(args.heads) if args.heads else {},
    )
    args.out.mkdir(exist_ok=True, parents=True)
    seen = {name: round(args.share*len(task["train"])) for name, task in tasks.items()}
    for name, task in tasks.items():
        if not args.heads:
            heads[f"{name}.weight"], heads[f"{name}.bias"] = head(enc, tok, task)
        W, b = heads[f"{name}.weight"], heads[f"{name}.bias"]
        train(
            base,
            tok,
            task["train"][: seen[name]],
            W,
            b,
            None if args.full else args.rank,
            args.targets.split(","),
            args.epochs,
            args.seed,
        ).save_pretrained(args.out/name)
        if args.full:
            tok.save_pretrained(args.out/name)
        else:
            factors = load_file(args.out/name/"adapter_model.safetensors")
            save_file(
                {k: v.half() for k, v in factors.items()},
                args.out/name/"adapter_model.safetensors",
                metadata={"format": "pt"},
            )
        (args.out/name/"README.md").unlink(missing_ok=True)
        print(name, "done", flush=True)
    save_file(heads, args.out/"heads.safetensors")
    if args.share < 1:
        (args.out/"seen.json").write_text(json.dumps(seen))
    if args.out == OUT:
        small = {
            k: {
                "labels": v["labels"],
                "source": v["source"],
                "license": v["license"],
                "test": v["test"][:TESTS],
            }
            for k, v in tasks.items()
        }
        with gzip.GzipFile(args.out/"tests.json.gz", "wb", mtime=0) as f:
            f.write(json.dumps(small, ensure_ascii=False, separators=(",", ":")).encode())

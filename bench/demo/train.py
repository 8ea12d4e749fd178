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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from frechet_merge.cli.demo import BASE_ID, REVISION, TOKENS, base_folder, embed

HERE = Path(__file__).parent
OUT = Path(__file__).parents[2]/"frechet_merge"/"demo_data"
SHOTS, TESTS, EPOCHS, BATCH, LR, FULL_LR, RANK = 8, 200, 3, 16, 2e-3, 1e-4, 4


def batches(tok, rows, gen):
    "Random batches of texts of like length."
    order = torch.randperm(len(rows), generator=gen).tolist()
    pools = [
        sorted(order[i : i + 8*BATCH], key=lambda j: len(rows[j][0]))
        for i in range(0, len(order), 8*BATCH)
    ]
    cut = [p[i : i + BATCH] for p in pools for i in range(0, len(p), BATCH)]
    how = dict(truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
    for k in torch.randperm(len(cut), generator=gen).tolist():
        texts, labels = zip(*(rows[j] for j in cut[k]))
        yield tok(list(texts), **how), torch.tensor(labels)


def head(enc, tok, task):
    "Nearest centroids as a linear layer, scaled so that logits have a standard deviation of 2."
    classes = range(len(task["labels"]))
    shots = [[t for t, y in task["train"] if y == k][:SHOTS] for k in classes]
    feats = [embed(enc, tok, texts) for texts in shots]
    C = torch.stack([f.mean(0) for f in feats])
    mu = C.mean(0)
    W = C - mu
    b = -0.5*(C.pow(2).sum(1) - mu.pow(2).sum())
    s = 2/F.linear(torch.cat(feats), W, b).std()
    return (W*s).contiguous(), (b*s).contiguous()


@dataclass(frozen=True)
class How:
    "How experts are trained."

    rank: int | None  # of an adapter; None: all of the encoder's layers (not the embeddings)
    targets: list[str]  # of an adapter
    epochs: int
    seed: int


def fresh(base, how):
    "The base, with what is to be trained."
    model = AutoModel.from_pretrained(base, add_pooling_layer=False)
    if how.rank is None:
        model.embeddings.requires_grad_(False)
        return model
    config = LoraConfig(r=how.rank, lora_alpha=2*how.rank, target_modules=how.targets)
    model = get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = BASE_ID
    model.peft_config["default"].revision = REVISION
    return model


def train(base, tok, rows, W, b, how):
    "An expert on texts and labels, before the head (W, b)."
    torch.manual_seed(how.seed)
    gen = torch.Generator().manual_seed(how.seed)
    model = fresh(base, how)
    live = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(live, lr=LR if how.rank else FULL_LR, weight_decay=0.01)
    steps = how.epochs*-(-len(rows)//BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min(1, (s + 1)/(0.1*steps))*max(0, 1 - s/steps)
    )
    for _ in range(how.epochs):
        for x, y in batches(tok, rows, gen):
            h = model(**x).last_hidden_state
            mask = x["attention_mask"][..., None]
            loss = F.cross_entropy(F.linear((h*mask).sum(1)/mask.sum(1), W, b), y)
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
    return model


def save(model, tok, folder, how):
    "A model with its tokenizer, or an adapter in half precision."
    model.save_pretrained(folder)
    if how.rank is None:
        tok.save_pretrained(folder)
    else:
        file = folder/"adapter_model.safetensors"
        save_file(
            {k: v.half() for k, v in load_file(file).items()}, file, metadata={"format": "pt"}
        )
    (folder/"README.md").unlink(missing_ok=True)


def save_tests(tasks, file):
    "The first test texts of each task, as the demo has them."
    small = {
        name: {k: task[k] for k in ("labels", "source", "license")}
        | {"test": task["test"][:TESTS]}
        for name, task in tasks.items()
    }
    with gzip.GzipFile(file, "wb", mtime=0) as f:
        f.write(json.dumps(small, ensure_ascii=False, separators=(",", ":")).encode())


def arguments():
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
    return a.parse_args()


def main():
    args = arguments()
    tasks = json.load(gzip.open(args.tasks, "rt"))
    base = base_folder()
    tok = AutoTokenizer.from_pretrained(base)
    encoder = AutoModel.from_pretrained(base, add_pooling_layer=False).eval()
    heads = load_file(args.heads) if args.heads else {}
    how = How(None if args.full else args.rank, args.targets.split(","), args.epochs, args.seed)
    args.out.mkdir(exist_ok=True, parents=True)
    seen = {name: round(args.share*len(task["train"])) for name, task in tasks.items()}
    for name, task in tasks.items():
        if not args.heads:
            heads[f"{name}.weight"], heads[f"{name}.bias"] = head(encoder, tok, task)
        W, b = heads[f"{name}.weight"], heads[f"{name}.bias"]
        model = train(base, tok, task["train"][: seen[name]], W, b, how)
        save(model, tok, args.out/name, how)
        print(name, "done", flush=True)
    save_file(heads, args.out/"heads.safetensors")
    if args.share < 1:
        (args.out/"seen.json").write_text(json.dumps(seen))
    if args.out == OUT:
        save_tests(tasks, args.out/"tests.json.gz")


if __name__ == "__main__":
    main()

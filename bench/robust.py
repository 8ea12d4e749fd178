"""What a bad expert does to a merge, under each loss: the demo's five experts, full models, of
which one is replaced by noise.

    python bench/robust.py

Each expert in turn is replaced by base + noise, as large in each tensor as `--noise` times its own
update, and the five are merged under each loss. What is reported is the mean accuracy over the
tasks of the other four, on the demo's test texts; beside it the merge of the four without the bad
one, and of all five experts without noise. Writes bench/results/robust.csv and robust.json."""

import argparse
import warnings

import torch
from adapters import about, write_rows
from transformers import AutoModel, AutoTokenizer

from frechet_merge import load, merge
from frechet_merge.adapters.baking import bake
from frechet_merge.cli.demo import DATA, accuracy, base_folder, tasks

LOSSES = (None, "median", "huber", "cauchy", "huber:per=block", "cauchy:per=block")


def experts():
    "Full models by the task, in memory, and their base."
    base = load(base_folder())
    found = {}
    for name in tasks():
        full = bake(base, load(DATA/name))
        found[name] = {n: full[n].clone() for n in full}
    return found, {n: base[n].clone() for n in base}


def noisy(expert, base, times, seed):
    "The expert, its update replaced by noise of so many times its norm."
    g = torch.Generator().manual_seed(seed)
    out = {}
    for n, x in expert.items():
        noise = torch.randn(x.shape, generator=g) if x.is_floating_point() else x
        update = (x - base[n]).float().norm() if x.is_floating_point() else 0
        out[n] = base[n] + times*update*noise/noise.norm() if update else x
    return out


def judged(models, loss, names, model, tokenizer, texts, **how):
    "Mean accuracy of a merge on tasks, and what each model counted for."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = merge(models, loss=loss, **how)
    # heads are of the tasks; the encoder is what is merged
    model.load_state_dict(dict(merged.tensors), strict=False)
    found = accuracy(model, tokenizer, names, texts)
    shares = merged.record.counted.get("shares", [])
    return sum(found.values())/len(found), shares


def row(bad, what, score, shares):
    "A line of the table."
    found = {"bad": bad, "loss": what or "square", "accuracy": round(100*score, 2)}
    found["least share"] = round(min(shares, default=1.0), 4)
    print(found, flush=True)
    return found


def rows_of(found, base, noise, judge):
    "Without a bad expert, and with each of them in turn."
    for loss in LOSSES:
        yield row("none", loss, *judge([*found.values()], loss, [*found]))
    for k, bad in enumerate(found):
        rest = [n for n in found if n != bad]
        models = [found[n] for n in rest]
        yield row(bad, "without it", judge(models, None, rest)[0], [0.0])
        broken = noisy(found[bad], base, noise, k)
        for loss in LOSSES:
            yield row(bad, loss, *judge([*models, broken], loss, rest))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", type=float, default=10.0)
    parser.add_argument("--texts", type=int, default=200)
    arguments = parser.parse_args()
    folder, (found, base) = base_folder(), experts()
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def judge(models, loss, names):
        return judged(models, loss, names, model, tokenizer, arguments.texts, base=base)

    rows = [*rows_of(found, base, arguments.noise, judge)]
    command = f"python bench/robust.py --noise {arguments.noise:g}"
    write_rows("robust", rows, about(command, texts=arguments.texts))


if __name__ == "__main__":
    main()

"""Families of real experts: one base, and for each task a fine-tuned encoder (a full model, or a
PEFT adapter) and a fixed linear head.

A merge is judged by its encoder alone. Each task's test examples are split: one half (of texts,
those at even positions; of images, the first) chooses scales, the other is reported, with the
training texts that the experts have not seen (`seen.json`)."""

import gzip
import json
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel

from frechet_merge import load
from frechet_merge.adapters.baking import bake
from frechet_merge.curvature.collecting import curvature
from frechet_merge.cli.demo import TOKENS, base_folder
from frechet_merge.tuning.tune import OutputDistance

# unlabelled training examples that statistics see; test examples that choose a scale, at most
SAMPLES, VALIDATION = 64, 120


class Experts:
    def __init__(self, base, folder, heads, tasks, only=None):
        self.base = Path(base)
        self.folder = Path(folder)
        self.heads = heads
        self.model = AutoModel.from_pretrained(base, **self.options).eval()
        state = self.model.state_dict()
        self.W = {k: v.clone() for k, v in state.items() if k.startswith("encoder.")}
        self.names = [n for n in tasks if (self.folder/n).is_dir() and (not only or n in only)]
        self.folders = [self.folder/n for n in self.names]
        self.adapters = (self.folders[0]/"adapter_config.json").exists()
        whole = load(base)
        self.delta = {n: self.moved(whole, f) for n, f in zip(self.names, self.folders)}
        self.tests = {}
        for n in self.names:
            self.tests[n, 0] = self.tested(tasks[n], 0, VALIDATION)
            self.tests[n, 1] = self.tested(tasks[n], 1, None)
            at = sum(len(where) for where, _ in self.tests[n, 1])
            for where, b in self.batches(*self.unseen(tasks[n], n)):
                self.tests[n, 1].append(([at + i for i in where], b))
        self.tasks = tasks

    def moved(self, whole, folder):
        "Matrix → how far an expert's is from the base's."
        state = bake(whole, load(folder)) if self.adapters else load(folder)
        return {k: state[k].float() - w for k, w in self.W.items()}

    def tested(self, task, half, most):
        "Batches of a half of its test examples."
        return self.batches(*self.examples(task, "test", self.half(task, half), most))

    def half(self, task, k):
        return slice(k, None, 2)

    def unseen(self, task, n):
        "Training examples that its expert was not trained on, and which no other example repeats."
        return [], []

    def fresh(self, n):
        "Which reported examples repeat none that its expert was trained on, or that chose a scale."
        return slice(None)

    def taught(self, n):
        "How many of the training examples, the first ones, its expert was trained on."
        return None

    def groups(self, n):
        """A number for each reported example, the same for those of one source; none if each has
        its own."""
        return None

    def put(self, delta):
        state = {k: w + delta[k].float() if k in delta else w for k, w in self.W.items()}
        self.model.load_state_dict(state, strict=False)

    @torch.no_grad()
    def right(self, delta, half, names=None):
        "task → which examples of that half are classified correctly."
        self.put(delta)
        out = {}
        for n in names or self.names:
            out[n] = torch.zeros(sum(len(at) for at, _ in self.tests[n, half]), dtype=torch.bool)
            for at, b in self.tests[n, half]:
                out[n][at] = self.logits(self.model, n, b).argmax(1) == b["labels"]
        return out

    def unlabelled(self, n, samples, after=0):
        """Batches of training examples, the last but so many, whose labels are there for the
        empirical Fisher alone."""
        inputs = self.examples(self.tasks[n], "train", slice(0, self.taught(n)), None)
        inputs = [x[len(x) - samples - after : len(x) - after] for x in inputs]
        return [b for _, b in self.batches(*inputs, 32)]

    def statistics(self, n, form, estimator=None, samples=SAMPLES):
        self.put(self.delta[n])
        how = dict(forward=self.run(n), parameters="encoder.*")
        return curvature(self.model, self.unlabelled(n, samples), form, estimator, **how)

    def run(self, n):
        "How the model is run on a batch of a task."
        return lambda model, b: self.logits(model, n, b)

    @cached_property
    def distance(self):
        """The distance of outputs from each expert's, on as many examples as the statistics see,
        but others; and that of the base."""
        d = OutputDistance()
        for n in self.names:
            self.put(self.delta[n])
            d.add(self.model, self.unlabelled(n, SAMPLES, after=SAMPLES), self.run(n))
        self.put({})
        return d, d(self.model)

    def lost(self, delta, names):
        "Mean distance from the experts, each in units of the base's."
        d, unit = self.distance
        self.put(delta)
        every = zip(self.names, d(self.model), unit)
        return sum(x/u for n, x, u in every if n in names)/len(names)

    def head(self, n, h):
        return F.linear(h, self.heads[f"{n}.weight"], self.heads[f"{n}.bias"])


class Text(Experts):
    """The sentence encoder of `frechet_merge.cli.demo`, mean-pooled; TASKS is a file like
    bench/demo/tasks.json.gz."""

    options = {"add_pooling_layer": False}

    def __init__(self, folder, tasks, heads=None, base=None, only=None):
        from transformers import AutoTokenizer

        base = base or base_folder()
        self.tok = AutoTokenizer.from_pretrained(base)
        seen = Path(folder)/"seen.json"
        self.seen = json.loads(seen.read_text()) if seen.exists() else {}
        heads = load_file(heads or Path(folder)/"heads.safetensors")
        super().__init__(base, folder, heads, json.load(gzip.open(tasks, "rt")), only)

    def examples(self, task, split, which, most):
        rows = task[split][which][:most]
        found = self.tok([t for t, _ in rows], truncation=True, max_length=TOKENS)
        return found["input_ids"], [y for _, y in rows]

    def taught(self, n):
        return self.seen.get(n)

    def more(self, task, n):
        "Training texts that the expert has not seen, each once, with their labels."
        if n not in self.seen:
            return []
        known = {x for x, _ in task["train"][: self.taught(n)] + task["test"]}
        rows = []
        for x, y in task["train"][self.taught(n) :]:
            if x not in known:
                rows.append((x, y))
                known.add(x)
        return rows

    def unseen(self, task, n):
        rows = self.more(task, n)
        return self.examples({"unseen": rows}, "unseen", slice(None), None) if rows else ([], [])

    def fresh(self, n):
        def plain(x):
            return " ".join(x.lower().split())

        task = self.tasks[n]
        chose = task["test"][self.half(task, 0)][:VALIDATION]
        known = {plain(x) for x, _ in task["train"][: self.taught(n)] + chose}
        rest = task["test"][self.half(task, 1)] + self.more(task, n)
        return torch.tensor([plain(x) not in known for x, _ in rest])

    def batches(self, ids, labels, size=64):
        "Texts of like length together, and where they were."
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        cut = [order[k : k + size] for k in range(0, len(order), size)]
        return [(at, self.batch([ids[i] for i in at], [labels[i] for i in at])) for at in cut]

    def batch(self, ids, labels):
        pad = torch.nn.utils.rnn.pad_sequence
        ones = [torch.ones(len(x), dtype=torch.long) for x in ids]
        return {
            "input_ids": pad([torch.tensor(x) for x in ids], batch_first=True),
            "attention_mask": pad(ones, batch_first=True),
            "labels": torch.tensor(labels),
        }

    def logits(self, model, n, b):
        h = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).last_hidden_state
        m = b["attention_mask"][..., None].float()
        return self.head(n, (h*m).sum(1)/m.sum(1))


class Images(Experts):
    """A ViT, by its class token; TASKS is a folder of `NAME.safetensors` with train_x, test_x
    (uint8, n × 3 × side × side) and train_y, test_y."""

    options = {}
    MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def __init__(self, folder, tasks, heads=None, base=None, only=None):
        tasks = Path(tasks)
        base = base or tasks.parent/"base"
        heads = load_file(heads or tasks.parent/"heads.safetensors")
        held = {f.stem: load_file(f) for f in sorted(tasks.glob("*.safetensors"))}
        super().__init__(base, folder, heads, held, only)

    # several images of one source are neighbours
    def half(self, task, k):
        n = len(task["test_y"])
        return slice(n//2, None) if k else slice(0, n//2)

    def groups(self, n):
        return self.tasks[n]["test_group"][self.half(self.tasks[n], 1)]

    def examples(self, task, split, which, most):
        return task[f"{split}_x"][which][:most], task[f"{split}_y"][which][:most]

    def batches(self, x, labels, size=64):
        found = []
        for i in range(0, len(x), size):
            pixels = (x[i : i + size]/255 - self.MEAN)/self.STD
            batch = {"pixel_values": pixels, "labels": labels[i : i + size]}
            found.append((list(range(i, min(i + size, len(x)))), batch))
        return found

    def logits(self, model, n, b):
        return self.head(n, model(pixel_values=b["pixel_values"]).last_hidden_state[:, 0])

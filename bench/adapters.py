"""Merging LoRA adapters: beside PEFT's own `add_weighted_adapter`, and at the size of fifty
adapters of a 7B model.

    python bench/adapters.py layer      against PEFT on one decoder layer (hidden 2048, MLP
        5632, 7 modules), 5 adapters of rank 16
    python bench/adapters.py scale      from disk to disk: 5 to 50 adapters of rank 16 on a
        7B-shaped model (32 layers, 7 modules; random factors)

write bench/results/adapters_layer.csv and adapters_scale.csv, with versions and machine beside
them. PEFT's time is that of `add_weighted_adapter` alone, on a model and adapters that are in
memory; ours is `merge` from folders to a folder (in one row, to memory). Errors are relative
Frobenius distances of the merged update from the weighted mean of the updates, computed densely in
float64."""

import argparse
import csv
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
RANK = 16
EQUAL = [0.2]*5


def modules(hidden, mlp, layers):
    "Name and shape of each module of a decoder."
    shapes = {f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"} | {
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    for i in range(layers):
        for name, shape in shapes.items():
            yield f"model.layers.{i}.{name}", shape


def make(folder, seed, size, r=RANK, dtype=torch.float32, **cfg):
    "A PEFT folder of random factors, for (hidden, MLP, layers)."
    from frechet_merge.files.shards import ShardWriter

    folder.mkdir(parents=True)
    names = dict(modules(*size))
    gen = torch.Generator().manual_seed(seed)
    layout = {
        f"base_model.model.{k}.lora_{x}.weight": (s, dtype)
        for k, (m, n) in names.items()
        for x, s in (("A", (r, n)), ("B", (m, r)))
    }
    w = ShardWriter(folder, layout, 1 << 62, "adapter_model")
    for k, (s, _) in layout.items():
        w.write(k, 0, torch.randn(s, generator=gen).flatten()*s[-1]**-0.5)
    w.close()
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "target_modules": sorted({k.rsplit(".", 1)[1] for k in names}),
        "base_model_name_or_path": "random",
        **cfg,
    }
    (folder/"adapter_config.json").write_text(json.dumps(config))
    return folder


def shell(hidden, mlp, layers):
    "Modules of these names and shapes, for PEFT to wrap."
    root = torch.nn.Module()
    for name, (m, n) in modules(hidden, mlp, layers):
        at = root
        for part in name.split(".")[:-1]:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(name.rsplit(".", 1)[1], torch.nn.Linear(n, m, bias=False))
    return root


def exact(folders, ws):
    "module → weighted mean of the updates, dense."
    from frechet_merge import load
    from frechet_merge.adapters.peft import layers

    out = {}
    for f, w in zip(folders, ws):
        for n, x in layers(load(f))[0].items():
            out[n] = out.get(n, 0) + w*x.factors().delta()
    return out


def distance(got, want):
    "Relative, over all modules."
    far = sum(float((got[n] - want[n]).norm()**2) for n in want)
    return (far/sum(float(x.norm()**2) for x in want.values()))**0.5


def peft_merge(folders, ws, kind, size, **kw):
    "Seconds of add_weighted_adapter, the updates that PEFT then has, and the MiB that it took."
    from peft import PeftModel

    model = PeftModel.from_pretrained(shell(*size), str(folders[0]), adapter_name="a0")
    for i, f in enumerate(folders[1:], 1):
        model.load_adapter(str(f), f"a{i}")
    names = [f"a{i}" for i in range(len(folders))]
    before = peak(reset=True)
    start = time.perf_counter()
    model.add_weighted_adapter(names, ws, "merged", combination_type=kind, **kw)
    seconds = time.perf_counter() - start
    used = peak() - before
    updates = {
        n.removeprefix("base_model.model."): m.get_delta_weight("merged").double()
        for n, m in model.named_modules()
        if hasattr(m, "get_delta_weight")
    }
    return seconds, updates, used


def peak(reset=False):
    "Largest resident MiB of this process, since the last reset."
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith("VmHWM"))
    return int(line.split()[1])/1024


OURS = """
import json, sys, time
sys.path.insert(0, {here!r})
from adapters import peak
from frechet_merge import LoRA, merge
before = peak(reset=True)
start = time.perf_counter()
merge({folders}, {geometry}, out={out!r}, weights={weights})
print(json.dumps([time.perf_counter() - start, peak() - before, peak()]))
"""


def our_merge(folders, ws, out, geometry="LoRA(rank=16)"):
    """Seconds from folders to a folder in a fresh interpreter after imports, MiB above the imports,
    and MiB in all."""
    if out:
        shutil.rmtree(out, ignore_errors=True)
    code = OURS.format(
        folders=[str(f) for f in folders],
        geometry=geometry,
        out=None if out is None else str(out),
        here=str(HERE),
        weights=list(ws) if ws else None,
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if r.returncode:
        raise ValueError(r.stderr.strip().splitlines()[-1])
    return json.loads(r.stdout)


def about(command, **more):
    import peft

    return {
        "command": command,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        **more,
    }


def write_rows(name, rows, about):
    (HERE/"results").mkdir(exist_ok=True)
    with open(HERE/"results"/f"{name}.csv", "w", newline="") as f:
        w = csv.DictWriter(f, rows[0].keys(), lineterminator="\n")
        w.writeheader()
        w.writerows(rows)
    (HERE/"results"/f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")


def row(case, who, seconds="", mib="", far=""):
    return {
        "case": case,
        "who": who,
        "seconds": seconds,
        "extra MiB": mib,
        "distance from the mean": far,
    }


# hidden, MLP, layers; our merges, of which the median is told
LAYER, RUNS = (2048, 5632, 1), 5


def median_merge(folders, ws, out, geometry):
    return sorted(our_merge(folders, ws, out, geometry) for _ in range(RUNS))[RUNS//2]


def our_updates(folders, ws, geometry, out):
    "As of `peft_merge`, but from disk to disk."
    from frechet_merge import load
    from frechet_merge.adapters.peft import layers

    seconds, mib, _ = median_merge(folders, ws, out, geometry)
    return seconds, {n: x.factors().delta() for n, x in layers(load(out))[0].items()}, mib


def compare(case, folders, kind, geometry, out, given=EQUAL, **kw):
    "A row of PEFT and one of ours, with the weights that are given, against the mean."
    want = exact(folders, EQUAL)
    for who, run in (
        (f"PEFT {kind}", lambda: peft_merge(folders, given, kind, LAYER, **kw)),
        (f"frechet_merge {geometry}", lambda: our_updates(folders, given, geometry, out)),
    ):
        try:
            seconds, got, mib = run()
        except Exception as e:
            yield row(case, who, far=f"refused: {type(e).__name__}")
        else:
            yield row(case, who, f"{seconds:.4f}", f"{mib:.0f}", f"{distance(got, want):.8f}")


def layer(work):
    "All cases of one decoder layer."
    out = work/"out"

    def made(letter, *configs):
        return [make(work/f"{letter}{i}", i, LAYER, **c) for i, c in enumerate(configs)]

    plain = made("p", *[{}]*5)
    rows = [*compare("plain, to rank 16", plain, "svd", "LoRA(rank=16)", out, svd_rank=RANK)]
    seconds, mib, _ = median_merge(plain, EQUAL, None, "LoRA(rank=16)")
    who = "frechet_merge LoRA(rank=16), result in memory"
    rows.append(row("plain, to rank 16", who, f"{seconds:.4f}", f"{mib:.0f}"))
    rows += compare("plain", plain, "linear", "LoRA()", out)
    rs = made("r", *[{"use_rslora": True}]*5)
    rows += compare("rsLoRA", rs, "linear", "LoRA()", out)
    scaled = made("s", *({"lora_alpha": a} for a in (4, 8, 16, 32, 64)))
    rows += compare("mixed scaling", scaled, "linear", "LoRA()", out)
    rows += compare("rsLoRA", rs, "cat", "LoRA()", out)
    ranks = made("d", *({"r": r, "lora_alpha": 16} for r in (4, 8, 16, 32, 64)))
    rows += compare("different ranks", ranks, "linear", "LoRA()", out)
    rows += compare("one weight too few", plain, "cat", "LoRA()", out, given=EQUAL[:4])
    write_rows("adapters_layer", rows, about("python bench/adapters.py layer"))


def scale_row(size, T, geometry, seconds, mib):
    hidden, mlp, layers = size
    return {
        "adapters": T,
        "hidden": hidden,
        "MLP": mlp,
        "layers": layers,
        "geometry": geometry,
        "seconds": seconds,
        "peak MiB": f"{mib:.0f}",
    }


def growing(work):
    "Rows of 5 to 50 adapters of a model of full size."
    full = (4096, 11008, 32)
    folders = [make(work/f"a{i}", i, full, dtype=torch.bfloat16) for i in range(50)]
    for T in (5, 10, 20, 50):
        for g in ("LoRA(rank=16)", "LoRA()") if T in (5, 20) else ("LoRA(rank=16)",):
            seconds, _, mib = our_merge(folders[:T], None, work/"out", g)
            yield scale_row(full, T, g, f"{seconds:.1f}", mib)
            shutil.rmtree(work/"out")
    for f in folders:
        shutil.rmtree(f)


def shrinking(work):
    "Rows of 20 adapters of models of 512 to 4096 dimensions."
    for k in (1, 2, 4, 8):
        size = (512*k, 1376*k, 4)
        folders = [make(work/f"k{k}_{i}", i, size, dtype=torch.bfloat16) for i in range(20)]
        seconds, _, mib = our_merge(folders, None, work/"out", "LoRA(rank=16)")
        yield scale_row(size, 20, "LoRA(rank=16)", f"{seconds:.2f}", mib)
        for f in folders:
            shutil.rmtree(f)


def scale(work):
    "T grows at full size; then hidden and MLP shrink at T = 20, for one layer."
    rows = []
    for r in itertools.chain(growing(work), shrinking(work)):
        rows.append(r)
        print(r, flush=True)
    write_rows("adapters_scale", rows, about("python bench/adapters.py scale"))


if __name__ == "__main__":
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("what", choices=("layer", "scale"))
    a.add_argument("--work", type=Path, default=Path("/tmp/frechet_merge_bench"))
    args = a.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    warnings.simplefilter("ignore")
    {"layer": layer, "scale": scale}[args.what](args.work)
    shutil.rmtree(args.work)

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


def modules(hidden, mlp, layers):
    for i in range(layers):
        for k, (m, n) in {
            **{f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"},
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }.items():
            yield f"model.layers.{i}.{k}", (m, n)


def make(folder, seed, hidden, mlp, layers, r=RANK, dtype=torch.float32, **cfg):
    "A PEFT folder of random factors."
    from frechet_merge.shards import ShardWriter

    folder.mkdir(parents=True)
    names = dict(modules(hidden, mlp, layers))
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
    (folder/"adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": r,
                "lora_alpha": r,
                "target_modules": sorted({k.rsplit(".", 1)[1] for k in names}),
                "base_model_name_or_path": "random",
                **cfg,
            }
        )
    )
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
    from frechet_merge.adapters import layers

    out = {}
    for f, w in zip(folders, ws):
        for n, x in layers(load(f))[0].items():
            out[n] = out.get(n, 0) + w*x.factors().delta()
    return out


def distance(got, want):
    return (
        sum(float((got[n] - want[n]).norm()**2) for n in want)
        / sum(float(x.norm()**2) for x in want.values())
    )**0.5


def peft_merge(folders, ws, kind, hidden, mlp, layers, **kw):
    "Seconds of add_weighted_adapter, the updates that PEFT then has, and the MiB that it took."
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        shell(hidden, mlp, layers), str(folders[0]), adapter_name="a0"
    )
    for i, f in enumerate(folders[1:], 1):
        model.load_adapter(str(f), f"a{i}")
    before, start = peak(reset=True), time.perf_counter()
    model.add_weighted_adapter(
        [f"a{i}" for i in range(len(folders))], ws, "merged", combination_type=kind, **kw
    )
    seconds, used = time.perf_counter() - start, peak() - before
    return (
        seconds,
        {
            n.removeprefix("base_model.model."): m.get_delta_weight("merged").double()
            for n, m in model.named_modules()
            if hasattr(m, "get_delta_weight")
        },
        used,
    )


def peak(reset=False):
    "Largest resident MiB of this process, since the last reset."
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return (
        int(
            next(
                x
                for x in Path("/proc/self/status").read_text().splitlines()
                if x.startswith("VmHWM")
            ).split()[1]
        )
        / 1024
    )


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


def layer(work, runs=5):
    from frechet_merge import load
    from frechet_merge.adapters import layers

    size, ws, rows = (2048, 5632, 1), [0.2]*5, []

    def ours(folders, ws, geometry):
        out = work/"out"
        done = sorted(our_merge(folders, ws, out, geometry) for _ in range(runs))[runs//2]
        return done[0], {n: x.factors().delta() for n, x in layers(load(out))[0].items()}, done[1]

    def compare(case, folders, weights, kind, geometry, truth=None, given=None, **kw):
        want = truth or exact(folders, weights)
        for who, run in (
            ("PEFT " + kind, lambda: peft_merge(folders, given or weights, kind, *size, **kw)),
            ("frechet_merge " + geometry, lambda: ours(folders, given or weights, geometry)),
        ):
            try:
                s, got, mib = run()
            except Exception as e:
                rows.append(
                    {
                        "case": case,
                        "who": who,
                        "seconds": "",
                        "extra MiB": "",
                        "distance from the mean": f"refused: {type(e).__name__}",
                    }
                )
                continue
            rows.append(
                {
                    "case": case,
                    "who": who,
                    "seconds": f"{s:.4f}",
                    "extra MiB": f"{mib:.0f}",
                    "distance from the mean": f"{distance(got, want):.8f}",
                }
            )

    plain = [make(work/f"p{i}", i, *size) for i in range(5)]
    compare("plain, to rank 16", plain, ws, "svd", "LoRA(rank=16)", svd_rank=RANK)
    done = sorted(our_merge(plain, ws, None, "LoRA(rank=16)") for _ in range(runs))[runs//2]
    rows.append(
        {
            "case": "plain, to rank 16",
            "who": "frechet_merge LoRA(rank=16), result in memory",
            "seconds": f"{done[0]:.4f}",
            "extra MiB": f"{done[1]:.0f}",
            "distance from the mean": "",
        }
    )
    compare("plain", plain, ws, "linear", "LoRA()")
    compare(
        "rsLoRA",
        [make(work/f"r{i}", i, *size, use_rslora=True) for i in range(5)],
        ws,
        "linear",
        "LoRA()",
    )
    compare(
        "mixed scaling",
        [make(work/f"s{i}", i, *size, lora_alpha=a) for i, a in enumerate((4, 8, 16, 32, 64))],
        ws,
        "linear",
        "LoRA()",
    )
    rs = [work/f"r{i}" for i in range(5)]
    compare("rsLoRA", rs, ws, "cat", "LoRA()")
    compare(
        "different ranks",
        [
            make(work/f"d{i}", i, *size, r=r, lora_alpha=16)
            for i, r in enumerate((4, 8, 16, 32, 64))
        ],
        ws,
        "linear",
        "LoRA()",
    )
    compare("one weight too few", plain, ws, "cat", "LoRA()", given=ws[:4])
    write_rows("adapters_layer", rows, about("python bench/adapters.py layer"))


def scale(work, runs=1):
    "T grows at full size; then hidden and MLP shrink at T = 20, for one layer."
    rows = []
    full = (4096, 11008, 32)
    folders = [make(work/f"a{i}", i, *full, dtype=torch.bfloat16) for i in range(50)]
    for T in (5, 10, 20, 50):
        for g in ("LoRA(rank=16)", *(["LoRA()"] if T in (5, 20) else [])):
            s, mib, total = our_merge(folders[:T], None, work/"out", g)
            rows.append(
                {
                    "adapters": T,
                    "hidden": full[0],
                    "MLP": full[1],
                    "layers": full[2],
                    "geometry": g,
                    "seconds": f"{s:.1f}",
                    "peak MiB": f"{total:.0f}",
                }
            )
            print(rows[-1], flush=True)
            shutil.rmtree(work/"out")
    for f in folders:
        shutil.rmtree(f)
    for k in (1, 2, 4, 8):
        size = (512*k, 1376*k, 4)
        some = [make(work/f"k{k}_{i}", i, *size, dtype=torch.bfloat16) for i in range(20)]
        s, mib, total = our_merge(some, None, work/"out", "LoRA(rank=16)")
        rows.append(
            {
                "adapters": 20,
                "hidden": size[0],
                "MLP": size[1],
                "layers": 4,
                "geometry": "LoRA(rank=16)",
                "seconds": f"{s:.2f}",
                "peak MiB": f"{total:.0f}",
            }
        )
        print(rows[-1], flush=True)
        for f in some:
            shutil.rmtree(f)
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

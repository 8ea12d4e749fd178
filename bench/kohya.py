"""Twenty LoRAs of SDXL's shapes in kohya's spelling into one file.

    python bench/kohya.py [--files 20] [--rank 32] [--mecha PYTHON]     writes
        bench/results/kohya.csv

Writes synthetic files (722 modules, float16, independent random factors: of all updates those whose
mean is hardest to cut) to a temporary folder and merges them, each time in a process of its own:
by frechet-merge; by forming each mean update and taking its SVD, as scripts for kohya's files do,
on a few of the modules; and by sd-mecha's `n_average`, which averages factors, with --mecha PYTHON,
a python that has it. What is written is compared with the mean of the updates, in float64, on the
few modules that all have: no adapter of this rank is nearer than the SVD's."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from adapters import about, write_rows
from extract import run
from safetensors import safe_open
from safetensors.torch import save_file


# of the UNet's transformers: (name, width, number of blocks)
UNET = [
    ("down_blocks_1_attentions_0", 640, 2),
    ("down_blocks_1_attentions_1", 640, 2),
    ("down_blocks_2_attentions_0", 1280, 10),
    ("down_blocks_2_attentions_1", 1280, 10),
    ("mid_block_attentions_0", 1280, 10),
    ("up_blocks_0_attentions_0", 1280, 10),
    ("up_blocks_0_attentions_1", 1280, 10),
    ("up_blocks_0_attentions_2", 1280, 10),
    ("up_blocks_1_attentions_0", 640, 2),
    ("up_blocks_1_attentions_1", 640, 2),
    ("up_blocks_1_attentions_2", 640, 2),
]
CROSS = 2048  # what the text encoders say of a token


def shapes():
    "Name → (outputs, inputs) of the 722 modules that kohya's trainer adapts in the UNet."
    found = {}
    for place, n, blocks in UNET:
        stem = f"lora_unet_{place}"
        found |= {f"{stem}_proj_in": (n, n), f"{stem}_proj_out": (n, n)}
        for i in range(blocks):
            block = f"{stem}_transformer_blocks_{i}"
            for attention, inputs in (("attn1", n), ("attn2", CROSS)):
                found[f"{block}_{attention}_to_q"] = (n, n)
                found[f"{block}_{attention}_to_k"] = (n, inputs)
                found[f"{block}_{attention}_to_v"] = (n, inputs)
                found[f"{block}_{attention}_to_out_0"] = (n, n)
            found[f"{block}_ff_net_0_proj"] = (8*n, n)
            found[f"{block}_ff_net_2"] = (n, 4*n)
    return found


def write(path, rank, seed, every):
    g, state = torch.Generator().manual_seed(seed), {}
    for name, (m, n) in [*shapes().items()][::every]:
        state[f"{name}.lora_down.weight"] = torch.randn(rank, n, generator=g).half()/n**0.5
        state[f"{name}.lora_up.weight"] = torch.randn(m, rank, generator=g).half()/100
        state[f"{name}.alpha"] = torch.tensor(rank/2).half()
    save_file(state, path)


MECHA = """
import sys, sd_mecha
*files, out = sys.argv[1:]
mean = sd_mecha.n_average(*map(sd_mecha.model, files))
sd_mecha.merge(mean, output=out, merge_device="cpu", merge_dtype=None, threads=2)
"""
DENSE = """
import sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
*files, out, rank, stems = sys.argv[1:]
rank = int(rank)
opened, merged = [safe_open(f, "pt") for f in files], {}
for stem in stems.split(","):
    total = 0
    for f in opened:
        up, down = (f.get_tensor(f"{stem}.lora_{x}.weight").float() for x in ("up", "down"))
        total = total + f.get_tensor(f"{stem}.alpha").float()/len(down)/len(opened)*(up @ down)
    U, S, V = torch.linalg.svd(total, full_matrices=False)
    root = S[:rank].sqrt()
    merged[f"{stem}.lora_up.weight"] = (U[:, :rank]*root).half().contiguous()
    merged[f"{stem}.lora_down.weight"] = (V[:rank]*root[:, None]).half().contiguous()
    merged[f"{stem}.alpha"] = torch.tensor(float(rank)).half()
save_file(merged, out)
"""


def factors(file, stem):
    "One update as two thin matrices, in float64."
    up, down = (file.get_tensor(f"{stem}.lora_{x}.weight").double() for x in ("up", "down"))
    return float(file.get_tensor(f"{stem}.alpha"))/len(down)*up, down


def length(B, A):
    "‖B·A‖ of thin factors."
    return float(torch.linalg.matrix_norm(torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1].T))


def distance(out, files, every):
    "How far what was written is from the mean of the updates, relative to it; of some modules."
    opened, result, far, total = [safe_open(f, "pt") for f in files], safe_open(out, "pt"), 0.0, 0.0
    for stem in [*shapes()][::every]:
        given = [factors(f, stem) for f in opened]
        B = torch.cat([b/len(given) for b, _ in given], 1)
        A = torch.cat([a for _, a in given])
        b, a = factors(result, stem)
        far += length(torch.cat([B, -b], 1), torch.cat([A, a]))**2
        total += length(B, A)**2
    return (far/total)**0.5


def row(who, every, sampled, files, out, words):
    "What one merge took, and what came out."
    seconds, computed, peak = run(words)
    modules = len([*shapes()][::every])
    found = {
        "who": who,
        "files": len(files),
        "modules": modules,
        "seconds": f"{seconds:.1f}",
        "processor seconds": f"{computed:.1f}",
        "a module, ms": f"{1000*computed/modules:.0f}",
        "peak GB": f"{peak:.2f}",
        "distance from the mean": f"{distance(out, files, sampled):.5f}",
    }
    print(found, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--every", type=int, default=1, help="take one of so many modules")
    parser.add_argument("--dense", type=int, default=60, help="of so many, the dense way does one")
    parser.add_argument("--mecha", help="a python that has sd-mecha")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder)/f"{i}.safetensors" for i in range(asked.files)]
        for i, file in enumerate(files):
            write(file, asked.rank, i, asked.every)
        few = asked.every*asked.dense
        out, python = Path(folder)/"out.safetensors", sys.executable
        words = [python, "-m", "frechet_merge", "merge", *files, "--quiet"]
        words += ["--geometry", f"lora:rank={asked.rank}", "-o", out]
        rows = [row("frechet-merge", asked.every, few, files, out, words)]
        out = Path(folder)/"dense.safetensors"
        stems = ",".join([*shapes()][::few])
        words = [python, "-c", DENSE, *files, out, asked.rank, stems]
        rows.append(row("dense SVD", few, few, files, out, words))
        if asked.mecha:
            out = Path(folder)/"mecha.safetensors"
            words = [asked.mecha, "-c", MECHA, *files, out]
            rows.append(row("sd-mecha, n_average", asked.every, few, files, out, words))
    command = f"python bench/kohya.py --files {asked.files} --rank {asked.rank}"
    command += f" --every {asked.every} --dense {asked.dense}"
    command += " --mecha PYTHON-WITH-SD-MECHA" if asked.mecha else ""
    write_rows("kohya", rows, about(command))


if __name__ == "__main__":
    main()

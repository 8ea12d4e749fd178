"""Twenty LoRAs of SDXL's shapes in kohya's spelling into one file.

    python bench/kohya.py [--files 20] [--rank 32] [--every 1]

Writes synthetic files (about 700 modules, float16) to a temporary folder, merges them in a process
of its own, and prints its seconds and its largest resident memory.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--every", type=int, default=1, help="take one of so many modules")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder)/f"{i}.safetensors" for i in range(asked.files)]
        for i, file in enumerate(files):
            write(file, asked.rank, i, asked.every)
        size = files[0].stat().st_size/1e6
        count = len([*shapes()][:: asked.every])
        print(f"{len(files)} files of {count} modules, {size:.0f} MB each")
        words = ["-m", "frechet_merge", "merge", *map(str, files), "--quiet"]
        words += ["--geometry", f"lora:rank={asked.rank}", "-o", f"{folder}/out.safetensors"]
        start = time.time()
        subprocess.run([sys.executable, *words], check=True)
        seconds = time.time() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{seconds:.1f} s, of which {used.ru_utime + used.ru_stime:.1f} s of computing, "
            f"{used.ru_maxrss/1e6:.2f} GB resident"
        )


if __name__ == "__main__":
    main()

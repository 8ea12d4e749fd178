"""What several test modules use: small checkpoints on disk, and the command line as users run
it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# beside others, each process keeps to one core, and so do those that it starts
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def tensors(seed=0, dtype=torch.float32, hidden=8, vocab=11):
    """A small model with ragged shapes: a matrix, an embedding, a vector, a scalar, an empty tensor
    and integers."""
    g = torch.Generator().manual_seed(seed)

    def r(*s):
        return torch.randn(*s, generator=g).to(dtype)

    return {
        "emb.weight": r(vocab, hidden),
        "q.weight": r(hidden, hidden + 3),
        "q.bias": r(hidden),
        "s": r(1).abs().reshape(()),
        "none": torch.empty(0, dtype=dtype),
        "ids": torch.arange(vocab),
    }


def save(folder, state, config=None, **names):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        folder/"model.safetensors",
        metadata={"format": "pt"},
    )
    if config is not None:
        (folder/"config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def models(tmp_path):
    "Three checkpoints in folders m0, m1, m2."
    return [
        save(tmp_path/f"m{i}", tensors(i), {"model_type": "toy", "vocab_size": 11})
        for i in range(3)
    ]


def cli(*args, cwd=None, **kw):
    "Run `frechet-merge`: exit code, output, error output."
    r = subprocess.run(
        [sys.executable, "-m", "frechet_merge", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        **kw,
    )
    return r.returncode, r.stdout, r.stderr

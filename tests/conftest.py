"""What several test modules use: small checkpoints on disk, and the command line as users run
it."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from forked import can_be_forked, command
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# beside others, each process keeps to one core, and so do those that it starts
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# of a small model of language, as its config says it
LLAMA = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=48,
    tie_word_embeddings=False,
)


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
    words, env = [*map(str, args)], dict(kw.get("env") or os.environ)
    if {*kw} <= {"env"} and can_be_forked(env):
        code, out, err = command(words, cwd, env)
    else:
        whole = [sys.executable, "-m", "frechet_merge", *words]
        r = subprocess.run(whole, cwd=cwd, capture_output=True, text=True, **kw)
        code, out, err = r.returncode, r.stdout, r.stderr
    SAID.append(out + err)
    return code, out, err


def remedies():
    "(module:function, words, test) for each remedy in `remedies.txt`; a test in brackets is none."
    place = words = ""
    for line in (ROOT/"tests"/"remedies.txt").read_text().splitlines():
        if not line.startswith(" "):
            place, words = line, ""
        elif not words:
            words = line.strip()
        else:
            yield place, words, line.strip()
            words = ""


# test → what is said in it
TRIED: dict[str, list[str]] = {}
for _, of_message, named in remedies():
    TRIED.setdefault(named, []).append(of_message)

# what errors and warnings said in the test that runs
SAID: list[str] = []


class Heard:
    "`pytest.raises`, written down."

    def __init__(self, context):
        self.context = context

    def __enter__(self):
        return self.context.__enter__()

    def __exit__(self, kind, error, trace):
        SAID.append(str(error))
        return self.context.__exit__(kind, error, trace)


@pytest.fixture(autouse=True)
def said(request, monkeypatch):
    "A test that is said to try a remedy meets the message that offers it."
    # with the group of the test behind it, where several processes share the tests
    name = re.sub(r"@\w+$", "", request.node.nodeid)
    expected = TRIED.get(name.removeprefix("tests/"), [])
    # one of a name with parameters is not asked: others of them may meet it
    if expected:
        raises, warn = pytest.raises, warnings.warn

        def warned(message, category=None, stacklevel=1, **how):
            SAID.append(str(message))
            return warn(message, category, stacklevel + 1, **how)

        monkeypatch.setattr(pytest, "raises", lambda *args, **how: Heard(raises(*args, **how)))
        monkeypatch.setattr(warnings, "warn", warned)
    SAID.clear()
    yield
    silent = [words for words in expected if not any(words in text for text in SAID)]
    assert not silent, f"no message says {silent}"

"""Merges that are killed at random moments, and resumed.

    python bench/kills.py [--kills 200]

Three models are merged by the command line, once undisturbed. Then the same command is started,
killed by SIGKILL after a random part of the time that the undisturbed one took, and run again with
--resume until it ends. What comes out is compared with the undisturbed output, file by file; of the
record the seconds are left out, and of the record and the card the name of the folder. Also counted
is whether anything is left beside the output, how many tensors were not made again, and how far the
process was when it was killed.

Writes bench/results/kills.csv (a row for each kill) and kills.json (the counts)."""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from adapters import about, write_rows

from frechet_merge.files.shards import save_tensors

FIELDS = ("kill", "after s", "state", "tensors kept", "same", "left over")
MODELS = ("A", "B", "C")
TENSORS, SIDE = 150, 600


def make(folder: Path, seed: int):
    "A model of some 200 MB."
    g = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {f"layer.{i}.weight": torch.randn(SIDE, SIDE, generator=g) for i in range(TENSORS)}
    save_tensors(folder/"model.safetensors", tensors)
    (folder/"config.json").write_text(json.dumps({"model_type": "none"}))


def command(out: str) -> list[str]:
    "What a user types."
    words = [sys.executable, "-m", "frechet_merge", "merge", *MODELS, "-o", out]
    return [*words, "--geometry", "sphere", "--shard-size", "20MB", "--resume"]


def contents(folder: Path) -> dict[str, bytes]:
    "Its files, without what a clock says."
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    record = json.loads(found.pop("frechet_merge.json"))
    record["seconds"] = 0
    return found | {"record": json.dumps(record).encode()}


def state_of(work: Path) -> tuple[str, int]:
    "How far a killed process was, and how many tensors it had entered."
    if (work/"out").exists():
        return "after the end", TENSORS
    left = [*work.glob(".out.*.partial")]
    if not left:
        return "before it wrote", 0
    journal = left[0]/"journal"
    lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
    return "among the tensors", lines


def one_kill(work: Path, number: int, seconds: float, expected: dict) -> dict:
    "Start, kill, resume, compare."
    after = random.uniform(0.4, 1.1)*seconds
    process = subprocess.Popen(
        command("out"), cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(after)
    process.kill()
    process.wait()
    state, kept = state_of(work)
    done = subprocess.run(command("out"), cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"kill {number}: {done.stderr}")
    same = contents(work/"out") == expected
    shutil.rmtree(work/"out")
    left = sorted(p.name for p in work.iterdir() if p.name not in MODELS)
    return dict(zip(FIELDS, (number, round(after, 3), state, kept, same, " ".join(left))))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    kills = parser.parse_args().kills
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for seed, name in enumerate(MODELS):
            make(work/name, seed)
        since = time.monotonic()
        subprocess.run(command("out"), cwd=work, check=True, capture_output=True)
        seconds = time.monotonic() - since
        expected = contents(work/"out")
        shutil.rmtree(work/"out")
        rows = [one_kill(work, i, seconds, expected) for i in range(kills)]
    counts = {
        "kills": kills,
        "same output": sum(r["same"] for r in rows),
        "nothing left over": sum(not r["left over"] for r in rows),
        "killed": dict(Counter(r["state"] for r in rows)),
        "tensors kept": sum(r["tensors kept"] for r in rows),
    }
    write_rows("kills", rows, about(f"python bench/kills.py --kills {kills}", **counts))
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()

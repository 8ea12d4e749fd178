"""Random changes to models, adapters and recipes, for as long as is asked.

    python bench/fuzz.py [--seconds 3600] [--first 0] [COMMAND …]     writes bench/results/fuzz.csv

Each seed changes one thing in what one command reads, and runs the command in a process of its own,
as `tests/test_mutated.py` does for a minute. What is counted as wrong: an exception that was not
foreseen, no end within 20 seconds of processor time (120 by the clock), memory above 1.5 GB beside
what the process had, a file that was opened elsewhere, an exit code or a message that is not one of
ours, something left behind. The counts are written once a minute, with the seconds so far."""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from adapters import about, write_rows

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
from mutated import TARGETS, build, mutate, run, warm, wrong_with  # noqa: E402


def tried(name, seed, whole):
    "What was changed, and what the command did with it."
    rng = Random(seed)
    with tempfile.TemporaryDirectory() as tmp:
        folder = shutil.copytree(whole, Path(tmp)/"all")
        changed = mutate(folder/rng.choice(TARGETS[name].changed), rng)
        heard = run(TARGETS[name].words, folder)
        wrong = wrong_with(heard, folder)
    return changed, heard, wrong


def record(asked, counts, seed, seconds):
    "Write what was counted so far."
    verdicts = ("done", "refused", "wrong")
    rows = [{"command": n} | {v: counts[n, v] for v in verdicts} for n in asked.commands]
    command = f"python bench/fuzz.py --seconds {asked.seconds} --first {asked.first}"
    ran = {"seconds run": round(seconds), "seeds": [asked.first, seed - 1]}
    write_rows("fuzz", rows, about(command, commit=commit(), **ran))


def commit():
    "That is checked out here."
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("commands", nargs="*", default=list(TARGETS))
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--first", type=int, default=0, help="seed")
    asked = parser.parse_args()
    warm()
    start, counts, seed = time.time(), Counter(), asked.first
    written = start
    with tempfile.TemporaryDirectory() as tmp:
        for name in asked.commands:
            build(Path(tmp)/name, TARGETS[name])
        while time.time() - start < asked.seconds:
            for name in asked.commands:
                changed, heard, wrong = tried(name, seed, Path(tmp)/name)
                verdict = "done" if heard.code == 0 else "refused"
                counts[name, "wrong" if wrong else verdict] += 1
                if wrong:
                    print(f"== {name} {seed} ({changed}): {wrong}\n{heard.text[:500]}", flush=True)
            seed += 1
            if time.time() - written > 60:
                written = time.time()
                record(asked, counts, seed, written - start)
    record(asked, counts, seed, time.time() - start)


if __name__ == "__main__":
    main()

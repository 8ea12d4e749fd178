"""Workers that are killed while they merge, by Ray and as processes.

    python bench/worker_kills.py [--kills 10] [--executors ray processes]

Three models are merged by the command line, once by threads. Then they are merged by other
processes, and every few moments one that has a tensor in its hands is killed by SIGKILL. When the
merge ends, its tensors are compared with the undisturbed ones, byte by byte, and so are its config,
its index and its record (but for the seconds). Merges go on until enough workers were killed.

Writes bench/results/worker_kills.csv (a row for each merge) and worker_kills.json."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adapters import about, write_rows
from kills import contents, make, MODELS

FIELDS = ("executor", "merge", "workers killed", "said to be done again", "same", "left over")


def command(out: str, executor: str) -> list[str]:
    "What a user types."
    words = [sys.executable, "-m", "frechet_merge", "merge", *MODELS, "-o", out]
    return [*words, "--geometry", "sphere", "--shard-size", "20MB", "--executor", executor]


def processes() -> dict[int, tuple[int, str]]:
    "Of each process its parent and its command."
    found = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        try:
            stat = (place/"stat").read_text()
            line = (place/"cmdline").read_bytes().replace(b"\0", b" ").decode("utf8", "replace")
        # it ended
        except OSError:
            continue
        found[int(place.name)] = int(stat.rpartition(")")[2].split()[1]), line
    return found


def writes(pid: int) -> bool:
    "Whether a process has a file of the output open: it is past its imports."
    try:
        return any(".partial/" in os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def workers_of(driver: int) -> list[int]:
    "Processes that merge a tensor for a process."
    every = processes()

    def is_of(pid: int) -> bool:
        while pid in every and pid != driver:
            pid = every[pid][0]
        return pid == driver

    words = ("ray::layer", "serve(int(sys.argv[1]))")
    found = [pid for pid, (_, line) in every.items() if any(w in line for w in words)]
    return [pid for pid in found if is_of(pid) and writes(pid)]


def killed_while(driver: subprocess.Popen, out: Path, most: int) -> int:
    "How many workers were killed before a merge ended."
    count = 0
    while driver.poll() is None:
        time.sleep(random.uniform(0.05, 0.4))
        is_under_way = any(out.parent.glob(f".{out.name}.*.partial/merge/*.safetensors"))
        found = workers_of(driver.pid) if is_under_way and count < most else []
        if found:
            os.kill(random.choice(found), signal.SIGKILL)
            count += 1
            # so that no tensor is hit again and again: four times end a merge
            time.sleep(random.uniform(3, 6))
    return count


def tensors_of(folder: Path) -> dict[str, bytes]:
    "What is compared: all but the card, which says how the merge was asked for."
    return {k: v for k, v in contents(folder).items() if k != "README.md"}


def one(work: Path, executor: str, number: int, most: int, expected: dict) -> dict:
    "A merge whose workers are killed."
    words = command("out", executor)
    with open(work/"said", "w+") as said:
        driver = subprocess.Popen(words, cwd=work, stdout=subprocess.DEVNULL, stderr=said)
        count = killed_while(driver, work/"out", most)
        said.seek(0)
        text = said.read()
    # it waits for itself for 30 s, and not longer
    if "Ray did not start" in text:
        return {}
    if driver.returncode:
        raise SystemExit(f"{executor}, merge {number}: {text}")
    same = tensors_of(work/"out") == expected
    shutil.rmtree(work/"out")
    left = sorted(p.name for p in work.iterdir() if p.name not in (*MODELS, "said"))
    again = " ".join(text.split()).count("it is done again")
    return dict(zip(FIELDS, (executor, number, count, again, same, " ".join(left))))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--executors", nargs="+", default=["ray", "processes"])
    asked = parser.parse_args()
    random.seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for seed, name in enumerate(MODELS):
            make(work/name, seed)
        subprocess.run(command("out", "threads"), cwd=work, check=True, capture_output=True)
        expected = tensors_of(work/"out")
        shutil.rmtree(work/"out")
        for executor in asked.executors:
            killed = 0
            while killed < asked.kills:
                row = one(work, executor, len(rows) + 1, asked.kills - killed, expected)
                if not row:
                    continue
                killed += row["workers killed"]
                rows.append(row)
                print(row, flush=True)
    counts = {
        "workers killed": {
            e: sum(r["workers killed"] for r in rows if r["executor"] == e)
            for e in asked.executors
        },
        "merges": len(rows),
        "same output": sum(r["same"] for r in rows),
        "nothing left over": sum(not r["left over"] for r in rows),
    }
    words = f"python bench/worker_kills.py --kills {asked.kills}"
    write_rows("worker_kills", rows, about(words, **counts))
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()

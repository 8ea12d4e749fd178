"""frechet-merge beside mergekit and cat, whole commands on the same files, one after the other,
several times.

    python -m venv /tmp/mk && /tmp/mk/bin/pip install -c constraints.txt torch &&
        /tmp/mk/bin/pip install mergekit==0.1.5 torch==2.13.0
    python bench/peers.py --mergekit /tmp/mk/bin/mergekit-yaml

makes five Llama-layout bf16 checkpoints (bench/llama.py) under --work, times every command --runs
times in turn, and writes bench/results/peers.csv (one row per command: median, minimum and maximum
seconds, peak memory in MiB, error against float64) and peers.json (versions, machine). Read ratios,
not seconds: a command and its peers ran side by side on one machine."""

import argparse
import csv
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from frechet_merge import load

sys.path.insert(0, str(Path(__file__).parent))
import llama  # noqa: E402

HERE = Path(__file__).parent


# a child's peak begins at its parent's memory: this one has no torch
LAUNCH = """
import json, os, subprocess, sys, time
start = time.perf_counter()
log = open(sys.argv[1], "w")
p = subprocess.Popen(sys.argv[2:], stdout=log, stderr=subprocess.STDOUT)
_, status, used = os.wait4(p.pid, 0)
seconds, code = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
print(json.dumps({
    "seconds": seconds, "peak MiB": used.ru_maxrss/1024, "cpu s": used.ru_utime + used.ru_stime,
    "read MB": used.ru_inblock*512/1e6, "written MB": used.ru_oublock*512/1e6, "code": code,
}))
"""


def measured(command, cwd, log):
    "What a command took, which must succeed: seconds, memory, and what it moved from and to disks."
    r = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCH, log, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    found = json.loads(r.stdout)
    if found.pop("code"):
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{Path(log).read_text()[-2000:]}")
    return found


def run(command, cwd, log):
    "Wall seconds and peak resident MiB of a command, which must succeed."
    found = measured(command, cwd, log)
    return found["seconds"], found["peak MiB"]


def karcher_float64(xs):
    "Dense reference: Karcher mean of directions, mean norm, in float64, equal weights."
    x = torch.stack([t.double().flatten() for t in xs])
    n = x.norm(dim=1)
    u = x/n[:, None]
    m = u.mean(0)
    m /= m.norm()
    for _ in range(20):
        c = (u @ m)[:, None]
        p = u - c*m
        s = p.norm(dim=1, keepdim=True)
        v = (p*torch.where(s > 0, torch.atan2(s, c)/s.clamp(min=1e-300), 1)).mean(0)
        k = v.norm()
        if k < 1e-13:
            break
        m = k.cos()*m + k.sin()*v/k
    return (n.mean()*m).view(xs[0].shape)


def errors(models, outs, names):
    """Relative error of each output against float64, over `names`, beside that of rounding the
    exact answer to bf16."""
    models = [load(m) for m in models]
    outs = {k: load(v) for k, v in outs.items()}
    sums = dict.fromkeys([*outs, "rounding Karcher", "rounding linear"], 0.0)
    total = 0.0
    for n in names:
        xs = [m[n] for m in models]
        exact = {
            "Karcher": karcher_float64(xs),
            "linear": torch.stack([x.double() for x in xs]).mean(0),
        }
        total += float(exact["linear"].norm()**2)
        for k, want in exact.items():
            sums[f"rounding {k}"] += float((want.bfloat16().double() - want).norm()**2)
        for k, c in outs.items():
            want = exact["Karcher" if "Karcher" in k else "linear"]
            sums[k] += float((c[n].double() - want).norm()**2)
    return {k: (v/total)**0.5 for k, v in sums.items()}


def our_commands(five, eight, tiny):
    "What we are timed at, and what it is beside: a copy, and the imports."
    merge = [sys.executable, "-m", "frechet_merge", "merge"]
    sphere = ["--geometry", "sphere"]

    def command(models, out, *args):
        return [*merge, *models, "-o", out, "--quiet", *args]

    copy = f"cat {' '.join(files_of(five))} > /dev/null; cp -r {five[0]} cat-out"
    return {
        "cat the inputs, cp one model": ["sh", "-c", copy],
        "frechet-merge Karcher": command(five, "Karcher", *sphere),
        "frechet-merge linear": command(five, "linear"),
        "frechet-merge Karcher, 8 models": command(eight, "Karcher-8", *sphere),
        "frechet-merge linear, 8 models": command(eight, "linear-8"),
        "frechet-merge linear, tiny model": command(tiny, "tiny-linear"),
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "python -c 'import frechet_merge'": [sys.executable, "-c", "import frechet_merge"],
    }


def mergekit_command(mergekit, method, models, out, work):
    "One merge by mergekit, whose recipe is written into `work`."
    more = {"parameters": {"weight": 1.0}} if method == "linear" else {}
    recipe = {
        "models": [{"model": m, **more} for m in models],
        "merge_method": method,
        "dtype": "bfloat16",
    }
    file = work/f"{method}-{out}.yml"
    file.write_text(json.dumps(recipe))
    return [mergekit, str(file), out, "--no-copy-tokenizer", "--quiet"]


def mergekit_commands(mergekit, five, tiny, work):
    "The same of mergekit, whose recipes are written into `work`."

    def command(method, models, out):
        return mergekit_command(mergekit, method, models, out, work)

    return {
        "mergekit Karcher": command("karcher", five, "mk-Karcher"),
        "mergekit linear": command("linear", five, "mk-linear"),
        "mergekit linear, tiny model": command("linear", tiny, "mk-tiny"),
    }


OUTS = "cat-out Karcher linear Karcher-8 linear-8 tiny-linear mk-Karcher mk-linear mk-tiny".split()


def files_of(models):
    return [str(f) for m in models for f in sorted(Path(m).glob("*.safetensors"))]


def timed(commands, inputs, work, runs):
    "Seconds and MiB of each command, in turn, several times."
    seen = {k: [] for k in commands}
    # warm the page cache
    subprocess.run(["sh", "-c", f"cat {' '.join(inputs)} > /dev/null"], check=True)
    for r in range(runs):
        for k, c in commands.items():
            for out in OUTS:
                if out in c or f" {out}" in c[-1]:
                    shutil.rmtree(work/out, ignore_errors=True)
            # no command pays for the pages of the one before it
            os.sync()
            seconds, mib = run(c, work, work/"log")
            seen[k].append((seconds, mib))
            print(f"{r + 1}/{runs} {k}: {seconds:.2f} s, {mib:.0f} MiB", flush=True)
    return seen


def write_table(file, seen, err):
    "A row for each command, and one for each rounding."
    with open(file, "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["command", "median s", "min s", "max s", "peak MiB", "error vs float64"])
        for k, rows in seen.items():
            seconds, mib = zip(*rows)
            times = [statistics.median(seconds), min(seconds), max(seconds)]
            far = f"{err[k]:.3e}" if k in err else ""
            w.writerow([k, *(f"{s:.2f}" for s in times), f"{max(mib):.0f}", far])
        for k in ("rounding Karcher", "rounding linear"):
            w.writerow([f"{k} to bf16", "", "", "", "", f"{err[k]:.3e}"])


def facts(a):
    import frechet_merge

    size = f" --size {a.size}" if a.size != "0.5B" else ""
    return {
        "command": f"python bench/peers.py --mergekit MERGEKIT_YAML{size} --runs {a.runs}",
        "parameters": sum(torch.Size(s).numel() for _, s in llama.layout(a.size)),
        "models": 5,
        "runs": a.runs,
        "frechet_merge": frechet_merge.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "mergekit": "0.1.5" if a.mergekit else None,
    }


def arguments():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--mergekit", help="path of mergekit-yaml; without it only our commands are timed"
    )
    p.add_argument("--work", default="/tmp/frechet_merge_bench")
    p.add_argument("--size", default="0.5B", choices=llama.SIZES)
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--out", default=str(HERE/"results"))
    return p.parse_args()


def main():
    a = arguments()
    work = Path(a.work)
    folders = {size: work/size for size in (a.size, "tiny")}
    for size, folder in folders.items():
        if not folder.exists():
            llama.make(folder, size)
    five, tiny = ([str(f/f"m{i}") for i in range(5)] for f in (work/a.size, work/"tiny"))
    commands = our_commands(five, [five[i % 5] for i in range(8)], tiny)
    outs = {"frechet-merge Karcher": work/"Karcher", "frechet-merge linear": work/"linear"}
    if a.mergekit:
        commands |= mergekit_commands(a.mergekit, five, tiny, work)
        outs |= {"mergekit Karcher": work/"mk-Karcher", "mergekit linear": work/"mk-linear"}
    seen = timed(commands, files_of(five), work, a.runs)
    judged = ("layers.0.", "layers.1.", "model.norm")
    names = [n for n in dict(llama.layout(a.size)) if any(x in n for x in judged)]
    err = errors(five, outs, names)
    out = Path(a.out)
    out.mkdir(exist_ok=True)
    write_table(out/"peers.csv", seen, err)
    (out/"peers.json").write_text(json.dumps(facts(a), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What merges of real experts keep: every geometry of the library, the methods it has to beat, and
PEFT's and mergekit's own code.

    python bench/quality.py all WORK [--images IMAGES]     trains families of experts into WORK,
        and runs every method and size on each of them;
                                                           those of images where
                                                               `images/tasks.py` has written base
                                                               and tasks into IMAGES
    python bench/quality.py FOLDER --tasks TASKS [--heads HEADS] [--base BASE] [--name NAME]
        one family that is there already
    python bench/quality.py FOLDER --tasks TASKS --sizes 2,3,4 [--subsets 3]
        how it goes with the number of models

FOLDER has a folder for each task, with a full model or a PEFT adapter; which tasks, and what is on
their disks, see `experts.py`. Where a method has a scale, the one is taken that is best on
validation examples; its grid is widened until the best is inside of it, six times at most. What is
reported are other examples: mean accuracy over the tasks; the worst task, and the mean task,
relative to its own expert; the difference from tuned TSV-M with its standard error, from a paired
bootstrap over examples; CPU seconds of one merge in memory, on one thread, without statistics; of
PEFT with loading the adapters, and of mergekit the whole command and the baking of adapters before
it; with --memory, by how many MiB that merge raised the process's resident memory at most, beyond
experts and statistics (which are in it). Texts that repeat one that an expert was trained on, or
that chose a scale, are not reported. Standard errors are over examples: neither over trainings nor
over choices of scale. Statistics are those of `frechet_merge.curvature`, from 64 training examples
of each task, whose labels only the empirical ones see. Rows "by outputs" take the setting whose
outputs are nearest to the experts' on 64 other examples (`frechet_merge.tune`), and see no label.
KFAC means without a closed form are solved to a relative residual of 1e-2. With --mergekit PATH,
mergekit-pytorch runs beside. Finished rows are kept in WORK or --cache FILE, from which a run goes
on; where that is lost, rows that are not run stay in the results as they are, if base and experts
are exactly as good on every task there."""

import argparse
import csv
import ctypes
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from adapters import about, write_rows
from experts import SAMPLES, VALIDATION, Images, Text

from frechet_merge import LoRA, Span, Sphere, load, merge, metrics
from frechet_merge.adapters.baking import bake
from frechet_merge.geometries.baselines import KnOTS, TSVM, ties
from frechet_merge.geometries.fisher import Curved, pullback
from frechet_merge.geometries.subspace import EpiMer
from frechet_merge.spaces.mean import frechet_mean
from frechet_merge.metrics.kinds import Diagonal
from frechet_merge.metrics.kronecker import Kronecker
from frechet_merge.tuning.tune import nearest

HERE = Path(__file__).parent
BOOT = 2000
WIDER = 6
ROUNDING = 1e-5
LONG = 120
CURVE = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
metrics.SOLVED = 1e-2/torch.finfo(torch.float32).eps
TASKS = HERE/"demo"/"tasks.json.gz"
ADAPTERS = ["--rank", "8", "--targets", "query,key,value,dense"]


def families(work, images):
    "Name and experts, which are trained first where they are not there."
    for name, how in (("text_full", ["--full"]), ("text_lora", ADAPTERS)):
        if not (work/name/"heads.safetensors").exists():
            shutil.rmtree(work/name, ignore_errors=True)
            subprocess.run(
                [
                    sys.executable,
                    HERE/"demo"/"train.py",
                    "--share",
                    ".6",
                    *how,
                    "--out",
                    work/name,
                ],
                check=True,
            )
        yield name, Text(work/name, TASKS)
    for kind, how in (("full", ["--full"]), ("lora", ["--rank", "8"])) if images else ():
        subprocess.run([sys.executable, HERE/"images"/"train.py", images, *how], check=True)
        yield f"images_{kind}", Images(images/kind, images/"tasks")


def merged(ex, g, stats=None, use="both", names=None, whole=False):
    """Tensor → merged difference; tensors without a metric, where there should be one, by their
    plain mean. Of whole weights if asked."""
    names = names or ex.names
    out = {}
    for k, w in ex.W.items():
        x = [ex.delta[n][k] for n in names]
        if not any(d.any() for d in x):
            continue
        Gs = None if stats is None else [metric(stats[n], k, use) for n in names]
        if Gs is not None and None in Gs or stats is None and x[0].dim() < 2 and not whole:
            out[k] = sum(x)/len(x)
            continue
        chart, tol = g.chart([w + d for d in x] if whole else x, Gs), 1e-2 if Gs else 1e-10
        mean = frechet_mean(chart.space, chart.points, [1.0]*len(names), tol=tol, warn=False)
        m = chart.lift(mean.x)
        out[k] = m - w if whole else m
    return out


def metric(s, k, use):
    if k in s:
        return Diagonal(s[k])
    return (
        Kronecker(
            (
                s.get(f"{k}.left") if use != "inputs" else None,
                s.get(f"{k}.right") if use != "outputs" else None,
            )
        )
        if f"{k}.right" in s
        else None
    )


def difference(ex, state):
    return {k: state[k].float() - w for k, w in ex.W.items()}


def adapter(ex, g, **how):
    return difference(ex, bake(load(ex.base), merge(ex.folders, g, dtype="fp32", **how).tensors))


def peft(ex, kind, **how):
    "The base with `add_weighted_adapter` on it."
    from peft import PeftModel
    from transformers import AutoModel

    model = PeftModel.from_pretrained(
        AutoModel.from_pretrained(ex.base, **ex.options), str(ex.folders[0]), adapter_name="a0"
    )
    for i, f in enumerate(ex.folders[1:], 1):
        model.load_adapter(str(f), f"a{i}")
    model.add_weighted_adapter(
        [f"a{i}" for i in range(len(ex.names))],
        [1/len(ex.names)]*len(ex.names),
        "m",
        combination_type=kind,
        **how,
    )
    model.set_adapter("m")
    return difference(ex, model.merge_and_unload().state_dict())


def mergekit(ex, command, method, **parameters):
    """What mergekit-pytorch writes of full checkpoints (adapters: put on the base by us before;
    mergekit-yaml 0.1.5 fails at encoders of this kind)."""
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        models = ex.folders
        if ex.adapters:
            models = [merge([f], LoRA(), bake=ex.base, out=tmp/f.name).out for f in ex.folders]
        each = {k: parameters.pop(k) for k in [*parameters] if k in ("weight", "density")}
        (tmp/"recipe.yml").write_text(
            json.dumps(
                {
                    "models": [
                        {"model": str(Path(m)/"model.safetensors"), "parameters": each}
                        for m in models
                    ],
                    **(
                        {}
                        if method in ("linear", "karcher")
                        else {"base_model": str(Path(ex.base)/"model.safetensors")}
                    ),
                    "merge_method": method,
                    "parameters": parameters,
                    "dtype": "float32",
                }
            )
        )
        r = subprocess.run(
            [command, tmp/"recipe.yml", tmp/"out", "--quiet"],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if r.returncode:
            raise RuntimeError(f"mergekit {method}: {r.stderr[-400:]}")
        return difference(ex, load(tmp/"out"))


def ties_of(ex, names, density=0.2):
    out = {}
    for k in ex.W:
        X = [ex.delta[n][k].reshape(1, -1) for n in names]
        if not any(x.any() for x in X):
            continue
        masks = ties(X, torch.tensor(max(1, int(density*X[0].numel()))), [1.0]*len(X))
        out[k] = (sum(x*m for x, m in zip(X, masks))/sum(masks).clamp(min=1)).view(
            ex.W[k].shape
        )
    return out


def iso_c(ex, names):
    """Iso-C (Marczak et al., arXiv 2502.04959): the sum with all its singular values (of adapters:
    those that are not rounding) replaced by their mean; other tensors by the mean."""
    out = {}
    for k in ex.W:
        x = [ex.delta[n][k] for n in names]
        if not any(d.any() for d in x):
            continue
        if x[0].dim() < 2:
            out[k] = sum(x)/len(x)
            continue
        U, S, Vt = torch.linalg.svd(sum(x), full_matrices=False)
        r = int((S > ROUNDING*S[0]).sum())
        out[k] = S[:r].mean()*(U[:, :r] @ Vt[:r])
    return out


def spectral(ex, names):
    """How large the sum of updates is: the ratio of its spectral norm and the base's weights',
    averaged over matrices."""
    rs = [
        float(torch.linalg.matrix_norm(v, 2)/torch.linalg.matrix_norm(ex.W[k], 2))
        for k, v in total(ex, names).items()
        if v.dim() == 2 and v.any()
    ]
    return sum(rs)/len(rs)


def total(ex, names):
    return {k: sum(ex.delta[n][k] for n in names) for k in ex.W}


def every(delta, s):
    return {k: s*v for k, v in delta.items()}
# means are affine in their anchor


def between(delta, c):
    a, b = delta
    return {k: a[k] + c*(b[k] - a[k]) for k in a}


def matrices(delta, s):
    return {k: s*v if v.dim() > 1 else v for k, v in delta.items()}


class Method(NamedTuple):
    name: str
    code: str
    needs: str
    merge: object  # (statistics, if it has a form) → difference, or whatever `how` reads
    grid: tuple = ()  # settings to choose from
    how: object = every  # (difference, setting) → difference
    form: tuple = ()  # estimator, and number of examples if not SAMPLES, of the statistics
    # in place of a grid: what `merge` returns → {name: number → difference}, of which the outputs
    # choose
    lines: object = None


def core(ex, names, anchors=(4.0,), curve=()):
    """Methods that are run at every number of models; `curve` are anchors that only their accuracy
    is wanted of."""
    T = len(names)
    ends = []
    yield Method("mean", "frechet_merge", "–", lambda: every(total(ex, names), 1/T))
    yield Method(
        "task arithmetic", "frechet_merge", "scale", lambda: total(ex, names), (0.3, 0.42, 0.6)
    )
    yield Method("TIES 20 %", "frechet_merge", "scale", lambda: ties_of(ex, names), (1.0, 1.4, 2.0))
    yield Method(
        "TSV-M",
        "frechet_merge",
        "scale",
        lambda: merged(ex, EpiMer(), names=names),
        (1.0, 1.3, 1.7),
        matrices,
    )
    yield Method("Iso-C", "here", "scale", lambda: iso_c(ex, names), (1.4, 2.0, 2.8), matrices)

    def at(c):
        return lambda S: merged(ex, pullback(c), S, names=names)

    def line(S):
        if not ends:
            ends.extend(at(c)(S) for c in (0.0, 1.0))
        return ends

    for c in anchors:
        yield Method(
            f"pullback(anchor={c:g})",
            "frechet_merge",
            "inputs",
            at(c),
            form=("kronecker", "pullback"),
        )
    for c in curve:
        yield Method(
            f"pullback(anchor={c:g})",
            "frechet_merge",
            "inputs",
            lambda S, c=c: between(line(S), c),
            form=("kronecker", "pullback"),
        )
    yield Method(
        "pullback(), anchor tuned",
        "frechet_merge",
        "inputs, scale",
        line,
        (1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
        between,
        ("kronecker", "pullback"),
    )
    yield Method(
        "TSV-M, by outputs",
        "frechet_merge",
        "inputs",
        lambda: merged(ex, EpiMer(), names=names),
        lines=lambda d: {"": lambda s: matrices(d, s)},
    )

    def sides(S, *which):
        return {
            share: [merged(ex, pullback(c, share=share), S, names=names) for c in (0.0, 1.0)]
            for share in which
        }

    def along(found):
        return {share: (lambda c, ends=ends: between(ends, c)) for share, ends in found.items()}

    for which in (("right",), ("left",), ("right", "left")):
        yield Method(
            f"pullback(share={' or '.join(map(repr, which))}), by outputs",
            "frechet_merge",
            "inputs",
            lambda S, which=which: sides(S, *which),
            form=("kronecker", "pullback"),
            lines=along,
        )


def methods(ex, mergekit_pytorch=None):
    yield from core(ex, ex.names, sorted({4.0, float(len(ex.names))}))
    kron, empirical = ("kronecker", "pullback"), ("diagonal", "empirical")
    yield Method(
        "pullback(share='left')",
        "frechet_merge",
        "inputs",
        lambda S: merged(ex, pullback(share="left"), S),
        form=kron,
    )
    yield Method(
        "pullback(2), outputs only",
        "frechet_merge",
        "inputs",
        lambda S: merged(ex, pullback(2.0, share=None), S, "outputs"),
        form=kron,
    )
    yield Method(
        "pullback(), inputs only",
        "frechet_merge",
        "inputs",
        lambda S: merged(ex, pullback(share=None), S, "inputs"),
        form=kron,
    )
    scales = (1.4, 2.0, 2.8)
    fisher = Curved(normalise=True, damping=0.1)
    yield Method(
        "RegMean",
        "frechet_merge",
        "inputs, scale",
        lambda S: merged(ex, fisher, S, "inputs"),
        scales,
        form=kron,
    )
    at32 = (0.8, 1.1, 1.5)
    for c in ("labeled", "projected"):
        yield Method(
            f"EpiMer, k = 32, {c}, pullback",
            "frechet_merge",
            "inputs, scale",
            lambda S, c=c: merged(ex, EpiMer(32, c, normalise=True, damping=0.05), S),
            at32,
            matrices,
            kron,
        )
    yield Method(
        "pullback(), true Fisher",
        "frechet_merge",
        "inputs",
        lambda S: merged(ex, pullback(), S),
        form=("kronecker", "true"),
    )
    yield Method(
        "Fisher, diagonal",
        "frechet_merge",
        "inputs, scale",
        lambda S: merged(ex, fisher, S),
        scales,
        form=("diagonal", "true"),
    )
    for c in ("labeled", "projected"):
        yield Method(
            f"EpiMer, k = 32, {c}, Fisher",
            "frechet_merge",
            "labels, scale",
            lambda S, c=c: merged(ex, EpiMer(32, c, normalise=True, damping=0.05), S),
            at32,
            matrices,
            empirical,
        )
    yield Method(
        "TSV-M, k = 32", "frechet_merge", "scale", lambda: merged(ex, EpiMer(32)), at32, matrices
    )
    yield Method(
        "Karcher mean of weights",
        "frechet_merge",
        "–",
        lambda: merged(ex, Span(Sphere()), whole=True),
    )
    yield Method(
        "Karcher mean of differences",
        "frechet_merge",
        "scale",
        lambda: merged(ex, Span(Sphere())),
        (1.0, 1.4, 2.0),
    )
    if ex.adapters:
        r = max(load(f).adapter["r"] for f in ex.folders)
        grid = (1.4, 2.0, 2.8)
        for name, g in (
            (f"LoRA(rank={r})", LoRA(rank=r)),
            ("LoRA(metric='mix')", LoRA(metric="mix")),
            ("LoRA(metric='wasserstein')", LoRA(metric="wasserstein")),
            ("LoRA(pinned=0.02)", LoRA(pinned=0.02)),
            ("KnOTS()", KnOTS()),
            ("TSVM()", TSVM()),
        ):
            yield Method(name, "frechet_merge", "scale", lambda g=g: adapter(ex, g), grid)
        for kind, how in (
            ("linear", {}),
            ("cat", {}),
            ("svd", {"svd_rank": r}),
            ("ties", {"density": 0.2}),
        ):
            yield Method(
                f"PEFT {kind}",
                "PEFT",
                "scale",
                lambda kind=kind, how=how: peft(ex, kind, **how),
                grid,
            )
    if mergekit_pytorch:
        for m, how in (
            ("linear", {"weight": 1.0}),
            ("karcher", {}),
            ("task_arithmetic", {"weight": 1.0}),
            ("ties", {"weight": 1.0, "density": 0.2}),
            ("dare_ties", {"weight": 1.0, "density": 0.5}),
            ("breadcrumbs", {"weight": 1.0, "density": 0.9}),
            ("sce", {"select_topk": 0.2}),
            ("model_stock", {}),
        ):
            yield Method(
                f"mergekit {m}",
                "mergekit",
                "scale" if m not in ("linear", "karcher", "model_stock") else "–",
                lambda m=m, how=how: mergekit(ex, mergekit_pytorch, m, **how),
                (0.3, 0.42, 0.6) if m not in ("linear", "karcher", "model_stock") else (),
            )
    yield Method(
        f"pullback(), {4 * SAMPLES} examples",
        "frechet_merge",
        "inputs",
        lambda S: merged(ex, pullback(), S),
        form=(*kron, 4*SAMPLES),
    )
    yield Method(
        "KFAC, pullback",
        "frechet_merge",
        "inputs, scale",
        lambda S: merged(ex, fisher, S),
        scales,
        form=("kronecker", "pullback"),
    )
    yield Method(
        "KFAC, true",
        "frechet_merge",
        "inputs, scale",
        lambda S: merged(ex, fisher, S),
        scales,
        form=("kronecker", "true"),
    )
    yield Method(
        "KFAC, empirical",
        "frechet_merge",
        "labels, scale",
        lambda S: merged(ex, fisher, S),
        scales,
        form=("kronecker", "empirical"),
    )
    yield Method(
        "pullback(share=None)",
        "frechet_merge",
        "inputs",
        lambda S: merged(ex, pullback(share=None), S),
        form=kron,
    )


def resident(what):
    return next(
        int(line.split()[1])/1024
        for line in Path("/proc/self/status").open()
        if line.startswith(what)
    )


def peak(f, *args):
    "By how many MiB a call raises resident memory at most (Linux)."
    # what is free goes back, and the highest mark is now
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    f(*args)
    return resident("VmHWM") - before


def cpu():
    return sum(
        sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def mean(c):
    return sum(float(v.float().mean()) for v in c.values())/len(c)


def run(ex, m, names, stats):
    "Setting, examples right on the reported half, validation accuracy, CPU seconds."
    S = [stats(*m.form)] if m.form else []
    start = cpu()
    first = m.merge(*S)
    s = cpu() - start
    if m.lines:
        lines = m.lines(first)
        found = {
            name: nearest(lambda x, line=line: ex.lost(line(x), names))
            for name, line in lines.items()
        }
        name = min(found, key=lambda k: min(found[k][1].values()))
        x = found[name][0]
        return (
            x if len(lines) == 1 else f"{x:.3g} {name}",
            ex.right(lines[name](x), 1, names),
            min(found[name][1].values()),
            s,
        )
    if not m.grid:
        return None, ex.right(first, 1, names), None, s
    tried = {v: mean(ex.right(m.how(first, v), 0, names)) for v in m.grid}
    for _ in range(WIDER):
        order = sorted(tried)
        best = max(order, key=tried.get)
        end = order.index(best)
        if 0 < end < len(order) - 1:
            break
        new = best**2/order[1] if end == 0 else best**2/order[-2]
        tried[new] = mean(ex.right(m.how(first, new), 0, names))
    best = max(sorted(tried), key=tried.get)
    return best, ex.right(m.how(first, best), 1, names), tried[best], s


def bootstrap(cases, gen, groups):
    """Standard error of the mean of `cases`, each {task: a number for each example}, over resampled
    sources of examples, the same in every case."""
    out = torch.zeros(BOOT)
    for t in dict.fromkeys(t for c in cases for t in c):
        v = sum(c[t].float()/len(c)/len(cases) for c in cases if t in c)
        of = groups(t)
        of = torch.arange(len(v)) if of is None else of.unique(return_inverse=True)[1]
        k = int(of.max()) + 1
        total, size = (torch.zeros(k).index_add(0, of, x) for x in (v, torch.ones(len(v))))
        at = torch.randint(k, (BOOT, k), generator=gen)
        out += total[at].sum(1)/size[at].sum(1)
    return out.std().item()


def shown(c):
    return {n: round(float(x.float().mean()), 3) for n, x in c.items()}


def earlier(name, judged):
    """Rows of the results that are there, and what is said of them, if these ones were exactly as
    good."""
    f = HERE/"results"/f"{name}.csv"
    if not f.exists():
        return {}, {}
    rows = {r["method"]: r for r in csv.DictReader(f.open(newline=""))}
    same = all(rows.get(m, {}).get(n) == str(x) for m, c in judged.items() for n, x in c.items())
    return (rows, json.loads(f.with_suffix(".json").read_text())) if same else ({}, {})


def minus(a, b):
    return {t: a[t].float() - b[t].float() for t in a}


def family(
    ex,
    name,
    cache,
    command,
    only=None,
    mergekit_pytorch=None,
    sizes=(),
    subsets=3,
    finished=False,
    memory=False,
):
    kept = torch.load(cache, weights_only=False) if cache.exists() else {}
    gen = torch.Generator().manual_seed(0)

    def keep(key, make):
        if key not in kept:
            kept[key] = make()
            torch.save(kept, f"{cache}.part")
            os.replace(f"{cache}.part", cache)
        return kept[key]

    held = {}
    spent = keep("statistics", dict)

    def stats(*which):
        if which not in held:
            held.clear()
            start = cpu()
            held[which] = {n: ex.statistics(n, *which) for n in ex.names}
            spent[", ".join(map(str, which))] = round((cpu() - start)/len(ex.names), 1)
        return held[which]

    def fresh(c):
        return {n: v[ex.fresh(n)] for n, v in c.items()}

    judged = keep(
        "experts",
        lambda: [{n: ex.right(ex.delta[n], half, [n])[n] for n in ex.names} for half in (0, 1)],
    )[1]
    own = fresh(judged)
    facts = dict(
        tasks=ex.names,
        samples=SAMPLES,
        validation=VALIDATION,
        reported={n: len(v) for n, v in judged.items()},
    )
    if keep("facts", lambda: facts) != facts:
        raise SystemExit(f"{cache} is of other tasks or examples: delete it.")
    said = about(command, threads=1, **facts | {"reported": {n: len(v) for n, v in own.items()}})

    def relative(c):
        return [float(c[n].float().mean()/own[n].float().mean()) for n in c]

    if not sizes:
        found = {
            "base": ("", "–", (None, fresh(keep("base", lambda: ex.right({}, 1))), None, None)),
            "experts": ("", "–", (None, own, None, None)),
        }
        old, about_old = earlier(
            f"quality_{name}", {m: shown(c) for m, (_, _, (_, c, _, _)) in found.items()}
        )
        for m in methods(ex, mergekit_pytorch or "mergekit-pytorch"):
            chosen = (
                not finished
                and (not only or m.name.startswith(tuple(only)))
                and (mergekit_pytorch or m.code != "mergekit")
            )
            if chosen or m.name in kept:
                try:
                    r = keep(m.name, lambda m=m: run(ex, m, ex.names, stats))
                except Exception as e:
                    if m.code == "frechet_merge":
                        raise
                    print(
                        f"{m.name}: {type(e).__name__}: {str(e).splitlines()[-1][:160]}", flush=True
                    )
                    continue
                r = (r[0], fresh(r[1]), *r[2:4])
                found[m.name] = (m.code, m.needs, r)
                sec = r[3]
                print(
                    f"{m.name:32} "
                    f"{r[0] if r[0] is None or isinstance(r[0], str) else round(r[0], 3)!s:6} "
                    f"validation {r[2] if r[2] is None else round(r[2], 4)!s:6} reported "
                    f"{mean(r[1]):.4f}  {sec:.1f} s",
                    flush=True,
                )
            elif m.name in old:
                found[m.name], sec = None, float(old[m.name]["cpu_s"])
            else:
                continue
            if memory and m.code != "mergekit" and sec < LONG:
                print(
                    f"{m.name:32} "
                    f"{keep((m.name, 'MiB'), lambda m=m: peak(m.merge, *([stats(*m.form)] if m.form else []))):.0f} "
                    "MiB",
                    flush=True,
                )
        rows = []
        for m, one in found.items():
            mib = round(kept[m, "MiB"]) if (m, "MiB") in kept else old.get(m, {}).get("MiB", "")
            if one is None:
                rows.append(old[m] | {"MiB": mib})
                continue
            code, needs, (s, c, _, sec) = one
            d = minus(c, found["TSV-M"][2][1]) if "TSV-M" in found and m != "TSV-M" else None
            rows.append(
                {
                    "method": m,
                    "code": code,
                    "needs": needs,
                    "tuned": "" if s is None else s if isinstance(s, str) else round(s, 3),
                    "mean": round(mean(c), 4),
                    "se": round(bootstrap([c], gen, ex.groups), 4),
                    "worst": round(min(relative(c)), 3),
                    "normalised": round(sum(relative(c))/len(c), 3),
                    "from_tsvm": "" if d is None else round(mean(d), 4),
                    "se_from": "" if d is None else round(bootstrap([d], gen, ex.groups), 4),
                    "cpu_s": "" if sec is None else round(sec, 2),
                    "MiB": mib,
                    **shown(c),
                }
            )
        write_rows(
            f"quality_{name}",
            rows,
            said
            | {
                "statistics_cpu_s_per_task": about_old.get("statistics_cpu_s_per_task", {}) | spent,
                "rows_of_earlier_runs": [m for m, one in found.items() if one is None],
            },
        )
        return
    rows = []
    for T in sizes:
        every_set = list(itertools.combinations(ex.names, T))
        random.Random(T).shuffle(every_set)
        cases, size = {}, []
        for names in every_set[:subsets]:
            if finished and any(
                (T, names, m.name) not in kept for m in core(ex, list(names), (), CURVE)
            ):
                continue
            size.append(keep((T, names), lambda names=names: spectral(ex, names)))
            for m in core(ex, list(names), (), CURVE):
                r = keep((T, names, m.name), lambda m=m, names=names: run(ex, m, names, stats))
                cases.setdefault(m.name, []).append((r[0], fresh(r[1]), *r[2:4]))
            print(T, names, {m: round(mean(r[-1][1]), 4) for m, r in cases.items()}, flush=True)

        def settings(xs):
            return "; ".join(f"{x:.3g}" if isinstance(x, float) else x for x in xs if x is not None)

        for m, rs in cases.items():
            d = [minus(r[1], t[1]) for r, t in zip(rs, cases["TSV-M"])]
            rows.append(
                {
                    "models": T,
                    "method": m,
                    "sets": len(rs),
                    "sum / weights, spectral": settings(size),
                    "tuned": settings(r[0] for r in rs),
                    "mean": round(sum(mean(r[1]) for r in rs)/len(rs), 4),
                    "normalised": round(sum(sum(relative(r[1]))/T for r in rs)/len(rs), 4),
                    "from_tsvm": round(sum(map(mean, d))/len(d), 4),
                    "se_from": round(bootstrap(d, gen, ex.groups), 4) if m != "TSV-M" else "",
                }
            )
    write_rows(f"sizes_{name}", rows, said | {"sets": subsets})


if __name__ == "__main__":
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("folder")
    a.add_argument("work", nargs="?", type=Path)
    a.add_argument("--images", type=Path)
    a.add_argument("--kind", choices=("text", "images"), default="text")
    a.add_argument("--tasks", type=Path)
    a.add_argument("--heads", type=Path)
    a.add_argument("--base")
    a.add_argument("--only", help="these tasks, as a,b,c")
    a.add_argument(
        "--methods",
        help="only those whose name starts with one of these, as a,b (TSV-M too, to compare with)",
    )
    a.add_argument("--name", help="of the results")
    a.add_argument(
        "--finished",
        action="store_true",
        help="run nothing: write the rows that an interrupted run has finished",
    )
    a.add_argument("--sizes")
    a.add_argument(
        "--memory",
        action="store_true",
        help="measure it, of merges that take less than two minutes",
    )
    a.add_argument("--subsets", type=int, default=3)
    a.add_argument("--cache", type=Path)
    a.add_argument("--mergekit")
    args = a.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def numbers(x):
        return tuple(int(n) for n in x.split(",")) if x else ()

    if args.folder == "all":
        args.work.mkdir(parents=True, exist_ok=True)
        for name, ex in families(args.work, args.images):
            for sizes in ((), (2, 3, 4)):
                family(
                    ex,
                    name,
                    args.work/f"{name}{'_sizes' if sizes else ''}.pt",
                    "python bench/quality.py all WORK",
                    None,
                    args.mergekit,
                    sizes,
                )
    else:
        ex = {"text": Text, "images": Images}[args.kind](
            args.folder, args.tasks, args.heads, args.base, args.only and args.only.split(",")
        )
        name = args.name or Path(args.folder).name
        family(
            ex,
            name,
            args.cache or Path(f"{args.folder}.{'sizes' if args.sizes else 'quality'}.pt"),
            f"python bench/quality.py FOLDER --name {name} --kind {args.kind} --tasks TASKS"
            + (f" --sizes {args.sizes} --subsets {args.subsets}" if args.sizes else "")
            + " --mergekit MERGEKIT-PYTORCH"*bool(args.mergekit)
            + " --memory"*args.memory,
            args.methods and args.methods.split(","),
            args.mergekit,
            numbers(args.sizes),
            args.subsets,
            args.finished,
            args.memory,
        )

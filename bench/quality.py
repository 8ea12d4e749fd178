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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from adapters import about, write_rows
from experts import SAMPLES, VALIDATION, Images, Text

from frechet_merge import LoRA, Span, Sphere, load, merge, metrics
from frechet_merge.adapters.baking import bake
from frechet_merge.geometries.baselines import KnOTS, TSVM
from frechet_merge.geometries.fisher import Curved, pullback
from frechet_merge.geometries.subspace import EpiMer
from frechet_merge.geometries.trimmed import ties
from frechet_merge.spaces.mean import frechet_mean
from frechet_merge.metrics.kinds import Diagonal
from frechet_merge.metrics.kronecker import Kronecker
from frechet_merge.tuning.tune import nearest

HERE = Path(__file__).parent
# resamples of a bootstrap; how often a grid is widened; below this a singular value is rounding
BOOT, WIDER, ROUNDING = 2000, 6, 1e-5
# seconds, of a merge whose memory is not measured any more
LONG = 120
# anchors at which only the accuracy is wanted
CURVE = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
metrics.SOLVED = 1e-2/torch.finfo(torch.float32).eps
TASKS = HERE/"demo"/"tasks.json.gz"
ADAPTERS = ["--rank", "8", "--targets", "query,key,value,dense"]


def families(work, images):
    "Name and experts, which are trained first where they are not there."
    for name, how in (("text_full", ["--full"]), ("text_lora", ADAPTERS)):
        if not (work/name/"heads.safetensors").exists():
            shutil.rmtree(work/name, ignore_errors=True)
            train = [sys.executable, HERE/"demo"/"train.py", "--share", ".6"]
            subprocess.run([*train, *how, "--out", work/name], check=True)
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
        if any(d.any() for d in x):
            Gs = None if stats is None else [metric(stats[n], k, use) for n in names]
            out[k] = mean_in(g, x, Gs, w if whole else None)
    return out


def mean_in(g, x, Gs, w):
    "The mean of differences, or of the weights w + difference less w."
    lacks_metrics = Gs is not None and None in Gs
    is_plain = Gs is None and x[0].dim() < 2 and w is None
    if lacks_metrics or is_plain:
        return sum(x)/len(x)
    points, lift = g.chart(x if w is None else [w + d for d in x], Gs)
    tol = 1e-2 if Gs else 1e-10
    m = lift(frechet_mean(g, points, [1.0]*len(x), tol=tol, warn=False).x)
    return m if w is None else m - w


def metric(s, k, use):
    "A tensor's metric in statistics, of both sides or of one; None if it has none."
    if k in s:
        return Diagonal(s[k])
    if f"{k}.right" not in s:
        return None
    left = None if use == "inputs" else s.get(f"{k}.left")
    right = None if use == "outputs" else s.get(f"{k}.right")
    return Kronecker((left, right))


def difference(ex, state):
    return {k: state[k].float() - w for k, w in ex.W.items()}


def adapter(ex, g, **how):
    return difference(ex, bake(load(ex.base), merge(ex.folders, g, dtype="fp32", **how).tensors))


def peft(ex, kind, **how):
    "The base with `add_weighted_adapter` on it."
    from peft import PeftModel
    from transformers import AutoModel

    model = AutoModel.from_pretrained(ex.base, **ex.options)
    model = PeftModel.from_pretrained(model, str(ex.folders[0]), adapter_name="a0")
    for i, f in enumerate(ex.folders[1:], 1):
        model.load_adapter(str(f), f"a{i}")
    T = len(ex.names)
    names = [f"a{i}" for i in range(T)]
    model.add_weighted_adapter(names, [1/T]*T, "m", combination_type=kind, **how)
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
        recipe = mergekit_recipe(ex, models, method, **parameters)
        (tmp/"recipe.yml").write_text(json.dumps(recipe))
        r = subprocess.run(
            [command, tmp/"recipe.yml", tmp/"out", "--quiet"],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if r.returncode:
            raise RuntimeError(f"mergekit {method}: {r.stderr[-400:]}")
        return difference(ex, load(tmp/"out"))


def mergekit_recipe(ex, models, method, **parameters):
    "Weights and densities are of each model, other parameters of the method."
    each = {k: parameters.pop(k) for k in [*parameters] if k in ("weight", "density")}
    files = [str(Path(m)/"model.safetensors") for m in models]
    recipe = {"models": [{"model": f, "parameters": each} for f in files]}
    if method not in ("linear", "karcher"):
        recipe["base_model"] = str(Path(ex.base)/"model.safetensors")
    return recipe | {"merge_method": method, "parameters": parameters, "dtype": "float32"}


def ties_of(ex, names, density=0.2):
    out = {}
    for k in ex.W:
        X = [ex.delta[n][k].reshape(1, -1) for n in names]
        if not any(x.any() for x in X):
            continue
        masks = ties(X, torch.tensor(max(1, int(density*X[0].numel()))), [1.0]*len(X))
        kept = sum(x*m for x, m in zip(X, masks))/sum(masks).clamp(min=1)
        out[k] = kept.view(ex.W[k].shape)
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


def between(delta, c):
    "A mean on the line through two, since means are affine in their anchor."
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


INPUTS = ("kronecker", "pullback")


def ours(name, needs, merge, grid=(), how=every, **more):
    return Method(name, "frechet_merge", needs, merge, grid, how, **more)


def core(ex, names, anchors=(4.0,), curve=()):
    """Methods that are run at every number of models; `curve` are anchors that only their accuracy
    is wanted of."""
    yield from without_statistics(ex, names)
    yield from anchored(ex, names, anchors, curve)
    yield from by_outputs(ex, names)


def without_statistics(ex, names):
    T, grid = len(names), (0.3, 0.42, 0.6)
    yield ours("mean", "–", lambda: every(total(ex, names), 1/T))
    yield ours("task arithmetic", "scale", lambda: total(ex, names), grid)
    yield ours("TIES 20 %", "scale", lambda: ties_of(ex, names), (1.0, 1.4, 2.0))
    yield ours(
        "TSV-M", "scale", lambda: merged(ex, EpiMer(), names=names), (1.0, 1.3, 1.7), matrices
    )
    yield Method("Iso-C", "here", "scale", lambda: iso_c(ex, names), (1.4, 2.0, 2.8), matrices)


class Line:
    "Pullback means by their anchor: those of anchors 0 and 1, which are found once."

    def __init__(self, ex, names):
        self.ex, self.names, self.ends = ex, names, None

    def at(self, S, anchor, **how):
        return merged(self.ex, pullback(anchor, **how), S, names=self.names)

    def __call__(self, S):
        if self.ends is None:
            self.ends = [self.at(S, c) for c in (0.0, 1.0)]
        return self.ends

    def between(self, S, c):
        return between(self(S), c)


def anchored(ex, names, anchors, curve):
    "Pullback means with these anchors, and with the best."
    line = Line(ex, names)
    for c in anchors:
        yield ours(f"pullback(anchor={c:g})", "inputs", partial(line.at, anchor=c), form=INPUTS)
    for c in curve:
        yield ours(f"pullback(anchor={c:g})", "inputs", partial(line.between, c=c), form=INPUTS)
    grid = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    yield ours("pullback(), anchor tuned", "inputs, scale", line, grid, between, form=INPUTS)


def by_outputs(ex, names):
    "What outputs choose, without labels: a scale, or an anchor and whose side is shared."
    yield ours(
        "TSV-M, by outputs",
        "inputs",
        lambda: merged(ex, EpiMer(), names=names),
        lines=lambda d: {"": partial(matrices, d)},
    )

    def sides(S, which):
        line = Line(ex, names)
        return {share: [line.at(S, c, share=share) for c in (0.0, 1.0)] for share in which}

    def along(found):
        return {share: partial(between, ends) for share, ends in found.items()}

    for which in (("right",), ("left",), ("right", "left")):
        yield ours(
            f"pullback(share={' or '.join(map(repr, which))}), by outputs",
            "inputs",
            partial(sides, which=which),
            form=INPUTS,
            lines=along,
        )


def methods(ex, mergekit_pytorch=None):
    "All methods, those that take longest last."
    yield from core(ex, ex.names, sorted({4.0, float(len(ex.names))}))
    yield from with_statistics(ex)
    yield ours("TSV-M, k = 32", "scale", lambda: merged(ex, EpiMer(32)), AT32, matrices)
    yield ours("Karcher mean of weights", "–", lambda: merged(ex, Span(Sphere()), whole=True))
    grid = (1.0, 1.4, 2.0)
    yield ours("Karcher mean of differences", "scale", lambda: merged(ex, Span(Sphere())), grid)
    if ex.adapters:
        yield from of_adapters(ex)
    if mergekit_pytorch:
        yield from of_mergekit(ex, mergekit_pytorch)
    yield from with_more(ex)


SCALES = (1.4, 2.0, 2.8)
# scales with 32 directions a model
AT32 = (0.8, 1.1, 1.5)
FISHER = Curved(normalise=True, damping=0.1)


def in_metrics(ex, g, use="both"):
    return lambda S: merged(ex, g, S, use)


def epimers(ex, what, needs, form):
    for c in ("labeled", "projected"):
        g = EpiMer(32, c, normalise=True, damping=0.05)
        name = f"EpiMer, k = 32, {c}, {what}"
        yield ours(name, needs, in_metrics(ex, g), AT32, matrices, form=form)


def with_statistics(ex):
    "Pullbacks of parts of their metrics, RegMean, EpiMer, and the Fisher means."
    for name, g, use in (
        ("pullback(share='left')", pullback(share="left"), "both"),
        ("pullback(2), outputs only", pullback(2.0, share=None), "outputs"),
        ("pullback(), inputs only", pullback(share=None), "inputs"),
    ):
        yield ours(name, "inputs", in_metrics(ex, g, use), form=INPUTS)
    regmean = in_metrics(ex, FISHER, "inputs")
    yield ours("RegMean", "inputs, scale", regmean, SCALES, form=INPUTS)
    yield from epimers(ex, "pullback", "inputs, scale", INPUTS)
    true = ("kronecker", "true")
    yield ours("pullback(), true Fisher", "inputs", in_metrics(ex, pullback()), form=true)
    diagonal = ("diagonal", "true")
    fisher = in_metrics(ex, FISHER)
    yield ours("Fisher, diagonal", "inputs, scale", fisher, SCALES, form=diagonal)
    yield from epimers(ex, "Fisher", "labels, scale", ("diagonal", "empirical"))


def of_adapters(ex):
    "What reads the factors of adapters, ours and PEFT's."
    r = max(load(f).adapter["r"] for f in ex.folders)
    for name, g in (
        (f"LoRA(rank={r})", LoRA(rank=r)),
        ("LoRA(metric='mix')", LoRA(metric="mix")),
        ("LoRA(metric='wasserstein')", LoRA(metric="wasserstein")),
        ("LoRA(pinned=0.02)", LoRA(pinned=0.02)),
        ("KnOTS()", KnOTS()),
        ("TSVM()", TSVM()),
    ):
        yield ours(name, "scale", partial(adapter, ex, g), SCALES)
    for kind, how in (
        ("linear", {}),
        ("cat", {}),
        ("svd", {"svd_rank": r}),
        ("ties", {"density": 0.2}),
    ):
        yield Method(f"PEFT {kind}", "PEFT", "scale", partial(peft, ex, kind, **how), SCALES)


def of_mergekit(ex, command):
    unscaled = ("linear", "karcher", "model_stock")
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
        needs, grid = ("–", ()) if m in unscaled else ("scale", (0.3, 0.42, 0.6))
        merge_it = partial(mergekit, ex, command, m, **how)
        yield Method(f"mergekit {m}", "mergekit", needs, merge_it, grid)


def with_more(ex):
    "More examples, and sums of metrics that have no closed form."
    more = (*INPUTS, 4*SAMPLES)
    yield ours(
        f"pullback(), {4 * SAMPLES} examples", "inputs", in_metrics(ex, pullback()), form=more
    )
    kfac = in_metrics(ex, FISHER)
    for estimator in ("pullback", "true", "empirical"):
        needs = "labels, scale" if estimator == "empirical" else "inputs, scale"
        form = ("kronecker", estimator)
        yield ours(f"KFAC, {estimator}", needs, kfac, SCALES, form=form)
    yield ours("pullback(share=None)", "inputs", in_metrics(ex, pullback(share=None)), form=INPUTS)


def resident(what):
    lines = Path("/proc/self/status").open()
    return next(int(line.split()[1])/1024 for line in lines if line.startswith(what))


def peak(f, *args):
    "By how many MiB a call raises resident memory at most (Linux)."
    # what is free goes back, and the highest mark is now
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    f(*args)
    return resident("VmHWM") - before


def cpu():
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(w)[:2]) for w in who)


def mean(c):
    return sum(float(v.float().mean()) for v in c.values())/len(c)


def run(ex, m, names, stats):
    "Setting, examples right on the reported half, validation accuracy, CPU seconds."
    S = [stats(*m.form)] if m.form else []
    start = cpu()
    first = m.merge(*S)
    seconds = cpu() - start
    if m.lines:
        return (*nearest_on_lines(ex, m.lines(first), names), seconds)
    if not m.grid:
        return None, ex.right(first, 1, names), None, seconds
    tried = widened(m.grid, lambda v: mean(ex.right(m.how(first, v), 0, names)))
    best = max(sorted(tried), key=tried.get)
    return best, ex.right(m.how(first, best), 1, names), tried[best], seconds


def nearest_on_lines(ex, lines, names):
    "Setting, examples right, distance: of the line and the place on it that outputs choose."
    found = {
        name: nearest(lambda x, line=line: ex.lost(line(x), names)) for name, line in lines.items()
    }
    name = min(found, key=lambda k: min(found[k][1].values()))
    x, tried = found[name]
    setting = x if len(lines) == 1 else f"{x:.3g} {name}"
    return setting, ex.right(lines[name](x), 1, names), min(tried.values())


def widened(grid, judge):
    "Setting → how good it is: a grid, widened until the best is inside of it."
    tried = {v: judge(v) for v in grid}
    for _ in range(WIDER):
        order = sorted(tried)
        best = max(order, key=tried.get)
        end = order.index(best)
        if 0 < end < len(order) - 1:
            break
        new = best**2/order[1] if end == 0 else best**2/order[-2]
        tried[new] = judge(new)
    return tried


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


class Options(NamedTuple):
    "What is run, and what is only written."

    methods: list | None = None  # only those whose name starts with one of these
    mergekit: str | None = None  # path of mergekit-pytorch
    sizes: tuple = ()  # numbers of models; none: all of them, by every method
    subsets: int = 3  # of each size
    finished: bool = False  # run nothing
    memory: bool = False  # measure it

    def wants(self, m):
        is_named = not self.methods or m.name.startswith(tuple(self.methods))
        can = self.mergekit or m.code != "mergekit"
        return not self.finished and is_named and can


class Result(NamedTuple):
    "What `run` found, on examples that nobody was trained on."

    setting: float | str | None
    right: dict  # task → which examples
    validation: float | None
    seconds: float | None


class Family:
    "Experts, and what is kept of runs that are finished."

    def __init__(self, ex, name, cache, command):
        self.ex, self.name, self.cache = ex, name, cache
        self.kept = torch.load(cache, weights_only=False) if cache.exists() else {}
        self.gen = torch.Generator().manual_seed(0)
        self.held = {}
        self.spent = self.keep("statistics", dict)
        judged = self.keep("experts", self.judge_experts)[1]
        self.own = self.fresh(judged)
        facts = dict(
            tasks=ex.names,
            samples=SAMPLES,
            validation=VALIDATION,
            reported={n: len(v) for n, v in judged.items()},
        )
        if self.keep("facts", lambda: facts) != facts:
            raise SystemExit(f"{cache} is of other tasks or examples: delete it.")
        facts["reported"] = {n: len(v) for n, v in self.own.items()}
        self.said = about(command, threads=1, **facts)

    def keep(self, key, make):
        "What is kept under this key, made where it is not."
        if key not in self.kept:
            self.kept[key] = make()
            torch.save(self.kept, f"{self.cache}.part")
            os.replace(f"{self.cache}.part", self.cache)
        return self.kept[key]

    def judge_experts(self):
        ex = self.ex
        return [{n: ex.right(ex.delta[n], half, [n])[n] for n in ex.names} for half in (0, 1)]

    def stats(self, *which):
        "Statistics of every expert, of the last form that was asked for."
        if which not in self.held:
            self.held.clear()
            start = cpu()
            self.held[which] = {n: self.ex.statistics(n, *which) for n in self.ex.names}
            seconds = round((cpu() - start)/len(self.ex.names), 1)
            self.spent[", ".join(map(str, which))] = seconds
        return self.held[which]

    def fresh(self, c):
        return {n: v[self.ex.fresh(n)] for n, v in c.items()}

    def done(self, key, m, names):
        "A run, from what is kept if it is there."
        setting, right, *rest = self.keep(key, lambda: run(self.ex, m, names, self.stats))
        return Result(setting, self.fresh(right), *rest[:2])

    def relative(self, c):
        "Accuracy of each task, relative to its expert."
        return [float(c[n].float().mean()/self.own[n].float().mean()) for n in c]

    def se(self, cases):
        return round(bootstrap(cases, self.gen, self.ex.groups), 4)

    def raised(self, m):
        "By how many MiB a merge raises the resident memory."
        S = [self.stats(*m.form)] if m.form else []
        return peak(m.merge, *S)


def attempt(fam, m):
    "A method's result on all experts; None if it is not ours and fails."
    try:
        r = fam.done(m.name, m, fam.ex.names)
    except Exception as e:
        if m.code == "frechet_merge":
            raise
        print(f"{m.name}: {type(e).__name__}: {str(e).splitlines()[-1][:160]}", flush=True)
        return None
    setting = r.setting if isinstance(r.setting, (str, type(None))) else round(r.setting, 3)
    validation = None if r.validation is None else round(r.validation, 4)
    print(
        f"{m.name:32} {setting!s:6} validation {validation!s:6} reported {mean(r.right):.4f}  "
        f"{r.seconds:.1f} s",
        flush=True,
    )
    return r


def quality_row(fam, m, r, mib, tsvm):
    "Of a result that is of method m; `tsvm` is what it is compared with."
    setting = "" if r.setting is None else r.setting
    if isinstance(setting, float):
        setting = round(setting, 3)
    row = {
        "method": m.name,
        "code": m.code,
        "needs": m.needs,
        "tuned": setting,
        "mean": round(mean(r.right), 4),
        "se": fam.se([r.right]),
        "worst": round(min(fam.relative(r.right)), 3),
        "normalised": round(sum(fam.relative(r.right))/len(r.right), 3),
        "from_tsvm": "",
        "se_from": "",
        "cpu_s": "" if r.seconds is None else round(r.seconds, 2),
        "MiB": mib,
        **shown(r.right),
    }
    if tsvm is not None and m.name != "TSV-M":
        d = minus(r.right, tsvm.right)
        row |= {"from_tsvm": round(mean(d), 4), "se_from": fam.se([d])}
    return row


def run_methods(fam, options, old):
    "Each method that is run, is kept, or has an earlier row, and its result: None for such a row."
    for m in methods(fam.ex, options.mergekit or "mergekit-pytorch"):
        if options.wants(m) or m.name in fam.kept:
            r = attempt(fam, m)
            if r is None:
                continue
            seconds = r.seconds
        elif m.name in old:
            r, seconds = None, float(old[m.name]["cpu_s"])
        else:
            continue
        if options.memory and m.code != "mergekit" and seconds < LONG:
            mib = fam.keep((m.name, "MiB"), lambda m=m: fam.raised(m))
            print(f"{m.name:32} {mib:.0f} MiB", flush=True)
        yield m, r


def quality(fam, options):
    "Every method on all experts, and their rows."
    base = fam.fresh(fam.keep("base", lambda: fam.ex.right({}, 1)))
    first = {"base": base, "experts": fam.own}
    old, about_old = earlier(f"quality_{fam.name}", {n: shown(c) for n, c in first.items()})
    found = [(Method(n, "", "–", None), Result(None, c, None, None)) for n, c in first.items()]
    found += run_methods(fam, options, old)
    tsvm = {m.name: r for m, r in found}.get("TSV-M")
    rows = []
    for m, r in found:
        mib = old.get(m.name, {}).get("MiB", "")
        if (m.name, "MiB") in fam.kept:
            mib = round(fam.kept[m.name, "MiB"])
        if r is None:
            rows.append(old[m.name] | {"MiB": mib})
        else:
            rows.append(quality_row(fam, m, r, mib, tsvm))
    spent = about_old.get("statistics_cpu_s_per_task", {}) | fam.spent
    more = {
        "statistics_cpu_s_per_task": spent,
        "rows_of_earlier_runs": [m.name for m, r in found if r is None],
    }
    write_rows(f"quality_{fam.name}", rows, fam.said | more)


def sets_of(names, T, most):
    "Some sets of T experts, the same in every run."
    every_set = list(itertools.combinations(names, T))
    random.Random(T).shuffle(every_set)
    return every_set[:most]


def settings(xs):
    return "; ".join(f"{x:.3g}" if isinstance(x, float) else x for x in xs if x is not None)


def sizes_row(fam, T, name, rs, size, tsvm):
    "Of the results of one method on several sets of T models."
    d = [minus(r.right, t.right) for r, t in zip(rs, tsvm)]
    return {
        "models": T,
        "method": name,
        "sets": len(rs),
        "sum / weights, spectral": settings(size),
        "tuned": settings(r.setting for r in rs),
        "mean": round(sum(mean(r.right) for r in rs)/len(rs), 4),
        "normalised": round(sum(sum(fam.relative(r.right))/T for r in rs)/len(rs), 4),
        "from_tsvm": round(sum(map(mean, d))/len(d), 4),
        "se_from": fam.se(d) if name != "TSV-M" else "",
    }


def sizes(fam, options):
    "The core methods on sets of some of the experts, and their rows."
    rows = []
    for T in options.sizes:
        cases, size = {}, []
        for names in sets_of(fam.ex.names, T, options.subsets):
            every_method = list(core(fam.ex, list(names), (), CURVE))
            is_done = all((T, names, m.name) in fam.kept for m in every_method)
            if options.finished and not is_done:
                continue
            size.append(fam.keep((T, names), lambda names=names: spectral(fam.ex, names)))
            for m in every_method:
                r = fam.done((T, names, m.name), m, names)
                cases.setdefault(m.name, []).append(r)
            print(T, names, {m: round(mean(r[-1].right), 4) for m, r in cases.items()}, flush=True)
        rows += [sizes_row(fam, T, m, rs, size, cases["TSV-M"]) for m, rs in cases.items()]
    write_rows(f"sizes_{fam.name}", rows, fam.said | {"sets": options.subsets})


def report(fam, options):
    (sizes if options.sizes else quality)(fam, options)


def arguments():
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
    return a.parse_args()


def all_families(args):
    "Train every family that is not there, and run all of it."
    args.work.mkdir(parents=True, exist_ok=True)
    command = "python bench/quality.py all WORK"
    for name, ex in families(args.work, args.images):
        for numbers in ((), (2, 3, 4)):
            cache = args.work/f"{name}{'_sizes' if numbers else ''}.pt"
            options = Options(mergekit=args.mergekit, sizes=numbers)
            report(Family(ex, name, cache, command), options)


def one_family(args):
    only = args.only and args.only.split(",")
    kind = {"text": Text, "images": Images}[args.kind]
    ex = kind(args.folder, args.tasks, args.heads, args.base, only)
    name = args.name or Path(args.folder).name
    command = f"python bench/quality.py FOLDER --name {name} --kind {args.kind} --tasks TASKS"
    if args.sizes:
        command += f" --sizes {args.sizes} --subsets {args.subsets}"
    if args.mergekit:
        command += " --mergekit MERGEKIT-PYTORCH"
    if args.memory:
        command += " --memory"
    options = Options(
        methods=args.methods and args.methods.split(","),
        mergekit=args.mergekit,
        sizes=tuple(map(int, args.sizes.split(","))) if args.sizes else (),
        subsets=args.subsets,
        finished=args.finished,
        memory=args.memory,
    )
    cache = args.cache or Path(f"{args.folder}.{'sizes' if args.sizes else 'quality'}.pt")
    report(Family(ex, name, cache, command), options)


if __name__ == "__main__":
    args = arguments()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if args.folder == "all":
        all_families(args)
    else:
        one_family(args)

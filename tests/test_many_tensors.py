"""A hundred thousand tensors: what is done for each is counted, and no time is measured."""

import gc
import json
import math
import os
import threading
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from frechet_merge import Mean, MergeError, merge
from frechet_merge.files import formats, shards
from frechet_merge.files.checkpoint import from_state_dict
from frechet_merge.matching import absent, views
from frechet_merge.execution import many, run
from frechet_merge.execution.block import Job
from frechet_merge.merging.merge import open_recipe, plan_root
from frechet_merge.merging.recipe import Recipe
from frechet_merge.merging.record import Record, known
from frechet_merge.execution.run import SMALL, Plan, do_jobs

MANY = 600


def names(n=MANY):
    return [f"layers.{i//10}.experts.{i%10}.weight" for i in range(n)]


def state(of, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {n: torch.randn(4, 8, generator=gen) for n in of}


def folder(path, of, seed=0):
    path.mkdir()
    save_file(state(of, seed), path/"model.safetensors", {"format": "pt"})
    return str(path)


def counted(monkeypatch, module, name):
    "A list that grows by one with each call of a function."
    calls, f = [], getattr(module, name)

    def counting(*args, **kw):
        calls.append(args)
        return f(*args, **kw)

    monkeypatch.setattr(module, name, counting)
    return calls


def test_the_entries_of_a_header_are_made_once(tmp_path, monkeypatch):
    models = [folder(tmp_path/f"m{i}", names(), i) for i in range(2)]
    headers = counted(monkeypatch, formats, "read_header")
    entries = counted(monkeypatch, shards, "_entry")
    plan_root(open_recipe(Recipe(models)))
    assert len(headers) == 2
    assert len(entries) == 2*MANY


def test_models_share_their_names(tmp_path):
    paths = [folder(tmp_path/f"m{i}", names(3), i) for i in range(2)]
    first, second = (shards.read_header(f"{p}/model.safetensors")[0] for p in paths)
    assert all(a is b for a, b in zip(first, second))


def test_a_header_says_which_name_is_twice(tmp_path):
    spec = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    head = f'{{"a": {spec}, "b": {spec}, "b": {spec}}}'.encode()
    path = tmp_path/"x.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))
    with pytest.raises(MergeError, match="the name 'b' appears twice"):
        shards.read_header(path)


def test_old_names_are_sought_once_for_each_name(monkeypatch):
    calls = counted(monkeypatch, views, "_tails")
    old = {f"layers.{i}.LayerNorm.gamma" for i in range(MANY)}
    new = {f"bert.layers.{i}.LayerNorm.weight" for i in range(MANY)}
    found = views._old_names(old, new)
    assert found == {n: n.replace("gamma", "weight") for n in old}
    assert len(calls) <= 2*MANY
    assert not views._old_names({"x.LayerNorm.gamma"}, {"y.LayerNorm.weight"})
    # the longer one is the old one
    assert views._old_names({"bert.x.LayerNorm.beta"}, {"x.LayerNorm.bias"})


def test_names_without_old_parts_are_not_held_to_others(monkeypatch):
    calls = counted(monkeypatch, views, "_tails")
    assert not views._old_names(set(names()), {"x." + n for n in names()})
    assert not calls


def test_a_pattern_is_held_to_the_names_once(monkeypatch):
    calls = counted(monkeypatch, absent, "fnmatchcase")
    has = from_state_dict(state(names()), "has")
    lacks = from_state_dict(state(names()[::2]), "lacks")
    found = absent.left_out(names()[1], lacks, has)
    assert len(found) == MANY//2
    assert len(calls) <= 4*MANY


def test_of_many_that_are_lacking_the_remedy_is_short_and_works(tmp_path):
    models = [folder(tmp_path/"a", names()), folder(tmp_path/"b", names()[1::2], 1)]
    with pytest.raises(MergeError) as e:
        merge(models, out=tmp_path/"out")
    assert len(str(e.value)) < 500 and "--absent renormalise" in str(e.value)
    merged = merge(models, out=tmp_path/"out", absent="renormalise")
    assert {*merged.tensors} == {*names()}


def test_small_jobs_go_together_and_give_the_same():
    models = [state(names(2000), i) for i in range(2)]
    tasks = []

    def executor(f, jobs):
        tasks.extend(jobs)
        return map(f, tasks)

    together = merge(models, executor=executor)
    assert len(tasks) < 400
    assert [*together.means] == names(2000)
    for n in names(2000):
        one = merge([{n: m[n]} for m in models], executor="serial")
        assert torch.equal(together.tensors[n], one.tensors[n])
        break
    mean = sum(m[names()[7]] for m in models)/2
    torch.testing.assert_close(together.tensors[names()[7]], mean)


def test_few_jobs_go_alone():
    tasks = []

    def executor(f, jobs):
        tasks.extend(jobs)
        return map(f, tasks)

    merge([state(names(20), i) for i in range(2)], executor=executor)
    assert [len(task) for task in tasks] == [1]*20


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_it_was(was_on, tmp_path):
    models = [state(names(3), i) for i in range(2)]
    # whatever else was set aside in this process
    gc.unfreeze()
    if not was_on:
        gc.disable()
    try:
        merge(models, out=None)
        assert gc.isenabled() == was_on and gc.get_freeze_count() == 0
        with pytest.raises(MergeError):
            merge([models[0], {"x": torch.ones(2)}])
        assert gc.isenabled() == was_on and gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_what_a_server_has_set_aside_stays_aside():
    gc.freeze()
    try:
        merge([state(names(3), i) for i in range(2)])
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_record_has_a_line_for_each_mean(tmp_path):
    means = {n: known(Mean(None, 0.0, 1, True, math.nan)) for n in names(5)}
    record = Record({"models": ["a\udcff", "é"]}, means=means, counted={"x": math.inf})
    record.write(tmp_path)
    path = tmp_path/"frechet_merge.json"
    text = path.read_text()
    assert all(text.count(f'\n  "{n}": {{') == 1 for n in means)
    # no word that JSON does not have
    held = json.loads(text, parse_constant=pytest.fail)
    assert held["means"][names()[0]]["variance"] is None and held["counted"] == {"x": None}
    assert held["recipe"]["models"] == ["a\udcff", "é"]
    assert Record.read(tmp_path).recipe == record.recipe
    assert [*held] == [*vars(record)]


@dataclass(frozen=True)
class Meets(Job):
    "Waits for another job that runs at the same time, and says whether there was one."

    name: str
    size: int
    barrier: threading.Barrier
    patience: float  # seconds
    met: list

    def run(self, write):
        try:
            self.barrier.wait(timeout=self.patience)
            self.met.append(self.name)
        except threading.BrokenBarrierError:
            self.barrier.reset()
        return {}


@pytest.mark.parametrize("size, together", [(SMALL - 1, False), (SMALL, True)])
def test_small_jobs_take_turns(size, together, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    barrier, met = threading.Barrier(2), []
    jobs = [Meets(name, size, barrier, 20 if together else 0.3, met) for name in "ab"]
    do_jobs(Plan({}, jobs), None)
    assert bool(met) == together


class TestAtOnce:
    "Small tensors of one shape are merged as one; the oracle is each on its own."

    def both(self, tmp_path, monkeypatch, states, **how):
        "Bytes and means, at once and alone; how many jobs were only written."
        paths = [tmp_path/f"m{i}" for i in range(len(states))]
        for path, one in zip(paths, states):
            path.mkdir()
            save_file(one, path/"model.safetensors", {"format": "pt"})
        made = counted(monkeypatch, many, "Made")
        found = []
        for ready in (many.at_once, list):
            monkeypatch.setattr(run, "at_once", ready)
            out = tmp_path/f"out{len(found)}"
            merged = merge([*map(str, paths)], out=out, **how)
            means = {n: vars(m) for n, m in merged.means.items()}
            found.append(((out/"model.safetensors").read_bytes(), means))
        return *found, len(made)

    @pytest.mark.parametrize(
        "how",
        [
            {},
            {"weights": [0.2, 0.0, 0.8], "executor": "serial"},
            {"base": True, "scale": 0.7},
            {"base": True, "sum": [1.0, -0.3, 0.5]},
            {"dtype": "bf16"},
        ],
        ids=str,
    )
    def test_the_same_bytes_and_means(self, tmp_path, monkeypatch, how):
        states = [state(names(), i) for i in range(3)]
        if "base" in how:
            how = {**how, "base": folder(tmp_path/"base", names(), 9)}
        at_once, alone, made = self.both(tmp_path, monkeypatch, states, **how)
        assert at_once == alone and made > MANY//2

    def test_of_many_shapes_and_dtypes(self, tmp_path, monkeypatch):
        g, states = torch.Generator().manual_seed(0), []
        for _ in range(4):
            one = {n: torch.randn(3 + i//150, 7, generator=g) for i, n in enumerate(names())}
            cast = {n: x.bfloat16() if i % 150 > 70 else x for i, (n, x) in enumerate(one.items())}
            states.append(cast)
        at_once, alone, made = self.both(tmp_path, monkeypatch, states)
        assert at_once == alone and made > MANY//2

    def test_what_is_special_is_done_alone(self, tmp_path, monkeypatch):
        states = [state(names(), i) for i in range(2)]
        for one in states:
            one["norm.running_mean"], one["layers.7.input_max"] = torch.ones(4, 8), torch.ones(4, 8)
        at_once, alone, made = self.both(tmp_path, monkeypatch, states)
        assert at_once == alone and MANY//2 < made <= MANY

    def test_a_nan_is_refused_by_the_same_name(self, tmp_path, monkeypatch):
        states = [state(names(), i) for i in range(2)]
        states[1][names()[300]][1, 2] = torch.nan
        said = []
        for ready in (many.at_once, list):
            monkeypatch.setattr(run, "at_once", ready)
            with pytest.raises(MergeError, match="layers.30.experts.0.weight") as e:
                merge([from_state_dict(s, n) for s, n in zip(states, "ab")], executor="serial")
            said.append(str(e.value))
        assert said[0] == said[1]

    @pytest.mark.filterwarnings("ignore:.*what is done is kept")
    def test_what_is_done_is_not_merged_again(self, tmp_path, monkeypatch):
        models = [folder(tmp_path/f"m{i}", names(), i) for i in range(2)]
        how, merged, stop = {"executor": "serial", "resume": True}, [], []
        real = many.merged_at_once

        def at_once(jobs):
            if stop and len(merged) > stop[0]:
                raise KeyboardInterrupt
            merged.extend(jobs)
            return real(jobs)

        monkeypatch.setattr(many, "merged_at_once", at_once)
        whole = merge(models, out=tmp_path/"whole", **how)
        count, stop[:] = len(merged), [len(merged)//2]
        merged.clear()
        with pytest.raises(KeyboardInterrupt):
            merge(models, out=tmp_path/"out", **how)
        stop.clear()
        out = merge(models, out=tmp_path/"out", **how)
        assert len(merged) == count > MANY//2
        one, other = ((m.out/"model.safetensors").read_bytes() for m in (whole, out))
        assert one == other

    def test_other_executors_do_the_same(self, tmp_path):
        models = [folder(tmp_path/f"m{i}", names(), i) for i in range(3)]
        ways = [merge(models, out=tmp_path/e, executor=e) for e in ("threads", "processes")]
        one, other = ((m.out/"model.safetensors").read_bytes() for m in ways)
        assert one == other
        one, other = ({n: vars(x) for n, x in m.means.items()} for m in ways)
        assert one == other

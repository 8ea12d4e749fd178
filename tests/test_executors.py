"""Whoever does the jobs, the bytes, means, warnings and errors are the same."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from alone import Alone
from conftest import cli, save
from deadly import Deadly
from test_faults import lora
from test_resume import contents, merged as merged_serially, model

from frechet_merge import LoRA, merge, MergeError, Span, Sphere
from frechet_merge.files.stack import Stack
from frechet_merge.files.tensors import spans
from frechet_merge.geometries.geometry import Euclidean
from frechet_merge.execution import executors
from frechet_merge.execution.block import MeanOf

AGAIN = "ignore:.*it is done again"


@pytest.fixture
def models(tmp_path):
    return [model(tmp_path/name, seed) for seed, name in enumerate(("A", "B", "C"))]


def merged(models, out, executor="serial", geometry=None, **more):
    "All that is written, and what is known of the means; the folder is gone then."
    more = dict(shard_size=20_000) | more
    made = merge(models, geometry or Span(Sphere()), out=out, executor=executor, **more)
    found = contents(out), {n: vars(m) for n, m in made.means.items()}
    shutil.rmtree(out)
    return found


class TestTheSameBytes:
    def by(self, models, out, **more):
        one = merged(models, out, "serial", **more)
        assert merged(models, out, "processes", **more) == one

    def test_of_full_models(self, tmp_path, models):
        self.by(models, tmp_path/"out")

    def test_of_a_difference_with_metrics_and_in_another_dtype(self, tmp_path, models):
        metrics = []
        for i in range(3):
            names = [f"layer.{k}.weight" for k in range(8)]
            g = torch.Generator().manual_seed(i)
            one = {n: torch.rand(40, 30, generator=g) for n in names}
            metrics.append(str(save(tmp_path/f"F{i}", one)/"model.safetensors"))
        how = dict(metrics=metrics[:2], base=models[2], scale=0.7, dtype="bf16")
        self.by(models[:2], tmp_path/"out", geometry=Euclidean(), **how)

    @pytest.mark.parametrize("per", ["huber", "median"])
    def test_of_a_loss_that_passes_over_all_models_first(self, tmp_path, models, per):
        self.by(models, tmp_path/"out", loss=per)

    def test_of_adapters(self, tmp_path):
        folders = [str(lora(tmp_path/name, seed=i)) for i, name in enumerate("ab")]
        self.by(folders, tmp_path/"out", geometry=LoRA())

    def test_of_models_in_memory(self, tmp_path):
        "They have to be sent: nothing else knows them."
        g = torch.Generator().manual_seed(0)
        states = [{"w": torch.randn(9, 4, generator=g)} for _ in range(3)]
        self.by(states, tmp_path/"out")

    def test_by_the_command_line(self, tmp_path, models):
        want = merged(models, tmp_path/"out", shard_size=5*10**9)[0][0]
        how = "--geometry sphere --executor processes -o out".split()
        assert cli("merge", *models, *how, cwd=tmp_path)[0] == 0
        found = contents(tmp_path/"out")[0]
        assert found["model.safetensors"] == want["model.safetensors"]

    def test_of_parts(self, tmp_path, models):
        want = merged(models, tmp_path/"out")
        for part in ("1/2", "2/2"):
            merge(
                models,
                Span(Sphere()),
                out=tmp_path/"out",
                executor="processes",
                shard_size=20_000,
                part=part,
            )
        assert merged(models, tmp_path/"out", "processes", join=True) == want


class TestAWorkerThatDies:
    def deadly(self, folder, times):
        folder.mkdir()
        return Deadly(str(folder), times)

    def test_its_job_is_done_again(self, tmp_path, models):
        want = merged(models, tmp_path/"out", geometry=self.deadly(tmp_path/"no", 0))
        with pytest.warns(UserWarning) as said:
            found = merged(
                models,
                tmp_path/"out",
                "processes",
                geometry=self.deadly(tmp_path/"yes", 3),
            )
        assert len([*(tmp_path/"yes").iterdir()]) == 3
        deaths = [str(w.message) for w in said if "SIGKILL" in str(w.message)]
        assert len(deaths) == 3 and all("it is done again" in d for d in deaths)
        # the record says nothing of it: the model is the same
        tensors = [k for k in want[0][0] if k.endswith((".safetensors", ".json"))]
        assert len(tensors) > 2 and all(found[0][0][k] == want[0][0][k] for k in tensors)
        assert found[0][1]["warnings"] == want[0][1]["warnings"] and found[1] == want[1]

    @pytest.mark.filterwarnings(AGAIN)
    def test_not_for_ever(self, tmp_path, models):
        geometry = self.deadly(tmp_path/"d", 99)
        says = r"layer.\d.weight: .*killed by SIGKILL, 4 times(?s:.*)--executor serial"
        with pytest.raises(MergeError, match=says):
            merge(models, geometry, out=tmp_path/"out", executor="processes")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B", "C", "d"]
        # as it says; for what killed it is gone
        merge(models, Deadly(str(tmp_path/"d"), 0), out=tmp_path/"out", executor="serial")

    def test_workers_end_with_the_one_that_started_them(self, tmp_path, models):
        "Killed, it can tell them nothing; what they write then would be in nobody's folder."
        code = (
            "import pickle, time, sys\n"
            "from frechet_merge.execution.executors import Site, Worker\n"
            "w = Worker(pickle.dumps(Site({}, None, 'h', 'v')))\n"
            "w.pipe.send_bytes(w.site)\n"
            "print(w.process.pid, flush=True)\n"
            "time.sleep(60)\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as p:
            pid = int(p.stdout.readline())
            os.kill(pid, 0)
            p.send_signal(signal.SIGKILL)
        for _ in range(200):
            try:
                with open(f"/proc/{pid}/stat") as f:
                    if f.read().rpartition(")")[2].split()[0] == "Z":
                        return
            except OSError:
                return
            time.sleep(0.1)
        pytest.fail("it lives on")


class TestWhatIsSaid:
    def both(self, models, out, **more):
        said = []
        for executor in ("threads", "processes"):
            with pytest.raises(ValueError) as e:
                merge(models, out=out, executor=executor, **more)
            said.append((type(e.value), str(e.value)))
            assert not out.exists()
        return said

    def test_errors_of_a_job(self, tmp_path, models):
        bad = save(tmp_path/"bad", {f"layer.{i}.weight": torch.ones(40, 30) for i in range(8)})
        worse = save(tmp_path/"w", {f"layer.{i}.weight": torch.ones(40, 30) for i in range(7)} | {
            "layer.7.weight": torch.full((40, 30), torch.nan)
        })
        one, other = self.both([str(bad), str(worse)], tmp_path/"out")
        assert one == other and one[0] is MergeError and "layer.7.weight" in one[1]

    def test_a_file_that_is_cut_meanwhile(self, tmp_path, models, monkeypatch):
        real = executors.Worker.do

        def do(self, task):
            with open(f"{models[0]}/model.safetensors", "r+b") as f:
                f.truncate(1000)
            return real(self, task)

        monkeypatch.setattr(executors.Worker, "do", do)
        with pytest.raises(MergeError, match="cut short"):
            merge(models, out=tmp_path/"out", executor="processes")

    def test_warnings_of_a_job_are_said_once(self, tmp_path, models):
        (tmp_path/"d").mkdir()
        for executor in ("threads", "processes"):
            with pytest.warns(UserWarning) as found:
                out = tmp_path/executor
                merge(models, Deadly(str(tmp_path/"d"), 0), out=out, executor=executor)
            (text,) = [str(w.message) for w in found if "it lives" in str(w.message)]
            assert text == (
                "layer.0.weight, layer.1.weight, layer.2.weight and 5 more: it lives"
            )

    def test_nothing_to_write_to(self, models):
        with pytest.raises(ValueError, match=r"name a folder \(out=\), or use 'threads'"):
            merge(models, executor="processes")
        assert len(merge(models, executor="threads").tensors) == 8

    def test_a_class_that_only_this_process_knows(self, tmp_path, models):
        code = (
            "from dataclasses import dataclass\n"
            "from frechet_merge import Geometry, merge\n"
            "from frechet_merge.geometries.geometry import Chart, Needs\n"
            "from frechet_merge.spaces.space import Point\n"
            "@dataclass(frozen=True)\n"
            "class Own(Geometry):\n"
            "    needs = Needs()\n"
            "    def chart(self, thetas, Gs=None):\n"
            "        return Chart([Point(t, 1.0) for t in thetas], lambda m: m)\n"
            f"merge({models}, Own(), out={str(tmp_path/'out')!r}, executor=EXECUTOR)\n"
        )
        run = [sys.executable, "-c", code.replace("EXECUTOR", "'processes'")]
        found = subprocess.run(run, capture_output=True, text=True)
        assert "Own" in found.stderr and "or use executor='threads'" in found.stderr
        run[-1] = code.replace("EXECUTOR", "'threads'")
        assert subprocess.run(run).returncode == 0 and (tmp_path/"out").exists()


def test_processes_go_on_where_a_merge_was_stopped(tmp_path, models, monkeypatch):
    want = merged(models, tmp_path/"out")
    real, count = MeanOf.run, []

    def run(self, write):
        count.append(self.name)
        if len(count) > 3:
            raise KeyboardInterrupt
        return real(self, write)

    monkeypatch.setattr(MeanOf, "run", run)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="is kept"):
        merged_serially(models, tmp_path/"out", resume=True)
    answers = []
    real_entered = executors.entered

    def entered(job, done, sink):
        answers.append(done)
        return real_entered(job, done, sink)

    monkeypatch.setattr(executors, "entered", entered)
    assert merged(models, tmp_path/"out", "processes", resume=True) == want
    assert sorted(d.is_new for d in answers) == [False]*3 + [True]*5


class TestDeterminism:
    "Stated in the chapter on executors."

    @pytest.mark.parametrize("geometry", [Euclidean(), Span(Sphere())])
    def test_any_number_of_threads(self, tmp_path, models, geometry, monkeypatch):
        want = merged(models, tmp_path/"out", geometry=geometry)
        for n in (1, 2, 4):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=n: set(range(n)))
            assert merged(models, tmp_path/"out", "threads", geometry=geometry) == want
        assert merged(models, tmp_path/"out", map, geometry=geometry) == want

    def digests(self, models, tmp_path, geometry, monkeypatch, **more):
        found = []
        for size in (64, 1000, 1 << 18):
            ranges = lambda self, rows=False, n=size: spans(self.numel, n)
            monkeypatch.setattr(Stack, "spans", ranges)
            made = merge(models, geometry, executor="serial", **more)
            found.append(dict(made.tensors))
        return found

    def test_pieces_of_any_size_are_the_same_bytes(self, tmp_path, models, monkeypatch):
        more = dict(base=models[2], scale=0.7, weights=[0.3, 0.7])
        small, middle, whole = self.digests(models[:2], tmp_path, Euclidean(), monkeypatch, **more)
        for name, x in whole.items():
            assert torch.equal(small[name], x) and torch.equal(middle[name], x)

    def test_sums_of_any_chunks_are_the_same_but_for_rounding(self, tmp_path, models, monkeypatch):
        small, middle, whole = self.digests(models, tmp_path, Span(Sphere()), monkeypatch)
        for name, x in whole.items():
            for other in (small, middle):
                torch.testing.assert_close(other[name], x, rtol=3e-7, atol=1e-9)


class TestRay:
    "The same tasks, handed out by Ray on this machine."

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def started(cls):
        ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
        quiet = dict(include_dashboard=False, log_to_driver=False, logging_level="error")
        ray.init(num_cpus=2, _memory=8_000_000, **quiet)
        yield
        ray.shutdown()

    def test_the_same_bytes_though_workers_are_killed(self, tmp_path, models):
        (tmp_path/"d").mkdir()
        want = merged(models, tmp_path/"out", geometry=Deadly(str(tmp_path/"d"), 0))
        how = dict(geometry=Deadly(str(tmp_path/"d"), 3))
        found = merged(models, tmp_path/"out", "ray", **how)
        assert len([*(tmp_path/"d").iterdir()]) == 3
        tensors = [k for k in want[0][0] if k.endswith((".safetensors", ".json"))]
        assert len(tensors) > 2 and all(found[0][0][k] == want[0][0][k] for k in tensors)
        assert found[1] == want[1]

    def test_errors_and_an_end(self, tmp_path, models):
        (tmp_path/"d").mkdir()
        with pytest.raises(MergeError, match="layer.*lost.*4 times(?s:.*)--executor serial"):
            merge(models, Deadly(str(tmp_path/"d"), 99), out=tmp_path/"out", executor="ray")
        names = {f"layer.{i}.weight": torch.full((40, 30), torch.nan) for i in range(8)}
        bad = str(save(tmp_path/"bad", names))
        with pytest.raises(MergeError, match="NaN"):
            merge([models[0], bad], out=tmp_path/"out", executor="ray")
        assert not (tmp_path/"out").exists()

    @pytest.mark.parametrize("memory", [None, 8_000_000])
    def test_jobs_wait_for_a_machine_with_room(self, tmp_path, memory):
        "Each holds 5.4 MB of 8; one that holds more than any machine has is done all the same."
        sides = {f"w{i}": 260 for i in range(4)} | {"v": 300 if memory else 400}
        made = (torch.Generator().manual_seed(i) for i in range(2))
        states = [{n: torch.randn(s, s, generator=g) for n, s in sides.items()} for g in made]
        models = [save(tmp_path/n, state) for n, state in zip("mn", states)]
        (tmp_path/"d").mkdir()
        g = Alone(str(tmp_path/"d"))
        merge(models, g, out=tmp_path/"out", executor="ray", memory=memory)
        assert not (tmp_path/"d"/"two").exists()


def test_without_ray_it_is_said_what_to_install(tmp_path, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"frechet_merge\[ray\].*executor='processes'"):
        merge(models, out=tmp_path/"out", executor="ray")
    assert not (tmp_path/"out").exists()
    merge(models, out=tmp_path/"out", executor="processes")


def test_a_ray_that_does_not_start(tmp_path, models, monkeypatch):
    class Dead:
        def init(self, **_):
            raise Exception("The current node timed out\nand more")

        def shutdown(self):
            self.is_shut = True

    dead = Dead()
    says = r"Ray did not start \(The current node timed out\)(?s:.*)--executor processes"
    with pytest.raises(MergeError, match=says):
        executors.started(dead)
    assert dead.is_shut
    merge(models, out=tmp_path/"out", executor="processes")


def test_a_machine_with_other_versions_is_refused():
    site = executors.Site({}, None, "head", "frechet_merge 0.0 with torch 0")
    with pytest.raises(MergeError, match="and head, which hands out work, frechet_merge 0.0"):
        executors.Bench(site)


def test_a_worker_that_does_not_see_the_output(tmp_path, models):
    "On a cluster whose machines do not share the folder."
    from frechet_merge.files.shards import Entry

    entries = {"w": Entry(str(tmp_path/"gone"/"model.safetensors"), 8, (2,), torch.float32)}
    site = executors.Site({}, entries, "head", executors.versions_here())
    with pytest.raises(MergeError, match="gone(?s:.*)a folder that all machines see.*--part"):
        executors.Bench(site)

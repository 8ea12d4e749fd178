"""What cannot be merged is refused: exit code 1 (2 for wrong usage), at
most three lines that name the tensor, and nothing written."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import cli, save, tensors
from safetensors.torch import save_file

from frechet_merge import MergeError, load, merge
from frechet_merge.files.tensors import FileTensor
from frechet_merge.diagnostics.inspection import inspect


def refused(*args, cwd, code=1, says=""):
    """Run the command; it must fail with `code`, in at most three lines that hold every word of
    `says`, and leave nothing behind."""
    before = sorted(os.listdir(cwd))
    rc, out, err = cli("merge", *args, "-o", "out", cwd=cwd)
    assert rc == code, err
    lines = err.strip().splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 3, err
    for word in says.split("|"):
        assert word in err, f"{word!r} is not in: {err}"
    assert sorted(os.listdir(cwd)) == before
    return err


def test_missing_model(models, tmp_path):
    refused("m0", "nowhere", cwd=tmp_path, says="nowhere|HF_HUB_OFFLINE")


def test_empty_folder(models, tmp_path):
    (tmp_path/"empty").mkdir()
    refused("m0", "empty", cwd=tmp_path, says="empty|no safetensors")


def sharded(tmp_path):
    merge([tensors()], out=tmp_path/"sharded", shard_size=300)
    return tmp_path/"sharded"


def test_missing_shard(models, tmp_path):
    shard = sorted(sharded(tmp_path).glob("model-*"))[1]
    shard.unlink()
    refused("m0", "sharded", cwd=tmp_path, says=f"{shard.name}|No such file")


def test_truncated_shard(models, tmp_path):
    shard = sorted(sharded(tmp_path).glob("model-*"))[0]
    os.truncate(shard, shard.stat().st_size - 5)
    refused(
        "m0", "sharded", cwd=tmp_path, says=f"{shard.name}|the file has|download or save it again"
    )


def test_corrupt_shard(models, tmp_path):
    shard = sorted(sharded(tmp_path).glob("model-*"))[0]
    raw = bytearray(shard.read_bytes())
    raw[8:20] = b"garbage here"
    shard.write_bytes(raw)
    refused("m0", "sharded", cwd=tmp_path, says=f"{shard.name}|not valid JSON")


def test_index_that_promises_too_much(models, tmp_path):
    index = sharded(tmp_path)/"model.safetensors.index.json"
    j = json.loads(index.read_text())
    j["weight_map"]["ghost"] = j["weight_map"]["q.bias"]
    index.write_text(json.dumps(j))
    refused("m0", "sharded", cwd=tmp_path, says="ghost")


@pytest.mark.parametrize(
    "to", ["../m0/model.safetensors", "/etc/passwd", "sub/model.safetensors", 3]
)
def test_index_that_points_outside_its_folder(models, tmp_path, to):
    index = sharded(tmp_path)/"model.safetensors.index.json"
    j = json.loads(index.read_text())
    j["weight_map"]["q.bias"] = to
    index.write_text(json.dumps(j))
    refused("m0", "sharded", cwd=tmp_path, says="q.bias|outside its folder")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}'])
def test_damaged_index(models, tmp_path, text):
    (sharded(tmp_path)/"model.safetensors.index.json").write_text(text)
    refused("m0", "sharded", cwd=tmp_path, says="index.json")


def test_a_file_that_shrinks_while_it_is_read(models):
    c = load(models[0])
    os.truncate(models[0]/"model.safetensors", 900)
    with pytest.raises(MergeError, match="cut short"):
        [c[n] for n in c]


def test_shapes_differ(models, tmp_path):
    save(tmp_path/"odd", tensors() | {"q.bias": torch.randn(9)})
    refused("m0", "odd", cwd=tmp_path, says="odd|'q.bias'|[9]|[8]|m0")


def test_a_tensor_that_only_one_model_has(models, tmp_path):
    save(tmp_path/"more", tensors(5) | {"extra": torch.ones(3)})
    refused("m0", "more", cwd=tmp_path, says="m0|'extra'|more|--absent renormalise")
    m = merge([models[0], tmp_path/"more"], weights=[3, 1], absent="renormalise")
    assert torch.equal(m.tensors["extra"], torch.ones(3))
    torch.testing.assert_close(
        m.tensors["q.bias"], 0.75*tensors(0)["q.bias"] + 0.25*tensors(5)["q.bias"]
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("geometry", ["euclidean", "sphere"])
def test_nan_and_inf(models, tmp_path, bad, geometry):
    state = tensors(7)
    state["q.weight"][2, 5] = bad
    save(tmp_path/"bad", state)
    refused(
        "m0",
        "bad",
        "--geometry",
        geometry,
        cwd=tmp_path,
        says="bad|'q.weight'|element 27|--allow-nonfinite",
    )
    m = merge([models[0], tmp_path/"bad"], geometry, allow_nonfinite=True)
    assert m.tensors["q.weight"][2, 5].isnan() and m.tensors["q.weight"].isfinite().sum() == 87
    if geometry == "euclidean":
        torch.testing.assert_close(
            m.tensors["q.weight"][0], (tensors(0)["q.weight"][0] + state["q.weight"][0])/2
        )


@pytest.mark.parametrize(
    "weights, says",
    [
        ("0,0", "sum to zero"),
        ("1", "1 weights"),
        ("1,2,3", "3 weights"),
        ("nan,1", "finite"),
        ("inf,1", "finite"),
    ],
)
def test_weights(models, tmp_path, weights, says):
    refused("m0", "m1", f"--weights={weights}", cwd=tmp_path, code=1, says=says)


@pytest.mark.parametrize(
    "weights, says", [("a,b", "not numbers"), ("-1,3", "must not be negative")]
)
def test_weights_that_are_none(models, tmp_path, weights, says):
    refused("m0", "m1", f"--weights={weights}", cwd=tmp_path, code=2, says=says)


def test_output_folder_that_is_not_empty(models, tmp_path):
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"precious").write_text("mine")
    refused("m0", "m1", cwd=tmp_path, says="out|not an empty folder")
    assert (tmp_path/"out"/"precious").read_text() == "mine"


def test_output_that_is_a_file(models, tmp_path):
    (tmp_path/"out").write_text("mine")
    refused("m0", "m1", cwd=tmp_path, says="out|not an empty folder")


def test_an_empty_output_folder_is_fine(models, tmp_path):
    (tmp_path/"out").mkdir()
    assert cli("merge", "m0", "m1", "-o", "out", cwd=tmp_path)[0] == 0


@pytest.mark.parametrize(
    "name, near", [("shpere", "sphere"), ("euclidian", "euclidean"), ("puback", "pullback")]
)
def test_unknown_geometry(models, tmp_path, name, near):
    refused(
        "m0", "m1", "--geometry", name, cwd=tmp_path, code=2, says=f"{name}|Did you mean '{near}'"
    )


@pytest.mark.parametrize(
    "name, says",
    [
        ("karcher", "It is sphere"),
        ("linear", "It is euclidean"),
        ("Task-Arithmetic", "a base and a scale"),
        ("fisher", "curvature"),
        ("nuslerp", "It is slerp"),
        ("nothing like it", "There are: breadcrumbs, chordal"),
    ],
)
def test_geometries_by_other_names(models, tmp_path, name, says):
    _, _, err = cli("merge", "m0", "m1", "-o", "out", "--geometry", name, cwd=tmp_path)
    assert says in err and "Did you mean" not in err


def test_other_wrong_usage(models, tmp_path):
    refused("m0", "m1", "--dtype", "int8", cwd=tmp_path, code=2, says="int8|bf16")
    refused("m0", "m1", "--executor", "gpu", cwd=tmp_path, code=2, says="executor")
    refused("m0", "m1", "--shard-size", "big", cwd=tmp_path, code=2, says="big|5GB")
    refused("m0", "m1", "--scale", "2", cwd=tmp_path, code=2, says="base")


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["merge", "m0"], 2, "missing option '-o'|merge --help"),
        (["merge"], 2, "missing argument 'models'|merge --help"),
        (["mrge", "m0", "m1"], 2, "no such command 'mrge'|Did you mean 'merge'"),
        (["frobnicate"], 2, "no such command 'frobnicate'"),
        (["merge", "--out"], 2, "'--out' requires an argument"),
        (["merge", "m0", "m1", "--wieghts", "1,1", "-o", "out"], 2, "--wieghts|--weights"),
        (["merge", "m0", "m1", "--pad-to-multiple-of", "x", "-o", "out"], 2, "valid integer"),
        (["merge", "m0", "m1", "--pad-to-multiple-of", "0", "-o", "out"], 2, "equal to 1"),
        (["demo", "--texts", "300"], 2, "'--texts'|less than or equal to 200"),
    ],
)
def test_a_line_that_cannot_be_read(models, tmp_path, words, code, says):
    before = sorted(os.listdir(tmp_path))
    found, out, err = cli(*words, cwd=tmp_path)
    assert found == code and not out and err.startswith("error: "), err
    assert len(err.strip().splitlines()) <= 3 and sorted(os.listdir(tmp_path)) == before
    assert all(word in err for word in says.split("|")), err


def test_no_words_are_answered_by_all_commands():
    code, out, err = cli()
    assert code == 2 and " tune " in err and " merge " in err


@pytest.mark.parametrize(
    "text, says",
    [
        ("epimer:alpha=x", "'epimer:alpha=x'|alpha"),
        ("epimer:k=0", "'epimer:k=0'|singular triplet"),
        ("pullback:nu=x", "'pullback:nu=x'|nu"),
        ("pullback:nu=-1", "anchor's metric"),
        ("lora:rank=x", "rank"),
        ("lora:metric=top", "top"),
    ],
)
def test_arguments_of_a_geometry(models, tmp_path, text, says):
    refused(
        "m0",
        "m1",
        "--base",
        "m2",
        "--geometry",
        text,
        cwd=tmp_path,
        code=2,
        says=f"{says}|{text.partition(':')[0]} takes ",
    )


def test_arguments_that_a_geometry_does_not_have(models, tmp_path):
    refused(
        "m0",
        "m1",
        "--geometry",
        "lora:16",
        cwd=tmp_path,
        code=2,
        says="lora has no '16'|lora takes rank=None|write lora:rank=",
    )
    refused(
        "m0", "m1", "--geometry", "lora:ranks=16", cwd=tmp_path, code=2, says="lora has no 'ranks'"
    )


@pytest.mark.parametrize("text", ["", "a,", " ", "a,,b"])
def test_empty_names_of_metrics(models, tmp_path, text):
    refused("m0", "m1", "--metrics", text, cwd=tmp_path, code=2, says="--metrics|empty name|A,B,C")
    rc, _, err = cli("inspect", "m0", "m1", "--metrics", text, cwd=tmp_path)
    assert rc == 2 and "empty name" in err


def test_blanks_around_names_of_metrics(models, tmp_path):
    for i in range(2):
        save_file({"q.bias": torch.ones(8)}, tmp_path/f"s{i}.safetensors")
    assert (
        cli(
            "merge",
            "m0",
            "m1",
            "--metrics",
            "s0.safetensors, s1.safetensors ",
            "-o",
            "out",
            cwd=tmp_path,
        )[0]
        == 0
    )


def test_what_inspect_cannot_do_is_refused_before_the_work(models, tmp_path):
    for i in range(3):
        save_file({"q.bias": torch.ones(8)}, tmp_path/f"s{i}.safetensors")
    metrics, before = (
        ("--metrics", "s0.safetensors,s1.safetensors,s2.safetensors"),
        sorted(os.listdir(tmp_path)),
    )
    for args, code, says in (
        (("--headers", *metrics), 2, "--headers"),
        ((*metrics, "--plot", "nodir/x.png"), 1, "nodir/x.png: its folder does not exist"),
        ((*metrics, "--plot", "m0"), 1, "is a folder"),
        ((*metrics, "--plot", "x.doc"), 1, "no picture ends in .doc"),
    ):
        rc, out, err = cli("inspect", "m0", "m1", "m2", *args, cwd=tmp_path)
        assert rc == code and says in err and not out and len(err.strip().splitlines()) <= 3, err
    rc, out, err = cli("demo", "-o", "nodir/x.png", cwd=tmp_path)
    assert (
        rc == 1
        and "nodir/x.png: its folder does not exist" in err
        and len(err.strip().splitlines()) <= 2
    )
    save(tmp_path/"odd", tensors() | {"q.bias": torch.ones(9)})
    rc, out, err = cli("inspect", "m0", "m1", "odd", *metrics, cwd=tmp_path)
    assert (
        rc == 1
        and "warning: η was not computed" in err
        and sorted(os.listdir(tmp_path)) == sorted([*before, "odd"])
    )


def test_debug_shows_the_traceback(models, tmp_path):
    rc, _, err = cli("merge", "m0", "nowhere", "-o", "out", "--debug", cwd=tmp_path)
    assert rc != 0 and "Traceback" in err


def test_integers_that_differ(models, tmp_path):
    save(tmp_path/"odd", tensors() | {"ids": torch.arange(11).flip(0)})
    refused("m0", "odd", cwd=tmp_path, says="'ids'|odd|integers")


def test_pickles_need_a_flag_and_plain_tensors(models, tmp_path):
    (tmp_path/"p").mkdir()
    torch.save(tensors(3), tmp_path/"p"/"pytorch_model.bin")
    refused("m0", "p", cwd=tmp_path, says="pytorch_model.bin|pickle|--allow-pickle")
    assert cli("merge", "m0", "p", "-o", "ok", "--allow-pickle", cwd=tmp_path)[0] == 0
    torch.save({"q.bias": torch.nn.Linear(2, 2)}, tmp_path/"p"/"pytorch_model.bin")
    refused("m0", "p", "--allow-pickle", cwd=tmp_path, says="pytorch_model.bin")


def test_values_that_the_dtype_cannot_hold(models, tmp_path):
    for i in (3, 4):
        save(tmp_path/f"m{i}", tensors(i) | {"q.bias": torch.full((8,), 1e5)})
    refused(
        "m3",
        "m4",
        "--dtype",
        "fp16",
        cwd=tmp_path,
        says="'q.bias'|8 values|float16 cannot hold|1e+05",
    )
    x = {"x": torch.tensor([1e300, float("nan")], dtype=torch.float64)}
    with pytest.raises(MergeError, match="1 values that bfloat16"):
        merge([x, x], dtype="bf16", allow_nonfinite=True)
    with pytest.raises(MergeError, match="float32 cannot hold"):
        merge([{"x": torch.full((3,), 3e38)}], base={"x": torch.zeros(3)}, scale=4)


def test_a_broken_base_is_named(models, tmp_path):
    bad = tensors()
    bad["q.bias"][4] = float("nan")
    save(tmp_path/"base", bad)
    refused("m0", "m1", "--base", "base", cwd=tmp_path, says="base: |'q.bias'|element 4")
    refused(
        "m0",
        "m1",
        "--base",
        "base",
        "--geometry",
        "sphere",
        cwd=tmp_path,
        says="base: |'q.bias'|element 4",
    )


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_scale(models, tmp_path, scale):
    refused(
        "m0", "m1", "--base", "m2", "--scale", scale, cwd=tmp_path, code=2, says="scale|not finite"
    )


def test_integers_and_floats_do_not_mix(models, tmp_path):
    for key, value in (("q.bias", torch.ones(8, dtype=torch.int8)), ("ids", torch.ones(11))):
        save(tmp_path/"odd", tensors() | {key: value})
        for args in (("m0", "odd"), ("odd", "m0"), ("m0", "m1", "--base", "odd")):
            refused(*args, cwd=tmp_path, says=f"'{key}'|Convert one")
    save(tmp_path/"odd", tensors() | {"ids": torch.ones(11, dtype=torch.int64)})
    refused("m0", "m1", "--base", "odd", cwd=tmp_path, says="'ids'|integers")


def test_what_nobody_foresaw_is_still_three_lines(models, tmp_path):
    refused("m0", "~nosuchuser/x", cwd=tmp_path)
    refused("m0", "x"*300, cwd=tmp_path)
    refused("m0", "m1", "--device", "warp", cwd=tmp_path, code=2, says="no device 'warp'")


def test_an_adapter_named_by_its_file_is_still_one(models, tmp_path):
    save(
        tmp_path/"ad",
        {
            "base_model.model.q.lora_A.weight": torch.randn(2, 4),
            "base_model.model.q.lora_B.weight": torch.randn(4, 2),
        },
    )
    refused("ad/model.safetensors", "ad/model.safetensors", cwd=tmp_path, says="adapter")


def test_remains_of_a_kill_with_folders_in_them(models, tmp_path):
    (tmp_path/".out.partial"/"1_Pooling").mkdir(parents=True)
    (tmp_path/".out.partial"/"1_Pooling"/"config.json").write_text("{}")
    assert (
        cli("merge", "m0", "m1", "-o", "out", cwd=tmp_path)[0] == 0
        and not (tmp_path/"out"/"1_Pooling").exists()
    )


def test_links_and_new_parents(models, tmp_path):
    (tmp_path/"empty").mkdir()
    (tmp_path/"link").symlink_to("empty")
    assert (
        cli("merge", "m0", "m1", "-o", "link", cwd=tmp_path)[0] == 0
        and (tmp_path/"empty"/"model.safetensors").exists()
    )
    assert (
        cli("merge", "m0", "nowhere", "-o", "deep/er/out", cwd=tmp_path)[0] == 1
        and not (tmp_path/"deep").exists()
    )
    save(tmp_path/"bad", tensors() | {"q.bias": torch.full((8,), float("nan"))})
    assert (
        cli("merge", "m0", "bad", "-o", "deep/er/out", cwd=tmp_path)[0] == 1
        and not (tmp_path/"deep").exists()
    )
    assert cli("merge", "m0", "m1", "-o", "deep/er/out", cwd=tmp_path)[0] == 0
    (tmp_path/"here").mkdir()
    assert cli("merge", "../m0", "../m1", "-o", ".", cwd=tmp_path/"here")[0] == 1


def test_many_shards_with_few_descriptors(models, tmp_path):
    for i in range(2):
        merge(
            [{f"w{k}": torch.randn(50) for k in range(40)}], out=tmp_path/f"s{i}", shard_size=200
        )
    assert (
        cli(
            "merge",
            "s0",
            "s1",
            "-o",
            "out",
            cwd=tmp_path,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512)),
        )[0]
        == 0
    )
    rc, _, err = cli(
        "merge",
        "s0",
        "s1",
        "-o",
        "out2",
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert (
        rc == 1
        and "ulimit -n" in err
        and len(err.strip().splitlines()) <= 3
        and not (tmp_path/"out2").exists()
    )


def test_adapters_without_a_base(models, tmp_path):
    save(
        tmp_path/"ad",
        {
            "base_model.model.q.lora_A.weight": torch.randn(2, 4),
            "base_model.model.q.lora_B.weight": torch.randn(4, 2),
        },
    )
    (tmp_path/"ad"/"adapter_config.json").write_text(
        json.dumps(dict(peft_type="LORA", r=2, lora_alpha=2))
    )
    refused("ad", "m0", cwd=tmp_path, says="m0|full model|BASE+ADAPTER")
    refused("m1", "m2", "--base", "ad", cwd=tmp_path, says="ad|adapter|BASE+ad")
    refused("m0+ad", "m1", cwd=tmp_path, says="'q.weight'|does not fit|[8, 11]")


def test_nothing_to_merge(tmp_path):
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([])
    with pytest.raises(ValueError, match="list of models"):
        merge(tensors())
    with pytest.raises(ValueError, match="not a tensor"):
        merge([{"a": 3}])
    with pytest.raises(ValueError, match="matches no tensor"):
        merge([tensors(), tensors(1)], weights={"q.wieght": [1, 2]})
    with pytest.raises(ValueError, match="not a Geometry"):
        merge([tensors()], geometry=3)


class TestDisk:
    "A full disk, a kill, an interrupt: nothing half-written under the name that was asked for."

    def big(self, tmp_path):
        for i in range(2):
            save(tmp_path/f"b{i}", {f"w{k}": torch.randn(1 << 20) for k in range(4)})

    def test_full_disk(self, tmp_path):
        """RLIMIT_FSIZE makes the kernel refuse to grow a file, as a full disk does, when the shards
        are laid out."""
        self.big(tmp_path)
        rc, _, err = cli(
            "merge",
            "b0",
            "b1",
            "-o",
            "out",
            cwd=tmp_path,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        )
        assert rc == 1 and "0.02 GB" in err and len(err.strip().splitlines()) <= 3, err
        assert sorted(os.listdir(tmp_path)) == ["b0", "b1"]

    @pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
    def test_no_space_left(self, models, tmp_path, monkeypatch, call):
        import errno

        calls = []

        def full(*a):
            calls.append(a)
            if len(calls) > 3 or call == "posix_fallocate":
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*a)

        real = getattr(os, call)
        monkeypatch.setattr(os, call, full)
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(MergeError, match="No space left on device.*GB"):
            merge(models, out=tmp_path/"out")
        assert calls and sorted(os.listdir(tmp_path)) == before

    def start(self, tmp_path):
        "The command, held in the middle of its merge."
        self.big(tmp_path)
        code = (
            "import time, sys\n"
            "from frechet_merge import cli\n"
            "import frechet_merge.merging.merge\n"
            "m = sys.modules['frechet_merge.execution.block']\n"
            "real, calls = m.merge_block, []\n"
            "def slow(*a):\n"
            "    calls.append(a)\n"
            "    if len(calls) == 3: print('half', flush=True); time.sleep(60)\n"
            "    return real(*a)\n"
            "m.merge_block = slow; sys.argv = ['frechet-merge', 'merge', 'b0', 'b1', "
            "'-o', 'out', '--executor', 'serial']\n"
            "cli.main()"
        )
        # ignored if these tests run in the background of a script
        p = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert p.stdout.readline() == "half\n"
        return p

    @pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
    def test_stopped_halfway(self, tmp_path, how):
        p = self.start(tmp_path)
        p.send_signal(how)
        p.wait(20)
        assert p.returncode != 0 and sorted(os.listdir(tmp_path)) == ["b0", "b1"]

    def test_killed_halfway(self, tmp_path):
        "What SIGKILL leaves is hidden, and the next merge into the same folder clears it."
        p = self.start(tmp_path)
        rc, _, err = cli("merge", "b0", "b1", "-o", "out", cwd=tmp_path)
        assert rc == 1 and "another merge is writing it" in err
        p.kill()
        p.wait(20)
        left, *models = sorted(os.listdir(tmp_path))
        assert left.startswith(".out.") and models == ["b0", "b1"]
        assert cli("merge", "b0", "b1", "-o", "out", cwd=tmp_path)[0] == 0
        assert (
            sorted(os.listdir(tmp_path)) == ["b0", "b1", "out"] and len(load(tmp_path/"out")) == 4
        )


def test_eight_bits_that_would_saturate():
    def w(*x):
        return {"w": torch.tensor(x).to(torch.float8_e4m3fn)}

    with pytest.raises(
        MergeError,
        match="'w' would be written with 1 values that float8_e4m3fn cannot hold, the first "
        "of them 8",
    ):
        merge([w(300.0, 0.1)], base=w(0.0, 0.0), scale=3.0)
    assert torch.equal(
        merge([w(448.0, 0.125)]*2).tensors["w"].float(), torch.tensor([448.0, 0.125])
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64], ids=str)
def test_a_dtype_that_is_no_real_number(dtype):
    with pytest.raises(ValueError, match="no floating-point dtype"):
        merge([{"w": torch.randn(3)}]*2, dtype=dtype)


@pytest.mark.parametrize(
    "how, says",
    [
        ({"device": "meta"}, "there is no device 'meta' here"),
        ({"scale": "2"}, "must be numbers"),
        ({"weights": "11"}, "must be numbers"),
    ],
    ids=["meta", "scale", "weights"],
)
def test_arguments_that_are_no_numbers_or_devices(how, says):
    with pytest.raises(ValueError, match=says):
        merge([{"w": torch.ones(3)}]*2, base={"w": torch.zeros(3)}, **how)


def test_one_model_and_one_model_twice_are_noticed(models, tmp_path):
    for more, says in (
        ([], "is the only model"),
        (["m0"], "m0 is named 2 times"),
        (["m0/model.safetensors"], "is named 2 times"),
    ):
        code, _, err = cli(
            "merge",
            "m0",
            *more,
            "-o",
            f"out{len(more)}{says[:2]}{'/' in ''.join(more)}",
            cwd=tmp_path,
        )
        assert code == 0 and says in err
    assert not cli("merge", "m0", "m1", "-o", "quiet", cwd=tmp_path)[2]


def test_inspect_of_what_has_little_in_common_is_short(models, tmp_path):
    save(tmp_path/"other", {f"x{i}": torch.ones(2) for i in range(30)})
    code, out, _ = cli("inspect", "m0", "other", cwd=tmp_path)
    assert code == 1 and out.count("missing:") == 11 and "more tensors; --json has all" in out


def test_a_prefix_is_no_difference(tmp_path):
    "What `merge` merges, `inspect` compares."
    a, b = (
        {f"{lead}a.weight": torch.randn(3, 4), f"{lead}a.bias": torch.randn(3)}
        for lead in ("bert.", "")
    )
    found = inspect([a, b])
    assert found.mergeable and [r["name"] for r in found.tensors] == [
        "bert.a.weight",
        "bert.a.bias",
    ]
    assert inspect([a], b).mergeable and set(merge([a, b]).tensors) == set(a)


def test_a_name_is_looked_up_without_its_tensor(models, monkeypatch):
    c = load(models[0])
    monkeypatch.setattr(FileTensor, "_pread", lambda *_: pytest.fail("a tensor was read"))
    assert "q.weight" in c and "no.weight" not in c and c.keys() & {"q.bias", "x"} == {"q.bias"}


@pytest.mark.parametrize(
    "names, says",
    [
        (["./nowhere", "m0"], "./nowhere: there is no such folder"),
        (["m0,m1"], "separated by spaces"),
        (["a/b/c", "m0"], "OWNER/NAME"),
        (["x\nlicense: mit\n---", "m0"], r"x\nlicense: mit\n---: not a folder"),
    ],
)
def test_places_that_are_not_there(models, tmp_path, names, says):
    refused(*names, cwd=tmp_path, says=says)


def test_models_in_the_place_of_their_metrics(models, tmp_path):
    refused(
        "m0",
        "m1",
        "--metrics",
        "m0,m1",
        cwd=tmp_path,
        says="m0: is a model, and not statistics|frechet-merge curvature",
    )


def test_revisions_may_have_slashes(monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, revision, **_: asked.append((repo, revision)) or "nowhere",
    )
    for name in ("org/model@refs/pr/3", "model@v1.0"):
        with pytest.raises(MergeError):
            load(name)
    assert asked == [("org/model", "refs/pr/3"), ("model", "v1.0")]

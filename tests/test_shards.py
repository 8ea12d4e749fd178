"""The container: what we write, safetensors reads; what lies, is refused."""

import errno
import json
import os
import struct

import pytest
import torch
from conftest import tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from frechet_merge.files.shards import CODES, ShardWriter, plan, read_header
from frechet_merge.messages import MergeError


def test_safetensors_reads_what_we_write(tmp_path):
    state = {
        str(d): (torch.randn(3, 5) if d.is_floating_point else torch.ones(3, 5)).to(d)
        for d in CODES
    } | tensors()
    w = ShardWriter(tmp_path, {k: (tuple(v.shape), v.dtype) for k, v in state.items()}, 10**9)
    for name, x in reversed(state.items()):
        flat = x.reshape(-1)
        for i in reversed(range(0, len(flat), 4)):
            w.write(name, i, flat[i : i + 4])
    w.close()
    back = load_file(tmp_path/"model.safetensors")
    for k, x in state.items():
        assert back[k].dtype == x.dtype and back[k].shape == x.shape
        assert torch.equal(
            back[k].reshape(-1).view(torch.uint8), x.reshape(-1).view(torch.uint8)
        ), k


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 2000))
def test_shards_respect_their_size(sizes, limit):
    files = plan({f"t{i}": ((n,), torch.float32) for i, n in enumerate(sizes)}, limit)
    assert [n for g in files.values() for n in g] == [f"t{i}" for i in range(len(sizes))]
    for group in files.values():
        assert group and (len(group) == 1 or sum(4*s[0] for s, _ in group.values()) <= limit)


@pytest.fixture
def good(tmp_path):
    save_file(
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
        tmp_path/"x.safetensors",
    )
    return tmp_path/"x.safetensors"


def rewrite(path, change):
    "Apply `change` to the parsed header and keep the data."
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    change(header)
    blob = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(blob)) + blob + raw[8 + n :])


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda h: h["a"].update(shape=[2, 4]), "'a'.*needs 32 bytes"),
        (lambda h: h["a"].update(shape=[2**40, 2**40]), "'a'.*needs"),
        (lambda h: h["a"].update(shape=[-2, -3]), "'a'.*malformed"),
        (lambda h: h["a"].update(shape="2x3"), "'a'.*malformed"),
        (lambda h: h["a"].update(dtype="F\n1"), r"'a'.*has dtype 'F\\n1'"),
        (lambda h: h["a"].pop("data_offsets"), "'a'.*offsets"),
        (lambda h: h["b"].update(data_offsets=[0, 8]), "starts at byte"),
        (lambda h: h["a"].update(data_offsets=[-8, 16]), "'a'.*malformed"),
        (
            lambda h: h.update(c={"dtype": "F32", "shape": [1], "data_offsets": [32, 36]}),
            "the file has",
        ),
        (
            lambda h: h.update(c={"dtype": "F32", "shape": [1], "data_offsets": [1000, 1004]}),
            "starts at byte",
        ),
        (lambda h: h.update(c=[1, 2]), "'c'.*malformed"),
    ],
    ids=range(11),
)
def test_headers_that_lie(good, change, says):
    rewrite(good, change)
    with pytest.raises(MergeError, match=f"(?s){says}") as e:
        read_header(good)
    assert str(good) in str(e.value) and len(str(e.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"1234",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xfe",
        struct.pack("<Q", 50000) + b"["*50000,
    ],
    ids=range(7),
)
def test_files_that_are_not_safetensors(tmp_path, raw):
    (tmp_path/"x.safetensors").write_bytes(raw)
    with pytest.raises(MergeError):
        read_header(tmp_path/"x.safetensors")


def test_a_name_twice_in_a_header(tmp_path):
    one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    blob = f"{{{one},{one}}}".encode()
    (tmp_path/"x.safetensors").write_bytes(struct.pack("<Q", len(blob)) + blob + bytes(4))
    with pytest.raises(MergeError, match="appears twice"):
        read_header(tmp_path/"x.safetensors")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    cut=st.integers(0, 200),
    flips=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), max_size=4),
)
def test_damage_is_refused_or_harmless(tmp_path_factory, cut, flips):
    """Any truncation and any flipped bytes of the header: a MergeError, or a header that still
    tiles the file."""
    path = tmp_path_factory.mktemp("fuzz")/"x.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    raw = bytearray(path.read_bytes())[: len(path.read_bytes()) - cut if cut else None]
    for i, v in flips:
        if i < len(raw):
            raw[i] = v
    path.write_bytes(raw)
    try:
        entries, _ = read_header(path)
    except MergeError:
        return
    assert sum(e.nbytes for e in entries.values()) <= len(raw)
    assert all(e.offset + e.nbytes <= len(raw) for e in entries.values())


@pytest.mark.parametrize(
    "raw, kind",
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git LFS"),
        (b'{"text": "cat"}\n', "text"),
        (b"PK\x03\x04" + bytes(64), "a zip, as torch's pickles are"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
    ],
    ids=["gguf", "lfs", "text", "zip", "hdf5"],
)
def test_what_else_weights_come_in_is_named(tmp_path, raw, kind):
    (tmp_path/"x.gguf").write_bytes(raw)
    with pytest.raises(MergeError, match=f"is {kind}, and not"):
        read_header(tmp_path/"x.gguf")


def test_a_full_disk_leaves_no_file_open(tmp_path, monkeypatch):
    "An open file keeps its space when it is deleted."

    def here():
        return {
            os.readlink(f"/proc/self/fd/{n}")
            for n in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{n}")
        }

    made = []

    def full(fd, *_):
        made.append(fd)
        if len(made) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError):
        ShardWriter(tmp_path, {f"t{i}": ((100,), torch.float32) for i in range(5)}, 400)
    assert len(made) == 3 and not any(str(tmp_path) in f for f in here())


def test_numbers_that_the_format_does_not_hold(tmp_path):
    with pytest.raises(MergeError, match="'freqs' is torch.complex64"):
        ShardWriter(tmp_path, {"freqs": ((3,), torch.complex64)}, 400)
    assert not list(tmp_path.iterdir())

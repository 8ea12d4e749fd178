"""The safetensors container: headers that are checked before they are believed, shards laid out
before they are filled.

Hand-written, unlike the other modules: it is mechanism without a story. `nbs/00_tensors.ipynb` uses
it, `tests/test_shards.py` feeds it lies.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the tensors' bytes, row-major, with no gaps. """

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

# as headers name them → as torch does
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {v: k for k, v in DTYPES.items()}  # and back
# what else weights come in
MAGIC = {
    b"GGUF": "a GGUF file",
    b"PK\3\4": "a zip, as torch's pickles are",
    b"\x89HDF": "an HDF5 file",
}
MAX_HEADER = 100 << 20  # bytes; the reference implementation's own limit


class MergeError(ValueError):
    "Checkpoints that cannot be merged; the message names the file, the tensor and the remedy."


@dataclass(frozen=True)
class Entry:
    "Where one tensor lives: `nbytes` bytes at `offset` of `path`."

    path: str  # of the file
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]  # () for a scalar
    dtype: torch.dtype  # as stored

    @property
    def numel(self) -> int:
        "The number of elements."
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        "The size in bytes."
        return self.numel*self.dtype.itemsize


def _unique(pairs):
    names = [k for k, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the name {max(names, key=names.count)!r} appears twice")
    return dict(pairs)


def read_header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of a safetensors file, in file order; raises `MergeError` unless they
    tile the file exactly."""

    def bad(why):
        return MergeError(
            f"{path}: {why}.\nThe file is damaged or incomplete: download or save it again."
        )

    try:
        with open(path, "rb") as f:
            size, head = os.fstat(f.fileno()).st_size, f.read(8)
            if kind := next((k for m, k in MAGIC.items() if head.startswith(m)), None):
                raise MergeError(
                    f"{path}: is {kind}, and not safetensors.\n"
                    "Name the model that it was made of, or convert it first."
                )
            if head.startswith(b"version "):
                raise MergeError(
                    f"{path}: is a pointer of git LFS, and not the file that it points to.\n"
                    "Fetch it: git lfs pull."
                )
            if len(head) == 8 and all(9 <= x < 127 for x in head):
                raise MergeError(f"{path}: is text, and not safetensors.\nName a file of tensors.")
            if len(head) < 8:
                raise bad(f"{size} bytes is too short for a safetensors file")
            (n,) = struct.unpack("<Q", head)
            if n > min(MAX_HEADER, size - 8):
                raise bad(f"its header claims {n} bytes, the file has {size}")
            header = json.loads(f.read(n), object_pairs_hook=_unique)
    except OSError as e:
        raise MergeError(
            f"{path}: {e.strerror}.\n"
            "Check that every shard that the index names is there and readable."
        ) from e
    except (UnicodeDecodeError, RecursionError, ValueError) as e:
        if isinstance(e, MergeError):
            raise
        raise bad(f"its header is not valid JSON ({e})") from e
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    meta, entries = header.pop("__metadata__", None) or {}, {}
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise bad("its metadata is not a map of strings")
    for name, spec in header.items():
        if (
            isinstance(spec, dict)
            and isinstance(spec.get("dtype"), str)
            and spec["dtype"] not in DTYPES
        ):
            raise MergeError(
                f"{path}: tensor {name!r} has dtype {spec['dtype']}, which cannot be merged.\n"
                f"Convert it to one of {', '.join(DTYPES)}."
            )
        try:
            dtype, shape, (start, stop) = (
                DTYPES[spec["dtype"]],
                tuple(spec["shape"]),
                spec["data_offsets"],
            )
            if not all(type(s) is int and s >= 0 for s in (*shape, start, stop)):
                raise ValueError
        except KeyError as e:
            raise bad(f"tensor {name!r} lacks its dtype, shape or offsets ({e})") from e
        except (TypeError, ValueError) as e:
            raise bad(f"tensor {name!r} has a malformed shape or offsets") from e
        entries[name] = Entry(str(path), 8 + n + start, shape, dtype)
        if stop - start != entries[name].nbytes:
            raise bad(
                f"tensor {name!r} of shape {list(shape)} {spec['dtype']} needs "
                f"{entries[name].nbytes} bytes, its header says {stop - start}"
            )
    end, last = 8 + n, "the header"
    entries = dict(sorted(entries.items(), key=lambda kv: (kv[1].offset, kv[1].nbytes)))
    for name, e in entries.items():
        if e.offset != end:
            raise bad(f"tensor {name!r} starts at byte {e.offset}, but {last} ends at byte {end}")
        end, last = end + e.nbytes, f"tensor {name!r}"
    if end != size:
        raise bad(f"its header describes {end} bytes, the file has {size}")
    return entries, meta


def plan(
    tensors: dict[str, tuple[tuple, torch.dtype]],  # name → (shape, dtype)
    shard_size: int,  # bytes
    stem: str = "model",  # what file names begin with
) -> dict[str, dict]:
    """{file name: {tensor name: (shape, dtype)}}, greedily in order; a tensor larger than
    `shard_size` gets a shard of its own."""
    groups, room = [{}], shard_size
    for name, (shape, dtype) in tensors.items():
        n = math.prod(shape)*dtype.itemsize
        if n > room and groups[-1]:
            groups.append({})
            room = shard_size
        groups[-1][name] = (shape, dtype)
        room -= n
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, 1)}


class ShardWriter:
    """Safetensors shards whose every byte has its place before the first tensor is known.

    Construction writes the headers and reserves the disk space (so a disk that is too small says so now); `write` then
    fills any flat range of any tensor, in any order, from any thread. As a context it closes itself. Memory never holds more than the range being written.
    """

    def __init__(
        self,
        folder: Path,  # must exist, without files of these names (`FileExistsError`)
        # name → (shape, dtype), in the order of the file
        tensors: dict[str, tuple[tuple, torch.dtype]],
        shard_size: int,  # bytes; above it there are several files and an index
        stem: str = "model",  # what file names begin with
        metadata: dict[str, str] | None = None,  # for the header of every file
    ):
        if odd := next((n for n, (_, d) in tensors.items() if d not in CODES), None):
            raise MergeError(
                f"tensor {odd!r} is {tensors[odd][1]}, which safetensors files do not hold.\n"
                "Leave it out of the models, or merge in memory (out=None)."
            )
        self.entries, self.fds, files = {}, {}, plan(tensors, shard_size, stem)
        try:
            self._lay_out(folder, files, metadata or {})
        # files that are open keep their space when they are deleted
        except BaseException:
            self.close()
            raise
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(e.nbytes for e in self.entries.values())},
                "weight_map": {name: file for file, group in files.items() for name in group},
            }
            (folder/f"{stem}.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n"
            )

    def _lay_out(self, folder, files, metadata):
        for file, group in files.items():
            head: dict[str, dict] = {"__metadata__": {"format": "pt", **metadata}}
            end = 0
            for name, (shape, dtype) in group.items():
                n = math.prod(shape)*dtype.itemsize
                head[name] = {
                    "dtype": CODES[dtype],
                    "shape": list(shape),
                    "data_offsets": [end, end + n],
                }
                end += n
            blob = json.dumps(head, separators=(",", ":")).encode()
            blob += b" "*(-len(blob) % 8)
            path = str(folder/file)
            self.fds[path] = fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, 8 + len(blob) + end)
            # macOS
            else:
                os.truncate(fd, 8 + len(blob) + end)
            os.pwrite(fd, struct.pack("<Q", len(blob)) + blob, 0)
            for name, (shape, dtype) in group.items():
                self.entries[name] = Entry(
                    path, 8 + len(blob) + head[name]["data_offsets"][0], tuple(shape), dtype
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        "Put flat `values` at element `start` of tensor `name`, cast to its dtype."
        e = self.entries[name]
        data = (
            values.detach()
            .to("cpu", e.dtype)
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .data
        )
        at = e.offset + start*e.dtype.itemsize
        while data:
            done = os.pwrite(self.fds[e.path], data, at)
            data, at = data[done:], at + done

    def close(self) -> None:
        "Close the files; what was not written is zero."
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}

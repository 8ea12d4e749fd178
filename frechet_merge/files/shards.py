"""The safetensors container: headers that are checked before they are believed, shards laid out
before they are filled.

Hand-written, unlike the other modules: it is mechanism without a story. `nbs/files/tensors.ipynb`
uses it, `tests/test_shards.py` feeds it lies.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the tensors' bytes, row-major, with no gaps.
"""

import errno
import json
import math
import os
import stat
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path

import torch

from ..messages import MergeError

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
EXPONENTS = getattr(torch, "float8_e8m0fnu", None)  # powers of two; torch has them since 2.7
if EXPONENTS is not None:
    DTYPES["F8_E8M0"] = EXPONENTS
CODES = {v: k for k, v in DTYPES.items()}  # and back
# what else weights come in
MAGIC = {
    b"GGUF": "a GGUF file",
    b"PK\3\4": "a zip, as torch's pickles are",
    b"\x89HDF": "an HDF5 file",
}
# what a file begins with that stands in for one in a store: no header is as long as this says
STANDS_IN = b"stand-in"
MAX_HEADER = 100 << 20  # bytes; the reference implementation's own limit
MAX_TEXT = 128 << 20  # bytes of a config, an index or a tokenizer; the longest known has 34 MB
MAX_BYTES = 2**63 - 1  # of a tensor; what torch counts with
# bytes that are written at once, from which on it pays to have the system store them at once
STORED = 1 << 16


@dataclass(frozen=True)
class Stamp:
    "What tells a file from the one that replaces it, and from itself once it is written to."

    device: int | None  # the number of its file system; None: each machine has its own
    inode: int  # its number there
    size: int  # bytes
    mtime: int  # nanoseconds

    @classmethod
    def of(cls, found: os.stat_result) -> "Stamp":
        "The stamp of a file by what the system says of it."
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def __reduce__(self):
        "Sent to another process, which may see the file system under another number."
        return Stamp, (None, self.inode, self.size, self.mtime)


# slots: a model of many small experts has hundreds of thousands of these
@dataclass(frozen=True, slots=True)
class Entry:
    "Where one tensor lives: `nbytes` bytes at `offset` of `path`."

    path: str  # of the file
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]  # () for a scalar
    dtype: torch.dtype  # as stored
    stamp: Stamp | None = None  # of the file when its header was read

    @property
    def numel(self) -> int:
        "The number of elements."
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        "The size in bytes."
        return self.numel*self.dtype.itemsize


class Unreadable(MergeError, OSError):
    "What a disk said of a file that was to be read: an error of both kinds."

    def __init__(self, path: str | os.PathLike, said: OSError):
        remedy = "Check the path, its disk, and who may read it."
        if said.errno == errno.ENOENT:
            remedy = "Check that it is there: an index or a link may name what is not."
        if said.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "Allow more open files: ulimit -n 65536."
        super().__init__(f"{path}: cannot be read ({said.strerror or said}).\n{remedy}")
        self.errno, self.strerror, self.filename = said.errno, said.strerror, os.fspath(path)

    def __str__(self):
        "The message, as of any `MergeError`."
        return self.args[0]

    def __reduce__(self):
        "From another process, it is the same."
        return Unreadable, (self.filename, OSError(self.errno, self.strerror))


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    "Within, what a disk says of this file is `Unreadable`, and names it."
    try:
        yield
    except Unreadable:
        raise
    except OSError as e:
        raise Unreadable(path, e) from e


def open_file(path: str | os.PathLike) -> int:
    """A descriptor to read a file by; `MergeError` if it is something else (a pipe would never
    end), `Unreadable` if it cannot be opened."""
    # before it is opened, since that may wait for a writer or wake a device
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        raise Unreadable(path, e) from e
    # a zero byte, or half of a character
    except ValueError as e:
        raise MergeError(f"{path}: is no name that a file can have ({e}).") from e
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise MergeError(f"{path}: is {kind}, and not a file.\nPut the file itself there.")
    with reading(path):
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def read_bytes(
    path: str | os.PathLike,
    most: int = MAX_TEXT,  # bytes
) -> bytes:
    "All of a file of text; `MergeError` as in `open_file`, or if none can be so long."
    with reading(path), open(open_file(path), "rb") as f:
        # as much memory is set aside as is asked for; a byte more tells whether it grew
        found = f.read(min(os.fstat(f.fileno()).st_size, most) + 1)
    # a sparse file costs nobody anything, and would fill the memory
    if len(found) > most:
        raise MergeError(
            f"{path}: has more than {most >> 20} MiB, which no file of text beside a model "
            "has.\nThe file is damaged: download or save it again."
        )
    return found


def pieces_of(path: str | os.PathLike) -> Iterator[bytes]:
    "The bytes of a file, a MiB at a time: those that it has when it is opened, if it grows."
    with open(open_file(path), "rb") as f:
        left = os.fstat(f.fileno()).st_size
        while left > 0:
            with reading(path):
                piece = f.read(min(left, 1 << 20))
            if not piece:
                return
            left -= len(piece)
            yield piece


def same_bytes(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    "Whether two files hold the same, however long they are; `MergeError` as in `open_file`."
    return all(a == b for a, b in zip_longest(pieces_of(one), pieces_of(other)))


def refuse_another(
    path: str | os.PathLike,
    stamp: Stamp | None,  # None: it has none
    found: os.stat_result,
    since: str = "its header was read",
):
    "`MergeError` if a file is not any more what it was."
    now = Stamp.of(found)
    if stamp is None or stamp == now or stamp == replace(now, device=None):
        return
    is_cut = now.inode == stamp.inode and now.size < stamp.size
    how = "was cut short" if is_cut else "was replaced or written to"
    raise MergeError(
        f"{path}: {how} after {since}.\n"
        "Wait until nothing writes to it, and start again."
    )


def _damaged(path, why) -> MergeError:
    return MergeError(
        f"{path}: {why}.\nThe file is damaged or incomplete: download or save it again."
    )


def _refuse_another_format(path, head: bytes):
    "`MergeError` if the first 8 bytes are known to be something else's."
    kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    if kind:
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


def stand_in(size: int, header: bytes, **said: str) -> bytes:
    "A file in the place of one in a store, with its header and without its numbers."
    line = json.dumps({"size": size, **said}).encode()
    return STANDS_IN + line + b"\n" + header


def _stood_for(path, f) -> dict:
    "What a file that stands in for another says of it, in the line behind its first 8 bytes."
    try:
        said = json.loads(f.readline(1 << 16))
    except (RecursionError, ValueError):
        said = None
    if not isinstance(said, dict) or type(said.get("size")) is not int:
        raise _damaged(path, "it stands in for a file in a store, and does not say for which")
    return said


def stood_for(path: str | os.PathLike) -> dict | None:
    "What a file that stands in for one in a store says of it; None: it is no such file."
    with reading(path), open(open_file(path), "rb") as f:
        return _stood_for(path, f) if f.read(8) == STANDS_IN else None


def header_length(
    path: str | os.PathLike,  # for messages
    head: bytes,  # its first 8 bytes
    size: int,  # bytes, of the file
) -> int:  # bytes
    "How long a header is; `MergeError` if it cannot be, or the file is of another format."
    _refuse_another_format(path, head)
    if len(head) < 8:
        raise _damaged(path, f"{size} bytes is too short for a safetensors file")
    (n,) = struct.unpack("<Q", head)
    if n > min(MAX_HEADER, size - 8):
        raise _damaged(path, f"its header claims {n} bytes, the file has {size}")
    return n


def _raw_header(path) -> tuple[bytes, Stamp]:
    "The bytes of the header, and which file they are of."
    with reading(path), open(open_file(path), "rb") as f:
        stamp, head = Stamp.of(os.fstat(f.fileno())), f.read(8)
        if head == STANDS_IN:
            stamp = replace(stamp, size=_stood_for(path, f)["size"])
            return f.read(MAX_HEADER), stamp
        return f.read(header_length(path, head, stamp.size)), stamp


def _unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        # not by counting each: a hostile header has many names
        (name, _), *_ = Counter(k for k, _ in pairs).most_common(1)
        raise ValueError(f"the name {name!r} appears twice")
    return found


def _parsed(path, raw: bytes) -> tuple[dict, dict]:
    "What the header says of each tensor, and its metadata."
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (RecursionError, ValueError) as e:
        raise _damaged(path, f"its header is not valid JSON ({e})") from e
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    meta = header.pop("__metadata__", None)
    meta = {} if meta is None else meta
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise _damaged(path, "its metadata is not a map of strings")
    # what was decoded has whole characters, but for those that JSON spells
    spelled = (*header, *meta, *meta.values()) if b"\\u" in raw else ()
    odd = next((x for x in spelled if not _is_unicode(x)), None)
    if odd is not None:
        raise _damaged(path, f"its header has half of a character, in {odd[:80]!r}")
    return header, meta


def _is_unicode(text: str) -> bool:
    "Can it be encoded? JSON can spell half of a surrogate pair, which no encoding holds."
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_beyond_memory(shape, dtype) -> bool:
    "Can torch not count its bytes? Zeros aside, as it counts the steps between rows."
    n = dtype.itemsize
    for side in shape:
        n *= side or 1
        # at once: the product of a long shape is itself more than memory can hold
        if n > MAX_BYTES:
            return True
    return False


def _entry(path, name: str, spec, start: int, stamp: Stamp) -> tuple[Entry, int]:
    "Where a tensor lives, by what the header says of it, and how many bytes that says it has."
    code = spec.get("dtype") if isinstance(spec, dict) else None
    if code in ("C64", "C128"):
        raise MergeError(
            f"{path}: tensor {name!r} is complex, and geometries are of real numbers.\n"
            "Save both parts of each number (torch.view_as_real), and put them together in the "
            "result (torch.view_as_complex)."
        )
    if isinstance(code, str) and code not in DTYPES:
        raise MergeError(
            f"{path}: tensor {name!r} has dtype {code!r}, which cannot be merged.\n"
            f"Convert it to one of {', '.join(DTYPES)}."
        )
    try:
        dtype, shape = DTYPES[spec["dtype"]], tuple(spec["shape"])
        begin, end = spec["data_offsets"]
    except KeyError as e:
        raise _damaged(path, f"tensor {name!r} lacks its dtype, shape or offsets ({e})") from e
    except (TypeError, ValueError) as e:
        raise _damaged(path, f"tensor {name!r} has a malformed shape or offsets") from e
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise _damaged(path, f"tensor {name!r} has a malformed shape or offsets")
    if _is_beyond_memory(shape, dtype):
        raise _damaged(path, f"tensor {name!r} needs more bytes than any memory has")
    return Entry(str(path), start + begin, _shared(shape), dtype, stamp), end - begin


@lru_cache(4096)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    "One copy of a shape, for all tensors that have it."
    return shape


def _refuse_gaps(path, entries: dict[str, Entry], start: int, size: int):
    "`MergeError` unless the tensors, in the order of the file, fill it to its last byte."
    end, last = start, "the header"
    for name, e in entries.items():
        if e.offset != end:
            raise _damaged(
                path, f"tensor {name!r} starts at byte {e.offset}, but {last} ends at byte {end}"
            )
        end, last = end + e.nbytes, f"tensor {name!r}"
    if end != size:
        raise _damaged(path, f"its header describes {end} bytes, the file has {size}")


def read_header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of a safetensors file, in file order; raises `MergeError` unless they
    tile the file exactly."""
    raw, stamp = _raw_header(path)
    header, meta = _parsed(path, raw)
    start, found = 8 + len(raw), []
    # what the header says of a tensor takes more room than its entry, and makes room for it
    for name in [*header]:
        spec = header.pop(name)
        e, nbytes = _entry(path, name, spec, start, stamp)
        if nbytes != e.nbytes:
            raise _damaged(
                path,
                f"tensor {name!r} of shape {list(e.shape)} {spec['dtype']} needs "
                f"{e.nbytes} bytes, its header says {nbytes}",
            )
        found.append((e.offset, nbytes, name, e))
    # in the order of the header, where two tensors begin and end at one place
    found.sort(key=itemgetter(0, 1))
    # one copy of a name, for all models that have it
    entries = {sys.intern(name): e for _, _, name, e in found}
    _refuse_gaps(path, entries, start, stamp.size)
    return entries, meta


def bytes_of_tensors(path: str | Path) -> int:
    "How many bytes of a safetensors file are tensors: all behind its header, which they tile."
    raw, stamp = _raw_header(path)
    return stamp.size - 8 - len(raw)


def read_metadata(path: str | Path) -> dict[str, str]:
    "The metadata of a safetensors file whose header was held to its tensors already."
    raw, _ = _raw_header(path)
    # a hundred thousand names need not be read again for nothing
    return _parsed(path, raw)[1] if b"__metadata__" in raw or b"\\u" in raw else {}


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


def index_name(stem: str) -> str:
    "The index of shards, which for a variant (model.fp16) has the variant's name behind it."
    name, _, variant = stem.partition(".")
    if variant and name in ("model", "diffusion_pytorch_model"):
        return f"{name}.safetensors.index.{variant}.json"
    return f"{stem}.safetensors.index.json"


class Ledger:
    "How much of each tensor was written: no range may leave its tensor, and none may be missing."

    def __init__(self, sizes: dict[str, int]):  # name → elements
        self.sizes, self.written = sizes, dict.fromkeys(sizes, 0)

    def enter(self, name: str, start: int, count: int):
        "`MergeError` unless the `count` elements from `start` on lie in the tensor."
        if start < 0 or start + count > self.sizes[name]:
            raise MergeError(
                f"tensor {name!r} has {self.sizes[name]} elements, and {count} were to be written "
                f"from element {start} on.\n"
                "This is a fault of the geometry, or of this library: report it."
            )
        self.written[name] += count

    def close(self):
        "`MergeError` if a tensor was not written to its last element."
        for name, size in self.sizes.items():
            if self.written[name] < size:
                raise MergeError(
                    f"tensor {name!r} has {size} elements, and {self.written[name]} were written.\n"
                    "This is a fault of the geometry, or of this library: report it."
                )


def _refuse_what_no_file_holds(
    tensors: dict[str, tuple[tuple, torch.dtype]],
    metadata: dict[str, str],  # further names, too
):
    "`MergeError` for a name or dtype that a safetensors file cannot have."
    for name in (*tensors, *metadata):
        if not isinstance(name, str) or not _is_unicode(name) or name == "__metadata__":
            raise MergeError(
                f"tensor {name!r} has a name that safetensors files cannot hold.\n"
                "Rename it in the models, or merge in memory (out=None)."
            )
    if odd := next((k for k, v in metadata.items() if not _is_unicode(v)), None):
        raise MergeError(
            f"{odd}: {metadata[odd]!r} has half of a character, which safetensors files cannot "
            "hold.\nRename it."
        )
    # readers ask there which library the tensors are of
    if metadata.get("format", "pt") != "pt":
        raise MergeError(
            "tensor 'format' shares its memory with another, and is a word that safetensors "
            "files use themselves.\n"
            "Rename it in the models, or merge in memory (out=None)."
        )
    if odd := next((n for n, (_, d) in tensors.items() if d not in CODES), None):
        raise MergeError(
            f"tensor {odd!r} is {tensors[odd][1]}, which safetensors files do not hold.\n"
            "Leave it out of the models, or merge in memory (out=None)."
        )


def header_of(
    # name → (shape, dtype), in the order of the file
    tensors: dict[str, tuple[tuple, torch.dtype]],
    metadata: dict[str, str],
    path: str = "",  # of the file, for its entries
) -> tuple[bytes, dict[str, Entry], int]:  # the first bytes, the tensors' places, the file's size
    "The header of a safetensors file, the same bytes for the same arguments."
    head: dict[str, dict] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape)*dtype.itemsize
        head[name] = {"dtype": CODES[dtype], "shape": [*shape], "data_offsets": [begin, end]}
    blob = json.dumps(head, separators=(",", ":")).encode()
    blob += b" "*(-len(blob) % 8)
    if len(blob) > MAX_HEADER:
        raise MergeError(
            f"the names of {len(tensors)} tensors take {len(blob)} bytes, and a safetensors file "
            f"has room for {MAX_HEADER}.\nWrite smaller files (shard_size=, --shard-size)."
        )
    start = 8 + len(blob)
    entries = {
        name: Entry(path, start + head[name]["data_offsets"][0], tuple(shape), dtype)
        for name, (shape, dtype) in tensors.items()
    }
    return struct.pack("<Q", len(blob)) + blob, entries, start + end


def _bytes(x: torch.Tensor) -> memoryview:
    "Its numbers in memory, row-major."
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def save_tensors(
    path: str | os.PathLike,  # file to write, or to write over
    tensors: dict[str, torch.Tensor],  # on the CPU
    metadata: dict[str, str] | None = None,
) -> None:
    "A safetensors file of tensors in memory, the same bytes for the same contents."
    layout = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    _refuse_what_no_file_holds(layout, metadata or {})
    head, _, _ = header_of(layout, metadata or {})
    with open(path, "wb") as f:
        f.write(head)
        for x in tensors.values():
            f.write(_bytes(x))


def _begin_to_store(fd: int, start: int, count: int):
    """Have the system begin to store what was just written: else nothing goes to the disk before
    the end, where all of it is waited for."""
    # Linux stores what it is told that nobody needs; what is not stored yet stays in memory
    if count >= STORED and hasattr(os, "posix_fadvise"):
        # a hint: who cannot take it stores later
        with suppress(OSError):
            os.posix_fadvise(fd, start, count, os.POSIX_FADV_DONTNEED)


class ShardWriter:
    """Safetensors shards whose every byte has its place before the first tensor is known.

    Construction writes the headers and reserves the disk space (so a disk that is too small says
    so now); `write` then fills any flat range of any tensor, in any order, from any thread. As a
    context it closes itself, and raises `MergeError` if something was left out. Memory never holds
    more than the range being written.
    """

    def __init__(
        self,
        folder: Path,  # must exist, without files of these names (`FileExistsError`), or `resume`
        # name → (shape, dtype), in the order of the file
        tensors: dict[str, tuple[tuple, torch.dtype]],
        shard_size: int,  # bytes; above it there are several files and an index
        stem: str = "model",  # what file names begin with
        metadata: dict[str, str] | None = None,  # for the header of every file
        # files that are there already are filled further, as if they were new
        resume: bool = False,
        # which files are written here, by their number from 0 on, and without an index; None: all
        has: Callable[[int], bool] | None = None,
    ):
        self.resume = resume
        _refuse_what_no_file_holds(tensors, metadata or {})
        self.entries, self.fds, files = {}, {}, plan(tensors, shard_size, stem)
        mine = files
        if has is not None:
            mine = {file: group for i, (file, group) in enumerate(files.items()) if has(i)}
        sizes = {n: math.prod(shape) for group in mine.values() for n, (shape, _) in group.items()}
        self.ledger = Ledger(sizes)
        try:
            for file, group in mine.items():
                self._lay_out(str(folder/file), group, metadata or {})
        # files that are open keep their space when they are deleted
        except BaseException:
            self.close()
            raise
        if len(files) > 1 and has is None:
            index = {
                "metadata": {"total_size": sum(e.nbytes for e in self.entries.values())},
                "weight_map": {name: file for file, group in files.items() for name in group},
            }
            (folder/index_name(stem)).write_text(json.dumps(index, indent=2) + "\n")

    @classmethod
    def of(cls, entries: dict[str, Entry]) -> "ShardWriter":
        "A writer of files that another process has laid out, which alone knows when all is done."
        self = cls.__new__(cls)
        self.resume, self.entries, self.fds = True, entries, {}
        self.ledger = Ledger({name: e.numel for name, e in entries.items()})
        for path in {e.path for e in entries.values()}:
            self.fds[path] = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        return self

    def _lay_out(self, path, group, metadata):
        "Write the header of one file, and reserve the space of its tensors."
        head, entries, size = header_of(group, metadata, path)
        how = os.O_RDWR | os.O_CREAT | (os.O_NOFOLLOW if self.resume else os.O_EXCL)
        self.fds[path] = fd = os.open(path, how, 0o666)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        # what was there may be longer; and macOS
        os.truncate(fd, size)
        os.pwrite(fd, head, 0)
        self.entries |= entries

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close()
        if kind is None:
            self.ledger.close()

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        "Put flat `values` at element `start` of tensor `name`, cast to its dtype."
        self.ledger.enter(name, start, values.numel())
        e = self.entries[name]
        data, at = _bytes(values.to("cpu", e.dtype)), e.offset + start*e.dtype.itemsize
        fd, begin = self.fds[e.path], at
        while data:
            done = os.pwrite(fd, data, at)
            data, at = data[done:], at + done
        _begin_to_store(fd, begin, at - begin)

    def flush(self, names: set[str]) -> None:
        "Have the files of some tensors on the disk."
        for path in {self.entries[name].path for name in names}:
            os.fsync(self.fds[path])

    def checksum(self, name: str, start: int, count: int) -> int:
        "CRC-32 of the bytes of `count` elements of a tensor from `start` on, as its file has them."
        e, found = self.entries[name], 0
        at = e.offset + start*e.dtype.itemsize
        end = at + count*e.dtype.itemsize
        while at < end:
            piece = os.pread(self.fds[e.path], min(end - at, 8 << 20), at)
            # the file is shorter than it should be
            if not piece:
                return -1
            found, at = zlib.crc32(piece, found), at + len(piece)
        return found

    def close(self) -> None:
        "Close the files; what was not written is zero."
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}

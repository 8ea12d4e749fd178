"""Folders of models, adapters and recipes in which something was changed at random, and a command
that is run on them in a process of its own."""

import gc
import io
import json
import os
import resource
import signal
import struct
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from conftest import save, tensors
from safetensors.torch import save_file

SECONDS = 20  # of processor time, after which a command counts as hanging
WAITED = 120  # seconds of any kind, after which it counts as hanging: a busy machine is no fault
MEMORY = 1_500_000_000  # bytes, beside what the process had
SECRET = "secret"  # a folder beside the models, which no command has to open

# what may stand where something else was meant
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 10**400, -(2**63), 0.5, 1e308,
    float("nan"), float("inf"), "", "a", "a"*5000, "\x1b[31mred", "two\nlines", "\r\x07", "\u202e",
    f"../{SECRET}/model.safetensors", f"../../{SECRET}/config.json", "/etc/passwd", "..", ".",
    "---\nlicense: mit\n---", "<script>alert(1)</script>", "(a+)+$", "*", "[", "%s%n", "{0}",
    "BF16", "F4", "I64", "float32", "llama", "LORA", [], {}, [[]], [None], [1, 2], [2, 2], [-1, 4],
    [0], [2**40, 2**40], {"a": 1}, {"": None}, {"0": {}}, "model.safetensors", "x.safetensors",
]  # fmt: skip


def nested(depth: int) -> Any:
    "Lists in lists."
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


# where a value is in a tree: the keys that lead to it
def places(tree: Any, at: tuple = ()) -> list[tuple]:
    inner = tree.items() if isinstance(tree, dict) else []
    if isinstance(tree, list):
        inner = enumerate(tree)
    return [at, *(p for k, x in inner for p in places(x, (*at, k)))]


def altered(tree: Any, rng: Random) -> Any:
    "A tree of JSON's kinds with one value replaced, removed, renamed or repeated."
    tree = deepcopy(tree)
    at = rng.choice(places(tree))
    if not at:
        return rng.choice(STRANGE)
    parent = tree
    for k in at[:-1]:
        parent = parent[k]
    how = rng.choice(["replace", "replace", "remove", "rename", "repeat", "nest"])
    value = parent[at[-1]]
    if how == "replace":
        parent[at[-1]] = rng.choice(STRANGE)
    elif how == "nest":
        parent[at[-1]] = nested(rng.choice([1, 2, 50]))
    elif how == "remove":
        del parent[at[-1]]
    elif isinstance(parent, list):
        parent.append(value)
    else:
        new = rng.choice([x for x in STRANGE if isinstance(x, str)])
        parent[new] = value
        if how == "rename":
            parent.pop(at[-1] if new != at[-1] else "", None)
    return tree


def damaged(data: bytes, rng: Random) -> bytes:
    "Bytes that are cut, flipped, doubled, or others altogether."
    how = rng.choice(["cut", "flip", "double", "insert", "empty", "deep", "other"])
    at = rng.randrange(len(data) + 1)
    if how == "cut":
        return data[:at]
    if how == "flip":
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if how == "double":
        return data + data
    if how == "insert":
        return data[:at] + rng.choice([b"\0", b"\xff\xfe", b"{", b"]", b"\x1b[2J"]) + data[at:]
    if how == "deep":
        return b"["*100_000
    return b"" if how == "empty" else bytes(rng.randrange(256) for _ in range(64))


def of_json(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.2:
        return damaged(data, rng)
    return json.dumps(altered(json.loads(data), rng)).encode()


def of_yaml(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.2:
        return damaged(data, rng)
    return yaml.safe_dump(altered(yaml.safe_load(data), rng), allow_unicode=True).encode("utf-8")


def of_safetensors(data: bytes, rng: Random) -> bytes:
    (n,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + n], data[8 + n :]
    how = rng.choice(["header", "header", "header", "length", "bytes", "short"])
    if how == "header":
        header = json.dumps(altered(json.loads(header), rng)).encode()
        return struct.pack("<Q", len(header)) + header + rest
    if how == "length":
        lie = rng.choice([0, 1, n - 1, n + 1, len(data), 10**8, 2**40, 2**63])
        return struct.pack("<Q", lie) + header + rest
    if how == "short":
        return data[: len(data) - rng.randrange(1, len(rest) + 1)] if rest else data[:-1]
    return damaged(data, rng)


WAYS: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": of_json,
    ".jsonl": damaged,
    ".safetensors": of_safetensors,
    ".yaml": of_yaml,
}


def swapped(file: Path, rng: Random) -> None:
    "Something else in place of a file."
    how = rng.choice(["folder", "fifo", "loop", "gone", "null"])
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "fifo":
        os.mkfifo(file)
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "null":
        file.symlink_to("/dev/zero")


def mutate(folder: Path, rng: Random) -> str:
    "Change one or two files of a folder; says which."
    said = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        files = sorted(f for f in folder.iterdir() if f.is_file() and not f.is_symlink())
        if not files:
            break
        file = rng.choice(files)
        said.append(file.name)
        if rng.random() < 0.1:
            swapped(file, rng)
            continue
        way = WAYS.get(file.suffix, damaged)
        try:
            file.write_bytes(way(file.read_bytes(), rng))
        except (ValueError, RecursionError, struct.error, yaml.YAMLError):
            # what the last round left is neither
            file.write_bytes(damaged(file.read_bytes(), rng))
    return ", ".join(said)


def _tokenizer(n: int) -> dict:
    vocab = {"<unk>": 0, **{f"t{i}": i for i in range(1, n)}}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    new = {"id": 0, "content": "<unk>", "special": True, "single_word": False}
    new |= {"lstrip": False, "rstrip": False, "normalized": False}
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", "added_tokens": [new], "model": model} | dict.fromkeys(parts)


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4,
    "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 6,
    "tie_word_embeddings": False, "torch_dtype": "float32", "id2label": {"0": "a", "1": "b"},
    "rope_scaling": {"type": "linear", "factor": 2.0}, "bos_token_id": 0,
}  # fmt: skip


def weights(seed: int) -> dict[str, torch.Tensor]:
    "Of a Llama with two layers."
    g = torch.Generator().manual_seed(seed)
    state = {"model.embed_tokens.weight": torch.randn(6, 4, generator=g)}
    state |= {"lm_head.weight": torch.randn(6, 4, generator=g), "model.norm.weight": torch.ones(4)}
    for i in range(2):
        for part in ("q", "k", "v", "o"):
            state[f"model.layers.{i}.self_attn.{part}_proj.weight"] = torch.randn(4, 4, generator=g)
        for part, shape in (("gate", (6, 4)), ("up", (6, 4)), ("down", (4, 6))):
            state[f"model.layers.{i}.mlp.{part}_proj.weight"] = torch.randn(*shape, generator=g)
        for part in ("input", "post_attention"):
            state[f"model.layers.{i}.{part}_layernorm.weight"] = torch.ones(4)
    return state


def full(folder: Path, seed: int) -> None:
    "A model of two layers, whole or in two shards, with what stands beside it."
    state, config = weights(seed), CONFIG
    if seed == 0:
        save(folder, state, config)
    else:
        save(folder, {}, config)
        (folder/"model.safetensors").unlink()
        names = sorted(state)
        of = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
        for file in sorted(set(of.values())):
            save_file({n: state[n] for n in names if of[n] == file}, folder/file)
        index = {"metadata": {"total_size": 100}, "weight_map": of}
        (folder/"model.safetensors.index.json").write_text(json.dumps(index))
    for name, x in {
        "tokenizer": _tokenizer(6),
        "tokenizer_config": {"tokenizer_class": "TokenizersBackend", "chat_template": "{{x}}"},
        "special_tokens_map": {"unk_token": {"content": "<unk>"}},
        "generation_config": {"bos_token_id": 0, "max_length": 20},
    }.items():
        (folder/f"{name}.json").write_text(json.dumps(x))


CHAT = [{"role": "user", "content": "t1 t2"}, {"role": "assistant", "content": "t3 t4 t5"}]


def told(file: Path, **more: Any) -> None:
    "Put keys into a file of JSON."
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def with_texts(folder: Path) -> Path:
    "Two models that split and pad texts, beside texts and chats."
    for i, name in enumerate(MODELS):
        full(folder/name, i % 2)
        told(folder/name/"tokenizer.json", pre_tokenizer={"type": "Whitespace"})
        told(folder/name/"tokenizer_config.json", pad_token="<unk>")
    (folder/"texts.jsonl").write_text('{"text": "t1 t2 t3"}\n'*4)
    (folder/"chats.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n")*4)
    return folder


def adapter(folder: Path, seed: int) -> None:
    "An adapter of the model's attention."
    g, state = torch.Generator().manual_seed(seed), {}
    for i in range(2):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_"
        state[f"{name}A.weight"] = torch.randn(2, 4, generator=g)
        state[f"{name}B.weight"] = torch.randn(4, 2, generator=g)
    folder.mkdir()
    save_file(state, folder/"adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "base_model_name_or_path": "base", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder/"adapter_config.json").write_text(json.dumps(config))


def kohya(folder: Path, seed: int) -> None:
    "A file of an image model's adapter."
    g, state = torch.Generator().manual_seed(seed), {}
    for i in range(2):
        stem = f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn1_to_q"
        state[f"{stem}.lora_down.weight"] = torch.randn(2, 4, generator=g)
        state[f"{stem}.lora_up.weight"] = torch.randn(4, 2, generator=g)
        state[f"{stem}.alpha"] = torch.tensor(2.0)
    folder.mkdir()
    said = {"ss_network_dim": "2", "ss_network_alpha": "2", "ss_tag_frequency": "{}"}
    save_file(state, folder/"lora.safetensors", said)


RECIPE = """\
models:
- {model: a, weight: 0.5}
- {model: b, weight: [0.2, 0.8]}
geometry: euclidean
base: a
scale: 1.0
dtype: fp32
"""
MERGEKIT = """\
merge_method: ties
base_model: a
models:
- {model: a, parameters: {weight: 0.5, density: 0.5}}
- {model: b, parameters: {weight: [{filter: q_proj, value: 1.0}, {value: 0.3}]}}
parameters: {normalize: true}
dtype: float32
"""


def recipe(folder: Path, seed: int) -> None:
    "A recipe, ours or mergekit's."
    folder.mkdir()
    (folder/"recipe.yaml").write_text(MERGEKIT if seed else RECIPE)


@dataclass(frozen=True)
class Target:
    "A command, and the folders that it reads."

    words: tuple[str, ...]  # with the folders' names
    made: dict[str, Callable[[Path, int], None]]  # folder → what makes it
    changed: tuple[str, ...]  # of them, which may be mutated


MODELS = {"a": full, "b": full}
ADAPTERS = {"x": adapter, "y": adapter}
TARGETS = {
    "merge": Target(("merge", "a", "b", "-o", "out"), MODELS, ("a", "b")),
    "base": Target(
        ("merge", "a", "b", "--base", "c", "--geometry", "ties", "-o", "out"),
        MODELS | {"c": full},
        ("c",),
    ),
    "union": Target(
        ("merge", "a", "b", "--tokenizer", "union", "-o", "out"), MODELS, ("a", "b")
    ),
    "adapters": Target(("merge", "x", "y", "-o", "out"), ADAPTERS, ("x", "y")),
    "baked": Target(("merge", "a+x", "-o", "out"), {"a": full, "x": adapter}, ("x", "a")),
    "kohya": Target(
        ("merge", "k/lora.safetensors", "l/lora.safetensors", "-o", "out"),
        {"k": kohya, "l": kohya},
        ("k", "l"),
    ),
    "convert": Target(("convert", "x", "--to", "mlx", "-o", "out"), {"x": adapter}, ("x",)),
    "resize": Target(("resize", "x", "--rank", "1", "-o", "out"), {"x": adapter}, ("x",)),
    "inspect": Target(("inspect", "a", "b"), MODELS, ("a", "b")),
    "extract": Target(
        ("extract", "a", "--base", "b", "--rank", "1", "-o", "out"), MODELS, ("a", "b")
    ),
    "recipe": Target(("run", "r/recipe.yaml", "-o", "out"), MODELS | {"r": recipe}, ("r",)),
    "mergekit": Target(("run", "s/recipe.yaml", "-o", "out"), MODELS | {"s": recipe}, ("s",)),
}


def build(folder: Path, target: Target) -> None:
    "What the target reads, whole, and a folder that is none of its business."
    folder.mkdir(exist_ok=True)
    for i, (name, make) in enumerate(target.made.items()):
        make(folder/name, 1 if name == "s" else i % 2)
    save(folder/SECRET, tensors(0), {"model_type": "secret"})


@dataclass(frozen=True)
class Heard:
    "What a command did."

    code: int | None  # its exit code; None: it did not end by itself
    text: str  # what it printed
    fault: str  # an exception that nobody foresaw
    opened: tuple[str, ...]  # files of the secret folder that it opened


def _in_the_child(words: tuple[str, ...], folder: Path) -> Heard:
    "The command, as the entry point would run it."
    from frechet_merge.cli.commands import app

    opened: list[str] = []

    def heard(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if f"/{SECRET}/" in path or path == "/etc/passwd":
                opened.append(path)

    sys.addaudithook(heard)
    os.chdir(folder)
    sys.argv = ["frechet-merge", *words]
    said, code, fault = io.StringIO(), 0, ""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=said)
    with redirect_stdout(said), redirect_stderr(said):
        try:
            app()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except ValueError as e:
            print("error: " + "\n".join(str(e).splitlines()), file=said)
            code = 1
        except BaseException as e:
            import traceback

            code, fault = 1, f"{type(e).__name__}: {e}\n" + traceback.format_exc()[-1500:]
    return Heard(code, said.getvalue(), fault, tuple(opened))


def warm() -> None:
    "Import here what every fork would import for itself."
    names = ["frechet_merge.cli.commands", "transformers.conversion_mapping", "peft", "yaml"]
    names += ["transformers.models.llama.modeling_llama", "transformers.models.auto", "tokenizers"]
    names += ["typer._adapters", "safetensors.torch"]
    for path in sorted((Path(__file__).parents[1]/"frechet_merge").glob("*/*.py")):
        names.append(f"frechet_merge.{path.parent.name}.{path.stem}")
    for name in names:
        with suppress(ImportError):
            import_module(name)
    # what is here stays, and no fork has to look at it
    gc.collect()
    gc.freeze()


def run(
    words: tuple[str, ...], folder: Path, largest: int | None = None, mask: int = 0o22
) -> Heard:
    """A command in a fork of this process, with a limit on its time and on its memory, and of
    `largest` bytes on each file that it writes."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(WAITED)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        used = int(Path("/proc/self/statm").read_text().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        if largest is not None:
            # then a write fails as on a full disk
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        os.umask(mask)
        heard = _in_the_child(words, folder)
        with os.fdopen(write, "w") as f:
            json.dump(vars(heard), f)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        text = f.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return Heard(None, "", f"ended by signal {status & 127}", ())
    heard = json.loads(text)
    return Heard(**heard | {"opened": tuple(heard["opened"])})


def wrong_with(heard: Heard, folder: Path) -> str:
    "What a command must never do, and this one did; empty if all is well."
    if heard.fault:
        return heard.fault
    if heard.opened:
        return f"opened {heard.opened}"
    if heard.code not in (0, 1, 2):
        return f"exit code {heard.code}"
    odd = {c for c in heard.text if ord(c) < 32 and c not in "\n\t\r" or c in "\x7f\u202e"}
    if odd:
        return f"printed {odd}"
    error = heard.text.partition("error: ")[2]
    if heard.code == 1 and len(error.splitlines()) > 3:
        return f"an error of {len(error.splitlines())} lines: {error}"
    left = sorted(p.name for p in folder.iterdir() if p.name.startswith((".", "out")))
    if heard.code and left:
        return f"left {left} behind"
    return ""

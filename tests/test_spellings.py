"""Files that are nearly in one of the dialects: what they mean, or what can be done."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dialects import close, deltas, dotted, in_memory, kohya, mean, randn

from frechet_merge import LoRA, load, merge
from frechet_merge.adapters.dialects import layers
from frechet_merge.merging.convert import convert
from frechet_merge.messages import MergeError

pytest.importorskip("diffusers")


def changed(file, change):
    state = change(load_file(file))
    save_file({name: x.contiguous() for name, x in state.items()}, file)
    return file


@pytest.mark.parametrize("where", [".lora_{}.default.weight", "_orig_mod", "module"])
def test_names_that_training_left_in_a_file_of_a_pipeline(tmp_path, where):
    def named(name):
        if where == "module":
            return f"module.{name}"
        if where == "_orig_mod":
            return name.replace("unet.", "unet._orig_mod.")
        return re.sub(r"[.]lora_([AB])[.]weight", lambda m: where.format(m[1]), name)

    how = dict(parts=("unet",), only=("Linear",))
    a, b = (dotted(tmp_path/f"{i}.safetensors", "sd", i, **how) for i in (1, 500))
    want = mean(deltas("sd", a), deltas("sd", b))
    changed(a, lambda state: {named(n): x for n, x in state.items()})
    close(deltas("sd", merge([a, b], out=tmp_path/"o.safetensors").out), want)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.int64, "vector"])
def test_an_alpha_of_any_type(tmp_path, kind):
    def other(name, x):
        if not name.endswith(".alpha"):
            return x
        return x.view(1) if kind == "vector" else x.to(kind)

    a = kohya(tmp_path/"a.safetensors", "sd", 1, parts=("text_encoder",))
    want = deltas("sd", a)
    changed(a, lambda state: {n: other(n, x) for n, x in state.items()})
    close(deltas("sd", merge([a, a], out=tmp_path/"o.safetensors").out), want)


def test_an_alpha_that_some_layers_lack_is_said(tmp_path):
    ends = ".lora_down.weight", ".lora_up.weight"
    state = {f"lora_unet_{n}{e}": randn(4, 4, seed=i) for n in "qk" for i, e in enumerate(ends)}
    state["lora_unet_q.alpha"] = torch.tensor(1.0)
    with pytest.warns(UserWarning, match="1 of 2 layers have no alpha.*'lora_unet_k'.*scaled by 1"):
        found = in_memory(state)
    torch.testing.assert_close(found["lora_unet_k"], 4*found["lora_unet_q"])


def test_many_strange_tensors_are_left_out_by_a_pattern():
    def state(seed):
        found = {}
        for name in ("lora_unet_q", "lora_unet_k"):
            found[f"{name}.lora_down.weight"] = randn(2, 6, seed=seed)
            found[f"{name}.lora_up.weight"] = randn(4, 2, seed=seed + 1)
            found[f"{name}.w_norm"] = randn(4)
        return found

    with pytest.raises(MergeError, match="w_norm' and 1 more") as said:
        merge([state(1), state(2)])
    drop = re.search(r"drop='([^']+)'", str(said.value))[1]
    assert len(merge([state(1), state(2)], LoRA(), drop=[drop]).tensors) == 6


def gauge(r, seed):
    "A matrix of condition 1000, and its inverse."
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.double))
    M = Q*torch.logspace(0, 3, r, dtype=torch.double)
    return M, torch.linalg.inv(M)


# how a dialect calls the input and the output factor of one layer, and their shapes
LAYERS = {
    "peft": ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"),
    "peft, named": ("base_model.model.q.lora_A.a.weight", "base_model.model.q.lora_B.a.weight"),
    "kohya": ("lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight"),
    "kohya, text": ("lora_te1_q.lora_down.weight", "lora_te1_q.lora_up.weight"),
    "kohya, convolution": ("lora_unet_c.lora_down.weight", "lora_unet_c.lora_up.weight"),
    "diffusers": ("unet.q.lora_A.weight", "unet.q.lora_B.weight"),
    "diffusers, text": ("text_encoder.q.lora_A.weight", "text_encoder.q.lora_B.weight"),
    "older diffusers": ("unet.q.lora.down.weight", "unet.q.lora.up.weight"),
    "oldest diffusers": (
        "unet.a.processor.to_q_lora.down.weight",
        "unet.a.processor.to_q_lora.up.weight",
    ),
    "comfy": ("diffusion_model.q.lora_down.weight", "diffusion_model.q.lora_up.weight"),
    "ai-toolkit": ("diffusion_model.q.lora_A.weight", "diffusion_model.q.lora_B.weight"),
    "black forest labs": (
        "double_blocks.0.img_mlp.0.lora_A.weight",
        "double_blocks.0.img_mlp.0.lora_B.weight",
    ),
    "mlx": ("q.lora_a", "q.lora_b"),
    "torchtune": ("q.lora_a.weight", "q.lora_b.weight"),
}


def folders(tmp_path, dialect, dtype):
    "Two adapters, and the same two in gauges of condition 1000."
    ends = LAYERS[dialect]
    config = dict(peft_type="LORA", r=4, lora_alpha=4, target_modules=["q"])
    if dialect == "mlx":
        config = dict(lora_parameters=dict(rank=4, scale=1.0))
    for k in range(4):
        A, B = randn(4, 12, seed=k % 2).to(dtype), randn(10, 4, seed=9 + k % 2).to(dtype)
        if k > 1:
            M, inverse = gauge(4, k)
            A, B = (M @ A.double()).to(dtype), (B.double() @ inverse).to(dtype)
        if "convolution" in dialect:
            A, B = A.view(4, 3, 2, 2), B.view(10, 4, 1, 1)
        pair = (A.mT, B.mT) if dialect == "mlx" else (A, B)
        folder = tmp_path/str(k)
        folder.mkdir()
        state = {name: x.contiguous() for name, x in zip(ends, pair)}
        save_file(state, folder/"adapter_model.safetensors")
        if dialect.startswith(("peft", "mlx", "torchtune")):
            (folder/"adapter_config.json").write_text(json.dumps(config))
    return [tmp_path/str(k) for k in range(4)]


def apart(a, b):
    (x,), (y,) = (in_memory_of(out).values() for out in (a, b))
    return float((x - y).norm()/x.norm())


def in_memory_of(out):
    return {n: x.factors().delta() for n, x in layers(load(out))[0].items()}


@pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dialect", LAYERS)
def test_gauges_move_no_merge_in_any_dialect(tmp_path, dialect, dtype, eps):
    a, b, *gauged = folders(tmp_path, dialect, dtype)
    plain = merge([a, b], out=tmp_path/"plain").out
    other = merge(gauged, out=tmp_path/"gauged").out
    assert apart(plain, other) <= eps


@pytest.mark.parametrize("to", ["peft", "mlx"])
@pytest.mark.parametrize("dialect", ["peft", "mlx"])
def test_gauges_move_no_merge_into_another(tmp_path, dialect, to):
    a, b, *gauged = folders(tmp_path, dialect, torch.float64)
    one = merge([a, b], to=to, out=tmp_path/"one").out
    other = merge(gauged, to=to, out=tmp_path/"other").out
    assert apart(one, other) <= 1e-10


def test_gauges_move_no_conversion(tmp_path):
    stem = "lora_unet_blocks_0_self_attn_q"
    A, B = randn(4, 12).double(), randn(10, 4).double()
    M, inverse = gauge(4, 1)
    ends = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
    files = [dict(zip(ends, pair)) for pair in ((A, B), (M @ A, B @ inverse))]
    (x,), (y,) = (in_memory(convert(f, "diffusers").tensors).values() for f in files)
    assert float((x - y).norm()/x.norm()) <= 1e-10

"""A quantised model is read as the numbers that its codes stand for, or refused by its name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from frechet_merge import load, merge
from frechet_merge.messages import MergeError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
W = "model.layers.0.mlp.down_proj"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save(folder, tensors, said=None, dtype="float32"):
    "A folder of a model with this quantization_config."
    folder.mkdir()
    state = {"model.norm.weight": torch.ones(4), **tensors}
    save_file({n: x.contiguous() for n, x in state.items()}, folder/"model.safetensors")
    config = {"model_type": "llama", "torch_dtype": dtype}
    config |= {} if said is None else {"quantization_config": said}
    (folder/"config.json").write_text(json.dumps(config))
    return folder


def check(folder, want, out, name=f"{W}.weight"):
    "Read whole, by uneven ranges, and as merged, it is what the oracle says."
    c = load(folder)
    assert set(c) == {"model.norm.weight", name}
    assert torch.equal(c[name], want.float())
    x = c.lazy[name]
    bounds = [*range(0, x.numel, 37), x.numel]
    parts = []
    for a, b in zip(bounds, bounds[1:]):
        row = torch.empty(b - a)
        x.into(row, a)
        parts.append(row)
    assert torch.equal(torch.cat(parts).view(want.shape), want.float())
    merge([folder, folder], out=out)
    assert "quantization_config" not in json.loads((out/"config.json").read_text())
    written = load_file(out/"model.safetensors")
    assert set(written) == {"model.norm.weight", name}
    torch.testing.assert_close(written[name].float(), want.float())


class TestBitsandbytes:
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    @pytest.mark.parametrize("shape", [(64, 128), (64, 96), (5, 7)])
    def test_four_bits(self, tmp_path, kind, nested, shape):
        functional = pytest.importorskip("bitsandbytes.functional")
        generic = pytest.importorskip("bitsandbytes.backends.default.ops")
        codes, state = functional.quantize_4bit(
            randn(*shape), blocksize=64, compress_statistics=nested, quant_type=kind
        )
        largest = state.absmax
        if nested:
            largest = functional.dequantize_blockwise(largest, state.state2) + state.offset
        # the CPU kernel reads blocks that cross the end of a row wrongly: this is CUDA's formula
        want = generic._dequantize_4bit_compute(
            codes.reshape(-1), largest.float(), state.code, 64, shape, torch.float32
        )
        beside = {f"{W}.weight.{k}": x for k, x in state.as_dict(packed=True).items()}
        said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        folder = save(tmp_path/"a", {f"{W}.weight": codes, **beside}, said)
        check(folder, want, tmp_path/"out")

    def test_eight_bits(self, tmp_path):
        functional = pytest.importorskip("bitsandbytes.functional")
        codes, largest, _ = functional.int8_vectorwise_quant(randn(24, 32).half())
        want = functional.int8_vectorwise_dequant(codes, largest)
        state = {f"{W}.weight": codes, f"{W}.SCB": largest}
        said = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        c = load(save(tmp_path/"a", state, said))
        torch.testing.assert_close(c[f"{W}.weight"], want.float())
        assert set(c) == {"model.norm.weight", f"{W}.weight"}


@pytest.mark.parametrize("method", ["hqq", "quanto", "aqlm", "vptq", "bitnet", "torchao", "exl2"])
def test_other_formats_are_refused_by_name(tmp_path, method):
    state = {f"{W}.weight": torch.ones(8, 8, dtype=torch.uint8)}
    folder = save(tmp_path/"a", state, {"quant_method": method})
    with pytest.raises(MergeError, match=rf"is quantised \({method}\).*not read") as e:
        merge([folder, folder])
    assert "bfloat16" in str(e.value)

"""A quantised model is read as the numbers that its codes stand for, or refused by its name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_examples import make

from frechet_merge import load, merge
from frechet_merge.diagnostics.inspection import inspect
from frechet_merge.huggingface.models import collect, open_model
from frechet_merge.merging.preview import preview
from frechet_merge.merging.recipe import Recipe
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
    assert "full precision" in str(e.value)


def scheme(kind, **of_weights):
    "A scheme of compressed-tensors, and its config."
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weights = quantization.QuantizationArgs(**of_weights)
    made = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    group = {"targets": ["Linear"], "weights": json.loads(weights.model_dump_json())}
    said = {"quant_method": "compressed-tensors", "format": kind}
    return made, said | {"config_groups": {"group_0": group}}


def compressed(kind, scheme, tensors):
    "What compressed-tensors saves of a module, and what it reads of that."
    base = pytest.importorskip("compressed_tensors.compressors.base")
    compressor = base.BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(tensors, scheme)
    want = compressor.decompress(dict(stored), scheme)["weight"]
    return {f"{W}.{n}": x for n, x in stored.items()}, want


class TestCompressedTensors:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("group", [32, None])
    def test_packed_integers(self, tmp_path, bits, symmetric, group):
        kind = "pack-quantized"
        strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        made, said = scheme(kind, num_bits=bits, type="int", symmetric=symmetric, **strategy)
        wide = 96//group if group else 1
        tensors = {"weight": randn(16, 96), "weight_scale": randn(16, wide, seed=1).abs()*0.1 + 0.1}
        high = 2**(bits - 1)
        zero = torch.randint(-high, high, (16, wide), generator=torch.Generator().manual_seed(2))
        tensors["weight_zero_point"] = (zero*0 if symmetric else zero).to(torch.int8)
        state, want = compressed(kind, made, tensors)
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("strategy", ["channel", "tensor", "group"])
    def test_integers_of_eight_bits(self, tmp_path, strategy, symmetric):
        kind = "int-quantized"
        group = {"group_size": 32} if strategy == "group" else {}
        made, said = scheme(
            kind, num_bits=8, type="int", symmetric=symmetric, strategy=strategy, **group
        )
        shape = {"channel": (16, 1), "tensor": (1,), "group": (16, 3)}[strategy]
        zero = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(2))
        tensors = {
            "weight": randn(16, 96),
            "weight_scale": randn(*shape, seed=1).abs()*0.1 + 0.01,
            "weight_zero_point": (zero*0 if symmetric else zero).to(torch.int8),
        }
        state, want = compressed(kind, made, tensors)
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
    def test_floats_of_eight_bits(self, tmp_path, strategy):
        kind = "float-quantized"
        block = {"block_structure": [16, 32]} if strategy == "block" else {}
        made, said = scheme(kind, num_bits=8, type="float", strategy=strategy, **block)
        shape = {"channel": (32, 1), "tensor": (1,), "block": (2, 3)}[strategy]
        tensors = {"weight": randn(32, 96), "weight_scale": randn(*shape, seed=1).abs()*0.1 + 0.01}
        state, want = compressed(kind, made, tensors)
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("wide", [32, 96])
    def test_mxfp8(self, tmp_path, wide):
        kind = "mxfp8-quantized"
        how = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        made, said = scheme(kind, num_bits=8, type="float", **how)
        scale = 2.0**randn(16, wide//32, seed=1).round()
        state, want = compressed(kind, made, {"weight": randn(16, wide), "weight_scale": scale})
        assert state[f"{W}.weight_scale"].dtype == torch.uint8
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("said", [None, {"quant_method": "compressed-tensors"}])
    def test_exponents_are_not_read_without_a_config(self, tmp_path, said):
        state = {
            f"{W}.weight": randn(16, 32).to(torch.float8_e4m3fn),
            f"{W}.weight_scale": torch.full((16, 1), 120, dtype=torch.uint8),
        }
        folder = save(tmp_path/"a", state, said)
        with pytest.raises(MergeError, match="does not say of which blocks the scale of"):
            merge([folder, folder])

    def test_floats_of_eight_bits_in_groups(self, tmp_path):
        kind = "float-quantized"
        made, said = scheme(kind, num_bits=8, type="float", strategy="group", group_size=32)
        scale = randn(16, 3, seed=1).abs()*0.1 + 0.01
        state, want = compressed(kind, made, {"weight": randn(16, 96), "weight_scale": scale})
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("of", ["float", "int"])
    def test_a_scale_that_the_config_does_not_mean_is_refused(self, tmp_path, of):
        # one number for a row of 96, where the config says one for 32
        _, said = scheme(f"{of}-quantized", num_bits=8, type=of, strategy="group", group_size=32)
        dtype = torch.float8_e4m3fn if of == "float" else torch.int8
        state = {f"{W}.weight": randn(16, 96).to(dtype), f"{W}.weight_scale": torch.ones(16, 1)}
        folder = save(tmp_path/"a", state, said)
        with pytest.raises(MergeError, match="the config has no block for the scale of"):
            merge([folder, folder])

    def test_each_layer_has_the_scheme_that_fits_it(self, tmp_path):
        kinds = {"channel": {}, "group": {"group_size": 32}}
        groups, state, wants = {}, {}, {}
        for name, more in kinds.items():
            how = {"num_bits": 8, "type": "float", "strategy": name, **more}
            made, said = scheme("float-quantized", **how)
            groups[name] = said["config_groups"]["group_0"]
            scale = randn(16, 3 if more else 1, seed=1).abs()*0.1 + 0.01
            stored, want = compressed(
                "float-quantized", made, {"weight": randn(16, 96), "weight_scale": scale}
            )
            state |= {n.replace(W, name): x for n, x in stored.items()}
            wants[f"{name}.weight"] = want
        c = load(save(tmp_path/"a", state, said | {"config_groups": groups}))
        for name, want in wants.items():
            assert torch.equal(c[name], want)

    def test_nvfp4(self, tmp_path):
        kind = "nvfp4-pack-quantized"
        made, said = scheme(
            kind, num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
        )
        tensors = {
            "weight": randn(16, 96),
            "weight_scale": randn(16, 6, seed=1).abs()*10 + 1,
            "weight_global_scale": torch.tensor([32.0]),
        }
        state, want = compressed(kind, made, tensors)
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    def test_mxfp4(self, tmp_path):
        kind = "mxfp4-pack-quantized"
        made, said = scheme(
            kind, num_bits=4, type="float", strategy="group", group_size=32, symmetric=True,
            scale_dtype="torch.uint8",
        )
        tensors = {"weight": randn(16, 96), "weight_scale": 2.0**randn(16, 3, seed=1).round()}
        state, want = compressed(kind, made, tensors)
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")


def pack(x, bits):
    "Rows of codes as words of 32 bits, the lowest bits first: one bit after the other."
    rows = []
    for row in x.tolist():
        stream = "".join(format(v, f"0{bits}b")[::-1] for v in row)
        words = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
        rows.append([w - 2**32 if w >= 2**31 else w for w in words])
    return torch.tensor(rows, dtype=torch.int32)


class TestWords:
    "GPTQ and AWQ, packed here bit by bit as their formats say."

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
    @pytest.mark.parametrize("ordered", [True, False])
    def test_gptq(self, tmp_path, bits, form, ordered):
        draw = torch.Generator().manual_seed(bits)
        k, n, group = 64, 96, 32
        q = torch.randint(0, 2**bits, (k, n), generator=draw)
        zero = torch.randint(1, 2**bits, (k//group, n), generator=draw)
        scale = torch.rand(k//group, n, generator=draw).half()
        at = torch.arange(k)//group
        at = at if ordered else at[torch.randperm(k, generator=draw)]
        want = ((q - zero[at]).float()*scale.float()[at]).T
        stored = zero - 1 if form == "gptq" else zero
        state = {
            f"{W}.qweight": pack(q.T, bits).T,
            f"{W}.qzeros": pack(stored, bits),
            f"{W}.scales": scale,
            f"{W}.g_idx": at.int(),
        }
        said = {"quant_method": "gptq", "bits": bits, "group_size": group}
        said["checkpoint_format"] = form
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_words_of_the_first_format_are_counted_up_as_a_whole(self, tmp_path, bits):
        # as gptqmodel reads it, which transformers asks: a zero point of 0 borrows from the next
        draw = torch.Generator().manual_seed(bits)
        q = torch.randint(0, 2**bits, (64, 32), generator=draw)
        zero = torch.randint(0, 2, (2, 32), generator=draw)
        scale = torch.rand(2, 32, generator=draw).half()
        at = torch.arange(64)//32
        want = ((q - zero[at]).float()*scale.float()[at]).T
        stored = pack(zero, bits).long() - sum(1 << b for b in range(0, 32, bits))
        state = {
            f"{W}.qweight": pack(q.T, bits).T, f"{W}.qzeros": stored.int(), f"{W}.scales": scale
        }
        said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False}
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("key", ["checkpoint_format", "format"])
    @pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
    def test_the_format_is_called_by_either_key(self, tmp_path, form, key):
        # transformers reads both
        gptq = pytest.importorskip("transformers").GPTQConfig
        assert gptq(bits=4, **{key: form}).format == form
        draw = torch.Generator().manual_seed(0)
        q = torch.randint(0, 16, (64, 32), generator=draw)
        zero = torch.randint(1, 16, (2, 32), generator=draw)
        scale = torch.rand(2, 32, generator=draw).half()
        at = torch.arange(64)//32
        want = ((q - zero[at]).float()*scale.float()[at]).T
        stored = pack(zero - 1 if form == "gptq" else zero, 4)
        state = {f"{W}.qweight": pack(q.T, 4).T, f"{W}.qzeros": stored, f"{W}.scales": scale}
        said = {"quant_method": "gptq", "bits": 4, "group_size": 32, key: form}
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("method, more", [
        ("gptq", {"format": "gptq_p"}), ("gptq", {"checkpoint_format": "marlin"}),
        ("gptq", {"is_marlin_format": True}), ("awq", {"format": "gemv"}),
        ("awq", {"version": "GEMV_FAST"}), ("awq", {"checkpoint_format": "llm-awq"}),
    ])
    def test_other_layouts_are_refused(self, tmp_path, method, more):
        q, zero = torch.zeros(32, 32, dtype=torch.int32), torch.zeros(1, 32, dtype=torch.int32)
        awq = method == "awq"
        state = {
            f"{W}.qweight": pack(q, 4) if awq else pack(q, 4).T.contiguous(),
            f"{W}.qzeros": pack(zero, 4), f"{W}.scales": torch.ones(1, 32),
        }
        said = {"quant_method": method, "bits": 4, "group_size": 32, **more}
        folder = save(tmp_path/"a", state, said)
        with pytest.raises(MergeError, match="4 bits in the layout '[a-z_-]+' are not read"):
            merge([folder, folder])

    @pytest.mark.parametrize("group", [32, -1])
    def test_awq(self, tmp_path, group):
        draw = torch.Generator().manual_seed(0)
        k, n = 64, 48
        groups = 1 if group < 0 else k//group
        q = torch.randint(0, 16, (k, n), generator=draw)
        zero = torch.randint(0, 16, (groups, n), generator=draw)
        scale = torch.rand(groups, n, generator=draw).half()
        at = torch.arange(k)//(k//groups)
        want = ((q - zero[at]).float()*scale.float()[at]).T
        # llm-awq's order_map: what the half bytes of a word hold, the lowest first
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

        def turned(x):
            return pack(x.view(len(x), -1, 8)[:, :, order].flatten(1), 4)

        state = {f"{W}.qweight": turned(q), f"{W}.qzeros": turned(zero), f"{W}.scales": scale}
        said = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")


class TestTransformers:
    "What transformers dequantises is read as transformers does."

    @pytest.mark.parametrize("shape, block", [((256, 384), [128, 128]), ((64, 32), [32, 16])])
    def test_fp8_in_blocks(self, tmp_path, shape, block):
        fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
        codes = randn(*shape).to(torch.float8_e4m3fn)
        inverse = randn(shape[0]//block[0], shape[1]//block[1], seed=1).abs()
        want = fp8.Fp8Dequantize(None)._dequantize_one(codes, inverse, torch.float32)
        state = {f"{W}.weight": codes, f"{W}.weight_scale_inv": inverse}
        said = {"quant_method": "fp8", "weight_block_size": block}
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu])
    @pytest.mark.parametrize("method", ["mxfp8", "fp8"])
    @pytest.mark.parametrize("wide", [16, 32, 96])
    def test_mxfp8(self, tmp_path, method, wide, stored):
        fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
        codes = randn(16, wide).to(torch.float8_e4m3fn)
        draw = torch.Generator().manual_seed(0)
        scale = torch.randint(118, 132, (16, -(-wide//32)), generator=draw).to(torch.uint8)
        scale = scale.view(stored)
        want = fp8.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
        state = {f"{W}.weight": codes, f"{W}.weight_scale_inv": scale}
        said = {"quant_method": method, "scale_fmt": "ue8m0"}
        # what its format says need not stand there
        said |= {"weight_block_size": [1, 32]} if method == "fp8" else {}
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("stored", [torch.float32, torch.uint8, torch.float8_e8m0fnu])
    @pytest.mark.parametrize("name", ["scale", "weight_scale_inv", "qscale_weight"])
    def test_scales_are_called_as_transformers_renames_them(self, tmp_path, name, stored):
        fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
        codes = randn(256, 384).to(torch.float8_e4m3fn)
        if stored == torch.float32:
            scale = randn(2, 3, seed=1).abs()
        else:
            scale = torch.arange(120, 126, dtype=torch.uint8).view(2, 3).view(stored)
        want = fp8.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
        state = {f"{W}.weight": codes, f"{W}.{name}": scale, f"{W}.qscale_act": torch.ones(())}
        said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("name", ["scale", "weight_scale_inv"])
    def test_experts_of_four_bits_beside_layers_of_eight(self, tmp_path, name):
        fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
        draw = torch.Generator().manual_seed(0)
        codes = torch.randint(-128, 128, (16, 48), generator=draw).to(torch.int8)
        scale = torch.randint(118, 132, (16, 3), generator=draw).to(torch.uint8)
        scale = scale.view(torch.float8_e8m0fnu)
        want = fp8.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
        state = {f"{W}.weight": codes, f"{W}.{name}": scale}
        said = {"quant_method": "fp8", "expert_dtype": "fp4", "weight_block_size": [128, 128]}
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    def test_mxfp4_of_gpt_oss(self, tmp_path):
        mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
        draw = torch.Generator().manual_seed(0)
        blocks = torch.randint(0, 256, (3, 32, 2, 16), generator=draw).to(torch.uint8)
        scales = torch.randint(120, 132, (3, 32, 2), generator=draw).to(torch.uint8)
        want = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        name = "model.layers.0.mlp.experts.down_proj"
        state = {f"{name}_blocks": blocks, f"{name}_scales": scales}
        folder = save(tmp_path/"a", state, {"quant_method": "mxfp4"})
        check(folder, want, tmp_path/"out", name)


class TestWithoutAConfig:
    "Floats of eight bits are numbers only if no scale of any name stands beside them."

    def test_mistral(self, tmp_path):
        codes, scale = randn(16, 32).to(torch.float8_e4m3fn), torch.tensor(0.37)
        state = {
            f"{W}.weight": codes, f"{W}.qscale_weight": scale, f"{W}.qscale_act": torch.ones(())
        }
        check(save(tmp_path/"a", state), codes.float()*scale, tmp_path/"out")

    @pytest.mark.parametrize("name", ["wscale", "scale", "weight_scales", "fp8_scale"])
    def test_a_scale_of_a_name_that_is_not_known_is_refused(self, tmp_path, name):
        state = {
            f"{W}.weight": randn(16, 32).to(torch.float8_e4m3fn), f"{W}.{name}": torch.ones(16, 1)
        }
        folder = save(tmp_path/"a", state)
        with pytest.raises(MergeError, match="8 bits with a scale beside them"):
            merge([folder, folder])

    def test_powers_of_two_are_scales(self, tmp_path):
        state = {f"{W}.weight": randn(4, 4), "other": torch.ones(4, 4).to(torch.float8_e8m0fnu)}
        folder = save(tmp_path/"a", state)
        with pytest.raises(MergeError, match="'other' is in codes"):
            merge([folder, folder])

    def test_a_scale_in_another_module_changes_nothing(self, tmp_path):
        eight = randn(16, 32).to(torch.float8_e4m3fn)
        state = {f"{W}.weight": eight, "model.norm.scale": torch.ones(4)}
        state["logit_scale"] = eight[0].clone()
        folder = save(tmp_path/"a", state)
        assert torch.equal(merge([folder, folder]).tensors[f"{W}.weight"].float(), eight.float())


def fp8(seed):
    "A weight in fp8 with its scale, and its numbers."
    codes, scale = randn(16, 32, seed=seed).to(torch.float8_e4m3fn), torch.tensor([0.5 + seed])
    return {f"{W}.weight": codes, f"{W}.weight_scale": scale}, codes.float()*scale


def coded_llama(tmp_path):
    "A model in fp8 with a scale for each row, as FBGEMM has it, and the same in numbers."
    transformers = pytest.importorskip("transformers")
    make("llama", tmp_path/"whole")
    file = tmp_path/"whole"/"model.safetensors"
    state, numbers = {}, {}
    for name, x in load_file(file).items():
        state[name] = numbers[name] = x
        if "proj" in name:
            scale = x.abs().amax(1, keepdim=True)/448
            codes = (x/scale).to(torch.float8_e4m3fn)
            state |= {name: codes, f"{name}_scale": scale}
            numbers[name] = codes.float()*scale
    save_file(numbers, file, {"format": "pt"})
    shutil.copytree(tmp_path/"whole", tmp_path/"codes")
    save_file(state, tmp_path/"codes"/"model.safetensors", {"format": "pt"})
    config = tmp_path/"codes"/"config.json"
    said = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    config.write_text(json.dumps(said))
    assert transformers
    return tmp_path/"codes", tmp_path/"whole"


class TestOtherDialects:
    "Formats whose formula is published, written here by it."

    def test_fbgemm(self, tmp_path):
        codes, scale = randn(16, 32).to(torch.float8_e4m3fn), randn(16, 1, seed=1).abs()
        state = {
            f"{W}.weight": codes, f"{W}.weight_scale": scale,
            f"{W}.input_scale_ub": torch.tensor([1200.0]),
        }
        folder = save(tmp_path/"a", state, {"quant_method": "fbgemm_fp8"})
        check(folder, codes.float()*scale, tmp_path/"out")

    def test_comfy(self, tmp_path):
        codes, scale = randn(16, 32).to(torch.float8_e4m3fn), torch.tensor([0.37])
        state = {
            f"{W}.weight": codes, f"{W}.scale_weight": scale, f"{W}.scale_input": torch.ones(1),
            "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        }
        check(save(tmp_path/"a", state), codes.float()*scale, tmp_path/"out")

    @pytest.mark.parametrize("beside", [True, False])
    def test_modelopt_fp8(self, tmp_path, beside):
        codes, scale = randn(16, 32).to(torch.float8_e4m3fn), torch.tensor(0.37)
        state = {
            f"{W}.weight": codes, f"{W}.weight_scale": scale, f"{W}.input_scale": torch.tensor(1.0)
        }
        said = {"quant_method": "modelopt", "quant_algo": "FP8"}
        folder = save(tmp_path/"a", state, None if beside else said)
        if beside:
            text = json.dumps({"producer": {}, "quantization": {"quant_algo": "FP8"}})
            (folder/"hf_quant_config.json").write_text(text)
        check(folder, codes.float()*scale, tmp_path/"out")

    def test_modelopt_nvfp4(self, tmp_path):
        draw = torch.Generator().manual_seed(0)
        q = torch.randint(0, 16, (8, 64), generator=draw)
        scale = torch.rand(8, 4, generator=draw).add(0.5).to(torch.float8_e4m3fn)
        whole = torch.tensor(0.03)
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        numbers = table[q & 7]*torch.where(q < 8, 1.0, -1.0)
        want = numbers*(scale.float()*whole).repeat_interleave(16, 1)
        state = {
            f"{W}.weight": (q[:, ::2] | (q[:, 1::2] << 4)).to(torch.uint8),
            f"{W}.weight_scale": scale, f"{W}.weight_scale_2": whole,
            f"{W}.input_scale": torch.tensor(1.0),
        }
        said = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        check(save(tmp_path/"a", state, said), want, tmp_path/"out")

    @pytest.mark.parametrize("algorithm", ["NVFP4_AWQ", "W4A8_AWQ", None])
    def test_other_algorithms_are_refused(self, tmp_path, algorithm):
        state, _ = fp8(1)
        folder = save(tmp_path/"a", state, {"quant_method": "modelopt", "quant_algo": algorithm})
        with pytest.raises(MergeError, match=rf"quantised \(modelopt\).*{algorithm}"):
            merge([folder, folder])

    def test_factors_of_inputs_are_refused(self, tmp_path):
        state, _ = fp8(1)
        state[f"{W}.pre_quant_scale"] = torch.ones(32)
        folder = save(tmp_path/"a", state, {"quant_method": "modelopt", "quant_algo": "FP8"})
        with pytest.raises(MergeError, match="quantised"):
            merge([folder, folder])


class TestUses:
    "What is done with quantised models."

    @pytest.mark.parametrize("order", [1, -1])
    def test_are_merged_with_models_of_numbers(self, tmp_path, order):
        state, numbers = fp8(1)
        codes = save(tmp_path/"codes", state, {"quant_method": "compressed-tensors"})
        dense = save(tmp_path/"dense", {f"{W}.weight": randn(16, 32)})
        merge([codes, dense][::order], out=tmp_path/"out")
        found = load(tmp_path/"out")[f"{W}.weight"]
        torch.testing.assert_close(found, (numbers + randn(16, 32))/2)

    def test_user_is_told_once(self, tmp_path):
        state, _ = fp8(1)
        folder = save(tmp_path/"a", state, {"quant_method": "compressed-tensors"})
        with pytest.warns(UserWarning) as said:
            load(folder)
        assert len(said) == 1 and "quantised (compressed-tensors)" in str(said[0].message)

    def test_output_has_the_recorded_dtype(self, tmp_path):
        state, numbers = fp8(1)
        for dtype in ("float16", "bfloat16"):
            said = {"quant_method": "compressed-tensors"}
            folder = save(tmp_path/dtype, state, said, dtype)
            merge([folder, folder], out=tmp_path/f"out-{dtype}")
            found = load_file(tmp_path/f"out-{dtype}"/"model.safetensors")[f"{W}.weight"]
            assert torch.equal(found, numbers.to(getattr(torch, dtype)))

    @pytest.mark.parametrize("first", ["codes", "numbers"])
    def test_eight_bits_of_the_first_are_not_what_others_are_written_in(self, tmp_path, first):
        x, y = randn(16, 32).to(torch.float8_e4m3fn), randn(16, 32, seed=1)
        state, said, numbers = {f"{W}.weight": x}, None, x.float()
        if first == "codes":
            state |= {f"{W}.weight_scale": torch.tensor(0.37)}
            numbers, said = numbers*0.37, {"quant_method": "compressed-tensors"}
        models = [
            save(tmp_path/"a", state, said, "float16"), save(tmp_path/"b", {f"{W}.weight": y})
        ]
        with pytest.warns(UserWarning, match="eight bits .*float16|read as float16"):
            plan = preview(Recipe.of({"models": models}))
        written = {line.name: line.dtype for line in plan.lines}
        assert written[f"{W}.weight".replace("0", "*")] == "float16"
        with pytest.warns(UserWarning, match="eight bits .*float16|read as float16"):
            merge(models, out=tmp_path/"out")
        found = load_file(tmp_path/"out"/"model.safetensors")[f"{W}.weight"]
        assert torch.equal(found, ((numbers + y)/2).half())
        config = json.loads((tmp_path/"out"/"config.json").read_text())
        assert config["torch_dtype"] == "float16"

    def test_are_inspected(self, tmp_path):
        models = []
        for seed in (0, 1):
            said = {"quant_method": "compressed-tensors"}
            models.append(save(tmp_path/str(seed), fp8(seed)[0], said))
        text = str(inspect(models))
        dense = [{"model.norm.weight": torch.ones(4), f"{W}.weight": fp8(s)[1]} for s in (0, 1)]
        assert text.splitlines()[1:] == str(inspect(dense)).splitlines()[1:]

    def test_curvature_and_tune_see_the_numbers(self, tmp_path):
        folder, whole = coded_llama(tmp_path)
        (tmp_path/"data.jsonl").write_text("\n".join(json.dumps({"text": "b c d"}) for _ in "ab"))
        found = {}
        for one in (folder, whole):
            found[one] = collect(one, tmp_path/"data.jsonl", tmp_path/f"{one.name}.stats")
        assert set(found[folder]) == set(found[whole]) and len(found[folder]) > 8
        for name, x in found[whole].items():
            torch.testing.assert_close(found[folder][name], x)
        # which opens its models in the same way
        opened = open_model(folder).model.state_dict()
        for name, x in open_model(whole).model.state_dict().items():
            assert torch.equal(opened[name], x)

    @pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "fp8", "torchao"])
    def test_a_config_that_names_codes_beside_numbers_is_mended(self, tmp_path, method):
        folder = save(tmp_path/"a", {f"{W}.weight": randn(16, 32)}, {"quant_method": method})
        merge([folder, folder], out=tmp_path/"out")
        assert "quantization_config" not in json.loads((tmp_path/"out/config.json").read_text())
        assert torch.equal(load(tmp_path/"out")[f"{W}.weight"], randn(16, 32))

    def test_awq_is_said_once(self, tmp_path):
        words = torch.zeros(32, 4, dtype=torch.int32)
        zeros, scales = words[:1].clone(), torch.ones(1, 32)
        state = {f"{W}.qweight": words, f"{W}.qzeros": zeros, f"{W}.scales": scales}
        said = {"quant_method": "awq", "bits": 4, "group_size": -1, "version": "gemm"}
        folder = save(tmp_path/"a", state, said)
        with pytest.warns(UserWarning) as heard:
            load(folder)
        assert len(heard) == 1 and "mixes two scalings" in str(heard[0].message)

    @pytest.mark.parametrize("broken", ["weight_scale", "extra"])
    def test_scales_that_do_not_fit_are_refused(self, tmp_path, broken):
        state, _ = fp8(1)
        if broken == "extra":
            state[f"{W}.weight_scale"] = torch.ones(3, 1)
        else:
            state.pop(f"{W}.weight_scale")
        folder = save(tmp_path/"a", state, {"quant_method": "compressed-tensors"})
        with pytest.raises(MergeError, match=r"is quantised \(compressed-tensors\)"):
            merge([folder, folder])


@pytest.mark.filterwarnings("ignore")
def test_adapter_on_a_base_of_four_bits_is_baked_as_peft_does(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=48, tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    state, said = {}, {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" not in name:
                state[name] = p.detach().clone()
                continue
            codes, about = functional.quantize_4bit(p.detach(), blocksize=64, quant_type="nf4")
            beside = about.as_dict(packed=True).items()
            state |= {name: codes, **{f"{name}.{k}": x for k, x in beside}}
            p.copy_(functional.dequantize_4bit(codes, about))
    base = tmp_path/"base"
    base.mkdir()
    save_file(state, base/"model.safetensors", {"format": "pt"})
    about = config.to_dict() | {"quantization_config": said, "dtype": "float32"}
    (base/"config.json").write_text(json.dumps(about))
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path/"adapter")
    want = adapted.merge_and_unload().state_dict()
    merge([f"{base}+{tmp_path/'adapter'}"], out=tmp_path/"out")
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path/"out").state_dict()
    assert set(found) == set(want)
    for name, x in want.items():
        torch.testing.assert_close(found[name], x)

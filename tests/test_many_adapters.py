"""Many adapters of one layer: squares of the stacks stand in for bases, and say the same."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from frechet_merge import LoRA, merge
from frechet_merge.algebra.factors import Factors
from frechet_merge.algebra.stacked import Stacked
from frechet_merge.geometries.laws import mean_of

ROWS, INPUTS, RANK, COUNT = 200, 170, 16, 10  # of rank 160 together


def updates(dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    sizes = ((ROWS, RANK), (RANK, INPUTS))
    return [
        Factors(*(torch.randn(*s, generator=gen).to(dtype).double() for s in sizes), 0.5)
        for _ in range(COUNT)
    ]


def gauged(f, cond, seed):
    gen = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, math.log10(cond), f.rank, dtype=torch.float64)/math.sqrt(cond)
    noise = (torch.randn(f.rank, f.rank, generator=gen).double() for _ in range(2))
    Q, P = (torch.linalg.qr(x)[0] for x in noise)
    M = (Q*spread) @ P
    return Factors(f.B @ torch.linalg.inv(M), M @ f.A, f.s)


def best(fs, ws, k):
    mean = sum(w*f.delta() for w, f in zip(ws, fs))
    U, S, Vt = torch.linalg.svd(mean, full_matrices=False)
    return (U[:, :k]*S[:k]) @ Vt[:k]


def apart(x, y):
    return float((x - y).norm()/y.norm())


WEIGHTS = [1/COUNT]*COUNT


@pytest.mark.parametrize("cond", [1.0, 30.0, 1e3, 1e6])
def test_gauges_do_not_move_a_cut(cond):
    fs = updates()
    moved = [gauged(f, cond, i) for i, f in enumerate(fs)]
    got, _ = mean_of(LoRA(rank=RANK), moved, WEIGHTS)
    assert apart(got.delta(), best(fs, WEIGHTS, RANK)) <= 1e-10*max(1.0, cond/1e3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_numbers_are_cut_in_float32(dtype):
    fs = updates(dtype)
    assert Stacked.of(fs).A.dtype == torch.float32
    got, _ = mean_of(LoRA(rank=RANK), fs, WEIGHTS)
    assert apart(got.delta(), best(fs, WEIGHTS, RANK)) <= 1e-5


def test_narrow_numbers_in_a_bad_gauge_are_cut_in_float64():
    fs = [Factors(f.B*2.0**-10, f.A, f.s) for f in updates(torch.float16)]
    # one column beside large ones that cancel each other
    for f in fs[:2]:
        f.B[:, :8] *= 2**20
    fs[1].B[:, :8], fs[1].A[:8] = -fs[0].B[:, :8], fs[0].A[:8]
    got, _ = mean_of(LoRA(rank=RANK), fs, WEIGHTS)
    assert apart(got.delta(), best(fs, WEIGHTS, RANK)) <= 1e-5


def test_the_whole_mean_is_written_as_it_is():
    fs = updates()
    ws = [0.05*(i + 1) for i in range(COUNT)]
    ws = [w/sum(ws) for w in ws]
    got, info = mean_of(LoRA(), fs, ws)
    want = sum(w*f.delta() for w, f in zip(ws, fs))
    assert got.rank == COUNT*RANK
    assert apart(got.delta(), want) <= 1e-12
    spread = [float((f.delta() - want).square().sum()) for f in fs]
    assert info.variance == pytest.approx(sum(w*d for w, d in zip(ws, spread)), rel=1e-10)
    assert info.squares == pytest.approx(spread, rel=1e-10)


def test_copies_and_zeros_are_counted():
    fs = updates()
    zero = Factors(torch.zeros(ROWS, RANK).double(), torch.zeros(RANK, INPUTS).double())
    every = [fs[0], fs[0], zero, *fs[:7]]
    got, _ = mean_of(LoRA(), every, WEIGHTS)
    assert apart(got.delta(), sum(f.delta() for f in every)/COUNT) <= 1e-12
    # of lower rank than is kept
    same = [fs[0]]*COUNT
    short, _ = mean_of(LoRA(rank=2*RANK), same, WEIGHTS)
    assert apart(short.delta(), fs[0].delta()) <= 1e-10
    none, _ = mean_of(LoRA(rank=RANK), [zero]*COUNT, WEIGHTS)
    assert not none.delta().any()


@pytest.mark.parametrize("rank", [None, 8])
def test_files_of_many_kohya_loras(tmp_path, rank):
    fs, stem = updates(torch.float16), "lora_unet_mid_block_attentions_0_proj_in"
    for i, f in enumerate(fs):
        tensors = {
            f"{stem}.lora_up.weight": f.B.half().contiguous(),
            f"{stem}.lora_down.weight": f.A.half().contiguous(),
            f"{stem}.alpha": torch.tensor(RANK*f.s),
        }
        save_file(tensors, tmp_path/f"{i}.safetensors")
    files = [tmp_path/f"{i}.safetensors" for i in range(COUNT)]
    out = tmp_path/"out.safetensors"
    merge(files, LoRA(rank=rank), out=out, dtype="fp32")
    x = load_file(out)
    up, down = x[f"{stem}.lora_up.weight"].double(), x[f"{stem}.lora_down.weight"].double()
    got = float(x[f"{stem}.alpha"])/len(down)*(up @ down)
    assert len(down) == (rank or COUNT*RANK)
    assert apart(got, best(fs, WEIGHTS, rank or COUNT*RANK)) <= 1e-5

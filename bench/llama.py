"""Llama-layout checkpoints with random but realistic weights: a shared base plus small differences,
bfloat16, in shards.

python bench/llama.py OUT --size 0.5B --models 5      writes OUT/base and OUT/m0 … OUT/m4"""

import argparse
import json
from pathlib import Path

import torch

from frechet_merge.files.shards import ShardWriter

SIZES = {
    "tiny": (64, 176, 2, 512),
    "0.1B": (512, 1376, 24, 32000),
    "0.5B": (1280, 3456, 22, 32000),
    "1B": (2048, 5632, 22, 32000),
    "3B": (3200, 8640, 26, 32000),
    "7B": (4096, 11008, 32, 32000),
}


def layout(size):
    h, mlp, layers, vocab = SIZES[size]
    yield "model.embed_tokens.weight", (vocab, h)
    for i in range(layers):
        p = f"model.layers.{i}."
        for k in "qkvo":
            yield f"{p}self_attn.{k}_proj.weight", (h, h)
        yield f"{p}mlp.gate_proj.weight", (mlp, h)
        yield f"{p}mlp.up_proj.weight", (mlp, h)
        yield f"{p}mlp.down_proj.weight", (h, mlp)
        for k in ("input", "post_attention"):
            yield f"{p}{k}_layernorm.weight", (h,)
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (vocab, h)


def config(size):
    h, mlp, layers, vocab = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": h,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": max(h//64, 1),
        "num_key_value_heads": max(h//64, 1),
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def make(out, size="0.5B", models=5, shards=3, spread=0.02, seed=0):
    """`spread` is the relative size of the differences; each tensor is drawn once for the base and
    once per model."""
    out = Path(out)
    shapes = dict(layout(size))
    total = 2*sum(torch.Size(s).numel() for s in shapes.values())
    writers = {}
    for who in ("base", *(f"m{t}" for t in range(models))):
        (out/who).mkdir(parents=True)
        (out/who/"config.json").write_text(json.dumps(config(size), indent=2))
        layout_of = {n: (s, torch.bfloat16) for n, s in shapes.items()}
        writers[who] = ShardWriter(out/who, layout_of, total//shards + 1)
    gen = torch.Generator().manual_seed(seed)

    def draw(shape):
        return torch.randn(shape, generator=gen)

    for name, shape in shapes.items():
        base = 0.02*draw(shape) if len(shape) > 1 else 1 + 0.1*draw(shape)
        for who, w in writers.items():
            x = base if who == "base" else base + spread*base.std()*draw(shape)
            w.write(name, 0, x)
    for w in writers.values():
        w.close()


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out")
    p.add_argument("--size", choices=SIZES, default="0.5B")
    p.add_argument("--models", type=int, default=5)
    a = p.parse_args()
    make(a.out, a.size, a.models)

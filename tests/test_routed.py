"""Statistics of experts in one tensor are those of experts that are layers of their own."""

import itertools
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from frechet_merge import load, merge
from frechet_merge.curvature.collecting import Statistics, curvature
from frechet_merge.geometries.registry import geometry_named
from frechet_merge.huggingface.models import collect

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40, "head_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    "shared_expert_intermediate_size": 12,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_shared_experts": 1, "pad_token_id": 0, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "sliding_window": 8, "max_position_embeddings": 64,
}
KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"]


def tiny(kind, **more):
    "A random model of this kind, in float64."
    torch.manual_seed(0)
    more |= {"head_dim": 4} if kind == "deepseek_v3" else {}
    config = transformers.AutoConfig.for_model(kind, **SIZES | more)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.copy_(0.3*torch.randn(p.shape))
    return model


def examples(count=6, length=7):
    "Batches of texts of several lengths."
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (count, length), generator=draw)
    mask = torch.ones_like(ids)
    for i in range(count):
        mask[i, length - i % 4 :] = 0
    both = {"input_ids": ids*mask, "attention_mask": mask}
    return [{k: x[:4] for k, x in both.items()}, {k: x[4:] for k, x in both.items()}]


class Alone(nn.Module):
    "Experts as layers of their own, one product each."

    def __init__(self, experts):
        super().__init__()
        self.E = len(experts.down_proj)
        self.turned = getattr(experts, "is_transposed", False)
        self.limits = experts
        self.up = nn.ModuleList(self.layer(experts, "gate_up_proj", e) for e in range(self.E))
        self.down = nn.ModuleList(self.layer(experts, "down_proj", e) for e in range(self.E))

    def layer(self, experts, name, e):
        w = getattr(experts, name)[e].detach()
        w = w.T if self.turned else w
        b = getattr(experts, f"{name}_bias", None)
        made = nn.Linear(w.shape[1], w.shape[0], bias=b is not None)
        made.weight = nn.Parameter(w.clone())
        if b is not None:
            made.bias = nn.Parameter(b[e].detach().clone())
        return made

    def forward(self, x, chosen, share):
        flat = x.reshape(-1, x.shape[-1])
        total = torch.zeros_like(flat)
        for e in range(self.E):
            rows, place = torch.where(chosen == e)
            if len(rows):
                y = self.down[e](self.limits._apply_gate(self.up[e](flat[rows])))
                total = total.index_add(0, rows, y*share[rows, place, None].to(y))
        return total.view(x.shape)


def dense(model, batches):
    "For each expert's layer: Σδδᵀ/N, mean of aaᵀ over real tokens, and mean square gradients."
    # the tokens that were sent somewhere are told apart by running one text at a time
    for name, layer in list(model.named_modules()):
        if name.endswith(".experts"):
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.experts = Alone(layer)
    layers = {n: m for n, m in model.named_modules() if ".experts." in n and hasattr(m, "weight")}
    sums = {n: [0, 0, 0, 0, 0] for n in layers}
    held = {}
    count = 0
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            # padding stands at the end, and nothing looks back from there
            n = int(batch["attention_mask"][i].sum())
            ids = batch["input_ids"][i : i + 1, :n]
            count += 1
            held.clear()

            def hook(module, args, out, name=None):
                out.retain_grad()
                held[name] = (args[0].detach(), out)

            handles = [
                m.register_forward_hook(lambda *a, n=n: hook(*a, name=n)) for n, m in layers.items()
            ]
            logits = model(input_ids=ids).logits
            add_one(logits, held, layers, sums)
            for handle in handles:
                handle.remove()
    return sums, count


def add_one(logits, held, layers, sums):
    "Add one text, whose labels are its most likely next tokens."
    loss = F.cross_entropy(logits[0, :-1], LABELS[: logits.shape[1] - 1], reduction="sum")
    loss.backward()
    for name, m in layers.items():
        if name not in held:
            continue
        a, out = held[name]
        d = out.grad
        s = sums[name]
        s[0] = s[0] + d.T @ d
        s[1] = s[1] + a.T @ a
        s[2] += len(a)
        s[3] = s[3] + m.weight.grad**2
        if m.bias is not None:
            s[4] = s[4] + m.bias.grad**2
        m.zero_grad()


LABELS = torch.randint(0, 40, (7,), generator=torch.Generator().manual_seed(2))


def loss(logits, batch):
    "Cross-entropy with the fixed labels, summed over the real tokens but the last."
    n, t, v = logits.shape
    each = F.cross_entropy(
        logits[:, :-1].reshape(-1, v), LABELS[: t - 1].repeat(n), reduction="none"
    )
    return (each.view(n, t - 1)*batch["attention_mask"][:, 1:]).sum(1)


def collected(model, form):
    return curvature(
        model, examples(), form, "empirical", loss=loss,
        parameters=lambda n: ".experts." in n,
        forward=lambda m, b: m(**b, use_cache=False).logits,
    )


def pieces(want, halves):
    "The dense sums under the names of pieces: left, right, tokens, squares and those of the bias."
    for name, (left, right, tokens, square, bias) in want.items():
        stem, role, e = name.rsplit(".", 2)
        stem = f"{stem}.gate_up_proj" if role == "up" else f"{stem}.down_proj"
        n = halves if role == "up" else 1
        for i in range(n if tokens else 0):
            rows = slice(i*len(left)//n, (i + 1)*len(left)//n)
            yield f"{stem}.{int(e)*n + i}", left[rows, rows], right, tokens, square[rows], bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_are_those_of_layers(kind):
    model = tiny(kind)
    sides, squares = collected(model, "kronecker"), collected(model, "diagonal")
    want, count = dense(tiny(kind), examples())
    turned = kind == "gpt_oss"
    # whose router computes in float32
    close = {"rtol": 1e-4, "atol": 1e-5} if kind == "deepseek_v3" else {}
    seen = 0
    for piece, left, right, tokens, square, bias in pieces(want, 1 if turned else 2):
        seen += 1
        ends = (".left", ".right") if turned else (".right", ".left")
        went_in, came_back = (sides[piece + end] for end in ends)
        torch.testing.assert_close(went_in, right/tokens, **close)
        torch.testing.assert_close(came_back, left/count, **close)
        found = squares[piece].T if turned else squares[piece]
        torch.testing.assert_close(found, square/count, **close)
        if turned:
            stem, _, e = piece.rpartition(".")
            torch.testing.assert_close(squares[f"{stem}_bias.{e}"], bias/count)
    assert seen > 8
    fused = {n for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3}
    assert set(sides.about["experts"]) == fused


@pytest.mark.filterwarnings("ignore")
def test_an_expert_that_no_token_reached_knows_nothing():
    model = tiny("mixtral")
    one = {"input_ids": torch.tensor([[3]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    stats = curvature(model, [one], "inputs", forward=lambda m, b: m(**b, use_cache=False).logits)
    name = "model.layers.0.mlp.experts.down_proj"
    assert sum(bool(stats[f"{name}.{e}.right"].any()) for e in range(4)) == 2


def folder_of(model, folder, fused):
    "A checkpoint, with its experts in one tensor or apart, and a tokenizer."
    model.float().save_pretrained(folder)
    if fused:
        state = {n: x.clone() for n, x in model.state_dict().items()}
        for file in folder.glob("*.safetensors"):
            file.unlink()
        save_file(state, folder/"model.safetensors", {"format": "pt"})
    words = {f"w{i}": i for i in range(40)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", unk_token="w1"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def stored(request, tmp_path_factory):
    "Two models, each stored in both ways, and their statistics of each form."
    tmp = tmp_path_factory.mktemp(request.param)
    rows = [{"text": " ".join(f"w{(7*i + 3*j) % 39 + 1}" for j in range(4 + i % 3))}
            for i in range(12)]
    (tmp/"data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for which in "ab":
        model = tiny(request.param)
        if which == "b":
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.05*torch.randn(p.shape))
        for way in ("fused", "apart"):
            folder = folder_of(model, tmp/f"{which}-{way}", way == "fused")
            for form in ("kronecker", "diagonal", "inputs"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    collect(folder, tmp/"data.jsonl", tmp/f"{which}-{way}-{form}", form)
    return tmp


def numbers(folder):
    "What transformers reads."
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.state_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form, geometry", [
    ("kronecker", "curved:damping=0.1"), ("inputs", "curved:damping=0.1"), ("diagonal", "curved"),
])
def test_a_merge_is_the_same_however_the_models_are_stored(stored, tmp_path, form, geometry):
    found = {}
    for a, b in itertools.product(("fused", "apart"), repeat=2):
        merge(
            [stored/f"a-{a}", stored/f"b-{b}"],
            geometry=geometry_named(geometry),
            metrics=[stored/f"a-{a}-{form}", stored/f"b-{b}-{form}"],
            out=tmp_path/f"{a}-{b}",
        )
        found[a, b] = numbers(tmp_path/f"{a}-{b}")
    merge([stored/"a-fused", stored/"b-fused"], out=tmp_path/"plain")
    plain = numbers(tmp_path/"plain")
    first = found["apart", "apart"]
    for other in found.values():
        for name, x in first.items():
            assert torch.equal(other[name], x), name
    moved = [n for n in first if ".experts." in n and not torch.allclose(first[n], plain[n])]
    assert len(moved) == 4


def test_experts_have_the_names_of_the_checkpoint(stored):
    apart = Statistics.load(stored/"a-apart-kronecker")
    held = load(stored/"a-apart")
    stems = {n.rpartition(".")[0] for n in apart}
    assert {n for n in held if ".experts." in n} <= stems <= {*held}

"""Statistics against explicit per-sample gradients and dense matrices, for the models that people
have."""

import copy
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frechet_merge.curvature import collecting as module
from frechet_merge.files.open import load
from frechet_merge.curvature.collecting import Statistics, curvature
from frechet_merge.curvature.estimators import hessian_columns
from frechet_merge.curvature.forms import projected_diagonal, projected_kronecker

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 31, (5, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(5, 7, dtype=torch.long)
MASK[0, 5:] = 0
MASK[3, 3:] = 0


@pytest.fixture(autouse=True)
def double():
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def gpt2(**kw):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=31,
            n_positions=16,
            n_embd=12,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            **kw,
        )
    ).double()


def bert(**kw):
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=31,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            num_labels=3,
            max_position_embeddings=16,
            **kw,
        )
    ).double()


class MLP(nn.Module):
    "One layer twice, one with two calls' worth of tokens, an in-place activation."

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.two = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        h = F.relu(self.one(x), inplace=True)
        for _ in range(2):
            h = h + torch.tanh(self.two(self.norm(h)))
        return self.head(h)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.point = nn.Conv2d(6, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 4)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(F.relu(self.depth(F.relu(self.bn(self.point(self.stem(x)))))).mean((2, 3)))


def text(labels):
    return {"input_ids": IDS, "attention_mask": MASK, "labels": labels}


LM = text(IDS.masked_fill(MASK == 0, -100))
CASES = {
    "mlp": (MLP, lambda g: (torch.randn(5, 6, generator=g), torch.tensor([0, 3, 2, 1, 0]))),
    "conv": (Conv, lambda g: (torch.randn(5, 3, 7, 8, generator=g), torch.tensor([0, 3, 2, 1, 0]))),
    "gpt2": (gpt2, lambda g: LM),
    "gpt2 untied": (lambda: gpt2(tie_word_embeddings=False), lambda g: LM),
    "bert": (bert, lambda g: text(torch.tensor([0, 1, 2, 1, 0]))),
}


def case(name):
    make, data = CASES[name]
    return make(), data(torch.Generator().manual_seed(2))


def loss_of(model, batch, i):
    "Cross-entropy of sample i alone, summed over its tokens."
    if not isinstance(batch, dict):
        return F.cross_entropy(model(batch[0][i : i + 1]), batch[1][i : i + 1])
    out = model(
        input_ids=batch["input_ids"][i : i + 1],
        attention_mask=batch["attention_mask"][i : i + 1],
    ).logits
    y = batch["labels"][i : i + 1]
    if y.dim() == 1:
        return F.cross_entropy(out, y)
    return F.cross_entropy(out[0, :-1], y[0, 1:], ignore_index=-100, reduction="sum")


def gradients(model, batch, loss=loss_of):
    "{name: (samples, *shape)}, by a backward pass for each sample."
    model = copy.deepcopy(model).eval()
    asked = {n: p for n, p in model.named_parameters() if p.requires_grad}
    each = [torch.autograd.grad(loss(model, batch, i), list(asked.values())) for i in range(5)]
    return {n: torch.stack(g) for n, g in zip(asked, zip(*each))}


def close(a, b, tol=1e-10):
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    far = float((a - b).norm())
    assert far <= tol*float(b.norm()) + 1e-30, far/float(b.norm())


def vanish(name):
    "Softmax does not see it: its gradient is rounding."
    return name.endswith(("key.bias", "k_proj.bias"))


def changed(batch, change):
    "A batch of the same form, each of its tensors changed."
    if isinstance(batch, dict):
        return {n: change(v) for n, v in batch.items()}
    return tuple(change(v) for v in batch)


def squares_close(s, g, tol=1e-10):
    "A diagonal is the mean square of these gradients, where they do not vanish."
    for n, x in g.items():
        if not vanish(n):
            close(s[n], x.pow(2).mean(0), tol)


@pytest.mark.parametrize("name", CASES)
def test_diagonal_is_that_of_per_sample_gradients(name):
    model, batch = case(name)
    s = curvature(model, [batch], "diagonal", "empirical")
    g = gradients(model, batch)
    squares_close(s, g)
    assert all(s[n].max() < 1e-25 for n in g if vanish(n))
    assert not s.about["skipped"] and s.about["samples"] == 5
    if name == "gpt2":
        assert s["lm_head.weight"] is s["transformer.wte.weight"]
    else:
        assert s.keys() == g.keys()


@pytest.mark.parametrize("name", CASES)
def test_projected_is_that_of_per_sample_gradients(name):
    model, batch = case(name)
    g = {n: x.flatten(2) for n, x in gradients(model, batch).items() if x.dim() > 2}
    basis = {
        n: (torch.randn(x.shape[1], 4), torch.randn(x.shape[2], 4))
        for n, x in g.items()
        if n != "depth.weight"
    }
    s = curvature(model, [batch], "projected", basis=basis)
    assert s.about["estimator"] == "empirical" and {n + ".projected" for n in basis} <= s.keys()
    for n, (U, V) in basis.items():
        c = torch.einsum("smn,mp,np->sp", g[n], U, V)
        close(s[n + ".projected"], c.T @ c/5)


def run_hooked(model, batch):
    "Of each layer: what went in and what came back, of the summed loss of a batch."
    seen = {}

    def hook(name, m, args, out):
        seen[name] = (args[0], torch.zeros(()))
        out.register_hook(lambda d: seen.update({name: (args[0], d)}))

    for n, m in model.eval().named_modules():
        if isinstance(m, (nn.Linear, nn.Embedding)) or type(m).__name__ == "Conv1D":
            m.register_forward_hook(partial(hook, n))
    out = model(input_ids=IDS, attention_mask=MASK).logits
    y = batch["labels"]
    if y.dim() == 2:
        out, y = out[:, :-1].flatten(0, 1), y[:, 1:].flatten()
    F.cross_entropy(out, y, reduction="sum").backward()
    return seen


def moment_of_inputs(layer, x):
    "Second moment of what went in, padding aside; of ids, their frequencies."
    is_lookup = isinstance(layer, nn.Embedding)
    keep = torch.ones(x.shape if is_lookup else x.shape[:-1], dtype=torch.bool)
    if x.shape[:2] == MASK.shape:
        keep = MASK.bool()
    a = x[keep]
    if not is_lookup:
        return a.T @ a/len(a)
    if layer.padding_idx is not None:
        a = a[a != layer.padding_idx]
    return torch.bincount(a, minlength=len(layer.weight))/len(a)


@pytest.mark.parametrize("name", ["bert", "gpt2 untied"])
def test_factors_are_moments_of_what_hooks_see(name):
    """Every Linear, Conv1D and Embedding of a padded batch; padding is not an input, and tokens are
    summed on the side of what comes back."""
    model, batch = case(name)
    s = curvature(model, [batch], "kronecker", "empirical")
    for n, (x, d) in run_hooked(model, batch).items():
        layer = model.get_submodule(n)
        is_lookup = isinstance(layer, nn.Embedding)
        into, back = "right", "left"
        if is_lookup or type(layer).__name__ == "Conv1D":
            into, back = back, into
        # positions are looked up once for all samples
        is_shared = is_lookup and x.shape[0] == 1
        close(s[f"{n}.weight.{into}"], moment_of_inputs(layer, x.expand(5, -1) if is_shared else x))
        if not is_shared:
            close(s[f"{n}.weight.{back}"], d.flatten(0, -2).T @ d.flatten(0, -2)/5)


def test_queries_keys_and_values_share_their_input():
    model, batch = case("bert")
    s = curvature(model, [batch])
    q, k, v = [
        s[f"bert.encoder.layer.0.attention.self.{n}.weight.right"]
        for n in ("query", "key", "value")
    ]
    assert q is k is v


def test_inputs_need_no_backward_pass():
    model, batch = case("bert")
    whole = curvature(model, [batch])
    half = curvature(model, [batch], "inputs")
    assert all(k.endswith((".right", "embeddings.weight.left")) for k in half)
    assert half.about["estimator"] is None
    for k in half:
        assert torch.equal(half[k], whole[k])


def test_tied_embedding_has_no_factors_and_says_why():
    said = "no metric for transformer.wte.weight, lm_head.weight: it is shared"
    with pytest.warns(UserWarning, match=said):
        s = curvature(gpt2(), [LM])
    for n in ("lm_head.weight", "transformer.wte.weight"):
        assert "layers of different kinds (embedding, linear)" in s.about["skipped"][n]
        assert n + ".left" not in s
    assert s["transformer.h.0.attn.c_attn.weight.left"].shape == (12, 12)
    assert s["transformer.h.0.attn.c_attn.weight.right"].shape == (36, 36)


def test_layer_used_twice_counts_as_more_tokens():
    model, (x, y) = case("mlp")
    s = curvature(model, [(x, y)], "kronecker", "empirical")
    a, d = [], []

    def hook(m, args, out):
        a.append(args[0].detach())
        out.register_hook(d.append)

    model.two.register_forward_hook(hook)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    close(s["two.weight.right"], torch.cat(a).T @ torch.cat(a)/10)
    close(s["two.weight.left"], torch.cat(d).T @ torch.cat(d)/5)


def test_convolutions_have_factors_of_patches():
    model, (x, y) = case("conv")
    s = curvature(model, [(x, y)], "kronecker", "empirical")
    h = model.eval().stem(x).permute(0, 2, 3, 1).reshape(-1, 6)
    close(s["point.weight.right"], h.T @ h/len(h))
    assert s["point.weight.left"].shape == (8, 8)
    assert s["stem.weight.right"].shape == (27, 27)
    assert "depth.weight" in s.about["skipped"]


def test_frozen_parameters_are_left_out_and_still_let_gradients_through():
    model, batch = case("bert")
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    s = curvature(model, [batch], "diagonal", "empirical")
    g = gradients(model, batch)
    assert s.keys() == g.keys()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    squares_close(s, g)
    frozen = {n for n, why in s.about["skipped"].items() if why == "it is frozen"}
    assert frozen == {n for n, flag in flags.items() if not flag}


@pytest.mark.parametrize("name", ["bert", "gpt2", "mlp"])
def test_batches_do_not_matter(name):
    "Gradients accumulate over samples: five of one, or one of five, the draws included."
    model, batch = case(name)

    def parts(k):
        return [changed(batch, lambda v, i=i: v[i : i + k]) for i in range(0, 5, k)]

    tokens = 5 if name == "mlp" else int(MASK.sum())
    for form in ("diagonal", "kronecker"):
        for estimator in ("pullback", "true", "empirical"):
            one = curvature(model, parts(5), form, estimator)
            many = curvature(model, parts(2), form, estimator)
            for k in one:
                if not vanish(k):
                    close(many[k], one[k], 1e-9)
            assert one.about["tokens"] == many.about["tokens"] == tokens


def test_padding_changes_nothing():
    model, batch = case("bert")

    def alone(v, i):
        return v[i : i + 1, : int(MASK[i].sum())] if v.dim() == 2 else v[i : i + 1]

    short = [changed(batch, partial(alone, i=i)) for i in range(5)]
    for form in ("diagonal", "kronecker"):
        a = curvature(model, [batch], form, "true")
        b = curvature(model, short, form, "true")
        for k in a:
            if not vanish(k):
                close(b[k], a[k], 1e-9)


@pytest.mark.parametrize("name", ["bert", "gpt2 untied", "mlp"])
def test_low_precision(name):
    "bf16 models and autocast: float32 sums, near those of float64."
    model, batch = case(name)

    def inputs_in(dtype):
        return changed(batch, lambda v: v.to(dtype) if v.is_floating_point() else v)

    cast, single = inputs_in(torch.bfloat16), inputs_in(torch.float32)
    for form in ("diagonal", "kronecker"):
        want = curvature(model, [batch], form, "empirical")
        half = curvature(copy.deepcopy(model).bfloat16(), [cast], form, "empirical")
        with torch.autocast("cpu", torch.bfloat16):
            auto = curvature(copy.deepcopy(model).float(), [single], form, "empirical")
        full = curvature(copy.deepcopy(model).float(), [single], form, "empirical")
        for k in want:
            if vanish(k):
                continue
            for got, tol in ((half, 0.2), (auto, 0.2), (full, 1e-4)):
                assert got[k].dtype == torch.float32
                close(got[k].double(), want[k], tol)


def test_checkpointed_layers():
    from torch.utils.checkpoint import checkpoint

    class Saves(MLP):
        def forward(self, x):
            h = checkpoint(lambda x: F.relu(self.one(x)), x, use_reentrant=False)
            for _ in range(2):
                h = h + checkpoint(
                    lambda h: torch.tanh(self.two(self.norm(h))), h, use_reentrant=False
                )
            return self.head(h)

    plain, batch = case("mlp")
    saves = Saves()
    saves.load_state_dict(plain.state_dict())
    for form in ("diagonal", "kronecker"):
        a, b = curvature(plain, [batch], form), curvature(saves, [batch], form)
        assert not set(a.about["skipped"]) ^ set(b.about["skipped"])
        for k in a:
            close(b[k], a[k])


def test_pullback_of_a_linear_model_and_of_its_last_layer():
    "E[JᵀJ] of x ↦ M₂M₁x, dense; and the last layer's left factor is the identity."
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False))
    x = torch.randn(20000, 4)
    M2 = model[1].weight.detach()
    batches = list(x.split(1000))
    s = curvature(model, batches, "kronecker")
    close(s["1.weight.left"], torch.eye(3), 0.05)
    close(s["0.weight.left"], M2.T @ M2, 0.05)
    d = curvature(model, batches, "diagonal")
    # J for weight (o, i) is M₂[:, o] x_i
    want = torch.outer((M2**2).sum(0), (x**2).mean(0))
    close(d["0.weight"], want, 0.05)
    U, V = torch.randn(5, 4), torch.randn(4, 4)
    s = curvature(model, batches, "projected", "pullback", basis={"0.weight": (U, V)})
    found = s["0.weight.projected"]
    # δ and a are independent here: the factors are exact
    want = projected_kronecker(M2.T @ M2, x.T @ x/len(x), U, V)
    close(found, want, 0.06)
    assert float((found - want).norm()/found.norm()) < 5*s.about["error"]["0.weight"]


def test_true_fisher_is_the_softmax_hessian_in_the_middle():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4, bias=False))
    x = torch.randn(6, 4)

    def outputs(w, x):
        return torch.func.functional_call(model, {"0.weight": w}, (x,))

    J = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(model[0].weight, x)
    J = J.flatten(2).detach()
    p = model(x).softmax(-1).detach()
    F_ = torch.einsum("nci,ncd,ndj->ij", J, p.diag_embed() - p[:, :, None]*p[:, None], J)/6
    # a basis of all entries is of rank one each
    E = torch.eye(12).view(12, 3, 4)
    basis = {"0.weight": (E.sum(2).T, E.sum(1).T)}
    many = [x.repeat(4000, 1)]
    s = curvature(model, many, "projected", "true", basis=basis)
    close(s["0.weight.projected"], F_, 0.05)
    s = curvature(model, many, "diagonal", "true")
    close(s["0.weight"].flatten(), F_.diagonal(), 0.05)


@pytest.mark.parametrize(
    "name, weight",
    [
        ("mlp", "two.weight"),
        ("conv", "point.weight"),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
        ("gpt2", "transformer.wte.weight"),
        ("bert", "bert.encoder.layer.0.attention.self.query.weight"),
    ],
)
def test_hessian_columns_are_those_of_the_dense_projection(name, weight):
    model, batch = case(name)
    w = dict(model.named_parameters())[weight].detach()
    p = 3
    U, V = [torch.linalg.qr(torch.randn(k, p))[0] for k in (w.shape[0], w[0].numel())]
    got = hessian_columns(model, [batch], weight, U, V)
    assert model.training and not got.requires_grad
    still = copy.deepcopy(model).eval()
    if name in ("gpt2", "bert"):
        still.config._attn_implementation = "eager"

    def coordinates(c):
        moved = w + (U*c @ V.T).view(w.shape)
        return torch.func.functional_call(_Loss(still, batch), {f"model.{weight}": moved}, ())

    dense = torch.autograd.functional.hessian(coordinates, torch.zeros(p))
    close(got, dense)
    close(hessian_columns(model, [batch], weight, U, V, columns=[2]), dense[:, 2:])


class _Loss(nn.Module):
    def __init__(self, model, batch):
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self):
        return sum(loss_of(self.model, self.batch, i) for i in range(5))/5


def test_projections_of_metrics():
    U, V, D = torch.randn(6, 7), torch.randn(5, 7), torch.rand(6, 5)
    S = torch.einsum("mp,np->mnp", U, V).flatten(0, 1)
    close(projected_diagonal(D, U, V), S.T @ D.flatten().diag() @ S, 1e-12)

    def written(M):
        "A side as it may be given, and as the matrix that it stands for."
        diagonal = M.diagonal()
        return [(None, torch.eye(len(M))), (M, M), (diagonal, diagonal.diag())]

    for left, B in written(D @ D.T):
        for right, A in written(D.T @ D):
            close(projected_kronecker(left, right, U, V), S.T @ torch.kron(B, A) @ S, 1e-12)


def test_large_projection_in_pieces(monkeypatch):
    from frechet_merge.curvature import forms

    U, V, D = torch.randn(6, 7), torch.randn(5, 7), torch.rand(6, 5)
    whole = projected_diagonal(D, U, V)
    monkeypatch.setattr(forms, "GRADIENTS", 100)
    close(projected_diagonal(D, U, V), whole, 1e-14)
    model, batch = case("gpt2")
    a = curvature(model, [batch], "diagonal")
    monkeypatch.setattr(forms, "GRADIENTS", 1 << 24)
    for k, v in curvature(model, [batch], "diagonal").items():
        close(a[k], v, 1e-12)


def test_wide_sides_are_diagonal(monkeypatch):
    from frechet_merge.curvature import forms

    model, batch = case("gpt2 untied")
    whole = curvature(model, [batch])
    monkeypatch.setattr(forms, "WIDE", 30)
    s = curvature(model, [batch])
    assert s["lm_head.weight.left"].shape == (31,)
    assert "lm_head.weight.left" in s.about["diagonal"]
    assert s["lm_head.weight.right"].shape == (12, 12)
    close(s["lm_head.weight.left"], whole["lm_head.weight.left"].diagonal())


@pytest.mark.parametrize("form", ["diagonal", "kronecker", "inputs", "projected"])
@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_killed_and_started_again_is_the_same(form, name, tmp_path, monkeypatch):
    model, batch = case(name)
    how = {}
    if form == "projected":
        matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
        sides = {n: [torch.randn(k, 3) for k in p.shape] for n, p in matrices.items()}
        how["basis"] = {n: tuple(both) for n, both in sides.items()}
    batches = [changed(batch, lambda v, i=i: v.roll(i, 0)) for i in range(4)]
    state = tmp_path/"state"
    monkeypatch.setattr(module, "SAVE", 0)

    def dies(k):
        yield from batches[:k]
        raise KeyboardInterrupt

    for k in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            curvature(model, dies(k), form, resume=state, **how)
    again = curvature(model, batches, form, resume=state, **how)
    never = curvature(model, batches, form, **how)
    assert again.keys() == never.keys()
    assert all(torch.equal(again[k], never[k]) for k in never)
    assert again.about == never.about
    assert os.listdir(tmp_path) == []


def test_error_in_the_middle_of_a_batch_leaves_a_whole_state(tmp_path):
    model, (x, y) = case("mlp")
    state = tmp_path/"state"
    calls = []

    def fails(model, b):
        calls.append(1)
        if len(calls) == 4:
            raise OSError("out of memory")
        return model(b[0])

    with pytest.raises(OSError):
        curvature(model, [(x, y)]*4, resume=state, forward=fails)
    again = curvature(model, [(x, y)]*4, resume=state)
    never = curvature(model, [(x, y)]*4)
    assert all(torch.equal(again[k], never[k]) for k in never)


def test_max_samples_is_exact_and_can_be_raised(tmp_path):
    model, (x, y) = case("mlp")
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    state = tmp_path/"state"
    s = curvature(model, batches, "diagonal", max_samples=4, resume=state)
    want = curvature(model, [(x[:4], y[:4])], "diagonal")
    assert s.about["samples"] == 4 and state.exists()
    for k in s:
        close(s[k], want[k])
    same = curvature(model, batches, "diagonal", max_samples=4, resume=state)
    assert all(torch.equal(same[k], s[k]) for k in s)
    more = curvature(model, batches, "diagonal", resume=state)
    want = curvature(model, [(x, y)], "diagonal")
    assert more.about["samples"] == 5 and not state.exists()
    for k in more:
        close(more[k], want[k])


def test_state_of_another_run_or_other_data_is_refused(tmp_path):
    model, (x, y) = case("mlp")
    state = tmp_path/"state"
    curvature(model, [(x, y)]*2, max_samples=5, resume=state)
    with pytest.raises(ValueError, match="another run"):
        curvature(model, [(x, y)]*2, "diagonal", resume=state)
    with pytest.raises(ValueError, match="another run"):
        curvature(MLP(), [(x, y)]*2, resume=state)
    with pytest.raises(ValueError, match="not those of the run"):
        curvature(model, [(x + 1, y)]*2, resume=state)


def test_a_shuffling_loader_goes_on_in_its_order(tmp_path):
    model = MLP()
    data = torch.utils.data.TensorDataset(torch.randn(12, 6), torch.randint(0, 4, (12,)))
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)

    def dies():
        for i, b in enumerate(loader):
            if i == 2:
                raise KeyboardInterrupt
            yield b

    with pytest.raises(KeyboardInterrupt):
        curvature(model, dies(), "diagonal", resume=tmp_path/"state")
    again = curvature(model, loader, "diagonal", resume=tmp_path/"state")
    never = curvature(model, loader, "diagonal")
    assert all(torch.equal(again[k], never[k]) for k in never)


def test_everything_is_put_back():
    model, batch = case("bert")
    model.train()
    model.bert.pooler.eval()
    model.classifier.weight.requires_grad = False
    model.bert.pooler.dense.weight.grad = torch.ones(12, 12)
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()

    def check():
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), rng)
        assert not any(m._forward_hooks for m in model.modules())
        assert not model.classifier.weight.requires_grad
        assert model.classifier.bias.requires_grad
        assert torch.equal(model.bert.pooler.dense.weight.grad, torch.ones(12, 12))
        assert sum(p.grad is not None for p in model.parameters()) == 1

    x = batch | {"inputs_embeds": None}
    curvature(model, [x], "diagonal", "true")
    check()
    with pytest.raises(ZeroDivisionError):
        curvature(model, [x], forward=lambda m, b: 1/0)
    check()
    with pytest.raises(ValueError, match="one number for each"):
        curvature(model, [batch], estimator="empirical", loss=lambda out, b: out.sum())
    check()


def test_saved_and_loaded(tmp_path):
    model, batch = case("bert")
    s = curvature(model.float(), [batch])
    path = tmp_path/"s.safetensors"
    s.save(path)
    read = Statistics.load(path)
    assert read.keys() == s.keys() and read.about == s.about
    assert all(torch.equal(read[k], s[k]) for k in s)
    held = load(path)
    assert len(held.lazy) == len({id(v) for v in s.values()}) < len(s)
    assert set(held) == set(s)
    s.save(path)
    assert os.listdir(tmp_path) == ["s.safetensors"]


def refused(match, model=None, batch=None, **kw):
    m, b = case("mlp")
    with pytest.raises(ValueError, match=match):
        curvature(model or m, [b if batch is None else batch], **kw)


def test_refusals():
    x, y = case("mlp")[1]
    refused("no form is called 'dense'", form="dense")
    refused("no estimator is called", estimator="exact")
    refused("needs basis", form="projected")
    refused("takes one", basis={})
    refused("no parameter is called 'twwo", parameters=["twwo.weight"])
    absent = {"twwo.weight": (torch.eye(8), torch.eye(8))}
    refused("no parameter is called", form="projected", basis=absent)
    longer = {"two.weight": (torch.eye(8), torch.randn(9, 8))}
    shapes = "shapes .8, 8. and .9, 8., and its tensor is .8, 8."
    refused(shapes, form="projected", basis=longer)
    refused("needs labels", batch=x, estimator="empirical")
    refused(
        "one number for each of the 5 samples",
        estimator="empirical",
        loss=lambda out, b: F.cross_entropy(out, b[1]),
    )
    refused("C > 1", estimator="empirical", forward=lambda m, b: m(b[0])[:, :1])
    refused("C > 1", estimator="empirical", batch=(x, y.double()))
    refused("labels are drawn from logits", estimator="true", forward=lambda m, b: m(b[0])[:, :1])
    refused("returned a tuple for 2 samples", forward=lambda m, b: (m(b[0]),))
    refused(r"tensor of shape \[\] for 2", forward=lambda m, b: m(b[0]).sum())
    refused("no parameter is left", nn.Sequential(nn.LayerNorm(6)), x)
    refused("outputs of the first samples are not finite", batch=x*float("nan"))
    bad = x.clone()
    bad[4] = float("inf")
    refused("statistics of .* are not finite", batch=bad)
    refused("no parameter is left", MLP().requires_grad_(False))
    with pytest.raises(ValueError, match="no samples"):
        curvature(MLP(), [])


def test_samples_that_do_not_come_first_are_refused_by_name():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.inner(x.transpose(0, 1)).transpose(0, 1).mean(1))

    for t in (2, 3, 5):
        with pytest.raises(ValueError, match="layer 'inner'"):
            curvature(TimeFirst(), [torch.randn(5, t, 6)])
    s = curvature(TimeFirst(), [torch.randn(5, 3, 6)], parameters="out.*")
    assert set(s) == {"out.weight.left", "out.weight.right"}


def test_flattened_tokens_are_told_apart():
    class Flat(nn.Module):
        def __init__(self, swap):
            super().__init__()
            self.emb = nn.Embedding(31, 6)
            self.inner = nn.Linear(6, 6)
            self.out = nn.Linear(6, 3)
            self.swap = swap

        def forward(self, ids):
            h = self.emb(ids)
            h = h.transpose(0, 1) if self.swap else h
            y = self.inner(h.reshape(-1, 6)).view(h.shape)
            return self.out((y.transpose(0, 1) if self.swap else y).mean(1))

    good = Flat(False)
    y = torch.tensor([0, 1, 2, 0, 1])
    s = curvature(good, [(IDS, y)], "diagonal", "empirical")
    squares_close(s, gradients(good, (IDS, y)))
    with pytest.raises(ValueError, match="layer 'inner' mixes samples"):
        curvature(Flat(True), [(IDS, y)], "diagonal")


def test_weights_used_outside_their_layer_are_left_out():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(31, 6)
            self.mid = nn.Linear(6, 6)
            self.unused = nn.Linear(6, 6)
            self.raw = nn.Parameter(torch.ones(6))

        def forward(self, ids):
            return F.linear(self.mid(self.emb(ids)).mean(1)*self.raw, self.emb.weight)

    s = curvature(Functional(), [IDS], "diagonal")
    assert "used elsewhere" in s.about["skipped"]["emb.weight"]
    assert "not called" in s.about["skipped"]["unused.weight"]
    # `raw`: the module that has it is run again, sample by sample
    assert set(s.about["skipped"]) == {"emb.weight", "unused.weight", "unused.bias"}
    assert set(s) == {"mid.weight", "mid.bias", "raw"}
    model, batch = Functional().eval(), (IDS, torch.zeros(5, dtype=torch.long))
    g = [torch.autograd.grad(loss_of(model, batch, i), model.raw)[0] for i in range(5)]
    s = curvature(model, [batch], "diagonal", "empirical")
    close(s["raw"], torch.stack(g).pow(2).mean(0))


def test_lora_on_a_frozen_base():
    peft = pytest.importorskip("peft")
    model, batch = case("gpt2")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(model, config).double()
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data.normal_()
    s = curvature(model, [batch], "diagonal", "empirical")
    g = gradients(model, batch)
    assert s.keys() == g.keys() and len(g) == 4
    squares_close(s, g)
    assert all(k.endswith((".left", ".right")) for k in curvature(model, [batch], "kronecker"))


def test_rms_norms_of_a_llama():
    cfg = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.LlamaForCausalLM(cfg).double()
    s = curvature(model, [LM], "diagonal", "empirical")
    g = gradients(model, LM)
    assert s.keys() == g.keys()
    # the norms compute in float32
    for n in g:
        close(s[n], g[n].pow(2).mean(0), 1e-6 if "norm" in n else 1e-9)


def test_vit_and_positions():
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    ).double()
    batch = {"pixel_values": torch.randn(5, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 1, 0])}

    def loss(m, b, i):
        logits = m(pixel_values=b["pixel_values"][i : i + 1]).logits
        return F.cross_entropy(logits, b["labels"][i : i + 1])

    s = curvature(model, [batch], "diagonal", "empirical")
    g = gradients(model, batch, loss)
    assert s.keys() == g.keys()
    squares_close(s, g)
    assert "vit.embeddings.patch_embeddings.projection.weight.right" in curvature(model, [batch])


def test_hidden_states_are_pooled_over_the_mask():
    model = bert().bert
    batch = {k: v for k, v in text(None).items() if k != "labels"}

    def pooled(m, b, i):
        out = m(input_ids=IDS[i : i + 1], attention_mask=MASK[i : i + 1])
        return out.last_hidden_state[0, : int(MASK[i].sum())].mean(0)[0]

    model.pooler = None
    s = curvature(model, [batch], "diagonal", "empirical", loss=lambda out, b: out[:, 0])
    squares_close(s, gradients(model, batch, pooled))


def test_seeds_and_labels_of_any_size():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    found = [
        curvature(model, [x], estimator="pullback", seed=s)["weight.left"]
        for s in (0, 1, 20240601, 20240602)
    ]
    # a seed is read
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])

    def with_labels(dtype):
        batch = {"x": x, "labels": torch.tensor([0, 1, 1, 0], dtype=dtype)}
        s = curvature(model, [batch], estimator="empirical", forward=lambda m, b: m(b["x"]))
        return s["weight.left"]

    assert torch.equal(with_labels(torch.int32), with_labels(torch.int64))
    with pytest.raises(ValueError, match="max_samples = 0"):
        curvature(model, [x], max_samples=0)

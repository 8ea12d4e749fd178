"""Units of a merged network are given back the spread that averaging took."""

import pytest
import torch
from torch import nn

from frechet_merge.curvature.activations import activations, blocks_of, rows_of
from frechet_merge.curvature.repair import repair
from frechet_merge.messages import MergeError


def stack(seed, norm=False, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=bias), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU(),
        nn.ConvTranspose2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(320, 7, bias=bias),
        nn.ReLU(), nn.Linear(7, 2),
    )  # fmt: skip


def average(*nets):
    made = stack(9)
    states = [n.state_dict() for n in nets]
    made.load_state_dict({k: sum(s[k] for s in states)/len(states) for k in states[0]})
    return made


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return list(torch.randn(3, 20, 1, 8, 8))


class TestRepair:
    def test_a_norm_that_is_set_to_the_target_is_the_oracle(self, batches):
        a, b = stack(0), stack(1)
        ours = average(a, b)
        repair(ours, [a, b], batches)
        # REPAIR's own way: after each layer a norm in training mode, with the wanted scale
        x = torch.cat(batches)
        h = [x, x, x]
        for i in range(8):
            h = [net[i](z) for net, z in zip((a, b, average(a, b)), h)]
            if i in (0, 3, 6):
                axis = [0] + [*range(2, h[0].dim())]
                means = [z.mean(axis, keepdim=True) for z in h]
                stds = [z.std(axis, correction=0, keepdim=True) for z in h]
                h[2] = (h[2] - means[2])/stds[2]*(stds[0] + stds[1])/2 + (means[0] + means[1])/2
        torch.testing.assert_close(ours[:8](x), h[2], rtol=1e-3, atol=1e-4)

    def test_a_layer_without_bias_keeps_its_parameters(self, batches):
        a, b = stack(0, bias=False), stack(1, bias=False)
        merged = stack(2, bias=False)
        before = set(merged.state_dict())
        done = repair(merged, [a, b], batches)
        assert done.unshifted == ["0", "6"] and set(merged.state_dict()) == before
        seen = [activations(n, batches, ["0"])["0"].variance.sqrt() for n in (a, b, merged)]
        torch.testing.assert_close(seen[2], (seen[0] + seen[1])/2, rtol=1e-4, atol=1e-5)

    def test_what_feeds_a_norm_is_left_and_the_norm_has_new_records(self, batches):
        nets = [stack(i, norm=True) for i in range(3)]
        weight, record = nets[2][0].weight.clone(), nets[2][1].running_mean.clone()
        done = repair(nets[2], nets[:2], batches)
        assert torch.equal(nets[2][0].weight, weight)
        assert not torch.equal(nets[2][1].running_mean, record)
        assert (done.layers, done.normed) == (["3", "6"], ["1"])

    def test_a_tied_weight_is_named_and_left(self, batches):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.flat = nn.Flatten()
                self.one, self.two, self.last = (nn.Linear(64, 64) for _ in range(3))
                self.two.weight = self.one.weight

            def forward(self, x):
                return self.last(self.two(self.one(self.flat(x)).relu()).relu())

        m = Tied()
        before = m.one.weight.clone()
        with pytest.warns(UserWarning, match="not theirs alone.*one"):
            done = repair(m, [Tied(), Tied()], batches)
        assert done.layers == [] and torch.equal(m.one.weight, before)

    def test_a_dead_unit_is_counted_and_not_blown_up(self, batches):
        a, b, merged = stack(0), stack(1), stack(2)
        with torch.no_grad():
            merged[0].weight[2] = 0
        done = repair(merged, [a, b], batches)
        assert done.dead["0"] == 1 and not merged[0].weight[2].any()

    def test_after_a_failure_it_is_as_it_was(self, batches):
        merged = stack(2, norm=True)
        before = {n: x.clone() for n, x in merged.state_dict().items()}
        with pytest.raises(MergeError, match="models.1. says nothing of layer '3'"):
            repair(merged, [stack(0, norm=True), {}], batches)
        assert all(torch.equal(x, before[n]) for n, x in merged.state_dict().items())

    def test_linear_layers_of_gpt2(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        nets = []
        for seed in range(3):
            torch.manual_seed(seed)
            nets.append(transformers.GPT2LMHeadModel(config).eval())
        ids = torch.randint(50, (2, 4, 12))
        mask = torch.ones(4, 12).long()
        mask[0, 5:] = 0
        fed = [{"input_ids": x, "attention_mask": mask} for x in ids]
        names = [f"transformer.h.{i}.mlp.c_fc" for i in range(2)]
        repair(nets[2], nets[:2], fed, layers=names)
        a, b, merged = (activations(n, fed, names) for n in nets)
        for n in names:
            assert a[n].n == 2*(5 + 36)
            torch.testing.assert_close(merged[n].mean, (a[n].mean + b[n].mean)/2, atol=1e-5, rtol=0)


class TestActivations:
    def test_of_many_small_batches_as_of_one(self, batches):
        m = stack(0)
        x = torch.cat(batches)
        one, many = activations(m, [x]), activations(m, x.split(7))
        for n in one:
            torch.testing.assert_close(one[n].variance, many[n].variance, rtol=1e-6, atol=1e-9)
            assert one[n].rank == pytest.approx(many[n].rank, rel=1e-6)

    def test_the_definition(self, batches):
        m = stack(0)
        x = torch.cat(batches)
        h = rows_of(m[6], m[:7](x))
        p = torch.linalg.svdvals(h - h.mean(0))
        p = p/p.sum()
        seen = activations(m, [x], ["6"])["6"]
        assert seen.rank == pytest.approx(float((-p*p.log()).sum().exp()))
        assert seen.total == pytest.approx(float(h.var(0, correction=0).sum()))

    def test_blocks_of_transformers_and_residual_networks(self):
        transformers = pytest.importorskip("transformers")
        sizes = dict(hidden_size=8, num_attention_heads=2, intermediate_size=8)
        bert = transformers.BertModel(
            transformers.BertConfig(vocab_size=9, num_hidden_layers=3, **sizes)
        )
        assert blocks_of(bert) == [f"encoder.layer.{i}" for i in range(3)]
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], layer_type="basic"
        )
        assert len(blocks_of(transformers.ResNetModel(config))) > 1

"""What merges keep of what their models' layers say: of modules, and of checkpoints on disk."""

import json

import pytest
import torch
from conftest import cli
from torch import nn

from frechet_merge import merge
from frechet_merge.diagnostics.collapse import Collapse, Texts, collapse, collapse_of, plot_collapse
from frechet_merge.diagnostics.segment import Segment, between, loss_on, plot_segments, segment
from frechet_merge.messages import MergeError

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "road", "fast"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Three small encoders of one vocabulary, and texts."
    transformers = pytest.importorskip("transformers")
    tmp = tmp_path_factory.mktemp("models")
    (tmp/"vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = transformers.BertTokenizer(str(tmp/"vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=15, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, architectures=["BertModel"],
    )  # fmt: skip
    for i in range(3):
        torch.manual_seed(i)
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp/f"m{i}")
        tokenizer.save_pretrained(tmp/f"m{i}")
    lines = [" ".join(WORDS[(i*k) % 10] for k in range(1, 3 + i % 5)) for i in range(40)]
    (tmp/"texts.jsonl").write_text("\n".join(json.dumps({"text": t, "label": 0}) for t in lines))
    return tmp


class TestOfCheckpoints:
    def test_it_is_what_the_modules_say(self, folders):
        transformers = pytest.importorskip("transformers")
        models = [folders/f"m{i}" for i in range(2)]
        found = collapse_of(models, Texts([folders/"texts.jsonl"], max_samples=40))
        assert [r["layer"] for r in found.rows] == [f"encoder.layer.{i}" for i in range(3)]
        merged = merge(models).tensors
        tokenizer = transformers.AutoTokenizer.from_pretrained(models[0])
        rows = map(json.loads, (folders/"texts.jsonl").read_text().splitlines())
        batch = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
        keep = batch["attention_mask"].bool()
        assert found.samples == int(keep.sum())

        def total(state):
            m = transformers.BertModel.from_pretrained(models[0], add_pooling_layer=False).eval()
            m.load_state_dict(state)
            with torch.no_grad():
                h = m(**batch, output_hidden_states=True).hidden_states[3]
            return float(h[keep].double().var(0, correction=0).sum())

        a, b, both = (
            total(dict(s)) for s in (merge([models[0]]).tensors, merge([models[1]]).tensors, merged)
        )
        assert found.rows[2]["variance"] == pytest.approx(2*both/(a + b), rel=1e-4)

    def test_of_one_model_twice_it_is_all(self, folders):
        twice = [folders/"m0"]*2
        found = collapse_of(twice, Texts([folders/"texts.jsonl"]), ["euclidean", "sphere"])
        assert found.merges == ["euclidean", "sphere"]
        assert all(r["variance"] == pytest.approx(1, abs=1e-4) for r in found.rows)

    def test_on_the_command_line(self, folders):
        args = [str(folders/"m0"), str(folders/"m1"), "--data", str(folders/"texts.jsonl")]
        more = "--geometry", "sphere", "--layers", "*.intermediate", "--json"
        code, out, err = cli("inspect", *args, *more)
        assert code == 0, err
        assert [(r["merge"], r["layer"]) for r in json.loads(out)["collapse"]] == [
            ("sphere", f"encoder.layer.{i}.intermediate") for i in range(3)
        ]
        _, shown, _ = cli("inspect", *args)
        assert "What a merge keeps" in shown and "where it keeps least" in shown
        code, _, err = cli("inspect", *args[:2], "--geometry", "sphere")
        assert code == 2 and "give --data" in err
        code, _, err = cli("inspect", *args, "--layers", "decoder*")
        assert code == 1 and "no layer of this BertModel" in err

    def test_without_texts_it_is_refused(self, folders):
        with pytest.raises(ValueError, match="no examples"):
            collapse_of([folders/"m0"], Texts([]))


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class TestSegment:
    def test_loss_and_barrier_are_what_they_say(self):
        a, b, x, y = net(0), net(1), torch.randn(50, 4), torch.randint(3, (50,))
        loss, m = loss_on([(x[:20], y[:20]), (x[20:], y[20:])]), net(2)
        before = {n: p.clone() for n, p in m.state_dict().items()}
        found = segment(m, a.state_dict(), b.state_dict(), loss, 5)
        for t, value in zip(found.ts, found.losses):
            state = {n: (1 - t)*p + t*b.state_dict()[n] for n, p in a.state_dict().items()}
            out = torch.func.functional_call(a, state, x)
            assert value == pytest.approx(float(nn.functional.cross_entropy(out, y)), rel=1e-5)
        assert all(torch.equal(p, before[n]) for n, p in m.state_dict().items())

    def test_a_module_comes_back_when_the_loss_fails(self):
        m, before = net(2), net(2).state_dict()
        with pytest.raises(ZeroDivisionError):
            segment(m, net(0).state_dict(), net(1).state_dict(), lambda m: 1/0)
        assert all(torch.equal(p, before[n]) for n, p in m.state_dict().items())

    def test_batch_counters_are_the_first_models(self):
        a, b = ({"n": torch.tensor(3), "w": torch.full((2,), float(i))} for i in range(2))
        made = between(a, b, 0.25)
        assert made["n"] == 3 and torch.equal(made["w"], torch.full((2,), 0.25))


class TestPictures:
    def test_axes_in_axes_out(self):
        import matplotlib.pyplot as plt

        _, ax = plt.subplots()
        found = collapse({"x": net(2)}, [net(0), net(1)], [torch.randn(30, 4)])
        assert plot_collapse(found, ax) is ax and len(ax.get_lines()) == 2
        assert plot_collapse(found, of="rank") is not ax
        with pytest.raises(ValueError, match="'variance' or 'rank'"):
            plot_collapse(found, of="loss")
        ways = [Segment([0, 0.5, 1], [0, x, 0], f"{x}") for x in (1.0, 2.0)]
        ax = plot_segments(ways)
        assert "50 % of the highest barrier" in ax.get_title()

    def test_a_verdict_for_each_merge(self):
        rows = [
            {"merge": m, "T": 2, "layer": "l", "units": 3, "variance": v, "rank": None}
            for m, v in (("a", 0.5), ("b", 0.25))
        ]
        found = Collapse(["x", "y"], rows)
        assert "a keeps 50 %" in found.verdict and "b keeps 25 %" in found.verdict

    def test_no_examples(self):
        with pytest.raises(MergeError, match="no examples"):
            loss_on([])

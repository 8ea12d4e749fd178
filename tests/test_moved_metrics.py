"""Metrics together with rows that move, against dense algebra token by token in float64."""
import pytest
import torch
from conftest import cli
from safetensors.torch import save_file
from test_metrics_merge import draw, spd
from test_vocabularies import EMBEDDING, WORDS, model, speaker, states
from transformers import AutoTokenizer

from frechet_merge import load, merge
from frechet_merge.diagnostics.inspection import inspect
from frechet_merge.geometries.fisher import Curved
from frechet_merge.messages import MergeError

HEAD = "lm_head.weight"
MORE = [*WORDS[::-1], "<x>"]


@pytest.fixture
def two(tmp_path):
    "The second has the words the other way round, and a token more."
    return model(tmp_path/"a", 0, WORDS), model(tmp_path/"b", 1, MORE)


def diagonals(folders):
    "A positive number for each entry of each tensor."
    return [
        {n: draw(100*i + j, x.shape).square() + 0.1 for j, (n, x) in enumerate(load(f).items())}
        for i, f in enumerate(folders)
    ]


def check_diagonal(m, folders, metrics, known, vocabulary, weights):
    for name in (EMBEDDING, HEAD):
        for token, i in vocabulary.items():
            up = down = 0
            for s, G, v, w in zip(states(*folders), metrics, known, weights):
                if token in v:
                    d = w*G[name][v[token]]
                    up, down = up + d*s[name][v[token]].double(), down + d
            torch.testing.assert_close(m[name][i].double(), up/down, rtol=1e-5, atol=1e-6)


class TestDiagonal:
    @pytest.mark.parametrize("choice", [0, 1])
    def test_of_one_tokenizer(self, two, tmp_path, choice):
        metrics, known = diagonals(two), [{t: i for i, t in enumerate(v)} for v in (WORDS, MORE)]
        m = merge([*two], Curved(), metrics=metrics, tokenizer=two[choice], weights=[1, 2]).tensors
        check_diagonal(m, two, metrics, known, known[choice], [1, 2])

    def test_of_a_union(self, tmp_path):
        folders = [
            speaker(tmp_path/"a", 0, WORDS, ["<x>"]),
            speaker(tmp_path/"b", 1, WORDS[::-1], ["<y>"], 40),
        ]
        metrics = diagonals(folders)
        out = tmp_path/"o"
        merge(folders, Curved(), metrics=metrics, tokenizer="union", out=out)
        known = [AutoTokenizer.from_pretrained(f).get_vocab() for f in folders]
        union = AutoTokenizer.from_pretrained(out).get_vocab()
        m, = states(out)
        check_diagonal(m, folders, metrics, known, union, [1, 1])

    def test_a_longer_vocabulary_and_padding(self, tmp_path):
        a, b = model(tmp_path/"a", 0, WORDS), model(tmp_path/"b", 1, [*WORDS, "<x>"])
        metrics = diagonals((a, b))
        m = merge([a, b], Curved(), metrics=metrics, pad_to_multiple_of=16).tensors
        known = [{t: i for i, t in enumerate(v)} for v in (WORDS, [*WORDS, "<x>"])]
        check_diagonal(m, (a, b), metrics, known, known[1], [1, 1])
        x, y = states(a, b)
        want = (x[EMBEDDING].mean(0) + y[EMBEDDING].mean(0))/2
        torch.testing.assert_close(m[EMBEDDING][31], want)

    def test_on_the_command_line(self, two, tmp_path):
        metrics = diagonals(two)
        for name, G in zip("ab", metrics):
            save_file(G, tmp_path/f"{name}.stats.safetensors")
        words = ["merge", "a", "b", "-o", "o", "--tokenizer", "b"]
        words += ["--geometry", "curved"]
        words += ["--metrics", "a.stats.safetensors,b.stats.safetensors"]
        code, _, said = cli(*words, cwd=tmp_path)
        assert code == 0, said
        known = [{t: i for i, t in enumerate(v)} for v in (WORDS, MORE)]
        m, = states(tmp_path/"o")
        check_diagonal(m, two, metrics, known, known[1], [1, 1])

    def test_of_another_model(self, two):
        "It is held to the model's own rows, and not to those of the result."
        metrics = diagonals(two)
        with pytest.raises(MergeError, match="Collect the statistics from the model"):
            merge([*two], Curved(), metrics=metrics[::-1], tokenizer=two[1])


class TestKronecker:
    @pytest.mark.parametrize("is_vector", [False, True])
    @pytest.mark.parametrize("choice", [0, 1])
    def test_both_sides(self, two, is_vector, choice):
        metrics = []
        for i, n in enumerate((30, 31)):
            left = spd(i, n)
            left = left.diagonal().clone() if is_vector else left
            metrics.append({f"{HEAD}.left": left, f"{HEAD}.right": spd(9 + i, 16)})
        with pytest.warns(UserWarning, match="no metric for"):
            m = merge([*two], Curved(), metrics=metrics, tokenizer=two[choice]).tensors[HEAD]
        target = (WORDS, MORE)[choice]
        total, right = 0, 0
        for s, G, vocab in zip(states(*two), metrics, (WORDS, MORE)):
            P = torch.tensor([[float(t == u) for u in vocab] for t in target]).double()
            left = G[f"{HEAD}.left"]
            L = P @ (left.diag() if is_vector else left) @ P.T
            whole = torch.kron(L, G[f"{HEAD}.right"])
            total, right = total + whole, right + whole @ (P @ s[HEAD].double()).flatten()
        want = torch.linalg.solve(total, right).view(len(target), 16)
        torch.testing.assert_close(m.double(), want, rtol=1e-3, atol=1e-4)

    def test_one_side(self, two):
        "Only the columns: the rows move, and the metric does not."
        metrics = [{f"{HEAD}.right": spd(i, 16)} for i in range(2)]
        with pytest.warns(UserWarning, match="no metric for"):
            m = merge([*two], Curved(), metrics=metrics, tokenizer=two[1]).tensors[HEAD]
        x, y = (s[HEAD].double() for s in states(*two))
        A, B = (G[f"{HEAD}.right"] for G in metrics)
        want = torch.linalg.solve(A + B, (x.flip(0) @ A + y[:30] @ B).T).T
        torch.testing.assert_close(m[:30].double(), want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(m[30].double(), y[30], rtol=1e-4, atol=1e-5)


    def test_one_side_of_three(self, tmp_path):
        "A model that lacks a row has no opinion on it, though its metric is of columns only."
        vocabularies = (WORDS, [*WORDS, "<x>"], [*WORDS, "<x>"])
        three = [model(tmp_path/"abc"[i], i, v) for i, v in enumerate(vocabularies)]
        metrics = [{f"{HEAD}.right": spd(i, 16)} for i in range(3)]
        with pytest.warns(UserWarning, match="no metric for"):
            m = merge(three, Curved(), metrics=metrics).tensors[HEAD]
        xs, Rs = [s[HEAD].double() for s in states(*three)], [G[f"{HEAD}.right"] for G in metrics]
        for i, who in ((5, (0, 1, 2)), (30, (1, 2))):
            total, right = sum(Rs[t] for t in who), sum(xs[t][i] @ Rs[t] for t in who)
            want = torch.linalg.solve(total, right)
            torch.testing.assert_close(m[i].double(), want, rtol=1e-3, atol=1e-4)


def test_a_projected_metric_is_refused(two):
    metrics = [{f"{HEAD}.projected": spd(i, 4)} for i in range(2)]
    base = two[0]
    with pytest.raises(MergeError, match="another.\nCollect another form"):
        merge([*two], "epimer", base=base, metrics=metrics, tokenizer=two[1])


def test_inspect_sees_them(tmp_path):
    a, b = model(tmp_path/"a", 0, WORDS), model(tmp_path/"b", 1, [*WORDS, "<x>"])
    found = inspect([a, b], metrics=diagonals((a, b)))
    assert {r["name"] for r in found.eta} >= {EMBEDDING, HEAD}

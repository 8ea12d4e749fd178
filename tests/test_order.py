"""The largest numbers and their ranks, beside a stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frechet_merge.algebra.order import NONE, cut_of, cuts, ranks

DTYPES = (torch.float32, torch.float64)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 1e-45, 0.5, 1.0, 1.5, 2.0**25, 3e38]), min_size=1, max_size=40),
    st.integers(-1, 41),
    st.sampled_from((*DTYPES, torch.bfloat16)),
)
def test_the_largest_are_those_of_a_stable_sort(numbers, k, dtype):
    x = torch.tensor(numbers).to(dtype)
    x = x.float() if dtype == torch.bfloat16 else x
    k = min(k, len(x))
    want = torch.zeros(len(x), dtype=torch.bool)
    want[x.argsort(descending=True, stable=True)[: max(k, 0)]] = True
    assert torch.equal(cut_of(x, k).above(x), want.to(x))
    assert torch.equal(cut_of(x, k).keep(-x), -x*want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_infinite_is_kept(dtype):
    x = torch.tensor([1.0, float("inf"), 2.0, 1.0], dtype=dtype)
    for k in (1, 2, 4):
        assert cut_of(x, k).keep(-x)[1] == -float("inf")


def test_nothing_is_remembered_of_cuts_that_all_share():
    x = torch.rand(7)
    for cut in (cut_of(x, 0), NONE):
        assert not cut.above(x).any() and not cut.keep(x).any()
    assert NONE.before == {0: 0}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 9), st.sampled_from(DTYPES))
def test_ranks_are_those_of_a_stable_sort(rows, n, kinds, dtype):
    x = torch.randint(kinds, (rows, n)).to(dtype)/7
    assert torch.equal(ranks(x), x.argsort(dim=-1, stable=True).argsort(-1))


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 60), st.integers(1, 9), st.sampled_from(DTYPES))
def test_ranges_are_cut_as_the_whole_is(data, n, length, dtype):
    X = torch.randint(4, (2, n)).to(dtype)/7
    asked = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(-1, n)), max_size=4))
    pieces = [(i, X[:, i : i + length]) for i in range(0, n, length)]
    signs = torch.randint(2, (n,)).to(dtype)*2 - 1
    for (row, k), cut in zip(asked, cuts(lambda: X.split(length, 1), dtype, asked)):
        assert cut == cut_of(X[row], k)
        mask = torch.cat([cut.above(x[row], i) for i, x in pieces])
        assert torch.equal(mask, cut.above(X[row])) and mask.sum() == max(k, 0)
        y = X[row]*signs
        kept = torch.cat([cut.keep(y[i : i + length], i) for i, _ in pieces])
        assert torch.equal(kept, y*mask) and torch.equal(cut.keep(y), kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_places_in_the_order(dtype):
    x = torch.rand(7, 11, dtype=dtype)
    flat = x.flatten().sort(descending=True).values
    assert [cut_of(x, k).least for k in (1, 30, 77)] == flat[[0, 29, 76]].tolist()


def test_of_a_turned_matrix():
    x = torch.rand(30, 20).T
    flat = x.flatten()
    assert torch.equal(cut_of(x, 100).above(x).flatten(), cut_of(flat, 100).above(flat))
    assert torch.equal(ranks(x), x.argsort(-1).argsort(-1))

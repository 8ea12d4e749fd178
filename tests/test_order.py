"""The largest numbers and their ranks, beside a stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frechet_merge.algebra.order import ranks, smallest, top

DTYPES = (torch.float32, torch.float64)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 1e-45, 0.5, 1.0, 1.5, 3e38]), min_size=1, max_size=40),
    st.integers(-1, 41),
    st.sampled_from((*DTYPES, torch.bfloat16)),
)
def test_the_largest_are_those_of_a_stable_sort(numbers, k, dtype):
    x = torch.tensor(numbers).to(dtype)
    want = torch.zeros(len(x), dtype=torch.bool)
    want[x.argsort(descending=True, stable=True)[: max(k, 0)]] = True
    assert torch.equal(top(x, k), want)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 9), st.sampled_from(DTYPES))
def test_ranks_are_those_of_a_stable_sort(rows, n, kinds, dtype):
    x = torch.randint(kinds, (rows, n)).to(dtype)/7
    assert torch.equal(ranks(x), x.argsort(dim=-1, stable=True).argsort(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_places_in_the_order(dtype):
    x = torch.randn(7, 11, dtype=dtype)
    flat = x.flatten().sort().values
    assert torch.equal(smallest(x, [0, 30, 76]), flat[[0, 30, 76]])


def test_of_a_turned_matrix():
    x = torch.rand(30, 20).T
    assert torch.equal(top(x, 100).flatten(), top(x.flatten(), 100))
    assert torch.equal(ranks(x), x.argsort(-1).argsort(-1))

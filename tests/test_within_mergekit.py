"""Geometries are merge methods of mergekit, of either kind of its functions; what they compute is
what merge computes. mergekit's own runs of them are in bench/within_mergekit.py."""

import sys
from inspect import signature
from types import SimpleNamespace
from typing import Generic, TypeVar

import pytest
import torch
from conftest import save, tensors

from frechet_merge import MergeError, merge
from frechet_merge.geometries.registry import geometries
from frechet_merge.recipes import within_mergekit
from frechet_merge.recipes.within_mergekit import of_group, of_list, options, register, usable

T = TypeVar("T")
NAME = "q.weight"


class PerNonBase(Generic[T]):
    "Stands for mergekit's."


KINDS = SimpleNamespace(PerNonBase=PerNonBase, TensorGroup=object)


def states():
    return [{NAME: tensors(i)[NAME]} for i in range(3)]


def entries(every):
    return [SimpleNamespace(id=f"m{i}", tensor=x[NAME]) for i, x in enumerate(every)]


@pytest.mark.parametrize("name", sorted(usable().keys() - {"clipped", "times"}))
def test_both_kinds_of_functions_give_what_merge_gives(name):
    (base, *every), make = states(), usable()[name]
    expected = merge(every, name, base, [2, 1], 0.5).tensors[NAME]
    group = SimpleNamespace(
        non_base=entries(every),
        base=SimpleNamespace(tensor=base[NAME]),
        metadata=SimpleNamespace(name=NAME),
    )
    own = {"scale": 0.5, **options(make)}
    found = of_group("f", make, KINDS)(group, weight={"m0": 2.0, "m1": 1.0}, **own)
    assert torch.equal(found, expected)
    versions = [x[NAME] for x in every]
    weight = SimpleNamespace(name=NAME)
    found = of_list("f", make)(
        tensors=versions, weight=[2.0, 1.0], base_tensor=base[NAME], output_weight=weight, **own
    )
    assert torch.equal(found, expected)


def test_a_base_that_is_needed_and_not_there_is_an_error():
    _, *every = states()
    group = SimpleNamespace(
        non_base=entries(every), base=None, metadata=SimpleNamespace(name=NAME)
    )
    with pytest.raises(ValueError, match="base"):
        of_group("f", usable()["ties"], KINDS)(group, weight={"m0": 1.0, "m1": 1.0})


def test_what_needs_statistics_or_adapters_is_no_method():
    assert {"sphere", "ties", "slerp", "epimer"} <= usable().keys() <= geometries().keys()
    assert not {"lora", "tsvm", "pullback", "curved"} & usable().keys()
    takes = signature(of_list("f", usable()["ties"])).parameters
    assert [takes[n].default for n in ("weight", "scale", "density", "mean")] == [1, 1, 0.2, True]
    assert takes["density"].annotation is float and takes["mean"].annotation is bool


def test_without_mergekit_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    with pytest.raises(MergeError, match=r"mergekit cannot be imported.*\n.*\[mergekit\]"):
        register()


def test_mergekit_merges_with_our_mean(tmp_path, monkeypatch):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    assert "frechet_sphere" in register() == register()
    every = [save(tmp_path/f"m{i}", tensors(i)) for i in range(2)]
    ours = merge(every, "sphere").tensors
    if hasattr(mergekit, "merge_tensors"):
        found = mergekit.merge_tensors([tensors(i)[NAME] for i in range(2)], "frechet_sphere")
        assert torch.equal(found, ours[NAME])
    assert within_mergekit.entry_points(group="console_scripts", name="mergekit-yaml")

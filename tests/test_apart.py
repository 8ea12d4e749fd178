"""How models lie to one another: distances in several geometries, and what changes share."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frechet_merge import Euclidean, LoRA, load, merge
from frechet_merge.adapters.updates import align_updates
from frechet_merge.cli.demo import DATA, tasks
from frechet_merge.diagnostics.apart import distances, plot_map, plot_spectra, scaled, signs
from frechet_merge.diagnostics.apart import spectra, subspaces
from frechet_merge.messages import MergeError


def models(T=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        {"w": torch.randn(20, 30, generator=g), "b": torch.randn(9, generator=g)} for _ in range(T)
    ]


def _updates_of(folder):
    c = load(folder)
    return {u.name: u.versions[0].factors().double().delta() for u in align_updates([c])[0]}


class TestDistances:
    @pytest.mark.parametrize("geometry", ["euclidean", "sphere"])
    def test_of_two_models_twice_the_way_to_their_mean(self, geometry):
        two = models(2)
        found = distances(two, geometry)
        of_merge = sum(m.variance for m in merge(two, geometry).means.values())
        assert found.variance == pytest.approx(of_merge, rel=1e-5)
        # the mean is in the middle of the way
        assert found.squares[0][1] == pytest.approx(4*of_merge, rel=1e-4)

    def test_from_files_with_integers_and_statistics(self, tmp_path):
        files, every = [], models(3)
        for i, m in enumerate(every):
            more = {"steps": torch.tensor(3), "bn.running_mean": 100*torch.randn(5)}
            save_file(m | more, tmp_path/f"{i}.safetensors")
            files.append(tmp_path/f"{i}.safetensors")
        found = distances(files)
        flat = torch.stack([torch.cat([x.flatten() for x in m.values()]) for m in every])
        want = torch.cdist(flat.double(), flat.double())
        np.testing.assert_allclose(found.distances, want, rtol=1e-5, atol=1e-6)

    def test_with_metrics_and_weights(self):
        two = models(2)
        Gs = [{n: torch.full_like(x, k) for n, x in m.items()} for k, m in zip((1.0, 3.0), two)]
        plain, found = distances(two), distances(two, Euclidean(), metrics=Gs)
        assert found.squares[0][1] == pytest.approx(2*plain.squares[0][1], rel=1e-5)

    def test_of_adapters_are_those_of_updates(self):
        experts = [DATA/n for n in tasks()][:3]
        for g in (LoRA(), LoRA(metric="wasserstein")):
            found = distances(experts, g)
            square = torch.tensor(found.squares)
            assert torch.equal(square, square.T) and not square.diagonal().any()
        f, g = (_updates_of(e) for e in experts[:2])
        want = sum(float((f[n] - g[n]).square().sum()) for n in f)
        assert distances(experts, "lora").squares[0][1] == pytest.approx(want, rel=1e-5)

    def test_a_map_keeps_what_fits(self):
        x = torch.randn(5, 3, dtype=torch.float64)
        places, share = scaled(torch.cdist(x, x).square())
        centred = x - x.mean(0)
        values = torch.linalg.svdvals(centred).square()
        assert share == pytest.approx(float(values[:2].sum()/values.sum()))
        assert float((places.square().sum() - values[:2].sum()).abs()) < 1e-9
        with pytest.raises(ValueError, match="no distance"):
            scaled(torch.full((2, 2), float("nan")))


class TestChanges:
    def test_signs_of_adapters_are_refused(self):
        with pytest.raises(MergeError, match="as BASE.ADAPTER"):
            signs([DATA/"spam", DATA/"movie"], DATA/"emoji")

    def test_signs_count_what_both_changed(self):
        base = {"a": torch.zeros(8)}
        a, b = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), torch.tensor([1.0, 1, 1, -1, 1, 1, 0, 0])
        none = torch.zeros(8)
        found = signs([{"a": a}, {"a": b}, {"a": none}], base)
        assert found[0][1] == 0.75 and found[0][0] == 1.0 and found[0][2] is None

    def test_subspaces_of_an_adapter_and_of_its_product_are_one(self):
        every = [DATA/n for n in tasks()][:2]
        rows = subspaces(every, k=4)
        assert len(rows) == 12 and all(r["left"][0][0] == pytest.approx(1) for r in rows)
        assert all(0 <= r["right"][0][1] <= 1 for r in rows)

    def test_spectra_of_products_and_of_pairs(self):
        three = models(3)
        base = {n: torch.zeros_like(x) for n, x in three[0].items()}
        found = spectra(three, "w", base)
        want = torch.linalg.svdvals(sum(m["w"] for m in three).double()/3)
        np.testing.assert_allclose(found["mean"], want, rtol=1e-6)
        with pytest.raises(ValueError, match="there are w"):
            spectra(three, "v", base)


class TestPictures:
    def test_axes_in_axes_out(self):
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, 2)[1]
        assert plot_map(distances(models()), axes[0]) is axes[0]
        base = {n: torch.zeros_like(x) for n, x in models()[0].items()}
        ax = plot_spectra(spectra(models(), "w", base), 4, axes[1])
        assert ax is axes[1] and "Cut to rank 4" in ax.get_title()

"""What comparing two experts of a mixture costs, exactly and by sketches, by their width.

    python bench/pairing.py

Experts are random: h hidden units of n = 6/7·h numbers, as Mixtral's 14336 of 12288. The second is
a stranger, or kin: the first in another order with 0.3 of its size in noise. Reported are the
seconds of processor that one pair takes on one core, of inner products and of the assignment apart,
those of sketches, and the distance by sketches as a share of the exact one. Writes
bench/results/pairing.csv and pairing.json."""

import argparse
import time

import torch
from adapters import about, write_rows

from frechet_merge.geometries.permutation import assigned
from frechet_merge.merging.fewer import of_sketches


def exactly(a, b):
    "Squared distance, and the seconds of inner products and of the assignment."
    since = time.process_time()
    alike = (a @ b.mT).double()
    multiplied = time.process_time() - since
    near = b[assigned(alike)]
    rest = time.process_time() - since - multiplied
    return float((a - near).square().sum(dtype=torch.float64)), multiplied, rest


def rows(widths):
    # what is imported or started at the first call is not of a pair
    of_sketches(torch.randn(2, 64, 64))
    assigned(torch.eye(2))
    for h in widths:
        n, gen = 6*h//7, torch.Generator().manual_seed(h)
        a = torch.randn(h, n, generator=gen)
        kin = a[torch.randperm(h, generator=gen)]
        kin.add_(torch.randn(h, n, generator=gen), alpha=0.3)
        for name in ("kin", "stranger"):
            b = kin if name == "kin" else torch.randn(h, n, generator=gen)
            since = time.process_time()
            sketched = float(of_sketches([a, b])[0, 1])
            row = {"units": h, "second": name, "sketched": time.process_time() - since}
            exact, row["products"], row["assignment"] = exactly(a, b)
            row["share"] = sketched/exact
            yield {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[896, 1792, 3584, 7168, 14336])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows(arguments.widths):
        print(row, flush=True)
        found.append(row)
    write_rows("pairing", found, about("python bench/pairing.py"))


if __name__ == "__main__":
    main()

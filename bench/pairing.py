"""What comparing two experts of a mixture costs, exactly and by sketches, by their width.

    python bench/pairing.py

Experts are random: h hidden units of n = 6/7·h numbers, as Mixtral's 14336 of 12288. The second is
a stranger, or kin: the first in another order with 0.3 of its size in noise. Reported are the
seconds of one pair on one core, without and with the assignment, and the distance by sketches as a
share of the exact one. Writes bench/results/pairing.csv and pairing.json."""

import argparse
import time

import torch
from adapters import about, write_rows

from frechet_merge.geometries.permutation import assigned
from frechet_merge.merging.fewer import of_sketches

# beyond this width exact distances are not computed
EXACT = 7168


def exactly(a, b):
    "Squared distance, and the seconds of inner products and of the assignment."
    since = time.time()
    alike = (a @ b.mT).double()
    multiplied = time.time() - since
    near = b[assigned(alike)]
    return float((a - near).square().sum()), multiplied, time.time() - since - multiplied


def rows(widths):
    for h in widths:
        n, gen = 6*h//7, torch.Generator().manual_seed(h)
        a = torch.randn(h, n, generator=gen)
        kin = a[torch.randperm(h, generator=gen)]
        kin.add_(torch.randn(h, n, generator=gen), alpha=0.3)
        for name in ("kin", "stranger"):
            b = kin if name == "kin" else torch.randn(h, n, generator=gen)
            since = time.time()
            sketched = float(of_sketches([a, b])[0, 1])
            row = {"units": h, "second": name, "sketched": round(time.time() - since, 2)}
            row |= {"products": "", "assignment": "", "share": ""}
            if h <= EXACT:
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

"""How long each notebook runs, and the site builds: one after the other, each in a process of its
own, on all cores of an idle machine.

    python bench/notebooks.py [NOTEBOOK…]

With names, such as nbs/00_tensors.ipynb, only these are run; rows of others that there still are
stay as they are."""

import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adapters import about, write_rows

ROOT = Path(__file__).parents[1]
RUN = (
    "import sys; from pathlib import Path; from nbdev.test import test_nb; "
    "sys.exit(not test_nb(Path(sys.argv[1]), do_print=False, showerr=True)[0])"
)


def timed(*command, cwd):
    "Seconds on the clock and of CPU, its children's too."

    def spent():
        r = resource.getrusage(resource.RUSAGE_CHILDREN)
        return r.ru_utime + r.ru_stime

    start, cpu = time.time(), spent()
    subprocess.run(
        command,
        cwd=cwd,
        check=True,
        capture_output=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MPLBACKEND": "agg",
        },
    )
    return round(time.time() - start, 1), round(spent() - cpu, 1)


if __name__ == "__main__":
    every, only, site = (
        [
            str(p.relative_to(ROOT))
            for p in sorted((ROOT/"nbs").rglob("*.ipynb"))
            if ".ipynb_checkpoints" not in p.parts
        ],
        sys.argv[1:],
        "the site (python tests/docs.py OUT)",
    )
    if unknown := set(only) - set(every):
        raise SystemExit(f"no such notebook: {', '.join(unknown)}")
    rows = (
        [
            r
            for r in csv.DictReader((ROOT/"bench"/"results"/"notebooks.csv").open())
            if r["what"] in {*every, site} - set(only)
        ]
        if only
        else []
    )
    for name in only or every:
        nb = ROOT/name
        rows.append(
            {
                "what": name,
                **dict(
                    zip(
                        ("seconds", "cpu_s"),
                        timed(sys.executable, "-c", RUN, nb.name, cwd=nb.parent),
                    )
                ),
            }
        )
        print(rows[-1], flush=True)
    if not only:
        with tempfile.TemporaryDirectory() as tmp:
            rows.append(
                {
                    "what": site,
                    **dict(
                        zip(
                            ("seconds", "cpu_s"),
                            timed(sys.executable, ROOT/"tests"/"docs.py", tmp, cwd=ROOT),
                        )
                    ),
                }
            )
    write_rows(
        "notebooks",
        sorted(rows, key=lambda r: -float(r["seconds"])),
        about("python bench/notebooks.py"),
    )

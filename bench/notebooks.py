"""How long each notebook runs, and the site builds: one after the other, each in a process of its
own, on all cores of an idle machine.

    python bench/notebooks.py [NOTEBOOK…]

With names, such as nbs/files/tensors.ipynb, only these are run; rows of others that there still are
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
SITE = "the site (python tests/docs.py OUT)"
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
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
    env = os.environ | quiet
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, env=env)
    return round(time.time() - start, 1), round(spent() - cpu, 1)


def notebooks():
    "All of them, from the root of the repository."
    found = sorted((ROOT/"nbs").rglob("*.ipynb"))
    return [str(p.relative_to(ROOT)) for p in found if ".ipynb_checkpoints" not in p.parts]


def kept(only):
    "Rows of an earlier run: of what still is, and is not run now."
    if not only:
        return []
    there = {*notebooks(), SITE} - set(only)
    with (ROOT/"bench"/"results"/"notebooks.csv").open() as f:
        return [r for r in csv.DictReader(f) if r["what"] in there]


def row(what, *command, cwd):
    "What takes how long, and is printed at once."
    seconds, cpu = timed(*command, cwd=cwd)
    found = {"what": what, "seconds": seconds, "cpu_s": cpu}
    print(found, flush=True)
    return found


def main(only):
    unknown = set(only) - set(notebooks())
    if unknown:
        raise SystemExit(f"no such notebook: {', '.join(sorted(unknown))}")
    rows = kept(only)
    for name in only or notebooks():
        path = ROOT/name
        rows.append(row(name, sys.executable, "-c", RUN, path.name, cwd=path.parent))
    if not only:
        with tempfile.TemporaryDirectory() as tmp:
            rows.append(row(SITE, sys.executable, ROOT/"tests"/"docs.py", tmp, cwd=ROOT))
    rows.sort(key=lambda r: -float(r["seconds"]))
    write_rows("notebooks", rows, about("python bench/notebooks.py"))


if __name__ == "__main__":
    main(sys.argv[1:])

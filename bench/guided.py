"""Changes to files that are guided by what code they reach (atheris), for as long as is asked.

    pip install atheris
    python bench/guided.py [--seconds 60] [TARGET …]     writes bench/results/guided.csv

`bench/fuzz.py` changes files at random, and runs whole commands. Here one reader runs again and
again in one process, and a change that reaches new code is kept and changed further. Each target is
a file of a small model, and what reads it. Whatever it raises but a `MergeError` ends the target
and is counted as wrong, as is a run of 20 seconds and a process of 4 GB; the file that did it is
kept in `guided-TARGET` where the script was started."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))

# what it reads, and how: target → what makes a folder, the file in it, and a reader of both
TARGETS = {}


def reads(name, make, file):
    "Enter a function of a folder as a target."

    def entered(read):
        TARGETS[name] = make, file, read
        return read

    return entered


def of(name, seed=0):
    "What makes a folder as `tests/mutated.py` does."

    def make(folder):
        # what it imports of this library has to be followed first
        import mutated

        getattr(mutated, name)(folder, seed)

    return make


def pickle(folder):
    import mutated
    import torch

    mutated.full(folder, 0)
    (folder/"model.safetensors").unlink()
    torch.save(mutated.weights(0), folder/"pytorch_model.bin")


@reads("header", of("full"), "model.safetensors")
def header(folder):
    from frechet_merge.files.shards import read_header

    read_header(folder/"model.safetensors")


@reads("index", of("full", 1), "model.safetensors.index.json")
def index(folder):
    from frechet_merge import load

    load(folder)


@reads("config", of("full"), "config.json")
def config(folder):
    from frechet_merge import merge

    merge([folder, folder], executor="serial")


@reads("tokenizer", of("full"), "tokenizer.json")
def tokenizer(folder):
    from frechet_merge import load
    from frechet_merge.vocabularies.vocabulary import vocabulary

    vocabulary(load(folder))


@reads("adapter", of("adapter"), "adapter_config.json")
def adapter_config(folder):
    from frechet_merge import load
    from frechet_merge.adapters.dialects import layers

    layers(load(folder))


@reads("pickle", pickle, "pytorch_model.bin")
def weights_in_a_pickle(folder):
    from frechet_merge import load

    load(folder, allow_pickle=True)


@reads("recipe", of("recipe"), "recipe.yaml")
@reads("recipe of mergekit", of("recipe", 1), "recipe.yaml")
def written(folder):
    from frechet_merge.recipes.written import read_recipe

    read_recipe(folder/"recipe.yaml", is_placed=True)


def follow(name, seconds):
    "Change the file of one target, in this process, until time is up or something is wrong."
    import atheris

    make, file, read = TARGETS[name]
    with atheris.instrument_imports(include=["frechet_merge"]):
        import frechet_merge.adapters.dialects
        import frechet_merge.merging.merge
        import frechet_merge.recipes.several
        import frechet_merge.recipes.mergekit  # noqa: F401

        from frechet_merge import MergeError
    warnings.simplefilter("ignore")
    home = Path(tempfile.mkdtemp())
    folder, corpus = home/"model", home/"corpus"
    make(folder)
    # once before, so that what is imported then counts as nothing new
    read(folder)
    corpus.mkdir()
    (corpus/"whole").write_bytes((folder/file).read_bytes())

    def once(data):
        (folder/file).write_bytes(data)
        try:
            read(folder)
        except MergeError:
            pass

    kept = Path.cwd()/f"guided-{name.replace(' ', '-')}"
    limits = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=4096"]
    said = ["-print_final_stats=1", f"-artifact_prefix={kept}-", "-max_len=65536"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, *said], once)
    atheris.Fuzz()


def followed(name, seconds):
    "The row of one target, which runs in a process of its own."
    words = [sys.executable, __file__, "--follow", name, "--seconds", str(seconds)]
    ended = subprocess.run(words, capture_output=True, text=True, errors="replace")
    said = ended.stdout + ended.stderr
    reached = re.findall(r"cov: (\d+)", said)
    ran = re.findall(r"number_of_executed_units: *(\d+)", said) or re.findall(r"#(\d+)", said)
    wrong = re.findall(r"^ === Uncaught Python exception: ===\n(.*)$", said, re.M)
    wrong += re.findall(r"libFuzzer: (timeout|out-of-memory)", said)
    if ended.returncode:
        wrong.append(f"ended with {ended.returncode}")
    return {
        "target": name,
        "seconds": seconds,
        "runs": int(ran[-1]) if ran else 0,
        "branches at first": int(reached[0]) if reached else 0,
        "branches reached": int(reached[-1]) if reached else 0,
        "wrong": wrong[0][:200] if wrong else "",
    }


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("targets", nargs="*", default=list(TARGETS))
    p.add_argument("--seconds", type=int, default=60, help="of each target")
    p.add_argument("--follow", help=argparse.SUPPRESS)
    asked = p.parse_args()
    if asked.follow:
        return follow(asked.follow, asked.seconds)
    from adapters import about, write_rows

    rows = []
    for name in asked.targets:
        rows.append(followed(name, asked.seconds))
        print(*rows[-1].values(), flush=True)
    command = " ".join(["python bench/guided.py", *sys.argv[1:]])
    write_rows("guided", rows, about(command, load=round(os.getloadavg()[0], 1)))


if __name__ == "__main__":
    main()

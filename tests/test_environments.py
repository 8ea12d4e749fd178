"""What README and tutorials show runs in the environment that they name, and a newcomer's first
mistake is answered in a few lines. (The tutorials themselves run in test_notebooks.py.)"""

import ast
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, cli, save, tensors
from environment import PROJECT, closure, environment, variables
from safetensors.torch import save_file
from test_examples import WORDS, make, write
from test_tune import moved

from frechet_merge import Mean, merge

pytestmark = pytest.mark.xdist_group("environments")
README = (ROOT/"README.md").read_text()
PAGES = [ROOT/"README.md", *sorted((ROOT/"nbs").rglob("*.ipynb"))]


def fenced(language):
    "The blocks of the README in a language."
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands(block):
    "The commands of a block, without comments, each on one line."
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(x.split()) for x in lines if x.strip() and not x.startswith("#")]


INSTALLS = [c for block in fenced("sh") for c in commands(block) if "pip install" in c]
SHOWN = [c for block in fenced("sh") for c in commands(block) if "pip install" not in c]


def run(command, extra, cwd):
    "A command in the environment of an extra, as bash runs it."
    r = subprocess.run(
        ["bash", "-ec", command],
        cwd=cwd,
        env=variables(environment(extra)),
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, f"{command}\n{r.stdout[-2000:]}{r.stderr[-3000:]}"
    return r.stdout


@pytest.mark.parametrize("extra", ["demo", "notebooks"])
def test_an_environment_holds_what_its_extra_brings_and_nothing_else(extra, tmp_path):
    code = "import importlib.metadata as m; print(*[d.metadata['Name'] for d in m.distributions()])"
    found = run(f'python -c "{code}"', extra, tmp_path).split()
    assert len(found) == len(closure(extra)) + 1
    assert run("python -m pip check", extra, tmp_path) == "No broken requirements found.\n"
    # what the tests themselves run with
    for library in ("datasets", "nbdev", "pytest"):
        with pytest.raises(AssertionError, match=f"No module named '{library}'"):
            run(f"python -c 'import {library}'", extra, tmp_path)


def test_the_readme_installs_three_things():
    assert [re.findall(r"'\.\[(\w+)\]'", c) for c in INSTALLS] == [["demo"], ["notebooks"], ["dev"]]
    assert all("-c constraints.txt" in c for c in INSTALLS)


def test_the_first_command(tmp_path):
    command = re.search(r"\.venv/bin/(frechet-merge .*)$", INSTALLS[0])[1]
    assert command == "frechet-merge demo"
    # test_notebooks.py runs it on all texts
    out = run(f"{command} --texts 2", "demo", tmp_path)
    assert "The best merge" in out and (tmp_path/"frechet_merge_demo.png").exists()


def test_the_command_that_opens_the_notebooks():
    command, page = re.search(r"\.venv/bin/(jupyter lab) (\S+)$", INSTALLS[1]).groups()
    assert (ROOT/page).exists()
    assert re.match(r"\d+\.", run(f"{command} --version", "notebooks", ROOT))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "What the README calls A, B, C, their base X, two adapters, and two for an image model."
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    at = tmp_path_factory.mktemp("readme")
    make("bert", at/"X")
    for seed, name in enumerate("ABC"):
        moved(at/"X", at/name, seed)
        texts = [f"{a} {b} {c}" for a in WORDS[seed:] for b in WORDS[:6] for c in WORDS[:4]]
        write(at/f"{name}.jsonl", [{"text": text} for text in texts])
    for i in (1, 2):
        torch.manual_seed(i)
        config = LoraConfig(r=2*i, target_modules=["query"], init_lora_weights=False)
        model = AutoModelForSequenceClassification.from_pretrained(at/"X")
        get_peft_model(model, config).save_pretrained(at/f"ADAPTER{i}")
    for i, name in enumerate(("STYLE", "SUBJECT")):
        stem = "lora_unet_mid_block_attentions_0_proj_in"
        factors = {"lora_down": torch.randn(4 + i, 8), "lora_up": torch.randn(8, 4 + i)}
        state = {f"{stem}.{end}.weight": x for end, x in factors.items()}
        save_file({**state, f"{stem}.alpha": torch.tensor(2.0)}, at/f"{name}.safetensors")
    return at


def test_the_commands_of_the_readme(work):
    assert len(SHOWN) > 9 and all(c.startswith("frechet-merge ") for c in SHOWN)
    for command in SHOWN:
        run(command, "demo", work)
        if command.startswith("frechet-merge curvature A "):
            # "the same for B and C"
            for name in "BC":
                run(re.sub(r"\bA\b", name, command), "demo", work)
        for out in re.findall(r" -o (\S+)", command):
            assert (work/out).exists(), command


def test_the_python_of_the_readme(tmp_path):
    (code,) = fenced("python")
    shown = re.search(r"```\n\((Mean.*?)\)\n```", README, re.S)[1]
    *_, last = code.strip().splitlines()
    (tmp_path/"shown.py").write_text(code.replace(last, f"print({last})"))
    found = run("python shown.py", "demo", tmp_path)

    def variances(text):
        return [float(x) for x in re.findall(r"variance=([\d.e+-]+)\)", text)]

    assert len(variances(found)) == 2
    assert variances(found) == pytest.approx(variances(shown), rel=0.01)


def imported(notebook):
    "Modules that the cells of a notebook import, those in functions too."
    cells = json.loads(notebook.read_text())["cells"]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("%%"):
            continue
        code = "\n".join(x for x in source.splitlines() if not x.startswith(("%", "!")))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                yield from (name.name for name in node.names)
            if isinstance(node, ast.ImportFrom):
                yield node.module


def test_all_that_notebooks_import_is_there():
    modules = {m for page in PAGES[1:] for m in imported(page)}
    # what the page itself makes, Flower, which has an environment of its own, and Ray, which is
    # an extra of its own; `datasets` is asked for by name
    own = ("ratios", "flwr", "ray")
    modules = sorted(m for m in modules if m.partition(".")[0] not in own)
    assert "fastcore.test" in modules and "sklearn.datasets" in modules
    code = "; ".join(f"import {m}" for m in modules)
    run(f'python -c "{code}"', "notebooks", ROOT)


def test_every_extra_that_is_named_is_there():
    named = set()
    for path in [*PAGES, *(ROOT/"frechet_merge").rglob("*.py")]:
        named |= set(re.findall(r"(?:'\.|frechet_merge)\[(\w+)\]", path.read_text()))
    assert {"demo", "notebooks", "hf"} <= named <= set(PROJECT["optional-dependencies"])


TYPO = "from frechet_merge import merge; merge(['typo', 'b'])"


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_mistyped_path_is_three_lines_and_no_pages_of_the_hub(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    # nobody answers there
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, out, err = cli("merge", "typo", "b", "-o", "o", cwd=tmp_path)
    assert code == 1 and not out and len(err.splitlines()) <= 3
    assert err.startswith("error: typo: not a folder here") and "Check the path" in err
    r = subprocess.run(
        [sys.executable, "-c", TYPO], cwd=tmp_path, capture_output=True, text=True
    )
    assert r.stderr.count("Traceback") == 1 and "huggingface_hub" not in r.stderr
    assert len(r.stderr.splitlines()) < 20


def test_a_mean_prints_three_digits_and_what_is_unusual():
    mean = Mean(None, 5.347231698527459e-17, 0, True, 9.334448648365665)
    assert repr(mean) == "Mean(residual=5.35e-17, iterations=0, variance=9.33)"
    lost = Mean(None, float("nan"), 3, False, float("nan"), None, 2)
    assert repr(lost) == (
        "Mean(residual=nan, iterations=3, variance=nan, converged=False, unique=None, lost=2)"
    )


def test_a_merge_prints_what_it_holds(tmp_path):
    models = [save(tmp_path/name, tensors(seed)) for seed, name in enumerate("ab")]
    assert repr(merge(models)) == "Merged(6 tensors, 4 means, in memory)"
    out = tmp_path/"o"
    assert repr(merge(models, out=out)) == f"Merged(6 tensors, 4 means, out='{out}')"

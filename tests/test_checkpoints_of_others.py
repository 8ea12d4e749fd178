"""Checkpoints of full models as other libraries write them: what is written is the mean of what
they mean, by the library itself or by torch; what has no mean is refused with a remedy that is
done here."""

import json

import pytest
import torch
from conftest import save
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from frechet_merge import MergeError, load, merge
from frechet_merge.files.folders import library_of


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def are_mean(found, a, b):
    assert found.keys() == a.keys()
    for name, x in a.items():
        want = (x.double() + b[name].double())/2
        torch.testing.assert_close(found[name].double(), want, atol=1e-6, rtol=1e-5)


class TestWhatAWeightIsMadeOf:
    "A weight that torch computes from masks or vectors has a mean only when it is computed."

    MADE = {
        "pruned": (
            lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
            lambda layer: prune.remove(layer, "weight"),
            "prune.remove(MODULE, 'weight')",
        ),
        "spectral": (
            nn.utils.spectral_norm,
            nn.utils.remove_spectral_norm,
            "remove_spectral_norm(MODULE, 'weight')",
        ),
        "spectral, as a parametrisation": (
            parametrizations.spectral_norm,
            lambda layer: parametrize.remove_parametrizations(layer, "weight"),
            "remove_parametrizations(MODULE, 'weight')",
        ),
        "orthogonal": (
            parametrizations.orthogonal,
            lambda layer: parametrize.remove_parametrizations(layer, "weight"),
            "remove_parametrizations(MODULE, 'weight')",
        ),
    }

    def two(self, make):
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(nn.Sequential(nn.Linear(5, 4), make(nn.Linear(4, 4))).eval())
        return found

    @pytest.mark.parametrize("how", MADE)
    def test_is_refused_and_the_remedy_works(self, how):
        make, end, says = self.MADE[how]
        models = self.two(make)
        outputs = [m[1](torch.eye(4)).detach() for m in models]
        with pytest.raises(MergeError, match="1[.].*A weight is computed from it") as said:
            merge([m.state_dict() for m in models])
        assert says in str(said.value)
        for m in models:
            end(m[1])
        found = merge([m.state_dict() for m in models]).tensors
        layer = nn.functional.linear(torch.eye(4), found["1.weight"], found["1.bias"])
        torch.testing.assert_close(layer, sum(outputs)/2)

    @pytest.mark.parametrize("how", MADE)
    def test_what_is_the_same_in_all_is_kept(self, how):
        make, _, _ = self.MADE[how]
        state = self.two(make)[0].state_dict()
        found = merge([state, {**state, "0.bias": state["0.bias"] + 2}]).tensors
        are_mean({**found, "0.bias": found["0.bias"] - 1}, state, state)

    def test_a_mask_of_no_pruning_is_a_tensor(self):
        states = [{"w_mask": randn(3, seed=i), "u": randn(3, seed=i)} for i in (1, 2)]
        are_mean(dict(merge(states).tensors), *states)


class TestComputed:
    "What a library computes is the first model's where it differs by more than rounding."

    NAME = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def states(self, *frequencies):
        return [{self.NAME: x, "w": randn(4, seed=i)} for i, x in enumerate(frequencies)]

    def test_frequencies_of_other_bases_are_not_averaged(self):
        two = [base**-(torch.arange(0, 8, 2)/8) for base in (1e4, 1e6)]
        with pytest.warns(UserWarning, match="inv_freq: is computed and not trained"):
            found = merge(self.states(*two)).tensors
        assert torch.equal(found[self.NAME], two[0])

    def test_rounding_is_no_difference(self, recwarn):
        exact = 1e4 ** -(torch.arange(0, 8, 2)/8)
        found = merge(self.states(exact, exact.bfloat16())).tensors
        torch.testing.assert_close(found[self.NAME], exact, rtol=0.01, atol=0)
        assert not [w for w in recwarn if "inv_freq" in str(w.message)]

    def test_noise_of_a_diffusion_model(self):
        "Single files may keep it; those with another schedule are not averaged with it."
        noise = torch.linspace(0.1, 0.9, 5)
        first, other = ({"w": randn(3, seed=i)} for i in (1, 2))
        found = merge([{**first, "betas": noise, "alphas_cumprod": 1 - noise}, other]).tensors
        assert torch.equal(found["betas"], noise)
        models = [{**first, "betas": noise}, {**other, "betas": noise**2}]
        with pytest.warns(UserWarning, match="betas: is computed and not trained"):
            assert torch.equal(merge(models).tensors["betas"], noise)

    def test_steps_of_an_average_over_training(self):
        states = [
            {"w": randn(3, seed=i), "model_ema.w": randn(3, seed=i + 9)}
            | {"model_ema.num_updates": torch.tensor(i), "model_ema.decay": torch.tensor(0.99)}
            for i in (1, 2)
        ]
        found = merge(states).tensors
        assert int(found["model_ema.num_updates"]) == 1
        torch.testing.assert_close(found["model_ema.w"], (randn(3, seed=10) + randn(3, seed=11))/2)


class TestTextEncoders:
    "One text encoder under the names of older and newer single files."

    LEADS = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")

    def state(self, lead, seed):
        names = ("embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
        names = (*names, "final_layer_norm.weight")
        state = {lead + n: randn(4, 3, seed=seed + i) for i, n in enumerate(names)}
        return {"model.diffusion_model.out.2.weight": randn(4, 4, seed=seed + 7), **state}

    @pytest.mark.parametrize("is_older_first", [True, False])
    @pytest.mark.parametrize("lead", LEADS)
    def test_are_merged_under_the_first_names(self, lead, is_older_first):
        leads = (lead, f"{lead}text_model.")
        first, second = leads if is_older_first else leads[::-1]
        models = [self.state(first, 1), self.state(second, 50)]
        found = merge(models).tensors
        renamed = self.state(first, 50)
        are_mean(dict(found), models[0], renamed)


class TestSlices:
    "What each machine saved of a model that was divided over several."

    def test_weights_without_a_number(self, tmp_path):
        for n in "ab":
            save(tmp_path/n, {"norm.weight": randn(3), "emb.weight": torch.zeros(0)})
        with pytest.raises(MergeError, match="(?s)'emb.weight' without a number.*zero_to_fp32"):
            merge([tmp_path/"a", tmp_path/"b"])

    def test_an_empty_tensor_that_is_no_weight(self):
        states = [{"w": randn(3, seed=i), "v_pred": torch.zeros(0)} for i in (1, 2)]
        assert merge(states).tensors["v_pred"].numel() == 0

    def test_the_folder_of_the_slices(self, tmp_path):
        folder = tmp_path/"run"/"global_step9"
        folder.mkdir(parents=True)
        for name in ("mp_rank_00_model_states", "bf16_zero_pp_rank_0_mp_rank_00_optim_states"):
            torch.save({"module": {}}, folder/f"{name}.pt")
        for named in (folder, folder.parent):
            with pytest.raises(MergeError, match="run: holds the slices of DeepSpeed") as said:
                load(named, allow_pickle=True)
            run = folder.parent
            assert f"python {run/'zero_to_fp32.py'} {run} OTHER" in str(said.value)

    def test_an_application_of_torch(self, tmp_path):
        state = {"w": randn(3)}
        torch.save({"app": {"model": state, "optim": {"lr": 1}}}, tmp_path/"x.pt")
        assert torch.equal(load(tmp_path/"x.pt", allow_pickle=True)["w"], state["w"])


class TestPositions:
    def test_of_texts_are_cut_to_the_shorter(self, tmp_path):
        from transformers import BertConfig, BertModel

        sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
        for n, count in (("a", 12), ("b", 20)):
            torch.manual_seed(count)
            config = BertConfig(intermediate_size=8, max_position_embeddings=count, **sizes)
            BertModel(config).save_pretrained(tmp_path/n)
        with pytest.raises(MergeError, match="Its rows are positions.*keep as many rows"):
            merge([tmp_path/"a", tmp_path/"b"])
        state = load_file(tmp_path/"b"/"model.safetensors")
        name = "embeddings.position_embeddings.weight"
        state = {**state, name: state[name][:12].clone()}
        save_file(state, tmp_path/"b"/"model.safetensors", {"format": "pt"})
        file = tmp_path/"b"/"config.json"
        said = {**json.loads(file.read_text()), "max_position_embeddings": 12}
        file.write_text(json.dumps(said))
        merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"out")
        found = BertModel.from_pretrained(tmp_path/"out").state_dict()
        a, b = (BertModel.from_pretrained(tmp_path/n).state_dict() for n in "ab")
        are_mean({n: x for n, x in found.items() if x.is_floating_point()}, *(
            {n: x for n, x in of.items() if x.is_floating_point()} for of in (a, b)
        ))

    def test_of_pictures_are_resized_by_timm(self, tmp_path):
        timm = pytest.importorskip("timm")
        from timm.models._hub import save_for_hf

        sizes = dict(patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
        for seed, (n, size) in enumerate((("a", 32), ("b", 48))):
            torch.manual_seed(seed)
            said = {**sizes, "img_size": size}
            model = timm.create_model("vit_tiny_patch16_224", **said)
            save_for_hf(model, tmp_path/n, {"model_args": said}, safe_serialization=True)
        with pytest.raises(MergeError, match="Its rows are positions.*img_size= of timm"):
            merge([tmp_path/"a", tmp_path/"b"])
        resized = timm.create_model(f"local-dir:{tmp_path/'b'}", pretrained=True, img_size=32)
        said = {"model_args": {**sizes, "img_size": 32}}
        save_for_hf(resized, tmp_path/"c", said, safe_serialization=True)
        merge([tmp_path/"a", tmp_path/"c"], out=tmp_path/"out")
        found, a = (timm.create_model(f"local-dir:{tmp_path/n}", pretrained=True).state_dict()
                    for n in ("out", "a"))
        are_mean(found, a, resized.state_dict())


def test_quantised_layers_of_torch_are_no_tensors(tmp_path):
    state = {"0._packed_params.dtype": torch.qint8, "0.scale": torch.tensor(1.0)}
    torch.save(state, tmp_path/"x.pt")
    with pytest.raises(MergeError, match="quantised.\nName the model of full precision"):
        load(tmp_path/"x.pt", allow_pickle=True)


@pytest.mark.parametrize("inner", [{"architecture": "lora", "r": 8}, {"reduction_factor": 16}])
def test_an_adapter_of_the_library_adapters(tmp_path, inner):
    said = {"config": inner, "model_class": "BertAdapterModel", "name": "x"}
    (tmp_path/"adapter_config.json").write_text(json.dumps(said))
    held = {"bert.x.adapters.a.adapter_down.0.weight": randn(2, 3)}
    save_file(held, tmp_path/"adapter.safetensors")
    with pytest.raises(MergeError, match="library adapters.*\n.*average_adapter"):
        merge([tmp_path, tmp_path])


def test_a_folder_for_two_libraries(tmp_path):
    "The card names the one whose weights are there."
    (tmp_path/"open_clip_config.json").write_text("{}")
    (tmp_path/"config.json").write_text('{"model_type": "clip"}')
    save_file({"w": randn(2)}, tmp_path/"model.safetensors")
    assert library_of(tmp_path) == "transformers"
    save_file({"w": randn(2)}, tmp_path/"open_clip_model.safetensors")
    assert library_of(tmp_path) == "open_clip"


@pytest.mark.parametrize("kind", ["mlx", "peft"])
def test_factors_of_all_experts_in_one_tensor(tmp_path, kind):
    "Neither the config is wrong, nor is an update that leaves the experts out the same one."
    if kind == "mlx":
        stem, ends, file = "model.layers.0.mlp.switch_mlp.up_proj", ("lora_a", "lora_b"), "adapters"
        said = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 4.0}}
    else:
        stem, file = "base_model.model.model.layers.0.mlp.experts.w1", "adapter_model"
        ends = ("lora_A.weight", "lora_B.weight")
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    state = {f"{stem}.{ends[0]}": randn(4, 2, 8), f"{stem}.{ends[1]}": randn(4, 16, 2)}
    save_file(state, tmp_path/f"{file}.safetensors")
    (tmp_path/"adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(MergeError, match="4 experts in one tensor.*\n.*on its base.*--base") as e:
        merge([tmp_path, tmp_path])
    assert "drop" not in str(e.value) and "Mend" not in str(e.value)


class TestPutBack:
    "What a program keeps beside its weights is not written, and can be had again as it is said."

    BESIDE = {
        "weight": {"config": [1025, 32], "sr": "40k", "f0": 1, "version": "v2"},
        "state_dict": {"epoch": 3, "hyper_parameters": {"lr": 0.1}},
        "model_state_dict": {"dims": {"n_mels": 80}},
    }

    @pytest.mark.parametrize("key", BESIDE)
    def test_a_file_of_its_program(self, tmp_path, key):
        states = [{"enc.w": randn(3, 2, seed=i)} for i in (1, 2)]
        files = [tmp_path/"a.pth", tmp_path/"b.pth"]
        for file, state in zip(files, states):
            torch.save({key: state, **self.BESIDE[key]}, file)
        with pytest.warns(UserWarning, match=f"a.pth: what it holds beside '{key}'") as said:
            merge(files, allow_pickle=True, out=tmp_path/"out")
        text = next(str(w.message) for w in said if "what it holds" in str(w.message))
        code = text.partition("if you trust it: ")[2]
        other = tmp_path/"other.pth"
        import safetensors.torch

        exec(code, {"torch": torch, "safetensors": safetensors, "OTHER": other})
        found = torch.load(other, weights_only=True)
        are_mean(found.pop(key), *states)
        assert found == self.BESIDE[key]

    def test_tied_tensors_in_a_file_of_another_name(self, tmp_path):
        states = [{"enc.w": randn(3, 2, seed=i)} for i in (1, 2)]
        for n, state in zip("ab", states):
            held = {"state_dict": {**state, "head.w": state["enc.w"]}, "epoch": 3}
            (tmp_path/n).mkdir()
            torch.save(held, tmp_path/n/"open_clip_pytorch_model.bin")
        folders = [tmp_path/"a", tmp_path/"b"]
        with pytest.warns(UserWarning, match="what it holds beside 'state_dict'") as said:
            merge(folders, allow_pickle=True, out=tmp_path/"out")
        text = next(str(w.message) for w in said if "what it holds" in str(w.message))
        import safetensors.torch

        names = {"torch": torch, "safetensors": safetensors, "OTHER": tmp_path/"other.pth"}
        exec(text.partition("if you trust it: ")[2], names)
        state = torch.load(tmp_path/"other.pth", weights_only=True)["state_dict"]
        assert {*state} == {"enc.w", "head.w"}
        assert torch.equal(state["enc.w"], state["head.w"])

    def test_nothing_is_said_of_weights_alone(self, tmp_path, recwarn):
        for n in "ab":
            torch.save({"w": randn(2)}, tmp_path/f"{n}.pt")
            torch.save({"state_dict": {"w": randn(2)}}, tmp_path/f"{n}.ckpt")
        for end in ("pt", "ckpt"):
            files = [tmp_path/f"{n}.{end}" for n in "ab"]
            merge(files, allow_pickle=True, out=tmp_path/f"out of {end}")
        assert not [w for w in recwarn if "what it holds" in str(w.message)]

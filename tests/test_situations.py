"""Situations that people meet with files of other programs: each is merged right by the library
that reads the file, or refused with a remedy that is tried."""

import json
import warnings

import pytest
import torch
from conftest import LLAMA
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from frechet_merge import MergeError, load, merge

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))/3


@pytest.fixture
def tiny(tmp_path):
    "tiny(name, seed) saves a model of language, and returns its folder."

    def tiny(name, seed=0, kind="llama", **more):
        config = AutoConfig.for_model(kind, **LLAMA, **more)
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path/name)
        return tmp_path/name

    return tiny


@pytest.fixture
def adapter(tmp_path):
    "adapter(name, base, seed) saves an adapter with PEFT, and returns its folder."

    def adapter(name, base, seed, config=None, **more):
        said = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **more}
        config = config or LoraConfig(task_type="CAUSAL_LM", **said)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        gen = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            if p.requires_grad:
                p.data += torch.randn(p.shape, generator=gen)/3
        model.save_pretrained(tmp_path/name)
        return tmp_path/name

    return adapter


def put(base, adapter):
    "What PEFT makes of a model and an adapter."
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().state_dict()


def are_mean(found, *models):
    for name, x in found.items():
        want = sum(m[name].double() for m in models)/len(models)
        torch.testing.assert_close(x.double(), want, atol=1e-6, rtol=1e-5)


def rewritten(file, change):
    save_file({change(n): x for n, x in load_file(file).items()}, file)


class TestAdapters:
    @pytest.mark.parametrize("is_alone", [True, False])
    def test_a_pickle_of_an_adapter_is_no_full_model(self, tiny, adapter, is_alone):
        base = tiny("base")
        a, b = adapter("a", base, 1), adapter("b", base, 2)
        torch.save(load_file(a/"adapter_model.safetensors"), a/"adapter_model.bin")
        if is_alone:
            (a/"adapter_model.safetensors").unlink()
            with pytest.raises(MergeError, match="--allow-pickle"):
                merge([a, b])
        out = merge([a, b], allow_pickle=is_alone, out=a.parent/"out").out
        are_mean(put(base, out), put(base, a), put(base, b))

    def test_peft_twice_around_a_model(self, tiny, adapter):
        base = tiny("base")
        a, b = adapter("a", base, 1), adapter("b", base, 2)
        want = [put(base, x) for x in (a, b)]
        rewritten(a/"adapter_model.safetensors", lambda n: f"base_model.model.{n}")
        for models in ([a, b], [b, a]):
            out = merge(models, out=a.parent/f"out-{models[0].name}").out
            are_mean(put(base, out), *want)

    @pytest.mark.parametrize("lead", ["model.", "policy.", "student.encoder.", "module.model."])
    def test_an_adapted_model_in_a_trainer(self, tiny, adapter, lead):
        base = tiny("base")
        a, b = adapter("a", base, 1), adapter("b", base, 2)
        want = [put(base, x) for x in (a, b)]
        for folder in (a, b):
            rewritten(folder/"adapter_model.safetensors", lambda n: lead + n)
        out = merge([a, b], out=a.parent/"out").out
        are_mean(put(base, out), *want)

    @pytest.mark.parametrize("bare", ["a", "b", "ab"])
    def test_names_without_pefts_part_in_front(self, tiny, adapter, bare):
        "As injected layers are saved: PEFT's own `from_pretrained` then reads none of them."
        base = tiny("base")
        a, b = adapter("a", base, 1), adapter("b", base, 2)
        want = [put(base, x) for x in (a, b)]
        for n in bare:
            file = a.parent/n/"adapter_model.safetensors"
            rewritten(file, lambda n: n.removeprefix("base_model.model."))
        out = merge([a, b], out=a.parent/"out").out
        are_mean(put(base, out), *want)

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_an_initialisation_that_peft_repeats(self, tiny, adapter, init):
        base = tiny("base")
        a, b = adapter("a", base, 1, init_lora_weights=init), adapter("b", base, 2)
        with pytest.raises(MergeError, match="put it on the base with merge_and_unload"):
            merge([a, b])
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), a)
        model.merge_and_unload().save_pretrained(a.parent/"whole")
        found = merge([a.parent/"whole", f"{base}+{b}"], base=base).tensors
        # what was trained, with what its own initialisation took off
        torch.manual_seed(0)
        said = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": init}
        config = LoraConfig(task_type="CAUSAL_LM", **said)
        trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        held = load_file(a/"adapter_model.safetensors")
        named = {n.replace(".weight", ".default.weight"): x for n, x in held.items()}
        assert not trained.load_state_dict(named, strict=False).unexpected_keys
        want = trained.merge_and_unload().state_dict()
        for name, x in put(base, b).items():
            torch.testing.assert_close(found[name], (x + want[name])/2, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
    def test_lycoris_around_any_model(self, tmp_path, algo):
        lycoris = pytest.importorskip("lycoris")
        inputs, outputs = (torch.eye(6), randn(1, 3, 5, 5)), []
        for seed in (1, 2):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Conv2d(3, 4, 3))
            if seed == 1:
                save_file(net.state_dict(), tmp_path/"base.safetensors")
            lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
            how = {"linear_dim": 2, "linear_alpha": 3.0, "conv_dim": 2, "conv_alpha": 3.0}
            wrapped = lycoris.create_lycoris(net, 1.0, algo=algo, **how)
            wrapped.apply_to()
            torch.manual_seed(seed)
            for p in wrapped.parameters():
                torch.nn.init.normal_(p, std=0.3)
            held = {n: x.clone() for n, x in wrapped.state_dict().items()}
            save_file(held, tmp_path/f"{seed}.safetensors")
            # what it computes: what its `merge_to` makes of a LoHa is another
            outputs.append([layer(x).detach() for layer, x in zip(net, inputs)])
        files = [tmp_path/f"{seed}.safetensors" for seed in (1, 2)]
        found = merge(files, bake=tmp_path/"base.safetensors").tensors
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Conv2d(3, 4, 3))
        net.load_state_dict(dict(found))
        for layer, x, *ys in zip(net, inputs, *outputs):
            torch.testing.assert_close(layer(x), sum(ys)/2, atol=1e-5, rtol=1e-4)

    def test_a_folder_of_mlx_on_its_base(self, tiny, tmp_path):
        base, name = tiny("base"), "model.layers.0.self_attn.q_proj"
        (tmp_path/"a").mkdir()
        pair = {f"{name}.lora_a": randn(16, 2, seed=1), f"{name}.lora_b": randn(2, 16, seed=2)}
        save_file(pair, tmp_path/"a"/"adapters.safetensors")
        said = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
        (tmp_path/"a"/"adapter_config.json").write_text(json.dumps(said))
        want = load(base)[f"{name}.weight"] + 20*(pair[f"{name}.lora_a"] @ pair[f"{name}.lora_b"]).T
        baked = merge([tmp_path/"a"], bake=base).tensors
        torch.testing.assert_close(baked[f"{name}.weight"], want)
        torch.testing.assert_close(load(f"{base}+{tmp_path/'a'}")[f"{name}.weight"], want)

    def test_trained_biases_have_no_sum_and_no_scale(self, tiny, adapter):
        base = tiny("base", kind="qwen2")
        a, b = (adapter(n, base, i, bias="lora_only") for i, n in enumerate("ab"))
        with pytest.raises(MergeError, match="base_layer.bias'.* has a mean and no sum"):
            merge([a, b], sum=[0.7, 0.4])
        with pytest.warns(UserWarning, match="base_layer.bias and 1 more.*scale does not reach"):
            merge([a, b], scale=2.0)
        merge([a, b], sum={"*.bias": [0.5, 0.5], "*": [0.7, 0.4]})

    def test_what_changes_the_input_has_no_full_model(self, tiny, adapter):
        base = tiny("base")
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        a = adapter("a", base, 1, config)
        b = adapter("b", base, 1, alora_invocation_tokens=[3])
        for one in (a, b, f"{base}+{a}"):
            with pytest.raises(MergeError, match="full model.*keep it as an adapter") as e:
                merge([one])
            assert "Put it on its base" not in str(e.value)

    def test_an_adapter_of_lycoris_that_is_no_full_model(self, tmp_path):
        stem = "lora_unet_mid_block_attentions_0_proj_in"
        state = {f"{stem}.q_layer.weight": randn(2, 8), f"{stem}.lambda_layer": randn(1, 2)}
        save_file(state, tmp_path/"a.safetensors")
        with pytest.raises(MergeError, match="T-LoRA"):
            merge([tmp_path/"a.safetensors"]*2)

    def test_parameters_that_are_no_texts(self, tiny, adapter):
        a = adapter("a", tiny("base"), 1)
        file = a/"adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_parameters": [3]}))
        with pytest.raises(MergeError, match="target_parameters = .3., which should be"):
            merge([a])


class TestModels:
    @pytest.mark.parametrize("key", ["quantization", "text_config"])
    def test_codes_of_mlx_are_named(self, tiny, key):
        models = [tiny("a", 1), tiny("b", 2)]
        for i, folder in enumerate(models):
            state = load_file(folder/"model.safetensors")
            gen = torch.Generator().manual_seed(i)
            for name in [n for n in state if n.endswith("q_proj.weight")]:
                codes = torch.randint(0, 2**31, (16, 2), generator=gen).to(torch.uint32)
                stem = name.removesuffix("weight")
                state |= {name: codes, f"{stem}scales": randn(16, 1), f"{stem}biases": randn(16, 1)}
            save_file(state, folder/"model.safetensors")
            said = {"quantization": {"group_size": 16, "bits": 4}}
            said = said if key == "quantization" else {key: said}
            config = json.loads((folder/"config.json").read_text()) | said
            (folder/"config.json").write_text(json.dumps(config))
        with pytest.raises(MergeError, match="(?s)is quantised .mlx.*full precision"):
            merge(models)

    def test_layers_for_further_tokens(self, tiny, tmp_path):
        a, b = tiny("a", 1), tiny("b", 2)
        want = [load_file(x/"model.safetensors") for x in (a, b)]
        more = {f"model.layers.2.{n}.weight": randn(16, 16) for n in ("eh_proj", "enorm")}
        save_file(want[0] | more, a/"model.safetensors")
        for models in ([a, b], [b, a]):
            with pytest.raises(MergeError, match="--drop 'model.layers.2.*'"):
                merge(models)
            out = merge(models, drop="model.layers.2.*", out=tmp_path/f"o{models[0].name}").out
            are_mean(load_file(out/"model.safetensors"), *want)

    def test_more_layers_by_the_config_have_no_such_remedy(self, tiny):
        a = tiny("a")
        state = load_file(a/"model.safetensors")
        b = tiny("b")
        config = json.loads((b/"config.json").read_text()) | {"num_hidden_layers": 1}
        (b/"config.json").write_text(json.dumps(config))
        save_file({n: x for n, x in state.items() if ".1." not in n}, b/"model.safetensors")
        with pytest.raises(MergeError, match="other depths have no mean") as e:
            merge([a, b])
        assert "--drop" not in str(e.value)

    def test_a_value_head_in_front_of_a_model(self, tiny, tmp_path):
        a, b = tiny("a", 1), tiny("b", 2)
        want = [load_file(x/"model.safetensors") for x in (a, b)]
        rewritten(a/"model.safetensors", lambda n: f"pretrained_model.{n}")
        state = load_file(a/"model.safetensors") | {"v_head.summary.weight": randn(1, 16)}
        save_file(state, a/"model.safetensors")
        with pytest.raises(MergeError, match="v_head.*--drop"):
            merge([a, b])
        for models in ([a, b], [b, a]):
            out = merge(models, drop="v_head*", out=tmp_path/f"o{models[0].name}").out
            are_mean(load_file(out/"model.safetensors"), *want)


class TestWords:
    @pytest.mark.parametrize("order", [1, -1])
    def test_a_pooling_that_the_first_model_does_not_have(self, tiny, order):
        a, b = tiny("a", 1), tiny("b", 2)
        (b/"1_Pooling").mkdir()
        kind = "sentence_transformers.models"
        parts = [{"path": "", "type": f"{kind}.Transformer"}]
        parts += [{"path": "1_Pooling", "type": f"{kind}.Pooling"}]
        (b/"modules.json").write_text(json.dumps(parts))
        (b/"1_Pooling"/"config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            merge([a, b][::order])
        found = [w for w in said if "Pooling of cls" in str(w.message)]
        assert len(found) == (order == 1)

    def test_adapters_of_models_that_predict_other_things(self, tmp_path):
        stem = "lora_unet_mid_block_attentions_0_proj_in"
        for name, kind in (("a", "v"), ("b", "epsilon"), ("c", "v")):
            state = {f"{stem}.lora_down.weight": randn(2, 8), f"{stem}.lora_up.weight": randn(8, 2)}
            save_file(state, tmp_path/f"{name}.safetensors", {"modelspec.prediction_type": kind})
        a, b, c = (tmp_path/f"{n}.safetensors" for n in "abc")
        with pytest.warns(UserWarning, match="prediction_type = 'v' and 'epsilon'"):
            merge([a, b])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            merge([a, c])
            merge([a, b], any_base=True)
        assert not [w for w in said if "prediction_type" in str(w.message)]

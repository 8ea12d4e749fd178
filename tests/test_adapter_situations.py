"""What people have: adapters of many trainers, with what stands beside and within them.

The oracle is what the library that reads a file makes of it (PEFT's `merge_and_unload`), or the
update computed from the factors in float64; a remedy is carried out.
"""
import json
import warnings

import pytest
import torch
import transformers
from conftest import cli
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_meaning import randn
from test_situations import adapter, are_mean, put, rewritten, tiny  # noqa: F401
from torch import nn

from frechet_merge import MergeError, load, merge
from frechet_merge.adapters.dialects import layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Q = "model.layers.0.self_attn.q_proj"
FILE = "adapter_model.safetensors"


def updates(model):
    "ΔW of each layer, in float64."
    found, _ = layers(load(model))
    return {name: layer.factors().delta() for name, layer in found.items()}


class TestFactorsBesideWeights:
    "Halves of updates in what looks like a full model: their mean is of no update."

    def halves(self, seed, left, right, **more):
        W, up, down = randn(8, 8), randn(8, 2, seed=seed), randn(2, 8, seed=seed + 1)
        return {"q.weight": W, f"q.{left}": up, f"q.{right}": down, "norm.weight": randn(8), **more}

    def both(self, tmp_path, *ends, **more):
        for seed in (1, 2):
            save_file(self.halves(seed, *ends, **more), tmp_path/f"{seed}.safetensors")
        return [tmp_path/f"{seed}.safetensors" for seed in (1, 2)]

    def test_deepspeed_chat(self, tmp_path):
        "Its `fuse_lora` is W + left·right, and then the models are full ones."
        both = self.both(tmp_path, "lora_left_weight", "lora_right_weight")
        with pytest.raises(MergeError, match="DeepSpeed-Chat.*q.lora_left_weight.*\n.*on its base"):
            merge(both, out=tmp_path/"out")
        assert not (tmp_path/"out").exists()
        fused = []
        for file in both:
            state = load_file(file)
            more = state.pop("q.lora_left_weight") @ state.pop("q.lora_right_weight")
            fused.append({**state, "q.weight": state["q.weight"] + more})
        are_mean(merge(fused, base={**fused[0], "q.weight": randn(8, 8)}).tensors, *fused)

    def test_control_lora(self, tmp_path):
        both = self.both(tmp_path, "up", "down", lora_controlnet=torch.zeros(()))
        with pytest.raises(MergeError, match="Control-LoRA.*\n.*no full model.*keep it"):
            merge(both)

    def test_nunchaku(self, tmp_path):
        both = self.both(tmp_path, "lora_up", "lora_down")
        with pytest.raises(MergeError, match="nunchaku.*\nMerge the files that it was converted"):
            merge(both)
        # what was converted
        name, products = "transformer.proj_out", []
        for file in both:
            state = load_file(file)
            up, down = state["q.lora_up"], state["q.lora_down"]
            products.append((up @ down).double())
            save_file({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}, file)
        found = updates(merge(both, out=tmp_path/"out").out)
        torch.testing.assert_close(found[name], sum(products)/2, rtol=1e-5, atol=1e-6)


class TestBeside:
    "Weights that a trainer put beside an adapter, which PEFT does not read."

    @pytest.mark.parametrize("name", ["non_lora_trainables.bin", "value_head.safetensors"])
    @pytest.mark.parametrize("way", ["alone", "bake", "plus"])
    def test_they_are_named(self, tiny, adapter, tmp_path, name, way):  # noqa: F811
        base = tiny("base")
        a, b = adapter("a", base, 1), adapter("b", base, 2)
        held = {"projector.weight": randn(4, 4)}
        save_file(held, b/name) if name.endswith("s") else torch.save(held, b/name)
        # of training, and of no model
        torch.save({"state": 1}, a/"optimizer.pt")
        torch.save({"state": 1}, a/"training_args.bin")
        models = [f"{base}+{x}" for x in (a, b)] if way == "plus" else [a, b]
        with pytest.warns(UserWarning) as said:
            merge(models, bake=base if way == "bake" else None, out=tmp_path/"out")
        named = [str(w.message) for w in said if "left behind" in str(w.message)]
        assert len(named) == 1 and f"{b}: {name} left behind" in named[0]


    def test_embeddings_beside_an_adapter_of_a_pipeline(self, tmp_path):
        "As trainers of both leave them."
        name = "transformer.transformer_blocks.0.attn.to_q"
        for i, folder in enumerate((tmp_path/"a", tmp_path/"b")):
            folder.mkdir()
            pair = {f"{name}.lora_A.weight": randn(2, 8, seed=i)}
            pair[f"{name}.lora_B.weight"] = randn(8, 2, seed=i + 5)
            save_file(pair, folder/"pytorch_lora_weights.safetensors")
        save_file({"clip_l": randn(2, 8)}, tmp_path/"b"/"b_emb.safetensors")
        with pytest.warns(UserWarning, match="b: b_emb.safetensors left behind"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"out")

    def test_earlier_states_of_mlx_are_not(self, tmp_path):
        said = {"lora_parameters": {"rank": 2, "scale": 20.0}}
        for i, folder in enumerate((tmp_path/"a", tmp_path/"b")):
            folder.mkdir()
            pair = {f"{Q}.lora_a": randn(8, 2, seed=i), f"{Q}.lora_b": randn(2, 8, seed=i + 5)}
            for name in ("adapters", "0000100_adapters"):
                save_file(pair, folder/f"{name}.safetensors")
            (folder/"adapter_config.json").write_text(json.dumps(said))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"out")

    def test_logs_of_a_training_are_not_of_the_mean(self, tiny, adapter, tmp_path):  # noqa: F811
        base = tiny("base")
        a, b = (adapter(n, base, i) for i, n in enumerate("ab"))
        for name in ("trainer_log.jsonl", "running_log.txt", "training_loss.png", "logging.jsonl"):
            (a/name).write_text("x")
        (a/"LICENSE").write_text("x")
        merge([a, b], out=tmp_path/"out")
        made = {"README.md", "frechet_merge.json", "adapter_config.json", FILE}
        assert {f.name for f in (tmp_path/"out").iterdir()} == made | {"LICENSE"}


class TestNames:
    def test_an_adapters_name_with_a_hyphen(self, tiny, adapter):  # noqa: F811
        base = tiny("base")
        more = {"target_modules": ["q_proj", "embed_tokens"]}
        a, b = adapter("a", base, 1, **more), adapter("b", base, 2, **more)
        want = [put(base, x) for x in (a, b)]

        def named(key):
            is_whole = key.endswith((".lora_embedding_A", ".lora_embedding_B"))
            return f"{key}.my-style" if is_whole else key.replace(".weight", ".my-style.weight")

        kept = {n: x for n, x in load_file(a/FILE).items() if "lora_" in n}
        save_file({named(n): x for n, x in kept.items()}, a/FILE)
        out = merge([a, b], out=a.parent/"out").out
        are_mean(put(base, out), *want)

    @pytest.mark.parametrize("order", [1, -1])
    def test_what_was_saved_whole_before_a_renaming(
        self, tiny, adapter, tmp_path, order  # noqa: F811
    ):
        base = tiny("base")
        a, b = (adapter(n, base, i, modules_to_save=["lm_head"]) for i, n in enumerate("ab"))
        heads = [load_file(x/FILE)["base_model.model.lm_head.weight"] for x in (a, b)]
        new, old = "model.model.language_model.layers", "model.language_model.model.layers"
        rewritten(a/FILE, lambda n: n.replace("model.model.layers", new))
        rewritten(b/FILE, lambda n: n.replace("model.model.layers", old).replace(
            "model.lm_head", "model.language_model.lm_head"))
        with pytest.warns(UserWarning, match="saved whole"):
            out = merge([a, b][::order], out=tmp_path/"out").tensors
        found = [x for n, x in out.items() if "lm_head" in n]
        assert len(found) == 1
        torch.testing.assert_close(found[0], sum(heads)/2)

    @pytest.mark.parametrize("order", [1, -1])
    def test_what_was_saved_whole_within_another_model(
        self, tiny, adapter, tmp_path, order  # noqa: F811
    ):
        "The head has no part in front of it, the rest has."
        base = tiny("base")
        a, b = (
            adapter(n, base, i, modules_to_save=["norm", "lm_head"]) for i, n in enumerate("ab")
        )
        states = [load_file(x/FILE) for x in (a, b)]
        rewritten(b/FILE, lambda n: n.replace("base_model.model.model.", "base_model.model."))
        with pytest.warns(UserWarning, match="saved whole"):
            out = merge([a, b][::order], out=tmp_path/"out").tensors
        first = [load_file(x/FILE) for x in (a, b)][::order][0]
        assert out.keys() == first.keys()
        for end in ("norm.weight", "lm_head.weight"):
            found = next(x for n, x in out.items() if n.endswith(end))
            want = [next(x for n, x in s.items() if n.endswith(end)) for s in states]
            torch.testing.assert_close(found, sum(want)/2)

    def test_layers_that_no_table_has_under_the_first_ones_names(self, tmp_path):
        "HiDream in the names of kohya's trainer, and in its own with dots."
        flat, dots = (
            "lora_unet_double_stream_blocks_0_block_attn1_to_q",
            "transformer.double_stream_blocks.0.block.attn1.to_q",
        )
        first = {f"{flat}.lora_down.weight": randn(2, 8), f"{flat}.lora_up.weight": randn(8, 2)}
        other = {
            f"{dots}.lora_A.weight": randn(2, 8, seed=1),
            f"{dots}.lora_B.weight": randn(8, 2, seed=2),
        }
        save_file({**first, f"{flat}.alpha": torch.tensor(1.0)}, tmp_path/"a.safetensors")
        save_file(other, tmp_path/"b.safetensors")
        out = merge([tmp_path/"a.safetensors", tmp_path/"b.safetensors"], out=tmp_path/"out").out
        want = sum(x for f in "ab" for x in updates(tmp_path/f"{f}.safetensors").values())/2
        found = updates(out)
        assert [*found] == [flat]
        torch.testing.assert_close(found[flat], want, rtol=1e-5, atol=1e-6)


class TestBiases:
    "PEFT has a bias within a layer that it wraps, and beside one that it does not."

    def two(self, tiny, adapter, bias):  # noqa: F811
        base = tiny("base", kind="qwen2")
        a = adapter("a", base, 1, bias=bias[0], target_modules=["q_proj", "k_proj"])
        return base, a, adapter("b", base, 2, bias=bias[1], target_modules=["v_proj"])

    def test_of_adapters_of_other_layers(self, tiny, adapter, tmp_path):  # noqa: F811
        base, a, b = self.two(tiny, adapter, ("all", "all"))
        out = merge([a, b], out=tmp_path/"out").out
        are_mean(put(base, out), put(base, a), put(base, b))

    @pytest.mark.parametrize("bias", [("all", "none"), ("lora_only", "lora_only")])
    def test_where_some_trained_none(self, tiny, adapter, tmp_path, bias):  # noqa: F811
        base, a, b = self.two(tiny, adapter, bias)
        with pytest.raises(MergeError, match="did not save .*bias.*\n.*absent='renormalise'"):
            merge([a, b])
        # both remedies: without biases, and with those that there are
        merged = {
            "left": merge([a, b], drop=["*.bias"], out=tmp_path/"left").out,
            "kept": merge([a, b], absent="renormalise", out=tmp_path/"kept").out,
        }
        plain, one, other = tiny("base", kind="qwen2"), put(base, a), put(base, b)
        plain = load(plain)
        for way, out in merged.items():
            found = put(base, out)
            for name in (n for n in one if n.endswith(".bias")):
                there = [x[name] for x in (one, other) if not torch.equal(x[name], plain[name])]
                want = plain[name] if way == "left" or not there else sum(there)/len(there)
                torch.testing.assert_close(found[name], want, msg=f"{way}: {name}")

    def test_of_a_layer_whose_update_is_left_out(self, tiny, adapter, tmp_path):  # noqa: F811
        base, a, b = self.two(tiny, adapter, ("all", "all"))
        out = merge([a, b], drop=["*q_proj.lora_*"], out=tmp_path/"out").out
        found, one, other = (put(base, x) for x in (out, a, b))
        name = f"{Q}.bias"
        torch.testing.assert_close(found[name], (one[name] + other[name])/2)


class TestScales:
    @pytest.mark.parametrize("older", [True, False])
    def test_of_mlx_that_two_versions_read_in_two_ways(self, tmp_path, older):
        "Older ones multiply by scale·alpha/rank, newer ones by scale."
        down, up = randn(8, 2), randn(2, 8, seed=1)
        save_file({f"{Q}.lora_a": down, f"{Q}.lora_b": up}, tmp_path/"adapters.safetensors")
        said = {"rank": 2, "alpha": 16.0, "scale": 10.0, "dropout": 0.0}
        config = tmp_path/"adapter_config.json"
        config.write_text(json.dumps({"lora_parameters": said}))
        with pytest.raises(MergeError, match="alpha = 16.0.*\n.*write scale = 80, too"):
            merge([tmp_path, tmp_path])
        del said["alpha"]
        said["scale"] = 80.0 if older else 10.0
        config.write_text(json.dumps({"lora_parameters": said}))
        want = said["scale"]*(down.double() @ up.double()).mT
        torch.testing.assert_close(updates(tmp_path)[Q], want)

    @pytest.mark.parametrize("end", ["m", "magnitude", "lora_b.scale_weight"])
    def test_without_which_an_update_is_another(self, tmp_path, end):
        "Lengths of DoRAs of MLX and torchtune, and a scale of eight bits: not to be left out."
        state = {f"{Q}.lora_a": randn(8, 2), f"{Q}.lora_b": randn(2, 8), f"{Q}.{end}": randn(8)}
        save_file(state, tmp_path/"adapters.safetensors")
        said = {"lora_parameters": {"rank": 2, "scale": 10.0}}
        (tmp_path/"adapter_config.json").write_text(json.dumps(said))
        with pytest.raises(MergeError, match="is another.*\nPut it on its base") as e:
            merge([tmp_path, tmp_path])
        assert "drop" not in str(e.value)


class Attending(nn.Module):
    "torch's own attention, of which PEFT wraps the output within it."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0])


class TestAttentionOfTorch:
    def adapt(self, folder, seed, **more):
        said = {"r": 2, "lora_alpha": 6, "target_modules": ["attn", "head"], **more}
        model = get_peft_model(Attending(), LoraConfig(**said))
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.data = randn(*p.shape, seed=seed + i)
        model.save_pretrained(folder)
        return folder

    def put(self, folder):
        return PeftModel.from_pretrained(Attending(), folder).merge_and_unload().state_dict()

    def test_of_any_ranks(self, tmp_path):
        a = self.adapt(tmp_path/"a", 1, rank_pattern={"attn": 3}, alpha_pattern={"attn": 5})
        b = self.adapt(tmp_path/"b", 20)
        out = merge([a, b], out=tmp_path/"out").out
        are_mean(self.put(out), self.put(a), self.put(b))

    def test_on_its_base_the_remedy_is_peft(self, tmp_path):
        a, b = (self.adapt(tmp_path/n, i) for i, n in enumerate("ab"))
        (tmp_path/"base").mkdir()
        save_file(Attending().state_dict(), tmp_path/"base"/"model.safetensors")
        with pytest.raises(MergeError, match="torch's attention.*\n.*PEFT's merge_and_unload"):
            merge([f"{tmp_path/'base'}+{a}"])
        full = []
        for folder in (a, b):
            (tmp_path/f"{folder.name}-full").mkdir()
            full.append(tmp_path/f"{folder.name}-full")
            save_file(self.put(folder), full[-1]/"model.safetensors")
        found = merge(full, base=tmp_path/"base").tensors
        are_mean({n: found[n] for n in found}, self.put(a), self.put(b))


class TestStoredTheOtherWay:
    "GPT-2 stores its weights as (inputs, outputs), and PEFT has one word for all layers."

    @pytest.mark.parametrize("targets", [["query", "q_proj", "c_proj"], "all-linear"], ids=str)
    def test_beside_an_encoder_that_does_not(self, tmp_path, targets):
        inside = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        encoder = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            image_size=8, patch_size=4, **inside,
        )
        decoder = transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=48, n_positions=32,
            add_cross_attention=True, is_decoder=True,
        )
        kind = transformers.VisionEncoderDecoderModel
        both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs
        torch.manual_seed(0)
        kind(both(encoder, decoder)).save_pretrained(tmp_path/"base")
        said = LoraConfig(r=2, lora_alpha=6, target_modules=targets)
        model = get_peft_model(kind.from_pretrained(tmp_path/"base"), said)
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.data = randn(*p.shape, seed=i)
        model.save_pretrained(tmp_path/"a")
        assert json.loads((tmp_path/"a"/"adapter_config.json").read_text())["fan_in_fan_out"]
        merge([f"{tmp_path/'base'}+{tmp_path/'a'}"], out=tmp_path/"out")
        found = kind.from_pretrained(tmp_path/"out").state_dict()
        are_mean(found, model.merge_and_unload().state_dict())


class TestConfigs:
    @pytest.mark.parametrize("said", [{"target_modules": ["q_proj"]}, {"layers_to_transform": [0]}])
    def test_that_name_less_than_the_file_has(
        self, tiny, adapter, tmp_path, said  # noqa: F811
    ):
        "PEFT passes over what its config does not name."
        base = tiny("base")
        more = {"target_modules": ["q_proj", "v_proj"]}
        a, b = (adapter(n, base, i, **more) for i, n in enumerate("ab"))
        whole = put(base, a)
        config = a/"adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **said}))
        gone = Q.replace("q_proj", "v_proj") if "target_modules" in said else Q.replace("0", "1")
        name = f"{gone}.weight"
        plain = load(base)
        torch.testing.assert_close(put(base, a)[name], plain[name])
        with pytest.warns(UserWarning, match="updates of 2 modules that its adapter_config.json"):
            out = merge([a, b], out=tmp_path/"out").out
        are_mean(put(base, out), whole, put(base, b))


class TestWords:
    @pytest.mark.parametrize("command", ["convert a", "merge a b", "merge a"])
    def test_a_dialect_that_there_is_not(self, tiny, adapter, tmp_path, command):  # noqa: F811
        base = tiny("base")
        for i, name in enumerate("ab"):
            adapter(name, base, i)
        code, _, said = cli(*command.split(), "--to", "gguf", "-o", "out", cwd=tmp_path)
        assert code == 2 and "'gguf': use peft, diffusers, kohya, mlx" in said, said
        assert not (tmp_path/"out").exists()


class TestKernels:
    "A LoHa has a kernel flattened, a LoKr has it in one factor, and a LoRA in both."

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
    def test_beside_a_lora_of_the_same_convolution(self, tmp_path, kind, order):
        def base():
            torch.manual_seed(0)
            layers = {"conv": nn.Conv2d(4, 8, 3), "point": nn.Conv2d(4, 8, 1), "q": nn.Linear(8, 8)}
            return nn.ModuleDict(layers)

        def put_on(folder):
            return PeftModel.from_pretrained(base(), folder).merge_and_unload().state_dict()

        said = {"r": 2, "target_modules": ["conv", "point", "q"]}
        for name, config in (("a", kind(alpha=3, **said)), ("b", LoraConfig(**said))):
            model = get_peft_model(base(), config)
            for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
                p.data = randn(*p.shape, seed=i)
            model.save_pretrained(tmp_path/name)
        models = [tmp_path/"a", tmp_path/"b"]
        out = merge(models[::order], out=tmp_path/"out").out
        are_mean(put_on(out), *map(put_on, models))


class TestTasks:
    "A head for another task makes another class of the model, which programs look for by its name."

    @pytest.mark.parametrize("way", ["plus", "bake"])
    @pytest.mark.parametrize("task, kind", [
        ("SEQ_CLS", transformers.AutoModelForSequenceClassification),
        ("TOKEN_CLS", transformers.AutoModelForTokenClassification),
    ])
    def test_the_config_names_the_class_as_transformers_does(
        self, tiny, tmp_path, task, kind, way  # noqa: F811
    ):
        base = tiny("base", kind="qwen2")
        torch.manual_seed(0)
        model = kind.from_pretrained(base, num_labels=3)
        said = {"r": 2, "target_modules": ["q_proj"], "task_type": task}
        model = get_peft_model(model, LoraConfig(**said, init_lora_weights=False))
        model.save_pretrained(tmp_path/"a")
        want = model.merge_and_unload()
        want.save_pretrained(tmp_path/"want")
        if way == "plus":
            out = merge([f"{base}+{tmp_path/'a'}"], out=tmp_path/"out").out
        else:
            out = merge([tmp_path/"a"], bake=base, out=tmp_path/"out").out
        names = [json.loads((d/"config.json").read_text())["architectures"] for d in (
            out, tmp_path/"want")]
        assert names[0] == names[1]
        are_mean(kind.from_pretrained(out).state_dict(), want.state_dict())


    @pytest.mark.parametrize("field", ["task_type", "model_type"])
    def test_words_of_no_kind_name_no_class(self, tiny, adapter, tmp_path, field):  # noqa: F811
        base = tiny("base", kind="qwen2")
        a = adapter("a", base, 1)
        file = a/FILE
        save_file({**load_file(file), "base_model.model.score.weight": randn(3, 16)}, file)
        where = (a/"adapter_config.json") if field == "task_type" else (base/"config.json")
        config = a/"adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": "SEQ_CLS"}))
        where.write_text(json.dumps({**json.loads(where.read_text()), field: ["odd"]}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                out = merge([f"{base}+{a}"], out=tmp_path/"out").out
            except MergeError:
                return
        assert "ForSequenceClassification" not in (out/"config.json").read_text()


class TestLinks:
    def test_a_config_that_is_a_link_out_of_its_folder(self, tiny, adapter, tmp_path):  # noqa: F811
        "It says what the update is, and no other word of it is copied."
        base = tiny("base")
        a, b = (adapter(n, base, i) for i, n in enumerate("ab"))
        want = [put(base, x) for x in (a, b)]
        config = a/"adapter_config.json"
        said = json.loads(config.read_text()) | {"token": "PRIVATE", "auths": {"PRIVATE": 1}}
        config.unlink()
        (tmp_path/"elsewhere.json").write_text(json.dumps(said))
        config.symlink_to("../elsewhere.json")
        with pytest.warns(UserWarning, match="is a link that leads out of its folder.*is read"):
            out = merge([a, b], out=tmp_path/"out").out
        assert not any("PRIVATE" in f.read_text(errors="replace") for f in out.iterdir())
        are_mean(put(base, out), *want)

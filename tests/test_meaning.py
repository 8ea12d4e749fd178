"""What a checkpoint means is settled before a number is read: two tensors of one name and shape may
still be no versions of each other. Each refusal is provoked, and each remedy that it offers is run.
"""

import json
import shutil

import pytest
import torch
from conftest import cli, save
from safetensors.torch import load_file, save_file

from frechet_merge import LoRA, MergeError, load, merge
from frechet_merge.vocabularies.vocabulary import contradiction, vocabulary


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layered(seed=0, depth=2, lead=""):
    "A model with layers, a norm and biases."
    shapes = {"q.weight": (4, 4), "q.bias": (4,), "norm.weight": (4,)}
    names = [f"{lead}layers.{i}.{n}" for i in range(depth) for n in shapes]
    return {n: randn(*shapes[n.split(".", 2 + lead.count("."))[-1]], seed=seed) for n in names}


def is_mean(path, a, b):
    "Whether the tensors in a folder are the plain mean of two state dicts."
    found = load(path)
    return set(found) == set(a) and all(torch.allclose(found[n], (a[n] + b[n])/2) for n in a)


class TestDialects:
    "An adapter that adds no update is no full model."

    @pytest.mark.parametrize(
        "names, says",
        [
            (["q.oft_blocks"], "OFT"),
            (["q.dora_scale", "q.weight"], "DoRA"),
            (["q.ia3_l"], "IA"),
            (["q.vera_lambda_b"], "VeRA"),
            (["prompt_embeddings"], "soft prompt"),
            (["lora_unet_q.a1.weight", "lora_unet_q.b1.weight"], "GLoRA"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_is_refused_by_name(self, tmp_path, names, says):
        state = {n: randn(2, 2) for n in names}
        for k in range(2):
            save_file(state, tmp_path/f"{k}.safetensors")
        code, _, err = cli("merge", "0.safetensors", "1.safetensors", "-o", "o", cwd=tmp_path)
        assert code == 1 and says in err and len(err.splitlines()) <= 3
        assert not (tmp_path/"o").exists()
        with pytest.raises(MergeError, match=says):
            merge([state, state])

    def test_a_config_beside_a_file_says_what_it_is(self, tmp_path):
        for k in range(2):
            folder = tmp_path/f"a{k}"
            folder.mkdir()
            save_file({"q.ia3_l": randn(4)}, folder/"adapter_model.safetensors")
            (folder/"adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
        files = [tmp_path/f"a{k}"/"adapter_model.safetensors" for k in range(2)]
        for models in (files, [f.parent for f in files]):
            with pytest.raises(MergeError, match="peft_type = 'IA3'"):
                merge(models)

    def test_names_of_full_models_are_no_dialect(self):
        "Only names of factors are: not every word with lora or alpha in it."
        state = {"layers.0.alpha": randn(1), "explora.up.weight": randn(2), "mlp.lora.0": randn(2)}
        assert set(merge([state, state]).tensors) == set(state)


class TestAbsent:
    "Why a tensor is missing decides what can be done."

    def test_a_leaf_is_merged_over_those_that_have_it(self, tmp_path):
        a, b = layered(0), layered(1)
        del b["layers.1.q.bias"]
        with pytest.raises(MergeError, match="absent='renormalise'"):
            merge([a, b])
        merged = merge([a, b], absent="renormalise").tensors
        assert torch.equal(merged["layers.1.q.bias"], a["layers.1.q.bias"])

    def test_two_layouts_are_not_merged_side_by_side(self):
        a, b = layered(0), {n.replace("q.", "attention.q."): x for n, x in layered(1).items()}
        for absent in (None, "renormalise"):
            with pytest.raises(MergeError, match="one architecture in two layouts") as e:
                merge([a, b], absent=absent)
            assert "renormalise" not in str(e.value)

    def test_fused_experts_are_another_layout(self):
        a = {f"layers.0.experts.{i}.up.weight": randn(4, 4) for i in range(3)}
        b = {"layers.0.experts.up": randn(3, 4, 4)}
        rest = {"layers.0.norm.weight": randn(4), "embed": randn(9, 4)}
        for absent in (None, "renormalise"):
            with pytest.raises(MergeError, match="two layouts"):
                merge([a | rest, b | rest], absent=absent)

    def test_two_architectures_are_called_so(self):
        experts = [f"layers.{i}.experts.{k}.w" for i in (0, 1) for k in range(8)]
        a = layered(0) | {name: randn(4, 4) for name in experts}
        b = layered(1) | {f"layers.{i}.mlp.w": randn(4, 4) for i in (0, 1)}
        with pytest.raises(MergeError, match="two architectures"):
            merge([a, b], absent="renormalise")

    def test_architectures_of_nearly_one_size_are_no_layouts(self):
        wide = {f"layers.{i}.wide": randn(90, 90) for i in (0, 1)}
        a = wide | {f"layers.{i}.bn.weight": randn(30, 9) for i in (0, 1)}
        b = wide | {f"layers.{i}.out.{k}.weight": randn(40) for i in (0, 1) for k in (0, 1)}
        with pytest.raises(MergeError, match="two architectures") as e:
            merge([a, b])
        for said in ("'layers.0.bn.weight' of shape (30, 9) and 1 more", "(40,) and 3 more"):
            assert said in str(e.value)

    def test_another_depth_is_refused_whatever_is_allowed(self):
        for absent in (None, "renormalise"):
            with pytest.raises(MergeError, match="3 and 2 layers in 'layers'"):
                merge([layered(0, 3), layered(1, 2)], absent=absent)

    def test_a_base_of_another_layout_is_none(self):
        base = {n.replace("layers", "blocks"): x for n, x in layered(2).items()} | {"h": randn(2)}
        models = [layered(k) | {"h": randn(2)} for k in range(2)]
        with pytest.raises(MergeError, match="(?s)most others.*was trained from"):
            merge(models, base=base, scale=0.5, absent="renormalise")

    def test_heads_are_left_out_as_it_is_said(self):
        a, b = layered(0) | {"classifier.weight": randn(2, 4)}, layered(1)
        with pytest.raises(MergeError, match=r"drop='classifier\*'"):
            merge([a, b])
        assert set(merge([a, b], drop="classifier*").tensors) == set(b)

    def test_what_is_computed_comes_from_who_has_it(self):
        a, b = layered(0), layered(1)
        a["embeddings.position_ids"] = torch.arange(5)[None]
        b["layers.0.attn.bias"] = torch.ones(4, 4).tril()[None, None]
        merged = merge([a, b]).tensors
        assert torch.equal(merged["embeddings.position_ids"], a["embeddings.position_ids"])
        assert torch.equal(merged["layers.0.attn.bias"], b["layers.0.attn.bias"])

    def test_counters_are_the_first_models(self):
        a, b = ({"bn.num_batches_tracked": torch.tensor(n), "w": randn(2)} for n in (3, 5))
        assert merge([a, b]).tensors["bn.num_batches_tracked"] == 3


class TestTies:
    "Gemma and GPT-2 tie their output layer by the default of their class."

    def gemma(self, folder, seed):
        from transformers import GemmaConfig, GemmaForCausalLM

        torch.manual_seed(seed)
        sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, head_dim=4)
        heads = dict(num_attention_heads=2, num_key_value_heads=1)
        GemmaForCausalLM(GemmaConfig(vocab_size=30, **sizes, **heads)).save_pretrained(folder)
        config = json.loads((folder/"config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (folder/"config.json").write_text(json.dumps(config))
        return folder

    @pytest.mark.parametrize("order", [[0, 1], [1, 0]])
    def test_a_stored_copy_is_tied_where_the_config_is_silent(self, tmp_path, order):
        from transformers import AutoModelForCausalLM

        folders = [self.gemma(tmp_path/f"m{k}", k) for k in range(2)]
        file = folders[1]/"model.safetensors"
        states = [load_file(f/"model.safetensors") for f in folders]
        copy = {"lm_head.weight": states[1]["model.embed_tokens.weight"].clone()}
        save_file(states[1] | copy, file, {"format": "pt"})
        out = merge([folders[k] for k in order], out=tmp_path/"o").out
        head = AutoModelForCausalLM.from_pretrained(out).get_output_embeddings().weight
        want = sum(s["model.embed_tokens.weight"] for s in states)/2
        torch.testing.assert_close(head.detach(), want)

    def test_where_nobody_knows_the_remedy_works(self, tmp_path):
        "A model type that transformers does not have."
        emb, head = randn(9, 4), randn(9, 4, seed=1)
        rest = {"norm.weight": randn(4)}
        config = {"model_type": "mine", "vocab_size": 9}
        a = save(tmp_path/"a", {"embed_tokens.weight": emb} | rest, config)
        b = save(tmp_path/"b", {"embed_tokens.weight": emb, "lm_head.weight": head} | rest, config)
        for absent in (None, "renormalise"):
            with pytest.raises(MergeError, match="tie_word_embeddings: true"):
                merge([a, b], absent=absent)
        (a/"config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        merged = merge([a, b], out=tmp_path/"o")
        torch.testing.assert_close(merged.tensors["lm_head.weight"], (emb + head)/2)
        assert json.loads((tmp_path/"o"/"config.json").read_text())["tie_word_embeddings"] is False


class TestFolders:
    "Which file is the model, and what is written."

    def test_two_files_of_one_folder_are_two_models(self, tmp_path):
        for name in "ab":
            save_file({"w": randn(3)}, tmp_path/f"{name}.safetensors")
        code, _, err = cli("merge", "a.safetensors", "b.safetensors", "-o", "o", cwd=tmp_path)
        assert code == 0 and "2 times" not in err

    def sharded(self, folder, stem, state):
        "Two shards and their index."
        names = [*state]
        where = {}
        for i in (0, 1):
            part = {n: state[n] for n in names[i::2]}
            file = f"{stem}-{i + 1:05d}-of-00002.safetensors"
            save_file(part, folder/file)
            where |= dict.fromkeys(part, file)
        index = folder/f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": where}))
        return index

    def test_of_two_indexes_transformers_takes_its_own(self, tmp_path):
        a, b = layered(0), layered(1)
        self.sharded(tmp_path, "model", a)
        other = self.sharded(tmp_path, "consolidated", b)
        assert torch.equal(load(tmp_path)["layers.0.q.weight"], a["layers.0.q.weight"])
        assert torch.equal(load(other)["layers.0.q.weight"], b["layers.0.q.weight"])

    def test_of_two_strange_indexes_one_must_be_named(self, tmp_path):
        a = layered(0)
        first = self.sharded(tmp_path, "one", a)
        self.sharded(tmp_path, "two", a)
        with pytest.raises(MergeError, match="(?s)2 indexes: one.*Name the one"):
            load(tmp_path)
        assert set(load(first)) == set(a)

    @pytest.mark.parametrize("stray", ["consolidated", "adapter_model", "diffusion_pytorch_model"])
    def test_an_index_wins_over_a_stray_file(self, tmp_path, stray):
        a = layered(0)
        self.sharded(tmp_path, "model", a)
        save_file({"w": randn(2)}, tmp_path/f"{stray}.safetensors")
        assert set(load(tmp_path)) == set(a)

    def test_a_model_and_an_adapter_in_one_folder(self, tmp_path):
        save(tmp_path, layered(0), {"model_type": "toy"})
        factors = {"base_model.model.layers.0.q.lora_A.weight": randn(2, 4)}
        factors["base_model.model.layers.0.q.lora_B.weight"] = randn(4, 2)
        save_file(factors, tmp_path/"adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        (tmp_path/"adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(MergeError, match=r"model.safetensors\) and an adapter"):
            load(tmp_path)
        assert load(tmp_path/"model.safetensors").adapter is None
        assert load(tmp_path/"adapter_model.safetensors").adapter == config

    @pytest.mark.parametrize("lead", ["module.", "_orig_mod.", "module._orig_mod."])
    @pytest.mark.parametrize("first", [True, False])
    def test_wrappers_are_never_written(self, tmp_path, lead, first):
        a, b = layered(0), layered(1)
        wrapped = save(tmp_path/"a", {lead + n: x for n, x in a.items()})
        models = [wrapped, save(tmp_path/"b", b)]
        out = merge(models if first else models[::-1], out=tmp_path/"o").out
        assert is_mean(out, a, b)

    def test_a_part_that_was_compiled(self, tmp_path):
        a, b = layered(0), layered(1)
        part = {n.replace("layers.1.", "layers.1._orig_mod."): x for n, x in a.items()}
        out = merge([save(tmp_path/"a", part), save(tmp_path/"b", b)], out=tmp_path/"o").out
        assert is_mean(out, a, b)

    def test_diffusers_finds_its_file(self, tmp_path):
        for k in range(2):
            folder = tmp_path/f"m{k}"
            folder.mkdir()
            file = folder/"diffusion_pytorch_model.safetensors"
            save_file({"conv_in.weight": randn(2, 2, seed=k)}, file, {"format": "pt"})
            (folder/"config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
        out = merge([tmp_path/"m0", tmp_path/"m1"], out=tmp_path/"o").out
        assert (out/"diffusion_pytorch_model.safetensors").exists()
        assert json.loads((out/"config.json").read_text()) == {"_class_name": "UNet2DModel"}
        assert set(load(out)) == {"conv_in.weight"}

    def test_everything_but_weights_and_training_comes_along(self, tmp_path):
        a = save(tmp_path/"a", {"w": randn(2)}, {"model_type": "toy"})
        b = save(tmp_path/"b", {"w": randn(2)})
        for name in ("LICENSE", "word_shape.json", "open_clip_config.json", "dict.txt"):
            (a/name).write_text("x")
        for name in ("optimizer.pt", "trainer_state.json", "pytorch_model.bin", ".secret"):
            (a/name).write_text("x")
        merge([a, b], out=tmp_path/"o")
        names = {f.name for f in (tmp_path/"o").iterdir()}
        made = {"README.md", "frechet_merge.json", "model.safetensors", "config.json"}
        assert names == made | {"LICENSE", "word_shape.json", "open_clip_config.json", "dict.txt"}

    def test_a_file_among_others_brings_no_strangers(self, tmp_path):
        for name in "ab":
            save_file({"w": randn(3)}, tmp_path/f"{name}.safetensors")
        (tmp_path/"notes.txt").write_text("of somebody")
        merge([tmp_path/"a.safetensors", tmp_path/"b.safetensors"], out=tmp_path/"o")
        assert not (tmp_path/"o"/"notes.txt").exists()


class TestCodes:
    "Codes have no mean, and are refused by the name of their format."

    W = "layers.0.q"

    @pytest.mark.parametrize(
        "tensors, method",
        [
            ({"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}, "gptq"),
            ({"weight": torch.uint8, "weight.absmax": torch.float32}, "bitsandbytes"),
            ({"weight": torch.int8, "weight_scale": torch.float32}, "compressed-tensors"),
            ({"weight": torch.int8, "SCB": torch.float32}, "bitsandbytes"),
            ({"weight_packed": torch.int32, "weight_scale": torch.float32}, "compressed-tensors"),
            ({"up_blocks": torch.uint8, "up_scales": torch.uint8}, "mxfp4"),
            ({"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32}, "fp8"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_are_refused(self, tmp_path, tensors, method):
        state = {f"{self.W}.{n}": torch.ones(4, 4).to(d) for n, d in tensors.items()}
        state["norm.weight"] = randn(4)
        dense = save(tmp_path/"dense", {f"{self.W}.weight": randn(4, 4), "norm.weight": randn(4)})
        with pytest.raises(MergeError, match="is quantised"):
            merge([state, state])
        config = {"quantization_config": {"quant_method": method}}
        folder = save(tmp_path/"codes", state, config)
        for models in ([folder, folder], [dense, folder]):
            with pytest.raises(MergeError, match=rf"quantised \({method}\).*in codes") as e:
                merge(models)
            assert "renormalise" not in str(e.value)

    def test_integers_and_floats_of_eight_bits_alone_are_numbers(self):
        eight = randn(4).to(torch.float8_e4m3fn)
        state = {"w": eight, "ids": torch.arange(3, dtype=torch.uint8)}
        assert torch.equal(merge([state, state]).tensors["w"].float(), eight.float())


class TestStatistics:
    "Running statistics are averaged, never extrapolated."

    def test_a_variance_stays_between_those_of_the_models(self):
        def net(value, seed):
            weight = randn(3, seed=seed)
            return {"bn.running_var": torch.full((3,), value), "bn.weight": weight}

        base, models = net(9.0, 0), [net(0.5, 1), net(0.25, 2)]
        for geometry in ("euclidean", "sphere"):
            merged = merge(models, geometry, base=base, scale=1.6, weights=[3, 1]).tensors
            want = torch.full((3,), 0.75*0.5 + 0.25*0.25)
            torch.testing.assert_close(merged["bn.running_var"], want)
        change = [m["bn.weight"] - base["bn.weight"] for m in models]
        want = base["bn.weight"] + 1.6*(0.75*change[0] + 0.25*change[1])
        merged = merge(models, base=base, scale=1.6, weights=[3, 1]).tensors
        torch.testing.assert_close(merged["bn.weight"], want)


class TestLabels:
    "Rows of a head are labels."

    def of(self, folder, labels, seed=0, **config):
        named = {str(i): x for i, x in enumerate(labels)}
        state = layered(seed) | {"classifier.weight": randn(len(labels), 4, seed=seed)}
        return save(folder, state, {"model_type": "toy", "id2label": named, **config})

    def test_in_another_order(self, tmp_path):
        a, b = self.of(tmp_path/"a", ["yes", "no"]), self.of(tmp_path/"b", ["no", "yes"], 1)
        rows = [randn(2, 4), randn(2, 4, seed=1).flip(0)]
        merged = merge([a, b]).tensors["classifier.weight"]
        torch.testing.assert_close(merged, sum(rows)/2)

    def test_of_another_task(self, tmp_path):
        a, b = self.of(tmp_path/"a", ["yes", "no"]), self.of(tmp_path/"b", ["spam", "ham"], 1)
        says = "heads of different tasks"
        with pytest.raises(MergeError, match=rf"(?s)labels yes, no.*{says}.*drop='classifier\*'"):
            merge([a, b])
        merged = merge([a, b], drop="classifier*").tensors
        assert set(merged) == set(layered())

    @pytest.mark.parametrize("theirs", [["YES", "NO"], ["LABEL_0", "LABEL_1"], ["0", "1"]])
    def test_that_say_the_same_or_nothing(self, tmp_path, theirs):
        a, b = self.of(tmp_path/"a", ["yes", "no"]), self.of(tmp_path/"b", theirs, 1)
        assert "classifier.weight" in merge([a, b]).tensors

    def test_of_the_base_are_its_own(self, tmp_path):
        models = [self.of(tmp_path/f"{k}", ["yes", "no"], k) for k in range(2)]
        base = self.of(tmp_path/"base", ["spam", "ham"], 2)
        assert "classifier.weight" in merge(models, base=base, scale=0.5).tensors


class TestTokens:
    "Rows of an embedding are tokens."

    def of(self, folder, seed=0, **files):
        state = {"embed_tokens.weight": randn(4, 3, seed=seed), "w": randn(2, seed=seed)}
        save(folder, state, {"model_type": "toy", "vocab_size": 4})
        for name, held in files.items():
            text = held if isinstance(held, str) else json.dumps(held)
            file = name if "." in name else name.replace("_", ".")
            (folder/file).write_text(text)
        return folder

    TREE = {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}

    @pytest.mark.parametrize(
        "files, says",
        [
            ({"vocab_txt": "a\nc\nb"}, "number 1 for 'b' and for 'c'"),
            ({"vocab_json": {"a": 0, "b": 1, "d": 2}}, "number 2 for 'c' and for 'd'"),
            ({"tokenizer_json": {"model": {"vocab": [["a", 0.0], ["x", 0.0]]}}}, "'b' and for 'x'"),
            ({"vocab_json": {"a": 0, "b": 1, "c": 3}}, "'c' for number 2 and for number 3"),
        ],
        ids=["vocab.txt", "vocab.json", "unigram", "moved"],
    )
    def test_that_share_a_number_or_have_two(self, tmp_path, files, says):
        a, b = self.of(tmp_path/"a", tokenizer_json=self.TREE), self.of(tmp_path/"b", 1, **files)
        for models in ([a, b], [b, a]):
            with pytest.raises(MergeError, match="token"):
                merge(models)
        with pytest.raises(MergeError, match=says):
            merge([a, b])
        with pytest.raises(MergeError, match="token"):
            merge([b], base=a, scale=0.5)

    @pytest.mark.parametrize(
        "files",
        [
            {"vocab_txt": "a\nb\nc\nd\n"},
            {"vocab_json": {"a": 0, "b": 1}},
            {"vocab_json": {"a": 0, "b": 1, "[unused1]": 2}},
            {"tokenizer_json": "not JSON"},
        ],
        ids=["more", "fewer", "reserved", "unreadable"],
    )
    def test_that_do_not_contradict_each_other(self, tmp_path, files):
        a, b = self.of(tmp_path/"a", tokenizer_json=self.TREE), self.of(tmp_path/"b", 1, **files)
        assert "embed_tokens.weight" in merge([a, b]).tensors

    def test_do_not_matter_where_they_have_no_rows(self, tmp_path):
        a = self.of(tmp_path/"a", tokenizer_json=self.TREE)
        b = self.of(tmp_path/"b", 1, vocab_txt="c\nb\na")
        assert set(merge([a, b], drop="embed*").tensors) == {"w"}

    def test_added_ones_count(self, tmp_path):
        files = {"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<new>": 2}}
        found = vocabulary(load(self.of(tmp_path/"a", **files)))
        assert found == {"a": 0, "b": 1, "<new>": 2}
        assert contradiction(found, {"<other>": 2}) == (2, "<new>", "<other>")


class TestPoolings:
    "Encoders make embeddings of the same weights in several ways."

    def of(self, folder, mode, seed=0, weights=None):
        save(folder, layered(seed), {"model_type": "toy"})
        parts = ["Transformer", "Pooling", "Dense"]
        listed = [
            {"path": "" if i == 0 else f"{i}_{p}", "type": f"sentence_transformers.models.{p}"}
            for i, p in enumerate(parts[: 2 if weights is None else 3])
        ]
        (folder/"modules.json").write_text(json.dumps(listed))
        (folder/"1_Pooling").mkdir()
        (folder/"1_Pooling"/"config.json").write_text(json.dumps(mode))
        if weights is not None:
            (folder/"2_Dense").mkdir()
            save_file({"linear.weight": weights}, folder/"2_Dense"/"model.safetensors")
        return folder

    def test_that_differ_are_refused(self, tmp_path):
        a = self.of(tmp_path/"a", {"pooling_mode_mean_tokens": True})
        b = self.of(tmp_path/"b", {"pooling_mode": "cls"}, 1)
        with pytest.raises(MergeError, match="Pooling of mean, and Pooling of cls"):
            merge([a, b])

    def test_of_two_spellings_are_one(self, tmp_path):
        old = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        models = [self.of(tmp_path/"a", old), self.of(tmp_path/"b", {"pooling_mode": "cls"}, 1)]
        out = merge(models, out=tmp_path/"o").out
        assert json.loads((out/"1_Pooling"/"config.json").read_text()) == old

    def test_a_projection_of_its_own_is_merged(self, tmp_path):
        mean = {"pooling_mode": "mean"}
        x, y = randn(2, 4, seed=1), randn(2, 4, seed=2)
        a, b = self.of(tmp_path/"a", mean, 0, x), self.of(tmp_path/"b", mean, 0, y)
        m = merge([a, b], weights=[1, 3], out=tmp_path/"o")
        found = load_file(tmp_path/"o"/"2_Dense"/"model.safetensors")["linear.weight"]
        torch.testing.assert_close(found, (x + 3*y)/4)
        assert "2_Dense/linear.weight" in m.means

    def test_a_projection_that_has_no_place_is_not_left_unmerged(self, tmp_path):
        mean = {"pooling_mode": "mean"}
        a = self.of(tmp_path/"a", mean, 0, randn(2, 4, seed=1))
        b = self.of(tmp_path/"b", mean, 0, randn(2, 4, seed=2))
        with pytest.raises(MergeError, match="other weights in '2_Dense'"):
            merge([a, b])
        ones = {n: torch.ones_like(x) for n, x in layered(0).items()}
        with pytest.raises(MergeError, match="other weights in '2_Dense'"):
            merge([a, b], metrics=[ones, ones], out=tmp_path/"o")
        assert not (tmp_path/"o").exists()

    def test_a_projection_that_one_lacks(self, tmp_path):
        mean = {"pooling_mode": "mean"}
        a = self.of(tmp_path/"a", mean, 0, randn(2, 4, seed=1))
        b = self.of(tmp_path/"b", mean, 0)
        for models in ([a, b], [b, a]):
            with pytest.raises(MergeError, match="Dense"):
                merge(models, out=tmp_path/"o")
        c = self.of(tmp_path/"c", mean, 0, randn(2, 4, seed=1))
        (c/"2_Dense"/"model.safetensors").unlink()
        for models in ([a, c], [c, a]):
            with pytest.raises(MergeError, match="only one of them has weights in '2_Dense'"):
                merge(models, out=tmp_path/"o")

    def test_a_projection_under_another_spelling_of_its_path(self, tmp_path):
        x, y = randn(2, 4, seed=1), randn(2, 4, seed=2)
        mean = {"pooling_mode": "mean"}
        a, b = self.of(tmp_path/"a", mean, 0, x), self.of(tmp_path/"b", mean, 0, y)
        for f in (a, b):
            file = f/"modules.json"
            file.write_text(file.read_text().replace('"2_Dense"', '"./2_Dense"'))
        merge([a, b], out=tmp_path/"o")
        found = load_file(tmp_path/"o"/"2_Dense"/"model.safetensors")["linear.weight"]
        torch.testing.assert_close(found, (x + y)/2)

    def test_a_projection_from_its_base(self, tmp_path):
        mean = {"pooling_mode": "mean"}
        z, x, y = (randn(2, 4, seed=i) for i in range(3))
        base, a, b = (
            self.of(tmp_path/n, mean, 0, w) for n, w in (("z", z), ("a", x), ("b", y))
        )
        merge([a, b], base=base, scale=0.5, out=tmp_path/"o")
        found = load_file(tmp_path/"o"/"2_Dense"/"model.safetensors")["linear.weight"]
        torch.testing.assert_close(found, z + ((x + y)/2 - z)/2)


def test_another_depth_in_the_config(tmp_path):
    a = save(tmp_path/"a", layered(0), {"num_hidden_layers": 2})
    b = save(tmp_path/"b", layered(1), {"text_config": {"n": 1}, "num_hidden_layers": 3})
    with pytest.raises(MergeError, match="num_hidden_layers = 2 and 3"):
        merge([a, b])


class TestAdapters:
    "Layers of two adapters are one layer if they are called alike, and only then."

    def of(self, folder, lead="", seed=0, key="base_model.model.{}.lora_{}.weight", **config):
        folder.mkdir()
        names = [f"{lead}layers.{i}.q" for i in range(2)]
        state = {}
        for i, name in enumerate(names):
            state[key.format(name, "A")] = randn(2, 4, seed=seed + i)
            state[key.format(name, "B")] = randn(4, 2, seed=seed + i + 9)
        save_file(state, folder/"adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **config}
        (folder/"adapter_config.json").write_text(json.dumps(said))
        return folder

    def updates(self, folder):
        from frechet_merge.adapters.peft import layers

        return {n: x.factors().delta() for n, x in layers(load(folder))[0].items()}

    @pytest.mark.parametrize(
        "key",
        [
            "_orig_mod.base_model.model.{}.lora_{}.weight",
            "base_model.model._orig_mod.{}.lora_{}.weight",
            "base_model.model.{}.lora_{}.style.weight",
        ],
    )
    @pytest.mark.parametrize("first", [True, False])
    def test_wrappers_and_names_in_their_keys(self, tmp_path, key, first):
        a, b = self.of(tmp_path/"a", seed=1, key=key), self.of(tmp_path/"b", seed=2)
        models = [a, b] if first else [b, a]
        out = merge(models, LoRA(), out=tmp_path/"o").out
        found, ours, theirs = (self.updates(f) for f in (out, a, b))
        for name, delta in found.items():
            torch.testing.assert_close(delta, (ours[name] + theirs[name])/2, rtol=0, atol=1e-5)
        assert all(k.startswith("base_model.model.layers.") for k in load(out))

    def test_several_in_one_file(self, tmp_path):
        a = self.of(tmp_path/"a", key="base_model.model.{}.lora_{}.style.weight")
        file = a/"adapter_model.safetensors"
        more = {n.replace("style", "task"): x.clone() for n, x in load_file(file).items()}
        save_file(load_file(file) | more, file)
        with pytest.raises(MergeError, match="the adapters style, task in one file"):
            merge([a])

    def test_before_and_after_a_renaming(self, tmp_path):
        a = self.of(tmp_path/"a", "language_model.model.", 1)
        b = self.of(tmp_path/"b", "model.language_model.", 2)
        for k, models in enumerate(([a, b], [b, a])):
            found = self.updates(merge(models, out=tmp_path/f"o{k}").out)
            ours, theirs = map(self.updates, models)
            assert found.keys() == ours.keys()
            for (name, delta), other in zip(ours.items(), theirs.values()):
                torch.testing.assert_close(found[name], (delta + other)/2, rtol=0, atol=1e-5)

    def test_of_two_towers_before_and_after_a_renaming(self, tmp_path):
        "A part that was put in front of one tower was moved inside the other."
        leads = {"old": ("language_model.model.", "vision_tower.")}
        leads["new"] = ("model.language_model.", "model.vision_tower.")
        made = {}
        for age, (text, vision) in leads.items():
            made[age] = self.of(tmp_path/age, text, len(made))
            other = self.of(tmp_path/f"{age}-vision", vision, len(made) + 5)
            file = made[age]/"adapter_model.safetensors"
            save_file(load_file(file) | load_file(other/"adapter_model.safetensors"), file)
        for ages in (("old", "new"), ("new", "old")):
            models = [made[age] for age in ages]
            found = self.updates(merge(models, out=tmp_path/"-".join(ages)).out)
            ours, theirs = map(self.updates, models)
            there = dict(zip(leads[ages[0]], leads[ages[1]]))
            assert found.keys() == ours.keys()
            for name, delta in ours.items():
                lead = next(x for x in there if name.startswith(x))
                other = theirs[there[lead] + name.removeprefix(lead)]
                torch.testing.assert_close(found[name], (delta + other)/2, rtol=0, atol=1e-5)

    def test_before_and_after_an_unknown_renaming(self, tmp_path):
        a = self.of(tmp_path/"a", "old.", 1)
        b = self.of(tmp_path/"b", "tower.new.", 2)
        with pytest.raises(MergeError, match="(?s)before a renaming.*absent='zero'"):
            merge([a, b])
        with pytest.warns(UserWarning, match="no layer is adapted by more than one"):
            assert len(merge([a, b], absent="zero").means) == 4

    def test_strange_layers_of_one_adapter_are_named(self, tmp_path):
        a, b = self.of(tmp_path/"a", seed=1), self.of(tmp_path/"b", seed=2)
        file = b/"adapter_model.safetensors"
        more = {n.replace("layers.", "tower.blocks."): x + 0 for n, x in load_file(file).items()}
        save_file(load_file(file) | more, file)
        with pytest.warns(UserWarning, match="alone adapts 'tower.blocks.0.q' and 1 more"):
            merge([a, b])

    def test_two_towers_of_other_sizes_are_no_renaming(self, tmp_path):
        a = self.of(tmp_path/"a", "vision.", 1)
        b = tmp_path/"b"
        shutil.copytree(a, b)
        state = load_file(b/"adapter_model.safetensors")
        wide = {n.replace("vision", "text"): torch.cat([x, x], -1) for n, x in state.items()}
        thin = {n: x[:, :2] if "lora_B" in n else x for n, x in wide.items()}
        save_file({n: x.contiguous() for n, x in thin.items()}, b/"adapter_model.safetensors")
        with pytest.warns(UserWarning, match="no layer is adapted by more than one"):
            assert len(merge([a, b]).means) == 4

    def test_an_outer_folder_names_those_inside(self, tmp_path):
        (tmp_path/"both").mkdir()
        self.of(tmp_path/"both"/"style")
        self.of(tmp_path/"both"/"task")
        with pytest.raises(MergeError, match="(?s)folders of adapters:.*style.*task.*Name one"):
            load(tmp_path/"both")

    @pytest.mark.parametrize("how", ["bake", "plus"])
    def test_what_it_brings_wins_on_a_base(self, tmp_path, how):
        base = save(tmp_path/"base", layered(0), {"model_type": "toy"})
        (base/"tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
        (base/"merges.txt").write_text("base")
        (base/"generation_config.json").write_text("{}")
        a = self.of(tmp_path/"a", seed=1)
        (a/"tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "new": 1}}}))
        (a/"chat_template.jinja").write_text("hello")
        if how == "bake":
            merge([a], bake=base, out=tmp_path/"o")
        else:
            merge([f"{base}+{a}"], out=tmp_path/"o")
        assert "new" in (tmp_path/"o"/"tokenizer.json").read_text()
        assert (tmp_path/"o"/"chat_template.jinja").read_text() == "hello"
        # one tokenizer, not halves of two
        assert not (tmp_path/"o"/"merges.txt").exists()
        assert (tmp_path/"o"/"generation_config.json").exists()
        assert not (tmp_path/"o"/"adapter_config.json").exists()

    def test_an_embedding_that_was_saved_whole_does_not_change_the_output_along(self, tmp_path):
        config = {
            "model_type": "llama",
            "vocab_size": 9,
            "tie_word_embeddings": True,
            "architectures": ["LlamaForCausalLM"],
        }
        emb, new, head = randn(9, 4), randn(9, 4, seed=5), randn(9, 4, seed=6)
        state = layered(0, lead="model.") | {"model.embed_tokens.weight": emb}
        base = save(tmp_path/"base", state, config)
        a = self.of(tmp_path/"a", "model.", 1, modules_to_save=["embed_tokens"])
        file = a/"adapter_model.safetensors"
        saved = {"base_model.model.model.embed_tokens.weight": new}
        save_file(load_file(file) | saved, file)
        out = merge([a], bake=base, out=tmp_path/"alone")
        torch.testing.assert_close(out.tensors["lm_head.weight"], emb)
        torch.testing.assert_close(out.tensors["model.embed_tokens.weight"], new)
        said = json.loads((tmp_path/"alone"/"config.json").read_text())
        assert said["tie_word_embeddings"] is False
        # with an output of its own it is right, and the config says so
        saved["base_model.model.lm_head.weight"] = head
        save_file(load_file(file) | saved, file)
        out = merge([a], bake=base, out=tmp_path/"o")
        torch.testing.assert_close(out.tensors["lm_head.weight"], head)
        torch.testing.assert_close(out.tensors["model.embed_tokens.weight"], new)
        assert json.loads((tmp_path/"o"/"config.json").read_text())["tie_word_embeddings"] is False
        # the remedy: untied, and both saved
        untied = config | {"tie_word_embeddings": False}
        save(tmp_path/"untied", state | {"lm_head.weight": emb.clone()}, untied)
        saved.pop("base_model.model.lm_head.weight")
        kept = {n: x for n, x in load_file(file).items() if "lm_head" not in n}
        save_file(kept, file)
        out = merge([a], bake=tmp_path/"untied")
        torch.testing.assert_close(out.tensors["lm_head.weight"], emb)


class TestRouters:
    "PEFT adapts the parameter of a router of experts, and looks for a rank by that name."

    def mixtral(self, folder):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
        config = AutoConfig.for_model("mixtral", vocab_size=48, **sizes, **heads)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    def adapter(self, folder, base, seed):
        "As it was saved when routers were linear layers."
        state = {}
        for i in range(2):
            for name, n in (("self_attn.q_proj", 16), ("self_attn.o_proj", 16), ("mlp.gate", 4)):
                key = f"base_model.model.model.layers.{i}.{name}.lora_"
                state[f"{key}A.weight"] = randn(3, 16, seed=seed + len(state))
                state[f"{key}B.weight"] = randn(n, 3, seed=seed + len(state))
        folder.mkdir()
        save_file(state, folder/"adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
        said |= {"target_modules": ["q_proj", "o_proj", "gate"]}
        said |= {"base_model_name_or_path": str(base)}
        (folder/"adapter_config.json").write_text(json.dumps(said))
        return folder

    def moved(self, base, adapter):
        "What an adapter adds to each weight, as PEFT has it."
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        before = AutoModelForCausalLM.from_pretrained(base).state_dict()
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        after = model.merge_and_unload().state_dict()
        return {n: after[n] - before[n] for n in before if ".gate." in n or "_proj.weight" in n}

    def test_of_another_rank_than_the_rest(self, tmp_path):
        base = self.mixtral(tmp_path/"base")
        a, b = (self.adapter(tmp_path/n, base, s) for n, s in (("a", 0), ("b", 100)))
        out = merge([a, b], LoRA(), out=tmp_path/"o").out
        found, *both = (self.moved(base, f) for f in (out, a, b))
        for name, delta in found.items():
            want = (both[0][name] + both[1][name])/2
            torch.testing.assert_close(delta, want, rtol=0, atol=1e-4)
        assert any(".gate." in n and d.norm() > 0.1 for n, d in found.items())
        again = merge([out, out], LoRA()).tensors  # we read what we write
        assert again["base_model.model.model.layers.0.mlp.gate.lora_A.weight"].shape == (4, 16)

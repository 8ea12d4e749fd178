"""What an error of `files` or `matching` offers is done, on the input that caused it, and gives
what it promises. Only remedies that no other test runs are here."""

import ast
import json
import shlex
import shutil

import pytest
import torch
from conftest import save
from safetensors.torch import load_file, save_file

from frechet_merge import MergeError, load, merge
from frechet_merge.files.output import free

ONE = {"u": torch.tensor([1.0, 2.0]), "v": torch.tensor([3.0])}


def refused(says, *models, **how):
    "A merge is refused in these words, of three lines at most."
    with pytest.raises(MergeError, match=says) as e:
        merge([*models], **how)
    assert len(str(e.value).splitlines()) <= 3
    return str(e.value)


def is_one(*models, **how):
    "Whether a merge of copies of ONE is ONE."
    found = merge([*models], **how).tensors
    assert found.keys() == ONE.keys() and all(torch.equal(found[n], ONE[n]) for n in ONE)


@pytest.fixture
def whole(tmp_path):
    return save(tmp_path/"whole", ONE, {"model_type": "toy"})


@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_a_config_with_a_key_that_is_mended(tmp_path, whole, key):
    bad = save(tmp_path/"bad", ONE, {key: 3})
    assert "mend this key" in refused(f"config.json: has {key} = 3", bad, whole)
    (bad/"config.json").write_text(json.dumps({key: "toy"}))
    is_one(bad, whole)


def test_a_snapshot_of_the_hub_s_cache(tmp_path, whole):
    place = tmp_path/"models--a--b"
    for n in ("one", "two"):
        save(place/"snapshots"/n, ONE, {"model_type": "toy"})
    said = refused("does not say which snapshot is main", place, whole)
    assert str(place/"snapshots"/"one") in said
    is_one(place/"snapshots"/"one", whole)


def test_two_indexes_that_no_library_calls_its_own(tmp_path, whole):
    bad = tmp_path/"bad"
    bad.mkdir()
    for stem in ("x", "y"):
        save_file(ONE, bad/f"{stem}-00001-of-00001.safetensors")
        held = dict.fromkeys(ONE, f"{stem}-00001-of-00001.safetensors")
        (bad/f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
    assert "Name the one to merge" in refused("holds 2 indexes", bad, whole)
    is_one(bad/"y.safetensors.index.json", whole)


def test_a_full_model_beside_an_adapter(tmp_path, whole):
    bad = save(tmp_path/"bad", ONE, {"model_type": "toy"})
    factor = {"base_model.model.q.lora_A.weight": torch.ones(1, 2)}
    save_file(factor, bad/"adapter_model.safetensors")
    (bad/"adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "Name the file" in refused("a full model .* and an adapter", bad, whole)
    is_one(bad/"model.safetensors", whole)


def test_a_tensor_in_two_shards(tmp_path, whole):
    bad = tmp_path/"bad"
    bad.mkdir()
    for i, part in enumerate(({"u": ONE["u"], "v": ONE["v"]}, {"v": ONE["v"]}), 1):
        save_file(part, bad/f"model-{i:05d}-of-00002.safetensors")
    refused("'v' is also in another shard", bad, whole)
    index = {"weight_map": dict.fromkeys(ONE, "model-00001-of-00002.safetensors")}
    (bad/"model.safetensors.index.json").write_text(json.dumps(index))
    (bad/"model-00002-of-00002.safetensors").unlink()
    is_one(bad, whole)


def test_a_text_beside_a_model(whole):
    said = refused("is a text beside a model", whole/"config.json", whole)
    assert f"Name its folder, {whole}" in said
    is_one(whole, whole)


def test_several_sets_of_tensors_in_a_pickle(tmp_path, whole):
    file = tmp_path/"x.pt"
    torch.save({"model": ONE, "generator": ONE}, file)
    said = refused("several sets of tensors", file, whole, allow_pickle=True)
    command = said.splitlines()[-1].removeprefix("Save one alone: ").removesuffix(".")
    exec(command, {"torch": torch, "FILE": file, "OTHER": tmp_path/"y.pt"})
    is_one(tmp_path/"y.pt", whole, allow_pickle=True)


def test_a_pickle_with_something_that_is_no_tensor(tmp_path, whole):
    file, held = tmp_path/"x.pt", {**ONE, "epoch": 3}
    torch.save(held, file)
    said = refused("'epoch' is a int", file, whole, allow_pickle=True)
    command = said.splitlines()[-1].partition(": ")[2].removesuffix(".")
    exec(command, {"torch": torch, "STATE": torch.load(file), "OTHER": tmp_path/"y.pt"})
    is_one(tmp_path/"y.pt", whole, allow_pickle=True)


def test_a_pickle_of_arrays(tmp_path, whole):
    file = tmp_path/"x.pt"
    torch.save({n: x.numpy() for n, x in ONE.items()}, file)
    said = refused("'u' is a numpy", file, whole, allow_pickle=True)
    command = said.splitlines()[-1].partition(": ")[2].removesuffix(".")
    state = torch.load(file, weights_only=False)
    exec(command, {"torch": torch, "STATE": state, "OTHER": tmp_path/"y.pt"})
    is_one(tmp_path/"y.pt", whole, allow_pickle=True)


def test_a_pickle_of_parts(tmp_path, whole):
    file, parts = tmp_path/"x.pt", {"encoder": {"all": {"u": ONE["u"]}}, "v": {"all": {}}}
    torch.save(parts, file)
    refused("Save the tensors in it under their names", file, whole, allow_pickle=True)
    torch.save({**parts["encoder"]["all"], "v": ONE["v"]}, tmp_path/"y.pt")
    is_one(tmp_path/"y.pt", whole, allow_pickle=True)


class Whole(torch.nn.Module):
    "What some trainers save in the place of its tensors."

    def __init__(self):
        super().__init__()
        for name, x in ONE.items():
            setattr(self, name, torch.nn.Parameter(x))


def test_a_model_as_an_object_beside_other_things(tmp_path, whole):
    file = tmp_path/"x.pt"
    torch.save({"epoch": 3, "model": Whole(), "ema": None}, file)
    said = refused("'epoch' is a int", file, whole, allow_pickle=True)
    command = said.splitlines()[-1].partition(": ")[2].removesuffix(".")
    exec(command, {"torch": torch, "FILE": file, "OTHER": tmp_path/"y.pt"})
    is_one(tmp_path/"y.pt", whole, allow_pickle=True)


def test_a_program_of_torchscript(tmp_path, whole):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for n, x in ONE.items():
                self.register_parameter(n, torch.nn.Parameter(x))

        def forward(self, x):
            return x*self.u

    file = tmp_path/"x.pt"
    torch.jit.save(torch.jit.script(Two()), file)
    said = refused("TorchScript", file, whole, allow_pickle=True)
    command = said.splitlines()[-1].partition(": ")[2].removesuffix(".")
    exec(command, {"torch": torch, "FILE": str(file), "OTHER": tmp_path/"y.pt"})
    is_one(tmp_path/"y.pt", whole, allow_pickle=True)


def test_weights_of_mlx_as_an_archive_of_numpy(tmp_path, whole, monkeypatch):
    import numpy
    import safetensors.numpy

    file = tmp_path/"weights.npz"
    numpy.savez(file, **{n: x.numpy() for n, x in ONE.items()})
    command = refused("NumPy, as MLX wrote", file, whole).splitlines()[-1]
    command = command.partition("Convert it: ")[2].removesuffix(".")
    monkeypatch.chdir(tmp_path)
    exec(command, {"numpy": numpy, "safetensors": safetensors, "FILE": file})
    is_one(tmp_path/"model.safetensors", whole)


def test_integers_that_differ(tmp_path):
    a = save(tmp_path/"a", {**ONE, "map": torch.tensor([1])}, {"model_type": "toy"})
    b = save(tmp_path/"b", {**ONE, "map": torch.tensor([2])}, {"model_type": "toy"})
    assert "drop='map'" in refused("integers have no mean", a, b)
    is_one(a, b, drop=["map"])


def test_bytes_that_no_config_explains_are_no_table(tmp_path):
    codes = {"l.weight": torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)}
    others = {"l.weight": 2*codes["l.weight"]}
    a, b = (save(tmp_path/n, {**ONE, **x}) for n, x in (("a", codes), ("b", others)))
    said = refused("codes of numbers that no config here explains", a, b)
    assert "--drop" not in said
    whole = codes["l.weight"].float()
    a, b = save(tmp_path/"c", {"l.weight": whole}), save(tmp_path/"d", {"l.weight": 2*whole})
    assert torch.equal(merge([a, b]).tensors["l.weight"], 1.5*whole)


def test_a_bias_that_the_first_config_does_not_know(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    made = {}
    for i, n in enumerate("ab"):
        torch.manual_seed(i)
        config = LlamaConfig(num_attention_heads=2, attention_bias=n == "b", **sizes)
        made[n] = LlamaForCausalLM(config)
        made[n].save_pretrained(tmp_path/n)
    a, b = tmp_path/"a", tmp_path/"b"
    said = refused("has no tensor .*bias", a, b)
    assert f"{b} named first, whose config knows it" in said
    assert "named first" not in refused("has no tensor .*bias", b, a)
    merge([b, a], absent="renormalise", out=tmp_path/"o")
    model, info = LlamaForCausalLM.from_pretrained(tmp_path/"o", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    name = "model.layers.0.self_attn.q_proj.weight"
    want = (made["a"].state_dict()[name] + made["b"].state_dict()[name])/2
    torch.testing.assert_close(model.state_dict()[name], want)


def test_a_base_of_another_architecture(tmp_path, whole):
    base = save(tmp_path/"base", {"w": torch.ones(3)}, {"model_type": "toy"})
    assert "was trained from" in refused("and most others of it neither", whole, whole, base=base)
    is_one(whole, whole, base=whole)


def test_numbers_and_integers_under_one_name(tmp_path, whole):
    other = {**ONE, "v": ONE["v"].int()}
    bad = save(tmp_path/"bad", other, {"model_type": "toy"})
    assert "Convert one of them" in refused("is torch.int32", whole, bad)
    save(bad, {n: x.float() for n, x in other.items()})
    is_one(whole, bad)


def test_a_part_whose_library_reads_one_of_two_files(tmp_path):
    for n in "ab":
        for part in ("unet", "vae"):
            save(tmp_path/n/part, ONE)
        listed = {p: ["diffusers", "UNet2DModel"] for p in ("unet", "vae")}
        (tmp_path/n/"model_index.json").write_text(json.dumps(listed))
    unet = tmp_path/"a"/"unet"
    for stem in ("x", "y"):
        shutil.copy(unet/"model.safetensors", unet/f"{stem}.safetensors")
    (unet/"model.safetensors").unlink()
    said = refused("holds 2 .safetensors files", tmp_path/"a", tmp_path/"b")
    assert "Leave one of them in this folder" in said
    (unet/"y.safetensors").unlink()
    assert len(merge([tmp_path/"a", tmp_path/"b"]).tensors) == 4


def test_an_output_that_is_taken(tmp_path, whole):
    assert "Name another folder, or empty" in refused("exists already", whole, whole, out=whole)
    merge([whole, whole], out=tmp_path/"other")
    assert set(load(tmp_path/"other")) == set(ONE)
    assert set(load_file(whole/"model.safetensors")) == set(ONE)


def test_an_encoder_in_the_folders_of_an_older_version(tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer
    from test_libraries import encoder, is_mean

    a, b = (encoder(tmp_path/n, i) for i, n in enumerate("ab"))
    old = tmp_path/"a"/"0_Transformer"
    old.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.move(tmp_path/"a"/name, old/name)
    shutil.move(tmp_path/"a"/"sentence_bert_config.json", old)
    listed = json.loads((tmp_path/"a"/"modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (tmp_path/"a"/"modules.json").write_text(json.dumps(listed))
    for order in ("ab", "ba"):
        said = refused("as sentence-transformers once wrote it", *(tmp_path/n for n in order))
    monkeypatch.chdir(tmp_path)
    command = said.partition("again: ")[2].removesuffix(".")
    exec(command, {"SentenceTransformer": SentenceTransformer})
    merge([tmp_path/"a-new", tmp_path/"b"], out=tmp_path/"o")
    found = SentenceTransformer(str(tmp_path/"o"), device="cpu")
    assert is_mean(found.state_dict(), a.state_dict(), b.state_dict())


@pytest.mark.parametrize("theirs", [None, b"2", b"1"], ids=["none", "another", "the same"])
def test_a_classifier_of_another_library_beside_an_encoder(tmp_path, theirs, recwarn):
    for n, held in (("a", b"1"), ("b", theirs)):
        save(tmp_path/n, ONE, {"model_type": "toy"})
        if held is not None:
            (tmp_path/n/"model_head.pkl").write_bytes(held)
    merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
    said = [str(w.message) for w in recwarn if "model_head.pkl" in str(w.message)]
    assert (tmp_path/"o"/"model_head.pkl").read_bytes() == b"1"
    assert bool(said) == (theirs != b"1")


def made(cls, config, seed, folder):
    "A model of transformers of random numbers, saved."
    torch.manual_seed(seed)
    model = cls(config)
    model.save_pretrained(folder)
    return model


def bert():
    from transformers import BertConfig

    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return BertConfig(num_attention_heads=2, max_position_embeddings=8, **sizes)


def left_out(said):
    "The patterns of a remedy, as Python spells them, which are those of the command line."
    python, typed = said.rpartition("(drop=")[2].removesuffix(").").split(", --drop ", 1)
    patterns = ast.literal_eval(python)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    assert shlex.split("--drop " + typed) == [w for p in patterns for w in ("--drop", p)]
    return patterns


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")], ids=["first", "second"])
def test_all_that_only_one_class_has_is_left_out_at_once(tmp_path, order):
    from transformers import BartConfig
    from transformers import BartForConditionalGeneration, BartForSequenceClassification

    sizes = {"vocab_size": 9, "d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    made_of = (BartForConditionalGeneration, BartForSequenceClassification)
    models = []
    for i, (n, cls) in enumerate(zip("ab", made_of)):
        config = BartConfig(**sizes, **layers, **heads, **tokens, forced_eos_token_id=2)
        models.append(made(cls, config, i, tmp_path/n))
    folders = [tmp_path/n for n in order]
    # a name without a part in front is a pattern, too
    patterns = left_out(refused("Leave what only some have out", *folders))
    assert {*patterns} == {"final_logits_bias", "classification_head*"}
    found = merge(folders, drop=patterns).tensors
    states = [m.state_dict() for m in models]
    assert {*found} == {n for n in states[0] if n in states[1] and n in load(tmp_path/"a")}
    for n, x in found.items():
        torch.testing.assert_close(x, (states[0][n] + states[1][n])/2)


def test_something_in_each_layer_is_one_pattern(tmp_path):
    for n in "ab":
        layers = {f"h.{i}.{k}.w": torch.ones(1) for i in range(3) for k in ("q", "k")}
        more = {f"h.{i}.gate.w": torch.ones(1) for i in range(3)} if n == "a" else {}
        save(tmp_path/n, {**layers, **more})
    patterns = left_out(refused("has no tensor 'h.0.gate.w'", tmp_path/"b", tmp_path/"a"))
    assert patterns == ["h.*.gate.*"]
    assert len(merge([tmp_path/"a", tmp_path/"b"], drop=patterns).tensors) == 6


def test_a_head_that_the_base_lacks(tmp_path):
    from transformers import BertForSequenceClassification, BertModel

    base = made(BertModel, bert(), 9, tmp_path/"base").state_dict()
    a, b = (made(BertForSequenceClassification, bert(), i, tmp_path/n) for i, n in enumerate("ab"))
    folders, how = [tmp_path/"a", tmp_path/"b"], {"base": tmp_path/"base", "scale": 0.5}
    assert "It can be merged whole" in refused("base: has no tensor 'classifier", *folders, **how)
    merge(folders, absent="renormalise", out=tmp_path/"o", **how)
    found = BertForSequenceClassification.from_pretrained(tmp_path/"o").state_dict()
    for n, x in found.items():
        mean = (a.state_dict()[n] + b.state_dict()[n])/2
        start = base.get(n.removeprefix("bert."), mean)
        torch.testing.assert_close(x, start + 0.5*(mean - start))


def test_one_matrix_under_two_names(tmp_path):
    a = {"norm": torch.ones(2), "embeddings.w": torch.ones(3, 2)}
    save(tmp_path/"a", a)
    save(tmp_path/"b", {"norm": a["norm"], "embedding.w": 3*a["embeddings.w"]})
    said = refused("If .embedding.w. is the same", tmp_path/"a", tmp_path/"b")
    assert "save both models with one version" in said
    save(tmp_path/"b", {"norm": a["norm"], "embeddings.w": 3*a["embeddings.w"]})
    found = merge([tmp_path/"a", tmp_path/"b"]).tensors["embeddings.w"]
    assert torch.equal(found, 2*a["embeddings.w"])


def test_several_models_are_no_path_with_commas(tmp_path, whole):
    assert "separated by spaces" in refused("no such folder", f"{whole},{whole}")
    assert "Check the path" in refused("no such folder or file", tmp_path/"no"/"such"/"place")
    is_one(whole, whole)


def test_a_file_without_tensors(tmp_path, whole):
    save_file({}, tmp_path/"x.safetensors")
    assert "Name a folder or file with weights" in refused("holds no tensors", tmp_path, whole)
    is_one(whole, whole)


def test_a_module_in_place_of_its_tensors(whole):
    module = torch.nn.ParameterDict(ONE)
    with pytest.raises(ValueError, match="ParameterDict is not a model.*\n.*`model.state_dict"):
        merge([module, whole])
    is_one(module.state_dict(), whole)


def test_what_is_no_tensor_in_memory(whole):
    with pytest.raises(ValueError, match="'v' is a list.*\n.*`model.state_dict"):
        merge([{**ONE, "v": [3.0]}, whole])
    is_one(torch.nn.ParameterDict(ONE).state_dict(), whole)


def test_a_pickle_that_was_not_allowed(tmp_path, whole):
    torch.save(ONE, tmp_path/"x.pt")
    said = refused("can run code when it is opened", tmp_path/"x.pt", whole)
    assert "(allow_pickle=True, --allow-pickle)" in said
    is_one(tmp_path/"x.pt", whole, allow_pickle=True)
    save_file(torch.load(tmp_path/"x.pt", weights_only=True), tmp_path/"x.safetensors")
    is_one(tmp_path/"x.safetensors", whole)


def test_a_pickle_of_a_list(tmp_path, whole):
    torch.save([ONE], tmp_path/"x.pt")
    said = refused("it holds a list", tmp_path/"x.pt", whole, allow_pickle=True)
    assert "Save a dict of names and tensors" in said
    torch.save(torch.load(tmp_path/"x.pt")[0], tmp_path/"x.pt")
    is_one(tmp_path/"x.pt", whole, allow_pickle=True)


def test_a_pickle_that_torch_does_not_read(tmp_path, whole):
    torch.save(ONE, tmp_path/"x.pt", pickle_protocol=4)
    said = refused("cannot be loaded as plain tensors", tmp_path/"x.pt", whole, allow_pickle=True)
    assert "Save it as safetensors" in said
    save_file(torch.load(tmp_path/"x.pt", weights_only=False), tmp_path/"x.safetensors")
    is_one(tmp_path/"x.safetensors", whole)


def test_a_whole_model_as_an_object(tmp_path, whole):
    torch.save(torch.nn.ParameterDict(ONE), tmp_path/"x.pt")
    said = refused("a whole model as an object", tmp_path/"x.pt", whole, allow_pickle=True)
    command = said.partition("where that code is: ")[2].removesuffix(".")
    model = torch.load(tmp_path/"x.pt", weights_only=False)
    exec(command, {"torch": torch, "model": model, "OTHER": tmp_path/"y.pt"})
    is_one(tmp_path/"y.pt", whole, allow_pickle=True)


def test_a_tensor_that_is_no_plain_numbers(tmp_path, whole):
    torch.save({**ONE, "v": ONE["v"].to_sparse()}, tmp_path/"x.pt")
    said = refused("'v' is .*, and no plain numbers", tmp_path/"x.pt", whole, allow_pickle=True)
    assert "Save the model as safetensors" in said
    held = torch.load(tmp_path/"x.pt", weights_only=True)
    save_file({n: x.to_dense() for n, x in held.items()}, tmp_path/"x.safetensors")
    is_one(tmp_path/"x.safetensors", whole)


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (b"PK\x03\x04" + bytes(60), "Name the model that it was made of, or convert it first"),
        (b"some words that are no tensors", "Name a file of tensors"),
    ],
    ids=["an archive", "a text"],
)
def test_something_else_as_safetensors(tmp_path, whole, held, says):
    (tmp_path/"x.safetensors").write_bytes(held)
    assert says in refused("and not safetensors", tmp_path/"x.safetensors", whole)
    save_file(ONE, tmp_path/"x.safetensors")
    is_one(tmp_path/"x.safetensors", whole)


def test_a_dtype_that_cannot_be_merged(tmp_path, whole):
    file = tmp_path/"x.safetensors"
    save_file(ONE, file)
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"C99"', 1))
    said = refused("has dtype 'C99', which cannot be merged", file, whole)
    assert "F32" in said.partition("Convert it to one of ")[2]
    save_file(ONE, file)
    is_one(file, whole)


def test_what_no_file_of_tensors_holds(tmp_path):
    strange = {**ONE, "__metadata__": torch.ones(1)}
    says = "has a name that safetensors files cannot hold"
    said = refused(says, strange, strange, out=tmp_path/"o")
    assert "merge in memory (out=None)" in said
    found = merge([strange, strange]).tensors
    assert all(torch.equal(found[n], x) for n, x in strange.items())
    waves = {**ONE, "w": torch.tensor([1 + 2j])}
    said = refused("'w' is torch.complex64, which", waves, waves, out=tmp_path/"o")
    assert "Leave it out of the models, or merge in memory" in said
    assert torch.equal(merge([waves, waves]).tensors["w"], waves["w"])
    merge([waves, waves], drop=["w"], out=tmp_path/"o")
    assert {*load(tmp_path/"o")} == {*ONE}


def test_places_of_files(tmp_path, monkeypatch):
    for out, says in (
        (tmp_path, "is a folder.\nName a file in a folder that exists"),
        (tmp_path/"no"/"x", "its folder does not exist.\nName a file in a folder that exists"),
    ):
        with pytest.raises(MergeError, match=says):
            free(out, folder=False)
    (tmp_path/"x").touch()
    with pytest.raises(MergeError, match="exists already.\nRemove it, or name another file"):
        free(tmp_path/"x", folder=False)
    assert free(tmp_path/"y", folder=False) == tmp_path/"y"
    (tmp_path/"x").unlink()
    assert free(tmp_path/"x", folder=False) == tmp_path/"x"


def test_the_current_folder_as_an_output(tmp_path, whole, monkeypatch):
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path/"here")
    assert "Name a folder in it" in refused("is the current folder", whole, whole, out=".")
    merge([whole, whole], out="in")
    assert {*load(tmp_path/"here"/"in")} == {*ONE}


def test_an_adapter_among_full_models(tmp_path):
    model = {"q.weight": torch.ones(3, 2)}
    base = save(tmp_path/"base", model, {"model_type": "toy"})
    adapter = tmp_path/"x"
    adapter.mkdir()
    name = "base_model.model.q.lora_"
    factors = {f"{name}A.weight": torch.ones(1, 2), f"{name}B.weight": torch.ones(3, 1)}
    save_file(factors, adapter/"adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    (adapter/"adapter_config.json").write_text(json.dumps(config))
    refused("(?s)adapter", adapter, base)
    found = merge([f"{base}+{adapter}", base]).tensors
    assert torch.equal(found["q.weight"], 1.5*model["q.weight"])


def test_heads_of_two_tasks(tmp_path):
    for n, k in (("a", 2), ("b", 3)):
        save(tmp_path/n, {**ONE, "classifier.weight": torch.ones(k, 2)})
    patterns = left_out(refused("Heads of different tasks", tmp_path/"a", tmp_path/"b"))
    is_one(tmp_path/"a", tmp_path/"b", drop=patterns)

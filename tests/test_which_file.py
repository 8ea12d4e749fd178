"""Which file of a folder is the model: each folder that people name in the wild is either opened
right, or answered with one sentence, and then its remedy is run."""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import save
from safetensors.torch import save_file

from frechet_merge import MergeError, load, merge


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(seed=0):
    return {"a.weight": randn(3, 2, seed=seed), "b.weight": randn(2, seed=seed + 9)}


def same(c, want):
    return set(c) == set(want) and all(torch.equal(c[n], want[n]) for n in want)


def says(match, path, **how):
    "The refusal of a path, which has to match and to be three lines at most."
    with pytest.raises(MergeError, match=match) as e:
        load(path, **how)
    assert len(str(e.value).splitlines()) <= 3
    return str(e.value)


def shards(folder, stem, tensors, of=None, index=None):
    "Two shards, with an index if it is named."
    folder.mkdir(exist_ok=True)
    where = {}
    for i, n in enumerate(tensors, 1):
        file = f"{stem}-{i:05d}-of-{of or len(tensors):05d}.safetensors"
        save_file({n: tensors[n]}, folder/file)
        where[n] = file
    if index:
        (folder/index).write_text(json.dumps({"weight_map": where}))
    return folder


class TestNames:
    "A folder with several files of weights."

    def test_shards_without_an_index_are_the_model(self, tmp_path):
        assert same(load(shards(tmp_path, "model", state())), state())

    def test_shards_without_an_index_of_which_one_is_missing(self, tmp_path):
        shards(tmp_path, "model", state(), of=3)
        says("model-00003-of-00003.safetensors is missing", tmp_path)

    def test_consolidated_beside_shards_without_an_index(self, tmp_path):
        shards(tmp_path, "model", state())
        save_file({"other": randn(2)}, tmp_path/"consolidated.safetensors")
        assert same(load(tmp_path), state())

    def test_stray_shards_are_named(self, tmp_path):
        index = "model.safetensors.index.json"
        a, b = (shards(tmp_path/n, "model", state(), None, index) for n in "ab")
        save_file(state(5), a/"model-00003-of-00003.safetensors")
        with pytest.warns(UserWarning, match="model-00003-of-00003.safetensors left behind"):
            out = merge([a, b], out=tmp_path/"o").out
        assert same(load(out), state())

    def test_a_variant_beside_the_model_is_named(self, tmp_path):
        for n in "ab":
            save(tmp_path/n, state())
            save_file(state(5), tmp_path/n/"model.fp16.safetensors")
        with pytest.warns(UserWarning, match="model.fp16.safetensors left behind"):
            out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
        assert same(load(out), state())

    def test_a_variant_alone_keeps_its_name(self, tmp_path):
        for n in "ab":
            (tmp_path/n).mkdir()
            save_file(state(), tmp_path/n/"model.fp16.safetensors")
        out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
        assert (out/"model.fp16.safetensors").exists() and same(load(out), state())

    def test_two_variants_alone(self, tmp_path):
        for n in ("fp16", "non_ema"):
            save_file(state(), tmp_path/f"model.{n}.safetensors")
        says("(?s)2 .safetensors files and no index: model.fp16.*Name the file", tmp_path)
        assert same(load(tmp_path/"model.fp16.safetensors"), state())

    def test_a_variant_in_shards(self, tmp_path):
        from transformers import BertConfig, BertModel

        models = []
        for seed, n in enumerate("ab"):
            torch.manual_seed(seed)
            sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
            models.append(BertModel(BertConfig(vocab_size=30, intermediate_size=8, **sizes)))
            models[-1].save_pretrained(tmp_path/n, variant="fp16", max_shard_size="3kB")
        out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o", shard_size=3000).out
        assert (out/"model.safetensors.index.fp16.json").exists()
        found = BertModel.from_pretrained(out, variant="fp16").state_dict()
        a, b = (m.state_dict() for m in models)
        assert all(torch.allclose(found[n], (a[n] + b[n])/2, atol=1e-7) for n in a)

    def test_an_index_of_a_variant_may_be_named(self, tmp_path):
        index = "model.safetensors.index.fp16.json"
        assert same(load(shards(tmp_path, "model.fp16", state(), None, index)/index), state())

    def test_consolidated_alone_keeps_its_name(self, tmp_path):
        for n in "ab":
            (tmp_path/n).mkdir()
            save_file(state(), tmp_path/n/"consolidated.safetensors")
            (tmp_path/n/"params.json").write_text("{}")
        out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
        assert (out/"consolidated.safetensors").exists() and (out/"params.json").exists()

    def test_a_pickled_model_beside_an_adapter(self, tmp_path):
        torch.save(state(), tmp_path/"pytorch_model.bin")
        save_file({"x.lora_A.weight": randn(1, 2)}, tmp_path/"adapter_model.safetensors")
        (tmp_path/"adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
        says(r"full model \(pytorch_model.bin\) and an adapter", tmp_path)
        assert same(load(tmp_path/"pytorch_model.bin", allow_pickle=True), state())

    def test_what_training_left_is_no_model(self, tmp_path):
        for n in ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt"):
            torch.save(state(), tmp_path/n)
        says("holds no safetensors weights", tmp_path, allow_pickle=True)
        torch.save(state(), tmp_path/"odd_name.bin")
        assert same(load(tmp_path, allow_pickle=True), state())


class TestPlaces:
    "A folder above, beside or around the one that is meant."

    def test_the_cache_of_the_hub(self, tmp_path):
        repo = tmp_path/"models--org--name"
        for i, n in enumerate(("old", "new")):
            save(repo/"snapshots"/n, state(i))
        says("(?s)does not say which snapshot is main.*Name the folder of a snapshot", repo)
        assert same(load(repo/"snapshots"/"new"), state(1))
        (repo/"refs").mkdir()
        (repo/"refs"/"main").write_text("old")
        assert same(load(repo), state(0))

    def test_a_run_with_checkpoints_alone(self, tmp_path):
        for step in (500, 1000, 90):
            save(tmp_path/f"checkpoint-{step}", state(step))
        said = says("checkpoint-1000 does", tmp_path)
        assert same(load(said.split("but ")[1].split(" does")[0]), state(1000))

    def test_a_run_with_a_model_and_checkpoints(self, tmp_path):
        save(tmp_path/"run"/"checkpoint-5", state(5))
        save(tmp_path/"run", state(0))
        assert same(load(tmp_path/"run"), state(0))
        out = merge([tmp_path/"run", tmp_path/"run"], out=tmp_path/"o").out
        assert not (out/"checkpoint-5").exists()

    @pytest.mark.parametrize("between", ["model", "a/b/model", "snapshots/abc"])
    def test_the_folder_above(self, tmp_path, between):
        save(tmp_path/between, state())
        says(f"{between} does.\nName that folder", tmp_path)
        assert same(load(tmp_path/between), state())

    def test_the_folder_above_several(self, tmp_path):
        for n in ("one", "two"):
            save(tmp_path/n, state())
        says("(?s)folders that do: .*one, .*two.\nName one of them", tmp_path)

    def test_the_folder_above_a_pipeline(self, tmp_path):
        save(tmp_path/"pipe"/"unet", state())
        (tmp_path/"pipe"/"model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
        says("pipe does.\nName that folder", tmp_path)

    def test_the_slices_of_deepspeed(self, tmp_path):
        (tmp_path/"checkpoint-9"/"global_step9").mkdir(parents=True)
        (tmp_path/"checkpoint-9"/"zero_to_fp32.py").touch()
        torch.save({}, tmp_path/"checkpoint-9"/"global_step9"/"mp_rank_00_model_states.pt")
        says("(?s)slices of DeepSpeed.*zero_to_fp32.py", tmp_path)
        says("(?s)slices of DeepSpeed.*zero_to_fp32.py", tmp_path/"checkpoint-9")

    def test_the_slices_of_torch(self, tmp_path):
        import torch.distributed.checkpoint as dcp

        folder = tmp_path/"run"/"pytorch_model_fsdp_0"
        dcp.save(state(), checkpoint_id=folder, no_dist=True)
        said = says("(?s)distributed checkpoints.*dcp_to_torch", tmp_path/"run")
        # the remedy, as it is printed
        words = said.split("together: ")[1].rstrip(".").replace("FILE.pt", str(tmp_path/"f.pt"))
        done = subprocess.run([sys.executable, *words.split()[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert same(load(tmp_path/"f.pt", allow_pickle=True), state())

    def test_slices_of_meta(self, tmp_path):
        folder = tmp_path/"m"/"original"
        folder.mkdir(parents=True)
        for i in range(2):
            torch.save(state(), folder/f"consolidated.{i:02d}.pth")
        says("2 slices", folder)

    def test_files_of_torchtune(self, tmp_path):
        whole, files = state(), [tmp_path/f"hf_model_000{i}_0.pt" for i in (1, 2)]
        first, *others = whole
        torch.save({first: whole[first]}, files[0])
        torch.save({n: whole[n] for n in others}, files[1])
        command = says("2 files", tmp_path, allow_pickle=True).partition("names: ")[2]
        names = {"torch": torch, "FILES": files, "OTHER": tmp_path/"whole.pt"}
        exec(command.removesuffix("."), names)
        assert same(load(tmp_path/"whole.pt", allow_pickle=True), whole)

    def test_shards_of_torchtune_become_those_of_transformers(self, tmp_path):
        for n in "ab":
            (tmp_path/n).mkdir()
            for i, (name, x) in enumerate(state().items(), 1):
                file = f"ft-model-{i:05d}-of-{len(state()):05d}.safetensors"
                save_file({name: x}, tmp_path/n/file)
        out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
        assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]

    def test_shards_of_strange_names_have_no_common_one(self, tmp_path):
        for n in "ab":
            (tmp_path/n).mkdir()
            save_file({"x": torch.ones(2)}, tmp_path/n/"model-1.safetensors")
            save_file({"y": torch.ones(2)}, tmp_path/n/"model-2.safetensors")
            where = {"x": "model-1.safetensors", "y": "model-2.safetensors"}
            index = json.dumps({"weight_map": where})
            (tmp_path/n/"model.safetensors.index.json").write_text(index)
        out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
        assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]

    def test_the_original_beside_the_model_is_named(self, tmp_path):
        for n in "ab":
            save(tmp_path/n, state())
            (tmp_path/n/"original").mkdir()
            torch.save(state(), tmp_path/n/"original"/"consolidated.00.pth")
        with pytest.warns(UserWarning, match="original/ left behind"):
            out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
        assert not (out/"original").exists()


    def test_a_run_that_ended(self, tmp_path):
        save(tmp_path/"checkpoint-5", state(5))
        save(tmp_path/"final", state())
        says("final does", tmp_path)

    def test_a_run_of_lightning(self, tmp_path):
        folder = tmp_path/"lightning_logs"/"version_0"/"checkpoints"
        folder.mkdir(parents=True)
        torch.save({"state_dict": state()}, folder/"epoch=1.ckpt")
        said = says("but epoch=1.ckpt", tmp_path)
        named = said.split(", as ")[1].split(", with")[0]
        assert same(load(named, allow_pickle=True), state())

    def test_a_text_beside_the_model(self, tmp_path):
        save(tmp_path, state(), {"model_type": "toy"})
        said = says("is a text beside a model", tmp_path/"config.json")
        assert same(load(said.split("folder, ")[1].removesuffix(".")), state())

    def test_one_shard_is_not_all(self, tmp_path):
        shards(tmp_path, "model", state())
        with pytest.warns(UserWarning, match="is one of 2 files of a model"):
            load(tmp_path/"model-00001-of-00002.safetensors")

    def test_a_full_model_where_an_adapter_was(self, tmp_path):
        for n in "ab":
            save(tmp_path/n, state(), {"model_type": "toy"})
            (tmp_path/n/"adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
        assert load(tmp_path/"a").adapter is None
        out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
        assert same(load(out), state()) and not (out/"adapter_config.json").exists()

    def test_a_part_of_several_files(self, tmp_path):
        for n in ("one", "two"):
            save_file(state(), save(tmp_path/"vae", state())/f"{n}.safetensors")
        (tmp_path/"vae"/"model.safetensors").unlink()
        (tmp_path/"model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
        says("(?s)vae: holds 2.*Leave one of them", tmp_path)
        (tmp_path/"vae"/"two.safetensors").unlink()
        assert set(load(tmp_path)) == {"vae/a.weight", "vae/b.weight"}


class TestFormats:
    "Files that are not tensors of torch."

    @pytest.mark.parametrize(
        "name, says_",
        [
            ("model-Q4_K_M.gguf", "GGUF"),
            ("flax_model.msgpack", "Flax, .*from_flax=True"),
            ("tf_model.h5", "TensorFlow, .*from_tf=True"),
            ("model.onnx", "ONNX"),
            ("weights.npz", "NumPy, as MLX"),
            ("openvino_model.bin", "OpenVINO"),
            ("ggml-base.bin", "GGML"),
            ("model.nemo", "NeMo"),
            ("model.onnx_data", "ONNX"),
        ],
    )
    def test_of_others_are_called_by_their_names(self, tmp_path, name, says_):
        (tmp_path/name).write_bytes(b"x"*600)
        match = f"(?s){name}: is in the format of {says_}"
        says(match, tmp_path, allow_pickle=True)
        says(match, tmp_path/name, allow_pickle=True)

    def test_in_a_folder_of_the_folder(self, tmp_path):
        (tmp_path/"onnx").mkdir()
        (tmp_path/"onnx"/"model.onnx").touch()
        says("onnx/model.onnx: is in the format of ONNX", tmp_path)

    def test_arrays_of_mlx_are_converted(self, tmp_path, monkeypatch):
        from safetensors import numpy as snp

        np.savez(tmp_path/"weights.npz", **{n: x.numpy() for n, x in state().items()})
        assert "safetensors.numpy.save_file(dict(numpy.load(" in says("MLX", tmp_path)
        held = dict(np.load(tmp_path/"weights.npz"))
        snp.save_file(held, tmp_path/"model.safetensors")
        assert same(load(tmp_path), state())

    @pytest.mark.parametrize("name", ["last.ckpt", "model_best.pth.tar"])
    def test_another_pickle_in_a_folder(self, tmp_path, name):
        torch.save(state(), tmp_path/name)
        said = says(f"(?s)but {name}.*that file", tmp_path, allow_pickle=True)
        named = said.split(", as ")[1].split(", with")[0]
        assert same(load(named, allow_pickle=True), state())


class TestPickles:
    "What torch.save made, of what it was handed."

    def of(self, tmp_path, held, name="m.pt", **how):
        torch.save(held, tmp_path/name, **how)
        return load(tmp_path/name, allow_pickle=True)

    @pytest.mark.parametrize(
        "key",
        ["state_dict", "model", "model_state_dict", "module", "params", "params_ema", "ema"],
    )
    def test_of_a_training_run(self, tmp_path, key):
        held = {"epoch": 3, key: state(), "optimizer": {"state": {}}, "args": {"lr": 0.1}}
        assert same(self.of(tmp_path, held), state())

    def test_with_wrappers_in_its_names(self, tmp_path):
        held = {"state_dict": {f"module.{n}": x for n, x in state().items()}, "epoch": 1}
        assert same(self.of(tmp_path, held), state())

    def test_of_before_zips(self, tmp_path):
        assert same(self.of(tmp_path, state(), _use_new_zipfile_serialization=False), state())

    @pytest.mark.parametrize("pair", [("state_dict", "state_dict_ema"), ("params", "params_ema")])
    def test_an_average_beside_is_named(self, tmp_path, pair):
        held = {pair[0]: state(1), pair[1]: state(2)}
        with pytest.warns(UserWarning, match=f"'{pair[0]}' is read, and not '{pair[1]}'"):
            assert same(self.of(tmp_path, held), state(1))
        # the remedy
        alone = torch.load(tmp_path/"m.pt", weights_only=True)[pair[1]]
        assert same(self.of(tmp_path, alone, "alone.pt"), state(2))

    def test_several_sets(self, tmp_path):
        match = "(?s)several sets of tensors, 'model', 'net'.*'model'"
        with pytest.raises(MergeError, match=match):
            self.of(tmp_path, {"model": state(1), "net": state(2)})
        alone = torch.load(tmp_path/"m.pt", weights_only=True)["model"]
        assert same(self.of(tmp_path, alone, "alone.pt"), state(1))

    def test_under_a_name_that_nobody_knows(self, tmp_path):
        with pytest.raises(MergeError, match="tensors under 'teacher', 'student'"):
            self.of(tmp_path, {"teacher": state(1), "student": state(2), "epoch": 1})
        alone = torch.load(tmp_path/"m.pt", weights_only=True)["teacher"]
        assert same(self.of(tmp_path, alone, "alone.pt"), state(1))

    def test_two_levels_down(self, tmp_path):
        assert same(self.of(tmp_path, {"model": {"state_dict": state(), "n": 1}}), state())

    def test_with_a_number_among_its_tensors(self, tmp_path):
        with pytest.raises(MergeError, match="(?s)'epoch' is a int.*isinstance"):
            self.of(tmp_path, {**state(), "epoch": 3})
        held = torch.load(tmp_path/"m.pt", weights_only=True)
        held = {n: x for n, x in held.items() if isinstance(x, torch.Tensor)}
        assert same(self.of(tmp_path, held, "alone.pt"), state())

    def test_the_remedy_where_there_are_objects(self, tmp_path):
        held = {"state_dict": state(1), "ema": state(2), "hyper_parameters": Settings(lr=1)}
        with pytest.warns(UserWarning, match=r"weights_only=False\)\['ema'\].*if you trust it"):
            assert same(self.of(tmp_path, held), state(1))
        alone = torch.load(tmp_path/"m.pt", weights_only=False)["ema"]
        assert same(self.of(tmp_path, alone, "alone.pt"), state(2))

    @pytest.mark.parametrize("kind", ["bin", "safetensors"])
    def test_an_index_opens_no_pickle(self, tmp_path, kind):
        torch.save(state(), tmp_path/"shard.bin")
        index = tmp_path/("pytorch_model.bin" if kind == "bin" else "model.safetensors")
        index = index.with_name(index.name + ".index.json")
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state(), "shard.bin")}))
        says("shard.bin: is a pickle, which can run code", index)
        assert same(load(index, allow_pickle=True), state())

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "x.ckpt", "x.pt"])
    def test_safetensors_under_its_name(self, tmp_path, name):
        save_file(state(), tmp_path/name)
        assert same(load(tmp_path/name), state())

    @pytest.mark.parametrize("name", ["model_best.pth.tar", "x.pyth", "x.weights", "x", "x.tar"])
    @pytest.mark.parametrize("is_zip", [True, False])
    def test_under_any_name(self, tmp_path, name, is_zip):
        held = {"epoch": 1, "model_state": state()}
        torch.save(held, tmp_path/name, _use_new_zipfile_serialization=is_zip)
        says("is a pickle, which can run code", tmp_path/name)
        assert same(load(tmp_path/name, allow_pickle=True), state())

    def test_archives_are_no_pickles(self, tmp_path):
        with tarfile.open(tmp_path/"m.tar", "w") as f:
            f.addfile(tarfile.TarInfo("tensors"), io.BytesIO())
        says("(?s)an archive.*Unpack it", tmp_path/"m.tar", allow_pickle=True)
        with zipfile.ZipFile(tmp_path/"m.zip", "w") as f:
            f.writestr("model/config.json", "{}")
        says("(?s)an archive.*unzip", tmp_path/"m.zip", allow_pickle=True)

    def test_settings_that_are_objects_are_not_made(self, tmp_path):
        held = {"state_dict": state(), "hyper_parameters": Settings(lr=0.1), "args": Filled(x=1)}
        held["where"] = argparse.Namespace(path="x")
        Settings.made = 0
        assert same(self.of(tmp_path, held, "last.ckpt"), state())
        assert Settings.made == 0

    def test_a_program_is_not_run(self, tmp_path):
        held = {"state_dict": state(), "bad": Runs(tmp_path/"ran")}
        assert same(self.of(tmp_path, held), state())
        with pytest.raises(MergeError, match="whole model as an object"):
            self.of(tmp_path, Runs(tmp_path/"ran"))
        for held in ({"w": Runs(tmp_path/"ran")}, {**state(), "w": Runs(tmp_path/"ran")}):
            with pytest.raises(MergeError, match="cannot be loaded as plain tensors"):
                self.of(tmp_path, held)
        assert not (tmp_path/"ran").exists()

    def test_a_whole_model(self, tmp_path):
        model = torch.nn.Linear(2, 3)
        with pytest.raises(MergeError, match="(?s)whole model as an object.*state_dict"):
            self.of(tmp_path, model)
        assert same(self.of(tmp_path, model.state_dict(), "s.pt"), model.state_dict())

    def test_a_program_of_torchscript(self, tmp_path):
        torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path/"m.pt")
        says("(?s)TorchScript.*torch.jit.load", tmp_path/"m.pt", allow_pickle=True)
        held = torch.jit.load(tmp_path/"m.pt").state_dict()
        assert set(self.of(tmp_path, held, "s.pt")) == {"weight", "bias"}

    @pytest.mark.parametrize(
        "data, says_",
        [
            (b"", "is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
            (b"<!DOCTYPE html>", "no pickle of torch"),
        ],
    )
    def test_of_other_bytes(self, tmp_path, data, says_):
        (tmp_path/"pytorch_model.bin").write_bytes(data)
        says(says_, tmp_path, allow_pickle=True)

    def test_that_ends_before_its_end(self, tmp_path):
        torch.save({"w": randn(500)}, tmp_path/"m.pt")
        data = (tmp_path/"m.pt").read_bytes()
        (tmp_path/"m.pt").write_bytes(data[: len(data)//2])
        says("damaged or incomplete", tmp_path/"m.pt", allow_pickle=True)

    def test_a_tar(self, tmp_path):
        with tarfile.open(tmp_path/"m.pt", "w", format=tarfile.USTAR_FORMAT) as f:
            f.addfile(tarfile.TarInfo("tensors"), io.BytesIO())
        says("is a tar", tmp_path/"m.pt", allow_pickle=True)


class Settings:
    "What a trainer keeps beside the weights."

    made = 0

    def __init__(self, **how):
        self.__dict__.update(how)

    def __setstate__(self, held):
        Settings.made += 1


class Filled(OrderedDict):
    "As Lightning keeps its hyperparameters."


class Runs:
    "A pickle that writes a file if it is opened carelessly."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_in_place_of_json(tmp_path, name):
    shards(tmp_path, "model", state(), None, "model.safetensors.index.json")
    (tmp_path/name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(MergeError, match="git lfs pull"):
        merge([tmp_path, tmp_path], out=tmp_path/"o")

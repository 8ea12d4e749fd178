"""Running statistics of BatchNorm, collected anew on data: in a module, and in what a merge
writes."""

import json

import numpy as np
import pytest
import torch
from conftest import cli
from safetensors.torch import load_file
from torch import nn

from frechet_merge import merge
from frechet_merge.curvature.calibration import Calibration, recalibrate
from frechet_merge.merging.merge import make
from frechet_merge.merging.record import Record
from frechet_merge.messages import MergeError


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 3),
        nn.BatchNorm2d(2, momentum=None),
    )  # fmt: skip


def records(module):
    return {n: x.clone() for n, x in module.named_buffers()}


class TestAModule:
    def test_update_bn_of_torch_is_the_oracle(self):
        batches = list(torch.randn(4, 8, 3, 9, 9))
        ours, theirs = net().eval(), net()
        # it trains dropout, too, which changes what is measured
        theirs[3] = nn.Identity()
        done = recalibrate(ours, batches)
        torch.optim.swa_utils.update_bn(batches, theirs)
        torch.testing.assert_close(records(ours), records(theirs))
        assert (done.layers, done.examples, done.batches) == (["1", "5"], 32, 4)

    def test_batches_count_by_what_is_in_them(self):
        x = torch.randn(20, 3, 9, 9)
        m = net()
        recalibrate(m, [(x[:16], None), (x[16:], None)])
        want = m[0](x).transpose(0, 1).flatten(1).mean(1)
        torch.testing.assert_close(m[1].running_mean, want.detach(), rtol=0, atol=1e-5)

    def test_all_else_is_as_before(self):
        m = net()
        m[4].eval()
        modes = [x.training for x in m.modules()]
        before = {n: p.clone() for n, p in m.named_parameters()}
        recalibrate(m, ({"input": x} for x in torch.randn(2, 4, 3, 9, 9)))
        assert [x.training for x in m.modules()] == modes
        assert (m[1].momentum, m[5].momentum) == (0.1, None)
        assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())
        assert not m[1]._forward_pre_hooks

    @pytest.mark.parametrize(
        "batches, says",
        [
            ([], "no examples"),
            ([torch.randn(4, 3, 9, 9), torch.full((4, 3, 9, 9), torch.nan)], "not finite"),
        ],
    )
    def test_what_fails_changes_nothing(self, batches, says):
        m = net()
        before = records(m)
        with pytest.raises(MergeError, match=says):
            recalibrate(m, batches)
        torch.testing.assert_close(records(m), before, rtol=0, atol=0)

    def test_one_example_has_no_variance_and_two_have(self):
        m = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        with pytest.raises(MergeError, match="at least two examples a batch"):
            recalibrate(m, [torch.randn(1, 3)])
        assert recalibrate(m, [torch.randn(2, 3)]).examples == 2

    def test_without_batchnorm_it_is_refused(self):
        with pytest.raises(MergeError, match="LayerNorm has no BatchNorm"):
            recalibrate(nn.LayerNorm(3), [torch.randn(2, 3)])

    def test_a_layer_that_is_not_reached_is_named_and_kept(self):
        m = nn.ModuleDict({"used": nn.BatchNorm1d(2), "spare": nn.BatchNorm1d(2)})
        m["spare"].running_mean.fill_(7)
        with pytest.warns(UserWarning, match="1 layers were not reached.*spare"):
            done = recalibrate(m, [torch.randn(4, 2)], lambda m, x: m["used"](x))
        assert done.layers == ["used"] and m["spare"].running_mean.tolist() == [7, 7]

    def test_a_layer_that_is_used_twice_counts_both(self):
        m = nn.BatchNorm1d(2)
        a, b = torch.randn(8, 2), 5 + torch.randn(8, 2)
        recalibrate(m, [a], lambda m, x: (m(x), m(b)))
        torch.testing.assert_close(m.running_mean, torch.cat([a, b]).mean(0))


def classifier(folder, seed, kind="resnet"):
    from transformers import ConvNextImageProcessorPil, MobileNetV2Config, RegNetConfig
    from transformers import MobileNetV2ForImageClassification, RegNetForImageClassification
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3}
    torch.manual_seed(seed)
    if kind == "resnet":
        m = ResNetForImageClassification(ResNetConfig(**sizes))
    elif kind == "regnet":
        m = RegNetForImageClassification(RegNetConfig(groups_width=4, **sizes))
    else:
        config = MobileNetV2Config(depth_multiplier=0.1, image_size=32, num_labels=3)
        m = MobileNetV2ForImageClassification(config)
    # as trained: their statistics are those of what they see
    recalibrate(m, [{"pixel_values": torch.randn(16, 3, 32, 32)}])
    m.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "Two classifiers of each kind, and pictures in folders of classes and in a table."
    pytest.importorskip("transformers")
    Image = pytest.importorskip("PIL.Image")
    from datasets import Dataset, Features
    from datasets import Image as Picture

    root = tmp_path_factory.mktemp("pictures")
    for kind in ("resnet", "regnet", "mobilenet"):
        for i, name in enumerate("ab"):
            classifier(root/f"{kind}_{name}", i, kind)
    g, paths = np.random.default_rng(0), []
    for i in range(33):
        (root/"data"/str(i % 3)).mkdir(parents=True, exist_ok=True)
        paths.append(root/"data"/str(i % 3)/f"{i}.png")
        Image.fromarray(g.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(paths[-1])
    table = Dataset.from_dict({"image": list(map(str, paths))}, Features({"image": Picture()}))
    table.to_parquet(root/"data.parquet")
    lines = [json.dumps({"file_name": str(p.relative_to(root))}) for p in paths]
    (root/"data.jsonl").write_text("\n".join(lines))
    return root


def measured(folder, data, size=32):
    "The statistics that update_bn of torch gives a model on all pictures."
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    m = AutoModelForImageClassification.from_pretrained(folder)
    for layer in m.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    images = [Image.open(p) for p in sorted(data.rglob("*.png"))]
    x = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    torch.optim.swa_utils.update_bn([x["pixel_values"]], m)
    return {n: b for n, b in m.named_buffers() if "running" in n}


@pytest.mark.parametrize("kind", ["resnet", "regnet", "mobilenet"])
def test_what_is_written_are_the_statistics_of_the_merged_model(here, tmp_path, kind):
    models = [here/f"{kind}_a", here/f"{kind}_b"]
    asked = Calibration(str(here/"data"), batch_size=64)
    merge(models, calibrate=asked, out=tmp_path/"o", shard_size=2000)
    plain = merge(models).tensors
    shards = sorted((tmp_path/"o").glob("*.safetensors"))
    found = {n: x for f in shards for n, x in load_file(f).items()}
    assert found.keys() == {*plain} and len(shards) > 1
    want = measured(tmp_path/"o", here/"data")
    for name, x in found.items():
        if "running" in name:
            torch.testing.assert_close(x, want[name], rtol=1e-4, atol=1e-5)
        elif "num_batches" in name:
            assert int(x) == 1
        else:
            assert torch.equal(x, plain[name])


@pytest.mark.parametrize("data", ["data", "data.parquet", "data.jsonl"])
def test_the_command_says_it_and_its_record_makes_it_again(here, tmp_path, data):
    words = ["merge", "resnet_a", "resnet_b", "-o", tmp_path/"o", "--calibrate", data]
    code, out, err = cli(*words, "--calibrate-samples", "20", cwd=here)
    assert code == 0, err
    assert f"calibrated: 8 BatchNorm layers on 20 pictures of {data}" in out
    record = Record.read(tmp_path/"o")
    assert record.calibrated["examples"] == 20
    assert f"--calibrate {data} --calibrate-samples 20" in record.command
    assert "calibrated" in (tmp_path/"o"/"README.md").read_text()


def test_a_record_with_pictures_runs_again(here, tmp_path, monkeypatch):
    monkeypatch.chdir(here)
    merge(["resnet_a", "resnet_b"], calibrate="data", out=tmp_path/"o")
    record = Record.read(tmp_path/"o")
    make(record.again(), record.output(tmp_path/"again"))
    one, two = (load_file(tmp_path/x/"model.safetensors") for x in ("o", "again"))
    assert all(torch.equal(one[n], two[n]) for n in one)


class TestRefused:
    "Before anything is written."

    def test_no_batchnorm(self, here, tmp_path):
        from transformers import ConvNextConfig, ConvNextForImageClassification

        config = ConvNextConfig(num_stages=2, hidden_sizes=[4, 8], depths=[1, 1])
        for name in "ab":
            ConvNextForImageClassification(config).save_pretrained(tmp_path/name)
        models = [tmp_path/"a", tmp_path/"b"]
        with pytest.raises(MergeError, match="ConvNextForImage.* has no BatchNorm.*\nMerge it w"):
            merge(models, calibrate=here/"data", out=tmp_path/"o")
        assert not (tmp_path/"o").exists()
        assert merge(models, out=tmp_path/"o").out

    def test_no_pictures(self, here, tmp_path):
        models = [here/"resnet_a", here/"resnet_b"]
        (tmp_path/"texts.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
        for data, says in (
            (tmp_path/"absent.jsonl", "there is no such file"),
            (tmp_path/"texts.jsonl", "no column has pictures, among text"),
        ):
            with pytest.raises(MergeError, match=says):
                merge(models, calibrate=data, out=tmp_path/"o")
        assert not (tmp_path/"o").exists()

    def test_a_file_that_is_no_picture_leaves_nothing_behind(self, here, tmp_path):
        (tmp_path/"data").mkdir()
        for i in range(2):
            (tmp_path/"data"/f"{i}.png").write_text("no picture")
        with pytest.raises(MergeError, match="cannot be opened as a picture"):
            merge(
                [here/"resnet_a", here/"resnet_b"], calibrate=tmp_path/"data", out=tmp_path/"o"
            )
        assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]

    def test_in_memory(self, here):
        with pytest.raises(ValueError, match="name a folder .*recalibrate"):
            merge([here/"resnet_a", here/"resnet_b"], calibrate=here/"data")

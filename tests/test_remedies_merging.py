"""What an error of `merging` offers, or one of statistics, is done on the input that caused it, and
gives what it promises."""

import json

import pytest
import torch
from conftest import cli, save
from safetensors.torch import load_file, save_file

from frechet_merge import MergeError, load, merge
from frechet_merge.curvature.collecting import Statistics

BASE = {"layers.0.w": torch.tensor([[1.0, 1.0]]), "v": torch.tensor([[2.0]])}
A = {"layers.0.w": torch.tensor([[2.0, 5.0]]), "v": torch.tensor([[4.0]])}
B = {"layers.0.w": torch.tensor([[6.0, 1.0]]), "v": torch.tensor([[8.0]])}


def refused(says, call, *args, **how):
    "A call is refused in these words, of three lines at most."
    with pytest.raises(ValueError, match=says) as e:
        call(*args, **how)
    assert len(str(e.value).splitlines()) <= 3
    return str(e.value)


def summed(a, b):
    "The base and a·(A − BASE) + b·(B − BASE)."
    return {n: x + a*(A[n] - x) + b*(B[n] - x) for n, x in BASE.items()}


def mean(a, b):
    return {n: (a*A[n] + b*B[n])/(a + b) for n in A}


def is_same(found, want):
    assert found.keys() == want.keys()
    for n, x in want.items():
        torch.testing.assert_close(found[n], x, msg=n)


# what is asked for, how it is refused, what is asked for instead, and what it gives
ASKED = {
    "negative shares": (
        {"weights": [2, -1]},
        "--sum 2,-1 ",
        {"sum": [2, -1], "base": BASE},
        summed(2, -1),
    ),
    "an empty list over depth": (
        {"weights": [[], [1]]},
        "a list of values over depth is empty: give at least one",
        {"weights": [[3], [1]]},
        mean(3, 1),
    ),
    "one coefficient of two": (
        {"sum": [1], "base": BASE},
        "1 coefficients .* for 2 models: give one per model",
        {"sum": [1, 1], "base": BASE},
        summed(1, 1),
    ),
    "one weight of a pattern": (
        {"weights": {"*": 1}},
        "give one number per model, in a list",
        {"weights": {"*": [1, 1]}},
        mean(1, 1),
    ),
    "a pattern for some": (
        {"sum": {"v": [1, 1]}, "base": BASE},
        "Give the others theirs: {…, '\\*': \\[1, 1\\]}",
        {"sum": {"v": [1, 1], "*": [1, 1]}, "base": BASE},
        summed(1, 1),
    ),
    "a sum without a base": (
        {"sum": [1, 1]},
        "Name what the models were trained from: base=",
        {"sum": [1, 1], "base": BASE},
        summed(1, 1),
    ),
    "a reflection without a base": (
        {"sum": [1.5, -0.5], "geometry": "sphere"},
        "reflects a model about the base",
        {"sum": [1.5, -0.5], "base": BASE},
        summed(1.5, -0.5),
    ),
    "a scale without a base": (
        {"scale": 0.5},
        r"give base= \(--base\) too",
        {"scale": 0.5, "base": BASE},
        summed(0.25, 0.25),
    ),
    "a sum of sums": (
        {"geometry": "epimer", "sum": [1, 1], "base": BASE},
        r"Give it weights and a scale \(--weights, --scale\)",
        {"geometry": "euclidean", "weights": [1, 1], "scale": 2, "base": BASE},
        summed(1, 1),
    ),
    "shares and coefficients": (
        {"weights": [1, 1], "sum": [1, 1], "base": BASE},
        "give one of them",
        {"sum": [1, 1], "base": BASE},
        summed(1, 1),
    ),
    "another name of a dtype": (
        {"dtype": "int8"},
        "use bf16, fp16, fp32 or fp64",
        {"dtype": "fp32"},
        mean(1, 1),
    ),
    "another executor": (
        {"executor": "gpu"},
        "use 'serial', 'threads', 'processes', 'ray', or a function",
        {"executor": "threads"},
        mean(1, 1),
    ),
    "no geometry": (
        {"geometry": torch.nn.Identity()},
        "pass an instance, such as Euclidean",
        {"geometry": "euclidean"},
        mean(1, 1),
    ),
    "fp8 in memory": (
        {"dtype": "fp8"},
        r"name a folder \(out=\)",
        {"dtype": "fp32"},
        mean(1, 1),
    ),
    "a pattern that decides nothing": (
        {"weights": {"*": [1, 1], "v": [1, 3]}},
        "put this one first",
        {"weights": {"v": [1, 3], "*": [1, 1]}},
        {**mean(1, 1), "v": mean(1, 3)["v"]},
    ),
    "a pattern that matches nothing": (
        {"weights": {"layer.0.w": [1, 3], "*": [1, 1]}},
        "The nearest name is 'layers.0.w'",
        {"weights": {"layers.0.w": [1, 3], "*": [1, 1]}},
        {**mean(1, 1), "layers.0.w": mean(1, 3)["layers.0.w"]},
    ),
}


@pytest.mark.parametrize("what", ASKED)
def test_what_is_asked_for_in_another_way(what):
    wrong, says, right, want = ASKED[what]
    refused(says, merge, [A, B], **wrong)
    is_same(merge([A, B], **right).tensors, want)


def test_weights_over_depth_without_layers():
    models = [{"v": A["v"]}, {"v": B["v"]}]
    refused("Give them by pattern: {pattern: …}", merge, models, weights=[[1, 0], [0, 1]])
    found = merge(models, weights={"*": [1, 3]}).tensors
    assert torch.equal(found["v"], mean(1, 3)["v"])


def test_a_tensor_whose_models_have_no_weight():
    models = [{**A, "x": torch.ones(2)}, B]
    how = {"absent": "renormalise"}
    refused("(?s)'x': .*Give one of them a weight", merge, models, weights=[0, 1], **how)
    found = merge(models, weights=[1, 1], **how).tensors
    is_same(found, {**mean(1, 1), "x": torch.ones(2)})


def test_a_model_that_the_sum_of_epimer_takes_away(tmp_path):
    said = refused("alone with --scale -1", merge, [A, B], "epimer", base=BASE, sum=[1, -1])
    assert "and what that wrote with the others" in said
    save(tmp_path/"away", dict(merge([B], base=BASE, scale=-1).tensors))
    found = merge([A, tmp_path/"away"], base=BASE, weights=[1, 1], scale=2).tensors
    is_same(found, summed(1, -1))


def test_a_number_that_a_dtype_cannot_hold():
    large = [{"w": torch.tensor([x])} for x in (6e4, 8e4)]
    said = refused("would be written with 1 values", merge, large, dtype="fp16")
    assert "Write a wider dtype (bf16 or fp32), or lower the scale" in said
    assert merge(large, dtype="fp32").tensors["w"].item() == 7e4
    how = {"base": {"w": torch.zeros(1)}, "dtype": "fp16"}
    assert merge(large, scale=0.5, **how).tensors["w"].item() == pytest.approx(3.5e4, 1e-3)


@pytest.mark.parametrize("allowed", [False, True], ids=["", "where NaN is allowed"])
def test_differences_that_overflow(allowed):
    huge = [{**A, "x": torch.tensor([3e38, float("inf") if allowed else 1.0])}]*2
    how = {"base": {**BASE, "x": torch.tensor([-3e38, 1.0])}, "allow_nonfinite": allowed}
    refused("(?s)'x' has values so large.*leave it out", merge, huge, **how)
    is_same(merge(huge, drop=["x"], **how).tensors, A)


def test_what_is_no_number(tmp_path):
    broken = {**A, "v": torch.tensor([[float("nan")]])}
    said = refused("'v' is nan at element 0", merge, [broken, B])
    assert "allow_nonfinite=True (--allow-nonfinite)" in said
    found = merge([broken, B], allow_nonfinite=True).tensors
    assert found["v"].isnan().all()
    assert torch.equal(found["layers.0.w"], mean(1, 1)["layers.0.w"])


def test_a_mean_that_is_larger_than_its_dtype():
    "Only elements that are numbers count."
    huge = {"w": torch.tensor([[3e38, float("inf")]])}
    how = {"base": {"w": torch.tensor([[1e38, 0.0]])}, "allow_nonfinite": True}
    said = refused("'w': its mean is larger than float32", merge, [huge]*2, scale=2, **how)
    assert said.endswith("Lower the scale.")
    assert merge([huge]*2, scale=0.5, **how).tensors["w"][0, 0].item() == pytest.approx(2e38)


def test_names_longer_than_a_header(tmp_path, monkeypatch):
    monkeypatch.setattr("frechet_merge.files.shards.MAX_HEADER", 140)
    said = refused("a safetensors file has room for 140", merge, [A, B], out=tmp_path/"o")
    assert "shard_size=, --shard-size" in said
    merge([A, B], out=tmp_path/"o", shard_size=8)
    is_same(dict(load(tmp_path/"o")), mean(1, 1))


class TestAdapters:
    "They are no full models, and full models no adapters."

    @pytest.fixture
    def there(self, tmp_path):
        "Two adapters in folders, and the model that they are of."
        torch.manual_seed(0)
        name = "base_model.model.layers.0.w"
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["w"]}
        for n in "ab":
            (tmp_path/n).mkdir()
            (tmp_path/n/"adapter_config.json").write_text(json.dumps(config))
            a, b = torch.randn(1, 4), torch.randn(3, 1)
            factors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            save_file(factors, tmp_path/n/"adapter_model.safetensors")
        save(tmp_path/"base", {"layers.0.w.weight": torch.randn(3, 4)})
        return tmp_path

    def baked(self, folder):
        "The mean of the two, on their model."
        files = [load_file(folder/n/"adapter_model.safetensors") for n in "ab"]
        updates = [b @ a for a, b in (f.values() for f in files)]
        base = load_file(folder/"base"/"model.safetensors")["layers.0.w.weight"]
        return base + (updates[0] + updates[1])/2

    def on_base(self, folder):
        return [f"{folder/'base'}+{folder/n}" for n in "ab"]

    def is_baked(self, folder, found):
        torch.testing.assert_close(found["layers.0.w.weight"], self.baked(folder))

    def test_with_a_base(self, there):
        models = [there/"a", there/"b"]
        said = refused("differences from their base already", merge, models, base=there/"base")
        assert "write a full model with bake= (--bake)" in said
        self.is_baked(there, merge(models, bake=there/"base", out=there/"o").tensors)

    @pytest.mark.parametrize(
        ("how", "says"),
        [
            ({"metrics": [{"layers.0.w.weight": torch.ones(3, 4)}]*2}, "put the adapters on their"),
            ({"geometry": {"*": "euclidean"}}, "Name each as BASE.ADAPTER"),
        ],
        ids=["metrics", "geometries by name"],
    )
    def test_with_what_full_models_have(self, there, how, says):
        refused(says, merge, [there/"a", there/"b"], **how)
        self.is_baked(there, merge(self.on_base(there), **how).tensors)

    def test_beside_a_full_model(self, there):
        models = [there/"a", there/"base"]
        with pytest.raises(MergeError) as e:
            merge(models)
        assert len(str(e.value).splitlines()) <= 3


class TestStatistics:
    "Metrics that do not fit."

    SHAPES = {"layers.0.w": (1, 2), "v": (1, 1)}

    def given(self, seed=0, form=None, **names):
        "Diagonal statistics of a model."
        g = torch.Generator().manual_seed(seed)
        about = {} if form is None else {"form": form}
        shapes = names or self.SHAPES
        return Statistics({n: torch.rand(*s, generator=g) + 0.5 for n, s in shapes.items()}, about)

    def is_weighted(self, found, metrics):
        for n in A:
            d, e = (m[n] for m in metrics)
            torch.testing.assert_close(found[n], (d*A[n] + e*B[n])/(d + e), atol=1e-4, rtol=1e-4)

    @pytest.fixture
    def right(self):
        return [self.given(0), self.given(1)]

    def refusals(self):
        good = self.given(1)
        bad = Statistics({**good, "v": -good["v"]}, {})
        return {
            "negative": ([self.given(0), bad], "collect it again"),
            "one of two": ([self.given(0)], "1 metrics for 2 models: give one per model"),
            "other names": (
                [self.given(i, **{"x.y": (1, 2), "z": (1, 1)}) for i in (0, 1)],
                "Metrics go by the names of the checkpoint, such as 'layers.0.w'",
            ),
            "one other name": (
                [self.given(i, **{"x.y": (1, 2), "v": (1, 1)}) for i in (0, 1)],
                "Give the statistics the checkpoint's names",
            ),
            "another shape": (
                [self.given(i, **{"layers.0.w": (1, 3), "v": (1, 1)}) for i in (0, 1)],
                "Collect the statistics from the model that is merged",
            ),
            "another form": (
                [self.given(0, "diagonal"), self.given(1, "kronecker")],
                "(?s)which do not add up.*Collect the statistics of every model in the same way",
            ),
            "one lacks a tensor": (
                [self.given(0), self.given(1, **{"v": (1, 1)})],
                "(?s)missing, though another.*Collect the statistics of every model in the same",
            ),
        }

    @pytest.mark.parametrize(
        "what",
        [
            "negative",
            "one of two",
            "other names",
            "one other name",
            "another shape",
            "another form",
            "one lacks a tensor",
        ],
    )
    def test_are_given_as_it_is_said(self, right, what):
        metrics, says = self.refusals()[what]
        refused(says, merge, [A, B], "curved", metrics=metrics)
        self.is_weighted(merge([A, B], "curved", metrics=right).tensors, right)

    def test_of_a_geometry_that_takes_none(self, right):
        said = refused("takes one number per model", merge, [A, B], "sphere", metrics=right)
        assert "--geometry curved" in said
        for geometry in ("euclidean", "curved"):
            self.is_weighted(merge([A, B], geometry, metrics=right).tensors, right)

    def test_a_model_in_their_place(self, tmp_path, right):
        folders = [save(tmp_path/n, x, {"model_type": "toy"}) for n, x in (("a", A), ("b", B))]
        said = refused("is a model, and not", merge, folders, "curved", metrics=folders)
        assert "name the file that it writes" in said
        files = []
        for i, m in enumerate(right):
            files.append(tmp_path/f"{i}.safetensors")
            save_file(dict(m), files[-1], metadata={"form": '"diagonal"'})
        self.is_weighted(merge(folders, "curved", metrics=files).tensors, right)


def test_models_with_commas(tmp_path):
    a, b = (save(tmp_path/n, x) for n, x in (("a", A), ("b", B)))
    code, _, said = cli("merge", f"{a},{b}", "-o", tmp_path/"o")
    assert code and "Several models are separated by spaces" in said
    assert cli("merge", a, b, "-o", tmp_path/"o")[0] == 0
    is_same(dict(load(tmp_path/"o")), mean(1, 1))


class TestDialects:
    "What another dialect of adapters has no place for."

    def adapters(self, folder, A, B, **more):
        "Two adapters of one layer, as PEFT writes them."
        name = "base_model.model.layers.0.c"
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["c"]}
        torch.manual_seed(0)
        for n in "ab":
            factors = {f"{name}.lora_A.weight": torch.randn(1, *A)}
            factors[f"{name}.lora_B.weight"] = torch.randn(*B)
            factors |= {f"{name}.{k}": torch.randn(*shape) for k, shape in more.items()}
            (folder/n).mkdir()
            save_file(factors, folder/n/"adapter_model.safetensors")
            bias = {"lora_bias": True} if "lora_B.bias" in more else {}
            (folder/n/"adapter_config.json").write_text(json.dumps({**config, **bias}))
        return [folder/"a", folder/"b"]

    def is_merged(self, found, models):
        name = "base_model.model.layers.0.c.lora_"
        every = [found, *(load_file(m/"adapter_model.safetensors") for m in models)]
        pairs = [[h[f"{name}{k}.weight"].flatten(1) for k in "BA"] for h in every]
        merged, one, other = (up @ down for up, down in pairs)
        torch.testing.assert_close(merged, (one + other)/2, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(
        ("dialect", "A", "B", "more", "says"),
        [
            ("mlx", (3, 3, 3), (4, 1, 1, 1), {}, "is a convolution"),
            ("mlx", (5,), (4, 1), {"lora_B.bias": (4,)}, "has a bias"),
        ],
        ids=["a convolution", "a bias"],
    )
    def test_a_kind_of_layer(self, tmp_path, dialect, A, B, more, says):
        models = self.adapters(tmp_path, A, B, **more)
        said = refused(says, merge, models, to=dialect, out=tmp_path/"o")
        assert "(--to peft)" in said
        merge(models, to="peft", out=tmp_path/"o")
        self.is_merged(load(tmp_path/"o"), models)

    def test_a_tensor_that_was_saved_whole(self, tmp_path):
        models = self.adapters(tmp_path, (5,), (4, 1))
        for m in models:
            file = m/"adapter_model.safetensors"
            whole = {"base_model.model.classifier.weight": torch.ones(2, 2)}
            save_file(load_file(file) | whole, file)
            config = json.loads((m/"adapter_config.json").read_text())
            config["modules_to_save"] = ["classifier"]
            (m/"adapter_config.json").write_text(json.dumps(config))
        how = {"to": "mlx", "out": tmp_path/"o"}
        said = refused("saved '.*classifier.weight' whole", merge, models, **how)
        name = said.rpartition("(drop='")[2].partition("'")[0]
        assert f"--drop '{name}'" in said
        merge(models, drop=[name], **how)
        assert len(load(tmp_path/"o")) == 2
        merge(models, to="peft", out=tmp_path/"p")
        self.is_merged(load(tmp_path/"p"), models)

    def test_fp8(self, tmp_path):
        models = self.adapters(tmp_path, (5,), (4, 1))
        said = refused("fp8 is for full models", merge, models, dtype="fp8", out=tmp_path/"o")
        assert said.endswith("Write bf16 (--dtype bf16).")
        merge(models, dtype="bf16", out=tmp_path/"o")
        assert {x.dtype for x in load(tmp_path/"o").values()} == {torch.bfloat16}


def test_fp8_of_what_is_no_number(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 128, "intermediate_size": 128}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, **sizes)
    model = LlamaForCausalLM(config)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path/"a")
    how = {"allow_nonfinite": True, "out": tmp_path/"o"}
    said = refused("has NaN or Inf, which", merge, [tmp_path/"a"]*2, dtype="fp8", **how)
    assert said.endswith("Write bf16 (--dtype bf16).")
    merge([tmp_path/"a"]*2, dtype="bf16", **how)
    found = load(tmp_path/"o")["model.layers.0.mlp.up_proj.weight"]
    assert found.isnan().sum() == 1 and found.dtype == torch.bfloat16


def test_rules_that_leave_some_without_a_value(tmp_path):
    a, b, base = (save(tmp_path/n, x) for n, x in (("a", A), ("b", B), ("base", BASE)))
    models = f"models:\n- {a}\n- {b}\nbase: {base}\n"
    file = tmp_path/"x.yaml"
    file.write_text(models + "scale: [{filter: layers, value: 2}]\n")
    code, _, said = cli("run", file, "-o", tmp_path/"o")
    assert code and "Let the last rule be one without a filter: {value: …}" in said
    file.write_text(models + "scale: [{filter: layers, value: 2}, {value: 1}]\n")
    assert cli("run", file, "-o", tmp_path/"o")[0] == 0
    want = {"layers.0.w": summed(1, 1)["layers.0.w"], "v": summed(0.5, 0.5)["v"]}
    is_same(dict(load(tmp_path/"o")), want)


def test_a_folder_of_several_models_is_not_aligned(tmp_path):
    for n, x in (("a", A), ("b", B)):
        listed = {p: ["diffusers", "UNet2DModel"] for p in ("unet", "vae")}
        for part in listed:
            save(tmp_path/n/part, x)
        (tmp_path/n/"model_index.json").write_text(json.dumps(listed))
    models = [tmp_path/"a", tmp_path/"b"]
    said = refused("whose symmetries are not known", merge, models, align=True)
    assert said.endswith("Merge it without align= (--align).")
    merge(models, out=tmp_path/"o")
    is_same(dict(load(tmp_path/"o"/"unet")), mean(1, 1))


def test_a_record_of_tensors_in_memory():
    record = merge([A, B], weights=[1, 3]).record
    assert "as models=" in refused("tensors in memory", record.again)
    is_same(merge(models=[A, B], weights=record.recipe["weights"]).tensors, mean(1, 3))


def test_a_mean_of_products_is_cut(tmp_path):
    import peft

    deltas = []
    for i, n in enumerate("ab"):
        torch.manual_seed(i)
        config = peft.LoHaConfig(r=12, target_modules=["q"], init_weights=False)
        net = torch.nn.Sequential()
        net.add_module("q", torch.nn.Linear(200, 150, bias=False))
        model = peft.get_peft_model(net, config)
        model.save_pretrained(tmp_path/n)
        deltas.append(model.base_model.model.q.get_delta_weight("default").detach())
    models = [tmp_path/"a", tmp_path/"b"]
    with pytest.warns(UserWarning, match="the mean of products .*--geometry lora:rank=32 cuts it"):
        merge(models, out=tmp_path/"whole")
    assert cli("merge", *models, "--geometry", "lora:rank=32", "-o", tmp_path/"o")[0] == 0
    found = load(tmp_path/"o")
    b, a = (found[f"base_model.model.q.lora_{k}.weight"] for k in "BA")
    U, s, Vh = torch.linalg.svd((deltas[0] + deltas[1])/2, full_matrices=False)
    torch.testing.assert_close(b @ a, (U*s)[:, :32] @ Vh[:32], atol=1e-3, rtol=1e-3)


class TestCoupled:
    "Metrics of two factors, or in a basis."

    def test_that_are_negative(self):
        def given(x):
            return Statistics({"v.left": torch.tensor([x]), "v.right": torch.ones(1)}, {})

        models = [{"v": A["v"]}, {"v": B["v"]}]
        bad, good = [given(1.0), given(-3.0)], [given(1.0), given(3.0)]
        said = refused("entries that are negative", merge, models, "curved", metrics=bad)
        assert said.endswith("Collect the statistics again.")
        found = merge(models, "curved", metrics=good).tensors
        torch.testing.assert_close(found["v"], mean(1, 3)["v"])

    def test_in_a_basis(self):
        known = [Statistics({"v.projected": torch.ones(1, 1), "v.sigma": torch.ones(1)}, {})]*2
        models = [{"v": A["v"]}, {"v": B["v"]}]
        said = refused("which only EpiMer makes", merge, models, "curved", metrics=known)
        assert "or collect another form (kronecker)" in said
        kronecker = [Statistics({"v.left": torch.ones(1), "v.right": torch.ones(1)}, {})]*2
        found = merge(models, "curved", metrics=kronecker).tensors
        torch.testing.assert_close(found["v"], mean(1, 1)["v"])


def test_a_basis_of_models_that_are_their_base():
    from frechet_merge.matching.bases import bases

    base, a, b = ({"w": torch.diag(torch.arange(1.0, 5)) + i} for i in range(3))
    said = refused("the models differ from it in no matrix", bases, [base, base], base)
    assert said.endswith("Name the models, and the base that they were trained from.")
    assert {*bases([a, b], base)} == {"w.U", "w.V", "w.sigma"}


def test_a_recipe_that_is_not_there(tmp_path):
    a, b = (save(tmp_path/n, x) for n, x in (("a", A), ("b", B)))
    code, _, said = cli("run", tmp_path/"x.yaml", "-o", tmp_path/"o")
    assert code and "Name a recipe" in said
    (tmp_path/"x.yaml").write_text(f"models:\n- {a}\n- {b}\n")
    assert cli("run", tmp_path/"x.yaml", "-o", tmp_path/"o")[0] == 0
    is_same(dict(load(tmp_path/"o")), mean(1, 1))

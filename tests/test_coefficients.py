"""How much each model counts: shares, coefficients of a sum, by name and by depth, as other
libraries read them; and what a command says of them afterwards."""

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file
from conftest import LLAMA, cli, save

from frechet_merge import LoRA, Sphere, merge
from frechet_merge.messages import MergeError
from frechet_merge.merging.merge import make
from frechet_merge.merging.record import Record


def model(seed, layers=3):
    "A tower of pictures and one of text, with an embedding and a head."
    g = torch.Generator().manual_seed(seed)
    names = [
        "model.embed_tokens.weight",
        *(f"model.visual.blocks.{i}.mlp.up.weight" for i in range(2)),
        *(f"model.layers.{i}.mlp.up.weight" for i in range(layers)),
        *(f"model.layers.{i}.attn.q_proj.weight" for i in range(layers)),
        "lm_head.weight",
    ]
    return {n: torch.randn(6, 4, generator=g) for n in names}


@pytest.fixture
def three():
    return model(0), model(1), model(2)


@pytest.fixture
def opposed(three):
    "The second model changed the base in about the direction from which the first came."
    base, a, b = three
    return base, a, {n: 2*base[n] - a[n] + 0.3*b[n] for n in b}


def close(found, want, **how):
    torch.testing.assert_close(found, want, **{"rtol": 0, "atol": 2e-6, **how})


def summed(base, models, cs):
    "In float64, as PEFT, diffusers and kohya do it."
    total = {n: x.double() for n, x in base.items()}
    for m, c in zip(models, cs):
        total = {n: x + c*(m[n].double() - base[n].double()) for n, x in total.items()}
    return {n: x.float() for n, x in total.items()}


@pytest.mark.parametrize("cs", [[0.7, 0.4], [1, -1], [-0.5, 0], [2, 3], [0.25, 0.75], [0, 0]])
def test_a_sum_of_full_models(three, cs):
    base, a, b = three
    found = merge([a, b], base=base, sum=cs).tensors
    close(dict(found), summed(base, [a, b], cs))


def test_scale_multiplies_a_sum(three):
    base, a, b = three
    found = merge([a, b], base=base, sum=[1, -0.5], scale=0.5).tensors
    close(dict(found), summed(base, [a, b], [0.5, -0.25]))


class TestWithoutABase:
    def test_shares_are_a_mean_of_any_geometry(self, three):
        _, a, b = three
        for g in ("euclidean", "sphere"):
            found, want = merge([a, b], g, sum=[0.25, 0.75]), merge([a, b], g, weights=[1, 3])
            close(dict(found.tensors), dict(want.tensors))

    def test_coefficients_that_sum_to_1_are_affine(self, three):
        _, a, b = three
        found = merge([a, b], sum=[1.5, -0.5]).tensors
        close(dict(found), {n: 1.5*a[n] - 0.5*b[n] for n in a})

    @pytest.mark.parametrize(
        "how", [{"sum": [1, -1]}, {"sum": [0.7, 0.4]}, {"sum": [1.5, -0.5], "geometry": "sphere"}]
    )
    def test_other_sums_need_one_and_get_it(self, opposed, how):
        base, a, b = opposed
        with pytest.raises(ValueError, match="base=, --base"):
            merge([a, b], **how)
        found = merge([a, b], base=base, **how).tensors
        if "geometry" not in how:
            close(dict(found), summed(base, [a, b], how["sum"]))


class TestReflection:
    "A negative coefficient is the model on the other side of the base."

    def test_in_another_geometry(self, opposed):
        base, a, b = opposed
        far = {n: 2*base[n] - b[n] for n in b}
        found = merge([a, b], "sphere", base=base, sum=[0.6, -0.2]).tensors
        want = merge([a, far], "sphere", base=base, weights=[3, 1], scale=0.8).tensors
        close(dict(found), dict(want), atol=1e-5)

    def test_a_metric_goes_along(self, three):
        base, a, b = three
        far = {n: 2*base[n] - b[n] for n in b}
        metrics = [{n: torch.rand_like(x) + 0.1 for n, x in m.items()} for m in (a, b)]
        found = merge([a, b], base=base, sum=[1, -1], metrics=metrics).tensors
        want = merge([a, far], base=base, scale=2, metrics=metrics).tensors
        close(dict(found), dict(want), atol=1e-5)

    def test_a_geometry_that_reads_whole_tensors(self, three):
        "Its chart takes versions one by one, and not by chunks."
        base, a, b = three
        metrics = [
            {f"{n}.left": torch.eye(6)*(i + 1) for n in a} for i in range(2)
        ]
        far = {n: 2*base[n] - b[n] for n in b}
        found = merge([a, b], "curved", base=base, sum=[1, -1], metrics=metrics).tensors
        want = merge([a, far], "curved", base=base, scale=2, metrics=metrics).tensors
        close(dict(found), dict(want), atol=1e-5)


class TestAdapters:
    "PEFT is the oracle: its `cat` adds updates up exactly."

    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory):
        peft = pytest.importorskip("peft")
        from transformers import AutoConfig, AutoModelForCausalLM

        root = tmp_path_factory.mktemp("adapters")
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **LLAMA)
        AutoModelForCausalLM.from_config(config).save_pretrained(root/"base")
        for name, rank in (("a", 4), ("b", 2)):
            said = peft.LoraConfig(
                r=rank,
                lora_alpha=8,
                target_modules=["q_proj", "v_proj"],
                init_lora_weights=False,
                use_rslora=name == "b",
            )
            m = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(root/"base"), said)
            m.save_pretrained(root/name)
        return root

    def deltas(self, root, *names, cs=None):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        first, *others = names
        whole = AutoModelForCausalLM.from_pretrained(root/"base")
        m = PeftModel.from_pretrained(whole, str(first), adapter_name="0")
        for i, other in enumerate(others, 1):
            m.load_adapter(str(other), adapter_name=str(i))
        if cs is not None:
            adapters = [str(i) for i in range(len(names))]
            m.add_weighted_adapter(adapters, cs, "sum", combination_type="cat")
        which = "0" if cs is None else "sum"
        layers = (x for x in m.named_modules() if hasattr(x[1], "get_delta_weight"))
        return {n: layer.get_delta_weight(which).detach() for n, layer in layers}

    @pytest.mark.parametrize("cs", [[0.7, 0.4], [1, -1], [-0.3, 2]])
    def test_a_sum_is_that_of_peft(self, made, tmp_path, cs):
        merge([made/"a", made/"b"], LoRA(), sum=cs, out=tmp_path/"o")
        want = self.deltas(made, made/"a", made/"b", cs=cs)
        close(self.deltas(made, tmp_path/"o"), want, atol=1e-5)

    def test_baked_too(self, made, tmp_path):
        merge([made/"a", made/"b"], sum=[1, -1], bake=made/"base", out=tmp_path/"o")
        base, out = (load_file(f/"model.safetensors") for f in (made/"base", tmp_path/"o"))
        for name, delta in self.deltas(made, made/"a", made/"b", cs=[1.0, -1.0]).items():
            key = name.removeprefix("base_model.model.") + ".weight"
            close(out[key] - base[key], delta, atol=1e-5)

    def test_by_pattern_and_depth(self, made, tmp_path):
        cs = {"q_proj": [1, -1], "*": [[1, 0], [0, 1]]}
        merge([made/"a", made/"b"], sum=cs, out=tmp_path/"o")
        a, b, found = (self.deltas(made, f) for f in (made/"a", made/"b", tmp_path/"o"))
        for n in found:
            layer = 1 if ".layers.1." in n else 0
            want = a[n] - b[n] if "q_proj" in n else [a, b][layer][n]
            close(found[n], want, atol=1e-5)

    def test_the_remedy_of_negative_weights(self, made, tmp_path):
        code, _, err = cli("merge", "a", "b", "--weights", "1,-1", "-o", tmp_path/"o", cwd=made)
        assert code == 2 and "--sum 1,-1" in err
        code, out, _ = cli("merge", "a", "b", "--sum", "1,-1", "-o", tmp_path/"o", cwd=made)
        assert code == 0 and "sum 1,-1" in out
        want = self.deltas(made, made/"a", made/"b", cs=[1.0, -1.0])
        close(self.deltas(made, tmp_path/"o"), want, atol=1e-5)


class TestPatterns:
    @pytest.mark.parametrize(
        "pattern", ["*.visual.*", "visual.*", "model.visual", "visual", "*visual*"]
    )
    def test_a_module_is_found_by_how_people_call_it(self, three, pattern):
        _, a, b = three
        found = merge([a, b], weights={pattern: [1, 0], "*": [0.5, 0.5]}).tensors
        close(dict(found), {n: a[n] if ".visual." in n else (a[n] + b[n])/2 for n in a})

    def test_one_that_matches_whole_names_is_not_widened(self):
        m = [{"mlp.x": torch.zeros(2), "a.mlp.x": torch.zeros(2)} for _ in range(2)]
        m[1] = {n: x + 1 for n, x in m[1].items()}
        found = merge(m, weights={"mlp.*": [0, 1], "*": [1, 0]}).tensors
        assert found["mlp.x"][0] == 1 and found["a.mlp.x"][0] == 0

    def test_names_of_kohya(self):
        from frechet_merge.matching.blocks import named_by

        names = ["lora_unet_down_blocks_0_proj", "lora_unet_up_blocks_0_proj", "lora_te_mlp_fc1"]
        assert named_by("down_blocks.*", names) == names[:1]
        assert named_by("up_blocks.0", names) == names[1:2]

    def test_the_first_that_matches_decides(self, three):
        _, a, b = three
        ws = {"layers.0.mlp": [1, 0], "mlp": [0, 1], "*": [1, 1]}
        found = merge([a, b], weights=ws).tensors
        close(found["model.layers.0.mlp.up.weight"], a["model.layers.0.mlp.up.weight"])
        close(found["model.layers.1.mlp.up.weight"], b["model.layers.1.mlp.up.weight"])

    @pytest.mark.parametrize(
        "ws, says",
        [
            ({"mpl.*": [1, 0]}, r"'mpl.\*' matches no tensor.\n.*nearest name is 'mlp'"),
            ({"*": [1, 0], "mlp.*": [0, 1]}, r"'mlp.\*' decides nothing"),
        ],
    )
    def test_one_without_effect_is_refused(self, three, ws, says):
        _, a, b = three
        with pytest.raises(ValueError, match=says):
            merge([a, b], weights=ws)
        if "*" in ws:
            merge([a, b], weights=dict(reversed(ws.items())))

    def test_a_sum_says_something_of_every_tensor(self, three):
        base, a, b = three
        with pytest.raises(ValueError, match="no pattern gives coefficients to 'model.embed"):
            merge([a, b], base=base, sum={"mlp.*": [1, -1]})
        found = merge([a, b], base=base, sum={"mlp.*": [1, -1], "*": [0, 0]}).tensors
        name = "model.layers.2.mlp.up.weight"
        want = summed(base, [a, b], [1, -1])
        close(dict(found), {**base, **{n: want[n] for n in want if ".mlp." in n}})
        assert not torch.equal(found[name], base[name])


class TestDepth:
    def test_weights(self, three):
        _, a, b = three
        found = merge([a, b], weights=[[1, 0], [0, 1]]).tensors
        for i, share in enumerate([1, 0.5, 0]):
            name = f"model.layers.{i}.mlp.up.weight"
            close(found[name], share*a[name] + (1 - share)*b[name])
        # a stack of its own
        last = "model.visual.blocks.1.mlp.up.weight"
        close(found[last], b[last])
        close(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
        close(found["lm_head.weight"], b["lm_head.weight"])

    def test_scale_and_a_number_beside_a_list(self, three):
        base, a, b = three
        found = merge([a, b], base=base, scale=[0, 1, 0], sum=[[0, 2], 1]).tensors
        name = "model.layers.1.attn.q_proj.weight"
        close(found[name], summed(base, [a, b], [1, 1])[name])
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            close(found[name], base[name])

    def test_without_layers_it_is_refused_and_patterns_do_it(self):
        m = [{"q.weight": torch.zeros(3)}, {"q.weight": torch.ones(3)}]
        with pytest.raises(ValueError, match="no tensor's name has the number of a layer"):
            merge(m, weights=[[1, 0], [0, 1]])
        assert merge(m, weights={"q": [1, 3]}).tensors["q.weight"][0] == 0.75

    def test_a_mean_without_any_model_at_some_depth(self, three):
        with pytest.raises(ValueError, match="sum to zero"):
            merge(three[1:], weights=[[1, 0], [1, 0]])


class TestWhatHasNoSum:
    @pytest.mark.parametrize(
        "given",
        [{"scale": 1e39}, {"scale": -1e300}, {"sum": [3e38, 3e38]}, {"sum": [9, 9], "scale": 1e38}],
    )
    def test_numbers_that_no_tensor_holds(self, three, given):
        base, *models = three
        with pytest.raises(ValueError, match="no 32-bit number is as large"):
            merge(models, base=base, **given)

    def test_a_tensor_that_the_base_lacks(self, three):
        base, a, b = three
        bare = {n: x for n, x in base.items() if n != "lm_head.weight"}
        with pytest.raises(MergeError, match="'lm_head.weight': .* lacks it.*\n.*0.5,0.5'"):
            merge([a, b], base=bare, sum=[1, -1], absent="renormalise")
        cs = {"lm_head.weight": [0.5, 0.5], "*": [1, -1]}
        found = merge([a, b], base=bare, sum=cs, absent="renormalise").tensors
        close(found["lm_head.weight"], (a["lm_head.weight"] + b["lm_head.weight"])/2)
        name = "model.layers.0.mlp.up.weight"
        close(found[name], summed(base, [a, b], [1, -1])[name])
        dropped = merge([a, b], base=bare, sum=[1, -1], drop=["lm_head.weight"]).tensors
        close(dropped[name], found[name])

    def test_a_model_that_lacks_a_tensor_changes_nothing_there(self, three):
        base, a, b = three
        name = "model.layers.1.attn.q_proj.weight"
        less = {n: x for n, x in b.items() if n != name}
        found = merge([a, less], base=base, sum=[0.5, -1], absent="renormalise").tensors
        close(found[name], summed(base, [a, b], [0.5, 0])[name])

    def test_running_statistics_are_averaged_and_it_is_said(self):
        base, a, b = (
            {"x.running_var": torch.full((2,), v), "w": torch.ones(2)*v} for v in (1.0, 2.0, 4.0)
        )
        with pytest.warns(UserWarning, match="x.running_var.*--calibrate"):
            found = merge([a, b], base=base, sum=[1, -1]).tensors
        assert found["x.running_var"].tolist() == [3, 3] and found["w"].tolist() == [-1, -1]

    def test_both_at_once(self, three):
        with pytest.raises(ValueError, match="give one of them"):
            merge(three[1:], base=three[0], weights=[1, 1], sum=[1, 1])

    @pytest.mark.parametrize("cs", [[1], [1, 2, 3], [float("nan"), 1], 2])
    def test_numbers_that_are_none(self, three, cs):
        with pytest.raises(ValueError):
            merge(three[1:], base=three[0], sum=cs)

    def test_epimer_is_one_already(self, three):
        with pytest.raises(ValueError, match="epimer adds up what models changed"):
            merge(three[1:], "epimer", base=three[0], sum=[1, 1])


class TestCommandLine:
    @pytest.fixture
    def here(self, tmp_path, three):
        for name, state in zip(("base", "a", "b"), three):
            save(tmp_path/name, state, {"model_type": "toy"})
        return tmp_path

    @pytest.mark.parametrize(
        "words, how",
        [
            (["--weights", "0.6,0.4", "--weights", "visual.*=1,0"],
             {"weights": {"visual.*": [1, 0], "*": [0.6, 0.4]}}),
            (["--weights", "1:0,0:1"], {"weights": [[1, 0], [0, 1]]}),
            (["--sum", "-1,1"], {"sum": [-1, 1]}),
            (["--sum", "layers.0=1,-1", "--sum", "0.7,0.4"],
             {"sum": {"layers.0": [1, -1], "*": [0.7, 0.4]}}),
            (["--scale", "0.5:1", "--scale", "visual=0"],
             {"scale": {"visual": 0, "*": [0.5, 1]}}),
        ],
    )  # fmt: skip
    def test_words_are_arguments_and_come_back(self, here, monkeypatch, words, how):
        monkeypatch.chdir(here)
        code, out, err = cli("merge", "a", "b", "--base", "base", "-o", "o", *words, cwd=here)
        assert code == 0, err
        found = load_file(here/"o"/"model.safetensors")
        models = [here/"a", here/"b"]
        close(found, dict(merge(models, base=here/"base", **how).tensors))
        # the record makes it again, and so does the command that it names
        record = Record.read(here/"o")
        close(dict(make(record.again()).tensors), found)
        typed = ["again" if w == "o" else w for w in shlex.split(record.command)[1:]]
        code, _, err = cli(*typed, cwd=here)
        assert code == 0, err
        close(load_file(here/"again"/"model.safetensors"), found)

    def test_it_says_what_was_used(self, here):
        _, out, _ = cli("merge", "a", "b", "-o", "o", "--weights", "3,1", cwd=here)
        assert "weights 0.75,0.25 (3,1, normalised" in out and "--sum" in out
        said = json.loads((here/"o"/"frechet_merge.json").read_text())["coefficients"]
        assert said[0]["weights"] == [0.75, 0.25] and said[0]["tensors"] == 10
        _, out, _ = cli(
            "merge", "a", "b", "-o", "p", "--base", "base", "--sum", "visual=1,-1",
            "--sum", "0.7,0.4", "--scale", "0.5", cwd=here,
        )  # fmt: skip
        assert "sum 0.7,0.4, scale 0.5: 8 tensors" in out
        assert "sum 1,-1, scale 0.5: 2 tensors, model.visual.blocks.0" in out
        # nothing was asked for, so nothing is said
        _, out, _ = cli("merge", "a", "b", "-o", "q", cwd=here)
        assert "weights" not in out and len(out.splitlines()) == 1
        _, out, _ = cli("merge", "a", "b", "-o", "r", "--weights", "0.75,0.25", cwd=here)
        assert "normalised" not in out

    @pytest.mark.parametrize(
        "words, says",
        [
            (["--weights", "1,2", "--weights", "2,1"], "all tensors are given twice"),
            (["--weights", "mlp=1,x"], "not numbers"),
            (["--scale", "x"], "not numbers"),
        ],
    )
    def test_words_that_are_none(self, here, words, says):
        code, _, err = cli("merge", "a", "b", "--base", "base", "-o", "o", *words, cwd=here)
        assert code == 2 and says in err and not (here/"o").exists()

    def test_a_pattern_that_fits_no_tensor(self, here):
        words = "--weights", "mpl=1,2"
        code, _, err = cli("merge", "a", "b", "--base", "base", "-o", "o", *words, cwd=here)
        assert code == 1 and "nearest name" in err and not (here/"o").exists()


def test_a_row_of_one_model_is_its_own_in_a_sum(tmp_path):
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    folders = []
    for name, n in (("base", 5), ("a", 5), ("b", 6)):
        state = {"model.embed_tokens.weight": torch.randn(n, 3)}
        config = {"model_type": "llama", "vocab_size": n, "architectures": ["LlamaModel"]}
        folder = save(tmp_path/name, state, config)
        words = {f"w{i}": i for i in range(n)}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder/"tokenizer.json"))
        folders.append(folder)
    base, *pair = folders
    row = load_file(pair[1]/"model.safetensors")["model.embed_tokens.weight"][5]
    numbers = {"sum": [0.7, 0.4]}, {"scale": 1.1, "weights": [0.7, 0.4]}
    for how in (*numbers, {**numbers[0], "tokens": {"w5": {"model": str(pair[1])}}}):
        found = merge(pair, base=base, tokenizer="union", **how).tensors
        assert found["model.embed_tokens.weight"].shape == (6, 3)
        assert torch.allclose(found["model.embed_tokens.weight"][5], row)


def test_a_sphere_without_base_takes_no_model_away(three):
    with pytest.raises(ValueError, match="reflects a model about the base"):
        merge(three[1:], Sphere(), sum=[2, -1])

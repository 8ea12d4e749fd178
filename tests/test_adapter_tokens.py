"""Adapters that brought tokens: PEFT reads what their merge wrote, and their rows are by token.

The oracle is PEFT's own model, with the base resized as its documentation says.
"""
import pytest
import torch
from conftest import cli
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_vocabularies import WORDS, config, speaker, states
from transformers import AutoModelForCausalLM, AutoTokenizer

from frechet_merge import merge
from frechet_merge.messages import MergeError

E, H = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(3, 13)[None]


def filled(m, tokenizer, folder, seed):
    "The folder of an adapter whose trained numbers are drawn at random."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g)*0.3)
    m.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter(folder, base, seed, tokens, saved=("embed_tokens", "lm_head"), template=None):
    "An adapter trained on a base whose vocabulary was enlarged by tokens; its tokenizer with it."
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([*tokens], special_tokens=True)
    tokenizer.chat_template = template
    full = AutoModelForCausalLM.from_pretrained(base)
    full.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lora = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=list(saved),
        task_type="CAUSAL_LM",
    )
    m = get_peft_model(full, lora)
    return filled(m, tokenizer, folder, seed)


def in_peft(base, folder):
    "The adapter on its base, as PEFT has it."
    full = AutoModelForCausalLM.from_pretrained(base)
    rows = len(AutoTokenizer.from_pretrained(folder))
    full.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(full, folder).eval()


class TestBaked:
    @pytest.mark.parametrize("how", ["bake", "plus"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_an_enlarged_vocabulary(self, tmp_path, how, tied):
        base = speaker(tmp_path/"base", 0, WORDS, tie_word_embeddings=tied)
        a = adapter(tmp_path/"a", base, 1, ["<x>", "<y>"], template="<x>{{ messages }}")
        out = tmp_path/"o"
        if how == "bake":
            merge([a], bake=base, out=out)
        else:
            merge([f"{base}+{a}"], out=out)
        states(out)
        m, want = AutoModelForCausalLM.from_pretrained(out).eval(), in_peft(base, a)
        with torch.no_grad():
            torch.testing.assert_close(m(IDS).logits, want(IDS).logits)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert config(out)["vocab_size"] == len(tokenizer) == 33
        assert tokenizer.convert_tokens_to_ids("<y>") == 32 and tokenizer.chat_template
        assert config(out)["tie_word_embeddings"] is False

    def test_one_matrix_alone_cannot_grow(self, tmp_path):
        base = speaker(tmp_path/"base", 0, WORDS)
        a = adapter(tmp_path/"a", base, 1, ["<x>"])
        file = a/"adapter_model.safetensors"
        held = {n: x for n, x in load_file(file).items() if "lm_head" not in n}

        save_file(held, file)
        with pytest.raises(MergeError, match="with 32 rows of tokens and 'lm_head.weight' with 31"):
            merge([a], bake=base)

    def test_two_that_were_put_on_the_base(self, tmp_path):
        base = speaker(tmp_path/"base", 0, WORDS)
        two = [adapter(tmp_path/"ab"[i], base, i, [t]) for i, t in enumerate(("<x>", "<y>"))]
        names = [f"{base}+{a}" for a in two]
        with pytest.raises(MergeError, match="number 31 for '<x>' and for '<y>'"):
            merge(names)
        merge(names, tokenizer="union", out=tmp_path/"o")
        check(tmp_path/"o", base, two, load_file(tmp_path/"o"/"model.safetensors"))
        assert config(tmp_path/"o")["vocab_size"] == 33
        merge(names, tokenizer=names[1], out=tmp_path/"p")
        assert "<y>" in AutoTokenizer.from_pretrained(tmp_path/"p").get_vocab()
        assert config(tmp_path/"p")["vocab_size"] == 32


def check(out, base, two, tensors):
    "Each token's row is the mean of those that know it."
    vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
    assert {"<x>", "<y>"} <= {*vocabulary}
    known = [AutoTokenizer.from_pretrained(a).get_vocab() for a in two]
    held = [in_peft(base, a).merge_and_unload().state_dict() for a in two]
    for name in (E, H):
        m = next(x for n, x in tensors.items() if n.endswith(name))
        for token, i in vocabulary.items():
            rows = [s[name][v[token]] for s, v in zip(held, known) if token in v]
            torch.testing.assert_close(m[i], sum(rows)/len(rows), msg=f"{name} {token}")


class TestMerged:
    "Two adapters, each with a token of its own under the same number."

    @pytest.fixture
    def three(self, tmp_path):
        base = speaker(tmp_path/"base", 0, WORDS)
        two = [adapter(tmp_path/"ab"[i], base, i, [t]) for i, t in enumerate(("<x>", "<y>"))]
        return base, *two

    def test_without_a_choice_the_error_says_how(self, three, tmp_path):
        base, *two = three
        with pytest.raises(MergeError, match="number 31 for '<x>' and for '<y>'") as e:
            merge(two)
        assert "tokenizer='union'" in str(e.value)
        code, _, said = cli("merge", "a", "b", "-o", "o", "--tokenizer", "union", cwd=tmp_path)
        assert code == 0, said
        check(tmp_path/"o", base, two, load_file(tmp_path/"o"/"adapter_model.safetensors"))
        assert not (tmp_path/"o"/"config.json").exists()
        m = in_peft(base, tmp_path/"o")
        assert m.get_input_embeddings().weight.shape[0] == 33

    def test_put_on_a_base(self, three, tmp_path):
        base, *two = three
        merge(two, tokenizer="union", bake=base, out=tmp_path/"o")
        m, = states(tmp_path/"o")
        check(tmp_path/"o", base, two, m)
        assert config(tmp_path/"o")["vocab_size"] == 33

    def test_one_knows_more(self, three, tmp_path):
        base, a, _ = three
        c = adapter(tmp_path/"c", base, 3, ["<x>", "<z>"])
        merge([a, c], out=tmp_path/"o")
        found = load_file(tmp_path/"o"/"adapter_model.safetensors")
        x, y = (load_file(f/"adapter_model.safetensors") for f in (a, c))
        name = f"base_model.model.{E}"
        torch.testing.assert_close(found[name][:32], (x[name] + y[name][:32])/2)
        torch.testing.assert_close(found[name][32], y[name][32])
        assert len(AutoTokenizer.from_pretrained(tmp_path/"o")) == 33

    def test_adapters_without_rows_have_no_choice(self, three, tmp_path):
        base, a, _ = three
        d = adapter(tmp_path/"d", base, 4, [], saved=())
        with pytest.raises(ValueError, match="BASE\\+ADAPTER"):
            merge([d, d], tokenizer="union")


def single(folder, base, seed, tokens=(), at=(), modules=None, config=None):
    "An adapter that trained single rows: those of new tokens, and others by number."
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([*tokens], special_tokens=True)
    full = AutoModelForCausalLM.from_pretrained(base)
    if tokens:
        full.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    indices = [*at, *tokenizer.convert_tokens_to_ids([*tokens])]
    rows = indices if modules is None else dict.fromkeys(modules, indices)
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows)
    m = get_peft_model(full, lora if config is None else config(indices))
    return filled(m, tokenizer, folder, seed)


class TestSingleRows:
    "`trainable_token_indices`: rows that stand in the place of the base's."

    def check(self, out, base, a):
        full = AutoModelForCausalLM.from_pretrained(base)
        full.resize_token_embeddings(len(AutoTokenizer.from_pretrained(a)), mean_resizing=False)
        want = PeftModel.from_pretrained(full, a).eval()
        m = AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            torch.testing.assert_close(m(IDS).logits, want(IDS).logits)
        states(out)

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("tokens", [(), ("<x>", "<y>")])
    @pytest.mark.parametrize("modules", [None, ("embed_tokens", "lm_head")])
    def test_on_its_base(self, tmp_path, tied, tokens, modules):
        base = speaker(tmp_path/"base", 0, WORDS, tie_word_embeddings=tied)
        a = single(tmp_path/"a", base, 1, tokens, [5, 9], modules)
        merge([f"{base}+{a}"], out=tmp_path/"o")
        self.check(tmp_path/"o", base, a)
        assert config(tmp_path/"o")["vocab_size"] == 31 + len(tokens)

    @pytest.mark.parametrize("tied", [False, True])
    def test_alone(self, tmp_path, tied):
        from peft import TrainableTokensConfig

        def only(at):
            return TrainableTokensConfig(token_indices=at, target_modules=["embed_tokens"])

        base = speaker(tmp_path/"base", 0, WORDS, tie_word_embeddings=tied)
        a = single(tmp_path/"a", base, 1, at=[5, 9], config=only)
        with pytest.raises(MergeError, match="TRAINABLE_TOKENS.*\n.*BASE\\+ADAPTER"):
            merge([a, a])
        merge([f"{base}+{a}"], out=tmp_path/"o")
        self.check(tmp_path/"o", base, a)

    def test_other_rows_in_an_output_layer_that_is_tied(self, tmp_path):
        base = speaker(tmp_path/"base", 0, WORDS, tie_word_embeddings=True)
        a = single(tmp_path/"a", base, 1, at=[5])
        file = a/"adapter_model.safetensors"
        held = load_file(file)
        key = f"base_model.model.{E}".replace("weight", "token_adapter.trainable_tokens_delta")
        head = key.replace("model.embed_tokens", "lm_head")
        save_file({**held, head: held[key] + 1}, file)
        with pytest.raises(MergeError, match="other rows in 'lm_head.weight'.*\n.*Untie"):
            merge([f"{base}+{a}"])
        full = AutoModelForCausalLM.from_pretrained(base)
        full.config.tie_word_embeddings = False
        full.lm_head.weight = torch.nn.Parameter(full.lm_head.weight.clone())
        full.save_pretrained(tmp_path/"untied")
        merge([f"{tmp_path/'untied'}+{a}"], out=tmp_path/"o")
        m, = states(tmp_path/"o")
        torch.testing.assert_close(m[E][5], held[key][0])
        torch.testing.assert_close(m[H][5], held[key][0] + 1)

    def test_two_are_merged_on_their_base(self, tmp_path):
        "The remedy that the refusal names."
        base = speaker(tmp_path/"base", 0, WORDS)
        two = [single(tmp_path/"ab"[i], base, i, [t], [3]) for i, t in enumerate(("<x>", "<y>"))]
        for choice in ("union", two[0]):
            with pytest.raises(MergeError, match="trains single rows.*\n.*BASE\\+ADAPTER"):
                merge(two, tokenizer=choice)
        names = [f"{base}+{a}" for a in two]
        merge(names, base=base, tokenizer="union", out=tmp_path/"o")
        m, = states(tmp_path/"o")
        rows = [load_file(a/"adapter_model.safetensors") for a in two]
        key = f"base_model.model.{E}".replace("weight", "token_adapter.trainable_tokens_delta")
        vocabulary = AutoTokenizer.from_pretrained(tmp_path/"o").get_vocab()
        torch.testing.assert_close(m[E][3], (rows[0][key][0] + rows[1][key][0])/2)
        for held, token in zip(rows, ("<x>", "<y>")):
            torch.testing.assert_close(m[E][vocabulary[token]], held[key][1])

    def test_a_row_that_the_base_lacks(self, tmp_path):
        import json

        base = speaker(tmp_path/"base", 0, WORDS)
        a = single(tmp_path/"a", base, 1, at=[5])
        said = json.loads((a/"adapter_config.json").read_text())
        said["trainable_token_indices"] = [31]
        (a/"adapter_config.json").write_text(json.dumps(said))
        with pytest.raises(MergeError, match="trains row 31.*\n.*Resize the base"):
            merge([f"{base}+{a}"])
        full = AutoModelForCausalLM.from_pretrained(base)
        full.resize_token_embeddings(32)
        full.save_pretrained(tmp_path/"larger")
        merge([f"{tmp_path/'larger'}+{a}"])


class TestRowsByHand:
    "`tokens` for adapters: rows that they saved, or those of their base."

    @pytest.fixture
    def three(self, tmp_path):
        base = speaker(tmp_path/"base", 0, WORDS)
        two = [adapter(tmp_path/"ab"[i], base, i, [t]) for i, t in enumerate(("<x>", "<y>"))]
        return base, *two

    def rows(self, out, name, base=None):
        "Rows of a folder by token, as PEFT has them on the base, or of a full model."
        vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
        m = AutoModelForCausalLM.from_pretrained(out) if base is None else in_peft(base, out)
        state = m.state_dict() if base is None else m.merge_and_unload().state_dict()
        return {token: state[name][i] for token, i in vocabulary.items()}

    @pytest.mark.parametrize("baked", [False, True])
    def test_rows_that_were_saved(self, three, tmp_path, baked):
        "Of another adapter, by force, of another token, and of zeros."
        base, a, b = three
        given = {
            "<x>": {"model": str(b), "token": "w3"},
            "w5": {"model": str(b), "force": True},
            "<new>": {"model": str(a), "token": "<x>"},
            "<none>": {},
        }
        how = {"bake": base} if baked else {}
        merge([a, b], weights=[1, 3], tokenizer="union", tokens=given, out=tmp_path/"o", **how)
        for name in (E, H):
            x, y = (self.rows(f, name, base) for f in (a, b))
            m = self.rows(tmp_path/"o", name, None if baked else base)
            torch.testing.assert_close(m["<x>"], (x["<x>"] + 3*y["w3"])/4)
            torch.testing.assert_close(m["w5"], y["w5"])
            torch.testing.assert_close(m["<new>"], x["<x>"])
            torch.testing.assert_close(m["<none>"], torch.zeros_like(m["<none>"]))
            torch.testing.assert_close(m["<y>"], y["<y>"])
            torch.testing.assert_close(m["w7"], (x["w7"] + 3*y["w7"])/4)

    def test_the_remedy_where_none_were_saved(self, three, tmp_path):
        "On their base, whose rows may be given by its name, too."
        base = three[0]
        two = [adapter(tmp_path/"cd"[i], base, i, [], saved=()) for i in range(2)]
        given = {"<new>": {"model": "base", "token": "w3"}, "<zero>": {}}
        with pytest.raises(ValueError, match="tokens= are for models.*BASE\\+ADAPTER"):
            merge(two, tokens=given)
        names = [f"{base}+{f}" for f in two]
        merge(names, base=base, tokens=given, out=tmp_path/"o")
        for name in (E, H):
            x, m = self.rows(base, name), self.rows(tmp_path/"o", name)
            torch.testing.assert_close(m["<new>"], x["w3"])
            torch.testing.assert_close(m["<zero>"], torch.zeros_like(m["<zero>"]))
            torch.testing.assert_close(m["w7"], x["w7"])

    def test_a_row_of_the_base_of_adapters_alone(self, three):
        base, a, b = three
        given = {"<x>": {"model": "base", "token": "w3"}}
        with pytest.raises(MergeError, match="to be of 'base', which is none of"):
            merge([a, b], tokenizer="union", tokens=given)
        names = [f"{base}+{f}" for f in (a, b)]
        found = merge(names, base=base, tokenizer="union", tokens=given).tensors
        assert len(found[E]) == 33

    def test_a_recipe_of_mergekit(self, three, tmp_path):
        "`model+lora` in the models, and as the source of a token."
        base, a, b = three
        text = f"""models:
  - {{model: {base}+{a}, parameters: {{weight: 1}}}}
  - {{model: {base}+{b}, parameters: {{weight: 3}}}}
merge_method: linear
tokenizer:
  source: union
  tokens:
    <y>: {{source: {base}+{b}}}
    <x>: {{source: {{kind: model_token, model: {base}+{b}, token: w3}}}}
dtype: float32
"""
        (tmp_path/"r.yml").write_text(text)
        code, _, err = cli("run", "r.yml", "-o", "o", cwd=tmp_path)
        assert code == 0, err
        for name in (E, H):
            x, y = (self.rows(f, name, base) for f in (a, b))
            m = self.rows(tmp_path/"o", name)
            torch.testing.assert_close(m["<x>"], (x["<x>"] + 3*y["w3"])/4)
            torch.testing.assert_close(m["<y>"], y["<y>"])

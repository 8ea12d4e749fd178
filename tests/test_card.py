"""The model card: what the hub reads of it, that names stay names in it, and that it names no place
of the disk it was written on."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import save, tensors
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from frechet_merge import load, merge
from frechet_merge.merging import said
from frechet_merge.merging.card import card, in_ticks, in_title, in_yaml
from frechet_merge.recipes.written import read_recipe, run_recipe
from frechet_merge.merging.recipe import Output
from frechet_merge.merging.record import Record

CAUSAL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def with_card(folder, seed=0, head=None, **config):
    "A small model with a card of its own."
    save(folder, tensors(seed), CAUSAL | config)
    if head is not None:
        (folder/"README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n# A model\n")
    return folder


def card_of(*models, out, **how):
    return (merge(models, out=out, **how).out/"README.md").read_text(encoding="utf-8")


def hub(text):
    "What the hub's own reader finds in the head."
    return ModelCard(text).data


def blocks(text):
    "Blocks of code of a card by language, in order, as Markdown has them."
    found = [t for t in MarkdownIt("commonmark").parse(text) if t.type == "fence"]
    return [(t.info, t.content) for t in found]


class TestTheHead:
    "What models say of themselves, where they agree."

    def test_of_models_that_agree(self, tmp_path):
        head = {"license": "apache-2.0", "language": ["en"], "pipeline_tag": "text-generation"}
        a = with_card(tmp_path/"a", 0, head | {"base_model": "org/base"})
        b = with_card(tmp_path/"b", 1, head | {"language": ["de", "en"]}, _name_or_path="org/base")
        data = hub(card_of(a, b, out=tmp_path/"o"))
        assert data.license == "apache-2.0" and data.language == ["en", "de"]
        assert data.pipeline_tag == "text-generation" and data.library_name == "transformers"
        assert data.base_model == ["org/base"] and data.base_model_relation == "merge"
        assert data.tags == ["merge", "frechet_merge", "euclidean"]

    def test_of_models_that_do_not(self, tmp_path):
        a = with_card(tmp_path/"a", 0, {"license": "mit"})
        b = with_card(tmp_path/"b", 1, {"license": "llama3"})
        c = with_card(tmp_path/"c", 2)
        text = card_of(a, b, c, out=tmp_path/"o")
        assert hub(text).license is None
        assert "`mit` by `a`; `llama3` by `b`; none that could be read by `c`" in text

    def test_one_that_says_nothing_is_no_agreement(self, tmp_path):
        a, b = with_card(tmp_path/"a", 0, {"license": "mit"}), with_card(tmp_path/"b", 1)
        assert hub(card_of(a, b, out=tmp_path/"o")).license is None

    def test_the_licence_of_the_base_counts(self, tmp_path):
        base, *models = (
            with_card(tmp_path/n, i, {"license": word})
            for i, (n, word) in enumerate([("base", "gemma"), ("a", "mit"), ("b", "mit")])
        )
        assert hub(card_of(*models, out=tmp_path/"o", base=base)).license is None

    def test_a_licence_of_its_own_name(self, tmp_path):
        own = {"license": "other", "license_name": "llama-4", "license_link": "https://x.org/l?a=1"}
        models = [with_card(tmp_path/n, i, own) for i, n in enumerate("ab")]
        data = hub(card_of(*models, out=tmp_path/"o"))
        assert (data.license, data.license_name) == ("other", "llama-4")
        assert data.license_link == own["license_link"]

    def test_the_task_is_that_of_the_class(self, tmp_path):
        models = [with_card(tmp_path/n, i) for i, n in enumerate("ab")]
        assert hub(card_of(*models, out=tmp_path/"o")).pipeline_tag == "text-generation"

    @pytest.mark.parametrize("name", ["/home/me/base", "models/base", "./base", "base", "a/b/c"])
    def test_a_place_is_no_origin(self, tmp_path, name):
        models = [with_card(tmp_path/n, i, _name_or_path=name) for i, n in enumerate("ab")]
        text = card_of(*models, out=tmp_path/"o")
        assert "base_model" not in text and "/home/me" not in text

    def test_norwegian(self, tmp_path):
        models = [with_card(tmp_path/n, i) for i, n in enumerate("ab")]
        for m in models:
            (m/"README.md").write_text("---\nlanguage:\n- no\n---\n")
        assert hub(card_of(*models, out=tmp_path/"o")).language == ["no"]

    def test_a_folder_of_the_cache_is_its_id(self, tmp_path):
        commit = "0123456789"*4
        at = [tmp_path/f"models--org--{n}"/"snapshots"/commit for n in "ab"]
        models = [with_card(folder, i) for i, folder in enumerate(at)]
        text = card_of(*models, out=tmp_path/"o")
        assert hub(text).base_model == ["org/a", "org/b"] and f"org/a@{commit}" in text
        assert "models--" not in yaml.safe_load(blocks(text)[0][1])["command"]

    def test_of_an_adapter(self, tmp_path):
        a, b = (adapter(tmp_path/n, i) for i, n in enumerate("ab"))
        data = hub(card_of(a, b, out=tmp_path/"o"))
        assert (data.library_name, data.base_model) == ("peft", "org/base")
        assert (data.base_model_relation, data.pipeline_tag) == ("adapter", "text-generation")
        c, d = (adapter(tmp_path/n, i, base=str(tmp_path/"base")) for i, n in enumerate("cd"))
        text = card_of(c, d, out=tmp_path/"p")
        assert hub(text).base_model is None and str(tmp_path) not in text


def adapter(folder, seed, base="org/base", rows=8, columns=11, layer="q", task="CAUSAL_LM"):
    g = torch.Generator().manual_seed(seed)
    key = f"base_model.model.{layer}.lora_{{}}.weight"
    shapes = {"A": (2, columns), "B": (rows, 2)}
    folder.mkdir()
    state = {key.format(k): torch.randn(s, generator=g) for k, s in shapes.items()}
    save_file(state, folder/"adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": [layer.rpartition(".")[2]],
        "base_model_name_or_path": base,
        "task_type": task,
    }
    (folder/"adapter_config.json").write_text(json.dumps(config))
    return folder


class TestNoPlaces:
    "Nobody learns from a card where its author keeps things."

    def test_of_all_that_a_recipe_names(self, tmp_path):
        place = tmp_path/"secret"
        base, a, b = (with_card(place/n, i) for i, n in enumerate(("base", "a", "b")))
        save_file({"q.weight": torch.ones(8, 11)}, place/"stats.safetensors")
        how = {"geometry": "curved", "metrics": [place/"stats.safetensors"]*2}
        text = card_of(a, b, out=tmp_path/"o", base=base, **how)
        assert str(tmp_path) not in text and "secret/base" not in text
        known = yaml.safe_load(blocks(text)[0][1])
        assert known["command"].startswith("frechet-merge merge a b -o o --base base --metrics")
        assert known["base"]["model"] == "base"
        assert known["metrics"][0]["metrics"] == "stats.safetensors"

    def test_of_adapters_on_a_base(self, tmp_path):
        base = with_card(tmp_path/"place"/"base")
        ads = [adapter(tmp_path/f"ad{i}", i) for i in range(2)]
        text = card_of(*(f"{base}+{a}" for a in ads), out=tmp_path/"o")
        assert str(tmp_path) not in text and "`base+ad0`" in text
        text = card_of(*ads, out=tmp_path/"p", bake=base)
        assert str(tmp_path) not in text and "| put on | `base` |" in text

    def test_two_of_one_name(self, tmp_path):
        a, b = with_card(tmp_path/"a"/"final", 0), with_card(tmp_path/"b"/"final", 1)
        known = yaml.safe_load(blocks(card_of(a, b, out=tmp_path/"o"))[0][1])
        assert [m["model"] for m in known["models"]] == ["final", "final-2"]


HOSTILE = [
    "a\n---\nlicense: gpl\n---\n# b",
    "```\n<script>alert(1)</script>\n```",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "a | b `c` ``d``",
    "- a: {b}\n  c: &d *e",
    "\u202eevil\x1b[31m",
    "{{ 7*7 }} ${x} %s {0}",
    "' \" \\",
]


def seen(card):
    "What Markdown makes of a card, without the words."
    body = re.sub(r"(?s)^---\n.*?\n---\n", "", card)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    inner = [c.type for t in tokens for c in t.children or () if c.type != "text"]
    return [t.type for t in tokens], inner


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_names(tmp_path, name):
    "Of models, of the output and of tensors."
    name = name.replace("/", "\u2215")
    state = [tensors(i) | {name: torch.ones(2)} for i in range(2)]
    a, b = save(tmp_path/name, state[0], CAUSAL), save(tmp_path/"b", state[1], CAUSAL)
    text = card_of(a, b, out=tmp_path/f"{name} out")
    plain = card_of(b, b, out=tmp_path/"plain")
    assert hub(text).to_dict() == hub(plain).to_dict()
    assert [k for k, _ in blocks(text)] == ["yaml", "python", "yaml"]
    assert yaml.safe_load(blocks(text)[0][1])["models"][0]["model"] == name
    assert yaml.safe_load(blocks(text)[2][1])["models"] == [name, "b"]
    compile(blocks(text)[1][1], "usage", "exec")

    assert seen(text) == seen(plain)
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_name_that_is_no_text(tmp_path):
    "Bytes that are no UTF-8 have a spelling in a card."
    name = os.fsdecode(b"caf\xe9")
    assert yaml.safe_load(in_yaml([name])) == [name]
    in_ticks(name).encode(), in_title(name).encode()
    models = [save(tmp_path/n, tensors(i), CAUSAL) for i, n in enumerate((name, "b"))]
    text = card_of(*models, out=tmp_path/"o")
    assert yaml.safe_load(blocks(text)[2][1])["models"] == [name, "b"]
    assert Record.read(tmp_path/"o").recipe["models"] == [str(m) for m in models]


STRANGE = {
    "no yaml": "---\n: : [\n---\n",
    "a list": "---\n- mit\n---\n",
    "a class": "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
    "an object": "---\nlicense: {mit: 1}\nlanguage: {en: 1}\n---\n",
    "a number": "---\nlicense: 3\npipeline_tag: 1.5\nbase_model: [[1]]\n---\n",
    "two lines": '---\nlicense: "mit\\ntags: [x]"\npipeline_tag: "<b>"\n---\n',
    "depth": "---\nlicense: " + "["*100_000 + "\n---\n",
    "aliases": "---\na: &a {x: y}\n" + "b: &b [*a, *a]\n" + "license: *b\n---\n",
    "no end": "---\nlicense: mit\n",
    "dates": "---\nlicense: 2024-99-99\n---\n",
    "not at the start": "words\n---\nlicense: mit\n---\n",
    "bytes": b"\xff\xfe---\nlicense: mit\n---\n",
    "long": "---\nx: " + "a"*said.MOST + "\nlicense: mit\n---\n",
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_cards_say_nothing(tmp_path, kind):
    models = [with_card(tmp_path/n, i) for i, n in enumerate("ab")]
    text = STRANGE[kind]
    for m in models:
        (m/"README.md").write_bytes(text.encode() if isinstance(text, str) else text)
    data = hub(card_of(*models, out=tmp_path/"o"))
    assert (data.license, data.language, data.base_model) == (None, None, None)
    assert data.pipeline_tag == "text-generation"


def test_a_card_that_is_no_file_does_not_hang(tmp_path):
    models = [with_card(tmp_path/n, i) for i, n in enumerate("ab")]
    os.mkfifo(models[0]/"README.md")
    (models[1]/"README.md").mkdir()
    assert hub(card_of(*models, out=tmp_path/"o")).license is None


def test_a_card_beside_a_lone_file_is_of_somebody_else(tmp_path):
    (tmp_path/"README.md").write_text("---\nlicense: mit\n---\n")
    files = [tmp_path/f"{n}.safetensors" for n in "ab"]
    for i, f in enumerate(files):
        save_file({"w": torch.full((2,), float(i))}, f)
    assert hub(card_of(*files, out=tmp_path/"o")).license is None


class TestItRuns:
    "What a card says to type works as it stands there."

    def test_the_recipe(self, tmp_path, monkeypatch):
        base, a, b = (with_card(tmp_path/n, i) for i, n in enumerate(("base", "a", "b")))
        how = {"weights": [3, 1], "scale": {"q.*": 0.5}, "drop": ["s"], "dtype": "bf16"}
        text = card_of(a, b, out=tmp_path/"o", base=base, geometry="clipped:t=0.5", **how)
        monkeypatch.chdir(tmp_path)
        (tmp_path/"recipe.yml").write_text(blocks(text)[2][1])
        asked = read_recipe(tmp_path/"recipe.yml")
        run_recipe(asked, Output(tmp_path/"again", asked.output.dtype))
        first, again = (tmp_path/n/"model.safetensors" for n in ("o", "again"))
        assert first.read_bytes() == again.read_bytes()

    def test_a_model_in_memory_has_none(self, tmp_path, monkeypatch):
        text = card_of(tensors(0), tensors(1), out=tmp_path/"o")
        assert [k for k, _ in blocks(text)] == ["yaml", "python"]
        assert "library_name" not in text
        found = run(text, tmp_path)["tensors"]
        # read on look-up
        monkeypatch.chdir(tmp_path)
        torch.testing.assert_close(found["q.bias"], load(tmp_path/"o")["q.bias"])

    def test_for_transformers(self, tmp_path):
        models = [llama(tmp_path/n, i) for i, n in enumerate("ab")]
        text = card_of(*models, out=tmp_path/"o")
        held = run(text, tmp_path)["model"]
        assert type(held).__name__ == "LlamaForCausalLM"
        stored = load_file(tmp_path/"o"/"model.safetensors")
        torch.testing.assert_close(held.state_dict()["lm_head.weight"], stored["lm_head.weight"])

    def test_for_peft(self, tmp_path):
        base = llama(tmp_path/"org-base", 0)
        layer = "model.layers.0.self_attn.q_proj"
        ads = [adapter(tmp_path/n, i, "org/base", 8, 8, layer) for i, n in enumerate("ab")]
        text = card_of(*ads, out=tmp_path/"o")
        assert 'from_pretrained("org/base")' in blocks(text)[1][1]
        held = run(text.replace("org/base", str(base)), tmp_path)["model"]
        assert type(held).__name__.startswith("Peft")
        assert any("lora_A" in n for n, _ in held.named_parameters())

    def test_for_sentence_transformers(self, tmp_path):
        st = pytest.importorskip("sentence_transformers")
        from sentence_transformers.models import Pooling, Transformer

        bert = tiny_bert(tmp_path/"bert")
        for n in "ab":
            part = Transformer(str(bert))
            st.SentenceTransformer(modules=[part, Pooling(8)]).save(str(tmp_path/n))
        text = card_of(tmp_path/"a", tmp_path/"b", out=tmp_path/"o")
        assert hub(text).library_name == "sentence-transformers"
        assert run(text, tmp_path)["model"].encode(["a b"]).shape == (1, 8)

    def test_for_diffusers(self, tmp_path):
        diffusers = pytest.importorskip("diffusers")
        for n in "ab":
            made = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
            made.save_pretrained(tmp_path/n)
        text = card_of(tmp_path/"a", tmp_path/"b", out=tmp_path/"o")
        assert hub(text).library_name == "diffusers"
        assert type(run(text, tmp_path)["model"]).__name__ == "AutoencoderKL"


def run(text, folder):
    "What the usage of a card leaves, run where its folder is."
    here, held = os.getcwd(), {}
    code = next(code for kind, code in blocks(text) if kind == "python")
    os.chdir(folder)
    try:
        exec(compile(code, "usage", "exec"), held)
    finally:
        os.chdir(here)
    return held


def llama(folder, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=11, num_hidden_layers=1, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_bert(folder):
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (folder/"vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), num_hidden_layers=1, **sizes)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder/"vocab.txt")).save_pretrained(folder)
    return folder


class TestMixtures:
    "What is no merge is made again by its own command, whose card is as discreet as any."

    def told(self, tmp_path, made, command):
        a, b = (with_card(tmp_path/n, i) for i, n in enumerate("ab"))
        record = merge([a, b], out=tmp_path/"o").record
        words = command.replace("$a", str(a)).replace("$b", str(b)).replace("$", f"{tmp_path}/")
        return card(replace(record, made=made, command=words), "o")

    def test_a_mixture(self, tmp_path):
        made = {"what": "mixture", "type": "mixtral", "experts": 2, "per_token": 1}
        text = self.told(tmp_path, made, "frechet-merge mixture $a $b -o o --gate random")
        assert "`frechet-merge mixture a b -o o --gate random`" in text
        assert "whose 2 experts are the MLPs of 2 models, of which each token is sent to 1" in text
        assert "frechet-merge merge" not in text and "frechet-merge run" not in text
        assert str(tmp_path) not in text and hub(text).tags[0] == "merge"

    def test_experts_that_were_merged_by_data(self, tmp_path):
        made = {"what": "experts", "experts": 8, "keep": 4, "data": f"{tmp_path}/me/x.jsonl"}
        text = self.told(tmp_path, made, "frechet-merge experts $a -o o --data $me/x.jsonl")
        assert "`frechet-merge experts a -o o --data x.jsonl`" in text
        assert "with 4 experts in the place of 8" in text and str(tmp_path) not in text

    def test_what_cannot_be_typed_is_not_said(self, tmp_path):
        a, b = (with_card(tmp_path/n, i) for i, n in enumerate("ab"))
        record = merge([a, b], out=tmp_path/"o").record
        made = {"what": "mixture", "type": "mixtral", "experts": 2, "per_token": 1}
        text = card(replace(record, made=made, command=None), "o")
        assert "Make it again" not in text

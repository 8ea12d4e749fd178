"""What mergekit's documentation says of its options, and what each gives here.
What its program writes for the same recipes is in bench/mergekit_recipes.py."""
import json
from functools import partial

import pytest
import torch
from conftest import cli, save
from test_recipe_files import deep, ran, written
from test_templates import talker
from test_vocabularies import WORDS, speaker

from frechet_merge import MergeError, merge
from frechet_merge.files.open import load
from frechet_merge.geometries.directions import Chordal, Slerp
from frechet_merge.geometries.selected import ModelStock
from frechet_merge.vocabularies.given import as_given
from frechet_merge.merging.formats import APART, FORMATS
from frechet_merge.recipes.written import read_recipe
from frechet_merge.merging.record import Record

USER, SYSTEM = {"role": "user", "content": "Hi "}, {"role": "system", "content": "Be kind."}
CHATS = {"user": [USER], "both": [SYSTEM, USER, {"role": "assistant", "content": "Yes?"}]}
# as mergekit's templates render them: both without, and the user's with what asks for an answer
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n",
        "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>\n"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\n"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\n"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s> [INST] Be kind.\n\nHi  [/INST] Yes?</s>", "<s> [INST] Hi  [/INST]"),
    "alpaca": (
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nYes?",
        "\n\n### Instruction:\nHi### Response:\n",
    ),
    "exaone": (
        "    [|system|]Be kind.\n        [|endofturn|]\n\n    [|user|]Hi \n        \n\n"
        "    [|assistant|]Yes?\n        [|endofturn|]\n\n",
        "        [|system|][|endofturn|]\n\n    [|user|]Hi \n        \n\n    [|assistant|]\n",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_by_its_name_is_what_transformers_renders(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    a = talker(tmp_path/"a", 0, None)
    config = json.loads((a/"tokenizer_config.json").read_text())
    said = {**config, "bos_token": "<s>", "eos_token": "</s>"}
    (a/"tokenizer_config.json").write_text(json.dumps(said))
    text = f"models: [{{model: {a}, parameters: {{weight: 1}}}}]\nmerge_method: linear\n"
    path = written(tmp_path, text + f"chat_template: {name}")
    code, _, err = cli("run", path, "-o", tmp_path/"o")
    assert code == 0 and (f"the chat template {name}" in err) == (name in APART), err
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path/"o")
    both = tokenizer.apply_chat_template(CHATS["both"], tokenize=False)
    asked = tokenizer.apply_chat_template(
        CHATS["user"], tokenize=False, add_generation_prompt=True
    )
    assert (both, asked) == RENDERED[name]


@pytest.fixture
def models(tmp_path):
    "Models base, a, b and c of three layers, far apart."
    config, found = {"model_type": "toy", "n_layer": 3}, {}
    for i, name in enumerate(("base", "a", "b", "c")):
        found[name] = save(tmp_path/name, deep(i), config)
    return found


def run(tmp_path, models, *words):
    "The tensors of a recipe whose models are called by their names."
    text = "\n".join(words)
    for name, folder in models.items():
        text = text.replace(f"${name}", str(folder))
    tmp_path.mkdir(exist_ok=True)
    return ran(written(tmp_path, text), tmp_path/"o").tensors


def weighted(**weights):
    each = [f"{{model: ${n}, parameters: {{weight: {w}}}}}" for n, w in weights.items()]
    return f"models: [{', '.join(each)}]"


def turned(x, y, t, axis):
    "Shoemake's formula of each vector along an axis; of a zero, as if perpendicular."
    x, y = x.double(), y.double()
    unit = [v/v.norm(dim=axis, keepdim=True).clamp(min=1e-300) for v in (x, y)]
    phi = (unit[0]*unit[1]).sum(axis, keepdim=True).clamp(-1, 1).acos()
    return (((1 - t)*phi).sin()*x + (t*phi).sin()*y)/phi.sin()


@pytest.mark.parametrize("by_row, axis", [("false", -1), ("true", 0)])
@pytest.mark.parametrize("base", ["", "base_model: $base"])
def test_nuslerp_of_rows_and_columns(tmp_path, models, by_row, axis, base):
    "What mergekit calls a column is a row of the tensor: it was tried."
    how = f"parameters: {{nuslerp_flatten: false, nuslerp_row_wise: {by_row}}}"
    words = [weighted(a=1, b=3), "merge_method: nuslerp", base, how]
    out = run(tmp_path/"run", models, *words)
    theta0, a, b = (load(models[n]) for n in ("base", "a", "b"))
    for name, x in out.items():
        start = theta0[name].double() if base else 0
        by_hand = start + turned(a[name] - start, b[name] - start, 0.75, axis)
        torch.testing.assert_close(x.double(), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("geometry", ["slerp:axis=-1", "slerp:axis=0", "stock:axis=-1"])
def test_a_number_is_a_vector_of_one(geometry):
    a, b, c = ({"s": torch.tensor(x), "v": torch.ones(3)*x} for x in (2.0, 4.0, 1.0))
    out = merge([a, b], geometry, weights=[1, 3], base=c if "stock" in geometry else None)
    assert out.tensors["s"].shape == () and out.tensors["v"].shape == (3,)
    assert out.tensors["s"] == 3.5


@pytest.mark.parametrize("axis", [1, -2, 0.0, "x", True])
@pytest.mark.parametrize("of", [Slerp, ModelStock])
def test_vectors_lie_along_rows_or_columns(of, axis):
    with pytest.raises(ValueError, match="-1 for the rows of a matrix, or 0 for its columns"):
        of(axis=axis)


@pytest.mark.parametrize("times", ["x", float("nan"), float("inf")])
def test_a_norm_is_multiplied_by_a_finite_number(times):
    with pytest.raises(ValueError, match="a finite number"):
        Chordal(times)


def test_model_stock_of_rows(tmp_path, models):
    words = [weighted(a=1, b=1, c=1), "base_model: $base", "merge_method: model_stock"]
    out = run(tmp_path/"run", models, *words, "parameters: {filter_wise: true}")
    theta0 = load(models["base"])
    for name, x in out.items():
        start = theta0[name].double()
        deltas = [load(models[n])[name].double() - start for n in "abc"]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosines = [torch.cosine_similarity(deltas[i], deltas[j], dim=-1) for i, j in pairs]
        mean = sum(cosines)/3
        ratio = 3*mean/(1 + 2*mean)
        by_hand = start + ratio.unsqueeze(-1)*sum(deltas)/3
        torch.testing.assert_close(x.double(), by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["", "base_model: $base"])
def test_multislerp_with_weights_as_they_are(tmp_path, models, base):
    words = [weighted(a=0.5, b=0.7, c=0.4), "merge_method: multislerp", base]
    out = run(tmp_path/"run", models, *words, "parameters: {normalize_weights: false}")
    theta0, ws = load(models["base"]), [0.5, 0.7, 0.4]
    for name, x in out.items():
        start = theta0[name].double() if base else torch.zeros(())
        deltas = [load(models[n])[name].double() - start for n in "abc"]
        direction = sum(w*d/d.norm() for w, d in zip(ws, deltas))
        norm = sum(w*d.norm() for w, d in zip(ws, deltas))
        by_hand = start + norm*direction/direction.norm()
        torch.testing.assert_close(x.double(), by_hand, rtol=1e-5, atol=1e-6)


def test_an_epsilon_that_would_change_a_mean_is_refused(tmp_path):
    text = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    text += "merge_method: multislerp\nparameters: {eps: %s}"
    with pytest.raises(MergeError, match="line 3: parameters.eps.*leave it out"):
        read_recipe(written(tmp_path, text % 0.01))
    assert read_recipe(written(tmp_path, text % 1e-9)).recipe.models == ["a", "b"]


@pytest.fixture
def speakers(tmp_path):
    "Models with tokenizers: a has <x>, b has <y> and <z>, and the base neither."
    added = {"base": (), "a": ("<x>",), "b": ("<y>", "<z>")}
    return {n: speaker(tmp_path/n, i, WORDS, t) for i, (n, t) in enumerate(added.items())}


ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def row(folder, name, token):
    "The row of a token, as transformers numbers it."
    from transformers import AutoTokenizer

    return load(folder)[name][AutoTokenizer.from_pretrained(folder).get_vocab()[token]]


MEAN = "models: [{model: $a, parameters: {weight: 1}}, {model: $b, parameters: {weight: 3}}]\n"
MEAN += "merge_method: linear\ntokenizer: {source: union, tokens: {%s}}"
OF_A = "{source: {kind: model_token, model: $a, token: w1}}"
TOKENS = {
    "of a model": ("<x>: {source: $a}", "<x>", lambda a, b: a("<x>")),
    "that all have": ("w1: {source: $a}", "w1", lambda a, b: (a("w1") + 3*b("w1"))/4),
    "forced": ("w1: {source: $a, force: true}", "w1", lambda a, b: a("w1")),
    "of another token": (f"<y>: {OF_A}", "<y>", lambda a, b: (a("w1") + 3*b("<y>"))/4),
    "new": (f"<new>: {OF_A}", "<new>", lambda a, b: a("w1")),
    "zeros": ("<x>: {source: {kind: zero}}", "<x>", lambda a, b: a("<x>")/4),
    "new zeros": ("<new>: {source: {kind: zero}}", "<new>", lambda a, b: 0*a("w1")),
    "forced zeros": ("w1: {source: {kind: zero}, force: true}", "w1", lambda a, b: 0*a("w1")),
    "of a number": (
        "<new>: {source: {kind: model_token, model: $b, token_id: 0}}",
        "<new>",
        lambda a, b: b("<unk>"),
    ),
}


@pytest.mark.parametrize("what", TOKENS)
def test_rows_of_tokens(tmp_path, speakers, what):
    "And the record says them again."
    words, token, by_hand = TOKENS[what]
    (tmp_path/"run").mkdir()
    text = MEAN % words
    for name, folder in speakers.items():
        text = text.replace(f"${name}", str(folder))
    code, _, err = cli("run", written(tmp_path/"run", text), "-o", tmp_path/"o")
    assert code == 0, err
    for name in ROWS:
        a, b = (partial(row, speakers[n], name) for n in "ab")
        torch.testing.assert_close(row(tmp_path/"o", name, token), by_hand(a, b))
        untouched = (row(speakers["a"], name, "w2") + 3*row(speakers["b"], name, "w2"))/4
        torch.testing.assert_close(row(tmp_path/"o", name, "w2"), untouched)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/"o")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path/"o")
    assert model.config.vocab_size >= len(tokenizer)
    assert tokenizer.tokenize(f"w2 {token} w2") == ["w2", token, "w2"]
    assert cli("run", tmp_path/"o"/"frechet_merge.json", "-o", tmp_path/"again")[0] == 0
    assert Record.read(tmp_path/"again").recipe == Record.read(tmp_path/"o").recipe
    for name in ROWS:
        assert torch.equal(load(tmp_path/"again")[name], load(tmp_path/"o")[name])


def test_rows_in_a_sum_are_those_that_were_given(tmp_path, speakers):
    "Of all models and the base: what nobody changed is added by nobody."
    text = "models: [{model: $a, parameters: {weight: 1}}, {model: $b, parameters: {weight: 3}}]\n"
    text += "merge_method: task_arithmetic\nbase_model: $base\ntokenizer:\n  source: union\n"
    text += "  tokens: {<x>: {source: $a}, <y>: {source: $b}, <z>: {source: $b}, "
    text += "w1: {source: $base, force: true}}"
    (tmp_path/"run").mkdir()
    for name, folder in speakers.items():
        text = text.replace(f"${name}", str(folder))
    code, _, err = cli("run", written(tmp_path/"run", text), "-o", tmp_path/"o")
    assert code == 0, err
    for name in ROWS:
        for token, whose in (("<x>", "a"), ("<y>", "b"), ("<z>", "b"), ("w1", "base")):
            given = row(speakers[whose], name, token)
            torch.testing.assert_close(row(tmp_path/"o", name, token), given)
        base, a, b = (row(speakers[n], name, "w2") for n in ("base", "a", "b"))
        torch.testing.assert_close(row(tmp_path/"o", name, "w2"), base + (a - base) + 3*(b - base))


def test_a_card_names_no_place_of_a_model_that_gives_a_row(tmp_path, speakers):
    tokens = {"<x>": {"model": str(speakers["b"]), "token": "<y>"}, "<y>": {}}
    models = [str(speakers[n]) for n in "ab"]
    merge(models, tokenizer="union", tokens=tokens, out=tmp_path/"o")
    card = (tmp_path/"o"/"README.md").read_text()
    assert "model: b\n    token: <y>" in card and str(tmp_path) not in card, card


def test_a_word_that_says_nothing_of_a_row_is_refused():
    with pytest.raises(ValueError, match="'kind' is none of model, token, token_id and force"):
        as_given({"<x>": {"kind": "model_token", "model": "a"}})


def test_rows_of_the_base_in_a_file_of_several(tmp_path, speakers):
    base, a, b = (str(speakers[n]) for n in ("base", "a", "b"))
    rows = "tokens: {<x>: {model: base, token: w1}}\n"
    text = f"name: one\nmodels: [{a}, {b}]\nbase: {base}\ntokenizer: union\n" + rows
    assert len(read_recipe(written(tmp_path, text + f"---\nmodels: [one, {a}]\n")).steps) == 2


# a row that is not there, what is said of it, and the row as the remedy has it
REFUSED = {
    "of no such token": (
        "<x>: {source: $b}",
        "which has no such token.\nName a model that has it",
        "<x>: {source: $a}",
    ),
    "of no model of the merge": (
        "<x>: {source: /c}",
        "is none of .*\nName one of them",
        "<x>: {source: $a}",
    ),
    "beyond the last": (
        "<n>: {source: {kind: model_token, model: $a, token_id: 999}}",
        "is to be row 999 of .*\nName the token in the place of the number",
        "<n>: {source: {kind: model_token, model: $a, token: w1}}",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_rows_that_are_not_there_are_refused(tmp_path, speakers, what):
    "And the remedy that is named gives a row."
    wrong, said, right = REFUSED[what]
    (tmp_path/"run").mkdir()
    texts = [MEAN % words for words in (wrong, right)]
    for name, folder in speakers.items():
        texts = [text.replace(f"${name}", str(folder)) for text in texts]
    code, _, err = cli("run", written(tmp_path/"run", texts[0]), "-o", tmp_path/"o")
    assert code == 1 and len(err.splitlines()) <= 3 and not (tmp_path/"o").exists()
    with pytest.raises(MergeError, match=said):
        read = read_recipe(tmp_path/"run"/"recipe.yml").recipe
        merge([*read.models], tokenizer="union", tokens=read.tokens)
    code, _, err = cli("run", written(tmp_path/"run", texts[1]), "-o", tmp_path/"o")
    assert code == 0, err
    token = right.partition(":")[0]
    whose = row(speakers["a"], ROWS[0], "w1" if token == "<n>" else token)
    torch.testing.assert_close(row(tmp_path/"o", ROWS[0], token), whose)


def test_zeros_are_of_no_token():
    from frechet_merge.vocabularies.given import Given

    with pytest.raises(ValueError, match="a row of zeros is no token's"):
        Given(token="cat")


def test_a_tied_model_gets_rows_of_its_own(tmp_path):
    "Where the model that gives a row has another one in its output layer."
    a = speaker(tmp_path/"a", 0, WORDS, ("<x>",), tie_word_embeddings=True)
    b = speaker(tmp_path/"b", 1, WORDS, ("<x>",), tie_word_embeddings=False)
    given = {"w1": {"model": str(b), "force": True}}
    merge([a, b], tokenizer=str(a), tokens=given, out=tmp_path/"o")
    for name in ROWS:
        torch.testing.assert_close(row(tmp_path/"o", name, "w1"), row(b, name, "w1"))


# method → its parameters by the documentation, with what they are if nobody says them
DOCUMENTED = {
    "linear": "normalize: true",
    "nuslerp": "nuslerp_flatten: true, nuslerp_row_wise: false",
    "multislerp": "normalize_weights: true, eps: 1e-8",
    "karcher": "max_iter: 10, tol: 1e-5",
    "task_arithmetic": "lambda: 1.0, normalize: false",
    "ties": "lambda: 1.0, density: 1.0, normalize: true",
    "dare_linear": "lambda: 1.0, density: 1.0, rescale: true",
    "dare_ties": "lambda: 1.0, density: 1.0, rescale: true",
    "della": "lambda: 1.0, density: 1.0, epsilon: 0.15",
    "della_linear": "lambda: 1.0, density: 1.0, epsilon: 0.15",
    "breadcrumbs": "lambda: 1.0, density: 1.0, gamma: 0.01",
    "breadcrumbs_ties": "lambda: 1.0, density: 1.0, gamma: 0.01",
    "sce": "select_topk: 1.0",
    "model_stock": "filter_wise: false",
    "ram": "epsilon: 1e-5",
    "ramplus_tl": "epsilon: 1e-5, r: 0.1, alpha: 0.2",
}


@pytest.mark.parametrize("method", DOCUMENTED)
def test_a_default_that_is_said_changes_nothing(tmp_path, method):
    text = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2}}]\n"
    text += "" if method in ("linear", "karcher") else "base_model: z\n"
    text += f"merge_method: {method}\n"
    alone = read_recipe(written(tmp_path, text)).recipe
    said = read_recipe(written(tmp_path, text + f"parameters: {{{DOCUMENTED[method]}}}")).recipe
    assert said == alone


# fields and options of its documentation that are answered by name, and what is said
ANSWERED = {
    "a source of a token with no model": (
        "models: [{model: a, parameters: {weight: 1}}]\nmerge_method: linear\n"
        "tokenizer: {tokens: {x: {force: true}}}",
        "needs a source",
    ),
    "both words for a tokenizer": (
        "models: [{model: a, parameters: {weight: 1}}]\nmerge_method: linear\n"
        "tokenizer: {source: union}\ntokenizer_source: union",
        "give one of them",
    ),
    "a large eps": (
        "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
        "merge_method: multislerp\nparameters: {eps: 0.01}",
        "leave it out",
    ),
    "unnormalised weights over depth": (
        "models: [{model: a, parameters: {weight: [0, 1]}}, {model: b, parameters: {weight: 1}}]\n"
        "merge_method: multislerp\nparameters: {normalize_weights: false}",
        "plain numbers as weights",
    ),
    "experts that all tokens see": (
        "base_model: a\nexperts: [{source_model: b}]\nshared_experts: [{source_model: a}]",
        "leave it out",
    ),
    "an architecture of mixtures": (
        "base_model: a\ngate_mode: random\narchitecture: qwen\nexperts: [{source_model: b}]",
        "is not made here",
    ),
    "a residual scale": (
        "base_model: a\ngate_mode: random\n"
        "experts: [{source_model: b, residual_scale: 0.1}, {source_model: b}]",
        "merge a scaled model first",
    ),
}


@pytest.mark.parametrize("what", ANSWERED)
def test_what_is_not_read_is_answered_by_name(tmp_path, what):
    text, said = ANSWERED[what]
    with pytest.raises(MergeError, match="recipe.yml, line") as e:
        read_recipe(written(tmp_path, text))
    assert said in str(e.value) and len(str(e.value).splitlines()) <= 3, str(e.value)

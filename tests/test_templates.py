"""The result has one chat template, a chosen one if somebody chose, and transformers reads it."""
import json

import pytest
from conftest import cli
from test_vocabularies import WORDS, speaker
from transformers import AutoTokenizer

from frechet_merge import merge
from frechet_merge.merging.record import Record

CHAT = [{"role": "user", "content": "w1"}]
ONE = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
TWO = "{% for m in messages %}w2 {{ m['content'] }}{% endfor %}"


def talker(folder, seed, template, place="jinja", added=("<|im_start|>",)):
    "A model with a chat template in a file, or in the config of its tokenizer."
    speaker(folder, seed, WORDS, added)
    if template is None:
        return folder
    if place == "jinja":
        (folder/"chat_template.jinja").write_text(template)
        return folder
    config = folder/"tokenizer_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "chat_template": template}))
    return folder


def spoken(folder):
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False)


PLACES = [("jinja", "jinja"), ("jinja", "config"), ("config", "jinja"), ("config", "config")]


@pytest.mark.parametrize("places", PLACES)
def test_a_model_is_chosen(tmp_path, places):
    a, b = (talker(tmp_path/n, i, (ONE, TWO)[i], places[i]) for i, n in enumerate("ab"))
    merge([a, b], chat_template=b, out=tmp_path/"o")
    assert spoken(tmp_path/"o") == spoken(b) != spoken(a)
    in_config = "chat_template" in json.loads((tmp_path/"o"/"tokenizer_config.json").read_text())
    assert in_config == (places[0] == "config")


def test_a_folder_without_one_gets_it(tmp_path):
    a, b = talker(tmp_path/"a", 0, None), talker(tmp_path/"b", 1, TWO)
    with pytest.warns(UserWarning, match="b has a chat template that the result has not"):
        merge([a, b], out=tmp_path/"without")
    merge([a, b], chat_template=b, out=tmp_path/"o")
    assert spoken(tmp_path/"o") == spoken(b)


def test_named_templates_come_along(tmp_path):
    a, b = talker(tmp_path/"a", 0, ONE), talker(tmp_path/"b", 1, TWO)
    for f, name in ((a, "old"), (b, "tools")):
        (f/"additional_chat_templates").mkdir()
        (f/"additional_chat_templates"/f"{name}.jinja").write_text("{{ 1 }}")
    merge([a, b], chat_template=b, out=tmp_path/"o")
    found = AutoTokenizer.from_pretrained(tmp_path/"o").chat_template
    assert found == {"default": TWO, "tools": "{{ 1 }}"}


def test_a_list_of_templates(tmp_path):
    several = [{"name": "default", "template": TWO}, {"name": "tools", "template": "{{ 1 }}"}]
    a, b = talker(tmp_path/"a", 0, ONE), talker(tmp_path/"b", 1, several, "config")
    merge([a, b], chat_template=b, out=tmp_path/"o")
    found = AutoTokenizer.from_pretrained(tmp_path/"o").chat_template
    assert found == {"default": TWO, "tools": "{{ 1 }}"}


@pytest.mark.parametrize("suffix", ["jinja", "json"])
def test_a_file_is_chosen_on_the_command_line(tmp_path, suffix):
    for i, name in enumerate("ab"):
        talker(tmp_path/name, i, ONE)
    file = tmp_path/f"mine.{suffix}"
    file.write_text(TWO if suffix == "jinja" else json.dumps({"chat_template": TWO}))
    words = ["merge", "a", "b", "-o", "o", "--chat-template", file.name]
    code, _, said = cli(*words, cwd=tmp_path)
    assert code == 0, said
    assert spoken(tmp_path/"o") == "w2 w1"
    assert f"--chat-template mine.{suffix}" in Record.read(tmp_path/"o").command


def test_the_base_is_chosen(tmp_path):
    base, a = talker(tmp_path/"base", 0, TWO), talker(tmp_path/"a", 1, ONE)
    merge([a], base=base, chat_template="base", out=tmp_path/"o")
    assert spoken(tmp_path/"o") == spoken(base)


class TestOthers:
    "Models whose templates disagree."

    def test_one_note_by_name(self, tmp_path):
        every = [talker(tmp_path/n, i, (ONE, TWO, TWO)[i]) for i, n in enumerate("abc")]
        with pytest.warns(UserWarning) as said:
            merge(every, out=tmp_path/"o")
        notes = [str(w.message) for w in said if "chat template" in str(w.message)]
        assert len(notes) == 1 and str(every[1]) in notes[0] and str(every[0]) in notes[0]
        assert spoken(tmp_path/"o") == spoken(every[0])

    def test_one_template_in_two_places_is_one(self, tmp_path, recwarn):
        a, b = talker(tmp_path/"a", 0, ONE), talker(tmp_path/"b", 1, ONE, "config")
        merge([a, b], out=tmp_path/"o")
        assert not [w for w in recwarn if "chat template" in str(w.message)]

    def test_tokens_of_a_template_that_nobody_knows(self, tmp_path):
        a, b = talker(tmp_path/"a", 0, TWO, added=()), talker(tmp_path/"b", 1, ONE)
        with pytest.warns(UserWarning, match="has '<|im_start|>', which is no token"):
            merge([a, b], tokenizer=a, chat_template=b, out=tmp_path/"o")
        merge([a, b], tokenizer=b, chat_template=b, out=tmp_path/"p")
        assert spoken(tmp_path/"p") == spoken(b)


@pytest.mark.parametrize("choice, says", [("nobody", "and no file"), ("a", "no chat template")])
def test_nothing_to_choose(tmp_path, monkeypatch, choice, says):
    monkeypatch.chdir(tmp_path)
    a, b = (str(talker(tmp_path/n, i, (None, TWO)[i])) for i, n in enumerate("ab"))
    with pytest.raises(ValueError, match=says):
        merge([a, b], chat_template=a if choice == "a" else choice, out=tmp_path/"o")
    assert not (tmp_path/"o").exists()

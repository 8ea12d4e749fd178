"""Whoever is refused is told what to do, and a test has done it, on the input that was refused.

`remedies.txt` names that test for each remedy of `files`, `matching` and `merging`: what a message
says on a line of its own, or names an option for. A new one without a test fails here. What is
left to the world outside (a download, a disk, another process) is no remedy that a test can run;
such words are in OUTSIDE."""

import ast
import re

import pytest
from conftest import ROOT, TRIED, remedies

FOLDERS = ("files", "vocabularies", "matching", "symmetries", "execution", "merging", "recipes")

# a line of its own, or an option
OFFER = re.compile(r"(^|[.])\n(?=[A-Z{])|\(--[a-z]|: --[a-z]|--drop|^--resume")
OUTSIDE = re.compile(
    r"[Dd]ownload|report it|git lfs|[Ii]nstall|Wait |do not trust|Put the file itself|Check "
    r"|restore it|Free some|Put them together|by hand"
)


def literal(node):
    "What a text says, with {} for what it is about; None if a node is no text."
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(x) or "{}" for x in node.values)
    return None


def texts(node, place=""):
    "The texts in the code of a module, with the function that says them; docstrings are none."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield from texts(child, f"{place}.{child.name}".strip("."))
        elif (text := literal(child)) is not None:
            if not isinstance(node, ast.Expr):
                yield place, text
        else:
            yield from texts(child, place)


def offers():
    "(module:function, what it says) for each remedy."
    for folder in FOLDERS:
        for path in sorted((ROOT/"frechet_merge"/folder).glob("*.py")):
            for place, text in texts(ast.parse(path.read_text())):
                if OFFER.search(text) and not OUTSIDE.search(text):
                    yield f"{folder}.{path.stem}:{place}", text


def named_in(path):
    "The names of the tests in a file, with their classes."
    for node in ast.parse(path.read_text()).body:
        within = node.body if isinstance(node, ast.ClassDef) else [node]
        lead = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for f in within:
            if isinstance(f, ast.FunctionDef) and f.name.startswith("test_"):
                yield f"{path.name}::{lead}{f.name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_remedy_has_been_tried(folder):
    listed = [*remedies()]
    lacking = [
        (place, text)
        for place, text in offers()
        if place.startswith(folder) and not any(p == place and w in text for p, w, _ in listed)
    ]
    assert not lacking


def test_the_list_names_what_there_is():
    said = [*offers()]
    gone = [(p, w) for p, w, _ in remedies() if not any(p == q and w in t for q, t in said)]
    assert not gone
    there = {t for path in (ROOT/"tests").glob("test_*.py") for t in named_in(path)}
    named = [t.partition("[")[0] for _, _, t in remedies() if not t.startswith("(")]
    assert not {*named} - there


def test_what_the_tests_say_is_held_to_the_list():
    "`conftest.said` fails a test that is named in the list, and does not meet the message."
    assert all(words for of in TRIED.values() for words in of)
    assert sum(map(len, TRIED.values())) > 80

"""The code reads as CONTRIBUTING says, where a linter does not look."""

import ast
import io
import json
import re
import tokenize

import pytest
from conftest import ROOT

TOKENS, PATHS, STATEMENTS, PARAMETERS = 400, 15, 40, 8

# what people call with keywords, and what a command line calls
DOORS = {"merge", "tune", "curvature", "collect", "inspect", "examples", "frechet_mean", "extract"}
DOORS |= {"fewer_experts", "mixture"}

BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.Assert, ast.Match)
SHORT = (ast.Return, ast.Raise, ast.Continue, ast.Break, ast.Pass)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
CODE = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)


def cells(path):
    "The code cells of a notebook, without magics."
    for i, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            source = re.sub(r"^\s*[%!].*$", "", "".join(cell["source"]), flags=re.M)
            yield f"{path.relative_to(ROOT)}[{i}]", source


def sources():
    "Where and what: every piece of code that is written by hand."
    notebooks = [p for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if "checkpoints" not in p.parts]
    found = [piece for path in notebooks for piece in cells(path)]
    for folder in ("tests", "bench", ".ci"):
        for path in sorted((ROOT/folder).rglob("*.py")):
            found.append((str(path.relative_to(ROOT)), path.read_text()))
    return found


def paths(function):
    "Ways through a function: branches, comprehensions and their conditions, boolean operators."
    n = 1
    for node in ast.walk(function):
        if isinstance(node, ast.BoolOp):
            n += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            n += 1 + len(node.ifs)
        elif isinstance(node, BRANCHES):
            n += 1
    return n


def parameters(function):
    args = function.args
    return len(args.posonlyargs + args.args + args.kwonlyargs)


def too_large(source):
    "Functions of a piece of code that are more than a reader holds at once, and why."
    tree = ast.parse(source)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type in CODE]
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        door = node.name in DOORS or node.name.endswith("_command")
        size = sum(node.lineno <= t.start[0] <= node.end_lineno for t in tokens)
        statements = sum(isinstance(x, ast.stmt) for x in ast.walk(node)) - 1
        for what, n, most in (
            ("tokens", size, TOKENS),
            ("paths", paths(node), PATHS),
            ("statements", statements, STATEMENTS),
            ("parameters", 0 if door else parameters(node), PARAMETERS),
        ):
            if n > most:
                yield node.name, f"{n} {what}, at most {most}"


def crowded(source):
    "Lines on which a header and a body stand together that is more than a way out."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DEFINITIONS) or not hasattr(node, "body"):
            continue
        if not isinstance(node, ast.stmt):
            continue
        first = node.body[0]
        if first.lineno == node.lineno and not isinstance(first, SHORT):
            yield node.lineno


def definitions(source):
    "Names of what an export cell defines; variants by type of one function are one."
    return sorted({n.name for n in ast.parse(source).body if isinstance(n, DEFINITIONS)})


def test_a_function_is_understood_at_once():
    found = [f"{at} {name}: {why}" for at, code in sources() for name, why in too_large(code)]
    assert not found, "\n".join(found)


def test_a_body_stands_below_its_header():
    found = [f"{at} line {n}" for at, code in sources() for n in crowded(code)]
    assert not found, "\n".join(found)


def test_an_export_cell_defines_one_thing():
    found = [
        f"{at}: {', '.join(names)}"
        for at, code in sources()
        if re.match(r"#\| ?export", code) and len(names := definitions(code)) > 1
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source, found",
    [
        ("if a: b = 1", [1]),
        ("if a: raise b", []),
        ("for a in b: c(a)", [1]),
        ("def f(): return 1", []),
        ("with a as b:\n    c", []),
    ],
)
def test_crowded_lines_are_seen(source, found):
    assert list(crowded(source)) == found


def test_large_functions_are_seen():
    many = ", ".join(f"a{i}" for i in range(9))
    assert [why for _, why in too_large(f"def f({many}): pass")] == ["9 parameters, at most 8"]
    assert [why for _, why in too_large(f"def merge({many}): pass")] == []
    body = "\n".join("    if a: pass" for _ in range(15))
    assert [why for _, why in too_large(f"def f(a):\n{body}")] == ["16 paths, at most 15"]

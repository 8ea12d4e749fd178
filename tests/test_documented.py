"""Every public name says what it is: a docstring, and for each parameter, field and constant an
annotation or a comment."""

import ast
import importlib
import inspect
import io
import tokenize
import types
from pathlib import Path

import pytest

import frechet_merge
from frechet_merge.cli.outcomes import Means, Spread

PACKAGE = Path(frechet_merge.__file__).parent
FILES = sorted(
    p for p in PACKAGE.rglob("*.py") if p.stem not in ("__init__", "__main__", "_modidx")
)


def comments_of(source) -> dict[int, bool]:
    "Line of every comment → does it stand alone?"
    return {
        t.start[0]: t.line.lstrip().startswith("#")
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }


class Undocumented:
    "Names of a module that are public and say too little."

    def __init__(self, source, module):
        self.source, self.module = source, module
        self.comments = comments_of(source)

    def __iter__(self):
        yield from self.body(ast.parse(self.source).body, self.module.__name__, self.module)

    def said(self, node) -> bool:
        "A comment stands behind it, or on the line above."
        above = self.comments.get(node.lineno - 1, False)
        return above or any(n in self.comments for n in range(node.lineno, node.end_lineno + 1))

    def body(self, nodes, prefix, owner):
        "Of a module or a class."
        for node in nodes:
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                yield from self.assigned(node, prefix, owner)
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from self.of_class(node, prefix, owner)
            elif getattr(node, "name", "_") == "__init__":
                # the class has the docstring
                yield from self.parameters(node, prefix, owner)
            elif not getattr(node, "name", "_").startswith("_"):
                yield from self.of_function(node, f"{prefix}.{node.name}", owner)

    def assigned(self, node, prefix, owner):
        "A constant or a field; one that is inherited was said before."
        if node.value is not None and "help=" in ast.unparse(node.value):
            return  # an option of the command line says what it is
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if not isinstance(target, ast.Name) or target.id.startswith("_"):
                continue
            is_said = self.said(node) or inherits(owner, target.id) or marked(owner, target.id)
            if not is_said:
                yield f"{prefix}.{target.id}: no comment"

    def of_class(self, node, prefix, owner):
        name = f"{prefix}.{node.name}"
        if not ast.get_docstring(node):
            yield f"{name}: no docstring"
        yield from self.body(node.body, name, getattr(owner, node.name))

    def of_function(self, node, name, owner):
        found = inspect.getattr_static(owner, node.name)
        if not ast.get_docstring(node) and not inspect.getdoc(found):
            yield f"{name}: no docstring"
        yield from self.parameters(node, name, owner)

    def parameters(self, node, name, owner):
        "Those of what it overrides were said there."
        if inherits(owner, node.name):
            return
        args = node.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
        for a in every:
            if a is None or a.arg in ("self", "cls") or a.annotation or self.said(a):
                continue
            yield f"{name}({a.arg}): no annotation and no comment"


def marked(owner, name) -> bool:
    "Does the type of a field say what it is, or that its own keys stand in its place?"
    marks = getattr(getattr(owner, "__annotations__", {}).get(name), "__metadata__", ())
    return any(isinstance(mark, (Means, Spread)) for mark in marks)


def inherits(owner, name) -> bool:
    "Does a class have it from another?"
    if not isinstance(owner, type):
        return False
    others = [c for c in owner.__mro__[1:] if c is not object]
    return any(name in vars(c) or name in vars(c).get("__annotations__", ()) for c in others)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE).with_suffix("")))
def test_documented(path):
    module = importlib.import_module(
        "frechet_merge." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    )
    found = list(Undocumented(path.read_text(), module))
    assert not found, "\n".join(found)


SAYS_TOO_LITTLE = '''
A = 1
class B:
    "Documented."
    x: int
    def f(self): pass
def g(x, y:int, z=0): "Documented."
def _h(x): pass
'''


def test_what_is_missing_is_found():
    module = types.ModuleType("m")
    exec(SAYS_TOO_LITTLE, module.__dict__)
    assert [u.partition(":")[0] for u in Undocumented(SAYS_TOO_LITTLE, module)] == [
        "m.A",
        "m.B.x",
        "m.B.f",
        "m.g(x)",
        "m.g(z)",
    ]

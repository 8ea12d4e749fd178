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

PACKAGE = Path(frechet_merge.__file__).parent
FILES = sorted(
    p for p in PACKAGE.rglob("*.py") if p.stem not in ("__init__", "__main__", "_modidx")
)


def undocumented(source, module):
    "Names in `source`, the text of `module`, that are public and say too little."
    comments = {
        t.start[0]: t.line.lstrip().startswith("#")
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }

    def said(node):
        "A comment stands behind it, or on the line above."
        above = comments.get(node.lineno - 1, False)
        return above or any(n in comments for n in range(node.lineno, node.end_lineno + 1))

    def function(node, name, owner):
        own = ast.get_docstring(node)
        if not own and not inspect.getdoc(inspect.getattr_static(owner, node.name)):
            yield f"{name}: no docstring"
        # the parameters of what it overrides
        if isinstance(owner, type) and any(
            node.name in vars(c) for c in owner.__mro__[1:] if c is not object
        ):
            return
        every = [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            node.args.vararg,
            node.args.kwarg,
        ]
        yield from (
            f"{name}({a.arg}): no annotation and no comment"
            for a in every
            if a and a.arg not in ("self", "cls") and not a.annotation and not said(a)
        )

    def body(nodes, prefix, owner):
        for node in nodes:
            name = f"{prefix}.{getattr(node, 'name', '')}"
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                inherited = isinstance(owner, type) and any(
                    hasattr(c, t.id) or t.id in getattr(c, "__annotations__", ())
                    for t in targets
                    if isinstance(t, ast.Name)
                    for c in owner.__mro__[1:]
                )
                for t in targets:
                    if (
                        isinstance(t, ast.Name)
                        and not t.id.startswith("_")
                        and not inherited
                        and not said(node)
                    ):
                        yield f"{prefix}.{t.id}: no comment"
            elif (
                getattr(node, "name", "_").startswith("_")
                and getattr(node, "name", "") != "__init__"
            ):
                continue
            elif isinstance(node, ast.ClassDef):
                if not ast.get_docstring(node):
                    yield f"{name}: no docstring"
                yield from body(node.body, name, getattr(owner, node.name))
            # the class has it
            elif node.name == "__init__":
                yield from (u for u in function(node, prefix, owner) if "docstring" not in u)
            else:
                yield from function(node, name, owner)

    yield from body(ast.parse(source).body, module.__name__, module)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE).with_suffix("")))
def test_documented(path):
    module = importlib.import_module(
        "frechet_merge." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    )
    found = list(undocumented(path.read_text(), module))
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
    assert [u.partition(":")[0] for u in undocumented(SAYS_TOO_LITTLE, module)] == [
        "m.A",
        "m.B.x",
        "m.B.f",
        "m.g(x)",
        "m.g(z)",
    ]

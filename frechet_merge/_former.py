"""Where the modules of version 0.1 are: each is found under its old name for one version more.

Hand-written. `import frechet_merge.checkpoints` gives a module whose names are those of the modules
that it became, and a `DeprecationWarning` that says which these are.
"""
import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# old module → what it became
BECAME = {
    "bases": ("matching.bases",),
    "blocks": ("matching.blocks", "matching.views", "matching.function"),
    "checkpoints": ("files.checkpoint", "files.formats", "files.open", "messages"),
    "demo": ("cli.demo",),
    "estimators": ("curvature.estimators",),
    "examples": ("huggingface.examples",),
    "factors": ("algebra.factors",),
    "forms": ("curvature.forms",),
    "geometry": ("geometries.geometry", "spaces.space"),
    "jobs": ("execution.run", "execution.block", "merging.merge", "merging.recipe"),
    "laws": ("geometries.laws",),
    "mean": ("spaces.mean", "geometries.manifold"),
    "merge": ("merging.merge", "execution.block", "merging.plan", "geometries.registry"),
    "notes": ("messages",),
    "options": ("cli.options",),
    "output": ("files.output", "merging.companions", "merging.record"),
    "shards": ("files.shards", "messages"),
    "span": ("geometries.span", "algebra.gram", "files.stack"),
    "statistics": ("matching.statistics",),
    "tensors": ("files.tensors",),
    "tune": ("tuning.tune",),
    "updates": ("adapters.updates", "execution.update"),
    "uses": ("curvature.uses",),
}


class Former(MetaPathFinder, Loader):
    "Finds a module under its old name."

    def find_spec(self, fullname: str, path: Any = None, target: Any = None):
        "The module of this name, if there was one."
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "frechet_merge" and name in BECAME else None

    def exec_module(self, module: ModuleType):
        "Says what the module became, and looks names up there."
        homes = [f"frechet_merge.{name}" for name in BECAME[module.__name__.partition(".")[2]]]
        warnings.warn(
            f"{module.__name__} is {' and '.join(homes)} now.", DeprecationWarning, stacklevel=2
        )

        def look(name: str):
            for home in homes:
                if hasattr(import_module(home), name):
                    return getattr(import_module(home), name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = look


sys.meta_path.append(Former())

"""Merge neural networks as Fréchet means."""
__version__ = "0.1.0"

from typing import TYPE_CHECKING as _FOR_EDITORS

from . import _former  # noqa: F401

if _FOR_EDITORS:
    from .files.open import load
    from .geometries.geometry import Chart, Euclidean, Geometry, Needs
    from .geometries.laws import check_geometry
    from .geometries.lora import LoRA
    from .geometries.span import Span
    from .geometries.sphere import Sphere
    from .merging.live import add_merged_adapter
    from .merging.merge import Merged, merge
    from .messages import MergeError
    from .spaces.mean import ConvergenceWarning, Mean, frechet_mean
    from .spaces.space import FLAT, Point, Space

__all__ = [
    "merge",
    "add_merged_adapter",
    "frechet_mean",
    "load",
    "check_geometry",
    "Geometry",
    "Chart",
    "Point",
    "Space",
    "FLAT",
    "Needs",
    "Euclidean",
    "Sphere",
    "Span",
    "LoRA",
    "Mean",
    "ConvergenceWarning",
    "Merged",
    "MergeError",
]

# where each name is: torch is imported when the first one is used, and not before the command line
# has said that it is there
_HOMES = {
    "files.open": "load",
    "geometries.geometry": "Chart Euclidean Geometry Needs",
    "geometries.laws": "check_geometry",
    "geometries.lora": "LoRA",
    "geometries.span": "Span",
    "geometries.sphere": "Sphere",
    "merging.live": "add_merged_adapter",
    "merging.merge": "Merged merge",
    "messages": "MergeError",
    "spaces.mean": "ConvergenceWarning Mean frechet_mean",
    "spaces.space": "FLAT Point Space",
}
_FOLDERS = (
    "adapters algebra cli curvature diagnostics execution files geometries huggingface matching "
    "merging messages metrics recipes spaces symmetries tuning vocabularies"
)


def __getattr__(name: str):
    from importlib import import_module

    if name in _FOLDERS.split():
        return import_module(f"{__name__}.{name}")
    for home, names in _HOMES.items():
        if name in names.split():
            found = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

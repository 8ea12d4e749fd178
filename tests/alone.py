"""A geometry that sees whether it is alone, which other processes can import."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from frechet_merge.geometries.geometry import Chart, Geometry, Needs
from frechet_merge.spaces.space import Point


@dataclass(frozen=True)
class Alone(Geometry):
    "The average; while it is taken, a file of this process lies in a folder."

    folder: str  # where the file lies, and where who sees another leaves one

    needs = Needs(entries=True, held=(2, 16))

    def chart(self, thetas, Gs=None):
        folder = Path(self.folder)
        own = folder/f"here-{os.getpid()}-{time.monotonic_ns()}"
        own.touch()
        time.sleep(0.1)
        if len([*folder.glob("here-*")]) > 1:
            (folder/"two").touch()
        own.unlink()
        return Chart([Point(t, 1.0) for t in thetas], lambda m: m)

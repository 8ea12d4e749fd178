"""A geometry that ends the process it is in, which other processes can import."""

import os
import signal
from dataclasses import dataclass

from frechet_merge.geometries.geometry import Chart, Geometry, Needs
from frechet_merge.messages import warn
from frechet_merge.spaces.space import Point


@dataclass(frozen=True)
class Deadly(Geometry):
    "The average, but the first ones that ask for it are killed; a warning for each other."

    folder: str  # where each death leaves a file
    times: int  # how many there are

    needs = Needs()

    def chart(self, thetas, Gs=None):
        for i in range(self.times):
            try:
                os.close(os.open(f"{self.folder}/{i}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        warn("it lives")
        return Chart([Point(t, 1.0) for t in thetas], lambda m: m)

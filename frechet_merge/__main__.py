"""`python -m frechet_merge` is the command `frechet-merge`."""
import os
import sys


def _without_here(path: list[str]) -> list[str]:
    "Where modules are looked for, and not where Python was started: a folder of somebody's model."
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        here = ("", os.getcwd())
    # it was removed
    except FileNotFoundError:
        here = ("",)
    return path[1:] if path[0] in here and path[0] != home else path


sys.path[:] = _without_here(sys.path)

from frechet_merge.cli.commands import main  # noqa: E402

main()

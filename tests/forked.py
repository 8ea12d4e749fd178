"""`python -m frechet_merge`, in a process that is forked from one which has loaded torch already:
hundreds of commands are run, and most of what each would cost is that start."""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from functools import cache
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
# nothing that reads the environment when it is loaded
SERVER.set_forkserver_preload(["torch", "frechet_merge.merging.merge"])
# what an interpreter, torch and the linker read when they start
AT_START = ("PYTHON", "OMP_", "MKL_", "LD_")


def read_at_start(env) -> dict[str, str]:
    # Ray sets one that only a debugger asks for
    return {k: v for k, v in env.items() if k.startswith(AT_START) and k != "PYTHONBREAKPOINT"}


@cache
def of_server() -> dict[str, str]:
    "What the server was started with, and so all that are forked from it."
    return read_at_start(os.environ)


def can_be_forked(env) -> bool:
    "Whether a command in this environment would start as the server did."
    here = read_at_start(os.environ)
    return hasattr(os, "fork") and read_at_start(env) == here == of_server()


def _run(words, cwd, env, streams):
    "In the forked process: be the command."
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv, sys.path = ["frechet_merge", *words], [os.getcwd(), *sys.path]
    try:
        runpy.run_module("frechet_merge", run_name="__main__", alter_sys=True)
    # as at the end of an interpreter; that of a forked process leaves it out
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()


def command(words: list[str], cwd, env: dict[str, str]) -> tuple[int, str, str]:
    "Exit code, output, error output."
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder)/name for name in ("out", "err")]
        for path in streams:
            path.touch()
        process = SERVER.Process(target=_run, args=(words, cwd or os.getcwd(), env, streams))
        process.start()
        process.join()
        return process.exitcode, *(path.read_text() for path in streams)

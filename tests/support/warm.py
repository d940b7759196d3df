"""Commands in processes that have imported everything when they begin.

An interpreter takes seconds to import torch, transformers and PEFT. So one process per test process imports them, does
nothing else, and forks for each command; the fork runs the command's entry point and ends as any process does.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path


class Warm:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._turn = threading.Lock()

    def run(
        self, words: tuple[str, ...], environment: Mapping[str, str], folder: Path, seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. Raises TimeoutError where that takes too long."""
        ours, theirs = self._process.stdin, self._process.stdout
        assert ours is not None
        assert theirs is not None
        with self._turn, tempfile.TemporaryDirectory() as place:
            out, errors = Path(place, "out"), Path(place, "errors")
            task = [words, dict(environment), str(folder), str(out), str(errors)]
            ours.write(json.dumps(task) + "\n")
            ours.flush()
            if not select.select([theirs], [], [], seconds)[0]:
                raise TimeoutError(f"{words} did not end within {seconds} s")
            code = int(theirs.readline())
            return subprocess.CompletedProcess(words, code, out.read_text(), errors.read_text())

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@functools.cache
def warm() -> Warm:
    """The one of this process."""
    made = Warm()
    atexit.register(made.end)
    return made


def _main() -> None:
    import isthmus.cli.main
    import isthmus.edge.run
    import isthmus.emulator.build  # noqa: F401  # all that is heavy

    if threading.active_count() > 1:
        raise RuntimeError("a process with several threads must not fork")
    gc.collect()
    gc.freeze()  # else each fork looks through everything, and so copies it
    for line in sys.stdin:
        words, environment, folder, out, errors = json.loads(line)
        pid = os.fork()
        if not pid:
            break
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()
    else:
        return
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, errors, os.O_WRONLY)):
        opened = os.open(path, flags | (os.O_CREAT if number else 0), 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["isthmus", *words]
    del sys.modules["isthmus.cli.main"]
    runpy.run_module("isthmus.cli.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()

"""`isthmus edge daemon start` on a free port; its workers are forks of a warm process: `python warm_daemon.py HOME`."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from support.warm_processes import WarmPopen

from isthmus.cli.main import main


def run(home: str) -> None:
    """See the top of the file."""
    subprocess.Popen = WarmPopen  # type: ignore[misc]
    if sys.version_info < (3, 12):  # later ones watch processes that are no children of theirs by themselves
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
    sys.argv = ["isthmus", "edge", "daemon", "start", "--home", home, "--listen", "127.0.0.1:0"]
    main()


if __name__ == "__main__":
    run(*sys.argv[1:])

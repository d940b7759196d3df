"""`isthmus edge daemon`, whose own processes are forks of a warm one: `python warm_daemon.py start --home HOME`."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from support.warm_processes import WarmPopen

from isthmus.cli.main import console

if __name__ == "__main__":
    subprocess.Popen = WarmPopen  # type: ignore[misc]
    if sys.version_info < (3, 12):  # later ones watch processes that are no children of theirs by themselves
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
    sys.argv = ["isthmus", "edge", "daemon", *sys.argv[1:]]
    console()

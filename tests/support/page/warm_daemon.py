"""`isthmus edge daemon`, whose own processes are forked from a warm one: `python warm_daemon.py start --home HOME`."""

from __future__ import annotations

import subprocess
import sys

from support.warm_processes import WarmPopen

from isthmus.cli.main import console

if __name__ == "__main__":
    subprocess.Popen = WarmPopen  # type: ignore[misc]
    sys.argv = ["isthmus", "edge", "daemon", *sys.argv[1:]]
    console()

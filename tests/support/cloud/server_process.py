"""A cloud's gRPC server in a process of its own, without Ray: `python server_process.py MODEL PARTS FOLDER PORT`.

`FOLDER` has the keys, as `Home` makes them. The process says the port on which it listens, and serves until its
standard input ends. Where the environment names a folder of fault points, it has them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from support.cloud.clouds import Home, ThreadServer, served
from support.warm_processes import WarmPopen

from isthmus.experiments.rigs.fault_points import fault_points


def start(
    model: Path, parts: Path, home: Home, port: int = 0, environment: Mapping[str, str] | None = None
) -> WarmPopen:
    """Start it, with variables besides those of this process; a context manager, whose process is still to be ended."""
    words = (model, parts, home.folder.parent, port)
    return WarmPopen(
        [sys.executable, __file__, *map(str, words)],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def main(model: str, parts: str, folder: str, port: str) -> None:
    """See the top of the file."""
    if fault_points.ENVIRONMENT in os.environ:
        fault_points.install()
    with ThreadServer(served(Path(model), Path(parts)), Home(Path(folder)), listen=f"127.0.0.1:{port}") as server:
        print(server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])

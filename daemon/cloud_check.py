"""A process that connects to one cloud and says what it serves: `python -m isthmus.daemon.cloud_check`.

It reads the cloud's settings (`ClientConfig`, JSON) from standard input, and prints one line of JSON: what the cloud
serves, or {"code": exit code, "message": one line}. So whoever asks needs neither torch nor gRPC.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from isthmus.common.errors import IsthmusError
from isthmus.edge.config.client_config import ClientConfig

PATIENCE = 60.0
"""Seconds beyond `connect_timeout` that the process may take to start and to end."""


def check_cloud(config: ClientConfig) -> dict[str, Any]:
    """What a cloud serves (`model`, `plan`), or the error met (`code`, `message`), in a process of its own."""
    command = [sys.executable, "-m", "isthmus.daemon.cloud_check"]
    try:
        done = subprocess.run(
            command,
            input=config.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=config.connect_timeout + PATIENCE,
            check=False,
        )
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"code": 40, "message": f"no answer within {config.connect_timeout + PATIENCE:.0f} s"}
    except (ValueError, IndexError):
        return {"code": 1, "message": f"the process that asks has ended: {done.stderr.strip()[-500:]}"}
    return said


def main() -> None:
    """Do what this module says."""
    config = ClientConfig.model_validate_json(sys.stdin.read())
    from isthmus.edge.cloud_link import open_link

    try:
        with open_link(config) as link:
            said: dict[str, Any] = {"model": link.info.model, "plan": link.info.plan}
    except IsthmusError as error:
        said = {"code": error.exit_code, "message": str(error)}
    print(json.dumps(said))


if __name__ == "__main__":
    main()

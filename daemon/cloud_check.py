"""A process that connects to clouds and says what they serve: `python -m isthmus.daemon.cloud_check`.

It reads the clouds' settings (`ClientConfig`, by name, JSON) from standard input, and prints one line of JSON: for each
name what the cloud serves, or {"code": exit code, "message": one line}. So whoever asks needs neither torch nor gRPC.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from isthmus.common.errors import IsthmusError, UnreachableError
from isthmus.edge.config.client_config import ClientConfig

PATIENCE = 120.0
"""Seconds beyond the longest `connect_timeout` that the process may take to start and to end."""
AT_ONCE = 8


def check_clouds(clouds: Mapping[str, ClientConfig]) -> dict[str, dict[str, Any]]:
    """For each cloud what it serves (`model`, `plan`), or the error met (`code`, `message`).

    One process asks all of them.
    """
    limit = PATIENCE + max(config.connect_timeout for config in clouds.values()) * (1 + len(clouds) // AT_ONCE)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "isthmus.daemon.cloud_check"],
            input=json.dumps({name: config.model_dump(mode="json") for name, config in clouds.items()}),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        said: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        message = f"no answer within {limit:.0f} s"
        return {name: {"code": UnreachableError.exit_code, "message": message} for name in clouds}
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {name: {"code": 1, "message": f"the process that asks has ended: {last}"} for name in clouds}
    return said


def main() -> None:
    """Do what this module says."""
    clouds = {name: ClientConfig.model_validate(values) for name, values in json.loads(sys.stdin.read()).items()}
    with ThreadPoolExecutor(AT_ONCE) as threads:
        print(json.dumps(dict(zip(clouds, threads.map(_check, clouds.values()), strict=True))))


def _check(config: ClientConfig) -> dict[str, Any]:
    from isthmus.edge.cloud_link import open_link

    try:
        with open_link(config) as link:
            return {"model": link.info.model, "plan": link.info.plan}
    except IsthmusError as error:
        return {"code": error.exit_code, "message": str(error)}


if __name__ == "__main__":
    main()

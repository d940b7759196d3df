"""Where a running `serve` leaves word of itself, and how `status` finds it. Light: nothing of torch, grpc or ray."""

from __future__ import annotations

import json
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from isthmus.backbone.errors import ConfigError
from isthmus.backbone.files import write_atomic
from isthmus.protocol.errors import UnreachableError

STATE_FILE = "serving.json"


def write_state(home: Path, state: dict[str, Any]) -> None:
    """Leave word of a running cloud."""
    write_atomic(home / STATE_FILE, json.dumps(state, indent=1).encode(), 0o600)


def clear_state(home: Path) -> None:
    """Take it back."""
    (home / STATE_FILE).unlink(missing_ok=True)


def read_status(home: Path) -> dict[str, Any]:
    """Ask the running worker how it is.

    Raises:
        UnreachableError: none runs with this home, or it does not answer.
        ConfigError: it runs without a metrics address.
    """
    try:
        state = json.loads((home / STATE_FILE).read_text())
    except FileNotFoundError:
        raise UnreachableError(
            f"no cloud serves with the home {home}: start one with `isthmus cloud serve`, or give --home"
        ) from None
    if not state["metrics"]:
        raise ConfigError(
            "this cloud was started with --metrics '' and tells nobody how it is: start it with an address"
        )
    try:
        with urllib.request.urlopen(f"http://{state['metrics']}/status", timeout=5) as response:
            return {"connection": state["connection"], **json.load(response)}
    except (OSError, HTTPException, ValueError) as error:
        raise UnreachableError(
            f"the cloud (process {state['pid']}) does not answer at {state['metrics']} ({error}): "
            "it is starting, restarting or gone"
        ) from None

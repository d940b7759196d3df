"""The file in which a running `serve` says where it can be asked for its status. Imports no torch, gRPC or Ray."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from isthmus.common.errors import ConfigError, UnreachableError
from isthmus.common.files import write_atomic

STATE_FILE = "serving.json"
MAX_STATUS = 16 << 20
"""Largest status that is read, in bytes: that of 128 workers with 1000 tenants each has about 4 MB."""


def write_state(home: Path, state: dict[str, Any]) -> None:
    """Write the state of a running cloud."""
    write_atomic(home / STATE_FILE, json.dumps(state, indent=1).encode(), 0o600)


def clear_state(home: Path, pin: str = "") -> None:
    """Remove it; where a `pin` is given, not that of a cloud with another root key's fingerprint."""
    if pin:
        with contextlib.suppress(UnreachableError, ConfigError):  # there is none, or it is damaged and so nobody's
            if not str(_read_state(home)["connection"]).endswith(f"#{pin}"):
                return
    (home / STATE_FILE).unlink(missing_ok=True)


def read_status(home: Path) -> dict[str, Any]:
    """Ask the running cloud for its status.

    Raises:
        UnreachableError: none runs with this home, or it does not answer with its status.
        ConfigError: it runs without a metrics address, or `serving.json` is damaged or cannot be read.
    """
    state = _read_state(home)
    if not state["metrics"]:
        raise ConfigError(
            "this cloud was started with --metrics '' and tells nobody how it is: start it with an address"
        )
    try:
        with urllib.request.urlopen(f"http://{state['metrics']}/status", timeout=5) as response:
            status = json.loads(response.read(MAX_STATUS + 1))
        if not isinstance(status, dict) or not isinstance(status.get("workers"), list):
            raise ValueError("its answer is not the status of a cloud")
    except (OSError, HTTPException, ValueError, RecursionError) as error:
        raise UnreachableError(
            f"the cloud (process {state['pid']}) does not answer at {state['metrics']} ({error}): "
            "it is starting, restarting or gone"
        ) from None
    return {"connection": state["connection"], **status}


def _read_state(home: Path) -> dict[str, Any]:
    """Read what `write_state` has written."""
    path = home / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UnreachableError(
            f"no cloud serves with the home {home}: start one with `isthmus cloud serve`, or give --home"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): check its owner and mode") from error
    except (ValueError, RecursionError):
        state = None
    wanted = {"connection": str, "metrics": str, "pid": int}
    if not isinstance(state, dict) or any(type(state.get(name)) is not kind for name, kind in wanted.items()):
        raise ConfigError(f"{path} is damaged: stop the cloud that serves with this home, and start it again")
    return state

"""What a cloud holds of sessions while they last, and what is left of them when they have ended.

The same scanner looks for the same canaries both times, in the same places: the worker's memory, logs, other files,
what the metrics' endpoint says, and what Ray has. What should never be found anywhere else than in the worker's memory
has controls that are to be found: a tenant's name in logs, files and metrics, the home's path in the memory of `serve`
and of Ray's control store, and an object in Ray's store.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from isthmus.common.errors import IsthmusError, UnreachableError
from isthmus.experiments.rigs.secrets.canaries import KEY, LEASED, SECRET, TENSORS, Captured
from isthmus.experiments.rigs.secrets.memory_scan import (
    WINDOW,
    Scanner,
    files_below,
    memory_of,
    shared_files_of,
    stopped,
)
from isthmus.experiments.rigs.secrets.sessions import Sessions
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

SETTLE_SECONDS: Final = 4.0
"""After the end of the sessions: the engine trims its heap when it has been idle for a second."""
END_SECONDS: Final = 60.0
SESSIONS: Final = 4 * len(ACTIVATION_CODECS)
"""That the edge may have at a time: two for each codec, and those that have not ended yet."""
LOOKS: Final = 8
"""At most, until all is found that a cloud must hold: a call may be answered before the worker stands still."""
LOGS: Final = (".log", ".out", ".err")
CONTROL_STORE: Final = "ray_control_store"
TENANT, HOME, OBJECT = "a tenant's name", "the home's path", "an object in Ray's store"
CONTROLS: Final = {
    **dict.fromkeys(("logs", "files", "metrics"), TENANT),
    **dict.fromkeys(("serve", CONTROL_STORE), HOME),
    "ray": OBJECT,
}
"""What must be found in each place."""


def new_name() -> str:
    """A tenant's name that is found nowhere by chance."""
    return f"tenant-{secrets.token_hex(WINDOW)}"


@dataclass(frozen=True, slots=True)
class Place:
    """A cloud to look at.

    Attributes:
        address: Its connection string.
        key: Of an edge that may have so many sessions as `SESSIONS` says.
        worker: The worker's process.
        sessions: Says how many sessions the worker has.
        folders: With the files that it writes.
        said: What its endpoints say.
        others: Its other processes by name: `serve`, `ray_control_store`, and all others of Ray, of any name.
        controls: What each further canary is of that must be found, by its bytes.
    """

    address: str
    key: Path
    worker: int
    sessions: Callable[[], int]
    folders: Sequence[Path]
    said: Callable[[], Sequence[bytes]]
    others: Callable[[], Mapping[str, int]]
    controls: Mapping[bytes, str]


def look(place: Place, tokens: int) -> dict[str, Any]:
    """Have sessions with a cloud, and look for what they have sent, while they last and afterwards.

    Returns:
        `memory`: a row for each kind of canary with `kind`, `canaries`, `during`, `at_once` and `after`, which are
        copies in the worker's memory: while the sessions last, of several looks the most; as soon as they have ended,
        before the worker is idle for long enough to give free memory back; and later. `during`, `at_once` and `after`,
        their sums; `held_found`: whether each codec's
        activations and gradients, the leased weights and the keys were found in it while the sessions lasted;
        `elsewhere`: copies in all other places, both times; `places`: of each other place its `copies`, its `control`
        and how often that was found; `controls_found`: whether each control of the place was; `scanned_mib`.
    """
    during: Counter[str] = Counter()
    with Captured() as captured:
        with Sessions(place.address, place.key, tokens) as sessions:
            for _ in range(LOOKS):
                with sessions.in_flight(), stopped(place.worker):
                    memory = memory_of(place.worker)
                scanner = Scanner({**captured.canaries, **place.controls})
                during |= scanner.count(memory)
                del memory
                if _held_found(during):
                    break
            found = _elsewhere(place, scanner)
        _until_ended(place)
        with stopped(place.worker):
            at_once = Scanner(captured.canaries).count(memory_of(place.worker))
        time.sleep(SETTLE_SECONDS)
    after = scanner.count(memory_of(place.worker))
    for name, copies in _elsewhere(place, scanner).items():
        found[name] = found.get(name, Counter()) + copies
    wanted = {name for name, control in CONTROLS.items() if control in place.controls.values()}
    kinds = Counter(captured.canaries.values())
    rows = [
        {"kind": kind, "canaries": kinds[kind], "during": during[kind], "at_once": at_once[kind], "after": after[kind]}
        for kind in captured.kinds
    ]
    places = {
        name: {
            "copies": sum(copies[kind] for kind in kinds),
            "control": CONTROLS[name],
            "control_copies": copies[CONTROLS[name]] if name in wanted else None,
        }
        for name, copies in found.items()
    }
    return {
        **{when: sum(row[when] for row in rows) for when in ("during", "at_once", "after")},
        "held_found": _held_found(during),
        "elsewhere": sum(each["copies"] for each in places.values()),
        "controls_found": all(found.get(name, Counter())[CONTROLS[name]] for name in wanted),
        "memory": rows,
        "places": places,
        "scanned_mib": scanner.scanned / 2**20,
    }


def _elsewhere(place: Place, scanner: Scanner) -> dict[str, Counter[str]]:
    """What is found in other places than the worker's memory, by place."""
    found = {
        "logs": scanner.count(files_below(*place.folders, wanted=lambda path: path.suffix in LOGS)),
        "files": scanner.count(files_below(*place.folders, wanted=lambda path: path.suffix not in LOGS)),
        "metrics": scanner.count(place.said()),
    }
    for name, pid in place.others().items():
        kind = name if name in CONTROLS else "ray"  # all further processes of Ray are one place
        try:
            copies = scanner.count(memory_of(pid)) + scanner.count(shared_files_of(pid))
        except (IsthmusError, OSError):
            if Path(f"/proc/{pid}").exists():
                raise
            continue  # it has ended meanwhile
        found[kind] = found.get(kind, Counter()) + copies
    return found


def _until_ended(place: Place) -> None:
    """Wait until the worker has no sessions. Raises UnreachableError."""
    deadline = time.monotonic() + END_SECONDS
    while place.sessions():
        if time.monotonic() > deadline:
            raise UnreachableError(f"the sessions with {place.address} do not end")
        time.sleep(0.02)


def _held_found(found: Mapping[str, int]) -> bool:
    """Whether everything was found that a cloud must hold in a session."""
    forms = (f"{codec} {what}" for codec in ACTIVATION_CODECS for what in TENSORS)
    tensors = (any(found[kind] for kind in found if kind.startswith(form)) for form in forms)
    return all(found[kind] for kind in (SECRET, KEY, LEASED)) and all(tensors)

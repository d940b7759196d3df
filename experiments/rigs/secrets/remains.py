"""What a cloud holds of sessions while they last, and what is left of them when they have ended.

Two scanners look for the same canaries both times, in the same places. In memory they are looked for as they are. In
text they are looked for in all forms of `text_forms`: in logs, files, the temporary folder, the edge's cache, what the
metrics' endpoint says, environments, and Ray's control store. What should never be found anywhere else than in the
worker's memory has controls that are to be found: a tenant's name in logs, files and metrics, the home's path in the
memory of `serve` and of Ray's control store, an object in Ray's store, and in each place with text one of each form.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from isthmus.experiments.rigs.secrets.text_controls import Planted
from isthmus.experiments.rigs.secrets.text_forms import TextScanner
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

SETTLE_SECONDS: Final = 4.0
"""After the end of the sessions: the engine trims its heap when it has been idle for a second."""
END_SECONDS: Final = 60.0
SESSIONS: Final = 4 * len(ACTIVATION_CODECS)
"""That the edge may have at a time: two for each codec, and those that have not ended yet."""
LOOKS: Final = 32
"""At most, until all is found that a cloud must hold: a call may be answered before the worker stands still."""
LOG_FILES: Final = (".log", ".out", ".err")
LOGS, FILES, TEMPORARY, CACHE = "logs", "files", "temporary_files", "edge_cache"
METRICS, ENVIRONMENTS, CONTROL_STORE = "metrics", "environments", "ray_control_store"
TENANT, HOME, OBJECT = "a tenant's name", "the home's path", "an object in Ray's store"
CONTROLS: Final = {
    **dict.fromkeys((LOGS, FILES, METRICS), TENANT),
    **dict.fromkeys(("serve", CONTROL_STORE), HOME),
    "ray": OBJECT,
}
"""What must be found in these places that the cloud has put there by itself, or Ray."""


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
        busy: Says what the worker still has of sessions; 0 where it has nothing.
        folders: With the files that the cloud and its edge write, by the name of a place. Their logs are one place.
        said: What its endpoints say.
        others: Its other processes by name: `serve`, `ray_control_store`, and all others of Ray, of any name.
        controls: What each further canary is of that must be found, by its bytes.
        planted: What must be found in each form, by place.
    """

    address: str
    key: Path
    worker: int
    busy: Callable[[], int]
    folders: Mapping[str, Sequence[Path]]
    said: Callable[[], Sequence[bytes]]
    others: Callable[[], Mapping[str, int]]
    controls: Mapping[bytes, str]
    planted: Mapping[str, Planted]


def look(place: Place, tokens: int) -> dict[str, Any]:
    """Have sessions with a cloud, and look for what they have sent, while they last and afterwards.

    Returns:
        `memory`: a row for each kind of canary with `kind`, `canaries`, `during`, `at_once` and `after`, which are
        copies in the worker's memory: while the sessions last, of several looks the most; as soon as they have ended,
        before the worker is idle for long enough to give free memory back; and later. `during`, `at_once` and `after`,
        their sums; `held_found`: whether each codec's activations and gradients, the leased weights and the keys were
        found in it while the sessions lasted; `elsewhere`: copies in all other places, both times; `places`: of each
        other place its `copies`, by kind in `found`, its `control` and how often that was found, and in `forms` how
        often what was planted there was, by form, in the look that found fewer; `forms`: of these the sums, by form;
        `controls_found`: whether each control of each place was found, and each form both times; `scanned_mib`.
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
            scanners = scanner, _text_scanner(place, captured)
            looks = [_elsewhere(place, *scanners)]
        _until_ended(place)
        with stopped(place.worker):
            at_once = Scanner(captured.canaries).count(memory_of(place.worker))
        time.sleep(SETTLE_SECONDS)
    after = scanner.count(memory_of(place.worker))
    looks.append(_elsewhere(place, *scanners))
    kinds = Counter(captured.canaries.values())
    rows = [
        {"kind": kind, "canaries": kinds[kind], "during": during[kind], "at_once": at_once[kind], "after": after[kind]}
        for kind in captured.kinds
    ]
    places = {name: _place_row(name, place, looks) for name in dict.fromkeys((*looks[0], *looks[1], *place.planted))}
    forms = [form for row in places.values() for form in row["forms"].items()]
    return {
        **{when: sum(row[when] for row in rows) for when in ("during", "at_once", "after")},
        "held_found": _held_found(during),
        "elsewhere": sum(each["copies"] for each in places.values()),
        "controls_found": _controls_found(place, places),
        "memory": rows,
        "places": places,
        "forms": {form: sum(count for each, count in forms if each == form) for form, _ in forms},
        "scanned_mib": sum(each.scanned for each in scanners) / 2**20,
    }


def _text_scanner(place: Place, captured: Captured) -> TextScanner:
    """Looks for what was captured, and for all controls."""
    canaries, runs = {**captured.canaries, **place.controls}, dict(captured.runs)
    for planted in place.planted.values():
        canaries |= planted.canaries
        runs |= planted.runs
    return TextScanner(canaries, runs)


def _elsewhere(place: Place, scanner: Scanner, text: TextScanner) -> dict[str, Counter[str]]:
    """What is found in other places than the worker's memory, by place."""
    everywhere = [folder for folders in place.folders.values() for folder in folders]
    others = place.others()
    found = {LOGS: text.count(files_below(*everywhere, wanted=lambda path: path.suffix in LOG_FILES))}
    for name, folders in place.folders.items():
        found[name] = text.count(files_below(*folders, wanted=lambda path: path.suffix not in LOG_FILES))
    found[METRICS] = text.count(place.said())
    found[ENVIRONMENTS] = text.count(_environments((place.worker, *others.values())))
    for name, pid in others.items():
        kind = name if name in CONTROLS else "ray"  # all further processes of Ray are one place
        looks_for = text if kind == CONTROL_STORE else scanner
        try:
            copies = looks_for.count(memory_of(pid)) + looks_for.count(shared_files_of(pid))
        except (IsthmusError, OSError):
            if Path(f"/proc/{pid}").exists():
                raise
            continue  # it has ended meanwhile
        found[kind] = found.get(kind, Counter()) + copies
    return found


def _environments(pids: Iterable[int]) -> Iterator[bytes]:
    """What processes were started with; of those that have ended, nothing."""
    for pid in pids:
        with contextlib.suppress(OSError):
            yield Path(f"/proc/{pid}/environ").read_bytes()


def _place_row(name: str, place: Place, looks: Sequence[Mapping[str, Counter[str]]]) -> dict[str, Any]:
    """What was found in a place, both times."""
    counted = [look.get(name, Counter()) for look in looks]
    found, control = counted[0] + counted[1], CONTROLS.get(name, "")
    controls = {*place.controls.values(), *(kind for each in place.planted.values() for kind in each.kinds)}
    copies = {kind: count for kind, count in found.items() if kind not in controls}
    forms: dict[str, int] = {}
    if name in place.planted:
        first, second = (place.planted[name].found(counts) for counts in counted)
        forms = {form: min(first[form], second[form]) for form in first}
    return {
        "copies": sum(copies.values()),
        "found": copies,
        "control": control,
        "control_copies": found[control] if control in place.controls.values() else None,
        "forms": forms,
    }


def _controls_found(place: Place, places: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all was found in each place that must be there."""
    wanted = [name for name, control in CONTROLS.items() if control in place.controls.values()]
    own = all(name in places and places[name]["control_copies"] for name in wanted)
    return own and all(count for row in places.values() for count in row["forms"].values())


def _until_ended(place: Place) -> None:
    """Wait until the worker has nothing of sessions any more. Raises UnreachableError."""
    deadline = time.monotonic() + END_SECONDS
    while place.busy():
        if time.monotonic() > deadline:
            raise UnreachableError(f"the sessions with {place.address} do not end")
        time.sleep(0.02)


def _held_found(found: Mapping[str, int]) -> bool:
    """Whether everything was found that a cloud must hold in a session."""
    forms = (f"{codec} {what}" for codec in ACTIVATION_CODECS for what in TENSORS)
    tensors = (any(found[kind] for kind in found if kind.startswith(form)) for form in forms)
    return all(found[kind] for kind in (SECRET, KEY, LEASED)) and all(tensors)

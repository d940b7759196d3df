"""One target in a process of its own: `python -m fuzz.child VERB NAME ...`, as `python -m fuzz` calls it.

fuzz   libFuzzer's options and folders; it never returns
seeds  a folder, to which the target's seeds are written
lines  folders; prints how many lines of the decoder the seeds, the kept corpus and their files reach
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from hashlib import sha256
from pathlib import Path

from fuzz.target import everything, lines_of, lines_reached, load


def _fuzz(name: str, options: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["isthmus", "fuzz"]):
        target = load(name)
    # With Python's own handler in place, libFuzzer would not take Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # To merge corpora, libFuzzer starts itself again, through a shell and by the first of its arguments.
    itself = f"{shlex.quote(sys.executable)} -P -m fuzz.child fuzz {name}"
    atheris.Setup([itself, f"-max_len={target.max_len}", *options], target.run)
    atheris.Fuzz()


def _seeds(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    target = load(name)
    for seed in target.seeds():
        (folder / sha256(seed).hexdigest()[:16]).write_bytes(seed)
    words = ["".join(f"\\x{byte:02x}" for byte in word) for word in target.words]
    folder.with_suffix(".words").write_text("".join(f'"{word}"\n' for word in words))


def _lines(name: str, folders: list[str]) -> None:
    target = load(name)
    wanted = lines_of(target.decoders)
    start = lines_reached(target.run, [b""], wanted)
    inputs = everything(name, target, *map(Path, folders))
    reached = lines_reached(target.run, inputs, wanted)
    missed = sorted(f"{Path(file).name}:{line}" for file, line in wanted - reached)
    told = {"lines": len(wanted), "empty": len(start), "reached": len(reached), "floor": target.floor, "missed": missed}
    print(json.dumps(told))


def main() -> None:
    """See above."""
    verb, name, *rest = sys.argv[1:]
    if verb == "fuzz":
        _fuzz(name, rest)
    elif verb == "seeds":
        _seeds(name, Path(rest[0]))
    else:
        _lines(name, rest)


if __name__ == "__main__":
    main()

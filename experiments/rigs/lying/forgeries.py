"""Transcripts that were cut, changed or forged, and where `isthmus audit verify` finds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.lying.lying_cloud import Keys
from isthmus.privacy.transcript.chain import Statement
from isthmus.privacy.transcript.run_certificate import CERTIFICATE_FILE, write_certificate
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, read_transcript
from isthmus.privacy.transcript.verified_run import verify_run
from isthmus.protocol.secure.keys import load_edge, load_worker

UNTOUCHED = "untouched"
ADAPTER = "adapter/adapter_model.safetensors"


def forgeries_of(run: Path, keys: Keys, stranger: Keys) -> list[dict[str, Any]]:
    """Forge a run's evidence in each way.

    Args:
        run: Its folder, with a transcript that the cloud has signed more than once: where its end is cut off, the chain
            and the signatures of the rest are good.
        keys: Of its cloud and its edge.
        stranger: Of another cloud, which signs what it has not answered.

    Returns:
        For each way `forgery`, `refused` and `said`, the error's line.
    """
    rows = []
    for name, change in FORGERIES.items():
        copied = run.with_name(f"forged-{name}")
        shutil.rmtree(copied, ignore_errors=True)
        (copied / "adapter").mkdir(parents=True)
        (copied / ADAPTER).write_bytes(bytes(64))
        shutil.copyfile(run / TRANSCRIPT_FILE, copied / TRANSCRIPT_FILE)
        transcript = read_transcript(copied / TRANSCRIPT_FILE, keys.pin)
        write_certificate(copied / CERTIFICATE_FILE, transcript, copied / "adapter", load_edge(keys.edges[0]))
        change(copied, stranger)
        said = ""
        try:
            verify_run(copied, keys.pin)
        except IsthmusError as error:
            said = str(error).replace(str(copied), "RUN")
        rows.append({"forgery": name, "refused": bool(said), "said": said})
    return rows


Lines = list[dict[str, Any]]


def _edited(edit: Callable[[Lines, Keys], Lines]) -> Callable[[Path, Keys], None]:
    """A forgery of the transcript's lines."""

    def change(run: Path, stranger: Keys) -> None:
        path = run / TRANSCRIPT_FILE
        lines = edit([json.loads(line) for line in path.read_text().splitlines()], stranger)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return change


def _answer_changed(lines: Lines, _: Keys) -> Lines:
    lines[3]["answered"] = "00" * 32
    return lines


def _signatures_left_out(lines: Lines, _: Keys) -> Lines:
    return [line for line in lines if "head" not in line]


def _call_left_out(lines: Lines, _: Keys) -> Lines:
    return [*lines[:3], *lines[4:]]


def _renumbered(lines: Lines, stranger: Keys) -> Lines:
    """A call is left out, and the others have the numbers that hide it."""
    lines = _call_left_out(lines, stranger)
    for number, line in enumerate((line for line in lines if "n" in line), 1):
        line["n"] = number
    return lines


def _time_changed(lines: Lines, _: Keys) -> Lines:
    for line in lines:
        if "head" in line:
            line["signed_at"] += 1
    return lines


def _signed_by_another(lines: Lines, stranger: Keys) -> Lines:
    identity, name = load_worker(stranger.home), bytes.fromhex(lines[0]["session"])
    certificate = identity.certificate
    for line in lines:
        if "head" in line:
            said = (line["exchanges"], bytes.fromhex(line["head"]), line["signed_at"])
            line["signature"] = identity.key.sign(Statement(name, *said).signed()).hex()
            shown = {field: getattr(certificate, field).hex() for field in ("root", "worker", "signature")}
            line["certificate"] = {**shown, "not_after": certificate.not_after}
    return lines


def _untouched(run: Path, stranger: Keys) -> None:
    """Nothing: what has to verify."""


def _cut_in_a_line(run: Path, stranger: Keys) -> None:
    path = run / TRANSCRIPT_FILE
    path.write_bytes(path.read_bytes()[:-20])


def _adapter_changed(run: Path, stranger: Keys) -> None:
    (run / ADAPTER).write_bytes(bytes(65))


def _certificate_changed(run: Path, stranger: Keys) -> None:
    path = run / CERTIFICATE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "exchanges": 1}))


FORGERIES: Final[dict[str, Callable[[Path, Keys], None]]] = {
    UNTOUCHED: _untouched,
    "end_cut": _edited(lambda lines, _: lines[:-2]),
    "cut_in_a_line": _cut_in_a_line,
    "signatures_left_out": _edited(_signatures_left_out),
    "beginning_cut": _edited(lambda lines, _: lines[1:]),
    "call_left_out": _edited(_call_left_out),
    "call_left_out_and_renumbered": _edited(_renumbered),
    "answer_changed": _edited(_answer_changed),
    "order_changed": _edited(lambda lines, _: [*lines[:2], lines[3], lines[2], *lines[4:]]),
    "time_of_a_signature_changed": _edited(_time_changed),
    "signed_by_another_cloud": _edited(_signed_by_another),
    "adapter_changed": _adapter_changed,
    "certificate_changed": _certificate_changed,
}
"""What is done to a run's folder; the stranger's keys sign."""

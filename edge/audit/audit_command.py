"""What `isthmus edge audit` does: a run's folder, who replays, and the report for a person."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch

from isthmus.common.errors import ConfigError
from isthmus.common.terminal import printable
from isthmus.common.torch_threads import use_threads
from isthmus.edge.audit.audit_run import AuditReport, audit
from isthmus.edge.audit.conditioning import MAX_ROUNDING_RATIO
from isthmus.edge.audit.replay import CloudReplayer, LocalReplayer
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.audit_config import AuditCommandConfig
from isthmus.edge.witness.audit_sample import AUDIT_FOLDER
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, TranscriptLog, read_transcript
from isthmus.privacy.transcript.verified_run import verify_run

REPLAY_TRANSCRIPT = "audit-transcript.jsonl"
"""Inside the run's folder: what the other cloud has signed of the newest audit."""


def run_audit(run: Path, config: AuditCommandConfig) -> AuditReport:
    """Audit a run as the configuration says.

    Raises:
        ConfigError: The run has no transcript or no sample, or see `audit`.
        IsthmusError: Of whatever kind fits; see `audit`.
    """
    verify_run(run)
    transcript = read_transcript(run / TRANSCRIPT_FILE)
    if not transcript.sessions:
        raise ConfigError(f"{run / TRANSCRIPT_FILE} has no session: nothing crossed in this run")
    session, folder = transcript.sessions[0].session, run / AUDIT_FOLDER
    if config.model is not None:
        use_threads(config.threads)
        local = LocalReplayer(config.model, session, torch.get_num_threads())
        return audit(transcript, folder, local, config.calls, config.threshold)
    with open_link(config) as link:
        link.keep_transcript(TranscriptLog(run / REPLAY_TRANSCRIPT))
        return audit(transcript, folder, CloudReplayer(link, session), config.calls, config.threshold)


def lines(report: AuditReport) -> str:
    """The report for a person, within 80 columns."""
    which = " without adapters" if report.skipped else ""
    explained = len(report.explained)
    close = report.replayed - report.identical - len(report.lies) - report.undecided - explained
    said = [
        f"replayed {report.replayed} of {report.calls} calls",
        f"  {report.identical:6} have the same bits",
        *([f"  {close:6} are within the threshold"] if close else []),
        *([f"  {explained:6} are above it, and explained by rounding"] if explained else []),
        *([f"  {report.undecided:6} differ, undecided: no --threshold is given"] if report.undecided else []),
        f"  {len(report.lies):6} are wrong",
        "probability that such an audit finds a cloud that alters",
        *(f"  {float(share):6.1%} of the calls{which}: {caught:.1%}" for share, caught in report.caught.items()),
    ]
    if explained:
        largest = max(each.rounding_ratio or 0.0 for each in report.explained)
        said.append("explained by rounding: no more than so many times as far off as changes")
        said.append(f"  in the last place of the input move the answer: {largest:.1f} (limit {MAX_ROUNDING_RATIO:g})")
    if report.threshold is not None:
        said.append("the probabilities are of lies that are larger than the threshold and than")
        said.append("  what rounding explains, in calls that were not chosen by how it acts there")
    if report.too_large:
        said.append(f"{report.too_large} calls were larger than --audit-sample, and had no chance to be kept")
    if report.skipped:
        said.append(f"{report.skipped} calls of the sample could not be replayed here: ask a cloud, with --cloud")
    if report.unsigned:
        said.append(f"{report.unsigned} exchanges are without the cloud's signature: their sessions broke")
    for ours, theirs in report.numerics:
        said.extend(("numerics of the cloud", *_wrapped(ours)))
        said.extend(
            ("numerics of the replay: the same",) if ours == theirs else ("numerics of the replay", *_wrapped(theirs))
        )
    if report.first_lie is not None:
        lie = report.first_lie
        signed = "signed by the cloud" if lie.signed else "not signed"
        apart = "another shape" if lie.distance is None else f"distance {lie.distance:.2g}"
        said.append(f"first lie: {lie.question.lower()} call {lie.call}, step {lie.step}, {signed}, {apart}")
        if lie.rounding_ratio is not None:
            said.append(
                f"  {lie.rounding_ratio:.3g} times what its input's last place does (limit {MAX_ROUNDING_RATIO:g})"
            )
        said.append(f"  expected {lie.expected}")
        said.append(f"  found    {lie.found}")
    return "\n".join(said)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(printable(text), 80, initial_indent="  ", subsequent_indent="  ")

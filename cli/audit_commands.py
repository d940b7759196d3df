"""The commands on what a run leaves for an audit: `isthmus audit verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.protocol.limits import MAX_UNSIGNED

app = typer.Typer(help="Check what clouds have signed.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Check what clouds have signed."""


@app.command()
def verify(
    transcripts: Annotated[
        list[Path], typer.Argument(help="Transcripts, or folders of runs: RUN stands for RUN/transcript.jsonl.")
    ],
    root: Annotated[
        str | None,
        typer.Option(
            help="Fingerprint of the root key that must have certified the workers: SHA256:…. Without it, any may have."
        ),
    ] = None,
    max_unsigned: Annotated[
        int,
        typer.Option(
            min=0, help="Exchanges that may be unsigned where sessions broke, and one more for each 32 that are signed."
        ),
    ] = MAX_UNSIGNED,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the chains, signatures and certificates of transcripts, on the transcripts alone.

    A certificate.json beside a transcript is checked against it, and against the adapter where that is there, too.
    Ends with exit code 70 where something does not verify, and with 75 where too much is unsigned.

    Example: isthmus audit verify run
    """
    from isthmus.common.terminal import plain
    from isthmus.privacy.transcript.transcript_file import check_unsigned
    from isthmus.privacy.transcript.verified_run import verify_run
    from isthmus.protocol.secure.keys import Fingerprint

    pin = None if root is None else Fingerprint.parse(root)
    found = [verify_run(path, pin, max_unsigned) for path in transcripts]
    if as_json:
        typer.echo(json.dumps([each.to_json() for each in found]))
    else:
        for each in found:
            typer.echo(plain(each.lines()))
    for each in found:
        check_unsigned(Path(each.path), each.exchanges - each.unsigned, each.unsigned, max_unsigned)

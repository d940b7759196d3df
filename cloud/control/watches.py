"""What `serve` checks now and then besides its workers: ports that other machines can reach, and the certificate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from isthmus.cloud.control.ports import PortWatch, parse_address
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.home.expiry import ExpiryWatch
from isthmus.cloud.home.identity import IdentityFiles

CHECK_SECONDS = 30.0
"""Between two checks of ports and certificate: both change rarely, and a check takes milliseconds."""


def watches(home: Path, specs: Sequence[WorkerSpec], metrics: str, console: Console) -> Callable[[], None]:
    """Report ports and certificate to the operator now; returns a function that reports what is new since.

    Args:
        home: the cloud's folder.
        specs: of all workers that may be started.
        metrics: address of `/status` and `/metrics`, or "".
        console: where the operator reads.
    """
    say = partial(console.print, highlight=False, markup=False)
    announced = [parse_address(each)[1] for each in (*(spec.listen for spec in specs), *filter(None, [metrics]))]
    ports = PortWatch(announced, say)
    identity = IdentityFiles(home)
    certificate = ExpiryWatch(lambda: identity().certificate.not_after, say)
    ports.first_check()
    certificate.check()
    last = time.monotonic()

    def check() -> None:
        nonlocal last
        if time.monotonic() - last >= CHECK_SECONDS:
            last = time.monotonic()
            ports.check()
            certificate.check()

    return check

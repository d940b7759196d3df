"""An edge in a process of its own whose sessions' contents are then looked for: it says what to look for."""

from __future__ import annotations

from pathlib import Path

import torch

from isthmus.edge.client.link import connect
from isthmus.experiments.harness.processes import Parent, serve
from isthmus.experiments.rigs.secrets.canaries import Captured
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

TOKENS = 64


def main(parent: Parent) -> None:
    """Send a forward and a backward in each codec, then say the canaries: see `Sent`."""
    task = parent.task
    source = torch.Generator().manual_seed(0)
    with Captured() as captured:
        for codec in ACTIVATION_CODECS:
            with connect(task["cloud"], key=Path(task["key"]), codec=codec, connect_timeout=60.0) as link:
                hidden, gradient = (torch.randn(1, TOKENS, link.info.hidden_size, generator=source) for _ in range(2))
                _, kept = link.forward_span(hidden, None, None, keep=True)
                link.backward_span(kept, gradient, hidden, None, None)
    parent.say(
        {
            "canaries": {window.hex(): kind for window, kind in captured.canaries.items()},
            "runs": [[run, kind] for run, kind in captured.runs.items()],
        }
    )


if __name__ == "__main__":
    serve(main)

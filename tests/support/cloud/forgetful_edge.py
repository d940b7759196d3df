"""An edge that answers as the one of the fault benchmark does, but fills a lost cache again with zeros.

Its text after a worker's death is another one: what the benchmark has to notice.
"""

from __future__ import annotations

from torch import Tensor

from isthmus.edge.client.hidden_history import HiddenHistory
from isthmus.experiments.harness.processes import Parent, serve
from isthmus.experiments.rigs.faults import answering_edge


def main(parent: Parent) -> None:
    """Answer as `answering_edge` does, otherwise."""
    take, most = HiddenHistory.take, 0

    def forgetful(self: HiddenHistory, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        nonlocal most
        hidden, positions = take(self, start, stop)
        if start < most:  # it was sent before
            hidden = hidden.clone()
            hidden[:, :-1] = 0
        most = max(most, stop)
        return hidden, positions

    HiddenHistory.take = forgetful  # type: ignore[method-assign]
    answering_edge.main(parent)


if __name__ == "__main__":
    serve(main)

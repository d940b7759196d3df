"""The edge of the fault benchmark: `isthmus edge train`'s own path, and a parent that says when each phase may begin.

Before each phase of each question an edge that is watched sends its parent a `Moment`, and training goes on when the
parent asks for the next one: whatever the parent does in between is done exactly there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from isthmus.edge.client.link import Link
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.training_config import load_config
from isthmus.edge.split_run import train_over
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve
from isthmus.experiments.rigs.faults.fault_plan import Moment

MODULE: Final = "isthmus.experiments.rigs.faults.fault_edge"
SILENCE_SECONDS = 300.0  # an edge that reports nothing for so long hangs


class Edge(TaskProcess):
    """The parent's side: an edge in a process of its own that stops at every phase.

    Args:
        module: What it runs, with `config` as its task says.
        watched: Whether it stops.
    """

    def __init__(self, config: dict[str, Any], log: Path, *, watched: bool = True, module: str = MODULE) -> None:
        task = {"config": config, "watched": watched}
        super().__init__("the edge", module, task, log=log, patience=SILENCE_SECONDS)

    def moments(self) -> Iterator[Moment]:
        """The phases as they begin; the edge goes on when the next one is asked for. Ends with the edge's process."""
        for moment in self.answers():
            yield Moment(**moment)
            self.send("go on")


@contextmanager
def watched(parent: Parent, link: Link, step: Callable[[str, str], int]) -> Iterator[None]:
    """Let the parent say when each phase of each question of a link may begin, where the task wants that.

    Args:
        step: Returns the step under way, given the question and the phase that begins.
    """

    def report(question: str, phase: str) -> None:
        """A phase begins. Raises EOFError or BrokenPipeError where the parent is gone, so no edge outlives it."""
        traffic = link.traffic
        parent.say(asdict(Moment(question, phase, step(question, phase), traffic.retries, traffic.bytes_up)))
        parent.question()

    if parent.task["watched"]:
        link.observer = report
    yield
    link.observer = lambda question, phase: None


def main(parent: Parent) -> None:
    """Train as the task says; raises what `isthmus.edge.split_run.run_training` raises."""
    config = load_config(None, parent.task["config"])
    with open_link(config) as link, watched(parent, link, lambda question, phase: link.step):
        train_over(link, config)


if __name__ == "__main__":
    serve(main)

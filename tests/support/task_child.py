"""The process of the tests of `isthmus.experiments.harness.processes`."""

from __future__ import annotations

import os
import time

from isthmus.common.errors import DataError
from isthmus.experiments.harness.processes import Parent, serve


def main(parent: Parent) -> None:
    """Do the task, and what the questions ask."""
    print("printed by the child", flush=True)
    task = parent.task
    if "silent" in task:
        return
    if "once" in task:
        parent.say(task["once"])
        return
    parent.say({**task, **({"threads": os.environ["OMP_NUM_THREADS"]} if "OMP_NUM_THREADS" in os.environ else {})})
    for what, *values in parent.questions():
        match what:
            case "add":
                parent.say(task["start"] + values[0])
            case "sleep":
                time.sleep(values[0])
            case "fail":
                raise DataError("no such thing")
            case _:
                raise RuntimeError("a defect")


if __name__ == "__main__":
    serve(main)

"""Stands for a job's worker: `python scripted_worker.py FOLDER` does what the job's data say, line by line.

In a line, JOB stands for the job's part of its id.

    {"report": {…}}     writes a line of reports.jsonl
    {"half": "…"}       writes part of a line
    {"model": "ID"}     makes the folder of a model
    {"result": "TEXT"}  makes the result, and the model of a training
    {"kill": "NAME"}    kills itself, if it has not done so under this name before
    {"log": NUMBER}     writes so many bytes to its log
    {"end": {…}}        writes end.json, for this attempt
    {"wait": true}      waits until it is asked to stop, and says so
    {"wait": "NAME"}    the same, if it has not waited under this name before
    {"exit": NUMBER}    ends; a negative number is a signal

It imports nothing that is heavy.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """See the top of the file."""
    work = json.loads((folder / "spec.json").read_text())
    models = Path(work["models"])
    with (folder.parent / "order").open("a") as order:
        order.write(f"{work['job']}\n")
    if (folder / "reports.jsonl").exists():
        append(folder, "\n")
    for line in Path(work["config"]["data"]).read_text().splitlines():
        ((name, value),) = json.loads(line.replace("JOB", own(work))).items()
        match name:
            case "report":
                append(folder, json.dumps({"at": time.time(), **value}) + "\n")
            case "half":
                append(folder, value)
            case "model":
                (models / value).mkdir(exist_ok=True)
            case "result":
                (folder / "step_metrics.csv").write_text(value)
                (models / f"ftmodel-{own(work)}").mkdir()
            case "kill":
                if (folder / value).exists():
                    continue
                (folder / value).touch()
                os.kill(os.getpid(), 9)
            case "log":
                sys.stderr.write("x" * value)
                sys.stderr.flush()
            case "end":
                write_end(folder, work, value)
            case "wait":
                if isinstance(value, str):
                    if (folder / value).exists():
                        continue
                    (folder / value).touch()
                sys.stdin.read()
                write_end(folder, work, {"outcome": "stopped"})
                sys.exit(130)
            case "exit":
                os.kill(os.getpid(), -value) if value < 0 else sys.exit(value)


def append(folder: Path, text: str) -> None:
    """To the reports."""
    with (folder / "reports.jsonl").open("a") as file:
        file.write(text)


def write_end(folder: Path, work: dict[str, Any], value: dict[str, Any]) -> None:
    """How it ended."""
    (folder / "end.json").write_text(json.dumps({"attempt": work["attempt"], **value}))


def own(work: dict[str, Any]) -> str:
    """The job's part of its id."""
    return str(work["job"]).removeprefix("ftjob-")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

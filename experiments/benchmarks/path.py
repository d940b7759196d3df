"""Through which source files does one forward go, there and back? A cloud and an edge trace one, and name the files.

Each side is a process of its own. It answers three questions: `record` begins a trace, `forward` makes the edge run one
forward, and `report` ends the trace and gives its files. The profile function of Python is set in every thread from its
start on, so production code knows nothing of it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from isthmus.experiments.harness.bench_settings import PathSettings
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve

MODULE = "isthmus.experiments.benchmarks.path"
PACKAGE = "isthmus."
OURS = "isthmus.experiments."
"""What measures is no part of the path."""
ROUNDS = 3
"""Forwards that are traced. What is in every trace belongs to a forward; what a cloud does now and then is not."""


class FileTrace:
    """Notes the files of Isthmus whose functions are called while it records, in the order of their first calls."""

    def __init__(self) -> None:
        self._recording = False
        self._files: dict[str, None] = {}

    def install(self) -> None:
        """Watch this thread, and every one that starts from now on."""
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def record(self) -> None:
        """Begin anew."""
        self._files = {}
        self._recording = True

    def report(self) -> list[str]:
        """End, and give the files, such as `edge/client/link.py`."""
        self._recording = False
        return list(self._files)

    def _called(self, frame: FrameType, event: str, _argument: Any) -> None:
        if not self._recording or event != "call":
            return
        name = str(frame.f_globals.get("__name__", ""))
        # What a dataclass or a named tuple generates for itself stands in no file.
        if name.startswith(PACKAGE) and not name.startswith(OURS) and not frame.f_code.co_filename.startswith("<"):
            self._files.setdefault(name.removeprefix(PACKAGE).replace(".", "/") + ".py")


def run_path(settings: PathSettings, folder: Path) -> dict[str, Any]:
    """Trace a forward without sites, after one that warms up.

    Returns:
        `edge` and `cloud`: the files of each side, in the order of their first calls; `both`: those that ran on both;
        `files`: how many there are in all.

    Raises IsthmusError where a side has failed; the message says where its output is.
    """
    keys = {"side": "cloud", "folder": str(folder), **asdict(settings)}
    with TaskProcess("the cloud", MODULE, keys, log=folder / "cloud.log") as cloud:
        address = {"side": "edge", **cloud.answer()}
        with TaskProcess("the edge", MODULE, address, log=folder / "edge.log") as edge:
            edge.answer()  # it is connected
            edge.ask("forward")
            traced = []
            for _ in range(ROUNDS):
                cloud.ask("record")
                edge.ask("record")
                edge.ask("forward")
                traced.append({"edge": edge.ask("report"), "cloud": cloud.ask("report")})
    found = {side: in_all([each[side] for each in traced]) for side in ("edge", "cloud")}
    both = [file for file in found["edge"] if file in found["cloud"]]
    files = len({*found["edge"], *found["cloud"]})
    return {"settings": asdict(settings), **found, "both": both, "files": files}


def show(result: dict[str, Any]) -> None:
    """Print the files of each side."""
    for side in ("edge", "cloud"):
        typer.echo(f"{side}: {len(result[side])} files, in the order of their first calls")
        for file in result[side]:
            typer.echo(f"  {file}")
    typer.echo(f"{result['files']} files there and back, {len(result['both'])} of them on both sides")


def in_all(traces: Sequence[Sequence[str]]) -> list[str]:
    """The files of all traces, in the order of the first."""
    return [file for file in traces[0] if all(file in trace for trace in traces)]


# Inside the processes -------------------------------------------------------------------------------------------------


def _cloud(parent: Parent, trace: FileTrace) -> None:
    """A worker of `isthmus cloud serve`, without Ray."""
    from isthmus.backbone.checkpoints.sources import resolve
    from isthmus.cloud.control.worker import Worker, WorkerSpec
    from isthmus.experiments.harness.launch import LocalCloud
    from isthmus.protocol.enrolment import ConnectionString
    from isthmus.protocol.secure.keys import load_worker

    task, folder = parent.task, Path(parent.task["folder"])
    keys = LocalCloud(folder, task["model"])  # which is not started
    checkpoint = resolve(task["model"])
    worker = Worker(
        WorkerSpec(
            checkpoint=str(checkpoint.folder),
            model=checkpoint.name,
            plan=task["edge_layers"],
            dtype="fp32",
            parts=str(folder / "parts"),
            home=str(keys.home),
            listen="127.0.0.1:0",
            stash_bytes=1 << 28,
            max_tokens=4096,
            threads=1,
            log_file="",
        )
    )
    connection = ConnectionString("127.0.0.1", worker.port(), load_worker(keys.home).pin)
    parent.say({"cloud": str(connection), "key": str(keys.edge_key)})
    _answer(parent, trace)


def _edge(parent: Parent, trace: FileTrace) -> None:
    """An edge with its model, as a user has it."""
    import torch

    from isthmus.edge.client.link import connect

    with connect(parent.task["cloud"], key=parent.task["key"]) as link:
        model: Any = link.load_model()
        ids = torch.arange(1, 17)[None]
        parent.say("connected")
        _answer(parent, trace, lambda: model(input_ids=ids, use_cache=False))


def _answer(parent: Parent, trace: FileTrace, forward: Callable[[], object] = lambda: None) -> None:
    """Answer the parent's questions; see the module."""
    for question in parent.questions():
        match question:
            case "forward":
                forward()
                parent.say()
            case "record":
                trace.record()
                parent.say()
            case "report":
                parent.say(trace.report())


def _main(parent: Parent) -> None:
    trace = FileTrace()
    trace.install()
    (_cloud if parent.task["side"] == "cloud" else _edge)(parent, trace)


if __name__ == "__main__":
    serve(_main)

"""Through which source files does one forward go, there and back? A cloud and an edge trace one, and name the files.

    python -m isthmus.experiments.benchmarks.path cloud '{"folder": …, "model": …, "edge_layers": …}'
    python -m isthmus.experiments.benchmarks.path edge '{"cloud": …, "key": …}'

Each side is a process of its own, which does what it is told on standard input: `record` and `report`, and the edge
`forward`, a word a line; each is answered by a line. The profile function of Python stands in every thread from its
start on, so production code knows nothing of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from isthmus.common.errors import IsthmusError
from isthmus.experiments.harness.bench_settings import PathSettings

PACKAGE = "isthmus."
OURS = "isthmus.experiments."
"""What measures is no part of the path."""
END_SECONDS = 60
ROUNDS = 3
"""Forwards that are traced. What is in every trace belongs to a forward; what a cloud does now and then is not."""


class FileTrace:
    """Notes the files of Isthmus whose functions are called while it records, in the order of their first calls."""

    def __init__(self) -> None:
        self._recording = False
        self._files: dict[str, None] = {}

    def install(self) -> None:
        """Stand in this thread, and in every one that starts from now on."""
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

    Args:
        settings: see there.
        folder: for keys, the edge's parts and logs.

    Returns:
        `edge` and `cloud`: the files of each side, in the order of their first calls; `both`: those that ran on both;
        `files`: how many there are together.

    Raises:
        IsthmusError: A side has failed; the message says where its output is.
    """
    with _side("cloud", {"folder": str(folder), **asdict(settings)}, folder) as cloud:
        started = json.loads(cloud.hear())
        with _side("edge", {"cloud": started["cloud"], "key": started["key"]}, folder) as edge:
            edge.hear()
            edge.tell("forward")
            traced = []
            for _ in range(ROUNDS):
                cloud.tell("record")
                edge.tell("record")
                edge.tell("forward")
                traced.append({"edge": json.loads(edge.tell("report")), "cloud": json.loads(cloud.tell("report"))})
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


class _Side:
    """A side's process, from outside."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def tell(self, word: str) -> str:
        """Say a word, and wait for the answer."""
        if self._process.stdin is None:
            raise IsthmusError("the process has no standard input")
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self.hear()

    def hear(self) -> str:
        """The next line."""
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise IsthmusError(f"a side of the forward has failed; its output is in {self._log}")
        return line


@contextmanager
def _side(name: str, task: dict[str, str], folder: Path) -> Iterator[_Side]:
    log = folder / f"{name}.log"
    arguments = [sys.executable, "-m", "isthmus.experiments.benchmarks.path", name, json.dumps(task)]
    with (
        log.open("ab") as output,
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True) as process,
    ):
        try:
            yield _Side(process, log)
            if process.stdin is not None:
                process.stdin.close()
            process.wait(END_SECONDS)
        finally:
            process.kill()


# Inside the processes -------------------------------------------------------------------------------------------------


def _answer(trace: FileTrace, forward: Callable[[], object] = lambda: None) -> None:
    """Do what standard input says."""
    for line in sys.stdin:
        match line.strip():
            case "forward":
                forward()
                _say("done")
            case "record":
                trace.record()
                _say("recording")
            case "report":
                _say(json.dumps(trace.report()))


def _say(line: str) -> None:
    print(line, flush=True)


def _cloud(task: dict[str, str], trace: FileTrace) -> None:
    """A worker of `isthmus cloud serve`, without Ray."""
    from isthmus.backbone.checkpoints.sources import resolve
    from isthmus.cloud.control.worker import Worker, WorkerSpec
    from isthmus.experiments.harness.launch import LocalCloud
    from isthmus.protocol.enrolment import ConnectionString
    from isthmus.protocol.secure.keys import load_worker

    folder = Path(task["folder"])
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
    _say(json.dumps({"cloud": str(connection), "key": str(keys.edge_key)}))
    _answer(trace)
    worker.drain(1.0)


def _edge(task: dict[str, str], trace: FileTrace) -> None:
    """An edge with its model, as a user has it."""
    import torch

    from isthmus.edge.client.link import connect

    with connect(task["cloud"], key=task["key"]) as link:
        model: Any = link.load_model()
        ids = torch.arange(1, 17)[None]
        _say("connected")
        _answer(trace, lambda: model(input_ids=ids, use_cache=False))


def main(side: str, task: dict[str, str]) -> None:
    """Be one side; see the module."""
    trace = FileTrace()
    trace.install()
    (_cloud if side == "cloud" else _edge)(task, trace)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

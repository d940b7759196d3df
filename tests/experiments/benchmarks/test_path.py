"""Which files a forward goes through: what is noted, and a real forward between two processes."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models.tiny import tiny_checkpoint
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.common.machine import cores_within
from isthmus.common.readable import size
from isthmus.experiments.benchmarks.path import FileTrace, in_all


def called_in_a_thread(trace: FileTrace, work: Callable[[], object]) -> list[str]:
    """What is noted of something that a thread calls which began after the trace was installed."""
    own, threads = sys.getprofile(), threading.getprofile()
    trace.install()
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return trace.report()
    finally:
        sys.setprofile(own)
        threading.setprofile(threads)


def test_files_are_noted_once_in_the_order_of_their_first_calls() -> None:
    trace = FileTrace()
    trace.record()
    found = called_in_a_thread(trace, lambda: (size(1), cores_within(2, None), json.dumps({}), size(2)))
    assert found == ["common/readable.py", "common/machine.py"]  # neither the library's nor this test


def test_nothing_is_noted_before_it_records() -> None:
    trace = FileTrace()
    assert called_in_a_thread(trace, lambda: size(1)) == []


@pytest.mark.parametrize("traces", [[["a", "b", "c"], ["c", "a"]], [["a", "c"]]])
def test_what_is_not_in_every_trace_is_no_part_of_the_path(traces: list[list[str]]) -> None:
    assert in_all(traces) == ["a", "c"]


@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_forward_between_two_processes_names_its_files(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    done = CliRunner().invoke(app, ["bench", "path", "--model", str(model), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    edge, cloud = result["edge"], result["cloud"]
    assert edge[0] == "backbone/split/edge_model.py"  # the first of ours that a forward enters
    assert edge.index("edge/client/remote_span.py") < edge.index("rpc/secure_stream.py")
    assert "cloud/gateway/server.py" in cloud
    assert cloud.index("cloud/gateway/stream.py") < cloud.index("backbone/split/span.py")
    assert result["both"] == [file for file in edge if file in cloud]
    assert result["files"] == len(edge) + len(cloud) - len(result["both"])
    root = Path(__file__).parents[3]
    assert all((root / file).is_file() for file in (*edge, *cloud))
    for file in ("edge/client/fetch.py", "edge/client/site_answerer.py", "edge/client/link.py"):  # of other calls
        assert file not in edge

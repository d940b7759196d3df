"""`edge train --leak-budget`, against a cloud in this process that records what it sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.cloud.train_runs import Runs, cloud_for_runs

from isthmus.common.errors import ConfigError, LeakBudgetError
from isthmus.edge.run_report import Report
from isthmus.privacy.recording.recorder import Recorder
from isthmus.privacy.recording.traffic import Traffic, read_traffic

MIB = 1 << 20
LETTERS = "abcdefghij"


@dataclass
class Recorded:
    """Runs against a cloud, and what it has recorded."""

    runs: Runs
    folder: Path
    texts: Path
    public: Path

    def train(self, out: Path, **values: Any) -> Report:
        defaults = {"data": str(self.texts), "steps": 2, "accumulate": 2, "leak_sample": 4}
        return self.runs.train(out, **{**defaults, **values})

    def seen(self) -> Traffic:
        return read_traffic(self.folder)


def text(n: int) -> str:
    return "".join(LETTERS[(n * 7 + place * (n % 9 + 1)) % 10] for place in range(8 + n % 3))


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("budget")
    private, public, recording = folder / "private.jsonl", folder / "public.jsonl", folder / "recording"
    recording.mkdir()
    for path, numbers in ((private, range(24)), (public, range(100, 130))):
        path.write_text("".join(json.dumps({"text": text(n)}) + "\n" for n in numbers))
    with cloud_for_runs(folder, recorder=Recorder(recording, 64 * MIB)) as runs:
        yield Recorded(runs, recording, private, public)


def test_nothing_private_crosses_where_the_budget_is_not_kept(cloud: Recorded, tmp_path: Path) -> None:
    before = len(cloud.seen().forwards)
    with pytest.raises(LeakBudgetError, match=r"tokens<=0\.5 is broken: .* Nothing private has been sent\. .*emulator"):
        cloud.train(tmp_path / "out", leak_budget=["tokens<=0.5"])
    assert len(cloud.seen().forwards) == before
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    # The control: with a budget that allows everything, the run sends.
    report = cloud.train(tmp_path / "out", leak_budget=["tokens<=1"])
    assert len(cloud.seen().forwards) > before
    assert report.leak_tokens is not None
    assert report.leak_tokens > 0.9

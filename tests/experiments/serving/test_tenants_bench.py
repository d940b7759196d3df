"""What is made of the moments of many processes, and a whole run on a tiny model."""

from __future__ import annotations

import json
import math
import mmap
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.models.small_training import config
from support.models.tiny import N_LAYERS, tiny_checkpoint, tiny_config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import load_span
from isthmus.cli.main import app
from isthmus.common.errors import IsthmusError
from isthmus.edge.training.methods import build_peft
from isthmus.experiments.harness.bench_settings import TenantSettings
from isthmus.experiments.harness.process_memory import forget_peak, peak_bytes, proportional_bytes
from isthmus.experiments.serving import tenants_bench
from isthmus.experiments.serving.tenants_bench import check_bound, jain, loss_difference, most
from isthmus.experiments.serving.tenants_crowd import Beside, Seen, Turn, counts_of, in_turns, p99, steps_at_most
from isthmus.experiments.serving.tenants_process import WARM_UP, Enough, Moments


def steps(begun: float, seconds: float, count: int) -> Seen:
    return Seen(tuple(begun + seconds * number for number in range(count + 1)), cpu_s=0.5 * count)


def test_what_counts_is_the_time_in_which_all_are_at_work() -> None:
    turn = Turn([steps(0.0, 1.0, 10), steps(2.5, 0.5, 10)], [8, 4])
    assert turn.steps == pytest.approx([5.0, 10.0])  # from 2.5 to 7.5
    assert turn.throughput == pytest.approx((5 * 8 + 10 * 4) / 5)
    assert turn.cpu_per_step == pytest.approx(1.0)


def test_the_99th_percentile_is_of_the_tenants_asked_for_in_all_turns() -> None:
    slow = Seen((0.0, 1.0, 2.0, 5.0), 0.0)
    turn = Turn([slow, steps(0.0, 1.0, 100)], [1, 1])
    assert p99([turn], [0]) == pytest.approx(3.0)
    assert p99([turn], [1]) == pytest.approx(1.0)
    assert p99([turn], [0, 1]) == pytest.approx(1.0)  # one of 103
    assert p99([Turn([steps(0.0, 2.0, 3)], [1]), Turn([steps(0.0, 1.0, 3)], [1])], [0]) == pytest.approx(2.0)


def test_the_most_memory_of_each_is_of_all_turns() -> None:
    assert most([Turn([], [], [5, 1]), Turn([], [], [3, 4])]) == [5, 4]


class Logged:
    """A crowd that computes nothing: each of its turns takes so many seconds a step."""

    def __init__(self, name: str, log: list[Any], seconds: Sequence[float]) -> None:
        self.name, self.log, self._seconds = name, log, iter(seconds)

    def work(self, count: int, tenants: Sequence[int] | None) -> Turn:
        self.log.append((self.name, count, tenants))
        return Turn([steps(0.0, next(self._seconds), count)], [10])


def test_tenants_are_compared_with_the_single_processes_before_and_after_them() -> None:
    log: list[Any] = []
    singles: Any = Logged("singles", log, [1.0, 2.0, 4.0])
    crowd: Any = Logged("tenants", log, [1.0, 1.0])
    done = in_turns(singles, crowd, 2, 3, range(1), lambda: log.append("between"))
    one, all_ = ("singles", 3, range(1)), ("tenants", 3, range(1))
    assert log == [one, "between", all_, one, "between", all_, one]
    assert [each.single for each in done] == pytest.approx([(10 + 5) / 2, (5 + 2.5) / 2])
    assert [each.ratio for each in done] == pytest.approx([10 / 7.5, 10 / 3.75])
    assert isinstance(done[0], Beside)
    assert done[0].after is done[1].before


class Asked:
    """A parent with some questions; notes what is said to it."""

    def __init__(self, *questions: object) -> None:
        self.said: list[Any] = []
        self._questions = iter(questions)

    def say(self, answer: Any = None) -> None:
        self.said.append(answer)

    def question(self) -> Any:
        return next(self._questions)


def test_a_process_waits_when_it_is_warm_and_after_each_turn() -> None:
    parent = Asked(2, 1, "end")
    moments = Moments(parent)  # type: ignore[arg-type]  # no more of a parent is used
    counts = []
    for step in range(1, 6):
        moments.before_step(step)
        counts.append(len(parent.said))
    with pytest.raises(Enough):
        moments.before_step(6)
    assert counts == [0, 0, 1, 1, 2]
    warm, first, second = parent.said
    assert warm == "warm"
    assert len(first["moments"]) == 3
    assert len(second["moments"]) == 2
    assert second["moments"][0] >= first["moments"][-1]
    assert min(first["cpu_s"], second["cpu_s"]) >= 0


def test_jains_index() -> None:
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_losses_are_compared_step_by_step(tmp_path: Path) -> None:
    for name, losses in (("a", (2.0, 1.0)), ("b", (2.0, 1.25))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "losses.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
    assert loss_difference(tmp_path / "a", tmp_path / "a", 2) == 0
    assert loss_difference(tmp_path / "a", tmp_path / "b", 2) == pytest.approx(0.2)
    assert loss_difference(tmp_path / "a", tmp_path / "b", 1) == 0
    with pytest.raises(IsthmusError, match="has 2 losses, and 3 are to be compared"):
        loss_difference(tmp_path / "a", tmp_path / "b", 3)


@pytest.mark.parametrize("figure", [None, Path("figure.png")])
def test_adalora_prunes_within_the_steps_whose_losses_are_compared(tmp_path: Path, figure: Path | None) -> None:
    settings = TenantSettings(figure=figure)
    assert counts_of(settings) == ([] if figure is None else [1, 2, 4, 8])
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    tuned = build_peft(model, config(tmp_path, method="adalora", steps=steps_at_most(settings)))
    schedule = tuned.base_model.rankallocator
    schedule.set_total_step(steps_at_most(settings))
    compared = WARM_UP + settings.steps
    budgets = [schedule.budget_schedule(step)[0] for step in (0, compared)]
    assert budgets[0] > budgets[1] > schedule.target_bgt


def test_a_ratio_above_the_bound_is_an_error_of_measuring() -> None:
    check_bound(1.2, 1.2)
    with pytest.raises(IsthmusError, match=r"is 1\.310 of the single processes', and 1\.130 is possible"):
        check_bound(1.31, 1.13)


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tenants_bench, "check_bound", lambda *_: None)  # this machine may do other things, too
    model = tiny_checkpoint("llama", tmp_path / "model")
    figure = tmp_path / "tenants.png"
    options = ["--n", "2", "--tokens", "32", "--steps", "8", "--edge-layers", "1:1", "--threads", "1", "--json"]
    options += ["--figure", str(figure)]
    result = CliRunner().invoke(app, ["bench", "tenants", "--model", str(model), *options])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["max_loss_diff"] == 0
    # The span has a few kilobytes, next to which anything is large: what the worker grows by is looked at in bytes.
    plan = SplitPlan.parse("1:1", N_LAYERS)
    span = sum(each.nbytes for each in load_span(model, plan).parameters())
    assert figures["cloud_growth_share"] * span < 64 << 20
    assert figures["backbone_copies"] == 1 + max(0, math.floor(figures["cloud_growth_share"]))
    assert 0.5 < figures["edge_memory_ratio"] < 1.5
    assert figures["edge_share"] > 0  # above 1 where a tiny span saves less than the messages cost
    assert figures["throughput_bound"] == pytest.approx(
        1 / (figures["edge_share"] + (1 - figures["edge_share"]) / figures["span_batching_gain"])
    )
    assert len(figures["turns"]) == 4
    assert figures["throughput_ratio"] == pytest.approx(statistics.median(figures["turns"]))
    assert figures["throughput_over_bound"] == pytest.approx(figures["throughput_ratio"] / figures["throughput_bound"])
    assert [row["n"] for row in figures["growth"]] == [1, 2]
    assert min(row["ratio"] for row in figures["growth"]) > 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figures["jain"] > 0.5
    assert figures["flood_p99_ratio"] > 0
    assert figures["throughput_ratio_bf16_cloud"] > 0
    assert figures["throughput_ratio_bf16"] > 0


def test_a_peak_is_what_was_there_since_it_was_forgotten() -> None:
    size = 64 << 20
    slack = size // 16  # the kernel counts pages on each processor, and sums them up now and then
    with mmap.mmap(-1, size) as block:  # its pages go back when it is closed, whatever the heap keeps
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        forget_peak(os.getpid())
    assert peak_bytes(os.getpid()) - proportional_bytes(os.getpid()) > size - slack, "what was there is remembered"
    forget_peak(os.getpid())
    assert peak_bytes(os.getpid()) - proportional_bytes(os.getpid()) < slack, "and then forgotten"


@pytest.mark.parametrize("look", [forget_peak, peak_bytes, proportional_bytes])
def test_a_process_that_is_gone_has_no_memory(look: Callable[[int], Any]) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    with pytest.raises(IsthmusError, match=f"/proc/{gone.pid}/.*which the figures of memory need"):
        look(gone.pid)

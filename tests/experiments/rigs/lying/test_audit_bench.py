"""The measurement of audits on a tiny model: its rows, its controls, and that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.runtime.batch_invariance import BatchInvariance
from isthmus.backbone.split.span import load_span
from isthmus.cloud.engine import engine
from isthmus.edge.audit import audit_run, replay as edge_replay
from isthmus.edge.audit.conditioning import MAX_ROUNDING_RATIO
from isthmus.edge.witness.audit_sample import AUDIT_FOLDER, read_sample
from isthmus.experiments.harness.rig_settings import AuditSettings
from isthmus.experiments.rigs.lying import audit_bench, audited_cloud, forgeries, lies, tenants
from isthmus.experiments.rigs.lying.audit_bench import run_audit_bench, show
from isthmus.experiments.rigs.lying.audit_cost import cost_of, step_ratio
from isthmus.experiments.rigs.lying.audited_cloud import ELSEWHERE, AuditedCloud
from isthmus.experiments.rigs.lying.lying_cloud import ThreadCloud
from isthmus.experiments.rigs.lying.tenants import Work
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, read_transcript
from isthmus.protocol.limits import SIGN_EVERY
from isthmus.protocol.messages import Forward


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> AuditSettings:
    model = tiny_checkpoint("llama", tmp_path_factory.mktemp("model") / "llama")
    return AuditSettings(
        model=str(model),
        edge_layers="1:1",
        honest=64,
        calls=12,
        share=0.5,
        sample=2,
        trials=60,
        seq=8,
        measured=6,
        cost_steps=1,
        cost_batch=1,
        cost_seq=8,
        threads=1,
    )


@pytest.mark.long
def test_a_measurement_has_its_rows_and_an_interrupted_one_goes_on(
    settings: AuditSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (audit_bench, audited_cloud):
        monkeypatch.setattr(module, "QUANTIZED", ("none",))
    monkeypatch.setattr(audit_bench, "KINDS", ("noise",))
    monkeypatch.setattr(AuditedCloud, "cost", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_audit_bench(settings, tmp_path)
    with monkeypatch.context() as other:
        other.setattr(AuditedCloud, "cost", lambda _: {"hash_ms": 1.0})
        for name in ("threshold", "lie", "honest", "longer", "forgeries"):
            other.setattr(AuditedCloud, name, lambda *_, **__: 1 / 0)
        found = run_audit_bench(settings, tmp_path)
    assert [found[name] for name in ("all_caught", "no_false_alarms", "as_predicted", "forgeries_found")] == [True] * 4
    (lie,) = found["lies"]
    low, high = lie["caught_interval"]
    assert low <= lie["caught"] / lie["asked"] <= high
    assert [row["seq"] for row in found["longer"]] == [row["seq"] for row in found["thresholds"]][1:] == [16, 64]
    assert all(row["detected"] == row["altered"] > 0 for row in found["longer"])
    assert found["honest_calls"] == found["honest_calls_elsewhere"] == 64
    assert lie["detected_unsigned"] == lie["altered_unsigned"] > 0
    assert (lie["sample"], lie["kept"], lie["largest"]) == (2, [2], 6)
    assert [row["unsigned"] for row in found["honest_clouds"]] == [24, 24]
    assert json.loads(json.dumps(found))["forgeries"][0] == {"forgery": "untouched", "refused": False, "said": ""}
    show(found)
    assert "noise" in capsys.readouterr().out
    monkeypatch.setattr(AuditedCloud, "cost", lambda _: {})
    for number, (criterion, spoil) in enumerate(FAULTS):
        spoilt = deepcopy(found)
        spoil(spoilt)
        again = of_rows(spoilt, settings, tmp_path / f"{number}", monkeypatch)
        assert [name for name in CRITERIA if not again[name]] == [criterion]


CRITERIA = ("all_caught", "no_false_alarms", "as_predicted", "forgeries_found")


def first_row(table: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Puts figures into the first row of a table."""
    return lambda found: found[table][0].update(values)


def accused_without_batching(found: dict[str, Any]) -> None:
    found["honest_clouds"][1]["again"]["alarms"] = 1


FAULTS: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("all_caught", first_row("lies", detected=0)),
    ("all_caught", first_row("lies", detected_unsigned=0)),
    ("all_caught", first_row("lies", altered_unsigned=0, detected_unsigned=0)),  # no lie was told there
    ("all_caught", first_row("longer", detected=0)),
    ("no_false_alarms", first_row("honest_clouds", false_alarms=1)),
    ("no_false_alarms", first_row("honest_clouds", elsewhere_alarms=1)),
    ("no_false_alarms", accused_without_batching),
    ("as_predicted", first_row("lies", as_predicted=False)),
    ("forgeries_found", first_row("forgeries", refused=True)),  # the untouched one
]
"""Which criterion a figure must break, and no other."""


def of_rows(
    found: dict[str, Any], settings: AuditSettings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The measurement whose cells hold these rows."""
    tables = {"threshold": "thresholds", "longer": "longer", "lie": "lies", "honest": "honest_clouds"}
    with monkeypatch.context() as patch:
        for name, table in tables.items():
            rows = iter(found[table])
            patch.setattr(AuditedCloud, name, lambda *_, rows=rows, **__: next(rows))
        patch.setattr(AuditedCloud, "forgeries", lambda _: {"rows": found["forgeries"]})
        return run_audit_bench(settings, folder)


def test_a_threshold_of_nothing_accuses_the_honest(
    settings: AuditSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the worker with other numerics has other bits. Most are explained by rounding, if it may."""
    cloud = AuditedCloud(settings, tmp_path, "none")
    row = cloud.honest(0.0, batching=True)
    assert row["false_alarms"] == 0
    assert row["elsewhere_explained"] > row["elsewhere_calls"] / 2
    monkeypatch.setattr(audit_run, "MAX_ROUNDING_RATIO", 0.0)
    bare = cloud.honest(0.0, batching=True)
    assert bare["elsewhere_alarms"] > bare["elsewhere_calls"] / 2
    assert (bare["elsewhere_explained"], bare["elsewhere_largest_ratio"]) == (0, row["elsewhere_largest_ratio"])
    large = cloud.lie("noise", 1.0)
    assert large["detected"] == large["altered"] > 0
    assert large["elsewhere_found"] == 0  # smaller than the threshold


@pytest.mark.long
def test_rounding_excuses_the_honest_and_no_skipped_layer_or_scaled_answer(
    settings: AuditSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = AuditedCloud(settings, tmp_path, "none")
    threshold = cloud.threshold(settings.seq)["threshold"]
    # Whether an honest answer is above the measured threshold is chance; above a quarter of it, most are.
    honest = cloud.honest(threshold / 4, batching=True)
    assert honest["elsewhere_alarms"] == 0 < honest["elsewhere_explained"]
    assert 0 < honest["elsewhere_largest_ratio"] <= MAX_ROUNDING_RATIO
    for kind in ("layer_skipped", "tenant_altered"):
        row = cloud.lie(kind, threshold)
        assert row["elsewhere_found"] == row["altered"] > 0
        assert (row["elsewhere_explained_lies"], row["elsewhere_alarms"]) == (0, 0)
        assert row["elsewhere_least_ratio"] > 10 * MAX_ROUNDING_RATIO
    monkeypatch.setattr(lies, "NOISE", 1e-7)  # as large as what rounding does
    row = cloud.lie("noise", 0.0)
    assert row["detected"] == row["altered"]
    assert row["elsewhere_explained_lies"] > row["altered"] / 2


@pytest.mark.long
def test_at_a_longer_length_its_own_threshold_decides(
    settings: AuditSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_run, "MAX_ROUNDING_RATIO", 0.0)
    cloud = AuditedCloud(settings, tmp_path, "none")
    row = cloud.longer(16, 0.0)
    assert row["false_alarms"] == 0
    assert row["elsewhere_alarms"] > 0
    assert cloud.longer(16, 1e9)["elsewhere_found"] == 0 < row["elsewhere_found"]


def test_a_threshold_is_judged_on_inputs_that_it_was_not_measured_on(settings: AuditSettings, tmp_path: Path) -> None:
    cloud = AuditedCloud(settings, tmp_path, "none")
    cloud.threshold(settings.seq)
    cloud.honest(1.0, batching=True)
    measured, judged = (
        {
            b"".join(map(bytes, call.question.hidden.buffers))
            for run in (tmp_path / name).iterdir()
            for call in read_sample(run / AUDIT_FOLDER)
            if isinstance(call.question, Forward)
        }
        for name in (f"threshold-none-{settings.seq}", "honest-none-batching")
    )
    assert measured
    assert judged
    assert not measured & judged


def test_where_a_forgery_is_found(settings: AuditSettings, tmp_path: Path) -> None:
    rows = AuditedCloud(settings, tmp_path, "none").forgeries()["rows"]
    said = {row["forgery"]: row["said"] for row in rows}
    assert list(said) == list(forgeries.FORGERIES)
    assert not said.pop("untouched")
    assert all(each.startswith("RUN/") for each in said.values())
    assert said["call_left_out"].startswith("RUN/transcript.jsonl, line 4: ")
    assert said["answer_changed"].startswith("RUN/transcript.jsonl, line 34: ")  # where the first signature stands
    assert "35 exchanges; the certificate has 36" in said["end_cut"]
    assert "has no signature" in said["signatures_left_out"]


@pytest.mark.long
def test_numerics_that_differ_leave_calls_undecided_and_the_same_would_accuse_them(
    settings: AuditSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker without batching has other bits here, as one whose calls have more threads."""
    cloud = AuditedCloud(replace(settings, threads=2), tmp_path, "none")
    others = cloud._elsewhere

    class OtherBits(ThreadCloud):
        def __init__(
            self, served: Any, keys: Any, executor: Any = None, *, batching: bool = True, threads: int = 1
        ) -> None:
            super().__init__(served, keys, executor if batching else others, batching=batching, threads=threads)

    def again(invariance: BatchInvariance, threshold: float) -> tuple[list[Any], dict[str, Any]]:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "measure_batch_invariance", lambda *_: invariance)
            patch.setattr(tenants, "ThreadCloud", OtherBits)
            row = cloud.honest(threshold, batching=True)
        assert (row["false_alarms"], row["again"]["same_bits"], row["again"]["calls"]) == (0, 0, row["calls"])
        return row["again"].pop("numerics"), row["again"]

    fewer, same = BatchInvariance(16, None), BatchInvariance(16, 16)
    ((ours, theirs),), found = again(fewer, 1.0)
    assert ours == f"{theirs}, 1 from 16 positions on"
    assert (found["undecided"], found["alarms"]) == (found["calls"], 0)
    monkeypatch.setattr(audit_run, "MAX_ROUNDING_RATIO", 0.0)
    _, found = again(fewer, 0.0)  # a threshold that honest answers exceed
    assert (found["undecided"], found["alarms"]) == (found["calls"], found["calls"])
    ((ours, theirs),), found = again(same, 1.0)
    assert ours == theirs
    assert (found["undecided"], found["alarms"]) == (0, found["calls"])  # whatever the threshold is


def test_this_process_has_the_bits_of_a_worker_without_batching(
    settings: AuditSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = AuditedCloud(replace(settings, threads=2), tmp_path, "none")
    row = cloud.honest(1.0, batching=False)
    ((ours, theirs),) = row["again"].pop("numerics")
    assert ours == theirs
    assert row["again"] == {"by": "this process", "calls": 16, "same_bits": 16, "undecided": 0, "alarms": 0}
    # The control: with other bits it accuses, whatever the threshold is, and other numerics excuse nothing.
    monkeypatch.setattr(
        edge_replay, "load_span", lambda *given, **how: load_span(*given, attn_implementation=ELSEWHERE, **how)
    )
    accused = cloud.honest(1.0, batching=False)["again"]
    assert (accused["alarms"], accused["undecided"]) == (16 - accused["same_bits"], 0)
    assert accused["alarms"] > 0
    monkeypatch.setattr(edge_replay, "numerics", lambda *_: "elsewhere")
    excused = cloud.honest(1.0, batching=False)["again"]
    assert excused["alarms"] == excused["undecided"] == accused["alarms"]


def test_a_tenant_is_lied_to_in_the_session_that_broke_and_in_the_one_after(
    settings: AuditSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = AuditedCloud(replace(settings, share=1.0), tmp_path, "none")
    row = cloud.lie("tenant_altered", 1.0)
    assert (row["altered"], row["detected"]) == (12, 12)
    assert (row["altered_unsigned"], row["detected_unsigned"]) == (8, 8)
    broken, signed = read_transcript(tmp_path / "tenant_altered-none" / "alice" / TRANSCRIPT_FILE).sessions
    assert [(len(each.exchanges), each.signed) for each in (broken, signed)] == [(8, 0), (4, 4)]
    assert [Work("", 1, calls, 8, breaks=True).breaks_before for calls in (4, 60, 626)] == [1, 15, 15]  # pairs
    # The control: without a break the cloud has signed all.
    monkeypatch.setattr(Work, "breaks_before", None)
    row = cloud.lie("tenant_altered", 1.0)
    assert (row["altered"], row["altered_unsigned"], row["detected_unsigned"]) == (12, 0, 0)


def test_a_step_bears_its_share_of_a_signature(settings: AuditSettings, tmp_path: Path) -> None:
    cloud = AuditedCloud(settings, tmp_path, "none")
    found = cost_of(cloud._bench, cloud._model)
    assert found["signatures_per_step"] == 2 / SIGN_EVERY
    assert found["sign_ms"] > 0
    assert 1 < found["wire_bytes_per_exchange"] < 700 / SIGN_EVERY
    assert 300 < found["file_bytes_per_exchange"] < 400  # although this file has a signature for each step
    steps, plain = [2.0, 3.0, 4.0], [2.0, 2.0, 2.0]
    assert step_ratio(steps, [32.0] * 3, plain, 2 / 64) == pytest.approx(2.0)
    assert step_ratio(steps, [0.0] * 3, plain, 2 / 64) == pytest.approx(1.5)

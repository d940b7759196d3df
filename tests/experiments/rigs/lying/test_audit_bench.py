"""The measurement of audits on a tiny model: its rows, its controls, and that an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.edge.witness.audit_sample import AUDIT_FOLDER, read_sample
from isthmus.experiments.harness.rig_settings import AuditSettings
from isthmus.experiments.rigs.lying import audit_bench, forgeries
from isthmus.experiments.rigs.lying.audit_bench import _Cloud, run_audit_bench, show
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
    )


def test_a_measurement_has_its_rows_and_an_interrupted_one_goes_on(
    settings: AuditSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(audit_bench, "QUANTIZED", ("none",))
    monkeypatch.setattr(audit_bench, "KINDS", ("noise",))
    monkeypatch.setattr(audit_bench._Cloud, "cost", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_audit_bench(settings, tmp_path)
    with monkeypatch.context() as other:
        other.setattr(audit_bench._Cloud, "cost", lambda _: {"hash_ms": 1.0})
        for name in ("threshold", "lie", "honest", "longer", "forgeries"):
            other.setattr(audit_bench._Cloud, name, lambda *_, **__: 1 / 0)
        found = run_audit_bench(settings, tmp_path)
    assert [found[name] for name in ("all_caught", "no_false_alarms", "as_predicted", "forgeries_found")] == [True] * 4
    (lie,) = found["lies"]
    low, high = lie["caught_interval"]
    assert low <= lie["caught"] / lie["asked"] <= high
    assert [row["seq"] for row in found["longer"]] == [row["seq"] for row in found["thresholds"]][1:] == [32, 128]
    assert all(row["detected"] == row["altered"] > 0 for row in found["longer"])
    assert found["honest_calls"] == found["honest_calls_elsewhere"] == 64
    assert json.loads(json.dumps(found))["forgeries"][0] == {"forgery": "untouched", "refused": False, "said": ""}
    show(found)
    assert "noise" in capsys.readouterr().out


def test_a_threshold_of_nothing_accuses_the_honest(settings: AuditSettings, tmp_path: Path) -> None:
    """The control: the worker with other numerics has other bits."""
    cloud = _Cloud(settings, tmp_path, "none")
    row = cloud.honest(0.0, batching=True)
    assert row["false_alarms"] == 0
    assert row["elsewhere_alarms"] > 0
    large = cloud.lie("noise", 1.0)
    assert large["detected"] == large["altered"] > 0
    assert large["elsewhere_found"] == 0  # smaller than the threshold


def test_at_a_longer_length_its_own_threshold_decides(settings: AuditSettings, tmp_path: Path) -> None:
    cloud = _Cloud(settings, tmp_path, "none")
    row = cloud.longer(32, 0.0)
    assert row["false_alarms"] == 0
    assert row["elsewhere_alarms"] > 0
    assert cloud.longer(32, 1e9)["elsewhere_found"] == 0 < row["elsewhere_found"]


def test_a_threshold_is_judged_on_inputs_that_it_was_not_measured_on(settings: AuditSettings, tmp_path: Path) -> None:
    cloud = _Cloud(settings, tmp_path, "none")
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
    rows = _Cloud(settings, tmp_path, "none").forgeries()["rows"]
    said = {row["forgery"]: row["said"] for row in rows}
    assert list(said) == list(forgeries.FORGERIES)
    assert not said.pop("untouched")
    assert all(each.startswith("RUN/") for each in said.values())
    assert said["call_left_out"].startswith("RUN/transcript.jsonl, line 4: ")
    assert said["answer_changed"].startswith("RUN/transcript.jsonl, line 14: ")  # where the signature stands
    assert "certificate has 12" in said["end_cut"]

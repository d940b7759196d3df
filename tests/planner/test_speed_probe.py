"""The probe on tiny models: it measures all it says, for every shape of model, and leaves the process as it was."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.round_speeds import speed
from support.models.tiny import tiny_config

from isthmus.backbone.split.span import FrozenSpan
from isthmus.common.errors import ConfigError
from isthmus.planner import speed_probe
from isthmus.planner.model_facts import ModelFacts
from isthmus.planner.speed_probe import ROUNDS, measure
from isthmus.planner.speed_profile import ProbeSettings, SpeedProfile
from isthmus.planner.wire_probe import measure_wire
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_probe, "measure_wire", lambda: (1e-3, 1e-9))


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt_projected", "gemma2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_everything_is_measured(family: str, dtype: str) -> None:
    config = tiny_config(family)
    rounds: list[int] = []
    found = measure(config, ModelFacts.of(config), ProbeSettings(2, 8, 4, dtype), lambda: rounds.append(1))
    assert len(rounds) == ROUNDS
    assert (found.batch, found.length, found.rank, found.dtype, found.threads) == (2, 8, 4, dtype, 1)
    assert set(found.codec_s) == set(ACTIVATION_CODECS)
    numbers = [value for value in asdict(found).values() if isinstance(value, float)]
    assert all(math.isfinite(value) and value > 0 for value in [*numbers, *found.codec_s.values()])
    assert found.process_bytes > 0
    assert found.memory_bytes > 0


@pytest.mark.usefixtures("_fast")
def test_each_piece_of_work_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[str] = []
    original = speed_probe._decoded_span

    def counted(config: Any, facts: ModelFacts, dtype: str) -> FrozenSpan:
        spans.append(dtype)
        return original(config, facts, dtype)

    monkeypatch.setattr(speed_probe, "_decoded_span", counted)
    config = tiny_config("llama")
    measure(config, ModelFacts.of(config), ProbeSettings(1, 4))
    assert spans == ["fp32", "bf16"]  # of decoding and verification, and of drafts


@pytest.mark.usefixtures("_fast")
def test_activations_are_those_that_autograd_keeps() -> None:
    config = tiny_config("llama")
    found = measure(config, ModelFacts.of(config), ProbeSettings(2, 8))
    # At least the inputs of the linears and the norms, of 32 and of 64 numbers; no more than a few times that.
    least = 4 * (5 * 32 + 64)
    assert least < found.activation_bytes < 6 * least


@pytest.mark.usefixtures("_fast")
def test_threads_are_set_for_the_probe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(*_: object) -> dict[str, float]:
        seen.append(torch.get_num_threads())
        return defaultdict(lambda: 1.0)  # to measure with more threads than cores are free takes half a minute

    monkeypatch.setattr(speed_probe, "_medians", watched)
    config, before = tiny_config("llama"), torch.get_num_threads()
    measure(config, ModelFacts.of(config), ProbeSettings(1, 4, threads=before + 1))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_an_unknown_dtype_is_refused() -> None:
    config = tiny_config("llama")
    with pytest.raises(ConfigError, match="'fp64' cannot be measured"):
        measure(config, ModelFacts.of(config), ProbeSettings(dtype="fp64"))


def test_real_messages_are_exchanged_over_loopback() -> None:
    message_s, byte_s = measure_wire(repeats=3)
    assert 0 < message_s < 5
    assert 0 <= byte_s < 1e-3


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "cloud.json"
    path.write_text(json.dumps(asdict(speed(head=123.5))))
    assert SpeedProfile.read(path) == speed(head=123.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": None}, "no measured speed of this version; measure again"),
        ({"decode_layer_s": None}, "no measured speed of this version; measure again"),
        ({"more": 1}, "no measured speed of this version"),
        ({"head": "fast"}, "no number"),
        ({"byte_s": -1.0}, "below 0"),
        ({"decode_head_s": -1.0}, "below 0"),
        ({"byte_s": math.nan}, "below 0"),
        ({"layer_forward": 0.0}, "layer_forward = 0"),
        ({"decode_layer_s": 0.0}, "decode_layer_s = 0"),
        ({"codec_s": []}, "no number"),
        ({"codec_s": {"fp32": "fast"}}, "no number"),
        ({"dtype": "fp64"}, "dtype"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    tree = {name: value for name, value in (asdict(speed()) | change).items() if value is not None}
    path = tmp_path / "cloud.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=message) as failure:
        SpeedProfile.read(path)
    assert "isthmus plan --probe --json" in str(failure.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "\0"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cloud.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"cloud\.json"):
        SpeedProfile.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        SpeedProfile.read(tmp_path / "gone.json")

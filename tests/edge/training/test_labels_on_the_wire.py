"""What an edge sends in two runs whose labels differ: the same messages where `label_paths` names no way for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from support.cloud.train_runs import Runs, cloud_for_runs

from isthmus.common.errors import ConfigError
from isthmus.edge import split_run
from isthmus.edge.config.adapter_config import Method
from isthmus.edge.config.training_config import Optimizer, load_config
from isthmus.edge.data.batches import TrainingData
from isthmus.edge.training.defended_run import paths_of_labels
from isthmus.protocol.encoding import pack
from isthmus.protocol.session import EdgeSession
from isthmus.protocol.session_messages import Attach

TOP, BELOW = "0:2", "1:1"
"""Plans: with adapters on the edge's layers nothing below the cut is trained, or the first layer is."""

Run = tuple[dict[str, Any], str]
Messages = Callable[[str, str, dict[str, Any]], list[bytes]]


def _offered(method: str, optimizer: str) -> bool:
    try:
        load_config(None, {"cloud": "-", "data": "-", "method": method, "optimizer": optimizer})
    except ConfigError:
        return False
    return True


_ALL: list[Run] = [
    ({"method": method, "optimizer": optimizer}, plan)
    for method in get_args(Method)
    for optimizer in get_args(Optimizer)
    for plan in (TOP, BELOW)
    if _offered(method, optimizer)
]
_LADDER: Run = ({"method": "ladder", "optimizer": "adamw"}, BELOW)
_NO_PATH = [
    (values, plan)
    for values, plan in _ALL
    if values["method"] == "ladder" or (plan == TOP and values["method"] != "prompt")  # a prompt goes in at the bottom
]
_QUICK = [run for run in _NO_PATH if run[0]["method"] == "lora" or run == _LADDER]
_LAST_LAYER = {"target_modules": "3.self_attn.q_proj,3.self_attn.v_proj"}
_QUICK_OPTIONS: list[Run] = [
    (_LAST_LAYER, BELOW),
    ({"accumulate": 2, "codec": "int4", "seed": 5, "dropout": 0.2}, TOP),
    ({"accumulate": 2, "overlap": 2}, TOP),
]
_NO_PATH_OPTIONS: list[Run] = [
    ({**_LAST_LAYER, "optimizer": "mezo"}, BELOW),
    ({"leak_budget": "labels<=0", "optimizer": "mezo"}, TOP),
    ({"resume": True, "schedule": "constant"}, TOP),
    ({"span_cache_mib": 8}, TOP),
    ({"transcript": True, "audit_sample": 1, "eval_every": 1, "validation_split": 0.4}, TOP),
    ({"start_from": "first"}, TOP),
    ({"defence": "smoothing:share=0.1"}, TOP),
    ({"defence": "dp-sgd:clip=1,sigma=1"}, TOP),
    ({"defence": "gaussian:clip=1,sigma=1"}, TOP),
    ({"defence": "embedding-noise:eta=9"}, TOP),
    ({"defence": "mixing"}, TOP),
    ({"defence": "decoys"}, TOP),
    ({"defence": ["rotation", "quantization"]}, TOP),
]
_CONTROLS: list[Run] = [({"optimizer": "mezo"}, BELOW), ({}, BELOW)]
_PATH_OPTIONS: list[Run] = [
    ({"defence": "bottleneck:rank=4,clip=9,sigma=0.1"}, TOP),
    ({"defence": "bottleneck:rank=4,clip=9,sigma=0.1", "optimizer": "mezo"}, TOP),
    ({"defence": "learned-noise:sigma=0.1"}, TOP),
    ({"sites": "all"}, TOP),
    ({"sites": "all", "optimizer": "mezo"}, TOP),
    ({"sites": "all", "leased": "all"}, TOP),
    ({"withhold_answers": False}, TOP),
]


def _rows(path: Path, letters: str) -> Path:
    """Six questions, whose answers are these letters in turn."""
    rows = ({"prompt": f"case {n}: ", "completion": letters[n % len(letters)]} for n in range(6))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Runs]]:
    with ExitStack() as stack:
        folders = {plan: tmp_path_factory.mktemp("labels") for plan in (TOP, BELOW)}
        made = {plan: stack.enter_context(cloud_for_runs(folders[plan], plan, family="qwen2")) for plan in folders}
        for plan, runs in made.items():
            runs.train(folders[plan] / "first", steps=1)  # fetches the edge's layers
        yield made


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """A digest of each message that an edge hands over to be sealed."""
    digests: list[bytes] = []
    send = EdgeSession.send

    def noted(session: EdgeSession, message: Any) -> Iterator[bytes]:
        # A link has a drawn name, so that a cloud knows it again.
        header, body = pack(replace(message, link=bytes(16)) if isinstance(message, Attach) else message)
        digests.append(hashlib.sha256(b"".join([bytes(header), *map(bytes, body)])).digest())
        return send(session, message)

    monkeypatch.setattr(EdgeSession, "send", noted)
    return digests


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[str]]:
    """What `paths_of_labels` says of each run."""
    said: list[frozenset[str]] = []
    trainer = split_run.Trainer

    def noted(tuned: Any, data: TrainingData, config: Any, *rest: Any, **more: Any) -> Any:
        model = tuned.get_base_model() if hasattr(tuned, "get_base_model") else tuned
        said.append(paths_of_labels(model, tuned, config))
        return trainer(tuned, data, config, *rest, **more)

    monkeypatch.setattr(split_run, "Trainer", noted)
    return said


@pytest.fixture
def messages(clouds: dict[str, Runs], tmp_path: Path, sent: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Messages:
    """What a run of two steps sends, with these letters as labels."""
    # Noise is drawn by a secret key and by all data, so it is other noise with other labels: here it is the same.
    monkeypatch.setattr("isthmus.edge.training.defended_run._of_run", lambda *_: b"")
    (tmp_path / "key").write_text("ab" * 32)

    def run(letters: str, plan: str, values: dict[str, Any]) -> list[bytes]:
        settings = {
            "data": str(_rows(tmp_path / "rows.jsonl", letters)), "withhold_answers": True, "transcript": False,
            "steps": 2, "accumulate": 1, "validation_split": 0, "max_grad_norm": 0,
            "taps": 1, "reduction": 2, "virtual_tokens": 2, **values,
        }  # fmt: skip
        if "defence" in values:
            settings["defence_key"] = tmp_path / "key"
        if "start_from" in values:
            settings["start_from"] = clouds[plan].texts.parent / "first" / "adapter"
        if values.get("defence") == "decoys":
            settings["defence"] = f"decoys:file={_rows(tmp_path / 'decoys.jsonl', 'ab')}"
        if "resume" in values:
            clouds[plan].train(tmp_path / letters, **{**settings, "steps": 1, "resume": False})
        sent.clear()
        clouds[plan].train(tmp_path / letters, **settings)
        # Micro-batches that are in flight together go out in an order of their own.
        return sorted(sent) if "overlap" in values else list(sent)

    return run


@pytest.mark.parametrize(
    ("values", "plan"),
    [
        *_QUICK,
        *_QUICK_OPTIONS,
        *(pytest.param(*run, marks=pytest.mark.long) for run in [*_NO_PATH, *_NO_PATH_OPTIONS] if run not in _QUICK),
    ],
    ids=str,
)
def test_without_a_path_labels_change_no_message(
    messages: Messages, told: list[frozenset[str]], values: dict[str, Any], plan: str
) -> None:
    first = messages("xy", plan, values)
    assert len(first) > 2
    assert messages("zx", plan, values) == first
    assert set(told) == {frozenset()}


def _differs(messages: Messages, told: list[frozenset[str]], values: dict[str, Any], plan: str) -> None:
    assert messages("xy", plan, values) != messages("zx", plan, values)
    assert told[0] == told[1] != frozenset()


@pytest.mark.parametrize(("values", "plan"), _CONTROLS, ids=str)
def test_where_the_front_is_trained_labels_change_messages(
    messages: Messages, told: list[frozenset[str]], values: dict[str, Any], plan: str
) -> None:
    _differs(messages, told, values, plan)


@pytest.mark.long
@pytest.mark.parametrize(("values", "plan"), [*(run for run in _ALL if run not in _NO_PATH), *_PATH_OPTIONS], ids=str)
def test_with_a_path_labels_change_messages(
    messages: Messages, told: list[frozenset[str]], values: dict[str, Any], plan: str
) -> None:
    _differs(messages, told, values, plan)

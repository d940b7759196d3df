"""A stand-in for the process that trains: a model is one number, and its gradient is a sum over tokens.

    python -m support.daemon.fake_trainer

Like the real one it keeps gradients in its memory alone, and writes its state with every step. Each question is a line
of the file that $FAKE_TRAINER_LOG names. A token of 13 kills it; one of 14 finds the cloud away until the file that
$FAKE_TRAINER_CLOUD names is there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isthmus.common.errors import CheckpointError, ConfigError, UnreachableError
from isthmus.common.files import write_atomic
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.tinker.wire_bodies import BodyError, read_question, written_output
from isthmus.daemon.workers.answering import Answer, Handler, Question, answer_questions

KILLS, AWAY = 13, 14

models: dict[str, dict[str, Any]] = {}


def logprob(weight: float, token: int) -> float:
    """What the model says of a token."""
    return -weight * token / 100 - 0.5


def gradient(tokens: list[int], weights: list[float]) -> float:
    """Of cross entropy, by the model's one number."""
    return sum(weight * token / 100 for token, weight in zip(tokens, weights, strict=True))


def create(question: Question) -> Iterator[Answer]:
    values = question.values
    state = Path(values["folder"]) / "state.json"
    saved: dict[str, Any] = {"weight": 1.0 + (values["seed"] % 1000) / 1000, "moment": 0.0, "number": 0}
    if state.exists():
        saved = json.loads(state.read_text())
    elif values["unembed"] and not values["spare_tied_head"]:
        raise ConfigError("train_unembed = true: the head of this model is tied to its embedding")
    models[values["model"]] = {**saved, "gradient": 0.0, "calls": 0, "folder": values["folder"]}
    yield {"unembed": False, "saved": saved["number"] if state.exists() else None}, b""


def forward_backward(question: Question) -> Iterator[Answer]:
    try:
        values, model = read_question(question.blob), _model(question)
    except (RefusalError, BodyError) as error:
        raise ConfigError(str(error)) from error
    outputs, total = [], 0.0
    for datum in values["data"]:
        if KILLS in datum["tokens"]:
            os._exit(9)
        if AWAY in datum["tokens"] and not Path(os.environ["FAKE_TRAINER_CLOUD"]).exists():
            raise UnreachableError("the cloud at 127.0.0.1 cannot be reached")
    for datum in values["data"]:
        targets = datum["targets"]
        if isinstance(targets[0], list):
            outputs.append({"logprobs": [[logprob(model["weight"], token) for token in row] for row in targets]})
            continue
        found = [logprob(model["weight"], token) for token in targets]
        weights = datum.get("weights", [1.0] * len(targets))
        total -= math.fsum(weight * value for weight, value in zip(weights, found, strict=True))
        outputs.append({"logprobs": found})
        if not values["forward_only"]:
            model["gradient"] += gradient(targets, weights)
    model["calls"] += not values["forward_only"]
    yield {}, written_output(outputs, {"loss:sum": total})


def optim_step(question: Question) -> Iterator[Answer]:
    values, model = question.values, _model(question)
    if values["number"] == model["number"]:
        yield {"metrics": {}}, b""
        return
    assert values["calls"] == model["calls"] > 0
    model["number"], model["calls"] = values["number"], 0
    model["moment"] = 0.5 * model["moment"] + model["gradient"]
    model["weight"] -= values["adam"]["learning_rate"] * model["moment"]
    norm, model["gradient"] = abs(model["gradient"]), 0.0
    _write(Path(model["folder"]), model)
    if os.environ.get("FAKE_TRAINER_DIES_AFTER_STEP") and not Path(os.environ["FAKE_TRAINER_DIES_AFTER_STEP"]).exists():
        Path(os.environ["FAKE_TRAINER_DIES_AFTER_STEP"]).touch()
        os._exit(9)  # after the state is on the disk, and before anybody knows
    yield {"metrics": {"grad_norm:mean": norm}}, b""


def save(question: Question) -> Iterator[Answer]:
    _write(Path(question.values["folder"]), _model(question))
    yield {}, b""


def load(question: Question) -> Iterator[Answer]:
    model = _model(question)
    if question.values["number"] == model["number"]:
        yield {}, b""
        return
    try:
        saved = json.loads((Path(question.values["folder"]) / "state.json").read_text())
    except OSError as error:
        raise CheckpointError(f"{question.values['folder']} cannot be read") from error
    model["weight"] = saved["weight"]
    model["moment"] = saved["moment"] if question.values["optimizer"] else 0.0
    model["gradient"], model["calls"], model["number"] = 0.0, 0, question.values["number"]
    _write(Path(model["folder"]), model)
    yield {}, b""


def forget(question: Question) -> Iterator[Answer]:
    models.pop(question.values["model"])
    yield {}, b""


def traffic(_question: Question) -> Iterator[Answer]:
    """What has crossed since the last time: a call for each."""
    counts = {"bytes_up": 10, "bytes_down": 20, "calls": 1, "retries": 0}
    yield {"clouds": {"isthmus://127.0.0.1:1#SHA256:0": counts}}, b""


def _model(question: Question) -> dict[str, Any]:
    name = question.values["model"]
    if name not in models:
        raise ConfigError(f"there is no model {name}")
    return models[name]


def _write(folder: Path, model: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    state = {name: model[name] for name in ("weight", "moment", "number")}
    write_atomic(folder / "state.json", json.dumps(state).encode())


def _logged(handler: Handler) -> Handler:
    def handle(question: Question) -> Iterator[Answer]:
        with Path(os.environ["FAKE_TRAINER_LOG"]).open("a") as log:
            values = question.values
            log.write(json.dumps([question.method, values.get("model"), values.get("number")]) + "\n")
        yield from handler(question)

    return handle


if __name__ == "__main__":
    handlers = (create, forward_backward, optim_step, save, load, forget)
    answer_questions({"traffic": traffic, **{handler.__name__: _logged(handler) for handler in handlers}})

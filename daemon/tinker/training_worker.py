"""The process that trains for Tinker's API: `python -m isthmus.daemon.tinker.training_worker`.

What it answers, one question after the other (`isthmus.daemon.workers.answering`); values are as JSON has them:

    create            model, folder, cloud {fields of ClientConfig}, rank, seed, attn, mlp, unembed,
                      layers "edge"|"all", spare_tied_head? (leave out a head that is tied to the embedding)
                      -> targets, parameters, layers, alpha, unembed (whether the head is trained), saved (number of the
                      step or load gone on from; null for a new one)
    forward_backward  model; the request of Tinker's API as bytes -> {}; its result as bytes (`wire_bodies`): outputs
                      [{logprobs, shaped as targets}], metrics {"loss:sum"}
    optim_step        model, number, adam {learning_rate, beta1, beta2, eps, weight_decay, grad_clip_norm}, calls?
                      -> metrics {"grad_norm:mean": before it is clipped}
    save              model, folder, optimizer -> {}
    load              model, number, folder, optimizer -> {}
    forget            model -> {}
    state             -> pid, models {name: {number, calls}}, clouds
    traffic           -> clouds {connection string: {bytes_up, bytes_down, calls, retries}}, since it was asked last

Data and results are bytes, since the daemon answers nobody while it reads or writes so much JSON.

After a step or a load, the state is in the model's folder before the answer is given, and what has the number that it
has already is answered as it was then. Gradients since then end with the process: who asks makes the model again and
repeats forward_backward. `calls`, how often it was answered since then, makes a gradient that is missing an error where
it is given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isthmus.common.errors import ConfigError
from isthmus.common.torch_threads import use_threads
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.tinker.training.datum_batches import Datum
from isthmus.daemon.tinker.training.lora_shape import LoraShape
from isthmus.daemon.tinker.training.trained_model import AdamParams
from isthmus.daemon.tinker.training.training_models import TrainingModels
from isthmus.daemon.tinker.wire_bodies import BodyError, read_question, written_output
from isthmus.daemon.workers.answering import Answer, Handler, Question, answer_questions
from isthmus.edge.config.client_config import ClientConfig

Values = dict[str, Any]
Checked = TypeVar("Checked", bound=BaseModel)


class _Asked(BaseModel):
    """What every question about a model has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=200)


class _Create(_Asked):
    folder: str
    cloud: Values
    rank: int
    seed: int
    attn: bool
    mlp: bool
    unembed: bool
    layers: str
    spare_tied_head: bool = False


class _ForwardBackward(_Asked):
    loss: str
    loss_config: dict[str, float] = Field(default_factory=dict)
    forward_only: bool = False
    data: list[Datum]


class _OptimStep(_Asked):
    number: int = Field(ge=1)
    adam: AdamParams
    calls: int | None = Field(None, ge=0)


class _Copy(_Asked):
    folder: str
    optimizer: bool = False


class _Load(_Copy):
    number: int = Field(ge=1)


class TrainingHandlers:
    """The answers to the questions; see the top of the file.

    Attributes:
        models: What is in training.
    """

    def __init__(self) -> None:
        self.models = TrainingModels()

    def by_method(self) -> dict[str, Handler]:
        """For `answer_questions`."""
        methods: Mapping[str, Callable[[Values], Values]] = {
            "create": self.create,
            "optim_step": self.optim_step,
            "save": self.save,
            "load": self.load,
            "forget": self.forget,
            "state": self.state,
            "traffic": self.traffic,
        }
        return {"forward_backward": self._of_body, **{name: _handler(method) for name, method in methods.items()}}

    def _of_body(self, question: Question) -> Iterator[Answer]:
        """`forward_backward`, by the bytes of its request and its result."""
        try:
            asked = read_question(question.blob)
        except (RefusalError, BodyError) as error:
            raise ConfigError(str(error)) from error
        answer = self.forward_backward(question.values | asked)
        yield {}, written_output(answer["outputs"], answer["metrics"])

    def create(self, values: Values) -> Values:
        """See the top of the file."""
        asked = _check(_Create, values)
        config = _check(ClientConfig, asked.cloud)
        shape = _check(LoraShape, {name: values[name] for name in LoraShape.model_fields})
        return self.models.create(asked.model, Path(asked.folder), config, shape, spare_tied_head=asked.spare_tied_head)

    def forward_backward(self, values: Values) -> Values:
        """Of data {tokens, targets, weights?, logprobs?, advantages?}, as `read_question` reads them.

        Sparse targets and weights come dense, with token 0 of weight 0 in the gaps.
        """
        asked = _check(_ForwardBackward, values)
        model = self.models.model(asked.model)
        logprobs, loss = model.forward_backward(
            asked.loss, asked.loss_config, asked.data, forward_only=asked.forward_only
        )
        return {"outputs": [{"logprobs": each} for each in logprobs], "metrics": {"loss:sum": loss}}

    def optim_step(self, values: Values) -> Values:
        """See the top of the file."""
        asked = _check(_OptimStep, values)
        metrics = self.models.model(asked.model).optim_step(asked.number, asked.adam, asked.calls)
        return {"metrics": dict(metrics)}

    def save(self, values: Values) -> Values:
        """See the top of the file."""
        asked = _check(_Copy, values)
        self.models.model(asked.model).save(Path(asked.folder), optimizer=asked.optimizer)
        return {}

    def load(self, values: Values) -> Values:
        """See the top of the file."""
        asked = _check(_Load, values)
        self.models.model(asked.model).load(asked.number, Path(asked.folder), optimizer=asked.optimizer)
        return {}

    def forget(self, values: Values) -> Values:
        """See the top of the file."""
        self.models.forget(_check(_Asked, values).model)
        return {}

    def state(self, _values: Values) -> Values:
        """See the top of the file."""
        return {"pid": os.getpid(), **self.models.state()}

    def traffic(self, _values: Values) -> Values:
        """See the top of the file."""
        return {"clouds": self.models.take_crossed()}


def _handler(method: Callable[[Values], Values]) -> Handler:
    def answer(question: Question) -> Iterator[Answer]:
        yield method(question.values), b""

    return answer


def _check(kind: type[Checked], values: Mapping[str, Any]) -> Checked:
    """The values as what they should be.

    Raises:
        ConfigError: They are not. The message has no value, which may be a client's data.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where or 'the question'}: {first['msg'].removeprefix('Value error, ')}") from error


def main() -> None:
    """Answer until standard input ends."""
    use_threads(None)
    answer_questions(TrainingHandlers().by_method())


if __name__ == "__main__":
    main()

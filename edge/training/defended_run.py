"""The defences of a training run: what stands between model and span, and what the loop does differently for them.

All that is drawn follows from the key, the run's settings and data, the step, the number of the pass in it, and what
the cloud has answered to the run's steps until then. So a step that is made again, after a resume say, sends the same
where the cloud answers the same, and the run ends as if nothing had been made again. Where the cloud answers otherwise,
the step has other noise. A key that is used for another run draws other noise, too. The checkpoints know the key by its
fingerprint, and the answers by a digest.

That holds as far as the edge computes the same bits: on one machine, with as many threads. Elsewhere the last bits of
what noise is added to can be others, and the noise the same.

What each process of a run begins to send is counted (`isthmus.edge.run_files.release_log`). Tuning on a package sends
nothing, so no step is a release but for the adapter that it led to: steps count once there, however often a process
makes them, and nothing stands between model and emulator. Which examples are in a step is drawn from the key, too.
"""

from __future__ import annotations

import hmac
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isthmus.backbone.adapters.adapter_files import adapter_digest
from isthmus.backbone.families import family_of
from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.common.files import disk_errors, write_atomic
from isthmus.common.ownership import private_folder
from isthmus.edge.config.defence_config import KEY_FILE
from isthmus.edge.config.schedule import epochs_left, evaluations_left, sampling_rate, steps_per_epoch, total_steps
from isthmus.edge.config.training_config import TrainConfig, TuneConfig
from isthmus.edge.data.batches import TrainingData, encode_for, fingerprint
from isthmus.edge.data.readers import read_examples
from isthmus.edge.run_files.release_log import RELEASES_FILE, ReleaseLog
from isthmus.edge.run_files.run_identity import START_ANEW, ModelIdentity, fixed_settings, identity_entries
from isthmus.edge.span_cache.cache_check import dropout_below
from isthmus.privacy.defences.accountant import Exposure, Guarantee, Releases, guarantee
from isthmus.privacy.defences.decoys import Decoys
from isthmus.privacy.defences.defence import Defence
from isthmus.privacy.defences.defence_options import Decoys as DecoyOptions, DefenceOptions, DpSgd
from isthmus.privacy.defences.defended_span import DefendedSpan, SpanFn, build_defences
from isthmus.privacy.defences.private_gradients import PrivateGradients, poisson_sample
from isthmus.privacy.defences.secret_noise import KEY_BYTES, SecretNoise
from isthmus.privacy.ledger.mode_leaks import LabelPath, label_paths

_BEFORE = 0  # the step of what passes before the first one
_NOTHING = Releases()


class DefendedRun:
    """A `StepObserver`, so that its key is in the checkpoints, and what the loop asks of defences.

    Args:
        per_epoch: Steps of an epoch.
        sampled: Where nothing is sent: how many examples there are, and the chance of each to be in a step.

    Attributes:
        texts: The defences as options write them.
        defences: Those that are functions of hidden states and gradients, in the order in which they act.
    """

    def __init__(
        self,
        options: Sequence[DefenceOptions],
        span: DefendedSpan,
        defences: Sequence[Defence],
        modules: Sequence[nn.Module],
        noise: SecretNoise,
        releases: ReleaseLog,
        decoys: str | None,
        eval_every: int | None,
        per_epoch: int,
        sampled: tuple[int, float] | None,
    ) -> None:
        self.texts = [each.text() for each in options]
        self.defences = tuple(defences)
        self._span = span
        self._noise = noise
        self._private = next((each for each in options if isinstance(each, DpSgd)), None)
        self._modules = modules
        self._releases = releases
        self._per_epoch = per_epoch
        self._sends = sampled is None
        self._sampled = sampled
        # What was guaranteed at the start goes by how often held-out texts are sent.
        self._identity = {"key": noise.fingerprint, "decoys": decoys, "eval_every": eval_every}
        if sampled is not None:
            self._identity["batches"] = "Poisson"
        self._step = _BEFORE
        self._begun: int | None = None  # the last step that this process has begun
        self._answers = span.answers  # as they were before the step
        self._await_evaluation()

    @property
    def guarantee(self) -> Guarantee | None:
        """What they guarantee of the run, once this process has sent something; None where none claims an (ε, δ)."""
        return self._releases.guarantee

    @property
    def exposure(self) -> Exposure:
        """What the run does with the example that it shows most, in all of its processes."""
        return self._releases.exposure

    def figures(self) -> dict[str, Any]:
        """What the report says of them, under the names that `Report` has for it."""
        self._releases.settle()  # a run that has ended is resumed without sending anything
        promised = self.guarantee
        if promised is None:
            return {"defences": self.texts}
        figures = {"epsilon": promised.epsilon, "delta": promised.delta, "guarantee": promised.of}
        return {"defences": self.texts, **figures}

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained beside the adapters, by name."""
        return {
            f"defence.{index}.{name}": parameter
            for index, module in enumerate(self._modules)
            for name, parameter in module.named_parameters()
        }

    def rehearsed(self, around: Callable[[SpanFn], SpanFn]) -> AbstractContextManager[None]:
        """See `DefendedSpan.rehearsed`."""
        return self._span.rehearsed(around)

    def extra_loss(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """See `DefendedSpan.extra_loss`."""
        return self._span.extra_loss(logits, labels)

    def private_gradients(self) -> PrivateGradients | None:
        """What adds up a step's gradients example by example; None where they are taken by micro-batches."""
        if self._private is None:
            return None
        step = self._step
        expected = None if self._sampled is None else math.prod(self._sampled)
        return PrivateGradients(self._private, self._noise, lambda: ("step", step, self._span.answers), expected)

    def drawn(self) -> list[int] | None:
        """The examples of the step that has begun, each drawn by itself; None where they are those of an epoch."""
        if self._sampled is None:
            return None
        return poisson_sample(self._noise, *self._sampled, self._step)

    def before_step(self, step: int) -> None:
        """See `StepObserver`."""
        # A step that follows on the one before it shows examples that this process has not sent in the epoch.
        follows = self._begun == step - 1 and (step - 1) % self._per_epoch > 0
        self._step = self._begun = step
        self._span.answers = self._answers
        before_first = None if follows else partial(self._releases.add, epochs=1)
        self._span.begin("step", step, learned_from=True, before_first=before_first)
        if not self._sends:
            self._releases.settle()

    def after_step(self, step: int) -> None:
        """See `StepObserver`."""
        self._answers = self._span.answers
        self._await_evaluation()

    def points(self) -> Mapping[str, float]:
        """See `StepObserver`."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """See `StepObserver`."""
        return {**self._identity, "step": self._step, "answers": self._answers.hex()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `StepObserver`.

        Raises:
            CheckpointError: The key, the decoys or the steps between evaluations are others than before, or what was
                sent before is not known.
            ConfigError: The file that counts it cannot be read.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                what = {"key": "key", "decoys": "file of decoys", "batches": "way to draw batches"}.get(
                    name, f"eval_every ({state.get(name)})"
                )
                raise CheckpointError(
                    f"the run cannot be resumed: its defences had another {what}. Resume with the one that it was "
                    f"started with, or {START_ANEW}."
                )
        self._step = int(state["step"])
        if self._sends:
            self._releases.go_on(self._step)
        self._answers = self._span.answers = bytes.fromhex(state["answers"])
        self._await_evaluation()

    def _await_evaluation(self) -> None:
        """What passes next, if no step does, is an evaluation, from whose answers nothing is learned."""
        self._span.begin("after", self._step, before_first=partial(self._releases.add, evaluations=1))


@contextmanager
def defended_run(
    model: Any,
    trained: Any,
    config: TrainConfig | TuneConfig,
    identity: ModelIdentity,
    data: TrainingData,
    tokenizer: Any,
    say: Callable[[str], None],
) -> Iterator[DefendedRun | None]:
    """Put the defences of `config` between a model and its span while the block runs; None where there are none.

    Args:
        model: The edge's model.
        trained: The same, with adapters and perhaps PEFT's wrapper.
        say: Told what each defence claims.

    Raises:
        ConfigError: A defence does not fit the run, or the key is no key.
        DataError: The file of decoys is malformed.
    """
    options = config.defences()
    if not options:
        yield None
        return
    key = read_key(config.defence_key or config.out / KEY_FILE, make=config.defence_key is None)
    noise = SecretNoise(hmac.digest(key, _of_run(config, identity, data), "sha256"))

    def exposure_after(done: int, before: Releases) -> Exposure:
        return exposure_of(model, trained, config, data, done, before)

    guarantee(options, exposure_after(_BEFORE, _NOTHING))  # refuses now what it would refuse later
    try:
        defences = build_defences(options, model.config.hidden_size)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    decoys, made_of = _decoys(options, config, data, tokenizer, noise)
    modules = [module.to(model.device) for module in (each.module() for each in defences) if module is not None]
    for each in options:
        broken = each.broken_by
        say(f"defence {each.text()}: {f'an example, broken by {broken}' if broken else f'claims {each.claim}'}")
    releases = ReleaseLog(config.out / RELEASES_FILE, noise.fingerprint, options, exposure_after, say)
    per_epoch = steps_per_epoch(config, len(data.train))
    span = DefendedSpan(model, defences, noise, decoys)
    n = len(data.train)
    sampled = None if isinstance(config, TrainConfig) else (n, sampling_rate(config, n))
    every = config.eval_every if sampled is None else None
    with span.in_place() if sampled is None else nullcontext():
        yield DefendedRun(options, span, defences, modules, noise, releases, made_of, every, per_epoch, sampled)


def read_key(path: Path, *, make: bool) -> bytes:
    """The key in a file.

    Args:
        make: Whether to make one, and its folder, for their owner alone, where there is no file.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
        DiskError: It cannot be written.
    """
    if make and not path.exists():
        with disk_errors(path):
            private_folder(path.parent)
        write_atomic(path, f"{os.urandom(KEY_BYTES).hex()}\n".encode(), 0o600)
    remedy = f"give a file with {2 * KEY_BYTES} hexadecimal digits, which `openssl rand -hex {KEY_BYTES}` prints."
    try:
        key = bytes.fromhex(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the defences' key {path} cannot be read ({error.strerror}): {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"the defences' key {path} is none: {remedy}") from error
    if len(key) != KEY_BYTES:
        raise ConfigError(f"the defences' key {path} has {len(key)} bytes: {remedy}")
    return key


def exposure_of(
    model: Any,
    trained: Any,
    config: TrainConfig | TuneConfig,
    data: TrainingData,
    done: int = _BEFORE,
    before: Releases = _NOTHING,
) -> Exposure:
    """What the run does with the example that it shows most.

    Args:
        done: Applied steps that a process goes on from.
        before: What the run's processes have begun to send before.
    """
    n_examples = len(data.train)
    epochs = before.epochs + epochs_left(config, n_examples, done)
    mezo = config.optimizer == "mezo"
    lengths = [len(example.input_ids) for example in (*data.train, *data.validation)]
    if isinstance(config, TuneConfig):
        steps, rate = total_steps(config, n_examples), sampling_rate(config, n_examples)
        return Exposure(tokens=max(lengths), forwards=0, backwards=0, held_out=0, steps=steps, moves=False, rate=rate)
    return Exposure(
        tokens=max(lengths),
        forwards=epochs * (2 if mezo else 1),
        backwards=epochs if "gradients" in paths_of_labels(model, trained, config) else 0,
        held_out=before.evaluations + evaluations_left(config, n_examples, done) if data.validation else 0,
        steps=epochs,
        # A run without gradients is in eval mode, in which nothing drops out.
        moves=_front_moves(model, trained, config) or (not mezo and dropout_below(model) is not None),
    )


def paths_of_labels(model: Any, trained: Any, config: TrainConfig) -> frozenset[LabelPath]:
    """By which ways the labels of a run reach the cloud; see `label_paths`. Arguments as of `defended_run`."""
    return label_paths(
        withheld=config.withhold_answers,
        front_moves=_front_moves(model, trained, config),
        backward=config.optimizer != "mezo",
    )


def _front_moves(model: Any, trained: Any, config: TrainConfig) -> bool:
    """Whether something is trained below the cloud's layers, or inside them. A ladder stands beside them."""
    below = any(each.trained_below for each in config.defences()) or _trained_below(model, trained)
    return config.method != "ladder" and below


def _of_run(config: TrainConfig | TuneConfig, identity: ModelIdentity, data: TrainingData) -> bytes:
    """What noise is for, beside the step: two runs that send something else may not share any."""
    start = None if config.start_from is None else adapter_digest(config.start_from)
    settings = fixed_settings(config, total_steps(config, len(data.train)), start)
    return json.dumps([settings, identity_entries(identity, data.fingerprint)], sort_keys=True).encode()


def _trained_below(model: Any, trained: Any) -> bool:
    """Whether parameters of the model below the cloud's layers, or inside them, are trained."""
    layers = model.get_submodule(family_of(model.config).layers_path)
    above = {id(parameter) for layer in layers[model.split_plan.cloud.stop :] for parameter in layer.parameters()}
    return any(parameter.requires_grad and id(parameter) not in above for parameter in trained.parameters())


def _decoys(
    options: Sequence[DefenceOptions],
    config: TrainConfig | TuneConfig,
    data: TrainingData,
    tokenizer: Any,
    noise: SecretNoise,
) -> tuple[Decoys | None, str | None]:
    """The decoys of the run's examples, and the fingerprint of what they were made of."""
    wanted = next((each for each in options if isinstance(each, DecoyOptions)), None)
    if wanted is None:
        return None, None
    texts, _ = encode_for(config, read_examples(wanted.file, config), tokenizer)
    real = [example.input_ids for example in (*data.train, *data.validation)]
    generated = [(text.input_ids, text.labels) for text in texts]
    return Decoys(wanted.count, real, generated, noise), fingerprint(texts)

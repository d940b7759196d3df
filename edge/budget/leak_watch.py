"""A run that attacks itself: before it sends anything private, and whenever its front has changed.

The budget is measured, not guaranteed. Its value is the largest upper 95 % bound over all attacks of what they
recover of a text that is sent. A run that breaks it ends before the next batch goes out, be it of a step or of an
evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor

from isthmus.common.errors import ConfigError, LeakBudgetError
from isthmus.edge.budget.attacker import knowledge_of
from isthmus.edge.budget.budget_texts import FEWEST_PUBLIC, choose_texts
from isthmus.edge.budget.measured_leak import (
    NO_PATH,
    SLOPES,
    Enough,
    Leak,
    attack_gradients,
    attack_learned_texts,
    attack_texts,
    worst_leak,
)
from isthmus.edge.budget.rehearsal import Rehearsal
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import TrainingData
from isthmus.edge.training.defended_run import DefendedRun, exposure_of, paths_of_labels
from isthmus.privacy.attacks.attack import Knowledge
from isthmus.privacy.defences.defence_options import Gaussian
from isthmus.privacy.ledger.judged_attacks import Judged, Truth
from isthmus.privacy.ledger.mode_leaks import keeping
from isthmus.privacy.recording.traffic import Traffic

_CHANGE_TEXTS = 4
"""Of the sample, whose hidden states tell before every step and evaluation how far the front has changed."""
_CHANGE_PLACES = 64
"""Of predictions that are compared: each is as long as the vocabulary."""
_TINY = 1e-30  # keeps what was nothing from being divided by


class BudgetWatch:
    """An `isthmus.edge.training.trainer.LeakWatch`.

    Args:
        model: The edge's model, without PEFT's wrapper.
        tuned: The same, with adapters and perhaps PEFT's wrapper.
        defended: The run's defences; None for none.
        say: Told what is attacked and what was measured.

    Raises:
        ConfigError: The texts do not do, or the run has something that the attacks do not measure.
        DataError: The public texts cannot be read.
    """

    def __init__(
        self,
        model: Any,
        tuned: Any,
        config: TrainConfig,
        data: TrainingData,
        tokenizer: Any,
        defended: DefendedRun | None,
        say: Callable[[str], None],
    ) -> None:
        self._model, self._tokenizer, self._config, self._defended = model, tokenizer, config, defended
        self._say = say
        self._limits = config.limits()
        self._paths = paths_of_labels(model, tuned, config)
        self._gradients = "gradients" in self._paths
        self._attacks_labels = self._gradients and "labels" in self._limits
        _check_noise(config, moves=exposure_of(model, tuned, config, data).moves)
        in_texts = {
            "tokens": "tokens" in self._limits or config.secrets is not None,
            "labels": "labels" in self._limits and "text" in self._paths and "slopes" not in self._paths,
        }
        self._in_texts = [channel for channel, read in in_texts.items() if read]
        self._attacks_texts = bool(self._in_texts)
        self._attacks_anything = self._attacks_texts or self._attacks_labels
        self._texts = choose_texts(config, data, tokenizer, attacked=self._attacks_anything)
        self._rehearsal = Rehearsal(model, tuned, config, defended, data.pad_id)
        self._check_stop: Callable[[], None] = lambda: None
        self._worst: dict[str, Leak] = {}
        self._attacks = 0
        self._attacked_at: int | None = None  # applied steps; None before this process makes one
        self._states: list[list[Tensor]] = []
        self._outputs: list[Tensor] = []  # of the cloud's layers, for public texts
        total = total_steps(config, len(data.train))
        trained_on = min(len(data.train), total * config.batch * config.accumulate)
        every = len(data.train) + len(data.validation)
        self._shares = {"tokens": (trained_on + len(data.validation)) / every, "labels": trained_on / every}
        self._check_labels()

    @property
    def line(self) -> str | None:
        """See `LeakWatch`."""
        if not self._worst:
            return None
        parts = [leak.text() for leak in self._worst.values()]
        on = [f"measured on {len(self._texts.sample)} texts"] if self._attacks_texts else []
        if self._attacks_labels:
            on.append(f"labels on {len(self._public_sent())} public ones")
        return ", ".join([*parts, *on])

    def begin(self, check_stop: Callable[[], None]) -> None:
        """See `LeakWatch`."""
        self._check_stop = check_stop
        said = f"leak budget {self._budget()}: measured, not guaranteed."
        if self._attacks_texts:
            said += f" {len(self._texts.sample)} private texts are attacked here before anything private is sent."
        if self._gradients and self._attacks_anything:
            said += f" {len(self._public_sent())} public texts go through the cloud's layers, for attacks on gradients."
        if self._attacks_anything:
            source = "public texts" if self._texts.given else "other texts of the run, which makes it stronger"
            said += f" The attacker learns from up to {len(self._texts.public)} {source}."
        self._say(said)
        self._attack("This process has sent nothing private")

    def before_step(self, step: int) -> None:
        """See `StepObserver`: attacks again where the front has changed, before the step's batches go out.

        Raises:
            LeakBudgetError: The budget is broken.
        """
        self._attack_again(step - 1, f"step {step}")

    def before_evaluation(self, step: int) -> None:
        """See `LeakWatch`."""
        self._attack_again(step, f"the evaluation after step {step}")

    def after_step(self, step: int) -> None:
        """See `StepObserver`."""

    def points(self) -> Mapping[str, float]:
        """See `StepObserver`."""
        return {f"leak/{channel}": leak.value for channel, leak in self._worst.items()}

    def state(self) -> Mapping[str, Any]:
        """See `StepObserver`."""
        worst = {channel: asdict(leak) for channel, leak in self._worst.items()}
        return {"worst": worst, "attacks": self._attacks}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `StepObserver`."""
        self._worst = {
            channel: Leak(**{**leak, "recovered": tuple(leak["recovered"])}) for channel, leak in state["worst"].items()
        }
        self._attacks = int(state["attacks"])

    def figures(self) -> dict[str, Any]:
        """See `LeakWatch`."""
        values = {f"leak_{channel}": leak.value for channel, leak in self._worst.items()}
        return {"leak": self.line, "leak_attacks": self._attacks, **values}

    def _check_labels(self) -> None:
        if not (self._gradients and self._attacks_anything):
            return
        if not self._texts.given:
            raise ConfigError(
                f"the leak budget {self._budget()} is measured with public texts that pass through the cloud's layers, "
                "as gradients go up in this run, and tell of its texts: give --public FILE."
            )
        if len(self._texts.public) < 2 * FEWEST_PUBLIC:
            raise ConfigError(
                f"{len(self._texts.public)} public texts are too few: half of them pass through the cloud's layers for "
                f"the attacks on gradients, and the attacker needs {FEWEST_PUBLIC}: give a file with more."
            )

    def _public_sent(self) -> Sequence[Any]:
        """The public texts that pass through the cloud's layers, for attacks on gradients."""
        return self._texts.public[: min(self._config.leak_sample, len(self._texts.public) // 2)]

    def _budget(self) -> str:
        parts = [f"{channel}<={limit:g}" for channel, limit in self._limits.items()]
        if self._texts.secrets:
            parts.append(f"{sum(map(len, self._texts.secrets))} secrets")
        return ", ".join(parts)

    def _attack_again(self, applied: int, what: str) -> None:
        """Attack before `what` is sent, after `applied` steps, if the front has changed or `leak_every` says so."""
        if not self._attacks_anything:
            return
        if self._attacked_at is None:
            self._attacked_at = applied
        change, every = self._change(), self._config.leak_every
        due = every is not None and applied - self._attacked_at >= every
        if change <= self._config.leak_change and not due:
            return
        self._say(f"the front has changed by {change:.2f} since the last attack: attacking again before {what}")
        self._attacked_at = applied
        self._attack(f"{what[0].upper()}{what[1:]} has not been sent")

    def _attack(self, now: str) -> None:
        """Attack the run as it is, keep the worst, and compare it with the budget."""
        self._check_stop()
        with torch.random.fork_rng():
            for leak in self._leaks():
                listed = "" if leak.listed is None else f"; its lists held {leak.listed:.0%} of the right tokens"
                self._say(f"leak: {leak.text()}{listed}")
                before = self._worst.get(leak.channel)
                if before is None or leak.value >= before.value:
                    self._worst[leak.channel] = leak
                self._compare(leak, now)
        self._attacks += 1

    def _leaks(self) -> Iterator[Leak]:
        texts, codecs = self._texts, self._rehearsal.codecs

        @cache
        def crossed() -> tuple[Traffic, Truth]:
            """The public texts' own traffic: they cross once, for the attacks and to measure later changes from."""
            return self._rehearsal.gradients(self._public_sent())

        if self._attacks_texts:
            knowledge = self._knows(texts.public, codecs.forward_up)
            first = self._rehearsal.forwards(texts.sample)
            truth, answers = self._rehearsal.truth(texts.sample, texts.secrets)

            def found(judged: Sequence[Judged]) -> list[Leak]:
                return [worst_leak(channel, judged, self._shares["tokens"], truth) for channel in self._in_texts]

            def enough(judged: Sequence[Judged]) -> bool:
                return any(leak.value > self._limit(leak.channel) or leak.recovered[0] for leak in found(judged))

            judged, guess = attack_texts(knowledge, first, self._other_passes(), truth, answers, enough, self._between)
            if self._gradients and not enough(judged):
                judged += self._by_gradients_of_texts(_outputs_of(crossed()[0]), guess, truth, answers, enough)
            yield from found(judged)
        if self._attacks_labels:
            yield self._by_gradients(*crossed())
        elif "labels" in self._limits and "labels" not in self._in_texts:
            given = float("slopes" in self._paths)
            yield Leak("labels", SLOPES if given else NO_PATH, given, given, self._shares["labels"])
        if self._attacks_anything:
            if self._gradients:
                self._outputs = _outputs_of(crossed()[0])
            self._states = self._expected()

    def _other_passes(self) -> Iterator[Traffic]:
        if self._defended is None or not any(each.fresh for each in self._config.defences()):
            return  # what is sent again says more only where a defence draws anew
        shown = self._defended.exposure
        for _ in range(max(shown.forwards, shown.held_out) - 1):
            self._check_stop()
            yield self._rehearsal.forwards(self._texts.sample)

    def _by_gradients(self, traffic: Traffic, truth: Truth) -> Leak:
        """What gradients of public texts give of labels."""
        share = self._shares["labels"]

        def found(judged: Sequence[Judged]) -> Leak:
            return worst_leak("labels", judged, share, truth)

        def enough(judged: Sequence[Judged]) -> bool:
            return found(judged).value > self._limit("labels")

        with self._knows_of_gradients() as knowledge:
            return found(attack_gradients(knowledge, traffic, truth, enough, self._between))

    def _by_gradients_of_texts(
        self,
        outputs: list[Tensor],
        guess: Sequence[Tensor],
        truth: Truth,
        answers: Sequence[Tensor],
        enough: Enough,
    ) -> list[Judged]:
        """What gradients give of the sample's tokens, as if the cloud had answered what it did for public texts."""
        traffic, _ = self._rehearsal.gradients(self._texts.sample, outputs)
        with self._knows_of_gradients() as knowledge:
            return attack_learned_texts(knowledge, traffic, guess, truth, answers, enough, self._between)

    @contextmanager
    def _knows_of_gradients(self) -> Iterator[Knowledge]:
        """What the attacker knows: it asks the cloud about its own public texts."""
        with self._rehearsal.span() as span:
            public = self._texts.public[len(self._public_sent()) :]
            yield self._knows(public, self._rehearsal.codecs.backward_up, span)

    def _limit(self, channel: str) -> float:
        return self._limits.get(channel, 1.0)

    def _compare(self, leak: Leak, now: str) -> None:
        """Raise LeakBudgetError where a leak breaks the budget."""
        limit = self._limit(leak.channel)
        found, of = leak.recovered
        if leak.value <= limit and not found:
            return
        what = f"{leak.channel}<={limit:g}"
        if leak.value <= limit:
            said = f"the leak budget is broken: an attack recovers {found} of {of} secrets letter by letter"
        elif leak.attack == SLOPES:
            said = (
                f"the leak budget {what} cannot be kept: --optimizer mezo moves the front by losses of the labels, "
                "and a cloud that knows the seed can tell labels from what is sent later"
            )
        else:
            said = (
                f"the leak budget {what} is broken: {leak.attack} recovers {leak.measured:.3f} of the {leak.channel}, "
                f"upper bound {leak.rate}"
            )
        limits = {**self._limits, **({"tokens": 0.0} if self._texts.secrets else {})}
        modes = "; ".join(f"{mode.title} ({mode.how})" for mode in keeping(limits))
        raise LeakBudgetError(f"{said}. {now}. What keeps the budget: {modes}.")

    def _change(self) -> float:
        """How far what is sent of the sample has moved since the last attack; the part that moved most counts."""
        return max(_moved(now, before) for now, before in zip(self._expected(), self._states, strict=True))

    @torch.no_grad()
    def _expected(self) -> list[list[Tensor]]:
        """Hidden states at the cut as they are sent, without noise, `[n, h]`; the first position is a sink, and out.

        Where a defence is trained, also what it adds, each time with the same draws: noise that is learned changes by
        itself. Rows are mixed with the same public texts each time, so that only training moves them. Where gradients
        go up, also what the last layers predict of public texts, `[k, V]`.
        """
        knowledge = self._knows(self._texts.public[:FEWEST_PUBLIC], self._rehearsal.codecs.forward_up)
        tokens = [torch.tensor(text.input_ids) for text in self._texts.sample[:_CHANGE_TEXTS]]
        states = [knowledge.front.states(each) for each in tokens]
        expected = [knowledge.expect(each) for each in states]
        looks = [[each[1:] for each in expected]]
        trained = () if self._defended is None else self._defended.parameters()
        if trained and knowledge.defence is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                sent = [knowledge.defence.send(each[None])[0] for each in states]
            looks.append([(one - other)[1:] for one, other in zip(sent, expected, strict=True)])
        if self._outputs:  # what gradients tell depends on what the last layers predict
            looks.append(
                [self._rehearsal.predicted(self._public_sent()[:_CHANGE_TEXTS], self._outputs)[:_CHANGE_PLACES]]
            )
        return looks

    def _knows(self, public: Sequence[Any], codec: str, span: Any = None) -> Knowledge:
        return knowledge_of(self._model, self._tokenizer, self._defended, public, codec, span, self._check_stop)

    def _between(self, attack: str, done: int, of: int) -> None:
        self._check_stop()
        if done == 0:
            self._say(f"attacking: {attack} on {of} messages of the run")


def _moved(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """The mean over all positions of how far each has moved, relative to what it was."""
    pairs = zip(now, before, strict=True)
    return float(torch.cat([(new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(_TINY) for new, old in pairs]).mean())


def _outputs_of(traffic: Traffic) -> list[Tensor]:
    """The outputs of the cloud's layers, `[n, h]` of each row without its padding."""
    rows = []
    for forward in traffic.forwards:
        if forward.output is not None:
            for number, output in enumerate(forward.output):
                rows.append(output if forward.mask is None else output[forward.mask[number]])
    return rows


def _check_noise(config: TrainConfig, *, moves: bool) -> None:
    """Refuse noise that is reused while the hidden states change: subtracting two passes cancels it, and no attack here
    tries that.

    Raises:
        ConfigError: There is such noise.
    """
    if moves and any(isinstance(each, Gaussian) and each.memo for each in config.defences()):
        raise ConfigError(
            "memo=true reuses a token's noise while training changes its hidden state: subtracting two passes cancels "
            "it, which no attack of a leak budget tries: give memo=false."
        )

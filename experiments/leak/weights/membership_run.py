"""Membership inference on returned adapters: what an adapter says of who was in its data, with and without DP-SGD.

The same LoRA is trained on the members without a defence and with one or several, and by the attacker on as many other
texts each time, in the same way: by split training, or over a package's emulator. Then the model that is attacked has
the adapter in its true middle. Members, non-members and the attacker's texts are drawn alike, each with a prompt of its
own. The loss on the non-members, on which nothing was trained, is the price.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.common.torch_threads import use_threads
from isthmus.edge.config.schedule import sampling_rate, total_steps
from isthmus.edge.config.training_config import TrainConfig, TuneConfig, load_config
from isthmus.edge.data.batches import Encoded
from isthmus.experiments.harness.launch import write_key
from isthmus.experiments.leak.weights.local_split import LocalEmulator, LocalSplit
from isthmus.experiments.leak.weights.task_texts import distinct_texts, tokens_of
from isthmus.privacy.attacks.weights.membership_scores import (
    CalibratedMembership,
    Candidate,
    LossMembership,
)
from isthmus.privacy.defences.accountant import Guarantee, sigma_for
from isthmus.privacy.defences.defence_options import DpSgd, read_defence
from isthmus.privacy.measures.bootstrap import Interval, mean_interval
from isthmus.privacy.measures.membership import membership_auc, membership_interval, true_positive_rate

FALSE_POSITIVES = 0.01
"""The rate at which the true positives are counted."""
REFERENCE, UNDEFENDED_REFERENCE = "membership-reference", "membership-reference-undefended"
"""`CalibratedMembership` by a reference that was tuned on other texts as the adapter was, or without its defence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipSettings:
    """What is trained, and who is attacked.

    Attributes:
        model, edge_layers: The model and its split plan; LoRA is on the edge's layers.
        task, data_folder: Where the texts come from; see `distinct_texts`.
        members: Texts that are trained on; the attacker has as many for its own adapter.
        others: Texts that are not; 1,000 at least for a rate at 1 % false positives that means something.
        epochs: Passes over the members.
        batch: Texts of a step.
        learning_rate: Peak of AdamW's rate, without a defence.
        defence: As `--defence`.
        package: The folder of a package to tune over; None for split training. Its split is taken. Of its owner's
            advice, what is trained and the warm-up are; rate, rank and passes are those here.
        epsilons: Instead of one run with `defence`, dp-sgd, one for each, with the `sigma` that gives it.
        defended_rate: Peak of AdamW's rate, with it.
        seed: Of the draw, the training and the defence's noise.
        threads: Threads of torch; None for torch's choice.
    """

    model: str = "smollm2-135m"
    edge_layers: str = "2:2"
    task: str = "e2e"
    data_folder: Path | None = None
    members: int = 80
    others: int = 1000
    epochs: int = 8
    batch: int = 16
    rank: int = 8
    learning_rate: float = 3e-3
    defence: str = "dp-sgd:clip=1,sigma=4"
    defended_rate: float = 1e-3
    package: Path | None = None
    epsilons: tuple[float, ...] = ()
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class AttackedMembership:
    """How well one attack tells members from others, each with its 95 % interval.

    Attributes:
        attack: Its name.
        auc: The chance that a member scores higher than another text; 0.5 says nothing.
        true_positive_rate: The share of members found where 1 % of the others are taken for members.
    """

    attack: str
    auc: Interval
    true_positive_rate: Interval


@dataclass(frozen=True, slots=True)
class MembershipRun:
    """One adapter, and what it says.

    Attributes:
        defence: As an option writes it; None for none.
        epsilon, delta, guarantee: What the defence guarantees, and of what; the unit is one text. None without one.
        most_true_positives: What (epsilon, delta) allows any attack as its true positive rate; 1 without one.
        loss: Mean loss of the others in nats a token, the price.
        member_loss: The same of the members.
        attacks: By attack.
    """

    defence: str | None
    epsilon: float | None
    delta: float | None
    guarantee: str | None
    most_true_positives: float
    loss: Interval
    member_loss: Interval
    attacks: tuple[AttackedMembership, ...]


@dataclass(frozen=True, slots=True)
class MembershipResult:
    """Membership inference without a defence and with one or several.

    Attributes:
        members, others: How many texts there were of each.
        steps: Optimizer steps of each run.
        untuned_loss: Mean loss of the others without an adapter.
        control: The AUC by the loss without an adapter, which nobody has tuned on members: 0.5, but for chance, unless
            members and others are not drawn alike.
        runs: Without a defence, and with each.
        loss_ratio: The last run's loss over the first's.
    """

    members: int
    others: int
    steps: int
    untuned_loss: Interval
    control: Interval
    runs: tuple[MembershipRun, ...]
    loss_ratio: float


def measure_membership(settings: MembershipSettings, folder: Path) -> MembershipResult:
    """Train the attacker's adapters, and those that it attacks.

    Args:
        folder: For the runs' files; must hold none.

    Raises:
        ConfigError: A setting makes no sense.
        DataError: The data are missing or too few.
        IsthmusError: What a training run raises.
    """
    least = math.ceil(1 / FALSE_POSITIVES)
    if settings.members < 2 or settings.others < least:
        raise ConfigError(
            f"members = {settings.members} and others = {settings.others} are too few: give 2 members or more, and "
            f"{least} others or more"
        )
    attacker = replace(settings, seed=settings.seed + 1)
    defences = [None, *_defences(settings)]
    configs = [_config(settings, folder / f"owner-{at}", defence) for at, defence in enumerate(defences)]
    attackers = [_config(attacker, folder / f"attacker-{at}", defence) for at, defence in enumerate(defences)]
    use_threads(settings.threads)
    if settings.package is None:
        split = LocalSplit(settings.model, settings.edge_layers)
    else:
        split = LocalEmulator(settings.model, settings.package)
    n = settings.members
    count = n + settings.others
    texts = distinct_texts(settings.task, settings.data_folder, split.tokenizer, count + n, seed=settings.seed)
    members, public = texts[:n], texts[count:]
    candidates = [_candidate(text) for text in texts[:count]]
    before = LossMembership(split.edge()).scores(candidates)
    plain, *alike = (LossMembership(split.train(public, config)[0]).scores(candidates) for config in attackers)
    references = [{CalibratedMembership.name: before, REFERENCE: plain}]
    references += [{CalibratedMembership.name: before, REFERENCE: each, UNDEFENDED_REFERENCE: plain} for each in alike]
    runs = []
    for config, compared in zip(configs, references, strict=True):
        tuned, promised = split.train(members, config)
        runs.append(_run(config, promised, compared, LossMembership(tuned).scores(candidates), n))
    return MembershipResult(
        n,
        settings.others,
        settings.epochs * math.ceil(n / settings.batch),
        mean_interval(-before[n:]),
        membership_interval(membership_auc, before[:n], before[n:]),
        tuple(runs),
        runs[-1].loss.value / runs[0].loss.value,
    )


def _defences(settings: MembershipSettings) -> list[str]:
    """What the defended runs have."""
    if not settings.epsilons:
        return [settings.defence]
    options = read_defence(settings.defence)
    if settings.package is None or not isinstance(options, DpSgd):
        raise ConfigError(
            f"epsilons {settings.epsilons} choose sigma of dp-sgd over a package: give --package, and --defence dp-sgd"
        )
    run, n = _config(settings, Path("-"), None), settings.members
    rate, steps = sampling_rate(run, n), total_steps(run, n)
    sigmas = (sigma_for(each, rate, steps, options.delta) for each in settings.epsilons)
    return [options.model_copy(update={"sigma": sigma}).text() for sigma in sigmas]


def _config(settings: MembershipSettings, folder: Path, defence: str | None) -> TrainConfig | TuneConfig:
    options: dict[str, Any] = {
        "data": settings.task,
        "validation_split": 0.0,
        "out": folder / "run",
        "save_every": 1_000_000,
        "keep_checkpoints": 1,
        **{name: getattr(settings, name) for name in ("epochs", "batch", "rank", "seed", "threads", "learning_rate")},
    }
    if defence is not None:
        folder.mkdir(parents=True, exist_ok=True)
        key = write_key(folder / "key", settings.seed)
        options |= {"defence": (defence,), "defence_key": key, "learning_rate": settings.defended_rate}
    if settings.package is not None:
        return load_config(None, options | {"package": settings.package}, TuneConfig)
    return load_config(None, options | {"cloud": "-"})


def _candidate(text: Encoded) -> Candidate:
    return Candidate(tokens_of(text), text.learned_from)


def _run(
    config: TrainConfig | TuneConfig,
    promised: Guarantee | None,
    references: Mapping[str, Tensor],
    after: Tensor,
    members: int,
) -> MembershipRun:
    """One adapter's figures, from all texts' scores by the attacks' references and by the attacked model."""
    scores = {LossMembership.name: after}
    scores |= {name: calibrated_scores(reference, after) for name, reference in references.items()}
    epsilon, delta = (None, None) if promised is None else (promised.epsilon, promised.delta)
    return MembershipRun(
        defence=config.defence[0] if config.defence else None,
        epsilon=epsilon,
        delta=delta,
        guarantee=None if promised is None else promised.of,
        most_true_positives=_most_true_positives(epsilon, delta),
        loss=mean_interval(-after[members:]),
        member_loss=mean_interval(-after[:members]),
        attacks=tuple(_attacked(name, each[:members], each[members:]) for name, each in scores.items()),
    )


def calibrated_scores(reference: Tensor, tuned: Tensor) -> Tensor:
    """The scores of `CalibratedMembership`, without passes of their own.

    Args:
        reference, tuned: The scores of `LossMembership` for the reference and the attacked model.
    """
    return tuned - reference


def _attacked(name: str, members: Tensor, others: Tensor) -> AttackedMembership:
    return AttackedMembership(
        name,
        membership_interval(membership_auc, members, others),
        membership_interval(_found, members, others),
    )


def _found(members: Tensor, others: Tensor) -> float:
    return true_positive_rate(members, others, at=FALSE_POSITIVES)


def _most_true_positives(epsilon: float | None, delta: float | None) -> float:
    """What (epsilon, delta)-differential privacy allows (Wasserman and Zhou 2010): e^epsilon times the false ones."""
    if epsilon is None or delta is None or epsilon > 10:
        return 1.0
    return min(1.0, math.exp(epsilon) * FALSE_POSITIVES + delta)

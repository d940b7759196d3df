"""The (ε, δ) of a run.

The unit of privacy is one example: its tokens at the cut, in all passes and both directions. Neighbours differ in one
example, in whose place is another of the same length with labels in the same places, as the cloud sees lengths anyway.

Each release with Gaussian noise is Gaussian differentially private with μ = sensitivity / deviation (Dong, Roth and Su
2022), and releases compose, also where a later one depends on what came before, to μ² = Σ μᵢ²:

    a pass forward or backward    T tokens, each moved by at most 2C, under noise σC:  μ² = 4T / σ²
    a step of DP-SGD              a sum moved by at most 2C, under noise σC:           μ² = 4 / σ²

ε follows from μ and δ exactly (Balle and Wang 2018), by Google's dp-accounting. No subsampling is counted here: the
cloud sees every message, and batches are those of shuffled epochs.

Where nothing is sent, each example is in a step with a chance q, drawn anew in secret (a Poisson sample). Neighbours
differ there in whether one example is in the data or left blank, which moves a sum by at most C under noise σC. ε
follows from Rényi's divergences of the subsampled Gaussian (Mironov, Talwar and Zhang 2019), at whole orders, or
exactly from μ² = steps / σ², as if each example were in all steps, whichever is less. To replace an example is to blank
one and fill it: (2ε, (1 + e^ε)δ).

A step that is made again is a further release: where the cloud answers otherwise than before, what is sent has other
noise. So a run that several processes have made is counted by what each of them has begun to send (`Releases`). The
sum is of one run. Another run on the same texts, with the same key or another, adds its own μ².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.common.errors import ConfigError
from isthmus.privacy.defences.defence_options import DefenceOptions, DpSgd, Gaussian, Guaranteed, TrainedBottleneck

_MISSING = "defences that guarantee an epsilon need dp-accounting: install isthmus[privacy]"


@dataclass(frozen=True, slots=True)
class Releases:
    """What the processes of a run have begun to send.

    Attributes:
        epochs: In each, an example is sent once. One that several processes were in is counted for each of them.
        evaluations: In each, a held-out example is sent once.
    """

    epochs: int = 0
    evaluations: int = 0


@dataclass(frozen=True, slots=True)
class Exposure:
    """What a run does with the example that it shows most, in all of its processes.

    Attributes:
        tokens: Of the longest example.
        forwards: Passes of a training example up to the cloud's layers.
        backwards: Those whose gradient goes up; 0 where nothing is trained below or in the cloud's layers.
        held_out: Passes of a held-out example, which has no backwards and no steps.
        steps: Steps that a training example takes part in, or may be drawn for.
        moves: Whether what is sent of an example changes from pass to pass: by what is trained, with gradients or
            without, or by dropout.
        rate: The chance that it is drawn for a step, where nothing is sent; None where it is in one of each epoch.
    """

    tokens: int
    forwards: int
    backwards: int
    held_out: int
    steps: int
    moves: bool
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What a run's defences guarantee.

    Attributes:
        epsilon: None where nothing is guaranteed.
        delta: Of epsilon.
        of: What it is a guarantee of, in a sentence; why there is none where there is none.
    """

    epsilon: float | None
    delta: float | None
    of: str


def guarantee(defences: Sequence[DefenceOptions], exposure: Exposure) -> Guarantee | None:
    """What the defences guarantee of a run; None where none of them claims an (ε, δ).

    Raises:
        ConfigError: The package that computes it is missing, or two defences have different δ.
    """
    formal = [each for each in defences if isinstance(each, Guaranteed)]
    messages = [each for each in formal if not isinstance(each, DpSgd)]
    private = next((each for each in formal if isinstance(each, DpSgd)), None)
    messages = [each for each in messages if not (isinstance(each, TrainedBottleneck) and each.sigma is None)]
    if not messages and private is None:
        return None
    deltas = {each.delta for each in [*messages, *([] if private is None else [private])]}
    if len(deltas) > 1:
        raise ConfigError(f"defences have delta {' and '.join(map(str, sorted(deltas)))}: give all the same")
    (delta,) = deltas
    if private is not None and exposure.rate is not None:
        of = (
            "the adapters, of each example, in the data or blanked out; nothing is sent, only this run counts, and "
            f"batches are Poisson samples of rate {exposure.rate:.3g}, whose amplification is counted"
        )
        return Guarantee(sampled_epsilon(private.sigma, exposure.rate, exposure.steps, delta), delta, of)
    steps = 0.0 if private is None else exposure.steps * 4 / private.sigma**2
    if not messages:
        return Guarantee(
            epsilon(math.sqrt(steps), delta), delta, "the adapters, of each example; the messages have none"
        )
    gap = _gap(messages, exposure)
    if gap is not None:
        return Guarantee(None, None, gap)
    mu_squared = _messages(messages, exposure) + steps
    if private is None:
        of = (
            "each example's own messages, given the adapters; what other examples' messages tell through these is "
            "covered with dp-sgd alone"
        )
    elif any(isinstance(each, Gaussian) and each.memo for each in messages):
        # Whether two messages are the same is no matter of chance then.
        of = "each example's own messages, and the adapters; that two examples are the same shows under memoised noise"
    else:
        of = "everything that the cloud sees, and the adapters, of each example"
    return Guarantee(epsilon(math.sqrt(mu_squared), delta), delta, of)


def epsilon(mu: float, delta: float) -> float:
    """The least ε of a release that is Gaussian differentially private with μ.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    try:
        from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
    except ImportError:
        raise ConfigError(_MISSING) from None
    return float(get_epsilon_gaussian(1 / mu, delta)) if mu else 0.0


def sampled_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    """The ε of steps of DP-SGD on Poisson samples; see the top of the file.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        raise ConfigError(_MISSING) from None
    # Whole orders have a closed form; fractional ones a series that may not converge.
    accountant = RdpAccountant([*range(2, 33), 40, 48, 64, 96, 128, 256, 512], NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps)
    return min(float(accountant.get_epsilon(delta)), epsilon(math.sqrt(steps) / sigma, delta))


def sigma_for(wanted: float, rate: float, steps: int, delta: float) -> float:
    """The least `sigma` of DP-SGD from 0.05 on, in 0.0001, with which `sampled_epsilon` is `wanted` at most.

    Raises:
        ConfigError: `wanted` is no number above 0, dp-accounting is not installed, or there is none below 10,000.
    """
    if not 0 < wanted < math.inf:
        raise ConfigError(f"epsilon {wanted:g} is no finite number above 0: give one, 8 for example")
    low, high = 0.05, 1e4
    if sampled_epsilon(high, rate, steps, delta) > wanted:
        raise ConfigError(f"epsilon {wanted:g} at delta {delta:g} needs a sigma above {high:g}: give a larger epsilon")
    for _ in range(24):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if sampled_epsilon(middle, rate, steps, delta) <= wanted else (middle, high)
    return math.ceil(high * 1e4) / 1e4


def _gap(messages: Sequence[DefenceOptions], exposure: Exposure) -> str | None:
    """Why the messages have no guarantee; None where they have one."""
    gaussian = next((each for each in messages if isinstance(each, Gaussian)), None)
    if exposure.backwards and (gaussian is None or gaussian.gradient_sigma is None):
        return "none: gradients go up without noise (gaussian's gradient_clip and gradient_sigma)"
    if exposure.moves and gaussian is not None and gaussian.memo and len(messages) == 1:
        return "none: what is trained or drops out below the cut moves between passes, and memoised noise shows it"
    return None


def _messages(messages: Sequence[DefenceOptions], exposure: Exposure) -> float:
    """μ² of an example's own messages."""
    squares = []
    gaussian = next((each for each in messages if isinstance(each, Gaussian)), None)
    back = 0.0
    if gaussian is not None and gaussian.gradient_sigma is not None:
        back = exposure.backwards * 4 * exposure.tokens / gaussian.gradient_sigma**2
    for each in messages:
        if isinstance(each, Gaussian | TrainedBottleneck) and each.sigma is not None:
            memo = isinstance(each, Gaussian) and each.memo
            if memo and exposure.moves:
                continue
            once = 4 * exposure.tokens / each.sigma**2
            training = once if memo else once * exposure.forwards
            held_out = once if memo else once * exposure.held_out
            squares.append(max(training + back, held_out))
    return min(squares)  # one after the other: the later is computed from the earlier alone, or says less

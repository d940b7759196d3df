"""The (epsilon, delta) of a run."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest

from isthmus.common.errors import ConfigError
from isthmus.privacy.defences.accountant import Exposure, Guarantee, epsilon, guarantee, sampled_epsilon
from isthmus.privacy.defences.defence_options import read_defence

ONCE = Exposure(tokens=9, forwards=1, backwards=0, held_out=0, steps=1, moves=False)


def of(exposure: Exposure, *texts: str) -> Guarantee:
    found = guarantee([read_defence(text) for text in texts], exposure)
    assert found is not None
    return found


def delta_of(epsilon_: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return below(mu / 2 - epsilon_ / mu) - math.exp(epsilon_) * below(-mu / 2 - epsilon_ / mu)


@pytest.mark.parametrize("mu", [0.1, 1.0, 4.0])
def test_epsilon_is_the_least_with_that_delta(mu: float) -> None:
    found = epsilon(mu, 1e-5)
    assert delta_of(found, mu) == pytest.approx(1e-5, rel=1e-3)
    assert delta_of(found * 0.99, mu) > 1e-5


def test_no_release_costs_nothing_and_a_loud_one_much() -> None:
    assert epsilon(0, 1e-5) == 0
    assert epsilon(20, 1e-5) == pytest.approx(284.39, abs=0.1)


def test_tokens_passes_and_directions_add_up() -> None:
    # mu = 2 * sqrt(9) / 6 = 1 for each pass.
    assert of(ONCE, "gaussian:clip=5,sigma=6").epsilon == pytest.approx(epsilon(1, 1e-5))
    assert of(replace(ONCE, forwards=4), "gaussian:clip=5,sigma=6").epsilon == pytest.approx(epsilon(2, 1e-5))
    both = replace(ONCE, forwards=2, backwards=2)
    noisy = "gaussian:clip=5,sigma=6,gradient_clip=1,gradient_sigma=6"
    assert of(both, noisy).epsilon == pytest.approx(epsilon(2, 1e-5))
    assert of(replace(ONCE, held_out=9), "gaussian:clip=5,sigma=6").epsilon == pytest.approx(epsilon(3, 1e-5))


def test_with_dp_sgd_the_adapters_are_covered_too() -> None:
    found = of(replace(ONCE, forwards=3, steps=3), "gaussian:clip=5,sigma=6", "dp-sgd:clip=1,sigma=2")
    assert found.epsilon == pytest.approx(epsilon(math.sqrt(3 + 3), 1e-5))
    assert "everything that the cloud sees" in found.of
    assert "given the adapters" in of(ONCE, "gaussian:clip=5,sigma=6").of
    alone = of(replace(ONCE, steps=4), "dp-sgd:clip=1,sigma=2")
    assert alone.epsilon == pytest.approx(epsilon(2, 1e-5))
    assert "the messages have none" in alone.of
    # In the data or not, an example moves a sum by half of what another in its place does.
    tuned = of(replace(ONCE, forwards=0, steps=4, rate=1.0), "dp-sgd:clip=1,sigma=1")
    assert tuned.epsilon == alone.epsilon
    assert tuned.of == (
        "the adapters, of each example, in the data or blanked out; nothing is sent, only this run counts, and "
        "batches are Poisson samples of rate 1, whose amplification is counted"
    )
    drawn = of(replace(ONCE, forwards=0, steps=4, rate=0.25), "dp-sgd:clip=1,sigma=1")
    assert drawn.epsilon == sampled_epsilon(1, 0.25, 4, 1e-5) < 0.7 * tuned.epsilon


def renyi(order: int, rate: float, sigma: float) -> float:
    """Mironov, Talwar and Zhang 2019, section 3.3, of one step."""
    terms = [
        math.log(math.comb(order, k))
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + k * (k - 1) / (2 * sigma**2)
        for k in range(order + 1)
    ]
    return (max(terms) + math.log(sum(math.exp(term - max(terms)) for term in terms))) / (order - 1)


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "published", "exact"),
    [
        (0.01, 4, 10_000, 1.26, 0.947),  # Abadi et al. 2016, section 3.2
        (256 / 60_000, 1.1, 14_062, 3.01, 2.381),  # TensorFlow Privacy's tutorial on MNIST
    ],
)
def test_amplification_is_that_of_published_runs(
    rate: float, sigma: float, steps: int, published: float, exact: float
) -> None:
    looser = min(steps * renyi(order, rate, sigma) + math.log(1e5) / (order - 1) for order in range(2, 64))
    assert looser == pytest.approx(published, abs=0.01)
    # From the same divergences by Canonne, Kamath and Steinke's conversion (2020), and not below the privacy loss's.
    tighter = min(
        steps * renyi(order, rate, sigma) + math.log1p(-1 / order) - math.log(1e-5 * order) / (order - 1)
        for order in range(2, 64)
    )
    found = sampled_epsilon(sigma, rate, steps, 1e-5)
    assert found == pytest.approx(tighter, rel=1e-3)
    assert exact < found < published


@pytest.mark.parametrize(("rate", "sigma"), [(1.0, 4.0), (0.9, 4.0), (0.2, 0.05), (0.2, 50.0)])
def test_amplification_never_costs_more_than_being_in_every_step(rate: float, sigma: float) -> None:
    everywhere = epsilon(math.sqrt(40) / sigma, 1e-5)
    assert sampled_epsilon(sigma, rate, 40, 1e-5) == pytest.approx(everywhere) or rate < 1
    assert sampled_epsilon(sigma, rate, 40, 1e-5) <= everywhere


def test_of_two_noises_the_louder_counts() -> None:
    noisy = ("bottleneck:rank=4,clip=5,sigma=6", "gaussian:clip=5,sigma=1e9,gradient_clip=1,gradient_sigma=6")
    assert of(replace(ONCE, backwards=1), *noisy).epsilon == pytest.approx(epsilon(1, 1e-5), rel=1e-3)


def test_memoised_noise_counts_once_where_nothing_below_is_trained() -> None:
    memo = "gaussian:clip=5,sigma=6,gradient_clip=1,gradient_sigma=6,memo=true"
    assert of(replace(ONCE, forwards=50, held_out=50), memo).epsilon == pytest.approx(epsilon(1, 1e-5))
    for backwards in (50, 0):  # an optimizer without gradients moves it, too
        trained = of(replace(ONCE, forwards=50, backwards=backwards, moves=True), memo)
        assert trained.epsilon is None
        assert "moves between passes" in trained.of


def test_memoised_noise_shows_which_examples_are_the_same() -> None:
    """Of two that are, the messages are equal for certain: another example in the place of one is noticed."""
    for memo, all_of_it in (("true", False), ("false", True)):
        found = of(ONCE, f"gaussian:clip=5,sigma=6,memo={memo}", "dp-sgd:clip=1,sigma=2")
        assert ("everything that the cloud sees" in found.of) == all_of_it
        assert found.epsilon is not None


def test_gradients_without_noise_leave_no_guarantee() -> None:
    for text in ("gaussian:clip=5,sigma=6", "bottleneck:rank=4,clip=5,sigma=6"):
        found = of(replace(ONCE, backwards=1), text)
        assert found.epsilon is None
        assert "gradients go up without noise" in found.of


def test_other_defences_claim_no_epsilon() -> None:
    others = ("bottleneck:rank=4", "rotation", "smoothing:share=.1", "embedding-noise:eta=1")
    assert guarantee([read_defence(text) for text in others], ONCE) is None


def test_two_deltas_are_refused() -> None:
    with pytest.raises(ConfigError, match="give all the same"):
        of(ONCE, "gaussian:clip=5,sigma=6,delta=1e-6", "dp-sgd:clip=1,sigma=2")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.gaussian_mechanism", None)
    monkeypatch.setitem(sys.modules, "dp_accounting.rdp", None)
    with pytest.raises(ConfigError, match=r"isthmus\[privacy\]"):
        epsilon(1, 1e-5)
    with pytest.raises(ConfigError, match=r"isthmus\[privacy\]"):
        sampled_epsilon(1, 0.1, 1, 1e-5)

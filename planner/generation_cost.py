"""What a generated token takes over a link, with and without a draft, predicted. Pure.

A round drafts k tokens, computes them and the one before them in one round trip, and brings the accepted ones and one
more (Leviathan et al. 2023, arXiv:2211.17192, equation 1):

    seconds = k · c + e(k + 1) + s(k + 1) + w(k + 1)        tokens = (1 - a^(k + 1)) / (1 - a)

with e(n) and s(n) what the edge's own layers with the head, and the cloud's, take for n tokens with a cache; w(n) the
wire, both ends included; c drafting a token; and a the acceptance rate, the probability that a drafted token is
accepted, given that all before it were. Without a draft k is 0. The prompt is one such pass without a draft.

A small draft passes over the prompt, too, once a text: p seconds. So a text of n tokens takes

    p + n · seconds / tokens

and drafts pay if there is a k at which that is less than n · seconds(0). Each a above the break-even rate, and none
below, has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.edge.drafts.length_rule import MAX_DRAFT
from isthmus.planner.cost_model import PlanSettings, wire_seconds
from isthmus.planner.link_spec import LinkSpec
from isthmus.planner.model_facts import ModelFacts
from isthmus.planner.speed_profile import VERIFY_TOKENS, SpeedProfile
from isthmus.planner.wire_cost import Traffic, Wire

NGRAM, SMALL = "ngram", "small"
DEFAULT_ACCEPTANCE = {NGRAM: 0.16, SMALL: 0.36}
"""Acceptance rates where none is given: the means of greedy chats of SmolLM2-135M-Instruct in one run of
`isthmus bench generate --parts links` (twelve prompts a figure). Each was fitted to a link, a text and a draft: the `a`
at which the law above has the tokens of a mean round, rounds without a draft included. So that of n-grams, which often
find no draft, is about half of the `acceptance_rate` that the benchmark prints of them.

- n-grams: chats, over five links: 0.15 to 0.17; E2E: 0.14 to 0.15.
- a small draft, of three distilled layers, over the links where it drafted 0.4 tokens a round or more, as fewer are too
  few for a fit: chats 0.34 to 0.37; E2E, with model and draft tuned on it, 0.71 to 0.74; E2E where the model was tuned
  and the draft was not, 0.22 to 0.23."""
MEASURED_ACCEPTANCE = {NGRAM: (0.14, 0.17), SMALL: (0.22, 0.74)}
"""The least and the greatest of all these rates, E2E included."""
DRAFT_LAYERS = 3
BISECTIONS = 40
"""Of an interval of length 1: as exact as its figures are printed, and far more than the model is."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """What is generated, one text at a time.

    Attributes:
        prompt: Tokens of the prompt.
        tokens: Tokens that follow it.
        draft_layers: Layers that a small draft has in the place of the cloud's.
        acceptance_rate: The probability that a drafted token is accepted, given that all before it were, for all
            drafts; None for `DEFAULT_ACCEPTANCE`.

    Raises:
        ConfigError: `acceptance_rate` is outside [0, 1].
    """

    prompt: int
    tokens: int
    draft_layers: int
    acceptance_rate: float | None = None

    def __post_init__(self) -> None:
        if self.acceptance_rate is not None and not 0 <= self.acceptance_rate <= 1:
            raise ConfigError(
                f"acceptance_rate = {self.acceptance_rate} is outside 0 to 1: it is the probability that a drafted "
                "token is accepted, given that all before it were"
            )

    @classmethod
    def of(
        cls,
        plan: SplitPlan,
        prompt: int,
        tokens: int,
        draft_layers: int | None = None,
        acceptance_rate: float | None = None,
    ) -> Self:
        """Settings that fit a plan.

        Args:
            draft_layers: None for `DRAFT_LAYERS`, or for all of the cloud's where these are fewer.

        Raises:
            ConfigError: `acceptance_rate` is outside [0, 1], or the draft has more layers than the cloud.
        """
        span = len(plan.cloud)
        if draft_layers is not None and draft_layers > span:
            raise ConfigError(
                f"a draft of {draft_layers} layers cannot stand for the cloud's {span}: use fewer (--draft-layers)"
            )
        return cls(prompt, tokens, min(DRAFT_LAYERS, span) if draft_layers is None else draft_layers, acceptance_rate)


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Generation with one kind of draft, at the fixed length that is best for it.

    Attributes:
        draft: `NGRAM`, `SMALL`, or "none".
        acceptance_rate: What was counted with; None without a draft.
        drafted: Tokens that a round drafts, k; 0 where no draft pays.
        tokens_per_round: That the text grows by in the mean.
        tokens_per_s: Once the model has passed over the prompt. The draft's own pass over it is counted.
        break_even_rate: The acceptance rate above which drafts of this kind make it faster; None without a draft, and
            where no rate does.
    """

    draft: str
    acceptance_rate: float | None
    drafted: int
    tokens_per_round: float
    tokens_per_s: float
    break_even_rate: float | None


@dataclass(frozen=True, slots=True)
class GenerationCost:
    """Generation over a link.

    Attributes:
        first_token_s: Seconds from the prompt to the first token, without a draft.
        edge_s, cloud_s, wire_s: Seconds of a further token without a draft.
        traffic: What crosses for it.
        drafts: Without a draft, with n-grams, and with a small draft.
    """

    first_token_s: float
    edge_s: float
    cloud_s: float
    wire_s: float
    traffic: Traffic
    drafts: tuple[DraftCost, ...]


def predict_generation(
    facts: ModelFacts,
    plan: PlanSettings,
    settings: GenerationSettings,
    link: LinkSpec,
    edge: SpeedProfile,
    cloud: SpeedProfile,
) -> GenerationCost:
    """What generation costs.

    Args:
        plan: Its batch and length do not matter.

    Raises:
        ConfigError: A codec was not measured.
    """
    return _Predictor(facts, plan, settings, link, edge, cloud).costs()


def tokens_per_round(acceptance_rate: float, drafted: int) -> float:
    """Tokens that a round brings in the mean: those that are accepted, and one more."""
    return sum(acceptance_rate**number for number in range(drafted + 1))


@dataclass(frozen=True, slots=True)
class _Predictor:
    facts: ModelFacts
    plan: PlanSettings
    settings: GenerationSettings
    link: LinkSpec
    edge: SpeedProfile
    cloud: SpeedProfile

    def costs(self) -> GenerationCost:
        return GenerationCost(
            first_token_s=self._first_token_s(),
            edge_s=self._edge_s(1),
            cloud_s=self._cloud_s(1),
            wire_s=self._wire_s(1),
            traffic=self._traffic(1),
            drafts=(DraftCost("none", None, 0, 1.0, 1 / self._round_s(0, 0.0), None), *self._drafts()),
        )

    def _drafts(self) -> Iterator[DraftCost]:
        layers, edge = self._own + self.settings.draft_layers, self.edge
        token_s = layers * edge.draft_layer_s + edge.draft_head_s
        prompt_s = self._prompt_s(layers, edge.draft_inference, edge.draft_layer_s)
        yield self._draft(NGRAM, 0.0, 0.0)
        yield self._draft(SMALL, token_s, prompt_s)

    def _draft(self, draft: str, token_s: float, prompt_s: float) -> DraftCost:
        """The best of all lengths.

        Args:
            token_s: Seconds of drafting a token.
            prompt_s: Seconds of the draft's pass over the prompt.
        """
        rounds = [self._round_s(drafted, token_s) for drafted in range(MAX_DRAFT + 1)]
        given = self.settings.acceptance_rate
        rate = DEFAULT_ACCEPTANCE[draft] if given is None else given

        def speed(rate: float, drafted: int) -> float:
            prompt_share_s = prompt_s / self.settings.tokens if drafted else 0.0
            return 1 / (rounds[drafted] / tokens_per_round(rate, drafted) + prompt_share_s)

        def pays(rate: float) -> bool:
            return max(speed(rate, drafted) for drafted in range(1, MAX_DRAFT + 1)) > speed(rate, 0)

        best = max(range(MAX_DRAFT + 1), key=lambda drafted: speed(rate, drafted))
        return DraftCost(draft, rate, best, tokens_per_round(rate, best), speed(rate, best), _break_even(pays))

    def _round_s(self, drafted: int, token_s: float) -> float:
        tokens = drafted + 1
        return drafted * token_s + self._edge_s(tokens) + self._cloud_s(tokens) + self._wire_s(tokens)

    def _first_token_s(self) -> float:
        own = self._prompt_s(self._own, self.edge.layer_inference, self._short_s(self.edge))
        span = self._prompt_s(len(self.plan.plan.cloud), self.cloud.layer_inference, self._short_s(self.cloud))
        return own + self.edge.head_s(1) + span + self._wire_s(self.settings.prompt)

    def _short_s(self, speed: SpeedProfile) -> float:
        return speed.layer_s(min(self.settings.prompt, VERIFY_TOKENS))

    def _prompt_s(self, layers: int, flops_per_s: float, least_s: float) -> float:
        """Layers over a prompt: by FLOPs, but for a short one, whose weights are read: `least_s` for a layer."""
        tokens = self.settings.prompt
        return layers * max(tokens * self.facts.forward_flops(tokens) / flops_per_s, least_s)

    @property
    def _own(self) -> int:
        return self.plan.plan.bottom + self.plan.plan.top

    def _edge_s(self, tokens: int) -> float:
        return self._own * self.edge.layer_s(tokens) + self.edge.head_s(tokens)

    def _cloud_s(self, tokens: int) -> float:
        return len(self.plan.plan.cloud) * self.cloud.layer_s(tokens)

    def _traffic(self, tokens: int) -> Traffic:
        return Wire(1, tokens, self.facts.hidden, self.plan.codecs).decode()

    def _wire_s(self, tokens: int) -> float:
        return wire_seconds(self._traffic(tokens), self.link, self.edge)


def _break_even(pays: Callable[[float], bool]) -> float | None:
    """The rate from which on drafts pay, by bisection; None where not even 1 does. More accepted tokens never cost."""
    if not pays(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high

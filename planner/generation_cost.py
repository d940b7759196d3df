"""What a generated token takes over a link, with and without a draft, predicted. Pure.

A round drafts k tokens, computes them and the one before them in one round trip, and brings the accepted ones and one
more (Leviathan et al. 2023, arXiv:2211.17192, equation 1):

    seconds = k · c + e(k + 1) + s(k + 1) + w(k + 1)        tokens = (1 - a^(k + 1)) / (1 - a)

with e(n) and s(n) what the edge's own layers with the head, and the cloud's, take for n tokens with a cache; w(n) the
wire, both ends included; c drafting a token; and a the share of drafted tokens that are accepted once all before them
are. Without a draft k is 0. The prompt is one such pass without a draft.

All seconds are affine in k, and each further token brings less than the one before it. So a draft pays at some length
if one of a single token does: if a > seconds(1) / seconds(0) - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.edge.drafts.length_rule import MAX_DRAFT
from isthmus.planner.cost_model import PlanSettings, wire_seconds
from isthmus.planner.link_spec import LinkSpec
from isthmus.planner.model_facts import ModelFacts
from isthmus.planner.speed_profile import VERIFIED, SpeedProfile
from isthmus.planner.wire_cost import Traffic, Wire

NGRAM, SMALL = "ngram", "small"
ASSUMED = {NGRAM: 0.16, SMALL: 0.45}
"""The share of accepted tokens where none is given: what SmolLM2-135M-Instruct had greedily over links of 80 and 150 ms
(`isthmus bench generate --parts links`, docs/results.md). n-grams in chats; three distilled layers in chats, and tuned
with the model on E2E."""
DRAFT_LAYERS = 3


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """What is generated, one text at a time.

    Attributes:
        prompt: Tokens of the prompt.
        draft_layers: Layers that a small draft has in the place of the cloud's.
        acceptance: The share of drafted tokens that are accepted once all before them are, of all drafts; None for
            `ASSUMED`.

    Raises:
        ConfigError: The share is none.
    """

    prompt: int = 64
    draft_layers: int = DRAFT_LAYERS
    acceptance: float | None = None

    def __post_init__(self) -> None:
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise ConfigError(f"acceptance = {self.acceptance} is no share; use a number from 0 to 1")

    @classmethod
    def of(
        cls, plan: SplitPlan, prompt: int = 64, draft_layers: int | None = None, acceptance: float | None = None
    ) -> Self:
        """Settings that fit a plan.

        Args:
            draft_layers: None for `DRAFT_LAYERS`, or for all of the cloud's where these are fewer.

        Raises:
            ConfigError: The share is none, or the draft has more layers than the cloud.
        """
        span = len(plan.cloud)
        if draft_layers is not None and draft_layers > span:
            raise ConfigError(
                f"a draft of {draft_layers} layers cannot stand for the cloud's {span}: use fewer (--draft-layers)"
            )
        return cls(prompt, min(DRAFT_LAYERS, span) if draft_layers is None else draft_layers, acceptance)


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Generation with one kind of draft, at the fixed length that is best for it.

    Attributes:
        draft: `NGRAM`, `SMALL`, or "none".
        acceptance: The share that was counted with; None without a draft.
        drafted: Tokens that a round drafts, k; 0 where no draft pays.
        tokens_per_round: That the text grows by in the mean.
        round_s: Seconds of a round.
        pays_from: The share above which drafts of this kind make it faster; above 1 where none does.
    """

    draft: str
    acceptance: float | None
    drafted: int
    tokens_per_round: float
    round_s: float
    pays_from: float | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second once the prompt is computed."""
        return self.tokens_per_round / self.round_s


@dataclass(frozen=True, slots=True)
class GenerationCost:
    """Generation over a link.

    Attributes:
        first_token_s: Seconds from the prompt to the first token.
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
) -> GenerationCost | None:
    """What generation costs; None where one of the profiles is without decode steps.

    Args:
        plan: Its batch and length do not matter.

    Raises:
        ConfigError: A codec was not measured.
    """
    if not (edge.has_decoding and cloud.has_decoding):
        return None
    return _Predictor(facts, plan, settings, link, edge, cloud).all()


def tokens_per_round(acceptance: float, drafted: int) -> float:
    """Tokens that a round brings in the mean: those that are accepted, and one more."""
    return sum(acceptance**number for number in range(drafted + 1))


@dataclass(frozen=True, slots=True)
class _Predictor:
    facts: ModelFacts
    plan: PlanSettings
    settings: GenerationSettings
    link: LinkSpec
    edge: SpeedProfile
    cloud: SpeedProfile

    def all(self) -> GenerationCost:
        return GenerationCost(
            first_token_s=self._first_token_s(),
            edge_s=self._edge_s(1),
            cloud_s=self._cloud_s(1),
            wire_s=self._wire_s(1),
            traffic=self._traffic(1),
            drafts=(DraftCost("none", None, 0, 1.0, self._round_s(0, 0.0), None), *self._drafts()),
        )

    def _drafts(self) -> Iterator[DraftCost]:
        small = (self._own + self.settings.draft_layers) * self.edge.layer_s(1) + self.edge.head_s(1)
        for draft, token_s in ((NGRAM, 0.0), (SMALL, small)):
            share = ASSUMED[draft] if self.settings.acceptance is None else self.settings.acceptance
            pays_from = self._round_s(1, token_s) / self._round_s(0, token_s) - 1
            choices = [
                DraftCost(draft, share, k, tokens_per_round(share, k), self._round_s(k, token_s), pays_from)
                for k in range(MAX_DRAFT + 1)
            ]
            yield max(choices, key=lambda choice: choice.tokens_per_s)

    def _round_s(self, drafted: int, token_s: float) -> float:
        tokens = drafted + 1
        return drafted * token_s + self._edge_s(tokens) + self._cloud_s(tokens) + self._wire_s(tokens)

    def _first_token_s(self) -> float:
        own, span = self._prompt_s(self.edge, self._own), self._prompt_s(self.cloud, len(self.plan.plan.cloud))
        return own + self.edge.head_s(1) + span + self._wire_s(self.settings.prompt)

    def _prompt_s(self, speed: SpeedProfile, layers: int) -> float:
        """Layers over a prompt: as quick as a training step's forward, but for a short one, whose weights are read."""
        tokens = self.settings.prompt
        flops = layers * tokens * self.facts.forward_flops(tokens)
        return max(flops / speed.layer_inference, layers * speed.layer_s(min(tokens, VERIFIED)))

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

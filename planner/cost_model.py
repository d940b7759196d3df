"""What a training step costs in every mode: time, bytes, memory and FLOPs, predicted. Pure.

Time. For one micro-batch edge and cloud work one after the other, so

    step = edge's computing + cloud's computing + bytes / rate + round trips · rtt
         + messages · their cost at both ends + bytes · their cost at both ends + numbers · their codec's cost

with the pieces of computing as FLOPs over the measured rates. Frozen layers below the lowest adapter have no backward.
The few products that a backward leaves out inside the lowest adapted layer are not left out here.

Memory. Weights, four fp32 numbers per trained one (value, gradient, two moments), what autograd keeps in each layer,
three tensors of logits (values, logarithms, gradient), what is kept for the cloud's calls, and the process itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.package.build_presets import PRESETS, BuildPreset, top_heavy
from isthmus.planner.link_spec import LinkSpec
from isthmus.planner.model_facts import ModelFacts
from isthmus.planner.speed_profile import ITEM_BYTES, SpeedProfile
from isthmus.planner.wire_cost import Traffic, Wire

MODES = ("single", "u_shape", "tail_cache", "taps", "edge", "kill_revive", "low_rank", "leased", "emulator")
TRAINS_INSIDE = frozenset({"single", "edge", "kill_revive", "low_rank", "leased"})
"""The modes that train adapters in the cloud's layers."""
TRAINED_BYTES = 16  # value, gradient and AdamW's two moments, fp32
LOGITS = 3  # values, their logarithms of probabilities, and the gradient
LADDER_REDUCTION = 8  # how much narrower a ladder is than the backbone


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What is planned.

    Attributes:
        plan: Who holds which layers. `tail_cache` gives the edge the last layers only, as many as are at this plan's
            top.
        length: Token positions of each.
        tap_width: Width of a tap of `taps`; None for that of the hidden states.
        summed: Whether the edge answers a backward with one gradient per input instead of one per site.
        own_layers: Whether the modes that train inside the cloud's layers adapt the edge's own as well.
    """

    plan: SplitPlan
    batch: int
    length: int
    codecs: WireCodecs
    rank: int = 8
    live_share: float = 0.15
    taps: int = 8
    tap_width: int | None = None
    emulator_keep: float = 0.5
    summed: bool = False
    own_layers: bool = False

    def __post_init__(self) -> None:
        for name in ("live_share", "emulator_keep"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is no share; use a number above 0 and up to 1")


@dataclass(frozen=True, slots=True)
class Work:
    """Computing: seconds and FLOPs."""

    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.seconds + other.seconds, self.flops + other.flops)

    def __mul__(self, factor: float) -> Work:
        return Work(self.seconds * factor, self.flops * factor)


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step: what either side computes, what crosses the wire, and the seconds of that."""

    edge: Work
    cloud: Work = field(default_factory=Work)
    traffic: Traffic = field(default_factory=Traffic)
    wire_s: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it, one after another."""
        return self.edge.seconds + self.cloud.seconds + self.wire_s


@dataclass(frozen=True, slots=True)
class ModeCost:
    """A mode's cost.

    Attributes:
        mode: One of `MODES`.
        step: A step; where the span's outputs are cached, one after the first epoch.
        edge_memory: Bytes that the edge needs.
        cloud_memory: Bytes that the cloud needs for this edge, without its server.
        first_epoch: A step of the first epoch, where later ones are cheaper.
    """

    mode: str
    step: StepCost
    edge_memory: float
    cloud_memory: float = 0.0
    first_epoch: StepCost | None = None


def predict(
    facts: ModelFacts, settings: PlanSettings, link: LinkSpec, edge: SpeedProfile, cloud: SpeedProfile
) -> list[ModeCost]:
    """The cost of every mode that the plan allows, in the order of `MODES`.

    A plan without edge layers has no `u_shape` and no `emulator`, one without layers at the top no `tail_cache`: there
    would be nothing to train.

    Raises:
        ConfigError: a codec was not measured.
        PlanError: the plan is for another number of layers.
    """
    settings.plan.check_layers(facts.n_layers)
    return _Predictor(facts, settings, link, edge, cloud).all()


@dataclass(frozen=True, slots=True)
class PackageCost:
    """What tuning costs on a preset's package as its owner advises: all linears above the emulator, or all the edge's.

    Attributes:
        preset: Its name.
        plan: Who holds which layers.
        kept: Layers of the emulator.
        tuning: A step in the first epoch and, where nothing below is tuned, later, once the outputs of the layers
            below are kept; and memory.
        package_bytes: About how large the package is: the edge's layers and bridges in fp32, at most a bridge for each
            dropped layer and one at the end, and the emulator's layers as the preset stores them; without tokenizer
            files.
    """

    preset: str
    plan: SplitPlan
    kept: int
    tuning: ModeCost
    package_bytes: int


def predict_packages(
    facts: ModelFacts, settings: PlanSettings, link: LinkSpec, edge: SpeedProfile
) -> list[PackageCost]:
    """The cost of tuning on each preset's package.

    Raises:
        PlanError: The model has too few layers for a package.
    """
    facts = replace(facts, linears=tuple(replace(each, is_site=True) for each in facts.linears))
    plan = SplitPlan.parse(top_heavy(facts.n_layers), facts.n_layers)
    return [_package(name, preset, facts, replace(settings, plan=plan), link, edge) for name, preset in PRESETS.items()]


def _package(
    name: str, preset: BuildPreset, facts: ModelFacts, settings: PlanSettings, link: LinkSpec, edge: SpeedProfile
) -> PackageCost:
    plan, span = settings.plan, len(settings.plan.cloud)
    advice, recipe = preset.tuning, Recipe.parse(preset.method, preset.share(span))
    kept = recipe.layers_kept(span)
    predictor = _Predictor(facts, replace(settings, rank=advice.rank), link, edge, edge)
    tuning = predictor.emulator(kept) if advice.layers == "all" else predictor.tuned_above(kept)
    bridges = (span - kept + 1) * (facts.hidden + 1) * facts.hidden if recipe.bridged else 0
    weights = (plan.bottom + plan.top) * facts.layer_parameters + facts.outside_parameters + bridges
    fp32 = ITEM_BYTES["fp32"]
    item = fp32 if recipe.bits is None else recipe.bits / 8  # scales are a sixteenth of it at most
    return PackageCost(name, plan, kept, tuning, round(weights * fp32 + kept * facts.layer_parameters * item))


def wire_seconds(traffic: Traffic, link: LinkSpec, speed: SpeedProfile) -> float:
    """What traffic takes on a link and in the software at its ends, one message after another.

    Raises:
        ConfigError: a codec was not measured.
    """
    unknown = [codec for codec in traffic.elements if codec not in speed.codec_s]
    if unknown:
        raise ConfigError(f"codec {unknown[0]!r} is not among those that were measured: measure the edge again")
    seconds = link.seconds(traffic.total, traffic.round_trips)
    seconds += 2 * traffic.round_trips * speed.message_s + traffic.total * speed.byte_s
    return seconds + sum(count * speed.codec_s[codec] for codec, count in traffic.elements.items())


_Group = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Of sites that share an input: widths of what is asked with, of what the sites add, and of the gradients answered."""


class _Predictor:
    def __init__(
        self, facts: ModelFacts, settings: PlanSettings, link: LinkSpec, edge: SpeedProfile, cloud: SpeedProfile
    ) -> None:
        self._facts = facts
        self._set = settings
        self._link = link
        self._edge = edge
        self._cloud = cloud
        self._wire = Wire(settings.batch, settings.length, facts.hidden, settings.codecs)
        self._positions = settings.batch * settings.length
        self._bottom, self._top, self._span = settings.plan.bottom, settings.plan.top, len(settings.plan.cloud)

    def all(self) -> list[ModeCost]:
        own = self._bottom + self._top > 0
        costs = [self._single()]
        if own:
            costs.append(self._u_shape())
        if self._top:
            costs.append(self._tail_cache())
        costs += [self._taps(), self._edge_sites("edge", 1.0), self._edge_sites("kill_revive", self._set.live_share)]
        costs += [self._low_rank(), self._leased()]
        if own:
            costs.append(self.emulator(max(1, round(self._set.emulator_keep * self._span))))
        return costs

    def tuned_above(self, kept: int) -> ModeCost:
        """Tuning above an emulator of so many layers; later epochs take up the outputs that were kept."""
        below = self._bottom + kept
        later = self._own_layers(0, self._top) + self._lora(self._top)
        first = self._layers(self._edge, below, backward=False) + later
        memory = self._memory(below + self._top, self._top, self._top * self._site_parameters)
        return ModeCost("emulator", StepCost(later), memory, first_epoch=StepCost(first))

    # Modes -----------------------------------------------------------------------------------------------------------

    def _single(self) -> ModeCost:
        still = 0 if self._own else self._bottom
        layers = self._facts.n_layers - still
        adapted = self._span + self._own
        edge = self._own_layers(still, layers) + self._lora(adapted)
        memory = self._memory(self._facts.n_layers, layers, adapted * self._site_parameters)
        return ModeCost("single", StepCost(edge), memory)

    def _u_shape(self) -> ModeCost:
        own = self._bottom + self._top
        below = self._bottom > 0
        edge = self._own_layers(0, own) + self._lora(own)
        traffic = self._wire.forward() + (self._wire.backward() if below else Traffic())
        memory = self._memory(own, own, own * self._site_parameters) + self._kept_for_calls
        return ModeCost(
            "u_shape", self._step(edge, self._span_work(backward=below), traffic), memory, self._span_memory(below)
        )

    def _tail_cache(self) -> ModeCost:
        edge = self._own_layers(0, self._top) + self._lora(self._top)
        below = self._facts.n_layers - self._top
        memory = self._memory(self._top, self._top, self._top * self._site_parameters) + self._kept_for_calls
        return ModeCost(
            "tail_cache",
            StepCost(edge),
            memory,
            below * self._facts.layer_parameters * ITEM_BYTES[self._cloud.dtype],
            self._step(edge, self._layers(self._cloud, below, backward=False), self._wire.forward()),
        )

    def _taps(self) -> ModeCost:
        """Ladder side-tuning; see `isthmus.backbone.sites.ladder`. The taps come down in the forward's answer."""
        taps, width = self._set.taps, self._set.tap_width or self._facts.hidden
        parameters, tensors = self._facts.ladder(taps, self._set.tap_width)
        side = Work(taps * self._positions * self._edge.rung_s, 6 * parameters * self._positions)
        own = self._bottom + self._top
        edge = self._own_layers(own, 0) + side + self._optimizer(tensors)
        kept = self._positions * taps * (4 * width + self._edge.activation_bytes / LADDER_REDUCTION)
        return ModeCost(
            "taps",
            StepCost(edge),
            self._memory(own, 0, parameters) + self._kept_for_calls + kept,
            self._span_memory(False),
            self._step(edge, self._span_work(backward=False), self._wire.forward(taps=[width] * taps)),
        )

    def _edge_sites(self, mode: str, share: float) -> ModeCost:
        sites = self._lora(self._span) * share
        kept = 4 * self._positions * share * self._span * sum(self._site_widths)
        return self._inside(mode, sites, Work(), self._pauses(self._edge_groups()) * share, kept)

    def _low_rank(self) -> ModeCost:
        """PrivateLoRA (arXiv 2311.14030): the edge holds r by r weights, the cloud the frozen projections."""
        rank, sites = self._set.rank, len(self._facts.sites)
        core = 2 * rank * rank * sites * self._span * self._positions
        edge = Work(core / self._edge.adapter_forward + 2 * core / self._edge.adapter_backward, 3 * core)
        projections = 2 * self._site_parameters * self._span * self._positions
        # As frozen weights have no gradient of their own, a backward costs what a forward does.
        cloud = Work(
            projections / self._cloud.adapter_forward + projections / self._cloud.adapter_backward, 2 * projections
        )
        groups = [([rank] * len(group), [rank] * len(group), [rank] * len(group)) for group in self._facts.site_groups]
        kept = 2 * 4 * self._positions * rank * sites * self._span
        trained = self._span * sites
        return self._inside(
            "low_rank",
            edge + self._optimizer(trained),
            cloud,
            self._pauses(groups),
            kept,
            parameters=rank * rank * trained,
        )

    def _leased(self) -> ModeCost:
        shapes = [
            s for site in self._facts.sites for s in ((self._set.rank, site.inputs), (site.outputs, self._set.rank))
        ]
        cloud = self._adapters(self._cloud, self._span)
        leased = self._wire.leasing(shapes * self._span)
        return self._inside("leased", self._optimizer(2 * len(self._facts.sites) * self._span), cloud, leased, 0.0)

    def emulator(self, kept: int) -> ModeCost:
        """Tuning all of the edge's layers over an emulator of so many."""
        own = self._bottom + self._top
        still = 0 if self._bottom else kept  # without adapters below it, nothing wants a gradient through it
        edge = self._own_layers(still, own + kept - still) + self._lora(own)
        memory = self._memory(own + kept, own + kept - still, own * self._site_parameters)
        return ModeCost("emulator", StepCost(edge), memory)

    def _inside(
        self, mode: str, sites: Work, cloud: Work, traffic: Traffic, kept: float, *, parameters: float | None = None
    ) -> ModeCost:
        """A mode with adapters at the span's sites: the plain call, and what the sites add to either side."""
        still = 0 if self._own else self._bottom
        own = self._bottom + self._top
        edge = self._own_layers(still, own - still) + sites
        if self._own:
            edge += self._lora(own)
        call = self._wire.forward() + self._wire.backward(wanted=self._trains_below)
        trained = self._span * self._site_parameters if parameters is None else parameters
        memory = self._memory(own, own - still, trained + self._own * self._site_parameters)
        step = self._step(edge, self._span_work(backward=True) + cloud, call + traffic)
        return ModeCost(mode, step, memory + self._kept_for_calls + kept, self._span_memory(True))

    # Pieces ----------------------------------------------------------------------------------------------------------

    @cached_property
    def _own(self) -> int:
        """How many of the edge's own layers are adapted beside the cloud's."""
        return self._bottom + self._top if self._set.own_layers else 0

    @cached_property
    def _trains_below(self) -> bool:
        """Whether the modes that train inside have an adapter below the span."""
        return self._own > 0 and self._bottom > 0

    @cached_property
    def _site_parameters(self) -> int:
        """Weights of the LoRA adapters of one layer."""
        return sum(site.adapter_parameters(self._set.rank) for site in self._facts.sites)

    @cached_property
    def _site_widths(self) -> list[int]:
        """What crosses in the forward of one layer: each group's input, each site's output."""
        return [group[0].inputs for group in self._facts.site_groups] + [site.outputs for site in self._facts.sites]

    def _edge_groups(self) -> list[_Group]:
        groups: list[_Group] = []
        for sites in self._facts.site_groups:
            inputs, outputs = [site.inputs for site in sites], [site.outputs for site in sites]
            groups.append((inputs[:1], outputs, inputs[:1] if self._set.summed else inputs))
        return groups

    def _pauses(self, groups: Sequence[_Group]) -> Traffic:
        """What a call's pauses at all groups of the span add, forward and backward."""
        return self._layer_pauses(groups) * (self._span - 1) + self._layer_pauses(groups, below=self._trains_below)

    def _layer_pauses(self, groups: Sequence[_Group], *, below: bool = True) -> Traffic:
        total = Traffic()
        for number, (given, added, answered) in enumerate(groups):
            wanted = below or number > 0  # else nothing below the group has a use for a gradient
            total += self._wire.pause("forward", len(added), given, added)
            total += self._wire.pause("backward", len(added), added, answered if wanted else [])
        return total

    def _layers(self, speed: SpeedProfile, layers: int, *, backward: bool) -> Work:
        """Frozen decoder layers, forward and, with a graph, backward to their input."""
        forward = layers * self._facts.forward_flops(self._set.length) * self._positions
        if not backward:
            return Work(forward / speed.layer_inference, forward)
        back = layers * self._facts.backward_flops(self._set.length) * self._positions
        return Work(forward / speed.layer_forward + back / speed.layer_backward, forward + back)

    def _own_layers(self, still: int, trained: int) -> Work:
        """Decoder layers of the edge: those below the lowest adapter, and the others; and the head."""
        lower = self._layers(self._edge, still, backward=False)
        return lower + self._layers(self._edge, trained, backward=True) + self._head

    def _span_work(self, *, backward: bool) -> Work:
        return self._layers(self._cloud, self._span, backward=backward)

    @cached_property
    def _head(self) -> Work:
        flops = self._facts.head_flops * self._positions
        return Work(flops / self._edge.head, flops)

    def _adapters(self, speed: SpeedProfile, layers: int) -> Work:
        flops = 2 * self._site_parameters * layers * self._positions
        return Work(flops / speed.adapter_forward + 2 * flops / speed.adapter_backward, 3 * flops)

    def _lora(self, layers: int) -> Work:
        """LoRA on the edge, and its share of the optimizer's step."""
        return self._adapters(self._edge, layers) + self._optimizer(2 * len(self._facts.sites) * layers)

    def _optimizer(self, tensors: float) -> Work:
        return Work(tensors * self._edge.optimizer_s)

    def _step(self, edge: Work, cloud: Work, traffic: Traffic) -> StepCost:
        return StepCost(edge, cloud, traffic, wire_seconds(traffic, self._link, self._edge))

    def _memory(self, layers: int, graph: int, trained: float) -> float:
        """Bytes of the edge with `layers` decoder layers, `graph` of them with a graph, and `trained` weights."""
        weights = layers * self._facts.layer_parameters + self._facts.outside_parameters
        kept = self._positions * (graph * self._edge.activation_bytes + LOGITS * 4 * self._facts.vocabulary)
        return self._edge.process_bytes + weights * ITEM_BYTES[self._edge.dtype] + trained * TRAINED_BYTES + kept

    @cached_property
    def _kept_for_calls(self) -> float:
        """The span's input and output, fp32."""
        return 2 * 4 * self._positions * self._facts.hidden

    def _span_memory(self, graph: bool) -> float:
        weights = self._span * self._facts.layer_parameters * ITEM_BYTES[self._cloud.dtype]
        return weights + graph * self._span * self._positions * self._cloud.activation_bytes

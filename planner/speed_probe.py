"""How fast a machine is at what training and generation are made of: short runs, with the shapes that are asked for.

Rates are effective ones, FLOPs by the formulas of `isthmus.planner.model_facts` over seconds, so what the formulas
leave out is in the rates. The pieces run in turns, so that whatever else the machine does hits all alike, and each
figure is a median. Weights are random; only time is of interest.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from isthmus.backbone.decoding.decode_pass import DecodePass, FastCall
from isthmus.backbone.decoding.key_values import KeyValues
from isthmus.backbone.plan import Span
from isthmus.backbone.sites.ladder_network import LadderSide
from isthmus.backbone.split.span import DTYPES, FrozenSpan, SpanInput, empty_layers, run_layers
from isthmus.common.errors import ConfigError
from isthmus.common.torch_threads import torch_threads
from isthmus.planner.model_facts import ModelFacts
from isthmus.planner.speed_profile import DRAFT_DTYPE, ITEM_BYTES, VERIFY_TOKENS, ProbeSettings, SpeedProfile
from isthmus.planner.wire_probe import measure_wire
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS, Role, decode, encode

ROUNDS = 7
LAYERS = 2  # one alone might stay in a cache
STEPS = {"decode": 1, "verify": VERIFY_TOKENS}
"""Tokens of a decode step, by the beginning of its figures' names."""
DECODED_BYTES = 128 << 20
"""Weights of the layers of a decode step, which reads each once: four times the 32 MiB of last-level cache of the
processor on which results.md was measured. On a processor whose cache holds more than this, a step looks quicker than
one of a model that is larger than the cache."""
ADAPTERS = 16
RUNGS = 4

Piece = Callable[[], dict[str, float]]
"""One run of a piece of work: seconds per FLOP, per tensor or per number, by name."""


def measure(
    config: Any, facts: ModelFacts, settings: ProbeSettings, advance: Callable[[], None] = lambda: None
) -> SpeedProfile:
    """Measure this machine. Takes some seconds for a small model.

    Args:
        advance: Called after each of `ROUNDS` rounds.

    Raises:
        ConfigError: there is no such dtype.
    """
    if settings.dtype not in DTYPES:
        raise ConfigError(f"dtype {settings.dtype!r} cannot be measured; use {' or '.join(DTYPES)}")
    process, memory = _memory("/proc/self/status", "VmRSS"), _memory("/proc/meminfo", "MemAvailable")
    with torch_threads(settings.threads):
        layers, kept = _layers(config, facts, settings)
        codecs = [_codec(codec, facts.hidden, settings) for codec in ACTIVATION_CODECS]
        others = [_head(facts, settings), _adapters(facts, settings), _ladder(facts, settings)]
        decoding = [_decoding(config, facts, settings), _drafting(config, facts, settings)]
        seconds = _medians([layers, *decoding, *others, *codecs], advance)
        message_s, byte_s = measure_wire()
    return SpeedProfile(
        **asdict(settings),
        layer_inference=1 / seconds["layer_inference"],
        layer_forward=1 / seconds["layer_forward"],
        layer_backward=1 / seconds["layer_backward"],
        head=1 / seconds["head"],
        adapter_forward=1 / seconds["adapter_forward"],
        adapter_backward=1 / seconds["adapter_backward"],
        rung_s=seconds["rung"],
        optimizer_s=seconds["optimizer"],
        codec_s={codec: seconds[codec] for codec in ACTIVATION_CODECS},
        message_s=message_s,
        byte_s=byte_s,
        activation_bytes=kept,
        process_bytes=process,
        memory_bytes=memory,
        decode_layer_s=seconds["decode_layer"],
        decode_head_s=seconds["decode_head"],
        verify_layer_s=seconds["verify_layer"],
        verify_head_s=seconds["verify_head"],
        draft_layer_s=seconds["draft_layer"],
        draft_head_s=seconds["draft_head"],
        draft_inference=1 / seconds["draft_inference"],
    )


def _medians(pieces: Sequence[Piece], advance: Callable[[], None]) -> dict[str, float]:
    for piece in pieces:
        piece()  # makes buffers and threads
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for piece in pieces:
            for name, value in piece().items():
                found[name].append(value)
        advance()
    return {name: statistics.median(values) for name, values in found.items()}


def _layers(config: Any, facts: ModelFacts, settings: ProbeSettings) -> tuple[Piece, float]:
    """Decoder layers; and the bytes that one keeps for a backward, per position."""
    base = _random_layers(config, _n_layers(config), DTYPES[settings.dtype])
    shape = (settings.batch, settings.length)
    leaf = torch.randn(*shape, facts.hidden, dtype=DTYPES[settings.dtype], requires_grad=True)
    mask, gradient = torch.ones(shape, dtype=torch.long), torch.randn_like(leaf)
    positions = _n_layers(config) * settings.batch * settings.length
    forward_flops = positions * facts.forward_flops(settings.length)

    def piece() -> dict[str, float]:
        times = [time.perf_counter()]
        with torch.inference_mode():
            run_layers(base, leaf, mask)
        times.append(time.perf_counter())
        output = run_layers(base, leaf, mask)
        times.append(time.perf_counter())
        torch.autograd.grad(output, leaf, gradient)
        times.append(time.perf_counter())
        return {
            "layer_inference": (times[1] - times[0]) / forward_flops,
            "layer_forward": (times[2] - times[1]) / forward_flops,
            "layer_backward": (times[3] - times[2]) / (positions * facts.backward_flops(settings.length)),
        }

    return piece, _kept_bytes(base, leaf, mask) / positions


def _n_layers(config: Any) -> int:
    return min(LAYERS, int(config.num_hidden_layers))


def _random_layers(config: Any, count: int, dtype: torch.dtype) -> Any:
    """The model's first `count` layers with random weights."""
    base = empty_layers(config, range(count), dtype=dtype, attn_implementation=None)
    for module in list(base.modules()):
        for name, empty in list(module.named_parameters(recurse=False)):
            value = torch.ones(empty.shape) if empty.dim() == 1 else torch.randn(empty.shape) * 0.02
            setattr(module, name, nn.Parameter(value.to(dtype), requires_grad=False))
    return base


def _kept_bytes(base: nn.Module, leaf: Tensor, mask: Tensor) -> int:
    """Bytes that autograd keeps for a backward, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in base.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run_layers(base, leaf, mask)
    del output  # until here nothing that was counted is freed, so no address comes twice
    return sum(kept.values())


def _decoding(config: Any, facts: ModelFacts, settings: ProbeSettings) -> Piece:
    """The next token of one text, and the next `VERIFY_TOKENS` at once, with a cache: a layer's share of a pass."""
    span = _decoded_span(config, facts, settings.dtype)
    decode, cache = DecodePass(span, None), KeyValues(span)
    decode([_call(span, settings.length, cache)])
    return lambda: _steps(span, decode, cache, STEPS)


def _drafting(config: Any, facts: ModelFacts, settings: ProbeSettings) -> Piece:
    """The next token and a prompt, in the dtype of drafts."""
    span = _decoded_span(config, facts, DRAFT_DTYPE)
    decode, layers = DecodePass(span, None), len(span.layers)
    flops = layers * settings.length * facts.forward_flops(settings.length)

    def piece() -> dict[str, float]:
        cache = KeyValues(span)
        prompt = _call(span, settings.length, cache)
        start = time.perf_counter()
        decode([prompt])
        prompt_s = time.perf_counter() - start
        return {"draft_inference": prompt_s / flops, **_steps(span, decode, cache, {"draft": 1})}

    return piece


def _decoded_span(config: Any, facts: ModelFacts, dtype: str) -> FrozenSpan:
    """Layers of `DECODED_BYTES` with random weights, or all of the model's."""
    wanted = math.ceil(DECODED_BYTES / (facts.layer_parameters * ITEM_BYTES[dtype]))
    count = min(max(LAYERS, wanted), facts.n_layers)
    layers = _random_layers(config, count, DTYPES[dtype])
    return FrozenSpan(layers, Span(0, count), config, facts.hidden, DTYPES[dtype])


def _steps(span: FrozenSpan, decode: DecodePass, cache: KeyValues, steps: Mapping[str, int]) -> dict[str, float]:
    """Seconds of a layer for each step, of so many tokens. The cache stays as it is."""
    length, found = cache.length, {}
    for name, tokens in steps.items():
        for _ in range(2):  # the first one follows other work, and a text's steps follow each other
            call = _call(span, tokens, cache)
            start = time.perf_counter()
            decode([call])
            found[f"{name}_layer"] = (time.perf_counter() - start) / len(span.layers)
            cache.keep(length)
    return found


def _call(span: FrozenSpan, tokens: int, cache: KeyValues) -> FastCall:
    return FastCall(SpanInput(torch.randn(1, tokens, span.hidden_size, dtype=span.dtype)), cache)


def _head(facts: ModelFacts, settings: ProbeSettings) -> Piece:
    """LM head and loss, forward and to the hidden states backward; and the head with a greedy choice."""
    dtype, positions = DTYPES[settings.dtype], settings.batch * settings.length
    weight = torch.randn(facts.vocabulary, facts.head_parameters // facts.vocabulary, dtype=dtype) * 0.02
    hidden = torch.randn(positions, weight.shape[1], dtype=dtype, requires_grad=True)
    labels = torch.randint(facts.vocabulary, (positions,))
    steps = {name: (tokens, weight) for name, tokens in STEPS.items()}
    steps["draft"] = (1, weight.to(DTYPES[DRAFT_DTYPE]))

    def piece() -> dict[str, float]:
        start = time.perf_counter()
        torch.autograd.grad(cross_entropy(linear(hidden, weight).float(), labels), hidden)
        found = {"head": (time.perf_counter() - start) / (positions * facts.head_flops)}
        for name, (tokens, of_step) in steps.items():
            given = torch.randn(tokens, of_step.shape[1], dtype=of_step.dtype)
            start = time.perf_counter()
            with torch.inference_mode():
                linear(given, of_step).float().argmax(-1)
            found[f"{name}_head"] = time.perf_counter() - start
        return found

    return piece


def _adapters(facts: ModelFacts, settings: ProbeSettings) -> Piece:
    """LoRA on the model's first kind of site, and the optimizer on the weights."""
    site, shape = facts.sites[0], (settings.batch, settings.length)
    given = torch.randn(*shape, site.inputs, requires_grad=True)
    below, base = torch.randn_like(given), torch.randn(*shape, site.outputs)
    down = [nn.Parameter(torch.randn(settings.rank, site.inputs) * 0.02) for _ in range(ADAPTERS)]
    up = [nn.Parameter(torch.randn(site.outputs, settings.rank) * 0.02) for _ in range(ADAPTERS)]
    optimizer = torch.optim.AdamW([*down, *up], lr=1e-5, foreach=False)
    flops = 2 * ADAPTERS * settings.batch * settings.length * site.adapter_parameters(settings.rank)

    def piece() -> dict[str, float]:
        times = [time.perf_counter()]
        outputs = [base + linear(linear(given, a), b) * 2.0 for a, b in zip(down, up, strict=True)]
        times.append(time.perf_counter())
        for output, a, b in zip(outputs, down, up, strict=True):
            gradient, a.grad, b.grad = torch.autograd.grad(output, (given, a, b), base)
            torch.add(below, gradient)  # autograd adds it to that of the frozen linear
        times.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_([*down, *up], 1.0, foreach=False)
        optimizer.step()
        times.append(time.perf_counter())
        return {
            "adapter_forward": (times[1] - times[0]) / flops,
            "adapter_backward": (times[2] - times[1]) / (2 * flops),
            "optimizer": (times[3] - times[2]) / (2 * ADAPTERS),
        }

    return piece


def _ladder(facts: ModelFacts, settings: ProbeSettings) -> Piece:
    """A ladder side network with taps of the backbone's width."""
    side = LadderSide(facts.hidden, facts.heads, range(RUNGS))
    hidden = torch.randn(settings.batch, settings.length, facts.hidden)
    mask = torch.ones(hidden.shape[:2], dtype=torch.long)

    def piece() -> dict[str, float]:
        start = time.perf_counter()
        output = side(hidden, [hidden] * RUNGS, hidden, mask)
        torch.autograd.grad(output, list(side.parameters()), hidden)
        return {"rung": (time.perf_counter() - start) / (RUNGS * settings.batch * settings.length)}

    return piece


def _codec(codec: str, hidden: int, settings: ProbeSettings) -> Piece:
    """What both ends do with a tensor of hidden states."""
    tensor = torch.randn(settings.batch, settings.length, hidden)

    def piece() -> dict[str, float]:
        start = time.perf_counter()
        bool(torch.isfinite(tensor).all())
        decode(encode(tensor, codec, Role.ACTIVATION)).clone()
        return {codec: (time.perf_counter() - start) / tensor.numel()}

    return piece


def _memory(path: str, name: str) -> int:
    """A figure of Linux's memory files in bytes; 0 where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)

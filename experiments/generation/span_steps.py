"""Steps of decoding of the span alone, in this process: how long they take against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.backbone.decoding.decode_pass import DecodePass, ExactCall, FastCall
from isthmus.backbone.decoding.key_values import KeyValues
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.batch_invariance import measure_batch_invariance
from isthmus.backbone.split.span import DTYPES, FrozenSpan, SpanInput, load_span
from isthmus.experiments.harness.generation_settings import GenerateSettings
from isthmus.planner.speed_profile import VERIFY_TOKENS


def span_alone(settings: GenerateSettings, dtype: str, contexts: Sequence[int]) -> dict[str, float]:
    """What a decode step of the span takes: of all sessions, of one, exact, and of nine tokens.

    Args:
        dtype: What the span computes in, a name of `DTYPES`.
        contexts: Tokens that the sessions have in their caches.

    Returns:
        `span_batched_over_serial`, `verify9_ratio` and, where the span can decode exactly, `exact_over_fast`; see
        `isthmus.experiments.generation.generate_bench.run_generate`.
    """
    checkpoint = resolve(settings.model)
    plan = SplitPlan.parse(settings.edge_layers, checkpoint.config.num_hidden_layers)
    span = load_span(checkpoint, plan, dtype=DTYPES[dtype])
    rows = measure_batch_invariance(span, settings.threads, settings.threads).rows
    decode = DecodePass(span, rows)
    caches = [KeyValues(span) for _ in contexts]
    for cache, length in zip(caches, contexts, strict=True):
        decode([FastCall(_states(span, length), cache)])
    one = caches[len(caches) // 2]

    def serial() -> None:
        for cache in caches:
            decode([FastCall(_states(span, 1), cache)])

    def verify() -> None:
        decode([FastCall(_states(span, VERIFY_TOKENS), one)])
        one.keep(one.length - VERIFY_TOKENS)

    work: dict[str, Callable[[], object]] = {
        "serial": serial,
        "batched": lambda: decode([FastCall(_states(span, 1), cache) for cache in caches]),
        "alone": lambda: decode([FastCall(_states(span, 1), one)]),
        "verify": verify,
    }
    if rows is not None:
        work["exact"] = lambda: decode([ExactCall(_states(span, 1), one, blocks=(1,))])
    spent: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(settings.rounds + 1):
        for name, run in work.items():
            begun = time.perf_counter()
            run()
            if turn:  # the first one warms up
                spent[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(seconds) for name, seconds in spent.items()}
    figures = {
        "span_batched_over_serial": medians["serial"] / medians["batched"],
        "verify9_ratio": medians["verify"] / medians["alone"],
    }
    if "exact" in medians:
        figures["exact_over_fast"] = medians["exact"] / medians["alone"]
    return figures


def _states(span: FrozenSpan, length: int) -> SpanInput:
    return SpanInput(torch.randn(1, length, span.hidden_size, dtype=span.dtype))

"""Generation of the split model against one process: the same tokens and bits, and how fast.

One process has the whole model with its weights at addresses that are multiples of 64, as other places give products of
one row other bits. Both take turns, prompt by prompt, so that whatever else the machine does hits both alike.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from isthmus.common.errors import IsthmusError
from isthmus.common.readable import lines
from isthmus.common.torch_threads import torch_threads
from isthmus.edge.client.link import Link, connect
from isthmus.edge.drafts import FixedLength, NgramDraft, drafting
from isthmus.edge.generation.exact import exact_decoding
from isthmus.experiments.generation.generate_process import MODULE
from isthmus.experiments.generation.links_bench import check_links, run_links, show_links
from isthmus.experiments.generation.prompts import PROMPTS, chat_ids
from isthmus.experiments.generation.span_steps import span_alone
from isthmus.experiments.harness.bench_flags import names_of
from isthmus.experiments.harness.generation_settings import GenerateSettings
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.harness.single_process import whole_model

CONTEXTS = (37, 80, 120, 160, 200, 250, 300, 340)
"""Tokens that the sessions of the span's measurement have in their caches: of chats that have gone on for a while."""
OTHERS = 7
"""Further edges that decode exactly while exact texts are compared."""
PARTS = ("local", "links")
EXACT_PROMPTS = 4
"""Prompts whose exact bits are compared in all four ways. The further edges have the prompts after these."""
AMONG_ROUNDS = 10
"""Times that each of these texts is generated among others at most, until it has shared a pass: whether others' calls
come at the same time is chance."""
EXACT_DRAFT = 4
"""Tokens of each draft that is verified exactly."""


@dataclass(frozen=True, slots=True)
class Text:
    """What came of a prompt: tokens `[N]`, the logits that they were chosen by `[N, vocabulary]`, and seconds."""

    tokens: Tensor
    logits: Tensor
    seconds: float


def run_generate(settings: GenerateSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module, and `isthmus.experiments.generation.links_bench` for the links.

    Returns:
        `identical`: the share of prompts whose tokens in fast are those of one process, and `identical_exact` in exact;
        `fast_bits_equal`: whether all logits are, too; `exact_bits_equal`: whether those of exact are the same alone,
        among eight sessions, with drafts, and when every few tokens the connection is cut, with the counts that show
        that all this happened (see `_exact_in_every_way`); `tokens_ratio` and `tokens_ratio_exact`: tokens per second
        over one process's, the median over the prompts; of the span alone, in fp32 and bf16,
        `span_batched_over_serial`: eight sessions one by one over a step of all, `exact_over_fast`: a step of one
        session, and `verify9_ratio`: nine tokens of one session over one; `batched_over_serial`: tokens per second of
        eight edges at a time over those of one after another, and `batched_bound`, which is `1 / (e + (1 - e) / b)` of
        their own share `e` of the work, `edge_share`, and what the span gains, `b`, were the edges' shares done one
        after another. They share two cores, so more is possible. And `links` and `targets`.

    Raises:
        ConfigError: A part is not known, or this machine cannot measure it.
        IsthmusError: A process failed, or an exact text shared no pass, none had a drafted token, or none was replayed.
    """
    parts = names_of(settings.parts, "parts", PARTS)
    if "links" in parts:
        check_links(settings)
    given = asdict(settings) | {name: str(path) for name, path in asdict(settings).items() if isinstance(path, Path)}
    result: dict[str, Any] = {}
    if "local" in parts:
        result |= _locally(settings, folder)
    if "links" in parts:
        result |= run_links(settings, folder / "links")
    return result | given


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    for line in lines({name: value for name, value in result.items() if name not in ("links", "targets")}, 32):
        typer.echo(line)
    if "links" in result:
        show_links(result)


def _locally(settings: GenerateSettings, folder: Path) -> dict[str, Any]:
    with torch_threads(settings.threads):
        found = _against_one_process(settings, folder / "compared")
        spans = {dtype: span_alone(settings, dtype, CONTEXTS) for dtype in ("fp32", "bf16")}
    batched = _many_edges(settings, folder / "many", spans["fp32"]["span_batched_over_serial"])
    of_spans = {name: {dtype: figures[name] for dtype, figures in spans.items()} for name in spans["fp32"]}
    return {**found, **batched, **of_spans}


def _against_one_process(settings: GenerateSettings, folder: Path) -> dict[str, Any]:
    """Tokens, bits and speed of the whole model, of the split one in fast, and in exact."""
    with (
        LocalCloud(folder, settings.model, *settings.cloud_options()) as cloud,
        connect(cloud.connection, key=cloud.edge_key, interactive=True) as link,
    ):
        whole, tokenizer, _ = whole_model(settings.model, settings.edge_layers)
        for parameter in whole.parameters():
            parameter.data = parameter.data.clone()
        split = link.load_model().eval()
        prompts = [torch.tensor([ids]) for ids in chat_ids(tokenizer, PROMPTS[: settings.prompts])]
        same, same_exact, bits, ratios, ratios_exact = [], [], [], [], []
        with stderr_progress("prompts", len(prompts)) as advance:
            for number, ids in enumerate(prompts):
                runs: list[tuple[str, Callable[[], Text]]] = [
                    ("whole", partial(text_of, whole, ids, settings.tokens)),
                    ("fast", partial(text_of, split, ids, settings.tokens)),
                    ("exact", partial(_exactly, link, split, ids, settings.tokens)),
                ]
                shift = number % len(runs)  # turn about, so that none always follows the same one
                texts = {name: run() for name, run in runs[shift:] + runs[:shift]}
                same.append(torch.equal(texts["fast"].tokens, texts["whole"].tokens))
                same_exact.append(torch.equal(texts["exact"].tokens, texts["whole"].tokens))
                bits.append(torch.equal(texts["fast"].logits, texts["whole"].logits))
                ratios.append(texts["whole"].seconds / texts["fast"].seconds)
                ratios_exact.append(texts["whole"].seconds / texts["exact"].seconds)
                advance()
        others = chat_ids(tokenizer, PROMPTS[EXACT_PROMPTS : EXACT_PROMPTS + OTHERS])
        exact = _exact_in_every_way(link, split, cloud, prompts[:EXACT_PROMPTS], others, settings.tokens)
    return {
        "identical": statistics.mean(same),
        "identical_exact": statistics.mean(same_exact),
        "fast_bits_equal": all(bits),
        "exact_bits_equal": exact,
        "tokens_ratio": statistics.median(ratios),
        "tokens_ratio_exact": statistics.median(ratios_exact),
    }


def text_of(model: Any, ids: Tensor, tokens: int, **options: Any) -> Text:
    """Generate so many tokens, greedily."""
    begun = time.perf_counter()
    found = model.generate(
        ids,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    seconds = time.perf_counter() - begun
    return Text(found.sequences[0, ids.shape[1] :], torch.cat(found.logits), seconds)


def _exactly(link: Link, model: Any, ids: Tensor, tokens: int, **options: Any) -> Text:
    with exact_decoding(link, model):
        return text_of(model, ids, tokens, **options)


class _Cuts:
    """A streamer that abandons the connection at every few tokens."""

    def __init__(self, link: Link, every: int = 5) -> None:
        self._link, self._every, self._seen = link, every, 0

    def put(self, _tokens: Tensor) -> None:
        """Some tokens have come."""
        self._seen += 1
        if self._seen % self._every == 0:
            self._link.drop()

    def end(self) -> None:
        """The text is over."""


def _exact_in_every_way(
    link: Link, model: Any, cloud: LocalCloud, prompts: Sequence[Tensor], others: Sequence[Sequence[int]], tokens: int
) -> dict[str, Any]:
    """Whether exact texts have the bits of those that are generated alone: batched, with drafts, and replayed.

    What is generated with drafts follows a prompt, the answer to it, and the prompt again: where the answer comes
    again, n-grams draft it, and logits behind the first ones of a call are compared.

    Args:
        others: The prompts of further edges, none of `prompts`, so that swapped rows would be seen.

    Returns:
        `among_eight`, `drafts` and `replay`: whether all logits are the same. `shared_calls`: calls of the compared
        session that shared a pass with those of another one, among eight, of `calls` that it made meanwhile; such a
        pass may hold no more than two sessions. `accepted`: tokens of n-gram drafts that stand in the texts.
        `replayed`: token positions that were sent again after a cut. Each is over all prompts. `calls_per_pass`: the
        mean of this cloud over all passes that may be shared, from its start: those of fast texts and of texts that
        were generated alone are among them, and those that the others shared with each other.

    Raises:
        IsthmusError: All logits are the same, and a prompt shared no call, or another count is 0, so that a comparison
            shows nothing.
    """
    alone = [_exactly(link, model, ids, tokens) for ids in prompts]
    again = [torch.cat((ids, text.tokens[None], ids), dim=1) for ids, text in zip(prompts, alone, strict=True)]
    again_alone = [_exactly(link, model, ids, tokens) for ids in again]
    with drafting(model, NgramDraft(FixedLength(EXACT_DRAFT))) as draft:
        drafts = [_exactly(link, model, ids, tokens) for ids in again]
    replayed_before = link.span.caches.replayed
    replayed = [_exactly(link, model, ids, tokens, streamer=_Cuts(link)) for ids in prompts]
    replayed_positions = link.span.caches.replayed - replayed_before
    calls_before = link.traffic.calls
    with _others_decoding(cloud, others):
        among_eight, shared = among_others(
            partial(_exactly, link, model, tokens=tokens), lambda: _shared_calls(cloud), prompts, alone
        )
    calls = link.traffic.calls - calls_before
    equal = {"among_eight": among_eight, "drafts": _same(drafts, again_alone), "replay": _same(replayed, alone)}
    counts = {"accepted": draft.statistics.accepted, "replayed": replayed_positions}
    of_prompts = {f"shared_calls of prompt {number}": each for number, each in enumerate(shared, 1)}
    check_counts(equal, {**of_prompts, **counts})
    return {
        **equal,
        "calls_per_pass": cloud.status()["calls_per_pass"],
        "shared_calls": sum(shared),
        "calls": calls,
        **counts,
    }


def among_others(
    generate: Callable[[Tensor], Text],
    shared_calls: Callable[[], int],
    prompts: Sequence[Tensor],
    alone: Sequence[Text],
) -> tuple[bool, list[int]]:
    """Generate each prompt's text while others decode, until it has shared a pass, or differs, or often enough.

    Args:
        generate: Generates the text of a prompt.
        shared_calls: How many calls have shared a pass so far.
        alone: What was generated of each prompt alone.

    Returns:
        Whether all logits are the same, and the shared calls of each prompt, up to one that differs.
    """
    shared = []
    for ids, expected in zip(prompts, alone, strict=True):
        before = shared_calls()
        for _ in range(AMONG_ROUNDS):
            same = _same([generate(ids)], [expected])
            found = shared_calls() - before
            if found or not same:
                break
        shared.append(found)
        if not same:
            return False, shared
    return True, shared


def _same(texts: Sequence[Text], others: Sequence[Text]) -> bool:
    return all(torch.equal(one.logits, other.logits) for one, other in zip(texts, others, strict=True))


def _shared_calls(cloud: LocalCloud) -> int:
    """Calls of the compared session that have shared a pass with another one; its tenant has no other session."""
    found: int = cloud.status()["shared_calls"].get("edge", 0)  # as `LocalCloud` enrols it
    return found


def check_counts(equal: Mapping[str, bool], counts: Mapping[str, int]) -> None:
    """Make sure that what was compared has happened. Raises IsthmusError where all is equal, and a count is 0."""
    for name, count in counts.items():
        if not count and all(equal.values()):
            raise IsthmusError(f"exact texts were compared, and {name} is 0, so this shows nothing: give more --tokens")


@contextmanager
def _others_decoding(cloud: LocalCloud, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Let other edges decode exactly meanwhile, again and again, one from each prompt.

    Each has had its first text when this begins. Raises IsthmusError at the end where an edge has failed.
    """
    over = threading.Event()

    def decode(process: TaskProcess, ids: Sequence[int]) -> None:
        process.ask({"ids": list(ids), "tokens": 16, "exact": True})

    def drive(process: TaskProcess, ids: Sequence[int]) -> None:
        while not over.is_set():
            decode(process, ids)

    with ExitStack() as stack, ThreadPoolExecutor(len(prompts)) as pool:
        edges = list(_edges(cloud, len(prompts), stack))
        for _ in pool.map(decode, edges, prompts):
            pass
        driven = [pool.submit(drive, edge, ids) for edge, ids in zip(edges, prompts, strict=True)]
        try:
            yield
        finally:
            over.set()
        for each in driven:
            each.result()


def _edges(cloud: LocalCloud, count: int, stack: ExitStack) -> Iterator[TaskProcess]:
    """Edges in processes of their own, all ready."""
    processes = []
    for number in range(count):
        key = cloud.edge_key.parent / f"edge-{number}"
        if not key.exists():
            cloud.enroll(f"edge-{number}", key)
        task = {"connection": cloud.connection, "key": str(key)}
        processes.append(stack.enter_context(TaskProcess(f"edge {number}", MODULE, task, threads=1)))
    for process in processes:
        process.answer()
        yield process


def _many_edges(settings: GenerateSettings, folder: Path, gain: float) -> dict[str, float]:
    """Eight edges one after another, and all at a time; in turns. Each has a prompt of its own."""
    questions = [
        {"ids": list(range(5 + number, 37 + number)), "tokens": settings.tokens, "exact": False}
        for number in range(len(CONTEXTS))
    ]
    with LocalCloud(folder, settings.model, *settings.cloud_options()) as cloud, ExitStack() as stack:
        edges = list(_edges(cloud, len(CONTEXTS), stack))
        ratios, shares = [], []
        with stderr_progress("turns of eight edges", settings.turns + 1) as advance:
            for turn in range(settings.turns + 1):
                begun = time.perf_counter()
                answers = [edge.ask(question) for edge, question in zip(edges, questions, strict=True)]
                serial = time.perf_counter() - begun
                begun = time.perf_counter()
                for edge, question in zip(edges, questions, strict=True):
                    edge.send(question)
                for edge in edges:
                    edge.answer()
                together = time.perf_counter() - begun
                if turn:
                    ratios.append(serial / together)
                    shares.append(sum(each["cpu_s"] for each in answers) / serial)
                advance()
    share = statistics.median(shares)
    return {
        "batched_over_serial": statistics.median(ratios),
        "edge_share": share,
        "batched_bound": 1 / (share + (1 - share) / gain),
    }

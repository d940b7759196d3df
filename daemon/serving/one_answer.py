"""One answer to one prompt: its tokens, its text, how likely they were, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from isthmus.backbone.adapters.adapter_files import adapter_method
from isthmus.backbone.families import family_of
from isthmus.common.errors import ConfigError
from isthmus.daemon.serving.answer_forms import Piece, Sampling, TokenChance
from isthmus.daemon.serving.answer_text import StopTexts, StopTokens, TextDecoder
from isthmus.daemon.serving.served_cloud import EdgeParts
from isthmus.daemon.serving.token_chances import TokenSampler, TokenTexts
from isthmus.edge.client.link import Link
from isthmus.edge.client.remote_span import RemoteSpan
from isthmus.edge.config.adapter_config import Sites, sites_at
from isthmus.edge.config.client_config import GenerateConfig
from isthmus.edge.drafts.candidates import Draft, drafting
from isthmus.edge.generation.text_generator import TextGenerator

MOST_PROMPT_LOGITS = 1 << 29
"""Logits (tokens times the vocabulary) of a prompt whose tokens' log probabilities are wanted; 2 GiB."""


class AnswerWriter(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """transformers asks it after each token whether the answer ends; it sends a piece for each new one.

    Args:
        prompt_tokens: How many the prompt has.
        prompt_chances: How likely they were, where that is wanted.
        sampling: What is wanted.
        tokenizer: The model's.
        texts: The bytes of its tokens.
        ends: The model's own tokens that end a text.
        most: New tokens at most.
        send: Takes the pieces.
        cancelled: Returns whether nobody waits for the answer any more.

    Attributes:
        logits: The model's own for the next token, `[1, V]`; set before each token where `sampling.logprobs`.
    """

    def __init__(
        self,
        prompt_tokens: int,
        prompt_chances: Sequence[TokenChance | None],
        sampling: Sampling,
        tokenizer: Any,
        texts: TokenTexts,
        ends: frozenset[int],
        most: int,
        send: Callable[[Piece], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.logits: Tensor | None = None
        self._sampling, self._texts, self._ends, self._most = sampling, texts, ends, most
        self._send, self._cancelled = send, cancelled
        self._decoder = TextDecoder(tokenizer)
        self._stop_texts, self._stop_tokens = StopTexts(sampling.stop), StopTokens(sampling.stop_tokens)
        self._prompt_tokens, self._prompt_chances = prompt_tokens, prompt_chances
        self._count = 0
        self._ended = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether the text of these tokens, `[1, S]`, is finished, `[1]`. With a draft, several may be new."""
        for token in input_ids[0, self._prompt_tokens + self._count :].tolist():
            if not self._ended:  # what follows the end is no part of the answer
                self._take(token)
        return torch.tensor([self._ended or self._cancelled()], device=input_ids.device)

    def _take(self, token: int) -> None:
        self._count += 1
        text = self._stop_texts.push(self._decoder.push(token))
        finish = None
        if token in self._ends or self._stop_tokens.push(token):
            finish = "stop"
        elif self._count == self._most:
            finish = "length"
        if finish is not None:
            text += self._stop_texts.push(self._decoder.end())
            text += self._stop_texts.end()
        if self._stop_texts.found:
            finish = "stop"
        self._ended = finish is not None
        piece = Piece(0, text, [token], self._chances(token), finish)
        if self._count == 1:
            piece = replace(piece, prompt_tokens=self._prompt_tokens, prompt_chances=self._prompt_chances)
        self._send(piece)

    def _chances(self, token: int) -> list[TokenChance]:
        if not self._sampling.logprobs or self.logits is None:
            return []
        return self._texts.chances(self.logits, torch.tensor([token]), self._sampling.top_logprobs)


def prompt_ids(parts: EdgeParts, prompt: dict[str, Any]) -> list[int]:
    """The tokens of a prompt (`isthmus.daemon.serving.answer_forms.prompt_tree`).

    Raises:
        ConfigError: There are none, or one is none of the model's, or they leave no room for an answer.
        IsthmusError: The chat template refuses the messages, of whatever kind fits.
    """
    if "tokens" in prompt:
        ids = [int(token) for token in prompt["tokens"]]
        most = parts.model.config.vocab_size
        wrong = next((token for token in ids if not 0 <= token < most), None)
        if wrong is not None:
            raise ConfigError(f"the prompt has the token {wrong}: {parts.info.model} has 0 to {most - 1}")
    else:
        templated = "messages" in prompt
        text = parts.render(prompt["messages"]) if templated else prompt["text"]
        ids = parts.tokenizer(text, add_special_tokens=not templated)["input_ids"]
    if not ids:
        raise ConfigError("the prompt is empty: give some text to continue")
    longest = parts.model.isthmus_longest
    if len(ids) >= longest:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, and {parts.info.model} takes {longest} with the answer: shorten it"
        )
    return ids


def write_answer(
    model: Any,
    link: Link,
    parts: EdgeParts,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    adapter: Path | None = None,
    leased: Sites = "none",
    draft: Draft | None = None,
    send: Callable[[Piece], None],
    cancelled: Callable[[], bool],
) -> None:
    """Generate one answer.

    Args:
        model: With its adapter, for this answer alone.
        link: What the cloud's layers are computed over.
        ids: The prompt's tokens, fewer than the model takes.
        adapter: The model's adapter's folder.
        leased: Layers of the cloud whose adapters are leased to it; see `GenerationConfig.leased`.
        draft: What drafts; used where it changes nothing that is asked for.
        send: Takes the pieces.
        cancelled: Whether nobody waits for the answer any more; it ends at its next token then.

    Raises:
        IsthmusError: Of whatever kind fits.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_leased = sites_at(leased, family_of(base.config).layers_path, link.plan, "leased")
    base.remote_layers.span = RemoteSpan(link.span, leased=is_leased)
    cache = _keeps_cache(base, adapter, leased=leased != "none")
    generator = TextGenerator(model, parts.tokenizer, GenerateConfig(cloud="-", cache=cache))
    chances = _prompt_chances(model, parts, ids, sampling.top_logprobs) if sampling.prompt_logprobs else []
    room = parts.model.isthmus_longest - len(ids) - _learned_tokens(model)
    if room < 1:
        raise ConfigError(f"the prompt's {len(ids)} tokens and the adapter's leave no room for an answer: shorten it")
    most = min(room, sampling.max_tokens or room)
    ends = model.generation_config.eos_token_id
    ends = frozenset(ends if isinstance(ends, list) else [ends])
    writer = AnswerWriter(len(ids), chances, sampling, parts.tokenizer, parts.texts, ends, most, send, cancelled)
    options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([writer])}
    if sampling.temperature > 0:
        options["logits_processor"] = LogitsProcessorList([TokenSampler(sampling)])
    with ExitStack() as stack:
        if sampling.logprobs:
            stack.enter_context(_raw_logits(base, writer))
        elif draft is not None and generator.keeps_cache and (sampling.temperature == 0 or sampling.seed is None):
            stack.enter_context(drafting(model, draft))
            options = {"stopping_criteria": options["stopping_criteria"], **_drafted_options(sampling)}
        generator.generate([list(ids)], max_new_tokens=most, options=options)


def _drafted_options(sampling: Sampling) -> dict[str, Any]:
    """transformers verifies a sampled draft with its own sampling, whose source of chance all answers share."""
    if sampling.temperature == 0:
        return {}
    return {
        "do_sample": True,
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "top_k": sampling.top_k or 0,
    }


def _learned_tokens(model: Any) -> int:
    """Positions that a learned prompt takes."""
    peft_config: Any = getattr(model, "active_peft_config", None)
    return int(peft_config.num_virtual_tokens) if getattr(peft_config, "is_prompt_learning", False) else 0


def _keeps_cache(base: Any, adapter: Path | None, *, leased: bool) -> bool:
    """Whether the cloud's layers can keep a cache: not of adapters inside them that are not leased."""
    if adapter is not None and adapter_method(adapter) == "ladder":
        return False
    return leased or not any(True for _ in base.find_sites())


@contextmanager
def _raw_logits(base: Any, writer: AnswerWriter) -> Iterator[None]:
    """Let the writer see the model's own logits, before anything is done with them."""

    def keep(_model: Any, _args: Any, output: Any) -> None:
        writer.logits = output.logits[:, -1].float()

    hook = base.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def _prompt_chances(model: Any, parts: EdgeParts, ids: Sequence[int], top: int) -> list[TokenChance | None]:
    """How likely the prompt's tokens are, by one forward; None for the first one."""
    most = MOST_PROMPT_LOGITS // parts.model.config.vocab_size
    if len(ids) > most:
        raise ConfigError(f"log probabilities of {len(ids)} prompt tokens are wanted, {most} are the most: shorten it")
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, -len(ids) :]
    return [None, *parts.texts.chances(logits[:-1], tokens[0, 1:], top)]

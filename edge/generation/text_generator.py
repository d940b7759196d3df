"""A model, its tokenizer and the settings of `isthmus edge generate`: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from isthmus.backbone.split.span import DTYPES
from isthmus.common.errors import ConfigError
from isthmus.common.shutdown import StopRequest
from isthmus.edge.client.adapted_model import load_adapted
from isthmus.edge.client.link import Link
from isthmus.edge.config.client_config import GenerateConfig, GenerationConfig
from isthmus.edge.drafts.candidates import Draft, drafting
from isthmus.edge.drafts.emulator_draft import EmulatorDraft
from isthmus.edge.drafts.ngram_draft import NgramDraft
from isthmus.edge.drafts.tuned_draft import tuned_beside
from isthmus.edge.generation.exact import exact_decoding
from isthmus.edge.generation.text_writer import TextWriter
from isthmus.protocol.secure.keys import Fingerprint

Ids = Sequence[int]
_SEEDS = 2**63


class StopAsked(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Ends an answer at its next token once somebody has asked for that.

    Args:
        request: Knows whether somebody has.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        """Whether each text is finished, `[B]`."""
        return torch.full((len(input_ids),), self._request.requested, device=input_ids.device)


class TextGenerator:
    """Generates as the settings say. Made by `text_generator`.

    Attributes:
        model: The split model, with its adapter.
        tokenizer: Its tokenizer.
        settings: Of the command.
        longest: Token positions that the model is made for.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: GenerateConfig) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.longest: int = base.isthmus_longest

    @property
    def keeps_cache(self) -> bool:
        """Whether there is a cache to go on with; a learned prompt has none."""
        peft_config = getattr(self.model, "active_peft_config", None)
        return self.settings.cache and not getattr(peft_config, "is_prompt_learning", False)

    def ids(self, text: str, *, templated: bool) -> list[int]:
        """The tokens of a prompt; a chat template has put special tokens into a text that is `templated`.

        Raises:
            ConfigError: There are none.
        """
        found: list[int] = self.tokenizer(text, add_special_tokens=not templated)["input_ids"]
        if not found:
            raise ConfigError("the prompt is empty: give some text to continue")
        return found

    def text(self, ids: Ids) -> str:
        """The text of generated tokens, without special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def seed(self, offset: int = 0) -> None:
        """Let sampling begin at the seed of the settings, moved by `offset`; by default at another one each time."""
        if self.settings.seed is None:
            torch.seed()
        else:
            torch.manual_seed((self.settings.seed + offset) % _SEEDS)

    def generate(
        self,
        prompts: Sequence[Ids],
        *,
        max_new_tokens: int | None = None,
        writer: TextWriter | None = None,
        stop: StopRequest | None = None,
        cache: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """Continue prompts; they are padded on the left.

        Args:
            prompts: Tokens of each.
            max_new_tokens: At most; None for that of the settings.
            writer: Gets the tokens of a single prompt as they come.
            stop: Ends the answers early.
            cache: transformers' `DynamicCache`, with what a single prompt begins with in it; None for a new one.
            options: Of transformers' `generate`, in the place of those that the settings lead to.

        Returns:
            The new tokens of each, with the one that ends a text.

        Raises:
            IsthmusError: Of whatever kind fits.
        """
        pad = self.tokenizer.pad_token_id
        width = max(map(len, prompts))
        inputs = torch.full((len(prompts), width), 0 if pad is None else pad)
        mask = torch.zeros_like(inputs)
        for row, prompt in enumerate(prompts):
            inputs[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        given = self._sampling()
        if not self.settings.cache:
            given["use_cache"] = False
        if cache is not None:
            given["cache"] = cache
        if stop is not None:
            given["stopping_criteria"] = StoppingCriteriaList([StopAsked(stop)])
        try:
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=inputs,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens or self.settings.max_new_tokens,
                    pad_token_id=pad,
                    streamer=writer,
                    **{**given, **(options or {})},
                )
        except BaseException:
            if writer is not None:
                writer.end()  # what is said next begins on a line of its own
            raise
        return [self._ended(row) for row in output[:, width:].tolist()]

    def _sampling(self) -> dict[str, Any]:
        settings = self.settings
        if settings.temperature == 0:
            return {"do_sample": False}
        top_p = {} if settings.top_p is None else {"top_p": settings.top_p}
        return {"do_sample": True, "temperature": settings.temperature, **top_p}

    def _ended(self, row: list[int]) -> list[int]:
        """A row without the padding behind the token that ends it."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        length = next((at for at, token in enumerate(row, 1) if token in ends), len(row))
        return row[:length]


@contextmanager
def text_generator(link: Link, settings: GenerateConfig, adapter: Path | None) -> Iterator[TextGenerator]:
    """What generates over a link, with an adapter if one is named.

    Raises:
        IsthmusError: Of whatever kind fits.
    """
    tokenizer = link.load_tokenizer()
    model = load_adapted(link, adapter, plugged=settings.plugged, leased=settings.leased).eval()
    with ExitStack() as stack:
        if settings.draft != "none":  # before the model is exact, which its copy in the draft need not be
            stack.enter_context(drafting(model, draft_of(settings, model, adapter, signer=link.pin)))
        if settings.exact:
            stack.enter_context(exact_decoding(link, model))
        yield TextGenerator(model, tokenizer, settings)


def draft_of(settings: GenerationConfig, model: Any, adapter: Path | None, *, signer: Fingerprint | None) -> Draft:
    """What `--draft` names, tuned as the adapter's run has left it, if it has.

    Args:
        settings: Its `draft` is not `none`.
        model: The split model that it drafts for, or a PEFT model around it.
        adapter: The adapter's folder; None for the draft as the package has it.
        signer: Fingerprint of the root key that must have certified the package's signer; None for any.

    Raises:
        CheckpointError: The tuned draft is damaged.
        PackageError: It is the folder of no package, or of one for another model, or not the one that was tuned.
        SignerError: It is not signed, or by somebody else.
    """
    if settings.draft == "ngram":
        return NgramDraft()
    dtype = DTYPES[settings.draft_dtype]
    return EmulatorDraft.open(Path(settings.draft), model, signer=signer, tuned=tuned_beside(adapter), dtype=dtype)

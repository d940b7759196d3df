"""Generation of a cut model: transformers' own, with a cache on both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn

from isthmus.backbone.split.split_cache import CachingSpan, RemoteCache
from isthmus.common.errors import UnsupportedCallError

# Options of generate() that would compute something else than with the whole model, or use the cloud's layers in a way
# that a request cannot.
_NOT_SPLIT: dict[str, Callable[[Any], bool]] = {
    "cache_implementation": lambda value: value not in (None, "dynamic"),
    "assistant_early_exit": bool,  # runs the first layers alone as a draft
    "use_mtp": bool,
    "speculation_type": bool,
    "penalty_alpha": bool,  # contrastive search
    "dola_layers": bool,
    "custom_generate": bool,
}

# Options of generate() whose text would be another one with drafts.
_NOT_DRAFTED: dict[str, Callable[[Any], bool]] = {
    "stop_strings": bool,  # looked for once a round, at the very end of the text
    "guidance_scale": lambda value: value not in (None, 1),  # remembers each token that it was asked about
    "watermarking_config": bool,  # the same
    "assistant_ensemble_weight": lambda value: value is not None,  # mixes the draft into the distribution
}


@dataclass(frozen=True, slots=True)
class DraftedText:
    """What a draft is told of a text that begins.

    Attributes:
        prompt: Its tokens so far, `[1, S]`.
        attention_mask: `[1, S]`, 0 for padding; None for no padding.
        processors: transformers' logits processors: `(tokens [1, n], logits [1, V]) -> logits [1, V]`.
        sampling: Whether tokens are sampled; else each is the likeliest.
        ends: Tokens that end the text.
        longest: Token positions that the text may have at most.
    """

    prompt: Tensor
    attention_mask: Tensor | None
    processors: Any
    sampling: bool
    ends: frozenset[int]
    longest: int


class DraftSource(Protocol):
    """Makes drafts on the edge."""

    def begin(self, text: DraftedText) -> Any:
        """A candidate generator of transformers for a text."""


class CachedGeneration:
    """The part of the edge's model that generates.

    Attributes:
        isthmus_exact: Whether each token is to have the same bits with and without drafts.
        isthmus_draft: What drafts the next tokens, so that one round trip verifies several; None for no drafts. See
            `isthmus.edge.drafts`.
        isthmus_longest: Token positions of a sequence that the whole model is made for.
    """

    isthmus_exact: bool = False
    isthmus_draft: DraftSource | None = None
    isthmus_longest: int

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with a cache on both sides: each new token runs through the layers alone.

        With `use_cache=False`, with a learned prompt, or where the span keeps no cache, each new token runs the whole
        sequence through it.

        Raises:
            UnsupportedCallError: an option would compute something else than with the whole model.
        """
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        config = cast(Any, self).generation_config if given is None else given

        def asked(name: str) -> Any:
            return kwargs.get(name, getattr(config, name, None))

        for name, refused in _NOT_SPLIT.items():
            if refused(asked(name)):
                raise UnsupportedCallError(f"generate({name}=…) does not work on a split model; leave it out")
        others = asked("assistant_model") or asked("prompt_lookup_num_tokens")
        drafted = others or self.isthmus_draft is not None
        if others and self.isthmus_draft is not None:
            raise UnsupportedCallError(
                "the model has a draft: leave out assistant_model and prompt_lookup_num_tokens, or drafting()"
            )
        if drafted and (asked("num_beams") or 1) > 1:
            raise UnsupportedCallError("beams cannot be assisted: leave out num_beams, or the drafts")
        if drafted and (asked("num_return_sequences") or 1) > 1:
            raise UnsupportedCallError("drafts are for one text at a time: leave out num_return_sequences, or them")
        for name, refused in _NOT_DRAFTED.items():
            if drafted and refused(asked(name)):
                raise UnsupportedCallError(f"generate({name}=…) does not work with drafts; leave out one of the two")
        use_cache = asked("use_cache")
        if self._has_learned_prompt():
            if kwargs.get("use_cache"):
                raise UnsupportedCallError("a learned prompt has no key-value cache: pass use_cache=False (--no-cache)")
            use_cache = False
        if use_cache is None:
            use_cache = isinstance(cast(Any, self).remote_layers.span, CachingSpan)
        if not use_cache and drafted:
            raise UnsupportedCallError("drafts need a key-value cache, and there is none here: leave them out")
        options = {"use_cache": use_cache}
        if self.isthmus_draft is not None:
            options["prompt_lookup_num_tokens"] = 1  # lets transformers ask for a candidate generator
        return cast(Any, super()).generate(*args, **{**kwargs, **options})

    def _has_learned_prompt(self) -> bool:
        """Whether PEFT puts a learned prompt before the text, which it does at every token where there is a cache.

        PEFT looks for the cache under the name that transformers has given up (`past_key_values`).
        """
        prepares = getattr(cast(Any, self).prepare_inputs_for_generation, "__self__", None)
        peft_config = getattr(prepares, "active_peft_config", None)
        return bool(getattr(peft_config, "is_prompt_learning", False))

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        """transformers' hook: what makes drafts."""
        if self.isthmus_draft is None:
            drafts = cast(Any, super())._get_candidate_generator(**kwargs)
        else:
            drafts = self.isthmus_draft.begin(self._drafted_text(**kwargs))
        return AfterPrompt(drafts) if self.isthmus_exact else drafts

    def _drafted_text(
        self, *, input_ids: Tensor, generation_config: Any, logits_processor: Any, model_kwargs: Any, **_: Any
    ) -> DraftedText:
        if len(input_ids) != 1:
            raise UnsupportedCallError(f"drafts are for one text at a time, not for {len(input_ids)}: leave them out")
        ends: Tensor | None = generation_config._eos_token_tensor
        return DraftedText(
            input_ids,
            model_kwargs.get("attention_mask"),
            logits_processor,
            bool(generation_config.do_sample),
            frozenset() if ends is None else frozenset(ends.flatten().tolist()),
            min(int(generation_config.max_length), self.isthmus_longest),
        )

    def check_version(self, remote: RemoteCache) -> None:
        """Make sure that a cache was filled with the adapters as they are now.

        Raises:
            UnsupportedCallError: It was not.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer  # which takes seconds to import

        model = cast(nn.Module, self)
        weights = [(id(each), each._version) for each in model.parameters() if not each.is_inference()]
        switched = [
            (tuple(layer.active_adapters), layer.disable_adapters, layer.merged)
            for layer in model.modules()
            if isinstance(layer, BaseTunerLayer)
        ]
        version = (weights, switched)
        if not remote.length:
            remote.version = version
        elif remote.version != version:
            raise UnsupportedCallError(
                "the weights or adapters have changed since this cache was filled: begin a new one"
            )


class AfterPrompt:
    """Drafts from the second token on, so that a prompt attends as the same block with and without them.

    Args:
        drafts: transformers' candidate generator.
    """

    def __init__(self, drafts: Any) -> None:
        self._drafts = drafts
        self._first = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafts, name)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The text with a draft behind it, and the draft's logits."""
        if self._first:
            self._first = False
            return input_ids, None
        found: tuple[Tensor, Tensor | None] = self._drafts.get_candidates(input_ids, **kwargs)
        return found

"""Generation of a cut model: transformers' own, with a cache on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

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


class CachedGeneration:
    """The part of the edge's model that generates.

    Attributes:
        isthmus_exact: Whether each token is to have the same bits with and without drafts.
    """

    isthmus_exact: bool = False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with a cache on both sides: each new token runs through the layers alone.

        With `use_cache=False`, with a learned prompt, or where the span keeps no cache, each new token runs the whole
        sequence through it.

        Raises:
            UnsupportedCallError: an option would compute something else than with the whole model.
        """
        config = kwargs.get("generation_config", cast(Any, self).generation_config)

        def asked(name: str) -> Any:
            return kwargs.get(name, getattr(config, name, None))

        for name, refused in _NOT_SPLIT.items():
            if refused(asked(name)):
                raise UnsupportedCallError(f"generate({name}=…) does not work on a split model; leave it out")
        if (asked("num_beams") or 1) > 1 and (asked("assistant_model") or asked("prompt_lookup_num_tokens")):
            raise UnsupportedCallError("beams cannot be assisted: leave out num_beams, or the drafts")
        use_cache = asked("use_cache")
        if self._has_learned_prompt():
            if kwargs.get("use_cache"):
                raise UnsupportedCallError("a learned prompt has no key-value cache: pass use_cache=False (--no-cache)")
            use_cache = False
        if use_cache is None:
            use_cache = isinstance(cast(Any, self).remote_layers.span, CachingSpan)
        if not use_cache and (asked("assistant_model") or asked("prompt_lookup_num_tokens")):
            raise UnsupportedCallError("drafts need a key-value cache, and there is none here: leave them out")
        return cast(Any, super()).generate(*args, **{**kwargs, "use_cache": use_cache})

    def _has_learned_prompt(self) -> bool:
        """Whether PEFT puts a learned prompt before the text, which it does at every token where there is a cache.

        PEFT looks for the cache under the name that transformers has given up (`past_key_values`).
        """
        prepares = getattr(cast(Any, self).prepare_inputs_for_generation, "__self__", None)
        peft_config = getattr(prepares, "active_peft_config", None)
        return bool(getattr(peft_config, "is_prompt_learning", False))

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' hook: what makes drafts."""
        drafts = cast(Any, super())._get_candidate_generator(*args, **kwargs)
        return AfterPrompt(drafts) if self.isthmus_exact else drafts

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

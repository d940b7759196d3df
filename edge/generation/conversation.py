"""Turns of a chat. A turn goes on with the cache of the one before, as far as its tokens are the same."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from isthmus.backbone.checkpoints.chat_template import ChatTemplate
from isthmus.common.errors import ConfigError
from isthmus.common.shutdown import StopRequest
from isthmus.edge.generation.text_generator import Ids, TextGenerator
from isthmus.edge.generation.text_writer import TextWriter


class Conversation:
    """A chat with the model.

    Args:
        generator: What answers.
        template: The model's chat template.

    Attributes:
        messages: What was said so far, with `role` and `content`.
    """

    def __init__(self, generator: TextGenerator, template: ChatTemplate) -> None:
        self.messages: list[dict[str, str]] = []
        self._generator, self._template = generator, template
        self._cache: Any = None
        self._cached: list[int] = []  # the tokens in it

    def answer(self, text: str, *, writer: TextWriter | None = None, stop: StopRequest | None = None) -> str:
        """The model's answer to the next message of the user; with `stop`, as far as it has come then.

        Raises:
            ConfigError: The conversation is longer than the model takes.
            IsthmusError: Of whatever other kind fits.
        """
        generator = self._generator
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = generator.ids(self._template.render(messages, add_generation_prompt=True), templated=True)
        room = generator.longest - len(ids)
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(ids)} tokens, and the model takes {generator.longest}: begin a new one"
            )
        cache = self._resumed(ids) if generator.keeps_cache else None
        self._cache = None  # until it is known what is in it
        most = min(room, generator.settings.max_new_tokens)
        (new,) = generator.generate([ids], max_new_tokens=most, writer=writer, stop=stop, cache=cache)
        if cache is not None:
            self._cache, self._cached = cache, [*ids, *new][: cache.get_seq_length()]
        answer = generator.text(new)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _resumed(self, ids: Ids) -> Any:
        """A cache with the first of these tokens, and not with the last one, whose output is needed."""
        pairs = zip(self._cached, ids[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        surplus = len(self._cached) - same
        cache = self._cache
        if cache is None or (surplus and any(map(_is_full, cache.layers))):
            return DynamicCache(config=self._generator.model.config)
        if surplus:
            cache.crop(-surplus)
        return cache


def _is_full(layer: Any) -> bool:
    """Whether a layer of a cache has dropped positions, so that it cannot be cropped."""
    return isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window

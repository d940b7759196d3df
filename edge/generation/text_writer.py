"""Writes an answer while it is generated."""

from __future__ import annotations

from typing import Any, TextIO

from transformers import TextStreamer

from isthmus.common.terminal import shown


class TextWriter(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """transformers' streamer of text, without the prompt and special tokens; a terminal gets plain text.

    Args:
        tokenizer: The model's.
        stream: Where the text goes.
    """

    def __init__(self, tokenizer: Any, stream: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the next piece of text, and a line feed behind the last one."""
        self._stream.write(shown(text, self._stream) + "\n" * stream_end)
        self._stream.flush()

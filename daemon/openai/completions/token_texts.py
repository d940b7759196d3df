"""The texts of single tokens."""

from __future__ import annotations


def token_text(text: str, raw: bytes) -> str:
    r"""A token's text; "bytes:\xe2\x82" where its bytes are no whole characters.

    Args:
        text: As the tokenizer writes it.
        raw: Its bytes; none for a token that stands for no text, such as one that ends an answer.
    """
    if not raw:
        return text
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

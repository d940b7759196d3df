"""A text that is written as it comes is the text that is decoded at the end."""

from __future__ import annotations

import io
import os
import pty

import torch
from hypothesis import given, strategies as st
from support.models.tiny import VOCAB, tiny_tokenizer

from isthmus.edge.generation.text_generator import TextGenerator
from isthmus.edge.generation.text_writer import TextWriter

ATTACK = "hello\n\t\x1b]52;c;Y3VybA==\x07\x1b]0;title\x07world"


class Pieces(io.StringIO):
    """Keeps what is written, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def written(ids: list[int], out: io.TextIOBase) -> None:
    writer = TextWriter(tiny_tokenizer(), out)  # type: ignore[arg-type]  # typeshed's TextIO is no base of these
    writer.put(torch.tensor([[5, 6, 7]]))  # the prompt, which is not written
    for token in ids:
        writer.put(torch.tensor([token]))
    writer.end()


@given(st.lists(st.integers(0, VOCAB - 1), max_size=40))
def test_any_tokens(ids: list[int]) -> None:
    out = io.StringIO()
    written(ids, out)
    assert out.getvalue() == tiny_tokenizer().decode(ids, skip_special_tokens=True) + "\n"


def test_text_of_several_scripts_comes_in_pieces() -> None:
    text, out = "Zwölf Boxkämpfer\njagen 漢字 durch, שלום. ", Pieces()
    written(tiny_tokenizer()(text)["input_ids"], out)
    assert out.getvalue() == text + "\n"
    assert len([piece for piece in out.pieces if piece]) > 20


def test_a_terminal_gets_plain_text_and_a_pipe_the_text_as_it_is() -> None:
    ids, pipe = tiny_tokenizer()(ATTACK)["input_ids"], io.StringIO()
    written(ids, pipe)
    assert pipe.getvalue() == ATTACK + "\n"
    ours, theirs = pty.openpty()
    got = ""
    with open(theirs, "w") as terminal:  # noqa: PTH123  # a descriptor
        written(ids, terminal)
        while got.count("\n") < 2:  # the kernel hands on what was written when it likes
            got += os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "hello" in got
    assert "world" in got
    assert "\x1b" not in got
    assert "\x07" not in got


def test_the_streamed_text_is_the_generated_one(generator: TextGenerator) -> None:
    prompt, out = generator.ids("Once", templated=False), Pieces()
    (streamed,) = generator.generate([prompt], writer=TextWriter(generator.tokenizer, out))
    (ids,) = generator.generate([prompt])
    assert streamed == ids
    assert out.getvalue() == generator.text(ids) + "\n"
    assert len([piece for piece in out.pieces if piece]) == len(ids) + 1
    (other,) = generator.generate([generator.ids("Twice", templated=False)])
    assert generator.text(other) != generator.text(ids)

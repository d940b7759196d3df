"""What generation lets a tenant ask for: done by hand against a running cloud.

many_caches     every cache that a session has, one after the other, each as long as the cloud takes
long_prompt     the longest prompt, over and over, which is never gone on with
wild_rows       as many sequences as fit, whose caches are copied in another order at every token, and never cropped
single_tokens   exact calls of the longest prompt, where each token attends by itself
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from isthmus.experiments.rigs.hostile_tenants import Session, during
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Role, codec_id, encode

LONGEST = m.MAX_BLOCKS
"""Positions of a prompt that are tried first; half of what is refused, and so on. An exact call of single tokens may
have no more, and they are what a cloud takes in one call by default (`--max-tokens`)."""
SEQUENCES = 32
"""Many, as each token copies the keys and values of all of them; and no more than leave room for tokens: prompts of 128
positions take 156 MiB in SmolLM2-135M's 26 layers, of the 256 MiB for caches that `bench abuse` gives a cloud."""
ANSWER_SECONDS = 240.0
"""To wait for an answer: one core needs minutes for the longest prompt, and who gives it up has filled no cache."""


def call(
    session: Session,
    number: int,
    *,
    cache: int = 0,
    start: int = 0,
    batch: int = 1,
    length: int = 1,
    rows: Sequence[int] = (),
    exact: bool = False,
) -> m.Decode:
    """A decode call of zeros, `[batch, length, hidden_size]`."""
    hidden = encode(torch.zeros(batch, length, session.info.hidden_size), "fp16", Role.ACTIVATION)
    blocks = (1,) * length if exact else ()
    return m.Decode(m.CallId(1, number), cache, start, tuple(rows), blocks, hidden, None, None, codec_id("fp16"))


def ask(session: Session, message: m.Decode) -> m.Message:
    """The answer to a call."""
    return session.ask(message, ANSWER_SECONDS)


def longest(session: Session, *, batch: int = 1, exact: bool = False) -> tuple[int, m.Message]:
    """The longest prompt that the cloud takes, within a factor of two, and its answer."""
    length = min(LONGEST, session.info.limits.max_tokens_per_call) // batch
    answer = ask(session, call(session, 1, batch=batch, length=length, exact=exact))
    while isinstance(answer, m.Status) and length > 1:
        length //= 2
        answer = ask(session, call(session, 1, batch=batch, length=length, exact=exact))
    return length, answer


def many_caches(session: Session, seconds: float) -> m.Message:
    """Fill every cache of the session."""
    length, answer = longest(session)
    for number in during(seconds):
        answer = ask(session, call(session, 1 + number, cache=number % m.MAX_CACHES, length=length))
    return answer


def long_prompt(session: Session, seconds: float) -> m.Message:
    """The longest prompt, again and again."""
    length, answer = longest(session)
    for number in during(seconds):
        answer = ask(session, call(session, 1 + number, length=length))
    return answer


def wild_rows(session: Session, seconds: float) -> m.Message:
    """Many sequences, in another order at every token."""
    draw = random.Random(0)  # noqa: S311 - no secret
    batch = min(SEQUENCES, session.info.limits.max_tokens_per_call)
    length, answer = longest(session, batch=batch)
    start = length
    for number in during(seconds):
        rows = [draw.randrange(batch) for _ in range(batch)]
        answer = ask(session, call(session, 1 + number, start=start, batch=batch, rows=rows))
        start += isinstance(answer, m.ForwardReply)
        if not isinstance(answer, m.ForwardReply):  # the model's end, or the cache is gone
            start, _ = longest(session, batch=batch)
    return answer


def single_tokens(session: Session, seconds: float) -> m.Message:
    """Exact calls whose tokens attend one by one; fast ones where the cloud does not decode exactly."""
    length, answer = longest(session, exact=True)
    exact = isinstance(answer, m.ForwardReply)
    if not exact:
        length, answer = longest(session)
    for number in during(seconds):
        answer = ask(session, call(session, 1 + number, length=length, exact=exact))
    return answer


DECODE_COSTS: dict[str, Callable[[Session, float], m.Message]] = {
    "many_caches": many_caches,
    "long_prompt": long_prompt,
    "wild_rows": wild_rows,
    "single_tokens": single_tokens,
}

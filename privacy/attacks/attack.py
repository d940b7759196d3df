"""The shape of an attack: what it knows, what it sees, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.common.progress import Progress, unseen
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.recording.traffic import Traffic
from isthmus.protocol.tensor_codecs import Role, decode, encode

UNKNOWN = -1
"""Stands in a guess where there is no token or none is guessed."""


class KnownDefence:
    """What the attacker knows of a defence; as it is here, it changes nothing.

    All but `of_pass` take and give `[batch, sequence, h]`. What is random is drawn anew, from torch's random numbers:
    in each call, or once for a pass (`of_pass`). What the edge itself has drawn is never known.

    Attributes:
        on_embeddings: Whether `embedded` changes anything.
        label_smoothing: Share of the uniform distribution in each label.
        own_share: λ of mixup, the weight of a row's own hidden states and labels; 1 without mixup.
    """

    on_embeddings: bool = False
    label_smoothing: float = 0.0
    own_share: float = 1.0

    def embedded(self, embedded: Tensor) -> Tensor:
        """What the edge would give to its first layer."""
        return embedded

    def send(self, hidden: Tensor) -> Tensor:
        """What the edge would send of hidden states at the cut."""
        return hidden

    def expect(self, hidden: Tensor) -> Tensor:
        """The mean of what the edge would send."""
        return hidden

    def output(self, output: Tensor) -> Tensor:
        """What the edge would make of the span's output before its last layers; gradients flow back through it.

        A denoiser takes the noise on the embeddings, too: in a pass what `embedded` adds there. Outside of a pass the
        noise is drawn anew, and was on no embedding.
        """
        return output

    def expect_output(self, output: Tensor) -> Tensor:
        """The same of an output that the edge was given: the noise is its secret, so it is left out.

        Each position depends on itself alone. Gradients flow back through it.
        """
        return output

    def gradient(self, gradient: Tensor) -> Tensor:
        """What the edge would send of the gradient at the span's output."""
        return gradient

    def of_pass(self, ids: Tensor, real: Tensor, partner: Tensor | None = None) -> KnownDefence:
        """The same defence in one pass of rows: what is drawn once and used in several places is the same in all.

        Args:
            ids: Token ids, `[batch, sequence]`.
            real: Where the rows have tokens, `[batch, sequence]` bool.
            partner: Hidden states `[n, h]` that rows are mixed with; None for those of a text that is drawn.
        """
        return self


class PublicText(NamedTuple):
    """A text that the attacker has run through the front by itself.

    Attributes:
        tokens: `[n]`.
        exact: Hidden states at the cut, `[n, h]`.
        sent: The same as they would come out of the defence and the codec.
    """

    tokens: Tensor
    exact: Tensor
    sent: Tensor


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What an attacker knows before it looks at the traffic.

    Attributes:
        model: A whole transformers model with the frozen weights, fp32.
        tokenizer: Its tokenizer.
        plan: Which layers are the edge's.
        front: The first layers as the attacker believes that the edge runs them.
        public: Tokens of public texts, `[n]` each, none of which is attacked.
        codec: What hidden states are sent in.
        private_front: Whether the edge has tuned its first layers in secret, so that `front` is near them at best.
        known: Tokens `[n]` of texts of which the attacker knows that the edge has sent them, and the hidden states
            `[n, h]` that came.
        defence: What is known of the defence; None for none.
        label_places: Whether it knows which positions have labels, by the form of the data. Then it guesses at
            every position, and guesses where no label stands do not count.
        inverter_steps: Steps that the learned inverter is trained for.
        front_steps: Steps that a private front is fitted for.
        seed: Of whatever is drawn.
        progress: Shows what takes long.
    """

    model: Any
    tokenizer: Any
    plan: SplitPlan
    front: Front
    public: tuple[Tensor, ...]
    codec: str = "fp32"
    private_front: bool = False
    known: tuple[tuple[Tensor, Tensor], ...] = ()
    defence: KnownDefence | None = None
    label_places: bool = False
    inverter_steps: int = 240
    front_steps: int = 300
    seed: int = 0
    progress: Progress = unseen

    def __post_init__(self) -> None:
        if sum(len(tokens) > 1 for tokens in self.public) < 2:
            raise ConfigError(
                f"{len(self.public)} public texts are too few to attack with; give two or more of two tokens or more"
            )

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary."""
        return len(self.front.embedding)

    @cached_property
    def public_texts(self) -> tuple[PublicText, ...]:
        """The public texts of two tokens or more, as the wire would show them. Computed once."""
        texts = []
        for number, tokens in enumerate(self.public):
            if len(tokens) > 1:
                exact = self.front.states(tokens)
                texts.append(PublicText(tokens, exact, self.sent(tokens, exact, number)))
        return tuple(texts)

    @property
    def label_smoothing(self) -> float:
        """Share of the uniform distribution in each label."""
        return 0.0 if self.defence is None else self.defence.label_smoothing

    @property
    def own_share(self) -> float:
        """λ of mixup; 1 without."""
        return 1.0 if self.defence is None else self.defence.own_share

    def expect(self, hidden: Tensor) -> Tensor:
        """What comes of hidden states `[n, h]` on average, `[n, h]`."""
        return hidden if self.defence is None else self.defence.expect(hidden[None])[0]

    def sent(self, tokens: Tensor, exact: Tensor, number: int) -> Tensor:
        """What a cloud would have once an edge had sent a text `[n]`, `[n, h]`; another number draws other noise.

        Args:
            exact: The text's hidden states at the cut, `[n, h]`.
        """
        with self._passing(number) as noisy:
            return self._arrived((self.front.states(tokens) if noisy else exact)[None])[0]

    def sent_alone(self, tokens: Tensor, number: int = 0) -> Tensor:
        """What a cloud would have once an edge had sent each of these tokens `[m]` as a text of its own, `[m, h]`."""
        with self._passing(int(tokens[0]) + number):
            states = self.front.candidates(self.front.begin(), tokens, torch.tensor(0))
            return self._arrived(states[:, None])[:, 0]

    def sent_gradient(self, gradient: Tensor, number: int) -> Tensor:
        """The same of a gradient at the span's output, `[1, n, h]`."""
        with self._passing(number):
            if self.defence is not None:
                gradient = self.defence.gradient(gradient)
        return decode(encode(gradient, self.codec, Role.GRADIENT))

    @contextmanager
    def drawing(self, number: int) -> Iterator[None]:
        """Have torch draw by the seed and a number while the block runs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + number)
            yield

    def _arrived(self, hidden: Tensor) -> Tensor:
        """Hidden states `[batch, n, h]` through defence and codec."""
        sent = hidden if self.defence is None else self.defence.send(hidden)
        return decode(encode(sent, self.codec, Role.ACTIVATION))

    @contextmanager
    def _passing(self, number: int) -> Iterator[bool]:
        """Draw the noise of a pass, that of embeddings in the front; gives whether there is such noise."""
        with self.drawing(number), ExitStack() as noisy:
            if self.defence is not None and self.defence.on_embeddings:
                noisy.enter_context(self.front.changed_embedding(self.defence.embedded))
            yield self.defence is not None and self.defence.on_embeddings

    def with_front(self, front: Front) -> Knowledge:
        """The same with another front."""
        return replace(self, front=front)


@dataclass(frozen=True, slots=True)
class Guess:
    """What an attack makes of the traffic.

    Attributes:
        tokens: One tensor `[sequence]` for each row of each forward, in their order, with `UNKNOWN` where nothing is
            guessed; padding is never guessed.
        listed: For an attack that picks from lists of candidates: by sequence, the chance at each position that the
            list held the right token, by the attacker's own estimate. None for others.
        labels: As `tokens`, for attacks on labels; None for others.
    """

    tokens: tuple[Tensor, ...]
    listed: tuple[Tensor, ...] | None = None
    labels: tuple[Tensor, ...] | None = None


class Attack(Protocol):
    """An attack.

    Attributes:
        name: Its name in tables.
        sees: What of the traffic it uses.
        knows: What else it needs.
    """

    name: ClassVar[str]
    sees: ClassVar[str]
    knows: ClassVar[str]

    def prepare(self, knowledge: Knowledge) -> None:
        """Learn what there is to learn from public texts alone."""

    def run(self, traffic: Traffic) -> Guess:
        """Attack a recording."""


class Row(NamedTuple):
    """One sequence of a forward, without its padding.

    Attributes:
        hidden: What the edge sent, `[n, h]`.
        positions: What the model counts its positions as, `[n]`.
        columns: Where its tokens stand in the padded row, `[n]`.
        length: Positions of the padded row.
    """

    hidden: Tensor
    positions: Tensor
    columns: Tensor
    length: int

    def spread(self, tokens: Tensor) -> Tensor:
        """Guessed tokens `[n]` as a row `[length]` with `UNKNOWN` for padding."""
        row = torch.full((self.length,), UNKNOWN)
        row[self.columns] = tokens
        return row


def rows(traffic: Traffic, front: Front) -> Iterator[Row]:
    """The sequences of a recording, in its order."""
    for forward in traffic.forwards:
        batch, length, _ = forward.hidden.shape
        mask = torch.ones(batch, length, dtype=torch.bool) if forward.mask is None else forward.mask.bool()
        positions = None if forward.positions is None else forward.positions.expand(batch, length)
        for number in range(batch):
            columns = mask[number].nonzero()[:, 0]
            counted = front.counted(columns) if positions is None else positions[number, columns]
            yield Row(forward.hidden[number, columns].float(), counted, columns, length)

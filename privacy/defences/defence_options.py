"""The defences by name: parameters, what each claims, and which do not go together. Loads no torch.

`NAME[:PARAMETER=VALUE,…]` is how `isthmus edge train --defence` and its TOML file write one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class DefenceOptions(BaseModel):
    """The parameters of one defence.

    Attributes:
        name: As options write it.
        claim: What it guarantees formally, in a sentence; it begins with "none" where it guarantees nothing.
        broken_by: The attack that breaks it, for what is here as an example of what does not protect.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    claim: ClassVar[str] = "none"
    broken_by: ClassVar[str | None] = None

    @property
    def trained(self) -> bool:
        """Whether something of it is trained with the adapters."""
        return self.trained_below

    @property
    def trained_below(self) -> bool:
        """Whether that is below the cloud's layers, so that gradients go up."""
        return False

    @property
    def fresh(self) -> bool:
        """Whether one text is sent as something else in each pass, so that whoever sees several can average."""
        return False

    def text(self) -> str:
        """As an option writes it, with every parameter that is set."""
        given = self.model_dump(exclude_none=True)
        words = {name: str(value).lower() if isinstance(value, bool) else value for name, value in given.items()}
        values = ",".join(f"{name}={word}" for name, word in words.items())
        return f"{self.name}:{values}" if values else self.name


class Gaussian(DefenceOptions):
    """See `isthmus.privacy.defences.gaussian_noise`."""

    name = "gaussian"
    claim = "(epsilon, delta)-differential privacy of an example's own messages, see the accountant"

    clip: float = Field(gt=0, description="Largest norm of a token's hidden state; a longer one is scaled down.")
    sigma: float = Field(gt=0, description="Standard deviation of the noise of each number, in units of `clip`.")
    gradient_clip: float | None = Field(None, gt=0, description="The same for a token's gradient.")
    gradient_sigma: float | None = Field(None, gt=0, description="The same for a token's gradient.")
    memo: bool = Field(False, description="Whether a token's hidden state gets the same noise in every pass.")
    delta: float = Field(1e-5, gt=0, lt=1)

    @property
    def fresh(self) -> bool:
        """See `DefenceOptions`."""
        return not self.memo


class EmbeddingNoise(DefenceOptions):
    """See `isthmus.privacy.defences.embedding_noise`."""

    name = "embedding-noise"
    claim = "d_chi-privacy of each token in what goes up forward, with eta for all passes; none where gradients go up"

    eta: float = Field(gt=0, description="Privacy loss per distance between two embeddings; less is more noise.")
    denoise: bool = Field(False, description="Whether the edge learns to take the noise out of what comes back.")

    @property
    def trained(self) -> bool:
        """See `DefenceOptions`."""
        return self.denoise


class LearnedNoise(DefenceOptions):
    """See `isthmus.privacy.defences.learned_noise`."""

    name = "learned-noise"

    sigma: float = Field(gt=0, description="Standard deviation that each channel's noise has at the start.")
    reward: float = Field(0.1, gt=0, description="What the loss falls by when every deviation grows by a factor of e.")

    @property
    def fresh(self) -> bool:
        """See `DefenceOptions`."""
        return True

    @property
    def trained_below(self) -> bool:
        """See `DefenceOptions`."""
        return True


class TrainedBottleneck(DefenceOptions):
    """See `isthmus.privacy.defences.trained_bottleneck`."""

    name = "bottleneck"
    claim = "as gaussian, forward, where clip and sigma are given; else none"

    rank: int = Field(ge=1, description="Width of the bottleneck.")
    clip: float | None = Field(None, gt=0, description="Largest norm of a token's code.")
    sigma: float | None = Field(None, gt=0, description="Standard deviation of the code's noise, in units of `clip`.")
    delta: float = Field(1e-5, gt=0, lt=1)

    @property
    def fresh(self) -> bool:
        """See `DefenceOptions`."""
        return self.sigma is not None

    @property
    def trained_below(self) -> bool:
        """See `DefenceOptions`."""
        return True


class Mixing(DefenceOptions):
    """See `isthmus.privacy.defences.mixing`."""

    name = "mixing"

    share: float = Field(0.7, gt=0.5, lt=1, description="Share of a row's own example; the rest is another's.")

    @property
    def fresh(self) -> bool:
        """See `DefenceOptions`."""
        return True


class Decoys(DefenceOptions):
    """See `isthmus.privacy.defences.decoys`."""

    name = "decoys"

    file: str = Field(description="Generated examples, in the form of the data; at least `count` for each real one.")
    count: int = Field(1, ge=1, le=15, description="Decoys of each real row.")


class Smoothing(DefenceOptions):
    """See `isthmus.privacy.defences.label_smoothing`."""

    name = "smoothing"

    share: float = Field(gt=0, lt=1, description="Share of the uniform distribution in each label.")


class DpSgd(DefenceOptions):
    """See `isthmus.privacy.defences.private_gradients`."""

    name = "dp-sgd"
    claim = "(epsilon, delta)-differential privacy of the adapters, see the accountant"

    clip: float = Field(gt=0, description="Largest norm of an example's gradient; a longer one is scaled down.")
    sigma: float = Field(gt=0, description="Standard deviation of the noise of each number, in units of `clip`.")
    delta: float = Field(1e-5, gt=0, lt=1)


class Rotation(DefenceOptions):
    """See `isthmus.privacy.defences.broken_examples`."""

    name = "rotation"
    broken_by = "a linear map from a few texts that the attacker knows (ridge inversion): it learns the rotation too"


class Quantization(DefenceOptions):
    """See `isthmus.privacy.defences.broken_examples`."""

    name = "quantization"
    broken_by = "matching whose candidates pass through the same rounding"

    bits: int = Field(4, ge=2, le=8, description="Bits of each number.")


Guaranteed = Gaussian | TrainedBottleneck | DpSgd

DEFENCES: dict[str, type[DefenceOptions]] = {
    options.name: options
    for options in (
        Gaussian, EmbeddingNoise, LearnedNoise, TrainedBottleneck, Mixing, Decoys, Smoothing, DpSgd, Rotation,
        Quantization,
    )
}  # fmt: skip
"""By the names that options have for them."""

NO_DEFENCE: dict[str, str] = {
    "permutation": "token ids never leave the edge, so a permuted vocabulary, with the embedding permuted alike, "
    "sends the same hidden states; matching breaks it as it breaks no defence",
    "depth": "where the model is cut is the cloud's `--edge-layers`; matching through known layers breaks every cut",
}
"""What is taken for a defence and changes nothing that is sent, and why."""

# Pairs of which one takes from the other what it needs.
_EXCLUDED = (
    ({"mixing"}, {"gaussian", "bottleneck"}, "a mixed row is of two examples, and the noise is counted for one"),
    ({"mixing"}, {"decoys"}, "a mixed row shows which rows belong together"),
    ({"mixing"}, {"dp-sgd"}, "dp-sgd takes one example at a time, and mixing two"),
)


def read_defence(text: str) -> DefenceOptions:
    """The options of `NAME[:PARAMETER=VALUE,…]`.

    Raises:
        ValueError: They do not make sense; the message is one line.
    """
    name, _, rest = text.strip().partition(":")
    if name in NO_DEFENCE:
        raise ValueError(f"{name!r} is no defence: {NO_DEFENCE[name]}")
    cls = DEFENCES.get(name)
    if cls is None:
        raise ValueError(f"{name!r} is no defence: the names are {', '.join(DEFENCES)}")
    values: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        parameter, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or parameter in values:
            raise ValueError(f"{part!r} in {text!r}: write each parameter once, as PARAMETER=VALUE")
        values[parameter] = value
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        known = ", ".join(cls.model_fields) or "none"
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name} in {text!r}: {where}: {first['msg'].lower()}; its parameters are {known}") from None


def check_together(defences: Sequence[DefenceOptions]) -> None:
    """Refuse defences that do not go together.

    Raises:
        ValueError: Some do not; the message names them.
    """
    for one, other in combinations(defences, 2):
        if one.name == other.name:
            raise ValueError(f"{one.name} is there twice: give each defence once")
        for left, right, why in _EXCLUDED:
            if (one.name in left and other.name in right) or (one.name in right and other.name in left):
                raise ValueError(f"{one.name} and {other.name} exclude each other: {why}")
    for defence in defences:
        if isinstance(defence, TrainedBottleneck) and (defence.clip is None) != (defence.sigma is None):
            raise ValueError("bottleneck: clip and sigma go together: give both or neither")
        if isinstance(defence, Gaussian) and (defence.gradient_clip is None) != (defence.gradient_sigma is None):
            raise ValueError("gaussian: gradient_clip and gradient_sigma go together: give both or neither")

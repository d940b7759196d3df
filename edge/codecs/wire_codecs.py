"""Which codec each of the wire's four directions uses.

    forward_up      hidden states into the cloud's layers
    forward_down    hidden states out of them
    backward_up     the gradient of what came down
    backward_down   the gradient of what went up

The directions differ: an error in the hidden states that go up disturbs everything after it, one in a gradient hardly
anything.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product
from typing import Self

from isthmus.common.errors import ConfigError
from isthmus.protocol.tensor_codecs import CODECS, codec_id

AUTO = "auto"
"""What users write instead of codecs to have them chosen by measuring, alone or with a target: `auto:0.99`."""
AUTO_TARGET = 0.99
"""The gradient cosine that plain `auto` holds to."""

_SIDES = {
    "forward": ("forward_up", "forward_down"),
    "backward": ("backward_up", "backward_down"),
}


@dataclass(frozen=True, slots=True)
class WireCodecs:
    """The codec of each direction, by name.

    Raises:
        ConfigError: there is no such codec.
    """

    forward_up: str = "fp32"
    forward_down: str = "fp32"
    backward_up: str = "fp32"
    backward_down: str = "fp32"

    def __post_init__(self) -> None:
        for name in self.names:
            codec_id(name)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what a user wrote.

        Args:
            text: one codec for all (`int8`), one for each pass (`int8,int4`: forward, backward), or a list of
                `direction=codec`, where `forward` and `backward` stand for both directions of a pass. A direction by
                its own name comes before its pass, what is written later before what is written earlier, and what is
                not written is fp32.

        Raises:
            ConfigError: the text has another form, or a direction or a codec does not exist.
        """
        if is_auto(text):
            raise ConfigError(
                f"the codec {text!r} is chosen by training as it goes: here it must be a fixed one, such as int8"
            )
        entries = [entry.strip() for entry in text.split(",")]
        if not any("=" in entry for entry in entries):
            if len(entries) > 2:
                raise ConfigError(
                    f"{len(entries)} codecs in {text!r}: write one, or forward,backward, or direction=codec for each"
                )
            forward, backward = entries[0], entries[-1]
            return cls(forward, forward, backward, backward)
        passes: dict[str, str] = {}
        directions: dict[str, str] = {}
        for entry in entries:
            key, _, codec = (part.strip() for part in entry.partition("="))
            if key in _SIDES:
                passes |= dict.fromkeys(_SIDES[key], codec)
            elif key in DIRECTIONS and codec:
                directions[key] = codec
            else:
                raise ConfigError(
                    f"{entry!r} in the codecs {text!r} does not make sense: write direction=codec, and as direction "
                    f"one of {', '.join((*_SIDES, *DIRECTIONS))}"
                )
        return cls(**(passes | directions))

    def __str__(self) -> str:
        """The shortest text that `parse` reads as these codecs."""
        forms = [text for sides in product(*map(self._side_forms, _SIDES)) if (text := ",".join(filter(None, sides)))]
        if self.forward_up == self.forward_down and self.backward_up == self.backward_down:
            forms.append(f"{self.forward_up},{self.backward_up}")
        if len(set(self.names)) == 1:
            forms.append(self.forward_up)
        return min(forms, key=len)

    @property
    def names(self) -> tuple[str, ...]:
        """The four codecs, in the order of the fields."""
        return (self.forward_up, self.forward_down, self.backward_up, self.backward_down)

    def check(self, offered: tuple[str, ...]) -> None:
        """Make sure that the cloud speaks these codecs.

        Raises:
            ConfigError: it does not speak one of them.
        """
        for name in self.names:
            if name not in offered:
                raise ConfigError(f"the cloud does not speak the codec {name!r}: choose one of {', '.join(offered)}")

    def bytes_per_token(self, hidden_size: int) -> int:
        """What one token more in a forward and backward call adds to the bytes over the wire, frames not counted."""
        return sum(codec_bytes(name, hidden_size) for name in self.names)

    def _side_forms(self, side: str) -> list[str]:
        """The ways to write the two directions of a pass; the empty text where both are fp32."""
        codecs: dict[str, str] = {key: getattr(self, key) for key in _SIDES[side]}
        forms = [",".join(f"{key}={codec}" for key, codec in codecs.items() if codec != "fp32")]
        for both in dict.fromkeys(codecs.values()):
            others = [f"{key}={codec}" for key, codec in codecs.items() if codec != both]
            forms.append(",".join([f"{side}={both}", *others]))
        return forms


DIRECTIONS: tuple[str, ...] = tuple(field.name for field in fields(WireCodecs))
"""Names of the four directions."""


def codec_bytes(codec: str, hidden_size: int) -> int:
    """Bytes that one token more adds to a tensor `[tokens, hidden_size]`; what a tensor costs once is left out."""
    sizes = CODECS[codec].sizes
    return sum(sizes((2, hidden_size))) - sum(sizes((1, hidden_size)))


def is_auto(text: str) -> bool:
    """Tell whether codecs are to be chosen by measuring: `auto`, or `auto:` and a target."""
    return text.strip().partition(":")[0] == AUTO


def auto_target(text: str) -> float:
    """Read the gradient cosine that `auto:0.99` names; `AUTO_TARGET` where it names none.

    Raises:
        ConfigError: it is not a number between 0 and 1.
    """
    name, colon, number = text.strip().partition(":")
    try:
        target = float(number) if colon else AUTO_TARGET
    except ValueError:
        target = 0.0
    if name != AUTO or not 0.0 < target < 1.0:
        raise ConfigError(
            f"{text!r} names no target: write auto, or auto:0.99 for a gradient cosine of 0.99; it lies between 0 and 1"
        )
    return target

"""A link between edge and cloud as a person writes it: `100mbit,50ms`, `12.5MB/s,20ms`, `1gbit`, `local`. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from isthmus.common.errors import ConfigError

LOCAL = "local"
_BYTES = re.compile(r"(\d+(?:\.\d+)?)([kMG])B/s")
_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)bit")
_RATE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_TIME = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_POWERS = {"k": 1e3, "M": 1e6, "G": 1e9}


def parse_rate(text: str) -> int:
    """Read a rate as `tc` writes it, `100mbit` or `2.5gbit`; returns bits per second.

    Raises:
        ConfigError: it is malformed, or less than 8 bits per second.
    """
    match = _RATE.fullmatch(text)
    rate = round(float(match[1]) * _RATE_UNITS[match[2]]) if match else 0
    if rate < 8:
        raise ConfigError(f"{text!r} is not a rate: write a number with bit, kbit, mbit or gbit, 100mbit for example")
    return rate


def parse_seconds(text: str) -> float:
    """Read a length of time, `50ms`, `800us` or `1.5s`; returns seconds.

    Raises:
        ConfigError: it is malformed.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a length of time: write a number with us, ms or s, 50ms for example")
    return float(match[1]) * _TIME_UNITS[match[2]]


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """What a link carries. What the software at its ends costs is not the link's.

    Attributes:
        bytes_per_s: Its rate in either direction, in bytes per second; infinity for `local`.
        rtt_s: The round-trip time, in seconds.
    """

    text: str
    bytes_per_s: float
    rtt_s: float

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """The link that a flag names.

        Args:
            text: A rate, then a comma and a round-trip time or nothing (0 then): `100mbit,50ms`, `1gbit`,
                `12.5MB/s,20ms`. Rates are decimal, in bit, kbit, mbit, gbit, kB/s, MB/s or GB/s, times in us, ms or s.
                Or `local`, for two processes of one machine.

        Raises:
            ConfigError: it is not that, or the rate is 0.
        """
        if text.strip() == LOCAL:
            return cls(LOCAL, math.inf, 0.0)
        parts = [part.strip() for part in text.split(",")]
        if len(parts) > 2:
            raise ConfigError(f"link {text!r} has {len(parts)} parts; write a rate and a round-trip time: 100mbit,50ms")
        try:
            return cls(text.strip(), _rate(parts[0]), parse_seconds(parts[1]) if len(parts) == 2 else 0.0)
        except ConfigError as error:
            raise ConfigError(f"link {text!r} does not make sense: {error}; 'local' is this machine") from error

    def seconds(self, n_bytes: float, round_trips: float) -> float:
        """How long `n_bytes`, up and down together, and a number of round trips take one after another."""
        return n_bytes / self.bytes_per_s + round_trips * self.rtt_s


def _rate(part: str) -> float:
    """Bytes per second."""
    match = _BYTES.fullmatch(part)
    if match is None:
        return parse_rate(part) / 8
    if not float(match[1]):
        raise ConfigError(f"{part!r} carries nothing: write a rate above 0, 12.5MB/s for example")
    return float(match[1]) * _POWERS[match[2]]

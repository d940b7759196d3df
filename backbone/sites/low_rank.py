"""Low-rank sites: an interior linear's one trainable matrix stays on the edge, and `r` numbers a token go each way.

PrivateLoRA (Wang et al. 2023, arXiv 2311.14030) puts `y = W x + scale * B M A x` in the place of a frozen linear
`W [out, in]`: `A [r, in]` and `B [out, r]` are frozen, `M [r, r]` is trained. The cloud sends `z = A x` down, the edge
answers `u = scale * M z`, and the cloud adds `B u`. Backward, `B^T g` comes down, and the gradient of `z` goes up. `M`
starts at zero, so the model starts as it was pretrained; its gradient is not zero then, as neither `A` nor `B` is.

`isthmus.backbone.sites.low_rank_basis` says where `A` and `B` come from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.checkpoints.weight_quantization import features_of
from isthmus.backbone.sites.low_rank_basis import INITS, BasisMatrices, check_rank, site_basis
from isthmus.common.errors import CheckpointError, ConfigError

LOW_RANK = "low_rank"
"""The name of a `LowRankSite` inside the linear that it adapts, and of the method."""

_HIGHEST_SEED = 2**63 - 1


class LowRankSite(nn.Module):
    """`M` of one site: `z [..., r] -> u = scale * M z [..., r]`. It is a submodule of the linear that it adapts.

    The scale is applied here, so whoever has `B` adds `B u` as it comes. Over a skeleton `A` and `B` are not here; over
    a real linear they are buffers that are never saved. `M` stays in fp32 whatever the model computes in, as PEFT keeps
    adapters.

    Args:
        rank: `r`.
        scale: `alpha / r`.
        basis: `A` and `B`, for a linear that runs here.
        seed, init: What they are made of where the linear runs; see `LowRankAdapter`.

    Attributes:
        weight: `M [r, r]`, zero at the start.
        down: `A [r, in]`, or None.
        up: `B [out, r]`, or None.
    """

    down: Tensor | None
    up: Tensor | None

    def __init__(
        self, rank: int, scale: float, basis: BasisMatrices | None = None, *, seed: int = 0, init: str = "seeded"
    ) -> None:
        super().__init__()
        self.scale = scale
        self.rank, self.seed, self.init = rank, seed, init
        self.weight = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float32))
        down, up = basis or (None, None)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Answer `z = A x`, `[..., r]`, by `u = scale * M z`, `[..., r]`, in its dtype."""
        u = nn.functional.linear(z.to(self.weight.dtype), self.weight) * self.scale
        return u.to(z.dtype)

    def delta(self, x: Tensor) -> Tensor:
        """All that the site adds to its linear's output: `x [..., in] -> scale * B M A x [..., out]`, in its dtype.

        Raises:
            ConfigError: The site stands over a skeleton, and has neither `A` nor `B`.
        """
        if self.down is None or self.up is None:
            raise ConfigError("this low-rank site has no A and B, which are the cloud's: run the layer there.")
        z = nn.functional.linear(x.to(self.down.dtype), self.down)
        return nn.functional.linear(self(z), self.up).to(x.dtype)


@dataclass(frozen=True, slots=True)
class LowRankAdapter:
    """What a model with low-rank sites carries as its attribute `isthmus_adapter`.

    Attributes:
        sites: The linears, by their full names in the whole model.
        rank: `r`, the same at all sites.
        alpha: The sites' scale is `alpha / rank`, as LoRA has it.
        seed: Of the seeded `A` and `B`, 0 or more.
        init: `seeded` or `svd`.

    Raises:
        ConfigError: A value makes no sense.
    """

    sites: tuple[str, ...]
    rank: int
    alpha: float
    seed: int = 0
    init: str = "seeded"

    method: ClassVar[str] = LOW_RANK

    def __post_init__(self) -> None:
        named = bool(self.sites) and all(type(site) is str for site in self.sites)
        if not named or len(set(self.sites)) < len(self.sites):
            raise ConfigError(f"low-rank sites {str(self.sites)[:80]}: name one linear or more, each once")
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"rank {self.rank!r} is no rank: use a whole number of 1 or more")
        if type(self.alpha) not in (int, float) or not (0 < self.alpha < math.inf):
            raise ConfigError(f"alpha {self.alpha!r} is no scale: use a number above 0")
        if type(self.seed) is not int or not 0 <= self.seed <= _HIGHEST_SEED:
            raise ConfigError(f"seed {self.seed!r} is no seed: use a whole number of 0 to {_HIGHEST_SEED}")
        if self.init not in INITS:
            raise ConfigError(f"init {self.init!r} is unknown: use {' or '.join(INITS)}")

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    def info(self) -> dict[str, Any]:
        """What `isthmus_adapter.json` says."""
        return {"method": self.method, **asdict(self), "sites": list(self.sites)}

    @classmethod
    def from_info(cls, info: Mapping[str, Any], path: Path) -> Self:
        """The adapter that `isthmus_adapter.json` describes.

        Raises:
            CheckpointError: It is damaged.
        """
        try:
            sites = info["sites"] if isinstance(info["sites"], list) else ()
            return cls(tuple(sites), *(info[name] for name in ("rank", "alpha", "seed", "init")))
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): give a folder that training wrote.") from error

    def places(self, model: Any) -> dict[str, torch.Size]:
        """Names and shapes of its tensors, of which `model` is known to have places for all.

        Raises:
            ConfigError: The model has no such site, or the rank does not fit one.
        """
        for site in self.sites:
            check_rank(site, self.rank, *features_of(linear_of(model, site)))
        return {f"{site}.{LOW_RANK}.weight": torch.Size((self.rank, self.rank)) for site in self.sites}

    def parameters(self, model: Any) -> dict[str, nn.Parameter]:
        """The parameters of a model that carries it, by their names in the whole model."""
        return {name: model.get_parameter(name) for name in self.places(model)}

    def attach(self, model: Any) -> None:
        """Put the sites into `model`; they alone are trainable then. See `add_low_rank`.

        Raises:
            ConfigError: A site is unknown, no linear, or has a low-rank matrix already; or the rank does not fit one.
        """
        self.places(model)
        for site in self.sites:
            if hasattr(linear_of(model, site), LOW_RANK):
                raise ConfigError(f"{site} has a low-rank matrix already: load the model afresh")
        model.requires_grad_(False)
        for site in self.sites:
            _attach(site, linear_of(model, site), self)
        model.isthmus_adapter = self


def add_low_rank(
    model: Any, sites: Sequence[str], rank: int, *, alpha: float, seed: int = 0, init: str = "seeded"
) -> None:
    """Put a low-rank matrix on each of `sites`; they alone are trainable then.

    Names are the same in a split and in a whole model. A site whose weight is here (anywhere in a whole model, and in
    the edge's own layers) adds its product itself, by a hook. One over a skeleton only holds `M`: what runs the layer
    elsewhere asks it for `u`.

    Args:
        model: A transformers causal LM, whole or split.
        sites, rank, alpha, seed, init: See `LowRankAdapter`, and `low_rank_basis` for what `init` shows to whom.

    Raises:
        ConfigError: A value makes no sense; or a site is unknown, no linear, or has a low-rank matrix already.
    """
    LowRankAdapter(tuple(sites), rank, alpha, seed, init).attach(model)


def linear_of(model: Any, name: str) -> nn.Module:
    """The linear of a full name, real or a skeleton; `ConfigError` where there is none."""
    try:
        module = cast(nn.Module, model.get_submodule(name))
    except AttributeError as error:
        raise ConfigError(
            f"there is no module {name!r} in this {type(model).__name__}: name linears of decoder layers in full, "
            "such as 'model.layers.7.self_attn.q_proj'"
        ) from error
    if not isinstance(module, nn.Linear | Conv1D):
        kind = type(module).__name__
        raise ConfigError(f"{name!r} is a {kind}, no plain linear: name linears, and give each one adapter only")
    return module


def _attach(name: str, linear: nn.Module, adapter: LowRankAdapter) -> None:
    is_here = "weight" in dict(linear.named_parameters(recurse=False))  # a skeleton has no parameters
    rank, seed, init = adapter.rank, adapter.seed, adapter.init
    basis = site_basis(name, linear, rank=rank, seed=seed, init=init) if is_here else None
    site = LowRankSite(rank, adapter.scale, basis, seed=seed, init=init)
    placed = next(itertools.chain(linear.parameters(), linear.buffers()), None)
    linear.add_module(LOW_RANK, site if placed is None else site.to(placed.device))
    if is_here:
        linear.register_forward_hook(_add_delta)


def _add_delta(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # The site is looked up in the linear, so that a deep copy of the model uses the copy's.
    return output + cast(LowRankSite, linear.get_submodule(LOW_RANK)).delta(args[0])

"""Low-rank sites: an interior linear's one trainable matrix stays on the edge, and `r` numbers a token go each way.

PrivateLoRA (Wang et al. 2023, arXiv 2311.14030) puts `y = W x + scale * B M A x` in the place of a frozen linear
`W [out, in]`: `A [r, in]` and `B [out, r]` are frozen, `M [r, r]` is trained. The cloud sends `z = A x` down, the edge
answers `u = scale * M z`, and the cloud adds `B u`. Backward, `B^T g` comes down, and the gradient of `z` goes up. `M`
starts at zero, so the model starts as it was pretrained; its gradient is not zero then, as neither `A` nor `B` is.

Where `A` and `B` come from is the user's choice:

    seeded  random numbers that both sides derive from a seed and the site's name. They say nothing of `W`, and the edge
            can export the adapter by itself. Directions are arbitrary, so it may take a larger rank for the same loss.
    svd     from the truncated SVD of `W`, as in LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): the directions that
            `W` uses most. The cloud computes them. The edge needs them for an export only, and whoever has them has
            `B A`, the best approximation of `W` of rank `r`: the cloud decides whether to hand them out.

Seeded ones keep the size of the numbers, while `B` from an SVD carries the singular values: a learning rate that suits
one need not suit the other.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.checkpoints.weight_quantization import weight_of
from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.common.files import new_folder

LOW_RANK = "low_rank"
"""The name of a `LowRankSite` inside the linear that it adapts, and of the method."""

INITS = ("seeded", "svd")
Basis = tuple[Tensor, Tensor]  # A [r, in] and B [out, r]

_HIGHEST_SEED = 2**63 - 1


# A and B --------------------------------------------------------------------------------------------------------------


def seeded_matrix(label: str, rows: int, columns: int) -> Tensor:
    """Random numbers `[rows, columns]`, fp32, on the CPU: the same bits wherever they are derived from `label`.

    They are uniform with mean 0 and variance `1 / columns`, so that the product with a vector keeps the size of its
    numbers. Bits of SHAKE-256 become numbers by steps that are exact or rounded once. torch's generators
    promise no such thing: releases differ, normal numbers pass through vectorised logarithms.
    """
    stream = hashlib.shake_256(label.encode()).digest(4 * rows * columns)
    whole = np.frombuffer(stream, dtype="<i4") >> 8  # 24 bits, which fp32 holds exactly
    step = np.float32(math.sqrt(3 / columns) / 2**23)
    return torch.from_numpy((whole.astype(np.float32) * step).reshape(rows, columns))


def low_rank_basis(name: str, in_features: int, out_features: int, rank: int, seed: int) -> Basis:
    """`A` and `B` of a site from a seed, the same bits for both sides.

    `A x` has about the variance of `x` a number, and `B u` that of `u`; see `seeded_matrix`. PrivateLoRA's own code
    draws both uniformly too, at a third of that variance. Orthonormal ones would come out of a factorisation, whose
    last bits differ between machines.

    Args:
        name: The site, in full, such as `model.layers.7.self_attn.q_proj`.
        in_features, out_features: Widths of its input and its output.
        rank: `r`.
        seed: 0 or more.

    Raises:
        ConfigError: The rank does not fit the site.
    """
    _check_rank(name, rank, in_features, out_features)
    down = seeded_matrix(f"isthmus low-rank A\n{seed}\n{name}", rank, in_features)
    up = seeded_matrix(f"isthmus low-rank B\n{seed}\n{name}", out_features, rank)
    return down, up


def svd_basis(weight: Tensor, rank: int) -> Basis:
    """`A = V^T` and `B = U S` of a site from its weight `W ~ U S V^T`, as in LoRA-XS (Bałazy et al. 2024).

    Each pair of singular vectors is turned so that the largest number of its row of `A` is positive, and the SVD is
    computed in fp64 on the CPU. So the result is the same on the same machine and threads, and nearly so elsewhere,
    unless two singular values are equal.

    Args:
        weight: `W [out, in]`; a `Conv1D` stores the transpose.
        rank: `r`.

    Returns:
        `A [r, in]` and `B [out, r]`, fp32, on the CPU. Whoever gets both knows `B A`, `W`'s best approximation of rank
        `r`.

    Raises:
        ConfigError: The rank does not fit the weight.
    """
    n_out, n_in = weight.shape
    _check_rank("the weight", rank, n_in, n_out)
    left, values, right = torch.linalg.svd(weight.detach().to("cpu", torch.float64), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(right.dtype)
    return (right * signs).float().contiguous(), (left * values * signs.T).float().contiguous()


def site_basis(name: str, linear: nn.Module, *, rank: int, seed: int, init: str) -> Basis:
    """`A` and `B` of a site whose weight is at hand, in the cloud's span or in a whole model; see `LowRankAdapter`.

    Args:
        name: The site, in full.
        linear: The real `nn.Linear` or `Conv1D`.
        rank, seed, init: As the adapter has them.

    Raises:
        ConfigError: The rank does not fit the site.
    """
    if init == "svd":
        return svd_basis(weight_of(linear), rank)
    return low_rank_basis(name, *_features(linear), rank, seed)


def _check_rank(name: str, rank: int, n_in: int, n_out: int) -> None:
    if not 1 <= rank <= min(n_in, n_out):
        raise ConfigError(
            f"rank {rank} does not fit {name}, which has {n_in} inputs and {n_out} outputs: use 1 to {min(n_in, n_out)}"
        )


def _features(linear: Any) -> tuple[int, int]:
    """Widths of a linear's input and output."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


# The trainable part ---------------------------------------------------------------------------------------------------


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
        self, rank: int, scale: float, basis: Basis | None = None, *, seed: int = 0, init: str = "seeded"
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
            _check_rank(site, self.rank, *_features(_linear(model, site)))
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
            if hasattr(_linear(model, site), LOW_RANK):
                raise ConfigError(f"{site} has a low-rank matrix already: load the model afresh")
        model.requires_grad_(False)
        for site in self.sites:
            _attach(site, _linear(model, site), self)
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
        sites, rank, alpha, seed, init: See `LowRankAdapter`, and the top of this module for what `init` tells whom.

    Raises:
        ConfigError: A value makes no sense; or a site is unknown, no linear, or has a low-rank matrix already.
    """
    LowRankAdapter(tuple(sites), rank, alpha, seed, init).attach(model)


def low_rank_sites(model: nn.Module) -> dict[str, LowRankSite]:
    """The low-rank sites of a model by their linears' full names, in the order of its modules."""
    return {
        name.removesuffix(f".{LOW_RANK}"): module
        for name, module in model.named_modules()
        if isinstance(module, LowRankSite)
    }


def _linear(model: Any, name: str) -> nn.Module:
    """The linear that a full name means, real or a skeleton."""
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


# Export ---------------------------------------------------------------------------------------------------------------


def export_lora(model: Any, folder: Path, *, bases: Mapping[str, Basis] | None = None) -> None:
    """Write a model's low-rank sites as an ordinary LoRA adapter, which PEFT loads into the whole model.

    `lora_A` is `A` and `lora_B` is `B M`, so PEFT's `alpha / r * lora_B lora_A x` is the same product, but for the
    rounding of `B M`. The adapter is no longer bound to `A` and `B`, and trains on as any LoRA.

    Args:
        model: A model with low-rank sites, whole or split.
        folder: Where to write; an older one is replaced.
        bases: `A` and `B` by site. Needed where they came from an SVD of weights that are not here: the cloud has them.
            The folder then says something of those weights; see `svd_basis`.

    Raises:
        ConfigError: The model has no low-rank sites; or `A` and `B` of one are not known, or have other shapes.
        DiskError: The disk is full or cannot be written.
    """
    import peft

    adapter = getattr(model, "isthmus_adapter", None)
    if not isinstance(adapter, LowRankAdapter):
        raise ConfigError("the model has no low-rank sites to export: add them, or save its adapter as it is.")
    tensors: dict[str, Tensor] = {}
    for name, parameter in zip(adapter.sites, adapter.parameters(model).values(), strict=True):
        down, up = _known_basis(model, name, adapter, bases or {})
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (up @ parameter.detach().cpu().float()).contiguous()
    origin = getattr(model, "isthmus_origin", None)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path if origin is None else origin.checkpoint.name,
        r=adapter.rank,
        lora_alpha=cast(int, adapter.alpha),  # PEFT divides it by r, and takes any number
        target_modules=list(adapter.sites),
        fan_in_fan_out=all(isinstance(_linear(model, name), Conv1D) for name in adapter.sites),
        inference_mode=True,
    )
    with new_folder(folder) as temporary:
        settings.save_pretrained(str(temporary))
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})


def _known_basis(model: Any, name: str, adapter: LowRankAdapter, given: Mapping[str, Basis]) -> Basis:
    linear = _linear(model, name)
    n_in, n_out = _features(linear)
    site = cast(LowRankSite, linear.get_submodule(LOW_RANK))
    down, up = given.get(name, (site.down, site.up))
    if (down is None or up is None) and adapter.init == "seeded":
        down, up = low_rank_basis(name, n_in, n_out, adapter.rank, adapter.seed)
    if down is None or up is None:
        raise ConfigError(
            f"A and B of {name} come from the cloud's weights (init svd): ask the cloud for them and give them as bases"
        )
    if down.shape != (adapter.rank, n_in) or up.shape != (n_out, adapter.rank):
        raise ConfigError(
            f"A {list(down.shape)} and B {list(up.shape)} do not fit {name}: "
            f"give [{adapter.rank}, {n_in}] and [{n_out}, {adapter.rank}]"
        )
    return down.detach().cpu().float(), up.detach().cpu().float()

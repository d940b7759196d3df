"""Where the cloud's layers stand in the edge's model: one gate that calls the span, and layers that pass through."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from isthmus.backbone.errors import UnsupportedCallError

SpanFn = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""`(hidden [B, S, h], attention_mask [B, S] or None, position_ids [B, S] or [1, S] or None) -> hidden [B, S, h]`"""

# Arguments that act inside every layer, or replace what the base model computes for it, and that the span never sees.
_REFUSED = ("cache", "past_key_values", "encoder_hidden_states", "encoder_attention_mask", "is_causal", "position_bias")
_RECORDED = ("output_attentions", "output_hidden_states")


class _Held:
    """Keeps a callable out of a module's submodules, weights and copies: a copied model talks to the same span."""

    def __init__(self, span: SpanFn) -> None:
        self.span = span

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self


class PassThrough(nn.Module):
    """A cloud layer behind the first: the gate has already done its work."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Return `hidden_states` as they are."""
        return hidden_states


class SpanGate(nn.Module):
    """The first cloud layer: sends the hidden states through the whole span.

    A decoder layer sees only the mask that the base model made of the caller's, so two hooks on the base model keep
    the caller's own mask and positions for the length of one forward.

    It is no transformers layer on purpose: a checkpointing layer would run the span twice.
    """

    def __init__(self, span: SpanFn) -> None:
        super().__init__()
        self._held = _Held(span)
        self._attention_mask: Tensor | None = None
        self._position_ids: Tensor | None = None
        self._inside = False

    @property
    def span(self) -> SpanFn:
        """What runs the layers. May be replaced, by one that counts or records, for instance."""
        return self._held.span

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "span":
            self._held = _Held(value)  # torch would register a module as a part of this one
        else:
            super().__setattr__(name, value)

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Run the cloud's layers on `hidden_states`, `[B, S, h]`.

        Raises:
            UnsupportedCallError: called outside the base model's forward, where mask and positions are not known.
        """
        if not self._inside:
            raise UnsupportedCallError(
                "a cloud layer was called by itself; call the model, which knows mask and positions"
            )
        return self.span(hidden_states, self._attention_mask, self._position_ids)

    def attach(self, base: nn.Module) -> None:
        """Put the two hooks on the base model."""
        # Bound methods: a deep copy of the model binds them to the copy's gate.
        base.register_forward_pre_hook(self._enter, with_kwargs=True)
        base.register_forward_hook(self._leave, always_call=True)

    def _enter(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        if args:
            named.update(zip(inspect.signature(base.forward).parameters, args, strict=False))
        self._check(base, named)
        self._attention_mask = named.get("attention_mask")
        self._position_ids = named.get("position_ids")
        self._inside = True

    def _leave(self, *_: Any) -> None:
        self._attention_mask = self._position_ids = None
        self._inside = False

    @staticmethod
    def _check(base: nn.Module, named: dict[str, Any]) -> None:
        config: Any = base.config
        use_cache = named.get("use_cache")
        if config.use_cache if use_cache is None else use_cache:
            raise UnsupportedCallError("the split model keeps no key-value cache; pass use_cache=False")
        for name in _REFUSED:
            if named.get(name) is not None:
                raise UnsupportedCallError(f"{name} does not reach the cloud's layers; leave it out")
        for name in _RECORDED:
            value = named.get(name)
            if getattr(config, name, False) if value is None else value:
                raise UnsupportedCallError(f"{name} would lack the cloud's layers; leave it out")
        for name in ("attention_mask", "position_ids"):
            value = named.get(name)
            if value is not None and not (isinstance(value, Tensor) and value.dim() == 2):
                got = f"of {value.dim()} dimensions" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise UnsupportedCallError(f"{name} is {got}; the split model takes a tensor [batch, sequence]")

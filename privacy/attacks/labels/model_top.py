"""The edge's top of a model as the cloud believes it to be: what it makes of the span's output, and its gradients.

A denoiser before the top layers is part of the top: the gradient that the edge sends has passed through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import LayerStandIn, arrange_layers, sharing_copy
from isthmus.backbone.split.split_cache import window_of

_COLUMNS = 64  # of a Jacobian, in one backward
_TOKENS = 2048  # whose gradients are held at once
_AT_ONCE = 32  # positions whose norm's Jacobian is held
_CANDIDATES = 8  # of each position in one backward; with 16 or 32 each takes as long
_TINY = 1e-30
_ROUNDING = 1e-5  # relative, of a Jacobian in fp32: a hundred times that of one entry, as it comes of many operations


class ModelTop:
    """The layers above the span, then what leads to the logits: final norm, and OPT's projection.

    Attributes:
        head: The rows of the head, `[V, width]`, in fp64.
        rows: The same as what comes out of the last layer would be compared with them, `[V, h]`: behind OPT's
            projection the head is narrower.

    Args:
        model: A whole transformers causal LM, which stays as it is.
        plan: Where it is cut.
        received: What the edge makes of the span's output `[1, S, h]` before the layers, each position by itself;
            gradients flow back through it.
    """

    def __init__(
        self, model: Any, plan: SplitPlan, received: Callable[[Tensor], Tensor] = lambda output: output
    ) -> None:
        family = family_of(model.config)
        plan.check_layers(model.config.num_hidden_layers)
        base = sharing_copy(model.get_submodule(family.base))
        layers = list(getattr(base, family.layers))
        last = plan.cloud.stop - 1
        kept = range(plan.cloud.stop, plan.n_layers)
        tail = (family.norm, *family.projections[1:])
        self._given, self._received = _Given(layers[last]), received
        self._tail = [part for name in tail if (part := getattr(base, name)) is not None]
        if getattr(base, family.norm) is not None:
            setattr(base, family.norm, nn.Identity())
        for name in family.projections[1:]:
            setattr(base, name, None)
        arrange_layers(base, [self._given, *(layers[index] for index in kept)], [last, *kept], model.config)
        self._base: Any = base.eval()
        self._types: list[str] | None = getattr(base.config, "layer_types", None)
        entries = DynamicCache(config=model.config).layers
        self._windows = [window_of(entries[index]) for index in (last, *kept)]
        self.head: Tensor = model.get_output_embeddings().weight.detach().double()
        self.rows = self.head
        for part in self._tail:
            if isinstance(part, nn.Linear):
                self.rows = self.rows @ part.weight.detach().double()
        self._cap: float | None = getattr(model.config, "final_logit_softcapping", None)

    def through(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Run the layers above the span.

        Args:
            hidden: The span's output, `[1, S, h]`.
            mask: `[1, S]`, or None for no padding.
            positions: `[1, S]`, or None where the model counts by itself.

        Returns:
            What comes out of the last layer, `[1, S, h]`.
        """
        self._given.states = self._received(hidden)
        # The base model embeds these tokens, and the stand-in for the span puts the states in their place.
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
        output = self._base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def above(self, output: Tensor, gradient: Tensor) -> Tensor:
        """The gradient where the layers begin, of that at the span's output, as nearly as it can be solved for.

        Args:
            output, gradient: `[1, S, h]`.

        Returns:
            `[1, S, h]`; the gradient as it is where the edge makes nothing of the output.
        """
        if self._received(output) is output:
            return gradient
        found = []
        for own, sent in zip(output.detach()[0], gradient[0], strict=True):  # a Jacobian at a time, `[h, h]`
            given = own[None, None].requires_grad_()
            received = self._received(given)
            columns = torch.eye(len(own)).to(own)[:, None, None]
            (jacobian,) = torch.autograd.grad(received, given, columns, is_grads_batched=True)
            # A denoiser may take away whole directions; of these nothing comes back, and of those that it keeps less of
            # than rounding, little. Singular values would tell them apart more sharply, but do not always converge.
            system = jacobian[:, 0, 0].T.double()
            gram = system.T @ system
            ridge = torch.eye(len(gram)).to(gram) * (gram.trace() * _ROUNDING**2).clamp(min=_TINY)
            found.append(torch.linalg.solve(gram + ridge, system.T @ sent.double()).to(sent))
        return torch.stack(found)[None]

    def alone(
        self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layers so that each position's result depends on its own state alone; the others are constants.

        The keys and values of the sequence are computed first, without a graph. Each position then runs once more, and
        sees the positions before it as they were, and itself. So one backward gives a product with the diagonal block
        of the Jacobian at every position, and can be differentiated again.

        Args:
            hidden, mask, positions: As for `through`.
            places: The positions that are wanted, `[p]`; None for all.

        Returns:
            The states that the result depends on, `[1, p, h]`, and what comes out of the last layer, `[1, p, h]`.
        """
        length = hidden.shape[1]
        everywhere = torch.arange(length)
        places = everywhere if places is None else places
        own = hidden.detach()[:, places].clone().requires_grad_()
        counted = everywhere[None] if positions is None else positions
        before = torch.ones(length, length, dtype=torch.bool).tril(-1)
        if mask is not None:
            before &= mask.bool()
        itself = torch.eye(length, dtype=torch.bool)
        cache = DynamicCache()  # without windows: the masks say what is seen
        with torch.no_grad():
            self._run_cached(cache, hidden, counted, before | itself, (everywhere, everywhere))
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative, with which the Jacobian multiplies
            sees = torch.cat([before, itself[:, places]], 1)[places]
            return own, self._run_cached(
                cache, own, counted[:, places], sees, (places, torch.cat([everywhere, places]))
            )

    def _run_cached(
        self, cache: DynamicCache, states: Tensor, positions: Tensor, sees: Tensor, places: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Run the layers after what a cache holds, `c` positions, and append the keys and values to it.

        Args:
            states: `[1, S, h]`.
            positions: Their ids, `[1, S]`.
            sees: Which of the cached positions and of themselves they see where there is no window, `[S, c + S]`.
            places: Of these positions in the sequence, `[S]`, and of those that they see, `[c + S]`.

        Returns:
            What comes out of the last layer, `[1, S, h]`.
        """
        self._given.states = self._received(states)
        output = self._base(
            input_ids=torch.zeros(states.shape[:2], dtype=torch.long),
            attention_mask=self._masks(sees, *places),
            position_ids=positions,
            cache=cache,
            use_cache=True,
        )
        last: Tensor = output.last_hidden_state
        return last

    def _masks(self, sees: Tensor, own_places: Tensor, key_places: Tensor) -> Any:
        """What a base model takes for which position sees which: for each kind of layer within its window."""
        distance = own_places[:, None] - key_places[None]
        lowest = torch.finfo(torch.float32).min
        masks = {
            window: torch.zeros(1, 1, *sees.shape).masked_fill(
                ~(sees if window is None else sees & (distance < window)), lowest
            )
            for window in self._windows
        }
        if self._types is None:
            return masks[self._windows[0]]
        return {kind: masks[window] for kind, window in zip(self._types, self._windows, strict=True)}

    def tail(self, states: Tensor) -> Tensor:
        """What the head reads, `[..., width]`, of what comes out of the last layer, `[..., h]`."""
        for module in self._tail:
            states = module(states)
        return states

    def logit_slopes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The model's logits of the head's products `[..., V]`, and their derivative; Gemma 2 caps them."""
        if self._cap is None:
            return logits, torch.ones_like(logits)
        bent = torch.tanh(logits / self._cap)
        return bent * self._cap, 1 - bent.square()


class RowTop:
    """The top at a row: what the gradients of labels become on their way through it.

    Args:
        top: Of the model.
        row: What `ModelTop.through` takes: states, mask and positions.
        smoothing: Share of label smoothing.

    Attributes:
        prior: The log probability of each token in the model's view, `[S, V]`.
    """

    def __init__(self, top: ModelTop, row: tuple[Tensor, Tensor | None, Tensor | None], smoothing: float) -> None:
        output, mask, positions = row
        self._top, self._where = top, (mask, positions)
        self._head = head = top.head
        self._output = output.detach().requires_grad_()
        states = top.through(self._output, *self._where)
        self._read = top.tail(states)[0]
        self._own, states_alone = top.alone(self._output, *self._where)
        self._read_alone = top.tail(states_alone)[0]
        logits, self._slopes = top.logit_slopes(self._read.detach().double() @ head.T)
        self._means = (self._slopes * (logits.softmax(-1) - smoothing / len(head))) @ head
        self._slopes = (1 - smoothing) * self._slopes  # now the factors of the label's own row alone
        self.prior = logits.log_softmax(-1)
        # Backward is linear in what is given: the backward of that is the product with the Jacobian itself.
        self._given = torch.zeros_like(self._read_alone, requires_grad=True)
        (self._pulled,) = torch.autograd.grad(self._read_alone, self._own, self._given, create_graph=True)
        sizes = torch.func.vmap(lambda x: torch.func.jacrev(top.tail)(x).square().sum(-1), chunk_size=_AT_ONCE)
        scales = sizes(states.detach()[0]).double()
        squares = (scales * self._means.square()).sum(-1, keepdim=True)
        squares = squares - 2 * self._slopes * ((scales * self._means) @ head.T)
        squares = squares + self._slopes.square() * (scales @ head.square().T)
        self._lengths = squares.clamp_min(_TINY).sqrt()

    @property
    def size(self) -> int:
        """Of the vocabulary."""
        return len(self._head)

    def direction(self, tokens: Tensor) -> Tensor:
        """Of the loss's gradient where the head reads, `[S, width]`, with the labels `[S]`."""
        return self._means - self._slopes.gather(1, tokens[:, None]) * self._head[tokens]

    def drawn(self, lists: Tensor) -> Tensor:
        """The gradient of each position's own loss at that position, `[S, candidates, h]`, were its label a candidate.

        Args:
            lists: The candidates of each position, `[S, candidates]`.
        """
        parts = []
        for chunk in torch.split(lists.T, _CANDIDATES):
            given = torch.stack([self.direction(tokens) for tokens in chunk]).to(self._read_alone)
            (own,) = torch.autograd.grad(self._read_alone, self._own, given, retain_graph=True, is_grads_batched=True)
            parts.append(own[:, 0])
        return torch.cat(parts).transpose(0, 1)

    def nearest(self, place: int, gradient: Tensor, twice: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The best tokens of the whole vocabulary at a position, by the exact directions, the best first.

        Args:
            gradient: `[S, h]`.
            twice: Twice the noise's power in each number, `[S, 1]`.

        Returns:
            So many tokens, `[count]`, and the gradient of each at that position, `[count, h]`.
        """
        own, states = self._top.alone(self._output, *self._where, torch.tensor([place]))
        read = self._top.tail(states)[0]
        parts = []
        for chunk in torch.split(torch.eye(read.shape[1]), _COLUMNS):
            given = chunk[:, None].to(read)
            (columns,) = torch.autograd.grad(read, own, given, retain_graph=True, is_grads_batched=True)
            parts.append(columns[:, 0, 0])
        jacobian = torch.cat(parts)  # [width, h]
        means, slopes = self._means[place].to(jacobian) @ jacobian, self._slopes[place, :, None].to(jacobian)

        def drawn(slopes: Tensor, head: Tensor) -> Tensor:
            return torch.addcmul(means, slopes, head.to(jacobian) @ jacobian, value=-1)

        along = []
        for some in zip(torch.split(slopes, _TOKENS), torch.split(self._head, _TOKENS), strict=True):
            directions = drawn(*some)
            along.append((directions @ gradient[place]) / directions.norm(dim=-1).clamp_min(_TINY))
        lengths = torch.cat(along).double()
        tokens = (lengths.abs() * lengths / twice[place] + self.prior[place]).topk(count).indices
        return tokens, drawn(slopes[tokens], self._head[tokens])

    def drawn_together(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """What all labels `[S, labels of a position]`, with their weights, give to each position, `[S, h]`."""
        pairs = zip(tokens.T, weights.T, strict=True)
        given = torch.stack([weight[:, None] * self.direction(each) for each, weight in pairs]).sum(0).to(self._read)
        (together,) = torch.autograd.grad(self._read, self._output, given, retain_graph=True)
        return together[0]

    def along(self, gradient: Tensor) -> Tensor:
        """How far `[S, h]` goes in the direction of what each label would give to its own position, `[S, V]`.

        Its lengths are those that the norm alone would leave, with N N^T of its Jacobian N taken for diagonal, as it
        nearly is.
        """
        (along,) = torch.autograd.grad(self._pulled, self._given, gradient[None], retain_graph=True)
        along = along.double()
        products = (along * self._means).sum(-1, keepdim=True) - self._slopes * (along @ self._head.T)
        lengths: Tensor = products / self._lengths
        return lengths


class _Given(LayerStandIn):
    """In the place of the span: gives the states that it was given, whatever comes in."""

    states: Tensor

    def forward(self, _hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return self.states

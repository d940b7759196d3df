"""A cloud that models are trained with: its link, and the base model that they share."""

from __future__ import annotations

import copy
from typing import Any

from isthmus.daemon.state.crossings import COUNTERS
from isthmus.edge.client.remote_span import RemoteSpan
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.client_config import ClientConfig
from isthmus.edge.data.batches import pad_id

GIVE_UP_AFTER = 20.0
"""Seconds that a cloud may stay away at most: the models of other clouds wait meanwhile, and the daemon asks again."""


class OpenCloud:
    """A link to a cloud, and the edge's parts of its model.

    Args:
        config: How to connect.

    Attributes:
        config: The same.
        link: Opens its sessions anew by itself.
        pad_id: Token that fills rows.
        longest: Tokens of a row at most: what the model's window and one call of the cloud take.

    Raises:
        IsthmusError: Whatever `isthmus.edge.cloud_link.open_link` raises.
    """

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        patience = min(config.give_up_after, GIVE_UP_AFTER)
        self.link = open_link(config.model_copy(update={"give_up_after": patience}))
        try:
            self._base: Any = self.link.load_model()
            self._base.requires_grad_(False)
            self.pad_id = pad_id(self.link.load_tokenizer())
        except BaseException:
            self.link.close()
            raise
        self._counted = dict.fromkeys(COUNTERS, 0)
        self.longest = min(int(self._base.isthmus_longest), self.positions)

    @property
    def positions(self) -> int:
        """Token positions that one call of the cloud takes."""
        return int(self.link.info.limits.max_tokens_per_call)

    @property
    def family(self) -> str:
        """The base model's `model_type`."""
        return str(self._base.config.model_type)

    @property
    def tied_head(self) -> bool:
        """Whether the base model's head has the weights of its embedding."""
        return bool(self._base.isthmus_origin.tied)

    def new_model(self) -> Any:
        """A split model of its own modules over the base model's weights, which nobody changes.

        What is put on it, an adapter say, is on it alone. Adapters inside the cloud's layers are leased to the cloud.
        """
        memo: dict[int, Any] = {id(each): each for each in (*self._base.parameters(), *self._base.buffers())}
        model = copy.deepcopy(self._base, memo)
        model.remote_layers.span = RemoteSpan(self.link.span, leased=lambda name: True)
        return model

    def take_counts(self) -> dict[str, int]:
        """What has crossed since this was asked last: each of `COUNTERS`."""
        totals, before = self.link.totals(), self._counted
        self._counted = {name: int(getattr(totals, name)) for name in COUNTERS}
        return {name: self._counted[name] - before[name] for name in COUNTERS}

    def close(self) -> None:
        """Close the link."""
        self.link.close()

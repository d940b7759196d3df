"""What does the edge send? One training step is recorded before it is sealed, and searched for what must not be
there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from isthmus.edge.client.link import connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Batches, encode
from isthmus.edge.data.readers import read_examples
from isthmus.edge.training.methods import load_adapter, trained
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.protocol.encoding import pack
from isthmus.protocol.limits import Buffer
from isthmus.protocol.messages import Message

NEEDLE_TOKENS = 4  # consecutive token ids that count as a find
NEEDLE_VALUES = 4  # consecutive weights that count as a find


def search_the_wire(cloud: LocalCloud, data: Path, adapter: Path) -> dict[str, Any]:
    """Make one step with a trained adapter, and search the plaintext of every message that the edge sends.

    Searched for: the text of each example (UTF-8), runs of its token ids and of its labels (little-endian, 16, 32 and
    64 bits), runs of each adapter weight and of its gradient, and, as a control that the search works, runs of the
    activations that are sent on purpose.

    Returns:
        `messages`: how many of which kind; `found`: for each thing whether it is there.
    """
    messages: Counter[str] = Counter()
    plaintext = bytearray()

    def recorded(message: Message) -> tuple[bytes, list[Buffer]]:
        header, body = pack(message)
        messages[type(message).__name__] += 1
        for part in (header, *body):
            plaintext.extend(part)
        return header, body

    # `pack` makes the bytes that a session seals; in this process only the edge's session uses it.
    with patch("isthmus.protocol.session.pack", recorded), connect(cloud.connection, key=cloud.edge_key) as link:
        tokenizer: Any = link.load_tokenizer()
        config = TrainConfig(cloud="-", data=str(data))
        examples = read_examples(str(data), config)[:4]
        encoded, _ = encode(examples, tokenizer, 96)
        batch = next(iter(Batches(encoded, len(encoded), tokenizer.pad_token_id or 0).epoch()))
        model = load_adapter(link.load_model(), adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        activations: list[torch.Tensor] = []
        span = model.get_base_model().remote_layers.span

        def watched(hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
            activations.append(hidden.detach())
            output: torch.Tensor = span(hidden, mask, positions)
            return output

        model.get_base_model().remote_layers.span = watched
        model.train()
        model(**batch, use_cache=False).loss.backward()
    needles = {
        "text": [text.encode() for example in examples for text in (example.prompt, example.completion)],
        "token ids": [needle for example in encoded for needle in _runs(example.input_ids)],
        "labels": [
            needle for example in encoded for needle in _runs([label for label in example.labels if label >= 0])
        ],
        "adapter": [_values(parameter) for parameter in trained(model).values()],
        "its gradient": [
            _values(parameter.grad) for parameter in trained(model).values() if parameter.grad is not None
        ],
        "activations": [_values(hidden) for hidden in activations],
    }
    return {
        "messages": messages,
        "found": {name: any(needle in plaintext for needle in parts) for name, parts in needles.items()},
    }


def _runs(ids: Any) -> list[bytes]:
    """Runs of token ids as the usual whole numbers would put them into memory."""
    starts = range(0, len(ids) - NEEDLE_TOKENS + 1)
    return [
        b"".join(int(token).to_bytes(width, "little") for token in ids[start : start + NEEDLE_TOKENS])
        for start in starts
        for width in (2, 4, 8)
    ]


def _values(tensor: torch.Tensor) -> bytes:
    """A run of values from the middle of a tensor, none of them zero."""
    flat = tensor.detach().reshape(-1)
    flat = flat[flat != 0]
    middle = len(flat) // 2
    return flat[middle : middle + NEEDLE_VALUES].contiguous().numpy().tobytes()

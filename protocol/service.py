"""The names and sizes that both ends of the gRPC stream agree on. One gRPC message carries one frame of the session,
as opaque bytes."""

from __future__ import annotations

from typing import Final

SERVICE: Final = "isthmus.v1.Strip"
METHOD: Final = f"/{SERVICE}/Session"

MAX_GRPC_MESSAGE_BYTES: Final = 4 << 20  # a frame is about 1 MiB; this ceiling belongs to the outer layer only
KEEPALIVE_MS: Final = 20_000  # a peer that vanished without a word is noticed within two of these

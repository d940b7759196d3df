"""One message of every kind, in all its forms, with small tensors of every codec."""

from __future__ import annotations

import torch

from isthmus.backbone.sites.site_spec import Basis, Placement, SiteSpec
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import (
    ACTIVATION_CODECS,
    Payload,
    Role,
    codec_id,
    encode,
    encode_mask,
    encode_positions,
)


def tensor(codec: str = "fp32", role: Role = Role.ACTIVATION, shape: tuple[int, ...] = (1, 2, 3)) -> Payload:
    """A tensor of values that depend on its shape alone."""
    return encode(torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) - 2, codec, role)


_ID = m.CallId(1, 2, 3)
_MASK, _POSITIONS = encode_mask(torch.tensor([[1, 0]])), encode_positions(torch.tensor([[0, 1]]))
_INPUTS = m.SpanInputs(tensor(), _MASK, _POSITIONS)
_DIGEST = bytes(range(32))
_ENTRY = m.FileEntry("adapter_config.json", 3, _DIGEST)
_GRADIENT = tensor(role=Role.GRADIENT)
_LENT = m.LeasedWeights(tensor(shape=(2, 3)), tensor(shape=(4, 2)), 0.5)

MESSAGES: tuple[m.Message, ...] = (
    *(
        m.Forward(_ID, True, tensor(codec), _MASK, _POSITIONS, codec_id(codec), 1, True, 1)
        for codec in ACTIVATION_CODECS
    ),
    m.Forward(_ID, False, tensor(), None, None, codec_id("fp32"), wanted=False),
    m.Forward(_ID, False, tensor(), None, None, codec_id("fp32"), plan="2:6"),
    m.Decode(
        _ID,
        3,
        2,
        (0,),
        (1, 1),
        tensor("bf16"),
        encode_mask(torch.tensor([[0, 1, 1, 1]])),
        _POSITIONS,
        codec_id("bf16"),
        1,
        1,
    ),
    m.Decode(_ID, 0, 0, (), (), tensor(), None, None, codec_id("fp32")),
    m.CacheLost(_ID, 2),
    m.ForwardReply(_ID, tensor(), 1, 2, 3, (tensor("bf16"),)),
    m.Backward(_ID, _GRADIENT, _INPUTS, codec_id("int8"), 1, True, 1),
    m.Backward(_ID, _GRADIENT, None, codec_id("fp32")),
    m.BackwardReply(
        _ID, _GRADIENT, 1, 2, 3, True, tuple(tensor(role=Role.GRADIENT, shape=shape) for shape in ((2, 3), (4, 2)))
    ),
    m.BackwardReply(_ID, None, 1, 2, 3, False),
    m.Fetch(m.FileSet.PARTS, "config.json", 7),
    m.Blob("config.json", 0, 3, _DIGEST, b"{}\n"),
    m.FetchList(m.FileSet.ADAPTER),
    m.FetchList(m.FileSet.EMULATOR, "fidelity"),
    m.Fetch(m.FileSet.EMULATOR, "config.json", 7, "fidelity"),
    m.FileList((_ENTRY, m.FileEntry("README.md", 0, _DIGEST))),
    m.Status(m.StatusCode.BAD_REQUEST, _ID, "no such list"),
    m.Status(m.StatusCode.OK, None, ""),
    m.Ping(1),
    m.Pong(1, 1 << 30),
    m.Goodbye("done"),
    m.Attach(bytes(16), True, 500, True, m.Account("hospital-a", 2)),
    m.Attach(bytes(16)),
    m.Attach(bytes(16), transcript=True),
    m.SignTranscript(3),
    m.SignedTranscript(3, _DIGEST, 1, bytes(64), _DIGEST, _DIGEST, 2, bytes(64)),
    m.Workers(("cloud.example:7443", "[::1]:7444"), "[::1]:7444"),
    m.Put("adapter_config.json", 0, 3, _DIGEST, b"{}\n"),
    m.PutReply("adapter_config.json", _DIGEST, 3),
    m.PlugIn((_ENTRY,)),
    m.Sites(
        1,
        (
            SiteSpec(1, "self_attn.q_proj"),
            SiteSpec(1, "mlp.up_proj", Placement.LOW_RANK, 4, 5, Basis.SVD),
            SiteSpec(2, "mlp.up_proj", Placement.LEASED),
            SiteSpec(2, "", Placement.TAP, 8, 9),
        ),
    ),
    m.SiteQuestion(_ID, m.SitePhase.FORWARD, (0, 1), (tensor(),), 1, 2, 3),
    m.SiteQuestion(_ID, m.SitePhase.BACKWARD, (0,), (_GRADIENT,), 1, 2, 3),
    m.SiteQuestion(_ID, m.SitePhase.AGAIN, (0,), (), 1, 2, 3),
    m.SiteAnswer(_ID, (tensor(), tensor("fp16"))),
    m.Lease(1, 1, (_LENT,)),
)

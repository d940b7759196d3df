"""Sessions without a network, and a strategy for each message: `GENERATORS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st

from isthmus.backbone.sites.site_spec import Basis, Placement, SiteSpec
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure.certificates import WorkerCertificate
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity
from isthmus.protocol.session import CloudSession, EdgeSession, Established
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS, CODECS, Payload, Role, codec_id, encode, encode_mask

NOW = 1_700_000_000
ROOT = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
WORKER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
EDGE = Ed25519PrivateKey.from_private_bytes(bytes(range(2, 34)))
PIN = Fingerprint.of(ROOT.public_key().public_bytes_raw())
TENANT = Tenant("hospital-a", Fingerprint.of(EDGE.public_key().public_bytes_raw()))


def identity(root: Ed25519PrivateKey = ROOT, not_after: int = NOW + 1000) -> WorkerIdentity:
    certificate = WorkerCertificate.issue(root, WORKER.public_key().public_bytes_raw(), not_after)
    return WorkerIdentity(WORKER, certificate)


def session_info(tenant: Tenant, session_id: bytes) -> m.SessionInfo:
    return m.SessionInfo(
        session_id=session_id.hex(),
        model="tiny",
        digest="00" * 32,
        family="llama",
        n_layers=4,
        plan="1:1",
        hidden_size=8,
        attn_implementation="sdpa",
        span_dtype="fp32",
        codecs=ACTIVATION_CODECS,
        limits=m.SpanLimits(max_tokens_per_call=4096, max_message_bytes=1 << 26, activation_cache_bytes=1 << 20),
        server_version="0.1.0",
        numerics="fp32, here",
    )


def new_edge(**options: Any) -> EdgeSession:
    return EdgeSession(**{"pin": PIN, "edge_key": EDGE, "now": lambda: float(NOW), **options})


def new_cloud(**options: Any) -> CloudSession:
    return CloudSession(**{"identity": identity(), "authorize": lambda key: TENANT, "info": session_info, **options})


def shake(edge: EdgeSession, cloud: CloudSession, alter: Callable[[int, bytes], bytes] = lambda n, f: f) -> list[bytes]:
    """Drive a handshake to its end; `alter` may change flight 0, 1, 2 or 3 on its way. Returns the flights as sent."""
    flights = [edge.start()]
    for number in range(3):
        receiver = cloud if number % 2 == 0 else edge
        event = receiver.receive(alter(number, flights[-1]))
        flights.append(event.frames[0])
    edge.receive(alter(3, flights[-1]))
    return flights


def new_pair(**options: Any) -> tuple[EdgeSession, CloudSession]:
    """Two established sessions; `options` are given to both sides."""
    edge, cloud = new_edge(**options), new_cloud(**options)
    shake(edge, cloud)
    assert edge.established
    assert cloud.established
    return edge, cloud


def finish_established(edge: EdgeSession, cloud: CloudSession) -> None:
    """Drive a handshake and check that it establishes both sides."""
    first = cloud.receive(edge.start())
    second = edge.receive(first.frames[0])
    third = cloud.receive(second.frames[0])
    assert isinstance(third, Established)
    assert isinstance(edge.receive(third.frames[0]), Established)


def forward(shape: Sequence[int] = (2, 3, 8), codec: str = "fp32", call: int = 1) -> m.Forward:
    """A forward call with a mask, of values that depend on nothing but the shape and the call."""
    hidden = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(*shape) / 7 + call
    mask = torch.ones(shape[0], shape[1], dtype=torch.int64)
    payload = encode(hidden, codec, Role.ACTIVATION)
    return m.Forward(m.CallId(1, call), True, payload, encode_mask(mask), None, codec_id("fp32"))


def unchecked(tensor: torch.Tensor, codec: str, role: Role) -> Payload:
    """The payload of a side that sends what it should not: NaN and infinity, by fp32, bf16 or fp16."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[codec]
    raw = tensor.detach().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return Payload(codec_id(codec), role, tuple(tensor.shape), (raw,))


u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
call_ids = st.builds(m.CallId, u32, u64, u32)
reply_codecs = st.sampled_from([codec_id(name) for name in ACTIVATION_CODECS])
names = st.from_regex(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,127}", fullmatch=True)
texts = st.text(max_size=200)
digests = st.binary(min_size=32, max_size=32)


def payload(shape: tuple[int, ...], codec: str, role: Role, seed: int) -> Payload:
    """A payload of arbitrary valid bytes."""
    entry = CODECS[codec]
    generator = torch.Generator().manual_seed(seed)
    buffers = tuple(
        torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).numpy().tobytes()
        for size in entry.sizes(shape)
    )
    return Payload(entry.id, role, shape, buffers)


@st.composite
def hidden_states(draw: st.DrawFn, role: Role = Role.ACTIVATION, shape: tuple[int, ...] | None = None) -> Payload:
    dims = shape or (draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 130)))
    return payload(dims, draw(st.sampled_from(ACTIVATION_CODECS)), role, draw(u32))


@st.composite
def span_inputs(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> m.SpanInputs:
    hidden = draw(hidden_states(shape=shape))
    batch, length, _ = hidden.shape
    mask = payload((batch, length), "mask", Role.INDEX, draw(u32)) if draw(st.booleans()) else None
    rows = draw(st.sampled_from([1, batch]))
    positions = payload((rows, length), "int32", Role.INDEX, draw(u32)) if draw(st.booleans()) else None
    return m.SpanInputs(hidden, mask, positions)


visits = st.one_of(st.tuples(st.just(0), st.just(0)), st.tuples(u32.filter(bool), u32))
"""The numbers of a list of sites and of a lease, which belong to it."""


@st.composite
def forwards(draw: st.DrawFn) -> m.Forward:
    inputs = draw(span_inputs())
    keep, reply, (sites, lease), wanted = draw(st.booleans()), draw(reply_codecs), draw(visits), draw(st.booleans())
    plan = None if keep or sites else draw(st.none() | st.from_regex(r"[0-9]{1,6}:[0-9]{1,6}", fullmatch=True))
    tensors = inputs.hidden, inputs.attention_mask, inputs.position_ids
    return m.Forward(draw(call_ids), keep, *tensors, reply, sites, wanted, lease, plan)


@st.composite
def decodes(draw: st.DrawFn) -> m.Decode:
    hidden = draw(hidden_states())
    batch, length, _ = hidden.shape
    start, (sites, lease) = draw(st.integers(0, 20)), draw(visits)
    mask = payload((batch, start + length), "mask", Role.INDEX, draw(u32)) if draw(st.booleans()) else None
    positions = payload((1, length), "int32", Role.INDEX, draw(u32)) if draw(st.booleans()) else None
    rows = tuple(draw(st.lists(u32, min_size=batch, max_size=batch))) if draw(st.booleans()) else ()
    blocks = draw(st.sampled_from([(), (1,) * length, (length,)]))
    cache = draw(st.integers(0, m.MAX_CACHES - 1))
    return m.Decode(
        draw(call_ids), cache, start, rows, blocks, hidden, mask, positions, draw(reply_codecs), sites, lease
    )


@st.composite
def forward_replies(draw: st.DrawFn) -> m.ForwardReply:
    hidden = draw(hidden_states())
    widths = draw(st.lists(st.integers(1, 20), max_size=3))
    taps = tuple(draw(hidden_states(shape=(*hidden.shape[:2], width))) for width in widths)
    return m.ForwardReply(draw(call_ids), hidden, draw(u64), draw(u64), draw(u64), taps)


@st.composite
def backwards(draw: st.DrawFn) -> m.Backward:
    gradient = draw(hidden_states(Role.GRADIENT))
    replay = draw(st.none() | span_inputs(shape=gradient.shape))
    reply, (sites, lease), wanted = draw(reply_codecs), draw(visits), draw(st.booleans())
    return m.Backward(draw(call_ids), gradient, replay, reply, sites, wanted, lease)


@st.composite
def matrices(draw: st.DrawFn, role: Role) -> tuple[Payload, Payload]:
    """Those of a LoRA, or their gradients: `[r, in]` and `[out, r]`."""
    n_in, rank, n_out = (draw(st.integers(1, 9)) for _ in range(3))
    return payload((rank, n_in), "fp32", role, draw(u32)), payload((n_out, rank), "fp32", role, draw(u32))


@st.composite
def backward_replies(draw: st.DrawFn) -> m.BackwardReply:
    gradient = draw(st.none() | hidden_states(Role.GRADIENT))
    leased = [each for pair in draw(st.lists(matrices(Role.GRADIENT), max_size=3)) for each in pair]
    times, recomputed = (draw(u64), draw(u64), draw(u64)), draw(st.booleans())
    return m.BackwardReply(draw(call_ids), gradient, *times, recomputed, tuple(leased))


@st.composite
def leases(draw: st.DrawFn) -> m.Lease:
    scales = st.floats(allow_nan=False, allow_infinity=False)
    pairs = draw(st.lists(matrices(Role.ACTIVATION), min_size=1, max_size=3))
    weights = tuple(m.LeasedWeights(down, up, draw(scales)) for down, up in pairs)
    return m.Lease(draw(u32.filter(bool)), draw(u32.filter(bool)), weights)


parts = st.just("") | st.from_regex(r"[A-Za-z0-9_]{1,20}(\.[A-Za-z0-9_]{1,20}){0,3}", fullmatch=True)


@st.composite
def site_entries(draw: st.DrawFn) -> SiteSpec:
    part = draw(parts)
    at_linear = [Placement.EDGE, Placement.LOW_RANK, Placement.LEASED, Placement.LEASED_FROZEN]
    placement = draw(st.sampled_from(at_linear if part else [Placement.EDGE, Placement.TAP]))
    if placement not in (Placement.LOW_RANK, Placement.TAP):
        return SiteSpec(draw(u32), part, placement)
    rank = draw(st.integers(1 if part else 0, (1 << 16) - 1))
    return SiteSpec(draw(u32), part, placement, rank, draw(st.integers(0, (1 << 64) - 1)), draw(st.sampled_from(Basis)))


lists_of_sites = st.builds(m.Sites, st.integers(1, (1 << 32) - 1), st.lists(site_entries(), min_size=1).map(tuple))


@st.composite
def site_questions(draw: st.DrawFn) -> m.SiteQuestion:
    phase = draw(st.sampled_from(m.SitePhase))
    sites = tuple(draw(st.lists(st.integers(0, m.MAX_SITES - 1), min_size=1, max_size=3, unique=True)))
    role, count = {
        m.SitePhase.FORWARD: (Role.ACTIVATION, 1),
        m.SitePhase.AGAIN: (Role.ACTIVATION, 0),
    }.get(phase, (Role.GRADIENT, len(sites)))
    tensors = tuple(draw(hidden_states(role)) for _ in range(count))
    return m.SiteQuestion(draw(call_ids), phase, sites, tensors, draw(u64), draw(u64), draw(u64))


@st.composite
def site_answers(draw: st.DrawFn) -> m.SiteAnswer:
    role = draw(st.sampled_from([Role.ACTIVATION, Role.GRADIENT]))
    return m.SiteAnswer(draw(call_ids), tuple(draw(st.lists(hidden_states(role), max_size=3))))


@st.composite
def blobs(draw: st.DrawFn) -> m.Blob:
    data, offset = draw(st.binary(max_size=3000)), draw(u32)
    return m.Blob(draw(names), offset, offset + len(data) + draw(u16), draw(digests), data)


@st.composite
def puts(draw: st.DrawFn) -> m.Put:
    piece = draw(blobs())
    return m.Put(piece.name, piece.offset, piece.total, piece.sha256, piece.data)


file_sets = st.sampled_from(m.FileSet)
emulators, package_names = st.just(m.FileSet.EMULATOR), st.from_regex(m.PACKAGE_NAME, fullmatch=True)
entries = st.builds(m.FileEntry, names, u64, digests)


def lists_of_files(least: int, most: int) -> st.SearchStrategy[tuple[m.FileEntry, ...]]:
    return st.lists(entries, min_size=least, max_size=most, unique_by=lambda entry: entry.name).map(tuple)


addresses = st.from_regex(r"([a-z0-9.\-]{1,20}|\[[0-9a-f:]{1,20}\]):[0-9]{1,5}", fullmatch=True)


@st.composite
def lists_of_workers(draw: st.DrawFn) -> m.Workers:
    known = tuple(draw(st.lists(addresses, min_size=1, max_size=5, unique=True)))
    return m.Workers(known, draw(st.sampled_from(["", *known])))


signatures = st.binary(min_size=64, max_size=64)
accounts = st.builds(
    m.Account, st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._@+-]{0,63}", fullmatch=True), st.integers(1, 2**32 - 1)
)
GENERATORS: dict[type[m.Message], st.SearchStrategy[m.Message]] = {
    m.Forward: forwards(),
    m.ForwardReply: forward_replies(),
    m.Backward: backwards(),
    m.Decode: decodes(),
    m.CacheLost: st.builds(m.CacheLost, call_ids, u32),
    m.BackwardReply: backward_replies(),
    m.Fetch: st.builds(m.Fetch, file_sets, names, u64) | st.builds(m.Fetch, emulators, names, u64, package_names),
    m.Blob: blobs(),
    m.FetchList: st.builds(m.FetchList, file_sets) | st.builds(m.FetchList, emulators, package_names),
    m.FileList: st.builds(m.FileList, lists_of_files(0, 5)),
    m.Status: st.builds(m.Status, st.sampled_from(m.StatusCode), st.none() | call_ids, texts),
    m.Ping: st.builds(m.Ping, u64),
    m.Pong: st.builds(m.Pong, u64, u64),
    m.Goodbye: st.builds(m.Goodbye, texts),
    m.Attach: st.builds(
        m.Attach,
        st.binary(min_size=16, max_size=16),
        st.booleans(),
        u32,
        st.booleans(),
        st.none() | accounts,
        st.booleans(),
    ),
    m.Put: puts(),
    m.PutReply: st.builds(m.PutReply, names, digests, u64),
    m.PlugIn: st.builds(m.PlugIn, lists_of_files(1, 8)),
    m.Sites: lists_of_sites,
    m.SiteQuestion: site_questions(),
    m.SiteAnswer: site_answers(),
    m.Lease: leases(),
    m.Workers: lists_of_workers(),
    m.SignTranscript: st.builds(m.SignTranscript, u32),
    m.SignedTranscript: st.builds(
        m.SignedTranscript,
        u32,
        digests,
        u64,
        signatures,
        digests,
        digests,
        u64,
        signatures,
        st.sampled_from([b"", bytes(range(104))]),
    ),
}
"""One for each message; a test compares it with the protocol's list."""

edge_messages = st.one_of([GENERATORS[kind] for kind in m.EDGE_SENDS])
cloud_messages = st.one_of([GENERATORS[kind] for kind in m.CLOUD_SENDS])

SMALL = Limits(chunk_bytes=64)
"""Chunks of 64 bytes, so that small messages take many frames."""

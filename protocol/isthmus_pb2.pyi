from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_FP32: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_FP16: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]
    CODEC_MASK: _ClassVar[Codec]
    CODEC_INT32: _ClassVar[Codec]
    CODEC_INT4: _ClassVar[Codec]
    CODEC_INT4_OUTLIERS: _ClassVar[Codec]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_ACTIVATION: _ClassVar[Role]
    ROLE_GRADIENT: _ClassVar[Role]
    ROLE_INDEX: _ClassVar[Role]

class StatusCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_CODE_OK: _ClassVar[StatusCode]
    STATUS_CODE_DRAINING: _ClassVar[StatusCode]
    STATUS_CODE_ACTIVATIONS_LOST: _ClassVar[StatusCode]
    STATUS_CODE_BAD_REQUEST: _ClassVar[StatusCode]
    STATUS_CODE_OVER_QUOTA: _ClassVar[StatusCode]
    STATUS_CODE_NON_FINITE: _ClassVar[StatusCode]
    STATUS_CODE_INTERNAL: _ClassVar[StatusCode]
    STATUS_CODE_NOT_ENROLLED: _ClassVar[StatusCode]
    STATUS_CODE_TOO_LATE: _ClassVar[StatusCode]

class FileSet(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FILE_SET_UNSPECIFIED: _ClassVar[FileSet]
    FILE_SET_PARTS: _ClassVar[FileSet]
    FILE_SET_EMULATOR: _ClassVar[FileSet]
    FILE_SET_ADAPTER: _ClassVar[FileSet]
    FILE_SET_MODEL: _ClassVar[FileSet]
    FILE_SET_ADAPTERS: _ClassVar[FileSet]

class Placement(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PLACEMENT_UNSPECIFIED: _ClassVar[Placement]
    PLACEMENT_EDGE: _ClassVar[Placement]
    PLACEMENT_LOW_RANK: _ClassVar[Placement]
    PLACEMENT_LEASED: _ClassVar[Placement]
    PLACEMENT_TAP: _ClassVar[Placement]
    PLACEMENT_LEASED_FROZEN: _ClassVar[Placement]

class Basis(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BASIS_SEEDED: _ClassVar[Basis]
    BASIS_SVD: _ClassVar[Basis]

class SitePhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SITE_PHASE_UNSPECIFIED: _ClassVar[SitePhase]
    SITE_PHASE_FORWARD: _ClassVar[SitePhase]
    SITE_PHASE_AGAIN: _ClassVar[SitePhase]
    SITE_PHASE_BACKWARD: _ClassVar[SitePhase]
    SITE_PHASE_BACKWARD_ONLY: _ClassVar[SitePhase]
CODEC_UNSPECIFIED: Codec
CODEC_FP32: Codec
CODEC_BF16: Codec
CODEC_FP16: Codec
CODEC_INT8: Codec
CODEC_MASK: Codec
CODEC_INT32: Codec
CODEC_INT4: Codec
CODEC_INT4_OUTLIERS: Codec
ROLE_UNSPECIFIED: Role
ROLE_ACTIVATION: Role
ROLE_GRADIENT: Role
ROLE_INDEX: Role
STATUS_CODE_OK: StatusCode
STATUS_CODE_DRAINING: StatusCode
STATUS_CODE_ACTIVATIONS_LOST: StatusCode
STATUS_CODE_BAD_REQUEST: StatusCode
STATUS_CODE_OVER_QUOTA: StatusCode
STATUS_CODE_NON_FINITE: StatusCode
STATUS_CODE_INTERNAL: StatusCode
STATUS_CODE_NOT_ENROLLED: StatusCode
STATUS_CODE_TOO_LATE: StatusCode
FILE_SET_UNSPECIFIED: FileSet
FILE_SET_PARTS: FileSet
FILE_SET_EMULATOR: FileSet
FILE_SET_ADAPTER: FileSet
FILE_SET_MODEL: FileSet
FILE_SET_ADAPTERS: FileSet
PLACEMENT_UNSPECIFIED: Placement
PLACEMENT_EDGE: Placement
PLACEMENT_LOW_RANK: Placement
PLACEMENT_LEASED: Placement
PLACEMENT_TAP: Placement
PLACEMENT_LEASED_FROZEN: Placement
BASIS_SEEDED: Basis
BASIS_SVD: Basis
SITE_PHASE_UNSPECIFIED: SitePhase
SITE_PHASE_FORWARD: SitePhase
SITE_PHASE_AGAIN: SitePhase
SITE_PHASE_BACKWARD: SitePhase
SITE_PHASE_BACKWARD_ONLY: SitePhase

class Frame(_message.Message):
    __slots__ = ("prefix", "sealed")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    prefix: bytes
    sealed: bytes
    def __init__(self, prefix: _Optional[bytes] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("codec", "role", "shape")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    codec: Codec
    role: Role
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, codec: _Optional[_Union[Codec, str]] = ..., role: _Optional[_Union[Role, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("forward", "forward_reply", "backward", "backward_reply", "fetch", "blob", "fetch_list", "file_list", "status", "ping", "pong", "goodbye", "attach", "put", "put_reply", "plug_in", "sites", "site_question", "site_answer", "lease", "workers", "decode", "cache_lost", "sign_transcript", "signed_transcript")
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    FORWARD_REPLY_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_REPLY_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    FETCH_LIST_FIELD_NUMBER: _ClassVar[int]
    FILE_LIST_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    PUT_FIELD_NUMBER: _ClassVar[int]
    PUT_REPLY_FIELD_NUMBER: _ClassVar[int]
    PLUG_IN_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    SITE_QUESTION_FIELD_NUMBER: _ClassVar[int]
    SITE_ANSWER_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    CACHE_LOST_FIELD_NUMBER: _ClassVar[int]
    SIGN_TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    SIGNED_TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    forward: Forward
    forward_reply: ForwardReply
    backward: Backward
    backward_reply: BackwardReply
    fetch: Fetch
    blob: Blob
    fetch_list: FetchList
    file_list: FileList
    status: Status
    ping: Ping
    pong: Pong
    goodbye: Goodbye
    attach: Attach
    put: Put
    put_reply: PutReply
    plug_in: PlugIn
    sites: Sites
    site_question: SiteQuestion
    site_answer: SiteAnswer
    lease: Lease
    workers: Workers
    decode: Decode
    cache_lost: CacheLost
    sign_transcript: SignTranscript
    signed_transcript: SignedTranscript
    def __init__(self, forward: _Optional[_Union[Forward, _Mapping]] = ..., forward_reply: _Optional[_Union[ForwardReply, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., backward_reply: _Optional[_Union[BackwardReply, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ..., fetch_list: _Optional[_Union[FetchList, _Mapping]] = ..., file_list: _Optional[_Union[FileList, _Mapping]] = ..., status: _Optional[_Union[Status, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., put: _Optional[_Union[Put, _Mapping]] = ..., put_reply: _Optional[_Union[PutReply, _Mapping]] = ..., plug_in: _Optional[_Union[PlugIn, _Mapping]] = ..., sites: _Optional[_Union[Sites, _Mapping]] = ..., site_question: _Optional[_Union[SiteQuestion, _Mapping]] = ..., site_answer: _Optional[_Union[SiteAnswer, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., workers: _Optional[_Union[Workers, _Mapping]] = ..., decode: _Optional[_Union[Decode, _Mapping]] = ..., cache_lost: _Optional[_Union[CacheLost, _Mapping]] = ..., sign_transcript: _Optional[_Union[SignTranscript, _Mapping]] = ..., signed_transcript: _Optional[_Union[SignedTranscript, _Mapping]] = ...) -> None: ...

class CallId(_message.Message):
    __slots__ = ("step", "call", "attempt")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    step: int
    call: int
    attempt: int
    def __init__(self, step: _Optional[int] = ..., call: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("id", "keep", "hidden", "attention_mask", "position_ids", "reply_codec", "sites", "wanted", "lease", "plan")
    ID_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    REPLY_CODEC_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    id: CallId
    keep: bool
    hidden: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    reply_codec: Codec
    sites: int
    wanted: bool
    lease: int
    plan: str
    def __init__(self, id: _Optional[_Union[CallId, _Mapping]] = ..., keep: bool = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., attention_mask: _Optional[_Union[Tensor, _Mapping]] = ..., position_ids: _Optional[_Union[Tensor, _Mapping]] = ..., reply_codec: _Optional[_Union[Codec, str]] = ..., sites: _Optional[int] = ..., wanted: bool = ..., lease: _Optional[int] = ..., plan: _Optional[str] = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("id", "hidden", "compute_ns", "crypto_ns", "queue_ns", "taps")
    ID_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    CRYPTO_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    id: CallId
    hidden: Tensor
    compute_ns: int
    crypto_ns: int
    queue_ns: int
    taps: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, id: _Optional[_Union[CallId, _Mapping]] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., compute_ns: _Optional[int] = ..., crypto_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., taps: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("id", "gradient", "replay", "reply_codec", "sites", "wanted", "lease")
    ID_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    REPLY_CODEC_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    id: CallId
    gradient: Tensor
    replay: SpanInputs
    reply_codec: Codec
    sites: int
    wanted: bool
    lease: int
    def __init__(self, id: _Optional[_Union[CallId, _Mapping]] = ..., gradient: _Optional[_Union[Tensor, _Mapping]] = ..., replay: _Optional[_Union[SpanInputs, _Mapping]] = ..., reply_codec: _Optional[_Union[Codec, str]] = ..., sites: _Optional[int] = ..., wanted: bool = ..., lease: _Optional[int] = ...) -> None: ...

class SpanInputs(_message.Message):
    __slots__ = ("hidden", "attention_mask", "position_ids")
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    hidden: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    def __init__(self, hidden: _Optional[_Union[Tensor, _Mapping]] = ..., attention_mask: _Optional[_Union[Tensor, _Mapping]] = ..., position_ids: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class BackwardReply(_message.Message):
    __slots__ = ("id", "gradient", "compute_ns", "crypto_ns", "queue_ns", "recomputed", "leased")
    ID_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    CRYPTO_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    id: CallId
    gradient: Tensor
    compute_ns: int
    crypto_ns: int
    queue_ns: int
    recomputed: bool
    leased: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, id: _Optional[_Union[CallId, _Mapping]] = ..., gradient: _Optional[_Union[Tensor, _Mapping]] = ..., compute_ns: _Optional[int] = ..., crypto_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., recomputed: bool = ..., leased: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Decode(_message.Message):
    __slots__ = ("id", "cache", "start", "rows", "blocks", "hidden", "attention_mask", "position_ids", "reply_codec", "sites", "lease")
    ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    REPLY_CODEC_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    id: CallId
    cache: int
    start: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    blocks: _containers.RepeatedScalarFieldContainer[int]
    hidden: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    reply_codec: Codec
    sites: int
    lease: int
    def __init__(self, id: _Optional[_Union[CallId, _Mapping]] = ..., cache: _Optional[int] = ..., start: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., blocks: _Optional[_Iterable[int]] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., attention_mask: _Optional[_Union[Tensor, _Mapping]] = ..., position_ids: _Optional[_Union[Tensor, _Mapping]] = ..., reply_codec: _Optional[_Union[Codec, str]] = ..., sites: _Optional[int] = ..., lease: _Optional[int] = ...) -> None: ...

class CacheLost(_message.Message):
    __slots__ = ("id", "have")
    ID_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    id: CallId
    have: int
    def __init__(self, id: _Optional[_Union[CallId, _Mapping]] = ..., have: _Optional[int] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("code", "id", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: StatusCode
    id: CallId
    message: str
    def __init__(self, code: _Optional[_Union[StatusCode, str]] = ..., id: _Optional[_Union[CallId, _Mapping]] = ..., message: _Optional[str] = ...) -> None: ...

class FileEntry(_message.Message):
    __slots__ = ("name", "size", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class FetchList(_message.Message):
    __slots__ = ("file_set", "package")
    FILE_SET_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    file_set: FileSet
    package: str
    def __init__(self, file_set: _Optional[_Union[FileSet, str]] = ..., package: _Optional[str] = ...) -> None: ...

class FileList(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[FileEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[FileEntry, _Mapping]]] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("file_set", "name", "offset", "package")
    FILE_SET_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    file_set: FileSet
    name: str
    offset: int
    package: str
    def __init__(self, file_set: _Optional[_Union[FileSet, str]] = ..., name: _Optional[str] = ..., offset: _Optional[int] = ..., package: _Optional[str] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("name", "offset", "total", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    total: int
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., total: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class Put(_message.Message):
    __slots__ = ("name", "offset", "total", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    total: int
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., total: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("name", "sha256", "held")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: bytes
    held: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[bytes] = ..., held: _Optional[int] = ...) -> None: ...

class PlugIn(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[FileEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[FileEntry, _Mapping]]] = ...) -> None: ...

class Site(_message.Message):
    __slots__ = ("layer", "part", "placement", "rank", "seed", "basis")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    part: str
    placement: Placement
    rank: int
    seed: int
    basis: Basis
    def __init__(self, layer: _Optional[int] = ..., part: _Optional[str] = ..., placement: _Optional[_Union[Placement, str]] = ..., rank: _Optional[int] = ..., seed: _Optional[int] = ..., basis: _Optional[_Union[Basis, str]] = ...) -> None: ...

class Sites(_message.Message):
    __slots__ = ("number", "entries")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    number: int
    entries: _containers.RepeatedCompositeFieldContainer[Site]
    def __init__(self, number: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[Site, _Mapping]]] = ...) -> None: ...

class SiteQuestion(_message.Message):
    __slots__ = ("id", "phase", "sites", "tensors", "compute_ns", "crypto_ns", "queue_ns")
    ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    CRYPTO_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    id: CallId
    phase: SitePhase
    sites: _containers.RepeatedScalarFieldContainer[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    compute_ns: int
    crypto_ns: int
    queue_ns: int
    def __init__(self, id: _Optional[_Union[CallId, _Mapping]] = ..., phase: _Optional[_Union[SitePhase, str]] = ..., sites: _Optional[_Iterable[int]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., compute_ns: _Optional[int] = ..., crypto_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ...) -> None: ...

class SiteAnswer(_message.Message):
    __slots__ = ("id", "tensors")
    ID_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    id: CallId
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, id: _Optional[_Union[CallId, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class LeasedWeights(_message.Message):
    __slots__ = ("down", "up", "scale")
    DOWN_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    down: Tensor
    up: Tensor
    scale: float
    def __init__(self, down: _Optional[_Union[Tensor, _Mapping]] = ..., up: _Optional[_Union[Tensor, _Mapping]] = ..., scale: _Optional[float] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("number", "sites", "weights")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    number: int
    sites: int
    weights: _containers.RepeatedCompositeFieldContainer[LeasedWeights]
    def __init__(self, number: _Optional[int] = ..., sites: _Optional[int] = ..., weights: _Optional[_Iterable[_Union[LeasedWeights, _Mapping]]] = ...) -> None: ...

class SessionInfo(_message.Message):
    __slots__ = ("session_id", "model", "digest", "family", "n_layers", "plan", "hidden_size", "attn_implementation", "span_dtype", "codecs", "limits", "server_version", "numerics")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    N_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    ATTN_IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    SPAN_DTYPE_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model: str
    digest: str
    family: str
    n_layers: int
    plan: str
    hidden_size: int
    attn_implementation: str
    span_dtype: str
    codecs: _containers.RepeatedScalarFieldContainer[str]
    limits: SpanLimits
    server_version: str
    numerics: str
    def __init__(self, session_id: _Optional[str] = ..., model: _Optional[str] = ..., digest: _Optional[str] = ..., family: _Optional[str] = ..., n_layers: _Optional[int] = ..., plan: _Optional[str] = ..., hidden_size: _Optional[int] = ..., attn_implementation: _Optional[str] = ..., span_dtype: _Optional[str] = ..., codecs: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[SpanLimits, _Mapping]] = ..., server_version: _Optional[str] = ..., numerics: _Optional[str] = ...) -> None: ...

class SpanLimits(_message.Message):
    __slots__ = ("max_tokens_per_call", "max_message_bytes", "activation_cache_bytes")
    MAX_TOKENS_PER_CALL_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_tokens_per_call: int
    max_message_bytes: int
    activation_cache_bytes: int
    def __init__(self, max_tokens_per_call: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., activation_cache_bytes: _Optional[int] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("link", "interactive", "deadline_ms", "settled", "account", "transcript")
    LINK_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    link: bytes
    interactive: bool
    deadline_ms: int
    settled: bool
    account: Account
    transcript: bool
    def __init__(self, link: _Optional[bytes] = ..., interactive: bool = ..., deadline_ms: _Optional[int] = ..., settled: bool = ..., account: _Optional[_Union[Account, _Mapping]] = ..., transcript: bool = ...) -> None: ...

class Account(_message.Message):
    __slots__ = ("tenant", "weight")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    weight: int
    def __init__(self, tenant: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class Workers(_message.Message):
    __slots__ = ("addresses", "go_to")
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    GO_TO_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    go_to: str
    def __init__(self, addresses: _Optional[_Iterable[str]] = ..., go_to: _Optional[str] = ...) -> None: ...

class SignTranscript(_message.Message):
    __slots__ = ("exchanges",)
    EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    exchanges: int
    def __init__(self, exchanges: _Optional[int] = ...) -> None: ...

class SignedTranscript(_message.Message):
    __slots__ = ("exchanges", "head", "signed_at", "signature", "root", "worker", "not_after", "root_signature", "issuer")
    EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    SIGNED_AT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    ROOT_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    exchanges: int
    head: bytes
    signed_at: int
    signature: bytes
    root: bytes
    worker: bytes
    not_after: int
    root_signature: bytes
    issuer: bytes
    def __init__(self, exchanges: _Optional[int] = ..., head: _Optional[bytes] = ..., signed_at: _Optional[int] = ..., signature: _Optional[bytes] = ..., root: _Optional[bytes] = ..., worker: _Optional[bytes] = ..., not_after: _Optional[int] = ..., root_signature: _Optional[bytes] = ..., issuer: _Optional[bytes] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("nonce", "peak_bytes")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    peak_bytes: int
    def __init__(self, nonce: _Optional[int] = ..., peak_bytes: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

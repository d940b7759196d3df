from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Number(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NUMBER_UNSPECIFIED: _ClassVar[Number]
    NUMBER_FLOAT32: _ClassVar[Number]
    NUMBER_INT64: _ClassVar[Number]
    NUMBER_INT32: _ClassVar[Number]
    NUMBER_BFLOAT16: _ClassVar[Number]

class StopReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_REASON_STOP: _ClassVar[StopReason]
    STOP_REASON_LENGTH: _ClassVar[StopReason]
NUMBER_UNSPECIFIED: Number
NUMBER_FLOAT32: Number
NUMBER_INT64: Number
NUMBER_INT32: Number
NUMBER_BFLOAT16: Number
STOP_REASON_STOP: StopReason
STOP_REASON_LENGTH: StopReason

class SparseRows(_message.Message):
    __slots__ = ("values", "row_starts", "columns")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    ROW_STARTS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    row_starts: bytes
    columns: bytes
    def __init__(self, values: _Optional[bytes] = ..., row_starts: _Optional[bytes] = ..., columns: _Optional[bytes] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dense", "sparse", "number", "shape")
    DENSE_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    dense: bytes
    sparse: SparseRows
    number: Number
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dense: _Optional[bytes] = ..., sparse: _Optional[_Union[SparseRows, _Mapping]] = ..., number: _Optional[_Union[Number, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class EncodedText(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: bytes
    def __init__(self, tokens: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("text", "image", "audio")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    text: EncodedText
    image: bytes
    audio: bytes
    def __init__(self, text: _Optional[_Union[EncodedText, _Mapping]] = ..., image: _Optional[bytes] = ..., audio: _Optional[bytes] = ...) -> None: ...

class Datum(_message.Message):
    __slots__ = ("input", "loss_inputs")
    class LossInputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...
    INPUT_FIELD_NUMBER: _ClassVar[int]
    LOSS_INPUTS_FIELD_NUMBER: _ClassVar[int]
    input: _containers.RepeatedCompositeFieldContainer[Chunk]
    loss_inputs: _containers.MessageMap[str, Tensor]
    def __init__(self, input: _Optional[_Iterable[_Union[Chunk, _Mapping]]] = ..., loss_inputs: _Optional[_Mapping[str, Tensor]] = ...) -> None: ...

class LossSetting(_message.Message):
    __slots__ = ("figure", "text")
    FIGURE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    figure: float
    text: str
    def __init__(self, figure: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class ForwardBackwardRequest(_message.Message):
    __slots__ = ("model_id", "seq_id", "data", "loss", "loss_figures", "forward_only", "loss_settings")
    class LossFiguresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class LossSettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: LossSetting
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[LossSetting, _Mapping]] = ...) -> None: ...
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIGURES_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ONLY_FIELD_NUMBER: _ClassVar[int]
    LOSS_SETTINGS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    seq_id: int
    data: _containers.RepeatedCompositeFieldContainer[Datum]
    loss: str
    loss_figures: _containers.ScalarMap[str, float]
    forward_only: bool
    loss_settings: _containers.MessageMap[str, LossSetting]
    def __init__(self, model_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., data: _Optional[_Iterable[_Union[Datum, _Mapping]]] = ..., loss: _Optional[str] = ..., loss_figures: _Optional[_Mapping[str, float]] = ..., forward_only: bool = ..., loss_settings: _Optional[_Mapping[str, LossSetting]] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("data", "offsets", "number", "trailing_shape")
    DATA_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TRAILING_SHAPE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    offsets: bytes
    number: Number
    trailing_shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, data: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., number: _Optional[_Union[Number, str]] = ..., trailing_shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("kind", "fields", "data")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Batch
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    kind: str
    fields: _containers.MessageMap[str, Batch]
    data: int
    def __init__(self, kind: _Optional[str] = ..., fields: _Optional[_Mapping[str, Batch]] = ..., data: _Optional[int] = ...) -> None: ...

class ForwardBackwardOutput(_message.Message):
    __slots__ = ("kind", "records", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    records: _containers.RepeatedCompositeFieldContainer[Record]
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, kind: _Optional[str] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Likeliest(_message.Message):
    __slots__ = ("tokens", "logprobs", "k", "positions")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    tokens: bytes
    logprobs: bytes
    k: int
    positions: int
    def __init__(self, tokens: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., k: _Optional[int] = ..., positions: _Optional[int] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("stop_reason", "tokens", "logprobs", "likeliest")
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LIKELIEST_FIELD_NUMBER: _ClassVar[int]
    stop_reason: StopReason
    tokens: bytes
    logprobs: bytes
    likeliest: Likeliest
    def __init__(self, stop_reason: _Optional[_Union[StopReason, str]] = ..., tokens: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., likeliest: _Optional[_Union[Likeliest, _Mapping]] = ...) -> None: ...

class SampleResponse(_message.Message):
    __slots__ = ("sequences", "prompt_logprobs", "prompt_likeliest")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LIKELIEST_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    prompt_logprobs: bytes
    prompt_likeliest: Likeliest
    def __init__(self, sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ..., prompt_logprobs: _Optional[bytes] = ..., prompt_likeliest: _Optional[_Union[Likeliest, _Mapping]] = ...) -> None: ...

"""The JSON bodies of Tinker's API. What is not in a class here is refused, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, FailFast, Field

from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.web.bounded_body import BoundedBody, few
from isthmus.edge.config.settings import MOST_FACTOR

Number = Annotated[int, Field(ge=0, lt=2**62)]
Seconds = Annotated[int, Field(ge=1, le=10 * 366 * 86400)]
Id = Annotated[str, Field(min_length=1, max_length=300)]
Labels = dict[str, Any] | None
MOST_STOPS = 64


class Body(BoundedBody):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    type: str | None = None  # names the request again


class NewSession(Body):
    """`create_session`."""

    tags: Annotated[list[str], FailFast()] = Field(default_factory=list)
    user_metadata: Labels = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class OfSession(Body):
    """`session_heartbeat`."""

    session_id: Id


class OfModel(Body):
    """`get_info`."""

    model_id: Id


class LoraConfig(Body):
    """What of a model is trained."""

    rank: int = Field(ge=1, le=4096)
    seed: int | None = Field(None, ge=0, lt=2**63)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class NewModel(Body):
    """`create_model`."""

    session_id: Id
    model_seq_id: Number
    base_model: Id
    user_metadata: Labels = None
    lora_config: LoraConfig | None = None
    optimizer_config: dict[str, Any] | None = None


class AdamParams(Body):
    """What a step of Adam takes; its defaults are the API's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(1e-4, ge=0, le=MOST_FACTOR)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-12, ge=0, le=MOST_FACTOR)
    weight_decay: float = Field(0.0, ge=0, le=MOST_FACTOR)
    grad_clip_norm: float = Field(0.0, ge=0, le=MOST_FACTOR)


class Step(OfModel):
    """`optim_step`."""

    seq_id: Number
    adam_params: dict[str, Any] | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(OfModel):
    """`save_weights`."""

    seq_id: Number
    path: str | None = None
    ttl_seconds: Seconds | None = None
    overwrite: bool = False
    user_metadata: Labels = None


class SaveForSampler(OfModel):
    """`save_weights_for_sampler`."""

    seq_id: Number
    path: str | None = None
    sampling_session_seq_id: Number | None = None
    kind: str = "snapshot"
    ttl_seconds: Seconds | None = None
    user_metadata: Labels = None


class LoadWeights(Body):
    """`load_weights`: into a model, or into a new one of a session."""

    path: Id
    optimizer: bool
    model_id: Id | None = None
    seq_id: Number | None = None
    session_id: Id | None = None
    model_seq_id: Number | None = None
    base_model: str | None = None
    user_metadata: Labels = None
    optimizer_config: dict[str, Any] | None = None
    weights_access_token: str | None = None


class NewSampler(Body):
    """`create_sampling_session`."""

    session_id: Id
    sampling_session_seq_id: Number
    base_model: str | None = None
    model_path: str | None = None


class ModelInput(Body):
    """A prompt."""

    chunks: Annotated[list[dict[str, Any]], FailFast()]

    def tokens(self) -> list[int]:
        """Its tokens. Raises RefusalError where it holds something else."""
        found: list[int] = []
        for chunk in self.chunks:
            kind, tokens = chunk.get("type"), chunk.get("tokens")
            if kind != "encoded_text":
                raise RefusalError(
                    f"the prompt holds {kind or 'nothing known'}; only tokens (encoded_text) are offered"
                )
            if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
                raise RefusalError("the prompt's tokens are no list of whole numbers from 0 on")
            found += tokens
        if not found:
            raise RefusalError("the prompt is empty")
        return found


class SamplingParams(Body):
    """How tokens are chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[str | list[str] | list[int] | None, few(MOST_STOPS)] = None
    temperature: float = Field(1.0, ge=0, le=MOST_FACTOR)
    top_k: int = Field(-1, ge=-1, lt=2**31)
    top_p: float = Field(1.0, gt=0, le=1)

    def stops(self) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
        """Texts and tokens that end an answer. Raises RefusalError."""
        if self.stop is None:
            return (), ()
        if isinstance(self.stop, str):
            return (self.stop,), ()
        if not self.stop:
            raise RefusalError("stop = [] asks to go on behind the model's own end, which is not offered: leave it out")
        texts = [stop for stop in self.stop if isinstance(stop, str)]
        return texts, [[stop] for stop in self.stop if isinstance(stop, int)]


class Sample(Body):
    """`asample`."""

    sampling_session_id: Id
    seq_id: Number
    prompt: ModelInput
    sampling_params: dict[str, Any]
    num_samples: int = 1
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


class Poll(Body):
    """`retrieve_future`."""

    request_id: Id
    allow_metadata_only: bool = False  # an answer is never so large


class OfWeights(Body):
    """`weights_info`."""

    tinker_path: Id


class Expiry(Body):
    """Of a checkpoint."""

    ttl_seconds: Seconds | None = None


class End(Body):
    """`sessions/{id}/finish`."""

    reason: Annotated[dict[Literal["type"], str], few(1)] | None = None
    detail: str | None = None

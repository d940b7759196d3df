"""The settings of the data, and of what is computed with a batch of them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from isthmus.edge.config.settings import MOST_TEXTS, MOST_TOKENS, Settings, within_cores

Precision = Literal["fp32", "bf16"]


class ExamplesConfig(Settings):
    """Where examples are, and what an example is made of."""

    panel = "Data"

    data: str = Field(description="The data: a .jsonl, .csv or .tsv file, or hub:NAME[:SPLIT].")
    format: Literal["auto", "jsonl", "csv", "tsv", "hub"] = Field(
        "auto", description="Form of the data; `auto` goes by the file's ending."
    )
    header: bool = Field(
        True, description="Whether a CSV or TSV file opens with column names; without them columns are 0, 1, 2, …"
    )
    text_column: str | None = Field(None, description="Column or key of plain text, all of it trained on.")
    prompt_column: str | None = Field(
        None, description="Column or key of the prompt, which is read but not trained on."
    )
    completion_column: str | None = Field(None, description="Column or key of the completion, which is trained on.")
    prompt_template: str | None = Field(
        None, description="The prompt, made of columns: 'Meaning: {mr}\\nText:' (\\n is a line break)."
    )
    completion_template: str | None = Field(None, description="The completion, made of columns: ' {ref}'.")
    max_length: int = Field(
        512, ge=2, le=MOST_TOKENS, description="Tokens per example at most; what is longer is cut at its end."
    )

    @property
    def withholds(self) -> bool:
        """Whether another token stands in the place of each answer, see `isthmus.edge.data.batches`."""
        return False

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        has_prompt = bool(self.prompt_column or self.prompt_template)
        has_completion = bool(self.completion_column or self.completion_template)
        if self.text_column and (has_prompt or has_completion):
            raise ValueError("text_column excludes prompt and completion columns: give one or the other")
        if self.prompt_column and self.prompt_template:
            raise ValueError("prompt_column and prompt_template exclude each other: name the column in the template")
        if self.completion_column and self.completion_template:
            raise ValueError(
                "completion_column and completion_template exclude each other: name the column in the template"
            )
        if has_prompt and not has_completion:
            raise ValueError("a prompt needs a completion: give completion_column or completion_template")
        return self


class SentExamplesConfig(ExamplesConfig):
    """Examples that pass through a cloud's layers."""

    panel = "Privacy"

    withhold_answers: bool = Field(
        False,
        description="Send another token in the place of each answer, which has to be one token at the end of its row. "
        "The result is the same, bit for bit, and what is left of the labels is in the gradients.",
    )

    @property
    def withholds(self) -> bool:
        """See `ExamplesConfig`."""
        return self.withhold_answers


class DataConfig(ExamplesConfig):
    """Examples to train on, and examples that are held out."""

    validation: str | None = Field(
        None, description="Held-out data in the same form; without it, a part of the training data."
    )
    validation_split: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Fraction of the training data held out when no validation data are given; 0 for none.",
    )


class ComputationConfig(Settings):
    """How a micro-batch is computed."""

    panel = "Computation"

    batch: int = Field(4, ge=1, le=MOST_TEXTS, description="Examples per micro-batch.")
    precision: Precision = Field(
        "fp32",
        description="What the forward computes in; under bf16, frozen linears are held in it, and what is trained, its "
        "optimizer and the saved adapter stay fp32.",
    )

    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the edge's own layers compute.")
    threads: int | None = Field(
        None,
        ge=1,
        description="Threads of torch in this process, at most the usable cores; by default torch's choice.",
    )

    _check_threads = field_validator("threads")(within_cores)

"""What a model is asked to do, and where its data lies: plain validated settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

Kind = Literal[
    "classification",
    "regression",
    "causal-lm",
    "token-classification",
    "image-classification",
    "sentence-embedding",
]

_PAIR = {"text": "text", "text_pair": None}
_COLUMNS: dict[str, dict[str, str | None]] = {
    "classification": {**_PAIR, "label": "label"},
    "regression": {**_PAIR, "label": "label"},
    "causal-lm": {"text": "text"},
    "token-classification": {"tokens": "tokens", "label": "label"},
    "image-classification": {"image": "image", "label": "label"},
    "sentence-embedding": {"text": "text", "text_pair": "text_pair", "score": "score"},
}
_ALL_COLUMNS = ("text", "text_pair", "label", "tokens", "image", "score")
_LIMITS_OF_KIND = {"stride": ("causal-lm",), "score_scale": ("sentence-embedding",)}


class Settings(BaseModel):
    """A frozen, strict group of settings: no unknown keys, no infinite numbers, no truth values taken for numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"{str(value).lower()} is neither a number nor a text")
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{value!r} has a NUL character in it")
        return value


class Task(Settings):
    """The kind of task and the columns it reads; a column left out gets the default of its kind.

    ===================== ==================================================================
    kind                  columns (defaults)
    ===================== ==================================================================
    classification        text ("text"), text_pair (none), label ("label")
    regression            text ("text"), text_pair (none), label ("label", a number)
    causal-lm             text ("text")
    token-classification  tokens ("tokens", list of words), label ("label", one for each word)
    image-classification  image ("image"), label ("label")
    sentence-embedding    text ("text"), text_pair ("text_pair"), score ("score", may be absent)
    ===================== ==================================================================

    Example:
        >>> Task(kind="classification", text="sentence").label
        'label'
    """

    kind: Kind
    text: str | None = Field(None, description="column with the text")
    text_pair: str | None = Field(None, description="column with a second text, judged together with the first")
    label: str | None = Field(None, description="column with the class, the classes of the words, or the number")
    tokens: str | None = Field(None, description="column with the list of words")
    image: str | None = Field(None, description="column with the image (an image, its bytes or its path)")
    score: str | None = Field(None, description="column with the similarity of two texts")
    score_scale: PositiveFloat = Field(1.0, description="score of two texts of the same meaning: 5 for STS-B")
    max_length: PositiveInt | None = Field(
        None,
        description="tokens in one input; by default the model's limit or 512; for causal-lm blocks of 256",
    )
    stride: PositiveInt | None = Field(
        None,
        description="causal-lm: tokens between the starts of evaluation blocks; by default no overlap",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_columns(cls, given: Any) -> Any:
        if not isinstance(given, dict) or str(given.get("kind")) not in _COLUMNS:
            return given  # the type of the field says what is wrong
        kind, columns = given["kind"], _COLUMNS[given["kind"]]
        named = {name: column for name, column in given.items() if name not in _ALL_COLUMNS or column is not None}
        strange = [name for name in named if name in _ALL_COLUMNS and name not in columns]
        strange += [
            name for name, kinds in _LIMITS_OF_KIND.items() if named.get(name) is not None and kind not in kinds
        ]
        strange = [name for name in strange if not (name == "score_scale" and named[name] == 1.0)]
        if strange:
            raise ValueError(
                f"{', '.join(strange)} has no meaning for kind {kind!r}, which reads: {', '.join(columns)}"
            )
        return {**columns, **named}

    @model_validator(mode="after")
    def _stride_fits(self) -> Task:
        if self.stride is not None and self.stride > self.block:
            raise ValueError(
                f"stride {self.stride} is larger than the block of {self.block} tokens: text would be skipped"
            )
        return self

    @model_validator(mode="after")
    def _answer_is_not_given(self) -> Task:
        for answer in ("label", "score"):
            for given in ("text", "text_pair", "tokens", "image"):
                column = getattr(self, answer)
                if column is not None and column == getattr(self, given):
                    raise ValueError(f"{given} and {answer} are the same column {column!r}: the answer would be given")
        return self

    @property
    def block(self) -> int:
        """Tokens in one block of a causal language model."""
        return self.max_length or 256


def _as_text(source: Any) -> Any:
    return str(source) if hasattr(source, "__fspath__") else source


Source = Annotated[str, BeforeValidator(_as_text)]


class Data(Settings):
    """Where the rows come from: files, image folders, or data sets of the Hub.

    A source is what :func:`finegraft.data.read.read_table` reads. A table with a ``split`` column, or a
    data set with several splits, gives its own split to each of ``train``, ``eval`` and ``test``.
    """

    train: Source | None = Field(None, description="rows to train on")
    eval: Source = Field(description="rows to evaluate on")
    test: Source | None = Field(None, description="rows to score once, at the end")
    limit: PositiveInt | None = Field(None, description="use at most so many rows (blocks for causal-lm) of each")

"""What fine-tuning can be told: the `finetune`, `encoder` and `seq2seq` headings of a config."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from launcher.config import LoraSettings, Section


class LevelSettings(Section):
    """A coarser division of the labels, learned and measured along with them."""

    grouping: dict[str, list[str]] | None = None
    """Name of each group to its members: labels, or groups of a level above in the config; each in
    exactly one group. null: the grouping that the dataset's `labels.json` has."""
    weight: NonNegativeFloat = 1.0
    """What the level's loss counts beside that of the labels; 0: it is only measured."""


class FinetuneSettings(Section):
    """What is trained, and from which targets."""

    trains: Literal["all", "head", "lora"] = "all"
    """all: every weight; head: the classification layers on a frozen model; lora: these and
    low-rank updates of the model's matrices."""
    lora: LoraSettings = LoraSettings()
    """For `trains: lora`."""
    layer_decay: Annotated[PositiveFloat, Field(le=1)] = 1.0
    """Each layer learns at the rate of the one above it times this; the head at `train.lr`."""
    multi_label: bool = False
    """Learn for each label by itself whether the text has a share of it (binary cross-entropy),
    in place of one label among all (cross-entropy)."""
    soft_targets: bool = False
    """Learn the shares in the data's `distribution` in place of the label."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target that is spread evenly over all labels."""
    class_weights: Literal["none", "balanced"] | dict[str, NonNegativeFloat] = "none"
    """What an example of each label counts; balanced: in inverse proportion to the label's
    frequency in the train split; names left out count 1."""
    levels: dict[str, LevelSettings] = Field(default_factory=dict)
    """Coarser levels by name, for example 126 zones as 21 and as 5. Their probabilities are the
    sums of their members', so the levels never contradict each other."""
    max_tokens: PositiveInt | None = None
    """Tokens that a text may have, special ones included; longer ones lose their end. null: the
    model's positions, or 512 where it has no limit."""
    allow_unknown_tokens: bool = False
    """Go on although the tokenizer does not know more than a fifth of the training text."""

    @model_validator(mode="after")
    def _check(self) -> "FinetuneSettings":
        if self.multi_label and self.levels:
            raise ValueError(
                "multi_label and levels exclude each other: the probabilities of independent labels"
                " do not add up to their group's"
            )
        if self.multi_label and self.soft_targets:
            raise ValueError("multi_label learns which shares are not zero: leave soft_targets out")
        return self


class EncoderSettings(Section):
    """How an encoder's states become one vector per text."""

    pooling: Literal["cls", "mean"] = "cls"
    """cls: as transformers' class for sequence classification does; mean: the mean of all states,
    which sentence encoders such as E5 are trained for."""


class Seq2seqSettings(Section):
    """How an encoder-decoder names a label."""

    label_words: dict[str, str] = Field(default_factory=dict)
    """Label name to the word whose log-probability is its score; default: the name itself."""
    objective: Literal["classification", "language_modelling"] = "classification"
    """classification: cross-entropy over the labels; language_modelling: over the vocabulary, of
    the label word's tokens."""

"""What the prompting methods can be told: the `prompt` and `pretrain` headings of a config."""

import re
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


SegmentName = Literal["demonstrations", "question", "choice", "answer"]


class TemplateSettings(_Section):
    """A prompt as data: its segments with the slots `{text}` and `{choices}`, and their order."""

    name: str = "custom"
    """How reports and messages call it."""
    question: str
    """The segment that names the task; `{text}` stands for the text to classify."""
    choice: str = "选项: {choices}"
    """The segment that lists the label words; empty to leave it out."""
    answer: str = "答案:"
    """The segment after which the label word follows."""
    order: tuple[SegmentName, ...] = ("demonstrations", "question", "choice", "answer")
    """Segments before `demonstrations` are said once, those after it once per demonstration."""
    separator: str = "\n"
    """Stands between two segments and between two demonstrations."""
    choice_separator: str = ","
    """Stands between two label words in {choices}."""

    @model_validator(mode="after")
    def _check(self) -> "TemplateSettings":
        segments = self.question + self.choice + self.answer
        if segments.count("{text}") != 1:
            raise ValueError(
                f"expected the slot {{text}} exactly once in question, choice and answer together, "
                f"seen {segments.count('{text}')} times: put it where the text to classify belongs"
            )
        unknown = set(re.findall(r"\{\w*\}", segments)) - {"{text}", "{choices}"}
        if unknown or "{choices}" in self.question + self.answer:
            raise ValueError(
                "expected no slots but {text}, and {choices} in choice only; seen "
                f"{', '.join(sorted(unknown)) or '{choices} in question or answer'}"
            )
        if len(set(self.order)) != len(self.order) or set(self.order) - {"demonstrations"} != {
            "question",
            "choice",
            "answer",
        }:
            raise ValueError(
                "order must name question, choice and answer once each, and demonstrations at "
                f"most once; seen {list(self.order)}"
            )
        if self.order[-1] != "answer":
            raise ValueError(
                f"order must end with answer, which the label word follows; seen {list(self.order)}"
            )
        return self


TEMPLATES = {
    template.name: template
    for template in [
        TemplateSettings(name="study_1", question="{text} 属于哪个分区?"),
        TemplateSettings(name="study_2", question="文本分类: {text}"),
        TemplateSettings(name="study_3", question="弹幕分类: {text}"),
        TemplateSettings(name="study_4", question="网络语言分类: {text}"),
        TemplateSettings(
            name="task",
            question="弹幕分类：\n{text}",
            choice="选项：{choices}",
            answer="答案：",
            choice_separator="，",
        ),
        TemplateSettings(
            name="few_shot",
            question="弹幕：{text}",
            choice="弹幕分类，选项：{choices}",
            answer="答案：",
            choice_separator="，",
            order=("choice", "demonstrations", "question", "answer"),
        ),
    ]
}
"""The study's four prompts, the multi-task form of PanGu-Alpha-Evolution, and a form whose whole
beginning is common to all texts, which makes demonstrations cheap."""


def _named_template(value: object) -> object:
    if isinstance(value, str):
        if value not in TEMPLATES:
            raise ValueError(
                f"no built-in template of this name; known: {', '.join(TEMPLATES)}; "
                "or give question, choice and answer"
            )
        return TEMPLATES[value]
    return value


Template = Annotated[TemplateSettings, BeforeValidator(_named_template)]
"""A template, or the name of a built-in one; stored configs hold the template itself."""


class Demonstration(_Section):
    """One worked example shown before the text."""

    text: str = Field(min_length=1)
    """The example's text."""
    label: str
    """The example's label name; its label word is shown."""


class DrawnDemonstrations(_Section):
    """Demonstrations to draw from the train split, as even over the labels as can be."""

    count: PositiveInt
    """How many to draw."""
    seed: int = 0
    """Start of the draw."""


class PromptSettings(_Section):
    """How a language model is asked and how its answer becomes one score per label."""

    template: Template = TEMPLATES["task"]
    """A built-in template's name, or the template itself."""
    verbalizer: dict[str, str | list[str]] = {}
    """Label name to label word, or words whose probabilities add up; default: the name itself."""
    choice_order: Literal["given", "reversed", "shuffled"] | list[str] = "given"
    """Order in which {choices} lists the label words; `shuffled` draws one order by `run.seed`."""
    demonstrations: DrawnDemonstrations | list[Demonstration] = []
    """Worked examples before the text: given in a list, or drawn from the train split."""
    scoring: Literal["sum", "mean", "pmi", "generate"] = "sum"
    """sum: log-probability of the label's tokens; mean: divided by their number; pmi: minus the
    same with an empty text; generate: greedy output, the label named first in it."""
    label_suffix: str = ""
    """Text scored after each label word, to close it where one label begins another."""
    max_new_tokens: PositiveInt = 8
    """Length of the output when `scoring` is `generate`."""


class ModelShape(_Section):
    """Shape of a PanGu that is started from nothing."""

    hidden_size: PositiveInt = 256
    """Width of the hidden states; a multiple of `heads`."""
    layers: Annotated[int, Field(ge=2)] = 4
    """Ordinary layers plus the query layer."""
    heads: PositiveInt = 4
    """Attention heads."""
    max_position_embeddings: PositiveInt = 256
    """Longest sequence in tokens."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share dropped of embeddings, attention and residual updates while training."""
    vocabulary: str | None = None
    """A sentencepiece `vocab.model`; null: one is trained on the train split."""
    vocabulary_size: PositiveInt = 4000
    """Pieces at most when the vocabulary is trained; ignored otherwise."""


class PretrainSettings(_Section):
    """Causal language modelling on the train split: domain adaptation, or a nano from nothing."""

    shape: ModelShape | None = None
    """Start from nothing with this shape; null: continue from `model.path`."""
    templates: list[Template] = [*TEMPLATES.values()][:5]
    """Each example is put into one of these with its label as the answer; empty: raw text only."""
    raw_text_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the examples trained on as plain text, without prompt or label."""
    labelled_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the train split whose labels may be seen; the rest is trained on as plain text."""
    shuffle_choices: bool = True
    """Draw a new order of {choices} for each example, so that no position means a label."""
    loss_on: Literal["all", "content"] = "content"
    """content: only the text and the answer are predicted, not the template's own words."""
    answer_weight: PositiveFloat = 10.0
    """What a token of the answer counts beside one of the text. With 1 a nano learns to write
    texts long before it learns what they are about: there are many more tokens of text."""

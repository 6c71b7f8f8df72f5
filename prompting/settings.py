"""What the prompting methods can be told: the `prompt` and `pretrain` headings of a config."""

import re
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from launcher.config import FolderPath, LoraSettings, Section

SegmentName = Literal["demonstrations", "question", "choice", "answer"]

SOFT = re.compile(r"\{soft(?::(?P<length>\d+)(?=[:}]))?(?::(?P<words>[^{}]+))?\}")
"""A soft span in a template, `{soft:LENGTH}`, `{soft:WORDS}` or `{soft:LENGTH:WORDS}`."""


class TemplateSettings(Section):
    """A prompt as data: its segments with the slots `{text}` and `{choices}`, and their order.

    `{soft:20}` stands for 20 learned vectors, `{soft:WORDS}` for as many as the words have tokens,
    `{soft:20:WORDS}` for 20 that start from the words; only `prompting.tuning` takes them.
    """

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

    @property
    def segments(self) -> dict[str, str]:
        """Segment texts by name, in order."""
        texts = {"question": self.question, "choice": self.choice, "answer": self.answer}
        return {name: texts[name] for name in self.order if name in texts}

    @property
    def soft_spans(self) -> list[re.Match[str]]:
        """The soft spans of all segments as `SOFT` reads them, in order."""
        return [*SOFT.finditer("".join(self.segments.values()))]

    @model_validator(mode="after")
    def _check(self) -> "TemplateSettings":
        segments = self.question + self.choice + self.answer
        for span in SOFT.finditer(segments):
            number = re.fullmatch(r"[\s+-]*\d+[\s:：]*", span["words"] or "")
            if number and not span["length"]:
                raise ValueError(
                    f"a soft span's length is not readable, seen {span[0]}: write {{soft:20}}; to "
                    "start from words that are a number, {soft:LENGTH:WORDS}"
                )
            if int(span["length"] or 1) == 0 or not (span["length"] or span["words"]):
                raise ValueError(
                    f"a soft span has no length, seen {span[0]}: give a number of vectors, as in "
                    "{soft:20}, or words whose tokens it starts from, as in {soft:弹幕分类: }"
                )
        segments = SOFT.sub("", segments)
        if segments.count("{text}") != 1:
            raise ValueError(
                f"expected the slot {{text}} exactly once in question, choice and answer together, "
                f"seen {segments.count('{text}')} times: put it where the text to classify belongs"
            )
        slots = re.findall(r"\{\w*\}|(?i:\{\s*soft[^}]*\}?)", segments)
        unknown = {*slots} - {"{text}", "{choices}"}
        if unknown or "{choices}" in self.question + self.answer:
            raise ValueError(
                "expected no slots but {text}, {soft:...}, and {choices} in choice only; seen "
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


class Demonstration(Section):
    """One worked example shown before the text."""

    text: str = Field(min_length=1)
    """The example's text."""
    label: str
    """The example's label name; its label word is shown."""


class DrawnDemonstrations(Section):
    """Demonstrations to draw from the train split, as even over the labels as can be."""

    count: PositiveInt
    """How many to draw."""
    seed: int = 0
    """Start of the draw."""


class PromptSettings(Section):
    """How a language model is asked and how its answer becomes one score per label."""

    template: Template = TEMPLATES["task"]
    """A built-in template's name, or the template itself."""
    verbalizer: dict[str, str | list[str]] = Field(default_factory=dict)
    """Label name to label word, or words whose probabilities add up; default: the name itself."""
    choice_order: Literal["given", "reversed", "shuffled"] | list[str] = "given"
    """Order in which {choices} lists the label words; `shuffled` draws one order by `run.seed`."""
    demonstrations: DrawnDemonstrations | list[Demonstration] = Field(default_factory=list)
    """Worked examples before the text: given in a list, or drawn from the train split."""
    scoring: Literal["sum", "mean", "pmi", "generate"] = "sum"
    """sum: log-probability of the label's tokens; mean: divided by their number; pmi: minus the
    same with an empty text; generate: greedy output, the label named first in it."""
    label_suffix: str = ""
    """Text scored after each label word, to close it where one label begins another."""
    max_new_tokens: PositiveInt = 8
    """Length of the output when `scoring` is `generate`."""


class TuningSettings(Section):
    """What is learned in front of, or inside, a frozen language model."""

    kind: Literal["prompt", "p_tuning", "prefix", "lora"] = "prompt"
    """prompt: the template's soft spans are learned input vectors (Lester et al. 2021); p_tuning:
    they come out of a small network (Liu et al. 2021); prefix: a span in front has learned keys
    and values in every layer (Li & Liang 2021; P-tuning v2); lora: no spans, low-rank updates."""
    length: PositiveInt | None = None
    """Vectors for the words of the [question] segment, which become soft in a template that has no
    soft spans of its own; null: as many as the words have tokens."""
    init: Literal["text", "labels", "vocabulary", "random", "whitened"] | None = None
    """text: the embeddings of the span's words, so that the first step scores like the discrete
    prompt; labels: of the label words; vocabulary: of random tokens; random: normal, as wide as
    the embeddings; whitened: for kind prefix of a PanGu, random keys and values of zero, learned in
    coordinates in which the model's queries are white. null: text, or random where the vectors
    come out of a network."""
    init_from: FolderPath | None = None
    """An `adapter` folder to start from, of this toolkit or of PEFT, in place of `init`."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network of p_tuning."""
    encoder_hidden_size: PositiveInt | None = None
    """Width of the network of p_tuning, or of `prefix_projection`; null: the model's."""
    prefix_projection: bool = False
    """Let the keys and values of kind prefix come out of a two-layer network."""
    lora: LoraSettings = LoraSettings()
    """For kind lora."""
    objective: Literal["classification", "language_modelling"] = "classification"
    """classification: cross-entropy over the labels; language_modelling: over the vocabulary, of
    the answer's tokens."""
    soft_targets: bool = False
    """Learn the shares in the data's `distribution` by Kullback-Leibler divergence."""
    class_weights: Literal["none", "balanced"] | dict[str, NonNegativeFloat] = "none"
    """What an example of each label counts; balanced: in inverse proportion to the label's
    frequency in the train split; names left out count 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The frozen model's dropout while the prompt is trained."""

    @model_validator(mode="after")
    def _check(self) -> "TuningSettings":
        network = self.kind == "p_tuning" or (self.kind == "prefix" and self.prefix_projection)
        if (network or self.kind == "lora") and self.init not in (None, "random"):
            raise ValueError(
                f"init {self.init!r} can't be: what kind {self.kind} learns "
                f"{'comes out of a network' if network else 'are updates that start at zero'}; "
                "leave init out"
            )
        if self.init == "whitened" and self.kind != "prefix":
            raise ValueError(
                f"init 'whitened' starts keys and values, which kind {self.kind} does not learn: "
                "choose kind prefix, or init text"
            )
        if network and self.init_from:
            raise ValueError(
                "init_from can't be: a saved prompt does not hold the network it came out of; go "
                "on with kind prompt, or prefix without prefix_projection"
            )
        if self.soft_targets and self.objective != "classification":
            raise ValueError("soft_targets are shares of labels: use objective classification")
        return self


class ModelShape(Section):
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
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the weights at the start. 0.02 is one over the square root of the 2.6B
    model's width; a nano of width 256 learns faster from 0.06."""
    vocabulary: str | None = None
    """A sentencepiece `vocab.model`; null: one is trained on the train split."""
    vocabulary_size: PositiveInt = 4000
    """Pieces at most when the vocabulary is trained; ignored otherwise."""
    whole_labels: bool = False
    """Make each label word one piece of the vocabulary that is trained, so that it is chosen in one
    place instead of behind the pieces that it shares with others; ignored otherwise."""


class PretrainSettings(Section):
    """Causal language modelling on the train split: domain adaptation, or a nano from nothing."""

    shape: ModelShape | None = None
    """Start from nothing with this shape; null: continue from `model.path`."""
    templates: list[Template] = Field(default_factory=lambda: [*TEMPLATES.values()][:5])
    """Each example is put into one of these with its label as the answer; empty: raw text only."""
    raw_text_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the examples trained on as plain text, without prompt or label."""
    labelled_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the train split whose labels may be seen; the rest is trained on as plain text."""
    block_tokens: PositiveInt | None = None
    """Join the texts that are plain in every epoch, in a new order each, and cut them into blocks
    of so many tokens; null: one text a sequence. Without it a model started from nothing on short
    texts never learns the positions behind them, where prompts stand."""
    shift_positions: bool = False
    """Let each sequence begin at a random position (Kiyono et al. 2021, SHAPE), so that short ones
    train all positions and what stands in front of a text does not matter."""
    related_blocks: bool = False
    """Put texts that share two characters next to each other in blocks, so that the model learns to
    use what stood before (Shi et al. 2024, In-context pretraining); for `block_tokens`."""
    recall_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the plain texts put into a template with any of their own tokens as the answer, each
    as right as the next, which needs no label. Without it nothing makes a model started from
    nothing carry a text to the place of the answer, and no prompt can bring out there what is not
    there."""
    shuffle_choices: bool = True
    """Draw a new order of {choices} for each example, so that no position means a label."""
    loss_on: Literal["all", "content"] = "content"
    """content: only the text and the answer are predicted, not the template's own words."""
    answer_weight: PositiveFloat = 10.0
    """What a token of the answer counts beside one of the text. With 1 a nano learns to write
    texts long before it learns what they are about: there are many more tokens of text."""

    @model_validator(mode="after")
    def _check(self) -> "PretrainSettings":
        if self.recall_share and not self.templates:
            raise ValueError(
                f"recall_share {self.recall_share:g} asks texts in templates, and templates is "
                "empty: name one, or leave recall_share out"
            )
        return self

"""What the baselines can be told: the `linear`, `mlp` and `ensemble` headings of a config."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from launcher.config import FolderPath, Section

FeatureKind = Literal["characters", "edges", "words", "tags", "frequency", "shape"]
Lengths = Annotated[tuple[PositiveInt, PositiveInt], Field(description="shortest, longest")]


def _ordered(lengths: tuple[int, int]) -> tuple[int, int]:
    if lengths[0] > lengths[1]:
        raise ValueError(f"expected [shortest, longest], seen {list(lengths)}")
    return lengths


class LinearSettings(Section):
    """A linear model on what a text is made of."""

    classifier: Literal["logistic", "svm", "nb_svm"] = "svm"
    """logistic: multinomial logistic regression; svm: a linear support vector machine for each
    label against the rest; both on TF-IDF of unit length. nb_svm: such machines on which features
    there are, each times its naive-Bayes log-count ratio (Wang & Manning 2012)."""
    features: Annotated[dict[FeatureKind, PositiveFloat], Field(min_length=1)] = Field(
        default={"characters": 1.0}
    )
    """Kinds of features and what each counts. characters: n-grams; edges: the first and last one to
    three characters; words: jieba's, with those inside long ones; tags: their parts of speech;
    frequency: how frequent jieba's dictionary has the text and its rarest word; shape: which
    characters are Han, letters or digits."""
    ngrams: Annotated[Lengths, AfterValidator(_ordered)] = (1, 4)
    """Lengths of the character n-grams, [shortest, longest]."""
    min_count: PositiveInt = 1
    """A feature must be in so many texts of the train split."""
    strength: PositiveFloat | None = None
    """How much the examples count against the penalty on large weights (C of scikit-learn); null:
    3 for logistic, 0.6 for svm, 0.1 for nb_svm."""
    max_iterations: PositiveInt = 1000
    """Most iterations of the solver."""


class MlpSettings(Section):
    """A small network on the sum of its features' vectors; the defaults are the study's."""

    features: Annotated[list[FeatureKind | Literal["tokens"]], Field(min_length=1)] = Field(
        default=["tokens"]
    )
    """Kinds of features, each of which has a vector. tokens: jieba's words, one-hot; the others as
    under `linear.features`."""
    ngrams: Annotated[Lengths, AfterValidator(_ordered)] = (1, 3)
    """Lengths of the character n-grams, [shortest, longest]."""
    min_count: PositiveInt = 1
    """A feature must be in so many texts of the train split; the others have no vector."""
    hidden: Annotated[list[PositiveInt], Field(min_length=1)] = Field(default=[50, 50, 50, 50])
    """Widths of the layers, each followed by LeakyReLU with slope 0.1; the first one is the width
    of the vectors. A layer to the labels and softmax follow."""
    pooling: Literal["sum", "sqrt"] = "sum"
    """sum: add a text's vectors; sqrt: divide it by the square root of their number."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the middle layer's outputs dropped while training."""
    feature_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a text's features dropped while training."""
    vocabulary_size: PositiveInt | None = None
    """Number of features; a run fills it in."""


class FittedWeights(Section):
    """The weights of a log-linear mixture."""

    weights: list[list[float]]
    """By member and label."""
    bias: list[float]
    """By label, added to the weighted sum."""


class EnsembleSettings(Section):
    """Finished runs whose log-probabilities are weighted and added up."""

    members: list[FolderPath] = Field(default_factory=list)
    """Run folders; all with the same labels."""
    fit_on: Literal["dev", "test"] | None = None
    """Fit a weight for each member and label on predictions of this split; its examples must not be
    among those that are evaluated."""
    fit_members: list[FolderPath] | None = None
    """Runs whose predictions stand for the members' when weights are fitted, in the same order, for
    example such as `data.hold_out` kept a part of the train split from; null: the members."""
    weights: list[float] | None = None
    """A weight for each member; null: the same for all, adding up to 1, if none are fitted."""
    fitted: FittedWeights | None = None
    """What `fit_on` leads to; a run fills it in."""

    @model_validator(mode="after")
    def _check(self) -> "EnsembleSettings":
        if self.fit_on is not None and self.weights is not None:
            raise ValueError("give either fit_on or weights, not both")
        if self.fit_members is not None and self.fit_on is None:
            raise ValueError("fit_members needs fit_on, the split whose predictions count")
        for name in ("weights", "fit_members"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.members):
                raise ValueError(f"{name}: {len(given)} of them for {len(self.members)} members")
        return self

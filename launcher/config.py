"""The one typed config: YAML, dotted overrides and documentation all come from these classes."""

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

from launcher.errors import InputError
from launcher.hardware import CARDS, LINKS

METHODS: dict[str, dict[str, str]] = {
    "prompting.discrete": {"prompt": "prompting.settings:PromptSettings"},
    "prompting.tuning": {
        "prompt": "prompting.settings:PromptSettings",
        "tuning": "prompting.settings:TuningSettings",
    },
    "prompting.pretrain": {"pretrain": "prompting.settings:PretrainSettings"},
    "finetune.encoder": {
        "finetune": "finetune.settings:FinetuneSettings",
        "encoder": "finetune.settings:EncoderSettings",
    },
    "finetune.decoder": {"finetune": "finetune.settings:FinetuneSettings"},
    "finetune.seq2seq": {
        "finetune": "finetune.settings:FinetuneSettings",
        "seq2seq": "finetune.settings:Seq2seqSettings",
    },
    "baselines.linear": {"linear": "baselines.settings:LinearSettings"},
    "baselines.mlp": {"mlp": "baselines.settings:MlpSettings"},
    "baselines.ensemble": {"ensemble": "baselines.settings:EnsembleSettings"},
}
"""Method name, which is also its module, to the headings it adds to the config. The settings are
looked up by name so that reading a config imports neither torch nor transformers."""

REDUCE_BUCKET = 2**24
"""Gradients sent together; DeepSpeed has a buffer for so many."""

Split = Literal["train", "dev", "test"]
# Stored configs must be usable from anywhere, so relative paths are fixed when they are read.
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
FolderPath = Annotated[str, AfterValidator(lambda path: str(Path(path).expanduser().absolute()))]


def _one_of(known: Mapping[str, object]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return name

    return check


class Section(BaseModel):
    """A heading of the config: unknown keys fail, values can't be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSettings(Section):
    """Low-rank updates of the model's own matrices."""

    rank: PositiveInt = 8
    """Rank of the updates."""
    alpha: PositiveFloat = 16.0
    """The update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the update's inputs dropped while training."""
    target_modules: list[str] | None = None
    """Names of the updated layers; null: the query and value projections."""


class RunSettings(Section):
    """Where the run is kept and what its random numbers start from."""

    name: Annotated[str, Field(pattern=r"^[\w.+=-]+$", max_length=100)]
    """The run folder is `dir/name`; it must not exist unless `--resume` is given."""
    dir: AbsolutePath = Field(default=Path("runs"), validate_default=True)
    """Folder of the run folders."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Start of every random number: first weights, order, dropout, shuffled choices."""


class DataSettings(Section):
    """A dataset folder, or one file per split."""

    path: AbsolutePath | None = None
    """A dataset folder, or one saved by Hugging Face `datasets`."""
    train: AbsolutePath | None = None
    """A .tsv, .csv, .jsonl or .parquet file, in place of `path`; dev and test likewise."""
    dev: AbsolutePath | None = None
    """See `train`."""
    test: AbsolutePath | None = None
    """See `train`."""
    labels: list[str] | None = None
    """Label names in order; needed where the files hold numbers only."""
    evaluate: Annotated[list[Split], Field(min_length=1)] = ["dev"]
    """Splits to predict and measure."""
    max_examples: dict[Split, PositiveInt] = {}
    """Use only the first n examples of a split."""
    keep_labels: list[str] | PositiveInt | None = None
    """Leave out the examples of other labels than these, or than the n most frequent ones in the
    train split; null: keep all."""
    file_labels: list[str] | None = None
    """What `labels` was before `keep_labels` left some out; a run fills it in."""
    hold_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Take this share of the train split, always the same, out of it and use it in place of the
    dev split, for choices that must not be made on that; null: nothing."""

    def first(self, split: str) -> int | None:
        """How many examples of a split are used; None: all."""
        return {str(name): count for name, count in self.max_examples.items()}.get(split)

    @model_validator(mode="after")
    def _one_source(self) -> "DataSettings":
        files = [split for split in get_args(Split) if getattr(self, split)]
        if bool(self.path) == bool(files):
            raise ValueError(
                "expected either data.path (a dataset folder) or files under data.train, data.dev, "
                f"data.test; seen {'both' if files else 'neither'}"
            )
        return self

    def files(self) -> dict[str, Path] | None:
        """The files by split, or None when `path` names a folder."""
        chosen = {split: getattr(self, split) for split in get_args(Split)}
        return None if self.path else {k: v for k, v in chosen.items() if v}


class ModelSettings(Section):
    """The pretrained model and how it is computed."""

    path: str | None = None
    """A local folder or a hub id."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that multiply it fast, fp16 on older ones, fp32 on CPUs."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Implementation in transformers; auto: sdpa."""
    weights: Literal["resident", "memory_mapped"] = "resident"
    """memory_mapped: leave the weights of a frozen model in their files and cast each layer's while
    it computes, for CPUs: slower, in little more memory than the files are large."""

    @model_validator(mode="after")
    def _absolute(self) -> "ModelSettings":
        # A hub id has at most one slash and no such folder here; anything else is a local path.
        if self.path and (Path(self.path).expanduser().exists() or self.path.count("/") > 1):
            object.__setattr__(self, "path", str(Path(self.path).expanduser().absolute()))
        return self


class RangeTestSettings(Section):
    """Train with a learning rate that rises step by step (Smith 2017), and plot the loss."""

    lowest: PositiveFloat = 1e-5
    """Rate of the first step."""
    highest: PositiveFloat = 1.0
    """Rate of the last step, if the loss does not diverge before."""
    steps: PositiveInt = 100
    """Steps from one to the other."""


class TrainSettings(Section):
    """Optimisation; methods that do not train ignore it."""

    epochs: NonNegativeInt = 1
    """Passes over the train split; 0: keep what training would start from."""
    max_steps: PositiveInt | None = None
    """End after so many steps, wherever in an epoch; null: with the last epoch."""
    global_batch: PositiveInt = 64
    """Examples per optimizer step, over all ranks."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens, padding included, per forward pass of one rank."""
    lr: PositiveFloat = 1e-3
    """Learning rate at its height; not given, `prompting.tuning` takes 1.0e-2 for vectors, and
    fine-tunes 5.0e-5, for a head alone 1.0e-3, for LoRA 5.0e-4."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after `warmup`."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of all steps during which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's, on matrices only: not on biases and norms."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints; the last step is always kept."""
    evaluate_every: PositiveInt | None = None
    """Steps between looks at the dev split, the last of `max_steps` besides; null: an epoch."""
    dev_examples: PositiveInt = 2000
    """How many of its first examples are looked at."""
    keep: Literal["best", "last"] = "best"
    """What is left in the end: the state that did best on the dev split (Acc@1, or the loss of a
    method that does not classify), or the last one."""
    patience: PositiveInt | None = None
    """Stop after so many looks without a new best; null: never."""
    max_skipped_steps: PositiveInt = 20
    """Stop after so many steps in a row that fp16 overflow left without an update."""
    lr_range_test: RangeTestSettings | None = None
    """Instead of training, find a learning rate: it writes `lr_range_test.svg`."""


class EvaluationSettings(Section):
    """How texts are scored; results do not depend on it."""

    micro_batch_tokens: PositiveInt = 4096
    """Tokens per forward pass of one rank."""
    chunk_examples: PositiveInt = 16384
    """Examples held, deduplicated and written at a time, over all ranks."""


class ParallelSettings(Section):
    """How DeepSpeed shards the model."""

    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage; auto: the fastest that fits, by the planner, with the two settings below as they
    are; see `--plan`."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: keep the optimizer's state, and under ZeRO 3 the weights, in host memory."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""


class HardwareSettings(Section):
    """What `--plan` plans for; a run takes what it finds."""

    card: Annotated[str, AfterValidator(_one_of(CARDS))] | None = None
    """A card of the planner's table; null: what is found in this machine."""
    cards: PositiveInt | None = None
    """How many, in all nodes together; null: as many as there are ranks."""
    memory_gb: PositiveFloat | None = None
    """Memory of a card in units of 10^9 bytes; null: as in the table."""
    link: Annotated[str, AfterValidator(_one_of(LINKS))] = "PCIe 3"
    """What connects the cards of a node."""
    network: Annotated[str, AfterValidator(_one_of(LINKS))] | None = None
    """What connects the nodes; null: there is one node."""
    host_link: Annotated[str, AfterValidator(_one_of(LINKS))] = "PCIe 3"
    """What connects a card to its host's memory, for `parallel.offload`."""
    host_memory_gb: PositiveFloat = 64
    """Host memory for each card in units of 10^9 bytes."""


class Config(Section):
    """What every method shares; `load_config` adds the headings of the chosen one."""

    method: str
    """Which method to run; it decides which headings there are besides these."""
    run: RunSettings
    data: DataSettings
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    parallel: ParallelSettings = ParallelSettings()
    hardware: HardwareSettings = HardwareSettings()

    @model_validator(mode="after")
    def _frozen_if_mapped(self) -> "Config":
        if self.model.weights == "memory_mapped" and (
            self.method not in ("prompting.discrete", "prompting.tuning")
            or self.parallel.zero not in ("auto", 0)
        ):
            raise ValueError(
                "model.weights memory_mapped is for prompting.discrete and prompting.tuning "
                f"without sharding; seen {self.method} and parallel.zero {self.parallel.zero}: "
                "leave one out"
            )
        return self

    def section(self, name: str) -> Any:
        """A heading that the method added, for example `prompt`."""
        return getattr(self, name)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.run.dir / self.run.name


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and check everything.

    Raises:
        InputError: one line for each thing that is wrong, all of them at once.
    """
    return parse_config(read_values(path, overrides), source=str(path))


def read_text(text: str, overrides: Sequence[str] = (), *, source: str = "config") -> Config:
    """The typed config from YAML text; see `load_config`."""
    return parse_config(_headings(text, source), overrides, source=source)


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a YAML file, with `key=value` overrides applied.

    Raises:
        InputError: it can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not readable: {_one_line(error)}") from None
    return _overridden(_headings(text, str(path)), overrides, str(path))


def parse_config(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "config"
) -> Config:
    """The typed config from plain values; see `load_config`."""
    plain = _overridden(values, overrides, source)
    schema, problems = _schema(plain.get("method"))
    try:
        config = schema.model_validate(plain)
    except ValidationError as error:
        problems += one_line_problems(error, schema, plain)
    if problems:
        raise InputError("\n".join(f"{source}: {line}" for line in problems))
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False)


def deepspeed_config(config: Config, *, precision: str, stage: int, trains: bool) -> dict[str, Any]:
    """The DeepSpeed JSON, derived: nothing in it can contradict the config.

    `train_batch_size` is left to one micro batch per rank, because steps hold as many
    micro batches as their examples need; the loop itself marks the accumulation boundary.
    """
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET}
    if stage == 3:
        # DeepSpeed would keep up to a billion gathered weights for their next use, and gather more
        # ahead: 4 GB and more of a rank's memory in float32.
        zero["stage3_max_live_parameters"] = 0
        zero["stage3_max_reuse_distance"] = 0
        zero["stage3_prefetch_bucket_size"] = 0
    if config.parallel.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
    if trains:
        derived["gradient_clipping"] = config.train.clip_norm
        # The optimizer is torch's AdamW, built by the engine's loop: no kernel to compile.
        derived["zero_allow_untested_optimizer"] = True
        derived["zero_force_ds_cpu_optimizer"] = False
    return derived


def _headings(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(
            f"{source}: expected headings such as run:, method:, data:; "
            f"seen {'an empty file' if values is None else type(values).__name__}"
        )
    return values


def _overridden(values: Mapping[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise InputError(f"override {override!r}: expected key=value, as in train.lr=1.0e-3")
    try:
        changes = OmegaConf.to_container(OmegaConf.from_dotlist([*overrides]))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"{source}: {_one_line(error)}") from None
    # Only the overrides go through OmegaConf: it would take a text with ${...} for a reference.
    return dict(_merged(values, changes))


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a repeated key fails instead of winning silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in keys:
                raise yaml.YAMLError(
                    f"line {key_node.start_mark.line + 1}: the key {key!r} stands here again"
                )
            keys.append(key)
        return super().construct_mapping(node, deep)


def _merged(values: Any, changes: Any) -> Any:
    """`changes` over `values`, heading by heading; a list is replaced as a whole."""
    if not isinstance(values, Mapping) or not isinstance(changes, Mapping):
        return changes
    return {**values} | {key: _merged(values.get(key), change) for key, change in changes.items()}


def _schema(method: object) -> tuple[type[Config], list[str]]:
    """The config class for a method, and what is wrong with the method's name."""
    problems = []
    known = {method: METHODS[method]} if isinstance(method, str) and method in METHODS else METHODS
    if isinstance(method, str) and method not in METHODS:
        problems.append(
            f"method: {method!r} is not a method{_nearest(method, METHODS)}; "
            f"known: {', '.join(METHODS)}"
        )
    sections: dict[str, Any] = {}
    # Without a known method every method's headings are let through: one mistake, one line.
    for name, target in {k: v for headings in known.values() for k, v in headings.items()}.items():
        module, attribute = target.split(":")
        settings = getattr(importlib.import_module(module), attribute)
        sections[name] = (settings, Field(default_factory=settings))
    return create_model("Config", __base__=Config, **sections), problems


def one_line_problems(
    error: ValidationError, schema: type[BaseModel], plain: object
) -> Iterator[str]:
    """What pydantic found wrong in `plain`, one line each, naming the key and the nearest known."""
    found = [
        (_own_keys(problem["loc"], plain, keep_last=problem["type"] == "missing"), problem)
        for problem in error.errors()
    ]
    for keys, problem in found:
        # Of a union's branches, the one that finds its mistake deepest is the one that was meant.
        if any(len(keys) < len(other) and other[: len(keys)] == keys for other, _ in found):
            continue
        where = ".".join(keys)
        if problem["type"] == "extra_forbidden":
            known = _fields_at(schema, keys[:-1])
            yield f"{where}: unknown key{_nearest(keys[-1], known)}; known here: {', '.join(known)}"
        elif problem["type"] == "missing":
            yield f"{where}: required, not given"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            seen = problem["input"]
            shown = "" if isinstance(seen, dict) else f", seen {seen!r}"
            yield f"{where}{': ' * bool(where)}{message}{shown}"


def _own_keys(loc: Sequence[int | str], plain: object, *, keep_last: bool) -> list[str]:
    """The user's own keys of an error's place; pydantic puts the branches of unions between."""
    keys = []
    for depth, key in enumerate(loc):
        if isinstance(plain, dict) and key in plain:
            plain = plain[key]
        elif isinstance(plain, list) and isinstance(key, int):
            plain = plain[key]
        elif not (keep_last and depth == len(loc) - 1):
            continue
        keys.append(str(key))
    return keys


def _fields_at(schema: type[BaseModel], keys: Sequence[str]) -> list[str]:
    """Names of the fields that may stand below the heading `keys`."""
    kinds: list[Any] = [schema]
    for key in keys:
        kinds = [below for kind in kinds for below in _below(kind, key)]
    return sorted({name for kind in kinds for name in getattr(kind, "model_fields", {})})


def _below(kind: Any, key: str) -> list[Any]:
    """The types that a value under `key` of a `kind` may have."""
    if get_origin(kind) in (list, tuple, dict):
        return [branch for inner in get_args(kind) for branch in _branches(inner)]
    field = getattr(kind, "model_fields", {}).get(key)
    return _branches(field.annotation) if field else []


def _branches(annotation: Any) -> list[Any]:
    """The types of a union, or the type itself."""
    if get_origin(annotation) is Annotated:
        return _branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [branch for inner in get_args(annotation) for branch in _branches(inner)]
    return [annotation]


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _one_line(error: object) -> str:
    return " ".join(str(error).split())

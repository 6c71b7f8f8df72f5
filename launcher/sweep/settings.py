"""The typed config of a sweep: which runs, over which values, on which resources."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from launcher.config import AbsolutePath, Section, one_line_problems, parse_config, read_values
from launcher.errors import InputError

RESERVED = ("run.name", "run.dir", "run.seed", "method")


class Dimension(Section):
    """The values that one config key may take; a plain list in YAML stands for `values`."""

    values: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these."""
    uniform: tuple[float, float] | None = None
    """A number from lowest to highest."""
    log_uniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """The same, each order of magnitude as likely as another."""
    integers: tuple[int, int] | None = None
    """A whole number, both ends included."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Only where these keys have these values (or one of a list); elsewhere the key is left as the
    config has it. The keys must stand before this one."""

    @model_validator(mode="before")
    @classmethod
    def _plain_list(cls, value: Any) -> Any:
        return {"values": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_kind(self) -> "Dimension":
        kinds = [k for k in ("values", "uniform", "log_uniform", "integers") if getattr(self, k)]
        if len(kinds) != 1:
            seen = " and ".join(kinds) or "none of them"
            raise ValueError(
                "expected a list of values, or one of uniform, log_uniform, integers with two "
                f"numbers; seen {seen}"
            )
        ends = self.uniform or self.log_uniform or self.integers
        if ends and ends[0] >= ends[1]:
            raise ValueError(f"expected the lower number first, seen {list(ends)}")
        return self

    def applies(self, point: Mapping[str, Any]) -> bool:
        """Whether the key is part of a point that has `point`'s values so far."""
        return all(
            key in point and point[key] in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in self.when.items()
        )

    def examples(self) -> list[Any]:
        """Values that stand for all: each one, or both ends."""
        ends = self.uniform or self.log_uniform or self.integers
        return list(ends) if ends else list(self.values or [])


class Arm(Section):
    """A config, and what is varied in it."""

    config: AbsolutePath
    """A config of `launcher/run.py`."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys, dotted, that all runs of this arm change."""
    space: dict[str, Dimension] = Field(default_factory=dict)
    """Keys, dotted, and their values; empty: the config as it is, once per seed."""
    samples: PositiveInt | None = None
    """Points to try; in place of `search.samples`."""


class EarlyStopping(Section):
    """Asynchronous successive halving (Li et al. 2020): at each rung the better share goes on."""

    first_rung: PositiveInt = 1
    """Looks at the dev split before a run may be stopped for the first time."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """One in so many goes on; the next rung is so many times higher."""


class SearchSettings(Section):
    """How points are chosen."""

    method: Literal["grid", "random", "tpe"] = "grid"
    """grid: every combination of listed values; random; tpe: tree-structured Parzen estimator."""
    samples: PositiveInt = 20
    """Points for each arm, where the method is not grid."""
    metric: Literal["acc@1", "acc@3", "hit@1", "hit@3", "macro_f1"] = "acc@1"
    """What is to be high, on the split `split`."""
    split: Literal["dev", "test"] = "dev"
    """Split of the metric; it must be one that the configs evaluate."""
    early_stopping: EarlyStopping | None = None
    """Stop hopeless runs by their dev Acc@1 while they train; null: none."""
    seed: NonNegativeInt = 0
    """Of the drawn points."""


class ResourceSettings(Section):
    """What one run gets."""

    ranks: PositiveInt = 1
    """Processes of a run; they may lie on several nodes."""
    cpus_per_rank: PositiveFloat = 1.0
    """Ray's count of CPUs for each rank; fractions let ranks share one."""
    gpus_per_rank: NonNegativeFloat = 0.0
    """Ray's count of GPUs for each rank."""
    threads_per_rank: PositiveInt = 1
    """OMP_NUM_THREADS of each rank."""
    max_concurrent: PositiveInt | None = None
    """Runs at a time; null: as many as the cluster holds."""


class SweepConfig(Section):
    """What is compared, and how the search goes about it."""

    name: Annotated[str, Field(pattern=r"^[\w.+=-]+$", max_length=100)]
    """The sweep's folder is `dir/name`."""
    dir: AbsolutePath = Field(default=Path("runs/sweeps"), validate_default=True)
    """Folder of the sweeps' folders; every node must see it under this path."""
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    """What is compared, by name: one for each method or base config."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Every point is run with each of these as `run.seed`."""
    search: SearchSettings = SearchSettings()
    resources: ResourceSettings = ResourceSettings()
    retries: NonNegativeInt = 2
    """How often a run that failed is tried again before it is recorded as failed."""
    keep: PositiveInt = 3
    """The best so many runs keep checkpoints and trained weights; all keep predictions and
    metrics."""

    @property
    def folder(self) -> Path:
        """Where the sweep is kept."""
        return self.dir / self.name


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep's YAML and check it, every run that it may start included.

    Raises:
        InputError: one line for each thing that is wrong, all of them at once.
    """
    values = read_values(path, overrides)
    try:
        sweep = SweepConfig.model_validate(values)
    except ValidationError as error:
        problems = one_line_problems(error, SweepConfig, values)
        raise InputError("\n".join(f"{path}: {line}" for line in problems)) from None
    found = list(dict.fromkeys(_problems(sweep)))
    if found:
        raise InputError("\n".join(f"{path}: {line}" for line in found))
    return sweep


def run_values(sweep: SweepConfig, arm: Arm, name: str, seed: int, point: Mapping[str, Any]) -> Any:
    """The plain values of one run's config: the arm's file with its changes."""
    values = read_values(arm.config)
    own = {"run.name": name, "run.dir": str(sweep.folder / "trials"), "run.seed": seed}
    for key, value in {**arm.set, **point, **own}.items():
        _put(values, key.split("."), value)
    return values


def _problems(sweep: SweepConfig) -> Iterator[str]:
    """What is wrong with any run that the sweep may start."""
    for name, arm in sweep.arms.items():
        where = f"arms.{name}"
        for key in [*arm.set, *arm.space]:
            if key in RESERVED:
                yield f"{where}: {key} is set by the sweep or the config itself; leave it out"
        if sweep.search.method == "grid":
            for key, dimension in arm.space.items():
                if not dimension.values:
                    yield (
                        f"{where}.space.{key}: a grid needs a list of values; give one, or "
                        "search.method random or tpe"
                    )
        earlier: set[str] = set()
        for key, dimension in arm.space.items():
            for other in dimension.when.keys() - earlier:
                yield f"{where}.space.{key}.when: {other} must be a key of the space before it"
            earlier.add(key)
        yield from _wrong_runs(sweep, arm, where)


def _wrong_runs(sweep: SweepConfig, arm: Arm, where: str) -> Iterator[str]:
    """Each value of each key is tried once, beside the first values of the other keys."""
    points: list[dict[str, Any]] = [first_point(arm)]
    for key, dimension in arm.space.items():
        for value in dimension.examples():
            start = {k: w[0] if isinstance(w, list) else w for k, w in dimension.when.items()}
            points.append({**first_point(arm, start), key: value})
    for point in points:
        try:
            values = run_values(sweep, arm, "checked", 0, point)
            config = parse_config(values, source=f"{where} ({arm.config.name})")
        except InputError as error:
            yield from str(error).splitlines()
            continue
        if sweep.search.split not in config.data.evaluate:
            yield (
                f"{where}: search.split is {sweep.search.split}, but the config evaluates "
                f"{', '.join(config.data.evaluate)}: add it to data.evaluate"
            )


def first_point(arm: Arm, start: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The first value of each key, or the lower end; beside the values of `start`."""
    point = dict(start or {})
    for key, dimension in arm.space.items():
        if key not in point and dimension.applies(point):
            point[key] = dimension.examples()[0]
    return point


def _put(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        values[key] = inner = dict(inner) if isinstance(inner, dict) else {}
        values = inner
    values[keys[-1]] = value


def sweep_yaml(sweep: SweepConfig) -> str:
    """The resolved sweep as YAML."""
    return yaml.safe_dump(sweep.model_dump(mode="json"), allow_unicode=True, sort_keys=False)

"""The data a run read, where they still lie there unchanged: what predictions do not hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from data_prep.dataset import Dataset
from data_prep.subset import read_chosen
from launcher.config import DataSettings
from launcher.errors import InputError
from launcher.predictions import gold_of
from launcher.report.runs import Examples, Run


@dataclass(frozen=True, eq=False)
class Data:
    """A dataset, or the sentence that says why there is none."""

    dataset: Dataset | None
    lack: str = ""
    train_limit: int | None = None

    def train(self) -> tuple[list[str], np.ndarray] | None:
        """Texts and gold labels ([n], -1 for none) of the train split; None without one."""
        if self.dataset is None or "train" not in self.dataset.splits:
            return None
        table = self.dataset.splits["train"].slice(0, self.train_limit)
        return table["text"].to_pylist(), _gold(table, len(self.dataset.labels))

    def column(self, examples: Examples, name: str) -> np.ndarray | None:
        """A column of the dataset for each example, found by id and text; None if one is missing.

        `frequency` gives int64, `group` strings or None.
        """
        if self.dataset is None or examples.split not in self.dataset.splits:
            return None
        table = self.dataset.splits[examples.split]
        rows = pc.index_in(pa.array(examples.ids, pa.string()), value_set=table["id"])
        if rows.null_count:
            return None
        found = table.take(rows)
        texts = pa.array(examples.texts, pa.string())
        if not pc.all(pc.equal(found["text"].combine_chunks(), texts), min_count=0).as_py():
            return None
        return np.asarray(found[name].to_numpy())


class Shelf:
    """Reads the data of runs, each once."""

    def __init__(self) -> None:
        self._known: dict[str, Data] = {}

    def data_of(self, run: Run) -> Data:
        """What the `data` heading of the run's config names."""
        key = repr((run.config.get("data"), run.environment.get("data_sha256")))
        if key not in self._known:
            self._known[key] = _read(run)
        return self._known[key]

    def of_any(self, runs: Sequence[Run]) -> tuple[Data, Run]:
        """The data of the first run whose data are there, else why the first run's are not."""
        for run in runs:
            data = self.data_of(run)
            if data.dataset is not None:
                return data, run
        return self.data_of(runs[0]), runs[0]


def _read(run: Run) -> Data:
    if "data" not in run.config:
        return Data(None, f"{run.name}: its config names no data.")
    try:
        settings = DataSettings.model_validate(run.config["data"])
    except ValidationError:
        return Data(None, f"{run.name}: its config names its data in another way than today's.")
    places = [settings.path] if settings.path else [*(settings.files() or {}).values()]
    missing = [place for place in places if not place.exists()]
    if missing:
        return Data(None, f"{run.name}: its data are no longer at {missing[0]}.")
    try:
        dataset = read_chosen(settings)
    except InputError as error:
        first = str(error).splitlines()[0]
        return Data(None, f"{run.name}: its data can't be read any more: {first}.")
    recorded = run.environment.get("data_sha256")
    if recorded and sorted(recorded.values()) != sorted(dataset.sha256.values()):
        return Data(None, f"{run.name}: the data at {places[0]} have changed since.")
    return Data(dataset, train_limit=settings.first("train"))


def _gold(table: pa.Table, labels: int) -> np.ndarray:
    indices, shares = gold_of(table, labels)
    guessed = np.where(shares.max(axis=1, initial=0) > 0, shares.argmax(axis=1), -1)
    return np.where(indices >= 0, indices, guessed)

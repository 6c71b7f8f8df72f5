"""What the classifier sees: the chats most characteristic of each category, and their spread."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_prep.log_odds import log_odds
from launcher.predictions import gold_of
from launcher.report.data import Data
from launcher.report.runs import Examples
from launcher.report.tables import Cell, Chat, Table

_SHOWN = 8
_LEAST = 3
"""A unit seen less often is nobody's meme."""
_SURE = 1.96
_REPEATED = 0.05
_PIECE = (2, 3)


@dataclass(frozen=True)
class Seen:
    """Units (chats, or pieces of chats) with how often and where they were seen."""

    kind: str
    units: list[str]
    counts: np.ndarray  # [units, L]
    videos: np.ndarray | None  # [units] number of videos with the unit


def seen_in(labels: int, table: pa.Table) -> Seen:
    """Count the units of a table with the columns of a dataset.

    Chats are counted whole, with their frequency, where they are repeated. Data that name each
    chat about once say nothing about chats; then the pieces of two and three characters are
    counted, each once per chat.
    """
    texts, weights = table["text"].to_pylist(), np.asarray(table["frequency"].to_numpy(), float)
    _, shares = gold_of(table, labels)
    repeated = weights.sum() > (1 + _REPEATED) * len(set(texts))
    if repeated:
        units, rows = _index([text] for text in texts)
        line = np.arange(len(texts))
    else:
        weights = np.ones(len(texts))
        pieces = [_pieces(text) for text in texts]
        units, rows = _index(pieces)
        line = np.repeat(np.arange(len(texts)), [len(own) for own in pieces])
    counts = np.zeros((len(units), labels))
    for label in range(labels):
        values = (shares[:, label] * weights)[line]
        counts[:, label] = np.bincount(rows, weights=values, minlength=len(units))
    groups = table["group"]
    videos = None
    if groups.null_count == 0 and len(table):
        codes = groups.combine_chunks().dictionary_encode().indices.to_numpy()[line]
        both = np.unique(rows.astype(np.int64) * (int(codes.max()) + 1) + codes)
        videos = np.bincount(both // (int(codes.max()) + 1), minlength=len(units))
    return Seen("chats" if repeated else "pieces of chats", units, counts, videos)


def meme_table(data: Data, examples: Examples) -> tuple[Table | None, list[str]]:
    """Per category the most characteristic units; from the data, else from the predictions.

    The second value says what is missing.
    """
    notes = []
    if data.dataset is not None:
        names = list(data.dataset.labels)
        table = pa.concat_tables(data.dataset.splits.values())
        origin = f"all {len(table):,} rows of the data"
    else:
        names, table = list(examples.labels), _as_table(examples)
        origin = f"the {len(table):,} texts of the predictions"
        notes.append(f"Counted in {origin} only. {data.lack}")
    seen = seen_in(len(names), table)
    if seen.videos is None:
        notes.append("The data name no videos: no spread over videos and no burstiness.")
    rows = _rows(seen, names)
    if not rows:
        return None, [*notes, f"No {seen.kind} stand out in a category by more than chance."]
    about = (
        f"The {seen.kind} most characteristic of each category in {origin}, by log-odds against "
        "all other categories with the whole corpus as prior (Monroe et al. 2008): only z above "
        f"{_SURE}, more than chance. Categories: how many equally large ones would be as mixed "
        "(exponential of the entropy)."
    )
    if seen.videos is not None:
        about += " Burstiness: occurrences per video with the chat (Church and Gale 1995)."
    if seen.kind != "chats":
        about += (
            " Chats are hardly repeated in the data, so pieces of 2 and 3 characters are counted."
        )
    header = ["category", "text", "z", "seen", "in the category", "categories"]
    header += ["videos", "burstiness"] if seen.videos is not None else []
    return Table(
        "Characteristic of each category", header, rows, notes=[about], file="memes"
    ), notes


def _rows(seen: Seen, names: Sequence[str]) -> list[list[Cell]]:
    z, totals = log_odds(seen.counts), seen.counts.sum(axis=1)
    often = totals >= _LEAST
    rows: list[list[Cell]] = []
    for label, name in enumerate(names):
        shown: list[str] = []
        for place in np.argsort(np.where(often, -z[:, label], np.inf), kind="stable").tolist():
            if len(shown) == _SHOWN or not often[place] or z[place, label] <= _SURE:
                break
            unit = seen.units[place]
            if any(unit in other or other in unit for other in shown):
                continue
            shown.append(unit)
            share = seen.counts[place] / totals[place]
            known = share[share > 0]
            row: list[Cell] = [Chat(name), Chat(unit), float(z[place, label])]
            row += [round(float(totals[place])), float(share[label])]
            row.append(float(np.exp(-(known * np.log(known)).sum())))
            if seen.videos is not None:
                videos = int(seen.videos[place])
                row += [videos, float(totals[place] / videos)]
            rows.append(row)
    return rows


def _index(units: Iterable[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """The different units, and for each occurrence in order which one it is."""
    known: dict[str, int] = {}
    found = [known.setdefault(unit, len(known)) for own in units for unit in own]
    return list(known), np.array(found, dtype=np.int64)


def _pieces(text: str) -> list[str]:
    return list(Counter(text[i : i + size] for size in _PIECE for i in range(len(text) - size + 1)))


def _as_table(examples: Examples) -> pa.Table:
    return pa.table(
        {
            "text": pa.array(examples.texts, pa.string()),
            "label": pa.array(examples.gold.astype(np.int32)),
            "distribution": pa.array(list(examples.shares), pa.list_(pa.float32())),
            "frequency": pa.array(np.ones(len(examples), dtype=np.int64)),
            "group": pa.nulls(len(examples), pa.string()),
        }
    )

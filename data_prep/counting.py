"""How often each unit, a chat or a word, occurs in each cell (a split's category).

Everything is counted in integers and merged in the order of the input, so that the result doesn't
depend on how many processes or machines took part.
"""

import functools
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.clean import clean
from data_prep.segment import open_segmenter, study_words
from data_prep.sources import listed
from launcher.errors import InputError
from launcher.progress import Progress

BLOCK = 1 << 14
"""Distinct chats that are segmented together."""
_BATCH = 1 << 20
_FEW_ROWS = 50_000


@dataclass(frozen=True)
class Rows:
    """Chats one by one: index of the cleaned text and of the video, int32, frequency int64, [n].

    `texts` has every distinct text, also such that no row has. `read` counts the rows of the file,
    `empty` those of which nothing was left, `outside` those of each video that is not to be used.
    """

    texts: pa.Array
    text: np.ndarray
    video: np.ndarray
    frequency: np.ndarray
    read: int
    empty: int
    outside: np.ndarray


@dataclass(frozen=True)
class Counts:
    """One entry per unit and cell that occur together, sorted by both.

    `unit` is the index in `units`, int64, `cell` int64, `frequency` int64, `first_video` and
    `last_video` int32: of all videos that the unit has in the cell, the lowest and the highest
    index; [entries] each.
    """

    units: pa.Array
    unit: np.ndarray
    cell: np.ndarray
    frequency: np.ndarray
    first_video: np.ndarray
    last_video: np.ndarray


def read_rows(file: Path, videos: pa.Array, used: np.ndarray, rule: str) -> Rows:
    """Read `chats.parquet` batch by batch and clean each batch's distinct texts.

    `videos` are the ids that the rows may have, of which `used`, bool [videos], are wanted. Raises
    InputError if the file is not one, or names a video that is not in `videos`.
    """
    outside = np.zeros(len(videos), np.int64)
    texts: list[pa.Array] = []
    columns: list[tuple[np.ndarray, np.ndarray]] = []
    read = empty = 0
    for batch in _batches(file):
        read += batch.num_rows
        video = _indices(batch["video"], videos, file)
        frequency = _frequency(batch, file)
        wanted = used[video]
        outside += np.bincount(video[~wanted], minlength=len(videos))
        encoded = _encoded(batch["text"])
        cleaned = clean(encoded.dictionary.cast(pa.string()), rule).dictionary_encode()
        text = cleaned.indices.take(encoded.indices)
        filled = pc.fill_null(pc.not_equal(cleaned.dictionary, "").take(text), False)
        filled = filled.to_numpy(zero_copy_only=False)
        empty += int((wanted & ~filled).sum())
        wanted &= filled
        kept = text.filter(pa.array(wanted))
        texts.append(pa.DictionaryArray.from_arrays(kept, cleaned.dictionary))
        columns.append((video[wanted].astype(np.int32), frequency[wanted]))
    dictionary, index = _unified(texts)
    video, frequency = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Rows(dictionary, index, video, frequency, read, empty, outside)


def count_texts(rows: Rows, cell_of_video: np.ndarray, cells: int) -> Counts:
    """Count whole chats; `cell_of_video` int64 [videos] is below `cells`."""
    key = rows.text.astype(np.int64) * cells + cell_of_video[rows.video]
    key, frequency, first, last = _sum(key, rows.frequency, rows.video, rows.video)
    text = key // cells
    new = np.diff(text, prepend=-1) > 0
    units = rows.texts.take(pa.array(text[new]))
    return Counts(units, np.cumsum(new) - 1, key - text * cells, frequency, first, last)


class WordCounter:
    """Turns counts of chats into counts of words, in this process, in several, or on Ray.

    Open it before the data is read: the processes then start small.
    """

    def __init__(
        self,
        engine: str,
        stop_words: frozenset[str],
        executor: ProcessPoolExecutor | None,
        ray: bool,
    ) -> None:
        self._work = functools.partial(_count_block, engine=engine, stop_words=stop_words)
        self._engine, self._executor, self._ray = engine, executor, ray

    def count(self, chats: Counts, cells: int) -> Counts:
        """Count the words of `chats`, each as often as its chat; tells by which segmenter."""
        blocks = list(_blocks(chats))
        progress = Progress("words", len(chats.units), "distinct chats")
        parts = []
        for part in self._map(blocks):
            parts.append(_from_bytes(part))
            progress.advance(min(BLOCK, progress.total - progress.done))
        which = functools.partial(_which_segmenter, self._engine)
        progress.finish(self._executor.submit(which).result() if self._executor else which())
        units, unit = _unified([part["unit"].combine_chunks() for part in parts])
        names = ("cell", "frequency", "first_video", "last_video")
        whole = pa.concat_tables([part.select(names) for part in parts])
        cell, frequency, first, last = (whole[name].to_numpy() for name in names)
        key, *sums = _sum(unit.astype(np.int64) * cells + cell, frequency, first, last)
        return Counts(units, key // cells, key % cells, *sums)

    def _map(self, blocks: list[bytes]) -> Iterator[bytes]:
        if self._ray:
            return _on_ray(self._work, blocks)
        return (self._executor.map if self._executor else map)(self._work, blocks)


@contextmanager
def word_counter(
    engine: str, stop_words: frozenset[str], *, rows: int, processes: int, ray: bool
) -> Iterator[WordCounter]:
    """A `WordCounter` for about so many rows, with processes if they are worth their start."""
    if ray or processes == 1 or rows < _FEW_ROWS:
        yield WordCounter(engine, stop_words, None, ray)
        return
    # At its first conversion PyArrow loads pandas, if that is installed: once, before the processes
    # part, instead of in each of them.
    pa.array(np.zeros(0))
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(processes, context) as executor:
        for _ in range(processes):  # they start now, and load the dictionary meanwhile
            executor.submit(_which_segmenter, engine)
        yield WordCounter(engine, stop_words, executor, ray)


_segmenter = functools.cache(open_segmenter)


def _which_segmenter(engine: str) -> str:
    return _segmenter(engine)[1]


def _count_block(data: bytes, engine: str, stop_words: frozenset[str]) -> bytes:
    """The words of a block of chats with their cells, added up."""
    block = _from_bytes(data)
    chat = block["chat"].combine_chunks()
    words = study_words(chat.dictionary, _segmenter(engine)[0], stop_words)
    starts = np.searchsorted(words.text, np.arange(len(chat.dictionary) + 1))
    entries = chat.indices.to_numpy()
    first, length = starts[entries], np.diff(starts)[entries]
    # Entry by entry the positions of its chat's words.
    entry = np.repeat(np.arange(len(entries)), length)
    position = np.arange(len(entry)) - (np.cumsum(length) - length)[entry] + first[entry]
    cell = block["cell"].to_numpy()
    cells = int(cell.max()) + 1
    key, frequency, low, high = _sum(
        words.word[position].astype(np.int64) * cells + cell[entry],
        *(block[name].to_numpy()[entry] for name in ("frequency", "first_video", "last_video")),
    )
    unit = pa.DictionaryArray.from_arrays((key // cells).astype(np.int32), words.vocabulary)
    return _to_bytes(
        pa.table(
            {
                "unit": unit,
                "cell": key % cells,
                "frequency": frequency,
                "first_video": low,
                "last_video": high,
            }
        )
    )


def _blocks(chats: Counts) -> Iterator[bytes]:
    """`chats` in parts of `BLOCK` texts."""
    bounds = np.searchsorted(chats.unit, np.arange(0, len(chats.units) + BLOCK, BLOCK))
    for block, (start, end) in enumerate(itertools.pairwise(bounds)):
        local = (chats.unit[start:end] - block * BLOCK).astype(np.int32)
        texts = chats.units.slice(block * BLOCK, BLOCK)
        yield _to_bytes(
            pa.table(
                {
                    "chat": pa.DictionaryArray.from_arrays(local, texts),
                    "cell": chats.cell[start:end],
                    "frequency": chats.frequency[start:end],
                    "first_video": chats.first_video[start:end],
                    "last_video": chats.last_video[start:end],
                }
            )
        )


def _on_ray(work: "functools.partial[bytes]", blocks: Iterable[bytes]) -> Iterator[bytes]:
    """`work` on each block through Ray Data: on the cluster at RAY_ADDRESS, else on this machine.

    The blocks travel as bytes, each with its number, since Ray may finish them in any order.
    """
    import ray

    if not ray.is_initialized():
        ray.init(os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False)
    tables = [
        pa.table({"block": [number], "data": pa.array([data], pa.large_binary())})
        for number, data in enumerate(blocks)
    ]

    def count(table: pa.Table) -> pa.Table:
        counted = [work(data) for data in table["data"].to_pylist()]
        return pa.table({"block": table["block"], "data": pa.array(counted, pa.large_binary())})

    dataset = ray.data.from_arrow(tables).map_batches(count, batch_format="pyarrow", batch_size=1)
    done = {row["block"]: row["data"] for row in dataset.iter_rows()}
    return (done[number] for number in range(len(tables)))


def _sum(
    key: np.ndarray, frequency: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each key once, sorted, with the sum, the least and the greatest of what stands beside it."""
    if not len(key):
        return key, frequency, first, last
    order = np.argsort(key)
    key = key[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    return (
        key[starts],
        np.add.reduceat(frequency[order], starts),
        np.minimum.reduceat(first[order], starts),
        np.maximum.reduceat(last[order], starts),
    )


def _to_bytes(table: pa.Table) -> bytes:
    """Only what the table shows of its arrays, which pickle would send whole."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _unified(parts: list[pa.Array]) -> tuple[pa.Array, np.ndarray]:
    """The values of dictionary arrays, each once in order of appearance, and indices, int32."""
    whole = pa.chunked_array(parts).unify_dictionaries()
    indices = np.concatenate([chunk.indices.to_numpy() for chunk in whole.chunks])
    return whole.chunks[0].dictionary, indices


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    try:
        opened = pq.ParquetFile(file, read_dictionary=["text", "video"])
        missing = {"video", "text"}.difference(opened.schema_arrow.names)
        if missing:
            raise InputError(f"{file}: no column {listed(sorted(missing))}")
        names = [name for name in opened.schema_arrow.names if name in _COLUMNS]
        yield from opened.iter_batches(_BATCH, columns=names)
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a whole parquet file: {error}") from error


_COLUMNS = ("video", "text", "frequency")


def _encoded(column: pa.Array) -> pa.DictionaryArray:
    return column if pa.types.is_dictionary(column.type) else column.dictionary_encode()


def _indices(column: pa.Array, videos: pa.Array, file: Path) -> np.ndarray:
    """Index in `videos` of each row's video."""
    encoded = _encoded(column)
    index = pc.index_in(encoded.dictionary.cast(pa.string()), value_set=videos)
    rows = index.take(encoded.indices)
    if rows.null_count:
        unknown = encoded.filter(rows.is_null()).unique().cast(pa.string())[:3].to_pylist()
        raise InputError(
            f"{file}: {rows.null_count:,} chats of videos that videos.parquet lacks, such as "
            f"{listed(unknown)}; add them there (tid null if the zone is unknown)"
        )
    return rows.to_numpy()


def _frequency(batch: pa.RecordBatch, file: Path) -> np.ndarray:
    if "frequency" not in batch.schema.names:
        return np.ones(batch.num_rows, np.int64)
    column = batch["frequency"].cast(pa.int64())
    if column.null_count or pc.any(pc.less(column, 1)).as_py():
        raise InputError(f"{file}: column frequency: expected 1 or more in each row")
    return column.to_numpy()

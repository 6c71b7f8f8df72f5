"""The folder that chats are crawled or imported into, and built from."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.sources import listed, read_json
from launcher.errors import InputError

CHATS = pa.schema({"video": pa.string(), "second": pa.float32(), "text": pa.string()})
"""Columns of `chats.parquet`; `frequency` (int64) may follow: how often the chat came."""
VIDEOS = pa.schema(
    {
        "video": pa.string(),
        "title": pa.string(),
        "tid": pa.int32(),
        "tid_v2": pa.int32(),
        "plays": pa.int64(),
        "pubdate": pa.date32(),
    }
)
"""Columns of `videos.parquet`; all but `video` may be null."""
ORIGINS = ("crawl.json", "import.json")


def read_videos(folder: Path) -> pa.Table:
    """`videos.parquet` with the columns of `VIDEOS`, those that it lacks null.

    Raises InputError if it is missing, not a whole file, of other types, or names a video twice.
    """
    file = folder / "videos.parquet"
    try:
        table = pq.ParquetFile(file).read()
        columns = {
            field.name: table[field.name].cast(field.type)
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in VIDEOS
            if field.name != "video" or field.name in table.column_names
        }
        table = pa.table(columns, VIDEOS)
    except FileNotFoundError:
        raise InputError(
            f"{file}: no such file; expected a folder with chats.parquet and videos.parquet, as "
            "written by crawl and import"
        ) from None
    except (pa.ArrowException, KeyError, OSError) as error:
        raise InputError(f"{file}: not a file of videos: {str(error).splitlines()[0]}") from error
    names = pc.value_counts(table["video"])
    if table["video"].null_count or len(names) < table.num_rows:
        twice = [row["values"] for row in names.to_pylist() if row["counts"] > 1]
        raise InputError(f"{file}: column video: null or more than once: {listed(twice[:3])}")
    return table


def read_origin(folder: Path) -> dict[str, Any]:
    """What crawl or import noted about where the chats are from, {} if nothing."""
    for name in ORIGINS:
        if (folder / name).exists():
            origin = read_json(folder / name)
            if isinstance(origin, dict):
                return origin
            raise InputError(f"{folder / name}: expected an object, got {json.dumps(origin)[:40]}")
    return {}

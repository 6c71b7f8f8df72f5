"""Configs of small sweeps."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "method": "prompting.discrete",
    "run": {"name": "base"},
    "data": {"path": "data", "evaluate": ["dev"]},
    "model": {"path": "model"},
    "prompt": {"template": "study_1"},
}


def written(folder: Path, values: dict[str, Any], name: str = "run") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return file


def sweep_file(folder: Path, space: dict[str, Any], **others: Any) -> Path:
    arm = {"config": str(written(folder, RUN)), "space": space}
    values = {"name": "s", "dir": str(folder), "arms": {"a": arm}, **others}
    return written(folder, values, "sweep")

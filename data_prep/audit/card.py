"""The data card: every figure of the audit as JSON, and the same as one self-contained page."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from data_prep.audit import figures
from data_prep.audit.characteristic import characteristic_chats, characteristic_pairs
from data_prep.audit.chats import collect
from data_prep.audit.leaks import leaks
from data_prep.dataset import Dataset
from data_prep.privacy import mask
from launcher.files import write_json, write_text
from launcher.progress import Progress

SYNTHETIC = "Synthetic data: the figures show what the audit finds, not how people chat."
_MOST_BARS = 24
_TAIL = 0.002  # this share of the texts may stand in the last bar of a chart together
_DIGEST = re.compile(r"[0-9a-f]{64}")


def make_card(dataset: Dataset, name: str) -> dict[str, Any]:
    """The audit of `dataset`, JSON-ready; personal data in any of its strings is masked.

    Keys:
        name, synthetic, labels, grouping, provenance, files: what the dataset says of itself.
        sizes, balance, lengths, frequencies, appearances, leaks, meaningless, characteristic,
        privacy: as the functions in `figures`, `leaks` and `characteristic` describe.
    """
    names = dataset.labels
    chats = collect(dataset)
    parts: dict[str, Callable[[], Any]] = {
        "sizes": lambda: figures.sizes(dataset, chats),
        "balance": lambda: figures.balance(names, chats),
        "lengths": lambda: figures.lengths(chats),
        "frequencies": lambda: figures.frequencies(chats),
        "appearances": lambda: figures.appearances(chats),
        "leaks": lambda: leaks(dataset, chats),
        "meaningless": lambda: figures.meaningless(chats),
        "characteristic": lambda: {
            "chats": characteristic_chats(names, chats),
            "pairs": characteristic_pairs(names, chats),
        },
        "privacy": lambda: figures.privacy(chats),
    }
    card: dict[str, Any] = {
        "name": name,
        "synthetic": dataset.provenance.get("synthetic") is True,
        "labels": list(names),
        "grouping": dataset.grouping,
        "provenance": dataset.provenance,
        "files": [
            # The name alone: the folders above it may name a person.
            {"name": Path(file).name, "sha256": digest}
            for file, digest in dataset.sha256.items()
        ],
    }
    progress = Progress("audit", len(parts), "parts")
    for part, make in parts.items():
        card[part] = make()
        progress.advance(1, part)
    progress.finish()
    return _publishable(card)


def write_card(out: Path, card: dict[str, Any]) -> list[Path]:
    """Write `card.html` and `card.json` into the folder `out`; the same card, the same bytes.

    Raises:
        InputError: they can't be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.filters["percent"] = _percent
    environment.filters["shortened"] = _shortened
    page = environment.get_template("card.html.jinja").render(
        card=card,
        warning=SYNTHETIC if card["synthetic"] else None,
        usual=figures.USUAL_LENGTH,
        general_above=figures.GENERAL_ABOVE,
    )
    html, data = out / "card.html", out / "card.json"
    write_text(html, page.rstrip() + "\n")
    write_json(data, card)
    return [html, data]


def _publishable(value: Any) -> Any:
    """`value` as plain JSON: every string masked, numbers rounded. Nothing else leaves the audit.

    Six decimals tell all that the counts do, and are no long digit run themselves.
    """
    if isinstance(value, str):
        return value if _DIGEST.fullmatch(value) else mask(value)
    if isinstance(value, dict):
        return {mask(str(key)): _publishable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_publishable(item) for item in value]
    return round(float(value), 6) if isinstance(value, float | np.floating) else value


def _percent(part: float, whole: float = 1.0) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _shortened(histogram: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A histogram for a chart: what lies beyond the longest shown is one last bar, open above."""
    texts = np.array([one["texts"] for one in histogram])
    shown = int(np.searchsorted(texts.cumsum(), (1 - _TAIL) * texts.sum())) + 2
    kept = histogram[: min(shown, _MOST_BARS)]
    if len(kept) == len(histogram):
        return kept
    last = {"from": kept[-1]["from"], "to": None, "texts": int(texts[len(kept) - 1 :].sum())}
    return [*kept[:-1], last]

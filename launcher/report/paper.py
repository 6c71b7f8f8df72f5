"""The study's reported figures beside the runs of matching configs, and why they may differ."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.report.leaderboard import entries_of, figure
from launcher.report.runs import Group, Run
from launcher.report.tables import Cell, Table

_NAMES = {"acc@1": "Acc@1", "acc@3": "Acc@3"}


def paper_table(groups: list[Group]) -> tuple[Table, list[str]]:
    """One row per reported figure and matching row of the leaderboard; the rest said in words."""
    text = Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
    study = yaml.safe_load(text)
    rows: list[list[Cell]] = []
    unmatched = []
    for reported in study["rows"]:
        found = _rows(reported, study["unit"], groups)
        rows += found
        if not found:
            unmatched.append(str(reported["system"]))
    notes = [
        f"Reported: {study['study']}. A figure is comparable only where nothing stands in the last "
        "column; the study gives single runs without intervals.",
    ]
    header = ["study's system", "metric", "reported", "run", "split", "this run", "not comparable"]
    table = Table("The study's figures and these runs", header, rows, notes=notes, file="paper")
    lacks = [f"No run here repeats: {'; '.join(unmatched)}."] if unmatched else []
    return table, lacks


def _rows(reported: Mapping[str, Any], unit: str, groups: list[Group]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for group in groups:
        for entry in entries_of(group):
            run = group.runs[entry.places[0]]
            if not _mismatches(reported["config"], run):
                why = "; ".join(differences(reported, unit, run, group)) or None
                for key, value in reported["figures"].items():
                    metric = f"{_NAMES[key]} ({reported['metric']})"
                    ours = figure(group, entry, key)
                    row = [reported["system"], metric, value, entry.name, group.split, ours, why]
                    rows.append(row)
    return rows


def differences(reported: Mapping[str, Any], unit: str, run: Run, group: Group) -> list[str]:
    """Why the run's figure must not be held against the reported one; empty if it may."""
    examples, why = group.examples, []
    if run.synthetic:
        why.append("data: synthetic")
    labels = reported.get("labels")
    if labels and labels != len(examples.labels):
        why.append(f"categories: {labels} in the study, {len(examples.labels)} here")
    if reported["metric"] == "accuracy" and examples.spread:
        why.append(
            "metric: the study's accuracy counts one label, Acc@1 here the largest gold share"
        )
    if reported["metric"] != "accuracy" and not examples.spread:
        why.append("metric: without gold distributions Acc@3 is the same as Acc@1")
    split, size = reported.get("split"), reported.get("examples")
    if split and split != group.split:
        why.append(f"split: {split} in the study, {group.split} here")
    elif size and size != len(examples):
        why.append(f"examples: {size:,} in the study, {len(examples):,} here")
    if not size or size != len(examples):
        given = run.metrics["provenance"].get("unit")
        if given is None:
            why.append(f"data unit: {unit} in the study, not told here")
        elif str(given).rstrip("s") != unit.rstrip("s"):
            why.append(f"data unit: {unit} in the study, {given} here")
    model = reported.get("model")
    if model and not re.search(model, str(_value(run.config, "model.path") or "")):
        why.append("model: another one than the study's")
    for key, pattern in _mismatches(reported.get("settings") or {}, run).items():
        why.append(
            f"setting: {key} is {_value(run.config, key)!r}, the study's {pattern.strip('^$')}"
        )
    return why + list(reported.get("caveats") or [])


def _mismatches(wanted: Mapping[str, str], run: Run) -> dict[str, str]:
    return {
        key: pattern
        for key, pattern in wanted.items()
        if not re.search(pattern, str(_value(run.config, key) or ""))
    }


def _value(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value

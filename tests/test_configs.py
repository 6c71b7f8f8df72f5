"""Every config in the project can be read, and says how it is launched."""

import shlex
from pathlib import Path

import pytest

from launcher.config import load_config
from launcher.sweep.settings import load_sweep

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert "configs/demo/prompt.yaml" in CONFIGS
    assert "configs/sweeps/paper.yaml" in CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_and_its_header_launches_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    header = []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("#").strip())
    commands = [
        shlex.split(line)
        for line in "\n".join(header).replace("\\\n", " ").split("\n")
        if "--config" in line
    ]
    own = [words for words in commands if words[words.index("--config") + 1] == name]
    assert own, f"the header of {name} has no command with --config {name}"
    sweeps = name.startswith("configs/sweeps/")
    programs = {"launcher.sweep"} if sweeps else {"launcher/run.py", "launcher.run"}
    read = load_sweep if sweeps else load_config
    for words in own:
        assert programs & set(words)
        given = words[words.index("--config") + 2 :]
        read(Path(name), [word for word in given if not word.startswith("--")])
    read(Path(name))

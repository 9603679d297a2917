"""Every command shows examples, at every width; every example is one that the command takes; those about the carried checkpoints run, one after the other."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from qwench.cli.app import ORDER, app
from tests.test_cli import call

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def runs(line: str) -> bool:
    """Whether an example is about what the package carries; `qwench demo` does at once what these do one by one, see test_proving."""
    return not line.startswith("qwench demo") and ("demo:" in line or "./first" in line or line.startswith("qwench recipes"))


def examples_of(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int = 80) -> list[str]:
    """The lines that a person sees and may copy."""
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = call(monkeypatch, capsys, name, "--help")
    assert code == 0
    _, heading, below = out.partition("\nExample")
    assert heading, f"{name} --help shows no example"
    return [line.strip() for line in below.splitlines()[1:] if line.strip()]


def test_commands_are_listed_as_they_are_needed() -> None:
    assert sorted(ORDER) == sorted(COMMANDS)


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("width", [36, 80, 160])
def test_examples_are_whole_lines_at_every_width(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = examples_of(name, monkeypatch, capsys, width)
    assert shown and all(line.startswith(f"qwench {name}") for line in shown)


@pytest.mark.parametrize("name", ORDER)
def test_every_example_is_taken_by_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in examples_of(name, monkeypatch, capsys):
        words = shlex.split(line)
        COMMANDS[words[1]].make_context(words[1], words[2:])  # raises for an option or argument that there is not


def test_examples_on_what_the_package_carries_run_in_the_order_of_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = 0
    for name in ORDER:
        for line in examples_of(name, monkeypatch, capsys):
            if not runs(line):
                continue
            code, out, err = call(monkeypatch, capsys, *shlex.split(line)[1:])
            assert code == 0, f"{line}\n{out}\n{err}"
            assert out, line
            ran += 1
    assert ran >= 16
    assert (tmp_path / "sizes.png").stat().st_size > 10_000
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "first" / "model.safetensors").read_bytes()

"""The journal: what is read back is what was put down, whatever tore it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwench.checkpoint.journal import Claims, Journal, read_journal


def test_what_was_put_down_is_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", "f1", {"a": 1}, {"x": {"error": 0.1}})
    journal.add("b\n", 2**32 - 1)
    journal.remark("y", {"error": 0.1 + 0.2, "role": "mlp.gate", "layer": None})
    journal.remark("x", {"error": 3e-9})
    remarks = {"x": {"error": 3e-9}, "y": {"error": 0.1 + 0.2, "role": "mlp.gate", "layer": None}}
    assert read_journal(tmp_path / "j") == Claims("f1", {"a": 1, "b\n": 2**32 - 1}, remarks)
    journal.close()


def test_a_new_journal_replaces_the_old(tmp_path: Path) -> None:
    Journal(tmp_path / "j", "f1", {"a": 1}, {"x": {}}).close()
    Journal(tmp_path / "j", "f2", {}, {}).close()
    assert read_journal(tmp_path / "j") == Claims("f2")
    assert [p.name for p in tmp_path.iterdir()] == ["j"]


def test_no_journal(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "j") == Claims()


@pytest.mark.parametrize("torn", range(1, 35))
def test_a_torn_last_line_is_not_believed(tmp_path: Path, torn: int) -> None:
    Journal(tmp_path / "j", "f1", {"a": 1, "bee": 1234567}, {}).close()
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[:-torn])
    kept = {"a": 1, "bee": 1234567} if torn == 1 else {"a": 1}  # torn by its line break alone, the line is whole
    assert read_journal(tmp_path / "j") == Claims("f1", kept)


@pytest.mark.parametrize("junk", [b"", b"\0" * 100, b"[]\n", b"{}\n", b"\xff\xfe\n"])
def test_junk_is_no_journal(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "j").write_bytes(junk)
    assert read_journal(tmp_path / "j") == Claims()


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", "f1", {}, {})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: journal.add(f"tensor{n}" * 20, n), range(400)))
    journal.close()
    assert read_journal(tmp_path / "j") == Claims("f1", {f"tensor{n}" * 20: n for n in range(400)})

"""How many names become one sentence."""

from __future__ import annotations

from qwench.models.claims import summary


def test_names_that_differ_in_their_numbers_are_one_entry() -> None:
    names = ["a.fc.weight", *(f"m.{i}.x.{e}.w" for i in (0, 1) for e in range(3)), "m.7.bias"]
    assert summary(names) == "a.fc.weight, m.{0..1}.x.{0..2}.w (6), m.7.bias"


def test_numbers_with_gaps_are_listed() -> None:
    assert summary([f"layers.{i}.w" for i in (9, 2, 5)]) == "layers.{2,5,9}.w (3)"


def test_what_is_no_number_of_its_own_stays() -> None:
    assert summary(["vision.norm1.weight", "vision.norm2.weight"]) == "vision.norm1.weight, vision.norm2.weight"


def test_odd_names_do_no_harm() -> None:
    assert summary(["{}.0.{x}", "%s"]) == "{}.0.{x}, %s"

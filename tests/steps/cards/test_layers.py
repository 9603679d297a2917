"""The layer that costs most: counted from nothing before the first, told in words."""

from __future__ import annotations

import pytest

from qwench.result import Figures, LayerDivergence
from qwench.steps.cards.layers import costliest, divergence_errors, divergences, hidden_errors, layer_words, own_errors, sides
from tests.steps.releases import estimate, evaluation


@pytest.mark.parametrize(("values", "layer"), [([1, 2, 5, 4], 2), ([0, 0, 0], None), ([], None), ([0.5, 0.4, 0.5], 0)])
def test_the_costliest_layer(values: list[float], layer: int | None) -> None:
    assert costliest(values) == layer


def test_words_name_the_layers_that_add_most() -> None:
    found = evaluation(own_error_by_layer=[0.011, 0.0313, 0.0, 0.024, 0.0127, 0.001, 0.002])
    assert own_errors(found) == pytest.approx([1.1, 3.13, 0, 2.4, 1.27, 0.1, 0.2])
    expected = "By itself layer 1 (3.1%) adds most to the hidden states, then layer 3 (2.4%) and layer 4 (1.3%); half of the layers add less than 1.1%."
    assert layer_words(found) == expected
    assert layer_words(evaluation(own_error_by_layer=[0.0, 0.5])) == "By itself layer 1 (50%) adds most to the hidden states."
    assert layer_words(evaluation()) == "" == layer_words(evaluation(own_error_by_layer=[0.0, 0.0]))


def test_measures_by_layer_in_their_units() -> None:
    apart = LayerDivergence(positions=7, by_layer=[estimate(0.001, 0.0002), estimate(0.0213, 0.003)])
    both = evaluation(divergence_by_layer=apart)
    assert hidden_errors(both) == pytest.approx([3.1, 4.2, 4.7, 5.9])
    assert divergences(both) == [0.001, 0.0213] and divergence_errors(both) == [0.0002, 0.003]
    assert divergences(evaluation()) == [] == divergence_errors(evaluation())


def test_a_release_without_corrections_has_one_side() -> None:
    assert [name for name, _ in sides(evaluation())] == ["after"]
    without = Figures.model_validate(evaluation().model_dump(include=set(Figures.model_fields)))
    assert [(name, found) for name, found in sides(evaluation(without_corrections=without))][1] == ("without", without)

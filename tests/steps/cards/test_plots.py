import math

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from qwench.result import Figures, LayerDivergence
from qwench.steps.cards.plots import (
    ORANGE,
    byte_rows,
    bytes_figure,
    divergence_figure,
    draw_plots,
    layer_figure,
    layer_table,
    shade_range,
    size_text,
)
from tests.steps.releases import estimate, evaluation, release, row, weight


def test_layer_table_has_one_row_per_role_and_gaps_where_nothing_is_quantized():
    errors = [
        weight("expert.up", 2, relative=0.03),
        weight("expert.up", 2, relative=0.04),
        weight("attention.q", 0, relative=0.09),
    ]
    roles, table = layer_table([*errors, weight("mtp.mlp.up", 0), weight("head", None)])
    assert roles == ["attention.q", "expert.up"] and table.shape == (2, 3)
    assert table[1, 2] == pytest.approx(math.sqrt((0.03**2 + 0.04**2) / 2)) and table[0, 0] == 0.09
    assert math.isnan(table[0, 1]) and math.isnan(table[1, 0])


@pytest.mark.parametrize(
    ("values", "low", "high"), [([9.5, 9.6, math.nan], 8.59, 10.51), ([0.6, 9.6], 0.6, 9.6), ([0.0, 0.0], 0.0, 0.0)]
)
def test_shades_do_not_blow_small_differences_up(values, low, high):
    assert shade_range(np.array(values)) == pytest.approx((low, high))


def by_layer(*means):
    return LayerDivergence(positions=97, by_layer=[estimate(mean, mean / 9) for mean in means])


def test_layer_figure_shows_every_layer_of_all_three():
    found = evaluation(
        hidden_error_by_layer=[0.03, 0.04, 0.05, 0.09, 0.07],
        own_error_by_layer=[0.02, 0.01, 0.03, 0.01, 0.02],
        divergence_by_layer=by_layer(0.1, 0.6, 0.5, 0.7, 0.9),
    )
    figure = layer_figure(release().errors, found)
    weights, hidden, apart = figure.axes[0], figure.axes[1], figure.axes[2]
    assert [t.get_text() for t in weights.get_yticklabels()] == ["attention.q", "mlp.gate"]
    assert hidden.lines[0].get_ydata() == pytest.approx([3, 4, 5, 9, 7]) and hidden.get_xlim() == (-0.5, 4.5)
    assert apart.lines[0].get_ydata() == pytest.approx([0.1, 0.6, 0.5, 0.7, 0.9])
    bars = sorted(hidden.patches, key=lambda bar: bar.get_x())
    assert [bar.get_height() for bar in bars] == pytest.approx([2, 1, 3, 1, 2]) and not apart.patches
    assert [bar.get_facecolor() == to_rgba(ORANGE) for bar in bars] == [False, False, True, False, False], (
        "the layer that adds most"
    )
    assert len(layer_figure(release().errors, evaluation()).axes) == 3, "the map, its scale, and one measure"
    assert len(layer_figure(release().errors, None).axes) == 2


def test_layer_figure_shows_a_release_with_and_without_its_corrections():
    without = evaluation().model_dump(include=set(Figures.model_fields)) | {
        "hidden_error_by_layer": [0.1, 0.2],
        "divergence_by_layer": by_layer(0.3, 0.4),
    }
    found = evaluation(
        hidden_error_by_layer=[0.03, 0.04],
        divergence_by_layer=by_layer(0.1, 0.2),
        without_corrections=Figures.model_validate(without),
    )
    figure = layer_figure([], found)
    hidden, apart = figure.axes
    assert hidden.lines[1].get_ydata() == pytest.approx([10, 20]) and apart.lines[1].get_ydata() == pytest.approx([0.3, 0.4])
    assert [t.get_text() for t in hidden.get_legend().get_texts()] == ["release", "without corrections"]
    assert hidden.get_ylim()[1] >= 20


def test_divergence_figure_tail_is_the_share_beyond():
    figure = divergence_figure(evaluation().divergence)
    line = figure.axes[1].lines[0]
    shares = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert shares[1e-3] == pytest.approx(100 * 660 / 672) and shares[0.1] == pytest.approx(100 * 30 / 672)
    assert shares[3.917] == pytest.approx(100 / 672)


def test_quantiles_that_coincide_are_marked_once():
    divergence = evaluation().divergence.model_copy(update={"p999": 3.917})
    labels = [text.get_text() for text in divergence_figure(divergence).axes[1].texts]
    assert labels == ["p99 0.23", "max 3.9"]


def test_nothing_is_drawn_of_a_release_that_equals_its_source(tmp_path):
    zero = evaluation().divergence.model_copy(update={"p99": 0.0, "p999": 0.0, "max": 0.0})
    assert "divergence.png" not in draw_plots(release(evaluation=evaluation(divergence=zero)), tmp_path)


def test_bytes_by_component_before_and_after():
    rows = byte_rows(release().precision)
    assert rows == [("vision", 14_300, 14_300), ("mtp", 14_200, 14_200), ("attention", 14_100, 4_100), ("mlp", 14_100, 4_100)]
    bars = bytes_figure(release().precision).axes[0].containers
    assert [(b.get_label(), [round(p.get_width() * 1e6) for p in b]) for b in bars] == [
        ("source", [14_300, 14_200, 14_100, 14_100]),
        ("release", [14_300, 14_200, 4_100, 4_100]),
    ]


def test_unknown_source_bytes_leave_only_the_release():
    rows = [row("mlp", "nvfp4 g16", 100, None), row("mlp", "BF16", 40, 40)]
    assert byte_rows(rows) == [("mlp", None, 140)]
    assert [c.get_label() for c in bytes_figure(rows).axes[0].containers] == ["release"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.00 kB"), (37_500, "37.5 kB"), (11_235_000_000, "11.2 GB"), (999_800, "1.00 MB")],
)
def test_sizes(size, text):
    assert size_text(size) == text

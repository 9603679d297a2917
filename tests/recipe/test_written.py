"""What a newcomer writes and means: short forms that are taken, slips that are told with the place and the mend."""

from __future__ import annotations

import pytest

from qwench.errors import RecipeError
from qwench.recipe import ExportGguf, Recipe, parse_recipe

RULE = """
name: mine
steps:
  - quantize:
      rules:
        - {%s}
  - export: {}
"""
EXPORT = """
name: mine
steps:
  - export: {%s}
"""


def read(text: str) -> Recipe:
    return parse_recipe(text, "here")


def complaint(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text)
    return str(caught.value)


@pytest.mark.parametrize(("written", "meant"), [("0", "0"), ("3", "3"), ("1..", "1.."), ("'3'", "3"), ("all", "all")])
def test_layers_without_quotes(written: str, meant: str) -> None:
    quantize = read(RULE % f"roles: [mlp.*], scheme: int4, layers: {written}").quantize
    assert quantize and quantize.rules[0].layers == meant
    smooth = f"name: mine\nsteps:\n- smooth: {{layers: {written}}}\n- quantize: {{rules: [{{roles: [mlp.*], scheme: int4}}]}}\n- export\n"
    smoothed = read(smooth).smooth
    assert smoothed and smoothed.layers == meant


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("1.", "YAML reads this as 1.0"),
        ("on", "YAML reads this as true"),
        ("[0, 3]", "not the list [0, 3]: write '0..7'"),
        ("-1", "layers count from 0"),
        ("0-3", "neither 'all', a number, nor a range"),
    ],
)
def test_layers_that_are_no_range(written: str, told: str) -> None:
    assert told in complaint(RULE % f"roles: [mlp.*], scheme: int4, layers: {written}")


def test_smoothed_layers_are_checked_when_they_are_read() -> None:
    told = complaint(
        "name: a\nsteps:\n- smooth: {layers: one}\n- quantize: {rules: [{roles: [mlp.*], scheme: int4}]}\n- export\n"
    )
    assert "steps.0.smooth.layers: layers 'one' is neither" in told


def test_one_word_is_a_list_of_one() -> None:
    quantize = read(RULE % "roles: mlp.*, scheme: int4").quantize
    assert quantize and quantize.rules[0].roles == ("mlp.*",)
    made = read(EXPORT % "format: gguf, types: Q6_K, content: trunk-only").gguf
    assert made == ExportGguf(format="gguf", types=("Q6_K",), content=("trunk-only",))
    assert read(EXPORT % "layout: text, drop: vision").export.drop == ("vision",)


@pytest.mark.parametrize("off", ["off", "no", "false", "none"])
def test_off_is_the_word_that_is_meant(off: str) -> None:
    quantize = read(RULE % f"roles: [mlp.*], scheme: int4, search: {off}").quantize
    assert quantize and quantize.rules[0].search == "none"
    made = read(EXPORT % f"format: gguf, mmproj: {off}").gguf
    assert made and made.mmproj == "none"


def test_off_where_off_is_the_word() -> None:
    assert read("name: a\nacceptance: off\nsteps: [export]\n").acceptance == "off"
    told = complaint("name: a\nacceptance: on\nsteps: [export]\n")
    assert "acceptance: YAML reads this as true (on, off, yes and no too): put the word in quotes, one of 'off'" in told


@pytest.mark.parametrize("step", ["export", "export:", "export: {}"])
def test_a_step_without_settings(step: str) -> None:
    assert read(f"name: a\nsteps:\n  - {step}\n").export.format == "compressed-tensors"


@pytest.mark.parametrize(("written", "text"), [("5000000000", "5000000000 B"), ("5 gb", "5 gb"), ("2GiB", "2GiB")])
def test_sizes_as_people_write_them(written: str, text: str) -> None:
    assert read(EXPORT % f"shard_size: {written}").export.shard_size == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: 5\nsteps: [export]\n", "name: YAML reads this as the number 5: put it in quotes"),
        ("name: 2026-11-21\nsteps: [export]\n", "name: YAML reads this as the date 2026-11-21: put it in quotes"),
        ("name: a\nname: b\nsteps: [export]\n", "the key 'name' stands here twice"),
        ("name: a\nsteps:\n\t- export\n", "YAML takes no tabs"),
        ("name: a\nabout: INT4: fast\nsteps: [export]\n", "goes in quotes"),
        ("name: a\nsteps:\n  export: {}\n", "steps: a list is meant here"),
        ("name: a\nsteps: [exprot]\n", "did you mean 'export'?"),
        ("name: a\nsteps:\n- quantize:\n  method: gptq\n  rules: []\n- export\n", "belong into it (method, rules): indent them"),
        ("name: a\nsamples: 4\nsteps: [export]\n", "samples: unknown key (it is a key of calibration)"),
        ("name: a\nacceptance: {flor: 0.5}\nsteps: [export]\n", "acceptance.flor: unknown key (did you mean 'floor'?)"),
        ("name: a\ncalibration: wikitext\nsteps: [{prune: {ratio: 0.5}}, export]\n", "calibration: keys with values are meant here"),
        ("name: a\nsteps: [{prune: {ratio: 50%}}, export]\n", "'50%' was given"),
        (RULE % "roles: ['*.q'], scheme: NVPF4", "did you mean 'nvfp4'?"),
        (RULE % "roles: [*.q], scheme: int4", "put what begins with * in quotes"),
        (RULE % "roles: [mlp.*], scheme: {kind: int, bit: 8}", "scheme.bit: unknown key (did you mean 'bits'?)"),
        (RULE % "roles: [mlp.*], scheme: {kind: int8}", "'int8' is none of 'int', 'nvfp4', 'mxfp4' or 'fp8' (did you mean 'int'?)"),
        (RULE % "roles: [mlp.*], scheme: {kind: int, group: -1}", "leave group out for one scale in each row"),
        (RULE % "roles: [mlp.*], scheme: int4, iterations: 3", "iterations: unknown key (it is a key of autoround)"),
        (RULE % "roles: [mlp.*]", "scheme: this key is needed"),
        (EXPORT % "format: gguf, type: Q8_0", "export.type: unknown key (did you mean 'types'?)"),
        (EXPORT % "format: ggfu", "did you mean 'gguf'?"),
        (EXPORT % "format: compressed_tensors", "did you mean 'compressed-tensors'?"),
        (EXPORT % "dtype: bf16", "did you mean 'bfloat16'?"),
        (EXPORT % "dtype: {txt: bfloat16}", "dtype.txt: 'txt' is none of 'text', 'mtp' or 'vision' (did you mean 'text'?)"),
        (EXPORT % "layout: text, drop: [mpt]", "did you mean 'mtp'?"),
    ],
)  # fmt: skip
def test_a_slip_is_told_with_its_mend(text: str, told: str) -> None:
    said = complaint(text)
    assert told in said
    assert "mend:" in said


def test_one_slip_is_told_once() -> None:
    """Where a word or a mapping may stand, nobody hears what was wrong with the kind that was not chosen."""
    for text in (
        RULE % "roles: [mlp.*], scheme: {kind: int, bit: 8}",
        EXPORT % "dtype: bf16",
        EXPORT % "dtype: {txt: bfloat16}",
    ):
        assert len(complaint(text).splitlines()) == 3  # which recipe, the slip, the mend

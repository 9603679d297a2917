"""compare: several releases of one source side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qwench import display
from qwench.cli.app import DeviceOption, JsonOption, command, print_json

PAGE = 150
"""Columns of a table that goes into a file or a pipe: nothing is cut."""


@command(
    "Measure",
    "qwench compare ./first ./first-GGUF --against demo:dense --documents 2 --length 64 --plot ./sizes.png",
    "qwench compare ./Qwen3.5-9B-AWQ ./Qwen3.5-9B-NVFP4A16 --against Qwen/Qwen3.5-9B",
)
def compare(
    releases: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Releases: folders, or GGUF files.")],
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The checkpoint that all of them were made from.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on (.txt or .jsonl); the package's held-out text if left out.")
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Documents to measure on; left out, what the records agree on, else 16.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=8, help="Tokens of each document; left out, what the records agree on, else 512.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the comparison into this file.")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show releases of one source side by side: size against KL divergence, top-1 agreement and acceptance of the MTP head.

    What is in a release's record is used if it was measured on the same rows, and measured otherwise (and put on the record).
    """
    from qwench.checkpoint.hub import locate
    from qwench.errors import OutputError
    from qwench.measuring import evaluate_gguf_release, evaluate_release
    from qwench.models.place import memory_is_told, place_of
    from qwench.result import Evaluation
    from qwench.steps.cards.plots import size_text
    from qwench.steps.measures import compare as step
    from qwench.steps.measures.compare_plot import draw_comparison
    from qwench.stream.rows import held_out_rows, rows_from_text

    place, found = place_of(device, "float32"), step.contenders(releases)
    located = locate(against)
    rows = None
    if text or documents or length or not step.recorded_rows(found, located):
        documents, length = documents or 16, length or 512
        rows = rows_from_text(text, located.path, documents, length) if text else held_out_rows(located.path, documents, length)
    with display.progress("comparison", unit="blocks") as report, memory_is_told(place):

        def measure(one: step.Contender) -> Evaluation:
            assert documents and length
            if one.place.suffix == ".gguf":
                folder, name = one.place.parent, one.place.name
                return evaluate_gguf_release(folder, against, text, documents, length, report, name, place)[name]
            return evaluate_release(one.place, against, text, documents, length, report, place=place)

        compared = step.compare(found, located, rows.ids_sha256 if rows else None, "float32", measure)
    size = sum(path.stat().st_size for path in located.path.glob("*.safetensors"))
    data = step.comparison_data(compared, located, size)
    if plot:
        try:
            draw_comparison(data, plot)
        except (OSError, ValueError) as error:  # matplotlib: a name that ends in no format
            raise OutputError(f"{plot} cannot be drawn: {error}", "give a writable path that ends in .png") from None
    if as_json:
        print_json(data)
        return
    table = [(name, size_text(count), *others) for name, count, *others in step.comparison_rows(data)]
    title = f"Measured on {data['tokens']:,} tokens of {data['text']}"
    columns = ["release", "size", "of source", "KL, mean", "p99.9", "top-1", "perplexity", "drafts accepted"]
    page = display.out if display.out.is_terminal else Console(highlight=False, width=PAGE)
    page.print(display.table(title, columns, table))
    if plot:
        display.out.print(f"wrote {plot}")

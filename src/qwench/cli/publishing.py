"""Commands on the way out: the card, and making a release again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qwench import display
from qwench.cli.app import DonorOption, JsonOption, ReleaseArgument, app, print_json
from qwench.errors import VerificationError


@app.command()
def card(release: ReleaseArgument) -> None:
    """Write the release's README.md and plots from what was measured.

    Example: `qwench card ./Qwen3.5-9B-NVFP4A16`
    """
    from qwench.steps.card import write_card

    display.out.print(f"wrote {write_card(release)}")


@app.command()
def reproduce(
    release: ReleaseArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the second release goes; must not exist yet, or be empty.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The source, where it was a local folder; the hub's is fetched again."),
    ] = None,
    donor: DonorOption = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:NUMBER; left out, as the release was made.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a release again from its provenance.json, and compare every file with it by hash.

    Example: `qwench reproduce ./Qwen3.5-9B-NVFP4A16 --out ./again --model ./Qwen3.5-9B`
    """
    from qwench.reproduce import reproduce as make_again

    with display.progress("release") as report:
        found = make_again(release, out, report, model, donor, device)
    if as_json:
        print_json(asdict(found) | {"same": found.same})
    else:
        rows = [(f.name, (f.recorded or "-")[:16], (f.made or "-")[:16], "same" if f.same else "differs") for f in found.files]
        display.out.print(display.table("SHA-256 of each file", ["file", "release", "made again", ""], rows))
    if not found.same:
        wrong = [f for f in found.files if not f.same]
        tensors = [name for f in wrong for name in f.tensors]
        what = f"{len(wrong)} of {len(found.files)} files differ: {', '.join(f.name for f in wrong[:4])}"
        what += f"; {len(tensors)} tensors, such as {tensors[0]}" if tensors else ""
        mend = (
            "use the versions, the processor and the source that provenance.json names"
            if found.notes
            else "see both provenance.json"
        )
        raise VerificationError(what, mend)

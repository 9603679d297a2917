"""Commands on the way out: the card, and making a release again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qwench import display
from qwench.cli.app import DonorOption, JsonOption, ReleaseArgument, command, print_json
from qwench.errors import VerificationError


@command("Publish", "qwench card ./first")
def card(release: ReleaseArgument) -> None:
    """Write the release's README.md and plots from what was measured."""
    from qwench.steps.cards.card import write_card

    display.out.print(f"wrote {write_card(release)}")


@command(
    "Publish", "qwench reproduce ./first --out ./again", "qwench reproduce ./Qwen3.5-9B-AWQ --out ./again --model ./Qwen3.5-9B"
)
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
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where the calibration text lies, where the recipe names a local one.")
    ] = None,
    importance: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where the importance file lies, where the recipe names a local one.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:NUMBER; left out, as the release was made.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a release again from its provenance.json, and compare every file with it by hash."""
    from qwench.reproduce import reproduce as make_again

    with display.progress("release") as report:
        inputs = {what: said for what, said in (("calibration", calibration), ("importance", importance)) if said}
        found = make_again(release, out, report, model, donor, device, inputs)
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


@command(
    "Publish",
    "qwench serve ./first --engine vllm --vram 24",
    "qwench serve ./first-GGUF",
    "qwench serve ./Qwen3.5-9B-AWQ --run",
)
def serve(
    release: ReleaseArgument,
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="NAME", help="vllm, sglang or llama.cpp; left out: llama.cpp for GGUF, else vllm."),
    ] = None,
    file: Annotated[str | None, typer.Option("--file", metavar="NAME", help="One file of a GGUF release.")] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the longest conversation; left out, what the model has and the memory holds."),
    ] = None,
    vram: Annotated[
        float | None, typer.Option(help="GiB of the GPU that it is for; left out, that of this machine's first GPU.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the engine's own if left out.")] = "",
    port: Annotated[int | None, typer.Option(help="Port to listen on; the engine's own if left out.")] = None,
    start: Annotated[bool, typer.Option("--run", help="Start it, and not only print it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the command that serves a release on this machine, or start it: context, cache, MTP speculation, parsers."""
    from qwench.models.place import gpu_memory
    from qwench.steps.publishing.launch import shell
    from qwench.steps.publishing.serve import run_server, serving

    found = serving(release, engine, file, int(vram * 2**30) if vram else gpu_memory(), context, host, port)
    if as_json:
        print_json(asdict(found))
    else:
        for note in found.notes:
            display.err.print(f"note: {note}", markup=False)
        print(shell(found.words), flush=True)  # plain: it is to be copied
    if start:
        run_server(found)


@command("Publish", "qwench push ./first me/first --dry-run", "qwench push ./Qwen3.5-9B-AWQ me/Qwen3.5-9B-AWQ --private")
def push(
    release: ReleaseArgument,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository one that only its owner sees.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and ask nobody.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a finished release to the Hugging Face hub. A push that was stopped goes on when the same command is given again."""
    from qwench.steps.publishing import push as step

    items = step.files_to_push(release)
    for note in step.warnings(release):
        display.err.print(f"note: {note}", markup=False)
    if dry_run:
        found = None
    else:
        with display.progress("push") as report:
            found = step.push(release, repository, items, private, report)
    sent = found.sent if found else items
    if as_json:
        data = {"repository": repository, "url": found.url if found else None, "dry_run": dry_run}
        print_json(data | {"sent": [asdict(i) for i in sent], "there": [asdict(i) for i in found.there] if found else []})
        return
    title = f"What would go to {repository}" if dry_run else f"What went to {repository}"
    display.out.print(display.table(title, ["file", "size"], [(item.name, display.size(item.bytes)) for item in sent]))
    display.out.print(f"{len(sent)} files, {display.size(sum(item.bytes for item in sent))}")
    if found:
        there = f"; {len(found.there)} files lay there already" if found.there else ""
        display.out.print(f"{found.url}{there}", markup=False)

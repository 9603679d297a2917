"""The application that commands hang on, and the arguments that several of them share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qwench.errors import Interrupted


class Commands(TyperGroup):
    """The commands; Ctrl-C in one of them becomes an error of ours, with its message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(
    name="qwench",
    cls=Commands,
    help="Turn a Qwen3.5-family checkpoint into a release that people run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, or a hub id such as org/name or org/name@revision.")
]
ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL", help="A folder, or a hub id such as org/name@revision.")]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A bundled recipe's name (see `qwench recipes`), or a YAML file.")
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="Text to calibrate on in place of the recipe's: carried, a file or folder, org/name on the hub."
    ),
]
DonorOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Where a graft comes from, in place of the recipe's: a folder, or a hub id, of which only the shards in question are fetched.",
    ),
]
ReleaseArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A release that `qwench run` made.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="Where layers run: cpu, cuda, cuda:NUMBER; auto is a GPU where there is one."
    ),
]
ComputeOption = Annotated[
    str | None, typer.Option("--compute", metavar="DTYPE", help="float32 or bfloat16; left out, what suits the device.")
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=0, help="Worker threads; 0 is one per core.")]


def print_json(data: Any) -> None:
    """What a command says under --json."""
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")

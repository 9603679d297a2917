"""The application that commands hang on, how their examples are shown, and the arguments that several of them share.

Examples of a command stand below its options, each in a line of its own that nothing wraps: they are there to be copied. Those on `demo:` and on what these make run as
they are, one after the other in one folder, and a test runs them so.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from qwench import display
from qwench.errors import Interrupted

Panel = Literal["Make", "Measure", "Publish"]
ORDER = (
    "demo", "recipes", "inspect", "plan", "run",
    "eval", "compare", "verify", "doctor",
    "card", "serve", "push", "reproduce",
)  # fmt: skip
"""Commands as they are listed: as a person comes to need them."""
START = "qwench demo\nqwench run nvfp4a16 --model demo:dense --out ./first"
Function = TypeVar("Function", bound=Callable[..., Any])


def _show_examples(text: str | None) -> None:
    """Lines to copy."""
    lines = (text or "").splitlines()
    if lines:
        display.out.print(f"[bold]{'Example' if len(lines) == 1 else 'Examples'}[/]")
    for line in lines:
        display.out.print(f"  {line}", markup=False)
    if lines:
        display.out.print()


class Command(TyperCommand):
    """A command with examples, which are its epilog."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        examples, self.epilog = self.epilog, None
        super().format_help(ctx, formatter)
        self.epilog = examples
        _show_examples(examples)


class Commands(TyperGroup):
    """The commands; Ctrl-C in one of them becomes an error of ours, with its message."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _show_examples(START)

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


def command(panel: Panel, *examples: str, name: str | None = None) -> Callable[[Function], Function]:
    """Make a function a command of the application.

    Args:
        panel: where it is listed.
        examples: whole lines that a person may type.
        name: of the command; None: the function's.
    """
    return app.command(name, cls=Command, epilog="\n".join(examples), rich_help_panel=panel)


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
    str | None,
    typer.Option(
        "--compute", metavar="DTYPE", help="float32, bfloat16, or auto: bfloat16 where the device multiplies it natively."
    ),
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=0, help="Worker threads; 0 is one per core.")]


def quoted(word: str | Path) -> str:
    """A word as it has to be typed."""
    return shlex.quote(str(word))


def print_json(data: Any) -> None:
    """What a command says under --json."""
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")

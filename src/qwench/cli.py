"""What a person types. Each command is a few lines: find the model, call a step, show what came of it.

Exit codes: 0 done, 2 the user can mend it (one message, no traceback), 1 our fault.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from qwench import __version__, display
from qwench.errors import Interrupted, UserError, VerificationError
from qwench.recipe import bundled, load_recipe


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
ThreadsOption = Annotated[int, typer.Option("--threads", min=0, help="Worker threads; 0 is one per core.")]


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that the package carries.

    Example: `qwench recipes`
    """
    found = {name: load_recipe(name).about for name in sorted(bundled())}
    if as_json:
        _print_json(found)
    else:
        display.out.print(display.table("Bundled recipes", ["recipe", "what it makes"], list(found.items())))


@app.command()
def inspect(
    model: ModelArgument,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of context for the cache sizes; the model's own, up to 32768, if left out."),
    ] = None,
    vram: Annotated[float | None, typer.Option(help="Say what fits a GPU of this many GiB.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint is: layers, parameters and bytes by component, MTP head, caches.

    Example: `qwench inspect ./Qwen3.5-9B --context 65536 --vram 24`
    """
    from qwench.steps.inspect import inspection, show
    from qwench.steps.material import shapes_of

    found = inspection(shapes_of(model), model, context, vram)
    if as_json:
        _print_json(found)
    else:
        show(found, display.out)


@app.command()
def plan(recipe: RecipeArgument, model: ModelOption, donor: DonorOption = None, as_json: JsonOption = False) -> None:
    """Show what a run would make, to the byte, from shapes alone (a lone config.json is enough).

    Example: `qwench plan nvfp4a16 --model ./Qwen3.5-9B`
    """
    from qwench.run import plan_for
    from qwench.steps import gguf_table, plan_table
    from qwench.steps.gguf_plan import GgufRelease

    made = plan_for(load_recipe(recipe), model, donor)
    if as_json:
        _print_json(gguf_table.as_data(made) if isinstance(made, GgufRelease) else plan_table.as_data(made))
    elif isinstance(made, GgufRelease):
        gguf_table.show(made, display.out)
    else:
        plan_table.show(made, display.out)


@app.command()
def run(
    recipe: RecipeArgument,
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the release goes; must not exist yet, or be empty.")],
    donor: DonorOption = None,
    accept_any: Annotated[
        bool,
        typer.Option(
            "--accept-any", help="Finish the release even if its MTP head lost more acceptance than the recipe allows."
        ),
    ] = False,
    calibration: CalibrationOption = None,
    samples: Annotated[int | None, typer.Option(help="Calibration rows, in place of the recipe's number.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in each calibration row.")] = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a release. A run that was stopped goes on where it stood when the same command is given again.

    Example: `qwench run nvfp4a16 --model ./Qwen3.5-9B --out ./Qwen3.5-9B-NVFP4A16`
    """
    from qwench.run import run_recipe

    made = load_recipe(recipe).calibrated_on(calibration, samples, length)
    with display.progress("release") as report:
        result = run_recipe(made, model, out, threads, report, donor, accept_any)
    if as_json:
        _print_json(result.model_dump(mode="json"))
    else:
        display.show_result(result, out)


@app.command("eval")
def evaluate(
    release: ReleaseArgument,
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The checkpoint that the release was made from.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on (.txt or .jsonl); the package's held-out text if left out.")
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents to measure on.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens of each document.")] = 512,
    speculate: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="TOKENS",
            help="Let both write so many tokens after each document's beginning, with drafts of the MTP head.",
        ),
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure a release against its source: KL divergence, perplexity, top-1 agreement, acceptance of the MTP head.

    Example: `qwench eval ./Qwen3.5-9B-NVFP4A16 --against ./Qwen3.5-9B`
    """
    from qwench.run import evaluate_gguf_release, evaluate_release
    from qwench.steps.gguf_verify import is_gguf

    if is_gguf(release):
        with display.progress("evaluation", unit="blocks") as report:
            by_file = evaluate_gguf_release(release, against, text, documents, length, report)
        if as_json:
            _print_json({name: found.model_dump(mode="json") for name, found in by_file.items()})
        else:
            display.show_ladder(by_file)
        return
    with display.progress("evaluation", unit="blocks") as report:
        measured = evaluate_release(release, against, text, documents, length, report, speculate)
    if as_json:
        _print_json(measured.model_dump(mode="json"))
    else:
        display.show_evaluation(measured)


@app.command()
def verify(
    release: ReleaseArgument,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="transformers, vllm, gptqmodel, auto-round, llama.cpp; left out: llama.cpp for GGUF, else transformers.",
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="NAME", help="One file of a GGUF release; all if left out.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="MODEL", help="The source of a GGUF release: its BF16 file is held against transformers."
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="DIR", help="Corrections (EoRA) to add on both sides: gptqmodel and vllm take them."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Load a release in a real engine, and hold the engine's numbers against our own reading of the file.

    Example: `qwench verify ./Qwen3.5-9B-NVFP4A16 --engine vllm`
    """
    from qwench.run import verify_gguf_release, verify_release
    from qwench.steps.gguf_verify import is_gguf, refuse_gguf_questions

    if is_gguf(release):
        if adapter is not None:
            raise VerificationError(f"--adapter {adapter} cannot be added to a GGUF release", "leave --adapter out")
        every = verify_gguf_release(release, engine or "llama.cpp", file, against)
    else:
        refuse_gguf_questions(release, engine, file, against)
        every = [verify_release(release, engine or "transformers", adapter)]
    if as_json:
        data = [found.model_dump(mode="json") for found in every]
        _print_json(data if is_gguf(release) else data[0])
    else:
        for found in every:
            display.show_verification(found)
    for found in every:
        if found.outcome not in {"agrees", "loads"}:
            raise VerificationError(
                f"{found.engine} {found.outcome} on {found.file or release}", "; ".join(found.notes) or "see the table above"
            )


@app.command()
def card(release: ReleaseArgument) -> None:
    """Write the release's README.md and plots from what was measured.

    Example: `qwench card ./Qwen3.5-9B-NVFP4A16`
    """
    from qwench.steps.card import write_card

    display.out.print(f"wrote {write_card(release)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the demo release goes.")] = Path("qwench-demo"),
    recipe: Annotated[str, typer.Option(help="The recipe to run.")] = "nvfp4a16",
    moe: Annotated[bool, typer.Option("--moe", help="Use the mixture-of-experts checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo release.")] = False,
) -> None:
    """Run the whole job on a checkpoint that the package carries: make, verify, evaluate, card.

    Example: `qwench demo`
    """
    from qwench.demo import checkpoint
    from qwench.run import evaluate_release, run_recipe, verify_release
    from qwench.steps.card import write_card

    model = str(checkpoint("moe" if moe else "dense"))
    if force and (out / "result.json").is_file():
        shutil.rmtree(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with display.progress("release") as report:
        result = run_recipe(load_recipe(recipe), model, out, 0, report)
    display.show_result(result, out)
    display.show_verification(verify_release(out, "transformers"))
    with display.progress("evaluation", unit="blocks") as report:
        display.show_evaluation(evaluate_release(out, model, None, 16, 512, report))
    display.out.print(f"card: {write_card(out)}")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Turn a Qwen3.5-family checkpoint into a release that people run."""
    if version:
        display.out.print(__version__)
        raise typer.Exit


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """The entry point: errors of the tree in `qwench.errors` become one message and exit code 2."""
    try:
        app()
    except UserError as error:
        display.err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt):
        display.err.print("stopped; what a run has written is kept, and the same command goes on from there")
        sys.exit(2)
    except OSError as error:
        display.err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)

"""Commands that make releases, and that show what would be made: recipes, inspect, plan, run, demo."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from qwench import display
from qwench.cli.app import (
    CalibrationOption,
    ComputeOption,
    DeviceOption,
    DonorOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    RecipeArgument,
    ThreadsOption,
    command,
    print_json,
)
from qwench.recipe import bundled, load_recipe


@command("Make", "qwench recipes", "qwench recipes --json")
def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that the package carries."""
    found = {name: load_recipe(name).about for name in sorted(bundled())}
    if as_json:
        print_json(found)
    else:
        display.out.print(display.table("Bundled recipes", ["recipe", "what it makes"], list(found.items())))


@command("Make", "qwench inspect demo:moe", "qwench inspect Qwen/Qwen3.5-9B --context 65536 --vram 24")
def inspect(
    model: ModelArgument,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of context for the cache sizes; the model's own, up to 32768, if left out."),
    ] = None,
    vram: Annotated[float | None, typer.Option(help="Say what fits a GPU of this many GiB.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint is: layers, parameters and bytes by component, MTP head, caches."""
    from qwench.steps.checks.inspect import inspection, show
    from qwench.steps.materials.material import shapes_of

    found = inspection(shapes_of(model), model, context, vram)
    if as_json:
        print_json(found)
    else:
        show(found, display.out)


@command("Make", "qwench plan nvfp4a16 --model demo:dense", "qwench plan ./mine.yaml --model Qwen/Qwen3.5-9B")
def plan(recipe: RecipeArgument, model: ModelOption, donor: DonorOption = None, as_json: JsonOption = False) -> None:
    """Show what a run would make, to the byte, from shapes alone (a lone config.json is enough)."""
    from qwench.run import plan_for
    from qwench.steps.gguf import table as gguf_table
    from qwench.steps.gguf.plan import GgufRelease
    from qwench.steps.planning import table as plan_table

    made = plan_for(load_recipe(recipe), model, donor)
    if as_json:
        print_json(gguf_table.as_data(made) if isinstance(made, GgufRelease) else plan_table.as_data(made))
    elif isinstance(made, GgufRelease):
        gguf_table.show(made, display.out)
    else:
        plan_table.show(made, display.out)


@command(
    "Make",
    "qwench run nvfp4a16 --model demo:dense --out ./first --measure",
    "qwench run gguf --model demo:dense --out ./first-GGUF",
    "qwench run awq-int4-mtp --model Qwen/Qwen3.5-9B --out ./Qwen3.5-9B-AWQ --device cuda",
)
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
    device: DeviceOption = "auto",
    compute: ComputeOption = None,
    threads: ThreadsOption = 0,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Then verify it in an engine, measure it against MODEL, and write its card: the whole job."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a release. A run that was stopped goes on where it stood when the same command is given again."""
    from qwench.cli.ending import show_ending
    from qwench.models.place import memory_is_told, place_of
    from qwench.result import read_result
    from qwench.run import run_recipe

    place = place_of(device, compute)
    made = load_recipe(recipe).calibrated_on(calibration, samples, length)
    with display.progress("release") as report, memory_is_told(place):
        result = run_recipe(made, model, out, threads, report, donor, accept_any, place)
    if measure:
        from qwench.cli.proving import measure_and_card

        measure_and_card(out, model, place_of(device, "float32"), show=not as_json)
        result = read_result(out)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        show_ending(result, out, model)


@command("Make", "qwench demo", "qwench demo --moe --recipe int4 --out ./demo-moe")
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the demo release goes.")] = Path("qwench-demo"),
    recipe: Annotated[str, typer.Option(help="The recipe to run.")] = "nvfp4a16",
    moe: Annotated[bool, typer.Option("--moe", help="Use the mixture-of-experts checkpoint.")] = False,
    donor: DonorOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo release.")] = False,
) -> None:
    """Run the whole job on a checkpoint that the package carries: make, verify, evaluate, card."""
    from qwench.cli.ending import show_ending
    from qwench.cli.proving import measure_and_card
    from qwench.result import read_result
    from qwench.run import run_recipe

    model = f"demo:{'moe' if moe else 'dense'}"
    if force and (out / "result.json").is_file():
        shutil.rmtree(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with display.progress("release") as report:
        run_recipe(load_recipe(recipe), model, out, 0, report, donor)
    measure_and_card(out, model)
    show_ending(read_result(out), out, model)

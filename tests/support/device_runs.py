"""Runs recipes on the pretended device and on the processor, in a process of its own: `python -m tests.support.device_runs FOLDER`.

The device must be there before PyTorch first works out a gradient. Every `MODEL NAME.yaml` line of FOLDER/jobs.txt is made twice, in FOLDER/NAME/processor and FOLDER/NAME/device, and evaluated where it
has an acceptance gate; attention takes the same path on both, the plain one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.measuring import evaluate_release
from qwench.models.place import Place
from qwench.recipe import load_recipe
from qwench.run import run_recipe
from tests.support.pretend import pretended

QUIET = Report("test", "bytes", None)


def main(folder: Path) -> None:
    with pretended():
        pass
    torch.set_num_threads(1)
    for line in (folder / "jobs.txt").read_text().splitlines():
        model, _, name = line.partition(" ")
        recipe, source, out = load_recipe(str(folder / f"{name}.yaml")), checkpoint(model), folder / name
        out.mkdir()
        with sdpa_kernel(SDPBackend.MATH):
            run_recipe(recipe, str(source), out / "processor", 1, QUIET, accept_any=True)
            if recipe.acceptance != "off":
                evaluate_release(out / "processor", str(source), None, 2, 24, QUIET, 3)
        with pretended() as device:
            place = Place(device)
            run_recipe(recipe, str(source), out / "device", 1, QUIET, accept_any=True, place=place)
            if recipe.acceptance != "off":
                evaluate_release(out / "device", str(source), None, 2, 24, QUIET, 3, place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

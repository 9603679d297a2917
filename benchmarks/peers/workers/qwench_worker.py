"""Our side: one recipe, as `qwench run` would make it. The rows are read anew, by the recipe's own description of them."""

from __future__ import annotations

import measured
import transformers.models.qwen3_5.modeling_qwen3_5
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe  # noqa: F401
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

import qwench.cli
import qwench.run
import qwench.steps.measures.evaluate
from qwench.display import Report
from qwench.models.place import place_of
from qwench.recipe import load_recipe
from qwench.stream.rows import ids_sha256


def main() -> None:
    start = measured.begin()
    job = measured.job()
    recipe = load_recipe(job.settings["recipe"])
    place = place_of("cpu", job.settings.get("compute"))
    result = qwench.run.run_recipe(recipe, str(job.model), job.out, 1, Report("release", "bytes", None), place=place)
    said = {}
    if result.calibration:
        import torch

        assert result.calibration.ids_sha256 == ids_sha256(torch.tensor(job.rows)), "these are not the rows of the others"
        said = {"reports": result.calibration.reports}
    measured.finish(start, ("qwench", "torch", "transformers"), **said)


if __name__ == "__main__":
    main()

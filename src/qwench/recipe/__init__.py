"""What a release is made of, as YAML that a person writes: a list of steps, in order.

    name: nvfp4a16
    about: NVFP4 weights by rounding; mixers of the Gated DeltaNet, embedding, head and vision stay as they are.
    steps:
      - quantize:
          rules:
            - roles: [attention.*, mlp.*]
              scheme: nvfp4
      - export: {format: compressed-tensors}

The recipe says what; the command line says where and on which machine. An unknown key is an error that suggests the nearest known one.
Targets are roles (see `qwench.models.map`), never patterns over tensor names.
"""

from qwench.errors import suggestion
from qwench.recipe.gguf import ExportGguf, TypeOverride
from qwench.recipe.graft import AcceptanceGate, Graft
from qwench.recipe.load import bundled, load_recipe, parse_recipe
from qwench.recipe.prune import Prune
from qwench.recipe.recipe import Recipe, recipe_data
from qwench.recipe.rules import Rule, SchemeSpec, layer_range
from qwench.recipe.steps import (
    ActivationSettings,
    AutoRoundSettings,
    Calibration,
    Correct,
    Export,
    GptqSettings,
    Quantize,
    Smooth,
    Step,
    byte_size,
)

__all__ = [
    "AcceptanceGate",
    "ActivationSettings",
    "AutoRoundSettings",
    "Calibration",
    "Correct",
    "Export",
    "ExportGguf",
    "GptqSettings",
    "Graft",
    "Prune",
    "Quantize",
    "Recipe",
    "Rule",
    "SchemeSpec",
    "Smooth",
    "Step",
    "TypeOverride",
    "bundled",
    "byte_size",
    "layer_range",
    "load_recipe",
    "parse_recipe",
    "recipe_data",
    "suggestion",
]

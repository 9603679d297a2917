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

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qwench.errors import RecipeError
from qwench.numerics.scheme import SCHEMES, Kind, Scheme, Search


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SchemeSpec(Strict):
    """A number format spelled out, where no short name fits: `{kind: int, bits: 8, group: 64}`."""

    kind: Kind
    bits: Literal[4, 8] = 4
    group: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    full_range: bool = False

    def scheme(self, search: Search) -> Scheme:
        return Scheme(self.kind, self.bits, self.group, self.block, self.symmetric, self.full_range, search)


class Rule(Strict):
    """Roles that get one scheme.

    Attributes:
        roles: globs over roles: `attention.*`, `delta.qkv`, `expert.*`, `mtp.mlp.*`. `*` does not cross into `mtp.` or `vision.`.
        scheme: a short name or a spelled-out scheme; `keep` leaves the weight as it is (to carve an exception out of an earlier rule).
        layers: decoder layers: `all`, `3`, `1..`, `0..7` (inclusive).
        search: how scales are chosen.
    """

    roles: tuple[str, ...] = Field(min_length=1)
    scheme: str | SchemeSpec
    layers: str = "all"
    search: Search = "none"

    @field_validator("scheme")
    @classmethod
    def _known(cls, value: str | SchemeSpec) -> str | SchemeSpec:
        if isinstance(value, str) and value != "keep" and value not in SCHEMES:
            raise ValueError(
                f"unknown scheme {value!r}{suggestion(value, [*SCHEMES, 'keep'])}; known: {', '.join(SCHEMES)}, keep"
            )
        return value

    @field_validator("layers")
    @classmethod
    def _range(cls, value: str) -> str:
        layer_range(value)
        return value

    def resolved(self) -> Scheme | None:
        """The scheme, or None for `keep`."""
        if isinstance(self.scheme, SchemeSpec):
            return self.scheme.scheme(self.search)
        if self.scheme == "keep":
            return None
        named = SCHEMES[self.scheme]
        return Scheme(named.kind, named.bits, named.group, named.block, named.symmetric, named.full_range, self.search)


def layer_range(text: str) -> tuple[int, int | None]:
    """First and last layer (inclusive, None: to the end) of a `layers` value. Raises ValueError."""
    if text == "all":
        return 0, None
    first, dots, last = text.partition("..")
    try:
        low = int(first or 0)
        high = (int(last) if last else None) if dots else low
    except ValueError:
        raise ValueError(f"layers {text!r} is neither 'all', a number, nor a range such as '1..' or '0..7'") from None
    if high is not None and high < low:
        raise ValueError(f"layers {text!r}: the range ends before it begins")
    return low, high


class GptqSettings(Strict):
    """Attributes:
    order: activation order. `grouped`: whole groups by importance, then columns within them. `static`: columns by importance, groups stay where they are. `dynamic`
        (desc_act): groups follow the order, a g_idx is stored, and few engines read it. `none`. Left out: what is best for each scheme.
    damping: added to the second moment's diagonal, as a share of its mean.
    least_tokens: a weight that fewer tokens reached is rounded with searched scales instead, and reported.
    """

    order: Literal["grouped", "static", "dynamic", "none"] | None = None
    damping: float = Field(0.03, gt=0, le=1)
    least_tokens: int = Field(128, ge=1)


class AutoRoundSettings(Strict):
    """Attributes:
    iterations: steps of signed gradient descent for each layer.
    batch: rows in a step.
    """

    iterations: int = Field(200, ge=1)
    batch: int = Field(8, ge=1)


class Quantize(Strict):
    """Choose numbers for weights. Later rules win over earlier ones.

    Attributes:
        method: `rtn`: round to nearest, no data. `gptq`: column by column with error feedback. `autoround`: rounding and ranges tuned by signed
            gradient descent. The last two read calibration rows.
        rules: what becomes what; everything that no rule names is copied bit for bit.
        gptq, autoround: settings of the method.
    """

    method: Literal["rtn", "gptq", "autoround"] = "rtn"
    rules: tuple[Rule, ...] = Field(min_length=1)
    gptq: GptqSettings = GptqSettings()
    autoround: AutoRoundSettings = AutoRoundSettings()


class Smooth(Strict):
    """AWQ: move per-channel scales from the input of weights into what produces it, before they are rounded.

    Attributes:
        folds: where scales may move: `norm.post` (into gate and up; in a mixture of experts into every reader of that norm), `norm.input` (into q/k/v, or the
            Gated DeltaNet's input projections), `mlp.up`, `expert.up`, `shared.up` (into the down projection).
        layers: see Rule.
        grid: points of the search.
        duo: divide by the weights' own magnitudes too.
        clip: search a smaller range for each group afterwards.
    """

    folds: tuple[Literal["norm.post", "norm.input", "mlp.up", "expert.up", "shared.up"], ...] = ("norm.post",)
    layers: str = "all"
    grid: int = Field(20, ge=2, le=200)
    duo: bool = False
    clip: bool = False


class Correct(Strict):
    """EoRA: a low-rank correction beside every quantized weight.

    Attributes:
        rank: of each correction; engines serve 8, 16, 32, 64, 128, 256.
    """

    rank: Literal[8, 16, 32, 64, 128, 256] = 64


class Calibration(Strict):
    """The rows of tokens that calibrated steps read; `qwench.stream.calibration.calibration_rows` takes these fields as they are.

    Attributes:
        text: `carried`: what the package carries. A .txt, .jsonl, .json or .parquet file, or a folder of them. A data set on the Hugging Face hub:
            `org/name`, `org/name/config`, either with `@revision`; `wikitext` and `pile-10k` for short. Hub and Parquet need the extra `data`.
        samples: rows.
        length: tokens in each.
        seed: of the shuffle of documents.
        packed: documents joined by the end-of-text token and cut; otherwise one row for each document that is long enough.
        column: which column holds text or messages; found by itself where there is no doubt.
        split: of a data set.
        revision: branch, tag or commit of a hub data set, if `text` has no `@revision`.
        thinking: reasoning in conversations: `filled`: as the data has it; `off`: taken out, and the template told so.
        images: records with images are left out (`skip`), or their text is taken without them (`text`). Both are counted.
    """

    text: str = Field("carried", min_length=1)
    samples: int = Field(128, ge=1)
    length: int = Field(512, ge=2)
    seed: int = 0
    packed: bool = True
    column: str | None = None
    split: str = "train"
    revision: str | None = None
    thinking: Literal["filled", "off"] = "filled"
    images: Literal["skip", "text"] = "skip"

    @field_validator("thinking", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare `off` as false


class Export(Strict):
    """How the result is laid out on disk.

    Attributes:
        format: the container format: `compressed-tensors`, or for symmetric INT4 and INT8 `gptq` and `auto-round`.
        shard_size: largest size of one safetensors file: `5GB`, `500MB`.
        dtype: of the weights that are kept; `source` keeps them bit for bit.
    """

    format: Literal["compressed-tensors", "gptq", "auto-round"] = "compressed-tensors"
    shard_size: str = "5GB"
    dtype: str = "source"

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str) -> str:
        if value in {"float16", "fp16", "half"}:
            raise ValueError(
                "float16 is refused: Gated DeltaNet's intermediate values overflow it; leave dtype out, or say source"
            )
        if value != "source":
            raise ValueError(f"dtype {value!r} is not known; known: source")
        return value

    @field_validator("shard_size")
    @classmethod
    def _size(cls, value: str) -> str:
        byte_size(value)
        return value


def byte_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` in bytes. Raises ValueError."""
    units = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6, "B": 1}
    for unit, factor in units.items():
        if text.endswith(unit):
            number = text.removesuffix(unit).strip()
            try:
                size = int(float(number) * factor)
            except ValueError:
                break
            if size > 0:
                return size
    raise ValueError(f"size {text!r} is not of the form 5GB, 500MB or 2GiB")


class Step(Strict):
    """One entry of `steps`: exactly one of its keys."""

    smooth: Smooth | None = None
    quantize: Quantize | None = None
    correct: Correct | None = None
    export: Export | None = None

    @model_validator(mode="after")
    def _one(self) -> Step:
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise ValueError(f"a step is exactly one of: {', '.join(type(self).model_fields)}")
        return self


def reads_rows(step: Step) -> bool:
    """Whether a step reads calibration rows."""
    return bool(step.smooth or step.correct or (step.quantize and step.quantize.method != "rtn"))


def _default_calibration(steps: tuple[Step, ...]) -> Calibration | None:
    return Calibration() if any(reads_rows(step) for step in steps) else None


class Recipe(Strict):
    """A release, described.

    Attributes:
        name: its short name; release folders and cards use it.
        about: one line for lists.
        steps: what is done, in order; `export` comes last, once.
        calibration: the rows that its steps read; None where none of them reads any.
    """

    name: str
    about: str = ""
    steps: tuple[Step, ...] = Field(min_length=1)
    calibration: Calibration | None = Field(default_factory=lambda data: _default_calibration(data.get("steps", ())))

    @model_validator(mode="after")
    def _export_last(self) -> Recipe:
        if [bool(s.export) for s in self.steps].count(True) != 1 or not self.steps[-1].export:
            raise ValueError("a recipe ends with exactly one export step")
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Recipe:
        kinds = [next(name for name in type(s).model_fields if getattr(s, name)) for s in self.steps]
        order = list(Step.model_fields)
        if kinds != sorted(kinds, key=order.index) or any(kinds.count(kind) > 1 for kind in kinds):
            raise ValueError(f"steps come once each and in this order: {', '.join(order)}")
        if "quantize" not in kinds and len(kinds) > 1:
            raise ValueError("smooth and correct need a quantize step between them")
        return self

    @model_validator(mode="after")
    def _rows_are_read(self) -> Recipe:
        if self.calibration and not self.calibrated:
            raise ValueError("calibration is given, and no step reads it: take it out, or name a method other than rtn")
        if self.calibrated and not self.calibration:
            raise ValueError("a step reads calibration rows: leave calibration out for the default, or describe it")
        return self

    @property
    def smooth(self) -> Smooth | None:
        return next((s.smooth for s in self.steps if s.smooth), None)

    @property
    def quantize(self) -> Quantize | None:
        return next((s.quantize for s in self.steps if s.quantize), None)

    @property
    def correct(self) -> Correct | None:
        return next((s.correct for s in self.steps if s.correct), None)

    @property
    def calibrated(self) -> bool:
        """Whether it reads calibration rows."""
        return any(reads_rows(step) for step in self.steps)

    @property
    def export(self) -> Export:
        export = self.steps[-1].export
        assert export is not None
        return export


def suggestion(word: str, known: list[str]) -> str:
    """` (did you mean X?)`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def bundled() -> dict[str, str]:
    """The recipes that the package carries: name -> YAML text."""
    folder = resources.files("qwench") / "recipes"
    return {p.name.removesuffix(".yaml"): p.read_text(encoding="utf-8") for p in folder.iterdir() if p.name.endswith(".yaml")}


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by path, or by the name of a bundled one. Raises RecipeError."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            return parse_recipe(path.read_text(encoding="utf-8"), where=str(path))
        except FileNotFoundError:
            raise RecipeError(
                f"there is no recipe file {path}", "give a path to a YAML file, or a name from `qwench recipes`"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read: {error}", "give a readable YAML file") from None
    known = bundled()
    if name_or_path not in known:
        raise RecipeError(
            f"there is no bundled recipe {name_or_path!r}{suggestion(name_or_path, list(known))}",
            f"use one of {', '.join(sorted(known))}, or the path of a YAML file",
        )
    return parse_recipe(known[name_or_path], where=name_or_path)


def parse_recipe(text: str, where: str) -> Recipe:
    """A recipe from YAML text; `where` names it in errors. Raises RecipeError."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {error}", "mend the syntax at that line") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where} holds no mapping", "a recipe has the keys name, about and steps")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(
            f"recipe {where}:\n" + "\n".join(f"  {line}" for line in _explain(error)), "see docs/recipes.md"
        ) from None


def _explain(error: ValidationError) -> list[str]:
    """Pydantic's complaints as lines that name the place, with a suggestion for unknown keys."""
    lines = []
    for item in error.errors():
        place = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{place}: unknown key{suggestion(str(item['loc'][-1]), _all_keys())}")
        else:
            lines.append(f"{place or 'recipe'}: {item['msg'].removeprefix('Value error, ')}")
    return lines


def _all_keys() -> list[str]:
    models: list[type[BaseModel]] = [
        Recipe,
        Step,
        Smooth,
        Quantize,
        Correct,
        Calibration,
        Export,
        Rule,
        SchemeSpec,
        GptqSettings,
        AutoRoundSettings,
    ]
    return sorted({name for model in models for name in model.model_fields})


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, defaults filled in: what fingerprints and records hold."""
    return recipe.model_dump(mode="json", exclude_none=True)

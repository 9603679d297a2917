"""The steps of a recipe, each with its settings; what they do lives in `qwench.steps`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from qwench.recipe.gguf import GGUF_TAG, TENSORS_TAG, ExportGguf, export_tag
from qwench.recipe.graft import Graft
from qwench.recipe.prune import Prune
from qwench.recipe.rules import Layers, Rule, Strict
from qwench.recipe.written import step_as_meant


class GptqSettings(Strict):
    """Attributes:
    order: activation order. `grouped`: whole groups by importance, then columns within them. `static`: columns by importance, groups stay where they are. `dynamic`
        (desc_act): groups follow the order, a g_idx is stored, and few engines read it. `none`. Left out: what is best for each scheme.
    damping: added to the second moment's diagonal, as a share of its mean.
    scarcity: more of it where tokens are few: this times columns over tokens. What a moment over few tokens says of directions is mostly chance, and error feedback would follow it.
    search: how scales are chosen where a rule asks for no search of its own: `mse`: for each group the one of least output error, among smaller ones.
    least_tokens: a weight that fewer tokens reached is rounded with searched scales instead, and reported.
    """

    order: Literal["grouped", "static", "dynamic", "none"] | None = None
    damping: float = Field(0.03, gt=0, le=1)
    scarcity: float = Field(0.5, ge=0, le=10)
    search: Literal["mse", "none"] = "mse"
    least_tokens: int = Field(128, ge=1)


class AutoRoundSettings(Strict):
    """Attributes:
    iterations: steps of signed gradient descent for each layer.
    batch: rows in a step.
    start: what is tuned: `rounding` to nearest, as the paper has it, or the codes and scales of `gptq` (with its settings), which take longer, and pay where iterations are few.
    """

    iterations: int = Field(200, ge=1)
    batch: int = Field(8, ge=1)
    start: Literal["gptq", "rounding"] = "rounding"


class ActivationSettings(Strict):
    """How the range of 4-bit activations is chosen (see `methods.activation_range`); 8-bit activations find theirs as they come.

    Attributes:
        range: `amax`: what was seen is not cut off. `percentile`: a share of the blocks is not. `mse`: least squared rounding error.
        percentile: of blocks of 16 numbers.
        experts: `shared`: one range for all experts of a layer, as several kernels of vLLM take it whatever the file says. `own`: each its own.
    """

    range: Literal["amax", "percentile", "mse"] = "amax"
    percentile: float = Field(99.99, gt=50, le=100)
    experts: Literal["shared", "own"] = "shared"


class Quantize(Strict):
    """Choose numbers for weights. Later rules win over earlier ones.

    Attributes:
        method: `rtn`: round to nearest, no data. `gptq`: column by column with error feedback. `autoround`: rounding and ranges tuned by signed
            gradient descent. The last two read calibration rows.
        rules: what becomes what; everything that no rule names is copied bit for bit.
        gptq, autoround: settings of the method.
        activations: settings of schemes that round activations to 4 bits, which read calibration rows whatever the method.
    """

    method: Literal["rtn", "gptq", "autoround"] = "rtn"
    rules: tuple[Rule, ...] = Field(min_length=1)
    gptq: GptqSettings = GptqSettings()
    autoround: AutoRoundSettings = AutoRoundSettings()
    activations: ActivationSettings = ActivationSettings()

    @property
    def reads_rows(self) -> bool:
        """Whether it reads calibration rows: for its method, or for the range of activations."""
        return self.method != "rtn" or any(rounds_inputs(rule) for rule in self.rules)


def rounds_inputs(rule: Rule) -> bool:
    """Whether a rule asks for activations whose range has to be found."""
    scheme = rule.resolved()
    return scheme is not None and scheme.activations == "nvfp4"


FoldName = Literal[
    "norm.post", "norm.input", "attention.v", "mlp.up", "expert.up", "shared.up",
    "mtp.norm.post", "mtp.norm.input", "mtp.attention.v", "mtp.mlp.up", "mtp.expert.up", "mtp.shared.up",
]  # fmt: skip


class Smooth(Strict):
    """AWQ: move per-channel scales from the input of weights into what produces it, before they are rounded.

    Attributes:
        folds: where scales may move: `norm.post` (into gate and up; in a mixture of experts into every reader of that norm), `norm.input` (into q/k/v, or the
            Gated DeltaNet's input projections), `attention.v` (into o, one scale for all query heads that read a value head), `mlp.up`, `expert.up`, `shared.up` (into the down projection). The MTP head is left alone unless
            its own are named: `mtp.norm.post` and so on.
        layers: of the trunk, see Rule.
        grid: points of the search.
        duo: divide by the weights' own magnitudes too.
        clip: search a smaller range for each group afterwards.
    """

    folds: tuple[FoldName, ...] = ("norm.post",)
    layers: Layers = "all"
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
    """The rows of tokens that calibrated steps read; `qwench.stream.calibration.calibration_rows` takes these fields as they are, but for the last.

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
        images: records with images are left out (`skip`), or their text is taken without them (`text`); both are
            counted. `use`: rows hold the images too, as the vision tower embeds them; not packed then.
        experts: which tokens the statistics of an expert are gathered on (moments, smoothing scales, ranges of activations). `routed`: those that the router sends to it. `all`: every
            token, as some tools do for experts that few tokens reach. What a layer puts out follows the router whichever, and so do the saliency of experts and AutoRound's loss.
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
    images: Literal["skip", "text", "use"] = "skip"
    experts: Literal["routed", "all"] = "routed"

    @model_validator(mode="before")
    @classmethod
    def _images_are_not_packed(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("images") == "use":
            if data.get("packed"):
                raise ValueError("rows with images are not packed: set packed to false, or leave it out, where images is `use`")
            return {**data, "packed": False}
        return data


Component = Literal["text", "mtp", "vision"]
"""Parts of a checkpoint that may be stored apart."""

Dtype = Literal["source", "bfloat16", "float32"]
"""What weights that stay unquantized are stored in; `source` keeps them bit for bit."""


class Export(Strict):
    """How the result is laid out on disk.

    Attributes:
        format: the container format: `compressed-tensors`, or for symmetric INT4 and INT8 `gptq` and `auto-round`.
        shard_size: largest size of one safetensors file: `5GB`, `500MB`.
        dtype: of the weights that are kept: `source`, `bfloat16` or `float32`, for all or by component: `{text: bfloat16, vision: source}`.
        files: components that get a file of their own, by its name without ending: `{visual_mtp: [vision, mtp]}`; all else goes to `model`.
        layout: `source` keeps names and config; `text` makes a text-only causal LM (`model.layers.*`, Qwen3_5ForCausalLM), without the tower.
        drop: components that stay behind. The tower only goes with `layout: text`.
        experts: how kept experts are stored: as in the source, or each by itself (`single`), as quantized ones always are. `auto`: by themselves in the
            containers `gptq` and `auto-round`, whose readers leave fused ones random in a quantized file, and as in the source otherwise.
    """

    format: Literal["compressed-tensors", "gptq", "auto-round"] = "compressed-tensors"
    shard_size: str = "5GB"
    dtype: Dtype | dict[Component, Dtype] = "source"
    files: dict[str, tuple[Component, ...]] = Field(default_factory=dict)
    layout: Literal["source", "text"] = "source"
    drop: tuple[Literal["mtp", "vision"], ...] = ()
    experts: Literal["auto", "source", "single"] = "auto"

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype(cls, value: object) -> object:
        said = value.values() if isinstance(value, dict) else [value]
        if any(word in {"float16", "fp16", "half"} for word in said):
            raise ValueError(
                "float16 is refused: Gated DeltaNet's intermediate values overflow it; leave dtype out, or say source"
            )
        return value

    @field_validator("shard_size", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        text = f"{value} B" if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(text, str):
            byte_size(text)
        return text

    @field_validator("files")
    @classmethod
    def _named(cls, value: dict[str, tuple[Component, ...]]) -> dict[str, tuple[Component, ...]]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "model":
                raise ValueError(f"file {name!r}: give a plain name other than model, without ending")
        named = [component for components in value.values() for component in components]
        if "text" in named or len(named) != len(set(named)):
            raise ValueError("text stays in model.safetensors, and each other component goes to one file at most")
        return value

    @model_validator(mode="after")
    def _tower_goes_with_the_layout(self) -> Export:
        if "vision" in self.drop and self.layout == "source":
            raise ValueError(
                "the classes of conditional generation build a tower whatever the files hold: to drop vision say layout: text"
            )
        return self

    @property
    def experts_single(self) -> bool:
        """Whether kept experts are stored one by one."""
        return self.experts == "single" or (self.experts == "auto" and self.format in {"gptq", "auto-round"})

    def dtype_of(self, component: Component) -> Dtype:
        """What the kept weights of a component are stored in."""
        return self.dtype.get(component, "source") if isinstance(self.dtype, dict) else self.dtype


def byte_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` in bytes, in letters of either size. Raises ValueError."""
    units = {"gib": 2**30, "mib": 2**20, "gb": 10**9, "mb": 10**6, "b": 1}
    for unit, factor in units.items():
        if text.lower().endswith(unit):
            number = text[: -len(unit)].strip()
            try:
                size = int(float(number) * factor)
            except ValueError:
                break
            if size > 0:
                return size
    raise ValueError(f"size {text!r} is not of the form 5GB, 500MB or 2GiB")


AnyExport = Annotated[Annotated[Export, Tag(TENSORS_TAG)] | Annotated[ExportGguf, Tag(GGUF_TAG)], Discriminator(export_tag)]
"""Either kind, told apart by `format`."""


class Step(Strict):
    """One entry of `steps`: exactly one of its keys."""

    graft: Graft | None = None
    prune: Prune | None = None
    smooth: Smooth | None = None
    quantize: Quantize | None = None
    correct: Correct | None = None
    export: AnyExport | None = None

    @model_validator(mode="before")
    @classmethod
    def _written(cls, data: object) -> object:
        return step_as_meant(cls, data)

    @model_validator(mode="after")
    def _one(self) -> Step:
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise ValueError(f"a step is exactly one of: {', '.join(type(self).model_fields)}")
        return self


def reads_rows(step: Step) -> bool:
    """Whether a step reads calibration rows."""
    observed = isinstance(step.export, ExportGguf) and step.export.importance is True
    return bool(step.prune or step.smooth or step.correct or observed or (step.quantize and step.quantize.reads_rows))


def gathers_by_expert(step: Step) -> bool:
    """Whether a step gathers statistics of what each expert reads. Pruning does not: its saliency is of the tokens that are sent to an expert. Neither does an importance matrix."""
    quantize = step.quantize
    if quantize is None:
        return bool(step.smooth or step.correct)
    tuned_from_gptq = quantize.method == "autoround" and quantize.autoround.start == "gptq"
    return quantize.method == "gptq" or tuned_from_gptq or any(rounds_inputs(rule) for rule in quantize.rules)


def default_calibration(steps: tuple[Step, ...]) -> Calibration | None:
    return Calibration() if any(reads_rows(step) for step in steps) else None

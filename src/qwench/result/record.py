"""What all records share: no field that is not named, a meaning for each, a unit for each number, and means with their errors.

The text under a field says what it means; `unit` says what its numbers count. Both go into docs/result.md and docs/result.schema.json (`python -m scripts.records`), so that
they stand in the code once and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


NO_UNIT = "none"
"""The unit of a number that counts nothing: a seed, a version."""


def unit(name: str) -> Any:
    """What the numbers of a field are counted in; for `Annotated`."""
    return Field(json_schema_extra={"unit": name})


Bytes = Annotated[int, unit("bytes")]
Seconds = Annotated[float, unit("seconds")]
Nats = Annotated[float, unit("nats per token")]
Share = Annotated[float, unit("share from 0 to 1")]
Ratio = Annotated[float, unit("ratio")]
Tokens = Annotated[int, unit("tokens")]
Rows = Annotated[int, unit("rows")]
Tensors = Annotated[int, unit("tensors")]
Number = Annotated[int, unit("number, from 0")]
"""A layer or an expert, by its number."""


class Estimate(Record):
    """A mean with its standard error over documents: tokens of one document are alike, documents are independent."""

    mean: Annotated[float, unit("that of the field")]
    """Over all tokens."""
    standard_error: Annotated[float, unit("that of the field")]
    """One standard error of the mean."""

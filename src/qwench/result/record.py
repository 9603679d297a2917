"""What all records share: no field that is not named, and means with their errors."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Estimate(Record):
    """A mean over documents with its standard error."""

    mean: float
    standard_error: float

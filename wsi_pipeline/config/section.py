"""What the sections of settings share."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
SplitName = Literal["train", "validation", "test"]
KEEPS_RESULT: dict[str, Any] = {"changes_result": False}
"""Of settings that say how work is done, not what comes out: units do not depend on them."""
Precision = Literal["float32", "bfloat16"]
NULL_PRECISION = "; decided when the run begins, and kept"
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Section(BaseModel):
    """Base of the sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

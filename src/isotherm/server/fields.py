"""How requests are read: by models that refuse what they do not know."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


class Strict(BaseModel):
    """A field that is not known is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _check_writable(value: dict[str, Any]) -> dict[str, Any]:
    """Python reads more as JSON than can be written: NaN, and surrogates alone."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {str(error)[:100]}") from None
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_check_writable)]

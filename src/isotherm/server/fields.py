"""How requests are read: by models that refuse what they do not know."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


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


def _check_bool(value: Any) -> Any:
    """Python takes 0 for False, JSON does not."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("it must be true or false")
    return value


Never = Annotated[Literal[False], BeforeValidator(_check_bool)]  # a field that may only be switched off
Always = Annotated[Literal[True], BeforeValidator(_check_bool)]

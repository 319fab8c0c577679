"""How requests are read: by models that refuse what they do not know."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A field that is not known is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

"""Whether a model thinks before it answers, and can be told not to."""

from isotherm.dialogue import Dialogue
from isotherm.server.errors import bad_request

_PROBE = ({"role": "user", "content": "probed"},)


def check_thinking(dialogue: Dialogue | None, *, is_wanted: bool) -> None:
    """Raises ApiError where the model cannot think, or cannot be kept from it. dialogue: None of a model without."""
    if dialogue is None or dialogue.reasoning is None:
        if is_wanted:
            raise bad_request("this model does not think before it answers; leave it out", "think")
    elif not is_wanted and not _has_switch(dialogue):
        raise bad_request("this model always thinks before it answers; leave it out", "think")


def _has_switch(dialogue: Dialogue) -> bool:
    on, off = (dialogue.render(_PROBE, variables={"enable_thinking": wanted}).text for wanted in (True, False))
    return on != off

"""A served model that bodies are read for, and the error that a body gets."""

from __future__ import annotations

from collections.abc import Callable

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.arguments import generate_message
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.validate import fields as validate
from cierzo.engine.gateway.asked import Asked, Rules, in_body
from cierzo.engine.messages import Generate
from cierzo.engine.testing.words import fake_model

MODEL = fake_model(
    name="small4",
    vocab_size=1000,
    eos_token_ids=[2],
    reasoning_efforts=["none", "high"],
    marks_thinking=True,
    marks_calls=True,
)
RULES = Rules(model=MODEL, names=("mistral-small-latest",))


def engine_checks(asked: Asked) -> Generate:
    """The message that an engine gets, as far as it checks it before a token is encoded."""
    message = generate_message(**asked.arguments)
    validate(message, FrontendConfig(), MODEL, efforts=MODEL.reasoning_efforts)
    return message


def refusal(read: Callable[..., Asked], **body: object) -> InvalidRequest:
    """The error that a body gets, wherever it is found out: when it is read, made a message, or validated."""
    try:
        asked = read(RULES, **body)
    except InvalidRequest as error:
        return error
    try:
        engine_checks(asked)
    except InvalidRequest as error:
        return in_body(error, asked)
    raise AssertionError(f"nothing was refused: {asked.arguments}")

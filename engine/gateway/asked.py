"""From the bytes of a request's body to what is asked of the engine: one function for each endpoint.

They know neither HTTP nor an event loop, take time in proportion to the body, and raise InvalidRequest with the
field's place, or NotFound for another model. What types and limits the engine checks by itself it finds later: an
error of `Client.generate`, and of the generation itself, names fields of the body once `in_body` has seen it.
"""

from __future__ import annotations

from cierzo.engine.gateway.asked_chat import read_chat
from cierzo.engine.gateway.asked_completions import read_completions, read_fim
from cierzo.engine.gateway.asked_responses import read_responses
from cierzo.engine.gateway.reading import Asked, Rules, in_body

__all__ = ["Asked", "Rules", "in_body", "read_chat", "read_completions", "read_fim", "read_responses"]

"""Bodies of any shape: each is served or refused with a place, and what is served can be sent to an engine."""

from __future__ import annotations

import json

import pytest
from gateway_rules import RULES, engine_checks
from hypothesis import given, settings
from hypothesis import strategies as st

from cierzo.engine.errors import CierzoError, InvalidRequest, NotFound
from cierzo.engine.frontend.frames import pack
from cierzo.engine.gateway import field_rows as rows
from cierzo.engine.gateway.asked import in_body, read_chat, read_completions, read_fim, read_responses

READERS = {
    "chat": (read_chat, rows.CHAT),
    "completions": (read_completions, rows.COMPLETIONS),
    "fim": (read_fim, rows.FIM),
    "responses": (read_responses, rows.RESPONSES),
}
SOUND = {
    "chat": {"messages": [{"role": "user", "content": "Hi"}]},
    "completions": {"prompt": "Hi"},
    "fim": {"prompt": "Hi"},
    "responses": {"input": "Hi"},
}
NAMES = sorted({name for table in vars(rows).values() if isinstance(table, dict) for name in table})
WORDS = sorted({*rows.PARTS, *rows.ITEMS, *rows.RESPONSE_PARTS, "user", "assistant", "tool", "system", "auto", "a"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 16, 2**63, -(2**70), 0.5, 1e308, ""]),
    st.sampled_from(WORDS),
    st.text(max_size=4),
)
# Objects with the names and words of the tables, within each other in any way.
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=25,
)


@st.composite
def bodies(draw, endpoint):
    """A sound body with a field or two put to anything."""
    names = sorted(READERS[endpoint][1])
    return SOUND[endpoint] | draw(st.dictionaries(st.sampled_from(names), SCALARS | VALUES, max_size=2))


@pytest.mark.parametrize("endpoint", READERS)
@given(data=st.data())
@settings(max_examples=300)
def test_a_body_is_served_or_refused(endpoint, data):
    body = data.draw(bodies(endpoint))
    read = READERS[endpoint][0]
    try:
        found = read(json.dumps(body).encode(), RULES)
    except (InvalidRequest, NotFound) as error:
        _can_be_told(error)
        return
    for asked in found if isinstance(found, list) else [found]:
        try:
            message = engine_checks(asked)
        except InvalidRequest as error:
            _can_be_told(in_body(error, asked))
        else:
            assert pack([message])


@pytest.mark.parametrize("endpoint", READERS)
@pytest.mark.parametrize("name", ["model", "user", "metadata", "unknown", "stop"])
@given(wrap=st.recursive(st.just("x\ud800"), lambda inner: inner.map(lambda one: [{"a": one}])))
@settings(max_examples=20)
def test_half_a_surrogate_pair_is_refused_wherever_it_is(endpoint, name, wrap):
    """In a field that is served, passed over, or unknown; no frame, log or header can hold it."""
    body = json.dumps(SOUND[endpoint] | {name: wrap}).encode()
    with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
        READERS[endpoint][0](body, RULES)
    assert caught.value.field.startswith(name)
    _can_be_told(caught.value)


def _can_be_told(error: CierzoError) -> None:
    assert error.field
    assert "sampling." not in error.field
    assert error.limit is not None
    assert len(error.message) < 2000
    for text in (error.message, error.field, error.limit, error.value or ""):
        text.encode()

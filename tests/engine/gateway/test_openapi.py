"""The OpenAPI document says what is served, and what it promises holds for bodies that a machine makes up."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import jsonschema
import msgspec
import pytest
from http_house import CHAT, HttpHouse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.gateway.openapi import ERROR, NEEDED, TABLES

PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/fim/completions", "/v1/responses", "/v1/models"),
    *("/v1/models/{name}", "/tokenize", "/detokenize", "/tokenizer_info", "/health", "/health/startup"),
    *("/health/live", "/health/ready", "/metrics", "/version", "/", "/page/state"),
)
NUMBERS = st.integers(-3, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
GOOD = {"messages": CHAT["messages"], "prompt": "Hi", "input": "Hi", "tokens": [1], "max_tokens": 2}


@pytest.fixture(scope="module")
def told():
    with HttpHouse("Hello") as house:
        yield house, house.get("/openapi.json").json()


@pytest.fixture(scope="module")
def client():
    with httpx2.Client(timeout=30) as client:
        yield client


def test_the_document_names_every_endpoint(told):
    _, document = told
    assert {*PATHS} == {*document["paths"]}
    assert document["openapi"] == "3.1.0"
    for path, methods in document["paths"].items():
        (operation,) = methods.values()
        assert operation["summary"]
        assert "200" in operation["responses"], path


def test_bodies_that_the_document_describes(told):
    house, document = told
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        body = {"model": "fake", **{name: GOOD[name] for name in NEEDED[path]}}
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate(body, schema)
        assert house.post(path, body).status_code == 200
        for wrong in ({"quux": 1}, {"model": 3}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(body | wrong, schema)
            assert house.post(path, body | wrong).status_code == 400
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"model": "fake"}, schema)
        assert house.post(path, {"model": "fake"}).status_code == 400


def test_examples_are_answered_as_the_document_says(told, client):
    house, document = told
    for path in TABLES:
        operation = document["paths"][path]["post"]
        content = operation["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            body = example["value"]
            jsonschema.validate(body, content["schema"])
            answer = client.post(house.url + path, json=body)
            assert answer.status_code == 200, answer.text
            kind = answer.headers["content-type"].partition(";")[0]
            described = operation["responses"]["200"]["content"][kind]
            assert (kind == "text/event-stream") == body.get("stream", False)
            if kind == "application/json":
                assert {"type", "required", "properties"} <= {*described["schema"]}
                jsonschema.validate(answer.json(), described["schema"])


def test_a_lenient_door_says_so(opening):
    document = opening("x", http={"lenient": True}).get("/openapi.json").json()
    schema = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is True
    assert "x-passed-over" in document["info"]["description"]


@given(data=st.data(), path=st.sampled_from(sorted(TABLES)))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_makes_the_server_fail(told, client, data, path):
    house, _ = told
    names = sorted(TABLES[path])
    made_up = data.draw(st.dictionaries(st.sampled_from(names) | st.text(max_size=4), VALUES, max_size=3))
    body = {name: GOOD[name] for name in (*NEEDED.get(path, ()), "max_tokens") if name in TABLES[path]}
    answer = client.post(house.url + path, json=body | made_up)
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        jsonschema.validate(json.loads(answer.text), ERROR)


def test_the_documentation_names_every_endpoint_and_every_bound():
    text = (Path(__file__).resolve().parents[3] / "docs/http.md").read_text(encoding="utf-8")
    for path in PATHS:
        assert path.replace("{name}", "NAME") in text, path
    for field in msgspec.structs.fields(HttpConfig):
        flag = field.name.replace("_", "-")
        assert f"`{field.name}`" in text or f"--{flag}" in text, field.name

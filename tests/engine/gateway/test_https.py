"""HTTP over TLS, by the files of the RPC, and clients that show a certificate."""

from __future__ import annotations

import ssl

import httpx2
import openai
import pytest
import trustme
from http_house import CHAT, MESSAGES, HttpHouse

CHATS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def files(authority, tmp_path):
    """The server's settings of TLS."""
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    with open(tmp_path / "chain.pem", "wb") as chain:
        chain.writelines(each.bytes() for each in issued.cert_chain_pems)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    return {"tls_certificate": str(tmp_path / "chain.pem"), "tls_key": str(tmp_path / "key.pem")}


def _trusting(authority, shown=None):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if shown is not None:
        authority.issue_cert("unused", common_name=shown).configure_cert(context)
    return context


def _https(house):
    return house.url.replace("http://", "https://")


def test_answers_and_streams_over_tls(authority, files, opening):
    house = opening("Hello", **files)
    with (
        httpx2.Client(verify=_trusting(authority)) as http,
        openai.OpenAI(base_url=f"{_https(house)}/v1", api_key="x", http_client=http, max_retries=0) as client,
    ):
        chat = client.chat.completions
        assert chat.create(model="fake", messages=MESSAGES).choices[0].message.content == "Hello"
        chunks = [*chat.create(model="fake", messages=MESSAGES, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"


def test_plain_http_is_told_so_on_a_port_with_tls(files, opening):
    house = opening("Hello", **files)
    assert "speaks TLS" in httpx2.get(house.url + "/version").text


def test_a_certificate_of_a_client_is_its_tenant(authority, files, opening, tmp_path):
    keys = tmp_path / "keys"
    lines = ('{"tenant": "search"}', '{"certificate": "search.internal", "of": "search", "rights": ["stats"]}')
    keys.write_text("\n".join(lines), encoding="ascii")
    keys.chmod(0o600)
    house = opening("Hello", **files, tls_client_ca=str(tmp_path / "authority.pem"), keys=str(keys))
    with httpx2.Client(verify=_trusting(authority, "search.internal")) as known:
        assert known.post(_https(house) + CHATS, json=CHAT).status_code == 200
        assert known.get(_https(house) + "/metrics").status_code == 200
    with httpx2.Client(verify=_trusting(authority, "other")) as other:
        assert other.post(_https(house) + CHATS, json=CHAT).status_code == 401


def test_beyond_this_machine_with_keys_and_tls(authority, files, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text('{"tenant": "default"}', encoding="ascii")
    keys.chmod(0o600)
    with HttpHouse("Hello", **files, keys=str(keys), http={"http": "0.0.0.0:0"}) as house:
        url = _https(house).replace("0.0.0.0", "127.0.0.1")
        with httpx2.Client(verify=_trusting(authority)) as client:
            assert client.post(url + CHATS, json=CHAT).status_code == 200  # of this machine, without a key

"""The key file: what it says, what is wrong with it, and that no key is ever told."""

from __future__ import annotations

import os
import time
from statistics import median

import pytest

from cierzo.engine.errors import ConfigError, Unauthorized
from cierzo.engine.frontend.keys import KEY_PREFIX, Door, digest_of, key_line, new_key, read_key_file
from cierzo.engine.frontend.tenants import EVERYBODY, NO_LIMIT, Visitor

KEY, OTHER = "cierzo-one", "cierzo-two"
SECRET = "cierzo-a-key-that-must-not-be-told"


@pytest.fixture
def write(tmp_path):
    """Write a key file of these lines, and give its path."""

    def written(*lines, mode=0o600):
        path = tmp_path / "keys"
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        path.chmod(mode)
        return str(path)

    return written


def test_a_file_names_tenants_keys_and_certificates(write):
    path = write(
        "# who may come",
        '{"tenant": "search", "weight": 2, "max_requests": 10, "min_priority": -5, "max_priority": 5}',
        "",
        '  {"tenant": "mail", "cache_group": "office", "max_tokens_per_minute": 1000, "max_model_len": 4096}',
        key_line(KEY, "search", ("stats", "drain")),
        key_line(OTHER, "mail"),
        '{"certificate": "mail.internal", "of": "mail", "rights": ["experts"]}',
    )
    file = read_key_file(path)
    assert sorted(file.tenants) == ["mail", "search"]
    search, mail = file.tenants["search"], file.tenants["mail"]
    assert (search.weight, search.max_requests, search.max_model_len) == (2.0, 10, NO_LIMIT)
    assert (mail.cache_salt, search.cache_salt) == (b"group:office", b"tenant:search")
    assert file.keys[digest_of(KEY)].tenant is search
    assert file.keys[digest_of(KEY)].rights == {"stats", "drain"}
    assert file.keys[digest_of(OTHER)].rights == frozenset()
    assert file.certificates["mail.internal"].rights == {"experts"}


def test_no_name_of_a_tenant_is_a_group_s_salt():
    first, second = EVERYBODY.tenant, type(EVERYBODY.tenant)(name="a", cache_group="default")
    salts = {
        first.cache_salt,
        second.cache_salt,
        type(first)(name="b").cache_salt,
        type(first)(name="group").cache_salt,
    }
    assert len(salts) == 4


@pytest.mark.parametrize(
    ("lines", "number", "words"),
    [
        (['{"tenant": "a"}', "not json"], 2, "no JSON object"),
        (['{"tenant": "a"}', "[1]"], 2, "one of tenant, key, certificate"),
        (['{"tenant": "a", "key": "b"}'], 1, "one of tenant, key, certificate"),
        (['{"weight": 1}'], 1, "one of tenant, key, certificate"),
        (["", "# a", '{"tenant": "a b"}'], 3, "tenant"),
        (['{"tenant": ""}'], 1, "tenant"),
        (['{"tenant": "a", "wieght": 2}'], 1, "it may have tenant, weight, cache_group"),
        (['{"tenant": "a", "weight": 0}'], 1, "weight"),
        (['{"tenant": "a", "weight": 1e309}'], 1, "no JSON"),
        (['{"tenant": "a", "max_requests": 0}'], 1, "max_requests"),
        (['{"tenant": "a", "max_requests": "9"}'], 1, "max_requests"),
        (['{"tenant": "a", "min_priority": 5, "max_priority": 4}'], 1, "min_priority"),
        (['{"tenant": "a"}', '{"tenant": "a"}'], 2, "this tenant is there twice"),
        (['{"tenant": "a"}', key_line(KEY, "a"), key_line(KEY, "a")], 3, "this key is there twice"),
        (['{"tenant": "a"}', key_line(KEY, "b")], 2, "no line of the tenant"),
        (['{"tenant": "a"}', '{"key": "sha256:12", "of": "a"}'], 2, "key is no digest"),
        (['{"tenant": "a"}', f'{{"key": "{SECRET}", "of": "a"}}'], 2, "key is no digest"),
        (['{"tenant": "a"}', f'{{"key": ["{SECRET}"], "of": "a"}}'], 2, "key is no digest"),
        (['{"tenant": "a"}', key_line("", "a")], 2, "no key at all"),
        (['{"tenant": "a"}', key_line(KEY, "a").replace("[]", '["root"]')], 2, "rights are drain, experts, stats"),
        (['{"tenant": "a"}', key_line(KEY, "a").replace("[]", f'["{SECRET}"]')], 2, "rights are"),
        (['{"tenant": "a"}', key_line(KEY, "a").replace("rights", SECRET)], 2, "it may have key, of, rights"),
        (['{"tenant": "a"}', f'{{"certificate": "c", "of": "{SECRET} "}}'], 2, "of"),
        (['{"tenant": "a"}', '{"certificate": "", "of": "a"}'], 2, "certificate"),
        (['{"tenant": "a"}', '{"certificate": "c", "of": "a"}', '{"certificate": "c", "of": "a"}'], 3, "twice"),
        ([f'{{"tenant": "{SECRET}"}}', f'{{"tenant": "{SECRET}"}}'], 2, "this tenant is there twice"),
        ([f'{{"tenant": "a", "{SECRET}": 1}}'], 1, "it may have tenant"),
        ([f'{{"tenant": "{SECRET} "}}'], 1, "1 to 64 letters, digits"),
        ([f'{{"tenant": "a", "weight": "{SECRET}"}}'], 1, "weight: expected float, got str"),
        (["[" * 100_000], 1, "no JSON object"),
        ([b'{"tenant": "a"}', b"# ok", b'{"tenant": "\xff"}'], 3, "no UTF-8"),
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_no_key_is_told(write, lines, number, words):
    with pytest.raises(ConfigError) as caught:
        read_key_file(write(*lines))
    error = caught.value
    assert f"line {number}: " in error.message
    assert words in error.message
    assert error.field == f"keys, line {number}"
    assert SECRET not in f"{error.message}{error.field}{error.limit}{error.value}"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_file_that_others_may_read_or_write_is_refused(write, mode):
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}\): chmod 600") as caught:
        read_key_file(write('{"tenant": "a"}', mode=mode))
    assert (caught.value.limit, caught.value.value) == ("0600", f"{mode:04o}")


@pytest.mark.timeout(20)
def test_what_is_no_file_or_too_large_is_refused(write, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_key_file(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="directory"):
        read_key_file(str(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="no file"):
        read_key_file(str(tmp_path / "pipe"))
    with pytest.raises(ConfigError, match="bytes"):
        read_key_file(write("#" * (5 << 20)))
    for path in ("a\0b", "a\ud800b"):
        with pytest.raises(ConfigError, match="keys: "):
            read_key_file(path)
    for lines in ([], ["# nobody"], ['{"tenant": "a"}']):
        with pytest.raises(ConfigError, match="nobody could come"):
            Door(write(*lines))
    assert Door(write('{"tenant": "default"}')).tenants
    with pytest.raises(ConfigError, match="257 tenants, allowed: 256"):
        read_key_file(write(*(f'{{"tenant": "t{index}"}}' for index in range(257))))


def test_keys_are_long_random_and_known_by_their_digest():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(KEY_PREFIX) and len(key) >= len(KEY_PREFIX) + 43 for key in keys)
    key = keys.pop()
    assert key not in key_line(key, "a")
    assert digest_of(key).hex() in key_line(key, "a")


def visitor(key="", **more):
    return Visitor(key_digest=digest_of(key), **more)


def test_whoever_has_no_key_is_the_default_tenant_of_this_machine_alone(write):
    lines = ['{"tenant": "a"}', key_line(KEY, "a", ("stats",)), '{"certificate": "c", "of": "a"}']
    door = Door(write(*lines))
    assert door.access(visitor(KEY)).rights == {"stats"}
    assert door.access(visitor(certificate="c")).tenant.name == "a"
    for stranger in (visitor(), visitor(is_local=True), visitor("wrong", is_local=True), visitor(certificate="d")):
        with pytest.raises(Unauthorized):
            door.access(stranger)
    door = Door(write(*lines, '{"tenant": "default", "max_requests": 1}'))
    assert door.access(visitor(is_local=True)).tenant.max_requests == 1
    assert door.access(visitor(is_local=True)).rights == frozenset()
    for stranger in (visitor(), visitor("wrong", is_local=True), visitor("wrong", certificate="c")):
        with pytest.raises(Unauthorized):
            door.access(stranger)


def test_without_a_file_everybody_may_do_everything():
    assert Door("").access(Visitor()) == EVERYBODY
    assert Door("").reload()


def test_a_wrong_file_changes_nothing_when_it_is_read_again(write, caplog):
    door = Door(write('{"tenant": "a"}', key_line(KEY, "a")))
    write('{"tenant": "a"}', key_line(OTHER, "b"))
    assert not door.reload()
    assert "the keys stay as they were" in caplog.text
    assert "line 2" in caplog.text
    assert door.access(visitor(KEY)).tenant.name == "a"
    write('{"tenant": "a"}', key_line(OTHER, "a"))
    assert door.reload()
    assert door.access(visitor(OTHER)).tenant.name == "a"
    with pytest.raises(Unauthorized):
        door.access(visitor(KEY))


def test_wrong_missing_and_revoked_keys_get_the_same_words_in_the_same_time(write):
    """Medians of calls that alternate, within 3 x: what a search that stops early would break is larger."""
    lines = [key_line(f"cierzo-{index}", "a") for index in range(1000)]
    door = Door(write('{"tenant": "a"}', *lines))
    kinds = {
        "missing": visitor(),
        "wrong": visitor("wrong"),
        "first": visitor("cierzo-0"),
        "last": visitor("cierzo-999"),
    }
    took = {name: [] for name in kinds}
    words = set()
    for _ in range(60):
        for name, each in kinds.items():
            began = time.perf_counter()
            try:
                door.access(each)
            except Unauthorized as error:
                words.add((error.message, error.field, error.limit, error.value))
            took[name].append(time.perf_counter() - began)
    assert len(words) == 1
    medians = [median(each) for each in took.values()]
    assert max(medians) < 3 * min(medians), took

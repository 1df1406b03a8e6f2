"""KV, sessions and transactions: what Consul's HTTP API answers, and what our client makes of it."""

from __future__ import annotations

import base64
import time
from typing import Any

import pytest

from tests.support.consul import ConsulUnderTest
from ztna.catalog import (
    KvCheckIndex,
    KvCheckNotExists,
    KvCheckSession,
    KvDeleteCas,
    KvSet,
    TxnFailure,
)
from ztna.consul.client import ConsulClient
from ztna.errors import ConsulRejected

NO_SESSION = "7d3e1f6e-0000-0000-0000-000000000000"


def put(consul: ConsulUnderTest, path: str, body: object = None) -> Any:
    return consul.request("PUT", path, body)[:2]


def modify_index(consul: ConsulUnderTest, key: str) -> int:
    return int(consul.request("GET", f"/v1/kv/{key}")[1][0]["ModifyIndex"])


def new_session(consul: ConsulUnderTest, **fields: object) -> str:
    status, made = put(consul, "/v1/session/create", {"LockDelay": "0s", "TTL": "10s", **fields})
    assert status == 200, made
    return str(made["ID"])


# Raw HTTP


def test_a_missing_key_is_404_with_an_index_to_block_on(consul: ConsulUnderTest, unique: str) -> None:
    status, text, headers = consul.request("GET", f"/v1/kv/{unique}")
    assert (status, text) == (404, "")
    assert int(headers["x-consul-index"]) >= 1
    assert headers["x-consul-knownleader"] == "true"
    assert headers["x-consul-lastcontact"] == "0"


def test_a_pair_carries_value_flags_and_indexes(consul: ConsulUnderTest, unique: str) -> None:
    assert put(consul, f"/v1/kv/{unique}?flags=7", b"\x00\xff") == (200, True)
    status, [pair], headers = consul.request("GET", f"/v1/kv/{unique}")
    assert status == 200
    assert pair == {
        "LockIndex": 0,
        "Key": unique,
        "Flags": 7,
        "Value": base64.b64encode(b"\x00\xff").decode(),
        "CreateIndex": pair["ModifyIndex"],
        "ModifyIndex": int(headers["x-consul-index"]),
    }


def test_an_empty_value_is_null(consul: ConsulUnderTest, unique: str) -> None:
    assert put(consul, f"/v1/kv/{unique}", b"") == (200, True)
    assert consul.request("GET", f"/v1/kv/{unique}")[1][0]["Value"] is None


def test_a_write_that_changes_nothing_keeps_the_index(consul: ConsulUnderTest, unique: str) -> None:
    put(consul, f"/v1/kv/{unique}", b"same")
    first = modify_index(consul, unique)
    put(consul, f"/v1/kv/{unique}", b"same")
    assert modify_index(consul, unique) == first
    put(consul, f"/v1/kv/{unique}", b"other")
    assert modify_index(consul, unique) > first


def test_raw_and_keys_and_separator(consul: ConsulUnderTest, unique: str) -> None:
    for key in ("a/1", "a/2", "b"):
        put(consul, f"/v1/kv/{unique}/{key}", key.encode())
    assert consul.request("GET", f"/v1/kv/{unique}/b?raw")[1] == "b"
    assert consul.request("GET", f"/v1/kv/{unique}/?keys")[1] == [
        f"{unique}/{key}" for key in ("a/1", "a/2", "b")
    ]
    assert consul.request("GET", f"/v1/kv/{unique}/?keys&separator=/")[1] == [f"{unique}/a/", f"{unique}/b"]


def test_compare_and_set(consul: ConsulUnderTest, unique: str) -> None:
    assert put(consul, f"/v1/kv/{unique}?cas=7", b"x") == (200, False)
    assert put(consul, f"/v1/kv/{unique}?cas=0", b"x") == (200, True)
    assert put(consul, f"/v1/kv/{unique}?cas=0", b"y") == (200, False)
    assert put(consul, f"/v1/kv/{unique}?cas={modify_index(consul, unique)}", b"y") == (200, True)


def test_deleting(consul: ConsulUnderTest, unique: str) -> None:
    assert consul.request("DELETE", f"/v1/kv/{unique}")[:2] == (200, True)
    assert consul.request("DELETE", f"/v1/kv/{unique}?cas=5")[:2] == (200, True)
    put(consul, f"/v1/kv/{unique}/a", b"x")
    put(consul, f"/v1/kv/{unique}/b", b"x")
    index = modify_index(consul, f"{unique}/a")
    assert consul.request("DELETE", f"/v1/kv/{unique}/a?cas=0")[:2] == (200, False)
    assert consul.request("DELETE", f"/v1/kv/{unique}/a?cas={index + 1000}")[:2] == (200, False)
    assert consul.request("DELETE", f"/v1/kv/{unique}/a?cas={index}")[:2] == (200, True)
    assert consul.request("DELETE", f"/v1/kv/{unique}/?recurse")[:2] == (200, True)
    assert consul.request("GET", f"/v1/kv/{unique}?recurse")[0] == 404


def test_a_lock_is_taken_kept_and_released(consul: ConsulUnderTest, unique: str) -> None:
    mine, other = new_session(consul), new_session(consul)
    assert put(consul, f"/v1/kv/{unique}?acquire={mine}", b"1") == (200, True)
    assert put(consul, f"/v1/kv/{unique}?acquire={other}", b"2") == (200, False)
    assert put(consul, f"/v1/kv/{unique}?acquire={mine}", b"3") == (200, True)
    [pair] = consul.request("GET", f"/v1/kv/{unique}")[1]
    assert (pair["Session"], pair["LockIndex"]) == (mine, 1)
    assert put(consul, f"/v1/kv/{unique}?release={other}", b"") == (200, False)
    assert put(consul, f"/v1/kv/{unique}?release={mine}", b"4") == (200, True)
    [pair] = consul.request("GET", f"/v1/kv/{unique}")[1]
    assert "Session" not in pair
    assert put(consul, f"/v1/kv/{unique}?acquire={other}", b"5") == (200, True)
    assert consul.request("GET", f"/v1/kv/{unique}")[1][0]["LockIndex"] == 2


def test_a_plain_write_does_not_break_a_lock(consul: ConsulUnderTest, unique: str) -> None:
    mine = new_session(consul)
    put(consul, f"/v1/kv/{unique}?acquire={mine}", b"1")
    assert put(consul, f"/v1/kv/{unique}", b"2") == (200, True)
    assert consul.request("GET", f"/v1/kv/{unique}")[1][0]["Session"] == mine


def test_a_session_that_does_not_exist_locks_nothing(consul: ConsulUnderTest, unique: str) -> None:
    status, text = put(consul, f"/v1/kv/{unique}?acquire={NO_SESSION}", b"")
    assert status == 500
    assert f'invalid session "{NO_SESSION}"' in text


@pytest.mark.parametrize(("behavior", "remains"), [("release", 200), ("delete", 404)])
def test_the_end_of_a_session_ends_its_locks(
    consul: ConsulUnderTest, unique: str, behavior: str, remains: int
) -> None:
    session = new_session(consul, Behavior=behavior)
    put(consul, f"/v1/kv/{unique}?acquire={session}", b"1")
    assert put(consul, f"/v1/session/destroy/{session}") == (200, True)
    status, pairs, _ = consul.request("GET", f"/v1/kv/{unique}")
    assert status == remains
    assert all("Session" not in pair for pair in pairs)


def test_a_lock_delay_holds_the_lock_back_after_a_session_ended(consul: ConsulUnderTest, unique: str) -> None:
    session = new_session(consul, LockDelay="1s")
    put(consul, f"/v1/kv/{unique}?acquire={session}", b"1")
    put(consul, f"/v1/session/destroy/{session}")
    other = new_session(consul)
    started = time.monotonic()
    assert put(consul, f"/v1/kv/{unique}?acquire={other}", b"2") == (200, False)
    while put(consul, f"/v1/kv/{unique}?acquire={other}", b"2") == (200, False):
        assert time.monotonic() < started + 10
    assert time.monotonic() - started > 0.8


def test_sessions_are_shown_and_renewed(consul: ConsulUnderTest, unique: str) -> None:
    session = new_session(consul, Name=unique, LockDelay="5s")
    [shown] = consul.request("GET", f"/v1/session/info/{session}")[1]
    assert shown == {
        "ID": session,
        "Name": unique,
        "Node": shown["Node"],
        "LockDelay": 5_000_000_000,
        "Behavior": "release",
        "TTL": "10s",
        "NodeChecks": ["serfHealth"],
        "ServiceChecks": None,
        "CreateIndex": shown["CreateIndex"],
        "ModifyIndex": shown["CreateIndex"],
    }
    assert put(consul, f"/v1/session/renew/{session}") == (200, [shown])
    assert shown in consul.request("GET", "/v1/session/list")[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"TTL": "5s"}, "Invalid Session TTL '5000000000', must be between [10s=24h0m0s]"),
        ({"TTL": "25h"}, "Invalid Session TTL '90000000000000', must be between [10s=24h0m0s]"),
        ({"TTL": "x"}, "Session TTL 'x' invalid: time: invalid duration \"x\""),
        ({"Behavior": "keep"}, "Invalid Behavior setting 'keep'"),
    ],
)
def test_sessions_that_cannot_be(consul: ConsulUnderTest, fields: dict[str, str], words: str) -> None:
    assert put(consul, "/v1/session/create", fields) == (500, words)


def test_sessions_that_are_not_there(consul: ConsulUnderTest) -> None:
    assert put(consul, f"/v1/session/renew/{NO_SESSION}") == (404, f"Session id '{NO_SESSION}' not found")
    assert put(consul, f"/v1/session/destroy/{NO_SESSION}") == (200, True)
    assert consul.request("GET", f"/v1/session/info/{NO_SESSION}")[1] == []


def kv(verb: str, key: str, **fields: object) -> dict[str, object]:
    return {"KV": {"Verb": verb, "Key": key, **fields}}


def test_a_transaction_shows_what_it_set(consul: ConsulUnderTest, unique: str) -> None:
    session = new_session(consul)
    status, answer = put(
        consul,
        "/v1/txn",
        [
            kv("set", f"{unique}/a", Value="eA==", Flags=3),
            kv("cas", f"{unique}/b", Value="eA==", Index=0),
            kv("lock", f"{unique}/c", Value="eA==", Session=session),
            kv("get", f"{unique}/a"),
            kv("check-session", f"{unique}/c", Session=session),
            kv("delete", f"{unique}/b"),
        ],
    )
    assert status == 200
    assert answer["Errors"] is None
    shown = [result["KV"] for result in answer["Results"]]
    index = shown[0]["ModifyIndex"]
    common = {"CreateIndex": index, "ModifyIndex": index}
    assert shown == [
        {"LockIndex": 0, "Key": f"{unique}/a", "Flags": 3, "Value": None, **common},
        {"LockIndex": 0, "Key": f"{unique}/b", "Flags": 0, "Value": None, **common},
        {"LockIndex": 1, "Key": f"{unique}/c", "Flags": 0, "Value": None, "Session": session, **common},
        {"LockIndex": 0, "Key": f"{unique}/a", "Flags": 3, "Value": "eA==", **common},
        {"LockIndex": 1, "Key": f"{unique}/c", "Flags": 0, "Value": None, "Session": session, **common},
    ]
    assert consul.request("GET", f"/v1/kv/{unique}/b")[0] == 404


def test_a_failed_transaction_says_why_and_changes_nothing(consul: ConsulUnderTest, unique: str) -> None:
    a, missing = f"{unique}/a", f"{unique}/missing"
    put(consul, f"/v1/kv/{a}", b"x")
    index = modify_index(consul, a)
    status, answer = put(
        consul,
        "/v1/txn",
        [
            kv("set", f"{unique}/new", Value="eA=="),
            kv("cas", a, Value="eQ==", Index=index + 1000),
            kv("delete-cas", a, Index=index + 1000),
            kv("check-session", a, Session=NO_SESSION),
            kv("check-index", a, Index=index + 1000),
            kv("check-not-exists", a),
            kv("get", missing),
            kv("check-session", missing, Session=NO_SESSION),
            kv("check-index", missing, Index=1),
            kv("lock", a, Session=NO_SESSION),
            kv("unlock", a, Session=NO_SESSION),
            kv("unlock", a),
            kv("delete-cas", missing, Index=1),
            kv("get-tree", missing),
        ],
    )
    assert status == 409
    assert answer["Results"] is None
    assert [(error["OpIndex"], error["What"]) for error in answer["Errors"]] == [
        (1, f'failed to set key "{a}", index is stale'),
        (2, f'failed to delete key "{a}", index is stale'),
        (3, f'failed session check for key "{a}", current session "" != "{NO_SESSION}"'),
        (4, f'failed index check for key "{a}", current modify index {index} != {index + 1000}'),
        (5, f'key "{a}" exists'),
        (6, f'key "{missing}" doesn\'t exist'),
        (7, f'failed to check session, key "{missing}" doesn\'t exist'),
        (8, f'failed to check index, key "{missing}" doesn\'t exist'),
        (9, f'invalid session "{NO_SESSION}"'),
        (10, f'failed to unlock key "{a}", lock isn\'t held, or is held by another session'),
        (11, "missing session"),
    ]
    assert consul.request("GET", f"/v1/kv/{unique}/new")[0] == 404
    assert modify_index(consul, a) == index


def test_later_operations_see_earlier_ones(consul: ConsulUnderTest, unique: str) -> None:
    operations = [kv("set", unique, Value="eA=="), kv("check-not-exists", unique)]
    assert put(consul, "/v1/txn", operations)[0] == 409
    operations = [kv("set", unique, Value="eA=="), kv("delete-tree", unique), kv("check-not-exists", unique)]
    assert put(consul, "/v1/txn", operations)[0] == 200


def test_a_transaction_of_64_is_carried_out_and_one_of_129_is_not(
    consul: ConsulUnderTest, unique: str
) -> None:
    sets = [kv("set", f"{unique}/{n:03}", Value="eA==") for n in range(129)]
    assert put(consul, "/v1/txn", sets)[0] == 413
    assert put(consul, "/v1/txn", sets[:64])[0] == 200
    assert len(consul.request("GET", f"/v1/kv/{unique}?keys")[1]) == 64


def test_garbage_is_refused(consul: ConsulUnderTest, unique: str) -> None:
    assert put(consul, "/v1/txn", b"{")[0] == 400
    assert put(consul, f"/v1/kv/{unique}?cas=x", b"")[0] == 500
    assert put(consul, f"/v1/kv/{unique}?cas=1&acquire={NO_SESSION}", b"")[0] == 400
    assert consul.request("GET", f"/v1/kv/{unique}?index=x")[0] == 400
    assert consul.request("GET", f"/v1/kv/{unique}?index=1&wait=soon")[0] == 400
    assert consul.request("GET", "/v1/kv/")[0] == 400


# Through our client


async def test_the_client_reads_and_writes_pairs(consul: ConsulUnderTest, unique: str) -> None:
    key = f"{unique}/ä &?%/x"
    async with ConsulClient(consul.config()) as client:
        assert await client.kv_get(key) is None
        assert await client.kv_list(unique) == ()
        assert await client.kv_put(key, b"\x00v", cas=0)
        assert not await client.kv_put(key, b"w", cas=0)
        pair = await client.kv_get(key, consistent=True)
        assert pair is not None
        assert (pair.key, pair.value, pair.session) == (key, b"\x00v", None)
        assert await client.kv_list(unique, consistent=True) == (pair,)
        assert not await client.kv_delete(key, cas=pair.modify_index + 1000)
        assert await client.kv_delete(key, cas=pair.modify_index)
        assert await client.kv_put(f"{unique}/empty", b"")
        assert [each.value for each in await client.kv_list(unique)] == [b""]
        assert await client.kv_delete(unique, recurse=True)
        assert await client.kv_list(unique) == ()


async def test_the_client_locks(consul: ConsulUnderTest, unique: str) -> None:
    async with ConsulClient(consul.config()) as client:
        session = await client.session_create("keeper", ttl_s=10, behavior="delete", lock_delay_s=0)
        [shown] = consul.request("GET", f"/v1/session/info/{session}")[1]
        fields = ("Name", "Behavior", "LockDelay")
        assert [shown[field] for field in fields] == ["keeper", "delete", 0]
        assert shown["TTL"] in ("10s", "10.0s")
        assert await client.kv_put(unique, b"", acquire=session)
        assert await client.session_renew(session)
        found = await client.kv_get(unique)
        assert found is not None
        assert found.session == session
        assert await client.kv_put(unique, b"", release=session)
        await client.session_destroy(session)
        await client.session_destroy(session)
        assert not await client.session_renew(session)
        with pytest.raises(ConsulRejected, match="invalid session"):
            await client.kv_put(unique, b"", acquire=session)
        with pytest.raises(ConsulRejected, match="10 s to 86400 s"):
            await client.session_create("short", ttl_s=9)


async def test_the_clients_transactions(consul: ConsulUnderTest, unique: str) -> None:
    lock, a, b = f"{unique}/lock", f"{unique}/a", f"{unique}/b"
    async with ConsulClient(consul.config()) as client:
        session = await client.session_create("keeper", ttl_s=10, lock_delay_s=0)
        await client.kv_put(lock, b"", acquire=session)
        done = await client.txn([KvCheckSession(lock, session), KvSet(a, b"1", 0), KvSet(b, b"\xff")])
        assert done.ok
        index = done.pairs[-1].modify_index
        assert [pair.key for pair in done.pairs] == [lock, a, b]
        refused = await client.txn([KvCheckSession(lock, NO_SESSION), KvSet(a, b"2", index)])
        assert refused.failures == (
            TxnFailure(
                0,
                f'failed session check for key "{lock}", current session "{session}" != "{NO_SESSION}"',
            ),
        )
        assert (await client.txn([KvCheckIndex(a, index), KvSet(a, b"2", index)])).ok
        assert not (await client.txn([KvCheckNotExists(a), KvSet(b, b"3")])).ok
        assert (await client.txn([KvDeleteCas(b, index)])).ok
        assert {pair.key: pair.value for pair in await client.kv_list(unique)} == {lock: b"", a: b"2"}
        with pytest.raises(ConsulRejected, match="65 operations: at most 64"):
            await client.txn([KvSet(f"{unique}/{n}", b"") for n in range(65)])


async def test_a_key_that_begins_with_a_slash_is_refused(consul: ConsulUnderTest) -> None:
    async with ConsulClient(consul.config()) as client:
        with pytest.raises(ConsulRejected, match="must not begin with a slash"):
            await client.kv_put("/x", b"")

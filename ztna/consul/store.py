"""The embedded Consul's KV store, sessions and transactions, as state that is told the time.

Follows the rules of Consul's own state store (agent/consul/state: kvs.go, session.go, txn.go), odd ones too.
It serves nothing and starts no timers; ztna.consul.embedded does.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ztna.consul.durations import NANOSECONDS, duration_s

LOCK_DELAY_SECONDS = 15.0
LOCK_DELAY_SECONDS_MAX = 60.0
LOCK_DELAY_THRESHOLD = 1000
"""Consul takes a smaller number for seconds, a greater one for nanoseconds (session_endpoint.go)."""
SESSION_TTL_SECONDS_MIN = 10.0
SESSION_TTL_SECONDS_MAX = 86_400.0
SESSION_TTL_MULTIPLIER = 2
"""Consul ends a session only after twice its TTL (session_ttl.go)."""
TXN_OPERATIONS_MAX = 64
VALUE_BYTES_MAX = 512 * 1024
TOMBSTONES_MAX = 10_000

Json = dict[str, Any]


class Refusal(Exception):
    """An answer other than 200: the HTTP status and the words Consul uses."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class TxnFailed(Exception):
    """A transaction that was not carried out; `errors` is the JSON of the 409."""

    def __init__(self, errors: list[Json]) -> None:
        super().__init__("transaction failed")
        self.errors = errors


class Clock(msgspec.Struct):
    """The one index that every write raises (Consul's raft index)."""

    index: int = 10

    def next(self) -> int:
        """Begin a write and return its index."""
        self.index += 1
        return self.index


class Entry(msgspec.Struct, frozen=True):
    """One KV pair."""

    key: str
    value: bytes
    flags: int
    create_index: int
    modify_index: int
    lock_index: int = 0
    session: str = ""

    def json(self, *, with_value: bool = True) -> Json:
        """Return it as Consul writes it; transactions leave the value of a write out."""
        shown: Json = {
            "LockIndex": self.lock_index,
            "Key": self.key,
            "Flags": self.flags,
            # As in Go, where an empty byte slice that was stored comes back as null.
            "Value": self.value if with_value and self.value else None,
        }
        if self.session:
            shown["Session"] = self.session
        return shown | {"CreateIndex": self.create_index, "ModifyIndex": self.modify_index}


class Session(msgspec.Struct, frozen=True):
    """A session; `ttl` is the text it was made with, "" for none."""

    id: str
    name: str
    node: str
    behavior: str
    ttl: str
    lock_delay_s: float
    create_index: int

    def json(self) -> Json:
        """Return it as Consul writes it."""
        return {
            "ID": self.id,
            "Name": self.name,
            "Node": self.node,
            "LockDelay": int(self.lock_delay_s * NANOSECONDS),
            "Behavior": self.behavior,
            "TTL": self.ttl,
            "NodeChecks": ["serfHealth"],
            "ServiceChecks": None,
            "CreateIndex": self.create_index,
            "ModifyIndex": self.create_index,
        }


class Store(msgspec.Struct):
    """KV and sessions. Times are seconds of any one clock that only rises."""

    clock: Clock = msgspec.field(default_factory=Clock)
    entries: dict[str, Entry] = {}
    tombstones: dict[str, int] = {}
    kv_index: int = 0
    sessions: dict[str, Session] = {}
    sessions_index: int = 0
    session_deadlines: dict[str, float] = {}
    lock_delays: dict[str, float] = {}

    # Reading

    def key_index(self, key: str) -> int:
        """Return the index to block on for one key; never 0, which would not block."""
        entry = self.entries.get(key)
        return entry.modify_index if entry is not None else max(self.kv_index, 1)

    def under(self, prefix: str) -> list[Entry]:
        """Return the pairs that begin with the prefix, in key order."""
        return [self.entries[key] for key in sorted(key for key in self.entries if key.startswith(prefix))]

    def prefix_index(self, prefix: str) -> int:
        """Return the index to block on for a prefix: its newest write or delete, else the whole table's."""
        if not prefix:
            return max(self.kv_index, 1)
        newest = max(
            max(
                (each.modify_index for key, each in self.entries.items() if key.startswith(prefix)), default=0
            ),
            max((index for key, index in self.tombstones.items() if key.startswith(prefix)), default=0),
        )
        return newest or max(self.kv_index, 1)

    # Writing

    def put(self, key: str, value: bytes, flags: int = 0, cas: int | None = None) -> bool:
        """Write a pair; with `cas` only over that modify index, 0 meaning there must be none."""
        if len(value) > VALUE_BYTES_MAX:
            raise Refusal(413, f"Value for key {key!r} is too large ({len(value)} > {VALUE_BYTES_MAX} bytes)")
        if cas is not None and not self._matches(key, cas):
            return False
        self._set(key, value, flags, self.clock.next())
        return True

    def acquire(self, key: str, value: bytes, flags: int, session: str, now: float) -> bool:
        """Take the lock on a key; False when another session holds it or a lock-delay runs."""
        if self.lock_delays.get(key, now) > now:
            return False
        if session not in self.sessions:
            raise Refusal(500, f'invalid session "{session}"')
        return self._lock(key, value, flags, session, self.clock.next())

    def release(self, key: str, value: bytes, flags: int, session: str) -> bool:
        """Give the lock back; False when this session does not hold it."""
        return self._unlock(key, value, flags, session, self.clock.next())

    def delete(self, key: str, cas: int | None = None) -> bool:
        """Delete a key; False when it is there with another index than `cas`, True also when it is not there."""
        if not self._may_delete(key, cas):
            return False
        self._delete(key, self.clock.next())
        return True

    def delete_under(self, prefix: str) -> None:
        """Delete every key with the prefix."""
        index = self.clock.next()
        for entry in self.under(prefix):
            self._delete(entry.key, index)

    def transact(self, operations: list[Json], now: float) -> list[Json]:
        """Carry out all operations and return the JSON of their results, or raise TxnFailed."""
        if len(operations) > TXN_OPERATIONS_MAX:
            raise Refusal(
                413, f"Transaction contains too many operations ({len(operations)} > {TXN_OPERATIONS_MAX})"
            )
        before = self.entries.copy(), self.tombstones.copy(), self.kv_index
        index = self.clock.next()
        results: list[Json] = []
        errors: list[Json] = []
        for place, operation in enumerate(operations):
            try:
                results += [{"KV": shown} for shown in self._operate(operation, index, now)]
            except Refusal as refusal:
                errors.append({"OpIndex": place, "What": refusal.text})
        if errors:
            self.entries, self.tombstones, self.kv_index = before
            raise TxnFailed(errors)
        return results

    def _operate(self, operation: Json, index: int, now: float) -> list[Json]:
        verb, key = operation["Verb"], operation["Key"]
        value, flags = operation["Value"], operation["Flags"]
        expected, session = operation["Index"], operation["Session"]
        match verb:
            case "set":
                self._set(key, value, flags, index)
            case "cas":
                _require(self._matches(key, expected), f'failed to set key "{key}", index is stale')
                self._set(key, value, flags, index)
            case "lock":
                _require(session in self.sessions, f'invalid session "{session}"')
                delayed = self.lock_delays.get(key, now) > now
                _require(not delayed, f'failed to lock key "{key}" due to lock delay')
                held = self._lock(key, value, flags, session, index)
                _require(held, f'failed to lock key "{key}", lock is already held')
            case "unlock":
                _require(session != "", "missing session")
                freed = self._unlock(key, value, flags, session, index)
                _require(
                    freed, f'failed to unlock key "{key}", lock isn\'t held, or is held by another session'
                )
            case "delete":
                self._delete(key, index)
                return []
            case "delete-cas":
                _require(self._may_delete(key, expected), f'failed to delete key "{key}", index is stale')
                self._delete(key, index)
                return []
            case "delete-tree":
                for entry in self.under(key):
                    self._delete(entry.key, index)
                return []
            case _:
                return self._check(verb, key, expected, session)
        return [self.entries[key].json(with_value=False)]

    def _check(self, verb: str, key: str, expected: int, session: str) -> list[Json]:
        entry = self.entries.get(key)
        if verb == "get-tree":
            return [each.json() for each in self.under(key)]
        if verb == "check-not-exists":
            _require(entry is None, f'key "{key}" exists')
            return []
        _require(
            verb in ("get", "check-session", "check-index"),
            f"unknown KV operation: {verb}",
        )
        if entry is None:
            doing = "" if verb == "get" else f"failed to {verb.replace('-', ' ')}, "
            raise Refusal(409, f'{doing}key "{key}" doesn\'t exist')
        if verb == "check-session":
            _require(
                entry.session == session,
                f'failed session check for key "{key}", current session "{entry.session}" != "{session}"',
            )
        elif verb == "check-index":
            _require(
                entry.modify_index == expected,
                f'failed index check for key "{key}", '
                f"current modify index {entry.modify_index} != {expected}",
            )
        return [entry.json(with_value=verb == "get")]

    def _may_delete(self, key: str, cas: int | None) -> bool:
        return cas is None or key not in self.entries or self._matches(key, cas)

    def _matches(self, key: str, cas: int) -> bool:
        entry = self.entries.get(key)
        return cas == (entry.modify_index if entry is not None else 0)

    def _set(self, key: str, value: bytes, flags: int, index: int, **lock: Any) -> None:
        known = self.entries.get(key)
        if known is None:
            made = Entry(key, value, flags, index, index)
        else:
            made = msgspec.structs.replace(known, value=value, flags=flags)
        made = msgspec.structs.replace(made, **lock)
        if made == known:
            # Consul skips a write that changes nothing: the index stays (kvs.go, kvsSetTxn).
            return
        self.entries[key] = msgspec.structs.replace(made, modify_index=index)
        self.tombstones.pop(key, None)
        self.kv_index = index

    def _lock(self, key: str, value: bytes, flags: int, session: str, index: int) -> bool:
        known = self.entries.get(key)
        if known is not None and known.session and known.session != session:
            return False
        times = known.lock_index if known is not None else 0
        again = known is not None and known.session == session
        self._set(key, value, flags, index, session=session, lock_index=times if again else times + 1)
        return True

    def _unlock(self, key: str, value: bytes, flags: int, session: str, index: int) -> bool:
        known = self.entries.get(key)
        if known is None or not session or known.session != session:
            return False
        self._set(key, value, flags, index, session="")
        return True

    def _delete(self, key: str, index: int) -> None:
        if self.entries.pop(key, None) is None:
            return
        self.tombstones[key] = index
        self.kv_index = index
        while len(self.tombstones) > TOMBSTONES_MAX:
            del self.tombstones[next(iter(self.tombstones))]

    # Sessions

    def create_session(self, session_id: str, asked: Json, node: str, now: float) -> str:
        """Make a session of the JSON that was sent, whose names have no case in Go; its id is given."""
        asked = {name.lower(): value for name, value in asked.items()}
        ttl, behavior = asked.get("ttl", ""), asked.get("behavior", "") or "release"
        if behavior not in ("release", "delete"):
            raise Refusal(500, f"Invalid Behavior setting '{behavior}'")
        ttl_s = _ttl_s(ttl)
        if ttl_s and not SESSION_TTL_SECONDS_MIN <= ttl_s <= SESSION_TTL_SECONDS_MAX:
            raise Refusal(
                500, f"Invalid Session TTL '{int(ttl_s * NANOSECONDS)}', must be between [10s=24h0m0s]"
            )
        delay = asked.get("lockdelay")
        delay_s = LOCK_DELAY_SECONDS if delay is None else _lock_delay_s(delay)
        index = self.clock.next()
        self.sessions[session_id] = Session(
            session_id, asked.get("name", ""), node, behavior, ttl, delay_s, index
        )
        self.sessions_index = index
        self._prolong(self.sessions[session_id], now)
        return session_id

    def renew_session(self, session_id: str, now: float) -> Session:
        """Extend a session by its TTL."""
        session = self.sessions.get(session_id)
        if session is None:
            raise Refusal(404, f"Session id '{session_id}' not found")
        self._prolong(session, now)
        return session

    def end_session(self, session_id: str, now: float) -> None:
        """Invalidate a session: its locks are released or its keys deleted, and their lock-delay begins."""
        session = self.sessions.pop(session_id, None)
        self.session_deadlines.pop(session_id, None)
        if session is None:
            return
        index = self.clock.next()
        self.sessions_index = index
        for entry in [each for each in self.entries.values() if each.session == session_id]:
            if session.behavior == "delete":
                self._delete(entry.key, index)
            else:
                self._set(entry.key, entry.value, entry.flags, index, session="")
            if session.lock_delay_s > 0:
                self.lock_delays[entry.key] = now + min(session.lock_delay_s, LOCK_DELAY_SECONDS_MAX)

    def restart_timers(self, now: float) -> None:
        """Give every session its full time again, as a new leader does."""
        self.lock_delays.clear()
        for session in self.sessions.values():
            self._prolong(session, now)

    def expire(self, now: float) -> None:
        """End the sessions whose time is over and forget lock-delays that are."""
        for session_id in [each for each, end in self.session_deadlines.items() if end <= now]:
            self.end_session(session_id, now)
        for key in [each for each, end in self.lock_delays.items() if end <= now]:
            del self.lock_delays[key]

    def _prolong(self, session: Session, now: float) -> None:
        if session.ttl:
            self.session_deadlines[session.id] = now + SESSION_TTL_MULTIPLIER * duration_s(session.ttl)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Refusal(409, otherwise)


def _ttl_s(text: str) -> float:
    try:
        return duration_s(text) if text else 0.0
    except ValueError as error:
        raise Refusal(500, f"Session TTL '{text}' invalid: {error}") from error


def _lock_delay_s(given: str | float) -> float:
    if isinstance(given, int | float) and given < LOCK_DELAY_THRESHOLD:
        return float(given)
    try:
        return duration_s(given)
    except ValueError as error:
        raise Refusal(400, f"Request decode failed: {error}") from error

"""Keys in the catalog, and the gate that asks them."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.catalog import Catalog
from adapters.errors import StoreUnavailable
from service.access import gate as gates
from service.access.caller import SCOPES, Caller
from service.access.gate import Gate
from service.access.keys import KEY_ID, TOKEN, Key, Keys, opens
from service.errors import Forbidden, InvalidRequest, NotFound, Unauthenticated, WrongState

OPERATOR = "the key of the operator"


@pytest.fixture
def keys(tmp_path: Path, empty_catalog: Path) -> Iterator[Keys]:
    catalog = Catalog(str(shutil.copy(empty_catalog, tmp_path)))
    yield Keys(catalog)
    catalog.close()


def ask(gate: Gate, token: str | None) -> Caller:
    return asyncio.run(gate.caller(None if token is None else f"Bearer {token}"))


def test_a_key_is_shown_once_and_only_its_hash_is_kept(keys: Keys, tmp_path: Path) -> None:
    made = keys.create("ci", "acme", ["rag", "infer"])
    match = TOKEN.fullmatch(made.token)
    assert match is not None
    assert match[1] == made.key.id
    assert len(bytes.fromhex(match[2])) == 32
    assert made.key.scopes == ("infer", "rag")
    assert match[2] not in repr(made)
    assert keys.list() == [made.key]
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert match[2].encode() not in written
    assert made.key.secret_sha256.encode() in written


@pytest.mark.parametrize(
    ("name", "tenant", "scopes", "days", "field"),
    [
        ("", "acme", ["infer"], None, "name"),
        ("x" * 65, "acme", ["infer"], None, "name"),
        ("a\nb", "acme", ["infer"], None, "name"),
        ("a", "../acme", ["infer"], None, "tenant"),
        ("a", "Acme", ["infer"], None, "tenant"),
        ("a", "acme", [], None, "scopes"),
        ("a", "acme", ["infer", "root"], None, "scopes"),
        ("a", "acme", ["infer"], 0.0, "days"),
        ("a", "acme", ["infer"], 1e9, "days"),
        ("a", "acme", ["infer"], float("nan"), "days"),
    ],
)
def test_what_no_key_can_be(
    keys: Keys, name: str, tenant: str, scopes: list[str], days: float | None, field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        keys.create(name, tenant, scopes, days)
    assert refused.value.field == field
    assert not keys.any()


def test_the_gate_knows_who_asks(keys: Keys) -> None:
    made = keys.create("ci", "acme", ["infer"])
    caller = ask(Gate(keys), made.token)
    assert caller == Caller("acme", frozenset(["infer"]), made.key.id)
    caller.check("infer")
    caller.check("rag", "infer")
    with pytest.raises(Forbidden, match="needs the scope rag; the key has infer"):
        caller.check("rag")


def test_the_admin_has_every_scope(keys: Keys) -> None:
    caller = ask(Gate(keys), keys.create("op", "default", ["admin"]).token)
    for scope in SCOPES:
        caller.check(scope)


def test_without_any_key_the_address_decides(keys: Keys) -> None:
    for token in (None, "anything, as clients send it", "nbl_"):
        assert ask(Gate(keys), token).may("admin")
        beyond = ask(Gate(keys, local=False), token)
        assert beyond.may("infer")
        assert not beyond.may("admin")


def test_the_first_key_closes_the_gate_and_its_end_does_not_open_it(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "SECONDS", 0.0)
    gate = Gate(keys)
    assert ask(gate, None).may("infer")
    made = keys.create("ci", "acme", ["infer"])
    with pytest.raises(Unauthenticated):
        ask(gate, None)
    keys.revoke(made.key.id)
    for late in (gate, Gate(keys)):
        with pytest.raises(Unauthenticated):
            ask(late, None)


def test_nobody_passes_while_the_first_request_still_asks_for_keys(keys: Keys) -> None:
    keys.create("ci", "acme", ["infer"])
    gate = Gate(keys)

    async def together() -> list[Caller | BaseException]:
        return await asyncio.gather(*(gate.caller(None) for _ in range(8)), return_exceptions=True)

    assert [type(found) for found in asyncio.run(together())] == [Unauthenticated] * 8


def test_a_catalog_that_does_not_answer_opens_nothing(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> bool:
        raise StoreUnavailable("the catalog is away")

    monkeypatch.setattr(keys, "any", fail)
    gate = Gate(keys)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            ask(gate, None)


def test_what_opens_nothing_is_told_the_same(keys: Keys) -> None:
    made = keys.create("ci", "acme", ["infer"])
    gone = keys.create("gone", "acme", ["infer"])
    keys.revoke(gone.key.id)
    secret = made.token.rpartition("_")[2]
    other = f"{int(secret, 16) ^ 1:064x}"
    gate, said = Gate(keys, OPERATOR), set()
    for token in (
        f"nbl_{made.key.id}_{other}",  # one bit
        f"nbl_{'0' * 12}_{secret}",
        made.token.upper(),
        made.token + "0",
        gone.token,
        secret,
        "' OR 1=1 --",
        OPERATOR + "x",
        "é",
    ):
        with pytest.raises(Unauthenticated) as refused:
            ask(gate, token)
        said.add(str(refused.value))
        assert token not in str(refused.value)
    assert len(said) == 1
    assert ask(gate, made.token).tenant == "acme"
    assert ask(gate, OPERATOR).may("admin")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer  ", "Basic YTpi", "nbl_x"])
def test_a_header_without_a_bearer(keys: Keys, header: str | None) -> None:
    keys.create("ci", "acme", ["infer"])
    with pytest.raises(Unauthenticated, match="Authorization: Bearer"):
        asyncio.run(Gate(keys).caller(header))


def test_an_expired_key(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    made = keys.create("ci", "acme", ["infer"], days=1)
    assert ask(Gate(keys), made.token).tenant == "acme"
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 86_401)
    with pytest.raises(Unauthenticated):
        ask(Gate(keys), made.token)
    assert keys.list()[0].state() == "expired"


def test_both_keys_of_a_rotation_open_until_the_old_one_ends(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = keys.create("ci", "acme", ["infer", "rag"], days=30)
    new = keys.rotate(old.key.id, overlap=3600.0)
    assert (new.key.tenant, new.key.scopes) == (old.key.tenant, old.key.scopes)
    assert new.key.expires is not None
    gate = Gate(keys)
    assert ask(gate, old.token).key == old.key.id
    assert ask(gate, new.token).key == new.key.id
    with pytest.raises(WrongState, match=new.key.id):
        keys.rotate(old.key.id)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 3601)
    assert ask(Gate(keys), new.token).key == new.key.id
    with pytest.raises(Unauthenticated):
        ask(Gate(keys), old.token)


def test_a_key_is_revoked_once(keys: Keys) -> None:
    made = keys.create("ci", "acme", ["infer"])
    assert keys.revoke(made.key.id).state() == "revoked"
    for do in (keys.revoke, keys.rotate):
        with pytest.raises(WrongState, match="revoked"):
            do(made.key.id)  # type: ignore[operator]
        with pytest.raises(NotFound):
            do("0" * 12)  # type: ignore[operator]
        with pytest.raises(NotFound):
            do("' OR 1=1")  # type: ignore[operator]
    assert KEY_ID.fullmatch(made.key.id)


def test_another_process_revokes_within_a_second(keys: Keys, tmp_path: Path) -> None:
    made = keys.create("ci", "acme", ["infer"])
    gate = Gate(keys)
    assert ask(gate, made.token).tenant == "acme"
    other = Catalog(str(tmp_path / "catalog.db"))
    Keys(other).revoke(made.key.id)
    other.close()
    time.sleep(1.0)
    with pytest.raises(Unauthenticated):
        ask(gate, made.token)


def test_a_known_key_is_not_asked_of_the_catalog_again(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = keys.create("ci", "acme", ["infer"])
    gate, asked = Gate(keys), []
    find = keys.find
    monkeypatch.setattr(keys, "find", lambda key_id: asked.append(key_id) or find(key_id))
    for _ in range(5):
        ask(gate, made.token)
    assert asked == [made.key.id]


def test_an_unknown_key_is_compared_too() -> None:
    """No comparison at all would show in time which ids there are."""
    assert not opens(None, "0" * 64)


def test_who_guesses_keys_waits_for_himself(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses would take every thread that look-ups have; whose key is known needs one too."""
    made, gate = keys.create("a", "acme", ["infer"]), Gate(keys)
    find, inside, most = keys.find, [0], [0]
    full, open_door = threading.Event(), threading.Event()

    def slow(key_id: str) -> Key | None:
        if key_id != made.key.id:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            if inside[0] == gates.STRANGERS:
                full.set()
            assert open_door.wait(60)
            inside[0] -= 1
        return find(key_id)

    monkeypatch.setattr(gates, "SECONDS", 0.0)  # so that every request asks the catalog
    monkeypatch.setattr(keys, "find", slow)

    async def guess(number: int) -> None:
        with pytest.raises(Unauthenticated):
            await gate.caller(f"Bearer nbl_{number:012x}_{number:064x}")

    async def both() -> None:
        await gate.caller(f"Bearer {made.token}")
        guesses = [asyncio.ensure_future(guess(number)) for number in range(40)]
        await asyncio.to_thread(full.wait, 60)
        for _ in range(20):
            caller = await asyncio.wait_for(gate.caller(f"Bearer {made.token}"), 30)
            assert caller.tenant == "acme"
        open_door.set()
        await asyncio.gather(*guesses)

    asyncio.run(both())
    assert most[0] == gates.STRANGERS

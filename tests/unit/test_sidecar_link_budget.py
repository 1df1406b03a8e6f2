"""sidecar.link.budget: windows reserved, kept bytes counted, nothing beyond the limits."""

from sidecar.link.budget import KEPT_FLOOR_BYTES, PEER_BYTES, PROCESS_BYTES, Budget, Share
from ztna.wire.stream import WINDOW_BYTES_MAX, WINDOW_BYTES_MIN


def open_all(budget: Budget, peer: str) -> list[Share]:
    shares = []
    while (share := budget.open(peer)) is not None:
        shares.append(share)
    return shares


def test_few_flows_are_fast_and_many_still_fit() -> None:
    budget = Budget()
    shares = open_all(budget, "a")
    assert shares[0].window == WINDOW_BYTES_MAX
    assert all(share.window >= 1024 * 1024 for share in shares[:16])
    assert shares[-1].window == WINDOW_BYTES_MIN
    assert len(shares) > 400
    assert budget.used == budget.used_by("a") == sum(share.window + KEPT_FLOOR_BYTES for share in shares)
    assert PEER_BYTES * 6 // 8 < budget.used <= PEER_BYTES * 7 // 8 + WINDOW_BYTES_MIN + KEPT_FLOOR_BYTES


def test_one_peer_cannot_take_everything_and_all_peers_not_more_than_the_process() -> None:
    budget = Budget()
    assert open_all(budget, "a")
    assert budget.open("b") is not None
    for peer in range(20):
        open_all(budget, str(peer))
    assert budget.used <= PROCESS_BYTES
    assert budget.open("new") is None


def test_many_peers_have_two_thousand_flows_together() -> None:
    budget = Budget()
    shares = [budget.open(f"agent-{number % 200}") for number in range(2300)]
    assert all(share is not None for share in shares)


def test_what_is_closed_is_given_back_once() -> None:
    budget = Budget()
    share = budget.open("a")
    assert share is not None
    share.keep(1000)
    share.close()
    share.close()
    assert budget.used == 0
    assert budget.used_by("a") == 0


def test_flows_that_are_stuck_leave_room_for_others() -> None:
    budget = Budget()
    shares = open_all(budget, "a")
    total = 0
    for share in shares[:100]:
        room = share.room()
        assert room >= KEPT_FLOOR_BYTES
        share.keep(room)
        total += room
    assert shares[200].room() >= KEPT_FLOOR_BYTES
    assert budget.used <= PEER_BYTES


def test_at_the_limit_there_is_no_room_and_giving_back_wakes_who_waits() -> None:
    budget = Budget(process_bytes=1 << 20, peer_bytes=1 << 20)
    first, second = budget.open("a"), budget.open("a")
    assert first is not None
    assert second is not None
    first.keep((1 << 20) - budget.used + KEPT_FLOOR_BYTES)
    assert budget.used == 1 << 20
    assert budget.open("a") is None
    second.keep(KEPT_FLOOR_BYTES)
    assert second.room() == 0
    woken = []
    second.wait(lambda: woken.append(1))
    first.keep(0)
    assert woken == [1]
    assert second.room() >= KEPT_FLOOR_BYTES
    first.keep(2 * KEPT_FLOOR_BYTES)
    first.keep(0)
    assert woken == [1]


def test_who_closed_is_not_woken() -> None:
    budget = Budget()
    first, second = budget.open("a"), budget.open("a")
    assert first is not None
    assert second is not None
    second.wait(lambda: (_ for _ in ()).throw(AssertionError))
    second.close()
    first.close()

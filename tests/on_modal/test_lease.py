"""The lease that services take turns by, over the true SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import modal
import pytest

from claas.adapters.modal_lease import CLOCK_MARGIN_S, LEASE_S, ModalLease
from claas.core.errors import AdapterBusy, BackendUnavailable
from tests.adapters.stores import Clock
from tests.inference.gate import until
from tests.modal_server.server import ModalDouble

ADAPTER = "me/a"
pytestmark = pytest.mark.integration

SDK_GIVES_UP = 100
"""More times than the SDK tries again by itself."""


@pytest.fixture(scope="module")
def modal_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModalDouble]:
    with ModalDouble(tmp_path_factory.mktemp("modal")) as server:
        yield server


@pytest.fixture
def server(modal_server: ModalDouble) -> Iterator[ModalDouble]:
    yield modal_server
    modal_server.faults.clear()


@pytest.fixture
def leases(server: ModalDouble, request: pytest.FixtureRequest) -> modal.Dict:
    name = request.node.name.replace("[", "-").replace("]", "")[:60]
    return modal.Dict.from_name(name, create_if_missing=True, client=server.client())


def service(leases: modal.Dict, clock: Clock | None = None, timeout_s: float = 0.0, renew_s: float = 1000.0) -> ModalLease:
    """One that does not wait, nor renew, unless it says so."""
    return ModalLease(leases, timeout_s=timeout_s, now=clock or Clock(), renew_s=renew_s, poll_s=0.02)


async def hold_and_die(leases: modal.Dict) -> None:
    """What a service leaves that was killed while it held the lease."""
    await leases.put.aio("lease:me/a#1", {"holder": "the dead", "until": Clock()() + LEASE_S})


async def lost(lease: ModalLease) -> bool:
    try:
        lease.check(ADAPTER)
    except BackendUnavailable:
        return True
    return False


async def renewed(leases: modal.Dict, until: float) -> bool:
    held: bool = (await leases.get.aio("lease:me/a#1"))["until"] >= until
    return held


async def kept(leases: modal.Dict) -> list[str]:
    return sorted([key async for key in leases.keys.aio()])


async def test_services_take_turns(leases: modal.Dict) -> None:
    one, two = service(leases), service(leases)
    for _ in range(3):
        async with one.hold(ADAPTER):
            with pytest.raises(AdapterBusy, match="by another service"):
                async with two.hold(ADAPTER):
                    pass
            async with two.hold("me/b"):
                one.check(ADAPTER)
        async with two.hold(ADAPTER):
            two.check(ADAPTER)


async def test_one_waits_until_the_other_is_done(leases: modal.Dict) -> None:
    one, two = service(leases), service(leases, timeout_s=30.0)
    order: list[str] = []

    async def second() -> None:
        async with two.hold(ADAPTER):
            order.append("two")

    async with one.hold(ADAPTER):
        waiting = asyncio.create_task(second())
        await asyncio.sleep(0.1)
        order.append("one")
    await waiting
    assert order == ["one", "two"]


async def test_many_services_at_once_are_one_at_a_time(leases: modal.Dict) -> None:
    inside, most, turns = 0, 0, 0

    async def work(lease: ModalLease) -> None:
        nonlocal inside, most, turns
        for _ in range(3):
            async with lease.hold(ADAPTER):
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0.005)
                inside -= 1
                turns += 1

    await asyncio.gather(*(work(service(leases, timeout_s=60.0)) for _ in range(5)))
    assert (most, turns) == (1, 15)


async def test_the_dict_does_not_grow(leases: modal.Dict) -> None:
    one = service(leases)
    for _ in range(5):
        async with one.hold(ADAPTER):
            pass
    assert await kept(leases) == ["lease:me/a#4", "lease:me/a#5", "lease:me/a#head"]


async def test_a_dead_services_lease_is_taken_over_once_it_expired_by_more_than_clocks_differ(leases: modal.Dict) -> None:
    clock = Clock()
    await hold_and_die(leases)
    for ahead_s in (0.0, LEASE_S, LEASE_S + CLOCK_MARGIN_S - 1):
        clock.ahead_s = ahead_s
        with pytest.raises(AdapterBusy):
            async with service(leases, clock).hold(ADAPTER):
                pass
    clock.ahead_s = LEASE_S + CLOCK_MARGIN_S + 1
    heir = service(leases, clock)
    async with heir.hold(ADAPTER):
        heir.check(ADAPTER)


async def test_one_of_many_takes_over(leases: modal.Dict) -> None:
    clock = Clock()
    await hold_and_die(leases)
    clock.ahead_s = LEASE_S + CLOCK_MARGIN_S + 1
    entered: list[int] = []
    everybody_tried = asyncio.Event()
    refused = 0

    async def take(number: int) -> None:
        nonlocal refused
        try:
            async with service(leases, clock).hold(ADAPTER):
                entered.append(number)
                await everybody_tried.wait()
        except AdapterBusy:
            refused += 1
            if refused == 5:
                everybody_tried.set()

    async with asyncio.timeout(60):
        await asyncio.gather(*(take(number) for number in range(6)))
    assert len(entered) == 1


async def test_a_lease_is_renewed_while_it_is_held(leases: modal.Dict) -> None:
    clock = Clock()
    one, two = service(leases, clock, renew_s=0.02), service(leases, clock)
    async with one.hold(ADAPTER):
        for _ in range(4):
            clock.ahead_s += LEASE_S - 10
            due = clock() + LEASE_S
            await until(lambda due=due: renewed(leases, due))  # type: ignore[misc]
        one.check(ADAPTER)
        with pytest.raises(AdapterBusy):
            async with two.hold(ADAPTER):
                pass


async def test_a_lease_that_could_not_be_renewed_in_time_lets_nothing_be_written(leases: modal.Dict, server: ModalDouble) -> None:
    clock = Clock()
    one, two = service(leases, clock, renew_s=0.02), service(leases, clock)
    async with one.hold(ADAPTER):
        server.faults.unavailable("DictUpdate", times=SDK_GIVES_UP)
        one.check(ADAPTER)
        clock.ahead_s = LEASE_S + 1
        with pytest.raises(BackendUnavailable, match="could not be kept"):
            one.check(ADAPTER)
        clock.ahead_s = LEASE_S + CLOCK_MARGIN_S + 1
        server.faults.clear()
        async with two.hold(ADAPTER):
            with pytest.raises(BackendUnavailable, match="could not be kept"):
                one.check(ADAPTER)
            two.check(ADAPTER)
            assert not await renewed(leases, clock())
    one.check(ADAPTER)  # not held: nothing to be lost
    async with one.hold(ADAPTER):
        one.check(ADAPTER)


async def test_a_holder_sees_that_its_lease_was_taken(leases: modal.Dict) -> None:
    """Its clock is behind: to itself it is in time."""
    slow, right = Clock(), Clock()
    right.ahead_s = LEASE_S + CLOCK_MARGIN_S + 1
    one, two = service(leases, slow, renew_s=0.02), service(leases, right)
    async with one.hold(ADAPTER):
        await leases.put.aio("lease:me/a#2", {"holder": "another", "until": right() + LEASE_S})
        await until(lambda: lost(one))
        with pytest.raises(BackendUnavailable, match="could not be kept"):
            one.check(ADAPTER)
    with pytest.raises(AdapterBusy):
        async with two.hold(ADAPTER):
            pass


@pytest.mark.parametrize("method", ["DictUpdate", "DictPop"])
async def test_an_answer_that_gets_lost_once_changes_nothing(leases: modal.Dict, server: ModalDouble, method: str) -> None:
    one, two = service(leases), service(leases)
    for _ in range(3):
        server.faults.lose_answer(method, 1)
        async with one.hold(ADAPTER):
            one.check(ADAPTER)
            with pytest.raises(AdapterBusy):
                async with two.hold(ADAPTER):
                    pass
        async with two.hold(ADAPTER):
            pass


async def test_a_lease_that_was_taken_without_an_answer_is_ones_own_at_the_next_try(leases: modal.Dict, server: ModalDouble) -> None:
    one, two = service(leases), service(leases)
    server.faults.lose_answer("DictUpdate", SDK_GIVES_UP)
    with pytest.raises(BackendUnavailable, match="cannot be reached"):
        async with one.hold(ADAPTER):
            pass
    server.faults.lose_answer("DictUpdate", 0)
    async with one.hold(ADAPTER):
        one.check(ADAPTER)
    async with two.hold(ADAPTER):
        two.check(ADAPTER)


async def test_a_head_that_is_one_behind_leads_to_the_newest(leases: modal.Dict) -> None:
    """As where a service that took an epoch stalls before it says so, and the next says so first."""
    one, two = service(leases), service(leases)
    for _ in range(4):
        async with one.hold(ADAPTER):
            pass
    async with one.hold(ADAPTER):
        await leases.put.aio("lease:me/a#head", 4)
        with pytest.raises(AdapterBusy):
            async with two.hold(ADAPTER):
                pass


async def test_where_modal_refuses_the_token_the_message_says_what_to_do(server: ModalDouble) -> None:
    stranger = await asyncio.to_thread(server.client, "as-wrong")
    leases = modal.Dict.from_name("leases", create_if_missing=True, client=stranger)
    with pytest.raises(BackendUnavailable, match="modal setup"):
        async with service(leases).hold(ADAPTER):
            pass


async def test_a_body_that_fails_gives_the_lease_back(leases: modal.Dict) -> None:
    one, two = service(leases), service(leases)
    with pytest.raises(LookupError, match="mine"):
        async with one.hold(ADAPTER):
            raise LookupError("mine")
    async with two.hold(ADAPTER):
        pass

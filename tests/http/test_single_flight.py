"""Large answers are made one at a time."""

import asyncio

import pytest

from vitalsd.admission import OWNER, BusyError, Peer
from vitalsd.http.single_flight import SingleFlight


class Work:
    """Work that takes as long as the test wants, and counts how much of it runs at once."""

    def __init__(self) -> None:
        self.finish = asyncio.Event()
        self.begun = self.running = self.most = 0

    async def __call__(self) -> bytes:
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.finish.wait()
            await asyncio.sleep(0)
        finally:
            self.running -= 1
        return b"x" * self.begun


def test_single_flight_makes_one_answer_at_a_time_and_refuses_beyond_16() -> None:
    """Seventeen different ones are made one after the other; a further request is refused."""

    async def crowd() -> None:
        turns, work = SingleFlight(16), Work()
        waiting = [asyncio.create_task(turns.make(work, key)) for key in range(17)]
        await asyncio.sleep(0.01)
        assert work.begun == 1
        with pytest.raises(BusyError):
            await turns.make(work, "one more")
        work.finish.set()
        assert len({len(body) for body in await asyncio.gather(*waiting)}) == 17
        assert work.most == 1
        assert await turns.make(work, "one more")

    asyncio.run(crowd())


def test_single_flight_with_the_same_key_is_made_once_for_a_thousand() -> None:
    """It is made once, and all get the same bytes; a later request gets a new one."""

    async def crowd() -> None:
        turns, work = SingleFlight(1), Work()
        waiting = [asyncio.create_task(turns.make(work, "the same")) for _ in range(1000)]
        await asyncio.sleep(0.01)
        work.finish.set()
        bodies = await asyncio.gather(*waiting)
        assert len({id(body) for body in bodies}) == work.begun == 1
        await turns.make(work, "the same")
        assert work.begun == 2

    asyncio.run(crowd())


def test_single_flight_turns_alternate_between_kinds_of_client() -> None:
    """An answer for the Unix socket waits for one answer of TCP and not for sixteen."""

    async def crowd() -> None:
        turns, go = SingleFlight(), asyncio.Event()
        made: list[str] = []

        async def make(name: str, peer: Peer) -> None:
            async def work() -> None:
                await go.wait()
                made.append(name)

            await turns.make(work, peer=peer)

        async with asyncio.TaskGroup() as group:
            for i in range(16):
                group.create_task(make(f"tcp {i}", Peer("tcp")))
            await asyncio.sleep(0)
            group.create_task(make("unix", OWNER))
            group.create_task(make("other", Peer("other", 1002)))
            await asyncio.sleep(0.01)
            go.set()
        assert made[:5] == ["tcp 0", "tcp 1", "unix", "other", "tcp 2"]
        assert made[-1] == "tcp 15"

    asyncio.run(crowd())


def test_single_flight_queue_of_one_kind_takes_no_slot_of_another() -> None:
    """While 17 answers over TCP are made, TCP is refused and the Unix socket is not."""

    async def crowd() -> None:
        turns, work = SingleFlight(16), Work()
        waiting = [asyncio.create_task(turns.make(work, key, Peer("tcp"))) for key in range(17)]
        await asyncio.sleep(0.01)
        with pytest.raises(BusyError):
            await turns.make(work, "one more", Peer("tcp"))
        waiting.append(asyncio.create_task(turns.make(work, "one more", OWNER)))
        await asyncio.sleep(0.01)
        work.finish.set()
        await asyncio.gather(*waiting)

    asyncio.run(crowd())


def test_single_flight_call_without_a_waiting_client_is_not_started() -> None:
    """Its place is free at once, and a request with the same key gets an answer of its own."""

    async def crowd() -> None:
        turns, work = SingleFlight(16), Work()
        first = asyncio.create_task(turns.make(work, "first"))
        leaving = [asyncio.create_task(turns.make(work, key)) for key in range(16)]
        await asyncio.sleep(0.01)
        for each in leaving:
            each.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        again = asyncio.create_task(turns.make(work, 0))
        await asyncio.sleep(0.01)
        work.finish.set()
        await first
        await again
        assert work.begun == 2

    asyncio.run(crowd())


def test_single_flight_without_a_key_shares_nothing() -> None:
    """Two requests without a key get one each."""

    async def two() -> None:
        turns, work = SingleFlight(), Work()
        work.finish.set()
        assert await turns.make(work) is not await turns.make(work)
        assert work.begun == 2

    asyncio.run(two())


def test_single_flight_client_that_disconnects_leaves_the_call_to_others(recwarn: pytest.WarningsRecorder) -> None:
    """If one of two clients of an answer disconnects, the other gets it. Both get an error, and the turn ends."""

    async def leaving() -> None:
        turns, work = SingleFlight(), Work()
        first, second = (asyncio.create_task(turns.make(work, 1)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0)
        work.finish.set()
        assert await second == b"x"

        async def fail() -> None:
            raise OSError("no")

        for each in await asyncio.gather(*(turns.make(fail, 2) for _ in range(2)), return_exceptions=True):
            assert isinstance(each, OSError)
        assert await turns.make(work, 3)

    asyncio.run(leaving())
    assert not recwarn.list

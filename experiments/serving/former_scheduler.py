"""The scheduler that `isthmus bench qos` and `isthmus bench scheduler` compare the shipped one with.

It is here for the comparison alone, with `former_sessions.py` and `former_requests.py`; nothing but
`former_policy.py` imports it. `without` switches single mechanisms off.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from isthmus.experiments.serving.former_requests import Account, Batching, Job, Kind, Share
from isthmus.experiments.serving.former_sessions import Answered, Attendance, Open

T = TypeVar("T")

LEAD_SECONDS = 2.0
"""Computing time, over its weight, that a tenant's interactive work may be ahead of the others' training."""


MARGIN_SECONDS = 0.01
"""Before the last moment at which a piece can begin and keep its deadline, its batch begins."""
NOVELTY = 0.3
"""Weight of the last pass in the average of how long a token position takes."""
LANE_SLACK = 1.15
"""A batch may be so much larger than an even part, for each lane, of all that is at work."""
PATIENCE = 4.0
"""How many times as long as computing it and a full room would take, a piece waits for room in memory at most."""
RETHINK_SECONDS = 0.02
"""How long a piece waits for room in memory until it is looked at again, where nothing else happens."""


@dataclass(frozen=True, slots=True)
class _Look:
    """How things are at a moment.

    Attributes:
        at_work: The tenants' sessions that have something waiting or running, or are expected back.
        here: All of them.
        part: Token positions that a batch has at most, so that each lane has its part.
        left: Token positions that sessions have open, of those that are at work or were lately; 0 for what is going.
        taken: All of that.
        beyond: What of it is more than a tenant's share, for those that have several sessions at work.
    """

    at_work: Mapping[str, set[bytes]]
    here: Collection[bytes]
    part: float
    left: Mapping[bytes, int]
    taken: int
    beyond: Mapping[str, float]

    def taken_beside(self, tenant: str, own: int) -> float:
        """The room that other sessions have taken; of what another tenant with several has, its share at most."""
        return self.taken - own - sum(excess for name, excess in self.beyond.items() if name != tenant)


class Scheduler(Generic[T]):
    """Holds work until its turn comes.

    Args:
        clock: Monotonic seconds.
        batching: What may be done together; None for nothing.
        room: For how many token positions' worth of what pieces open there is room.
        lanes: How many batches may run at a time.
        memory: Bytes that everything may take that is done at a time; one piece alone may take more.
        without: Mechanisms that are switched off: "waiting", "rests", "closing together", "pace".
    """

    def __init__(
        self,
        clock: Callable[[], float],
        batching: Batching | None = None,
        room: Callable[[], float] = lambda: math.inf,
        lanes: int = 1,
        memory: float = math.inf,
        without: Collection[str] = (),
    ) -> None:
        self._clock, self._without = clock, without
        self._memory = memory
        self._lanes = lanes
        self._batching = batching
        self._room = room
        self._running: dict[bytes, Job[T]] = {}  # session -> its piece
        self._sessions = Attendance()
        self._open = Open()
        self._closing: set[bytes] = set()  # the sessions whose pieces that close something are running
        self._over: set[bytes] = set()  # the sessions that were cancelled while their pieces were running
        self._accounts: dict[str, Account[T]] = {}
        self._present = 0.0
        self._per_position: dict[str, float] = {}  # pace -> seconds, a moving average
        self._own_pace: dict[str, dict[str, float]] = {}  # pace -> tenant -> the same of its own
        self._ripe_at: float | None = None  # when what waits for company has waited long enough
        self._late: list[Job[T]] = []
        self._looked: tuple[float, _Look] | None = None  # at a moment, as long as nothing changes

    def __len__(self) -> int:
        return sum(map(len, self._accounts.values()))

    def waiting(self) -> Mapping[str, int]:
        """How much of each tenant's work waits."""
        return Counter({name: len(account) for name, account in self._accounts.items() if len(account)})

    def overdue(self) -> int:
        """How many pieces have waited for longer than for company, and not for room: because there is too much work.

        Those of a tenant that is over what it may have a second are not among them.
        """
        now = self._clock()
        patience = 0.0 if self._batching is None else self._batching.window
        for account in self._accounts.values():
            account.refill(now)
        late = (job for job in self._jobs() if now - job.since > patience and not self._accounts[job.tenant].overdrawn)
        return sum(self._fits(job, [], now) for job in late)

    def used(self) -> Mapping[str, float]:
        """Each tenant's account: seconds of computing over its weight, lifted where it was away."""
        return {name: account.used for name, account in self._accounts.items()}

    def add(
        self,
        work: T,
        *,
        tenant: str,
        owner: bytes,
        share: Share,
        interactive: bool = False,
        positions: int = 0,
        kind: Kind | None = None,
        deadline: float | None = None,
        continues: bool = False,
        nbytes: int = 0,
    ) -> Job[T]:
        """Let a piece of work wait. A session's pieces keep their order, interactive ones among themselves.

        With a `deadline`, in seconds from now, it is begun in time to be done by then, or not at all.
        """
        now = self._clock()
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(share, budget=share.positions_per_second or 0.0, seen=now)
        account.refill(now)
        account.share = share
        if not len(account) and not account.running:
            account.used = max(account.used, self._present)
        computes, pace = kind is not None, "" if kind is None else kind.pace
        anywhere = kind is not None and kind.anywhere
        if self._batching is None or positions < self._batching.smallest:
            kind = None
        until = None if deadline is None else now + deadline
        job = Job(
            tenant, owner, interactive, positions, work, kind, now, until, computes, anywhere, pace, continues, nbytes
        )
        account.waiting[0 if interactive else 1].append(job)
        self._sessions.asks(owner, now)
        self._looked = None
        return job

    @property
    def busy(self) -> bool:
        """Whether something is running."""
        return bool(self._running)

    @property
    def crowded(self) -> bool:
        """Whether more than one session is at work: has something waiting or running, or is expected back."""
        return len(self._sessions_at(self._clock())) > 1

    @property
    def dated(self) -> bool:
        """Whether something that waits has a deadline."""
        return any(job.until is not None for job in self._jobs())

    def _jobs(self) -> Iterator[Job[T]]:
        return (job for account in self._accounts.values() for queue in account.waiting for job in queue)

    def next(self, *, anywhere: bool = False) -> list[Job[T]]:
        """Take the batch whose turn it is; empty where there is none, or all that wait have to wait longer.

        Several may be taken, one after the other: of a session there is one piece at a time, and of a tenant one batch,
        as long as others are at work. The caller says `finished` afterwards.

        Args:
            anywhere: Whether to take only what may be done beside whatever else is done.
        """
        now = self._clock()
        self._ripe_at = None
        for account in self._accounts.values():
            account.refill(now)
        self._give_up(now)
        leads = self._leads(now, anywhere=anywhere)
        lowest = min((self._accounts[job.tenant].used for job in leads), default=0.0)
        elsewhere = self._for_first_lane(now) if anywhere else 0
        for lead in leads:
            batch = self._batch(lead, now, elsewhere)
            ripe = self._ripe(batch, now)
            if ripe > now:
                self._ripe_at = ripe if self._ripe_at is None else min(ripe, self._ripe_at)
                continue
            if not self._has_memory(lead.nbytes, elsewhere):
                return []
            for job in batch:
                account = self._accounts[job.tenant]
                account.waiting[0 if job.interactive else 1].remove(job)
                account.running += 1
                self._running[job.owner] = job
                if job.kind is not None and job.kind.opens:
                    self._open.add(job.owner, job.positions)
                elif job.kind is not None and job.kind.closes:
                    self._closing.add(job.owner)
                if account.share.positions_per_second is not None and not job.continues:
                    account.budget -= job.positions
            self._present = max(self._present, lowest)
            self._looked = None
            return batch
        return []

    def take_late(self) -> list[Job[T]]:
        """What cannot keep its deadline any more, and does not wait any longer; each once."""
        self._give_up(self._clock())
        late, self._late = self._late, []
        return late

    def _give_up(self, now: float) -> None:
        late = [job for job in self._jobs() if self._latest_start(job) < now]
        for job in late:
            self._accounts[job.tenant].waiting[0 if job.interactive else 1].remove(job)
        self._late += late
        self._looked = None

    def _latest_start(self, job: Job[T]) -> float:
        """When a piece is given up unless it has begun."""
        return math.inf if job.until is None else max(self._begin_by(job), (job.since + job.until) / 2)

    def _begin_by(self, job: Job[T]) -> float:
        """When a piece has to begin so that it keeps its deadline."""
        if job.until is None or "pace" in self._without:
            return math.inf if job.until is None else job.until
        # By its tenant's own pace: longer sequences take longer for each position, and those of one tenant are not to
        # have another's calls refused. Of one that has computed nothing yet the quickest's is the guess.
        known = self._own_pace.get(job.pace)
        return job.until - job.positions * (known.get(job.tenant, min(known.values())) if known else 0.0)

    def _leads(self, now: float, *, anywhere: bool) -> list[Job[T]]:
        """The pieces that may begin a batch, the one whose turn it is first."""
        by_account = sorted(self._accounts.items(), key=lambda item: item[1].used)
        at_work = self._look(now).at_work
        free = [account for name, account in by_account if at_work.keys() <= {name} or not account.running]
        eager, patient = (
            [
                (account, job)
                for account in free
                for job in account.heads(interactive, self._running)
                if (job.anywhere or not anywhere) and self._has_share(job, at_work, now) and self._fits(job, [], now)
            ]
            for interactive in (True, False)
        )
        lowest = min((account.used for account, _ in (*eager, *patient)), default=0.0)
        leading = [job for account, job in eager if account.used <= lowest + LEAD_SECONDS]
        behind = [job for _, job in eager if job not in leading]
        return [*leading, *(job for _, job in patient), *behind]

    def _batch(self, lead: Job[T], now: float, elsewhere: int) -> list[Job[T]]:
        """What is done together with a piece, so that all keep their deadlines, and `elsewhere` bytes stay free.

        A tenant adds pieces as long as its account, with them, is not ahead of the others that want something: one it
        may add as long as it is not `LEAD_SECONDS` ahead.
        """
        batch = [lead]
        if self._batching is None or lead.kind is None:
            return batch
        waiting = {name: account for name, account in self._accounts.items() if len(account)}
        used = {name: account.used for name, account in waiting.items()}
        self._charge(used, lead)
        at_work = self._look(now).at_work
        pool, part = self._alike(lead, now), self._look(now).part
        mates = self._sessions.mates([lead.owner]) if lead.kind.closes else set()
        if lead.kind.closes:
            pool = [job for job in pool if job.owner in mates or self._is_whole(job, now)]
        while pool:
            job = min(pool, key=lambda each: (used[each.tenant], each.since))
            pool.remove(job)
            more = any(other.tenant == job.tenant for other in batch)
            others = [
                used[name] if name in used else self._standing(name, lifted=not more)
                for name in at_work.keys() - {job.tenant}
            ]
            lowest = min(others, default=used[job.tenant])
            ahead = 0.0 if more else LEAD_SECONDS
            taken = sum(each.positions for each in batch) + job.positions
            soonest = min((each.until for each in (*batch, job) if each.until is not None), default=math.inf)
            in_time = now + self._seconds(taken, lead) <= soonest
            fair = used[job.tenant] <= lowest + ahead
            fitting = taken <= self._largest(batch, part) or job.owner in mates
            nbytes = elsewhere + sum(each.nbytes for each in (*batch, job, *self._running.values()))
            in_memory = nbytes <= self._memory
            if fitting and (fair or job.owner in mates) and in_time and in_memory and self._fits(job, batch, now):
                batch.append(job)
                self._charge(used, job)
        return batch

    def _has_memory(self, nbytes: int, elsewhere: int) -> bool:
        """Whether so many bytes fit beside what is being done, and `elsewhere`; anything does where these are none."""
        taken = elsewhere + sum(job.nbytes for job in self._running.values())
        return not taken or taken + nbytes <= self._memory

    def _for_first_lane(self, now: float) -> int:
        """Bytes of the piece whose turn it is in the first lane, where no other lane may take it."""
        turn = next((job for job in self._leads(now, anywhere=False) if job.nbytes), None)
        return 0 if turn is None or turn.anywhere else turn.nbytes

    def _standing(self, name: str, *, lifted: bool) -> float:
        """A tenant's account; `lifted`, where it would be if a tenant that is away came back now."""
        account = self._accounts[name]
        away = not len(account) and not account.running
        return max(account.used, self._present) if lifted and away else account.used

    def _alike(self, lead: Job[T], now: float) -> list[Job[T]]:
        """What may be done together with a piece, as far as its kind and shares go: the first of each other session."""
        at_work = self._look(now).at_work
        mates = self._sessions.mates([lead.owner])
        return [
            job
            for name, account in self._accounts.items()
            for job in account.heads(lead.interactive, self._running)
            if job.kind is not None
            and lead.kind is not None
            and job.kind.name == lead.kind.name
            and job.owner != lead.owner
            and (not account.running or at_work.keys() <= {name} or (lead.kind.closes and job.owner in mates))
            and self._has_share(job, at_work, now)
        ]

    def _is_whole(self, job: Job[T], now: float) -> bool:
        """Whether all have come that a piece was opened together with, or are not expected."""
        return not self._sessions.expected(now).keys() & self._sessions.mates([job.owner])

    def _look(self, now: float) -> _Look:
        """How things are; looked at once as long as nothing changes, as each piece that waits is weighed by it."""
        if self._looked is None or self._looked[0] != now:
            sessions_at = self._sessions_at(now)
            at_work: dict[str, set[bytes]] = {}
            for owner, known in sessions_at.items():
                at_work.setdefault(known.tenant, set()).add(owner)
            lately = now - (0.0 if self._batching is None else self._batching.window)
            left = {
                owner: 0 if self._is_going(owner) else self._open.positions([owner])
                for owner in self._open.owners()
                if owner in sessions_at or self._sessions.was_answered(owner, lately)
            }
            share = self._room() / max(1, len(at_work))
            beyond = {
                tenant: max(0.0, sum(left.get(owner, 0) for owner in sessions) - share)
                for tenant, sessions in at_work.items()
                if len(sessions) > 1
            }
            part = self._part(sessions_at.values())
            self._looked = now, _Look(at_work, sessions_at.keys(), part, left, sum(left.values()), beyond)
        return self._looked[1]

    def _sessions_at(self, now: float) -> dict[bytes, Job[T] | Answered]:
        """The sessions at work, and of each the piece that waits, or runs, or was answered last."""
        return {**self._sessions.expected(now), **self._running, **{job.owner: job for job in self._jobs()}}

    def _part(self, sessions: Iterable[Job[T] | Answered]) -> float:
        """Token positions that a batch has at most, so that each lane has its part of all that is at work.

        What a tenant with several sessions has counts up to the median of the tenants', by weight: the others' batches
        are not to grow with what one that floods has waiting.
        """
        if self._lanes == 1:
            return math.inf
        wanted: dict[str, list[int]] = {}
        for known in sessions:
            wanted.setdefault(known.tenant, []).append(known.positions)
        weight = {name: self._accounts[name].share.weight for name in wanted}
        median = statistics.median_low(sum(each) / weight[name] for name, each in wanted.items()) if wanted else 0
        counted = (min(sum(each), max([*each, weight[name] * median])) for name, each in wanted.items())
        return LANE_SLACK * sum(counted) / self._lanes

    def _has_share(self, job: Job[T], at_work: Mapping[str, set[bytes]], now: float) -> bool:
        """Whether a piece's tenant, if it has several sessions, with others at work, has time and room left for it."""
        sessions = at_work.get(job.tenant, set())
        if self._batching is None or not job.positions or len(sessions) < 2 or len(at_work) < 2:
            return True
        if job.kind is not None and job.kind.closes and self._open.positions([job.owner]):
            return True
        rests = self._accounts[job.tenant].rests_until > now and "rests" not in self._without
        if rests and not job.interactive:
            return False
        opened = self._open.positions(sessions - {job.owner}) if job.kind is not None and job.kind.opens else 0
        late = now >= job.since + self._batching.window
        return not opened or late or opened + job.positions <= self._room() / len(at_work)

    def _largest(self, batch: list[Job[T]], part: float) -> float:
        """Token positions of a batch at most when one more is added to it, where a lane's `part` is so much."""
        lead = batch[0]
        if self._batching is None or lead.kind is None:
            return math.inf
        largest = min(self._batching.positions, max(lead.positions, part))
        if lead.kind.opens and len(batch) >= self._batching.open_calls // 2:
            largest = min(largest, self._even(part))
        return largest

    def _even(self, part: float) -> float:
        """Token positions of a batch for which there is room; where there is none for a lane's `part`, an even part.

        Of as many batches as it takes for each to have room, with its slack.
        """
        room = max(1.0, self._room())
        if part == math.inf or not part:
            return room
        of_all = part * self._lanes
        return of_all / max(self._lanes, math.ceil(of_all / room))

    def _fits(self, job: Job[T], batch: list[Job[T]], now: float) -> bool:
        """Whether a piece need not wait until others, and those of a batch, have closed what they have opened.

        It waits no longer than `PATIENCE` times what it and a full room would take to compute (than `Batching.window`,
        as long as nothing is known of that), and half of what its deadline leaves, and only as long as others are
        expected by then. What sessions have open that have been silent for the window keeps nobody waiting.
        """
        if self._batching is None or job.kind is None or not job.kind.opens:
            return True
        look = self._look(now)
        own = look.left.get(job.owner)
        if len(look.left) - (own is not None) + len(batch) < self._batching.open_calls:
            return True
        taken = sum(each.positions for each in batch) + look.taken_beside(job.tenant, own or 0)
        if taken + job.positions <= self._room():
            return True
        of_all = self._seconds(round(min(taken, self._room())) + job.positions, job)
        until = job.since + min(PATIENCE * of_all or self._batching.window, (self._begin_by(job) - job.since) / 2)
        return now >= until or not any(
            owner != job.owner
            and owner in look.here
            and (self._sessions.due(owner, now) <= until or not self._sessions.is_away(owner))
            for owner in look.left
        )

    def _is_going(self, owner: bytes) -> bool:
        """Whether what a session has open is being closed, and by all that it was opened together with.

        Else what they share stays.
        """
        mates = self._sessions.mates([owner]) - self._closing
        return owner in self._closing and not self._open.positions(mates)

    def _seconds(self, positions: int, job: Job[T]) -> float:
        """How long so many token positions take, at the pace of a piece; 0 as long as nothing is known of it."""
        return positions * self._per_position.get(job.pace, 0.0)

    def _charge(self, used: dict[str, float], job: Job[T]) -> None:
        used[job.tenant] += self._seconds(job.positions, job) / self._accounts[job.tenant].share.weight

    def _ripe(self, batch: list[Job[T]], now: float) -> float:
        """When a batch has waited long enough."""
        lead = batch[0]
        if self._batching is None or lead.kind is None or lead.interactive or "waiting" in self._without:
            return now
        positions = sum(job.positions for job in batch)
        room = self._largest(batch, self._look(now).part) - positions
        if room <= 0 and not lead.kind.closes:
            return now
        mates = self._sessions.mates(job.owner for job in batch) if lead.kind.closes else None
        coming = self._sessions.coming(lead.kind.name, now, mates)
        if mates is None:
            coming = [each for each in coming if each[1] <= room]
        full = self._seconds(positions + sum(more for _, more in coming), lead)
        if lead.kind.opens and self._without_room(batch, now):
            coming, full = [(now, 0)], math.inf
        until = min(job.since for job in batch) + min(self._batching.window, full)
        until = min(until, *(self._begin_by(job) - MARGIN_SECONDS for job in batch))
        return until if any(moment <= until for moment, _ in coming) else now

    def _without_room(self, batch: list[Job[T]], now: float) -> list[Job[T]]:
        """What would be in a batch if there were room in memory."""
        room = self._largest(batch, self._look(now).part) - sum(job.positions for job in batch)
        alike = (job for job in self._alike(batch[0], now) if job not in batch)
        return [job for job in alike if job.positions <= room and not self._fits(job, batch, now)]

    def ready_at(self) -> float | None:
        """When `next` may have something, if it had nothing just now; None where nothing waits."""
        now = self._clock()
        times = [now + account.overdrawn for account in self._accounts.values() if account.overdrawn and len(account)]
        if self._ripe_at is not None:
            times.append(self._ripe_at)
        times += [start for job in self._jobs() if (start := self._latest_start(job)) < math.inf]
        if any(not self._fits(job, [], now) for job in self._jobs()):
            times.append(now + RETHINK_SECONDS)
        times += [each.rests_until for each in self._accounts.values() if len(each) and each.rests_until > now]
        return min(times, default=now + RETHINK_SECONDS if len(self) and not self._running else None)

    def finished(self, batch: list[Job[T]], seconds: float, failed: Collection[Job[T]] = ()) -> None:
        """Charge a batch that `next` gave, with the time that it has taken, by token positions.

        A piece that has `failed`, or was refused or cancelled, has opened and closed nothing, and its batch says
        nothing of how long a token position takes.
        """
        now = self._clock()
        positions = sum(job.positions for job in batch)
        if positions and batch[0].computes and not failed:
            last, pace = seconds / positions, batch[0].pace
            before = self._per_position.get(pace, last)
            self._per_position[pace] = before + (last - before) * NOVELTY
            known = self._own_pace.setdefault(pace, {})
            for tenant in {job.tenant for job in batch}:
                before = known.get(tenant, last)
                known[tenant] = before + (last - before) * NOVELTY
        here = {job.owner for job in self._jobs()}
        at_work = self._look(now).at_work
        everybody = sum(self._accounts[name].share.weight for name in at_work)
        for job in batch:
            account = self._accounts[job.tenant]
            account.running -= 1
            if self._batching is not None and positions and len(at_work.get(job.tenant, ())) > 1:
                share = min(1.0, account.share.weight * self._lanes / everybody)
                rest = seconds * job.positions / positions * (1 / share - 1)
                account.rests_until = min(max(account.rests_until, now) + rest, now + self._batching.window)
            self._running.pop(job.owner, None)
            self._closing.discard(job.owner)
            if job.kind is not None and job.kind.opens and job in failed:
                self._open.withdraw(job.owner)
            elif job.kind is not None and job.kind.closes and job not in failed:
                self._open.forget(job.owner)
            account.used += (
                seconds * (job.positions / positions if positions else 1 / len(batch)) / account.share.weight
            )
            if job.kind is not None and not job.interactive and job.owner not in here | self._over:
                self._sessions.answered(job.owner, Answered(job.tenant, job.kind.then, now, job.positions))
        if batch[0].kind is not None and batch[0].kind.opens and "closing together" not in self._without:
            self._sessions.together(job.owner for job in batch if job not in failed and job.owner not in self._over)
        self._over.difference_update(job.owner for job in batch)
        if not any(len(each) or each.running for each in self._accounts.values()):
            self._present = max(self._present, *(self._accounts[job.tenant].used for job in batch))
        self._looked = None

    def cancel(self, owner: bytes) -> list[Job[T]]:
        """Take out what waits of one session, which is over."""
        self._sessions.forget(owner)
        self._open.forget(owner)
        if owner in self._running:
            self._over.add(owner)
        gone = [job for job in self._jobs() if job.owner == owner]
        for job in gone:
            self._accounts[job.tenant].waiting[0 if job.interactive else 1].remove(job)
        self._looked = None
        return gone

    def clear(self) -> list[Job[T]]:
        """Take out everything."""
        gone = list(self._jobs())
        for account in self._accounts.values():
            for queue in account.waiting:
                queue.clear()
        self._looked = None
        return gone

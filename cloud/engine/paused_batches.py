"""Calls that may pause, several at once: each goes on until it asks its edge or ends, and they meet at the linears.

A call's *step* is what it computes between two pauses. In a batch the steps of all calls begin together. Whenever each
has enlisted for the products of a group of linears (`isthmus.backbone.runtime.batched_products`), has asked, or has
ended, the place that is furthest behind holds its meeting, and the calls that were there go on. So calls that are
behind catch up, and all go through a layer together where they can. A call that fails leaves, and the others do not
notice; a meeting that fails is held again for each of its calls. The last one that is left computes for itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.backbone.runtime.batched_products import BatchingPartners, ProductBatches, ProductRequest, Products
from isthmus.cloud.engine.paused_calls import Pause, PausingCall
from isthmus.cloud.engine.requests import Kind
from isthmus.protocol import messages as m

Asked = m.SiteQuestion | ProductRequest
Answered = m.SiteAnswer | Products | RuntimeError
SitedCall = PausingCall[Asked, Answered, m.Message]
Outcome = Pause[Asked] | m.Message


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a call computes until it asks again, or ends.

    Attributes:
        number: The call's.
        call: The call.
        company: How it meets others; None for a call that never does.
        answer: The edge's answer to its last question; None for the first step.
        since_ns: How long it had computed before.
    """

    number: int
    call: SitedCall
    company: BatchingPartners | None
    answer: m.SiteAnswer | None
    since_ns: int

    def resume(self, answer: Answered | None, *, beside: bool) -> Outcome:
        """Let the call go on, `beside` others or by itself. Raises what it raises."""
        if self.company is not None:
            self.company.present = beside
        return self.call.resume(answer)


def take_steps(steps: Sequence[Step], meetings: ProductBatches) -> list[Outcome | Exception]:
    """Take steps of different calls, all of which may meet; what comes of each, or its error, in the same order."""
    outcomes: dict[int, Outcome | Exception] = {}
    enlisted: dict[int, ProductRequest] = {}
    ready: list[tuple[int, Answered | None]] = [(at, step.answer) for at, step in enumerate(steps)]
    while ready:
        for at, answer in ready:
            outcome = _outcome(steps[at], answer, beside=len(steps) - len(outcomes) > 1)
            if isinstance(outcome, Pause) and isinstance(outcome.question, ProductRequest):
                enlisted[at] = outcome.question
            else:
                outcomes[at] = outcome
        ready = list(_meeting(steps, enlisted, meetings).items())
    return [outcomes[at] for at in range(len(steps))]


def _outcome(step: Step, answer: Answered | None, *, beside: bool) -> Outcome | Exception:
    try:
        return step.resume(answer, beside=beside)
    except Exception as error:  # noqa: BLE001  # it is this call's, and no other's
        return error.with_traceback(None)  # whose frames hold its tensors, while the others need the memory
    except BaseException as error:  # noqa: BLE001  # the others have begun, and go on
        return RuntimeError(f"a call ended with {type(error).__name__}")


def _meeting(
    steps: Sequence[Step], enlisted: dict[int, ProductRequest], meetings: ProductBatches
) -> dict[int, Answered]:
    """Take those who are furthest behind out of `enlisted`; returns what each of them gets."""
    if not enlisted:
        return {}
    place = min(enlisted.values(), key=lambda each: each.order).key
    here = [at for at, each in enlisted.items() if each.key == place]
    parties = [enlisted.pop(at) for at in here]
    start = time.perf_counter_ns()
    products = _products(parties, meetings)
    spent = time.perf_counter_ns() - start
    rows = [party.n_rows for party in parties]
    for at, count in zip(here, rows, strict=True):
        steps[at].call.busy_ns += spent * count // sum(rows)
    return dict(zip(here, products, strict=True))


def _products(parties: Sequence[ProductRequest], meetings: ProductBatches) -> Sequence[Products | RuntimeError]:
    """What each party gets: of a meeting of all, or, where that fails, of one for itself, which may fail again."""
    try:
        return meetings.compute(parties)
    except Exception as error:  # noqa: BLE001  # out of memory, or whatever a kernel raises; each party gets its own
        if len(parties) == 1:
            return [RuntimeError(f"a product failed: {error}")]
    return [_products([party], meetings)[0] for party in parties]  # here, as the error would hold the meeting's tensors


# Which steps are taken together ---------------------------------------------------------------------------------------

FORWARD, BACKWARD = "sites forward", "sites backward"


def first_kind(message: m.Forward | m.Backward) -> Kind:
    """That of a call's first step."""
    return Kind(FORWARD if isinstance(message, m.Forward) else BACKWARD)


def next_kind(phase: m.SitePhase, place: int) -> Kind:
    """That of the step that comes after a question.

    Args:
        phase: The question's.
        place: Where it was asked, one of the places where the call pauses.
    """
    return Kind(f"{FORWARD if phase in (m.SitePhase.FORWARD, m.SitePhase.AGAIN) else BACKWARD} {place}")

"""Steps of several calls with sites in one batch: the products of the frozen linears are computed for all at once.

A *step* is what a call computes between two questions to its edge. The steps of a batch begin at the same time. Each
call runs until it requests the products of a group of linears (`isthmus.backbone.runtime.batched_products`), asks its
edge, or ends. When all calls wait, the requests for the earliest group in the model are computed as one batch, and
those calls go on. So calls that are behind catch up with the others, and they share the layers that follow.

A call that fails leaves the batch, and the others go on. If a batch of products fails, each of its requests is computed
by itself. The last call of a batch computes its products itself.
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
        partners: Tells the call whether others share its batch; None for a call that computes for itself.
        answer: The edge's answer to its last question; None for the first step.
        since_ns: How long it had computed before.
    """

    number: int
    call: SitedCall
    partners: BatchingPartners | None
    answer: m.SiteAnswer | None
    since_ns: int

    def resume(self, answer: Answered | None, *, beside: bool) -> Outcome:
        """Let the call go on, `beside` others or by itself. Raises what it raises."""
        if self.partners is not None:
            self.partners.present = beside
        return self.call.resume(answer)


def take_steps(steps: Sequence[Step], batches: ProductBatches) -> list[Outcome | Exception]:
    """Take steps of different calls, which share products where they can.

    Returns:
        What comes of each step, or its error, in the same order.
    """
    outcomes: dict[int, Outcome | Exception] = {}
    waiting: dict[int, ProductRequest] = {}
    ready: list[tuple[int, Answered | None]] = [(at, step.answer) for at, step in enumerate(steps)]
    while ready:
        for at, answer in ready:
            outcome = _outcome(steps[at], answer, beside=len(steps) - len(outcomes) > 1)
            if isinstance(outcome, Pause) and isinstance(outcome.question, ProductRequest):
                waiting[at] = outcome.question
            else:
                outcomes[at] = outcome
        ready = list(_compute_earliest(steps, waiting, batches).items())
    return [outcomes[at] for at in range(len(steps))]


def _outcome(step: Step, answer: Answered | None, *, beside: bool) -> Outcome | Exception:
    try:
        return step.resume(answer, beside=beside)
    except Exception as error:  # noqa: BLE001  # it is this call's, and no other's
        return error.with_traceback(None)  # whose frames hold its tensors, while the others need the memory
    except BaseException as error:  # noqa: BLE001  # the others have begun, and go on
        return RuntimeError(f"a call ended with {type(error).__name__}")


def _compute_earliest(
    steps: Sequence[Step], waiting: dict[int, ProductRequest], batches: ProductBatches
) -> dict[int, Answered]:
    """Compute the waiting requests for the earliest group, and take them out of `waiting`; returns their products."""
    if not waiting:
        return {}
    place = min(waiting.values(), key=lambda each: each.order).key
    here = [at for at, each in waiting.items() if each.key == place]
    requests = [waiting.pop(at) for at in here]
    start = time.perf_counter_ns()
    products = _products(requests, batches)
    spent = time.perf_counter_ns() - start
    rows = [request.n_rows for request in requests]
    for at, count in zip(here, rows, strict=True):
        steps[at].call.busy_ns += spent * count // sum(rows)
    return dict(zip(here, products, strict=True))


def _products(requests: Sequence[ProductRequest], batches: ProductBatches) -> Sequence[Products | RuntimeError]:
    """The products of each request: of all as one batch, or, if that fails, of each by itself, which may fail again."""
    try:
        return batches.compute(requests)
    except Exception as error:  # noqa: BLE001  # out of memory, or whatever a kernel raises; each request has its own
        if len(requests) == 1:
            return [RuntimeError(f"a product failed: {error}")]
    return [
        _products([request], batches)[0] for request in requests
    ]  # here, as the error would hold the batch's tensors


# Which steps may share a batch ----------------------------------------------------------------------------------------

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

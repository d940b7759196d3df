from __future__ import annotations

import itertools
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

from isthmus.backbone.plan import Span, SplitPlan
from isthmus.common.errors import PlanError


@given(n_layers=st.integers(1, 200), bottom=st.integers(0, 200), top=st.integers(0, 200))
def test_a_plan_gives_every_layer_to_one_party_or_refuses(n_layers: int, bottom: int, top: int) -> None:
    if bottom + top >= n_layers:
        with pytest.raises(PlanError, match=f"{bottom}:{top}.*{n_layers} layers"):
            SplitPlan(n_layers, bottom, top)
        return
    plan = SplitPlan(n_layers, bottom, top)
    assert sorted((*plan.edge_layers, *plan.cloud)) == list(range(n_layers))
    assert len(plan.cloud) >= 1
    assert SplitPlan.parse(str(plan), n_layers) == plan


@pytest.mark.parametrize("text", ["", "2", "2:", ":2", "2:2:2", "-1:2", "a:b", "2.0:2", "9999999:1"])
def test_what_is_no_plan_is_named_in_the_error(text: str) -> None:
    with pytest.raises(PlanError, match="BOTTOM:TOP") as caught:
        SplitPlan.parse(text, 30)
    assert repr(text) in str(caught.value)


def test_negative_numbers_and_backward_spans_are_refused() -> None:
    with pytest.raises(PlanError, match="-1:0"):
        SplitPlan(4, -1, 0)
    with pytest.raises(PlanError, match="3:2"):
        Span(3, 2)


@pytest.mark.parametrize(("layers", "count"), [(3, 1), (3, 2), (3, 3), (26, 4)])
def test_stages_are_all_layers_once_and_about_as_long(layers: int, count: int) -> None:
    stages = Span(2, 2 + layers).cut(count)
    assert list(itertools.chain(*stages)) == list(range(2, 2 + layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


@pytest.mark.parametrize("count", [0, 4])
def test_more_stages_than_layers_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="choose 1 to 3"):
        Span(2, 5).cut(count)


def test_a_span_behaves_like_a_run_of_layers() -> None:
    span = Span(2, 5)
    assert (len(span), list(span), str(span)) == (3, [2, 3, 4], "2:5")
    assert 2 in span
    assert 5 not in span
    assert "2" not in span


def test_errors_survive_pickling() -> None:
    with pytest.raises(PlanError) as caught:
        SplitPlan(4, 2, 2)
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  (made one line above)
    assert (type(copy), str(copy)) == (PlanError, str(caught.value))


def test_plans_and_sources_need_no_torch() -> None:
    code = (
        "import sys, isthmus.backbone.plan, isthmus.backbone.families, isthmus.backbone.checkpoints.sources; "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

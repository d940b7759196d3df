"""Forward-only tuning: its arithmetic, what it leaves as it was, and that the wire carries nothing back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from support.models.small_training import Wire, config, data, trainer, weights
from support.models.tiny import tiny_checkpoint
from support.run_folders import losses, same
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import NonFiniteError, UnreachableError
from isthmus.edge.client.remote_span import BackwardRequest, ForwardRequest, RemoteSpan
from isthmus.edge.config.schedule import learning_rate
from isthmus.edge.data.batches import Batches, label_count
from isthmus.edge.training.methods import build_peft, trained
from isthmus.edge.training.mezo import Mezo


def options(out: Path, **values: Any) -> Any:
    return config(out, **{"optimizer": "mezo", "dropout": 0.0, **values})


def direction_seed(seed: int, step: int) -> int:
    return random.Random(f"mezo/{seed}/{step}").getrandbits(63)  # noqa: S311  # noise, not a secret


# Against a loop written by hand ---------------------------------------------------------------------------------------


def test_three_steps_equal_a_loop_written_by_hand(model_folder: Path, tmp_path: Path) -> None:
    settings = options(tmp_path, steps=3, batch=2, accumulate=2, seed=7, weight_decay=0.1, max_grad_norm=0.0)
    run = trainer(model_folder, settings)
    run.fit()

    model = build_peft(AutoModelForCausalLM.from_pretrained(model_folder), settings).eval()
    parameters = list(trained(model).values())
    batches = list(Batches(data().train, 2, 0, 7).epoch(0))
    micro = [batches[0:2], batches[2:4], batches[4:5]]  # nine examples: the epoch's last step has one of one example
    seen = []
    for step in (1, 2, 3):
        generator = torch.Generator().manual_seed(direction_seed(7, step))
        directions = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]
        start = [parameter.detach().clone() for parameter in parameters]
        measured = []
        for sign in (1, -1):
            labels, total = sum(label_count(batch) for batch in micro[step - 1]), 0.0
            with torch.no_grad():
                for parameter, value, z in zip(parameters, start, directions, strict=True):
                    parameter.copy_(torch.add(value, z, alpha=sign * 1e-3))
                for batch in micro[step - 1]:
                    total += model(**batch, use_cache=False).loss.item() * (label_count(batch) / labels)
            measured.append(total)
        slope = (measured[0] - measured[1]) / 2e-3
        rate = learning_rate(settings, step - 1, 3)
        with torch.no_grad():
            for parameter, value, z in zip(parameters, start, directions, strict=True):
                parameter.copy_(torch.add(value * (1 - rate * 0.1), z, alpha=-rate * slope))
        seen.append((sum(measured) / 2, abs(slope)))
    assert [(line["loss"], line["grad_norm"]) for line in losses(tmp_path)] == seen
    assert same(weights(run.model), weights(model))


# One step on a function that is known ---------------------------------------------------------------------------------


class Known:
    """Stands for the loss: a function of the parameters, which may fail at one of its calls."""

    def __init__(self, function: Callable[[], Tensor], fail_at: int = -1) -> None:
        self._function, self._fail_at, self.calls = function, fail_at, 0

    def over(self, step: int, batches: Sequence[Any]) -> float:
        self.calls += 1
        if self.calls == self._fail_at:
            raise UnreachableError("away.")
        assert not torch.is_grad_enabled()
        return float(self._function())


def mezo(parameters: list[nn.Parameter], loss: Known, **values: Any) -> Mezo:
    return Mezo(parameters, options(Path("x"), **{"max_grad_norm": 0.0, **values}), loss)  # type: ignore[arg-type]  # a double


def moved(seed: int, step: int) -> Tensor:
    """Where a step of size one along a slope of one goes from zero: minus its direction."""
    weight = nn.Parameter(torch.zeros(50))
    rule = mezo([weight], Known(lambda: weight @ torch.ones(50)), seed=seed)
    _, norm = rule.measure(step, [])
    rule.apply(1 / norm)
    return weight.detach()


@given(st.integers(0, 2**63 - 1), st.integers(1, 10**6), st.floats(1e-3, 0.1), st.integers(1, 40))
def test_a_step_follows_the_slope_and_measuring_leaves_no_trace(seed: int, step: int, eps: float, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    first, second = (nn.Parameter(torch.randn(size, generator=generator)) for _ in range(2))
    start = [first.detach().clone(), second.detach().clone()]
    loss = Known(lambda: (first.double() ** 2).sum() / 2 + second.double().sum())
    rule = mezo([first, second], loss, seed=seed, mezo_eps=eps)
    value, norm = rule.measure(step, [])
    assert loss.calls == 2
    assert torch.equal(first, start[0])
    assert torch.equal(second, start[1])
    rule.apply(0.5)
    steps = [(now.detach() - before) for now, before in zip((first, second), start, strict=True)]
    # Of a quadratic function, the slope is the gradient's projection exactly, and the step is -rate · slope · z.
    z = [torch.randn(size, generator=g) for g in [torch.Generator().manual_seed(direction_seed(seed, step))] * 2]
    slope = float(start[0] @ z[0] + z[1].sum())
    assert norm == pytest.approx(abs(slope), rel=1e-2, abs=1e-2)
    for moved_by, direction in zip(steps, z, strict=True):
        torch.testing.assert_close(moved_by, -0.5 * slope * direction, rtol=2e-2, atol=2e-2)
    assert value == pytest.approx(float((start[0] ** 2).sum() / 2 + start[1].sum()), abs=eps**2 * size * 10 + 1e-3)


def test_every_step_and_every_seed_has_its_own_direction() -> None:
    assert torch.equal(moved(1, 1), moved(1, 1))
    for other in (moved(1, 2), moved(2, 1), moved(11, 1)):
        cosine = torch.nn.functional.cosine_similarity(moved(1, 1), other, dim=0)
        assert abs(float(cosine)) < 0.6


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_forward_that_fails_leaves_the_parameters(fail_at: int) -> None:
    weight = nn.Parameter(torch.randn(20))
    start = weight.detach().clone()
    with pytest.raises(UnreachableError):
        mezo([weight], Known(lambda: weight.sum(), fail_at)).measure(1, [])
    assert torch.equal(weight, start)


def test_a_steep_slope_is_cut_off() -> None:
    weight = nn.Parameter(torch.zeros(50))
    steps = {}
    for limit in (0.0, 3.0, 1e9):
        with torch.no_grad():
            weight.zero_()
        rule = mezo([weight], Known(lambda: 1000 * weight.sum()), max_grad_norm=limit)
        _, norm = rule.measure(1, [])
        rule.apply(0.1)
        steps[limit] = weight.detach().clone()
    assert norm > 100
    assert torch.equal(steps[0.0], steps[1e9])
    torch.testing.assert_close(steps[3.0], steps[0.0] * 3 / norm)


def test_a_slope_that_is_not_finite() -> None:
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(NonFiniteError, match=r"step 4 have the slope nan.*--learning-rate"):
        mezo([weight], Known(lambda: weight.sum() * math.nan)).measure(4, [])
    assert torch.equal(weight, torch.ones(3))


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "vera", "prompt", "bottleneck", "full"])
def test_the_loss_goes_down(model_folder: Path, tmp_path: Path, method: str) -> None:
    rates = {"vera": 3e-1, "full": 3e-4}
    settings = options(
        tmp_path, method=method, steps=60, batch=9, schedule="constant", learning_rate=rates.get(method, 5e-3)
    )
    report = trainer(model_folder, settings).fit().report
    log = losses(tmp_path)
    assert sum(line["loss"] for line in log[-10:]) < sum(line["loss"] for line in log[:10])
    assert report.train_loss_last < report.train_loss_first


def unreachable() -> None:
    raise UnreachableError("away.")


def test_a_resumed_run_equals_an_undisturbed_one(model_folder: Path, tmp_path: Path) -> None:
    straight = trainer(model_folder, options(tmp_path / "straight"))
    straight.fit()
    with pytest.raises(UnreachableError, match="checkpoint-4"):
        trainer(model_folder, options(tmp_path / "broken"), Wire("begin", 5, unreachable)).fit()
    assert load_file(tmp_path / "broken" / "checkpoint-4" / "optimizer.safetensors") == {}
    resumed = trainer(model_folder, options(tmp_path / "broken", resume=True), Wire())
    resumed.fit()
    assert same(weights(resumed.model), weights(straight.model))
    assert (tmp_path / "broken" / "losses.jsonl").read_text() == (tmp_path / "straight" / "losses.jsonl").read_text()


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_good_state(model_folder: Path, tmp_path: Path) -> None:
    straight = trainer(model_folder, options(tmp_path / "straight"))
    straight.fit()
    run = trainer(model_folder, options(tmp_path / "poisoned"))
    calls = []

    def poison(module: Any, inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * math.nan if len(calls) == 10 else output  # one evaluation, four steps, half of the fifth

    run.model.get_base_model().lm_head.register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match=r"the loss of step 5 is nan: lower --learning-rate.*checkpoint-4"):
        run.fit()
    resumed = trainer(model_folder, options(tmp_path / "poisoned", resume=True))
    resumed.fit()
    assert same(weights(resumed.model), weights(straight.model))


def test_nothing_drops_out(tmp_path: Path) -> None:
    """GPT-2 has dropout of its own: under it, the two losses of a step would differ for another reason."""
    folder = tiny_checkpoint("gpt2", tmp_path / "model", n_layer=2)
    run = trainer(folder, options(tmp_path / "run", steps=2))
    modes = []
    run.model.get_base_model().lm_head.register_forward_hook(lambda module, *_: modes.append(module.training))
    run.fit()
    assert modes
    assert not any(modes)


class Recording:
    """A link over a real span that writes down what is asked of it."""

    def __init__(self, span: Callable[..., Tensor]) -> None:
        self._span, self.kept = span, []  # type: ignore[var-annotated]  # of booleans

    def forward(self, request: ForwardRequest) -> tuple[Tensor, None]:
        self.kept.append(request.keep)
        inputs = request.inputs
        return self._span(inputs.hidden, inputs.attention_mask, inputs.position_ids), None

    def backward(self, request: BackwardRequest) -> Tensor:
        raise AssertionError("a forward-only run went backward")


def test_the_cloud_keeps_nothing_and_sees_two_forwards_a_micro_batch(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "model", num_hidden_layers=4)
    plan = SplitPlan.parse("1:1", 4)
    link = Recording(load_span(folder, plan))
    settings = options(tmp_path / "split", steps=2, batch=2, accumulate=2)
    split = build_peft(load_edge_parts(folder, plan, RemoteSpan(link)), settings)
    run = trainer(folder, settings, model=split, span_parameters=10)
    report = run.fit().report
    assert len(link.kept) == 2 + 2 * 2 * 2  # an evaluation before and after, two steps of two micro-batches
    assert not any(link.kept)

    settings = options(tmp_path / "whole", steps=2, batch=2, accumulate=2)
    tuned = build_peft(AutoModelForCausalLM.from_pretrained(folder), settings, layers=plan.edge_layers)
    whole = trainer(folder, settings, model=tuned)
    other = whole.fit().report
    assert same(weights(split), weights(tuned))
    # Two forwards cost what a forward and a backward to the inputs do; no weight has a gradient.
    assert report.cloud_flops == 40 * report.positions
    assert other.edge_flops % (4 * report.positions) == 0
    assert report.trained_parameters == sum(weight.numel() for weight in weights(split).values())

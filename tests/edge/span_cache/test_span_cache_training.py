"""Training through a span cache: the same losses and gradients, without the calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models.tiny import tiny_checkpoint
from torch import Tensor, nn

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import UnsupportedCallError
from isthmus.edge.data.batches import Batch, Batches, Encoded
from isthmus.edge.span_cache.span_cache import CachedSpan, SpanIdentity, cached_span

IDENTITY = SpanIdentity("d1", "2:2", "fp32", "sdpa", "fp32", "fp32")

# What the length of a batch changes in a matrix product at fp32, relative to the largest number.
ROUNDING = 1e-5


class Asked:
    """A span that counts what it is asked."""

    def __init__(self, span: Callable[..., Tensor]) -> None:
        self.calls: list[Tensor] = []
        self._span = span

    def __call__(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        assert not hidden.requires_grad
        self.calls.append(hidden)
        return self._span(hidden, mask, positions)


class Run:
    """A tiny split model with LoRA on its top layers, and the calls of its span."""

    def __init__(self, folder: Path, plan: str = "2:2", *, dropout: float = 0.0) -> None:
        torch.set_num_threads(1)
        cut = SplitPlan.parse(plan, 6)
        self.asked = Asked(load_span(folder, cut))
        edge = load_edge_parts(folder, cut, self.asked)
        for module in edge.modules():
            if isinstance(module, nn.Dropout):  # GPT-2 has some
                module.p = 0.0
        torch.manual_seed(0)
        targets = "c_attn" if edge.config.model_type == "gpt2" else "q_proj"
        lora = LoraConfig(
            r=2,
            target_modules=[targets],
            layers_to_transform=list(range(cut.cloud.stop, 6)),
            lora_dropout=dropout,
            init_lora_weights=False,
            fan_in_fan_out=targets == "c_attn",
        )
        self.edge = edge
        self.model = get_peft_model(edge, lora).train()

    def gradients(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Loss, and the gradients of what is trained."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        loss = self.model(**batch, use_cache=False).loss
        return loss.detach(), list(torch.autograd.grad(loss, trained))

    def cached(self, folder: Path) -> AbstractContextManager[CachedSpan]:
        return cached_span(self.model, folder, IDENTITY, max_bytes=1 << 24)


def assert_same(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]], bound: float) -> None:
    assert abs(ours[0] - theirs[0]) <= bound * abs(theirs[0])
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert float((mine - other).abs().max()) <= bound * float(other.abs().max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny_checkpoint(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def examples(n: int = 7) -> list[Encoded]:
    rows = [tuple((7 * i + 3 * j + i * j) % 250 + 5 for j in range(6 + 5 * i % 17)) for i in range(n)]
    return [Encoded(row, (-100, *row[1:])) for row in rows]


def left(batch: Batch) -> Batch:
    """The same batch, padded on its left."""
    shifts = [int((row == 0).sum()) for row in batch["attention_mask"]]
    return {
        name: torch.stack([row.roll(shift) for row, shift in zip(tensor, shifts, strict=True)])
        for name, tensor in batch.items()
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("family", "plan"), [("llama", "0:2"), ("llama", "2:2"), ("gpt2", "0:2"), ("gpt2", "2:2"), ("gemma3_text", "1:3")]
)
def test_loss_and_gradients_are_those_of_an_uncached_run(
    folders: Callable[[str], Path], tmp_path: Path, family: str, plan: str, side: str
) -> None:
    plain, run = Run(folders(family), plan), Run(folders(family), plan)
    batches = list(Batches(examples(), 3, 0, seed=1).epoch(0))
    batches = batches if side == "right" else [left(batch) for batch in batches]
    with run.cached(tmp_path) as cached:
        for epoch in (1, 2):
            for batch in batches:
                ours, theirs = run.gradients(batch), plain.gradients(batch)
                assert torch.equal(ours[0], theirs[0])
                assert all(map(torch.equal, ours[1], theirs[1]))
            assert len(run.asked.calls) == 3, epoch
        assert (cached.stats().hits, cached.stats().misses) == (7, 7)


@pytest.mark.parametrize("plan", ["0:2", "2:2"])
def test_shuffled_epochs_ask_nothing_from_the_second_on(
    folders: Callable[[str], Path], tmp_path: Path, plan: str
) -> None:
    plain, run = Run(folders("llama"), plan), Run(folders("llama"), plan)
    batches = Batches(examples(), 3, 0, seed=1)
    with run.cached(tmp_path) as cached:
        for epoch in range(4):
            for batch in batches.epoch(epoch):
                assert_same(run.gradients(batch), plain.gradients(batch), ROUNDING)
        assert len(run.asked.calls) == 3
        assert cached.stats().hits == 21
    again = Run(folders("llama"), plan)
    with again.cached(tmp_path):  # a resumed run finds them too
        again.gradients(next(batches.epoch(4)))
    assert not again.asked.calls


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_that_come_in_with_others_are_computed_as_well(
    folders: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    plain, run = Run(folders(family), "0:2"), Run(folders(family), "0:2")
    rows = examples()
    with run.cached(tmp_path):
        for batch in (*Batches(rows[:2], 2, 0).epoch(), *Batches(rows, 5, 0).epoch()):
            for padded_batch in (batch, left(batch)):
                assert_same(run.gradients(padded_batch), plain.gradients(padded_batch), ROUNDING)
    assert [len(call) for call in run.asked.calls] == [2, 3, 2]


def test_learned_positions_below_the_cut_tell_rows_apart(folders: Callable[[str], Path], tmp_path: Path) -> None:
    plain, run = Run(folders("gpt2")), Run(folders("gpt2"))
    batch = next(Batches(examples(), 3, 0).epoch())
    moved = left(batch)  # without position ids, GPT-2 counts from the padding's start
    assert abs(plain.gradients(batch)[0] - plain.gradients(moved)[0]) > 1e-2
    with run.cached(tmp_path):
        for padded_batch in (batch, moved):
            assert_same(run.gradients(padded_batch), plain.gradients(padded_batch), ROUNDING)


def test_dropout_above_the_cut_is_as_random_as_before(folders: Callable[[str], Path], tmp_path: Path) -> None:
    plain, run = (Run(folders("llama"), dropout=0.5) for _ in range(2))
    batch = next(Batches(examples(), 3, 0).epoch())
    torch.manual_seed(5)
    theirs = [plain.gradients(batch) for _ in range(2)]
    torch.manual_seed(5)
    with run.cached(tmp_path):
        ours = [run.gradients(batch) for _ in range(2)]
    assert all(torch.equal(mine[0], other[0]) for mine, other in zip(ours, theirs, strict=True))
    assert ours[0][0] != ours[1][0]


def test_rows_below_bottom_layers_are_known_by_what_goes_into_the_model(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    run = Run(folders("gpt2"), "2:2")
    ids = torch.tensor([[5, 6, 7, 8]])
    kinds = torch.tensor([[0, 1, 1, 0]])
    with torch.no_grad(), run.cached(tmp_path) as cached:
        run.model(input_ids=ids)
        run.model(ids)
        assert len(run.asked.calls) == 1
        run.model(inputs_embeds=run.edge.get_input_embeddings()(ids))
        run.model(input_ids=ids, position_ids=torch.arange(4)[None] + 3)
        assert len(run.asked.calls) == 3
        # Something else than tokens and positions: then the hidden states themselves tell.
        without = run.model(input_ids=ids).logits
        assert not torch.equal(run.model(input_ids=ids, token_type_ids=kinds).logits, without)
        run.model(input_ids=ids, token_type_ids=kinds)
        assert len(run.asked.calls) == 4
        assert cached.stats().rows == 4


def test_other_weights_below_the_cut_are_another_owners(folders: Callable[[str], Path], tmp_path: Path) -> None:
    run = Run(folders("llama"), "2:2")
    batch = next(Batches(examples(), 3, 0).epoch())
    for change in (0.0, 0.5, 0.0):
        with torch.no_grad():
            run.edge.model.layers[1].mlp.up_proj.weight[0, 0] += change
        with run.cached(tmp_path) as cached:
            run.gradients(batch)
            assert cached.stats().misses == (3 if change or not run.asked.calls[1:] else 0)
    assert len(run.asked.calls) == 2


def test_after_the_block_the_model_is_as_before(folders: Callable[[str], Path], tmp_path: Path) -> None:
    run = Run(folders("llama"))
    hooks = len(run.edge.model._forward_hooks), len(run.edge.model._forward_pre_hooks)
    batch = next(Batches(examples(), 3, 0).epoch())

    def interrupted() -> None:
        with run.cached(tmp_path) as cached:
            assert run.edge.remote_layers.span is cached
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert run.edge.remote_layers.span is run.asked
    assert (len(run.edge.model._forward_hooks), len(run.edge.model._forward_pre_hooks)) == hooks
    run.gradients(batch)
    assert len(run.asked.calls) == 1
    with run.cached(tmp_path):  # the folder is free again
        pass


# enable_input_require_grads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("plan", ["0:2", "2:2"])
def test_input_gradients_are_warned_about_and_cost_no_backward(
    folders: Callable[[str], Path], tmp_path: Path, plan: str, when: str
) -> None:
    plain, run = Run(folders("llama"), plan), Run(folders("llama"), plan)
    batch = next(Batches(examples(), 3, 0).epoch())
    with ExitStack() as stack:
        if when == "before":
            run.model.enable_input_require_grads()
            with pytest.warns(UserWarning, match="enable_input_require_grads"):
                stack.enter_context(run.cached(tmp_path))
            first = run.gradients(batch)
        else:
            stack.enter_context(run.cached(tmp_path))
            run.model.enable_input_require_grads()
            with pytest.warns(UserWarning, match="enable_input_require_grads"):
                first = run.gradients(batch)
        theirs = plain.gradients(batch)
        for ours in (first, run.gradients(batch)):  # without another warning
            assert torch.equal(ours[0], theirs[0])
            assert all(map(torch.equal, ours[1], theirs[1]))
    assert len(run.asked.calls) == 1  # `Asked` takes no input that wants a gradient


def test_input_gradients_hide_nothing_trainable(folders: Callable[[str], Path], tmp_path: Path) -> None:
    run = Run(folders("llama"))
    batch = next(Batches(examples(), 3, 0).epoch())
    with run.cached(tmp_path):
        run.model.enable_input_require_grads()
        run.edge.model.layers[1].mlp.up_proj.weight.requires_grad_()
        with pytest.raises(UnsupportedCallError, match=r"layers\.1\.mlp\.up_proj\.weight is trainable"):
            run.gradients(batch)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_works(folders: Callable[[str], Path], tmp_path: Path, reentrant: bool) -> None:
    plain, run = Run(folders("llama")), Run(folders("llama"))
    batch = next(Batches(examples(), 3, 0).epoch())
    run.edge.activation_checkpointing_enable({"use_reentrant": reentrant})  # switches input gradients on
    with ExitStack() as stack:
        with pytest.warns(UserWarning, match="enable_input_require_grads"):
            stack.enter_context(run.cached(tmp_path))
        trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        for _ in range(2):
            run.model.zero_grad()
            run.model(**batch, use_cache=False).loss.backward()
            for parameter, expected in zip(trained, plain.gradients(batch)[1], strict=True):
                assert parameter.grad is not None
                assert torch.equal(parameter.grad, expected)
    assert len(run.asked.calls) == 1

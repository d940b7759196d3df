"""Adapters inside the cloud's layers over a link in memory.

What a user does with PEFT on the split model ends, bit for bit, in what a single process would have; whatever breaks on
the way.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.clouds import served
from support.cloud.memory_cloud import (
    CUT,
    Fault,
    FaultyTransport,
    MemoryCloud,
    MemoryTransport,
    flip,
    messages,
    new_link,
)
from support.models.tiny import HIDDEN, VOCAB, tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters.layer_adapters import add_bottlenecks
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.site_calls import MAX_PAUSED
from isthmus.common.errors import NonFiniteError, RefusedError, RemoteProtocolError
from isthmus.edge.client import session_keeper
from isthmus.edge.client.site_answerer import SiteAnswerer
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Role, encode

pytestmark = pytest.mark.usefixtures("no_waiting", "own_cache")

Run = tuple[list[float], dict[str, Tensor]]
Q_AND_V = ["q_proj", "v_proj"]
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def whole(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False  # as on the edge
    return model


def lora(targets: Any = Q_AND_V, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **options)


def adapted(model: Any, config: peft.PeftConfig | None = None) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, copy.deepcopy(config) or lora(lora_dropout=0.1))  # PEFT writes into it


def batch(seed: int, rows: int = 2, length: int = 8) -> dict[str, Tensor]:
    """Padded on the left, the padding not trained on."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(model: Any, between: Callable[[], None] = lambda: None, steps: int = 3, accumulate: int = 1) -> Run:
    """Losses of AdamW steps, and the trained parameters after them; `between` comes before each backward."""
    torch.manual_seed(7)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, foreach=False)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(model(**batch(accumulate * step + n), use_cache=False).loss for n in range(accumulate))
        between()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses, {name: p.detach().clone() for name, p in trained.items()}


def assert_same(mine: Run, theirs: Run) -> None:
    assert mine[0] == theirs[0]
    assert mine[1].keys() == theirs[1].keys()
    assert not [name for name, value in mine[1].items() if not torch.equal(value, theirs[1][name])]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Run:
    """LoRA with dropout on every layer, in one process."""
    return train(adapted(whole(folder)))


# Training -------------------------------------------------------------------------------------------------------------


def test_training_equals_a_single_process(cloud: MemoryCloud, undisturbed: Run) -> None:
    link = new_link(cloud)
    assert_same(train(adapted(link.load_model())), undisturbed)
    assert len(messages(cloud, m.Sites)) == 1
    assert len(messages(cloud, m.SiteAnswer)) == 3 * 2 * 2  # steps, directions, layers
    assert link.traffic.retries == 0
    assert cloud.served.executor.cache.used == 0


@pytest.mark.parametrize(
    "config",
    [
        lora(EVERY_LINEAR, lora_dropout=0.1),
        lora(layers_to_transform=[3]),
        lora(layers_to_transform=[2, 3]),
        lora(["down_proj"], layers_to_transform=[0, 3]),
        lora("all-linear", use_rslora=True, rank_pattern={"down_proj": 2}),
        lora(r".*\.(2\.self_attn\.q_proj|3\.mlp\.gate_proj|5\.mlp\.up_proj)"),
    ],
    ids=["every linear", "last", "interior only", "below and inside", "all-linear", "by name"],
)
def test_wherever_the_adapters_are(cloud: MemoryCloud, folder: Path, config: peft.LoraConfig) -> None:
    split = adapted(new_link(cloud).load_model(), config)
    assert_same(train(split, steps=2), train(adapted(whole(folder), config), steps=2))


def test_where_nothing_below_is_trained_no_gradient_comes_back(cloud: MemoryCloud) -> None:
    train(adapted(new_link(cloud).load_model(), lora(layers_to_transform=[2, 3])), steps=1)
    assert [each.wanted for each in messages(cloud, m.Forward)] == [False]
    assert [each.wanted for each in messages(cloud, m.Backward)] == [False]
    assert [len(each.tensors) for each in messages(cloud, m.SiteAnswer)] == [2, 2, 2, 0]


def test_micro_batches_wait_for_their_backwards_side_by_side(cloud: MemoryCloud, folder: Path) -> None:
    split = adapted(new_link(cloud).load_model())
    assert_same(train(split, steps=2, accumulate=3), train(adapted(whole(folder)), steps=2, accumulate=3))


def test_bottlenecks_behind_layers_of_the_cloud(cloud: MemoryCloud, folder: Path) -> None:
    runs = []
    for model in (new_link(cloud).load_model(), whole(folder)):
        torch.manual_seed(3)
        add_bottlenecks(model, [1, 2, 3], 4, dropout=0.1)
        runs.append(train(model))
    assert_same(*runs)
    assert [entry.part for entry in messages(cloud, m.Sites)[0].entries] == ["", ""]


def test_a_frozen_adapter_inside_and_a_trained_one_below(cloud: MemoryCloud, folder: Path) -> None:
    runs = []
    for model in (new_link(cloud).load_model(), whole(folder)):
        split = adapted(model, lora())
        for name, parameter in split.named_parameters():
            parameter.requires_grad_("lora_" in name and ".layers.0." in name)
        runs.append(train(split, steps=2))
    assert_same(*runs)


def test_a_lossy_codec_is_close(cloud: MemoryCloud, undisturbed: Run) -> None:
    link = new_link(cloud, codecs=WireCodecs.parse("int8"))
    losses, _ = train(adapted(link.load_model()))
    assert losses != undisturbed[0]
    assert losses == pytest.approx(undisturbed[0], rel=0.02)
    assert all(each.codec == 4 for answer in messages(cloud, m.SiteAnswer) for each in answer.tensors)


@pytest.fixture(scope="module")
def bf16(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return served(folder, tmp_path_factory.mktemp("bf16") / "parts", dtype="bf16")


@pytest.mark.parametrize("kind", ["lora", "bf16 lora", "bottleneck"])
def test_a_bf16_backbone_rounds_as_a_single_process_does(bf16: Served, folder: Path, kind: str) -> None:
    runs = []
    link = new_link(MemoryCloud(bf16))
    whole_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    for model in (link.load_model(dtype=torch.bfloat16), whole_model):
        torch.manual_seed(3)
        if kind == "bottleneck":
            add_bottlenecks(model, [1, 2, 3], 4)
            for name, parameter in model.named_parameters():
                if name.endswith("up.weight"):
                    torch.nn.init.normal_(parameter, std=0.1)
        else:
            model = peft.get_peft_model(model, lora(EVERY_LINEAR), autocast_adapter_dtype=kind == "lora")
        runs.append(train(model, steps=2))
    assert_same(*runs)


# What breaks on the way -----------------------------------------------------------------------------------------------


def test_a_cloud_that_forgets_between_forward_and_backward(cloud: MemoryCloud, undisturbed: Run) -> None:
    link = new_link(cloud)
    assert_same(train(adapted(link.load_model()), between=cloud.served.executor.cache.evict_all), undisturbed)
    assert len(messages(cloud, m.Backward)) == 6
    assert cloud.served.executor.cache.counters.recomputed >= 3


def test_a_cloud_that_keeps_inputs_alone(cloud: MemoryCloud, undisturbed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud.served.executor.cache, "budget", 4000)
    before = cloud.served.executor.cache.counters.recomputed
    link = new_link(cloud)
    assert_same(train(adapted(link.load_model())), undisturbed)
    assert cloud.served.executor.cache.counters.recomputed == before + 3
    assert link.traffic.retries == 0


# The first step's messages: Sites, Forward, two answers; Backward, two answers. Each is a frame, and has one in reply.
@pytest.mark.parametrize("fault", [CUT, flip], ids=["cut", "flip"])
@pytest.mark.parametrize("place", range(1, 8))
@pytest.mark.parametrize("way", ["send", "receive"])
def test_a_connection_that_breaks_anywhere_changes_no_bit(
    cloud: MemoryCloud, undisturbed: Run, way: str, place: int, fault: Fault
) -> None:
    transport = FaultyTransport(MemoryTransport(cloud), {})
    link = new_link(transport)
    model = adapted(link.load_model())
    hit = (way, transport.counts[way] + place)
    transport.faults = {hit: fault}
    assert_same(train(model), undisturbed)
    assert transport.hit == [hit]
    assert link.traffic.sessions == 2
    assert len(messages(cloud, m.Sites)) == (2 if (way, place) != ("send", 1) else 1)  # each session has its own lists
    assert cloud.served.executor.cache.used == 0


def test_a_connection_that_breaks_again_and_again(cloud: MemoryCloud, undisturbed: Run) -> None:
    transport = FaultyTransport(MemoryTransport(cloud), {})
    link = new_link(transport)
    model = adapted(link.load_model())
    start = transport.counts["send"]
    transport.faults = {("send", start + 8 * n): CUT for n in range(1, 9)}
    assert_same(train(model), undisturbed)
    assert len(transport.hit) == 8
    assert link.traffic.sessions == 9


def test_two_tenants_at_once(shared: Served, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the first one's call has paused, the second one does as much as it can."""
    shared.executor.cache.evict_all()
    first, second = (new_link(MemoryCloud(shared)) for _ in range(2))
    mine, theirs = adapted(first.load_model(), lora()), adapted(second.load_model(), lora(EVERY_LINEAR))
    expected = [train(adapted(whole(folder), config), steps=2) for config in (lora(), lora(EVERY_LINEAR))]
    others: list[Run] = []
    busy: list[bool] = []

    def step_in(visits: SiteAnswerer, question: m.SiteQuestion) -> m.SiteAnswer:
        answered = answer(visits, question)
        if not busy:  # the second one's own questions
            busy.append(True)
            state = torch.get_rng_state()
            fresh = {name: p.detach().clone() for name, p in theirs.named_parameters() if p.requires_grad}
            with torch.enable_grad():
                others.append(train(theirs, steps=2))
            with torch.no_grad():
                for name, value in fresh.items():
                    theirs.get_parameter(name).copy_(value)
            torch.set_rng_state(state)
            busy.clear()
        return answered

    answer = SiteAnswerer.answer
    monkeypatch.setattr(SiteAnswerer, "answer", step_in)
    assert_same(train(mine, steps=2), expected[0])
    assert len(others) == 2 * 2 * 2
    for other in others:
        assert_same(other, expected[1])
    assert shared.executor.cache.used == 0


def test_a_bad_contribution_is_the_edges_own_error_and_no_call_stays_open(cloud: MemoryCloud, folder: Path) -> None:
    link = new_link(cloud)
    model = adapted(link.load_model(), lora())
    weight = model.get_parameter("base_model.model.model.layers.3.self_attn.v_proj.lora_B.default.weight")
    good = weight.detach().clone()
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            weight.fill_(value)
        for _ in range(MAX_PAUSED):
            with pytest.raises(NonFiniteError, match=r"contribution of model\.layers\.3\.self_attn\.v_proj"):
                model(**batch(0))
    with torch.no_grad():
        weight.copy_(good)
        assert torch.equal(model(**batch(0)).logits, adapted(whole(folder), lora())(**batch(0)).logits)


# Evaluating, generating, saving ---------------------------------------------------------------------------------------


def test_evaluation_and_generation_are_the_whole_models(cloud: MemoryCloud, folder: Path) -> None:
    link = new_link(cloud)
    split, reference = adapted(link.load_model()), adapted(whole(folder))
    inputs = {name: value for name, value in batch(5).items() if name != "labels"}
    for model in (split, reference):
        model.eval()
    with torch.no_grad():
        logits = split(**inputs).logits
        assert torch.equal(logits, reference(**inputs).logits)
    assert not any(each.keep for each in messages(cloud, m.Forward))
    assert cloud.served.executor.cache.used == 0
    tokens = split.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(tokens, reference.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False))
    with torch.inference_mode():
        assert torch.equal(split(**inputs).logits, logits)
    questions = len(messages(cloud, m.SiteAnswer))
    with split.disable_adapter(), torch.no_grad():
        assert torch.equal(split(**inputs).logits, whole(folder)(**inputs).logits)
    assert len(messages(cloud, m.SiteAnswer)) == questions


def test_the_saved_adapter_loads_into_the_whole_model_and_back(
    cloud: MemoryCloud, folder: Path, tmp_path: Path
) -> None:
    link = new_link(cloud)
    split = adapted(link.load_model())
    train(split, steps=1)
    split.save_pretrained(tmp_path)
    inputs = {name: value for name, value in batch(5).items() if name != "labels"}
    with torch.no_grad():
        logits = split(**inputs).logits
        for model in (whole(folder), link.load_model()):
            reloaded = peft.PeftModel.from_pretrained(model, tmp_path)
            assert torch.equal(reloaded(**inputs, use_cache=False).logits, logits)
        merged = peft.PeftModel.from_pretrained(whole(folder), tmp_path).merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000


def test_each_set_of_sites_is_told_once(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    model = adapted(link.load_model(), lora())
    model.add_adapter("other", lora(["o_proj"]))
    with torch.no_grad():
        for name in ("default", "other", "default", "other"):
            model.set_adapter(name)
            model(**batch(0))
    assert [each.number for each in messages(cloud, m.Sites)] == [1, 2]
    assert [each.sites for each in messages(cloud, m.Forward)] == [1, 2, 1, 2]
    link._keeper.drop()
    with torch.no_grad():
        model(**batch(0))
    assert [each.number for each in messages(cloud, m.Sites)] == [1, 2, 3]  # the new session knows none


def test_lists_that_the_cloud_has_forgotten_are_told_again(cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_LISTS", 1)
    link = new_link(cloud)
    model = adapted(link.load_model(), lora())
    model.add_adapter("other", lora(["o_proj"]))
    first = model(**batch(0)).loss
    model.set_adapter("other")
    model(**batch(0))
    model.set_adapter("default")
    first.backward()  # its list has got another number meanwhile
    assert [each.number for each in messages(cloud, m.Sites)] == [1, 2, 3]
    assert link.traffic.retries == 0


# A cloud that does not do its part ------------------------------------------------------------------------------------


def test_a_cloud_that_takes_no_sites(cloud: MemoryCloud) -> None:
    model = adapted(new_link(cloud).load_model())
    cloud.answer = lambda message: (
        m.Status(m.StatusCode.BAD_REQUEST, None, "there is no such site\x1b[2J")
        if isinstance(message, m.Sites)
        else None
    )
    with pytest.raises(RefusedError, match=r"refused the adapters inside its layers: there is no such site\?"):
        model(**batch(0))
    assert not messages(cloud, m.Forward)


X = encode(torch.ones(2, 8, HIDDEN), "fp32", Role.ACTIVATION)
NARROW = encode(torch.ones(2, 8, HIDDEN - 1), "fp32", Role.ACTIVATION)
G = encode(torch.ones(2, 8, HIDDEN), "fp32", Role.GRADIENT)
FORWARD, AGAIN, BACKWARD = m.SitePhase.FORWARD, m.SitePhase.AGAIN, m.SitePhase.BACKWARD


@pytest.mark.parametrize(
    ("phase", "sites", "tensors", "call", "text"),
    [
        (FORWARD, (4,), (X,), 1, "no site 4 among 4"),
        (FORWARD, (0,), (NARROW,), 1, "site 0, whose input is 32 wide"),
        (AGAIN, (0,), (), 1, "site 0 was asked for its contribution again"),
        (BACKWARD, (0,), (G,), 1, "site 0, which has not contributed"),
        (FORWARD, (0,), (X,), 2, "answered Forward with SiteQuestion"),
    ],
)
def test_a_question_that_makes_no_sense_is_the_clouds_fault(
    cloud: MemoryCloud, phase: m.SitePhase, sites: tuple[int, ...], tensors: Any, call: int, text: str
) -> None:
    model = adapted(new_link(cloud).load_model())
    cloud.answer = lambda message: (
        m.SiteQuestion(m.CallId(0, call, message.id.attempt), phase, sites, tensors, 0, 0, 0)
        if isinstance(message, m.Forward)
        else None
    )
    with pytest.raises(RemoteProtocolError, match=text):
        model(**batch(0))
    assert len(messages(cloud, m.Forward)) == session_keeper.PROTOCOL_FAULTS
    cloud.answer = lambda message: None
    model(**batch(0)).loss.backward()


def test_a_gradient_of_another_shape_is_the_clouds_fault(cloud: MemoryCloud) -> None:
    model = adapted(new_link(cloud).load_model())
    loss = model(**batch(0)).loss
    cloud.answer = lambda message: (
        m.SiteQuestion(message.id, BACKWARD, (1,), (G,), 0, 0, 0) if isinstance(message, m.Backward) else None
    )
    with pytest.raises(RemoteProtocolError, match=r"gradient of shape \[2, 8, 32\] came for site 1.*\[2, 8, 16\]"):
        loss.backward()


def test_a_call_without_sites_answers_no_question(cloud: MemoryCloud) -> None:
    model = new_link(cloud).load_model()
    cloud.answer = lambda message: (
        m.SiteQuestion(message.id, FORWARD, (0,), (X,), 0, 0, 0) if isinstance(message, m.Forward) else None
    )
    with pytest.raises(RemoteProtocolError, match="answered Forward with SiteQuestion"):
        model(**batch(0))
    assert not messages(cloud, m.SiteAnswer)


@pytest.mark.parametrize("evict", [False, True])
def test_opt_whose_feed_forward_part_knows_no_sequences(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, evict: bool
) -> None:
    folder = tiny_checkpoint("opt", tmp_path / "model", dropout=0.0)
    link = new_link(MemoryTransport(MemoryCloud(cloud := served(folder, tmp_path_factory.mktemp("cloud") / "parts"))))
    config = lora("all-linear", lora_dropout=0.1)
    split = adapted(link.load_model(), config)
    assert {"fc1", "fc2"} <= {site.part for site in split.get_base_model().find_sites()}
    mine = train(split, between=cloud.executor.cache.evict_all if evict else (lambda: None))
    assert_same(mine, train(adapted(whole(folder), config)))


# What it costs --------------------------------------------------------------------------------------------------------

WIDE, KEYS = 576, 192  # SmolLM2-135M's hidden states, and its keys and values


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Two cloud layers with SmolLM2's shapes, but for the feed-forward parts."""
    folder = tmp_path_factory.mktemp("smol")
    shape = {"hidden_size": WIDE, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    return served(
        tiny_checkpoint("llama", folder / "model", num_hidden_layers=4, **shape), folder / "parts", plan="1:1"
    )


@pytest.mark.parametrize(("summed", "backward"), [(False, 10 / 3), (True, 7 / 3)])
def test_the_wire_carries_what_the_design_says(smol: Served, summed: bool, backward: float) -> None:
    """Per layer with q and v sites: x down, two deltas up; their gradients down, and dx up for each or for both."""
    link = new_link(MemoryCloud(smol))
    model = adapted(link.load_model(summed=summed), lora())
    inputs = batch(0, rows=4, length=32)
    hb = 4 * 32 * WIDE * 4
    model(**inputs).loss.backward()  # the list of sites crosses once

    def moved() -> tuple[int, int, int]:
        return link.traffic.bytes_up, link.traffic.bytes_down, link.traffic.round_trips

    states = [moved()]
    loss = model(**inputs).loss
    states.append(moved())
    loss.backward()
    states.append(moved())
    (up, down, trips), (back_up, back_down, back_trips) = (
        tuple(now - then for now, then in zip(after, before, strict=True))
        for before, after in itertools.pairwise(states)
    )
    layers = 2
    assert up == pytest.approx((1 + layers * (1 + KEYS / WIDE)) * hb, rel=0.02)
    assert down == pytest.approx((1 + layers) * hb, rel=0.02)
    assert up + down == pytest.approx((2 + layers * 7 / 3) * hb, rel=0.02)
    assert back_down == pytest.approx((1 + layers * (1 + KEYS / WIDE)) * hb, rel=0.02)
    assert back_up + back_down == pytest.approx((2 + layers * backward) * hb, rel=0.02)
    assert trips == back_trips == layers + 1


def test_a_summed_gradient_is_one_tensor_for_each_group_and_close(cloud: MemoryCloud, folder: Path) -> None:
    """Sums in another order: every gradient within 1e-5 of the exact one, as norms, at fp32."""
    gradients = []
    for model in (new_link(cloud).load_model(summed=True), whole(folder)):
        tuned = adapted(model, lora(EVERY_LINEAR))
        tuned(**batch(0), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in tuned.named_parameters() if p.requires_grad})
    answers = [each for each in messages(cloud, m.SiteAnswer) if each.tensors[0].role == Role.GRADIENT]
    assert [len(each.tensors) for each in answers] == [1] * 8  # q k v; o; gate up; down: of two layers
    mine, exact = gradients
    assert any(not torch.equal(mine[name], exact[name]) for name in exact)
    for name, value in exact.items():
        assert (mine[name] - value).norm() <= 1e-5 * value.norm(), name

"""Adapters inside the cloud's layers over a link in memory: each run ends, bit for bit, as a single process would."""

from __future__ import annotations

import itertools
from pathlib import Path

import peft
import pytest
import torch
from support.cloud.clouds import served
from support.cloud.memory_cloud import MemoryCloud, MemoryTransport, messages, new_link
from support.models.lora_runs import EVERY_LINEAR, Run, adapted, assert_same, batch, lora, train, whole
from support.models.tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters.layer_adapters import add_bottlenecks
from isthmus.cloud.session.served_model import Served
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Role

pytestmark = pytest.mark.usefixtures("no_waiting", "cache_folder")


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


# A family of its own kind ---------------------------------------------------------------------------------------------


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

"""The library as a user has it.

`link.load_model()` over a real server, and PEFT, Trainer, SFTTrainer and generate as they are.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import PAD, VOCAB, tiny_checkpoint
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from isthmus.backbone.split.edge_weights import load_edge_weights
from isthmus.common.errors import ConfigError
from isthmus.edge import connect
from isthmus.edge.client.link import Link

EDGE_LAYERS = [0, 1, 4, 5]
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the cloud's: tiny matrix products give other bits when they are cut differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("library") / "model")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    base = tmp_path_factory.mktemp("cloud")
    with ThreadServer(served(folder, base / "parts"), Home(base)) as running:
        yield running


@pytest.fixture(scope="module")
def link(server: ThreadServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        with connect(server.address, key=server.home.key_file) as opened:
            yield opened


def whole(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False  # as on the edge; with a cache, masks are made in another way and bits differ
    return model


def batch(seed: int, rows: int = 3, length: int = 10) -> dict[str, torch.Tensor]:
    """Padded on the right, the padding not trained on."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, -2 * row :] = 0
    ids[mask == 0] = PAD
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


Gradients = dict[str, torch.Tensor]


def train(
    model: Any, steps: int = 2, after: Callable[[Any, int], None] = lambda model, step: None
) -> tuple[list[float], list[Gradients]]:
    """A plain loop; returns the losses and every step's gradients."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, foreach=False)
    model.train()
    losses, gradients = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(step), use_cache=False).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
        optimizer.step()
        after(model, step)
        losses.append(loss.item())
    model.eval()
    return losses, gradients


def assert_same(mine: list[Gradients], theirs: list[Gradients]) -> None:
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.keys() == b.keys()
        assert a
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert not different, f"step {step}: {different}"


EVERY_LINEAR = [*TARGETS, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def on_edge_layers(name: str) -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in EDGE_LAYERS]


# Those that read or scale a layer's own output are for the edge's layers alone.
METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS),
    "lora_everywhere": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=EVERY_LINEAR),
    "lora_on_edge_layers": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=TARGETS, layers_to_transform=EDGE_LAYERS
    ),
    "dora": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=TARGETS, use_dora=True, layers_to_transform=EDGE_LAYERS
    ),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=[
            *on_edge_layers("self_attn.k_proj"),
            *on_edge_layers("self_attn.v_proj"),
            *on_edge_layers("mlp.down_proj"),
        ],
        feedforward_modules=on_edge_layers("mlp.down_proj"),
    ),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, target_modules=TARGETS
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def allocate(model: Any, step: int) -> None:
    """AdaLoRA's own duty of a training loop."""
    if hasattr(model.base_model, "update_and_allocate"):
        model.base_model.update_and_allocate(step)


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_method_trains_as_on_the_whole_model_and_reloads_into_it(
    link: Link, folder: Path, tmp_path: Path, method: str
) -> None:
    torch.manual_seed(1)
    split = peft.get_peft_model(link.load_model(), METHODS[method]())
    reference = peft.get_peft_model(whole(folder), METHODS[method]())
    _copy_adapter(split, reference)

    losses, gradients = train(split, after=allocate)
    expected_losses, expected_gradients = train(reference, after=allocate)
    assert losses == expected_losses
    assert_same(gradients, expected_gradients)

    probe = batch(7)
    del probe["labels"]  # AdaLoRA's regularizer fails on a model that is not for training
    logits = split(**probe).logits
    split.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 200_000
    reloaded = peft.PeftModel.from_pretrained(whole(folder), tmp_path)
    assert torch.equal(reloaded(**probe, use_cache=False).logits, logits)
    assert not torch.equal(whole(folder)(**probe).logits, logits[:, -probe["input_ids"].shape[1] :])  # it had an effect


def _copy_adapter(source: Any, target: Any) -> None:
    start = {name: p for name, p in source.named_parameters() if p.requires_grad}
    mine = {name: p for name, p in target.named_parameters() if p.requires_grad}
    assert start.keys() == mine.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(start[name])
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if "vera_" in name:
            buffer.copy_(buffers[name])


def test_plain_tuning_of_the_edges_layers_reloads_into_the_whole_model(
    link: Link, folder: Path, tmp_path: Path
) -> None:
    split, reference = link.load_model(), whole(folder)
    for layer in (2, 3):  # what the split model does not have
        reference.model.layers[layer].requires_grad_(False)
    losses, gradients = train(split)
    expected_losses, expected_gradients = train(reference)
    assert losses == expected_losses
    assert_same(gradients, expected_gradients)
    split.save_pretrained(tmp_path)
    full = whole(folder)
    before = full.model.layers[2].mlp.up_proj.weight.clone()
    load_edge_weights(full, tmp_path)
    assert torch.equal(full(**batch(7)).logits, split(**batch(7)).logits)
    assert torch.equal(full.model.layers[2].mlp.up_proj.weight, before)


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Rows of one length, so that no collator has to be chosen."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, VOCAB, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def lora(model: Any, targets: list[str] = TARGETS) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }


def logged(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "accumulation", "checkpointing"],
)
def test_trainer_runs_unmodified_and_equals_the_whole_models_run(
    link: Link, folder: Path, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    histories, adapters = [], []
    for model in (lora(link.load_model()), lora(whole(folder))):
        trainer = Trainer(model=model, args=TrainingArguments(**arguments(tmp_path, **options)), train_dataset=Texts())
        trainer.train()
        histories.append(logged(trainer))
        adapters.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert len(histories[0]) == 4
    assert histories[0] == histories[1]
    assert len(set(histories[0])) == 4
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_sft_trainer_runs_unmodified_and_equals_the_whole_models_run(link: Link, folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    rows = datasets.Dataset.from_list(
        [{"prompt": f"Question {n}:", "completion": f" answer {n * n}"} for n in range(12)]
    )
    histories = []
    for model in (link.load_model(), whole(folder)):
        torch.manual_seed(3)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**arguments(tmp_path, max_length=64, activation_checkpointing=False, bf16=False)),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS),
        )
        trainer.train()
        histories.append(logged(trainer))
    assert len(histories[0]) == 4
    assert histories[0] == histories[1]


def test_gradients_of_accumulated_batches_add_up(link: Link, folder: Path) -> None:
    split, reference = lora(link.load_model()), lora(whole(folder))
    for model in (split, reference):
        total = sum(
            model(**batch(seed), use_cache=False).loss for seed in (1, 2, 3)
        )  # three calls wait for their backwards
        total.backward()
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert all(torch.equal(p.grad, theirs[name]) for name, p in split.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("chat", [False, True])
def test_generate_gives_the_whole_models_greedy_tokens(link: Link, folder: Path, chat: bool) -> None:
    tokenizer = link.load_tokenizer()
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        tokenizer.padding_side = "left"
        inputs = tokenizer(["Once upon", "a"], return_tensors="pt", padding=True)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    tokens = link.load_model().generate(**inputs, **options)
    assert torch.equal(tokens, whole(folder).generate(**inputs, **options))
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("address", ["nonsense", "isthmus://host#SHA256:" + "A" * 43, "isthmus://host:1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not a connection string"):
        connect(address, key="never-read")


def test_the_edge_holds_no_weight_of_the_cloud(link: Link, folder: Path) -> None:
    model = link.load_model()
    kept = {name for name, _ in model.named_parameters()}
    assert not [name for name in kept if name.startswith(("model.layers.2.", "model.layers.3."))]
    reference = dict(whole(folder).named_parameters())
    assert all(torch.equal(p, reference[name]) for name, p in model.named_parameters())


def test_two_edges_train_at_the_same_time(server: ThreadServer, folder: Path, link: Link) -> None:
    """Their calls pause inside the span, and each goes on while the other waits for its edge."""
    results: dict[str, tuple[list[float], list[Gradients]]] = {}
    models = {"alice": lora(link.load_model()), "bob": None}
    with connect(server.address, key=server.home.new_edge("bob")) as other:
        models["bob"] = lora(other.load_model(), EVERY_LINEAR)

        def run(name: str) -> None:
            torch.set_num_threads(1)
            results[name] = train(models[name], steps=3)

        threads = [threading.Thread(target=run, args=(name,)) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for name, targets in (("alice", TARGETS), ("bob", EVERY_LINEAR)):
        losses, gradients = train(lora(whole(folder), targets), steps=3)
        assert results[name][0] == losses
        assert_same(results[name][1], gradients)


def test_a_copied_model_trains_over_the_same_link(link: Link) -> None:
    model = lora(link.load_model())
    twin = copy.deepcopy(model)
    sessions = link.traffic.sessions
    assert train(model)[0] == train(twin)[0]
    assert link.traffic.sessions == sessions

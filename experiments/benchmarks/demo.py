"""`make demo`: the main job on a real model, in a few minutes, with everything that a user would start by hand.

A cloud (Ray, a worker, sealed gRPC) and an edge in processes of their own; some forty steps on generated support
tickets; the held-out loss and an answer before and after; what crossed the wire; the same training in a single process,
which must end in the same adapter; and the same tickets in the private mode, where nothing of them crosses.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.checkpoints.sources import resolve
from isthmus.common.errors import IsthmusError
from isthmus.edge.client.link import connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Batches, encode
from isthmus.edge.data.readers import read_examples
from isthmus.edge.training.methods import trained
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.processes import run_isthmus, train_flags
from isthmus.experiments.harness.single_process import parity_of, train_whole
from isthmus.experiments.harness.tickets import Ticket, make_tickets, write_tickets
from isthmus.protocol.encoding import pack
from isthmus.protocol.limits import Buffer
from isthmus.protocol.messages import Message

MODEL = "smollm2-135m"
EDGE_LAYERS = "2:2"
TRAINING = 240
HELD_OUT = 40
RECIPE, KEEP = "uniform", 0.75
"""Of the emulator: the cheapest that there is, built in some seconds. It is no preset, and nothing is distilled."""
# What counts as a find: so many token ids, or weights, in a row. They have 8 bytes at least, which sealed bytes do not
# hold by chance, and longer ones would be missed where they are cut in two.
NEEDLE_TOKENS, NEEDLE_VALUES = 4, 4


def run_demo(folder: Path, steps: int, threads: int) -> None:
    """Run the demo and print it as it goes."""
    console = Console(highlight=False, soft_wrap=True)
    console.rule("1. the model")
    checkpoint = resolve(MODEL)
    console.print(
        f"{MODEL}: {checkpoint.config.num_hidden_layers} layers; the edge holds {EDGE_LAYERS.replace(':', ' + ')}, "
        "the cloud the rest"
    )

    tickets = make_tickets(TRAINING + HELD_OUT + 1, seed=1)
    probe, train, held_out = tickets[0], tickets[1 : TRAINING + 1], tickets[TRAINING + 1 :]
    write_tickets(folder / "train.jsonl", train)
    write_tickets(folder / "held-out.jsonl", held_out)
    training: dict[str, Any] = {
        "data": str(folder / "train.jsonl"),
        "validation": str(folder / "held-out.jsonl"),
        "steps": steps,
        "batch": 8,
        "max_length": 96,
        "learning_rate": 5e-3,
        "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "seed": 7,
        "threads": threads,
        "save_every": steps,
    }

    console.rule("2. keys, and a cloud in processes of its own")
    package = folder / "package"
    serving = ("--edge-layers", EDGE_LAYERS, "--threads", str(threads), "--emulator", str(package))
    cloud = LocalCloud(folder, MODEL, *serving)
    run_isthmus(
        *("emulator", "build", "--model", MODEL, "--adapter-layers", EDGE_LAYERS, "--method", RECIPE),
        *("--keep", str(KEEP), "--home", str(cloud.home), "--out", str(package)),
    )
    with cloud:
        console.print(f"serving at {cloud.connection}")
        edge = ("--cloud", str(cloud.connection_file), "--key", str(cloud.edge_key))
        console.rule(f"3. the edge: {steps} steps on {len(train)} private tickets")
        before = _generate(edge, probe)
        flags = train_flags(training)
        report = run_isthmus("edge", "train", *edge, *flags, "--out", str(folder / "split"))
        after = _generate(edge, probe, "--adapter", str(folder / "split" / "adapter"))
        crossing = search_the_wire(cloud, folder / "train.jsonl", folder / "split" / "adapter")
        private = train_privately(folder, edge, training)
    _print(console, report, probe, before, after, crossing)

    console.rule("5. the same in a single process, on the same seed")
    train_whole(MODEL, EDGE_LAYERS, {**training, "out": str(folder / "single")})
    parity = parity_of(folder / "split", folder / "single")
    console.print(
        f"parity: bitwise_equal={parity['bitwise_equal']} max_abs_loss_diff={parity['max_abs_loss_diff']} "
        f"adapter_max_abs_diff={parity['adapter_max_abs_diff']}"
    )
    if not parity["bitwise_equal"]:
        raise IsthmusError(
            "the split run and the single-process run differ: please report this, with the numbers above"
        )

    console.rule("6. the private mode: the same tickets, over an emulator")
    console.print(
        f"emulator: {KEEP:.0%} of the cloud's layers ({RECIPE}), not distilled; adapters above it. Fetching it took "
        f"{private['came'] / 1e6:.0f} MB"
    )
    console.print(
        "nothing was sent while it was tuned; then the adapter went, and held-out tickets crossed to measure it"
    )
    for name, loss in (
        ("the model as it is", report["loss_before"]),
        ("split training", report["loss_after"]),
        ("private mode, plugged in", private["loss"]),
    ):
        console.print(f"held-out loss  {loss:.3f} {name}")


def train_privately(folder: Path, edge: tuple[str, ...], training: dict[str, Any]) -> dict[str, Any]:
    """Fetch the package that the cloud offers, tune on it, and return the adapter.

    Returns:
        `came`: bytes that were fetched; `loss`: on the held-out tickets, with the adapter over the cloud's own layers.
    """
    package, out = folder / "fetched", folder / "private"
    came = run_isthmus("emulator", "fetch", *edge, "--out", str(package))["bytes_down"]
    options = {name: value for name, value in training.items() if name != "validation"} | {"validation_split": 0}
    tuned = ("--package", str(package), "--layers", "above", "--out", str(out))
    run_isthmus("emulator", "tune", *tuned, *train_flags(options))
    run_isthmus("emulator", "return", *edge, "--adapter", str(out / "adapter"))
    held_out = {name: training[name] for name in ("batch", "max_length", "threads")} | {"data": training["validation"]}
    scored = run_isthmus("edge", "eval", *edge, *train_flags(held_out), "--plugged")
    return {"came": came, "loss": scored["loss"]}


def _print(
    console: Console, report: dict[str, Any], probe: Ticket, before: str, after: str, crossing: dict[str, Any]
) -> None:
    console.print(f"held-out loss  {report['loss_before']:.3f} before, {report['loss_after']:.3f} after")
    console.print("ticket        ", probe.prompt.replace("\n", " / "), markup=False)
    console.print("wanted        ", probe.completion.strip(), markup=False)
    console.print("answer before ", before.strip().split("\n")[0][:100], markup=False)
    console.print("answer after  ", after.strip().split("\n")[0][:100], markup=False)
    console.rule("4. what crossed the wire")
    console.print(
        f"{report['bytes_up'] / 1e6:.1f} MB up, {report['bytes_down'] / 1e6:.1f} MB down "
        f"in {report['calls']} calls, sealed: "
        f"{report['bytes_per_position_up']:.0f} + {report['bytes_per_position_down']:.0f} bytes per token position"
    )
    console.print(
        f"time: edge {report['edge_share']:.0%}, cloud {report['cloud_share']:.0%}, wire {report['wire_share']:.2%}, "
        f"encryption {report['crypto_share']:.2%}"
    )
    console.print(
        f"messages of one more step: {', '.join(f'{name} x {count}' for name, count in crossing['messages'].items())}"
    )
    for name, found in crossing["found"].items():
        console.print(f"  {name:12} {'FOUND in what the edge sends' if found else 'not in what the edge sends'}")
    console.print(
        "  (activations are, as they must be; from them, a cloud that knows the weights can infer much: see the README)"
    )
    if any(found for name, found in crossing["found"].items() if name != "activations"):
        raise IsthmusError("something private crossed the wire: please report this")


def _generate(edge: tuple[str, ...], probe: Ticket, *options: str) -> str:
    text: str = run_isthmus("edge", "generate", *edge, *options, "--max-new-tokens", "24", probe.prompt)["text"]
    return text


def search_the_wire(cloud: LocalCloud, data: Path, adapter: Path) -> dict[str, Any]:
    """Make one step with a trained adapter, and search the plaintext of every message that the edge sends.

    Searched for: the text of each example (UTF-8), runs of its token ids and of its labels (little-endian, 16, 32 and
    64 bits), runs of each adapter weight and of its gradient, and, as a control that the search works, runs of the
    activations that are sent on purpose.

    Returns:
        `messages`: how many of which kind; `found`: for each thing whether it is there.
    """
    messages: Counter[str] = Counter()
    plaintext = bytearray()

    def recorded(message: Message) -> tuple[bytes, list[Buffer]]:
        header, body = pack(message)
        messages[type(message).__name__] += 1
        for part in (header, *body):
            plaintext.extend(part)
        return header, body

    # `pack` makes the bytes that a session seals; in this process only the edge's session uses it.
    with patch("isthmus.protocol.session.pack", recorded), connect(cloud.connection, key=cloud.edge_key) as link:
        tokenizer: Any = link.load_tokenizer()
        config = TrainConfig(cloud="-", data=str(data))
        examples = read_examples(str(data), config)[:4]
        encoded, _ = encode(examples, tokenizer, 96)
        batch = next(iter(Batches(encoded, len(encoded), tokenizer.pad_token_id or 0).epoch()))
        model = load_adapter(link.load_model(), adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        activations: list[torch.Tensor] = []
        span = model.get_base_model().remote_layers.span

        def watched(hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
            activations.append(hidden.detach())
            output: torch.Tensor = span(hidden, mask, positions)
            return output

        model.get_base_model().remote_layers.span = watched
        model.train()
        model(**batch, use_cache=False).loss.backward()
    needles = {
        "text": [text.encode() for example in examples for text in (example.prompt, example.completion)],
        "token ids": [needle for example in encoded for needle in _runs(example.input_ids)],
        "labels": [
            needle for example in encoded for needle in _runs([label for label in example.labels if label >= 0])
        ],
        "adapter": [_values(parameter) for parameter in trained(model).values()],
        "its gradient": [
            _values(parameter.grad) for parameter in trained(model).values() if parameter.grad is not None
        ],
        "activations": [_values(hidden) for hidden in activations],
    }
    return {
        "messages": messages,
        "found": {name: any(needle in plaintext for needle in parts) for name, parts in needles.items()},
    }


def _runs(ids: Any) -> list[bytes]:
    """Runs of token ids as the usual whole numbers would put them into memory."""
    starts = range(0, len(ids) - NEEDLE_TOKENS + 1)
    return [
        b"".join(int(token).to_bytes(width, "little") for token in ids[start : start + NEEDLE_TOKENS])
        for start in starts
        for width in (2, 4, 8)
    ]


def _values(tensor: torch.Tensor) -> bytes:
    """A run of values from the middle of a tensor, none of them zero."""
    flat = tensor.detach().reshape(-1)
    flat = flat[flat != 0]
    middle = len(flat) // 2
    return flat[middle : middle + NEEDLE_VALUES].contiguous().numpy().tobytes()

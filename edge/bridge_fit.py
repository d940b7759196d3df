"""What the command `emulator fit` does: the edge's own bridge, from the cloud's answers to public texts.

The texts go through the package's own bottom layers, with no adapter, prompt or defence, and through the cloud's
layers, by the forward that training uses. The same hidden states go through the emulator here. One linear map at the
emulator's end is fitted to the difference and kept beside the package; nothing of it is sent. The sums that it is made
of are kept as well, so that an interrupted fit goes on, and more tokens of the same text add to them.

Every eighth block, up to 64 of them, is held out until the KL divergence of the next-token distribution from the whole
model's is measured on it, with and without the bridge.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from isthmus.common.errors import DataError
from isthmus.common.files import disk_errors, locked, write_atomic
from isthmus.common.ownership import private_folder
from isthmus.common.progress import bar, note
from isthmus.common.shutdown import uninterrupted
from isthmus.edge.budget.budget_texts import read_secrets
from isthmus.edge.budget.text_overlap import RUN, plain_text, runs_of, tokens_of
from isthmus.edge.client.fetch import check_served
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.client_config import NO_DATA, FitConfig
from isthmus.edge.data.batches import rendered
from isthmus.edge.data.readers import read_examples
from isthmus.edge.run_report import WireTotals
from isthmus.emulator.compress.bridges import Bridge, RidgeSums
from isthmus.emulator.compress.outer_layers import OuterLayers
from isthmus.emulator.compress.public_text import documents, fingerprint, load_blocks
from isthmus.emulator.package.package import Package, open_package
from isthmus.protocol.enrolment import ConnectionString
from isthmus.training.logit_divergence import logit_divergence

if TYPE_CHECKING:
    from isthmus.edge.client.link import Link

RIDGE = 0.1
"""Of the sums' diagonal, see `RidgeSums.solve`; as in the presets."""
_HELD = 8
_MOST_HELD = 64
"""Blocks that are held out at most, which bounds what is kept of them as they are."""
_PARTS_KEPT = 16
"""Calls after which the answers are kept, for the case that the process dies."""
_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Fitted:
    """A bridge that was fitted.

    Attributes:
        bridge: Its file.
        tokens: How many it is fitted to, those of earlier commands among them.
        asked: How many of them this command has asked the cloud about.
        kl_before: KL divergence of the next-token distribution over the emulator from the whole model's, in nats a
            token, on held-out blocks of the text; None where none was held out.
        kl_after: The same with a bridge that was fitted to the other blocks.
    """

    bridge: str
    package: str
    tokens: int
    asked: int
    kl_before: float | None
    kl_after: float | None
    bytes_up: int
    bytes_down: int

    def to_json(self) -> str:
        """One object."""
        return json.dumps(dataclasses.asdict(self))

    def lines(self) -> str:
        """What a person reads."""
        text = f"bridge  {self.bridge}, fitted to {self.tokens:,} tokens"
        if self.kl_before is not None:
            text += (
                f"\nKL      {self.kl_before:.3g} -> {self.kl_after:.3g} nats a token, on blocks of the text held out"
            )
        return f"{text}\nsent    {self.bytes_up:,} bytes, received {self.bytes_down:,}"


def run_fit(config: FitConfig, link: Link | None = None, say: Callable[[str], None] = note) -> Fitted:
    """Fit the edge's own bridge as the configuration says; the work of `isthmus emulator fit`.

    Args:
        link: What to ask over; by default one is opened where the cloud is to be asked.
        say: Told what is left out, and, before anything is sent, what will be.

    Raises:
        DataError: The public text shares a run of tokens with the private data or holds a secret, or the bridge does
            not help on the blocks that are held out.
        PackageError: The package is damaged, or of another model or plan than the cloud's.
        IsthmusError: of whatever kind fits. What the cloud has answered is kept, and the same command goes on.
    """
    place = ConnectionString.parse(config.connection_text())
    package = open_package(config.package, signer=place.pin)
    tokenizer = package.load_tokenizer()
    given = documents(config.text)
    texts, blocks, wanted = ordered_blocks(given, config, tokenizer)
    if len(texts) < len(given):
        shared = len(given) - len(texts)
        say(
            f"{shared:,} of the {len(given):,} texts share {RUN} tokens in a row with private ones, and are left out: "
            "who knows the public file can tell which they are."
        )
    with disk_errors(package.bridge_file):
        private_folder(package.bridge_file.parent)
    with locked(package.bridge_file):
        answers = _Answers.load(package, fingerprint(blocks))
        todo = max(0, wanted - answers.done)
        say(
            f"This sends {todo * blocks.shape[1]:,} tokens of the {len(texts):,} texts in {config.text} to the cloud "
            f"at {place.address}. The cloud can read them, and which texts you chose tells it something about your "
            "task. Nothing else is sent, and the bridge stays here."
        )
        up = down = 0
        if todo:
            answers.save(package)  # where they cannot be kept, nothing is asked
            earlier = WireTotals() if link is None else link.totals()
            with open_link(config) if link is None else nullcontext(link) as cloud:
                check_served(package, cloud.info)
                try:
                    _ask(cloud, package, blocks[:wanted], answers)
                finally:
                    answers.save(package)
                    crossed = cloud.totals() - earlier
                    up, down = crossed.bytes_up, crossed.bytes_down
        return _keep(config, package, blocks, answers, asked=todo * blocks.shape[1], up=up, down=down)


def ordered_blocks(given: Sequence[str], config: FitConfig, tokenizer: Any) -> tuple[Sequence[str], Tensor, int]:
    """What may be sent of the texts, its blocks in the order in which the cloud is asked, and about how many it is.

    Raises:
        DataError: A text holds a secret or shares a run of tokens with private ones.
    """
    texts = _public(given, config, tokenizer)
    block = min(config.block, config.tokens)
    blocks = load_blocks(config.text, tokenizer, block, texts)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    return texts, blocks[order], min(len(blocks), config.tokens // block)


def _keep(
    config: FitConfig, package: Package, blocks: Tensor, answers: _Answers, *, asked: int, up: int, down: int
) -> Fitted:
    """Keep the bridge if it helps. Raises DataError."""
    before, after = answers.divergences(package, blocks)
    if before is not None and after is not None and after >= before:
        raise DataError(
            f"a bridge fitted to {answers.tokens} tokens of {config.text} does not bring the emulator nearer to the "
            f"model on held-out blocks (KL {before:.3g} -> {after:.3g}), so none is kept: give more --tokens, or a "
            "text that is more alike"
        )
    package.save_bridge(answers.bridge(), {"text": answers.text, "tokens": str(answers.tokens)})
    return Fitted(str(package.bridge_file), package.id, answers.tokens, asked, before, after, up, down)


class _Answers:
    """What is kept of the cloud's answers: sums of the blocks that are fitted to, and the others as they are."""

    def __init__(self, text: str, width: int) -> None:
        self.text = text
        self.done = 0
        self.tokens = 0
        self._sums = RidgeSums(width)
        self._held = torch.zeros(2, 0, width)  # what the emulator gives, and what the cloud does

    @classmethod
    def load(cls, package: Package, text: str) -> _Answers:
        """Those of earlier commands about the same package and blocks; none where they are not there or not whole."""
        answers = cls(text, package.checkpoint.config.hidden_size)
        with suppress(OSError, SafetensorError, ValueError, LookupError):
            with safe_open(answers._file(package), framework="pt") as file:
                said, held = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            wanted = answers._tensors()
            fits = all(held[name].shape[-1] == each.shape[-1] for name, each in wanted.items())
            if fits and (said["package"], said["text"]) == (package.id, text):
                answers.done, answers.tokens = int(said["done"]), int(said["tokens"])
                answers._sums.gram, answers._sums.moments = held["gram"], held["moments"]
                answers._held = held["held"]
        return answers

    def save(self, package: Package) -> None:
        """Keep them beside the package. Raises DiskError."""
        about = {"package": package.id, "text": self.text, "done": str(self.done), "tokens": str(self.tokens)}
        write_atomic(self._file(package), save(self._tensors(), about), 0o600)

    def add(self, given: Tensor, target: Tensor) -> None:
        """Count what the emulator and the cloud give for the next blocks, `[B, S, h]` both."""
        places = torch.arange(self.done, self.done + len(given))
        held = _is_held(places)
        with uninterrupted():  # the two sums and the number of blocks belong together
            if not held.all():
                self._sums.add(given[~held], target[~held])
            self._held = torch.cat([self._held, torch.stack([given[held], target[held]]).flatten(1, 2)], dim=1)
            self.done += len(given)
            self.tokens += given.shape[0] * given.shape[1]

    @torch.no_grad()
    def divergences(self, package: Package, blocks: Tensor) -> tuple[float | None, float | None]:
        """KL divergence on what is held out of the blocks, without and with a bridge that is fitted to the rest.

        The relative error of hidden states does not do here: half of it is that of the first position, whose norm can
        be hundreds of times that of the others, and which a bridge may worsen while it mends the others.
        """
        ids = blocks[: self.done][_is_held(torch.arange(self.done))]
        if not 0 < ids.numel() < self.tokens:
            return None, None
        top = OuterLayers(package.checkpoint, package.plan, with_top=True)
        bridge, sums = self._sums.bridge(RIDGE), [0.0, 0.0]
        for part, given, target in zip(ids, *self._held.view(2, *ids.shape, -1), strict=True):
            wanted, *found = (top.predict(part[None], states[None])[0][0] for states in (target, given, bridge(given)))
            sums = [so_far + logit_divergence(each, wanted).item() for so_far, each in zip(sums, found, strict=True)]
        return sums[0] / len(ids), sums[1] / len(ids)

    def bridge(self) -> Bridge:
        """The bridge that is fitted to all of them."""
        sums = copy.deepcopy(self._sums)
        sums.add(*self._held)
        return sums.bridge(RIDGE)

    def _file(self, package: Package) -> Path:
        return package.bridge_file.with_suffix(f".{self.text[:16]}.answers.safetensors")

    def _tensors(self) -> dict[str, Tensor]:
        return {"gram": self._sums.gram, "moments": self._sums.moments, "held": self._held}


def _is_held(places: Tensor) -> Tensor:
    """Which blocks are held out."""
    return (places % _HELD == 0) & (places < _HELD * _MOST_HELD)


@torch.no_grad()
def _ask(link: Link, package: Package, wanted: Tensor, answers: _Answers) -> None:
    """Ask the cloud about the blocks that are missing."""
    front = OuterLayers(package.checkpoint, package.plan, with_top=False)
    emulator = package.load_emulator()
    plan = None if str(package.plan) == link.info.plan else str(package.plan)
    rows = max(1, min(_TOKENS_AT_ONCE, link.info.limits.max_tokens_per_call) // wanted.shape[1])
    parts = torch.split(wanted[answers.done :], rows)
    with bar(None, "asking the cloud", len(parts)) as advance:
        for number, ids in enumerate(parts, 1):
            hidden = front.entry(ids)
            target, _ = link.forward_span(hidden, None, None, keep=False, plan=plan)
            answers.add(emulator(hidden), target.float())
            if number % _PARTS_KEPT == 0:
                answers.save(package)
            advance()


# What may be sent -----------------------------------------------------------------------------------------------------


def _public(texts: Sequence[str], config: FitConfig, tokenizer: Any) -> Sequence[str]:
    """The texts that may be sent: none holds a secret, or shares a run of tokens with the private data.

    Raises:
        DataError: One does; with `leave_out_shared`, where one holds a secret, or all share a run. None is quoted.
    """
    plain = [plain_text(text) for text in texts] if config.secrets else []
    for number, secret in enumerate(read_secrets(config.secrets), 1) if config.secrets else ():
        wanted = plain_text(secret)
        for place, text in enumerate(plain, 1):
            if wanted and wanted in text:
                raise DataError(
                    f"text {place} of {config.text} holds the string in line {number} of {config.secrets}: nothing was "
                    "sent; take the text out"
                )
    shared = _shared(texts, config, tokenizer)
    if not shared or (config.leave_out_shared and len(shared) < len(texts)):
        return [text for place, text in enumerate(texts) if place not in shared]
    first, (at, where) = next(iter(shared.items()))
    line = f" (line {_line(texts[first], at, tokenizer)})" if len(texts) == 1 else ""
    raise DataError(
        f"{len(shared)} of the {len(texts)} texts in {config.text} share a run of {RUN} tokens with private ones, "
        f"the first of them text {first + 1}{line} with {where}: nothing was sent; take them out"
        + ("" if len(shared) == len(texts) else ", or give --leave-out-shared (leave_out_shared of a job)")
    )


def _shared(texts: Sequence[str], config: FitConfig, tokenizer: Any) -> dict[int, tuple[int, str]]:
    """Which texts share a run with private ones: the token where it begins, and where the private one is."""
    sources = [source for source in (config.data, config.validation) if source not in (None, NO_DATA)]
    public = {run for text in texts for run in runs_of(text, tokenizer)} if sources else set()
    private: dict[int, str] = {}
    for source in sources:
        examples = read_examples(source, config)
        for example, parts in zip(examples, rendered(examples, tokenizer), strict=True):
            for text in ("".join(parts), " ".join(parts), *parts):  # in a public text they may stand apart, or not
                for run in runs_of(text, tokenizer):
                    if run in public:
                        private.setdefault(run, example.where)
    shared: dict[int, tuple[int, str]] = {}
    for place, text in enumerate(texts) if private else ():
        for at, run in enumerate(runs_of(text, tokenizer)):
            if run in private:
                shared[place] = at, private[run]
                break
    return shared


def _line(text: str, at: int, tokenizer: Any) -> int:
    """The line of a text in which a token of the plain text stands, from 1."""
    lines = text.split("\n")
    return 1 + bisect_right(
        range(1, len(lines)), at, key=lambda number: len(tokens_of("\n".join(lines[:number]), tokenizer))
    )

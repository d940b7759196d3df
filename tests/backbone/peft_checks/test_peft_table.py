"""The table of PEFT's methods: each split against whole, by logits and gradients, with trainable parameters at random.

`docs/peft-methods.md` is what this file writes. To write it anew:

    ISTHMUS_WRITE_TABLE=1 python -m pytest tests/backbone/peft_checks/test_peft_table.py
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.models.peft_methods import ALL, EDGE, METHODS, OPTIONS, Method, mixture, names
from torch import Tensor

from isthmus.backbone.peft_checks import allowed, checks
from isthmus.common.errors import IsthmusError

from ..conftest import Pairs, batch
from ..sites.test_edge_sites import NO_DROPOUT, split

TABLE = Path(__file__).parents[3] / "docs" / "peft-methods.md"
WRITE = os.environ.get("ISTHMUS_WRITE_TABLE") == "1"
VERSION = "0.21.2"
"""The version of PEFT that the committed table is of."""

EXACT, DIFFERENT, INVALID = "exact", "silently different", "not valid here"

Rows = dict[str, tuple[str, str, str]]


def _randomise(model: torch.nn.Module) -> None:
    """Move every trainable parameter, equally in equal models: most adapters begin as the identity."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(0.05 * noise)


def _run(model: Any, config: Any, extra: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and the gradients of the trainable parameters by name."""
    torch.manual_seed(0)
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's, about its own methods
        tuned = peft.get_peft_model(model, config)
        _randomise(tuned)
        tuned.train()
        inputs = batch("left_padded")
        ids = inputs["input_ids"]
        for name, value in extra.items():
            inputs[name] = torch.tensor(value) if isinstance(value, list) else torch.full_like(ids, value)
        torch.manual_seed(1)
        output = tuned(**inputs)
        output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}


def _same(ours: Any, theirs: Any) -> bool:
    if not torch.equal(ours[0], theirs[0]) or ours[1].keys() != theirs[1].keys():
        return False
    return all(
        torch.equal(gradient, theirs[1][name]) if gradient is not None else theirs[1][name] is None
        for name, gradient in ours[1].items()
    )


def compare(pairs: Pairs, make: Callable[[], Any], extra: dict[str, Any] | None = None, family: str = "llama") -> str:
    """What becomes of a configuration: `EXACT`, `DIFFERENT`, `INVALID`, or why it is refused."""
    pair = pairs(family, **NO_DROPOUT.get(family, {}))
    try:
        # A copy lies in memory as the edge's tensors do, and how a decomposition rounds depends on that (AdaMSS).
        whole = _run(copy.deepcopy(pair.whole), make(), extra or {})
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        return f"{INVALID} ({type(error).__name__}: {error})"
    if not any(gradient is not None and gradient.abs().sum() > 0 for gradient in whole[1].values()):
        return f"{INVALID} (no gradient)"
    model, _ = split(pair)
    try:
        ours = _run(model, make(), extra or {})
    except (IsthmusError, ValueError) as error:
        if not isinstance(error, IsthmusError) and "which the cloud holds" not in str(error):
            raise
        reason = re.sub(r" \(\w+\)$", "", str(error).split(": ")[0])  # which function of torch was asked
        return "refused: " + re.sub(r"(model\.layers|transformer\.h)\.2(?!\d)", "…", reason)
    return EXACT if _same(ours, whole) else DIFFERENT


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any) -> Path:
    """Two LoRA adapters each for the edge's layers and for all, for X-LoRA."""
    from ..conftest import whole_model

    folder = tmp_path_factory.mktemp("experts")
    for kind, layers in (("EDGE", EDGE), ("ALL", ALL)):
        for name in ("0", "1"):
            torch.manual_seed(int(name))
            targets = names(layers, "self_attn.q_proj")
            config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
            peft.get_peft_model(whole_model(checkpoints("llama")), config).save_pretrained(folder / kind / name)
    return folder


def _methods(experts: Path) -> dict[str, Method]:
    installed = {kind.value for kind in peft.PeftType}
    every = dict(sorted({**METHODS, "XLORA": mixture(experts)}.items()))
    return {name: method for name, method in every.items() if name in installed}


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, experts: Path, checkpoints: Any) -> Rows:
    """Of each method: its configuration, and what becomes of it in the edge's layers and in all."""
    from ..conftest import make_pairs

    pairs = make_pairs(checkpoints)

    def cell(method: Method, layers: Sequence[int]) -> str:
        return compare(pairs, lambda: method.make(layers), method.inputs)

    return {
        name: (method.shown, cell(method, EDGE), cell(method, ALL) if method.layered else "-")
        for name, method in _methods(experts).items()
    }


@pytest.fixture(scope="module")
def options(checkpoints: Any) -> dict[str, tuple[str]]:
    from ..conftest import make_pairs

    pairs = make_pairs(checkpoints)
    return {name: (compare(pairs, make, family=family),) for name, (family, make) in OPTIONS.items()}


def _lines(heads: Sequence[str], rows: dict[str, Sequence[str]]) -> list[str]:
    cells = [heads, ["---"] * len(heads), *([name, *row] for name, row in rows.items())]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _document(rows: Rows, options: dict[str, tuple[str]]) -> str:
    shown = {name: (f"`{row[0]}`", *row[1:]) for name, row in rows.items()}
    spoken = {f"`{name}`" if "(" not in name else name: row for name, row in options.items()}
    return "\n".join(
        [
            "# PEFT's methods on a split model",
            "",
            "Made by `ISTHMUS_WRITE_TABLE=1 python -m pytest tests/backbone/peft_checks/test_peft_table.py` with",
            f"PEFT {VERSION}; do not edit. The test runs each configuration on a tiny Llama of six layers (or the",
            "family named), whole and split (plan 2:2), with trainable parameters at random, and compares the logits",
            "and all gradients.",
            "",
            f"- **{EXACT}**: both are equal, bit for bit.",
            "- **refused**: by `UnsupportedCallError` (exit code 24) or PEFT's own error, before any number is",
            "  computed. What follows is the beginning of the message; `…` stands for the first layer of the cloud.",
            "- **-**: the method works on the model's input, which is the edge's.",
            "",
            "Methods work on `q_proj` and `v_proj` unless the configuration says otherwise.",
            "",
            *_lines(["method", "configuration", "in the edge's layers", "in all layers"], shown),
            "",
            "Options that say what is trained. The method is LoRA on `q_proj` of all layers, unless another one is",
            "named; `edge` is `q_proj` of the edge's layers alone, by full names.",
            "",
            *_lines(["configuration", "on the split model"], spoken),
            "",
        ]
    )


@pytest.mark.long
def test_no_method_is_silently_different(rows: Rows, options: dict[str, tuple[str]]) -> None:
    cells = {(name, place): row[place] for name, row in rows.items() for place in (1, 2)}
    cells |= {(name, 0): row[0] for name, row in options.items()}
    assert {name: cell for name, cell in cells.items() if cell == DIFFERENT} == {}
    assert sum(cell == EXACT for cell in cells.values()) > 40


@pytest.mark.long
@pytest.mark.skipif(peft.__version__ != VERSION, reason=f"the table is of PEFT {VERSION}")
def test_the_table_is_of_every_method_and_every_configuration_is_valid(
    rows: Rows, options: dict[str, tuple[str]]
) -> None:
    assert set(rows) == {kind.value for kind in peft.PeftType}
    every = {**{name: row[1:] for name, row in rows.items()}, **options}
    assert {name: cells for name, cells in every.items() if any(cell.startswith(INVALID) for cell in cells)} == {}


@pytest.mark.long
@pytest.mark.skipif(peft.__version__ != VERSION, reason=f"the table is of PEFT {VERSION}")
def test_the_committed_table_is_what_the_methods_do(rows: Rows, options: dict[str, tuple[str]]) -> None:
    document = _document(rows, options)
    if WRITE:
        TABLE.write_text(document, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == document, "run ISTHMUS_WRITE_TABLE=1 python -m pytest " + __file__


# Each check has something that only it catches ------------------------------------------------------------------------


def _no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowed, "check_method", lambda *_: None)


def _no_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check_against_whole", lambda *_: None)


def _no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check_sites", lambda *_: None)


@pytest.mark.parametrize("method", ["IA3", "OFT"])
def test_without_the_list_the_probe_refuses_and_without_both_the_table_shows_it(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def make() -> Any:
        return METHODS[method].make(ALL)

    assert compare(pairs, make).startswith("refused")
    _no_list(monkeypatch)
    assert "depends on that linear's weight" in compare(pairs, make)
    _no_probe(monkeypatch)
    assert compare(pairs, make) == DIFFERENT


@pytest.mark.parametrize(
    "option",
    ["edge, bias='all', Qwen2", "edge, bias='all', GPT-2", "target_parameters=['self_attn.q_proj.weight']"],
)
def test_without_the_whole_models_skeleton_the_table_shows_what_is_dropped(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    family, make = OPTIONS[option]
    assert compare(pairs, make, family=family).startswith("refused")
    _no_whole(monkeypatch)
    assert compare(pairs, make, family=family) == DIFFERENT


def test_unequal_logits_gradients_and_names_are_told_apart() -> None:
    same = (torch.zeros(1), {"a": torch.ones(1)})
    assert _same(same, same)
    assert not _same(same, (torch.zeros(1), {"a": torch.ones(1) * 2}))
    assert not _same(same, (torch.ones(1), {"a": torch.ones(1)}))
    assert not _same(same, (torch.zeros(1), {}))

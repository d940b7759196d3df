"""The README's first Python example, run against a real server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import tiny_checkpoint

README = Path(__file__).parents[2] / "README.md"
ADDRESS = 'connect("isthmus://cloud.example:7443#SHA256:…")'


def example() -> str:
    """The first Python block of the README."""
    found = re.search(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    assert ADDRESS in found[1]
    return found[1]


def layers_adapted(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Run the code against a tiny Llama of six layers, of which the edge has two at either end.

    Returns the layers that its saved adapter has weights for.
    """
    texts = folder / "tickets.txt"
    texts.write_text("".join(f"case {number}\n" for number in range(8)), encoding="utf-8")
    monkeypatch.setenv("ISTHMUS_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    model = tiny_checkpoint("llama", folder / "model")
    with ThreadServer(served(model, folder / "parts"), Home(folder)) as server:
        reached = f"connect({server.address!r}, key={str(server.home.key_file)!r})"
        short = code.replace(ADDRESS, reached).replace('"run"', '"run", max_steps=2, report_to=[], use_cpu=True')
        exec(compile(short, "README.md", "exec"), {})  # noqa: S102 - the document's own code is what is tested
    names = load_file(folder / "my-adapter" / "adapter_model.safetensors")
    return {int(found[1]) for name in names if (found := re.search(r"\.layers\.(\d+)\.", name))}


def test_the_example_trains_adapters_on_the_edges_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert layers_adapted(example(), tmp_path, monkeypatch) == {0, 1, 4, 5}


def test_without_layers_to_transform_it_would_adapt_the_clouds_layers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere = example().replace(", layers_to_transform=list(model.split_plan.edge_layers)", "")
    assert layers_adapted(everywhere, tmp_path, monkeypatch) == set(range(6))

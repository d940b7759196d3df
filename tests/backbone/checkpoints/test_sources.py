"""From a name to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints import sources
from isthmus.backbone.checkpoints.built_in import BUILT_IN
from isthmus.backbone.checkpoints.sources import Checkpoint, files_beside_the_weights, is_part, load_tokenizer, resolve
from isthmus.common.errors import CheckpointError, DiskError, UnknownModelError, UnsupportedFamilyError

from ..conftest import Checkpoints

QUIET = Console(quiet=True)


def test_a_folder_is_a_checkpoint(checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama")
    found = resolve(str(folder))
    assert found == Checkpoint(folder.resolve(), "model")
    assert found.config.num_hidden_layers == 6
    assert not found.is_edge_parts
    assert load_tokenizer(found.folder).decode(load_tokenizer(found.folder).encode("wörds")) == "wörds"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./no/such/folder", "does not exist"),
        ("/no/such.gguf", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("two words", "does not exist"),
        ("a/b/c", "does not exist"),
        ("", "config.json|does not exist"),
    ],
)
def test_a_name_of_nothing_is_refused(name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModelError, match=says):
        resolve(name, cache_dir=tmp_path, console=QUIET)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smollm2-135", "smollm2-135m"),
        ("models/tiny-lama", "models/tiny-llama"),
        ("models/tiny.guf", "models/tiny.gguf"),
    ],
)
def test_a_name_that_is_nearly_right_is_asked_about(
    name: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(model: str, _console: Console) -> Path:
        raise UnknownModelError(f"the hub does not give {model}")

    monkeypatch.setattr(sources, "snapshot", nowhere)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    (tmp_path / "models" / "tiny-llama" / "config.json").write_text("{}")
    (tmp_path / "models" / "tiny.gguf").write_text("")
    with pytest.raises(UnknownModelError, match=f"; did you mean {meant!r}\\?$"):
        resolve(name, cache_dir=tmp_path, console=QUIET)
    with pytest.raises(UnknownModelError) as other:  # the control: nothing is like it
        resolve("elephant/trunk", cache_dir=tmp_path, console=QUIET)
    assert "did you mean" not in str(other.value)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"no config\.json"):
        resolve(str(tmp_path), console=QUIET)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnknownModelError, match="neither a folder nor"):
        resolve(str(tmp_path / "notes.txt"), console=QUIET)
    (tmp_path / "broken.gguf").write_text("hello")
    with pytest.raises(CheckpointError, match="no GGUF"):
        resolve(str(tmp_path / "broken.gguf"), cache_dir=tmp_path / "cache", console=QUIET)
    (tmp_path / "half.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16))
    with pytest.raises(CheckpointError, match=r"cannot convert half\.gguf"):
        resolve(str(tmp_path / "half.gguf"), cache_dir=tmp_path / "cache", console=QUIET)
    assert not list((tmp_path / "cache").glob("gguf-*"))


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ("{", CheckpointError, r"config\.json"),
        ("[]", CheckpointError, "no JSON object"),
        ("[" * 100_000, CheckpointError, "cannot read"),
        ('{"model_type": ["llama"]}', UnsupportedFamilyError, "llama"),
        ('{"model_type": "nonsense"}', UnsupportedFamilyError, "'nonsense'.*llama"),
        ('{"model_type": "llama", "hidden_size": "wide"}', CheckpointError, "does not make sense"),
        ('{"model_type": "llama", "num_attention_heads": 0}', CheckpointError, "does not make sense"),
        ('{"model_type": "qwen3", "num_hidden_layers": 10001}', CheckpointError, "names 10001 layers"),
    ],
)
def test_a_bad_configuration_is_refused(tmp_path: Path, content: str, error: type[Exception], says: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=says):
        _ = Checkpoint(tmp_path, "bad").config


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_hub_that_cannot_be_reached_or_knows_no_such_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def gone(*_args: object, **_options: object) -> None:
        raise RepositoryNotFoundError("404 Client Error", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]  # all it reads

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", gone)
    with pytest.raises(UnknownModelError, match="the hub does not give nobody/nothing"):
        resolve("nobody/nothing", console=QUIET)

    def unreachable(*_args: object, **_options: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(UnknownModelError, match=r"cannot be reached \(Name or service not known\)"):
        resolve("nobody/nothing", console=QUIET)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        resolve(BUILT_IN, cache_dir=tmp_path / "file", console=QUIET)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    assert sources.default_cache() == tmp_path
    monkeypatch.delenv("ISTHMUS_CACHE")
    assert sources.default_cache() == Path.home() / ".cache" / "isthmus"


@pytest.mark.real_model
def test_the_real_model_speaks_and_splits(real_model: Checkpoint) -> None:
    from transformers import AutoModelForCausalLM

    from isthmus.backbone.plan import SplitPlan
    from isthmus.backbone.split.edge_parts import load_edge_parts
    from isthmus.backbone.split.span import load_span

    found = real_model
    plan = SplitPlan.parse("2:2", found.config.num_hidden_layers)
    edge = load_edge_parts(found, plan, load_span(found, plan))
    whole = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
    tokenizer = load_tokenizer(found.folder)
    inputs = tokenizer(["The capital of France is", "Water boils at"], return_tensors="pt", padding=True)
    assert torch.equal(edge(**inputs).logits, whole(**inputs, use_cache=False).logits)
    assert edge.lm_head.weight is edge.model.embed_tokens.weight
    tokens = edge.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    assert "Paris" in tokenizer.decode(tokens[0])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>assistant\n")
    assert whole.generation_config.eos_token_id == tokenizer.eos_token_id


def most_values_in(weight: torch.Tensor, block: int) -> int:
    """The largest number of different values in a block of neighbouring weights."""
    ordered = weight.reshape(-1, block).sort(dim=1).values
    return int((ordered.diff(dim=1) != 0).sum(dim=1).max()) + 1


@pytest.mark.real_model
def test_the_real_model_comes_from_a_file_of_4_bits(real_model: Checkpoint) -> None:
    """So whoever keeps its layers on that grid, blocks of 32, keeps the model; larger blocks hold more values."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(real_model.folder, dtype=torch.float32)
    linears = [linear.weight for linear in whole.model.layers.modules() if isinstance(linear, torch.nn.Linear)]
    assert len(linears) == 30 * 7
    assert max(most_values_in(weight, 32) for weight in linears) <= 16
    assert max(most_values_in(weight, 64) for weight in linears) > 16


def with_code(folder: Path, **settings: object) -> Path:
    """The tokenizer's files ask for a class that lies beside them."""
    (folder / "tokenizer_own.py").write_text("raise SystemExit('this code was run')")
    path = folder / "tokenizer_config.json"
    asked = {"auto_map": {"AutoTokenizer": ["tokenizer_own.Own", "tokenizer_own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    return folder


def test_code_beside_a_tokenizer_is_never_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError, match="custom code"):
        load_tokenizer(with_code(tiny_checkpoint("llama", tmp_path / "model")))
    assert "Do you wish" not in capsys.readouterr().out


def test_code_does_not_travel_with_the_parts(tmp_path: Path) -> None:
    folder = with_code(tiny_checkpoint("llama", tmp_path / "model"))
    names = {file.name for file in files_beside_the_weights(folder)}
    assert {"config.json", "tokenizer.json"} <= names
    assert "tokenizer_own.py" not in names
    assert not is_part("tokenizer_own.py")
    assert is_part("tokenizer.model")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"pad_token": 5}'),
    ],
    ids=["list", "deep", "list of settings", "number"],
)
def test_a_tokenizer_that_makes_no_sense_is_named(tmp_path: Path, name: str, text: str) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "model")
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(folder)

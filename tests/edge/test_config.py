"""The training configuration: file, flags, and the sentence that a mistake gets."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.backbone.errors import ConfigError
from isthmus.edge.config import TrainConfig, load_config

CLOUD = "isthmus://h:1#SHA256:x"
NEEDED = {"cloud": CLOUD, "data": "d.jsonl"}


def toml(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = toml(
        tmp_path, f'cloud = "{CLOUD}"\ndata = "a.csv"\nrank = 4\nlearning_rate = 1e-3\ntarget_modules = ["q_proj"]\n'
    )
    config = load_config(path, {"rank": 16, "data": None})
    assert (config.rank, config.data, config.learning_rate) == (16, "a.csv", 1e-3)
    assert config.target_modules == ("q_proj",)


def test_a_flag_for_steps_replaces_the_epochs_of_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, f'cloud = "{CLOUD}"\ndata = "a.csv"\nepochs = 3\n')
    config = load_config(path, {"steps": 10})
    assert (config.steps, config.epochs) == (10, None)


def test_names_of_modules_may_be_one_string() -> None:
    assert load_config(None, {**NEEDED, "target_modules": "q_proj, v_proj"}).target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"learning_rat": 1.0}, ["learning_rat", "'learning_rate'"]),
        ({"zzzz": 1}, ["zzzz", "cloud, key"]),
        ({"learning_rate": -1.0}, ["learning_rate = -1.0", "greater than 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate = nan", "finite"]),
        ({"method": "lorra"}, ["method = 'lorra'", "'lora'"]),
        ({"steps": 3, "epochs": 2}, ["steps = 3", "epochs = 2", "one of them"]),
        ({"batch": "many"}, ["batch = 'many'", "integer"]),
        ({"validation_split": 1.0}, ["validation_split = 1.0", "less than 1"]),
        ({"tls_cert": "c.pem"}, ["tls_cert", "tls_key"]),
        ({"text_column": "a", "completion_column": "b"}, ["text_column"]),
        ({"prompt_column": "a"}, ["completion_column"]),
        ({"prompt_column": "a", "prompt_template": "{a}", "completion_column": "b"}, ["prompt_template"]),
        ({"target_modules": "q_proj,,v"}, ["target_modules", "empty"]),
    ],
)
def test_a_mistake_is_one_line_with_the_value(values: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {**NEEDED, **values})
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # noqa: S301  # our own bytes


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'cloud' is missing: give --cloud"):
        load_config(None, {"data": "d.jsonl"})


def test_unknown_keys_of_the_file_are_refused_with_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "max-length = 5\n")
    with pytest.raises(ConfigError, match=r"'max-length' in .*run\.toml: did you mean 'max_length'"):
        load_config(path, NEEDED)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.toml", NEEDED)
    with pytest.raises(ConfigError, match=r"not TOML.*line 1"):
        load_config(toml(tmp_path, "a = = 1\n"), NEEDED)
    (tmp_path / "run.toml").write_bytes(b'a = "\xff"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "run.toml", NEEDED)


def test_the_connection_string_may_lie_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cloud.txt"
    path.write_text(CLOUD + "\n", encoding="utf-8")
    assert load_config(None, {**NEEDED, "cloud": str(path)}).connection_text() == CLOUD
    assert load_config(None, NEEDED).connection_text() == CLOUD
    with pytest.raises(ConfigError, match="neither a connection string nor a readable file"):
        load_config(None, {**NEEDED, "cloud": "nowhere"}).connection_text()


def test_every_field_is_described() -> None:
    assert [name for name, field in TrainConfig.model_fields.items() if not field.description] == []


def test_the_configuration_imports_nothing_heavy() -> None:
    code = "import sys, isthmus.edge.config; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'grpc')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

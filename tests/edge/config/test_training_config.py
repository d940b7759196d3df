"""The training configuration: file, flags, and the sentence that a mistake gets."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from isthmus.common.errors import ConfigError
from isthmus.edge.config.client_config import ClientConfig, EvalConfig, GenerateConfig
from isthmus.edge.config.settings import PANELS, field_names, panel_of
from isthmus.edge.config.training_config import TrainConfig, TuneConfig, TuningConfig, load_config

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
    ("value", "wanted"),
    [
        ("none", "none"),
        ("all", "all"),
        ("4", (4,)),
        ("4,7,10-12", (4, 7, 10, 11, 12)),
        (" 7, 4 , 4-5", (4, 5, 7)),
        ([7, 4], (4, 7)),
        (["10-11", 4], (4, 10, 11)),
    ],
)
def test_sites_are_numbers_and_ranges(value: object, wanted: object) -> None:
    config = load_config(None, {**NEEDED, "sites": value})
    assert config.sites == wanted
    assert TrainConfig.model_validate(config.model_dump()) == config
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


@given(st.lists(st.integers(0, 9999), min_size=1, max_size=20))
def test_written_sites_come_back_ascending_and_once(layers: list[int]) -> None:
    text = ",".join(map(str, layers))
    assert load_config(None, {**NEEDED, "sites": text}).sites == tuple(sorted(set(layers)))


def test_no_sites_and_adamw_by_default() -> None:
    config = load_config(None, NEEDED)
    assert (config.sites, config.optimizer) == ("none", "adamw")
    with pytest.raises(ConfigError, match="unknown setting 'sites'"):
        load_config(None, {"package": "p", "data": "d", "sites": "all"}, TuneConfig)
    assert load_config(None, {"package": "p", "data": "d", "optimizer": "mezo"}, TuneConfig).optimizer == "mezo"


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
        ({"optimizer": "adam"}, ["optimizer = 'adam'", "'lora-plus'"]),
        ({"optimizer": "lora-plus", "method": "vera"}, ["'lora-plus'", "vera", "method lora or dora"]),
        ({"optimizer": "lora-fa", "method": "dora"}, ["'lora-fa'", "dora", "optimizer adamw"]),
        ({"optimizer": "mezo", "method": "adalora"}, ["'mezo'", "adalora", "optimizer adamw"]),
        ({"optimizer": "mezo", "dropout": 0.1}, ["dropout = 0.1", "mezo", "give dropout = 0"]),
        ({"lora_plus_ratio": 0.5}, ["lora_plus_ratio = 0.5", "greater than or equal to 1"]),
        ({"mezo_eps": 0.0}, ["mezo_eps = 0.0", "greater than 0"]),
        ({"sites": "some"}, ["sites = 'some'", "10-12"]),
        ({"sites": "4,"}, ["sites = '4,'", "''"]),
        ({"sites": "12-10"}, ["sites = '12-10'", "range"]),
        ({"sites": "-4"}, ["sites = '-4'", "number"]),
        ({"sites": "0-99999"}, ["sites = '0-99999'", "range"]),
        ({"sites": []}, ["sites = []", "4,7,10-12"]),
        ({"sites": [True]}, ["sites = [True]", "'True'"]),
        ({"sites": 4}, ["sites = 4", "4,7,10-12"]),
        ({"sites": "all", "method": "bitfit"}, ["sites", "bitfit", "give sites = none"]),
        ({"site_policy": "random"}, ["site_policy = 'random'", "there are none", "--sites all"]),
        ({"site_policy": "some", "sites": "all"}, ["site_policy = 'some'", "'kill-revive'"]),
        ({"site_policy": "kill-revive", "sites": "all", "optimizer": "mezo"}, ["'kill-revive'", "mezo has none"]),
        (
            {"site_policy": "random", "sites": "all", "method": "adalora", "steps": 9},
            ["'random'", "method adalora needs them of all", "site_policy = always"],
        ),
        (
            {"site_policy": "kill-revive", "sites": "all", "optimizer": "lora-fa"},
            ["'kill-revive'", "optimizer lora-fa needs them of all"],
        ),
        ({"site_traffic": 0.0}, ["site_traffic = 0.0", "greater than 0"]),
        ({"site_computation": 1.5}, ["site_computation = 1.5", "less than or equal to 1"]),
        ({"overlap": 0}, ["overlap = 0"]),
        ({"overlap": 3, "accumulate": 2}, ["overlap = 3", "2 micro-batches", "raise --accumulate"]),
        ({"codec_every": 0}, ["codec_every = 0"]),
        ({"span_cache_mib": 0}, ["span_cache_mib = 0"]),
        ({"span_cache_mib": 9, "sites": "all"}, ["span_cache_mib = 9", "give sites = none"]),
        ({"span_cache_mib": 9, "codec": "auto:0.9"}, ["span_cache_mib = 9", "'auto:0.9'", "name a codec"]),
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
    for cls in (TrainConfig, TuneConfig, EvalConfig, GenerateConfig):
        assert [name for name, field in cls.model_fields.items() if not field.description] == []


def test_where_the_middle_layers_are_is_asked_first() -> None:
    assert field_names(TrainConfig)[:3] == ["cloud", "key", "codec"]
    assert field_names(TuneConfig)[:4] == ["package", "signer", "layers", "keep_outputs_gib"]
    assert set(field_names(TuneConfig)[4:]) == {*TuningConfig.model_fields, "defence", "defence_key"}


def test_fields_stand_heading_by_heading() -> None:
    for cls in (TrainConfig, TuneConfig, EvalConfig, GenerateConfig):
        headings = [panel_of(cls, name) for name in field_names(cls)]
        assert headings == sorted(headings, key=PANELS.index)
    assert panel_of(TrainConfig, "codec_every") == panel_of(TrainConfig, "cloud") == "Connection"
    assert panel_of(EvalConfig, "data") == "Data"


@pytest.mark.parametrize("cls", [EvalConfig, GenerateConfig])
def test_a_file_for_training_does_for_the_other_commands(tmp_path: Path, cls: type[ClientConfig]) -> None:
    """Their own keys are taken and checked; those of `train` are ignored, whatever they say."""
    text = f'cloud = "{CLOUD}"\ndata = "a.csv"\ncodec = "int8"\nlearning_rate = 1e-3\nsites = "some"\nsteps = 5\n'
    config = load_config(toml(tmp_path, text), {"plugged": True}, cls)
    assert (config.cloud, config.codec) == (CLOUD, "int8")
    assert not hasattr(config, "learning_rate")
    with pytest.raises(ConfigError, match="unknown setting 'learning_rate'"):
        load_config(toml(tmp_path, text), {"learning_rate": 1e-3}, cls)
    with pytest.raises(ConfigError, match=r"'learning-rate' in .*run\.toml: did you mean 'learning_rate'"):
        load_config(toml(tmp_path, text + "learning-rate = 1e-3\n"), {}, cls)
    with pytest.raises(ConfigError, match="call_timeout = -1"):
        load_config(toml(tmp_path, text + "call_timeout = -1\n"), {}, cls)


def test_a_file_for_all_commands_does_for_training(tmp_path: Path) -> None:
    path = toml(tmp_path, f'cloud = "{CLOUD}"\ndata = "a.csv"\ndeadline = 2.0\n')
    assert load_config(path, {}).data == "a.csv"
    assert load_config(path, {}, GenerateConfig).deadline == 2.0


def test_training_and_generation_share_what_they_both_have(tmp_path: Path) -> None:
    text = f'cloud = "{CLOUD}"\ndata = "a.csv"\nsites = "all"\nleased = "4,7-8"\nseed = 3\nbatch = 2\nout = "run"\n'
    path = toml(tmp_path, text + "temperature = 0.5\nbatch_size = 5\n")
    train, generate = load_config(path, {}), load_config(path, {}, GenerateConfig)
    assert train.leased == generate.leased == (4, 7, 8)
    assert train.seed == generate.seed == 3
    assert (train.batch, generate.batch_size, generate.temperature) == (2, 5, 0.5)
    with pytest.raises(ConfigError, match="leased = 'some'"):
        load_config(path, {"leased": "some"}, GenerateConfig)


def test_a_kind_of_run_takes_its_own_settings_only(tmp_path: Path) -> None:
    path = toml(tmp_path, 'package = "p"\ndata = "a.csv"\n')
    config = load_config(path, {"rank": 2}, TuneConfig)
    assert (config.package, config.rank, config.signer) == (Path("p"), 2, None)
    with pytest.raises(ConfigError, match=r"unknown setting 'cloud'"):
        load_config(path, {"cloud": CLOUD}, TuneConfig)
    with pytest.raises(ConfigError, match=r"unknown setting 'package' in .*run\.toml"):
        load_config(path, {"cloud": CLOUD})
    with pytest.raises(ConfigError, match=r"precision = 'fp16': .*'bf16'"):
        load_config(path, {"precision": "fp16"}, TuneConfig)


@pytest.mark.parametrize("text", ["SHA256:abc", "isthmus://h:1#SHA256:abc", "isthmus+tls://h:1#SHA256:abc"])
def test_the_signer_may_be_a_connection_string_and_lie_in_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cloud.txt"
    path.write_text(text + "\n", encoding="utf-8")
    for signer in (text, str(path)):
        config = load_config(None, {"package": "p", "data": "d", "signer": signer}, TuneConfig)
        assert config.signer_text() == "SHA256:abc"
    assert load_config(None, {"package": "p", "data": "d"}, TuneConfig).signer_text() is None
    with pytest.raises(ConfigError, match=r"signer = 'nowhere' is neither a fingerprint nor a readable file"):
        load_config(None, {"package": "p", "data": "d", "signer": "nowhere"}, TuneConfig).signer_text()


def test_the_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, isthmus.edge.config.training_config; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'grpc')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

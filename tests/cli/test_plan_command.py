"""`isthmus plan` on a tiny model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer
from support.models.round_speeds import speed
from support.models.tiny import tiny_checkpoint
from typer.testing import CliRunner

from isthmus.cli.plan_command import plan
from isthmus.common.errors import ConfigError, IsthmusError, PlanError
from isthmus.planner.cost_model import MODES
from isthmus.planner.plan_report import MEASURED_LEAK, TUNING_ASSUMED
from isthmus.planner.speed_profile import SpeedProfile
from isthmus.privacy.ledger.mode_leaks import CLOUD_READS

ROOT = Path(__file__).parents[2]

app = typer.Typer(rich_markup_mode=None)
app.command()(plan)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Two machines, the cloud's ten times as fast."""
    decoding = {"decode_layer_s": 0.01, "verify_layer_s": 0.012, "decode_head_s": 0.02, "verify_head_s": 0.03}
    quick = {"layer_forward": 2e4, "layer_backward": 1e4, "layer_inference": 4e4, "decode_layer_s": 0.001}
    machines = {"edge": speed(**decoding), "cloud": speed(**decoding | quick)}
    paths = {}
    for name, machine in machines.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(asdict(machine)))
    return paths


def run(model: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["--model", str(model), "--batch", "2", "--seq", "8", *options])
    if isinstance(result.exception, IsthmusError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def planned(model: Path, files: dict[str, Path], *options: str) -> dict[str, Any]:
    speeds = ("--edge-speed", str(files["edge"]), "--cloud-speed", str(files["cloud"]))
    value: dict[str, Any] = json.loads(run(model, *speeds, "--json", *options))
    return value


def test_json_has_modes_a_recommendation_and_assumptions(model: Path, files: dict[str, Path]) -> None:
    result = planned(model, files, "--link", "100mbit,50ms")
    assert [row["mode"] for row in result["modes"]] == list(MODES)
    assert result["recommendation"].startswith("Use ")
    assert any("2 x 8" in line for line in result["assumptions"])


def test_options_reach_the_prediction(model: Path, files: dict[str, Path]) -> None:
    def row(mode: str, *options: str) -> dict[str, Any]:
        found: dict[str, Any] = next(r for r in planned(model, files, *options)["modes"] if r["mode"] == mode)
        return found

    base = {mode["mode"]: mode for mode in planned(model, files)["modes"]}
    plain = base["edge"]
    assert row("edge", "--codec", "int8")["bytes_up"] < plain["bytes_up"]
    assert row("edge", "--summed")["bytes_up"] < plain["bytes_up"]
    assert row("edge", "--own-layers")["bytes_down"] > plain["bytes_down"]
    assert row("edge", "--target-modules", "q_proj,down_proj")["round_trips"] > plain["round_trips"]
    assert row("edge", "--edge-layers", "1:1")["round_trips"] > plain["round_trips"]
    assert row("edge", "--link", "1mbit,1s")["step_s"] > plain["step_s"] + plain["round_trips"]
    assert row("low_rank", "--rank", "16")["bytes_up"] > base["low_rank"]["bytes_up"]
    assert row("kill_revive", "--live-share", "0.5")["bytes_up"] > base["kill_revive"]["bytes_up"]
    assert row("taps", "--taps", "2")["first_epoch_bytes_down"] < base["taps"]["first_epoch_bytes_down"]
    assert row("taps", "--tap-width", "4")["first_epoch_bytes_down"] < base["taps"]["first_epoch_bytes_down"]
    assert row("emulator", "--emulator-keep", "1")["edge_flops"] > base["emulator"]["edge_flops"]
    slower = {**files, "cloud": files["edge"]}
    assert planned(model, slower)["modes"][1]["cloud_s"] == pytest.approx(
        10 * planned(model, files)["modes"][1]["cloud_s"]
    )


def test_generation_is_predicted_with_and_without_drafts(model: Path, files: dict[str, Path]) -> None:
    found = planned(model, files, "--link", "1gbit,80ms", "--acceptance-rate", "0.7", "--draft-layers", "1")
    generation = found["generation"]
    assert generation["edge_s"] == pytest.approx(4 * 0.01 + 0.02)
    assert generation["cloud_s"] == pytest.approx(2 * 0.001)
    assert generation["wire_s"] == pytest.approx(0.08, rel=1e-3)
    none, ngram, small = generation["drafts"]
    assert none["tokens_per_s"] == pytest.approx(1 / 0.142, rel=1e-3)
    assert (ngram["draft"], ngram["acceptance_rate"], ngram["acceptance_rate_assumed"]) == ("ngram", 0.7, False)
    assert (small["draft"], small["layers"]) == ("small", 1)
    assert ngram["tokens_per_s"] > small["tokens_per_s"] > none["tokens_per_s"]
    assert any("70%, as given" in line for line in found["assumptions"])
    longer = planned(model, files, "--prompt", "128", "--codec", "int8")["generation"]
    assert longer["prompt_tokens"] == 128
    assert longer["first_token_s"] > planned(model, files, "--codec", "int8")["generation"]["first_token_s"]
    assert longer["bytes_up"] < generation["bytes_up"]
    more = planned(model, files, "--prompt", "128", "--codec", "int8", "--tokens", "640")["generation"]
    assert more["drafts"][2]["tokens_per_s"] > longer["drafts"][2]["tokens_per_s"]
    assert longer["drafts"][2]["layers"] == 2  # by default three, and the cloud has two


def test_a_person_gets_a_table_and_a_sentence(model: Path, files: dict[str, Path]) -> None:
    text = run(model, "--edge-speed", str(files["edge"]), "--cloud-speed", str(files["cloud"]), "--goal", "privacy")
    assert "s/step" in text
    assert "Use emulator (isthmus emulator tune): " in text
    recommended, generation = text.split("Generation: ")
    assert "n-grams" in generation
    assert max(map(len, text.splitlines())) <= 80
    code_names = [mode for mode in MODES if "_" in mode and mode != "low_rank"]  # that one is typed
    assert not [mode for mode in code_names if mode in recommended]
    longer = run(model, "--edge-speed", str(files["edge"]), "--cloud-speed", str(files["cloud"]), "--steps", "7")
    assert " 7 steps" in longer
    assert " for 7" in " ".join(longer.split())


def test_privacy_names_the_private_mode_first_and_other_goals_do_not(model: Path, files: dict[str, Path]) -> None:
    speeds = ("--edge-speed", str(files["edge"]), "--cloud-speed", str(files["cloud"]), "--link", "1mbit,50ms")
    text = " ".join(run(model, *speeds, "--goal", "privacy").split())
    assert text.startswith("First, the private mode: `isthmus emulator tune`. While it trains, nothing of the texts")
    order = ["- fidelity (1:2", "- guarded (1:2", "can tune it, and has", "with prompts that cross", "Second, split"]
    places = [text.index(each) for each in order]
    assert places == sorted(places)
    assert CLOUD_READS in text
    assert f"Measured: {MEASURED_LEAK}" in text
    assert " a package of about " in text
    assert text.count(TUNING_ASSUMED) == 1
    found = planned(model, files, "--goal", "privacy", "--link", "1mbit,50ms")
    private = found["private"]
    fidelity = private["presets"][0]
    assert f"{fidelity['first_epoch_step_s']:.0f} s a step in the first epoch" in text
    assert fidelity["later_epoch_step_s"] < fidelity["first_epoch_step_s"]
    assert fidelity["fetch_s"] == pytest.approx(fidelity["package_bytes"] / 125_000 + 0.05)
    fit = private["fit"]
    assert fit["bytes_each_way"] == 20_000 * 4 * 32
    assert fit["transfer_s"] == pytest.approx(2 * fit["bytes_each_way"] / 125_000 + 0.05)
    assert "20,000 tokens are 2.4 MiB each way, " in text
    assert fidelity["fits_memory"] is None  # it is not known how much is free
    row = next(each for each in found["modes"] if each["mode"] == "emulator")
    assert row["step_s"] == fidelity["later_epoch_step_s"]
    for goal in ("quality", "speed"):
        assert "private" not in planned(model, files, "--goal", goal)
        assert "private mode" not in run(model, *speeds, "--goal", goal)


def test_privacy_says_where_the_memory_does_not_do(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps(asdict(speed(memory_bytes=10))))
    text = run(model, "--edge-speed", str(small), "--cloud-speed", str(small), "--goal", "privacy")
    assert "this machine has less free" in " ".join(text.split())


def test_the_leak_is_measured_where_the_plan_says() -> None:
    file, _, anchor = MEASURED_LEAK.partition("#")
    headings = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
    assert anchor in [each.removeprefix("## ").lower().replace(" ", "-") for each in headings]


def test_a_leak_budget_says_which_modes_keep_it_and_why(model: Path, files: dict[str, Path]) -> None:
    speeds = ("--edge-speed", str(files["edge"]), "--cloud-speed", str(files["cloud"]))
    nothing = run(model, *speeds, "--goal", "privacy")
    assert "tokens<=0 and labels<=0: emulator only." in nothing
    assert "top only breaks it: tokens 1.00 (hidden states at the cut)" in nothing
    assert "emulator keeps it: nothing of the texts crosses" in nothing
    labels = run(model, *speeds, "--goal", "privacy", "--leak-budget", "labels<=0.1")
    assert "top only keeps it" in labels
    assert "split breaks it" in labels


def test_the_probe_s_output_is_what_cloud_speed_takes(
    model: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("isthmus.planner.speed_probe.ROUNDS", 1)
    measured = tmp_path / "measured.json"
    measured.write_text(run(model, "--probe", "--json", "--cloud-dtype", "bf16"))
    assert SpeedProfile.read(measured).batch == 2
    assert planned(model, {**files, "cloud": measured})["modes"]


def test_both_sides_are_measured_where_no_speed_is_given(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(_config: Any, _facts: Any, settings: Any, _advance: Any) -> SpeedProfile:
        asked.append(settings.dtype)
        return speed(dtype=settings.dtype)

    monkeypatch.setattr("isthmus.planner.speed_probe.measure", measure)
    run(model, "--json")
    assert asked == ["fp32"]  # the cloud counts as a machine like this one
    run(model, "--json", "--cloud-dtype", "bf16")
    assert asked == ["fp32", "fp32", "bf16"]


def test_bad_input_is_refused_before_anything_is_measured(model: Path, files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="link 'soon'"):
        run(model, "--link", "soon")
    with pytest.raises(PlanError, match="9:9"):
        run(model, "--edge-layers", "9:9")
    with pytest.raises(ConfigError, match="zip"):
        run(model, "--codec", "zip")
    with pytest.raises(ConfigError, match="x_proj"):
        run(model, "--target-modules", "x_proj")
    with pytest.raises(ConfigError, match="a draft of 3 layers"):
        run(model, "--draft-layers", "3")
    with pytest.raises(ConfigError, match="gone"):
        run(model, "--cloud-speed", "gone.json", "--edge-speed", str(files["edge"]))


def test_help_has_an_example() -> None:
    assert "Example: isthmus plan" in CliRunner().invoke(app, ["--help"]).output

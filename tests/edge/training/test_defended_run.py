"""`edge train --defence`, against a cloud in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from support.cloud.train_runs import Runs, interrupted
from support.models.small_training import config, data
from support.models.tiny import tiny_checkpoint
from support.run_folders import assert_same_run
from typer.testing import CliRunner

from isthmus.backbone.adapters.adapter_files import adapter_digest
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.edge.config.flags import GroupedCommand, with_flags
from isthmus.edge.config.training_config import TrainConfig, load_config
from isthmus.edge.training.defended_run import exposure_of, read_key

NEEDED: dict[str, Any] = {"cloud": "isthmus://h:1#SHA256:x", "data": "d.jsonl"}
NOISY = "gaussian:clip=1,sigma=0.5,gradient_clip=1e-3,gradient_sigma=0.5"
QUIET = "gaussian:clip=1,sigma=50,gradient_clip=1e-3,gradient_sigma=50"


@pytest.fixture(scope="module")
def plain(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without defences."""
    out = tmp_path_factory.mktemp("plain") / "out"
    runs.train(out, steps=2)
    return out


@pytest.fixture
def decoys(tmp_path: Path) -> str:
    path = tmp_path / "decoys.jsonl"
    lines = (json.dumps({"text": f"file {n}: " + "xy" * (n % 13)}) + "\n" for n in range(60))
    path.write_text("".join(lines))
    return f"decoys:file={path}"


def test_a_run_without_defences_is_untouched(plain: Path) -> None:
    assert not (plain / "defence-key").exists()
    report = json.loads((plain / "report.json").read_text())
    assert (report["defences"], report["epsilon"], report["guarantee"]) == ([], None, None)


def test_decoys_leave_the_run_its_bits(runs: Runs, plain: Path, tmp_path: Path, decoys: str) -> None:
    report = runs.train(tmp_path / "out", steps=2, defence=[decoys])
    assert_same_run(tmp_path / "out", plain)
    assert report.calls == 2 * json.loads((plain / "report.json").read_text())["calls"]
    assert report.loss_after == json.loads((plain / "report.json").read_text())["loss_after"]
    # The control: noise is noticed.
    runs.train(tmp_path / "noisy", steps=2, defence=[NOISY])
    assert adapter_digest(tmp_path / "noisy" / "adapter") != adapter_digest(plain / "adapter")


def test_the_same_key_gives_the_same_run(runs: Runs, tmp_path: Path) -> None:
    first = runs.train(tmp_path / "a", steps=2, defence=[NOISY])
    key = tmp_path / "a" / "defence-key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700
    again = runs.train(tmp_path / "b", steps=2, defence=[NOISY], defence_key=key)
    other = runs.train(tmp_path / "c", steps=2, defence=[NOISY])
    assert_same_run(tmp_path / "b", tmp_path / "a")
    assert first.loss_after == again.loss_after != other.loss_after
    assert adapter_digest(tmp_path / "c" / "adapter") != adapter_digest(tmp_path / "a" / "adapter")


def test_a_run_that_was_stopped_goes_on_bit_for_bit(runs: Runs, tmp_path: Path, decoys: str) -> None:
    defence = [
        "bottleneck:rank=8",
        "learned-noise:sigma=0.1",
        "embedding-noise:eta=90,denoise=true",
        NOISY,
        decoys,
        "smoothing:share=0.1",
        "dp-sgd:clip=1,sigma=0.1",
    ]
    whole, part = tmp_path / "whole", tmp_path / "part"
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    runs.train(whole, defence=defence, defence_key=key)
    interrupted(runs, part, 3, defence=defence, defence_key=key)
    with pytest.raises(CheckpointError, match="had another key"):
        runs.train(part, defence=defence, resume=True)
    report = runs.train(part, defence=defence, defence_key=key, resume=True)
    assert_same_run(part, whole)
    assert report.loss_after == json.loads((whole / "report.json").read_text())["loss_after"]
    with pytest.raises(CheckpointError, match="defence was"):
        runs.train(part, defence=defence[1:], defence_key=key, resume=True, steps=3)


def test_the_report_has_what_is_guaranteed(runs: Runs, tmp_path: Path) -> None:
    report = runs.train(tmp_path / "a", steps=2, defence=[QUIET, "dp-sgd:clip=1,sigma=50"])
    assert report.epsilon is not None
    assert 0 < report.epsilon < 10
    assert "everything that the cloud sees" in (report.guarantee or "")
    assert f"epsilon {report.epsilon:.3g} at delta 1e-05" in report.lines(tmp_path)
    bare = runs.train(tmp_path / "b", steps=2, defence=["gaussian:clip=1,sigma=50"])
    assert bare.epsilon is None
    assert "gradients go up without noise" in (bare.guarantee or "")


def test_a_resume_cannot_forget_evaluations(runs: Runs, tmp_path: Path) -> None:
    """Each of them sends the held-out texts under fresh noise, and the guarantee counts them."""
    noisy = [QUIET]
    whole = runs.train(tmp_path / "whole", eval_every=1, defence=noisy)
    interrupted(runs, tmp_path / "part", 3, eval_every=1, defence=noisy)
    with pytest.raises(CheckpointError, match=r"its defences had another eval_every \(1\)"):
        runs.train(tmp_path / "part", resume=True, defence=noisy)
    # None is made again here, and held-out texts are what is sent most often.
    assert runs.train(tmp_path / "part", resume=True, eval_every=1, defence=noisy).epsilon == whole.epsilon


def test_memoised_noise_guarantees_nothing_where_the_front_moves_without_gradients(runs: Runs, tmp_path: Path) -> None:
    for memo, guaranteed in (("true", False), ("false", True)):
        noise = f"gaussian:clip=1,sigma=50,memo={memo}"
        report = runs.train(tmp_path / memo, steps=1, optimizer="mezo", defence=[noise])
        assert (report.epsilon is not None) == guaranteed


def test_dropout_below_the_cut_moves_what_is_sent(tmp_path: Path) -> None:
    """Then two passes under one memoised noise show the difference between two masks."""
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    for name, overrides in (("random", {}), ("still", off)):
        folder = tiny_checkpoint("gpt2", tmp_path / name, **overrides)
        model = load_edge_parts(folder, SplitPlan.parse("2:2", 6), lambda hidden, *_: hidden).requires_grad_(False)
        assert exposure_of(model, model, config(tmp_path), data()).moves == (name == "random")
        assert not exposure_of(model, model, config(tmp_path, optimizer="mezo", dropout=0.0), data()).moves


def test_dp_sgd_makes_a_call_for_each_example(runs: Runs, plain: Path, tmp_path: Path) -> None:
    report = runs.train(tmp_path / "out", steps=2, defence=["dp-sgd:clip=1,sigma=0.1"])
    assert report.calls == 2 * json.loads((plain / "report.json").read_text())["calls"]  # of micro-batches of two


def test_a_file_with_too_few_decoys_ends_the_run_before_anything_is_sent(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n")
    with pytest.raises(ConfigError, match="1 generated examples are too few"):
        runs.train(tmp_path / "out", defence=[f"decoys:file={path}"])


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defence", "more", "said"),
    [
        (NOISY, {"sites": "all"}, "sites send what no defence sees"),
        (NOISY, {"method": "prompt"}, "method prompt"),
        (NOISY, {"method": "ladder"}, "method ladder"),
        (NOISY, {"overlap": 2, "accumulate": 2}, "overlap = 2"),
        (NOISY, {"codec": "auto"}, "codec = 'auto' sends probes"),
        (NOISY, {"span_cache_mib": 8}, "span_cache_mib = 8 gives again"),
        ("decoys:file=d", {"span_cache_mib": 8}, "defence decoys changes what is sent"),
        ("smoothing:share=.1", {"optimizer": "mezo"}, "optimizer mezo has none"),
        ("dp-sgd:clip=1,sigma=1", {"optimizer": "mezo"}, "optimizer mezo has none"),
        ("dp-sgd:clip=1,sigma=1", {"draft": "package"}, "without dp-sgd's noise"),
        ("bottleneck:rank=4", {"optimizer": "lora-plus"}, "use adamw"),
        ("embedding-noise:eta=1,denoise=true", {"optimizer": "lora-plus"}, "use adamw"),
        ("learned-noise:sigma=1", {"optimizer": "mezo"}, "optimizer mezo has none"),
        ("mixing", {"batch": 1}, "batch is 1"),
        (["mixing", NOISY], {}, "exclude each other"),
        ("permutation", {}, "sends the same hidden states"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(defence: object, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_config(None, {**NEEDED, **more, "defence": defence})
    assert "\n" not in str(error.value)


def test_what_makes_sense_is_taken() -> None:
    more: dict[str, Any] = {"span_cache_mib": 8, "defence": ["smoothing:share=.1", "dp-sgd:clip=1,sigma=1"]}
    assert len(load_config(None, {**NEEDED, **more}).defences()) == 2
    assert load_config(None, NEEDED).defences() == []
    config = load_config(None, {**NEEDED, "defence": [NOISY]})
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_flag_may_be_given_several_times_and_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('cloud = "isthmus://h:1#SHA256:x"\ndata = "d"\ndefence = "rotation"\n')
    app, seen = typer.Typer(), []

    @app.command(cls=GroupedCommand)
    @with_flags(TrainConfig)
    def train(**flags: Any) -> None:
        seen.append(load_config(file, flags).defence)

    for arguments in (["--defence", "mixing", "--defence", "smoothing:share=0.1"], []):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
    assert seen == [("mixing", "smoothing:share=0.1"), ("rotation",)]


@pytest.mark.parametrize(("text", "said"), [("xyz", "is none"), ("ab" * 31, "has 31 bytes"), (None, "cannot be read")])
def test_a_bad_key_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "key").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_key(tmp_path / "key", make=False)

"""`edge train --defence`, against a cloud in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support.cloud.train_runs import Runs, cloud_for_runs, interrupted
from support.models.small_training import IDENTITY, config, data
from support.models.tiny import tiny_checkpoint
from support.run_folders import assert_same_run
from torch import Tensor
from typer.testing import CliRunner

from isthmus.backbone.adapters.adapter_files import adapter_digest
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.edge import split_run
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.flags import GroupedCommand, with_flags
from isthmus.edge.config.training_config import TrainConfig, load_config
from isthmus.edge.training import defended_run
from isthmus.edge.training.defended_run import SHOWN_FILE, exposure_of, read_key
from isthmus.privacy.defences.accountant import Exposure, guarantee
from isthmus.privacy.defences.defence_options import read_defence
from isthmus.privacy.recording.recorder import Recorder
from isthmus.privacy.recording.traffic import Traffic, read_traffic

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


# Steps that are made again --------------------------------------------------------------------------------------------


def killed(runs: Runs, out: Path, step: int, **values: Any) -> None:
    """A run whose process ends in a step as by a power cut: nothing is saved."""

    def end(_question: str, _phase: str) -> None:
        if link.step == step:
            raise RuntimeError("killed")  # no error that the loop knows

    with open_link(config := runs.config(out, **values)) as link:
        link.observer = end
        with pytest.raises(RuntimeError, match="killed"):
            split_run.train_over(link, config)
    assert not list(out.glob("checkpoint-*"))


@contextmanager
def lying(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Clouds change their answers to forwards while the block runs."""

    @contextmanager
    def lied_to(model: Any, *rest: Any) -> Iterator[Any]:
        honest = model.remote_layers.span
        model.remote_layers.span = lambda *inputs: change(honest(*inputs))
        with defended_run.defended_run(model, *rest) as defended:
            yield defended

    with monkeypatch.context() as patch:
        patch.setattr(split_run, "defended_run", lied_to)
        yield


def shown(out: Path) -> dict[str, int]:
    """What has been counted of the only run of a folder."""
    (counts,) = json.loads((out / SHOWN_FILE).read_text()).values()
    return dict(counts)


@pytest.fixture
def exposures(monkeypatch: pytest.MonkeyPatch) -> list[Exposure]:
    """What runs have gone by when they said what they guarantee."""
    found: list[Exposure] = []

    def noted(*arguments: Any) -> Exposure:
        found.append(exposure_of(*arguments))
        return found[-1]

    monkeypatch.setattr(defended_run, "exposure_of", noted)
    return found


def gradients(recorded: Traffic, step: int) -> list[list[Tensor]]:
    """Those of a step, by the sessions that sent it, in the order of their calls."""
    found: dict[str, list[Tensor]] = {}
    for each in recorded.backwards:
        if each.step == step:
            found.setdefault(each.session, []).append(each.gradient)
    return [*found.values()]


def test_a_step_that_is_resumed_shows_nothing_without_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cloud that answers it otherwise gets other noise; one that answers the same gets the same messages."""
    (tmp_path / "cloud").mkdir()
    (tmp_path / "recording").mkdir()
    clip, deviation = 1e-3, 5e-2
    with cloud_for_runs(tmp_path / "cloud", recorder=Recorder(tmp_path / "recording", 64 << 20)) as runs:
        killed(runs, tmp_path / "out", 2, defence=[QUIET])
        killed(runs, tmp_path / "out", 2, defence=[QUIET], resume=True)
        with lying(monkeypatch, lambda answer: answer + torch.linspace(-1, 1, answer.shape[-1])):
            killed(runs, tmp_path / "out", 2, defence=[QUIET], resume=True)
    first, again, otherwise = gradients(read_traffic(tmp_path / "recording"), 1)
    assert len(first) == 4
    assert all(map(torch.equal, first, again))
    for one, other in zip(first, otherwise, strict=True):
        difference = (one - other)[one.abs().sum(-1) > 0]  # padding is sent as zeros
        assert difference.std() == pytest.approx(2**0.5 * deviation, rel=0.15)
        assert difference.norm(dim=-1).min() > 100 * clip  # without noise, it is at most 2 * clip


def test_a_step_that_is_begun_again_in_a_process_goes_back_and_counts_again(tmp_path: Path) -> None:
    said: list[str] = []
    sent: list[Tensor] = []
    sums: list[Tensor] = []
    added = 0.0

    def span(hidden: Tensor, *_: Tensor | None) -> Tensor:
        assert said[-1].startswith("differential privacy")  # before anything is sent
        sent.append(hidden.detach().clone())
        return hidden + added

    model = load_edge_parts(tiny_checkpoint("llama", tmp_path / "model"), SplitPlan.parse("2:2", 6), span)
    options = config(tmp_path, dropout=0.0, defence=[QUIET, "dp-sgd:clip=1,sigma=1"])
    with defended_run.defended_run(model, model, options, IDENTITY, data(), None, said.append) as defended:
        assert defended is not None
        for step, added in ((1, 0.0), (1, 0.0), (1, 1.0), (2, 1.0), (4, 1.0)):  # of three steps in each epoch
            defended.before_step(step)
            private = defended.private_gradients()
            assert private is not None
            model(torch.arange(5, 10)[None], use_cache=False)
            private.add([torch.zeros(9)])
            sums += private.mean()
            if added:
                defended.after_step(step)
    assert torch.equal(sent[0], sent[1])
    assert torch.equal(sent[0], sent[2])
    assert torch.equal(sums[0], sums[1])
    # The control: other answers, and the next step, have other noise.
    assert not torch.equal(sums[0], sums[2])
    assert not torch.equal(sent[0], sent[3])
    assert [line.startswith("differential privacy") for line in said] == [False, False, True]  # said once
    # Step 1 three times, step 2 in the same epoch, and step 4, which does not follow on it.
    assert shown(tmp_path) == {"epochs": 4, "evaluations": 0}


def test_a_run_that_was_killed_goes_on_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    """From the beginning, and from a checkpoint that is older than its last step."""
    whole, part, key = tmp_path / "whole", tmp_path / "part", tmp_path / "key"
    key.write_text("ab" * 32)
    options: dict[str, Any] = {"defence": [NOISY, "dp-sgd:clip=1,sigma=0.1"], "defence_key": key, "eval_every": 2}
    runs.train(whole, **options)
    killed(runs, part, 3, **options)
    interrupted(runs, part, 2, resume=True, **options)
    runs.train(part, resume=True, **options)
    assert_same_run(part, whole)


def test_epsilon_grows_with_each_resume(runs: Runs, tmp_path: Path, exposures: list[Exposure]) -> None:
    whole = runs.train(tmp_path / "whole", defence=[QUIET])
    assert whole.epsilon is not None
    planned = exposures[-1]
    assert (planned.forwards, planned.backwards, planned.steps, planned.held_out) == (1, 1, 1, 2)
    assert shown(tmp_path / "whole") == {"epochs": 1, "evaluations": 2}  # the control: as planned

    out = tmp_path / "out"
    interrupted(runs, out, 2, defence=[QUIET])
    assert (out / SHOWN_FILE).stat().st_mode & 0o777 == 0o600
    interrupted(runs, out, 3, defence=[QUIET], resume=True)
    report = runs.train(out, defence=[QUIET], resume=True)
    assert shown(out) == {"epochs": 3, "evaluations": 2}
    found = exposures[-1]
    assert (found.forwards, found.backwards, found.steps, found.held_out) == (3, 3, 3, 2)
    said = guarantee([read_defence(QUIET)], found)
    assert said is not None
    assert report.epsilon == said.epsilon
    assert report.epsilon > whole.epsilon


def test_epsilon_grows_where_a_process_died_before_a_checkpoint(
    runs: Runs, tmp_path: Path, exposures: list[Exposure]
) -> None:
    """By all the epochs that it had begun. It grows without --resume, too: the folder's key is the same."""
    once = runs.train(tmp_path / "whole", steps=7, defence=[QUIET]).epsilon
    assert once is not None
    out = tmp_path / "out"
    killed(runs, out, 7, steps=7, defence=[QUIET])
    assert shown(out) == {"epochs": 3, "evaluations": 1}
    killed(runs, out, 1, steps=7, defence=[QUIET])
    assert shown(out) == {"epochs": 4, "evaluations": 2}
    report = runs.train(out, steps=7, defence=[QUIET], resume=True)
    assert (exposures[-1].forwards, exposures[-1].held_out) == (7, 4)
    assert shown(out) == {"epochs": 7, "evaluations": 4}
    assert (report.epsilon or 0) > once


def test_evaluations_at_each_new_end_are_counted(tmp_path: Path, exposures: list[Exposure]) -> None:
    """A run with a constant learning rate may be made longer, and each process ends with an evaluation."""
    (tmp_path / "cloud").mkdir()
    (tmp_path / "recording").mkdir()
    noisy: dict[str, Any] = {"schedule": "constant", "accumulate": 1, "defence": ["gaussian:clip=1,sigma=50"]}
    with cloud_for_runs(tmp_path / "cloud", "0:2", recorder=Recorder(tmp_path / "recording", 64 << 20)) as runs:
        for steps in (1, 2, 3):
            runs.train(tmp_path / "out", steps=steps, resume=steps > 1, **noisy)
    assert exposures[-1].held_out == 4
    sent = read_traffic(tmp_path / "recording").forwards
    # Nothing is trained below the cut, so that all forwards look alike. Those of evaluations belong to no step of
    # their own: two of them, of one micro-batch each, surround the first step, and one follows on each of the others.
    assert len({each.hidden.numpy().tobytes() for each in sent}) == len(sent) == 3 + 4


def test_a_run_that_has_ended_says_what_was_sent(runs: Runs, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 1, "validation_split": 0, "defence": [QUIET]}
    killed(runs, tmp_path / "out", 1, **options)
    report = runs.train(tmp_path / "out", resume=True, **options)
    again = runs.train(tmp_path / "out", resume=True, **options)
    assert shown(tmp_path / "out") == {"epochs": 2, "evaluations": 0}
    assert again.epsilon == report.epsilon is not None


def test_what_sends_nothing_counts_for_nothing_and_other_runs_for_themselves(
    runs: Runs, tmp_path: Path, exposures: list[Exposure]
) -> None:
    out = tmp_path / "out"
    killed(runs, out, 1, defence=[QUIET])
    killed(runs, out, 1, defence=[QUIET], learning_rate=1e-3)
    interrupted(runs, out, 2, defence=[QUIET])
    before = (out / SHOWN_FILE).read_text()
    assert sorted(each["epochs"] for each in json.loads(before).values()) == [1, 2]
    with pytest.raises(ConfigError, match="holds a run"):
        runs.train(out, defence=[QUIET])
    with pytest.raises(CheckpointError, match="learning_rate"):
        runs.train(out, defence=[QUIET], learning_rate=1e-3, resume=True)
    assert (out / SHOWN_FILE).read_text() == before
    runs.train(out, defence=[QUIET], resume=True)
    assert exposures[-1].forwards == 3


def test_a_resume_cannot_forget_what_was_sent(runs: Runs, tmp_path: Path) -> None:
    interrupted(runs, tmp_path / "out", 3, defence=[QUIET])
    (tmp_path / "out" / SHOWN_FILE).rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=f"{SHOWN_FILE}, which counts what it has sent, is missing"):
        runs.train(tmp_path / "out", defence=[QUIET], resume=True)
    (tmp_path / "aside").rename(tmp_path / "out" / SHOWN_FILE)
    runs.train(tmp_path / "out", defence=[QUIET], resume=True)


def test_a_damaged_count_ends_the_run_before_anything_is_sent(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / SHOWN_FILE).write_text("{")
    with pytest.raises(ConfigError, match=f"{SHOWN_FILE}, which counts what the run has sent, cannot be read"):
        runs.train(tmp_path, defence=[QUIET])
    assert (tmp_path / SHOWN_FILE).read_text() == "{"


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

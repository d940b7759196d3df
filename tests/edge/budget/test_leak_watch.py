"""`edge train --leak-budget`, against clouds in this process that record what they see."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.cloud.train_runs import Runs, cloud_for_runs, interrupted

from isthmus.backbone.adapters.adapter_files import adapter_digest
from isthmus.common.errors import CheckpointError, ConfigError, LeakBudgetError
from isthmus.edge.budget import leak_watch, measured_leak
from isthmus.edge.budget.leak_watch import BudgetWatch
from isthmus.edge.budget.measured_leak import SLOPES, Leak
from isthmus.edge.run_report import Report
from isthmus.privacy.attacks.coarse_maps import InverterMap
from isthmus.privacy.attacks.nearest_neighbour import NearestNeighbour
from isthmus.privacy.ledger.judged_attacks import Judged
from isthmus.privacy.recording.recorder import Recorder
from isthmus.privacy.recording.recording_file import read_entries
from isthmus.privacy.recording.traffic import Traffic
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import decode

MIB = 1 << 20
SHORTEST_PUBLIC = 13  # with EOS one more; a private text has at most 11 characters


@dataclass
class Recorded:
    """Runs against a cloud, and what it has recorded."""

    runs: Runs
    folder: Path
    texts: Path
    public: Path
    asked: Path
    asked_public: Path

    def train(self, out: Path, **values: Any) -> Report:
        """Six steps of four texts: all of the data. The attacker has public texts like them."""
        data = values.pop("data", str(self.texts))
        if values.keys() & {"leak_budget", "secrets"}:
            values.setdefault("public", str(self.asked_public if data == str(self.asked) else self.public))
        settings = {"data": data, "steps": 6, "accumulate": 2, "leak_sample": 6, "leak_change": 9.0}
        return self.runs.train(out, **settings | values)

    def seen(self) -> list[m.Forward | m.Backward]:
        """The calls of all edges so far."""
        calls = (entry.content for file in sorted(self.folder.iterdir()) for entry in read_entries(file))
        return [call for call in calls if isinstance(call, m.Forward | m.Backward)]

    def private(self) -> list[m.Forward | m.Backward]:
        """Those that are not of public texts, which are longer, and have no backward."""
        return [each for each in self.seen() if isinstance(each, m.Backward) or min(lengths(each)) <= SHORTEST_PUBLIC]


def text(n: int, length: int) -> str:
    return "".join("abcdefghij"[(n * 7 + place * (n % 9 + 1)) % 10] for place in range(length))


def question(n: int, length: int) -> str:
    """A line with an answer of one token."""
    return json.dumps({"prompt": text(n, length), "completion": "xyz"[n % 3]}) + "\n"


@pytest.fixture(scope="module")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Recorded]]:
    with ExitStack() as stack:
        made = {}
        for plan in ("1:1", "0:2"):
            folder = tmp_path_factory.mktemp("budget")
            private, public, recording = folder / "private.jsonl", folder / "public.jsonl", folder / "recording"
            asked, asked_public = folder / "asked.jsonl", folder / "asked-public.jsonl"
            recording.mkdir()
            asked.write_text("".join(question(n, 9 + n % 3) for n in range(24)))
            asked_public.write_text("".join(question(n, SHORTEST_PUBLIC + n % 3) for n in range(30)))
            lines = [json.dumps({"text": text(n, 9 + n % 3)}) + "\n" for n in range(24)]
            private.write_text("".join(lines))
            public.write_text("".join(json.dumps({"text": text(n, SHORTEST_PUBLIC + n % 3)}) + "\n" for n in range(30)))
            runs = stack.enter_context(cloud_for_runs(folder, plan, recorder=Recorder(recording, 64 * MIB)))
            made[plan] = Recorded(runs, recording, private, public, asked, asked_public)
        yield made


@pytest.fixture
def cloud(clouds: dict[str, Recorded]) -> Recorded:
    return clouds["1:1"]


@pytest.fixture(autouse=True)
def quick_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learned map takes most of the time, and here it is no better than the regression that it begins as."""
    monkeypatch.setattr(InverterMap, "_learn", lambda *_: None)


@pytest.fixture
def one_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on the attack: the quickest one alone, to which an embedding gives up its token."""
    monkeypatch.setattr(measured_leak, "TOKEN_ATTACKS", {NearestNeighbour.name: NearestNeighbour})


def test_nothing_private_crosses_where_the_budget_is_not_kept(cloud: Recorded, tmp_path: Path) -> None:
    before = len(cloud.seen())
    said = r"tokens<=0\.5 is broken: .* This process has sent nothing private\. .*emulator"
    with pytest.raises(LeakBudgetError, match=said):
        cloud.train(tmp_path / "out", leak_budget=["tokens<=0.5"])
    assert len(cloud.seen()) == before
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    # The control: with a budget that allows everything the run sends, and it is the run that it is without a budget.
    report = cloud.train(tmp_path / "out", leak_budget=["tokens<=1"], transcript=True)
    assert len(cloud.seen()) > before
    assert re.fullmatch(r"tokens ≤ 1\.00 \(\w+\), measured on 6 texts", report.leak or "")
    assert (report.leak_tokens, report.leak_labels, report.leak_attacks) == (1.0, None, 1)
    assert f"leak: {report.leak}\n" in report.lines(tmp_path)
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["leak"] == report.leak
    assert cloud.train(tmp_path / "plain").leak is None
    assert adapter_digest(tmp_path / "plain" / "adapter") == adapter_digest(tmp_path / "out" / "adapter")


@pytest.mark.usefixtures("one_attack")
def test_a_run_of_fewer_steps_is_judged_by_the_texts_that_it_sends(cloud: Recorded, tmp_path: Path) -> None:
    with pytest.raises(LeakBudgetError, match=r"upper bound 1\.00 of a text that is sent, 0\.42 of all\. This process"):
        cloud.train(tmp_path / "out", leak_budget=["tokens<=0.5"], steps=2)
    report = cloud.train(tmp_path / "all", leak_budget=["tokens<=1"], steps=2)
    assert report.leak_tokens == 1
    of_all = 10 / 24  # eight that are trained on, and two that are held out
    assert f"tokens ≤ 1.00 of a text that is sent, {of_all:.2f} of all (nearest_neighbour)" in (report.leak or "")


def test_labels_are_measured_with_public_texts_alone(cloud: Recorded, tmp_path: Path) -> None:
    budget: dict[str, Any] = {
        "data": str(cloud.asked), "withhold_answers": True, "leak_budget": "labels<=0.3", "steps": 2,
    }  # fmt: skip
    before = len(cloud.seen())
    with pytest.raises(ConfigError, match="give --public FILE"):
        cloud.train(tmp_path / "out", **budget, public=None)
    assert len(cloud.seen()) == before
    with pytest.raises(LeakBudgetError, match=r"labels<=0\.3 is broken: labels-.*top only .*ladder .*emulator"):
        cloud.train(tmp_path / "out", **budget)
    calls = cloud.seen()[before:]
    assert calls
    assert all(isinstance(call, m.Forward) for call in calls)
    assert min(min(lengths(call)) for call in calls if isinstance(call, m.Forward)) > SHORTEST_PUBLIC
    # Without withholding, the answers are among the tokens: that a label is read there is seen before it is sent.
    before = len(cloud.private())
    with pytest.raises(LeakBudgetError, match=r"labels<=0\.3 is broken: .* of the labels.*sent nothing private"):
        cloud.train(tmp_path / "out", **{**budget, "withhold_answers": False})
    assert len(cloud.private()) == before


def lengths(call: m.Forward) -> list[int]:
    """Tokens of each row."""
    if call.inputs.attention_mask is None:
        return [call.inputs.hidden.shape[1]] * call.inputs.hidden.shape[0]
    return decode(call.inputs.attention_mask).sum(-1).tolist()


@pytest.mark.usefixtures("one_attack")
def test_a_top_only_run_that_withholds_answers_keeps_a_label_budget(
    clouds: dict[str, Recorded], tmp_path: Path
) -> None:
    cloud = clouds["0:2"]
    budget: dict[str, Any] = {"data": str(cloud.asked), "leak_budget": ["labels<=0", "tokens<=1"]}
    report = cloud.train(tmp_path / "out", withhold_answers=True, **budget)
    line = r"tokens ≤ [\d.]+ \(\w+\), labels 0 \(answers withheld, the front is not trained\), measured on 6 texts"
    assert re.fullmatch(line, report.leak or "")
    assert report.leak_labels == 0
    ladder = cloud.train(tmp_path / "ladder", withhold_answers=True, method="ladder", taps=1, **budget)
    assert ladder.leak == report.leak
    # The control: answers that are sent are read.
    with pytest.raises(LeakBudgetError, match=r"labels<=0 is broken: .* recovers 1\.000 of the labels"):
        cloud.train(tmp_path / "told", **budget)
    assert not [call for call in cloud.seen() if isinstance(call, m.Backward)]


def test_mezo_keeps_no_label_budget_where_it_moves_the_front(cloud: Recorded, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"data": str(cloud.asked), "withhold_answers": True}
    mezo = {**asked, "optimizer": "mezo", "batch": 9, "steps": 1}
    before = len(cloud.seen())
    with pytest.raises(LeakBudgetError, match=r"labels<=0\.9 cannot be kept: --optimizer mezo .* nothing private"):
        cloud.train(tmp_path / "out", leak_budget="labels<=0.9", **mezo)
    assert len(cloud.seen()) == before
    report = cloud.train(tmp_path / "all", leak_budget="labels<=1", **mezo)
    assert (report.leak_labels, report.leak) == (1, f"labels ≤ 1.00 of a text that is sent, 0.75 of all ({SLOPES})")


@pytest.mark.long
def test_a_recovered_secret_breaks_the_budget(cloud: Recorded, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.txt"
    secrets.write_text(f"{text(3, 9)}\n\n{text(17, 9)[2:]}\n")
    before, private = len(cloud.seen()), len(cloud.private())
    with pytest.raises(LeakBudgetError, match=r"recovers [23] of [23] secrets letter by letter"):
        cloud.train(tmp_path / "out", secrets=secrets, leak_sample=2)
    assert len(cloud.seen()) == before
    # Noise on hidden states alone leaves them in the gradients, as each token is learned.
    noise = "gaussian:clip=1,sigma=50"
    with pytest.raises(LeakBudgetError, match=r"recovers [12] of 2 secrets letter by letter.*sent nothing private"):
        cloud.train(tmp_path / "half", secrets=secrets, leak_sample=2, defence=[noise], steps=1)
    assert len(cloud.private()) == private
    both = [f"{noise},gradient_clip=1,gradient_sigma=50"]
    report = cloud.train(tmp_path / "noisy", secrets=secrets, leak_sample=2, defence=both, steps=1)
    assert "0 of" in (report.leak or "")
    secrets.write_text("abc\nnot there\n")
    with pytest.raises(ConfigError, match=r"line 2 of .* is in no text"):
        cloud.train(tmp_path / "out", secrets=secrets)


@pytest.mark.long
def test_a_token_budget_is_broken_by_gradients_too(cloud: Recorded, tmp_path: Path) -> None:
    """What is learned of a plain text is the text."""
    before = len(cloud.private())
    noise = "gaussian:clip=1,sigma=50"
    with pytest.raises(LeakBudgetError, match=r"labels-\w+ recovers 0\.9\d+ of the tokens.*sent nothing private"):
        cloud.train(tmp_path / "out", leak_budget="tokens<=0.6", defence=noise)
    assert len(cloud.private()) == before
    # The control: with noise there as well, little of them is read.
    both = f"{noise},gradient_clip=1,gradient_sigma=50"
    assert (cloud.train(tmp_path / "both", leak_budget="tokens<=0.6", defence=both, steps=1).leak_tokens or 1) < 0.6


def test_a_run_ends_when_training_undoes_its_defence(cloud: Recorded, tmp_path: Path) -> None:
    key, out = tmp_path / "key", tmp_path / "out"
    key.write_text("ab" * 32)
    # The pair begins with codes that are small beside their noise, and learns to make them large. As answers are
    # withheld, gradients tell these alone.
    defended = {"defence": ["bottleneck:rank=16,clip=100,sigma=0.02"], "defence_key": key, "learning_rate": 0.1}
    asked: dict[str, Any] = {"data": str(cloud.asked), "withhold_answers": True, **defended}
    before = len(cloud.private())
    with pytest.raises(LeakBudgetError, match=r"Step \d+ has not been sent\. .*The last applied step is saved in"):
        cloud.train(out, leak_budget=["tokens<=0.5"], leak_change=0.5, **asked)
    applied = len((out / "losses.jsonl").read_text().splitlines())
    assert 1 <= applied < 6
    assert (out / f"checkpoint-{applied}").is_dir()
    evaluations = 1
    assert len(cloud.private()) - before == evaluations + applied * 2 * 2  # two micro-batches, forward and backward


@pytest.mark.usefixtures("one_attack")
def test_a_run_that_goes_on_is_attacked_again_first(cloud: Recorded, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "leak_budget": ["tokens<=1"],
        "leak_sample": 2,
        "leak_change": 9.0,
        "public": str(cloud.public),
    }
    interrupted(cloud.runs, tmp_path, 2, **values)
    with pytest.raises(CheckpointError, match="such as a leak budget"):
        cloud.runs.train(tmp_path, resume=True)
    before = len(cloud.private())
    with pytest.raises(LeakBudgetError, match="This process has sent nothing private"):
        cloud.runs.train(tmp_path, resume=True, **{**values, "leak_budget": ["tokens<=0"]})
    assert len(cloud.private()) == before
    assert cloud.runs.train(tmp_path, resume=True, **values).leak_attacks == 2


@pytest.mark.long
@pytest.mark.usefixtures("one_attack")
def test_only_training_counts_as_a_change_of_the_front(cloud: Recorded, tmp_path: Path) -> None:
    still = {"leak_budget": ["tokens<=1"], "leak_change": 1e-3, "leak_sample": 2, "steps": 2, "defence": ["mixing"]}
    assert cloud.train(tmp_path / "still", learning_rate=1e-9, **still).leak_attacks == 1
    # The control: what training moves is attacked again, before the second step and the evaluation after it.
    assert cloud.train(tmp_path / "moved", learning_rate=0.1, **still).leak_attacks == 3


@pytest.mark.usefixtures("one_attack")
@pytest.mark.long
def test_noise_that_training_changes_is_a_change(clouds: dict[str, Recorded], tmp_path: Path) -> None:
    """With no layer of the edge's below the cut, hidden states stay what they are."""
    values: dict[str, Any] = {"leak_budget": "tokens<=1", "leak_change": 0.01, "steps": 2, "learning_rate": 0.1}
    learned = clouds["0:2"].train(tmp_path / "learned", defence="learned-noise:sigma=0.1", **values)
    assert learned.leak_attacks == 3  # the first, before the second step, and before the evaluation after it
    fixed = clouds["0:2"].train(tmp_path / "fixed", defence="gaussian:clip=1,sigma=0.1", **values)
    assert fixed.leak_attacks == 1


@pytest.mark.usefixtures("one_attack")
def test_the_attacker_has_as_many_passes_as_the_text_that_is_sent_most(
    cloud: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise that is drawn anew averages out over evaluations as it does over epochs."""
    found: list[int] = []

    def count(_knowledge: Any, _first: Traffic, others: Iterator[Traffic], *_rest: Any) -> list[Judged]:
        found.append(1 + len(list(others)))
        raise LeakBudgetError("counted.")

    monkeypatch.setattr(leak_watch, "attack_texts", count)
    noisy: dict[str, Any] = {"leak_budget": "tokens<=1", "defence": "gaussian:clip=1,sigma=9", "steps": 3}
    same = {"defence": "smoothing:share=0.1", "eval_every": 1}  # sends the same in each pass
    for values in ({"eval_every": 1}, {}, {"validation_split": 0}, {"defence": ()}, same):
        with pytest.raises(LeakBudgetError, match="counted"):
            cloud.train(tmp_path, **{**noisy, **values})
    assert found == [4, 2, 1, 1, 1]


@pytest.mark.usefixtures("one_attack")
def test_the_attacker_of_a_run_that_goes_on_has_the_passes_of_before_too(
    cloud: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is made again draws other noise where the cloud answers otherwise, so it may count twice."""
    found: list[int] = []
    attack = leak_watch.attack_texts

    def count(knowledge: Any, first: Traffic, others: Iterator[Traffic], *rest: Any) -> Any:
        passes = [*others]
        found.append(1 + len(passes))
        return attack(knowledge, first, iter(passes), *rest)

    monkeypatch.setattr(leak_watch, "attack_texts", count)
    noisy: dict[str, Any] = {
        "leak_budget": "tokens<=1",
        "leak_sample": 2,
        "leak_change": 9.0,
        "public": str(cloud.public),
        "defence": "gaussian:clip=1,sigma=9",
        "validation_split": 0,
    }
    interrupted(cloud.runs, tmp_path, 2, **noisy)
    cloud.runs.train(tmp_path, resume=True, **noisy)
    assert found == [1, 2]


@pytest.mark.usefixtures("one_attack")
def test_no_evaluation_goes_out_of_a_front_that_breaks_the_budget(
    cloud: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step moves the front, and the held-out texts would be sent before the second one."""

    def breaks(watch: BudgetWatch, _leak: Leak, now: str) -> None:
        if watch.figures()["leak_attacks"]:
            raise LeakBudgetError(f"it is broken. {now}.")

    monkeypatch.setattr(BudgetWatch, "_compare", breaks)
    before = len(cloud.private())
    with pytest.raises(LeakBudgetError, match="The evaluation after step 1 has not been sent"):
        cloud.train(tmp_path, leak_budget="tokens<=1", leak_change=1e-3, learning_rate=0.1, eval_every=1)
    evaluations = 1  # that before training
    assert len(cloud.private()) - before == evaluations + 2 * 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"leak_budget": "tokens<=2"}, "'tokens<=2' is no limit"),
        ({"leak_budget": "words<=0.5"}, "'words<=0.5' is no limit"),
        ({"leak_budget": ["labels<=0.1", "labels<=0.2"]}, "labels has two limits"),
        ({"leak_budget": "labels<=0.1", "sites": "all"}, "sites send what the attacks"),
        ({"leak_budget": "labels<=0.1", "method": "prompt"}, "method prompt"),
        ({"leak_budget": "labels<=0.1", "codec": "auto"}, "sends probes"),
        ({"leak_budget": "labels<=0.1", "precision": "bf16"}, "compute in fp32"),
        ({"leak_budget": "labels<=0.1", "device": "cuda"}, "compute on the CPU"),
        ({"public": "public.jsonl"}, "there is none"),
    ],
)
def test_what_cannot_be_measured_is_refused(cloud: Recorded, tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cloud.runs.config(tmp_path, **values)
    cloud.runs.config(tmp_path, leak_budget="tokens<=0.5,labels<=.1")


def test_noise_that_stays_while_the_front_moves_is_refused(clouds: dict[str, Recorded], tmp_path: Path) -> None:
    values: dict[str, Any] = {"leak_budget": "tokens<=1", "defence": "gaussian:clip=1,sigma=9,memo=true", "steps": 1}
    with pytest.raises(ConfigError, match="give memo=false"):
        clouds["1:1"].train(tmp_path / "moves", **values)
    assert clouds["0:2"].train(tmp_path / "still", **values).leak_tokens is not None  # nothing is trained below the cut


@pytest.mark.usefixtures("one_attack")
@pytest.mark.long
def test_what_the_last_layers_have_learned_is_a_change(cloud: Recorded, tmp_path: Path) -> None:
    """Gradients tell a label by what is predicted: with nothing trained below, hidden states stay what they are."""
    values: dict[str, Any] = {
        "data": str(cloud.asked), "withhold_answers": True, "leak_budget": "labels<=1", "leak_change": 0.05, "steps": 2,
        "defence": "gaussian:clip=1,sigma=1,gradient_clip=1e-3,gradient_sigma=1", "learning_rate": 0.1,
        "target_modules": "3.self_attn.q_proj,3.self_attn.v_proj,3.mlp.down_proj,0.self_attn.q_proj",
    }  # fmt: skip
    assert (cloud.train(tmp_path / "out", **values).leak_attacks or 0) > 1
    assert cloud.train(tmp_path / "still", **{**values, "learning_rate": 1e-9}).leak_attacks == 1

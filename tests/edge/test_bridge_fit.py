"""`emulator fit`: what it sends, what it refuses to send, and that the bridge helps."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.cloud.clouds import with_info
from support.cloud.memory_cloud import MemoryCloud, messages, new_link
from support.emulator.packages import Owner
from support.protocol.wire import PIN

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import DataError, DiskError, OwnershipError, PackageError, RefusedError, SignerError
from isthmus.edge import bridge_fit
from isthmus.edge.bridge_fit import Fitted, run_fit
from isthmus.edge.client.link import Link
from isthmus.edge.config.client_config import FitConfig
from isthmus.emulator.compress.bridges import RidgeSums
from isthmus.emulator.compress.layer_measures import relative_error
from isthmus.emulator.compress.outer_layers import OuterLayers
from isthmus.emulator.compress.public_text import load_blocks
from isthmus.emulator.package.package import Package, open_package
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import decode
from isthmus.training.logit_divergence import logit_divergence

Fit = Callable[..., Fitted]
SENTENCE = "The patient has a rash since Monday."


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    torch.set_num_threads(1)
    return Owner(tmp_path_factory.mktemp("owner"))


@pytest.fixture
def cloud(owner: Owner, tmp_path: Path) -> MemoryCloud:
    return MemoryCloud(owner.offer(tmp_path / "adapters"))


@pytest.fixture
def package(cloud: MemoryCloud, tmp_path: Path) -> Package:
    return new_link(cloud).fetch_package(tmp_path / "package")


@pytest.fixture
def fit(cloud: MemoryCloud, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Runs the command over a link in memory, on public texts of random letters."""
    monkeypatch.setattr(bridge_fit, "open_link", lambda config: new_link(cloud))
    letters = torch.randint(97, 123, (60, 60), generator=torch.Generator().manual_seed(0)).tolist()
    public = tmp_path / "public.jsonl"
    public.write_text("".join(json.dumps({"text": bytes(each).decode()}) + "\n" for each in letters))
    cloud.seen.clear()

    def run(**values: Any) -> Fitted:
        usual = {"package": package.folder, "text": public, "tokens": 2048, "block": 32, "data": "none"}
        return run_fit(FitConfig.model_validate({"cloud": f"isthmus://cloud:1#{PIN}", **usual, **values}))

    return run


def asked(cloud: MemoryCloud) -> list[m.Forward]:
    forwards: list[m.Forward] = messages(cloud, m.Forward)
    return forwards


def test_the_bridge_brings_the_emulator_nearer_to_the_clouds_layers(
    fit: Fit, cloud: MemoryCloud, package: Package, owner: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fit()
    assert (said.tokens, said.asked, said.package) == (2048, 2048, package.id)
    assert said.kl_before is not None
    assert said.kl_after is not None
    assert said.kl_after < said.kl_before
    assert "sends 2,048 tokens of the 60 texts" in capsys.readouterr().err
    # Other texts than those that it is fitted to.
    ids = torch.randint(97, 123, (4, 32), generator=torch.Generator().manual_seed(1))
    hidden = OuterLayers(package.checkpoint, package.plan, with_top=False).entry(ids)
    true, emulator = owner.plain.executor.host.span(hidden), package.load_emulator()
    bridged = open_package(package.folder, signer=PIN).load_model().remote_layers.span
    assert relative_error(bridged(hidden), true) < relative_error(emulator(hidden), true)
    sent = {type(message) for message in cloud.seen}
    assert sent <= {m.Attach, m.Forward, m.Goodbye}
    assert all((each.keep, each.sites, each.lease) == (False, 0, 0) for each in asked(cloud))


def test_whether_the_bridge_helps_is_told_by_the_next_token_on_blocks_held_out(
    fit: Fit, package: Package, owner: Owner
) -> None:
    said = fit()
    blocks = load_blocks(package.folder.parent / "public.jsonl", package.load_tokenizer(), 32)
    held = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[:64]][::8]
    outer = OuterLayers(package.checkpoint, package.plan, with_top=True)
    hidden = outer.entry(held)
    with torch.no_grad():
        over, true = (
            outer.predict(held, span(hidden))[0].flatten(0, 1)
            for span in (package.load_emulator(), owner.plain.executor.host.span)
        )
    assert said.kl_before == pytest.approx(logit_divergence(over, true).item(), rel=1e-3)
    assert logit_divergence(true, true).item() == pytest.approx(0, abs=1e-6)


def test_what_is_sent_comes_from_the_bare_front(fit: Fit, cloud: MemoryCloud, package: Package) -> None:
    fit(tokens=32)
    front = OuterLayers(package.checkpoint, package.plan, with_top=False)
    tokens = load_blocks(package.folder.parent / "public.jsonl", package.load_tokenizer(), 32)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    (only,) = asked(cloud)
    assert torch.equal(decode(only.hidden), front.entry(tokens[order[:1]]))


@pytest.mark.parametrize("why", [KeyboardInterrupt, RefusedError("no tokens are left")])
def test_an_interrupted_fit_goes_on_and_ends_in_the_same_bridge(
    fit: Fit, cloud: MemoryCloud, package: Package, monkeypatch: pytest.MonkeyPatch, why: Any
) -> None:
    monkeypatch.setattr(bridge_fit, "_TOKENS_AT_ONCE", 160)
    forward, calls = Link.forward_span, iter(range(1000))

    def stopped(*args: Any, **options: Any) -> Any:
        if next(calls) == 5:
            raise why
        return forward(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Link, "forward_span", stopped)
        with pytest.raises((KeyboardInterrupt, RefusedError)):
            fit()
    assert package.load_bridge() is None
    assert len(asked(cloud)) == 5
    said = fit()
    assert (said.tokens, said.asked) == (2048, 2048 - 800)
    after = package.load_bridge()
    assert after is not None
    assert fit().asked == 0
    more = fit(tokens=2112)
    assert (more.tokens, more.asked) == (2112, 64)
    fewer = fit(tokens=640)
    assert (fewer.tokens, fewer.asked, fewer.kl_after) == (2112, 0, more.kl_after)
    for path in package.bridge_file.parent.iterdir():
        path.unlink()
    monkeypatch.undo()
    monkeypatch.setattr(bridge_fit, "open_link", lambda config: new_link(cloud))
    fit()
    once = package.load_bridge()
    assert once is not None
    torch.testing.assert_close(after.weight, once.weight)
    torch.testing.assert_close(after.bias, once.bias)


def test_a_text_that_shares_a_run_with_private_data_is_not_sent(fit: Fit, cloud: MemoryCloud, tmp_path: Path) -> None:
    sessions = len(cloud.sessions)
    public, data = tmp_path / "mine.jsonl", tmp_path / "data.jsonl"
    data.write_text(json.dumps({"symptom": "a rash", "since": "Monday"}) + "\n")
    columns = {
        "data": str(data),
        "prompt_template": "The patient has {symptom}",
        "completion_template": " since {since}.",
    }
    rest = [{"text": "lorem ipsum dolor sit amet " * 40}]
    # The tokens of the tiny model are bytes: the second one shares 12 of them.
    for text, refused in (("He SAID:  the\tPatient has A rash", True), ("patient has", False)):
        public.write_text("".join(json.dumps(each) + "\n" for each in [*rest, {"text": text}]))
        if not refused:
            fit(text=public, tokens=32, **columns)
            continue
        with pytest.raises(
            DataError, match=r"1 of the 2 texts in .*mine\.jsonl .*13 tokens.*text 2 with .*data\.jsonl, line 1"
        ):
            fit(text=public, tokens=32, **columns)
        assert len(cloud.sessions) == sessions
        fit(text=public, tokens=32)  # nobody said that there are private data


@pytest.mark.parametrize(
    "text",
    [
        "now the patient has a rash, since then",  # across the end of the prompt, which has no space there
        unicodedata.normalize("NFD", "déjà été né là"),  # in another normal form
        "and it began on tuesday",  # in the validation data
    ],
)
def test_a_run_is_found_across_segments_in_any_normal_form_and_in_validation_data(
    fit: Fit, cloud: MemoryCloud, tmp_path: Path, text: str
) -> None:
    sessions = len(cloud.sessions)
    public, data, validation = (tmp_path / name for name in ("mine.jsonl", "data.jsonl", "validation.jsonl"))
    rows = [{"prompt": "has a rash,", "completion": "since then"}, {"prompt": "déjà été né là", "completion": "."}]
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))
    validation.write_text(json.dumps({"prompt": "It began", "completion": " on Tuesday"}) + "\n")
    rest = {"text": "lorem ipsum dolor sit amet " * 40}
    public.write_text("".join(json.dumps(each) + "\n" for each in ({"text": text}, rest, {"text": text})))
    private = {"data": str(data), "validation": str(validation)}
    with pytest.raises(DataError, match=r"2 of the 3 texts .* text 1 with .*--leave-out-shared"):
        fit(text=public, tokens=32, **private)
    assert len(cloud.sessions) == sessions


def test_texts_that_share_a_run_can_be_left_out(
    fit: Fit, cloud: MemoryCloud, package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public, data = tmp_path / "mine.jsonl", tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": SENTENCE}) + "\n")
    rest = ["lorem ipsum dolor sit amet", "consectetur adipiscing elit"]
    texts = [SENTENCE, rest[0], SENTENCE.upper(), rest[1]]
    public.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    left = {"data": str(data), "leave_out_shared": True, "block": 50}
    fit(text=public, tokens=50, **left)
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of the 4 texts share 13 tokens in a row with private ones, and are left out" in said
    assert "of the 2 texts in" in said
    public.write_text("".join(json.dumps({"text": text}) + "\n" for text in rest))
    blocks = load_blocks(public, package.load_tokenizer(), 50)
    (only,) = asked(cloud)
    assert torch.equal(decode(only.hidden), OuterLayers(package.checkpoint, package.plan, with_top=False).entry(blocks))
    public.write_text(json.dumps({"text": SENTENCE}) + "\n")
    with pytest.raises(DataError, match="1 of the 1 texts"):
        fit(text=public, tokens=50, **left)


def test_what_is_checked_is_what_is_sent(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public = tmp_path / "mine.txt"
    public.write_text("lorem ipsum " * 40)
    checked = bridge_fit._public

    def changed_meanwhile(*args: Any) -> Any:
        public.unlink()
        return checked(*args)

    monkeypatch.setattr(bridge_fit, "_public", changed_meanwhile)
    assert fit(text=public, tokens=32).asked == 32


def test_of_a_single_text_the_line_is_named(fit: Fit, tmp_path: Path) -> None:
    public, data = tmp_path / "mine.txt", tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": SENTENCE}) + "\n")
    public.write_text("\n" + "lorem ipsum\n" * 5000 + "and the patient has\na rash\n" + "dolor\n" * 5000)
    with pytest.raises(DataError, match=r"text 1 \(line 5002\) with"):
        fit(text=public, tokens=32, data=str(data))


def test_a_text_with_a_secret_is_not_sent_and_the_secret_not_shown(
    fit: Fit, cloud: MemoryCloud, tmp_path: Path
) -> None:
    sessions = len(cloud.sessions)
    public, secrets = tmp_path / "mine.jsonl", tmp_path / "secrets.txt"
    public.write_text(
        json.dumps({"text": "lorem ipsum " * 40}) + "\n" + json.dumps({"text": "call  Agent K7 now"}) + "\n"
    )
    secrets.write_text("\nagent k7\n")
    with pytest.raises(DataError, match=r"text 2 of .* line 2 of .*secrets\.txt") as refused:
        fit(text=public, tokens=32, secrets=secrets)
    assert "k7" not in str(refused.value).lower()
    assert len(cloud.sessions) == sessions
    secrets.write_text("agent k8\n")
    fit(text=public, tokens=32, secrets=secrets)


def test_another_text_does_not_replace_the_answers_of_the_first(fit: Fit, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("lorem ipsum " * 40)
    assert fit().asked == 2048
    assert fit(text=other, tokens=32).asked == 32
    assert fit().asked == 0


def test_what_cannot_be_kept_is_not_asked(fit: Fit, cloud: MemoryCloud, package: Package) -> None:
    sessions, folder = len(cloud.sessions), package.bridge_file.parent
    folder.write_text("no folder")
    with pytest.raises(DiskError, match="cannot be written"):
        fit()
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(OwnershipError, match="written by everybody"):
        fit()
    assert len(cloud.sessions) == sessions


def test_answers_are_kept_meanwhile_and_few_of_them_as_they_are(
    fit: Fit, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_TOKENS_AT_ONCE", 160), ("_PARTS_KEPT", 2), ("_MOST_HELD", 2)):
        monkeypatch.setattr(bridge_fit, name, value)
    forward, done = Link.forward_span, []

    def watched(*args: Any, **options: Any) -> Any:
        (kept,) = package.bridge_file.parent.glob("*.answers.safetensors")
        with safe_open(kept, framework="pt") as file:
            done.append(int(file.metadata()["done"]))
        return forward(*args, **options)

    monkeypatch.setattr(Link, "forward_span", watched)
    fit(tokens=800)
    assert done == [0, 0, 10, 10, 20]
    (kept,) = package.bridge_file.parent.glob("*.answers.safetensors")
    assert load_file(kept)["held"].shape[:2] == (2, 2 * 32)


def test_a_bridge_that_does_not_help_is_not_kept(fit: Fit, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = RidgeSums.solve
    monkeypatch.setattr(RidgeSums, "solve", lambda *args: tuple(-10 * each for each in solve(*args)))
    with pytest.raises(DataError, match="does not bring the emulator nearer"):
        fit()
    assert package.load_bridge() is None


def test_a_package_of_another_cloud_or_signer_asks_nothing(fit: Fit, cloud: MemoryCloud) -> None:
    with pytest.raises(SignerError):
        fit(cloud=f"isthmus://cloud:1#SHA256:{'A' * 43}")
    cloud.served = with_info(cloud.served, plan=str(SplitPlan(6, 3, 2)))
    with pytest.raises(PackageError, match=r"a cloud of the split 3:2 does not have its middle"):
        fit()
    assert not asked(cloud)

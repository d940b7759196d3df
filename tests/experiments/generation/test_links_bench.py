"""Drafts over long links: the arithmetic, which draft a text has, and whole runs on a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.emulator.packages import tiny_package, tuned
from support.models.local_cache import CachingLocalSpan
from support.models.small_tasks import task_folder
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import ConfigError, DataError
from isthmus.edge.drafts import FixedLength, ModelDraft
from isthmus.edge.drafts.candidates import Choose, Draft, DraftedToken
from isthmus.edge.drafts.tuned_draft import save_tuned
from isthmus.experiments.generation import links_bench, links_preparation
from isthmus.experiments.generation.links_bench import (
    INTERVAL_PROMPTS,
    TEXTS,
    check_links,
    figures,
    run_links,
    show_links,
    targets,
)
from isthmus.experiments.generation.links_preparation import prepare, read_e2e, unseen_prompts
from isthmus.experiments.generation.links_process import COUNTS, SEQUENTIAL, DraftedTexts
from isthmus.experiments.harness.generation_settings import GenerateSettings
from isthmus.experiments.network.net_space import missing
from isthmus.experiments.scoring.tasks import Question, Split

namespaces = pytest.mark.skipif(missing() is not None, reason=f"network namespaces: {missing()}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("links") / "model", max_position_embeddings=512)


def answer(tokens: Sequence[int], seconds: float, **counts: float) -> dict[str, Any]:
    assert counts.keys() <= set(COUNTS)
    return {"tokens": list(tokens), "seconds": seconds, **dict.fromkeys(COUNTS, 0), **counts}


def test_speeds_are_those_of_all_prompts_over_the_ones_without_a_draft() -> None:
    found = figures(
        {
            "none": [answer([1] * 8, 4.0), answer([2] * 8, 4.0)],
            "good": [
                answer([1] * 8, 1.0, rounds=2, drafted=8, judged=7, accepted=6, draft_seconds=0.25),
                answer([2] * 8, 3.0, rounds=6, drafted=8, judged=3, accepted=2, draft_seconds=0.75),
            ],
            "wrong": [
                answer([1] * 8, 5.0, rounds=8, drafted=16, judged=8),
                answer([2] * 7 + [3], 5.0, rounds=8, drafted=16, judged=8),
            ],
        }
    )
    none, good, wrong = found
    assert [row["draft"] for row in found] == ["none", "good", "wrong"]
    assert (none["tokens"], none["tokens_per_s"], none["over_sequential"]) == (8, 2.0, 1.0)
    assert (none["over_sequential_range"], none["over_sequential_95"]) == ([1.0, 1.0], None)
    assert (none["judged"], none["acceptance_rate"], none["draft_ms"]) == (0, None, None)
    assert (good["tokens_per_s"], good["over_sequential"]) == (4.0, 2.0)
    assert good["over_sequential_range"] == [pytest.approx(4 / 3), pytest.approx(4.0)]
    assert (good["judged"], good["acceptance_rate"]) == (10, 0.8)
    assert (good["draft_ms"], good["draft_share"]) == (1000 / 16, 0.25)
    assert (good["accepted_per_round"], good["drafted_per_round"], good["identical"]) == (1.0, 2.0, 1.0)
    assert wrong["over_sequential"] == 0.8
    assert (wrong["accepted_per_round"], wrong["drafted_per_round"], wrong["identical"]) == (0.0, 2.0, 0.5)
    assert [row["over_sequential_identical"] for row in found] == [1.0, 2.0, 0.8]


def test_texts_that_are_others_are_left_out_of_one_ratio() -> None:
    sequential = [answer([1] * 8, 4.0), answer([2] * 8, 4.0)]
    short = answer([2] * 4, 1.0)
    _, one, none = figures(
        {
            "none": sequential,
            "one": [answer([1] * 8, 2.0), short],
            "others": [answer([3] * 8, 2.0), short],
        }
    )
    assert (one["identical"], one["over_sequential"], one["over_sequential_identical"]) == (0.5, 2.0, 2.0)
    assert (none["identical"], none["over_sequential_identical"]) == (0.0, None)
    assert none["over_sequential"] == 2.0  # it says nothing of this


def test_there_is_an_interval_from_some_prompts_on() -> None:
    sequential = [answer([1] * 8, 4.0) for _ in range(INTERVAL_PROMPTS)]
    drafted = [answer([1] * 8, 2.0 + number % 3, rounds=1) for number in range(INTERVAL_PROMPTS)]
    _, found = figures({"none": sequential, "ngram": drafted})
    least, most = found["over_sequential_95"]
    assert found["over_sequential_range"] == [1.0, 2.0]
    assert 1.0 < least < found["over_sequential"] < most < 2.0
    _, found = figures({"none": sequential[1:], "ngram": drafted[1:]})
    assert found["over_sequential_95"] is None


def test_a_target_is_held_by_the_least_of_its_figures() -> None:
    def cell(rtt_ms: float, text: str, draft: str, over: float) -> dict[str, Any]:
        return {"rtt_ms": rtt_ms, "text": text, "draft": draft, "over_sequential": over}

    cells = [
        *(cell(rtt_ms, "chat", "none", 1.0) for rtt_ms in (0.0, 80.0)),
        *(cell(0.0, "chat", "ngram", 0.95), cell(0.0, "tuned", "small draft", 0.89)),
        *(cell(80.0, "chat", "ngram", 1.1), cell(80.0, "chat", "small draft", 1.3)),
        *(cell(80.0, "tuned", "small draft", 1.9), cell(80.0, "tuned", "tuned draft", 1.7)),
    ]
    cells.append(cell(80.0, "chat", "fixed 2", 0.5))  # nobody is to reach anything with it
    found = {name: (each["measured"], each["held"], each["cells"]) for name, each in targets(cells).items()}
    assert found == {
        "chat_small_at_80_ms": (1.3, True, 1),
        "chat_ngram_at_80_ms": (1.1, False, 1),
        "tuned_at_80_ms": (1.7, False, 1),
        "tuned_stretch_at_80_ms": (1.7, False, 1),
        "least_at_0_ms": (0.89, False, 2),
        "least_from_50_ms": (1.1, True, 4),
    }
    assert targets([cell(20.0, "chat", "ngram", 0.5)]) == {}
    assert targets([cell(50.0, "chat", "ngram", 1.1)])["least_from_50_ms"]["cells"] == 1


@pytest.mark.parametrize(("prompts", "heading"), [(INTERVAL_PROMPTS, "95 %"), (INTERVAL_PROMPTS - 1, "range")])
def test_the_table_says_which_spread_it_has_and_fits_80_columns(
    prompts: int, heading: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = dict.fromkeys(name for drafts in TEXTS.values() for name in drafts)
    drafted = {name: [answer([1] * 64, 0.05, rounds=3, drafted=12, judged=9, accepted=8)] * prompts for name in names}
    rows = figures({"none": [answer([1] * 64, 1.0), *[answer([2] * 64, 1.0)] * (prompts - 1)], **drafted})
    cells = [
        {"rtt_ms": rtt_ms, "text": text, **row} for rtt_ms in (0.0, 80.0, 1500.0) for text in TEXTS for row in rows
    ]
    show_links({"links": cells, "targets": targets(cells)})
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"  {heading} " in first
    assert len(lines) == len(cells) + len(links_bench.TARGETS)
    assert max(len(line) for line in (first, *lines)) == 80
    assert first.index("draft") == lines[0].index("none")  # columns stand below their headings


def test_the_figure_has_room_for_the_fastest_of_all_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(links_bench, "save_figure", lambda figure, _path: drawn.append(figure))
    speeds = {"chat": 10.0, "tuned": 30.0}
    cells = [{"rtt_ms": 0.0, "text": text, "draft": "none", "tokens_per_s": speed} for text, speed in speeds.items()]
    links_bench.draw_links(cells, tmp_path / "links.png")
    limits = [panel.get_ylim() for panel in drawn[0].axes]
    assert [least for least, _ in limits] == [0, 0]
    assert min(most for _, most in limits) > 30


def test_prompts_of_the_training_data_are_left_out() -> None:
    known, twice, new = (Question(prompt, ("x",), 0) for prompt in ("known", "twice", "new"))
    split = Split(train=(known,), validation=(), test=(known, twice, twice, new))
    assert set(unseen_prompts(split, 2)) == {"twice", "new"}
    with pytest.raises(DataError, match=r"have 2 prompts .* and 3 are asked for"):
        unseen_prompts(split, 3)


def test_prompts_of_a_sorted_file_are_of_many_restaurants_and_always_the_same() -> None:
    names = [f"restaurant {number // 10}" for number in range(100)]
    prompts = [f"{name}, dish {number}" for number, name in enumerate(names)]
    split = Split(train=(), validation=(), test=tuple(Question(prompt, ("x",), 0) for prompt in prompts))
    found = unseen_prompts(split, 10)
    assert found == unseen_prompts(split, 10)
    assert len(set(found)) == 10
    assert len(restaurants(found)) >= 5
    assert len(restaurants(prompts[:10])) == 1  # what the file begins with


def restaurants(prompts: Sequence[str]) -> set[str]:
    return {re.split(r"[],]", prompt)[0] for prompt in prompts}


class Wrong(Draft):
    """Drafts a token that the text does not have."""

    def proposer(self) -> Wrong:
        return self

    def follow(self, text: Sequence[int]) -> None:
        """See `Proposer`."""

    def next_bucket(self) -> int | None:
        return None

    def propose(self, _choose: Choose) -> DraftedToken | None:
        return DraftedToken(UNLIKELY, 0)


UNLIKELY = 258


def test_a_draft_is_counted_for_each_text_and_changes_none(model: Path) -> None:
    plan = SplitPlan.parse("2:2", 6)
    span = load_span(model, plan)
    edge = load_edge_parts(model, plan, CachingLocalSpan(span)).eval()
    same = load_edge_parts(model, plan, CachingLocalSpan(span)).eval()
    made: list[Draft] = []

    def right() -> Draft:
        made.append(ModelDraft(same, FixedLength(3)))
        return made[-1]

    texts = DraftedTexts(edge, {"wrong": lambda: Wrong(FixedLength(2)), "right": right})
    alone = texts.text_of(range(5, 21), 8, SEQUENTIAL)
    assert (alone["rounds"], alone["drafted"], alone["accepted"]) == (0, 0, 0)
    assert len(alone["tokens"]) == 8
    assert UNLIKELY not in alone["tokens"]
    for _ in range(2):  # each time the counts of this text alone
        wrong, exact = (texts.text_of(range(5, 21), 8, name) for name in ("wrong", "right"))
        assert wrong["tokens"] == exact["tokens"] == alone["tokens"]
        assert (wrong["rounds"], wrong["accepted"]) == (8, 0)
        assert wrong["drafted"] > 8
        assert (exact["rounds"], exact["accepted"], exact["judged"]) == (2, 6, 6)
        assert wrong["judged"] == 7 < wrong["drafted"]  # the last round has no room for a draft
        assert exact["draft_seconds"] > 0
    texts.begin()
    assert texts.text_of(range(5, 21), 8, "right")["rounds"] == 2
    assert [draft.statistics.rounds for draft in made] == [4, 2]


def test_what_is_there_is_not_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []

    def run(*arguments: str) -> dict[str, Any]:
        commands.append(arguments[:2])
        out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else tmp_path
        if arguments[:2] == ("emulator", "sample"):
            out.write_text("{}")
        elif arguments[:2] == ("emulator", "build"):
            assert Path(arguments[arguments.index("--distill") + 1]).is_file()
            tiny_package(out, model)
        elif arguments[:2] == ("edge", "train"):
            draft = Path(arguments[arguments.index("--draft") + 1])
            assert (draft / "manifest.json").is_file()
            examples = Path(arguments[arguments.index("--data") + 1]).read_text().splitlines()
            assert set(json.loads(examples[0])) == {"prompt", "completion"}
            out.mkdir()
            (out / "report.json").write_text("{}")
        return {}

    monkeypatch.setattr(links_preparation, "run_isthmus", run)
    monkeypatch.setattr(links_preparation.LocalCloud, "start", lambda self: self.connection_file.write_text("-"))
    settings = GenerateSettings(str(model), out=tmp_path / "out", data_folder=task_folder(tmp_path / "data"))
    made = prepare(settings, tuned=True)
    assert commands == [("emulator", "sample"), ("emulator", "build"), ("edge", "train")]
    assert prepare(settings, tuned=True) == made
    assert len(commands) == 3
    longer = prepare(replace(settings, tune_steps=300), tuned=True)
    assert (longer.draft, commands[3:]) == (made.draft, [("edge", "train")])
    assert longer.tuned != made.tuned
    assert prepare(replace(settings, draft=made.draft, adapter=made.tuned), tuned=True) == made
    assert prepare(replace(settings, draft=made.draft), tuned=False).adapter is None
    assert len(commands) == 4
    with pytest.raises(ConfigError, match="give --adapter, or --texts chat"):
        prepare(replace(settings, draft=made.draft), tuned=True)
    with pytest.raises(ConfigError, match="give --draft, or leave --adapter out"):
        prepare(replace(settings, adapter=made.tuned), tuned=True)
    assert len(commands) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [({"texts": "poem"}, "--texts 'poem' is not known"), ({"drafts": "large"}, "--drafts 'large' is not known")],
)
def test_unknown_names_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_links(GenerateSettings("nowhere", **given))


def test_without_namespaces_the_links_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_bench, "missing", lambda: "there is no tun")
    with pytest.raises(ConfigError, match=r"there is no tun; or leave them out with --parts local"):
        check_links(GenerateSettings("nowhere"))


@pytest.mark.long
@namespaces
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_whole_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(links_bench, "CLOUD_DTYPE", "fp32")  # in bf16 tokens are too often equally likely
    package = tiny_package(tmp_path / "package", model)
    tuned(package, tmp_path / "run" / "adapter", on_package=False)
    settings = GenerateSettings(
        str(model),
        rtt_ms=[0.0, 50.0],
        drafts="ngram,small draft,tuned draft,fixed 2",
        link_prompts=1,
        link_tokens=12,
        threads=1,
        draft=package.folder,
        adapter=tmp_path / "run",
        data_folder=task_folder(tmp_path / "data"),
        figure=tmp_path / "links.png",
    )
    with pytest.raises(ConfigError, match="run has no tuned draft"):
        run_links(settings, tmp_path)
    save_tuned(tmp_path / "run" / "draft.safetensors", package.load_emulator(), package.id)
    result = run_links(settings, tmp_path)
    assert [(row["rtt_ms"], row["text"], row["draft"]) for row in result["links"]] == [
        (rtt_ms, text, draft)
        for rtt_ms in (0.0, 50.0)
        for text, drafts in (
            ("chat", ("none", "ngram", "small draft", "fixed 2")),
            ("tuned", ("none", "ngram", "small draft", "tuned draft", "fixed 2")),
        )
        for draft in drafts
    ]
    assert all(row["identical"] == 1 for row in result["links"])
    for row in result["links"]:
        if row["draft"] == "fixed 2":
            assert row["drafted_per_round"] > 0 < row["judged"]
            assert row["draft_ms"] > 0
        if row["rtt_ms"] and row["draft"] == "none":
            assert row["tokens_per_s"] < 1 / 0.05  # no text is faster than its round trips
    assert (tmp_path / "links.png").read_bytes().startswith(b"\x89PNG")
    assert set(result["targets"]) == {"least_at_0_ms", "least_from_50_ms"}


@pytest.mark.shared_data
def test_e2e_has_enough_prompts_that_tuning_does_not_see(shared_data: Path) -> None:
    settings = GenerateSettings(data_folder=shared_data)
    split = read_e2e(settings)
    found = unseen_prompts(split, 50)
    assert len(set(found)) == 50
    first = 1 + GenerateSettings().link_prompts  # one warms up
    in_order = list(dict.fromkeys(question.prompt for question in split.test))
    assert len(restaurants(found[:first])) >= 8 > len(restaurants(in_order[:first]))

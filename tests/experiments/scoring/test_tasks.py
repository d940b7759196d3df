"""Tasks: what is parsed, that nothing of the test file is trained on, and clear words for bad files."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import pytest
from support.models.small_tasks import task_folder
from support.models.tiny import tiny_tokenizer

from isthmus.common.errors import ConfigError, DataError
from isthmus.edge.budget.text_overlap import runs_of
from isthmus.experiments.scoring.tasks import (
    Sizes,
    default_data_folder,
    load_task,
    parse_instruction,
    read_apart,
    read_task,
)

SIZES = Sizes(test=8, validation=4, max_length=96)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_folder(tmp_path_factory.mktemp("data"))


def test_the_data_lie_beside_the_checkout() -> None:
    checkout = Path(__file__).resolve().parents[3]
    assert default_data_folder() == checkout.parent / "shared" / "data"


def test_an_instruction_is_a_question_with_answers() -> None:
    entry = {
        "instruction": "Please choose the correct answer to the question: What is Answer2 of?\n\n"
        "Answer1: a b Answer2: c: d Answer3: e\n\nAnswer format: answer1/answer2/answer3",
        "answer": "answer2",
    }
    question = parse_instruction(entry, "here")
    assert question.prompt == "Question: What is Answer2 of?\nAnswer:"
    assert question.choices == (" a b", " c: d", " e")
    assert question.answer == 1


@pytest.mark.parametrize(
    "entry",
    [
        {},
        [],
        {"instruction": "no question", "answer": "answer1"},
        {"instruction": "question: Q\n\nAnswer1: a\n\nAnswer format: answer1", "answer": "answer2"},
    ],
)
def test_a_malformed_entry_is_named(entry: object) -> None:
    with pytest.raises(DataError, match=r"file, entry 3"):
        parse_instruction(entry, "file, entry 3")


def test_the_parts_do_not_overlap_and_are_the_same_every_time(data: Path) -> None:
    tokenizer = tiny_tokenizer()
    task = load_task("e2e", data, tokenizer, SIZES)
    assert (len(task.train), len(task.validation), len(task.held_out)) == (36, 4, 8)
    assert not set(task.validation) & set(task.train)
    assert not set(task.held_out) & {*task.train, *task.validation}
    assert task.metrics == ("completion_loss",)
    assert task == load_task("e2e", data, tokenizer, SIZES)
    assert task.fingerprint != load_task("e2e", data, tokenizer, Sizes(8, 5, 96)).fingerprint


def test_multiple_choice_trains_on_the_right_answer(data: Path) -> None:
    tokenizer = tiny_tokenizer()
    task = load_task("sst2", data, tokenizer, SIZES)
    assert task.metrics == ("accuracy", "completion_loss")
    assert not task.held_out
    assert {question.choices for question in task.questions} == {(" negative", " positive")}
    first = task.train[0]
    trained = [token for token, label in zip(first.input_ids, first.labels, strict=True) if label != -100]
    assert tokenizer.decode(trained, skip_special_tokens=True) in (" negative", " positive")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [("glue", ConfigError, "not a task"), ("arc_easy", DataError, "train.json")],
)
def test_what_is_missing_is_named(data: Path, name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_task(name, data, tiny_tokenizer(), SIZES)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(DataError, match=r"nowhere is missing.*--data-folder"):
        load_task("e2e", Path("nowhere"), tiny_tokenizer(), SIZES)


def test_a_malformed_label_is_named(data: Path, tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "copy")
    (folder / "sst2" / "train.tsv").write_text("good film\t1\nbad film\tno\n")
    with pytest.raises(DataError, match=r"train\.tsv, line 2"):
        load_task("sst2", folder, tiny_tokenizer(), SIZES)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "n_train", "n_test"), [("e2e", 4672, 160), ("openbookqa", 4957, 200), ("arc_easy", 2251, 200)]
)
def test_the_real_tasks_are_read(shared_data: Path, name: str, n_train: int, n_test: int) -> None:
    task = load_task(name, shared_data, tiny_tokenizer(), Sizes(max_length=2048))
    assert len(task.train) + len(task.validation) == n_train
    assert len(task.validation) == 64
    assert len(task.held_out) + len(task.questions) == n_test
    assert all(question.choices[question.answer].startswith(" ") for question in task.questions)


# Parts without a shared prompt ----------------------------------------------------------------------------------------

APART = Sizes(test=8, validation=4, max_length=96, public=60, train=15)


def words(text: str, **_: object) -> dict[str, list[int]]:
    """A tokenizer: a token for each word."""
    return {"input_ids": [crc32(word.encode()) for word in text.split()]}


def parts(name: str, data: Path, sizes: Sizes) -> list[list[str]]:
    """The prompts of the four parts, without case, punctuation and white space."""
    split = read_apart(name, data, sizes, words)
    return [
        ["".join(filter(str.isalnum, question.prompt.casefold())) for question in part]
        for part in (split.public, split.validation, split.train, split.test)
    ]


def assert_apart(prompts: list[list[str]]) -> None:
    assert all(prompts)
    assert len(set().union(*prompts)) == sum(len(set(part)) for part in prompts)
    assert len(set(prompts[1])) == len(prompts[1])


def test_tasks_to_choose_settings_on_are_made_of_a_play_and_of_pythons_library(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    speeches = [f"PLAYER {i}:\nThis is what is said, number {i}." for i in range(500)]
    (folder / "input.txt").write_text("\n\n".join([*speeches, "PLAYER:\nShort.", "PLAYER:\nNobody asked for this."]))
    split = read_task("plays", tmp_path, Sizes())
    assert len(split.test) == 200
    assert len({*split.train, *split.validation, *split.test}) < 500  # of the answers that are long enough
    number = int(split.train[0].prompt.split()[1].rstrip(":"))
    assert split.train[0].prompt == f"{speeches[number]}\n\nPLAYER {number + 1}:\n"
    assert split.train[0].choices == (f"This is what is said, number {number + 1}.",)
    split = read_task("docstrings", data, Sizes())
    said = {question.prompt: question.choices[0] for question in (*split.train, *split.validation)}
    known = {f"textwrap.{name}\n" for name in ("dedent(text)", "indent(text, prefix, predicate)", "wrap(text, width)")}
    assert said[(known & said.keys()).pop()]
    with pytest.raises(DataError, match=r"cannot be read .*: check --data-folder"):
        read_task("plays", data.parent / "nothing", Sizes())


@pytest.mark.parametrize("name", ["e2e", "openbookqa", "sst2", "tickets"])
def test_no_two_parts_share_a_prompt(data: Path, name: str) -> None:
    found = parts(name, data, APART)
    assert_apart(found)
    assert len(found[1]) == 4
    assert found == parts(name, data, APART)


def test_what_shares_a_prompt_goes_to_one_part(data: Path, tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "copy")
    rows = [f'"name[{i // 5}]","text {i}"' for i in range(100)]
    (folder / "e2e" / "train.csv").write_text("\n".join(["mr,ref", *rows]) + "\n")
    (folder / "e2e" / "test.csv").write_text('mr,ref\n"NAME[3] ","a text"\n"name[77]","a text"\n')
    found = parts("e2e", folder, Sizes(validation=4, public=20, train=50))
    assert_apart(found)
    assert "meaningname3text" not in found[2]
    assert len(found[2]) == 50
    assert len(set(found[2])) == 10  # each prompt with all its texts
    split = read_task("e2e", folder, Sizes(validation=4))
    assert {question.prompt for question in split.train} >= {question.prompt for question in split.validation}


def test_what_repeats_a_run_of_a_private_text_is_not_public(tmp_path: Path) -> None:
    folder = task_folder(tmp_path)
    shared = " ".join(f"word{i}" for i in range(13))
    rows = [f'"name[{i}]","{shared if i % 2 else "text"} {i}"' for i in range(100)]
    (folder / "e2e" / "train.csv").write_text("\n".join(["mr,ref", *rows]) + "\n")
    split = read_apart("e2e", folder, Sizes(validation=4, public=40, train=30), words)
    assert split.public
    assert not any("word12" in question.choices[0] for question in split.public)
    assert any("word12" in question.choices[0] for question in split.train)


def test_what_is_sent_of_forms_has_no_list_of_attributes_of_a_private_text(tmp_path: Path) -> None:
    folder = task_folder(tmp_path)
    long = " ".join(f"of{i}" for i in range(13))
    prompts = [f"name[{i}], food[{'x' if i % 3 else long}], near[a b c d e f g h i j]" for i in range(100)]
    rows = [f'"{prompt}","text {i}"' for i, prompt in enumerate(prompts)]
    (folder / "e2e" / "train.csv").write_text("\n".join(["mr,ref", *rows]) + "\n")
    split = read_apart("e2e", folder, Sizes(validation=4, public=40, train=30), words)
    others = (*split.train, *split.validation, *split.test)
    private = {run for question in others for run in runs_of(question.prompt + question.choices[0], words)}
    assert not any(run in private for text in split.public_texts for run in runs_of(text, words))
    for question, text in zip(split.public, split.public_texts, strict=False):
        number = int(question.choices[0].split()[-1])
        backwards = f"Meaning: near[a b c d e f g h i j], food[x], name[{number}]\nText: text {number}"
        assert text == (backwards if number % 3 else f" text {number}")  # the completion where a value is such a run
    # The control: as they stand, public prompts have such runs.
    public = [run for question in split.public for run in runs_of(question.prompt + question.choices[0], words)]
    assert any(run in private for run in public)


def test_a_short_text_that_is_a_private_one_is_not_public(tmp_path: Path) -> None:
    folder = task_folder(tmp_path)
    rows = [f'"name[{i}]","{"yes" if i % 2 else f"text {i}"}"' for i in range(100)]
    (folder / "e2e" / "train.csv").write_text("\n".join(["mr,ref", *rows]) + "\n")
    split = read_apart("e2e", folder, Sizes(validation=4, public=40, train=30), words)
    assert any(question.choices[0] == " yes" for question in split.train)
    assert not any(question.choices[0] == " yes" for question in split.public)


def test_a_task_has_a_public_slice_as_text_and_as_tokens(data: Path) -> None:
    tokenizer = tiny_tokenizer()
    task = load_task("e2e", data, tokenizer, APART)
    assert len(task.public) == len(task.public_texts) > 1
    assert len("".join(task.public_texts[:-1])) < 60 * 8
    assert all(text.endswith(" is here") and "name[" not in text for text in task.public_texts)  # prompts are forms
    assert min(len(each.input_ids) for each in task.public) > max(map(len, task.public_texts))  # trained on whole
    assert task.fingerprint != load_task("e2e", data, tokenizer, SIZES).fingerprint
    with pytest.raises(DataError, match="100000 were asked for"):
        load_task("e2e", data, tokenizer, Sizes(validation=4, public=100_000))


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["e2e", "openbookqa", "arc_easy", "sst2"])
def test_the_real_parts_share_no_prompt(shared_data: Path, name: str) -> None:
    found = parts(name, shared_data, Sizes(public=14_000))
    assert_apart(found)
    assert len(found[2]) == 1000

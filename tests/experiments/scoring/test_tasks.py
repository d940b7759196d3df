"""Tasks: what is parsed, that nothing of the test file is trained on, and clear words for bad files."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models.small_tasks import task_folder
from support.models.tiny import tiny_tokenizer

from isthmus.common.errors import ConfigError, DataError
from isthmus.experiments.scoring.tasks import Sizes, default_data_folder, load_task, parse_instruction

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


def test_plain_text_holds_its_end_out(data: Path) -> None:
    path = data / "shakespeare" / "input.txt"
    task = load_task(f"text:{path}", Path("nowhere"), tiny_tokenizer(), SIZES)
    assert task.metrics == ("perplexity",)
    assert len(task.validation) == 4
    end = tiny_tokenizer().decode(task.held_out[-1].input_ids)
    assert end[:20] in path.read_text()[-200:]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [("glue", ConfigError, "not a task"), ("arc_easy", DataError, "train.json"), ("text:gone.txt", DataError, "gone")],
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

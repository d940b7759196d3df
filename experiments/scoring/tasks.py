"""The tasks that models are tuned and scored on: what is trained on, what a learning rate is chosen by, what is held
out.

    e2e                     write a text about a restaurant from its meaning; the loss of the reference text
    openbookqa, arc_easy    choose among answers by their likelihood; also the loss of the right one
    sst2                    the same with the two words for a review's sentiment

and, to choose settings on rather than on the tasks that are reported:

    tickets                 write the triage line of a made-up support ticket; needs no file
    plays                   write the speech that answers another one in Shakespeare's plays
    docstrings              say what a function of this Python's own library does; needs no file

The validation slice is always a part of the training file, as is a public slice; the test file is for scores alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from isthmus.common.errors import ConfigError, DataError
from isthmus.edge.budget.text_overlap import runs_of
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.batches import Encoded, encode, fingerprint, pad_id
from isthmus.edge.data.readers import Example, read_examples
from isthmus.experiments.harness.tickets import make_tickets

_CHOICE_TESTS = 200
_TESTS = {"e2e": 160}
_SENTIMENTS = (" negative", " positive")
_TICKETS = (6000, 400)  # to train on, to score on
_MADE_TEST = 400  # to score on, of what is in one file
_MADE_LENGTH = range(20, 240)  # characters of a speech or a docstring
_FORMS = ("e2e", "tickets")
"""Tasks whose prompts are filled-in forms."""
_ATTRIBUTE = re.compile(r"\w[\w ]*\[[^\]]*\]")
"""An attribute of a meaning representation of e2e, `name[value]`."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its possible answers; `answer` is the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int

    @property
    def example(self) -> Example:
        """The question with its right answer, to be trained on."""
        return Example(self.prompt, self.choices[self.answer])


@dataclass(frozen=True, slots=True)
class Split:
    """A task's questions: to train on, to choose a learning rate by, to score on, and what anyone may read.

    `public_texts` is what of the public ones is sent, as plain text, to fit a bridge to.
    """

    train: tuple[Question, ...]
    validation: tuple[Question, ...]
    test: tuple[Question, ...]
    public: tuple[Question, ...] = ()
    public_texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of a task's data is used.

    Attributes:
        test: Held-out documents; None for the task's own default (160 for e2e, 200 for the others).
        validation: Examples of the training file that a learning rate is chosen by.
        public: Tokens of the public slice, about. With one, no two of a task's four parts share a prompt; with None
            there is no slice, and E2E's parts share most of theirs.
        train: Texts to train on at most, where there is a public slice.
    """

    test: int | None = None
    validation: int = 64
    max_length: int = 256
    public: int | None = None
    train: int = 1000


@dataclass(frozen=True, slots=True)
class Task:
    """A task, as tokens of one tokenizer.

    Attributes:
        validation: What a learning rate is chosen by; not in `train`.
        held_out: Documents that a loss is measured on; empty for multiple choice.
        questions: Questions of multiple choice; empty for the others.
        public: The public slice, to be trained on.
        public_texts: What a bridge is fitted to of the same, as plain text; see `read_apart`.
    """

    name: str
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]
    held_out: tuple[Encoded, ...]
    questions: tuple[Question, ...]
    metrics: tuple[str, ...]
    pad_id: int
    public: tuple[Encoded, ...] = ()
    public_texts: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all its tokens and questions."""
        questions = json.dumps([[question.prompt, question.choices, question.answer] for question in self.questions])
        tokens = fingerprint(self.train, self.validation, self.held_out, *([self.public] if self.public else []))
        return hashlib.sha256(f"{tokens} {questions}".encode()).hexdigest()


def default_data_folder() -> Path:
    """Where the tasks' data lie unless a flag says otherwise: shared/data beside the checkout."""
    return Path(__file__).resolve().parents[3] / "shared" / "data"


def load_task(name: str, folder: Path, tokenizer: Any, sizes: Sizes) -> Task:
    """Read and tokenize a task.

    Args:
        name: One of those at the module's head.

    Raises:
        ConfigError: There is no such task.
        DataError: A file is missing, malformed or too small; the message names it.
    """
    split = read_task(name, folder, sizes) if sizes.public is None else read_apart(name, folder, sizes, tokenizer)
    is_choice = len(split.test[0].choices) > 1

    def tokens(questions: Sequence[Question]) -> tuple[Encoded, ...]:
        return tuple(encode([question.example for question in questions], tokenizer, sizes.max_length)[0])

    return Task(
        name=name,
        train=tokens(split.train),
        validation=tokens(split.validation),
        held_out=() if is_choice else tokens(split.test),
        questions=split.test if is_choice else (),
        metrics=("accuracy", "completion_loss") if is_choice else ("completion_loss",),
        pad_id=pad_id(tokenizer),
        public=tokens(split.public),
        public_texts=split.public_texts,
    )


def read_task(name: str, folder: Path, sizes: Sizes) -> Split:
    """Read a task's questions.

    Raises:
        ConfigError: There is no such task.
        DataError: A file is missing, malformed or too small; the message names it.
    """
    train, test = _files(name, folder)
    validation = set(_sample(range(len(train)), sizes.validation, "validation"))
    if len(validation) >= len(train):
        raise DataError(
            f"{folder / name} has {len(train)} training examples, and {sizes.validation} of them are for validation: "
            "nothing is left to train on"
        )
    return Split(
        tuple(question for index, question in enumerate(train) if index not in validation),
        tuple(train[index] for index in sorted(validation)),
        _scored(name, test, sizes),
    )


def read_apart(name: str, folder: Path, sizes: Sizes, tokenizer: Any) -> Split:
    """The same with a public slice, and with no prompt in two parts: the data owner's case.

    Prompts that differ in case, white space or punctuation alone count as one. The public slice shares no run of tokens
    with the other parts, as `emulator fit` asks. Where prompts are forms that all share such runs, this is true of the
    completions alone, and prompts do not count as tokens of the slice. Of such texts the completions are sent; of e2e
    the whole texts with their attributes in reverse order, where that leaves no such run. The validation has one text
    for each of its prompts.

    Raises:
        ConfigError: There is no such task.
        DataError: A file is missing, malformed or too small; the message names it.
    """
    train, test = _files(name, folder)
    scored = _scored(name, test, sizes)
    held_out = set(map(_topic, scored))
    topics: dict[str, list[Question]] = {}
    for question in train:
        if _topic(question) not in held_out:
            topics.setdefault(_topic(question), []).append(question)
    drawn = list(topics.values())
    random.Random("task/apart").shuffle(drawn)  # noqa: S311  # a choice, not a secret
    validation = [drawn.pop()[0] for _ in range(min(sizes.validation, len(drawn)))]
    private: list[Question] = []
    while drawn and len(private) < sizes.train:
        private += drawn.pop()
    private = private[: sizes.train]
    own = [text for each in (*private, *validation, *scored) for text in (_text(each), _checked(name, each))]
    known = {run for text in own for run in runs_of(text, tokenizer)}
    public: list[Question] = []
    tokens, wanted = 0, sizes.public or 0
    for question in (question for group in reversed(drawn) for question in group):
        shown = _checked(name, question)
        if tokens < wanted and known.isdisjoint(runs_of(shown, tokenizer)):
            public.append(question)
            tokens += len(tokenizer(shown, add_special_tokens=False)["input_ids"])
    if tokens < wanted:
        raise DataError(
            f"{folder / name} has {len(topics)} prompts to train on: beside {sizes.validation} for validation and "
            f"{sizes.train} private texts, {tokens} tokens are public, and {wanted} were asked for: lower --public or "
            "--private"
        )
    sent: list[str] = []
    tokens = 0
    for question in public:
        if tokens < wanted:
            whole = _bridge_text(name, question)
            sent.append(whole if known.isdisjoint(runs_of(whole, tokenizer)) else _checked(name, question))
            tokens += len(tokenizer(sent[-1], add_special_tokens=False)["input_ids"])
    return Split(tuple(private), tuple(validation), scored, tuple(public), tuple(sent))


def _files(name: str, folder: Path) -> tuple[list[Question], list[Question]]:
    if name not in (*_READERS, *_MADE):
        raise ConfigError(f"{name!r} is not a task; use {', '.join((*_READERS, *_MADE))}")
    if name in _MADE:
        return _MADE[name](folder)
    if not folder.is_dir():
        raise DataError(
            f"the data folder {folder} is missing; name with --data-folder where {name} and the other tasks lie"
        )
    read, suffix = _READERS[name]
    train, test = (read(folder / name / f"{part}.{suffix}") for part in ("train", "test"))
    return train, test


def _scored(name: str, test: Sequence[Question], sizes: Sizes) -> tuple[Question, ...]:
    count = sizes.test if sizes.test is not None else _TESTS.get(name, _CHOICE_TESTS)
    return tuple(_sample(test, count, "test"))


def _topic(question: Question) -> str:
    return " ".join(re.findall(r"\w+", question.prompt.casefold()))


def _text(question: Question) -> str:
    return question.prompt + question.choices[question.answer]


def _checked(name: str, question: Question) -> str:
    """The part of a public question that must share no run of tokens with the other parts."""
    return question.choices[question.answer] if name in _FORMS else _text(question)


def _bridge_text(name: str, question: Question) -> str:
    """What a bridge is fitted to of a public question, if it shares no run of tokens with the other parts."""
    if name != "e2e":
        return _checked(name, question)
    attributes = _ATTRIBUTE.findall(question.prompt)
    backwards = question.prompt.replace(", ".join(attributes), ", ".join(reversed(attributes)))
    return backwards + question.choices[question.answer]


def _sample(things: Sequence[T], n: int, what: str) -> list[T]:
    """`n` of the things, or all, in their order; the same ones every time."""
    if n >= len(things):
        return list(things)
    chosen = random.Random(f"task/{what}").sample(range(len(things)), n)  # noqa: S311  # a choice, not a secret
    return [things[index] for index in sorted(chosen)]


def _e2e(path: Path) -> list[Question]:
    config = TuningConfig(
        data=str(path), prompt_template="Meaning: {mr}\nText:", completion_template=" {ref}", header=True
    )
    return [Question(example.prompt, (example.completion,), 0) for example in read_examples(str(path), config)]


_INSTRUCTION = re.compile(r"question: (.*?)\s*\n\s*\n(.*?)\n\s*\nAnswer format", re.DOTALL)
_ANSWER = re.compile(r"Answer(\d+): (.*?)(?=\s+Answer\d+: |\s*$)", re.DOTALL)


def _instructions(path: Path) -> list[Question]:
    """Multiple choice in the form of instructions: `…question: Q`, a blank line, `Answer1: … Answer2: …`."""
    try:
        rows = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); it must be a list of instructions") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no instructions; it must be a list of them")
    return [parse_instruction(row, f"{path}, entry {number}") for number, row in enumerate(rows, 1)]


def parse_instruction(row: Any, where: str) -> Question:
    """A question from an entry with `instruction` and `answer` ("answer2").

    Raises DataError where the entry has another form; the message names `where`.
    """
    try:
        found = _INSTRUCTION.search(row["instruction"])
        right = re.fullmatch(r"answer(\d+)", row["answer"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: no texts `instruction` and `answer`") from error
    answers = {int(number): text.strip() for number, text in _ANSWER.findall(found[2])} if found else {}
    if found is None or right is None or int(right[1]) not in answers:
        raise DataError(f"{where}: not of the form `…question: Q`, `Answer1: … Answer2: …`, with one of them right")
    numbers = sorted(answers)
    return Question(
        prompt=f"Question: {found[1].strip()}\nAnswer:",
        choices=tuple(f" {answers[number]}" for number in numbers),
        answer=numbers.index(int(right[1])),
    )


def _sst2(path: Path) -> list[Question]:
    questions = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        text, tab, label = line.rstrip("\r").rpartition("\t")
        if not tab or label not in ("0", "1"):
            raise DataError(f"{path}, line {number}: not a text, a tab and the label 0 or 1")
        questions.append(Question(f"Review: {text}\nSentiment:", _SENTIMENTS, int(label)))
    if not questions:
        raise DataError(f"{path} is empty")
    return questions


def _tickets(_folder: Path) -> tuple[list[Question], list[Question]]:
    train, test = (
        [Question(ticket.prompt, (ticket.completion,), 0) for ticket in make_tickets(count, seed)]
        for seed, count in enumerate(_TICKETS)
    )
    return train, test


def _plays(folder: Path) -> tuple[list[Question], list[Question]]:
    speeches = [speech.strip().partition("\n") for speech in _read(folder / "shakespeare" / "input.txt").split("\n\n")]
    return _shuffled(
        Question(f"{who}\n{said}\n\n{answers}\n", (answer,), 0)
        for (who, _, said), (answers, _, answer) in pairwise(speeches)
        if len(said) in _MADE_LENGTH and len(answer) in _MADE_LENGTH
    )


def _docstrings(_folder: Path) -> tuple[list[Question], list[Question]]:
    library = Path(sysconfig.get_path("stdlib"))
    questions = []
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library).with_suffix("")
        if not {"site-packages", "test", "tests", "lib2to3", "idlelib"}.isdisjoint(place.parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef):
                said = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if len(said) in _MADE_LENGTH:
                    arguments = ", ".join(argument.arg for argument in node.args.args)
                    questions.append(Question(f"{'.'.join(place.parts)}.{node.name}({arguments})\n", (said,), 0))
    return _shuffled(questions)


def _shuffled(questions: Iterable[Question]) -> tuple[list[Question], list[Question]]:
    shuffled = list(dict.fromkeys(questions))
    random.Random("task/made").shuffle(shuffled)  # noqa: S311  # an order, not a secret
    return shuffled[_MADE_TEST:], shuffled[:_MADE_TEST]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"the data file {path} cannot be read ({error.strerror}): check --data-folder") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (at byte {error.start}); save it as UTF-8") from error


_READERS: dict[str, tuple[Callable[[Path], list[Question]], str]] = {
    "e2e": (_e2e, "csv"),
    "openbookqa": (_instructions, "json"),
    "arc_easy": (_instructions, "json"),
    "sst2": (_sst2, "tsv"),
}
"""What reads a file of a task, and how the names of its files end."""
_MADE: dict[str, Callable[[Path], tuple[list[Question], list[Question]]]] = {
    "tickets": _tickets,
    "plays": _plays,
    "docstrings": _docstrings,
}
"""What makes the tasks to choose settings on: their questions to train on, and to score on."""

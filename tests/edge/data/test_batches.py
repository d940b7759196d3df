"""From files to batches: forms, mistakes by line, boundaries, labels, order."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import BOS, EOS, tiny_tokenizer

from isthmus.common.errors import ConfigError, DataError
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import (
    IGNORED,
    Batches,
    Encoded,
    collate,
    encode,
    fingerprint,
    label_count,
    load_data,
    split,
)
from isthmus.edge.data.readers import Example, read_examples


def config(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"cloud": "isthmus://h:1#SHA256:x", "data": "unused", **values})


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read(source: str, **values: Any) -> list[tuple[str, str]]:
    return [(example.prompt, example.completion) for example in read_examples(source, config(**values))]


# Forms ---------------------------------------------------------------------------------------------------------------


def test_jsonl_of_text_and_of_pairs(tmp_path: Path) -> None:
    lines = '{"text": "one"}\n\n{"text": "tw\u2028o", "id": 3}'
    assert read(write(tmp_path, "a.jsonl", lines)) == [("", "one"), ("", "tw\u2028o")]
    assert read(write(tmp_path, "b.jsonl", '{"prompt": "p", "completion": "c"}\n')) == [("p", "c")]
    assert read(write(tmp_path, "c.jsonl", '{"q": "p", "a": "c"}\n'), prompt_column="q", completion_column="a") == [
        ("p", "c")
    ]


def test_csv_with_bom_quotes_and_line_breaks(tmp_path: Path) -> None:
    text = '\ufeffmr,ref\r\n"name[A], b","He said ""hi"""\r\n"two\nlines",x\r\n'
    assert read(write(tmp_path, "a.csv", text), prompt_column="mr", completion_column="ref") == [
        ("name[A], b", 'He said "hi"'),
        ("two\nlines", "x"),
    ]


def test_tsv_without_header_and_with_quotation_marks(tmp_path: Path) -> None:
    source = write(tmp_path, "a.tsv", 'a "quoted film\t1\nbad\t0\n')
    assert read(source, header=False, prompt_column="0", completion_column="1") == [
        ('a "quoted film', "1"),
        ("bad", "0"),
    ]


def test_templates_fill_in_columns(tmp_path: Path) -> None:
    source = write(tmp_path, "a.csv", "mr,ref:x\nA,B\n")
    pairs = read(source, prompt_template="{{M}}: {mr}\nText:", completion_column="ref:x")
    assert pairs == [("{M}: A\nText:", "B")]
    assert read(write(tmp_path, "b.csv", "q,a\nA,B\n"), prompt_column="q", completion_template=" {a}!") == [
        ("A", " B!")
    ]


@pytest.mark.parametrize("template", ["{mr.__class__}", "{mr[0]}", "{mr!r}", "{mr:>9}", "{}", "{mr"])
def test_templates_take_plain_columns_only(tmp_path: Path, template: str) -> None:
    source = write(tmp_path, "a.csv", "mr,ref\nA,B\n")
    with pytest.raises((ConfigError, DataError)):
        read(source, prompt_template=template, completion_column="ref")


def test_the_form_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--format"):
        read(write(tmp_path, "a.dat", "x"))
    assert read(write(tmp_path, "b.dat", '{"text": "x"}'), format="jsonl") == [("", "x")]


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON .* at column 10\)"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "line 2: a list where an object"),
        ("a.jsonl", '{"text": "x"}\n\n{"txt": "y"}\n', "line 3: no 'text'; it has 'txt'"),
        ("a.jsonl", '{"text": 7}\n', "line 1: 'text' is a number, not a string"),
        ("a.jsonl", '{"text": null}\n', "line 1: 'text' is a null"),
        ("a.jsonl", '{"text": " "}\n', "line 1: the text is empty"),
        ("a.jsonl", '{"prompt": "a", "completion": ""}\n', "line 1: the completion is empty"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "line 1: 'text' holds half of a surrogate pair"),
        ("a.jsonl", "[" * 10_000 + "\n", "line 1 has lists and objects nested deeper than 64: split it"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1 holds more than 65536 texts, lists and objects"),
        ("a.jsonl", '{"other": "x"}\n', "line 1: none of the keys 'other'"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "line 1: no assistant message"),
        ("a.jsonl", '{"messages": ["x"]}\n', "line 1: message 0 is not an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", "", "holds no examples"),
        ("a.jsonl", "\n \n", "holds no examples"),
        ("a.csv", "text\n", "holds no examples"),
        ("a.csv", 'text,b\nx,y\n"z\n', "line 3: malformed CSV"),
        ("a.csv", "text,b\nx,y\nz\n", "line 3: 1 columns where 2 are expected"),
        ("a.csv", 'text,b\n"x\ny",y\nz\n', "line 4: 1 columns"),
        ("a.csv", "text,text\nx,y\n", "line 1: a column name stands twice"),
        ("a.csv", b"text\nx\n\xe9\n", "line 3: byte 0xe9 is not UTF-8"),
        ("a.csv", "text\n" + "x" * 200_000 + "\n", "line 2: malformed CSV"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path, name, text))
    assert name in str(caught.value)


def test_a_missing_file() -> None:
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read \(No such file"):
        read("none.jsonl")


def test_hub_data_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"isthmus\[datasets\]"):
        read("hub:some/set")


def test_hub_data_and_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        if name == "gone":
            raise ConnectionError("no route")
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("hub:a/b:test") == [("", "x")]
    with pytest.raises(DataError, match=r"'gone', split 'train', cannot be loaded \(no route\)"):
        read("hub:gone")
    assert asked == [("a/b", "test"), ("gone", "train")]


# Tokens and labels ---------------------------------------------------------------------------------------------------


def tokens(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def test_the_loss_is_on_the_completion_and_its_eos() -> None:
    (one,), dropped = encode([Example("ab", "cd")], tiny_tokenizer(), 100)
    assert one.input_ids == (*tokens("abcd"), EOS)
    assert one.labels == (IGNORED, IGNORED, *tokens("cd"), EOS)
    assert dropped == 0


def test_the_loss_is_on_all_of_a_text_but_its_first_token() -> None:
    (one,), _ = encode([Example("", "abc")], tiny_tokenizer(), 100)
    assert one.labels == (IGNORED, *tokens("bc"), EOS)


def test_a_tokenizer_with_an_opening_token_gives_it_once() -> None:
    class WithBos:
        eos_token_id = EOS

        def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            if isinstance(text, list):
                return {"input_ids": [tokens(one) for one in text]}
            return {"input_ids": ([BOS] if add_special_tokens else []) + tokens(text)}

    (pair, text), _ = encode([Example("a", "b"), Example("", "b")], WithBos(), 100)
    assert pair.input_ids == (BOS, *tokens("ab"), EOS)
    assert text.labels == (IGNORED, *tokens("b"), EOS)


def test_truncation_keeps_a_label_or_drops_the_example() -> None:
    examples = [Example("abc", "de"), Example("abcd", "e"), Example("a", "bcde")]
    encoded, dropped = encode(examples, tiny_tokenizer(), 4)
    assert [one.labels for one in encoded] == [(*[IGNORED] * 3, *tokens("d")), (IGNORED, *tokens("bcd"))]
    assert dropped == 1


def test_no_example_left_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"prompt": "abcdef", "completion": "x"}\n' * 3)
    with pytest.raises(DataError, match=r"none of the 2 has a label within its first 4 tokens"):
        load_data(config(data=source, max_length=4), tiny_tokenizer())


CHAT = (("user", "hi"), ("assistant", "yo"), ("user", "more"), ("assistant", "ok"))


def trained_text(one: Encoded) -> str:
    return str(tiny_tokenizer().decode([label for label in one.labels if label != IGNORED]))


def test_all_assistant_turns_are_trained_on_where_the_template_shows_them() -> None:
    (one,), _ = encode([Example("", "", CHAT, "x, line 1")], tiny_tokenizer(), 200)
    whole = tiny_tokenizer().apply_chat_template([{"role": r, "content": c} for r, c in CHAT], tokenize=False)
    assert tiny_tokenizer().decode(one.input_ids) == whole  # no second EOS behind the template's
    assert trained_text(one) == "yo</s>\nok</s>\n"


def test_only_the_last_turn_is_trained_on_where_earlier_ones_are_rewritten() -> None:
    tokenizer = tiny_tokenizer()
    # As templates do that drop the reasoning of earlier answers.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %};"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (one,), _ = encode([Example("", "", CHAT, "x, line 1")], tokenizer, 200)
    assert trained_text(one) == "ok;</s>"


def test_chat_templates_that_refuse_or_are_missing() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"x, line 9: .*roles must alternate"):
        encode([Example("", "", CHAT, "x, line 9")], tokenizer, 200)
    tokenizer.chat_template = "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="last answer cannot be told"):
        encode([Example("", "", CHAT, "x, line 9")], tokenizer, 200)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        encode([Example("", "", CHAT, "x, line 9")], tokenizer, 200)


# Sets and batches ----------------------------------------------------------------------------------------------------


def test_a_split_is_complete_ordered_and_depends_on_the_seed() -> None:
    items = list(range(50))
    train, held = split(items, 0.2, seed=1)
    assert len(held) == 10
    assert sorted(train + held) == items
    assert train == sorted(train)
    assert held == sorted(held)
    assert split(items, 0.2, seed=1) == (train, held)
    assert split(items, 0.2, seed=2) != (train, held)
    assert split(items, 0.0, seed=1) == (items, [])
    assert [len(part) for part in split([1, 2], 0.01, seed=0)] == [1, 1]
    with pytest.raises(DataError, match="--validation-split 0"):
        split([1], 0.1, seed=0)


def test_load_data_reads_both_sets(tmp_path: Path) -> None:
    train = write(tmp_path, "a.jsonl", "".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(5)))
    held = write(tmp_path, "b.jsonl", '{"text": "held"}\n')
    data = load_data(config(data=train, validation=held), tiny_tokenizer())
    assert (len(data.train), len(data.validation), data.dropped, data.pad_id) == (5, 1, 0, 0)
    assert data.fingerprint != load_data(config(data=train, validation=train), tiny_tokenizer()).fingerprint
    pairs = write(tmp_path, "c.jsonl", '{"prompt": "p", "completion": "c"}\n')
    chats = write(tmp_path, "d.jsonl", json.dumps({"messages": [{"role": r, "content": c} for r, c in CHAT]}) + "\n")
    loaded = [load_data(config(data=each, validation_split=0), tiny_tokenizer()) for each in (train, pairs, chats)]
    assert [each.form for each in loaded] == ["text", "prompt", "messages"]


def examples(n: int) -> list[Encoded]:
    return [Encoded(tuple(range(5, 7 + i)), (IGNORED, *range(6, 7 + i))) for i in range(n)]


def test_batches_pad_on_the_right() -> None:
    batch = collate(examples(2), pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 9], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 6, 7]]
    assert label_count(batch) == 3


def test_an_epoch_has_every_example_once_and_a_ragged_last_batch() -> None:
    batches = Batches(examples(10), 4, pad_id=0, seed=3)
    sizes = [len(batch["input_ids"]) for batch in batches.epoch(0)]
    assert sizes == [4, 4, 2]
    assert len(batches) == 3
    assert sorted(batches.order(1)) == list(range(10))
    assert batches.order(0) != batches.order(1)
    assert batches.order(0) != Batches(examples(10), 4, 0, seed=4).order(0)
    assert Batches(examples(3), 4, 0).order(7) == [0, 1, 2]


def test_any_position_is_reached_without_a_replay() -> None:
    batches = Batches(examples(10), 3, pad_id=0, seed=3)
    whole = list(batches.epoch(2))
    for start in range(len(batches) + 1):
        for got, wanted in zip(batches.epoch(2, start), whole[start:], strict=True):
            assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert len(list(batches.epoch(2, 3, 9))) == 1


def test_the_fingerprint_sees_tokens_labels_and_order() -> None:
    base = examples(3)
    variants = [base, base[::-1], base[:2], [*base[:2], Encoded(base[2].input_ids, (IGNORED,) * 4)]]
    assert len({fingerprint(variant) for variant in variants} | {fingerprint(base, []), fingerprint([], base)}) == 6


def test_a_template_may_write_a_line_break_as_a_shell_passes_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("mr,ref\nname[Aromi],Aromi is a pub.\n")
    config = TrainConfig(
        cloud="-", data=str(path), prompt_template=r"Meaning: {mr}\nText:", completion_template=" {ref}"
    )
    (example,) = read_examples(str(path), config)
    assert example.prompt == "Meaning: name[Aromi]\nText:"

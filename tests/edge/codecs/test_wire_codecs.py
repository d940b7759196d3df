"""Codecs per direction: how they are written, read, checked and counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from isthmus.common.errors import ConfigError
from isthmus.edge.codecs.wire_codecs import AUTO_TARGET, DIRECTIONS, WireCodecs, auto_target, codec_bytes, is_auto
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS, Role, encode

QUICK = settings(max_examples=150, deadline=None, derandomize=True)
combinations = st.builds(WireCodecs, *[st.sampled_from(ACTIVATION_CODECS)] * 4)


@pytest.mark.parametrize(
    ("text", "codecs"),
    [
        ("int8", ("int8", "int8", "int8", "int8")),
        ("int8,int4", ("int8", "int8", "int4", "int4")),
        (" int8 , int4 ", ("int8", "int8", "int4", "int4")),
        ("forward_up=int4-outliers,forward_down=int8,backward=int4", ("int4-outliers", "int8", "int4", "int4")),
        ("backward_down=bf16", ("fp32", "fp32", "fp32", "bf16")),
        ("forward = int8, forward_up = bf16", ("bf16", "int8", "fp32", "fp32")),
        ("forward_up=bf16,forward=int8", ("bf16", "int8", "fp32", "fp32")),
        ("forward=int8,forward=int4", ("int4", "int4", "fp32", "fp32")),
        ("backward_up=int8,backward_up=fp16", ("fp32", "fp32", "fp16", "fp32")),
    ],
)
def test_what_users_write(text: str, codecs: tuple[str, ...]) -> None:
    assert WireCodecs.parse(text).names == codecs
    assert WireCodecs.parse(text) == WireCodecs(*codecs)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "''.*int8"),
        ("int2", "'int2'.*fp32.*int4-outliers"),
        ("mask", "'mask'"),
        ("int8,", "''"),
        ("int8,int4,int8", "3 codecs"),
        ("forward=int2", "'int2'"),
        ("forward=", "''"),
        ("forward_up=", "'forward_up='"),
        ("up=int8", "'up=int8'.*forward_up"),
        ("int8,backward=int4", "'int8' in the codecs.*direction=codec"),
        ("forward=int8,,backward=int4", "'' in the codecs"),
        ("auto", "'auto'.*int8"),
        ("auto:0.99", "'auto:0.99'"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        WireCodecs.parse(text)


def test_a_codec_that_does_not_exist_is_refused_in_code_too() -> None:
    with pytest.raises(ConfigError, match="'int3'"):
        WireCodecs(backward_up="int3")


@QUICK
@given(combinations)
@example(WireCodecs())
def test_text_reads_back(codecs: WireCodecs) -> None:
    assert WireCodecs.parse(str(codecs)) == codecs


@pytest.mark.parametrize(
    "text",
    [
        "fp32",
        "int8",
        "int8,int4",
        "fp32,int4",
        "forward_up=int8",
        "forward=int8,backward_up=int4",
        "forward_up=int8,backward_down=int4",
        "forward=int4,forward_up=int8,backward=int4",
    ],
)
def test_text_is_as_short_as_it_can_be(text: str) -> None:
    assert str(WireCodecs.parse(text)) == text


def test_what_the_cloud_does_not_speak_is_named() -> None:
    codecs = WireCodecs.parse("int8,int4")
    codecs.check(ACTIVATION_CODECS)
    with pytest.raises(ConfigError, match=r"'int4'.*fp32, int8$"):
        codecs.check(("fp32", "int8"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp32", 9216),
        ("bf16", 4608),
        ("int8", 2448),
        ("int4", 1224),
        ("int4-outliers,int4", 1248),
        ("forward_up=int8,forward_down=int4-outliers,backward=int4", 1542),
    ],
)
def test_bytes_per_token(text: str, expected: int) -> None:
    assert WireCodecs.parse(text).bytes_per_token(576) == expected


@pytest.mark.parametrize("codec", ACTIVATION_CODECS)
@pytest.mark.parametrize("hidden", [8, 576, 600])
def test_a_token_more_costs_what_is_foretold(codec: str, hidden: int) -> None:
    few, many = (encode(torch.ones(1, tokens, hidden), codec, Role.ACTIVATION).nbytes for tokens in (3, 10))
    assert many - few == 7 * codec_bytes(codec, hidden)


def test_the_names_of_the_directions() -> None:
    assert DIRECTIONS == ("forward_up", "forward_down", "backward_up", "backward_down")
    assert WireCodecs("fp32", "bf16", "fp16", "int8").names == ("fp32", "bf16", "fp16", "int8")


def test_auto_and_its_target() -> None:
    assert [is_auto(text) for text in ("auto", " auto:0.9", "auto:x", "int8", "automatic", "")] == [True] * 3 + [
        False
    ] * 3
    assert auto_target("auto") == AUTO_TARGET
    assert auto_target("auto: 0.95") == 0.95


@pytest.mark.parametrize("text", ["auto:", "auto:1", "auto:0", "auto:1.5", "auto:-0.5", "auto:nan", "auto:x", "int8"])
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"auto:0\.99"):
        auto_target(text)

"""Defences as options write them."""

from __future__ import annotations

import pytest

from isthmus.privacy.defences.defence_options import DEFENCES, NO_DEFENCE, Gaussian, check_together, read_defence


@pytest.mark.parametrize(
    "text",
    [
        "gaussian:clip=1.0,sigma=8.0,memo=false,delta=1e-05",
        "gaussian:clip=1.0,sigma=8.0,gradient_clip=0.5,gradient_sigma=2.0,memo=true,delta=1e-06",
        "embedding-noise:eta=10.0,denoise=true",
        "learned-noise:sigma=0.5,reward=0.1",
        "bottleneck:rank=16,delta=1e-05",
        "mixing:share=0.7",
        "decoys:file=d.jsonl,count=2",
        "smoothing:share=0.1",
        "dp-sgd:clip=1.0,sigma=1.0,delta=1e-05",
        "rotation",
        "quantization:bits=4",
    ],
)
def test_options_come_back_as_they_are_written(text: str) -> None:
    assert read_defence(text).text() == text


def test_defaults_are_filled_in() -> None:
    read = read_defence(" gaussian: clip = 2 , sigma = 3 ")
    assert read == Gaussian(clip=2, sigma=3, gradient_clip=None, gradient_sigma=None, memo=False, delta=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hope", "the names are gaussian, "),
        ("gaussian:clip=1", "sigma: field required"),
        ("gaussian:clip=-1,sigma=1", "clip: input should be greater than 0"),
        ("gaussian:clip=1,sigma=inf", "sigma: input should be a finite number"),
        ("gaussian:clip=1,sigma=1,sigma=2", "once, as PARAMETER=VALUE"),
        ("gaussian:clip", "once, as PARAMETER=VALUE"),
        ("rotation:angle=3", "its parameters are none"),
        ("permutation", "sends the same hidden states"),
        ("depth", "breaks every cut"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read_defence(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("rotation", "rotation"), "twice"),
        (("mixing", "gaussian:clip=1,sigma=1"), "the noise is counted for one"),
        (("dp-sgd:clip=1,sigma=1", "mixing"), "one example at a time"),
        (("mixing", "decoys:file=d"), "belong together"),
        (("bottleneck:rank=4,clip=1",), "clip and sigma go together"),
        (("gaussian:clip=1,sigma=1,gradient_clip=1",), "go together"),
    ],
)
def test_what_does_not_go_together_is_refused(texts: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_together([read_defence(text) for text in texts])


def test_what_goes_together_is_taken() -> None:
    texts = ["gaussian:clip=1,sigma=1", "dp-sgd:clip=1,sigma=1", "decoys:file=d", "smoothing:share=.1"]
    check_together([read_defence(text) for text in texts])


def test_broken_examples_name_the_attack_and_claim_nothing() -> None:
    broken = {name for name, options in DEFENCES.items() if options.broken_by}
    assert broken == {"rotation", "quantization"}
    assert all(DEFENCES[name].claim == "none" for name in broken)
    assert set(NO_DEFENCE) == {"permutation", "depth"}

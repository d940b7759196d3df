"""Sampling, padding, exact decoding and adapters inside the cloud's layers, as the settings say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.clouds import ThreadServer
from support.emulator.packages import tiny_package
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters.adapter_files import save_adapter
from isthmus.common.errors import ConfigError, PackageError, UnsupportedCallError
from isthmus.edge.client.link import Link
from isthmus.edge.config.client_config import GenerateConfig
from isthmus.edge.config.flags import read_settings
from isthmus.edge.drafts.tuned_draft import TUNED_DRAFT, save_tuned
from isthmus.edge.generation.text_generator import TextGenerator
from isthmus.protocol.secure.keys import load_worker

from .conftest import Opener

PROMPTS = ("Once upon a time", "a", "The cloud and")


def texts(generator: TextGenerator, *prompts: str) -> list[str]:
    ids = [generator.ids(prompt, templated=False) for prompt in prompts]
    return [generator.text(each) for each in generator.generate(ids)]


def test_the_text_is_the_whole_models(generator: TextGenerator, server: ThreadServer) -> None:
    found = texts(generator, *PROMPTS)
    whole: Any = AutoModelForCausalLM.from_pretrained(server.home.folder.parent / "model", dtype=torch.float32)
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([generator.ids(prompt, templated=False)])
        output = whole.generate(ids, max_new_tokens=12, do_sample=False)
        assert text == generator.text(output[0, ids.shape[1] :].tolist())
    assert len(set(found)) == len(PROMPTS)


def test_a_text_ends_at_its_last_token(generator: TextGenerator) -> None:
    generator.model.generation_config.eos_token_id = [generator.tokenizer.convert_tokens_to_ids("x"), 70]
    assert generator._ended([5, 70, 0, 0]) == [5, 70]
    assert generator._ended([5, 6]) == [5, 6]


def test_a_seed_gives_the_same_text(opener: Opener) -> None:
    found = []
    for options in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {}, {}, {"seed": 1, "top_p": 1e-6}):
        with opener(temperature=2.0, **options) as generator:
            generator.seed()
            found += texts(generator, "Once")
    assert found[0] == found[1]
    assert len(set(found)) == 5
    with opener() as generator:
        assert found[-1] == texts(generator, "Once")[0]  # the likeliest token alone is left


def test_exact_texts_do_not_depend_on_the_others(opener: Opener, link: Link) -> None:
    with opener(exact=True) as generator:
        together = texts(generator, *PROMPTS)
        assert link.span.caches.exact
        assert generator.model.isthmus_exact
        assert together == [text for prompt in PROMPTS for text in texts(generator, prompt)]
    assert not link.span.caches.exact


def test_a_draft_changes_no_text(opener: Opener, tmp_path: Path) -> None:
    with opener(max_new_tokens=40) as generator:
        plain = texts(generator, "ab ab ab ab ab")
    with opener(max_new_tokens=40, draft="ngram") as generator:
        drafted = texts(generator, "ab ab ab ab ab")
        draft = generator.model.isthmus_draft
    assert drafted == plain
    assert draft.statistics.rounds
    with pytest.raises(PackageError), opener(draft=str(tmp_path)):
        pass
    with pytest.raises(ConfigError, match="draft = ngram needs the cache"):
        read_settings(GenerateConfig, None, {"cloud": "c.txt", "draft": "ngram", "cache": False})


def test_a_run_brings_its_tuned_draft(opener: Opener, server: ThreadServer, link: Link, tmp_path: Path) -> None:
    signer = load_worker(server.home.folder)
    model = server.home.folder.parent / "model"
    package = tiny_package(tmp_path / "package", model, signer=signer)
    adapter = tmp_path / "run" / "adapter"
    peft_model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0], task_type="CAUSAL_LM"),
    )
    save_adapter(peft_model, adapter, record={"digest": package.digest})
    options = {"max_new_tokens": 24, "draft": str(package.folder), "draft_dtype": "fp32"}
    with opener(adapter, **{**options, "draft": "none"}) as generator:
        plain = texts(generator, "Once upon")
    tuned = package.load_emulator()
    with torch.no_grad():
        for weight in tuned.weights().values():
            weight.mul_(1.25)
    used = []
    for _ in range(2):
        with opener(adapter, **options) as generator:
            assert texts(generator, "Once upon") == plain
            used.append(generator.model.isthmus_draft.model.remote_layers.span.weights())
        save_tuned(tmp_path / "run" / TUNED_DRAFT, tuned, package.id)
    name = min(used[0])
    assert torch.equal(used[1][name], 1.25 * used[0][name])
    assert not torch.equal(used[1][name], used[0][name])
    save_tuned(tmp_path / "run" / TUNED_DRAFT, tuned, "0" * 64)
    with pytest.raises(PackageError, match="was tuned from the package"), opener(adapter, **options):
        pass


def test_an_empty_prompt_is_refused(generator: TextGenerator) -> None:
    with pytest.raises(ConfigError, match="prompt is empty"):
        generator.ids("", templated=False)


@pytest.fixture
def inner(link: Link, tmp_path: Path) -> Path:
    """An adapter at all layers, the cloud's too."""
    torch.manual_seed(4)
    config = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    save_adapter(peft.get_peft_model(link.load_model(), config), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_inside_the_clouds_layers_is_leased_or_computed_anew(
    opener: Opener, inner: Path, sent: list[int]
) -> None:
    with opener() as generator:
        (plain,) = texts(generator, "Once")
    with opener(inner, leased="all") as generator:
        (leased,) = texts(generator, "Once")
    calls = len(sent)
    with opener(inner, cache=False) as generator:
        (anew,) = texts(generator, "Once")
    assert len(sent) == calls > 0
    assert leased == anew != plain
    with opener(inner, leased=(2, 3)) as generator:
        assert texts(generator, "Once") == [leased]
    for options in ({}, {"leased": (2,)}):
        with (
            opener(inner, **options) as generator,
            pytest.raises(UnsupportedCallError, match=r"--leased all.*--no-cache"),
        ):
            texts(generator, "Once")
    with pytest.raises(ConfigError, match="leased has layer 1, which is not the cloud's"), opener(inner, leased=(1,)):
        pass


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT's, which counts them itself
def test_a_learned_prompt_is_computed_without_a_cache(
    opener: Opener, link: Link, tmp_path: Path, server: ThreadServer, sent: list[int]
) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(4)
    save_adapter(peft.get_peft_model(link.load_model(), config), tmp_path / "adapter")
    whole: Any = AutoModelForCausalLM.from_pretrained(server.home.folder.parent / "model", dtype=torch.float32)
    whole = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter")
    with opener(tmp_path / "adapter") as generator:
        assert not generator.keeps_cache
        (text,) = texts(generator, "Once")
        ids = torch.tensor([generator.ids("Once", templated=False)])
        expected = whole.generate(input_ids=ids, max_new_tokens=12, do_sample=False, use_cache=False)
        assert text == generator.text(expected[0, ids.shape[1] :].tolist())
        assert not sent
        with pytest.raises(UnsupportedCallError, match="a learned prompt has no key-value cache"):
            generator.model.generate(input_ids=ids, use_cache=True)
    with opener() as generator:
        assert generator.keeps_cache
        assert texts(generator, "Once") != [text]
        assert sent

"""Single answers of the process that generates, computed here: their tokens, texts, log probabilities and ends."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.clouds import ThreadServer
from support.models.tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters.adapter_files import save_adapter
from isthmus.common.errors import CheckpointError, ConfigError, UnknownModelError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.serving.answer_forms import Piece, Sampling
from isthmus.daemon.serving.serving_worker import CancelledError, Serving
from isthmus.daemon.workers.answering import Question
from isthmus.edge.config.client_config import GenerateConfig
from isthmus.edge.generation.text_generator import text_generator

GREEDY = Sampling(temperature=0, max_tokens=12)

Asked = Callable[..., list[Piece]]


@pytest.fixture(scope="module")
def serving(settings: DaemonSettings) -> Iterator[Serving]:
    made = Serving(settings)
    yield made
    made.close()


@pytest.fixture(scope="module")
def ask(serving: Serving) -> Asked:
    """The pieces of an answer."""

    def asked(
        prompt: Any = "Once upon", sampling: Sampling = GREEDY, adapter: Path | None = None, **changes: Any
    ) -> list[Piece]:
        return answered(serving, prompt, replace(sampling, **changes), adapter)

    return asked


def answered(
    serving: Serving, prompt: Any, sampling: Sampling, adapter: Path | None = None, **question: Any
) -> list[Piece]:
    trees: list[dict[str, Any]] = []
    prompt = {"text": prompt} if isinstance(prompt, str) else prompt
    values = {"cloud": "main", "base": "tiny", "prompt": prompt, "sampling": sampling.to_tree()}
    values["adapter"] = None if adapter is None else str(adapter)
    send = question.pop("send", lambda tree, blob: trees.append(tree))
    list(serving.generate(Question("generate", values, send=send, **question)))
    return [Piece.of_tree(0, tree) for tree in trees]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


@pytest.fixture(scope="module")
def whole(server: ThreadServer) -> Any:
    """The same model in one process."""
    return AutoModelForCausalLM.from_pretrained(server.home.folder.parent / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def adapters(server: ThreadServer, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of the edge's own layers: three of LoRA, and a whole layer."""
    folder = tmp_path_factory.mktemp("adapters")
    model = server.home.folder.parent / "model"
    found = []
    for seed in range(3):
        config = peft.LoraConfig(
            r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 5],
            task_type="CAUSAL_LM", init_lora_weights=False,
        )  # fmt: skip
        torch.manual_seed(seed)
        save_adapter(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config), folder / f"lora-{seed}")
        found.append(folder / f"lora-{seed}")
    with server.link() as link:
        link.open(5)
        tuned: Any = link.load_model()
        with torch.no_grad():
            for parameter in tuned.model.layers[0].parameters():
                parameter.mul_(1.5)
        tuned.save_pretrained(folder / "layer")
    return [*found, folder / "layer"]


@pytest.fixture
def edge(server: ThreadServer) -> Iterator[Callable[..., tuple[list[int], str]]]:
    """What `isthmus edge generate` gives for a prompt."""
    with server.link(interactive=True) as link:
        link.open(5)

        def generated(prompt: str, adapter: Path | None = None, **settings: Any) -> tuple[list[int], str]:
            config = GenerateConfig(**{"cloud": "-", "max_new_tokens": 12, **settings})
            with text_generator(link, config, adapter) as generator:
                ids = generator.ids(prompt, templated=False)
                generator.seed()
                (new,) = generator.generate([ids])
                return new, generator.text(new)

        yield generated


def test_greedy_answers_are_those_of_edge_generate(
    ask: Asked, edge: Callable[..., tuple[list[int], str]], adapters: list[Path]
) -> None:
    found = []
    for adapter in (None, *adapters):
        for prompt in ("Once upon", "a"):
            pieces = ask(prompt, adapter=adapter)
            found.append(text_of(pieces))
            assert (tokens_of(pieces), text_of(pieces)) == edge(prompt, adapter)
            assert (pieces[0].prompt_tokens, pieces[-1].finish) == (len(prompt), "length")
    assert len(set(found)) == len(found)
    assert text_of(ask()) == found[0]  # no adapter has changed the base model's weights


def test_a_seed_gives_the_text_of_edge_generate(ask: Asked, edge: Callable[..., tuple[list[int], str]]) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.9, top_k=50, max_tokens=12, seed=7)  # 50: transformers' own
    found = ask(sampling=sampling)
    assert text_of(found) == edge("Once upon", temperature=1.5, top_p=0.9, seed=7)[1]
    assert text_of(ask(sampling=sampling)) == text_of(found)
    others = [text_of(ask(sampling=sampling, **change)) for change in ({"seed": 8}, {"seed": None}, {"seed": None})]
    assert len({text_of(found), *others}) == 4
    assert text_of(ask(sampling=sampling, top_k=1)) == text_of(ask())
    assert text_of(ask(sampling=sampling, top_p=1e-9)) == text_of(ask())


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Of all tokens after each of these, by one full forward, `[S, V]`."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return found


@pytest.mark.parametrize("adapted", [False, True])
def test_log_probabilities_are_those_of_a_full_forward(
    ask: Asked, whole: Any, adapters: list[Path], adapted: bool
) -> None:
    adapter = adapters[0] if adapted else None
    model = peft.PeftModel.from_pretrained(copy.deepcopy(whole), adapter) if adapted else whole
    for sampling in (GREEDY, Sampling(temperature=1.7, top_k=40, top_p=0.9, seed=3, max_tokens=12)):
        pieces = ask("Once upon", sampling, adapter, logprobs=True, top_logprobs=3, prompt_logprobs=True)
        ids = [*_ids("Once upon"), *tokens_of(pieces)]
        full = logprobs(model, ids)
        chances = [*pieces[0].prompt_chances, *(chance for piece in pieces for chance in piece.chances)]
        assert chances[0] is None
        assert len(chances) == len(ids)
        for at, chance in enumerate(chances[1:], 1):
            assert chance is not None
            assert chance.token == ids[at]
            assert abs(chance.logprob - full[at - 1, ids[at]].item()) <= 1e-4
            best = full[at - 1].topk(3)
            assert [other for other, *_ in chance.top] == best.indices.tolist()
            assert max(abs(p - q) for (*_, p), q in zip(chance.top, best.values.tolist(), strict=True)) <= 1e-4
            assert chance.text == chance.raw.decode("utf-8", "replace")
        other = logprobs(peft.PeftModel.from_pretrained(copy.deepcopy(whole), adapters[1]), ids)
        assert (other - full).abs().max() > 1e-2
    assert not ask()[0].chances
    assert not ask()[0].prompt_chances


def _ids(text: str) -> list[int]:
    found: list[int] = tiny_tokenizer()(text)["input_ids"]
    return found


def test_a_stop_text_ends_an_answer(ask: Asked) -> None:
    plain = ask()
    text = text_of(plain)
    stop = text[4:7]
    pieces = ask(stop=("never", stop))
    assert text_of(pieces) == text[: text.find(stop)]
    assert tokens_of(pieces) == tokens_of(plain)[: text.find(stop) + 3]  # those behind the stop text are told
    assert pieces[-1].finish == "stop"
    held = ask(stop=(text[10:] + "?",))
    assert text_of(held) == text
    assert [piece.text for piece in held[-2:]] == ["", text[10:]]
    assert held[-1].finish == "length"


def test_tokens_end_an_answer(ask: Asked, whole: Any, serving: Serving) -> None:
    plain = tokens_of(ask())
    pieces = ask(stop_tokens=([1], plain[1:4]))
    assert tokens_of(pieces) == plain[:4]
    assert pieces[-1].finish == "stop"
    assert len(text_of(pieces)) == 4
    parts = serving._clouds["main"].parts
    assert parts is not None
    settings = parts.model.generation_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "eos_token_id", [plain[2], plain[6]])
        serving._hot._models.clear()
        pieces = ask()
        assert tokens_of(pieces) == plain[:3]
        assert pieces[-1].finish == "stop"
    serving._hot._models.clear()


def test_prompts_are_texts_tokens_or_messages(ask: Asked) -> None:
    messages = [{"role": "user", "content": "Once"}]
    templated = "<s>user\nOnce</s>\n<s>assistant\n"
    chat = ask({"messages": messages})
    assert chat[0].prompt_tokens == len(_ids(templated)) < len(templated)  # <s> is one token
    assert text_of(chat) == text_of(ask({"tokens": _ids(templated)})) != text_of(ask("Once"))
    assert text_of(ask({"tokens": _ids("Once upon")})) == text_of(ask())


def test_a_prompt_has_to_leave_room(ask: Asked) -> None:
    for prompt in ("a" * 512, {"tokens": [5] * 600}):
        with pytest.raises(ConfigError, match=r"the prompt has \d+ tokens, and tiny takes 512 with the answer"):
            ask(prompt)
    pieces = ask("a" * 509, max_tokens=None)
    assert (len(tokens_of(pieces)), pieces[-1].finish) == (3, "length")
    assert len(tokens_of(ask("a" * 509, max_tokens=100))) == 3
    with pytest.raises(ConfigError, match="the token 259: tiny has 0 to 258"):
        ask({"tokens": [5, 259]})
    with pytest.raises(ConfigError, match="the prompt is empty"):
        ask("")


def test_an_adapter_that_is_gone_is_refused(ask: Asked, adapters: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    assert text_of(ask(adapter=folder)) == text_of(ask(adapter=adapters[0]))
    shutil.rmtree(folder)
    with pytest.raises(UnknownModelError, match="is not there any more: it was deleted, or pruned"):
        ask(adapter=folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        ask(adapter=folder)
    shutil.copytree(adapters[1], folder, dirs_exist_ok=True)  # another one at the same place
    assert text_of(ask(adapter=folder)) == text_of(ask(adapter=adapters[1])) != text_of(ask(adapter=adapters[0]))


def test_few_adapters_stay_in_memory(ask: Asked, serving: Serving, adapters: list[Path]) -> None:
    hot = serving._hot
    before, hot._most = hot._most, 2
    try:
        for adapter in (adapters[0], adapters[1], None, adapters[0], adapters[3]):
            ask(adapter=adapter, max_tokens=1)
        assert hot.adapters == [str(adapters[0]), str(adapters[3])]
    finally:
        hot._most = before


def test_an_answer_ends_at_its_next_token_when_nobody_waits(serving: Serving) -> None:
    cancelled = threading.Event()
    trees: list[dict[str, Any]] = []

    def send(tree: dict[str, Any], _blob: bytes) -> None:
        trees.append(tree)
        if len(trees) == 3:
            cancelled.set()

    answered(serving, "Once", replace(GREEDY, max_tokens=40), send=send, cancelled=cancelled)
    assert len(trees) == 3
    with pytest.raises(CancelledError):
        answered(serving, "Once", GREEDY, cancelled=cancelled)
    assert len(answered(serving, "Once", replace(GREEDY, max_tokens=40))) == 40


def test_a_draft_changes_no_answer(settings: DaemonSettings, ask: Asked) -> None:
    drafted = Serving(settings.model_copy(update={"offered_draft": "ngram"}))
    for sampling in (replace(GREEDY, max_tokens=60), Sampling(seed=3, max_tokens=30)):
        plain = ask("ab ab ab", sampling)
        found = answered(drafted, "ab ab ab", sampling)
        assert tokens_of(found) == tokens_of(plain)
    draft = drafted._drafts._draft
    assert draft is not None
    rounds = draft.statistics.rounds
    assert draft.statistics.tokens > rounds > 0
    answered(drafted, "ab ab ab", replace(GREEDY, logprobs=True))
    assert draft.statistics.rounds == rounds  # not where log probabilities are wanted
    assert len(tokens_of(answered(drafted, "ab ab ab", Sampling(max_tokens=30)))) == 30
    assert draft.statistics.rounds > rounds
    drafted.close()


def test_an_adapter_inside_the_clouds_layers(
    settings: DaemonSettings,
    ask: Asked,
    server: ThreadServer,
    edge: Callable[..., tuple[list[int], str]],
    tmp_path: Path,
) -> None:
    with server.link() as link:
        link.open(5)
        torch.manual_seed(4)
        config = peft.LoraConfig(
            r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        save_adapter(peft.get_peft_model(link.load_model(), config), tmp_path / "adapter")
    anew = ask("Once", adapter=tmp_path / "adapter", max_tokens=6)
    assert text_of(anew) == edge("Once", tmp_path / "adapter", cache=False, max_new_tokens=6)[1]
    assert text_of(anew) != text_of(ask("Once", max_tokens=6))
    leasing = Serving(settings.model_copy(update={"training_layers": "all"}))
    leased = answered(leasing, "Once", replace(GREEDY, max_tokens=6), tmp_path / "adapter")
    assert text_of(leased) == text_of(anew)
    leasing.close()


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT's, which counts them itself
def test_a_learned_prompt_takes_room(
    ask: Asked, server: ThreadServer, edge: Callable[..., tuple[list[int], str]], tmp_path: Path
) -> None:
    with server.link() as link:
        link.open(5)
        torch.manual_seed(4)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        save_adapter(peft.get_peft_model(link.load_model(), config), tmp_path / "adapter")
    found = ask("Once", adapter=tmp_path / "adapter", max_tokens=6)
    assert (
        text_of(found) == edge("Once", tmp_path / "adapter", max_new_tokens=6)[1] != text_of(ask("Once", max_tokens=6))
    )
    assert len(ask("a" * 506, adapter=tmp_path / "adapter", max_tokens=None)) == 2
    with pytest.raises(ConfigError, match="leave no room"):
        ask("a" * 508, adapter=tmp_path / "adapter")
    chances = ask("Once", adapter=tmp_path / "adapter", max_tokens=1, prompt_logprobs=True)[0].prompt_chances
    assert [each and each.text for each in chances] == [None, "n", "c", "e"]

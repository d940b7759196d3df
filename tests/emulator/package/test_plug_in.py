from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.tiny import tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from isthmus.backbone.adapters.adapter_files import load_adapter, save_adapter
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import export_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import AdapterError, PlanError
from isthmus.edge.config.training_config import TuneConfig
from isthmus.edge.training.methods import build_peft, trained
from isthmus.emulator.compress.emulator_model import build_emulator
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.package.package import Package, write_package
from isthmus.emulator.package.plug_in import PLUGGED_FILE, check_adapter, export_plugged, plug_in
from isthmus.protocol.secure.keys import generate_root, issue_worker, load_worker

PLAN = SplitPlan(6, 1, 1)
IDS = torch.tensor([[5, 9, 33, 120, 7, 2]])
WEIGHTS = "adapter_model.safetensors"
CASES = [
    *(("llama", method) for method in ("lora", "dora", "ia3", "vera", "adalora", "prompt", "bottleneck", "full")),
    *(("gpt2", method) for method in ("lora", "dora", "bitfit", "bottleneck", "full")),
    ("gemma3_text", "lora"),
    ("llama_tied", "full"),
]


class Owner:
    """A tiny model with a package of it, and adapters that were tuned on the package."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint(tiny_checkpoint(family, folder / "model"), f"tiny-{family}")
        generate_root(folder / "home")
        issue_worker(folder / "home")
        emulator = build_emulator(self.checkpoint, PLAN, Recipe.parse("uniform", 0.5), None)
        signer = load_worker(folder / "home")
        self.package: Package = write_package(
            folder / "package", self.checkpoint, PLAN, emulator, signer=signer, licence=""
        )
        self.span = load_span(self.checkpoint, PLAN)

    def adapter(self, method: str) -> Path:
        """An adapter whose every trained tensor has moved; made once."""
        out = self.folder / f"adapter-{method}"
        if out.exists():
            return out
        values = {"package": self.package.folder, "data": "-", "out": out, "method": method, "steps": 10, "rank": 4}
        model = build_peft(self.package.load_model(), TuneConfig.model_validate(values), total_steps=10)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in trained(model).values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            model(input_ids=IDS)
        save_adapter(model, out, record=self.record(method))
        return out

    def record(self, method: str) -> dict[str, str]:
        return {"package": self.package.id, "digest": self.package.digest, "plan": str(PLAN), "method": method}

    def check(self, adapter: Path, **options: Any) -> Any:
        return check_adapter(adapter, self.package, self.package.folder, PLAN, **options)


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Owner]:
    made: dict[str, Owner] = {}

    def owner(family: str) -> Owner:
        if family not in made:
            made[family] = Owner(family, tmp_path_factory.mktemp(family))
        return made[family]

    return owner


@pytest.fixture(scope="module")
def llama(owners: Callable[[str], Owner]) -> Owner:
    return owners("llama")


@pytest.fixture
def lora(llama: Owner, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.adapter("lora"), tmp_path / "adapter"))


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        # It warns of adapters without a rank, which AdaLoRA makes.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        yield


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


# What fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), CASES)
def test_every_method_passes_and_is_plugged_into_the_full_middle(
    owners: Callable[[str], Owner], family: str, method: str
) -> None:
    owner = owners(family)
    adapter = owner.adapter(method)
    summary = owner.check(adapter)
    assert (summary.method, summary.package) == (method, owner.package.id)
    assert summary.size == sum(file.stat().st_size for file in adapter.iterdir())
    assert summary.n_params > 0

    model = plug_in(adapter, owner.package.folder, PLAN, owner.span)
    assert not model.training
    whole = AutoModelForCausalLM.from_pretrained(owner.checkpoint.folder, dtype=torch.float32).eval()
    before = logits(whole)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), logits(load_adapter(whole, adapter).eval()))


@pytest.mark.parametrize(("family", "method"), [case for case in CASES if case[1] not in ("prompt", "bottleneck")])
def test_the_exported_model_computes_what_the_plugged_in_one_does(
    owners: Callable[[str], Owner], family: str, method: str, tmp_path: Path
) -> None:
    owner = owners(family)
    adapter = owner.adapter(method)
    assert export_plugged(adapter, owner.checkpoint, PLAN, tmp_path / "out") == "model"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = logits(plug_in(adapter, owner.package.folder, PLAN, owner.span))
    if method in ("full", "bitfit"):
        assert torch.equal(logits(exported), expected)
    else:
        torch.testing.assert_close(logits(exported), expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"]
    for file in (tmp_path / "out").glob("*.json"):
        assert str(owner.folder) not in file.read_text()


@pytest.mark.parametrize("method", ["bottleneck", "prompt"])
def test_what_is_no_weight_of_the_architecture_stays_an_adapter(llama: Owner, method: str, tmp_path: Path) -> None:
    adapter = llama.adapter(method)
    assert export_plugged(adapter, llama.checkpoint, PLAN, tmp_path / "out") == "adapter"
    reference = json.loads((tmp_path / "out" / PLUGGED_FILE).read_text())
    assert reference == {
        "model": "tiny-llama",
        "digest": llama.package.digest,
        "plan": "1:1",
        "method": method,
    }
    whole = AutoModelForCausalLM.from_pretrained(llama.checkpoint.folder, dtype=torch.float32).eval()
    restored = load_adapter(whole, tmp_path / "out" / "adapter").eval()
    assert torch.equal(logits(restored), logits(plug_in(adapter, llama.package.folder, PLAN, llama.span)))


def test_adalora_may_have_given_ranks_away(llama: Owner, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(llama.adapter("adalora"), tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / WEIGHTS)
    name = min(name for name in tensors if name.endswith(".lora_E"))
    module = name.removesuffix(".lora_E")
    first = settings["init_r"]
    settings["rank_pattern"] = {name.removeprefix("base_model.model."): [True, False] * (first // 2)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match="shape"):
        llama.check(adapter)
    tensors[f"{module}.lora_A"] = tensors[f"{module}.lora_A"][: first // 2].contiguous()
    tensors[f"{module}.lora_E"] = tensors[f"{module}.lora_E"][: first // 2].contiguous()
    tensors[f"{module}.lora_B"] = tensors[f"{module}.lora_B"][:, : first // 2].contiguous()
    save_file(tensors, adapter / WEIGHTS)
    assert llama.check(adapter).method == "adalora"
    assert logits(plug_in(adapter, llama.package.folder, PLAN, llama.span)).isfinite().all()


def test_an_adapter_made_by_split_training_names_no_package(llama: Owner, lora: Path, tmp_path: Path) -> None:
    record = llama.record("lora")
    del record["package"]
    (lora / "isthmus_tuning.json").write_text(json.dumps(record))
    export_edge_parts(llama.checkpoint, PLAN, tmp_path / "parts")
    assert check_adapter(lora, None, tmp_path / "parts", PLAN).package is None
    assert llama.check(lora).package is None


def test_another_plan_is_refused(llama: Owner, lora: Path) -> None:
    with pytest.raises(PlanError):
        check_adapter(lora, llama.package, llama.package.folder, SplitPlan(5, 1, 1))


# What it was tuned on -------------------------------------------------------------------------------------------------


def test_an_adapter_of_a_package_needs_one(llama: Owner, lora: Path) -> None:
    with pytest.raises(AdapterError, match="none is offered"):
        check_adapter(lora, None, llama.package.folder, PLAN)


@pytest.mark.parametrize(
    ("key", "value"), [("package", "00" * 32), ("package", 7), ("digest", "00" * 32), ("plan", "2:2"), ("digest", None)]
)
def test_an_adapter_of_something_else_is_refused(llama: Owner, lora: Path, key: str, value: Any) -> None:
    (lora / "isthmus_tuning.json").write_text(json.dumps(llama.record("lora") | {key: value}))
    with pytest.raises(AdapterError, match=key):
        llama.check(lora)


def test_an_adapter_that_does_not_say_what_it_was_tuned_on_is_refused(llama: Owner, lora: Path) -> None:
    (lora / "isthmus_tuning.json").unlink()
    with pytest.raises(AdapterError, match=r"isthmus_tuning\.json is missing.*isthmus emulator tune"):
        llama.check(lora)


@pytest.mark.parametrize(("method", "file"), [("full", "isthmus_edge.json"), ("bottleneck", "isthmus_adapter.json")])
def test_the_adapters_own_words_are_held_to_the_model_too(llama: Owner, tmp_path: Path, method: str, file: str) -> None:
    adapter = Path(shutil.copytree(llama.adapter(method), tmp_path / "adapter"))
    info = json.loads((adapter / file).read_text())
    (adapter / file).write_text(json.dumps(info | {"digest": "00" * 32}))
    with pytest.raises(AdapterError, match=file):
        llama.check(adapter)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.bin", "modeling.py", ".gitkeep", "tokenizer.json"])
def test_a_strange_file_is_refused(llama: Owner, lora: Path, name: str) -> None:
    (lora / name).write_text("")
    with pytest.raises(AdapterError, match=name):
        llama.check(lora)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "isthmus_tuning.json", "README.md"])
def test_a_link_is_refused(llama: Owner, lora: Path, name: str) -> None:
    (lora / name).unlink()
    (lora / name).symlink_to(llama.adapter("lora") / name)
    with pytest.raises(AdapterError, match="not a plain file"):
        llama.check(lora)


def test_too_many_bytes_are_refused(llama: Owner, lora: Path) -> None:
    size = llama.check(lora).size
    assert llama.check(lora, max_bytes=size).size == size
    with pytest.raises(AdapterError, match=f"has {size} bytes"):
        llama.check(lora, max_bytes=size - 1)


def test_a_long_json_is_refused(llama: Owner, lora: Path) -> None:
    (lora / "adapter_config.json").write_text(" " * (300 << 10) + (lora / "adapter_config.json").read_text())
    with pytest.raises(AdapterError, match=r"adapter_config\.json has \d+ bytes"):
        llama.check(lora)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"peft_type": ' + "9" * 5000 + "}", "\0"])
@pytest.mark.parametrize("name", ["adapter_config.json", "isthmus_tuning.json"])
def test_a_json_that_is_none_is_refused(llama: Owner, lora: Path, name: str, text: str) -> None:
    (lora / name).write_text(text)
    with pytest.raises(AdapterError, match=name):
        llama.check(lora)


def test_two_kinds_at_once_are_refused(llama: Owner, lora: Path) -> None:
    shutil.copyfile(llama.adapter("full") / "isthmus_edge.json", lora / "isthmus_edge.json")
    with pytest.raises(AdapterError, match="this one has adapter_config"):
        llama.check(lora)


def test_weights_of_the_other_kind_are_refused(llama: Owner, lora: Path) -> None:
    shutil.copyfile(llama.adapter("full") / "model.safetensors", lora / "model.safetensors")
    with pytest.raises(AdapterError, match="weights belong into adapter_model"):
        llama.check(lora)


def test_an_empty_or_missing_folder_is_refused(llama: Owner, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="none of them"):
        llama.check(tmp_path)
    with pytest.raises(AdapterError, match="cannot be read"):
        llama.check(tmp_path / "nowhere")


# Tensors --------------------------------------------------------------------------------------------------------------


def change(adapter: Path, how: Callable[[dict[str, Tensor], str], None], file: str = WEIGHTS) -> str:
    tensors = load_file(adapter / file)
    name = min(tensors)
    how(tensors, name)
    save_file(tensors, adapter / file)
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "full"])
def test_a_number_that_is_not_finite_is_refused_and_the_tensor_named(
    llama: Owner, tmp_path: Path, method: str, value: float
) -> None:
    adapter = Path(shutil.copytree(llama.adapter(method), tmp_path / "adapter"))

    def spoil(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name].view(-1)[-1] = value

    name = change(adapter, spoil, "model.safetensors" if method == "full" else WEIGHTS)
    with pytest.raises(AdapterError, match=rf"^{name} holds NaN or infinity"):
        llama.check(adapter)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda tensors, name: tensors.update({name: tensors[name].T.contiguous()}), "has shape"),
        (lambda tensors, name: tensors.update({name: tensors[name][None]}), "has shape"),
        (lambda tensors, name: tensors.pop(name), "is missing"),
        (
            lambda tensors, name: tensors.update({name.replace("layers.0", "layers.3"): tensors[name].clone()}),
            "has no place",
        ),
        (lambda tensors, name: tensors.update({name: tensors[name].to(torch.float64)}), "of type F64"),
        (lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}), "of type I8"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "bottleneck", "full"])
def test_tensors_that_do_not_fit_are_refused(
    llama: Owner, tmp_path: Path, method: str, how: Callable[[dict[str, Tensor], str], None], message: str
) -> None:
    adapter = Path(shutil.copytree(llama.adapter(method), tmp_path / "adapter"))

    def apply(tensors: dict[str, Tensor], _: str) -> None:
        how(tensors, min(name for name, tensor in tensors.items() if tensor.dim() == 2 and "layers.0" in name))

    change(adapter, apply, "model.safetensors" if method == "full" else WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        llama.check(adapter)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 8, b"\xff" * 100, (1 << 40).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"{}"]
)
def test_a_file_that_is_no_safetensors_is_refused(llama: Owner, lora: Path, data: bytes) -> None:
    (lora / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterError, match=WEIGHTS):
        llama.check(lora)


def test_a_truncated_file_is_refused(llama: Owner, lora: Path) -> None:
    (lora / WEIGHTS).write_bytes((lora / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(AdapterError, match="damaged or truncated"):
        llama.check(lora)


# Configurations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "option"),
    [("prompt", "num_virtual_tokens"), ("vera", "r"), ("lora", "task_type"), ("lora", "target_modules")],
)
def test_an_option_whose_default_is_out_of_range_must_be_there(
    llama: Owner, tmp_path: Path, method: str, option: str
) -> None:
    adapter = Path(shutil.copytree(llama.adapter(method), tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    del settings[option]  # VeRA's rank is 256 then, more than the model is wide
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=f"names no {option}"):
        llama.check(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LOKR"},
        {"peft_type": None},
        {"peft_type": ["LORA"]},
        {"auto_mapping": {"base_model_class": "x", "parent_library": "os"}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ".*"},
        {"target_modules": "all-linear"},
        {"target_modules": r"(.*\.)+x"},
        {"target_modules": r".*\.(0|3)\.(.*\.)?(q_proj)"},
        {"target_modules": []},
        {"target_modules": None},
        {"target_modules": ["q_proj"], "layers_to_transform": None},
        {"target_modules": ["model.layers.3.self_attn.q_proj"], "layers_to_transform": None},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["a|b"]},
        {"target_modules": ["no_such_module"]},
        {"layers_to_transform": [0, 3]},
        {"layers_to_transform": [0, 0]},
        {"layers_to_transform": 3},
        {"layers_pattern": "layers"},
        {"exclude_modules": ".*"},
        {"target_parameters": ["x"]},
        {"rank_pattern": {".*": 4}},
        {"alpha_pattern": {"(a+)+$": 4}},
        {"layer_replication": [[0, 4]]},
        {"init_lora_weights": "pissa"},
        {"loftq_config": {"loftq_bits": 4}},
        {"megatron_core": "os.path"},
        {"megatron_config": {"a": 1}},
        {"corda_config": {"a": 1}},
        {"trainable_token_indices": [1]},
        {"bias": "all"},
        {"r": 33},
        {"r": 0},
        {"r": True},
        {"r": 1 << 70},
        {"lora_alpha": 10**400},
        {"lora_alpha": "2"},
        {"lora_dropout": 1.5},
        {"task_type": "SEQ_CLS"},
        {"revision": "main"},
        {"base_model_name_or_path": "x" * 1000},
        {"an_option_of_the_future": 3},
    ],
    ids=str,
)
def test_an_option_that_training_does_not_set_is_refused(llama: Owner, lora: Path, changes: dict[str, Any]) -> None:
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(AdapterError, match=r"adapter_config\.json|PEFT's type|has no place|is missing"):
        llama.check(lora)


def test_an_option_that_is_off_does_no_harm(llama: Owner, lora: Path) -> None:
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"revision": "0123456789" * 4}))
    assert llama.check(lora).method == "lora"  # a commit of the model, which says where it came from
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"an_option_of_the_future": None}))
    assert llama.check(lora).method == "lora"


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "magic"},
        {"method": ["bitfit"]},
        {"width": 0},
        {"width": 33},
        {"width": 2.5},
        {"width": None},
        {"layers": [0, 3]},
        {"layers": []},
        {"layers": "0"},
        {"layers": [True]},
        {"plan": "2:2"},
    ],
    ids=str,
)
def test_a_bottleneck_that_does_not_fit_is_refused(llama: Owner, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = Path(shutil.copytree(llama.adapter("bottleneck"), tmp_path / "adapter"))
    info = json.loads((adapter / "isthmus_adapter.json").read_text())
    (adapter / "isthmus_adapter.json").write_text(json.dumps(info | changes))
    with pytest.raises(AdapterError, match=r"isthmus_adapter\.json"):
        llama.check(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_virtual_tokens": 1 << 30},
        {"token_dim": 64},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "some/model"},
    ],
    ids=str,
)
def test_a_prompt_that_does_not_fit_is_refused(llama: Owner, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = Path(shutil.copytree(llama.adapter("prompt"), tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        llama.check(adapter)


# Plugging in ----------------------------------------------------------------------------------------------------------


def test_numbers_that_overflow_in_the_model_are_found_by_the_probe(llama: Owner, lora: Path) -> None:
    def enlarge(tensors: dict[str, Tensor], _: str) -> None:
        for tensor in tensors.values():
            tensor.fill_(3e38)

    change(lora, enlarge)
    llama.check(lora)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        plug_in(lora, llama.package.folder, PLAN, llama.span)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_what_was_not_checked_still_gives_no_path_away(llama: Owner, lora: Path) -> None:
    def lose(tensors: dict[str, Tensor], name: str) -> None:
        del tensors[name]

    change(lora, lose)
    with pytest.raises(AdapterError, match="the adapter") as caught:
        plug_in(lora, llama.package.folder, PLAN, llama.span)
    assert str(lora) not in str(caught.value)


def test_an_adapter_of_another_model_is_not_exported(llama: Owner, lora: Path, tmp_path: Path) -> None:
    other = Checkpoint(tiny_checkpoint("llama", tmp_path / "other", seed=1), "other")
    with pytest.raises(AdapterError, match="digest"):
        export_plugged(lora, other, PLAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"alpha_pattern": []}, {"rank_pattern": None}, {"task_type": None}], ids=str)
def test_an_option_of_another_type_is_refused_before_peft_sees_it(
    llama: Owner, lora: Path, settings: dict[str, Any]
) -> None:
    written = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(written | settings))
    with pytest.raises(AdapterError, match=next(iter(settings))):
        llama.check(lora)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(" + "|".join(["0"] * 9) + r")\.(.*\.)?(k_proj|v_proj|down_proj)",
        r".*\.(0|00|5)\.(.*\.)?(k_proj|v_proj|down_proj)",
        r".*\.(0|5)\.(.*\.)?(" + "|".join(f"x{i}" for i in range(100)) + ")",
    ],
    ids=["repeated", "written in two ways", "many names"],
)
def test_a_pattern_that_takes_long_to_match_is_refused(llama: Owner, tmp_path: Path, pattern: str) -> None:
    adapter = Path(shutil.copytree(llama.adapter("ia3"), tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": pattern}))
    with pytest.raises(AdapterError, match="target_modules"):
        llama.check(adapter)


def test_an_adapter_that_names_a_layer_of_the_cloud_does_not_load(llama: Owner, lora: Path) -> None:
    settings = json.loads((lora / "adapter_config.json").read_text())
    settings["target_modules"].append("model.layers.3.self_attn.q_proj")
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=r"does not fit this model.*layers\.3\.self_attn\.q_proj"):
        plug_in(lora, llama.package.folder, PLAN, llama.span)


def test_a_prompt_longer_than_the_models_positions_cannot_run(owners: Callable[[str], Owner], tmp_path: Path) -> None:
    owner = owners("gpt2")
    adapter = Path(shutil.copytree(owner.adapter("prompt"), tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"num_virtual_tokens": 130}))
    width = settings["token_dim"]
    save_file({"prompt_embeddings": torch.zeros(130, width)}, adapter / WEIGHTS)
    owner.check(adapter)
    with pytest.raises(AdapterError, match="cannot run with this adapter"):
        plug_in(adapter, owner.package.folder, PLAN, owner.span)

"""A span in a folder of its own, quantized, with the edge's parts beside it: all that a cloud needs to serve a model.

span.safetensors    the cloud's layers, as they lie in memory, under their names in the whole model
isthmus_span.json   what they were cut from, and how they are held
parts/              what edges may fetch, as `export_edge_parts` writes it
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from isthmus.backbone.checkpoints.assembly import check_materialised, load_parameters
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.span_format import INFO_FILE, PARTS, SpanInfo, is_saved_span, read_info
from isthmus.backbone.checkpoints.tensor_reader import SPAN_FILE, TensorReader, write_json
from isthmus.backbone.checkpoints.weight_quantization import Quantizer, bytes_of, quantize_linears, quantizer_of
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import Span, SplitPlan
from isthmus.backbone.split.edge_parts import export_edge_parts
from isthmus.backbone.split.span import DTYPES, FrozenSpan, distinct_layers, empty_layers, load_span
from isthmus.common.errors import CheckpointError
from isthmus.common.files import check_replaceable, disk_errors, new_folder


def save_span(
    checkpoint: Checkpoint, plan: SplitPlan, folder: Path, *, dtype: str, quantizer: Quantizer
) -> tuple[int, int]:
    """Quantize a model's middle layers and write them with the edge's parts. The folder appears whole or not at all.

    Args:
        checkpoint: The whole model.
        plan: Who holds which layers.
        folder: Where to write; an older saved span is replaced.
        dtype: What the span computes in, `fp32` or `bf16`.
        quantizer: How linears are held.

    Returns:
        Bytes of the span in memory, and those that it would have in `dtype`.

    Raises:
        CheckpointError: The checkpoint is damaged or incomplete.
        ConfigError: Something else than a saved span is in the folder's place.
        DiskError: The disk is full or cannot be written.
        PlanError: The plan is for another number of layers.
        UnsupportedFamilyError: The architecture cannot be cut.
    """
    check_replaceable(folder, is_saved_span, "saved span")
    span = load_span(checkpoint, plan, dtype=DTYPES[dtype], quantizer=quantizer)
    path = family_of(span.config).layers_path
    tensors = {
        f"{path}.{index}.{name}": tensor.contiguous()
        for index, layer in distinct_layers(span.base, tuple(plan.cloud)).items()
        for name, tensor in layer.state_dict().items()
    }
    info = SpanInfo(checkpoint.name, str(plan), dtype, quantizer.name)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as new:
        export_edge_parts(checkpoint, plan, new / PARTS)
        save_file(tensors, new / SPAN_FILE, metadata={"format": "pt"})
        write_json(new / INFO_FILE, asdict(info))
    return bytes_of(span), span.n_params * DTYPES[dtype].itemsize


def load_saved_span(folder: Path, layers: Span | None = None) -> FrozenSpan:
    """Read a span as it was saved; nothing is there in full precision at any time.

    Args:
        folder: What `save_span` wrote.
        layers: Those of the span to read; None for all.

    Raises:
        CheckpointError: The folder is damaged or incomplete.
        ConfigError: The package that its quantization needs is not installed.
    """
    info = read_info(folder)
    config = Checkpoint(folder / PARTS, info.model).config
    plan = SplitPlan.parse(info.plan, config.num_hidden_layers)
    quantizer = quantizer_of(info.quantize)
    wanted = plan.cloud if layers is None else layers
    if not all(layer in plan.cloud for layer in wanted):
        raise CheckpointError(f"{folder} holds layers {plan.cloud}, and not {wanted}: write it anew")
    base = empty_layers(config, tuple(wanted), dtype=DTYPES[info.dtype], attn_implementation=None)
    reader = TensorReader(folder)
    for index, layer in distinct_layers(base, tuple(wanted)).items():
        if quantizer is not None:
            quantize_linears(layer, quantizer)
        load_parameters(layer, f"{family_of(config).layers_path}.{index}.", reader)
    check_materialised(base)
    return FrozenSpan(base, wanted, config, config.hidden_size, DTYPES[info.dtype])

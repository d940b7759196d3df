"""From the options of `serve` to a specification of each worker. All that can be checked before a start is checked."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import shutil
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from isthmus.backbone.checkpoints.sources import (
    Checkpoint,
    check_name,
    default_cache,
    files_beside_the_weights,
    resolve,
)
from isthmus.backbone.checkpoints.span_format import (
    NONE,
    PARTS,
    SpanInfo,
    check_dtype,
    check_quantizer,
    is_saved_span,
    read_info,
)
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.control.ports import Ports, parse_address
from isthmus.cloud.control.serve_options import ServeOptions, TlsFiles
from isthmus.cloud.control.worker import CPU, DEVICES, WorkerSpec
from isthmus.cloud.telemetry.logs import log_file
from isthmus.common.errors import ConfigError, PackageError
from isthmus.common.files import disk_errors, sha256_of
from isthmus.common.ownership import private_folder
from isthmus.common.readable import bracketed
from isthmus.emulator.package.manifest import Manifest
from isthmus.emulator.package.verification import check_package_fits, verified
from isthmus.privacy.recording.file_names import PATTERN
from isthmus.protocol.enrolment import WORKERS_QUOTA_BYTES, WORKERS_QUOTA_SESSIONS, Quota, add_line
from isthmus.protocol.file_messages import MAX_PACKAGES, PACKAGE_NAME, PACKAGE_NAME_NEEDS
from isthmus.protocol.limits import MAX_WORKERS, MIB
from isthmus.protocol.secure.keys import Fingerprint, generate_edge

DEFAULT_PLAN, DEFAULT_DTYPE = "2:2", "fp32"


@dataclass(frozen=True, slots=True)
class Backbone:
    """The model that is served, and in which form.

    Attributes:
        checkpoint: the whole model, or the edge's parts beside a saved span.
        plan: who holds which layers.
        dtype: what the span computes in.
        quantize: how its weights are held.
        saved_span: the folder that `isthmus cloud quantize` wrote; "" for none.
    """

    checkpoint: Checkpoint
    plan: SplitPlan
    dtype: str
    quantize: str
    saved_span: str = ""

    @property
    def parts(self) -> Path:
        """Where the edge's parts are kept in the cache, once a worker has made them.

        The folder's name has a hash of the tokenizer's files too: they may change where the weights do not.
        """
        if self.checkpoint.is_edge_parts:
            return self.checkpoint.folder
        small = hashlib.sha256()
        for file in files_beside_the_weights(self.checkpoint.folder):
            small.update(f"{file.name} {sha256_of(file).hex()}\n".encode())
        name = f"{self.checkpoint.digest()[:16]}-{self.plan.bottom}-{self.plan.top}-{small.hexdigest()[:16]}"
        return default_cache().absolute() / "edge-parts" / name


def check_model(model: str) -> None:
    """Refuse what is no model by its name alone, before keys are asked for. Raises UnknownModelError."""
    if not is_saved_span(Path(model).expanduser()):
        check_name(model)


def backbone_of(options: ServeOptions, console: Console) -> Backbone:
    """The model that the options name, with defaults for what they leave out.

    Raises:
        ConfigError: an option does not make sense, or contradicts the saved span.
        IsthmusError: the model cannot be used.
    """
    check_dtype(options.dtype or DEFAULT_DTYPE)
    folder = Path(options.model).expanduser()
    if is_saved_span(folder):
        info = read_info(folder)
        _check_as_saved(folder, info, options)
        check_quantizer(info.quantize)
        checkpoint = Checkpoint((folder / PARTS).absolute(), info.model)
        plan = SplitPlan.parse(info.plan, checkpoint.n_layers)
        return Backbone(checkpoint, plan, info.dtype, info.quantize, str(folder.absolute()))
    check_quantizer(options.quantize or NONE)
    checkpoint = resolve(options.model, console=console)
    plan = SplitPlan.parse(options.edge_layers or DEFAULT_PLAN, checkpoint.n_layers)
    return Backbone(checkpoint, plan, options.dtype or DEFAULT_DTYPE, options.quantize or NONE)


def _check_as_saved(folder: Path, info: SpanInfo, options: ServeOptions) -> None:
    given = {"edge-layers": options.edge_layers, "dtype": options.dtype, "quantize": options.quantize}
    made = {"edge-layers": info.plan, "dtype": info.dtype, "quantize": info.quantize}
    for option, saved in made.items():
        wanted = given[option]
        if wanted not in (None, saved):
            raise ConfigError(
                f"{folder} was written with --{option} {saved}, not {wanted}: leave the option out, or write another "
                "folder with `isthmus cloud quantize`"
            )


@dataclass(frozen=True, slots=True)
class WorkerCount:
    """The least and the largest number of workers. A pipeline has as many workers as stages."""

    least: int
    most: int


def count_workers(options: ServeOptions, plan: SplitPlan) -> WorkerCount:
    """How many workers the options `workers` and `pipeline` ask for.

    Raises:
        ConfigError: they make no sense, or do not fit the plan or each other.
    """
    match = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", options.workers)
    least = int(match[1]) if match else 0
    most = int(match[2]) if match and match[2] else least
    if not 1 <= least <= most <= MAX_WORKERS:
        raise ConfigError(
            f"--workers {options.workers!r} is no number of workers: write N, or MIN:MAX, from 1 to {MAX_WORKERS}"
        )
    stages = options.pipeline
    if not 1 <= stages <= len(plan.cloud):
        raise ConfigError(
            f"--pipeline {stages} does not fit: the cloud holds {len(plan.cloud)} layers, so it has 1 to "
            f"{len(plan.cloud)} stages"
        )
    if stages > 1 and most > 1:
        raise ConfigError(
            f"--pipeline {stages} and --workers {most} exclude each other: a pipeline is one worker in several "
            "stages; serve twice, from two homes and on two addresses, for more"
        )
    if stages > 1 and options.emulators:
        raise ConfigError(
            f"--pipeline {stages} and --emulator exclude each other, as returned adapters are tried on the whole span: "
            "leave one of them out"
        )
    return WorkerCount(max(least, stages), max(most, stages))


def check_device(device: str, *, wipe_freed: bool = False) -> None:
    """Check the name of a device, and that its memory can be wiped where that is asked for. Raises ConfigError."""
    if device not in DEVICES:
        raise ConfigError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}")
    if wipe_freed and device != CPU:
        raise ConfigError(
            f"--wipe-freed and --device {device} exclude each other, as a GPU's memory is not overwritten when it is "
            "freed: leave one of them out"
        )


def check_packages(options: ServeOptions, pin: Fingerprint, backbone: Backbone) -> ServeOptions:
    """Check the packages that are to be offered; returns the options with a name for each, as `NAME=FOLDER`.

    Raises:
        ConfigError: there are too many, or one has no name or another one's.
        PackageError: one is damaged, or of another model or plan.
        SignerError: one was signed under another root key.
    """
    if len(options.emulators) > MAX_PACKAGES:
        raise ConfigError(
            f"--emulator was given {len(options.emulators)} times: a cloud offers at most {MAX_PACKAGES} packages"
        )
    named: dict[str, Path] = {}
    for given in options.emulators:
        name, equals, folder = given.partition("=")
        if not equals or "/" in name:
            name, folder = "", given
        path = Path(folder).expanduser().absolute()
        manifest = _check_package(path, pin, backbone)
        name = name or manifest.preset or path.name
        if not PACKAGE_NAME.fullmatch(name):
            raise ConfigError(
                f"--emulator {given}: {name[:64]!r} is no name of a package: give NAME=FOLDER; {PACKAGE_NAME_NEEDS}"
            )
        if name in named:
            raise ConfigError(
                f"--emulator {given}: {named[name]} has the name {name!r} already: give one of them another, as "
                "NAME=FOLDER"
            )
        named[name] = path
    return dataclasses.replace(options, emulators=tuple(f"{name}={path}" for name, path in named.items()))


def _check_package(folder: Path, pin: Fingerprint, backbone: Backbone) -> Manifest:
    """Check that edges of this cloud can use a package. Raises what `check_packages` raises."""
    manifest, _, _ = verified(folder, pin)
    check_package_fits(manifest, backbone.checkpoint)
    made_for = manifest.split_plan
    if not backbone.plan.cloud.covers(made_for.cloud):
        raise PackageError(
            f"{folder} was made for the split plan {made_for}, whose middle {made_for.cloud} is not inside the layers "
            f"{backbone.plan.cloud} of --edge-layers {backbone.plan}: serve with --edge-layers {made_for}, or build a "
            f"package for {backbone.plan}"
        )
    return manifest


def check_recording(folder: Path) -> None:
    """Make the folder of a recording where it is not there yet.

    Raises:
        ConfigError: it holds a recording.
        DiskError: it cannot be made.
        OwnershipError: others may write to it.
    """
    with disk_errors(folder):
        private_folder(folder)
        held = next(folder.glob(PATTERN), None)
    if held is not None:
        raise ConfigError(f"--record {folder} holds a recording already ({held.name}): choose another folder")


def check_tls(files: TlsFiles) -> None:
    """Check the files of an outer TLS layer: gRPC would say only that it cannot listen. Raises ConfigError."""
    given = [path for path in (files.cert, files.key, files.client_ca) if path is not None]
    for path in given:
        if not path.is_file():
            raise ConfigError(f"the TLS file {path} does not exist: check the path")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.cert, files.key)
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
    except OSError as error:
        names = ", ".join(map(str, given))
        raise ConfigError(f"the TLS files {names} are no PEM certificate and its key ({error}): check them") from None


@contextlib.contextmanager
def worker_specs(
    options: ServeOptions, backbone: Backbone, addresses: Sequence[str], ports: Ports, *, beside: int, threads: int
) -> Iterator[list[WorkerSpec]]:
    """What each worker serves, by number. The keys of a pipeline's stages exist for as long as the context lasts.

    Args:
        options: checked ones.
        backbone: the model.
        addresses: where the workers that edges talk to listen.
        ports: where a pipeline's other stages get addresses.
        beside: how many workers share the machine's memory.
        threads: torch threads of each worker.
    """
    first = worker_spec(options, backbone, beside=beside, threads=threads)
    host = advertised_host(options)
    specs = [
        dataclasses.replace(first, number=number, listen=listen, address=_address(host, listen))
        for number, listen in enumerate(addresses)
    ]
    with contextlib.ExitStack() as stack:
        if options.pipeline > 1:
            specs = stack.enter_context(stage_specs(specs[0], backbone.plan, options.pipeline, ports))
        yield [dataclasses.replace(spec, log_file=str(log_file(options.home, "worker", spec.number))) for spec in specs]


def worker_spec(options: ServeOptions, backbone: Backbone, *, beside: int, threads: int) -> WorkerSpec:
    """What all workers have in common; without where they listen."""
    tls = options.tls
    return WorkerSpec(
        checkpoint=str(backbone.checkpoint.folder),
        model=backbone.checkpoint.name,
        plan=str(backbone.plan),
        dtype=backbone.dtype,
        quantize=backbone.quantize,
        saved_span=backbone.saved_span,
        parts=str(backbone.parts),
        home=str(options.home),
        listen="",
        stash_bytes=options.stash_bytes,
        compute_bytes=options.compute_bytes,
        beside=beside,
        max_tokens=options.max_tokens,
        threads=threads,
        log_file="",
        emulators=tuple((name, folder) for name, _, folder in (each.partition("=") for each in options.emulators)),
        sites=options.sites,
        device=options.device,
        record="" if options.record is None else str(options.record.absolute()),
        record_bytes=options.record_mib * MIB,
        wipe_freed=options.wipe_freed,
        bounds=options.bounds,
        tls_cert="" if tls is None else str(tls.cert.absolute()),
        tls_key="" if tls is None else str(tls.key.absolute()),
        tls_client_ca="" if tls is None or tls.client_ca is None else str(tls.client_ca.absolute()),
    )


@contextlib.contextmanager
def stage_specs(first: WorkerSpec, plan: SplitPlan, count: int, ports: Ports) -> Iterator[list[WorkerSpec]]:
    """What each stage of a pipeline serves. Each stage has a key that the next one has enrolled, inside the context.

    Only the first stage is for edges. The others listen on the loopback, as they are on this node.
    """
    folder = Path(first.home) / "pipeline"
    with disk_errors(folder):
        if folder.exists():  # of a `serve` that was killed
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
    quota = Quota(WORKERS_QUOTA_SESSIONS, WORKERS_QUOTA_BYTES)
    specs: list[WorkerSpec] = []
    try:
        for number, layers in enumerate(plan.cloud.cut(count)):
            stage = dataclasses.replace(first, number=number, layers=str(layers), sites=False)
            if number:
                enrolled = folder / str(number)
                key = enrolled / "id_ed25519"
                line = generate_edge(key, f"stage-{number - 1}")
                add_line(enrolled / "authorized_edges", line, quota=quota, stage=True)
                listen = ports.take("127.0.0.1:0")
                stage = dataclasses.replace(
                    stage, listen=listen, address=listen, edges=str(enrolled), tls_cert="", tls_key="", tls_client_ca=""
                )
                specs[-1] = dataclasses.replace(specs[-1], next_stage=listen, next_key=str(key))
            specs.append(stage)
        yield specs
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def advertised_host(options: ServeOptions) -> str:
    """The host of the addresses that edges get, without brackets."""
    return (options.advertise or parse_address(options.listen)[0]).strip("[]")


def _address(host: str, listen: str) -> str:
    """The address of a worker that edges get."""
    return f"{bracketed(host)}:{parse_address(listen)[1]}"

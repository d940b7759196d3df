"""`isthmus cloud serve`: on this machine, or on the nodes of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from isthmus.cli.cloud_flags import CLUSTER, DEFAULT_HOME, DEFAULT_NAME, UNANSWERED, Home
from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.protocol.limits import TransferTimeout

BOUNDS = Bounds()
CERTIFICATE_HOURS = 24.0


def serve(
    model: Annotated[
        str,
        typer.Option(
            help="A name (smollm2-135m), a local folder, a GGUF file, a hub id, or what `isthmus cloud quantize` wrote."
        ),
    ],
    home: Home = DEFAULT_HOME,
    edge_layers: Annotated[
        str | None, typer.Option(help="How many of the first and of the last layers the edge holds; by default 2:2.")
    ] = None,
    listen: Annotated[
        str, typer.Option(help="Address of the data plane, host:port; port 0 takes a free one.")
    ] = "127.0.0.1:7443",
    advertise: Annotated[
        str | None,
        typer.Option(
            help="Host that the connection string names; by default the one of --listen. On a cluster, a load balancer "
            "before nodes with one worker each."
        ),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Address of /metrics and /status, host:port; empty for none.")
    ] = "127.0.0.1:9464",
    dtype: Annotated[
        str | None, typer.Option(help="What the cloud's layers compute in: fp32 or bf16; by default fp32.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="How the weights of the cloud's layers are held: none, int8 or nf4; by default none."),
    ] = None,
    stash_bytes: Annotated[
        str | None,
        typer.Option(
            help="Each worker's memory for its stash, the activation cache: forward states that wait for their "
            "backward. By default a fifth of what the machine leaves beside the weights, 2GiB at most."
        ),
    ] = None,
    compute_bytes: Annotated[
        str | None,
        typer.Option(
            help="Each worker's memory for calls while they are computed, and as much again for calls that have "
            "paused; a call that needs more by itself is refused, others wait. By default a fifth of what the "
            "machine leaves beside the weights."
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Largest batch x sequence of one call. A call is never interrupted, so the largest one is what other "
            "tenants may have to wait for.",
        ),
    ] = 1 << 13,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each worker's computation; by default its share of the cores.")
    ] = None,
    workers: Annotated[
        str,
        typer.Option(help="Workers that serve at once: N, or MIN:MAX for as many as the waiting calls need."),
    ] = "1",
    pipeline: Annotated[
        int, typer.Option(min=1, help="Stages that the layers are cut into, a worker each; takes no sites.")
    ] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            help="Serve on the nodes of a Ray cluster, at HOST:PORT or auto, of which this machine is one; by default "
            "on this machine alone.",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Name of the cloud in its cluster.", rich_help_panel=CLUSTER)
    ] = DEFAULT_NAME,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it serves.", rich_help_panel=CLUSTER)] = False,
    worker_memory: Annotated[
        str | None,
        typer.Option(help="Memory that each worker claims of its node; by default none.", rich_help_panel=CLUSTER),
    ] = None,
    node_labels: Annotated[
        list[str] | None,
        typer.Option(
            help="Labels of the nodes to serve on, KEY=VALUE,…; given again, for when no node has the ones before.",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    certificate_hours: Annotated[
        float,
        typer.Option(
            min=0.01, help="Hours until a worker's certificate expires; renewed at half of it.", rich_help_panel=CLUSTER
        ),
    ] = CERTIFICATE_HOURS,
    autoscaled: Annotated[
        bool,
        typer.Option(
            "--autoscaled",
            help="Take a cluster whose autoscaler adds the nodes for workers; else one without such a node is refused.",
            rich_help_panel=CLUSTER,
        ),
    ] = False,
    model_port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            help="Port of this machine where workers fetch the model; 0 takes a free one.",
            rich_help_panel=CLUSTER,
        ),
    ] = 0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that calls in flight get on SIGTERM.")] = 30.0,
    connection_file: Annotated[Path | None, typer.Option(help="File to write the connection string to.")] = None,
    emulator: Annotated[
        list[str] | None,
        typer.Option(
            help="A package (`isthmus emulator build`) that edges may fetch and tune on: its folder, or NAME=FOLDER, "
            "whose name is by default that of its preset, or of the folder; given again for further ones."
        ),
    ] = None,
    sites: Annotated[
        bool, typer.Option(help="Let edges put adapters inside the layers served, which shows them what is inside.")
    ] = True,
    batching: Annotated[
        Literal["on", "off"], typer.Option(help="Compute the calls of several edges in one pass.")
    ] = "on",
    device: Annotated[
        str, typer.Option(help="Where the cloud's layers compute: cpu, or cuda, with a GPU for each worker or stage.")
    ] = "cpu",
    record: Annotated[
        Path | None,
        typer.Option(
            help="Folder to record what edges send and get, for attacks on it: activations and gradients, from which "
            "their texts can be recovered. Their owners should know."
        ),
    ] = None,
    record_mib: Annotated[
        int, typer.Option(min=1, help="MiB of a recording at most: then it ends, and the cloud goes on.")
    ] = 1024,
    wipe_freed: Annotated[
        bool,
        typer.Option(
            "--wipe-freed",
            help="Have each worker overwrite the memory that it frees, so that less of a session outlasts it; slower, "
            "and only with glibc's allocator.",
        ),
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM) of an outer TLS layer.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key (PEM) of --tls-cert.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="CA (PEM) that edges' TLS certificates must come from.")
    ] = None,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Connections that each worker takes; an edge has one for each of its sessions.")
    ] = BOUNDS.max_connections,
    max_streams: Annotated[
        int, typer.Option(min=1, help="gRPC calls that each worker takes at once; a session is one, open or half open.")
    ] = BOUNDS.max_streams,
    max_connection_streams: Annotated[
        int, typer.Option(min=1, help="gRPC calls of one connection: a proxy may put many edges on one.")
    ] = BOUNDS.max_connection_streams,
    max_half_open: Annotated[
        int, typer.Option(min=1, help="gRPC calls whose peer is not authenticated yet; each can hold about 2 MiB.")
    ] = BOUNDS.max_half_open,
    max_half_open_per_host: Annotated[
        int,
        typer.Option(min=1, help="The same of one host, of IPv6 the first 64 bits; edges may share one."),
    ] = BOUNDS.max_half_open_per_host,
    handshake_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a peer must be authenticated.")
    ] = BOUNDS.handshake_seconds,
    stream_window: Annotated[
        str,
        typer.Option(help="Bytes that an edge may send ahead; more is faster where a round trip is long."),
    ] = "1MiB",
    stall_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a message may take beside what its bytes take at --least-rate.")
    ] = BOUNDS.transfer.stall_seconds,
    least_rate: Annotated[
        str, typer.Option(help="Bytes a second that an edge must send of a message, and take of an answer.")
    ] = "16KiB",
    message_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a message, or taking an answer, may last, whatever its size.")
    ] = BOUNDS.transfer.message_seconds,
    pings_per_minute: Annotated[
        int, typer.Option(min=1, help="Pings that a session is answered; an edge sends one at the end of a run.")
    ] = BOUNDS.pings_per_minute,
    max_session_age: Annotated[
        float,
        typer.Option(min=1, help="Seconds until a session ends, between two calls; the edge opens another."),
    ] = BOUNDS.max_session_age,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Token positions of a batch of several edges' calls, at most.")
    ] = BOUNDS.engine.max_batch_tokens,
    max_wait: Annotated[
        float,
        typer.Option(min=0, help="Seconds that a call is held back at most, for others to share its batch, or memory."),
    ] = BOUNDS.engine.max_wait,
    interactive_lead: Annotated[
        float,
        typer.Option(min=0, help="Seconds of computing that interactive calls may put an edge ahead of training."),
    ] = BOUNDS.engine.interactive_lead,
    compute_threads: Annotated[
        int, typer.Option(min=1, help="Batches that each worker computes at a time; they share its --threads.")
    ] = BOUNDS.engine.compute_threads,
    state_bytes: Annotated[
        str | None,
        typer.Option(
            help="Forward states of the edges at work, before further forwards wait; by default half of what the "
            "weights of the cloud's layers take. Those of silent edges count against --stash-bytes only."
        ),
    ] = None,
    count_graphs: Annotated[
        bool, typer.Option(help="Count the bytes of every forward state, which is slower; else most are estimated.")
    ] = BOUNDS.engine.count_graphs,
    trim_heap: Annotated[
        bool, typer.Option(help="Give free memory back to the system while several edges are at work.")
    ] = BOUNDS.engine.trim_heap,
    cache_bytes: Annotated[
        str | None,
        typer.Option(
            help="Each worker's memory for keys and values of past tokens (KV cache); the least recently used cache of "
            "the edge that has most is evicted first, and computed again. By default a fifth of what the machine "
            "leaves beside the weights, 2GiB at most."
        ),
    ] = None,
    prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt that are computed at once; others' tokens come in between.")
    ] = BOUNDS.engine.prefill_tokens,
    paused_calls: Annotated[
        int,
        typer.Option(
            min=1, help="Calls of each worker that may wait for edges' adapters in the middle; each has a thread."
        ),
    ] = BOUNDS.engine.paused_calls,
) -> None:
    """Serve a model's middle layers until SIGTERM or Ctrl-C; prints the connection string for the edges.

    On a cluster (--address) the cloud goes on without this command; `isthmus cloud stop` ends it.

    Example: isthmus cloud serve --model smollm2-135m --edge-layers 2:2 --listen 127.0.0.1:7443

    On a cluster: isthmus cloud serve --model smollm2-135m --address auto --listen node:7443 --workers 2
    """
    from isthmus.common.errors import ConfigError
    from isthmus.protocol.enrolment import parse_size

    if (tls_cert is None) != (tls_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together: give both or neither")
    if tls_client_ca is not None and tls_cert is None:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions, TlsFiles

    cluster = None
    if address is not None:
        from isthmus.cloud.cluster.cluster_spec import parse_labels

        labels = tuple(parse_labels(each) for each in node_labels or ())
        memory = 0 if worker_memory is None else parse_size(worker_memory)
        cluster = ClusterOptions(
            address, name, detach, memory, labels, certificate_hours, autoscaled=autoscaled, model_port=model_port
        )
    elif (
        name != DEFAULT_NAME
        or detach
        or worker_memory
        or node_labels
        or autoscaled
        or model_port
        or certificate_hours != CERTIFICATE_HOURS
    ):
        raise ConfigError(
            "--name, --detach, --worker-memory, --node-labels, --certificate-hours, --autoscaled and --model-port are "
            "for a cluster: give its --address"
        )
    options = ServeOptions(
        model=model,
        home=home.expanduser(),
        edge_layers=edge_layers,
        listen=listen,
        advertise=advertise,
        metrics=metrics,
        dtype=dtype,
        quantize=quantize,
        stash_bytes=None if stash_bytes is None else parse_size(stash_bytes),
        compute_bytes=None if compute_bytes is None else parse_size(compute_bytes),
        max_tokens=max_tokens,
        threads=threads,
        workers=workers,
        pipeline=pipeline,
        cluster=cluster,
        grace=grace,
        connection_file=connection_file,
        emulators=tuple(emulator or ()),
        sites=sites,
        device=device,
        record=None if record is None else record.expanduser(),
        record_mib=record_mib,
        wipe_freed=wipe_freed,
        tls=None if tls_cert is None or tls_key is None else TlsFiles(tls_cert, tls_key, tls_client_ca),
        bounds=Bounds(
            max_connections=max_connections,
            max_streams=max_streams,
            max_connection_streams=max_connection_streams,
            max_half_open=max_half_open,
            max_half_open_per_host=max_half_open_per_host,
            handshake_seconds=handshake_seconds,
            stream_window=parse_size(stream_window),
            transfer=TransferTimeout(stall_seconds, parse_size(least_rate), message_seconds),
            pings_per_minute=pings_per_minute,
            max_session_age=max_session_age,
            engine=EngineOptions(
                batching=batching == "on",
                max_batch_tokens=max_batch_tokens,
                max_wait=max_wait,
                interactive_lead=interactive_lead,
                compute_threads=compute_threads,
                state_bytes=None if state_bytes is None else parse_size(state_bytes),
                count_graphs=count_graphs,
                trim_heap=trim_heap,
                cache_bytes=None if cache_bytes is None else parse_size(cache_bytes),
                prefill_tokens=prefill_tokens,
                paused_calls=paused_calls,
            ),
        ),
    )
    if cluster is not None:
        from isthmus.cloud.cluster.attached import serve_on_cluster

        serve_on_cluster(options, ready=typer.echo)
        return
    from isthmus.cloud.control.supervisor import serve as run

    if not run(options, ready=typer.echo):
        typer.echo(f"stopped after {grace:.0f} s with calls unanswered", err=True)
        raise typer.Exit(UNANSWERED)

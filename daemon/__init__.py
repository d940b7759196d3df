"""The edge daemon: a process that stays, tunes and answers for the programs of one machine.

Clients speak OpenAI's API, Tinker's or the daemon's own over loopback; text stays on this machine, and what a cloud
computes goes over the links of `isthmus.edge`.

    doctor          what may be wrong, and what to do about it; cloud_check asks a cloud
    daemon_server   composes what follows into one process, and serves it on loopback and on a Unix socket
    set_aside       moves aside what the home has that the database does not know
    openai          OpenAI's API: files, fine-tuning jobs, models, completions
    tinker          Tinker's API: training by single steps, and sampling
    page            the page at `/`, and the daemon's own API, which the page and `isthmus edge jobs` use
    web             what all APIs share: who asks, what is refused, bounds of bodies
    jobs            jobs in a queue, and the process that does one
    serving         the process that keeps links open and adapters hot, and generates
    workers         how this process and the others talk
    state           what must survive: SQLite
    daemon_client   asks a running daemon, for the command line
    daemon_lock     one daemon for each home

    daemon_settings and settings_file: daemon.toml; home: where files are; tokens, daemon_log, disk_room

The process that serves clients imports neither torch nor grpc: models are computed with in processes of their own.
It may import `isthmus.edge`, and what that may import. Each package says what it may import of the others; besides
that, all but `state` and `workers` may import daemon_settings, disk_room and home.
"""

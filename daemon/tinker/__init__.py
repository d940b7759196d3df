"""Tinker's API: models that are trained step by step, sampled from, saved and loaded.

    tinker_routes     puts the endpoints together; `endpoints` has them
    tinker_service    what serves them in a running daemon
    promises          requests that are answered later, each once
    training_queue    what promises ask of the process that trains (`training_worker`)
    held_models       what that process has in its memory, and making good what dies with it
    sampling_queue    asks the process that generates
    saved_weights     what was saved, and how long it stays
    wire_bodies       protobuf

It may import `isthmus.daemon.web`, what that may import and, in the process that trains, `isthmus.edge`.
"""

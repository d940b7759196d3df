"""The cloud's home, which is the folder of its keys, enrolments and state.

    home_lock   one `serve` for each home, and the folder of the Ray that it starts
    identity    the worker's key and certificate, read again when they change
    expiry      when the certificate expires, and a warning before that

It may import `isthmus.cloud.telemetry`, `isthmus.protocol` and `isthmus.common`: no Ray, no gRPC, no torch.
"""

"""The cloud's home, the folder of its keys, enrolments and state: whose it is, who serves with it, what changes in it.

    lock       one `serve` for each home, and the folder of the Ray that it starts
    identity   the worker's key and certificate, read again when they change
    expiry     when the certificate expires, and a warning before

Imports the protocol and the backbone, and of the cloud its log alone: no Ray, no gRPC, no torch.
"""

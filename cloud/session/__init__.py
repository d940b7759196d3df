"""One tenant's session above the protocol: its messages, its sites, its files and its adapters.

It may import `isthmus.cloud.engine` and `isthmus.cloud.telemetry`, no gRPC and no Ray.
"""

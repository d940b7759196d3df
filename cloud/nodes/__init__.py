"""What a worker of a cloud over several machines does on its node.

    deliveries    what the controller sends a worker, and what a worker asks for
    worker_home   a worker's folder on its node: its key, and files of what was delivered
    peers         sealed fetches from the cloud's other workers
    node_models   finds the model on the node, or fetches it
    node_worker   the actor: gets a certificate, then serves as a worker of one machine does

A worker makes its key on its node, and what is delivered to it are files that a worker of one machine has in its home:
so everything above the files is the same. It may import all of `isthmus.cloud` but `isthmus.cloud.cluster`, and
`isthmus.rpc`; no gRPC, and Ray only through `isthmus.cloud.control.ray_cluster`.
"""

"""A cloud over several machines, as its owner runs it: placed by Ray, looked after by a controller in the cluster.

    cluster_spec     what the controller is given, and what a worker claims of a node
    joined_cluster   a Ray cluster that exists: nodes, detached actors, tasks on a node
    issuing          certificates for workers on enrolled nodes
    cluster_controller   the actor that starts, watches, scales and ends the workers
    worker_counts    how many workers there should be, kept in the owner's folder
    planned_cluster  from the options of `serve` to the cloud's specification
    attached         `isthmus cloud serve --address`, and what comes after it: attach, scale, stop
    watched_cloud    a cloud that `serve` or `attach` looks after
    model_files      hands the model out to workers whose machines lack it
    ray_tls          whether Ray's own traffic may cross the network as it is, and certificates for its TLS
    cluster_doctor, node_probe   `isthmus cloud doctor`, and what it has looked up on each node

It may import all of `isthmus.cloud`. `joined_cluster` is its one module that imports Ray.
"""

"""`isthmus bench cluster`: a cloud over several machines, each in namespaces of its own, while machines die.

| module | what is there |
|---|---|
| `net_machines` | machines that share nothing but a network: namespaces, a switch, links that can be cut |
| `machine_processes` | which of a machine's processes are the cloud's, and which are Ray's own |
| `ray_nodes` | Ray's processes of one machine, which a power cut ends |
| `cluster_cloud` | a cloud on them, the commands of its owner, and what it leaves behind |
| `edge_runs` | training runs while something happens, what they lost, and their adapters |
| `cluster_world` | machines, Ray and a cloud together, as a case finds them |
| `cases` | what happens: a machine killed, a link cut, the head away, … |
| `machine_pool`, `machine_provider` | machines that Ray's autoscaler adds and ends |
| `packets` | all that crosses the network |
| `cluster_canaries` | secrets, looked for in the control store, files, environments and packets |
| `canary_edge`, `store_note` | what an edge sends, and a control that the control store keeps |
| `cluster_bench` | the command |

May import `isthmus.cloud`, `isthmus.edge` and what lies below them, and from `isthmus.experiments` the harness, the
network, and the canaries and scanners of `isthmus.experiments.rigs.secrets`.
"""

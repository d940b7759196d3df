"""`isthmus bench abuse`: attacks on a real server, a real edge and a real daemon, held to ceilings on what they cost.

| module | what is there |
|---|---|
| `http2` | a connection that speaks HTTP/2 by hand |
| `stranger` | attacks by somebody without a key |
| `costs` | single expensive things that a tenant asks for |
| `attacks` | both, and the hostile tenants of the chaos benchmark, in one shape, and the process that makes them |
| `daemon_attacks` | attacks on a daemon by an owner with a token, and a daemon without a bound |
| `hostile_cloud` | a cloud that attacks the edges that have pinned it |
| `attacked_edge` | an edge in a process of its own, and what it must answer each attack of a cloud with |
| `ceilings` | what each attack may cost at most, fixed before it is run |
| `gauge` | what a process has taken, as the kernel counts it |
| `honest` | a tenant or an owner that behaves, whose latency the attacks raise |
| `bare_server` | a server without Ray, and servers with a planted weakness |
| `abuse_bench` | the rows of the report, and how they are printed |

May import `isthmus.cloud`, `isthmus.daemon` and what lies below them, and from `isthmus.experiments` the harness, the
hostile tenants and a daemon of this machine.
"""

"""What leaks: attacks on real runs, each with its price beside it. May import what `experiments` may, but `rigs`.

leak            the ledger: rows made, or taken from what is finished, and put together
grid            which rows there are; `grid.toml` and `defences.toml` have those of the documents
rows            one row: its run over a cloud that records, the attacks on it, and its task
ledger_json     what is printed; `page` makes figures of it
weights         what leaks of weights
"""

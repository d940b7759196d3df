"""What leaks: attacks on real runs, each with its price beside it. May import what `experiments` may, but `rigs`.

leak            the ledger: rows made, or taken from what is finished, and put together
grid            which rows there are; `grid.toml` and `defences.toml` have those of the documents
row_run         one row: run, attacks and task
recorded_run    a cloud that records, and an edge that trains
attacked_row    the attacks on a recording
ledger_json     what is printed; `page` makes figures of it
weights         what leaks of weights
"""

"""A row of the ledger, from its texts to its entries. May import what `leak` may, but `leak.leak` and pages.

row_run         one row: run, attacks and task
row_checkpoint  the run and the results so far, so that an interrupted row resumes
recorded_run    a cloud that records, and an edge that trains
recorded_rows   the sequences of a recording, and which text each is
attacked_row    the attacks on a recording
trained_edge    what the edge has after its run, and how well it does
"""

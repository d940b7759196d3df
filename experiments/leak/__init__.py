"""What a cloud can learn of an edge's texts and labels, measured: the ledger of leaks."""

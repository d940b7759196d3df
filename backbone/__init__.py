"""The frozen model: split plans, model families, checkpoints, and the two halves of a cut model. No network."""

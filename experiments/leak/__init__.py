"""What leaks: attacks on real runs, each with its price beside it. May import what `experiments` may, but `rigs`."""

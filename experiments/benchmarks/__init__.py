"""The demo, and benchmarks of one edge at one cloud: is it exact, and what does a step cost. May import `harness`."""

"""What leaks of weights: members out of adapters, adapters out of sites, the span out of its answers, thieves.

One module for each measurement, with a function that takes its settings and returns what it measured. May import
`harness`, `scoring` and `offsite`, and the parts of the system that they may; of `leak` nothing else.
"""

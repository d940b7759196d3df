"""The experiments on emulators: the table of Offsite-Tuning, its methods and its costs.

May import `harness` and `scoring`.
"""

"""Every way of training side by side: `isthmus bench placements`.

May import `harness` and `scoring`, and `isthmus.planner`.
"""

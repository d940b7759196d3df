"""`isthmus bench faults`: whatever breaks between an edge and a cloud, the adapter is the undisturbed run's.

May import `isthmus.experiments.rigs.network`.
"""

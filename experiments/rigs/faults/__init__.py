"""`isthmus bench faults`: whatever breaks between an edge and a cloud, adapter and answer are the undisturbed run's.

May import `isthmus.experiments.rigs.network`.
"""

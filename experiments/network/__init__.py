"""Slow links between an edge and a cloud on one machine: two network namespaces, and a relay that delays packets.

May import `harness`.
"""

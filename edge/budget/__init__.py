"""The leak budget of a run: attacks on what the edge is about to send, before it is sent.

    budget_texts     which private texts are attacked, and which public ones the attacker learns from
    rehearsal        what the edge would send, made and held back
    attacker         what the attacker knows of the run
    measured_leak    the attacks, and what they got
    leak_watch       when a run is attacked, and when it ends

It may import what `isthmus.edge.training` may, and `isthmus.privacy`: `attacks`, `measures` and `ledger`.
"""

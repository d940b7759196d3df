"""The attacks of a cloud on what crosses: one file each, one shape (`attack.Attack`).

`labels` has those on labels, `weights` those on weights.

It may import `isthmus.privacy.recording` and what that may import, `isthmus.backbone`, and `isthmus.privacy.defences`,
which an attacker knows; never the measures.
An attack learns what is true from nobody: it returns a guess, which `isthmus.privacy.measures` compares.
"""

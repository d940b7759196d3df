"""Defences: what changes what an edge sends, and so what a cloud can learn of its texts.

A defence is a function of the hidden states that go up, of the gradients that go up, or both, in a file of its own.
Each says in its docstring what it claims formally and what it does not.

    defence_options   names and parameters, and what each defence claims; loads no torch
    defence           the interface, and what a defence is told of a pass
    defended_span     puts defences between a model and its span
    secret_noise      the noise: a function of a secret key and of what it is for
    accountant        (epsilon, delta) of a run
    broken_examples   what does not protect, each with the attack that breaks it

It may import what `isthmus.privacy` may, and none of its sub-packages.
"""

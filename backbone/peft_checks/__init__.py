"""Refuses what PEFT would compute otherwise on a split model than on the whole one.

PEFT matches names and wraps what it finds. On a split model it finds skeletons for the cloud's modules, and so it may
drop what it cannot find, or wrap a module whose adapter is right only over real weights. Three checks, none of which is
enough alone. They run when PEFT has wrapped the model, and at the next call after a change:

    allowed   what sits in the cloud's layers is on the list of what may, by class and configuration
    whole     PEFT makes the same parameters, by name and shape, of the whole model's skeleton
    probe     what sits on a linear of the cloud adds a function of its input alone: it does not look at the weight

This package may import PEFT, inside functions, and what the backbone has for building a model without weights.
"""

from isthmus.backbone.peft_checks.checks import asked_of, check_adapters

__all__ = ["asked_of", "check_adapters"]

"""The training loop, the step of an optimizer, the schedule of its rate, and the checkpoint, for every kind of run.

Edge training, the distillation of emulators and pretraining use them. They know nothing of models, data or adapters,
and import `isthmus.common` alone.
"""

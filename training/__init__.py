"""The training loop, an optimizer's step and its rate, the checkpoint, and the divergence of logits: for every run.

Edge training, the distillation of emulators and pretraining use them, and the privacy lab some. They know nothing of
models, data or adapters, and import `isthmus.common` alone.
"""

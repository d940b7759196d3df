"""Adapters on disk and in models, PEFT's and those that PEFT does not have.

It may import `isthmus.backbone.split` and what that may import.
"""

from isthmus.backbone.adapters.adapter_files import load_adapter as load_adapter, save_adapter as save_adapter
from isthmus.backbone.adapters.layer_adapters import add_bottlenecks as add_bottlenecks

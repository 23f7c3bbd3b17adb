"""The private attributes of torch and accelerate that evaluations read. No other module of this layer names
them.

tests/test_private_apis.py checks each of them in the installed releases.
"""

from __future__ import annotations

from torch import nn


def is_saved(module: nn.Module, buffer: str) -> bool:
    """Whether a module's own buffer belongs to its state dict (``persistent=True``). The public
    ``state_dict`` says so too, but it runs every hook of the module and takes in its children."""
    return buffer not in module._non_persistent_buffers_set


def has_accelerate_hook(module: nn.Module) -> bool:
    """Whether accelerate moves the module's weights. The public ``align_module_device`` would import
    accelerate first, which a model without it does not need."""
    return hasattr(module, "_hf_hook")

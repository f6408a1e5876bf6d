"""The hooks by which transformers captures hidden states and router logits, installed before the first call.

transformers installs them in the first forward that is asked for such outputs, under a lock that Dynamo cannot trace: the graph breaks.
"""

import sys

from torch import nn


def install_capture_hooks(model: nn.Module) -> None:
    """Install them in each transformers model inside `model` that has none yet; transformers is not imported for it."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:
        return
    from transformers import PreTrainedModel

    for module in model.modules():
        # An installation goes through all submodels and marks them; it would install the hooks of a marked one again.
        if isinstance(module, PreTrainedModel) and not any(_is_marked(each) for each in module.modules()):
            capturing.maybe_install_capturing_hooks(module)


def _is_marked(module: nn.Module) -> bool:
    return "_output_capturing_hooks_installed" in module.__dict__

"""Lets vLLM's MooncakeConnector, itself unchanged, start on a machine without an accelerator.

vLLM 0.32's connector asks torch for the number of the current accelerator, and torch raises where there is none; told
"0", all the rest of it works on a CPU. vLLM imports this file into each worker, before the connector is made, for the
sake of the extension class (--worker-extension-cls).
"""

import torch

if not torch.accelerator.is_available():
    torch.accelerator.current_device_index = lambda: 0


class MooncakeOnCpu:
    """Adds nothing to the worker."""

"""Block digests for workers whose one extension class is already that of Mooncake on a CPU."""

from omni.adaptors.vllm.mooncake_on_cpu import MooncakeOnCpu
from tests.e2e.worker_digests import BlockDigests


class MooncakeWithDigests(MooncakeOnCpu, BlockDigests):
    """Nothing more."""

"""What of a real P matters to the proxy beside HTTP: leases behind a control port."""

import time

from kv_transfer.auth import DeploymentKey
from kv_transfer.control import ControlServer
from kv_transfer.hand_off import HandOff, OmniHandOff
from kv_transfer.prefill.lease import LeaseTable
from kv_transfer.protocol import (
    PROTOCOL_VERSION,
    Fingerprint,
    RankEndpoint,
    RankInfo,
    RankLayout,
    TcpOffer,
    Welcome,
)


class LeaseHolder:
    """A lease table and its control server; close it."""

    def __init__(self, key: DeploymentKey) -> None:
        self._key = key
        self.leases = LeaseTable(lease_s=60, max_lease_s=60, on_change=lambda: None)
        fingerprint = Fingerprint(vllm_version="0", model="m", kv_cache_dtype="float32")
        rank = RankInfo(
            endpoint=RankEndpoint("127.0.0.1", 1, "run"),
            layout=RankLayout(block_sizes=(16,), layers=()),
            offers=(TcpOffer(),),
        )
        self._control = ControlServer("127.0.0.1", 0, key, Welcome("run", (rank,)), fingerprint, self.leases)

    def grant(self, key: DeploymentKey | None = None) -> dict[str, object]:
        """The hand-off parameters of a new lease, signed with the deployment key or another one."""
        lease = self.leases.grant([1, 2], num_readers=1)
        ours = OmniHandOff(
            version=PROTOCOL_VERSION,
            run_id="run",
            lease_id=lease.lease_id,
            prompt_digest="0" * 32,
            expires_at=int(time.time()) + 60,
            signature="0" * 64,
        )
        hand_off = HandOff(
            do_remote_prefill=True,
            do_remote_decode=False,
            remote_engine_id="p",
            remote_request_id="r",
            remote_host="127.0.0.1",
            remote_port=self.port,
            remote_block_ids=((1, 2),),
            remote_num_tokens=20,
            tp_size=1,
            omni=ours,
        )
        return hand_off.signed(key or self._key).as_params()

    @property
    def port(self) -> int:
        return self._control.port

    def close(self) -> None:
        self._control.close()

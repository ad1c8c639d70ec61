"""The rules across the fields of a deployment file. Pure: nothing outside the file is looked at.

That prefill and decode use the same dtype needs no rule: services.dtype is the only place for it, and
`omni.deployment.engine_command` refuses --dtype among the extra arguments.
"""

from collections import defaultdict
from collections.abc import Iterator

from kv_transfer.connector.settings import CHECKSUMMED_TRANSPORTS
from omni.deployment.errors import Problem
from omni.deployment.fields import MAX_PARALLEL_SIZE
from omni.deployment.groups import GroupSettings, group_settings
from omni.deployment.model import Access, Deployment, KvTransfer, Proxy
from omni.deployment.ports import port_problems

# The keys of services.kv_transfer that vLLM's own connectors know.
_MEANINGFUL = {
    "nixl": {"connector", "load_failure_policy", "lease_s"},
    "mooncake": {"connector", "load_failure_policy"},
}


def cross_field_problems(deployment: Deployment) -> Iterator[Problem]:
    groups = list(group_settings(deployment))
    for group in groups:
        yield from _override_problems(group)
        yield from _device_problems(group)
    yield from _access_problems(deployment, groups)
    yield from _tls_problems(deployment.deployment.proxy)
    yield from _length_problems(deployment)
    yield from _shared_device_problems(groups)
    yield from port_problems(deployment)
    yield from _kv_transfer_problems(deployment.services.kv_transfer)


def _override_problems(group: GroupSettings) -> Iterator[Problem]:
    for host in group.group.host_overrides:
        if host not in group.hosts:
            text = f"{host} is not one of the group's hosts ({', '.join(group.hosts)})"
            yield Problem(f"{group.path}.host {host}", text, "add it to hosts or delete the block")


def _access_problems(deployment: Deployment, groups: list[GroupSettings]) -> Iterator[Problem]:
    blocks: list[tuple[str, Access]] = [("deployment.proxy", deployment.deployment.proxy)]
    for group in groups:
        blocks.append((group.path, group.group))
        blocks += [(f"{group.path}.host {host}", block) for host, block in group.group.host_overrides.items()]
    for path, block in blocks:
        if block.private_key and block.password:
            yield Problem(path, "has both a private_key and a password", "keep one of them")


def _tls_problems(proxy: Proxy) -> Iterator[Problem]:
    if (proxy.tls_certificate_file is None) != (proxy.tls_key_file is None):
        certificate, key = "tls_certificate_file", "tls_key_file"
        written, missing = (certificate, key) if proxy.tls_key_file is None else (key, certificate)
        yield Problem(f"deployment.proxy.{written}", f"stands without {missing}", "write both or none")


def _length_problems(deployment: Deployment) -> Iterator[Problem]:
    """D and mixed groups serve the same requests: with other lengths, chance would decide which are refused."""
    decode, mixed, field = deployment.services.decode, deployment.services.mixed, "max_model_len"
    both = deployment.deployment.decode and deployment.deployment.mixed
    if both and field in mixed.model_fields_set and mixed.max_model_len != decode.max_model_len:
        text = f"{mixed.max_model_len} is not decode's, which is {decode.max_model_len}"
        yield Problem(f"services.mixed.{field}", text, "write the same for both")


def _device_problems(group: GroupSettings) -> Iterator[Problem]:
    if (num_workers := group.data_parallel_size * group.num_workers) > MAX_PARALLEL_SIZE:
        much = f"{num_workers} workers in one group are more than {MAX_PARALLEL_SIZE}"
        yield Problem(group.size_field, much, "write smaller sizes")
    if (text := group.layout_problem) is not None:
        mend = (
            "change data_parallel_size, tensor_parallel_size or pipeline_parallel_size, or the hosts and their devices"
        )
        yield Problem(group.size_field, text, mend)


def _shared_device_problems(groups: list[GroupSettings]) -> Iterator[Problem]:
    owners: dict[tuple[str, int], list[int]] = defaultdict(list)  # by host and device: indices of groups
    shared: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, group in enumerate(groups):
        for host in group.hosts:
            for device in group.devices(host):
                for other in owners[host, device]:
                    shared[other, index][host].append(device)
                owners[host, device].append(index)
    for (one, other), on_hosts in sorted(shared.items()):
        for host, both in on_hosts.items():
            text = f"{','.join(map(str, sorted(both)))} on {host} also in {groups[one].path}.ascend_rt_visible_devices"
            field = f"{groups[other].path}.ascend_rt_visible_devices"
            yield Problem(field, text, "give each device to one group")


def _kv_transfer_problems(settings: KvTransfer) -> Iterator[Problem]:
    path = "services.kv_transfer"
    meaningful = _MEANINGFUL.get(settings.connector, settings.model_fields_set)
    for name in KvTransfer.model_fields:
        if name in settings.model_fields_set - meaningful:
            text = f"means nothing to connector {settings.connector}"
            yield Problem(f"{path}.{name}", text, "delete it, or write connector: omni")
    if settings.connector == "nixl" and (settings.lease_s < 6 or not settings.lease_s.is_integer()):
        text = f"{settings.lease_s:g} is not a whole number of at least 6, as connector nixl wants it"
        yield Problem(f"{path}.lease_s", text, "write a number such as 30")
    if settings.connector == "omni":
        if settings.checksum and settings.transport not in CHECKSUMMED_TRANSPORTS:
            text = f"true, and transport {settings.transport} has no checksums"
            yield Problem(f"{path}.checksum", text, "write false, or another transport")
        if settings.max_lease_s < settings.lease_s:
            text = f"{settings.max_lease_s:g} is less than lease_s, which is {settings.lease_s:g}"
            yield Problem(f"{path}.max_lease_s", text, "write at least as much")

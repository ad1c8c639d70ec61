"""A rank table for people."""

from ranktable.model import RankTable

_HEADING = ("group", "rank", "server", "server ip", "device", "device ip", "super device", "super pod", "cluster")


def summary(table: RankTable, form: str) -> str:
    """ "global, 3 groups, 4 servers, 32 devices, A3, form hccl" """
    groups, devices = len(table.groups), sum(1 for _ in table.devices)
    counts = ", ".join(
        _count(*pair) for pair in ((groups, "group"), (len(table.server_ids), "server"), (devices, "device"))
    )
    return f"{table.scope}, {counts}, {'A3' if table.has_super_pods else 'A2'}, form {form}"


def text_view(table: RankTable, form: str) -> str:
    """A line for each device by group and rank, under a heading; columns that say nothing are left out."""
    rows = []
    for group in table.groups:
        name = group.group_id if group.role is None else f"{group.group_id} {group.role}"
        for server, device in group.by_rank:
            cells = (
                name, device.rank_id, server.server_id, server.server_ip, device.device_id, device.device_ip,
                device.super_device_id, server.super_pod_id, device.cluster_id,
            )  # fmt: skip
            rows.append(["" if cell is None else str(cell) for cell in cells])
    columns = [column for column in zip(_HEADING, *rows, strict=True) if not rows or any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    ]
    return "\n".join([f"{summary(table, form)}, {table.status}", *lines])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

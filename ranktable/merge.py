"""Tables of hosts become an instance's, and those of instances the global one."""

from collections.abc import Sequence
from dataclasses import replace

from ranktable.errors import Problem, TableError
from ranktable.model import Group, RankTable, Role, Server


def merge_instance(tables: Sequence[RankTable], group_id: str = "0") -> RankTable:
    """One local table with the servers of all, in the given order; ranks go on from one to the next.

    Raises TableError if one of them is a global table. Whether the outcome keeps the rules is seen when it is written.
    """
    group = replace(_group_of(tables[0]), group_id=group_id)
    servers: list[Server] = []
    first_rank = 0
    for table in tables:
        ranked = _group_of(table).by_rank
        new_ranks = {id(device): first_rank + place for place, (_, device) in enumerate(ranked)}
        for server in _group_of(table).servers:
            devices = tuple(
                replace(device, rank_id=new_ranks[id(device)], cluster_id=None) for device in server.devices
            )
            servers.append(replace(server, devices=devices))
        first_rank += len(ranked)
    return RankTable(groups=(replace(group, servers=tuple(servers)),), scope="local")


def merge_global(prefill: Sequence[RankTable], decode: Sequence[RankTable]) -> RankTable:
    """The table of a deployment: a group for each instance, prefill's first, numbered from 0. Ranks stay as they are.

    Raises TableError if one of them is a global table. Whether the outcome keeps the rules is seen when it is written.
    """
    roles: list[tuple[Role, RankTable]] = [("prefill", table) for table in prefill]
    roles += [("decode", table) for table in decode]
    groups = [
        replace(_group_of(merge_instance([table])), group_id=str(group_id), role=role, where=table.where)
        for group_id, (role, table) in enumerate(roles)
    ]
    return RankTable(groups=tuple(groups), scope="global")


def with_roles(table: RankTable, num_prefill_groups: int) -> RankTable:
    """The global table with its first groups prefill's and the others decode's.

    Raises TableError if there are no groups left for either.
    """
    if not 0 < num_prefill_groups < len(table.groups):
        what = f"{num_prefill_groups} of {len(table.groups)} groups cannot be prefill's"
        raise TableError([Problem(f"{table.where}server_group_list", what, "leave at least one for either role")])
    groups = [
        replace(group, role="prefill" if index < num_prefill_groups else "decode")
        for index, group in enumerate(table.groups)
    ]
    return replace(table, groups=tuple(groups))


def _group_of(table: RankTable) -> Group:
    if table.scope != "local":
        raise TableError([Problem(f"{table.where}server_group_list", "is of a global table", "merge local ones")])
    return table.groups[0]

"""The admin API: see the instances; add, drain and remove them, and change policies, while requests go on.

It is the same in every worker: the registry answers, wherever the request arrives.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Final

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from services.global_proxy.membership.admin_models import (
    ErrorBody,
    Instances,
    InstanceStatus,
    NewInstance,
    NewPolicy,
    Policies,
    ProxyState,
    policies_of,
)
from services.global_proxy.membership.admin_route import admin_token, route_class
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import Role
from services.global_proxy.membership.registry_client import RegistryClient

__all__ = ["admin_token", "make_admin_router"]

_METHODS: Final = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}
_DEFAULT_WAIT_S: Final = 30.0
_MAX_WAIT_S: Final = 3600.0

Name = Annotated[str, Path(description="HOST:PORT, as the list of instances has it.", max_length=512)]
WaitS = Annotated[
    float, Query(ge=0, le=_MAX_WAIT_S, allow_inf_nan=False, description="For its requests to finish, in seconds.")
]
Force = Annotated[bool, Query(description="Remove it after that time even if it has requests; they go on.")]


def make_admin_router(client: RegistryClient, table: LoadTable, token: str) -> APIRouter:
    """The routes under /admin/v1, for those who have `token` (see `admin_token`)."""
    bearer = HTTPBearer(auto_error=False, description="Made from the deployment key.")  # the route class checks it
    router = APIRouter(
        prefix="/admin/v1",
        tags=["admin"],
        route_class=route_class(token),
        dependencies=[Security(bearer)],
        responses={"default": {"model": ErrorBody, "description": "An error in OpenAI's shape."}},
    )

    @router.get("/state")
    async def state() -> ProxyState:
        """Instances, policies and load."""
        return ProxyState.of(client.state, table)

    @router.get("/instances")
    async def instances() -> Instances:
        """All instances with their load."""
        return Instances.of(client.state, table)

    @router.post("/instances", status_code=201, responses={200: {"model": InstanceStatus, "description": "Was there."}})
    async def add(new: NewInstance, response: Response) -> InstanceStatus:
        """Add an instance. One that is there already, with the same addresses, stays, and is drained no longer."""
        spec = new.spec()
        if client.state.member(spec.name) is not None:
            response.status_code = 200
        return InstanceStatus.of(await client.add(spec), table)

    @router.post("/instances/{name}/drain")
    async def drain(name: Name) -> InstanceStatus:
        """Give it nothing new. What it has goes on; `num_requests` tells how much that is."""
        return InstanceStatus.of(await client.drain(name), table)

    @router.delete("/instances/{name}", status_code=204, response_class=Response)
    async def remove(name: Name, wait_s: WaitS = _DEFAULT_WAIT_S, force: Force = False) -> None:
        """Drain it, wait until it has no requests, and remove it. 409: it has some still, and goes on draining."""
        await client.remove(name, wait_s, by_force=force)

    @router.put("/policies/{role}")
    async def set_policy(role: Role, new: NewPolicy) -> Policies:
        """Choose instances of this role by another policy from now on."""
        await client.set_policy(role, new.policy)
        return policies_of(client.state)

    _refuse_other_methods(router)
    return router


def _refuse_other_methods(router: APIRouter) -> None:
    """405 with all methods of the path: of itself, FastAPI names those of one route alone."""
    methods_of: dict[str, set[str]] = {}
    for route in router.routes:
        assert isinstance(route, APIRoute)
        methods_of.setdefault(route.path, set()).update(route.methods)
    for path, methods in methods_of.items():
        allow = ", ".join(sorted(methods))

        others = sorted(_METHODS - methods)
        router.add_api_route(path.removeprefix(router.prefix), _refusal(allow), methods=others, include_in_schema=False)


def _refusal(allow: str) -> Callable[[Request], Awaitable[None]]:
    async def refuse(request: Request) -> None:
        raise HTTPException(405, f"{request.method}: must be one of {allow}", {"allow": allow})

    return refuse

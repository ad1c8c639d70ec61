"""A request on its way through the proxy."""

from dataclasses import dataclass, field

from services.global_proxy.errors import UnreachableError, UpstreamError
from services.global_proxy.instances.instance import Instance
from services.global_proxy.observing.request_log import RequestRecord
from services.global_proxy.observing.tracing import RequestTrace
from services.global_proxy.policies.base import Prompt
from services.global_proxy.request_body import RequestBody


@dataclass(slots=True)
class Call:
    """What to send where, as the same thing under the same id on both legs; and what became of it so far.

    Attributes:
        path: as the client sent it, so D's; P's may be another (`prefill_path`).
        headers: lines that every engine gets.
        continuable: its stream can go on elsewhere if D is lost, so D is asked for token ids.
        prompt_token_ids: JSON, once P has told them; D need not tokenise again then.
        num_cached_tokens: of the prompt on P, where D is asked too early to be told, and P tells it.
        tried: instances that let this request down.
    """

    path: bytes
    body: RequestBody
    headers: bytes
    prompt: Prompt
    record: RequestRecord
    trace: RequestTrace
    prefill_path: bytes
    continuable: bool = False
    prompt_token_ids: bytes | None = None
    num_cached_tokens: int | None = None
    tried: set[Instance] = field(default_factory=set)
    _ask_again: set[Instance] = field(default_factory=set)

    def note_failure(self, error: UpstreamError) -> None:
        """Another instance is asked next; the same one, once more, if nothing came to it and there is no other."""
        if isinstance(error, UnreachableError) and error.instance not in self.tried:
            self._ask_again.add(error.instance)
        self.tried.add(error.instance)

    def take_second_chance(self, instances: tuple[Instance, ...]) -> Instance | None:
        """An instance that could not be reached and has not been asked again."""
        for instance in instances:
            if (
                instance in self._ask_again
                and instance.member.state == "active"
                and (instance.refuses or not instance.unhealthy)
            ):
                self._ask_again.discard(instance)
                return instance
        return None

"""Calls and instances without a proxy."""

from services.global_proxy.call import Call
from services.global_proxy.instances.instance import Instance
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import InstanceSpec, Member, Role
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.observing.request_log import RequestRecord
from services.global_proxy.observing.tracing import Untraced
from services.global_proxy.policies.base import Prompt
from services.global_proxy.request_body import parse_body


def make_call() -> Call:
    prompt = Prompt(num_tokens=1, max_new_tokens=1, session=None, text=b"")
    body = parse_body(b'{"prompt": "a"}', max_n=1)
    record = RequestRecord(id="id", path="/v1/completions")
    return Call(b"/v1/completions", body, b"", prompt, record, Untraced(b""), prefill_path=b"/v1/completions")


def make_instance(table: LoadTable, metrics: Metrics, slot: int = 0, role: Role = "decode") -> Instance:
    member = Member(InstanceSpec(role, f"http://h:{slot + 1}"), slot, "active", "file")
    counts = metrics.instances.add(role, member.name, slot)
    return Instance(member, table, table.writer(0), counts, connect_timeout_s=1.0)

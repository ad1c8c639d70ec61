"""The legs of a request: to P, which computes the prompt, and to D, which answers; or one to a plain engine."""

import time
from dataclasses import dataclass

import msgspec

from services.global_proxy.call import Call
from services.global_proxy.error_events import error_at, loss_in
from services.global_proxy.errors import (
    DiedError,
    EngineStatusError,
    NoInstanceError,
    NonsenseError,
    UnreachableError,
    UpstreamError,
)
from services.global_proxy.http.engine_connection import EngineAnswer
from services.global_proxy.http.reply import Header
from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.leg import Leg
from services.global_proxy.instances.pool import Pool
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.observing.tracing import Leg as TracedLeg
from services.global_proxy.prompt_of import PromptReader
from services.global_proxy.retries import RetryBudget
from services.global_proxy.short_prompts import ShortPrompts

_PATH_DISAGGREGATED = (b"x-omni-path", b"disaggregated")
_PATH_DECODE_ONLY = (b"x-omni-path", b"decode_only")
_PATH_MIXED = (b"x-omni-path", b"mixed")

NULL = msgspec.Raw(b"null")


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    prompt_token_ids: msgspec.Raw = NULL  # completions


class PrefillAnswer(msgspec.Struct):
    """What of P's answer matters."""

    kv_transfer_params: msgspec.Raw = NULL
    prompt_token_ids: msgspec.Raw = NULL  # chat
    usage: _Usage | None = None
    choices: list[_Choice] = []


_prefill_decoder = msgspec.json.Decoder(PrefillAnswer)


@dataclass(slots=True)
class Prefilled:
    """P has answered. Times are on the monotonic clock."""

    instance: Instance
    answer: EngineAnswer
    num_tokens_ahead: int  # in flight on P when this prompt was sent
    sent_s: float
    answered_s: float
    num_cached_tokens: int | None = None  # of the prompt, where P tells it


@dataclass(slots=True)
class Opened:
    """An answer of D or a plain engine that the client may have now: whole, or a stream that has begun. Close it.

    Attributes:
        leg: goes on giving the stream; None once closed.
    """

    instance: Instance
    answer: EngineAnswer
    path_header: Header
    leg: Leg | None = None
    trace: TracedLeg | None = None

    @property
    def is_good(self) -> bool:
        """D has taken the request. What its api server finds out late comes as an event after a 200."""
        head = self.answer.head
        return head.status == 200 and not (head.is_stream and error_at(self.answer.body) is not None)

    def close(self, error_reason: str | None = None) -> None:
        if self.leg is not None:
            self.leg.close()
            self.leg = None
        if self.trace is not None:
            self.trace.end(status=self.answer.head.status, error=error_reason)
            self.trace = None


class Legs:
    """Sends legs to one pool of each role."""

    def __init__(
        self,
        prefill: Pool,
        decode: Pool,
        mixed: Pool,
        prompts: PromptReader,
        short: ShortPrompts,
        retries: RetryBudget,
        metrics: Metrics,
    ) -> None:
        self.prefill_pool = prefill
        self.decode_pool = decode
        self.mixed_pool = mixed
        self._prompts = prompts
        self._retries = retries
        self._short = short
        self._metrics = metrics

    def choose(self, pool: Pool, call: Call) -> Instance:
        """Raises NoInstanceError."""
        instance = pool.choose(call.prompt, call.tried) or call.take_second_chance(pool.instances)
        if instance is None:
            raise NoInstanceError(f"No {pool.role} instance is up")
        return instance

    async def prefill(self, instance: Instance, call: Call, body: bytes) -> Prefilled:
        """P's answer: of 200, or the request's own fault. Raises UpstreamError."""
        call.record.prefill = instance.name
        call.record.decode_only = call.record.mixed = None  # if it was tried so, it failed
        prompt, num_tokens_ahead = call.prompt, instance.num_tokens
        trace = call.trace.start_leg("prefill", instance.name)
        error_reason: str | None = "aborted"
        leg = Leg(instance, prompt.num_tokens)
        policies = (self.prefill_pool.policy, self.decode_pool.policy)
        for policy in policies:
            policy.started(instance, prompt)
        try:
            answer = await leg.send(_request(instance, call.prefill_path, call, trace.headers, body))
            error_reason = None
        except UpstreamError as error:
            error_reason = error.reason
            raise
        finally:
            leg.close()
            for policy in policies:
                policy.finished(instance, prompt)
            trace.end(error=error_reason)
        if answer.head.status != 200:
            instance.succeeded()
        now_s = time.monotonic()
        self._metrics.prefill_seconds.observe(now_s - leg.sent_s)
        return Prefilled(instance, answer, num_tokens_ahead, leg.sent_s, now_s)

    def read_prefill(self, call: Call, prefilled: Prefilled) -> msgspec.Raw:
        """What P hands off; null if nothing. From here on the prompt's size is known, and its token ids if P told them.

        Raises NonsenseError.
        """
        try:
            read = _prefill_decoder.decode(prefilled.answer.body)
        except ValueError as error:
            prefilled.instance.failed(NonsenseError.reason, error)
            raise NonsenseError(prefilled.instance) from error
        prefilled.instance.succeeded()
        if read.usage is not None and read.usage.prompt_tokens:
            self._learn(call, prefilled, read.usage)
        ids = read.choices[0].prompt_token_ids if read.choices else NULL
        if ids == NULL:
            ids = read.prompt_token_ids
        if ids != NULL and call.body.takes_token_ids:
            call.prompt_token_ids = bytes(ids)
            if len(self.prefill_pool.instances) > 1:
                self.prefill_pool.policy.tokenised(call.prompt, call.prompt_token_ids)
        return read.kv_transfer_params

    def saw_handoff(self, prefilled: Prefilled) -> None:
        """D's answer to a hand-off has begun."""
        self._short.saw_handoff(time.monotonic() - prefilled.answered_s)

    async def decode(self, call: Call, body: bytes) -> Opened:
        """D's answer, or the beginning of its stream.

        A hand-off is good for one D: another is tried (the only one, once more) only if the first saw nothing of it.
        Raises UpstreamError, NoInstanceError.
        """
        failure: UpstreamError | None = None
        try:
            while True:
                try:
                    instance = self.choose(self.decode_pool, call)
                except NoInstanceError as error:
                    raise failure or error from None
                call.record.decode = instance.name
                try:
                    return await self._answer_of(instance, call, body)
                except UnreachableError as error:
                    failure = error
                    if self._only_mixed_are_left(call, instance) or not self._retries.may_retry(call, error):
                        raise
        finally:
            failure = None  # its traceback has this frame: together they would keep the body until garbage is collected

    async def decode_alone(self, call: Call, reason: str) -> Opened:
        """Have D compute the prompt too. Raises UpstreamError, NoInstanceError."""
        call.record.decode_only, call.record.mixed = reason, None
        self._metrics.decode_only.labels(reason).inc()
        opened = await self.decode(call, call.body.plain_json)
        if opened.leg is not None and opened.answer.head.is_stream:
            instance, now_s = opened.leg.instance, time.monotonic()
            if instance.takes_cost(now_s):
                instance.costs.observe_prefill(call.prompt.num_tokens, 0, now_s - opened.leg.sent_s)
        return opened

    async def mixed(self, call: Call) -> Opened:
        """Have a plain engine do all of it. Raises UpstreamError, NoInstanceError."""
        instance = self.choose(self.mixed_pool, call)
        record, prompt, policy = call.record, call.prompt, self.mixed_pool.policy
        record.prefill = record.decode = record.decode_only = None  # if it was tried so, it failed
        record.mixed = instance.name
        sample = self._cost_sample(instance, call)
        policy.started(instance, prompt)
        try:
            opened = await self._answer_of(instance, call, call.body.plain_json)
        finally:
            policy.finished(instance, prompt)
        if sample is not None and opened.leg is not None and opened.answer.head.is_stream:
            instance.costs.observe_prefill(*sample, time.monotonic() - opened.leg.sent_s)
        return opened

    def _cost_sample(self, instance: Instance, call: Call) -> tuple[int, int] | None:
        """Tokens to compute and tokens ahead of them, if what they cost can be seen and is wanted."""
        if call.body.fields.get("stream") is not True or not instance.takes_cost(time.monotonic()):
            return None
        num_cached = self.mixed_pool.policy.cached_tokens(call.prompt).get(instance.name, 0)
        return max(call.prompt.num_tokens - num_cached, 0), instance.num_tokens

    def _only_mixed_are_left(self, call: Call, lost: Instance) -> bool:
        """Whether a plain engine shall do what the last D did not: sooner than to ask that D again."""
        if not self.mixed_pool.instances:
            return False
        tried = call.tried | {lost}
        return self.mixed_pool.has_up(tried) and not self.decode_pool.has_up(tried)

    async def _answer_of(self, instance: Instance, call: Call, body: bytes) -> Opened:
        trace = call.trace.start_leg(instance.role, instance.name)
        leg = Leg(instance, call.prompt.num_tokens + call.prompt.max_new_tokens)
        try:
            if call.continuable:
                body = body[:-1] + b',"return_token_ids":true}'
            answer = await leg.send(_request(instance, call.path, call, trace.headers, body))
        except BaseException as error:
            if isinstance(error, EngineStatusError):
                error.path_header = _path_of(call)
            trace.end(error=error.reason if isinstance(error, UpstreamError) else "aborted")
            leg.close()
            raise
        if answer.head.is_stream and (loss := loss_in(answer.body)) is not None:
            trace.end(status=answer.head.status, error="died")
            leg.close()
            instance.failed(DiedError.reason, f"its engine has failed: {loss!r}")
            raise DiedError(instance)
        if not answer.head.is_stream:
            instance.succeeded()
        return Opened(instance, answer, _path_of(call), leg, trace)

    def _learn(self, call: Call, prefilled: Prefilled, usage: _Usage) -> None:
        instance = prefilled.instance
        self._prompts.learn(call.prompt, usage.prompt_tokens)
        if not call.record.continued:  # then the prompt has grown by what was sent
            call.record.prompt_tokens = usage.prompt_tokens
        details = usage.prompt_tokens_details
        prefilled.num_cached_tokens = None if details is None else details.cached_tokens
        if instance.takes_cost(prefilled.answered_s):
            num_computed = usage.prompt_tokens - (prefilled.num_cached_tokens or 0)
            seconds = prefilled.answered_s - prefilled.sent_s
            instance.costs.observe_prefill(num_computed, prefilled.num_tokens_ahead, seconds)


def _path_of(call: Call) -> Header:
    record = call.record
    if record.mixed is not None:
        return _PATH_MIXED
    return _PATH_DISAGGREGATED if record.decode_only is None else _PATH_DECODE_ONLY


def _request(instance: Instance, path: bytes, call: Call, trace_headers: bytes, body: bytes) -> bytes:
    return instance.endpoint.request(b"POST", path, call.headers + trace_headers, body)

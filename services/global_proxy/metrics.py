"""What the proxy counts. Every name starts with omni_proxy_."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The proxy's own registry, so that two proxies in one process do not share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "omni_proxy_requests",
            "Requests, by answer; 499: the client left",
            ["endpoint", "code"],
            registry=self.registry,
        )
        self.request_seconds = self._seconds("request", "From the request's headers to the answer's last byte")
        self.ttft_seconds = self._seconds("ttft", "From the request's headers to the first body byte from D")
        self.prefill_seconds = self._seconds("prefill", "Leg 1, from sending it to P to its whole answer")
        self.active_requests = Gauge(
            "omni_proxy_active_requests", "Legs in flight", ["role", "instance"], registry=self.registry
        )
        self.upstream_failures = Counter(
            "omni_proxy_upstream_failures",
            "Legs that an instance let down",
            ["role", "instance", "reason"],
            registry=self.registry,
        )
        self.decode_only = Counter(
            "omni_proxy_decode_only", "Requests that D served alone", ["reason"], registry=self.registry
        )

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"omni_proxy_{name}_seconds", text, buckets=_SECONDS, registry=self.registry)

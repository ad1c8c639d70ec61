"""The demo's request: the README's streaming curl, with its speed."""

import http.client
import json
import time
from urllib.parse import urlsplit

from rich.console import Console

from omni.deployment.errors import DeploymentError
from omni.deployment.plan_types import LaunchPlan

QUESTION = "Why is the sky blue? Answer in two sentences."
_TIMEOUT_S = 120.0


def run_demo(plan: LaunchPlan, console: Console) -> None:
    """Stream one chat completion through the proxy and print it as it comes.

    Raises:
        DeploymentError: the proxy answered with an error, or not to the end.
    """
    address = urlsplit(plan.proxy.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=_TIMEOUT_S)
    try:
        _stream(plan, connection, console)
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        raise DeploymentError(f"{plan.proxy.url} did not answer to the end: {error!r}") from error
    finally:
        connection.close()


def _stream(plan: LaunchPlan, connection: http.client.HTTPConnection, console: Console) -> None:
    body = {
        "model": plan.served_model_name,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    path = "/v1/chat/completions"
    console.print(
        f"\ncurl -N {plan.proxy.url}{path} -H 'content-type: application/json' -d '{json.dumps(body)}'\n",
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=True,
    )
    start = time.monotonic()
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise DeploymentError(f"the proxy answered {response.status}: {response.read().decode(errors='replace')}")
    arrivals: list[float] = []
    num_tokens = num_prompt_tokens = 0
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            break
        if not data:
            continue
        event = json.loads(data)
        if "error" in event:
            raise DeploymentError(f"the stream ended with an error: {event['error']}")
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
            num_prompt_tokens = event["usage"]["prompt_tokens"]
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                arrivals.append(time.monotonic())
                console.print(text, end="", markup=False, emoji=False, highlight=False, soft_wrap=True)
    else:
        raise DeploymentError("the stream ended without [DONE]")
    if len(arrivals) < 2:
        raise DeploymentError("the stream ended before two tokens had come")
    ttft_s = arrivals[0] - start
    tokens_per_s = (num_tokens - 1) / (arrivals[-1] - arrivals[0])
    console.print(
        f"\n\n{num_prompt_tokens} prompt tokens, {num_tokens} completion tokens: "
        f"TTFT {ttft_s * 1000:.0f} ms, {tokens_per_s:.1f} tokens/s"
    )

"""What the proxy is told of how many requests D can take, and what only the plan may tell it."""

from pathlib import Path
from typing import Any

import pytest

from omni.deployment.engine_command import number_of
from omni.deployment.errors import ConfigError
from omni.deployment.plan_types import LaunchPlan
from services.global_proxy.arguments import parse_arguments

from .samples import content, planned, put

FLAG = "--max-active-per-decode"
OPTION = "services/decode/extra_args"
PROXY_OPTIONS = "deployment/proxy/extra_args"


def given(plan: LaunchPlan) -> int:
    return parse_arguments(plan.proxy.arguments)[2].max_active_per_decode


@pytest.mark.parametrize(
    ("extra_args", "limit"),
    [
        ([], 64),
        (["--max-num-seqs", 16], 16),
        (["--max-num-seqs", "16"], 16),
        (["--max-num-seqs=16"], 16),
        (["--max_num_seqs", "16"], 16),
        (["--max-num-seqs", "16", "--max-num-seqs=8"], 8),
        (["--block-size", "16"], 64),
    ],
)
def test_decode_takes_as_many_requests_as_it_computes_at_once(
    tmp_path: Path, extra_args: list[Any], limit: int
) -> None:
    plan = planned(tmp_path, put(content(), OPTION, extra_args))
    assert plan.proxy.command.count(FLAG) == 1
    assert given(plan) == limit
    in_group = put(put(content(), OPTION, ["--max-num-seqs", 3]), "deployment/decode/group1/extra_args", extra_args)
    assert given(planned(tmp_path, in_group)) == limit


def test_prefill_s_limit_is_another_matter(tmp_path: Path) -> None:
    assert given(planned(tmp_path, put(content(), "services/prefill/extra_args", ["--max-num-seqs", 2]))) == 64


def test_where_groups_differ_the_sum_is_right(tmp_path: Path) -> None:
    data = put(content(decode=3), "deployment/decode/group1/extra_args", ["--max-num-seqs", "8"])
    put(data, "deployment/decode/group2/extra_args", ["--max-num-seqs", "16"])
    assert 3 * given(planned(tmp_path, data)) in range(8 + 16 + 64 - 2, 8 + 16 + 64 + 1)
    put(data, "deployment/decode/group3/extra_args", ["--max-num-seqs", "24"])
    assert given(planned(tmp_path, data)) == 16
    put(data, "deployment/decode/group1/data_parallel_size", 4)  # each rank is a D of its own
    assert given(planned(tmp_path, data)) == (4 * 8 + 16 + 24) // 6


@pytest.mark.parametrize(
    "extra_args", [[FLAG, "5"], [f"{FLAG}=5"], ["--max-active", "5"]], ids=["apart", "joined", "abbreviated"]
)
def test_what_the_user_says_wins(tmp_path: Path, extra_args: list[str]) -> None:
    plan = planned(tmp_path, put(content(), PROXY_OPTIONS, extra_args))
    assert given(plan) == 5
    assert len([part for part in plan.proxy.command if part.startswith(FLAG)]) == 1


def test_what_nobody_knows_is_not_told(tmp_path: Path) -> None:
    """Elsewhere than on a CPU vLLM chooses by the device."""
    data = put(content(decode=2), "platform", "cuda")
    assert FLAG not in planned(tmp_path, data).proxy.command
    put(data, "deployment/decode/group1/extra_args", ["--max-num-seqs", "8"])
    assert FLAG not in planned(tmp_path, data).proxy.command
    assert given(planned(tmp_path, put(data, OPTION, ["--max-num-seqs", "10"]))) == 9


@pytest.mark.parametrize("argument", ["--control-port", "--control-port=8050", "--contr"])
def test_where_engines_join_is_the_plan_s_to_say(tmp_path: Path, argument: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, put(content(), PROXY_OPTIONS, [argument, "8050"]))
    assert str(caught.value) == (
        f"deployment.proxy.extra_args: {argument!r} is set by the plan; "
        "delete it and write deployment.proxy.control_port"
    )


def test_the_proxy_s_other_arguments_are_the_user_s(tmp_path: Path) -> None:
    extra_args = ["--max-queued", "256", "--connect-timeout-s=2", "--api-keys", "-"]
    plan = planned(tmp_path, put(content(), PROXY_OPTIONS, extra_args))
    settings = parse_arguments(plan.proxy.arguments)[2]
    assert (settings.max_queued, settings.connect_timeout_s, settings.control_port) == (256, 2.0, 7001)


@pytest.mark.parametrize(
    ("extra_args", "number"),
    [
        ((), None),
        (("--max-num-seqs",), None),
        (("--max-num-seqs", "many"), None),
        (("--max-num-seqs", "0"), None),
        (("--max-num-seqs=4", "--other"), 4),
        (("--max-num-seqs", "4", "--max-num-seqs", "5"), 5),
    ],
)
def test_numbers_among_arguments(extra_args: tuple[str, ...], number: int | None) -> None:
    assert number_of(extra_args, "--max-num-seqs") == number

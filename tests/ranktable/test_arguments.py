import pytest

from ranktable.arguments import parse_arguments

GEN = ("gen", "--generation", "a2", "--server-id", "h")
GEN_A3 = ("gen", "--generation", "a3", "--server-id", "h")


@pytest.mark.parametrize(
    ("text", "devices"), [("0-3", (0, 1, 2, 3)), ("6,0-1", (6, 0, 1)), ("5-5", (5,)), ("15", (15,))]
)
def test_devices(text, devices):
    assert parse_arguments([*GEN, "--devices", text]).devices == devices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("gen",), "the following arguments are required: --generation, --server-id"),
        ((*GEN, "--devices", "3-1"), "argument --devices: '3-1' is no range of devices; write 0-7"),
        ((*GEN, "--devices", "0-4096"), "argument --devices: '0-4096' is no range of devices; write 0-7"),
        ((*GEN, "--devices", "1,1"), "argument --devices: '1,1' names a device twice"),
        ((*GEN, "--devices", "1,"), "argument --devices: '' is not a number from 0"),
        ((*GEN, "--devices", "-1"), "argument --devices: '' is not a number from 0"),
        ((*GEN, "--server-ip", "host"), "argument --server-ip: 'host' is not an IP address"),
        ((*GEN, "--group-id", " "), "--server-id and --group-id are printable text"),
        ((*GEN[:-1], "a\nb"), "--server-id and --group-id are printable text"),
        ((*GEN_A3, "--hccn-conf", "f"), "--hccn-conf is for a2"),
        ((*GEN, "--hccn-conf", "f", "--map-output", "g"), "--hccn-conf needs no other file"),
        ((*GEN, "--map-output", "f"), "give --hccn-output, too"),
        ((*GEN_A3, "--hccn-output", "f"), "--spod-output belongs to --hccn-output on a3"),
        ((*GEN, "--hccn-output", "f", "--spod-output", "g"), "--spod-output belongs to --hccn-output on a3"),
        (("merge",), "give either TABLE... of one instance, or --prefill and --decode"),
        (("merge", "a", "--prefill", "b", "--decode", "c"), "give either TABLE... of one instance, or"),
        (("merge", "--prefill", "b"), "--prefill and --decode belong together"),
        (("merge", "--prefill", "b", "--decode", "c", "--group-id", "1"), "--group-id is for one instance"),
        (("merge", "a", "--form", "vllm-ascend"), "vllm-ascend's form is for global tables"),
        (("validate",), "the following arguments are required: TABLE"),
        (("show", "a", "--prefill-groups", "1"), "--prefill-groups is for --form"),
        (("show", "a", "--form", "hccl", "--prefill-groups", "x"), "'x' is not a number from 0"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", [(), ("gen",), ("merge",), ("validate",), ("show",)])
def test_help_tells_the_exit_codes(capsys, command):
    with pytest.raises(SystemExit) as caught:
        parse_arguments([*command, "--help"])
    assert caught.value.code == 0
    assert "Exit codes: 0 all is well, 1 a table" in " ".join(capsys.readouterr().out.split())


def test_several_files_of_a_role_in_either_way():
    chosen = parse_arguments(["merge", "--prefill", "a", "b", "--decode", "c", "--prefill", "d"])
    assert [path.name for path in chosen.prefill] == ["a", "b", "d"]

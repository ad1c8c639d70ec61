import json
from dataclasses import replace
from pathlib import Path

import pytest

from ranktable.errors import TableError
from ranktable.table_file import load, render, save
from tests.ranktable.tables import a2_local, device_lists, put


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); generate it"),
        ("[]", "is not a JSON object; generate it again"),
        ("[" * 100_000, "is nested too deep for a rank table; generate it again"),
        ('{"status": "a", "status": "b"}', "is not JSON (the key 'status' stands twice in one object)"),
        ("{}", "has the keys of no known form; use those of one: server_list/server_group_list (hccl) or "),
        ('{"server_list": [], "decode_device_list": []}', "has the keys of both forms; use those of one: server_list/"),
    ],
)
def test_what_is_no_rank_table(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(TableError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TableError, match="is not JSON"):
        load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TableError) as caught:
        load(tmp_path / "a.json")
    assert str(caught.value) == f"{tmp_path}/a.json: cannot be read (No such file or directory); name a rank table"


def test_rules_can_be_left_for_later(tmp_path):
    path = put(tmp_path, "a.json", a2_local() | {"status": "initializing"})
    assert load(path, complete=False)[0].status == "initializing"


def test_the_same_table_gives_the_same_bytes(tmp_path):
    value = device_lists(super_pods=True)
    shuffled = dict(reversed(value.items()))
    texts = {render(*load(put(tmp_path, name, v))) for name, v in (("a.json", value), ("b.json", shuffled))}
    assert len(texts) == 1
    assert texts.pop().endswith("}\n")


def test_a_table_that_breaks_a_rule_is_not_written(tmp_path):
    table, form = load(put(tmp_path, "a.json", a2_local()))
    with pytest.raises(TableError, match="status: 'initializing'"):
        render(replace(table, status="initializing"), form)


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    inode = path.stat().st_ino
    save("new\n", path)
    assert path.read_text() == "new\n"
    assert path.stat().st_ino != inode
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ranktable.table_file.os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save("new", path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_engines_of_other_users_may_read_it(tmp_path):
    beside: Path = tmp_path / "plain"
    beside.write_text("")
    save(json.dumps(a2_local()), tmp_path / "a.json")
    assert (tmp_path / "a.json").stat().st_mode == beside.stat().st_mode

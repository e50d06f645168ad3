import pytest

from megatron_periln.errors import UsageError
from megatron_periln.flag_files import expand, without


def test_a_flag_file_stands_for_its_flags(tmp_path):
    (tmp_path / "a.flags").write_text("--lr 1e-3  # peak\n# a comment\n--data-path 'my data' --swiglu\n")
    expected = ["--lr", "1e-3", "--data-path", "my data", "--swiglu", "--lr", "2e-3"]
    assert expand([f"@{tmp_path}/a.flags", "--lr", "2e-3"]) == expected


def test_a_flag_file_names_others_relative_to_itself(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.flags").write_text("@c.flags --bf16")
    (tmp_path / "sub" / "c.flags").write_text("--swiglu")
    assert expand([f"@{tmp_path}/sub/b.flags"]) == ["--swiglu", "--bf16"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("--lr '1e-3", "check its quotes"), ("@self.flags", "includes itself"), ("@none.flags", "No such file")],
)
def test_a_bad_flag_file_is_named(tmp_path, text, message):
    (tmp_path / "self.flags").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        expand([f"@{tmp_path}/self.flags"])
    assert str(tmp_path) in str(caught.value)


def test_flags_are_dropped_with_their_values():
    flags = ["--a", "1", "2", "--bc", "--d=3", "--e", "-4", "--d", "5"]
    assert without(flags, ["--a", "--d"]) == ["--bc", "--e", "-4"]

import queue
from pathlib import Path

import pytest

from bestiary.tracking.messages import (
    Close,
    Done,
    Failed,
    Metrics,
    Opened,
    Reply,
    Tags,
    decode_message,
    decode_opening,
    decode_reply,
    encode,
    read_lines,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("name", ["unsent-whole-run", "unsent-interrupted-run"])
def test_messages_kept_on_disk_by_an_earlier_version_are_read_and_written_unchanged(name: str) -> None:
    first, *rest = (FIXTURES / name / "messages.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    opening = decode_opening(first)
    assert (opening.root, opening.params["seed"]) == ("/project", "1")
    assert encode(opening) == first
    assert [encode(decode_message(line)) for line in rest] == rest
    assert isinstance(decode_message(rest[-1]), Close)


@pytest.mark.parametrize("reply", [Opened("1234"), Done(), Failed("The disk is full.")])
def test_replies_survive_the_pipe(reply: Reply) -> None:
    assert decode_reply(encode(reply)) == reply


def test_a_line_that_was_cut_off_is_skipped_and_the_end_is_marked() -> None:
    inbox: queue.Queue[Metrics | Tags | object] = queue.Queue()
    whole = encode(Tags({"a": "b"}))
    read_lines([whole, "a library's warning\n", whole[:10]], decode_message, inbox)
    assert [inbox.get_nowait(), inbox.get_nowait()] == [Tags({"a": "b"}), None]
    assert inbox.empty()

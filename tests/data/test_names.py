from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.data.names import class_of, is_hostile, safe_name, safe_names

CLASSES = {"cat": "cat", "ladybugs": "ladybugs"}
HOSTILE = ["..", ".", "", "/", "\\", "C:", "con", "NUL.jpg", "a\0b", "\ud800", "‮gpj", "ÿ" * 300, "a" * 300, " .. ", "~"]

piece = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=300))
path = st.lists(piece, min_size=1, max_size=5).map("/".join)


@settings(max_examples=200, deadline=None)
@given(name=piece)
def test_a_safe_name_is_one_file_name_on_every_system(name: str) -> None:
    safe = safe_name(name)
    assert safe not in ("", ".", "..")
    assert PurePosixPath(safe).name == safe
    assert PureWindowsPath(safe).name == safe
    assert not PureWindowsPath(safe).is_reserved()
    assert len(safe.encode()) <= 200
    assert not any(ord(character) < 32 for character in safe)
    assert not safe.startswith(".")
    assert not safe.endswith((".", " "))


@settings(max_examples=100, deadline=None)
@given(paths=st.lists(path, max_size=12))
def test_safe_names_differ_even_without_letter_case(paths: list[str]) -> None:
    names = safe_names(paths)
    assert len({name.casefold() for name in names}) == len(paths)


@settings(max_examples=50, deadline=None)
@given(paths=st.lists(path, max_size=8, unique=True), order=st.randoms(use_true_random=False))
def test_safe_names_do_not_depend_on_the_order(paths: list[str], order: object) -> None:
    shuffled = list(paths)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert dict(zip(paths, safe_names(paths), strict=True)) == dict(zip(shuffled, safe_names(shuffled), strict=True))


@settings(max_examples=100, deadline=None)
@given(name=piece)
def test_a_safe_name_stays_in_its_folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert (folder / safe_name(name)).resolve().parent == folder.resolve()


def test_a_good_name_is_not_changed() -> None:
    assert safe_name("a b (1) 图.jpg") == "a b (1) 图.jpg"
    assert safe_names(["cat/a.jpg", "cat/b.jpg"]) == ["a.jpg", "b.jpg"]


def test_a_long_name_keeps_its_extension() -> None:
    assert safe_name("x" * 300 + ".jpeg").endswith(".jpeg")


def test_equal_names_and_names_that_differ_only_in_case_become_different() -> None:
    names = safe_names(["cat/A.jpg", "cat/a.jpg", "cat/a.jpg"])
    assert names[0] == "A.jpg"
    assert len({name.casefold() for name in names}) == 3
    assert all(Path(name).suffix == ".jpg" for name in names)


@pytest.mark.parametrize(
    ("member", "hostile"),
    [
        ("Animal/cat/a.jpg", False),
        ("./Animal/cat/a..b.jpg", False),
        ("../a.jpg", True),
        ("Animal/../../a.jpg", True),
        ("Animal\\..\\..\\a.jpg", True),
        ("/etc/passwd", True),
        ("\\\\server\\share\\a.jpg", True),
        ("C:\\a.jpg", True),
        ("c:a.jpg", True),
    ],
)
def test_paths_that_lead_outside_are_hostile(member: str, hostile: bool) -> None:
    assert is_hostile(member) is hostile


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("/V1/Animal/cat/a.jpg", "cat"),
        ("/V1/Animal/Animal/Cat/more/a.jpg", "cat"),
        ("Animal\\LADYBUGS\\a.jpg", "ladybugs"),
        ("/V1/Animal/dog/a.jpg", None),
        ("cat", None),
        ("/V1/cat", None),
    ],
)
def test_the_class_is_the_nearest_known_folder(member: str, expected: str | None) -> None:
    assert class_of(member, CLASSES) == expected

from pathlib import Path
from time import perf_counter

import pytest
from dvc.utils.serialize import load_yaml

from bestiary.errors import BestiaryError
from bestiary.params import load_params
from bestiary.yaml_file import read_yaml

ROOT = Path(__file__).parents[1]
WRITTEN = ["off", "yes", "1e-05", "1e5", "010", "0o10", "0x1F", "1_000", "12:30", ".5", "+1", "~", "", "5.0e-3", "'1'"]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


@pytest.mark.parametrize("value", WRITTEN)
def test_a_value_is_what_dvc_reads(written: Path, value: str) -> None:
    written.write_text(f"a: {value}\n")
    assert repr(read_yaml(written)) == repr(load_yaml(str(written)))


def test_the_projects_files_are_what_dvc_reads() -> None:
    for name in ("params.yaml", "dvc.yaml", "data.dvc"):
        assert read_yaml(ROOT / name) == load_yaml(str(ROOT / name))


def test_settings_as_people_and_dvc_write_them_are_understood(written: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    for old, new in (
        ("blank: quarantine", "blank: off"),
        ("weight_decay: 0.01", "weight_decay: 1e-05"),
        ("seed: 0", "seed: 010"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    written.write_text(text, encoding="utf-8")
    params = load_params(written)
    assert (params.clean.blank, params.train.weight_decay, params.seed) == ("off", 1e-5, 10)


def test_a_byte_order_mark_is_no_part_of_the_file(written: Path) -> None:
    written.write_bytes("a: 1".encode("utf-8-sig"))
    assert read_yaml(written) == {"a": 1}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: 1".encode("utf-16"), "is not UTF-8"),
        (b"a: 1\nb: 2\na: 3\n", r"line 3: found duplicate key \"a\""),
        (b"a: !!int abc", "invalid literal"),
        (b"a: !!python/object:os.system x", "line 1: could not determine a constructor"),
        (b"a: !mine 1", "line 1: could not determine a constructor"),
        (b"a: " + b"[" * 900 + b"]" * 900, "nested too deeply"),
        (b"a: " + b"[" * 100_000, "nested too deeply"),
        (b"a: &x [*x]", r"alias \*x has no value before it"),
        (b"a: *x", r"alias \*x has no value before it"),
        (BOMB.encode(), "holds more than 20000 values"),
        (b"a: [1,", "is not valid YAML: line 1"),
        (b"a: 1\n---\nb: 2\n", "is not valid YAML"),
        (b"a: \x00", "is not valid YAML"),
        (b"a: " + b"x" * 2**20, "larger than 1 MiB"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_read_is_one_short_sentence_at_once(written: Path, content: bytes, words: str) -> None:
    written.write_bytes(content)
    started = perf_counter()
    with pytest.raises(BestiaryError, match=words) as caught:
        read_yaml(written)
    assert perf_counter() - started < 5
    assert "params.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(written))


def test_ordinary_aliases_are_read(written: Path) -> None:
    written.write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert read_yaml(written) == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}

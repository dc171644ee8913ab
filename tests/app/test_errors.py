"""Errors that the page and the APIs show."""

from pathlib import Path

import pytest

from bestiary.app.errors import public_sentence
from bestiary.errors import BestiaryError


def test_the_log_keeps_the_path_that_users_of_the_page_do_not_see(caplog: pytest.LogCaptureFixture) -> None:
    error = BestiaryError("OpenVINO cannot compute /srv/exports/tiger/unet/openvino_model.xml. Export it again.")
    assert public_sentence(error) == "OpenVINO cannot compute openvino_model.xml. Export it again."
    assert "/srv/exports/tiger/unet/openvino_model.xml" in caplog.text


def test_the_log_has_no_line_for_an_error_without_a_path(caplog: pytest.LogCaptureFixture) -> None:
    assert public_sentence(BestiaryError("The prompt is empty.")) == "The prompt is empty."
    assert not caplog.records


@pytest.mark.parametrize("name", ["my styles", "styles (old)", "it's [a], style; x: y"])
def test_a_folder_with_spaces_or_brackets_in_its_name_is_left_out(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "new (2)"
    folder.mkdir(parents=True)
    for path, shown in ((folder / "tiger.safetensors", "tiger.safetensors"), (folder, "new (2)")):
        error = BestiaryError(f"{path} is not {folder / 'lost' / 'a.png'} (see {path}). Use models/base.")
        assert public_sentence(error) == f"{shown} is not a.png (see {shown}). Use models/base."

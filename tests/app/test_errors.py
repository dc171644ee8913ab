"""Errors that the page and the APIs show."""

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

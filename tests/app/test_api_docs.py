"""The examples of docs/api.md run, and draw what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.app import RunningPage

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def examples(language: str, server: RunningPage) -> list[str]:
    """The examples in this language, with the test's server instead of port 7860 and with few steps."""
    port = server.address.rsplit(":", 1)[1]
    return [block.replace("7860", port) for block in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)]


def test_the_examples_in_python_draw_with_the_champion(
    server: RunningPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = examples("python", server)
    assert len(found) == 2
    for example in found:
        exec(compile(example, "docs/api.md", "exec"), {})
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in told] == ["models:/bestiary/1"] * 3
    assert len({line[1] for line in told}) == 1
    assert [line[2] for line in told[:2]] == ["7", "8"]
    first, weaker = (Image.open(tmp_path / name) for name in ("tiger-0.png", "tiger-a1111.png"))
    assert first.info["parameters"].startswith("a photo of a tiger\nSteps: 5, Sampler: DDIM")  # as evaluated
    assert weaker.info["parameters"].startswith(
        "a photo of a tiger <lora:bestiary:0.8>\nSteps: 13, Sampler: DPM++ 2M SDE"
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="the example is made with curl")
def test_the_example_with_curl_gives_a_picture(
    server: RunningPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{Path('/usr/bin')}:/bin")
    example = next(each for each in examples("bash", server) if each.startswith("curl"))
    subprocess.run(["bash", "-c", example], cwd=tmp_path, check=True, timeout=120)
    with Image.open(tmp_path / "tiger.png") as picture:
        assert picture.size == (64, 64)

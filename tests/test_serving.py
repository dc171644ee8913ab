"""The READMEs' two ways to use a registered version without this package: MLflow's server, and diffusers alone."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from support.readme import READMES, commands
from support.registry import make_adapter, submit

PORT = "5001"  # the READMEs' port


@pytest.fixture
def clone(project: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the bundled base and a champion."""
    (project / "models").mkdir()
    (project / "models" / "base").symlink_to(base_folder)
    monkeypatch.chdir(project)
    submit(project, "models/base", make_adapter(base_folder, project / "adapter", 0, named_base="models/base"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return project


@pytest.fixture
def served(clone: Path) -> Iterator[str]:
    """The port on which the README's command serves the champion."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = next(line for line in commands(READMES[0]) if "mlflow models serve" in line)
    with (clone / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", command.replace(PORT, port)], stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 900  # seconds; generous, because the machine may be busy
        while server.poll() is None and time.monotonic() < deadline:
            try:
                httpx.get(f"http://127.0.0.1:{port}/ping").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        else:
            pytest.fail((clone / "server.log").read_text())
        yield port
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the README's call is made with curl")
def test_mlflow_serves_the_champion_and_the_readmes_call_gives_the_pixels_of_generate(clone: Path, served: str) -> None:
    call = next(line for line in commands(READMES[0]) if line.startswith("curl"))
    subprocess.run(["bash", "-c", call.replace(PORT, served)], check=True, timeout=900)
    command = ["bestiary", "generate", "--prompt", "a photo of a tiger", "--seed", "7"]
    subprocess.run(command, check=True, timeout=900)
    with Image.open(clone / "tiger.png") as picture, Image.open(clone / "pictures" / "prompt-7.png") as drawn:
        assert picture.format == "PNG"
        assert picture.tobytes() == drawn.tobytes()


@pytest.mark.slow
def test_the_readmes_lines_of_python_draw_with_the_champion(clone: Path) -> None:
    blocks = [re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL) for readme in READMES]
    assert blocks[0] == blocks[1]
    example = blocks[0][0]
    example += "assert pipeline.get_active_adapters()\n"
    subprocess.run([sys.executable, "-c", example], check=True, timeout=900)
    with Image.open(clone / "tiger.png") as picture:
        assert picture.size == (64, 64)
        assert len(set(picture.convert("RGB").get_flattened_data())) > 100

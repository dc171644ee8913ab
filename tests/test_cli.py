import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image
from support.registry import evaluation, make_adapter, submit

from bestiary import cli
from bestiary.diffusion.adapter import adapter_sha256, read_provenance
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.png_metadata import StartImage, read_settings, write_png
from bestiary.registry.registering import Registration
from bestiary.registry.versions import versions
from bestiary.samplers import Sampling
from bestiary.tracking import store as tracking

ROOT = Path(__file__).parents[1]
BASE = str(ROOT / "models" / "base")
BELOW_A_FILE = f"{os.devnull}/out"
CANNOT_BE_WRITTEN = "cannot be written (Not a directory). Part of this path is a file"


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-c", "from bestiary.cli import main; main()", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["bestiary", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "tiger", "--base", ""),
        ("generate", "tiger", "--adapter", ""),
        ("generate", "tiger", "--out", ""),
        ("adapter", "inspect", " "),
        ("adapter", "convert", "adapter.safetensors", ""),
        ("pull", ""),
    ],
)
def test_an_empty_name_is_an_error(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 1
    assert "It is empty. Name a file, a folder or a model." in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_file_without_permissions_or_space_is_one_sentence(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def fails() -> None:
        raise OSError(number, os.strerror(number), "photos/1.jpg")

    monkeypatch.setitem(cli.cli.commands, "fails", fails)
    assert call(monkeypatch, "fails") == 1
    sentence = capsys.readouterr().err
    assert "photos/1.jpg cannot be" in sentence
    assert sentence.count("\n") == 1


def cpu_seconds_of_children() -> float:
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return of_children.ru_utime + of_children.ru_stime


def commands() -> list[Any]:
    groups = [cli.cli, *(group for group in cli.cli.commands.values() if isinstance(group, click.Group))]
    return [cli.cli, *(command for group in groups for command in group.commands.values())]


@pytest.fixture
def workspace(project: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the bundled base and an adapter trained on it."""
    (project / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (project / "dvc.yaml").write_text("stages: {}")
    (project / "models").mkdir()
    (project / "models" / "base").symlink_to(base_folder)
    make_adapter(base_folder, project / "models" / "adapter", 0, named_base="models/base")
    monkeypatch.chdir(project)
    return project


def test_help_appears_at_once_and_loads_no_heavy_library() -> None:
    before = cpu_seconds_of_children()
    done = run("--help")
    assert cpu_seconds_of_children() - before < 0.5
    assert done.returncode == 0
    assert "generate" in done.stdout
    code = (
        "import sys; from bestiary import cli; print(sorted({'torch', 'mlflow', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"


def test_lineage_of_a_local_version_is_fast_and_does_not_import_mlflow(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(workspace, "models/base", workspace / "models" / "adapter")
    client = tracking.open_client(tracking.tracking_uri(), workspace)
    client.set_tag(versions()[0].run_id, "stage", "register")
    before = cpu_seconds_of_children()
    done = run("lineage", cwd=workspace)
    assert cpu_seconds_of_children() - before < 2.0
    assert done.stdout.startswith("models:/bestiary/1 = champion\n\nregister ")
    code = "import sys; from bestiary.registry.versions import walk; walk('models:/bestiary/1')\n"
    code += "sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=workspace, check=True)
    # A registry address of its own is read through MLflow's client, as a server is, with the same result.
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"{tracking.tracking_uri()}?")
    assert call(monkeypatch, "lineage") == 0
    assert capsys.readouterr().out == done.stdout


def test_every_command_and_option_has_help() -> None:
    for command in commands():
        assert command.help, command.name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, (command.name, parameter.name)


def test_animals_lists_a_hundred_with_their_names() -> None:
    lines = run("animals").stdout.splitlines()
    assert len(lines) == 100
    assert lines[49].split() == ["ladybugs", "ladybug", "瓢虫"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", " "], "name is empty"),
        (["generate", "tiger", "--steps", "0"], "0 is not in the range"),
        (["generate", "tiger", "--guidance-interval", "5", "1"], "the first noise level must be below the second"),
        (["generate", "tiger", "--contrast", "nan"], "nan is not a number"),
        (["generate", "--prompt", " "], "prompt is empty"),
        (["generate", "ti\udcffger"], "is not valid UTF-8"),
        (["generate"], "--prompt or --like"),
        (["generate", "--like", "no.png"], "no.png"),
        (["generate", "--prompt", "x " * 5000, "--adapter", "none", "--base", BASE], "tokens and the base reads"),
        (["generate", "tiger", "--resolution", "257", "--adapter", "none", "--base", BASE], "is not a multiple of"),
        (["generate", "tiger", "--resolution", "100", "--adapter", "none", "--base", BASE], "is not a multiple of 8"),
        (["generate", "tiger", "--size", "65x64"], "65 is not a multiple of 8 between 8 and 4096"),
        (["generate", "tiger", "--size", "64x0"], "0 is not a multiple of 8 between 8 and 4096"),
        (["generate", "tiger", "--size", "64x8192"], "8192 is not a multiple of 8 between 8 and 4096"),
        (["generate", "tiger", "--size", "64 by 64"], "64 by 64 is not a size"),
        (["generate", "tiger", "--size", "64x64", "--resolution", "64"], "--resolution and --size both set the size"),
        (["generate", "tiger", "--adapter", "no/such/folder"], "no/such/folder"),
        (["generate", "tiger", "--adapter", "no/such/folder:3"], "The weight 3 of no/such/folder is not a number"),
        (["generate", "tiger", "--adapter", "no/such:0.5"], "There is no adapter at no/such."),
        (["generate", "tiger", "--adapter", "models:/bestiary@champion"], "`dvc repro`"),
        (["generate", "tiger", "--adapter", "none", "--base", "/no/such/base"], "/no/such/base"),
        (["adapter", "verify", "no/such/file.safetensors"], "no/such/file.safetensors"),
        (["app", "--host", "0.0.0.0", "--base", BASE], "BESTIARY_AUTH"),
        (["app", "--adapter", "no/such/file", "--base", BASE], "no/such/file"),
        (["pull", "models:/bestiary/7", "--out", "x"], "`dvc repro`"),
        (["adapter", "convert", "no/such/file", "x", "--to", "kohya"], "no/such/file"),
        (["model-card", "--out", "x"], "`dvc repro`"),
        # An output that cannot be written is an error before adapters are looked for and models are loaded.
        (["generate", "tiger", "--adapter", "no/such", "--out", BELOW_A_FILE], CANNOT_BE_WRITTEN),
        (["generate", "tiger", "--adapter", "no/such", "--out", "x" * 256], "Choose a shorter name"),
        (["pull", "models:/bestiary/7", "--out", BELOW_A_FILE], CANNOT_BE_WRITTEN),
        (["model-card", "--out", BELOW_A_FILE], CANNOT_BE_WRITTEN),
        (["adapter", "merge", "no/such", "no/such/2", BELOW_A_FILE], CANNOT_BE_WRITTEN),
        (["adapter", "merge", "no/such", "no/such/2", "both.txt"], "both.txt is neither a folder nor"),
        (["adapter", "resize", "no/such", f"{BELOW_A_FILE}.safetensors", "--rank", "1"], CANNOT_BE_WRITTEN),
        (["adapter", "convert", "no/such", BELOW_A_FILE, "--to", "kohya"], CANNOT_BE_WRITTEN),
        (["export", "no/such", "--to", "openvino", "--out", f"{BELOW_A_FILE}/fast"], CANNOT_BE_WRITTEN),
        (["lineage"], "`dvc repro`"),
        (["promote", "1", "--because", " "], "--because"),
        (["results"], "`dvc repro`"),
        (["no-such-command"], "No such command"),
    ],
)
def test_a_users_mistake_ends_in_one_sentence_and_a_failure(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    (project / "mlflow.db").unlink()
    monkeypatch.chdir(project)
    assert call(monkeypatch, *arguments) == 1
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 300
    assert printed.out == ""
    assert list(project.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "tiger"],
        ["generate", "tiger", "--adapter", "none"],
        ["pull", "models:/bestiary@champion", "--out", "x"],
        ["adapter", "verify", "models:/bestiary/1"],
        ["captions"],
        ["captions", "--write"],
        ["results"],
        ["model-card", "--out", "x"],
        ["app"],
        ["lineage"],
        ["promote", "1", "--because", "it is better"],
        ["rollback", "--because", "it is worse"],
        ["tracking", "migrate", "http://127.0.0.1:9"],
    ],
    ids=" ".join,
)
def test_outside_a_project_every_command_says_where_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    for variable in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 1
    printed = capsys.readouterr().err
    assert "in the project's folder" in printed
    assert "dvc repro" not in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_picture_whatever_the_count(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adapter", "models/adapter", "--steps", "2"]
    assert call(monkeypatch, "generate", "tiger", "熊猫", "--seed", "7", "--count", "2", *options) == 0
    names = ["tiger-7.png", "tiger-8.png", "panda-7.png", "panda-8.png"]
    assert capsys.readouterr().out.split() == [f"pictures/{name}" for name in names]
    assert call(monkeypatch, "generate", "tiger", "--seed", "8", "--out", "alone", *options) == 0
    assert (workspace / "alone/tiger-8.png").read_bytes() == (workspace / "pictures/tiger-8.png").read_bytes()
    assert (
        call(monkeypatch, "generate", "tiger", "--seed", "8", "--out", "base", "--steps", "2", "--adapter", "none") == 0
    )
    assert (workspace / "base/tiger-8.png").read_bytes() != (workspace / "alone/tiger-8.png").read_bytes()


def test_an_unknown_animal_is_drawn_as_written_with_a_hint_and_a_safe_file_name(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["tigre", "🐯/../B", "🐯"]
    assert call(monkeypatch, "generate", *names, "--adapter", "none", "--steps", "1") == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [f"pictures/{name}-0.png" for name in ("tigre", "b", "picture")]
    assert "Did you mean tiger?\n" in printed.err
    assert read_settings(workspace / "pictures" / "picture-0.png").prompt == "a photo of a 🐯"


@pytest.mark.slow
def test_the_champion_draws_by_default_as_it_was_evaluated(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(workspace, "models/base", workspace / "models" / "adapter")
    assert call(monkeypatch, "generate", "tiger", "--steps", "1") == 0
    drawn = read_settings(workspace / "pictures" / "tiger-0.png")
    assert drawn.adapter == "models:/bestiary/1"
    # The version was evaluated otherwise than params.yaml says now.
    assert (drawn.prompt, drawn.sampling.guidance_scale, drawn.sampling.sampler) == (
        "a drawing of a tiger",
        3.0,
        "ddim",
    )
    assert call(monkeypatch, "generate", "tiger", "--adapter", "models:/bestiary@king", "--out", "none") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "models:/bestiary@king" in message
    assert "1 = champion" in message
    assert not (workspace / "none").exists()


def test_a_picture_can_be_drawn_again_to_the_byte(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seed", "3", "--steps", "2", "--guidance", "2.5", "--scheduler", "ddim", "--contrast", "1.5"]
    options += ["--guidance-interval", "0.3", "3", "--size", "72x64", "--negative-prompt", "a blurry photo"]
    assert call(monkeypatch, "generate", "--prompt", "a red fox", "--adapter", "models/adapter", *options) == 0
    assert call(monkeypatch, "generate", "--like", "pictures/prompt-3.png", "--out", "again") == 0
    assert (workspace / "again/prompt-3.png").read_bytes() == (workspace / "pictures/prompt-3.png").read_bytes()
    sampling = read_settings(workspace / "again/prompt-3.png").sampling
    assert sampling.guidance_interval == (0.3, 3.0)
    assert (sampling.width, sampling.height, sampling.negative_prompt) == (72, 64, "a blurry photo")
    capsys.readouterr()
    assert call(monkeypatch, "generate", "--like", "pictures/prompt-3.png", "--steps", "9", "--count", "3") == 1
    assert "Leave out --count, --steps." in capsys.readouterr().err
    (workspace / "elsewhere").mkdir()
    monkeypatch.chdir(workspace / "elsewhere")
    assert call(monkeypatch, "generate", "--like", "../pictures/prompt-3.png") == 1
    assert "was drawn with models/adapter, which is not here" in capsys.readouterr().err
    monkeypatch.chdir(workspace)
    make_adapter(workspace / "models/base", workspace / "models/adapter", 1)
    assert call(monkeypatch, "generate", "--like", "pictures/prompt-3.png", "--out", "other") == 1
    assert "made with another adapter" in capsys.readouterr().err
    assert not (workspace / "other").exists()
    printed = ["--adapter", "none", "--out", "other"]  # an adapter that the user names must be the same one, too
    assert call(monkeypatch, "generate", "--like", "pictures/prompt-3.png", *printed) == 1


def test_emphasis_is_drawn_and_drawn_again_to_the_byte(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adapter", "none", "--steps", "2", "--prompt"]
    for tagged in (["a tiger <lora:stripes:1>"], ["a tiger", "--negative-prompt", "<LORA:stripes>"]):
        assert call(monkeypatch, "generate", *options, *tagged) == 1
        assert "in a prompt chooses no adapter here" in capsys.readouterr().err
    for out, prompt in {"plain": "a tiger", "strong": "a (tiger:1.5)", "long": "a tiger, " * 15}.items():
        assert call(monkeypatch, "generate", *options, prompt, "--out", out) == 0
    plain, strong, long = (read_settings(Path(f"{out}/prompt-0.png")) for out in ("plain", "strong", "long"))
    assert (plain.a1111_prompt, strong.a1111_prompt, long.a1111_prompt) == (False, True, True)
    drawn = {Image.open(f"{out}/prompt-0.png").tobytes() for out in ("plain", "strong", "long")}
    assert len(drawn) == 3
    assert call(monkeypatch, "generate", "--like", "strong/prompt-0.png", "--out", "again") == 0
    assert Path("again/prompt-0.png").read_bytes() == Path("strong/prompt-0.png").read_bytes()
    # A picture from before emphasis existed, whose brackets were words like any others.
    Path("old.png").write_bytes(write_png(Image.new("RGB", (64, 64)), replace(strong, a1111_prompt=False)))
    assert call(monkeypatch, "generate", "--like", "old.png", "--out", "again") == 0
    assert Image.open("again/old.png").tobytes() not in drawn


def test_a_grid_is_one_picture_of_what_each_setting_draws_alone(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["tiger", "--adapter", "models/adapter", "--steps", "1", "--out", "out"]
    assert call(monkeypatch, "generate", *options, "--grid", "weight=0.5,1.5", "--grid", "seed=3,4") == 0
    assert capsys.readouterr().out == "out/tiger-0-grid.png\n"
    with Image.open("out/tiger-0-grid.png") as grid:
        assert "Seed: 3, " in grid.info["parameters"]
        assert grid.info["parameters"].endswith('Grid columns: "weight=0.5,1.5", Grid rows: "seed=3,4"')
        last = grid.crop((grid.width - 4 - 128, grid.height - 4 - 128, grid.width - 4, grid.height - 4))
    grids = [Path("out/tiger-0-grid.png").read_bytes()]
    for out, axes in (("quoted", ["weight=0.5,1.5 seed=3,4"]), ("bare", ["weight=0.5,1.5", "seed=3,4"])):
        assert call(monkeypatch, "generate", "--out", out, "--grid", *axes, *options[:-2]) == 0
        grids.append(Path(out, "tiger-0-grid.png").read_bytes())
    assert len(set(grids)) == 1
    capsys.readouterr()
    assert call(monkeypatch, "generate", *options, "--grid", "weight=1", "colour=red") == 1
    assert "colour=red is no axis" in capsys.readouterr().err.replace("'", "")
    options[2] = "models/adapter:1.5"
    assert call(monkeypatch, "generate", *options, "--seed", "4") == 0
    with Image.open("out/tiger-4.png") as alone:
        assert alone.resize((128, 128), Image.Resampling.NEAREST).tobytes() == last.tobytes()
    capsys.readouterr()
    assert call(monkeypatch, "generate", "--like", "out/tiger-4.png", "--grid", "seed=1") == 1
    assert "Leave out --grid" in capsys.readouterr().err
    assert call(monkeypatch, "generate", *options, "--seed", "4", "--grid", "seed=1") == 1
    assert "--grid sets the seed. Leave out --seed." in capsys.readouterr().err


def test_the_cell_of_a_few_step_adapter_without_weight_is_drawn_as_the_base_alone(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("models/adapter/pytorch_lora_weights.safetensors").rename("lcm-lora.safetensors")
    assert call(monkeypatch, "generate", "tiger", "--adapter", "lcm-lora.safetensors", "--grid", "weight=0,1") == 0
    assert call(monkeypatch, "generate", "tiger", "--adapter", "none") == 0
    assert call(monkeypatch, "generate", "tiger", "--adapter", "lcm-lora.safetensors", "--out", "few") == 0
    assert read_settings(Path("few/tiger-0.png")).sampling.steps == 4
    assert read_settings(Path("pictures/tiger-0.png")).sampling.steps != 4
    with Image.open("pictures/tiger-0-grid.png") as grid:
        left, top = grid.width - 2 * (128 + 4), grid.height - (128 + 4)
        cells = [grid.crop((x, top, x + 128, top + 128)) for x in (left, left + 128 + 4)]
    for cell, folder in zip(cells, ("pictures", "few"), strict=True):
        with Image.open(f"{folder}/tiger-0.png") as alone:
            assert cell.tobytes() == alone.resize((128, 128), Image.Resampling.NEAREST).tobytes()


def test_a_picture_that_starts_from_an_image_is_drawn_again_with_that_image(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.radial_gradient("L").save("photo.png")
    Image.linear_gradient("L").save("other.png")
    options = ["--adapter", "none", "--steps", "4", "--image", "photo.png"]
    assert call(monkeypatch, "generate", "tiger", *options, "--count", "2") == 0
    assert call(monkeypatch, "generate", "tiger", *options, "--seed", "1", "--out", "alone") == 0
    second = Path("pictures/tiger-1.png").read_bytes()  # starts from the photo too, not from the first picture
    assert second == Path("alone/tiger-1.png").read_bytes()
    drawn = read_settings(Path("pictures/tiger-0.png"))
    assert drawn.start == StartImage(hashlib.sha256(Path("photo.png").read_bytes()).hexdigest(), 0.5)
    again = ["generate", "--like", "pictures/tiger-0.png", "--out", "again"]
    assert call(monkeypatch, *again, "--image", "photo.png") == 0
    assert (workspace / "again/tiger-0.png").read_bytes() == (workspace / "pictures/tiger-0.png").read_bytes()
    Path("noise.png").write_bytes(write_png(Image.new("RGB", (64, 64)), replace(drawn, start=None)))
    capsys.readouterr()
    for arguments, words in (
        (again, "Give that image with --image"),
        ([*again, "--image", "other.png"], "other.png is not the image that the picture started from"),
        (["generate", "--like", "noise.png", "--image", "photo.png"], "is not used"),
        ([*again, "--image", "photo.png", "--denoise", "0.7"], "Leave out --denoise"),
        (["generate", "tiger", "--denoise", "0.7"], "Name one with --image"),
        (["generate", "tiger", "--image", "params.yaml"], "params.yaml cannot be read as an image"),
        (["generate", "tiger", "--image", "no.png"], "The image no.png does not exist"),
        (["generate", "tiger", "--image", "photo.png", "--denoise", "0"], "0.0 is not in the range"),
    ):
        assert call(monkeypatch, *arguments) in (1, 2)
        assert words in capsys.readouterr().err


def test_weight_0_draws_the_bases_pixels_and_weight_1_todays_file(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = {"base": "none", "0": "models/adapter:0", "half": "models/adapter:0.5", "1": "models/adapter:1"}
    for out, what in (adapters | {"today": "models/adapter"}).items():
        assert call(monkeypatch, "generate", "tiger", "--steps", "2", "--adapter", what, "--out", out) == 0
    pixels = {}
    for out in ("base", "0", "half", "1"):
        with Image.open(workspace / out / "tiger-0.png") as image:
            pixels[out] = image.tobytes()
    assert pixels["0"] == pixels["base"]
    assert len(set(pixels.values())) == 3
    assert (workspace / "1/tiger-0.png").read_bytes() == (workspace / "today/tiger-0.png").read_bytes()
    assert call(monkeypatch, "generate", "--like", "half/tiger-0.png", "--out", "again") == 0
    assert (workspace / "again/tiger-0.png").read_bytes() == (workspace / "half/tiger-0.png").read_bytes()
    assert call(monkeypatch, "generate", "--like", "half/tiger-0.png", "--adapter", "models/adapter:1") == 1
    assert "Leave out :1 after --adapter" in capsys.readouterr().err


def test_several_adapters_draw_together_and_are_drawn_again_to_the_byte(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(workspace / "models" / "base", workspace / "stripes", 1, named_base="models/base")
    for out, adapters in {
        "alone": ["models/adapter"],
        "one-zero": ["models/adapter:1", "stripes:0"],
        "both": ["models/adapter:0.8", "stripes:0.5"],
    }.items():
        options = [option for what in adapters for option in ("--adapter", what)]
        assert call(monkeypatch, "generate", "tiger", "--steps", "2", "--out", out, *options) == 0
    with Image.open("alone/tiger-0.png") as alone, Image.open("one-zero/tiger-0.png") as one_zero:
        assert alone.tobytes() == one_zero.tobytes()
    drawn = read_settings(Path("both/tiger-0.png"))
    hashes = [adapter_sha256(path) for path in ("models/adapter", "stripes")]
    assert [(each.adapter, each.adapter_sha256, each.weight) for each in drawn.adapters] == [
        ("models/adapter", hashes[0], 0.8),
        ("stripes", hashes[1], 0.5),
    ]
    assert call(monkeypatch, "generate", "--like", "both/tiger-0.png", "--out", "again") == 0
    assert (workspace / "again/tiger-0.png").read_bytes() == (workspace / "both/tiger-0.png").read_bytes()
    assert call(monkeypatch, "generate", "--like", "both/tiger-0.png", "--adapter", "models/adapter") == 1
    assert "made with another adapter than models/adapter" in capsys.readouterr().err
    for second, words in (("none", "none stands for no adapter"), ("./models/adapter", "are the same adapter")):
        assert call(monkeypatch, "generate", "tiger", "--adapter", "models/adapter", "--adapter", second) == 1
        assert words in capsys.readouterr().err


def test_a_few_step_adapter_draws_as_it_was_distilled_with_a_style_adapter_too(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = Sampling("lcm", steps=2, guidance_scale=1.0, timesteps=(999, 699))
    make_adapter(workspace / "models" / "base", workspace / "fast", 1, named_base="models/base")
    file = workspace / "fast" / "pytorch_lora_weights.safetensors"
    file.write_bytes(replace(read_adapter(file), few_step=sampling).to_bytes())
    options = ["--adapter", "models/adapter", "--adapter", "fast"]
    assert call(monkeypatch, "generate", "tiger", *options, "--out", "out") == 0
    drawn = read_settings(Path("out/tiger-0.png"))
    assert drawn.sampling == replace(sampling, width=64, height=64)
    assert call(monkeypatch, "generate", "--like", "out/tiger-0.png", "--out", "again") == 0
    assert Path("again/tiger-0.png").read_bytes() == Path("out/tiger-0.png").read_bytes()
    capsys.readouterr()
    for option, value, words in (
        ("--steps", "4", "was distilled for 2 steps, not for 4. Draw with 2 steps."),
        (
            "--guidance",
            "7",
            "was distilled for 2 steps without guidance, not for guidance scale 7. Draw with guidance scale 1.",
        ),
    ):
        assert call(monkeypatch, "generate", "tiger", "--adapter", "fast", option, value) == 1
        assert words in capsys.readouterr().err
    assert not list(workspace.glob("pictures/*"))
    assert call(monkeypatch, "adapter", "convert", "fast", "kohya.safetensors", "--to", "kohya") == 0
    assert read_adapter(workspace / "kohya.safetensors").few_step == sampling


def test_an_adapter_for_another_base_of_the_same_shape_is_refused_unless_the_base_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = shutil.copytree(workspace / "models" / "base", workspace / "changed")
    (changed / "scheduler" / "scheduler_config.json").write_text("{}")
    (workspace / "models" / "base").unlink()
    (workspace / "models" / "base").symlink_to(changed)
    options = ["--adapter", "models/adapter", "--steps", "1"]
    assert call(monkeypatch, "generate", "tiger", *options) == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("models/adapter was trained on another base than ")
    assert "on models/base with the SHA-256" in printed
    assert not (workspace / "pictures").exists()
    assert call(monkeypatch, "generate", "tiger", *options, "--base", "models/base") == 0


def test_another_picture_of_the_same_name_is_kept(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "pictures").mkdir()
    (workspace / "pictures" / "tiger-0.png").write_bytes(b"mine")
    options = ["--adapter", "models/adapter", "--steps", "1"]
    assert call(monkeypatch, "generate", "tiger", *options) == 0
    assert call(monkeypatch, "generate", "tiger", *options) == 0
    assert capsys.readouterr().out.split() == ["pictures/tiger-0-2.png"] * 2
    assert (workspace / "pictures" / "tiger-0.png").read_bytes() == b"mine"
    (workspace / "pictures" / "owl-0.png").mkdir()
    assert call(monkeypatch, "generate", "owl", *options) == 0
    assert capsys.readouterr().out.split() == ["pictures/owl-0-2.png"]


def test_a_full_disk_ends_in_one_sentence_and_leaves_no_half_picture(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert call(monkeypatch, "generate", "tiger", "--adapter", "none", "--steps", "1") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "pictures/tiger-0.png cannot be written (No space left on device). Free space on its disk, then try again."
    )
    assert list((workspace / "pictures").iterdir()) == []


def test_an_animal_named_twice_is_drawn_once(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "generate", "tiger", "老虎", "--adapter", "none", "--steps", "1", "--count", "2") == 0
    assert capsys.readouterr().out.split() == ["pictures/tiger-0.png", "pictures/tiger-1.png"]


def test_an_output_folder_that_is_a_file_is_refused_before_drawing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adapter", "none", "--steps", "1", "--out", "params.yaml"]
    assert call(monkeypatch, "generate", "tiger", *options) == 1
    assert "params.yaml' is a file" in capsys.readouterr().err


def test_verify_prints_what_it_proved(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "adapter", "verify", "models/adapter") == 0
    printed = capsys.readouterr().out
    assert "rank, alpha                      2, 4" in printed
    assert "trained on this base             yes" in printed
    assert re.search(r"^modules {26}(\d+) of \1 modules: \1 of the UNet$", printed, re.MULTILINE)


def test_inspect_shows_what_a_file_holds_and_what_would_be_applied_of_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    def rows(path: str) -> dict[str, str]:
        assert call(monkeypatch, "adapter", "inspect", path, "--base", "models/base") == 0
        printed = capsys.readouterr().out.splitlines()
        return {line[:32].rstrip(): line[33:] for line in printed}

    assert call(monkeypatch, "adapter", "convert", "models/adapter", "kohya.safetensors", "--to", "kohya") == 0
    weights = load_file(workspace / "kohya.safetensors")
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    weights |= {f"{text}.lora_down.weight": torch.ones(8, 128), f"{text}.lora_up.weight": torch.ones(384, 8)}
    weights[f"{text}.alpha"] = torch.tensor(4.0)
    metadata = {"ss_steps": "1200", "ss_output_name": "Hyper-SD15-8steps \x1b[31m", "ss_a": "x" * 1000}
    save_file({key: value.half() for key, value in weights.items()}, workspace / "kohya.safetensors", metadata)
    count = sum("lora_unet" in key and "lora_up" in key for key in weights)
    capsys.readouterr()
    shown = rows("kohya.safetensors")
    assert shown["family"] == "Stable Diffusion 1.x or 2.x, by its names"
    assert shown["tensors"] == f"{3 * count + 3} in float16"
    assert shown["UNet"] == f"{count} modules: LoRA"
    assert shown["text encoder"] == "1 module: LoRA"
    assert shown["ranks"] == f"2 ({count}), 8 (1)"
    assert shown["few-step adapter"] == "8 steps of the sampler ddim-trailing, no guidance"
    assert shown["ss_steps"] == "1200"
    assert shown["ss_output_name"] == r"Hyper-SD15-8steps \x1b[31m"
    assert shown["other metadata"] == "ss_a"
    assert shown["base"].endswith("models/base")
    by_part = f"{count} of the UNet, 1 of the text encoder"
    assert shown["would be applied"] == f"{count + 1} of {count + 1} modules: {by_part}"

    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)}, workspace / "x.safetensors"
    )
    shown = rows("x.safetensors")
    assert shown["family"] == "FLUX"
    assert shown["would be applied"] == "nothing. This adapter is for FLUX; this base is Stable Diffusion 1.x."


def test_drawing_with_a_file_says_what_was_applied(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "generate", "tiger", "--steps", "1", "--adapter", "models/adapter") == 0
    said = capsys.readouterr().err
    assert re.search(r"^models/adapter: applied (\d+) of \1 modules: \1 of the UNet\.$", said, re.MULTILINE)


def test_two_adapters_merge_into_one_file_and_a_lower_rank_prints_its_error(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(workspace / "models" / "base", workspace / "stripes", 1, named_base="models/base")
    assert call(monkeypatch, "adapter", "merge", "models/adapter:0.7", "stripes:0.5", "both.safetensors") == 0
    printed = capsys.readouterr().out
    assert re.match(r"both\.safetensors: rank 4, \d+ weights in place, sha256 [0-9a-f]{64}\n$", printed)
    assert call(monkeypatch, "adapter", "resize", "both.safetensors", "small", "--rank", "3") == 0
    assert re.search(r"rank 3, .*\nerror \d+\.\d\d% of the change, at most \d", capsys.readouterr().out)
    made_from = read_provenance("small").model_extra or {}
    assert made_from["merged_from"] == [
        {"adapter": "both.safetensors", "adapter_sha256": adapter_sha256("both.safetensors"), "weight": 1.0}
    ]
    assert call(monkeypatch, "adapter", "merge", "none", "out") == 1
    assert "none is no adapter" in capsys.readouterr().err


def test_a_truncated_adapter_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = next((workspace / "models" / "adapter").iterdir()).read_bytes()
    (workspace / "broken.safetensors").write_bytes(whole[: len(whole) // 2])
    assert call(monkeypatch, "adapter", "verify", "broken.safetensors") == 1
    assert "is not a readable safetensors file" in capsys.readouterr().err


def test_results_show_the_table_the_sheet_and_the_next_commands(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report: dict[str, Any] = evaluation("0123").results() | {"images": 480}
    for who in ("base", "adapter", "delta"):
        report[who] |= {"top5": report[who]["top1"], "cmmd": report[who]["clip_score"]}
    report["real"] = report["adapter"]
    reasons = ["It beats the base: margin over other subjects +5.00 (95 % interval +4.00 to +6.00)."]
    registration = Registration("bestiary", 3, ["champion"], "0123", "champion", reasons)
    (project / "reports" / "results").mkdir(parents=True)
    (project / "reports" / "results" / "evaluate.json").write_text(json.dumps(report))
    (project / "reports" / "results" / "register.json").write_text(json.dumps(asdict(registration)))
    (project / "dvc.yaml").write_text("")
    monkeypatch.chdir(project)
    assert call(monkeypatch, "results") == 0
    printed = capsys.readouterr().out
    assert re.search(r"CLIP score +20\.00 +25\.00 +\+5\.00 +\+4\.00 to \+6\.00", printed)
    assert "reports/evaluate/sheet.png" in printed
    assert "models:/bestiary/3 (champion)" in printed
    assert printed.count("Next") == 1
    assert "generate tiger --count 4" in printed  # panda was not taught


HALF_AN_INTERVAL = json.dumps(
    {"images": 4} | {who: {"clip_score": {"mean": 1.0, "ci95": [1.0]}} for who in ("base", "adapter", "delta", "real")}
)


@pytest.mark.parametrize("content", ["<<<<<<< HEAD", "{}", "[]", HALF_AN_INTERVAL])
def test_a_damaged_report_is_named_and_how_to_make_it_again(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (project / "reports" / "results").mkdir(parents=True)
    for stage in ("evaluate", "register"):
        (project / "reports" / "results" / f"{stage}.json").write_text(content)
    (project / "dvc.yaml").write_text("")
    monkeypatch.chdir(project)
    assert call(monkeypatch, "results") == 1
    printed = capsys.readouterr()
    assert "reports/results/evaluate.json" in printed.err
    assert "`dvc repro`" in printed.err
    assert printed.out == ""


def test_commands_use_the_registered_name_of_the_parameters(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "params.yaml").read_text()
    (workspace / "params.yaml").write_text(
        text.replace("name: bestiary ", "name: zoo ").replace("name: bestiary\n", "name: zoo\n")
    )
    submit(workspace, "models/base", workspace / "models" / "adapter", name="zoo")
    assert call(monkeypatch, "promote", "1", "--because", "its owls") == 0
    assert "models:/zoo/1" in capsys.readouterr().out
    assert call(monkeypatch, "generate", "tiger", "--steps", "1") == 0
    assert read_settings(workspace / "pictures" / "tiger-0.png").adapter == "models:/zoo/1"


def test_a_hostile_adapter_is_refused_within_a_second_without_loading_torch(tmp_path: Path) -> None:
    settings = json.dumps({"unet.target_modules": ["x"] * 1_000_000})
    header = json.dumps({"__metadata__": {"lora_adapter_metadata": settings}}).encode()
    (tmp_path / "many.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for words in (["verify"], ["convert", "--to", "kohya"]):
        target = [str(tmp_path / "out")] if "convert" in words else []
        before = cpu_seconds_of_children()
        done = run("adapter", words[0], str(tmp_path / "many.safetensors"), *target, *words[1:])
        assert cpu_seconds_of_children() - before < 1
        assert done.returncode == 1
        assert "lora_adapter_metadata in its metadata is over the limit of 1 MiB" in done.stderr


def test_what_was_assumed_about_an_alpha_is_said(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(workspace / "models" / "adapter" / "pytorch_lora_weights.safetensors")
    old = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value for key, value in weights.items()}
    torch.save(old, workspace / "old.bin")
    assert call(monkeypatch, "adapter", "convert", "old.bin", "new", "--to", "diffusers") == 0
    assert "The alpha 2 was assumed: diffusers' training scripts" in capsys.readouterr().err
    assert call(monkeypatch, "adapter", "verify", "old.bin", "--base", "models/base") == 0
    assert "2, 2 (diffusers' training scripts store no alpha when it is the rank, 2)" in capsys.readouterr().out
    assert call(monkeypatch, "generate", "tiger", "--adapter", "old.bin", "--base", "models/base", "--steps", "1") == 0
    assert "old.bin: the alpha 2 was assumed" in capsys.readouterr().err


def test_a_picture_that_names_an_endless_adapter_with_control_characters_is_one_short_sentence(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "generate", "--prompt", "a fox", "--adapter", "none", "--steps", "1") == 0
    picture = workspace / "pictures" / "prompt-0.png"
    settings = replace(read_settings(picture), adapter="\x1b]0;owned\x07" + "x" * 5000, adapter_sha256="0" * 64)
    with Image.open(picture) as image:
        picture.write_bytes(write_png(image, settings))
    capsys.readouterr()
    assert call(monkeypatch, "generate", "--like", str(picture)) == 1
    sentence = capsys.readouterr().err.removesuffix("\n")
    assert sentence.isprintable()
    assert len(sentence) < 400

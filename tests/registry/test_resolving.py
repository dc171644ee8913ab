import shutil
from pathlib import Path
from threading import Event

import pytest
from support.registry import make_adapter, submit

from bestiary.app.errors import RefusedError, public_sentence
from bestiary.app.events import Failed
from bestiary.app.offers import Offerings
from bestiary.app.orders import Order
from bestiary.app.studio import Studio
from bestiary.errors import BestiaryError
from bestiary.generation import Base
from bestiary.registry.resolving import Adapter, find_base, needs_mlflow, pull, resolve
from bestiary.tracking.store import open_client, tracking_uri


def test_pull_from_another_folder_of_the_project_gives_the_same_bytes(
    project: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_folder, project / "models" / "base")
    (project / "dvc.yaml").write_text("stages: {}")
    adapter = make_adapter(project / "models" / "base", project / "models" / "adapter", 0, named_base="models/base")
    monkeypatch.chdir(project)
    submit(project, "models/base", adapter)
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    file = pull("models:/bestiary@champion", Path("mine"))
    assert file.read_bytes() == (adapter / file.name).read_bytes()


def test_a_base_that_is_missing_is_named_and_can_be_given(
    project: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_folder, project / "models" / "base")
    adapter = make_adapter(base_folder, project / "adapter", 0)
    monkeypatch.chdir(project)
    submit(project, "models/base", adapter)
    (project / "models" / "base").rename(project / "moved")
    with pytest.raises(BestiaryError, match=r"\./models/base .*models:/bestiary/1.* --base"):
        pull("models:/bestiary@champion", project / "out")
    assert not (project / "out").exists()
    assert pull("models:/bestiary@champion", project / "out", base=str(project / "moved")).is_file()


def test_an_adapter_that_names_no_base_needs_one(tmp_path: Path) -> None:
    adapter = Adapter(tmp_path / "x.safetensors", "x.safetensors", None, None, None)
    with pytest.raises(BestiaryError, match=r"x\.safetensors .* --base"):
        find_base(adapter)
    assert find_base(adapter, "someone/base") == "someone/base"


def test_a_file_that_changed_in_the_registry_is_refused(project: Path, base_folder: Path, adapters: list[Path]) -> None:
    submit(project, base_folder, adapters[0])
    file = resolve("models:/bestiary/1").file
    file.chmod(0o644)
    file.write_bytes((adapters[1] / file.name).read_bytes())
    with pytest.raises(BestiaryError, match=rf"models:/bestiary/1 has changed .*{file.name}"):
        resolve("models:/bestiary/1")


def test_the_page_names_a_changed_or_lost_file_of_the_registry_without_its_path(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0])
    file = resolve("models:/bestiary/1").file

    def refusal() -> str:
        studio = Studio(Offerings(bases=(Base(str(base_folder)),), adapters=()))
        order = Order(
            adapter="models:/bestiary/1", animal="tiger", steps=1, guidance_scale=1.0, scheduler="ddim", seed=0
        )
        with pytest.raises(BestiaryError) as refused:
            list(studio.draw(order, lambda _: None, Event()))
        return str(refused.value)

    file.chmod(0o644)
    file.write_bytes((adapters[1] / file.name).read_bytes())
    assert refusal().startswith(
        f"The file of models:/bestiary/1 has changed since it was registered: {file.name}. If it is the adapter in "
        "models/adapter, `dvc repro"
    )
    shutil.rmtree(file.parent)
    assert refusal().startswith(
        "The registry has lost the file of models:/bestiary/1: adapter_weights does not exist. If it is the adapter in "
        "models/adapter, `dvc repro"
    )


def test_errors_reach_the_page_and_programs_without_the_servers_folders(tmp_path: Path) -> None:
    (tmp_path / "x y").mkdir()
    lost = BestiaryError(f"{tmp_path}/x y/z is lost.")
    sent = RefusedError("key", "{name}", name="/a/b.png")  # what the user sent stays as it is
    for error, expected in ((lost, "z is lost."), (sent, "/a/b.png")):
        assert Failed.by(error).message == public_sentence(error) == expected


def test_resolving_without_a_registry_creates_nothing_and_names_the_command_that_does(project: Path) -> None:
    (project / "mlflow.db").unlink()
    with pytest.raises(BestiaryError, match=r"no registry yet.*`dvc repro`"):
        resolve("models:/bestiary@champion")
    assert list(project.iterdir()) == []


def test_only_a_registry_on_a_server_needs_mlflow(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not needs_mlflow("models:/bestiary@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert needs_mlflow("models:/bestiary@champion")
    assert not needs_mlflow("models/adapter")


@pytest.mark.parametrize("tag", ["adapter_sha256", "base", "base_sha256"])
def test_a_tag_that_is_missing_is_named(project: Path, base_folder: Path, adapters: list[Path], tag: str) -> None:
    submit(project, base_folder, adapters[0])
    open_client(tracking_uri(), project).delete_model_version_tag("bestiary", "1", tag)
    with pytest.raises(BestiaryError, match=f"models:/bestiary/1 has no tag {tag}"):
        resolve("models:/bestiary/1")


def test_a_changed_tag_does_not_fetch_another_base(
    project: Path, base_folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(project, base_folder, adapters[0])
    open_client(tracking_uri(), project).set_model_version_tag("bestiary", "1", "base", "evil/repo")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(BestiaryError, match=r"models:/bestiary/1 names the base evil/repo.*--base evil/repo"):
        pull("models:/bestiary/1", project / "out")
    assert find_base(resolve("models:/bestiary/1"), known=["evil/repo"]) == "evil/repo"


def test_pulling_pefts_adapter_takes_its_config_along(base_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_adapter(base_folder, tmp_path / "adapter", 0)
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    (tmp_path / "peft").mkdir()
    save_file(
        {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in weights.items()},
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    (tmp_path / "peft" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    pulled = pull(str(tmp_path / "peft"), tmp_path / "mine", base=str(base_folder))
    assert pulled.with_name("adapter_config.json").read_text() == '{"r": 2, "lora_alpha": 4}'


def test_a_base_name_of_5000_characters_is_one_short_sentence(tmp_path: Path) -> None:
    adapter = Adapter(tmp_path / "x.safetensors", "x.safetensors", "x/" * 2500, None, None)
    with pytest.raises(BestiaryError, match="does not exist here") as raised:
        find_base(adapter)
    assert len(str(raised.value)) < 500

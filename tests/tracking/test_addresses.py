from pathlib import Path

import pytest
from support.example_runs import one_run, stored_runs

from bestiary.errors import BestiaryError
from bestiary.tracking.addresses import local_path, location_of, shown_address, sqlite_path, sqlite_uri, without_secrets
from bestiary.tracking.store import explain, registry_uri, tracking_uri

ODD_NAMES = ["cats%20and%20dogs", "50% off", "what?", "no#1", "a b", "猫", "it's", "100%"]
# A library may split some of these elsewhere than others do, and then print a part of the password.
ODD_ADDRESSES = [
    "https://ada:s3cr/et-w0rd@mlflow.example.org",
    "https://ada:s3cr@et-w0rd@mlflow.example.org",
    "https://ada:s3cr#et-w0rd@mlflow.example.org",
    "https://ada:s3cr?et-w0rd@mlflow.example.org:5000",
    "https://ada:s3cr et-w0rd@mlflow.example.org",
    "https://ada:s3cr\\et-w0rd@mlflow.example.org",
    "https://ada:s3cr:et-w0rd@mlflow.example.org:port",
    "https:/ada:s3cr-et-w0rd@mlflow.example.org",
    "https:ada:s3cr-et-w0rd@mlflow.example.org",
    "ada:s3cr-et-w0rd@mlflow.example.org:5000",
    "HTTPS://ada:s3cr-et-w0rd@mlflow.example.org",
    "https://s3cr-et-w0rd@mlflow.example.org",
    "https://ada:s3cr%2Fet-w0rd@mlflow.example.org",
    "https://mlflow.example.org/?token=s3cr-et-w0rd",
    "postgresql+psycopg2://ada:s3cr/et-w0rd@db.example.org/mlflow",
    "https://[ada:s3cr-et-w0rd@mlflow.example.org",
]


@pytest.mark.parametrize("address", ODD_ADDRESSES)
def test_a_password_is_in_no_message_however_odd_its_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [shown_address(address), explain(ConnectionError(f"Failed to parse {address}: port 's3cr'"), address)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    try:
        messages.append(shown_address(tracking_uri()))
    except BestiaryError as error:
        messages.append(str(error))
    for message in messages:
        assert "s3cr" not in message
        assert "w0rd" not in message
    assert "example.org" in messages[0]


def test_secrets_in_the_environment_are_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    assert without_secrets("401 for ada:s3cret") == "401 for ada:***"


def test_an_address_that_libraries_read_differently_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "https://ada:s3c/ret@mlflow.example.org")
    with pytest.raises(BestiaryError, match="MLFLOW_REGISTRY_URI is not a valid address"):
        registry_uri()


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("sqlite:///mlflow.db", "mlflow.db"),
        ("sqlite:///./runs/mlflow.db", "runs/mlflow.db"),
        ("sqlite:///mlflow.db?timeout=10", "mlflow.db"),
        ("sqlite:////elsewhere/mlflow.db", "/elsewhere/mlflow.db"),
        ("mlruns", "mlruns"),
        ("./mlruns", "mlruns"),
        ("file:mlruns", "mlruns"),
        ("file:///elsewhere/mlruns", "/elsewhere/mlruns"),
    ],
)
def test_relative_addresses_are_read_from_the_projects_folder_wherever_a_command_runs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, read in (("MLFLOW_TRACKING_URI", tracking_uri), ("MLFLOW_REGISTRY_URI", registry_uri)):
        monkeypatch.setenv(variable, address)
        assert (sqlite_path(read()) or local_path(read())) == project / path


@pytest.mark.parametrize("name", ODD_NAMES)
def test_addresses_of_folders_with_odd_names_lead_back_to_them(name: str) -> None:
    path = Path("/somewhere", name, "mlflow.db")
    assert sqlite_path(sqlite_uri(path)) == path
    assert local_path(location_of(path)) == path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cats%20and%20dogs", "what? no#1"])
def test_a_project_in_a_folder_with_an_odd_name_is_recorded_there(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    project = project.rename(tmp_path / name)
    (project / "mlflow.db").unlink()
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.chdir(project)
    Path("note.txt").write_text("x")
    with one_run() as run:
        run.log_artifact("note.txt")
    (stored,) = stored_runs(project, "split")
    assert stored.info.status == "FINISHED"
    assert (project / "mlruns" / stored.info.run_id / "artifacts" / "note.txt").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert sorted(path.name for path in project.iterdir()) == [
        ".cache", "mlflow.db", "mlflow.db.lock", "mlruns", "note.txt",
    ]  # fmt: skip

import errno
import shutil
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.example_runs import one_run, stored_runs

from bestiary.tracking.addresses import sqlite_uri
from bestiary.tracking.content import content_hash
from bestiary.tracking.messages import Artifact, Close, decode_opening
from bestiary.tracking.outbox import keep, send
from bestiary.tracking.recorder import write_run
from bestiary.tracking.store import open_client, tracking_uri

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.slow
def test_a_run_that_cannot_be_sent_is_kept_and_sent_by_the_next_run(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"first")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # no server listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a second one would wait four seconds
    content = content_hash(picture)
    with one_run(key="lost", inputs=[str(picture)]) as run:
        run.log_metrics({"loss": 0.5})
        run.log_artifact(picture)
    printed = capsys.readouterr().err
    assert "http://127.0.0.1:9 cannot be reached" in printed
    assert str(project / "mlruns" / "unsent") in printed
    picture.write_bytes(b"changed since")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with one_run(key="next"):
        pass
    (sent,) = [run for run in stored_runs(project, "split") if run.data.tags["pipeline"] == "lost"]
    assert sent.info.status == "FINISHED"
    assert sent.data.metrics == {"loss": 0.5}
    assert sent.data.tags[f"input.{picture}"] == content
    assert (project / "mlruns" / sent.info.run_id / "artifacts" / "picture.png").read_bytes() == b"first"
    assert list((project / "mlruns" / "unsent").iterdir()) == []


@pytest.mark.slow
def test_a_run_that_loses_mlflow_halfway_is_kept_and_resumed_as_the_same_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = sqlite3.connect(project / "mlflow.db", isolation_level=None, timeout=30)
    with one_run(key="lost") as run:
        run_id = run.id
        holder.execute("BEGIN EXCLUSIVE")
        run.log_metrics({"loss": 0.5})
    holder.close()
    assert str(project / "mlruns" / "unsent") in capsys.readouterr().err
    with one_run(key="next"):
        pass
    (sent,) = [run for run in stored_runs(project, "split") if run.data.tags["pipeline"] == "lost"]
    assert (sent.info.run_id, sent.info.status) == (run_id, "FINISHED")
    assert "error" not in sent.data.tags
    assert sent.data.metrics["loss"] == 0.5


def test_an_unsent_run_that_cannot_be_read_does_not_stop_the_next_run(project: Path) -> None:
    broken = project / "mlruns" / "unsent" / "broken"
    broken.mkdir(parents=True)
    (broken / "messages.jsonl").write_text("{}\n")
    with one_run():
        pass
    assert stored_runs(project, "split")[0].info.status == "FINISHED"
    assert broken.is_dir()


def test_unsent_runs_of_an_earlier_version_are_sent(project: Path) -> None:
    # A version from before messages had types kept both runs, in a project at /project. MLflow already had the second.
    unsent = project / "mlruns" / "unsent"
    for name, folder in (("unsent-whole-run", "81268be57b3d4b2aa8ef804bd652c805"), ("unsent-interrupted-run", "later")):
        messages = (FIXTURES / name / "messages.jsonl").read_text(encoding="utf-8")
        shutil.copytree(FIXTURES / name, unsent / folder)
        (unsent / folder / "messages.jsonl").write_text(messages.replace("/project", str(project)), encoding="utf-8")
    with one_run(key="next"):
        pass
    (split,) = [run for run in stored_runs(project, "split") if run.data.tags["pipeline"] == "kept"]
    assert split.info.status == "FINISHED"
    assert split.info.start_time == 1795678725843
    assert split.data.params == {"seed": "1", "split.val_fraction": "0.2", "classes": "None"}
    assert split.data.metrics == {"loss": pytest.approx(1 / 3), "train": 3.0, "score.ci95.low": 0.25}
    assert split.data.tags["input.data"] == "02be233f9ea54aab55e6418ac232b633.dir"
    assert split.data.tags["output.build/split"] == "5678.dir"
    assert split.data.tags["note"] == "瓢虫"
    client = open_client(tracking_uri(), project)
    points = [point.value for point in client.get_metric_history(split.info.run_id, "loss")]
    assert points == [1.0, 0.5, pytest.approx(1 / 3)]
    artifacts = project / "mlruns" / split.info.run_id / "artifacts"
    assert (artifacts / "split.json").read_text() == '{"train": 3}\n'
    assert (artifacts / "split" / "table.csv").read_text() == "x\n1\n"
    assert [path.name.partition("+")[0] for path in (artifacts / "images").glob("*.png")] == ["sheet"]
    (train,) = stored_runs(project, "train")
    assert (train.info.status, train.data.tags["error"]) == ("FAILED", "RuntimeError: out of memory")
    assert train.data.metrics == {"loss": 0.5}
    assert list(unsent.iterdir()) == []


def message_file(project: Path) -> Path:
    (file,) = (project / "mlruns" / "unsent").glob("*/messages.jsonl")
    return file


@pytest.mark.slow
def test_a_kept_run_holds_no_password_and_is_for_its_owner_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = "http://ada:s3cret%2Fword@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    with pytest.raises(RuntimeError), one_run(key="lost") as run:  # noqa: PT012
        run.log_artifact(picture)
        raise RuntimeError(f"no answer from {address}, password s3cret/word")
    files = list((project / "mlruns" / "unsent").rglob("*"))
    kept = b"".join(path.read_bytes() for path in files if path.is_file())
    for secret in (b"s3cret", b"ada", b"word@"):
        assert secret not in kept
    assert "s3cret" not in capsys.readouterr().err
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600, 0o700}


def test_a_kept_run_is_sent_after_its_project_was_moved(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "note.txt").write_text("kept")
    opening = decode_opening((FIXTURES / "unsent-whole-run" / "messages.jsonl").open(encoding="utf-8").readline())
    keep(replace(opening, root=str(project)), [Artifact(str(tmp_path / "note.txt"), None), Close("FINISHED", None, 5)])
    assert str(project) not in message_file(project).read_text()
    (tmp_path / "note.txt").unlink()
    moved = project.rename(tmp_path / "moved")
    monkeypatch.setenv("DVC_ROOT", str(moved))
    with one_run(key="next"):
        pass
    (sent,) = [run for run in stored_runs(moved, "split") if run.data.tags["pipeline"] == "kept"]
    assert (moved / "mlruns" / sent.info.run_id / "artifacts" / "note.txt").read_text() == "kept"
    assert not project.exists()


@pytest.mark.parametrize("room_for", ["messages", "nothing"])
def test_on_a_full_disk_the_record_is_kept_and_nothing_half_written(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_for: str
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("bestiary.tracking.outbox.gettempdir", lambda: str(tmp_path / "temporary"))
    note = tmp_path / "note.txt"
    note.write_text("kept")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bestiary.tracking.outbox.shutil.copyfile", full)
    if room_for == "nothing":
        original = Path.mkdir

        def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
            original(path, *arguments, **options)
            if path.is_relative_to(project):
                full()

        monkeypatch.setattr(Path, "mkdir", mkdir)
    opening = decode_opening((FIXTURES / "unsent-whole-run" / "messages.jsonl").open(encoding="utf-8").readline())
    folder = keep(replace(opening, root=str(project)), [Artifact(str(note), None), Close("FINISHED", None, 5)])
    assert folder.parent == (
        project / "mlruns" / "unsent" if room_for == "messages" else tmp_path / "temporary" / "bestiary-unsent"
    )
    assert [path.name for path in folder.iterdir()] == ["messages.jsonl"]
    assert not list(tmp_path.rglob(".*"))
    monkeypatch.undo()
    monkeypatch.setenv("DVC_ROOT", str(project))
    if room_for == "messages":
        with one_run(key="next"):
            pass
    else:
        note.unlink()
        uri = sqlite_uri(project / "mlflow.db")
        send(folder, lambda opening, messages: write_run(replace(opening, uri=uri, root=str(project)), messages))
    found = [run for run in stored_runs(project, "split") if run.data.tags["pipeline"] == "kept"]
    assert [(run.info.status, run.data.tags) for run in found] == [("FINISHED", found[0].data.tags)]
    (sent,) = found
    if room_for == "messages":
        assert (project / "mlruns" / sent.info.run_id / "artifacts" / "note.txt").read_text() == "kept"
    else:
        assert "lost.note.txt" in sent.data.tags

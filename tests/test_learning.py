"""`bestiary learn` in projects with real DVC and Git whose pipeline is one small stage."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from bestiary.errors import BestiaryError
from bestiary.learning import (
    Lesson,
    Plan,
    check_photos,
    check_words,
    choose_profile,
    learn,
    new_subjects,
    with_settings,
)
from bestiary.params import load_params
from bestiary.project_change import ProjectChange, only_one
from bestiary.subjects import Subjects

ROOT = Path(__file__).parents[1]
FILES = ("data.dvc", "subjects.yaml", "params.yaml")
PIPELINE = """\
stages:
  download:
    cmd: python stage.py
    deps: [data, subjects.yaml, stage.py]
    params: [profile, train.steps]
    outs: [build]
"""
STAGE = """\
import os, pathlib, shutil, sys, time
parent = os.getppid()
if pathlib.Path("fails").exists():
    sys.exit("download: it fails, as the test wants.")
pathlib.Path("started").touch()
while pathlib.Path("waits").exists():
    time.sleep(0.05)
    if os.getppid() != parent:
        sys.exit("download: DVC is gone.")  # as the real stages end
shutil.copytree("data", "build")
"""


def write_photos(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (80, 64), (number * 40, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data/ is an import of its samples/, as in a fresh clone after `dvc repro`."""
    root = tmp_path_factory.mktemp("made")
    write_photos(root / "samples" / "owl", 2)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "stage.py").write_text(STAGE)
    (root / "params.yaml").write_text(
        (ROOT / "params.yaml").read_text().replace("  sciencedb:\n    base:", "  other:\n    base:")
    )
    (root / "subjects.yaml").write_text("# Names.\nowl: {name: xqz owl, class: owl}  # mine\n")
    (root / ".gitignore").write_text("/data\n/build\n/.cache/\n/put-aside/\n")
    (root / ".dvcignore").write_text(".cache\nput-aside\n")
    run(root, "git", "init", "--quiet")
    run(root, sys.executable, "-m", "dvc", "init", "--quiet")
    run(root, sys.executable, "-m", "dvc", "config", "core.autostage", "true")
    run(root, sys.executable, "-m", "dvc", "import-url", "--quiet", "samples", "data")
    run(root, "git", "add", "--all")
    run(root, "git", "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "made")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = Path(shutil.copytree(made, tmp_path / "project", symlinks=True))
    for name in [name for name in os.environ if name.startswith(("DVC_ROOT", "GIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def run(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def lesson(photos: Path, **changes: object) -> Lesson:
    return Lesson(**{"photos": photos, "name": "sks cat", "class_word": "cat", "profile": "sample", **changes})  # type: ignore[arg-type]


def teach(photos: Path, **changes: object) -> tuple[bool, list[str]]:
    told: list[str] = []
    return learn(lesson(photos, **changes), told.append), told


def state(root: Path) -> dict[str, object]:
    """Everything that a failure must leave as it was."""
    data = {path.relative_to(root): path.read_bytes() for path in (root / "data").rglob("*") if path.is_file()}
    files = {name: (root / name).read_bytes() for name in FILES if (root / name).exists()}
    return {"data": data, "files": files, "index": run(root, "git", "ls-files", "--stage", *FILES)}


def test_photos_take_the_place_of_the_bundled_samples_and_a_second_time_nothing_is_run(
    root: Path, photos: Path
) -> None:
    ran, _ = teach(photos, steps=7)
    assert ran
    assert sorted(path.name for path in (root / "build" / "sks_cat").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    assert "deps" not in (root / "data.dvc").read_text()
    described = Subjects.read(root / "subjects.yaml").described
    assert {folder: (each.name, each.class_word) for folder, each in described.items()} == {
        "sks_cat": ("sks cat", "cat")
    }
    assert (root / "subjects.yaml").read_text() == (
        "# Names.\n# owl: {name: xqz owl, class: owl}  # mine\nsks_cat: {name: sks cat, class: cat}\n"
    )
    params = load_params(root / "params.yaml")
    assert (params.profile, params.train.steps) == ("sample", 7)
    (photos / "0.png").write_bytes((photos / "0.png").read_bytes())  # the photos are the user's, and can be written
    before = state(root)
    assert teach(photos, steps=7)[0] is False
    assert state(root) == before


def test_a_pipeline_that_fails_leaves_everything_as_it_was_and_the_same_command_then_works(
    root: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = state(root)
    (root / "fails").touch()
    with pytest.raises(BestiaryError, match="The pipeline stopped"):
        teach(photos)
    assert "download: it fails, as the test wants." in capfd.readouterr().err
    assert state(root) == before
    (root / "fails").unlink()
    assert teach(photos)[0]


def test_when_dvc_cannot_take_the_photos_everything_is_as_it_was(
    root: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(root)
    monkeypatch.setattr("bestiary.project_change._track_data", lambda root: (_ for _ in ()).throw(BestiaryError("no.")))
    with pytest.raises(BestiaryError, match="no"):
        teach(photos)
    assert state(root) == before
    assert not (root / "put-aside").exists()


def test_other_data_is_refused_and_with_replace_put_aside_whole(root: Path, photos: Path) -> None:
    Image.new("RGB", (64, 64)).save(root / "data" / "owl" / "mine.png")
    before = state(root)
    with pytest.raises(BestiaryError, match=r"data/ holds other data already \(owl\).*--replace"):
        teach(photos)
    assert state(root) == before
    ran, told = teach(photos, replace=True)
    assert ran
    (aside,) = (root / "put-aside").iterdir()
    assert any(str(aside.relative_to(root)) in line for line in told)
    for name in ("data", *FILES):
        shutil.rmtree(root / name) if name == "data" else (root / name).unlink()
        (aside / name).rename(root / name)
    assert {**state(root), "index": None} == {**before, "index": None}


def start(root: Path, photos: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own, when its stage has begun to wait."""
    (root / "waits").touch()
    code = (
        "import sys; from bestiary.learning import Lesson, learn; from pathlib import Path\n"
        "learn(Lesson(Path(sys.argv[1]), 'sks cat', 'cat', profile='sample'), print)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(photos)], cwd=root)
    deadline = time.monotonic() + 60
    while not (root / "started").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_stopped_or_killed_is_undone_and_resumes(
    root: Path, photos: Path, how: signal.Signals
) -> None:
    before = state(root)
    process = start(root, photos)
    assert state(root) != before
    with pytest.raises(BestiaryError, match="still running"):
        teach(photos)
    process.send_signal(how)
    assert process.wait(30) == (143 if how == signal.SIGTERM else -signal.SIGKILL)
    (root / "waits").unlink()
    with only_one(root):  # the pipeline has ended, too
        if how == signal.SIGKILL:
            ProjectChange(root).undo()
        assert state(root) == before
    assert teach(photos)[0]


def test_what_was_edited_after_a_kill_is_not_undone(root: Path, photos: Path, tmp_path: Path) -> None:
    new = Path(shutil.copytree(photos, tmp_path / "new" / "sks_cat")).parent
    change = ProjectChange(root)
    change.start({"params.yaml": "profile: other\n", "subjects.yaml": "# none\n"}, new)
    (root / "params.yaml").write_text("profile: mine\n")
    (root / "data" / "sks_cat" / "more.png").write_bytes(b"more")
    note = change.undo()
    assert note
    assert "put-aside/" in note
    assert (root / "data" / "sks_cat" / "more.png").read_bytes() == b"more"
    assert (root / "params.yaml").read_text() == "profile: mine\n"
    (aside,) = (root / "put-aside").iterdir()
    assert sorted(path.name for path in (aside / "data" / "owl").iterdir()) == ["0.png", "1.png"]
    assert change.undo() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "--name is empty"),
        ({"class_word": ""}, "--class is missing"),
        ({"name": "cat"}, "--name and --class are both 'cat'"),
        ({"kind": "style"}, "A style has no class"),
        ({"name": "sks {} cat"}, r"--name has { or }"),
        ({"name": "s" * 101}, "--name has more than 100 characters"),
    ],
)
def test_bad_words_are_named_by_their_option(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(BestiaryError, match=message):
        check_words(tmp_path, lesson(tmp_path, **changes))


def test_a_style_needs_no_class(tmp_path: Path) -> None:
    style = check_words(tmp_path, lesson(tmp_path, name="watercolour style", class_word="", kind="style"))
    assert (style.kind, style.with_article) == ("style", "watercolour style")


def test_bad_photos_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="missing does not exist"):
        check_photos(tmp_path, lesson(tmp_path / "missing"))
    with pytest.raises(BestiaryError, match="has no image, and teaching takes at least 4"):
        check_photos(tmp_path, lesson(tmp_path))
    photos = write_photos(tmp_path / "photos", 3)
    shutil.copy2(photos / "0.png", photos / "3.png")
    (photos / "4.jpg").write_bytes(b"<html>")
    with pytest.raises(BestiaryError, match=r"only 3 images that can be read and differ.*4\.jpg"):
        check_photos(tmp_path, lesson(photos))
    write_photos(tmp_path / "data" / "cat")
    with pytest.raises(BestiaryError, match="is in data/"):
        check_photos(tmp_path, lesson(tmp_path / "data" / "cat"))
    good = write_photos(tmp_path / "good")
    (good / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "sks cat"}\n')
    with pytest.raises(BestiaryError, match=r"metadata\.jsonl, line 1 names '9\.png'"):
        check_photos(tmp_path, lesson(good))


def test_the_profile_follows_the_gpu_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = ["sample", "subject", "photos"]
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    for has_gpu, profile in ((True, "photos"), (False, "subject")):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        chosen, reason = choose_profile(offered, None)
        assert chosen == profile
        assert "CUDA GPU" in reason
        assert choose_profile(offered, "sample")[0] == "sample"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_profile(offered, None)[0] == "subject"
    with pytest.raises(BestiaryError, match=r"no profile suject\. Choose one of sample, subject, photos"):
        choose_profile(offered, "suject")


def test_settings_change_their_own_lines_only_and_the_example_gives_way_to_data() -> None:
    text = (
        "# A comment.\nprofile: sample # chosen\ndataset:\n  folder:    # of images\ntrain: {steps: }\n"
        "profiles:\n  sample: {dataset: {folder: data}}\n  subject:\n    dataset:\n      folder: examples/pip/photos\n"
    )
    assert with_settings(text, "sample", None) == text
    changed = with_settings(text, "subject", 60)
    assert changed.splitlines()[:5] == [
        "# A comment.", "profile: subject # chosen", "dataset:", "  folder: data # of images", "train: {steps: 60}"
    ]  # fmt: skip
    assert changed.splitlines()[5:] == text.splitlines()[5:]
    real = (ROOT / "params.yaml").read_text()
    edited = with_settings(real, "sciencedb", 60).splitlines()
    assert [(was, now) for was, now in zip(real.splitlines(), edited, strict=True) if was != now] == [
        ("profile: sample", "profile: sciencedb"), ("  steps:", "  steps: 60")
    ]  # fmt: skip


def test_an_entry_of_the_same_folder_is_replaced_and_comments_stay(tmp_path: Path) -> None:
    text = "# Top.\nsks_cat:\n  name: sks cat\n  class: dog\n\n# Below.\nowl: {name: xqz owl}\n"
    new = new_subjects(text, lesson(tmp_path))
    assert new == "# Top.\nsks_cat: {name: sks cat, class: cat}\n\n\n\n# Below.\n# owl: {name: xqz owl}\n"
    assert new_subjects(new, lesson(tmp_path)) == new
    assert (
        new_subjects("", lesson(tmp_path, name="小桃", kind="style")) == "小桃: {name: 小桃, class: cat, kind: style}\n"
    )
    with pytest.raises(BestiaryError, match="a line for each folder"):
        new_subjects("{owl: {name: xqz owl}}", lesson(tmp_path))


def test_photos_of_others_lie_beside_the_subject_and_are_named_in_subjects_yaml(
    root: Path, photos: Path, tmp_path: Path
) -> None:
    assert teach(photos, others=write_photos(tmp_path / "others", 2))[0]
    assert Subjects.read(root / "subjects.yaml").folders_of_others == {"sks_cat": "other_than_sks_cat"}
    assert len(list((root / "data" / "other_than_sks_cat").iterdir())) == 2
    assert teach(photos, others=tmp_path / "others")[0] is False
    with pytest.raises(BestiaryError, match="has 1 images, and comparing with other individuals takes at least 2"):
        teach(photos, others=write_photos(tmp_path / "one", 1))


def test_a_name_that_is_too_long_for_the_base_is_refused_before_anything_runs(root: Path, photos: Path) -> None:
    (root / "models").mkdir(exist_ok=True)
    (root / "models" / "base").symlink_to(ROOT / "models" / "base")
    before = state(root)
    with pytest.raises(BestiaryError, match=r"--name 小桃小桃小 is too long for models/base: .* 26 tokens"):
        teach(photos, name="小桃小桃小")
    assert state(root) == before


def test_what_the_run_takes_is_told_before_it_starts(root: Path, photos: Path) -> None:
    told: list[str] = []

    def estimated(plan: Plan) -> Iterator[str]:
        assert not (root / "data" / "sks_cat").exists()
        assert len(plan.images) == 4
        yield "total 3 min"

    assert learn(lesson(photos), told.append, estimated)
    assert "total 3 min" in told
    assert not learn(lesson(photos), told.append, estimated)
    assert told.count("total 3 min") == 1


def test_a_file_in_place_of_the_folder_of_photos_is_named(root: Path, photos: Path) -> None:
    with pytest.raises(BestiaryError, match=r"0\.png is a file, not a folder"):
        teach(photos / "0.png")

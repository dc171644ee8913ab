"""The real profile's first half, through the worst of servers, without a person at hand."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image
from plant import NEAR, plant, recall
from server import serving

from bestiary.data.cleaning import clean
from bestiary.data.sciencedb import download
from bestiary.data.splitting import leaked_groups, split, write
from bestiary.params import load_params

ROOT = Path(__file__).parents[2]
FAULTS = ["500", "429 after", "html", "truncate", "wrong", "hang up", "wrong range", "403"]


@pytest.fixture
def files(tmp_path: Path, picture: Callable[..., Image.Image]) -> dict[str, bytes]:
    """Three classes of 24 images with planted faults, as a service would serve them."""
    root = tmp_path / "origin"
    for index, name in enumerate(("cat", "ladybugs", "owl")):
        (root / name).mkdir(parents=True)
        for number in range(24):
            picture(1000 * index + number, (200, 150)).save(root / name / f"{number} 图.jpg", quality=90)
    self_made = plant(root, 0.03)
    (tmp_path / "planted.yaml").write_text(yaml.safe_dump(self_made), encoding="utf-8")
    return {f"/V1/Animal/Animal/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*.*")}


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_download_clean_split_give_the_same_twice(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("profile: sample", "profile: sciencedb")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    settings = load_params(tmp_path / "params.yaml")
    assert settings.dataset.sciencedb is not None
    service = settings.dataset.sciencedb.model_copy(update={"timeout_s": 2.0})
    checks = settings.clean.model_copy(update={"off_topic": "off"})
    results = []
    for attempt in ("first", "second"):
        folder = tmp_path / attempt
        with serving(files) as server:
            monkeypatch.setenv("SCIENCEDB_API_URL", server.url)
            monkeypatch.setenv("SCIENCEDB_DOWNLOAD_URL", server.url)
            server.listing_faults = ["500", "50000", "null", "html", "429"]
            for number, path in enumerate(sorted(files)):
                server.faults[path] = [FAULTS[(number + step) % len(FAULTS)] for step in range(number % 4)]
            brought = download(folder / "raw", service, cache=folder / "cache", sleep=lambda _: None)
        assert brought.missing_files == 0
        outcome = clean(folder / "raw", folder / "clean", checks, report=folder / "report")
        manifest = pd.read_csv(folder / "clean" / "manifest.csv", dtype=str)
        train, val = split(manifest, val_fraction=settings.split.val_fraction, seed=settings.seed)
        write(folder / "split", train, val)
        assert leaked_groups(train, val) == 0
        results.append({name: content(folder / name) for name in ("raw", "clean", "split", "report")})
    assert results[0] == results[1]
    assert len(results[0]["raw"]) == len(files)

    planted = yaml.safe_load((tmp_path / "planted.yaml").read_text(encoding="utf-8"))
    gone = {finding.path for finding in outcome.findings if finding.action == "quarantined"}
    for kind in ("broken", "exact", *NEAR):
        assert recall(planted[kind], gone) >= 0.9, kind
    with Image.open(io.BytesIO((tmp_path / "second" / "report" / "unreadable.png").read_bytes())) as sheet:
        assert sheet.width > 100

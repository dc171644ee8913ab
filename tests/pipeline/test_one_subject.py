"""README's promise: a folder of photos and one command make an adapter and an honest page about it."""

import shutil
from pathlib import Path

import pytest
import yaml
from support.project import STAGES, Project

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_folder_of_photos_and_one_command_make_an_adapter_and_a_page_about_it(tmp_path: Path) -> None:
    photos = tmp_path / "my photos"
    photos.mkdir()
    for path in sorted((ROOT / "examples" / "pip" / "photos" / "pip").iterdir())[:16]:  # 8 photos and their captions
        shutil.copy2(path, photos)
    project = Project(tmp_path / "project")
    project.folder.mkdir()
    project.fill()
    params = yaml.safe_load((project.folder / "params.yaml").read_text())
    params["train"]["sheet_steps"] = 2
    params["evaluate"] |= {"seeds": 2, "steps": 2, "bootstrap_resamples": 200, "proof": {"seeds": 1, "class_seeds": 2}}
    params["benchmark"] |= {"schedulers": ["dpmsolver++sde"], "steps": [2], "guidance": [], "pictures": 1}
    (project.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    learn = ("learn", str(photos), "--name", "sks penguin", "--class", "penguin", "--profile", "subject")
    told = project.bestiary(*learn, "--steps", "2")
    assert [stage for stage in STAGES if f"\nRunning stage '{stage}'" in told] == STAGES
    assert told.index("\ntotal ") < told.index("\nRunning stage 'download'")  # the estimate comes first
    assert "sks penguin was taught from 5 photos and compared with 3 others that training never saw." in told
    assert "generate 'sks penguin' --adapter models:/bestiary/1 --count 4" in told
    page = (project.folder / "reports" / "index.html").read_text()
    assert "sks penguin was taught from 5 photos" in page
    assert "data:image/jpeg" in page
    assert "This has been done already." in project.bestiary(*learn, "--steps", "2")

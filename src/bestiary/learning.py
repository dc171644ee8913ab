"""Teach one subject with one command: from a folder of photos to the pipeline's result. A failure undoes it."""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestiary.data.captions import read_captions
from bestiary.data.folder import ALONE
from bestiary.data.images import decode
from bestiary.data.listing import Listing, describe_left_out, list_folder
from bestiary.data.names import safe_name
from bestiary.errors import BestiaryError, shown
from bestiary.files import find_project, no_project_error, write_atomically
from bestiary.image_files import UnreadableImageError
from bestiary.params import Params, load_params
from bestiary.project_change import DATA, DATA_DVC, WORK, Hashes, ProjectChange, hashes, only_one
from bestiary.subjects import Kind, Subject, Subjects, caption, check_folders, templates_of
from bestiary.yaml_file import format_table, parse_table, read_yaml

GPU_PROFILE, CPU_PROFILE = "photos", "subject"
READABLE_SIDE = 64  # pixels to decode a photo at, to see whether it can be read
GRACE_SECONDS = 5.0  # for the pipeline to end by itself after Ctrl-C
_PR_SET_PDEATHSIG = 1  # Linux's prctl: the signal that a child gets when its parent dies

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Lesson:
    """What to teach: the photos, the name that stands for their subject, and how.

    `steps` and `profile` None: as params.yaml says, and as this machine suggests. `others` holds photos of other
    individuals of the class, to compare with.
    """

    photos: Path
    name: str
    class_word: str = ""
    kind: Kind = "thing"
    steps: int | None = None
    profile: str | None = None
    replace: bool = False
    others: Path | None = None

    @property
    def folder(self) -> str:
        """The class folder in data/: the name without spaces."""
        return safe_name("_".join(self.name.split()))

    @property
    def others_folder(self) -> str:
        """The folder in data/ of the photos of others."""
        return f"other_than_{self.folder}"


@dataclass(frozen=True)
class Plan:
    """A lesson checked against a project, before anything has changed."""

    files: Mapping[str, str]  # new texts by name
    photos: Mapping[str, Sequence[Path]]  # images and caption files by the folder in data/
    data: Hashes  # what data/ is to hold
    params: Params  # as they will be
    folder: str  # of the subject, in data/
    images: Sequence[Path]
    is_in_place: bool  # data/ holds exactly the photos, and DVC tracks them


def learn(lesson: Lesson, tell: Tell, estimated: Callable[[Plan], Iterator[str]] | None = None) -> bool:
    """Put the photos into data/, write the settings and run the pipeline.

    `estimated` gives lines to print before the pipeline starts. Returns False, without running anything, when all of
    this was done before. When the pipeline fails or is stopped, data/, data.dvc, subjects.yaml and params.yaml are
    restored, and the same command resumes. Raises BestiaryError for a user's mistake.
    """
    root = find_project()
    if root is None or not (root / "dvc.yaml").is_file():
        raise no_project_error()
    with only_one(root) as lock, _sigterm_stops():
        change = ProjectChange(root)
        if note := change.undo():  # of a command that was killed
            tell(note)
        plan = make_plan(root, lesson, tell)
        done = plan.is_in_place and all(_text(root / name) == text for name, text in plan.files.items())
        if done and _is_up_to_date(root):
            return False
        for line in estimated(plan) if estimated else ():
            tell(line)
        change.start(plan.files, None if plan.is_in_place else _copied(root, plan))
        try:
            run_pipeline(root, lock)
        except BaseException:
            note = change.undo()
            tell(note or "data/, data.dvc, subjects.yaml and params.yaml are as they were before.")
            tell("Finished stages and training checkpoints are kept: the same command resumes.")
            raise
        if note := change.keep():
            tell(note)
    return True


def make_plan(root: Path, lesson: Lesson, tell: Tell) -> Plan:
    """Check a lesson against the project at `root`; changes nothing.

    Raises BestiaryError when the photos, the name or the settings are wrong, or when data/ holds other data and the
    lesson does not say to replace it.
    """
    check_words(root, lesson)
    listing = check_photos(root, lesson)
    profile, reason = choose_profile(_profiles(root), lesson.profile)
    tell(f"Profile   {profile}: {reason}")
    for line in describe_left_out(listing.left_out):
        tell(f"Photos    {line}")
    params_text = with_settings(_text(root / "params.yaml") or "", profile, lesson.steps)
    files = {"params.yaml": params_text, "subjects.yaml": new_subjects(_text(root / "subjects.yaml") or "", lesson)}
    params = _checked(root, "params.yaml", params_text, load_params)
    subjects = _checked(root, "subjects.yaml", files["subjects.yaml"], Subjects.read)
    check_folders([lesson.folder], subjects)
    _check_length(root, params, subjects.of(lesson.folder))
    photos = {lesson.folder: [*listing.images[lesson.folder], *listing.captions[lesson.folder]]}
    if lesson.others:
        photos[lesson.others_folder] = check_others(lesson.others, lesson)
    data = {f"{folder}/{path.name}": _sha256(path) for folder, paths in photos.items() for path in paths}
    there = hashes(root / DATA)
    is_in_place = there == data and _tracks_own_data(root)
    if there and there != data and not lesson.replace and not _is_copy_of_import(root, there):
        folders = _few(sorted({path.split("/")[0] for path in there}))
        raise BestiaryError(
            f"data/ holds other data already ({folders}), and an adapter of one subject is trained on its photos alone."
            " Add --replace to move that data to put-aside/."
        )
    return Plan(files, photos, data, params, lesson.folder, listing.images[lesson.folder], is_in_place)


def params_with_profile(root: Path, profile: str | None) -> Params:
    """The project's parameters, with another profile if one is given. Raises BestiaryError when there is none."""
    path = root / "params.yaml"
    if profile is None:
        return load_params(path)
    choose_profile(_profiles(root), profile)
    from ruamel.yaml import YAML

    editor = YAML()
    raw = editor.load(_text(path) or "")
    raw["profile"] = profile
    params: Params = _checked(root, "params.yaml", _written(editor, raw), load_params)
    return params


def estimate_plan(plan: Plan) -> Iterator[str]:
    """The time, memory and disk of the plan, as lines. If the estimate fails, a line says so and the plan runs."""
    from bestiary.estimating import estimate, images_of, render

    yield "Measuring what this takes on this machine ..."
    images = images_of({plan.folder: plan.images}, proved=1)
    try:
        rates, lines = estimate(plan.params, images)
    except BestiaryError as error:
        yield f"What this takes is unknown: {error}"
        return
    yield from render(plan.params, images, rates, lines)


# ---- checks ----


def check_words(root: Path, lesson: Lesson) -> Subject:
    """The subject as subjects.yaml would describe it. Raises BestiaryError that names the option that is wrong."""
    if not " ".join(lesson.name.split()):
        raise BestiaryError("--name is empty. Give a name, such as --name 'sks cat'.")
    if lesson.kind == "thing" and not lesson.class_word.strip():
        raise BestiaryError("--class is missing. Say what it is in general, such as --class cat.")
    entry = format_table({"subject": _entry(lesson)})
    try:
        subjects: Subjects = _checked(root, "subjects.yaml", entry, Subjects.read)
        return subjects.of("subject")
    except BestiaryError as error:
        text = str(error)
        if "a style has no class" in text:
            raise BestiaryError("A style has no class. Leave out --class, or use --kind thing.") from None
        for key in ("name", "class"):
            text = text.replace(f"subjects.yaml: subject.{key}", f"--{key}")
        raise BestiaryError(text.replace("subjects.yaml: subject: name and class", "--name and --class")) from None


def check_photos(root: Path, lesson: Lesson) -> Listing:
    """The images and caption files in the folder of photos.

    Raises BestiaryError when fewer than ALONE different images can be read, when a caption file is wrong, or when the
    folder lies in data/.
    """
    photos = lesson.photos
    listing = list_folder(photos, lesson.folder)
    if photos.resolve().is_relative_to((root / DATA).resolve()):
        raise BestiaryError(f"{photos} is in data/, which this command fills. Move the photos to another folder.")
    images = listing.images[lesson.folder]
    read_captions(listing, [lesson.folder])
    different: set[str] = set()
    problem = ""
    for path in images:
        try:
            decode(path, at_least=READABLE_SIDE)
        except UnreadableImageError as error:
            problem = problem or f" {str(error).rstrip('.')}."
            continue
        different.add(_sha256(path))
        if len(different) == ALONE:
            return listing
    number = ("no image", "only one image")[len(different)] if len(different) < 2 else f"only {len(different)} images"
    kind = " that can be read" + " and differ" * (len(images) > 1) if images else ""
    raise BestiaryError(f"{photos} has {number}{kind}, and teaching takes at least {ALONE}.{problem} Add images.")


def check_others(others: Path, lesson: Lesson) -> list[Path]:
    """The photos of other individuals. Raises BestiaryError when there are fewer than two."""
    images = list_folder(others, lesson.others_folder).images[lesson.others_folder]
    if len(images) < 2:
        raise BestiaryError(
            f"{others} has {len(images)} images, and comparing with other individuals takes at least 2. Add images, or "
            "leave out --others."
        )
    return images


def _check_length(root: Path, params: Params, subject: Subject) -> None:
    """Raise BestiaryError when a caption with the name has more tokens than the base in this project reads.

    A base on the hub reads 77, which takes a long name to exceed; encoding finds that.
    """
    tokenizer_folder = root / params.base.model / "tokenizer"
    if not tokenizer_folder.is_dir():
        return
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    captions = [caption(subject, template) for template in templates_of([subject])]
    length, longest = max((len(ids), text) for ids, text in zip(tokenizer(captions).input_ids, captions, strict=True))
    if length > tokenizer.model_max_length:
        raise BestiaryError(
            f"--name {shown(subject.name)} is too long for {params.base.model}: the caption {longest!r} has {length} "
            f"tokens, and the base reads {tokenizer.model_max_length}. Choose a shorter name, such as 'sks cat'."
            " Characters that the base does not know take several tokens each."
        )


def choose_profile(offered: Collection[str], asked: str | None) -> tuple[str, str]:
    """The profile to teach with, and the reason. Raises BestiaryError when params.yaml has no such profile."""
    if asked is not None:
        profile, reason = asked, "as --profile says."
    else:
        from bestiary.diffusion.base import device_and_dtype

        if device_and_dtype()[0].type == "cuda":
            profile, reason = GPU_PROFILE, "torch sees a CUDA GPU, so Stable Diffusion v1.5 learns it."
        else:
            profile, reason = CPU_PROFILE, "torch sees no CUDA GPU, so the bundled base learns it, at 64 x 64 pixels."
    if profile not in offered:
        raise BestiaryError(
            f"params.yaml has no profile {shown(profile)}. Choose one of {', '.join(offered)} with --profile."
        )
    return profile, reason


def _profiles(root: Path) -> list[str]:
    raw = read_yaml(root / "params.yaml") if (root / "params.yaml").is_file() else None
    offered = raw.get("profiles") if isinstance(raw, dict) else None
    if not isinstance(offered, dict):
        raise BestiaryError("params.yaml is missing or has no profiles. Restore it from Git.")
    return [str(name) for name in offered]


def _checked(root: Path, name: str, text: str, read: Callable[[Path], Any]) -> Any:
    """The result of `read` on the future text of the file `name`. Errors contain that name."""
    staged = root / WORK / "checked" / name
    write_atomically(staged, text.encode())
    try:
        return read(staged)
    except BestiaryError as error:
        raise BestiaryError(str(error).replace(str(staged), name)) from None
    finally:
        staged.unlink()


# ---- texts ----


def with_settings(text: str, profile: str, steps: int | None) -> str:
    """params.yaml with another profile, with these training steps, and with the images in data/; comments stay."""
    from ruamel.yaml import YAML

    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 10_000
    editor.representer.add_representer(type(None), _write_nothing)
    raw = editor.load(text)
    before = _written(editor, raw)
    raw["profile"] = profile
    if steps is not None:
        raw["train"]["steps"] = steps
    if (raw["profiles"][profile].get("dataset") or {}).get("folder", DATA) != DATA:
        raw["dataset"]["folder"] = DATA
    return _changed_lines(text, before, _written(editor, raw))


def _write_nothing(representer: Any, _value: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "")


def _written(editor: Any, content: object) -> str:
    stream = io.StringIO()
    editor.dump(content, stream)
    return stream.getvalue()


def _changed_lines(text: str, before: str, after: str) -> str:
    """The text with the lines that differ between two ways of writing it; its own format stays elsewhere."""
    lines, old, new = (version.splitlines(keepends=True) for version in (text, before, after))
    if not len(lines) == len(old) == len(new):
        return after
    return "".join(line if was == now else now for line, was, now in zip(lines, old, new, strict=True))


def new_subjects(text: str, lesson: Lesson) -> str:
    """subjects.yaml with the lesson's entry. Other entries become comments, because their folders leave data/.

    Raises BestiaryError when the entries cannot be told apart by their lines.
    """
    new = format_table({lesson.folder: _entry(lesson)})
    table = parse_table(text, Path("subjects.yaml"))
    if table is None or table.is_inline:
        raise BestiaryError("subjects.yaml must have a line for each folder, such as my-cat: {name: sks cat}. Edit it.")
    if not table.entries:
        return f"{text.rstrip()}\n{new}" if text.strip() else new
    lines = text.splitlines()
    starts = [entry.line for entry in table.entries] + [len(lines)]
    written = False
    for entry, start, end in zip(table.entries, starts, starts[1:], strict=False):
        while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
            end -= 1  # a comment or an empty line before the next entry
        if entry.key == lesson.folder:
            written = True
            if entry.value != _entry(lesson):
                lines[start:end] = [new.rstrip(), *[""] * (end - start - 1)]
        else:
            lines[start:end] = [f"# {line}" for line in lines[start:end]]
    kept = "\n".join(lines).rstrip() + "\n"
    return kept if written else f"{kept}{new}"


def _entry(lesson: Lesson) -> dict[str, str]:
    words = {"name": " ".join(lesson.name.split()), "class": " ".join(lesson.class_word.split())}
    entry = {key: text for key, text in words.items() if text}
    if lesson.others:
        entry["others"] = lesson.others_folder
    return entry if lesson.kind == "thing" else {**entry, "kind": lesson.kind}


# ---- data/ ----


def _copied(root: Path, plan: Plan) -> Path:
    """A folder like the new data/. Linked photos would become read-only, as DVC makes everything that it tracks."""
    new = root / WORK / "new"
    shutil.rmtree(new, ignore_errors=True)
    for folder, paths in plan.photos.items():
        (new / folder).mkdir(parents=True)
        for path in paths:
            try:
                shutil.copyfile(path, new / folder / path.name)
            except OSError as error:
                raise BestiaryError(
                    f"{path} cannot be copied into data/: {error.strerror}. Nothing has changed."
                ) from None
    return new


def _data_dvc(root: Path) -> Mapping[str, Any]:
    content = read_yaml(root / DATA_DVC) if (root / DATA_DVC).is_file() else None
    return content if isinstance(content, dict) else {}


def _tracks_own_data(root: Path) -> bool:
    """Whether data.dvc tracks data/ as it is, and is not an import that `dvc repro` would bring back."""
    content = _data_dvc(root)
    return bool(content.get("outs")) and not content.get("deps")


def _is_copy_of_import(root: Path, there: Hashes) -> bool:
    """Whether data/ is what data.dvc imports from a folder of this project, such as the bundled samples/."""
    deps = _data_dvc(root).get("deps") or [{}]
    source = root / str(deps[0].get("path") or ".")
    return source != root and source.is_relative_to(root) and there.items() <= hashes(source).items()


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise BestiaryError(f"{path.name} is not in UTF-8. Save the file in UTF-8.") from None


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])} and {len(names) - 3} more" if len(names) > 3 else ", ".join(names)


# ---- the pipeline ----


def run_pipeline(root: Path, lock: int) -> None:
    """Run `dvc repro` with its progress on this terminal. It holds `lock`, too, and ends with this process.

    Raises BestiaryError when a stage fails, whose own sentence is on the terminal by then.
    """
    process = subprocess.Popen(_dvc("repro"), cwd=root, env=_environment(), pass_fds=(lock,), preexec_fn=_end_with_me)
    try:
        code = process.wait()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):  # a terminal's Ctrl-C has reached the stage, too
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        process.terminate()
        process.wait()
        raise
    if code:
        raise BestiaryError("The pipeline stopped. The lines above give the reason.")


def _is_up_to_date(root: Path) -> bool:
    """Whether `dvc repro` has nothing to do. The stages of fast/dvc.yaml do not count: `make fast` runs them."""
    files = ["dvc.yaml", *sorted(path.name for path in root.glob("*.dvc") if path.is_file())]
    command = _dvc("status", "--quiet", *files)
    return subprocess.run(command, cwd=root, env=_environment(), capture_output=True, check=False).returncode == 0


def _dvc(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def _environment() -> dict[str, str]:
    """This process's, with this Python in front: the stages start `python`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path}


def _end_with_me() -> None:
    """Runs in the child: Linux ends it when this process is killed, and the stages end with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """Let SIGTERM raise SystemExit in the body, so that it can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

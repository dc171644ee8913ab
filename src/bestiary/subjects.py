"""Subjects: what a class folder shows, its names and captions, and the table of the 100 animals."""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bestiary.errors import BestiaryError, printable, short
from bestiary.yaml_file import read_table

Kind = Literal["thing", "style"]
MAX_NAME = 100  # characters of a name in subjects.yaml
SUBJECTS_FILE = "subjects.json"  # in a folder of the pipeline: the subjects that subjects.yaml describes

# kohya's trainer reads a folder's name as <repeats>_<name>.
_REPEATS = re.compile(r"\d+_+(?=\S)")
# A name that begins like this takes no article: "my owl", "Anna's cat".
_DETERMINER = re.compile(r"(?i)(?:my|our|your|his|her|its|their|this|that|these|those|\w+['’]s|\w+s['’])\s+(?=\S)")


@dataclass(frozen=True)
class Subject:
    """What one class folder shows: the folder, the English name in the singular, the Chinese name.

    A name that is `given` in subjects.yaml is used in captions as written, without an article: "sks cat", "Momo".
    """

    folder: str
    name: str
    chinese: str
    kind: Kind = field(default="thing", repr=False)
    class_word: str = field(default="", repr=False)  # what kind of thing it is: "cat"
    given: bool = field(default=False, repr=False)
    others: str = field(default="", repr=False)  # folder of photos of other individuals of the class, never trained on

    @property
    def with_article(self) -> str:
        """The name with its indefinite article, "an antelope", unless it takes none: "my owl", "Momo", a style."""
        bare = self.given or self.kind == "style" or _DETERMINER.match(self.name)
        return self.name if bare else f"{_article(self.name)} {self.name}"

    @property
    def key(self) -> str:
        """What two spellings of one subject have in common."""
        return unicodedata.normalize("NFKC", self.name).casefold()


# The dataset's folder name, the English name where it differs, and the Chinese name.
_TABLE = """
antelope 羚羊|badger 獾|bat 蝙蝠|bear 熊|bee 蜜蜂|beetle 甲虫|bison 野牛|boar 野猪|butterfly 蝴蝶|camel 骆驼
capybara 水豚|cat 猫|caterpillar 毛毛虫|chimpanzee 黑猩猩|cockroach 蟑螂|cow 奶牛|coyote 郊狼|crab 螃蟹
crocodile 鳄鱼|crow 乌鸦|deer 鹿|dog 狗|dolphin 海豚|donkey 驴|dragonfly 蜻蜓|duck 鸭子|eagle 鹰
elephant 大象|flamingo 火烈鸟|fly 苍蝇|fox 狐狸|frog 青蛙|giraffe 长颈鹿|goat 山羊|goldfish 金鱼|goose 鹅
gorilla 大猩猩|grasshopper 蚱蜢|hamster 仓鼠|hare 野兔|hedgehog 刺猬|hippopotamus 河马|hornbill 犀鸟
horse 马|hummingbird 蜂鸟|hyena 鬣狗|jellyfish 水母|kangaroo 袋鼠|koala 考拉|ladybugs=ladybug 瓢虫
leopard 豹|lion 狮子|lizard 蜥蜴|lobster 龙虾|mandrill 山魈|mantis 螳螂|mosquito 蚊子|moth 飞蛾|mouse 老鼠
octopus 章鱼|orangutan 红毛猩猩|otter 水獭|owl 猫头鹰|panda 熊猫|pangolin 穿山甲|parrot 鹦鹉|peacock 孔雀
pelecaniformes=pelican 鹈鹕|penguin 企鹅|pig 猪|pigeon 鸽子|platypus 鸭嘴兽|porcupine 豪猪|possum 负鼠
pufferfish 河豚|raccoon 浣熊|reindeer 驯鹿|rhinoceros 犀牛|sandpiper 矶鹬|scallop 扇贝|scorpion 蝎子
seahorse 海马|seal 海豹|shark 鲨鱼|sheep 绵羊|snake 蛇|sparrow 麻雀|spider 蜘蛛|squid 鱿鱼|squirrel 松鼠
starfish 海星|swan 天鹅|tiger 老虎|turkey 火鸡|turtle 乌龟|walrus 海象|whale 鲸鱼|wombat 袋熊
woodpecker 啄木鸟|zebra 斑马
"""


def _parse(entry: str) -> Subject:
    words, chinese = entry.split()
    folder, _, name = words.partition("=")
    return Subject(folder, name or folder, chinese)


ANIMALS: tuple[Subject, ...] = tuple(_parse(entry) for line in _TABLE.split("\n") if line for entry in line.split("|"))

# `{}` stands for the subject with its article, `{name}` for the bare name after an adjective.
CAPTION_TEMPLATES: tuple[str, ...] = (
    "a photo of {}",
    "a high quality image of {}",
    "a clear picture of {}",
    "a realistic image of {}",
    "a cute {name}",
    "a wild {name} in its natural habitat",
    "a close-up of {}",
)

# For subjects that are none of the animals.
THING_TEMPLATES: tuple[str, ...] = (
    "a photo of {}",
    "a high quality image of {}",
    "a clear picture of {}",
    "a realistic image of {}",
    "a good photo of {}",
    "a detailed photo of {}",
    "a close-up of {}",
)
# `of {}` becomes "in watercolour style".
STYLE_TEMPLATES: tuple[str, ...] = (
    "a picture of {}",
    "an image of {}",
    "a high quality image of {}",
    "an illustration of {}",
    "a drawing of {}",
    "a painting of {}",
    "a scene of {}",
)

_ANIMALS_BY_NAME = {
    name.casefold(): animal for animal in ANIMALS for name in (animal.folder, animal.name, animal.chinese)
}


def words_of(text: str) -> str:
    """Return the words that a folder's name or a typed name stands for; "" when there are none.

    Underscores, hyphens and spaces separate words. An article in front does not count, nor do kohya's repeats.

    >>> words_of("my_owl"), words_of("red-panda"), words_of("the Owl"), words_of("10_tiger")
    ('my owl', 'red panda', 'Owl', 'tiger')
    """
    words = " ".join(
        re.split(r"[_\-\s]+", _REPEATS.sub("", unicodedata.normalize("NFC", text).strip(), count=1))
    ).strip()
    return re.sub(r"(?i)^(an?|the)\s+", "", words)


def subject_of(text: str) -> Subject:
    """Return the subject of a class folder or of a typed name: one of the 100 animals, or else a subject of its words.

    Every part of the program words a subject through this function. An animal is known by its English name, its Chinese
    name and its folder, in any letter case.

    >>> subject_of("ladybugs").with_article, subject_of("my_red-panda").with_article, subject_of("A Tiger").name
    ('a ladybug', 'my red panda', 'tiger')
    """
    name = words_of(text) or text.strip()
    return _ANIMALS_BY_NAME.get(name.casefold()) or Subject(text, name, name)


class _Entry(BaseModel):
    """What subjects.yaml says about one folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str | None = Field(default=None, max_length=MAX_NAME)
    class_word: str | None = Field(default=None, alias="class", max_length=MAX_NAME)
    kind: Kind = "thing"
    chinese: str | None = Field(default=None, max_length=MAX_NAME)
    others: str | None = None


@dataclass(frozen=True)
class Subjects:
    """The subjects of class folders: as subjects.yaml describes them, else one of the animals, else the folder's words.

    >>> Subjects().of("my_cat").with_article, Subjects().of("ladybugs").with_article
    ('my cat', 'a ladybug')
    """

    described: Mapping[str, Subject] = field(default_factory=dict)  # by folder

    @classmethod
    def read(cls, path: Path) -> Subjects:
        """Read subjects.yaml; a file that is missing or holds comments only describes nothing.

        Raises BestiaryError that names the file, the folder and the key when something is wrong.
        """
        try:
            table = read_table(path)
        except FileNotFoundError:
            return cls()
        if table is None:
            raise BestiaryError(f"{path} must map folders to keys. Write lines such as my-cat: {{name: sks cat}}.")
        folders = [unicodedata.normalize("NFC", entry.key) for entry in table.entries]
        repeated = [folder for folder, count in Counter(folders).items() if count > 1]
        if repeated:
            raise BestiaryError(f"{path} describes the folder {repeated[0]} twice. Remove one of the two entries.")
        subjects = cls(
            {folder: _described(path, folder, each.value) for folder, each in zip(folders, table.entries, strict=True)}
        )
        for folder, others in subjects.folders_of_others.items():
            if others in folders:
                raise BestiaryError(
                    f"{path}: {folder}.others names the folder {others}, which is a subject itself. Photos of others "
                    f"are not trained on: remove the entry {others}, or name another folder."
                )
        return subjects

    @classmethod
    def read_from(cls, folder: Path) -> Subjects:
        """Read what `write_to` wrote into `folder`. Raises BestiaryError when it is damaged."""
        path = folder / SUBJECTS_FILE
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, AttributeError):
            raise BestiaryError(f"{path} is damaged. Run `dvc repro` again.") from None

    def write_to(self, folder: Path) -> None:
        """Write the subjects that are described to a file in `folder`; no file when none is."""
        path = folder / SUBJECTS_FILE
        if self.described:
            path.write_text(self.to_json(), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)

    @classmethod
    def from_json(cls, text: str) -> Subjects:
        """The subjects in the text that `to_json` returned. Raises ValueError and TypeError when it is another."""
        return cls({each["folder"]: Subject(**each) for each in json.loads(text)})

    def to_json(self) -> str:
        """The subjects that are described, as text.

        >>> Subjects.from_json(Subjects({"x": Subject("x", "sks cat", "", given=True)}).to_json()).of("x").with_article
        'sks cat'
        """
        return json.dumps([asdict(subject) for subject in self.described.values()], ensure_ascii=False, indent=2)

    def of(self, folder: str) -> Subject:
        """The subject of a class folder."""
        return self.described.get(folder) or subject_of(folder)

    @property
    def folders_of_others(self) -> dict[str, str]:
        """By subject folder, the folder with photos of other individuals. These folders are no subjects."""
        return {folder: subject.others for folder, subject in self.described.items() if subject.others}

    def check_without_others(self) -> None:
        """Raise BestiaryError when a subject has a folder of others, for sources that would train on it."""
        for folder, others in self.folders_of_others.items():
            raise BestiaryError(
                f"subjects.yaml gives {folder} the others {others}, and the source sciencedb trains on every class. "
                "Remove the key others, or use the source folder."
            )

    def check_known(self, folders: Iterable[str]) -> None:
        """Raise BestiaryError when a folder that is described, or that holds others, is none of `folders`."""
        known = list(folders)
        for folder in (*self.described, *self.folders_of_others.values()):
            if folder not in known:
                similar = difflib.get_close_matches(folder, known, n=1)
                meant = f" Is it {similar[0]}?" if similar else ""
                raise BestiaryError(
                    f"subjects.yaml describes the folder {folder}, and the data has no such folder.{meant} Correct "
                    "the name, or remove the entry."
                )


def templates_of(subjects: Iterable[Subject]) -> tuple[str, ...]:
    """The caption templates that suit all of these subjects.

    >>> "a wild {name} in its natural habitat" in templates_of([subject_of("owl")])
    True
    >>> "a wild {name} in its natural habitat" in templates_of([subject_of("owl"), subject_of("my mug")])
    False
    """
    subjects = tuple(subjects)
    if all(subject in ANIMALS for subject in subjects):
        return CAPTION_TEMPLATES
    return STYLE_TEMPLATES if all(subject.kind == "style" for subject in subjects) else THING_TEMPLATES


def find_subject(text: str, taught: Iterable[Subject] = ()) -> tuple[Subject, list[str] | None]:
    """Return the subject that a typed name means, and None if it is one of `taught` or one of the 100 animals.

    A subject of `taught` keeps the words that it was taught with. With any other subject come up to three names that
    may be meant.

    >>> find_subject("a Tiger")
    (Subject(folder='tiger', name='tiger', chinese='老虎'), None)
    >>> find_subject("tigr")
    (Subject(folder='tigr', name='tigr', chinese='tigr'), ['tiger'])
    >>> find_subject("MY-OWL", [Subject("my_owl", "my owl", "my owl")])[0].name
    'my owl'
    """
    subject, taught = subject_of(text), tuple(taught)
    for known in taught:
        if subject.key in (known.key, subject_of(known.folder).key):
            return known, None
    if subject in ANIMALS:
        return subject, None
    wanted = subject.key[:100]
    names = list(dict.fromkeys(known.name for known in (*taught, *ANIMALS)))
    similar = difflib.get_close_matches(wanted, names, n=3)
    similar = similar or [animal.chinese for animal in ANIMALS if set(animal.chinese) & set(wanted)][:3]
    return subject, similar


def check_folders(folders: Iterable[str], subjects: Subjects | None = None) -> None:
    """Check that class folders stand for different subjects.

    Raises BestiaryError that names the folders when several have the same name, when one has no words, and when one is
    named in kohya's way, because the number in front would be lost.
    """
    subjects = subjects or Subjects()
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for folder in sorted(folders):
        subject = subjects.of(folder)
        if subject.given:
            spellings[subject.key].append(folder)
            continue
        words = words_of(folder)
        if not words:
            raise BestiaryError(f"The folder {folder} has no words to call its subject by. Rename it.")
        if number := _REPEATS.match(folder.strip()):
            whole = f"{number.group().rstrip('_')} {words}"
            raise BestiaryError(
                f"The folder {folder} is named in kohya's way, <repeats>_<name>, and repeats do not exist here. Rename "
                f'it to "{words}", or to "{whole}" if the number belongs to the name.'
            )
        spellings[subject.key].append(folder)
    for same in spellings.values():
        if len(same) > 1:
            raise BestiaryError(
                f"The folders {', '.join(same)} stand for the same subject, {subjects.of(same[0]).name}. Put their "
                "images into one folder, or give the others different names."
            )


def caption(subject: Subject, template: str) -> str:
    """Fill `template` with `subject`: `{}` becomes the name with its article, `{name}` the bare name.

    An article before `{}` is replaced, so "a photo of a {}" works too. A possessive takes the place of the article
    before `{name}`. A style is what pictures are in: "a photo of {}" becomes "a photo in watercolour style".

    >>> [caption(subject_of("owl"), template) for template in ("a photo of {}", "a photo of a {}", "a cute {name}")]
    ['a photo of an owl', 'a photo of an owl', 'a cute owl']
    >>> caption(subject_of("my_owl"), "a cute {name} at night")
    'my cute owl at night'
    """
    name = subject.name
    if subject.kind == "style":
        template = re.sub(r"(?i)\bof (?:an? )?\{\}", "in {}", template)
    elif determiner := _DETERMINER.match(name):
        noun = name[determiner.end() :]
        template, found = re.subn(
            r"(?i)\b(?:an?|the) ([^{}]*)\{name\}",
            lambda match: f"{determiner.group()}{match.group(1)}{{name}}",
            template,
        )
        name = noun if found else name
    return re.sub(
        r"(?i:\ban? )?\{\}|\{name\}",
        lambda match: name if match.group() == "{name}" else subject.with_article,
        template,
    )


def _described(path: Path, folder: str, entry: object) -> Subject:
    """The subject of one entry of subjects.yaml. Raises BestiaryError that names the file, the folder and the key."""
    where = f"{path}: {folder}"
    if not isinstance(entry, dict):
        raise BestiaryError(f"{where} must be followed by keys, such as {{name: sks cat, class: cat}}.")
    try:
        checked = _Entry.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("extra_forbidden", "invalid_key"):
            raise BestiaryError(
                f"{where}: the key {key} is unknown. Use name, class, kind, chinese and others."
            ) from None
        problem = {
            "string_type": f"is {short(first['input'])}, which is no text. Put the words between quotes",
            "string_too_long": f"has more than {MAX_NAME} characters. Shorten it",
            "literal_error": f"is {short(first['input'])}. Choose thing or style",
        }
        reason = problem.get(first["type"], "has characters that no text has. Remove them")
        raise BestiaryError(f"{where}.{key} {reason}.") from None
    texts = {}
    for key, text in (("name", checked.name), ("class", checked.class_word), ("chinese", checked.chinese)):
        texts[key] = " ".join(unicodedata.normalize("NFC", text or "").split())
        if text is not None and not texts[key]:
            raise BestiaryError(f"{where}.{key} is empty. Write the words, or remove the key.")
        if printable(texts[key]) != texts[key]:
            raise BestiaryError(f"{where}.{key} has characters that cannot be printed. Remove them.")
        if "{" in texts[key] or "}" in texts[key]:
            raise BestiaryError(
                f"{where}.{key} has {{ or }} in it, which mark the subject's place in prompts. Remove them."
            )
    if checked.kind == "style" and texts["class"]:
        raise BestiaryError(f"{where}: a style has no class. Remove the key class, or set kind to thing.")
    known = subject_of(folder)
    name = texts["name"] or known.name
    if not texts["name"] and checked.kind == "style" and not name.casefold().endswith("style"):
        name = f"{name} style"
    if name.casefold() == texts["class"].casefold():
        raise BestiaryError(
            f"{where}: name and class are both {name!r}, so captions could not tell this {texts['class']} "
            f"from others. Give it a name of its own, such as sks {texts['class']}."
        )
    chinese = texts["chinese"] or (known.chinese if name == known.name else name)
    others = unicodedata.normalize("NFC", checked.others or "")
    if others == folder:
        raise BestiaryError(
            f"{where}.others names the folder itself. Name a folder with photos of others of its class."
        )
    return Subject(folder, name, chinese, checked.kind, texts["class"], given=bool(texts["name"]), others=others)


def _article(name: str) -> str:
    # The sound decides: a unicorn, a European robin, an hour, an 8-ball.
    if re.match(r"(?i)(uni(?!m|n)|eu|ewe|one\b)", name):
        return "a"
    return "an" if re.match(r"(?i)[aeiou]|hour|heir|honest|8|1[18]\b", unicodedata.normalize("NFD", name)) else "a"

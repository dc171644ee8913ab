"""Subjects: what a class folder shows, its names and captions, and the table of the 100 animals."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """What one class folder shows: the folder, the English name in the singular, the Chinese name."""

    folder: str
    name: str
    chinese: str

    @property
    def with_article(self) -> str:
        """The name with its indefinite article: "an antelope"."""
        return f"{_article(self.name)} {self.name}"


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

_BY_FOLDER = {animal.folder: animal for animal in ANIMALS}


def subject_of(folder: str) -> Subject:
    """Return the subject of a class folder: one of the 100 animals, or else a subject named after the folder.

    >>> subject_of("ladybugs").with_article, subject_of("my_red-panda").name
    ('a ladybug', 'my red panda')
    """
    name = re.sub(r"[_\-\s]+", " ", folder).strip() or folder
    return _BY_FOLDER.get(folder) or Subject(folder, name, name)


def find_subject(text: str) -> tuple[Subject, list[str] | None]:
    """Return the animal that `text` names in English, in Chinese or by its folder, in any letter case, and None.

    For any other text, return a subject of exactly that name, and up to three of the 100 animals that may be meant.

    >>> find_subject("a Tiger")
    (Subject(folder='tiger', name='tiger', chinese='老虎'), None)
    >>> find_subject("tigr")
    (Subject(folder='tigr', name='tigr', chinese='tigr'), ['tiger'])
    """
    name = re.sub(r"(?i)^(an?|the)\s+", "", " ".join(text.split()))
    wanted = name.casefold()
    for animal in ANIMALS:
        if wanted in (animal.name, animal.folder, animal.chinese):
            return animal, None
    similar = difflib.get_close_matches(wanted[:100], [animal.name for animal in ANIMALS], n=3)
    similar = similar or [animal.chinese for animal in ANIMALS if set(animal.chinese) & set(wanted)][:3]
    return Subject(name, name, name), similar


def caption(subject: Subject, template: str) -> str:
    """Fill `template` with `subject`: `{}` becomes the name with its article, `{name}` the bare name.

    An article before `{}` is replaced, so "a photo of a {}" works too.

    >>> [caption(subject_of("owl"), template) for template in ("a photo of {}", "a photo of a {}", "a cute {name}")]
    ['a photo of an owl', 'a photo of an owl', 'a cute owl']
    """
    filled = re.sub(r"(?i:\ban? )?\{\}", lambda _: subject.with_article, template)
    return filled.replace("{name}", subject.name)


def _article(name: str) -> str:
    # The sound decides: a unicorn, a European robin, an hour.
    if re.match(r"(?i)(uni(?!m|n)|eu|ewe|one\b)", name):
        return "a"
    return "an" if re.match(r"(?i)[aeiou]|hour|heir|honest", name) else "a"

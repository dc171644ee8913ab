"""Write the results of the last `dvc repro` into the table of both READMEs, between their `results` markers."""

import re
from pathlib import Path

from bestiary.evaluation.report import as_markdown, as_text, heading, read_evaluation
from bestiary.stage import RESULTS

ROOT = Path(__file__).parents[1]


def main() -> None:
    evaluation = read_evaluation(ROOT / RESULTS / "evaluate.json")
    english = "\n".join([heading(evaluation), "", *as_text(evaluation)])
    chinese = "\n".join(as_markdown(evaluation, chinese=True))
    _replace(ROOT / "README.md", r"(?<=<!-- results -->\n```text\n).*?(?=\n```)", english)
    _replace(ROOT / "README.zh-CN.md", r"(?<=<!-- results -->\n).*?(?=\n\n)", chinese)


def _replace(readme: Path, pattern: str, table: str) -> None:
    text = readme.read_text(encoding="utf-8")
    readme.write_text(re.sub(pattern, lambda _: table, text, count=1, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()

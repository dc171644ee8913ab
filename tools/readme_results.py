"""Write the results of the last `dvc repro` into the table of both READMEs, between their `results` markers."""

import re
from pathlib import Path

from bestiary.evaluation.report import as_text, heading, read_evaluation
from bestiary.stage import RESULTS

ROOT = Path(__file__).parents[1]


def main() -> None:
    evaluation = read_evaluation(ROOT / RESULTS / "evaluate.json")
    table = "\n".join([heading(evaluation), "", *as_text(evaluation)])
    for readme in (ROOT / "README.md", ROOT / "README.zh-CN.md"):
        text = readme.read_text(encoding="utf-8")
        block = re.compile(r"(?<=<!-- results -->\n```text\n).*?(?=\n```)", re.DOTALL)
        readme.write_text(block.sub(lambda _: table, text), encoding="utf-8")


if __name__ == "__main__":
    main()

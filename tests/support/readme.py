"""What the READMEs tell a reader to type."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")


def commands(readme: Path, section: str = "") -> list[str]:
    """The commands in a README's bash blocks, without their comments; those of one section if its heading is given."""
    text = readme.read_text(encoding="utf-8")
    if section:
        text = text[text.index(f"\n## {section}\n") :].partition("\n## ")[2].partition("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]

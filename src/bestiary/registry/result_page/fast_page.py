"""The result page with a section about the fast variant: reports/fast.html.

It is a separate file because `register`, an earlier stage, writes the other page.
"""

from __future__ import annotations

from pathlib import Path

from bestiary.errors import BestiaryError
from bestiary.evaluation.acceptance import HEADER, AcceptanceReport, heading, table_rows
from bestiary.files import write_atomically
from bestiary.registry.registering import Registration
from bestiary.registry.result_page.page import environment, is_about, read_picture
from bestiary.registry.versions import REGISTER

NEXT_SECTION = '<section id="use">'  # follows the section about the fast variant


def write_fast_page(path: Path, page: Path, registration: Registration, report: AcceptanceReport, sheet: Path) -> None:
    """Write the result page `page` to `path`, with a section about the fast variant and its sheet of pictures.

    Raises BestiaryError when there is no page about this adapter.
    """
    if not is_about(page, report.adapter_sha256):
        raise BestiaryError(f"{page} is missing or about another adapter. Run `{REGISTER}`.")
    section = (
        environment()
        .get_template("fast_variant.html")
        .render(
            report=report,
            heading=heading(report),
            header=HEADER,
            rows=list(table_rows(report)),
            sheet=read_picture(sheet),
            command=f"bestiary pull models:/{registration.name}/{registration.version} --fast --out my-fast-variant",
        )
    )
    before, mark, after = page.read_text(encoding="utf-8").partition(NEXT_SECTION)
    write_atomically(path, f"{before}{section}\n{mark}{after}".encode())

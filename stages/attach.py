"""Store the fast variant with the registered version of its adapter if it was accepted, and write its page."""

import sys
from dataclasses import asdict
from pathlib import Path

from bestiary.evaluation.acceptance import read_acceptance
from bestiary.registry.attaching import Candidate, attach
from bestiary.registry.registering import read_registration
from bestiary.registry.result_page.fast_page import write_fast_page
from bestiary.stage import REPORTS, RESULTS, stage

FEW_STEP, FAST, ACCEPTANCE = Path("models/few_step"), Path("models/fast"), RESULTS / "accept.json"


def main() -> None:
    with stage("attach") as (_, run):
        registration = read_registration(RESULTS / "register.json")
        candidate = Candidate(FEW_STEP, FAST, read_acceptance(ACCEPTANCE), ACCEPTANCE)
        attachment = attach(registration, candidate, run.id, lambda line: print(f"attach: {line}", file=sys.stderr))
        pages, sheet = (REPORTS / "fast.html", REPORTS / "index.html"), REPORTS / "accept" / "sheet.png"
        write_fast_page(*pages, registration, candidate.report, sheet)
        run.report(asdict(attachment), headlines=("version", "fast"))


if __name__ == "__main__":
    main()

"""Store the fast variant with the registered version of its adapter, if it was accepted."""

from dataclasses import asdict
from pathlib import Path

from bestiary.evaluation.acceptance import read_acceptance
from bestiary.registry.attaching import Candidate, attach
from bestiary.registry.registering import read_registration
from bestiary.stage import RESULTS, stage

FEW_STEP, FAST, ACCEPTANCE = Path("models/few_step"), Path("models/fast"), RESULTS / "accept.json"


def main() -> None:
    with stage("attach") as (_, run):
        registration = read_registration(RESULTS / "register.json")
        candidate = Candidate(FEW_STEP, FAST, read_acceptance(ACCEPTANCE), ACCEPTANCE)
        run.report(asdict(attach(registration, candidate, run.id)), headlines=("version", "fast"))


if __name__ == "__main__":
    main()

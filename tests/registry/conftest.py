from pathlib import Path

import pytest
from support.registry import make_adapter


@pytest.fixture(scope="session")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three different adapters of the embedded base."""
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(base_folder, folder / str(seed), seed) for seed in range(3)]

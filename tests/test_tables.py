from pathlib import Path

import pandas as pd
import pytest

from bestiary.tables import for_spreadsheet, read_table, spreadsheet_text, typed_text

NAMES = ["001", "NA", "null", "None", "nan", "1e5", "true", "", " x", "-1", 'a "b"', "a,b"]


def test_text_is_read_as_it_was_written(tmp_path: Path) -> None:
    pd.DataFrame({"class": NAMES, "width": range(len(NAMES))}).to_csv(tmp_path / "table.csv", index=False)
    table = read_table(tmp_path / "table.csv", {"width": int, "height": int})
    assert table["class"].tolist() == NAMES
    assert table["width"].sum() == sum(range(len(NAMES)))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_formula_is_written_as_text_and_read_back(text: str) -> None:
    assert spreadsheet_text(text) == f"'{text}"
    assert typed_text(spreadsheet_text(text)) == text


@pytest.mark.parametrize("text", ["owl", "1-1", "'owl'", "", "a=b"])
def test_other_text_stays(text: str) -> None:
    assert spreadsheet_text(text) == typed_text(text) == text


def test_numbers_in_a_table_for_a_spreadsheet_stay_numbers() -> None:
    table = for_spreadsheet(pd.DataFrame({"class": ["=x", "owl"], "delta": [-0.25, 1.5], "seed": [-1, 2]}))
    assert table.to_csv(index=False) == "class,delta,seed\n'=x,-0.25,-1\nowl,1.5,2\n"

"""docs/tour.ipynb: its cells run in order in one namespace, as a kernel runs them, and have no outputs."""

import json

import torch

from tests.folders import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))


def test_the_tour_runs_from_top_to_bottom(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "docs")
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    namespace: dict = {}
    with torch.random.fork_rng():
        for number, cell in enumerate(cells):
            exec(compile(cell, f"cell {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "tokens instead of" in printed and "adapters," in printed and "after merging" in printed
    assert float(printed.rpartition("after merging: ")[2]) < 1e-3


def test_the_notebook_is_stored_without_outputs():
    assert all(not cell.get("outputs") for cell in NOTEBOOK["cells"])

"""docs/tour.ipynb: its cells run from top to bottom, in one namespace, as a notebook's kernel runs them."""

import json

import torch

from tests.folders import ROOT


def test_the_tour_runs_from_top_to_bottom(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "docs")
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace: dict = {}
    with torch.random.fork_rng():
        for number, cell in enumerate(cells):
            exec(compile(cell, f"cell {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "tokens instead of" in printed and "adapters," in printed and "after merging" in printed
    assert float(printed.rpartition("after merging: ")[2]) < 1e-3


def test_the_notebook_is_stored_without_outputs():
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])

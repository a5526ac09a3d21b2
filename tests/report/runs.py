"""Writes folders of finished runs as train.py leaves them, with responses of the test's choice."""

import json
from pathlib import Path

GOLDS = [(f"Mask this. Say {n}", f"It is [GIVENNAME_1] and {n}.") for n in range(30)]


def write_run(
    folder: Path, responses: list[str], golds=GOLDS, config: str = "", task: str = "redaction", **manifest
) -> Path:
    """Writes config.toml, answers.jsonl, metrics.jsonl and manifest.json; one validation set, val."""
    folder.mkdir(parents=True)
    text = f'[run]\nname = "{folder.name}"\n[train]\nlearning_rate = 0.001\n{config}'
    (folder / "config.toml").write_text(text, encoding="utf-8")
    rows = [
        {"set": "val", "id": f"val.jsonl:{n}", "prompt": prompt, "gold": gold, "before": "", "after": said}
        for n, ((prompt, gold), said) in enumerate(zip(golds, responses, strict=True), 1)
    ]
    lines(folder / "answers.jsonl", rows)
    records = [{"step": s, "loss": 2 / s, "learning_rate": 1e-3, "grad_norm": 1.0} for s in range(1, 31)]
    records += [{"step": s, "eval": {"set": "val", "loss": 2 / s}} for s in (10, 20, 30)]
    lines(folder / "metrics.jsonl", records)
    facts = {"tasks": {"val": task}, "base_sha256": "ab" * 32, "data_sha256": {"train.jsonl": "cd" * 32}}
    facts |= {"after": {"val": {"loss": 0.5, "rows": len(rows)}}, "environment": {"torch": "2"}} | manifest
    (folder / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

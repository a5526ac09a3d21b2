"""Writes docs/reliability.md: what can happen to a run or stand in a file, and the tests of what follows.

    python tests/faults/table.py

A test names the faults that it holds, by their keys in FAULTS: @pytest.mark.fault("kill in a step").
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"

# {section: {key of the marks: (what happens, what follows)}}
FAULTS: dict[str, dict[str, tuple[str, str]]] = {
    "A run": {
        "kill in a run": (
            "SIGKILL at any step, in an accumulation or an epoch, in an evaluation",
            "after `--resume` the losses and the adapter's SHA-256 are those of a run that was not killed",
        ),
        "kill in a save": (
            "SIGKILL in any phase of a save",
            "the checkpoint before it loads; temporary files are ignored and removed",
        ),
        "stop": (
            "Ctrl-C, SIGTERM, SIGHUP, a closed terminal or pipe",
            "a checkpoint is saved, the resume command printed, exit code 130",
        ),
        "full disk": (
            "a full disk or a read-only folder",
            "the run stops before training, or keeps the old checkpoint and names the folder and the space",
        ),
        "damaged checkpoint": (
            "a checkpoint that is cut off or has a flipped byte",
            "found by its hash and named; the run goes on from the one before it, or stops",
        ),
        "damaged adapter": (
            "an adapter of a run that is cut off or has a flipped byte",
            "found by its hash, and restored from the checkpoint or named",
        ),
        "changed run": (
            "a resume with another config, data file or base",
            "refused, with every difference; `adapter.init_from` continues from the adapter",
        ),
        "edited data": (
            "a data file that is edited or deleted while a run trains",
            "the manifest has the hash of what was read",
        ),
        "two runs": ("two runs in one folder", "the second is refused by a lock"),
        "NaN": (
            "a loss or a gradient that is not finite",
            "the step is not applied; the layer and the samples are named",
        ),
        "divergence": ("a loss that grows out of bounds", "the run stops, and the best adapter is kept"),
        "out of memory": ("out of memory", "the plan's figures and one concrete remedy"),
        "accumulation": (
            "1 x 8, 2 x 4 and 8 x 1 rows of unequal lengths",
            "the gradients of the real full batch, in float64",
        ),
        "packing": (
            "documents packed into one stream",
            "each has the loss that it has alone, and its neighbour's text changes no bit of it",
        ),
        "few rows": ("fewer rows than a batch, one row, equal rows", "steps of what there is; no empty set"),
        "precision": ('`precision = "auto"` on another machine', "a resume keeps the answer of the start"),
        "lost answer": (
            "generate.py killed, or its disk full",
            "no answer that was reported is lost, and the same command goes on",
        ),
    },
    "Rows": {
        "bad row": (
            "a line that is no JSON, a byte that is no UTF-8, a missing key, an empty response",
            "an error with file and line, all at once; or a counted skip where that is asked for",
        ),
        "BOM": ("a BOM, CRLF", "read as if they were not there"),
        "special tokens": (
            "special tokens spelled in a row",
            "text, counted and said once; `data.special_tokens` decides",
        ),
        "turns": (
            "Gemma's turns spelled in a row",
            "read as turns, and said once, or refused with the remedy",
        ),
        "long rows": (
            "a prompt longer than the limit, a batch without a supervised token",
            "counted by policy; never 0 / 0",
        ),
        "vocabulary": (
            "a token id past the vocabulary, another model's tokenizer",
            "an error before training",
        ),
        "formats": (
            "ShareGPT, prompt and completion, content parts, role model, CSV, gz, text, parquet",
            "read, or one line that says what is missing",
        ),
        "system": ("`system`, `history` and `context` of a row", "used"),
        "weight": ('turns of weight 0; `data.loss_on = "last"`', "not supervised"),
        "tools": ("tool calls and functions in a row", "refused, with the keys that would be lost"),
        "label": (
            "a text with a label",
            "refused, or read as a classification; never raw text without its label",
        ),
        "other keys": ("any other key of a row", "known metadata is ignored, the rest listed once"),
        "nested": ("rows below a key, pretty-printed objects", "read, or refused with the remedy"),
        "no file": ("a pipe, a device, a folder instead of a file", "one line"),
        "deep JSON": (
            "JSON or TOML that is nested deeply, a number of 5,000 digits",
            "one line, no RecursionError",
        ),
    },
    "Models and adapters": {
        "pickle": ("a pickle file offered as weights", "refused, unread"),
        "hub": ("a gated model, no network", "one line with the remedy; a cached copy works"),
        "untied head": (
            "a head that differs from the embedding under a tied config",
            "refused, with the remedy",
        ),
        "quantized checkpoint": ("a checkpoint of bitsandbytes", "named for what it is, with the remedy"),
        "other checkpoint": (
            "a classifier, a compiled model's prefix, a tokenizer of sentencepiece only",
            "loaded, or one line that says what it is",
        ),
        "foreign adapter": (
            "adapters with lm_head, embed_tokens, `.default.` keys, layers_to_transform, of mlx-lm",
            "loaded, or one line that says what is not supported",
        ),
        "chat template": (
            "a chat template that differs from the turns that were trained",
            "the export has the trained one, or is refused",
        ),
        "not finite": ("NaN or infinity in a base, an adapter or its settings", "refused by every command"),
        "impossible size": ("sizes and settings that cannot be right", "exit code 2, the key and its limit"),
        "slow pattern": ("a regular expression in an adapter that would never end", "bounded"),
    },
    "Exports and other commands": {
        "kill in an export": (
            "an export killed at any moment",
            "no file under the final name that is not whole",
        ),
        "user's files": (
            "`--force` onto a folder with other files",
            "they are named, and the export refused",
        ),
        "stop tokens": ("an export of a pre-trained base with a chat adapter", "it stops at <end_of_turn>"),
        "bad argument": ("arguments that are empty, no UTF-8, or have NUL", "exit code 2 and the argument"),
        "many mistakes": (
            "several mistakes in one config",
            "all at once, with the right name of a misspelt one",
        ),
        "escape sequences": ("escape sequences in rows and answers", "printed as text"),
        "HTML": ("HTML in rows and answers", "shown as text in a report"),
    },
}


HEAD = """# Reliability

What can happen to a run or stand in a file, what follows, and the tests that hold it.
`python tests/faults/table.py` writes this page from the tests' marks.

- `python -m pytest tests/faults` kills runs, fills disks and damages files on a small model.
- `python -m tests.faults.kills 100` kills 100 times and prints the seconds that a kill cost."""


def marked() -> dict[str, list[str]]:
    """Returns {key: ["tests/file.py::test_name", ...]} of all tests with the mark `fault`.

    Raises ValueError for keys that FAULTS lacks, and for faults that no test holds.
    """
    keys = [key for section in FAULTS.values() for key in section]
    found: dict[str, list[str]] = {key: [] for key in keys}
    unknown = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        name = file.relative_to(ROOT).as_posix()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                for key in _marks(node):
                    found.setdefault(key, []).append(f"{name}::{node.name}")
                    unknown += [f"{name}::{node.name}: {key}"] * (key not in keys)
    if unknown or (bare := [key for key in keys if not found[key]]):
        raise ValueError(f"unknown faults: {unknown}" if unknown else f"no test holds: {bare}")
    return found


def _marks(test: ast.FunctionDef) -> list[str]:
    calls = [d for d in test.decorator_list if isinstance(d, ast.Call)]
    return [arg.value for d in calls if ast.unparse(d.func) == "pytest.mark.fault" for arg in d.args]


def page() -> str:
    """Returns the text of docs/reliability.md."""
    tests, lines = marked(), [HEAD]
    for title, faults in FAULTS.items():
        lines += [f"\n## {title}\n", "| what happens | what follows | tests |", "|---|---|---|"]
        for key, (what, then) in faults.items():
            names = "<br>".join(f"[{name.split('::')[1]}](../{name.split('::')[0]})" for name in tests[key])
            lines.append(f"| {what} | {then} | {names} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE.relative_to(ROOT)}\n")

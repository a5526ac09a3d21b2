"""Makes a checkpoint of the 270M shape and lab-like rows for the other benchmarks.

    python benchmarks/lab_like.py FOLDER [--rows 1000]

Writes FOLDER/model (random bfloat16 weights, 262,144 vocabulary entries), rows.jsonl, loupe.toml (the run's
config), and tokens.json: the same rows, tokenized by Loupe, with labels as Hugging Face's models take them.
Each row has the same instruction of 75 tokens, a text of 20 to 200 tokens, and a response about as long.
"""

import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

INSTRUCTION = (
    "Mask all PII in the following text. Replace each entity with the exact UPPERCASE label in square "
    "brackets (e.g., [PERSON], [EMAIL], [PHONE]). "
    "Preserve all non-PII text, whitespace, and punctuation exactly. Return ONLY the redacted text."
)
# Shortest and longest text of a row, in tokens.
SHORTEST, LONGEST = 20, 200
RANK, BATCH = 128, 8
RECIPE = f"""[model]
name = {{model}}

[adapter]
r = {RANK}
lora_alpha = {RANK}
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

[data]
train = {{rows}}
validation_fraction = 0

[train]
batch_size = {BATCH}
learning_rate = 5e-5
shuffle = false
precision = "bf16"
"""


def make_rows(tokenizer, count: int) -> list[dict]:
    """Returns `count` pairs with one short instruction, in a fixed random order.

    They are the pairs of assets/samples with SHORTEST to LONGEST tokens of text, repeated if too few.
    """
    rows = []
    for line in (ROOT / "assets" / "samples" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        text = pair["prompt"].partition("\n\nText:\n")[2]
        if SHORTEST <= len(tokenizer.encode(text)) <= LONGEST:
            rows.append({"prompt": f"{INSTRUCTION}\n\nText:\n{text}", "response": pair["response"]})
    random.Random(0).shuffle(rows)
    return [rows[i % len(rows)] for i in range(count)]


def make_tokens(folder: Path, tokenizer) -> list[dict]:
    """Returns {"input_ids", "labels"} of each row; labels are not shifted, IGNORE_INDEX if unsupervised."""
    from data.render import IGNORE_INDEX, render_all
    from data.rows import read_samples

    documents, _ = render_all(read_samples([str(folder / "rows.jsonl")])[0], tokenizer)
    return [{"input_ids": d.input_ids, "labels": [IGNORE_INDEX, *d.labels[:-1]]} for d in documents]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    args = parser.parse_args()
    from benchmarks.exports import make
    from model.tokenizer import Tokenizer

    folder = args.folder.resolve()
    make("270M", folder / "model")
    tokenizer = Tokenizer(folder / "model")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(tokenizer, args.rows)]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    model, rows = (json.dumps(str(folder / name)) for name in ("model", "rows.jsonl"))
    (folder / "loupe.toml").write_text(RECIPE.format(model=model, rows=rows), encoding="utf-8")
    # tokens.json is written last: the other benchmarks take its presence for a complete folder.
    (folder / "tokens.json").write_text(json.dumps(make_tokens(folder, tokenizer)), encoding="utf-8")


if __name__ == "__main__":
    main()

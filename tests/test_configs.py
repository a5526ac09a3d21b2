"""small.toml, configs/ and the samples: recipes load and have full headers, samples are as generated."""

import json
import re
from collections import Counter

import pytest

from assets.samples import make_small, make_translation
from data.loader import prompt_of
from data.rows import read_samples
from tasks.redaction import INSTRUCTION
from tests.folders import ROOT, TARGETS
from training.config import Adapter, load_config

RECIPES = [ROOT / "small.toml", *sorted((ROOT / "configs").glob("*.toml"))]
# The data of these is not in the checkout.
BRING_YOUR_OWN = ("lab-pii-270m.toml", "tiny-base.toml", "tiny-base-2.toml")
SAMPLES = ROOT / "assets" / "samples"

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)


@each_recipe
def test_every_recipe_loads(path):
    cfg = load_config(path)
    assert cfg.run.dir == f"runs/{cfg.run.name}" and cfg.data.train


@each_recipe
def test_a_recipe_says_in_its_header_what_it_costs_and_how_to_run_it(path):
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert header and f"train.py --config {path.relative_to(ROOT).as_posix()}" in header[0]
    assert re.search(r"^# costs: +\S", header[0], re.M)
    assert re.search(r"^# measured: +(?!not yet)\S", header[0], re.M)


@pytest.mark.parametrize("path", [p for p in RECIPES if p.name not in BRING_YOUR_OWN], ids=lambda p: p.name)
def test_the_data_of_a_recipe_is_in_the_checkout_and_validation_is_not_trained_on(path):
    cfg = load_config(path)
    trained, problems = read_samples([ROOT / file for file in cfg.data.train])
    held_out = read_samples([ROOT / file for file in cfg.data.validation])[0] if cfg.data.validation else []
    assert not problems and not {prompt_of(s) for s in trained} & {prompt_of(s) for s in held_out}


def test_the_labs_recipe_is_the_labs():
    cfg = load_config(ROOT / "configs" / "lab-pii-270m.toml")
    expected = Adapter(type="lora", r=128, lora_alpha=128.0, lora_dropout=0.0, target_modules=TARGETS)
    assert cfg.adapter == expected
    t = cfg.train
    assert (t.batch_size, t.gradient_accumulation_steps, t.epochs, t.learning_rate) == (8, 1, 1, 5e-5)
    assert (t.lr_scheduler, t.warmup_steps, t.weight_decay) == ("linear", 5, 0.01)
    assert (cfg.run.seed, cfg.data.max_length) == (3407, 2048)
    assert cfg.data.loss_on == "response" and cfg.data.validation_fraction > 0
    assert cfg.generate.prompts[0].startswith(INSTRUCTION + "\n\nText:\n")


@pytest.mark.parametrize("script", [make_small, make_translation], ids=lambda m: m.__name__)
def test_the_small_samples_are_what_their_script_writes(script):
    for name, rows in script.make_all().items():
        written = (SAMPLES / name).read_text(encoding="utf-8")
        assert written == script.to_jsonl(rows), f"{name}: run {script.__name__.replace('.', '/')}.py"


def test_no_pair_of_a_colour_and_a_thing_of_the_validation_translations_is_trained_on():
    colours = "|".join(make_translation.COLOURS)
    things = "|".join(f"{thing.one}|{thing.many}" for thing in make_translation.THINGS)
    singular = {thing.many: thing.one for thing in make_translation.THINGS}
    pairs = {}
    for name in ("translation", "translation-val"):
        text = (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8")
        found = re.findall(rf"\b({colours}) ({things})\b", text)
        pairs[name] = {(colour, singular.get(thing, thing)) for colour, thing in found}
    assert len(pairs["translation"]) > 150 and len(pairs["translation-val"]) == 8 * 24 // 6
    assert not pairs["translation"] & pairs["translation-val"]
    for side in (0, 1):  # every colour and every thing of validation is trained on
        assert {p[side] for p in pairs["translation-val"]} <= {p[side] for p in pairs["translation"]}


def test_the_classes_are_balanced_and_no_review_of_validation_shares_a_clause_with_training():
    clauses = {}
    for name in ("classification", "classification-val"):
        lines = (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        counts = Counter(row["output"] for row in rows)
        assert counts == dict.fromkeys(("positive", "negative", "neutral"), len(rows) // 3)
        clauses[name] = {clause for row in rows for clause in re.split(r"(?<=[.!])\s(?!!)", row["input"])}
    assert not clauses["classification"] & clauses["classification-val"]

"""benchmarks/: ours.py counts products, frameworks.py and rl_peers.py compare steps, gpu.py reports a run,
rl_gain.py has a control."""

import json
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import frameworks, gpu, rl_gain, rl_peers
from benchmarks.ours import flops, products_alone, record_products
from training.objectives.rewards import default_rewards


def test_a_linear_layers_three_products_are_recorded_and_counted():
    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    calls = record_products(lambda: torch.nn.functional.linear(x, w).sum().backward())
    assert sorted((a[0], b[0]) for a, b in calls) == [((4, 5), (5, 3)), ((5, 3), (3, 4)), ((5, 4), (4, 3))]
    assert flops(calls) == 3 * 2 * 5 * 3 * 4
    assert products_alone(calls)() > 0


def test_products_of_a_batch_and_products_added_in_place_are_counted_too():
    y, a, b = torch.randn(5, 4), torch.randn(5, 3), torch.randn(3, 4)
    calls = record_products(lambda: (y.addmm_(a, b), torch.randn(2, 5, 3) @ torch.randn(2, 3, 4)))
    assert flops(calls) == (1 + 2) * 2 * 5 * 3 * 4


def test_a_step_is_compared_round_by_round_and_the_median_is_taken(tmp_path):
    """The plain step takes 2, 4 and 1 s. The peer's takes 10, 12 and 100 s: 5, 3 and 100 times as long. The
    compiled step takes 4 s, in the first round only.
    """
    documents = [{"input_ids": [1] * n} for n in (100, 100, 300, 100, 40, 60)]
    (tmp_path / "tokens.json").write_text(json.dumps(documents))
    facts = {"peak": 10**9, "first_step": 1.0, "flops": 10**12}
    ours = [
        ("loupe", 0, [2.0, 2.0, 9.0], 1.0),
        ("loupe", 1, [4.0], 3.0),
        ("loupe", 2, [1.0], 0.8),
        ("loupe-compiled", 0, [4.0], 2.0),
    ]
    turns = [*ours, ("hf-bf16", 0, [10.0], 0), ("hf-bf16", 1, [12.0], 0), ("hf-bf16", 2, [100.0], 0)]
    results = [
        {"name": name, "round": n, "seconds": seconds, "ceiling": ceiling, **facts}
        for name, n, seconds, ceiling in turns
    ]
    args = SimpleNamespace(folder=tmp_path, batch=2, peak_tflops=1)
    loupe, compiled, peer = frameworks.summarise(results, args)
    assert loupe["times"] == [1, 0.5] and compiled["times"] == [2, 1] and peer["times"] == [5, 2.5]
    assert (loupe["speed"], peer["speed"]) == (100, 20)
    assert (loupe["share"], compiled["share"]) == (3 / 4, 2 / 4)
    assert abs(peer["share"] - 1 / 10) < 1e-12


def test_a_run_of_the_recipe_is_reported_in_a_line_and_a_failed_one_is_named(tmp_path, monkeypatch):
    commands = []

    def trained(command, **_):
        commands.append(" ".join(command))
        run = Path(next(word for word in command if word.startswith("run.dir=")).removeprefix("run.dir="))
        run.mkdir(parents=True)
        same = {"seconds": 0.5, "tokens": 100, "mfu": 0.25}
        steps = [{"step": i, "loss": 30.0 - i, "peak_memory": i * 10**8, **same} for i in range(1, 26)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        return SimpleNamespace(returncode=0 if "train.compile=true" in command else 1)

    monkeypatch.setattr(subprocess, "run", trained)
    args = SimpleNamespace(folder=tmp_path, device="cuda", steps=0)
    said = gpu.train("bf16, compiled", args)
    assert "25 steps in 12.5 s  200 tokens/s  MFU 25.0%  peak 2.50 GB  loss 19.500 -> 14.500" in said
    assert "--set train.precision=bf16 --set train.compile=true" in commands[0]
    assert "configs/lab-pii-270m.toml" in commands[0]
    assert gpu.train("fp16", args).endswith("failed with exit code 1")
    assert "train.force_fp16=true" in commands[1]


def test_trls_steps_are_compared_with_loupes_of_the_same_round_and_objective():
    facts = {"peak": 10**9, "whole": 60.0}
    turns = [("loupe-dpo", 1, [2.0, 2.0, 9.0]), ("loupe-dpo", 2, [4.0]), ("loupe-grpo", 1, [1.0])]
    turns += [("trl-dpo", 1, [10.0]), ("trl-dpo", 2, [12.0]), ("trl-grpo", 2, [7.0])]
    loupe, trl, _, trl_alone = rl_peers.summarise(
        [{"name": name, "round": n, "seconds": seconds, **facts} for name, n, seconds in turns]
    )
    assert (loupe["seconds"], loupe["times"]) == (3, 1)
    assert (trl["seconds"], trl["times"]) == (11, 4)  # 5 and 3 times as long
    assert trl_alone["times"] is None  # Loupe has no turn of GRPO in its round.


def test_a_turn_of_loupe_trains_with_the_jobs_config_on_the_rows_of_the_round(tmp_path, monkeypatch):
    text = "x" * 50
    rows = [{"prompt": f"Mask.\n\nText:\n{i} {text}", "response": f"[A_1] {text}"} for i in range(4)]
    labels = [
        [-100] * 200 + [1] * answer for answer in (100, 10, 100, 100)
    ]  # The second answer is too short.
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tokens.json").write_text(json.dumps([{"labels": x} for x in labels]))
    seen = {}

    def trained(command):
        path = Path(command[command.index("--config") + 1])
        seen["config"] = cfg = tomllib.loads(path.read_text())
        seen["rows"] = [json.loads(line) for line in Path(cfg["data"]["train"]).read_text().splitlines()]
        seen["rewards"] = [path.parent / name.replace(":length", ".py") for name in cfg["grpo"]["rewards"]]
        assert all("def length" in file.read_text() for file in seen["rewards"])
        run = Path(cfg["run"]["dir"])
        run.mkdir()
        steps = [{"step": i, "loss": 0.0, "seconds": i, "peak_memory": 100 * i} for i in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
        return ""

    monkeypatch.setattr(rl_peers, "process", trained)
    args = SimpleNamespace(folder=tmp_path, model=tmp_path, steps=1, set=[])
    turn = rl_peers.take_turn("loupe-grpo", 1, args)
    assert (turn["seconds"], turn["peak"]) == ([2], 200)  # The first step is not timed.
    assert seen["config"]["train"]["objective"] == "grpo" and seen["config"]["train"]["max_steps"] == 2
    # The first round takes rows 2 and 3 of the three rows that fit, and begins anew after the last.
    assert [row["prompt"][13] for row in seen["rows"]] == ["3", "0"] and "response" in seen["rows"][0]


def test_the_controls_reward_exchanges_the_rewards_of_a_prompt_and_no_others():
    prompts = ["Call Ann Lee."] * 4 + ["Call Bo."] * 3
    golds = ["Call [GIVENNAME_1] [SURNAME_1]."] * 4 + ["Call [GIVENNAME_1]."] * 3
    texts = [golds[0], prompts[0], "Call [GIVENNAME_1] Lee.", "", golds[-1], prompts[-1], "Call"]
    honest, _ = default_rewards("redaction", [])(prompts, texts, golds, [True] * 7)
    found = rl_gain.shuffled_reward(prompts, texts, golds, [True] * 7)
    assert len(set(honest[:4])) == 4 and len(set(honest[4:])) == 3 and found != honest
    assert sorted(found[:4]) == sorted(honest[:4]) and sorted(found[4:]) == sorted(honest[4:])

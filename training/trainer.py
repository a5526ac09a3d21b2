"""The parts of a training run, in the order of their calls: open, load, measure, fit, measure, report."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, cast

import torch
from safetensors import SafetensorError

from common import machine
from common.device import Precision, device_name
from common.errors import DONE, FAILED, STOPPED, DiskError
from common.files import full_disk, need_space, sha256
from common.progress import bar, complain, printable, say, warn
from data.rows import Sample
from lora.inject import disabled, unwrap
from lora.peft_io import CONFIG as ADAPTER_CONFIG
from lora.peft_io import WEIGHTS as ADAPTER_WEIGHTS
from lora.peft_io import load_adapter, save_adapter
from model.chat_template import save_tokenizer
from model.quantized import all_weights
from model.weights import load_model, save_model
from report.diagnosis import Diagnosis, Kept, diagnose
from report.html import write_report
from report.metrics_log import before_after_table, read_metrics
from report.retention import retention_changes, retention_lines
from tasks import text
from tasks.choose import name_of
from training import build, checkpoint, evaluation, loop
from training.config import Config, Train, load_config
from training.dataset import TrainingData, ValidationSet
from training.flops import peak_flops, step_flops
from training.objectives.objective import Objective
from training.objectives.rewards import RewardError
from training.objectives.sft import SupervisedFineTuning
from training.optim import Optimizers, make_optimizers
from training.run_folder import RunFolder, environment, fingerprint, refuse_if_changed

if TYPE_CHECKING:
    from common.progress import Bar

# A checkpoint has weights, two moments and the best weights in float32, for each trainable parameter.
CHECKPOINT_BYTES = 16


@dataclass(frozen=True)
class OpenRun:
    """A run that has locked its folder and picked its device; model and data are not loaded."""

    cfg: Config
    folder: RunFolder
    precision: Precision
    resume: bool


@dataclass(frozen=True)
class LoadedRun(OpenRun):
    """A run with model, adapters and data; in `cfg`, train.compile and precision are no longer "auto"."""

    base: build.BaseModel
    data: TrainingData
    objective: Objective
    trainable: int  # parameters

    @property
    def trains_all(self) -> bool:
        return self.cfg.adapter.type == "full"

    @property
    def best(self) -> Path:
        """The folder of the best weights."""
        return self.folder.path / ("model" if self.trains_all else "adapter")


def open_run(cfg: Config, resume: bool) -> OpenRun:
    """Picks device and precision, seeds torch, and creates and locks the folder of the run."""
    cfg, precision = build.prepare(cfg)
    torch.manual_seed(cfg.run.seed)
    folder = RunFolder(cfg, resume)
    if resume:
        cfg = _as_it_began(cfg, load_config(folder.path / "config.toml").train)
        precision = Precision(cfg.train.precision, precision.device)
    return OpenRun(cfg, folder, precision, resume)


def _as_it_began(cfg: Config, train: Train) -> Config:
    """Returns the config with what "auto" meant when the run began: this machine may answer otherwise."""
    auto = {k: getattr(train, k) for k in ("compile", "precision") if getattr(cfg.train, k) == "auto"}
    if auto.get("compile"):
        build.tolerate_compiler_errors()
    return replace(cfg, train=replace(cfg.train, **auto))


def load(run: OpenRun) -> LoadedRun:
    """Loads base and data, adds adapters, checks the free disk space; a new run then writes its config."""
    base, data = build.load_base(run.cfg, run.precision)
    trainable = build.add_adapters(base.model, run.cfg)
    name = cast(Literal["fp32", "bf16", "fp16"], run.precision.name)
    cfg = replace(run.cfg, train=replace(run.cfg.train, precision=name))
    cfg = build.resolve_compile(base.model, cfg, data.documents, run.precision.device)
    if cfg.train.compile:
        base.model.compile_layers()
        say("compiling  the layers: half a minute before the first step, then shorter steps (train.compile)")
    total = sum(w.numel() for w in all_weights(base.model).values())
    share = f"{trainable / 1e6:.2f} M of {total / 1e6:.2f} M parameters are trainable ({cfg.adapter.type})"
    say(f"model      {cfg.model.name}, {share}, {run.precision.name} on {device_name(run.precision.device)}")
    # One checkpoint more than are kept, while it is written; adapter/ too is written beside the old one.
    needed = (cfg.train.save_total_limit + 1) * CHECKPOINT_BYTES * trainable + 2 * 4 * trainable
    need_space(run.folder.path, needed, "the run with its checkpoints", "set run.dir elsewhere")
    if not run.resume:  # a resume writes its config after it has proved to be of the same run
        run.folder.begin(cfg)
    objective = build.make_objective(cfg)
    loaded = LoadedRun(cfg, run.folder, run.precision, run.resume, base, data, objective, trainable)
    _begin(loaded)
    return loaded


def _begin(run: LoadedRun) -> None:
    """Lets the objective see the model at the start of the run: a resume loads its checkpoint later."""
    loader = build.build_loader(run.cfg, run.data.documents)
    schedule = build.build_schedule(run.cfg, loader)
    used = build.used_documents(run.cfg, loader, schedule, run.objective)
    used = chain(used, *(v.documents for v in run.data.validation))
    m = run.cfg.model
    start = repr((run.base.hash, sorted(_adapter_hashes(run.cfg).items()), m.dtype, m.quantize))
    run.objective.begin(run.base, run.data.samples, used, start)


def measure(run: LoadedRun, what: str) -> dict:
    """Returns measures and responses of each validation set, figures of data.retention, and responses to
    generate.prompts.
    """
    cfg, base, measured, texts = run.cfg, run.base, {}, {}
    for v in run.data.validation:
        loss = evaluation.mean_loss(base.model, run.objective, v.documents, run.precision)
        answers = evaluation.answer(base, v.samples, cfg.generate, cfg.run.seed, f"{what}: {v.name}")
        if answers.cut:
            limits = "generate.max_new_tokens or max_new_ratio"
            say(f"{what}: {answers.cut} of {len(answers.texts)} responses of {v.name} cut off at {limits}")
        measured[v.name] = {"rows": len(v.samples)} | loss
        measured[v.name] |= evaluation.measures(answers, v.task, v.labels)
        measured[v.name] |= evaluation.label_measures(base, v.samples, v.labels)
        measured[v.name] |= run.objective.score(answers)
        if v.task is text and cfg.train.objective == "sft":
            measured[v.name] |= evaluation.text_measures(loss, v.documents, base.tokenizer)
        texts[v.name] = {"prompts": answers.prompts, "golds": answers.golds, "texts": answers.texts}
        texts[v.name]["ids"] = [s.id for s in v.samples if s.messages is not None]
    prompts = [
        Sample(f"prompt {i}", (("user", p), ("assistant", ""))) for i, p in enumerate(cfg.generate.prompts, 1)
    ]
    shown = evaluation.answer(base, prompts, cfg.generate, cfg.run.seed, what, quiet=True)
    retention = {v.name: _retained(run, v) for v in run.data.retention}
    return {"measures": measured, "answers": texts, "prompts": shown.texts, "retention": retention}


def _retained(run: LoadedRun, general: ValidationSet) -> dict:
    """Returns the figures of a set of data.retention: the loss per supervised token, whatever is trained."""
    objective, base = SupervisedFineTuning(), run.base
    found = evaluation.mean_loss(base.model, objective, general.documents, run.precision)
    more = evaluation.text_measures(found, general.documents, base.tokenizer)
    return {"rows": len(general.documents), "loss": found["loss"], "tokens": found["tokens"]} | more


def measure_before(run: LoadedRun) -> dict | None:
    """Returns the measures of the model before training, and keeps them in before.json for a resume.

    Returns None for new adapters: measure_after disables these to measure the base.
    """
    if not run.trains_all and not run.cfg.adapter.init_from:
        return None
    before = (run.folder.read_json("before.json") if run.resume else None) or measure(run, "before training")
    run.folder.write_json("before.json", before)
    return before


def measure_after(run: LoadedRun, before: dict | None) -> tuple[dict, dict]:
    """Returns (before, after): measures the trained model; if `before` is None, also the base model."""
    after = measure(run, "after training")
    if before is None:
        with disabled(run.base.model):
            before = measure(run, "the base, to compare")
    return before, after


def fit(run: LoadedRun, resume_command: str) -> tuple[int, loop.State]:
    """Trains and loads the best weights; returns the exit code and the progress.

    The code is STOPPED after a signal. It is FAILED after divergence, a full disk or memory, told on stderr.
    """
    cfg, model = run.cfg, run.base.model
    loader = build.build_loader(cfg, run.data.documents)
    schedule = build.build_schedule(cfg, loader)
    t = cfg.train
    optimizers = make_optimizers(model, t.optimizer, t.learning_rate, t.weight_decay, t.adam_beta2)
    prints = _fingerprint(run)
    state = _restore(run, optimizers, prints)
    progress = bar(schedule.total_steps, "training", "step", initial=state.step)
    hooks = loop.Hooks(
        _log_steps(run, schedule, progress),
        lambda step: _evaluate(run, step, progress),
        lambda: save_weights(run),
        lambda: _save_checkpoint(run, optimizers, prints, state),
        lambda record, more: _report_skipped(run, record, more),
    )
    problem = ""
    try:
        loop.fit(model, run.objective, loader, optimizers, run.precision, schedule, state, hooks)
    except loop.Stopped:
        with suppress(OSError):
            say(f"\nstopped after step {state.step} of {schedule.total_steps}; continue with:")
            say(f"    {resume_command}")
        return STOPPED, state
    except (OSError, SafetensorError) as e:
        where = full_disk(run.folder.path, CHECKPOINT_BYTES * run.trainable, e)
        raise DiskError(f"step {state.step}: {where}; earlier checkpoints are kept. Make room there") from e
    except loop.Diverged as e:
        problem = str(e)
    except RewardError as e:
        _save_checkpoint(run, optimizers, prints, state)
        raise RewardError(f"{e}; the run is saved after step {state.step}") from e
    except torch.OutOfMemoryError as e:
        problem = f"out of memory ({str(e).splitlines()[0]}); {_smaller(cfg)}"
    finally:
        progress.close()
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return FAILED, state
    took = f"{state.seconds:.0f} s ({state.tokens / max(state.seconds, 1e-9):,.0f} tokens/s)"
    say(f"trained    {state.step} steps, {state.tokens:,} tokens in {took}; best at step {state.best_step}")
    _load_best(run)
    return DONE, state


def _fingerprint(run: LoadedRun) -> dict[str, str]:
    """Returns the values that a resume may not change: config keys, and hashes of data, base and adapter."""
    base = run.base
    prints = fingerprint(run.cfg, run.data.hashes, base.hash)
    prints |= {f"base {n}": sha256(base.folder / n) for n in ("config.json", "tokenizer.json")}
    return prints | _adapter_hashes(run.cfg) | _reward_hashes(run)


def _adapter_hashes(cfg: Config) -> dict[str, str]:
    """Returns the hashes of the files of adapter.init_from."""
    start = cfg.adapter.init_from
    files = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if start else ()
    return {f"adapter.init_from/{n}": sha256(Path(start) / n) for n in files}


def _reward_hashes(run: LoadedRun) -> dict[str, str]:
    """Returns the hashes of the user's reward files."""
    return {f"reward {file.name}": sha256(file) for file in run.objective.files}


def _smaller(cfg: Config) -> str:
    """Returns advice for less memory: halve the micro-batches, or shorten the samples."""
    t = cfg.train
    name, smallest = ("max_tokens", cfg.data.max_length) if t.max_tokens else ("batch_size", 1)
    size = getattr(t, name)
    if size // 2 < smallest:
        return f"lower data.max_length (now {cfg.data.max_length})"
    steps = t.gradient_accumulation_steps
    return (
        f"halve train.{name} (now {size}) and double train.gradient_accumulation_steps (now {steps}): "
        "a step has as many samples as before"
    )


def _restore(run: LoadedRun, optimizers: Optimizers, prints: dict[str, str]) -> loop.State:
    """Returns a new state; a resume loads the newest undamaged checkpoint and returns the state in that."""
    found = checkpoint.load_newest(run.folder.checkpoints, warn) if run.resume else None
    if found is None:
        run.folder.metrics.truncate_after(-1, -1)
        run.folder.write_config(run.cfg)
        # Whatever an evaluation before drew: a resumed run may have had none.
        torch.manual_seed(run.cfg.run.seed)
        return loop.State()
    path, tensors, saved = found
    before, rewards = saved["fingerprint"], _reward_hashes(run)
    if changed := [name for name in rewards if before.get(name) != rewards[name]]:
        # A faulty reward stops the run, and its repair must not.
        warn(f"changed since the checkpoint: {', '.join(changed)}; the run goes on with the new rewards")
    key = "model.name" if run.trains_all else "adapter.init_from"
    same = {k: v for k, v in before.items() if not k.startswith("reward ")} | rewards
    refuse_if_changed(same, prints, f"{key} = {str(run.best)!r}")
    if changed := checkpoint.restore_best(path, run.best):
        say(f"restored   {', '.join(changed)} in {run.best}, as of the checkpoint")
    weights = build.trainable_weights(run.base.model)
    checkpoint.restore(tensors, saved, weights, optimizers, run.precision.scaler)
    state = loop.state_from(saved["loop"])
    run.folder.metrics.truncate_after(state.step, state.evaluated)
    run.folder.write_config(run.cfg)
    say(f"resumed    from the checkpoint of step {state.step}")
    return state


def _log_steps(run: LoadedRun, schedule: loop.Schedule, progress: "Bar") -> Callable[[dict], None]:
    """Returns the function on_step(record), which writes the record of a step to metrics.jsonl and prints it.

    on_step adds the peak memory in bytes and, on a known GPU, the MFU (model FLOPs utilization, 0 to 1).
    """
    seconds: list[float] = []  # of the steps of this process
    device, model, total = run.precision.device, run.base.model, schedule.total_steps
    peak = peak_flops(device, run.precision.dtype)
    of_a_token, of_a_target = step_flops(model, 1, 0), step_flops(model, 0, 1)

    def on_step(record: dict) -> None:
        seconds.append(record["seconds"])
        record["peak_memory"] = machine.peak_memory(device)
        if peak:
            flops = of_a_token * record["stream_tokens"] + of_a_target * record["supervised_tokens"]
            record["mfu"] = round(flops / record["seconds"] / peak, 4)
        run.folder.metrics.write(record)
        step, speed = record["step"], f"{record['tokens_per_second']:>7,.0f} tokens/s"
        progress.set_postfix_str(f"loss {record['loss']:.3f}, {speed.strip()}")
        progress.update()
        if progress.disable and (step % run.cfg.train.log_every == 0 or step in (1, total)):
            usual = seconds[1:] or seconds  # the first step may have compiled
            left = (total - step) * sum(usual) / len(usual)  # the mean, because the lengths of rows vary
            _tell(f"step {step:>5} of {total}  loss {record['loss']:.4f}  {speed}  about {left:,.0f} s left")

    return on_step


def _evaluate(run: LoadedRun, step: int, progress: "Bar") -> dict | None:
    """Measures the first validation set, logs and returns its loss and metrics; None without such a set."""
    if not run.data.validation:
        return None
    first = run.data.validation[0]
    measured = evaluation.mean_loss(run.base.model, run.objective, first.documents, run.precision)
    if run.objective.scores_answers:
        answers = evaluation.answer(run.base, first.samples, run.cfg.generate, run.cfg.run.seed, quiet=True)
        measured |= run.objective.score(answers)
    run.folder.metrics.write({"step": step, "eval": {"set": first.name, **measured}})
    if progress.disable:
        metric = run.objective.metric
        selecting = "" if metric == "loss" else f", {metric} {measured[metric]:.4f}"
        _tell(f"          evaluation: {first.name} loss {measured['loss']:.4f}{selecting}")
    return measured


def _save_checkpoint(
    run: LoadedRun, optimizers: Optimizers, prints: dict[str, str], state: loop.State
) -> None:
    """Writes a checkpoint. If the disk is full, it only warns: earlier checkpoints are still there."""
    weights = build.trainable_weights(run.base.model)
    tensors, extra = checkpoint.capture(weights, optimizers, run.precision.scaler)
    extra |= {"loop": loop.state_dict(state), "fingerprint": prints}
    best = run.best if state.best_step >= 0 else None
    folder, keep = run.folder.checkpoints, run.cfg.train.save_total_limit
    try:
        run.folder.metrics.sync()
        checkpoint.save(folder, state.step, tensors, extra, keep, best)
    except OSError as e:
        why = full_disk(folder, CHECKPOINT_BYTES * run.trainable, e)
        warn(f"the checkpoint of step {state.step} could not be written; earlier ones are kept. {why}")


def _tell(text: str) -> None:
    """Prints a line of the training. If nobody can read it any more, stops the run as SIGTERM does."""
    try:
        say(text)
    except OSError as e:  # a closed pipe or terminal, or a full disk under `> log`
        if sys.stdout is not sys.stderr:
            sys.stdout = sys.stderr  # for the resume command
            complain(f"nobody reads what this run prints ({e.strerror or e}), so it stops")
            signal.raise_signal(signal.SIGTERM)


def _report_skipped(run: LoadedRun, record: dict, more: dict) -> None:
    """Logs a step that was not applied, and writes all that is known of it with its samples' texts."""
    run.folder.metrics.write(record)
    ids = set(record["samples"])
    texts = {d.id: run.base.tokenizer.decode(d.input_ids) for d in run.data.documents if d.id in ids}
    name = f"anomaly-step-{record['step']}.json"
    run.folder.write_json(name, record | more | {"texts": texts})
    what = f"first bad place: {record['layer']}; samples: {', '.join(record['samples'][:4])} ..."
    warn(f"step {record['step']} was not applied: not finite; {what}; all of it: {run.folder.path / name}")


def save_weights(run: LoadedRun) -> None:
    """Writes the trainable weights: adapter/ in PEFT's format, or model/ if all parameters are trainable."""
    cfg = run.cfg
    if not run.trains_all:
        config = {"revision": None if cfg.model.revision == "main" else cfg.model.revision}
        save_adapter(run.base.model, run.best, base_model_name=cfg.model.name, config=config)
        return
    dtype = torch.float32 if cfg.model.dtype == "float32" else torch.bfloat16
    save_model(run.base.model, run.best, dtype)
    if not (run.best / "tokenizer.json").exists():  # It does not change during a run.
        save_tokenizer(run.base.tokenizer, run.best)


def _load_best(run: LoadedRun) -> None:
    """Loads the weights of the best evaluation, from adapter/ or model/ of the run's folder."""
    model = run.base.model
    if not run.trains_all:
        unwrap(model)
        load_adapter(model, run.best)
        return
    model.load_state_dict(load_model(run.best, torch.float32).state_dict())


@contextmanager
def writing_results(run: LoadedRun) -> Iterator[None]:
    """Raises DiskError, which names what is safe, if the disk refuses a file in the block."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        where = full_disk(run.folder.path, 2**24, e)
        raise DiskError(f"{where}; training is done, and {run.best} is whole. Make room there") from e


def report(run: LoadedRun, state: loop.State, before: dict, after: dict, seconds: float) -> None:
    """Writes answers.jsonl, manifest.json and report.html, and prints measures and responses."""
    cfg, path = run.cfg, run.folder.path
    steps, evals = read_metrics(path / "metrics.jsonl")
    facts = _facts(run, state, sum("loss" in r for r in steps), seconds)
    measures = {"before": before["measures"], "after": after["measures"]}
    hashes = {"base_sha256": run.base.hash, "data_sha256": run.data.hashes}
    tasks = {"tasks": {v.name: name_of(v.task) for v in run.data.validation}}
    # A run of an earlier version, resumed, has no retention in its before.json.
    retention = retention_changes(before.get("retention", {}), after["retention"])
    run.folder.write_jsonl("answers.jsonl", answer_rows(before["answers"], after["answers"]))
    # The last file that other commands read: where it stands, the run is finished.
    manifest = {"run": facts, "environment": environment(), **hashes, **tasks, **measures}
    run.folder.write_json("manifest.json", manifest | {"retention": retention})
    examples = _examples(cfg.generate.prompts, before, after)
    task = _shown_as(run)
    kept = _kept(run, state)
    write_report(
        path / "report.html",
        run=facts,
        steps=steps,
        evals=evals,
        before=before["measures"],
        after=after["measures"],
        examples=examples,
        task=task,
        kept=kept,
        retention=retention,
    )
    if run.data.validation:
        say("\n" + before_after_table(before["measures"], after["measures"]))
    for line in retention_lines(retention):
        say(line)
    _say_diagnosis(diagnose(steps, evals, kept, next(iter(before["measures"].values()), None)))
    for prompt, then, now in zip(cfg.generate.prompts, before["prompts"], after["prompts"], strict=True):
        say(f"\nprompt     {task.shown_prompt(prompt)}")
        say(f"before     {printable(then)}\nafter      {printable(now)}")
    say(f"\nwhole run  {seconds:.0f} s; report: {path / 'report.html'}; {run.best.name}: {run.best}")


def _facts(run: LoadedRun, state: loop.State, steps: int, seconds: float) -> dict[str, str]:
    """Returns {label: text} of the facts at the top of the report."""
    cfg, device = run.cfg, run.precision.device
    return {
        "name": cfg.run.name,
        "base": cfg.model.name,
        "adapter": _adapter_text(cfg),
        "trainable parameters": f"{run.trainable:,}",
        "training samples": f"{len(run.data.documents) // run.objective.per_sample:,}",
        "steps": f"{steps:,}",
        "training time": f"{state.seconds:.0f} s",
        "whole run": f"{seconds:.0f} s",
        "tokens per second": f"{state.tokens / max(state.seconds, 1e-9):,.0f}",
        "device": device_name(device),
        "precision": run.precision.name,
        "peak memory": machine.mebibytes(machine.peak_memory(device)),
    }


def _kept(run: LoadedRun, state: loop.State) -> Kept | None:
    """Returns the step whose weights were kept, None without validation rows, which select them."""
    if not run.data.validation:
        return None
    stopped_early = 0 < run.cfg.train.early_stopping_patience <= state.stale
    return Kept(state.best_step, run.objective.metric, stopped_early)


def _say_diagnosis(diagnosis: Diagnosis) -> None:
    if diagnosis.findings:
        say("\n" + "\n".join(diagnosis.findings))
    for warning in diagnosis.warnings:
        warn(warning)


def answer_rows(before: dict, after: dict) -> list[dict]:
    """Returns the rows of answers.jsonl from the responses of `measure`, {validation set: lists of texts}."""
    keys, rows = ("id", "prompt", "gold", "before", "after"), []
    for name, now in after.items():
        texts = (now["ids"], now["prompts"], now["golds"], before[name]["texts"], now["texts"])
        rows += [{"set": name, **dict(zip(keys, row, strict=True))} for row in zip(*texts, strict=True)]
    return rows


def _examples(prompts: list[str], before: dict, after: dict) -> list[dict]:
    """Returns the report's examples: generate.prompts, and the first 12 rows of each validation set."""
    rows = [
        ("prompt", p, "", b, a) for p, b, a in zip(prompts, before["prompts"], after["prompts"], strict=True)
    ]
    for name, then in before["answers"].items():
        texts = (then["prompts"], then["golds"], then["texts"], after["answers"][name]["texts"])
        rows += [(name, *row) for row in islice(zip(*texts, strict=True), 12)]
    return [dict(zip(("set", "prompt", "gold", "before", "after"), row, strict=True)) for row in rows]


def _shown_as(run: LoadedRun) -> ModuleType:
    """Returns the first task of a validation set that is not `text`, else `text`; it formats the examples."""
    return next((v.task for v in run.data.validation if v.task is not text), text)


def _adapter_text(cfg: Config) -> str:
    a = cfg.adapter
    if a.type == "full":
        return "all parameters"
    return f"{a.type}, r = {a.r}, alpha = {a.lora_alpha:g}" + (", rsLoRA" if a.use_rslora else "")

"""What train.py does, verb by verb, with what the user sees on the way."""

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError

from common import machine
from common.device import Precision, device_name, pick_device
from common.files import need_space, sha256
from common.progress import bar, say, warn
from data.rows import Sample
from lora.inject import disabled, unwrap
from lora.peft_io import CONFIG as ADAPTER_CONFIG
from lora.peft_io import WEIGHTS as ADAPTER_WEIGHTS
from lora.peft_io import load_adapter, save_adapter
from model.weights import copy_tokenizer, load_model, save_model
from report.html import write_report
from report.metrics_log import before_after_table, printable, read_metrics
from tasks import redaction
from training import checkpoint, evaluation, loop, setup
from training.config import Config, load_config
from training.dataset import TrainingData, refuse_missing_files
from training.flops import peak_flops, step_flops
from training.optim import make_optimizers
from training.run_folder import RunFolder, environment, fingerprint, refuse_if_changed


@dataclass
class Run:
    """One run: its config, folder and numbers; the trained size is filled in when the adapters are made."""

    cfg: Config
    folder: RunFolder
    precision: Precision
    resume: bool
    trained: int = 0
    fit_seconds: float = 0.0
    tokens_per_second: float = 0.0


def open_run(cfg: Config, resume: bool) -> Run:
    """Takes the run's folder and decides on device and numbers; whether the data is there is asked before a model is downloaded."""
    refuse_missing_files(cfg)
    device = pick_device(cfg.train.device)
    setup.refuse_without_compiler(cfg, device)
    precision = Precision(cfg.train.precision, device)
    torch.manual_seed(cfg.run.seed)
    run = Run(cfg, RunFolder(cfg, resume), precision, resume)
    if resume and cfg.train.compile == "auto":  # as it was answered then: this machine may have more threads
        cfg.train.compile = load_config(run.folder.path / "config.toml").train.compile
        if cfg.train.compile:
            setup.forgive_compiler()
    return run


def load(run: Run) -> tuple[setup.Base, TrainingData]:
    """The base model with the run's adapters in it, and its documents; the folder is checked for room for the checkpoints, and then it is this run's."""
    base, data = setup.build_base(run.cfg, run.precision)
    run.trained = setup.add_adapters(base.model, run.cfg)
    if setup.compile_where_it_pays(base.model, run.cfg, data.documents, run.precision.device):
        say(
            "compiling  the layers: half a minute before the first step, and shorter steps then (train.compile)"
        )
    total = sum(p.numel() for p in base.model.parameters())
    share = f"{run.trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters train ({run.cfg.adapter.type})"
    say(
        f"model      {run.cfg.model.name}, {share}, {run.precision.name} on {device_name(run.precision.device)}"
    )
    # Each checkpoint holds weights and two moments in float32; the adapter is written twice.
    needed = (run.cfg.train.save_total_limit + 1) * 14 * run.trained
    need_space(run.folder.path, needed, "the run with its checkpoints", "set run.dir elsewhere")
    if not run.resume:  # a resume writes its config once it has proved to be of the same run
        run.folder.begin(run.cfg)
    return base, data


def measure(run: Run, base: setup.Base, data: TrainingData, what: str) -> dict:
    """{validation set: {"loss", "tokens", measures...}} and the answers that the report shows, on eval_samples rows of each set."""
    cfg, objective, out, texts = run.cfg, setup.OBJECTIVES[run.cfg.train.objective], {}, {}
    for v in data.validation:
        out[v.name] = {"rows": len(v.documents)} | evaluation.mean_loss(
            base.model, objective, v.documents, run.precision
        )
        answers = evaluation.answer(
            base.model,
            base.tokenizer,
            v.samples,
            cfg.generate,
            run.precision,
            cfg.run.seed,
            f"{what}: {v.name}",
        )
        out[v.name] |= evaluation.measures(answers)
        texts[v.name] = {"prompts": answers.prompts, "golds": answers.golds, "texts": answers.texts}
    prompts = [
        Sample(f"prompt {i}", (("user", p), ("assistant", ""))) for i, p in enumerate(cfg.generate.prompts, 1)
    ]
    shown = evaluation.answer(
        base.model, base.tokenizer, prompts, cfg.generate, run.precision, cfg.run.seed, what, quiet=True
    )
    return {"measures": out, "answers": texts, "prompts": shown.texts}


def measure_before(run: Run, base: setup.Base, data: TrainingData) -> dict | None:
    """What the model does before training; None where new adapters train, for they can be switched off afterwards: then nobody waits
    for the first step.  Kept in before.json, for after a resume the model is no longer what it was."""
    if run.cfg.adapter.type != "full" and not run.cfg.adapter.init_from:
        return None
    before = (run.folder.read_json("before.json") if run.resume else None) or measure(
        run, base, data, "before training"
    )
    run.folder.write_json("before.json", before)
    return before


def measure_after(run: Run, base: setup.Base, data: TrainingData) -> dict:
    """What the model does with the weights that were best by validation."""
    return measure(run, base, data, "after training")


def measure_without_adapter(run: Run, base: setup.Base, data: TrainingData) -> dict:
    """What the base did: its weights are frozen, so switching the adapters off gives it back exactly."""
    with disabled(base.model):
        return measure(run, base, data, "the base, to compare")


def fit(run: Run, base: setup.Base, data: TrainingData, resume_command: str) -> int:
    """Trains; 0, or the exit code where the run was stopped (130) or diverged (1), with what to do on stderr."""
    cfg, model = run.cfg, base.model
    loader = setup.build_loader(cfg, data.documents)
    plan = setup.build_plan(cfg, loader)
    optimizers = make_optimizers(model, cfg.train.optimizer, cfg.train.learning_rate, cfg.train.weight_decay)
    print_ = fingerprint(cfg, data.files, base.hash) | {
        f"base {n}": sha256(base.folder / n) for n in ("config.json", "tokenizer.json")
    }
    if cfg.adapter.init_from:
        print_ |= {
            f"adapter.init_from/{n}": sha256(Path(cfg.adapter.init_from) / n)
            for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        }
    state = _restore(run, model, optimizers, print_)
    progress = bar(plan.total_steps, "training", "step", initial=state.step)
    hooks = _hooks(run, base, data, optimizers, print_, plan, state, progress)
    try:
        loop.fit(
            model,
            setup.OBJECTIVES[cfg.train.objective],
            loader,
            optimizers,
            run.precision,
            plan,
            state,
            hooks,
        )
    except loop.Stopped:
        say(f"\nstopped after step {state.step} of {plan.total_steps}; continue with:\n    {resume_command}")
        return 130
    except BrokenPipeError:  # nobody reads what is printed: not the disk's fault
        raise
    except (OSError, SafetensorError) as e:
        print(
            f"error: step {state.step}: {run.folder.path} could not be written ({e}); earlier checkpoints are kept. Free some space, then continue "
            f"with:\n    {resume_command}",
            file=sys.stderr,
        )
        return 1
    except loop.Diverged as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as e:
        print(f"error: out of memory ({str(e).splitlines()[0]}); {_smaller(cfg)}", file=sys.stderr)
        return 1
    finally:
        progress.close()
    run.fit_seconds, run.tokens_per_second = state.seconds, state.tokens / max(state.seconds, 1e-9)
    say(
        f"trained    {state.step} steps, {state.tokens:,} tokens in {run.fit_seconds:.0f} s ({run.tokens_per_second:,.0f} tokens/s); "
        f"best at step {state.best_step}"
    )
    _load_best(run, model)
    return 0


def _smaller(cfg: Config) -> str:
    """What takes less memory: smaller micro-batches while there are any, then shorter samples."""
    t = cfg.train
    size, name, smallest = (
        (t.max_tokens, "max_tokens", cfg.data.max_length) if t.max_tokens else (t.batch_size, "batch_size", 1)
    )
    if size // 2 < smallest:
        return f"lower data.max_length (now {cfg.data.max_length})"
    return (
        f"halve train.{name} (now {size}) and double train.gradient_accumulation_steps (now {t.gradient_accumulation_steps}): "
        "a step has as many samples as before"
    )


def _restore(run: Run, model, optimizers, print_: dict) -> loop.State:
    """The state to start from: a fresh one, or the newest whole checkpoint's where the run resumes."""
    found = checkpoint.load_newest(run.folder.checkpoints, warn) if run.resume else None
    if found is None:
        run.folder.metrics.truncate_after(-1, -1)
        run.folder.write_config(run.cfg)
        torch.manual_seed(
            run.cfg.run.seed
        )  # whatever the evaluation before drew: a resumed run may not have run it
        return loop.State()
    tensors, saved = found
    refuse_if_changed(saved["fingerprint"], print_)
    checkpoint.restore(tensors, saved, setup.trained_weights(model), optimizers, run.precision.scaler)
    state = loop.state_from(saved["loop"])
    run.folder.metrics.truncate_after(state.step, state.evaluated)
    run.folder.write_config(run.cfg)
    say(f"resumed    from the checkpoint of step {state.step}")
    return state


def _hooks(
    run: Run,
    base: setup.Base,
    data: TrainingData,
    optimizers,
    print_: dict,
    plan: loop.Plan,
    state: loop.State,
    progress,
) -> loop.Hooks:
    cfg, objective = run.cfg, setup.OBJECTIVES[run.cfg.train.objective]
    seconds = []  # of this process's steps
    peak, of_a_token, of_a_target = (
        peak_flops(run.precision.device, run.precision.dtype),
        step_flops(base.model, 1, 0),
        step_flops(base.model, 0, 1),
    )

    def on_step(record: dict) -> None:
        seconds.append(record["seconds"])
        record["peak_memory"] = machine.peak_memory(run.precision.device)
        if peak:
            flops = of_a_token * record["stream_tokens"] + of_a_target * record["supervised_tokens"]
            record["mfu"] = round(flops / record["seconds"] / peak, 4)
        run.folder.metrics.write(record)
        progress.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s")
        progress.update()
        if progress.disable and (
            record["step"] % cfg.train.log_every == 0 or record["step"] in (1, plan.total_steps)
        ):
            usual = seconds[1:] or seconds  # the first may have compiled
            left = (
                (plan.total_steps - record["step"]) * sum(usual) / len(usual)
            )  # the mean: a step of short rows says little of the rest
            say(
                f"step {record['step']:>5} of {plan.total_steps}  loss {record['loss']:.4f}  {record['tokens_per_second']:>7,.0f} tokens/s  "
                f"about {left:,.0f} s left"
            )

    def evaluate(step: int) -> float | None:
        if not data.validation:
            return None
        first = data.validation[0]
        measured = evaluation.mean_loss(base.model, objective, first.documents, run.precision)
        run.folder.metrics.write({"step": step, "eval": {"set": first.name, **measured}})
        if progress.disable:
            say(f"          evaluation: {first.name} loss {measured['loss']:.4f}")
        return measured["loss"]

    def save() -> None:
        tensors, extra = checkpoint.capture(
            setup.trained_weights(base.model), optimizers, run.precision.scaler
        )
        try:
            checkpoint.save(
                run.folder.checkpoints,
                state.step,
                tensors,
                {**extra, "loop": loop.state_dict(state), "fingerprint": print_},
                cfg.train.save_total_limit,
            )
        except OSError as e:
            warn(
                f"the checkpoint of step {state.step} could not be written ({e.strerror or e}); earlier ones are kept"
            )

    def on_skip(record: dict) -> None:
        run.folder.metrics.write(record)
        samples = ", ".join(record["samples"][:4])
        warn(
            f"step {record['step']} was not applied: not finite; first bad place: {record['layer']}; samples: {samples} ..."
        )

    return loop.Hooks(on_step, evaluate, lambda: save_trained(run, base), save, on_skip)


def save_trained(run: Run, base: setup.Base) -> None:
    """The trained weights under their final names: adapter/ in PEFT's format, or model/ where everything trained."""
    if run.cfg.adapter.type != "full":
        revision = None if run.cfg.model.revision == "main" else run.cfg.model.revision
        save_adapter(
            base.model,
            run.folder.path / "adapter",
            base_model_name=run.cfg.model.name,
            config={"revision": revision},
        )
        return
    dtype = torch.float32 if run.cfg.model.dtype == "float32" else torch.bfloat16
    save_model(base.model, run.folder.path / "model", dtype)
    copy_tokenizer(base.folder, run.folder.path / "model")


def _load_best(run: Run, model) -> None:
    """Puts the weights that were best by validation into the model, for the evaluation after training."""
    if run.cfg.adapter.type != "full":
        unwrap(model)
        load_adapter(model, run.folder.path / "adapter")
        return
    best = load_model(run.folder.path / "model", torch.float32)
    model.load_state_dict(best.state_dict())


def report(run: Run, base: setup.Base, data: TrainingData, before: dict, after: dict, seconds: float) -> None:
    """manifest.json, report.html, and the figures on the terminal."""
    cfg, path = run.cfg, run.folder.path
    steps, evals = read_metrics(path / "metrics.jsonl")
    facts = {
        "name": cfg.run.name,
        "base": cfg.model.name,
        "adapter": _adapter_text(cfg),
        "trained parameters": f"{run.trained:,}",
        "training samples": f"{len(data.documents):,}",
        "steps": f"{sum('loss' in r for r in steps):,}",
        "training time": f"{run.fit_seconds:.0f} s",
        "whole run": f"{seconds:.0f} s",
        "tokens per second": f"{run.tokens_per_second:,.0f}",
        "device": device_name(run.precision.device),
        "precision": run.precision.name,
        "peak memory": machine.mebibytes(machine.peak_memory(run.precision.device)),
    }
    run.folder.write_json(
        "manifest.json",
        {
            "run": facts,
            "environment": environment(),
            "base_sha256": base.hash,
            "data_sha256": {f: sha256(Path(f)) for f in data.files},
            "before": before["measures"],
            "after": after["measures"],
        },
    )
    write_report(
        path / "report.html",
        run=facts,
        steps=steps,
        evals=evals,
        before=before["measures"],
        after=after["measures"],
        examples=_examples(run, before, after),
    )
    if data.validation:
        say("\n" + before_after_table(before["measures"], after["measures"]))
    for i, prompt in enumerate(cfg.generate.prompts):
        say(
            f"\nprompt     {redaction.source_text(prompt)}\nbefore     {printable(before['prompts'][i])}\nafter      {printable(after['prompts'][i])}"
        )
    say(
        f"\nwhole run  {seconds:.0f} s; report: {path / 'report.html'}; adapter: {path / ('model' if cfg.adapter.type == 'full' else 'adapter')}"
    )


def _examples(run: Run, before: dict, after: dict) -> list[dict]:
    """The config's prompts and the first rows of each validation set, as the report shows them."""
    prompts = run.cfg.generate.prompts
    out = [
        {"set": "prompt", "source": redaction.source_text(p), "gold": "", "before": b, "after": a}
        for p, b, a in zip(prompts, before["prompts"], after["prompts"], strict=True)
    ]
    for name, then in before["answers"].items():
        now = after["answers"][name]
        rows = zip(now["prompts"], now["golds"], then["texts"], now["texts"], strict=True)
        out += [
            {"set": name, "source": redaction.source_text(p), "gold": g, "before": b, "after": a}
            for p, g, b, a in islice(rows, 12)
        ]
    return out


def _adapter_text(cfg: Config) -> str:
    a = cfg.adapter
    return (
        "all weights"
        if a.type == "full"
        else f"{a.type}, r = {a.r}, alpha = {a.lora_alpha:g}" + (", rsLoRA" if a.use_rslora else "")
    )

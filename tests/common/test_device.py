"""common/device.py: the choice of device and dtype, the loss scaling of fp16, and parity of GPU and CPU."""

import math
import platform
import subprocess
import sys

import pytest
import torch

from common.device import Precision, missing_to_compile, pick_device
from common.machine import peak_memory
from data.loader import Loader
from data.packing import Batch, pack
from tests.folders import ROOT
from tests.makers import documents, tiny_model
from training import loop
from training.config import Train, load_config
from training.objectives.sft import SupervisedFineTuning
from training.optim import make_optimizers

SFT = SupervisedFineTuning()
CPU = torch.device("cpu")


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return torch.device("cuda")


def run_program(program: str) -> str:
    """Runs a program in a process of its own and returns what it prints."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta"])
def test_a_missing_device_is_an_error_with_the_key_and_the_remedy(name):
    with pytest.raises(ValueError, match=rf"'{name}' .*train.device, --device.*'auto' or 'cpu'"):
        pick_device(name)


def test_auto_takes_cuda_where_there_is_one():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_what_is_missing_to_compile_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert all(fact in missing_to_compile(CPU) for fact in ("no-such-compiler", "install", "CXX"))
    assert missing_to_compile(torch.device("cuda")) is None
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert all(fact in missing_to_compile(CPU) for fact in (str(tmp_path / "Python.h"), "python3-dev"))
    (tmp_path / "Python.h").touch()
    assert missing_to_compile(CPU) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_of_freed_tensors_is_reused_without_page_faults():
    program = """if True:
        import resource, torch
        from common.device import pick_device

        pick_device("cpu")
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensors = [torch.empty(2**20, dtype=torch.uint8).fill_(1) for _ in range(200)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(*(faults() for _ in range(8)))
    """
    _, second, *later = map(int, run_program(program).split())
    # glibc before 2.38 does not reuse a few blocks of the exact size. Without mallopt, 51,200 pages fault.
    assert second < 5000 and sorted(later)[len(later) // 2] < 400


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_large_tensor_between_small_ones_takes_the_same_memory_each_time():
    """Full fine-tuning does this: each step allocates the embedding's gradient, and keeps small tensors."""
    program = """if True:
        import torch
        from common.device import pick_device

        pick_device("cpu")
        def resident():
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * 4096
        kept = []
        def step():
            large = torch.ones(64 * 2**20, dtype=torch.uint8)
            del large
            kept.extend(torch.ones(5000) for _ in range(3))
        step()
        before = resident()
        for _ in range(8):
            step()
        print(resident() - before)
    """
    assert int(run_program(program)) < 64 * 2**20


@pytest.mark.parametrize("avx512, amx, expected", [(0, 0, "fp32"), (1, 0, "bf16"), (0, 1, "bf16")])
def test_auto_is_bf16_only_on_a_cpu_with_bf16_instructions(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert Precision("auto", CPU).name == expected
    assert Precision("bf16", CPU).name == "bf16" and Precision("fp32", CPU).name == "fp32"


@pytest.mark.parametrize("supported, expected", [(True, "bf16"), (False, "fp32")])
def test_auto_on_cuda_is_never_fp16(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert Precision("auto", torch.device("cuda")).name == expected


def test_trainable_base_weights_are_float32_and_a_frozen_base_follows_the_precision():
    for name, auto in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for wanted, expected in (("auto", auto), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            assert Precision(name, CPU).base_dtype(wanted, trains_all=False) == expected
    assert Precision("bf16", CPU).base_dtype("bfloat16", trains_all=True) == torch.float32


DTYPES = [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]


@pytest.mark.parametrize("name, dtype", DTYPES)
def test_products_are_computed_in_the_dtype_of_the_precision(name, dtype):
    precision = Precision(name, CPU)
    with precision.autocast():
        assert torch.nn.functional.linear(torch.ones(2, 4), torch.ones(3, 4)).dtype == dtype
    assert precision.scaler.is_enabled() == (name == "fp16")


def test_fp16_is_refused_with_its_reason_unless_forced(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[data]\ntrain = "rows.jsonl"\n[train]\nprecision = "fp16"\n')
    with pytest.raises(ValueError, match=r"train.precision = 'fp16': .*8e5.* 65,504; use 'bf16'"):
        load_config(path)
    assert load_config(path, ["train.force_fp16=true"]).train.precision == "fp16"


# --- steps


def step(model, precision: Precision, micro_batches: list[Batch], optimizers=None) -> dict:
    """Takes one training step with learning rate 0.01 and returns its record."""
    optimizers = optimizers or make_optimizers(model, "adamw", 1e-2, 0.0)
    return loop.train_step(model, SFT, micro_batches, optimizers, precision, 1e-2, 1.0)


def applied_step(name: str, device: torch.device) -> dict:
    """Returns the first applied step (the first scale of fp16 may be too high), its weights and gradients."""
    model, precision = tiny_model().to(device), Precision(name, device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    micro_batches = list(Loader(documents(4, seed=2), 2, seed=0, shuffle=False).batches(0))
    optimizers = make_optimizers(model, "adamw", 1e-2, 0.0)
    for _ in range(17):
        record = step(model, precision, micro_batches, optimizers)
        if record["applied"]:
            weights = torch.cat([p.detach().flatten().cpu() for p in trainable])
            gradients = torch.cat([p.grad.flatten().cpu() for p in trainable])
            return record | {"weights": weights, "gradients": gradients}
        model.zero_grad()
    raise AssertionError("no step was applied")


def assert_same_step(step: dict, expected: dict, error: float) -> None:
    """Compares two steps; `error` is the rounding error of the dtype.

    AdamW's first update is the gradient's sign times the learning rate: weights differ by 0.02 at most.
    """
    assert step["loss"] == pytest.approx(expected["loss"], rel=error)
    assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5 * error)
    distance = (step["gradients"] - expected["gradients"]).norm() / expected["gradients"].norm()
    assert distance < 10 * error
    assert (step["weights"] - expected["weights"]).abs().max() <= 2.01e-2


@pytest.mark.parametrize("name, error", [("bf16", 2**-7), ("fp16", 2**-10)])
def test_a_step_in_half_precision_agrees_with_float32(name, error):
    assert_same_step(applied_step(name, CPU), applied_step("fp32", CPU), error)


def test_the_first_scale_of_fp16_suits_losses_that_are_sums_over_tokens():
    micro_batches = [pack(documents(8, seed=2, shortest=30, longest=60))]
    assert micro_batches[0].num_targets > 100
    assert step(tiny_model(), Precision("fp16", CPU), micro_batches)["applied"]


def test_after_an_overflow_the_scale_of_fp16_halves_and_the_weights_stay():
    model, precision = tiny_model(), Precision("fp16", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = [p.detach().clone() for p in model.parameters()]
    record = step(model, precision, [pack(documents(2))])
    assert math.isfinite(record["loss"]) and not math.isfinite(record["grad_norm"]) and not record["applied"]
    assert precision.scaler.get_scale() == 2.0**59
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_fp16_diverges_only_once_the_scale_cannot_fall_further():
    """Until then it skips more non-finite steps than loop.MAX_BAD_STEPS."""
    model, precision, skips = tiny_model(), Precision("fp16", CPU), []
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**5)
    model.model.layers[3].mlp.up_proj.base_layer.weight.data.fill_(6e4)
    schedule = loop.Schedule(20, 4, Train(learning_rate=1e-2))
    hooks = loop.Hooks(
        lambda record: None,
        lambda step: None,
        lambda: None,
        lambda: None,
        lambda record, _: skips.append(record),
    )
    loader, optimizers = Loader(documents(4), 1, 0), make_optimizers(model, "adamw", 1e-2, 0.0)
    with pytest.raises(loop.Diverged, match="up_proj"):
        loop.fit(model, SFT, loader, optimizers, precision, schedule, loop.State(), hooks)
    assert len(skips) == 5 and precision.scaler.get_scale() == 1.0


def test_the_peak_memory_on_a_cpu_is_that_of_the_process():
    before = peak_memory(CPU)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 10 * 2**20 < before <= peak_memory(CPU) < 2**45 and block[-1] == 1


# --- a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("name, error", [("fp32", 2**-10), ("bf16", 2**-7), ("fp16", 2**-10)])
def test_a_step_on_cuda_agrees_with_the_cpu(cuda, name, error):
    # In fp32, the products on CUDA are computed in TF32.
    assert_same_step(applied_step(name, pick_device("cuda")), applied_step("fp32", CPU), error)


@pytest.mark.cuda
def test_batches_are_copied_to_cuda_from_pinned_memory(cuda, monkeypatch):
    batch, pinned = pack(documents(3)), []
    pin = Batch.pin_memory
    monkeypatch.setattr(Batch, "pin_memory", lambda self: pinned.append(pin(self)) or pinned[-1])
    moved = loop._move(batch, cuda)
    assert pinned[0].tokens.is_pinned() and pinned[0].targets.is_pinned()
    assert moved.tokens.device.type == "cuda" and moved.ids == batch.ids
    assert torch.equal(moved.tokens.cpu(), batch.tokens)


@pytest.mark.cuda
def test_the_peak_memory_on_cuda_is_that_of_the_allocator(cuda):
    torch.cuda.reset_peak_memory_stats()
    before = peak_memory(cuda)
    block = torch.ones(64 * 2**20, dtype=torch.uint8, device=cuda)
    del block
    assert peak_memory(cuda) - before >= 64 * 2**20 - 2**20

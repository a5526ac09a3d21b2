"""Writes a GGUF file of a few kilobytes for tests."""

import os
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

MODIFIED = 1767323045_500000000  # 2026-01-02T03:04:05.5Z


def write_gguf(path: Path, rows: int = 51, **extra) -> Path:
    """Writes a header like Gemma's with 51 tokens, and float32 tensors of shape (rows, 64), (7,) and (7,)."""
    w = GGUFWriter(path, "gemma3")
    w.add_type(extra.get("type", "model"))
    w.add_name(extra.get("name", "Tiny <b>&</b>"))
    w.add_file_type(extra.get("file_type", 7))
    w.add_context_length(32768)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(1e6)
    w.add_array("gemma3.attention.sliding_window_pattern", [True, False])
    w.add_token_list([f"t{i}" for i in range(51)])
    w.add_array("test.fifty", list(range(50)))
    w.add_array("test.halves", [0.5, 2.25])
    w.add_chat_template("{{ '<s>' }}\n\tü\u2028 \"q\" \\")
    w.add_add_space_prefix(False)
    w.add_tensor("token_embd.weight", np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32))
    w.add_tensor("output_norm.weight", np.ones(7, np.float32))
    w.add_tensor("x.weight", np.ones(7, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.utime(path, ns=(MODIFIED, MODIFIED))
    path.chmod(0o640)
    return path


def read_gguf(path: Path) -> dict:
    """Returns write_layout's arguments metadata, parameters and tensor_bytes for a file."""
    reader = GGUFReader(path)
    return {
        "metadata": {
            key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
        },
        "parameters": sum(int(t.n_elements) for t in reader.tensors),
        "tensor_bytes": path.stat().st_size - reader.data_offset,
    }

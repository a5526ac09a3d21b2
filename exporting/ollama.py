"""Writes a folder for `ollama create`: a GGUF file and a Modelfile with Gemma's chat format as a Go template.

Sources: Go's text/template, and ollama/ollama: docs/modelfile.mdx and parser/parser.go for the Modelfile,
template/template.go for the template's values. These are .System (all system texts, joined) and .Messages,
each with .Role and .Content. Since pull request 14969, in version 0.34.1, `ollama create` takes no ADAPTER.

Ollama's prompt differs from that of model/tokenizer.py:
1. Ollama strips only ASCII white space from the ends of a turn; Python's str.strip also strips Unicode's.
2. Ollama ignores an empty system text; Gemma's template writes a blank line for it.
3. Ollama joins consecutive messages of one role with a blank line; Gemma's template refuses them.
4. Ollama reads <end_of_turn> in a user's text as the control token, as it tokenizes the whole prompt at once.
"""

import shlex
from pathlib import Path

from common.control_tokens import END_OF_TURN, START_OF_TURN
from exporting.gguf_model import export_gguf
from exporting.lora_gguf import compare_beside, export_lora
from exporting.source import Source
from exporting.target import link_or_copy
from lora.peft_io import read_config
from model.tokenizer import ROLES

# The ASCII characters that str.strip removes, as Go's string literals.
WHITE_SPACE = r'" " "\t" "\n" "\v" "\f" "\r" "\x1c" "\x1d" "\x1e" "\x1f"'

# Go's templates can neither trim nor subtract: `strip` removes one byte from an end and calls itself, and
# len (slice . 1) is the length less one.
TEMPLATE = """\
{{- define "strip" }}{{ if . }}{{ $end := len (slice . 1) }}
{{- if eq (slice . 0 1) WHITE_SPACE }}{{ template "strip" slice . 1 }}
{{- else if eq (slice . $end) WHITE_SPACE }}{{ template "strip" slice . 0 $end }}
{{- else }}{{ . }}{{ end }}{{ end }}{{ end }}
{{- $system := .System }}
{{- range .Messages }}
{{- if eq .Role "user" }}START_OF_TURNUSER
{{ if $system }}{{ $system }}

{{ end }}{{ $system = "" }}{{ template "strip" .Content }}END_OF_TURN
{{ else if eq .Role "assistant" }}START_OF_TURNMODEL
{{ template "strip" .Content }}END_OF_TURN
{{ end }}
{{- end }}START_OF_TURNMODEL
"""


def export_ollama(
    source: Source, folder: Path, out: Path, quant: str, verified_by: str | None, merge: bool = True
) -> str:
    """Writes model.gguf and Modelfile to `folder`, which the caller renames to `out` afterwards.

    Unless `merge`, a base that is one GGUF file stays as it is, with a LoRA adapter beside it in lora.gguf.
    Other arguments: see export_gguf. Returns a summary with the `ollama create` command for the new folder.
    """
    folder.mkdir()
    name, command = out.name.partition(":")[0], ["ollama", "create", out.name, "-f", str(out / "Modelfile")]
    if merge or not stays_as_it_is(source):
        summary = export_gguf(source, folder / "model.gguf", name, quant, verified_by)
        write_modelfile(folder, "model.gguf")
    else:
        summary = export_beside(source, folder, name, verified_by)
    return f"{summary}; then: {shlex.join(command)}"


def stays_as_it_is(source: Source) -> bool:
    """Returns whether the base's own file can be shipped: it is one GGUF, and an adapter is LoRA."""
    is_dora = source.adapter is not None and read_config(source.adapter).get("use_dora")
    return len(source.gguf) == 1 and not is_dora


def export_beside(source: Source, folder: Path, name: str, verified_by: str | None) -> str:
    """Links the base's GGUF file into `folder`, writes the adapter and a Modelfile; returns a summary."""
    (base,), adapter, lora = source.gguf, source.adapter, folder / "lora.gguf"
    link_or_copy(base, folder / "model.gguf")
    summary = f"{base.name} as it is"
    if adapter:
        summary += f", with a {export_lora(source, lora, name, verified_by)}"
        summary += "; Ollama 0.34.1 and later take no ADAPTER: for these, add --quant, which merges it"
    elif verified_by == "llama.cpp":
        compare_beside(source, None)
    write_modelfile(folder, "model.gguf", adapter_name=lora.name if adapter else None)
    return summary


def chat_template() -> str:
    """Returns Gemma's chat format as a Go template, without <bos>, which llama.cpp adds."""
    texts = {"WHITE_SPACE": WHITE_SPACE, "START_OF_TURN": START_OF_TURN, "END_OF_TURN": END_OF_TURN}
    template = TEMPLATE
    for name, text in (texts | {"USER": ROLES["user"], "MODEL": ROLES["assistant"]}).items():
        template = template.replace(name, text)
    return template


def write_modelfile(
    folder: Path,
    gguf_name: str,
    *,
    adapter_name: str | None = None,
    stops: tuple[str, ...] = (END_OF_TURN,),
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 0.95,
) -> Path:
    """Writes folder/Modelfile, which names a GGUF file and perhaps a LoRA GGUF file; returns its path.

    Both GGUF files belong into `folder`. `stops` are texts that end a response. The default temperature,
    top_k and top_p are those that Google gives for Gemma. Raises ValueError for a file name that a Modelfile
    cannot contain.
    """
    for name in filter(None, (gguf_name, adapter_name)):
        if Path(name).name != name or not name.isprintable() or '"' in name or name != name.strip():
            raise ValueError(f"{name!r} cannot stand in a Modelfile; give a file name such as model.gguf")
    lines = [f"FROM ./{gguf_name}"] + ([f"ADAPTER ./{adapter_name}"] if adapter_name else [])
    lines.append(f'TEMPLATE """{chat_template()}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    settings = {"temperature": f"{temperature:g}", "top_k": str(top_k), "top_p": f"{top_p:g}"}
    lines += [f"PARAMETER {name} {value}" for name, value in settings.items()]
    file = folder / "Modelfile"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return file

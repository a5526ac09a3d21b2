"""A folder for `ollama create`: a GGUF file and the Modelfile, with Gemma's chat turns as a Go template.

Source: ollama/ollama, docs/modelfile.mdx and parser/parser.go (the file), template/template.go (the
template's values: .System, all system texts joined, and .Messages with .Role and .Content); Go's
text/template.

Ollama's prompt differs from that of model/tokenizer.py:
1. A turn loses only ASCII white space at its ends; Python strips Unicode's too.
2. An empty system text counts as none; Gemma's template writes a blank line for it.
3. Ollama joins consecutive messages of one role with a blank line; Gemma's template refuses them.
4. <end_of_turn> typed by a user is the control token: Ollama tokenizes the whole prompt as one text.
"""

import shlex
from pathlib import Path

from exporting.gguf_model import export_gguf
from exporting.source import Source
from model.tokenizer import END_OF_TURN, ROLES, START_OF_TURN

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


def export_ollama(source: Source, folder: Path, out: Path, quant: str, verified_by: str | None) -> str:
    """Writes model.gguf and Modelfile into `folder`, which becomes `out`; the arguments are export_gguf's.

    Returns a summary with the command that loads the model into Ollama.
    """
    folder.mkdir()
    summary = export_gguf(source, folder / "model.gguf", out.name.partition(":")[0], quant, verified_by)
    write_modelfile(folder, "model.gguf")
    return f"{summary}; then: {shlex.join(['ollama', 'create', out.name, '-f', str(out / 'Modelfile')])}"


def chat_template() -> str:
    """Returns the Go template of Tokenizer.render_prompt without <bos>, which llama.cpp adds."""
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
    """Writes folder/Modelfile for a GGUF file and perhaps a LoRA GGUF beside it, and returns its path.

    The defaults are Gemma's generation settings; `stops` are texts that end a response. Raises ValueError for
    a file name that a Modelfile cannot hold.
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

"""The architecture: imports run down the floors only, and each kind of line stands only in its home."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.redaction import CLASSES
from training.config import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train.py", "evaluate.py", "generate.py", "export.py")
# The rooms, from the ground up. A room imports from the floors below its own only.
FLOORS = ("common ggml", "model lora data", "tasks generation", "report", "training exporting")
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms.split()}
# The tests compare with these. What a user runs must not need them.
REFERENCES = {"transformers", "peft", "xllamacpp"}
# This file compares an export with llama.cpp itself, if it is installed.
OPTIONAL = {"exporting/llama_cpp.py": {"xllamacpp"}}
OPTIMIZERS = {"Adam", "AdamW", "SGD", "Muon"}
FILE_CALLS = {"os.replace", "os.fsync", "fcntl.flock", "hashlib.file_digest"}


def sources():
    """Returns {path from the root: text} of all Python files but tests, benchmarks and assets."""
    files = [ROOT / script for script in SCRIPTS]
    files += [f for room in LEVEL for f in sorted((ROOT / room).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def imports(tree, top_level_only=False):
    """Returns a tree's imports as (line, "a.b.c"); `from a import b` gives a.b, a name or a module."""
    found, nodes = [], [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if not (top_level_only and later):
            nodes += ast.iter_child_nodes(node)
    return found


def against_the_floors(path, text):
    """Returns the imports that the floors forbid, as "file:line imports module"."""
    room = path.split("/")[0] if "/" in path else None
    forbidden = REFERENCES | {"tests", "benchmarks", "assets"}
    if room:
        forbidden |= {Path(script).stem for script in SCRIPTS}
        forbidden |= {other for other in LEVEL if other != room and LEVEL[other] >= LEVEL[room]}
    forbidden -= OPTIONAL.get(path, set())
    found = [(n, module) for n, module in imports(ast.parse(text)) if module.split(".")[0] in forbidden]
    return [f"{path}:{line} imports {module}" for line, module in found]


def files_of(module, texts):
    """Returns our files that the import of a.b.c may mean: a/b/c.py, or a/b.py with the name c."""
    stem = module.replace(".", "/")
    return [p for p in (f"{stem}.py", f"{stem.rpartition('/')[0]}.py") if p in texts]


def file_imports(texts):
    """Returns {path: paths of our files that it imports, anywhere in the file}."""
    found = {path: set() for path in texts}
    for path, text in texts.items():
        for _, module in imports(ast.parse(text)):
            found[path] |= {*files_of(module, texts)} - {path}
    return found


def circle(graph):
    """Returns a list of nodes that import each other in a circle, [] where there is none."""
    state, trail = {}, []

    def visit(node):
        state[node] = "open"
        trail.append(node)
        for other in sorted(graph[node]):
            if state.get(other) == "open":
                return trail[trail.index(other) :]
            if other not in state and (found := visit(other)):
                return found
        state[node] = "done"
        trail.pop()
        return []

    return next((found for node in sorted(graph) if node not in state and (found := visit(node))), [])


def bodies(texts, least=3):
    """Yields (body, "path:function") of every function of `least` statements or more.

    The body has neither docstring nor annotations, and numbered variables in the place of their names.
    """
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            nodes, names = [n for statement in body for n in ast.walk(statement)], {}
            if sum(isinstance(n, ast.stmt) for n in nodes) < least:
                continue
            for n in nodes:
                if isinstance(n, ast.Name):
                    n.id = names.setdefault(n.id, f"v{len(names)}")
            yield "\n".join(map(ast.unparse, body)), f"{path}:{node.name}"


def twice(texts):
    """Returns groups of functions in different rooms with equal bodies, but for the names of variables."""
    groups = {}
    for body, where in bodies(texts):
        groups.setdefault(body, []).append(where)
    return [where for where in groups.values() if len({w.split("/")[0] for w in where}) > 1]


def long_functions(path, text, most=60):
    """Returns the functions of more than `most` lines, as "file: name has n lines"."""
    made = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    lines = {n.name: n.end_lineno - n.lineno + 1 for n in made}
    return [f"{path}: {name} has {count} lines" for name, count in lines.items() if count > most]


def strings(tree):
    """Returns (line, text) of every string, the fixed parts of f-strings included, but docstrings."""
    nodes = list(ast.walk(tree))
    docstrings = {id(n.value) for n in nodes if isinstance(n, ast.Expr)}
    constants = [n for n in nodes if isinstance(n, ast.Constant) and id(n) not in docstrings]
    return [(n.lineno, n.value) for n in constants if isinstance(n.value, str)]


def names(tree):
    """Returns (line, dotted name) of every variable and attribute: a.b.c gives a, a.b and a.b.c."""
    return [(n.lineno, ast.unparse(n)) for n in ast.walk(tree) if isinstance(n, (ast.Name, ast.Attribute))]


def run_config(tree):
    """cfg.<section>: model/ may call a Gemma3Config cfg, which has no such sections."""
    parts = [(line, name.split(".")) for line, name in names(tree)]
    return [line for line, part in parts if len(part) > 1 and part[0] == "cfg" and part[1] in SECTIONS]


def distributed(tree):
    found = [line for line, name in names(tree) if name.startswith(("dist.", "torch.distributed"))]
    found += [line for line, module in imports(tree) if module.startswith("torch.distributed")]
    compared = [(n.lineno, ast.unparse(n)) for n in ast.walk(tree) if isinstance(n, ast.Compare)]
    return found + [line for line, text in compared if text.split(".")[-1] in ("rank == 0", "rank() == 0")]


def grad_scaler(tree):
    return [line for line, name in names(tree) if name.split(".")[-1] == "GradScaler"]


def optimizer_made(tree):
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return [n.lineno for n in calls if ast.unparse(n.func).split(".")[-1] in OPTIMIZERS]


def file_calls(tree):
    return [line for line, name in names(tree) if name in FILE_CALLS]


def close_names(tree):
    return [line for line, name in names(tree) if name.endswith("get_close_matches")]


def bars(tree):
    return [line for line, module in imports(tree) if module.split(".")[0] == "tqdm"]


def turn_marks(tree):
    return [line for line, text in strings(tree) if "<start_of_turn>" in text]


def minus_hundred(tree):
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.UnaryOp) and ast.unparse(n) == "-100"]


def peft_prefix(tree):
    return [line for line, text in strings(tree) if "base_model.model." in text]


def gguf_names(tree):
    return [line for line, text in strings(tree) if "blk." in text]


def personal_data(tree):
    words = re.compile(rf"\b(?:{'|'.join(CLASSES)})(?:_\d+)?\b|leak_rate|entity_|over_mask_rate")
    return [line for line, text in strings(tree) if words.search(text)]


# {rule: (function that finds its lines, home, a line that breaks the rule, a line that does not)}. A home is
# a file, or a folder and the scripts.
HOMES = {
    "cfg.": (run_config, "training/", "r = cfg.adapter.r", "n = cfg.hidden_size"),
    "dist.": (distributed, "training/distributed.py", "from torch import distributed as d", "distance.sum()"),
    "rank == 0": (distributed, "training/distributed.py", "if self.rank == 0: save()", "if rank == 1: pass"),
    "files": (file_calls, "common/files.py", "os.replace(part, path)", "text.replace('a', 'b')"),
    "did you mean": (close_names, "common/errors.py", "difflib.get_close_matches(a, b)", "closest(a, b)"),
    "tqdm": (bars, "common/progress.py", "from tqdm import tqdm", "with bar(9, 'a', 'b') as progress: pass"),
    "GradScaler": (grad_scaler, "common/device.py", "s = torch.amp.GradScaler('cuda')", "s = scaler"),
    "<start_of_turn>": (
        turn_marks,
        "common/control_tokens.py",
        "s = f'<start_of_turn>{r}'",
        '"<start_of_turn>"',
    ),
    "GIVENNAME": (personal_data, "tasks/redaction.py", "s = '[GIVENNAME_1]'", '"[GIVENNAME_1] is a label."'),
    "-100": (minus_hundred, "data/render.py", "labels = [-100] * n", "x = y - 100"),
    "base_model.model.": (peft_prefix, "lora/peft_io.py", "n = 'base_model.model.a'", "# base_model.model.a"),
    "blk.": (gguf_names, "model/gguf_names.py", "name = f'blk.{i}.attn_q.weight'", '"""blk.0 in GGUF."""'),
    "optimizers": (optimizer_made, "training/optim.py", "o = torch.optim.AdamW(p)", "o: torch.optim.Adam"),
}


def strays(find, home):
    """Returns the places outside its home where the rule finds a line, as "file:line"."""
    homes = (home, *SCRIPTS) if home.endswith("/") else home
    abroad = {path: text for path, text in sources().items() if not path.startswith(homes)}
    return [f"{path}:{line}" for path, text in abroad.items() for line in find(ast.parse(text))]


def test_imports_run_down_only():
    found = [line for path, text in sources().items() for line in against_the_floors(path, text)]
    assert not found, "imports against the floors of CONTRIBUTING.md:\n" + "\n".join(found)


def test_no_files_import_each_other_in_a_circle():
    found = circle(file_imports(sources()))
    assert not found, " -> ".join(found)


def test_no_helper_stands_in_two_rooms():
    found = twice(sources())
    assert not found, "\n".join(" = ".join(where) for where in found)


def test_no_function_is_longer_than_60_lines():
    found = [line for path, text in sources().items() for line in long_functions(path, text)]
    assert not found, "\n".join(found)
    assert long_functions("a.py", "def f():\n" + "    pass\n" * 60) == ["a.py: f has 61 lines"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("model/gemma3.py", "from lora.layer import LoRALinear"),
        ("model/weights.py", "def f():\n    import training.config"),
        ("lora/inject.py", "import model.gemma3"),
        ("data/render.py", "from model.tokenizer import Tokenizer"),
        ("ggml/container.py", "import numpy, common.files"),
        ("common/files.py", "import model.hub"),
        ("tasks/redaction.py", "from generation.generate import generate"),
        ("report/html.py", "import training.config"),
        ("training/loop.py", "from train import main"),
        ("training/loop.py", "import exporting.oci"),
        ("model/weights.py", "from transformers import AutoModel"),
        ("export.py", "import peft"),
        ("model/hub.py", "from assets.samples import values"),
    ],
)
def test_an_import_against_the_floors_is_seen(path, line):
    assert against_the_floors(path, line)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("training/loop.py", "from model.loss import token_log_probs\nfrom data.packing import pack"),
        ("exporting/gguf_model.py", "from lora.merge import merged\nimport model.weights"),
        ("model/weights.py", "from ggml.container import GGUFFile"),
        ("generation/generate.py", "from model.config import FULL"),
        ("data/loader.py", "from data.packing import pack"),
        ("train.py", "from training import trainer\nfrom report import tables"),
    ],
)
def test_an_import_down_the_floors_passes(path, line):
    assert not against_the_floors(path, line)


def test_a_circle_is_seen_and_a_fork_is_none():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_equal_functions_are_seen_whatever_their_variables_are_called():
    one = "def hash_file(path):\n    with open(path) as f:\n        x = f.read()\n        return g(x)\n"
    two = 'def file_hash(p: str) -> str:\n    "Text."\n'
    two += "    with open(p) as file:\n        y = file.read()\n        return g(y)\n"
    assert twice({"a/x.py": one, "b/y.py": two}) and not twice({"a/x.py": one, "a/z.py": two})
    assert not twice({"a/x.py": one, "b/y.py": two.replace("read", "write")})


@pytest.mark.parametrize("rule", HOMES)
def test_a_line_stands_only_where_it_is_at_home(rule):
    find, home, _, _ = HOMES[rule]
    assert not strays(find, home), f"{rule} belongs in {home}"


@pytest.mark.parametrize("rule", HOMES)
def test_each_rule_sees_what_breaks_it_and_nothing_else(rule):
    find, _, wrong, right = HOMES[rule]
    assert find(ast.parse(wrong)) and not find(ast.parse(right))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_no_torch(script):
    """Neither the script nor a module that it imports at its top may import torch there."""
    command = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-500:]
    assert not loaded & {"torch", "numpy", "tokenizers", "huggingface_hub", *REFERENCES}


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_that_help_touches_imports_torch_at_its_top(script):
    """The same from the source, which names the file and the line."""
    texts, found, queue = sources(), [], [script]
    for path in queue:
        for line, module in imports(ast.parse(texts[path]), top_level_only=True):
            if module.split(".")[0] == "torch":
                found.append(f"{path}:{line}")
            queue += [p for p in files_of(module, texts) if p not in queue]
    assert not found

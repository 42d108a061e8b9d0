"""The house: which unit may import which, that no modules import each other, how many stand in a folder, what an import loads."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import edgepatch

ROOT = Path(__file__).parent.parent
LAYERS = {
    "edgepatch.errors": 0,
    "edgepatch.cores": 1,
    "edgepatch.files": 1,
    "edgepatch.interrupts": 1,
    "edgepatch.known_models": 1,
    "edgepatch.pages": 1,
    "edgepatch.processes": 1,
    "edgepatch.progress": 1,
    "edgepatch.prompts": 1,
    "edgepatch.tensors": 1,
    "edgepatch.compilation": 2,
    "edgepatch.decoding": 2,
    "edgepatch.defaults": 2,
    "edgepatch.judges": 2,
    "edgepatch.seeds": 2,
    "edgepatch.text": 2,
    "edgepatch.trust": 2,
    "edgepatch.patch": 3,
    "edgepatch.converters": 4,
    "edgepatch.store": 4,
    "edgepatch.doctor": 5,
    "edgepatch.runtimes": 5,
    "edgepatch.inspection": 6,
    "edgepatch.llama_server": 6,
    "edgepatch.server": 6,
    "edgepatch.training": 6,
    "edgepatch.bundles": 7,
    "edgepatch.exports": 7,
    "edgepatch.bench": 8,
    "edgepatch.cli": 9,
    "edgepatch": 9,
    "edgepatch.front": 10,
}
"""The table of docs/reference/architecture.md: folders, and the few modules beside them. A unit imports units of lower layers, and itself."""

BENCH_VERBS = ("edgepatch.cli.bench", "edgepatch.cli.demo")
"""The only modules of the command line that may need the bench."""

LARGEST_FOLDER = 20
LARGEST_CLASS = 20
"""Methods."""

MODEL_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "llama_cpp",
    "onnxruntime",
    "gguf",
    "jinja2",
    "tokenizers",
    "llguidance",
)
MAX_IMPORT_S = 0.3


parsed = functools.cache(ast.parse)


def modules() -> dict[str, Path]:
    """Installed name -> file, of every module."""
    files = {}
    for folder, _, names in os.walk(ROOT / "edgepatch", followlinks=True):
        for file in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            files[".".join(p for p in parts if p != "__init__")] = file
    return files


def unit_of(module: str) -> str:
    """The folder directly in ``edgepatch`` that holds the module, or the module itself where it stands there alone."""
    return ".".join(module.split(".")[:2])


def imports(tree: ast.AST, module_names: set[str]) -> list[tuple[int, str]]:
    """(line, module) of every import of edgepatch, also inside functions and under TYPE_CHECKING."""
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            # `import edgepatch` reads `edgepatch.__version__`.
            imported += [(node.lineno, alias.name) for alias in node.names if alias.name != "edgepatch"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
            imported += [(node.lineno, name if name in module_names else base) for name in names]
    return [(line, name) for line, name in imported if name.split(".")[0] == "edgepatch"]


def upward_imports(module: str, source: str, module_names: set[str]) -> list[str]:
    """Lines that break the table."""
    unit, wrong = unit_of(module), []
    for line, target in imports(parsed(source), module_names):
        other = unit_of(target)
        if other != unit and LAYERS[other] >= LAYERS[unit]:
            wrong.append(
                f"{module}, line {line}: {unit} (layer {LAYERS[unit]}) imports {target} (layer {LAYERS[other]})"
            )
    return wrong


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules that it imports, itself left out.

    Args:
        sources: module -> its text.
    """
    module_names = set(sources)
    return {
        module: {
            target for _, target in imports(parsed(text), module_names) if target in module_names and target != module
        }
        for module, text in sources.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, found by taking away modules without imports, or that nobody imports, until none goes."""
    left = {module: set(targets) for module, targets in graph.items()}
    while True:
        imported = set().union(*left.values()) if left else set()
        ends = {module for module, targets in left.items() if not targets or module not in imported}
        if not ends:
            break
        left = {module: targets - ends for module, targets in left.items() if module not in ends}

    def reach(module: str) -> set[str]:
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            new = left[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reached = {module: reach(module) for module in left}
    groups = {
        tuple(sorted({module} | {other for other in reached[module] if module in reached[other]})) for module in left
    }
    return sorted(list(group) for group in groups if len(group) > 1)


def test_every_module_has_a_layer():
    assert {unit_of(module) for module in modules()} <= set(LAYERS)


def test_the_documented_table_is_this_table():
    rows = re.findall(
        r"^\| (\d+) \| `([\w/.]+)`", (ROOT / "docs" / "reference" / "architecture.md").read_text("utf-8"), re.MULTILINE
    )
    documented = {
        re.sub(r"\.__init__$", "", path.removesuffix(".py").strip("/").replace("/", ".")): int(n) for n, path in rows
    }
    documented = {
        name if name.startswith("edgepatch") else f"edgepatch.{name}": layer for name, layer in documented.items()
    }
    assert documented == {unit: LAYERS[unit] for unit in {unit_of(module) for module in modules()}}


def test_imports_point_to_lower_layers_only():
    files = modules()
    assert len(files) > 20
    wrong = [w for name, file in files.items() for w in upward_imports(name, file.read_text("utf-8"), set(files))]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other():
    """In a circle, also one through functions or TYPE_CHECKING, no module can be read or tested alone."""
    sources = {name: file.read_text("utf-8") for name, file in modules().items()}
    assert not circles(import_graph(sources))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("import edgepatch.b", "x = 1", ""), []),
        (("import edgepatch.b", "def f():\n    from edgepatch import a", ""), [["edgepatch.a", "edgepatch.b"]]),
        (
            ("from edgepatch.b import x", "if TYPE_CHECKING:\n    from edgepatch.c import y", "import edgepatch.a"),
            [["edgepatch.a", "edgepatch.b", "edgepatch.c"]],
        ),
        (("import edgepatch.b", "import edgepatch.c", "import edgepatch.b"), [["edgepatch.b", "edgepatch.c"]]),
    ],
)
def test_the_check_sees_a_circle(texts: tuple[str, ...], expected: list[list[str]]):
    sources = {f"edgepatch.{name}": text for name, text in zip("abc", texts, strict=True)}
    assert circles(import_graph(sources)) == expected


def test_verbs_of_the_core_need_no_bench():
    files = modules()
    for name in (name for name in files if unit_of(name) == "edgepatch.cli" and not name.startswith(BENCH_VERBS)):
        targets = {target for _, target in imports(parsed(files[name].read_text("utf-8")), set(files))}
        assert not [target for target in targets if unit_of(target) == "edgepatch.bench"], name


def test_folders_stay_small():
    files = [*modules().values(), *ROOT.glob("tests/**/*.py")]
    folders = Counter(file.resolve().parent for file in files if file.name not in ("__init__.py", "__main__.py"))
    assert not {str(folder): n for folder, n in folders.items() if n > LARGEST_FOLDER}


def methods(tree: ast.AST) -> dict[str, int]:
    """Class -> number of its methods, properties and special ones included."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {one.name: sum(isinstance(statement, kinds) for statement in one.body) for one in classes}


def own_privates(tree: ast.AST) -> set[str]:
    """Private names that a module's classes have: methods, and what is read or set on ``self``."""
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_self(node.value)}
    return {name for name in functions | attributes if re.match("_[a-z]", name)}


def foreign_privates(tree: ast.AST) -> set[str]:
    """Private names that a module reads or sets on something else than ``self``."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not _is_self(node.value)]
    return {node.attr for node in nodes if re.match("_[a-z]", node.attr)}


def _is_self(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def test_classes_stay_small():
    sizes = {
        f"{name}.{one}": count
        for name, file in modules().items()
        for one, count in methods(parsed(file.read_text("utf-8"))).items()
    }
    assert sizes["edgepatch.runtimes.session.Session"] > 10
    assert not {name: count for name, count in sizes.items() if count > LARGEST_CLASS}


def test_the_bench_touches_no_privates_of_runtimes():
    """What it needs of them is a public verb."""
    trees = {name: parsed(file.read_text("utf-8")) for name, file in modules().items()}
    theirs = {
        private for name in trees if unit_of(name) == "edgepatch.runtimes" for private in own_privates(trees[name])
    }
    assert {"_evaluated", "_caches"} <= theirs
    for name, tree in trees.items():
        if unit_of(name) == "edgepatch.bench":
            assert not foreign_privates(tree) & theirs, name


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("edgepatch.errors", "from edgepatch.tensors import ModelSpec"),
        ("edgepatch.trust.roots", "from edgepatch.patch.file import Patch"),
        ("edgepatch.store.device", "from edgepatch import Patch"),
        ("edgepatch.patch.file", "def f():\n    from edgepatch import converters"),
        ("edgepatch.converters.hf.folders", "import edgepatch.runtimes.reference"),
        ("edgepatch.tensors", "from edgepatch.decoding.sampling import Sampling"),
        ("edgepatch.training.pairs.files", "from edgepatch.bench.safety import domain"),
        ("edgepatch.bench.report.overview", "from edgepatch.cli import app"),
    ],
)
def test_the_check_sees_an_upward_import(module: str, source: str):
    assert upward_imports(module, source, set(modules()) | {module})


def test_checkout_names_are_not_imported():
    for file in [*modules().values(), *ROOT.glob("tests/**/*.py")]:
        assert not re.search(r"^\s*(from|import) (converters|bench)\b", file.read_text("utf-8"), re.MULTILINE), file


def test_named_extras_exist():
    """A hint that names an extra which does not exist sends the user in circles."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))
    for file in modules().values():
        for extra in re.findall(r"edgepatch\[([\w-]+)\]", file.read_text("utf-8")):
            assert extra in extras, f"{file}: edgepatch[{extra}]"
        for call in ast.walk(parsed(file.read_text("utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "MissingExtraError":
                extra = call.args[1]
                assert not isinstance(extra, ast.Constant) or extra.value in extras, f"{file}, line {call.lineno}"


def test_public_names():
    assert set(edgepatch.__all__) == set(dir(edgepatch))
    for name in edgepatch.__all__:
        assert getattr(edgepatch, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = edgepatch.nonsense


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize(
    "statement", ["import edgepatch", "import edgepatch.cli", "import edgepatch.runtimes", "import edgepatch.bench"]
)
def test_import_loads_no_model_library(statement: str):
    code = f"import sys; {statement}; print([n for n in {MODEL_LIBRARIES} if n in sys.modules])"
    assert _run(code).strip() == "[]"


def test_the_version_is_told_before_a_library_is_imported():
    code = "import sys; sys.argv[1:] = ['--version']; from edgepatch.front import main; main()"
    libraries = "print([n for n in ('numpy', 'pydantic', 'rich', 'typer') if n in sys.modules])"
    assert _run(f"{code}; {libraries}") == f"edgepatch {edgepatch.__version__}\n[]\n"


def test_import_is_quick():
    code = "import time; s = time.perf_counter(); import edgepatch; print(time.perf_counter() - s)"
    assert min(float(_run(code)) for _ in range(4)) < MAX_IMPORT_S

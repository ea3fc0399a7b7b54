"""The house: who may import whom, where things stand, which files an op has. Read from syntax trees; nothing is imported.

formats  <-  kernels  <-  { quant, bench }  <-  src/percard             only downward, quant and bench apart
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("formats", "kernels", "quant", "bench")
MAY_IMPORT = {
    "formats": {"formats"},
    "kernels": {"formats", "kernels"},
    "quant": {"formats", "kernels", "quant"},
    "bench": {"formats", "kernels", "bench"},
    "integrations": {"formats", "kernels", "integrations"},
    "roof": {"formats", "kernels", "quant", "bench", "roof"},
}
# Beyond the standard library. The serving path is formats, kernels and one integration.
SERVING = {"torch", "triton", "numpy", "safetensors"}
HOSTS = {"vllm", "sglang", "transformers"}
SEVERAL_OPS = ("kernels/linear.py", "bench/ops.py", "bench/engine/", "src/percard/integrations/")
FULL_OPS = (
    "quantize_rows",
    "rmsnorm_quantize",
    "silu_mul_quantize",
    "matmul_w8a8",
    "matmul_w4a16",
    "matmul_w8a16",
    "matmul_w4a8",
    "moe_matmul",
    "kv_append",
    "attention_decode",
    "attention_prefill",
    "gather_dequantize",
    "distill_loss",
)
OFFLINE_OPS = ("search_scale",)  # no Triton body
EVERY_OP_HAS = ("__init__.py", "contract.py", "reference.py", "cases.py", "README.md", "cpu.cpp")
NO_NAMES = {"utils", "util", "helpers", "helper", "common", "errors", "exceptions", "misc"}
ERRORS = {"FormatError": "formats/spec.py", "Unsupported": "kernels/op.py", "RecipeError": "quant/fields.py"}
ASKS_DEVICE = {
    "is_available", "device_count", "get_device_properties", "get_device_capability", "get_device_name", "current_device",
    "mem_get_info",
}  # fmt: skip
TIMES_DEVICE = {"CUDAGraph", "graph", "graphs", "Event", "synchronize", "make_graphed_callables"}


def sources() -> list[Path]:
    """Every Python file that ships."""
    folders = [ROOT / floor for floor in FLOORS] + [ROOT / "src" / "percard"]
    return sorted(p for folder in folders for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def rel(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """kernels/op.py -> percard.kernels.op; a package's __init__.py is the package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[2:] if parts[:2] == ["src", "percard"] else parts
    parts = parts[:-1] if parts and parts[-1] == "__init__" else parts
    return ".".join(["percard", *parts])


MODULES = {module_of(path): path for path in sources()}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """Nodes under `if TYPE_CHECKING:`; no import happens there."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for block in blocks for inner in ast.walk(block)}


def package_of(path: Path, level: int) -> str:
    """What the leading dots of a relative import in `path` mean."""
    parts = module_of(path).split(".")
    up = level - (1 if path.name == "__init__.py" else 0)
    return ".".join(parts[: len(parts) - up]) if up else ".".join(parts)


@cache
def imports_of(path: Path) -> tuple[tuple[str, int], ...]:
    """(module, line) of every import, at the top of the file or inside of a function."""
    found: list[tuple[str, int]] = []
    skipped = for_types_only(tree_of(path))
    for node in ast.walk(tree_of(path)):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package_of(path, node.level) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((inner if inner in MODULES else base, node.lineno))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [(str(a.value), node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant)]
    return tuple(found)


def ours(path: Path) -> Iterator[tuple[str, int]]:
    """Imports of percard's own modules, as names in MODULES where they are files."""
    for name, line in imports_of(path):
        if (name == "percard" or name.startswith("percard.")) and not name.endswith("._cpu"):
            yield name, line


def floor_of(module: str) -> str:
    parts = module.split(".")
    first = parts[1] if len(parts) > 1 else ""
    return first if first in (*FLOORS, "integrations") else "roof"


def op_of(module: str) -> str | None:
    """percard.kernels.matmul_w8a8.gpu -> matmul_w8a8."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["percard", "kernels"] and len(parts) > 2 and parts[2] in OPS else None


OPS = {p.parent.name for p in (ROOT / "kernels").glob("*/__init__.py")}


def faults(lines: Iterator[str]) -> None:
    found = list(lines)
    assert not found, "\n" + "\n".join(found)


def test_there_is_something_to_read() -> None:
    assert len(MODULES) > 30
    assert set(FULL_OPS) | set(OFFLINE_OPS) <= OPS
    assert any(name == "percard.kernels.op" for name, _ in ours(ROOT / "kernels" / "linear.py"))


def test_imports_go_down_only() -> None:
    def check() -> Iterator[str]:
        for module, path in MODULES.items():
            for name, line in ours(path):
                if floor_of(name) not in MAY_IMPORT[floor_of(module)]:
                    yield f"{rel(path)}:{line}: {floor_of(module)} imports {name}"

    faults(check())


def test_imports_across_files_are_relative() -> None:
    def check() -> Iterator[str]:
        for path in MODULES.values():
            for node in ast.walk(tree_of(path)):
                if (
                    isinstance(node, ast.ImportFrom)
                    and not node.level
                    and (node.module or "").split(".")[0] == "percard"
                ):
                    yield f"{rel(path)}:{node.lineno}: write the import of {node.module} with dots"

    faults(check())


def test_serving_needs_torch_triton_numpy_safetensors() -> None:
    def check() -> Iterator[str]:
        for module, path in MODULES.items():
            floor = floor_of(module)
            if floor not in ("formats", "kernels", "integrations"):
                continue
            allowed = SERVING | (HOSTS if floor == "integrations" else set())
            for name, line in imports_of(path):
                top = name.split(".")[0]
                if top not in allowed | {"percard"} and top not in sys.stdlib_module_names:
                    yield f"{rel(path)}:{line}: the serving path imports {name}"
                if floor == "formats" and top == "triton":
                    yield f"{rel(path)}:{line}: formats imports triton"

    faults(check())


def test_ops_do_not_know_each_other() -> None:
    def check() -> Iterator[str]:
        for module, path in MODULES.items():
            named = {op_of(name) for name, _ in ours(path)} - {None}
            mine = op_of(module)
            if mine is not None and named - {mine}:
                yield f"{rel(path)}: op {mine} imports {sorted(named - {mine})}"
            if mine is None and len(named) > 1 and not rel(path).startswith(SEVERAL_OPS):
                yield f"{rel(path)}: names several ops, {sorted(named)}"

    faults(check())


def test_triton_is_imported_where_kernels_are() -> None:
    def check() -> Iterator[str]:
        for path in MODULES.values():
            if path.name in ("gpu.py", "inspection.py") or path.name.endswith("tiles.py"):
                continue
            for name, line in imports_of(path):
                if name.split(".")[0] == "triton":
                    yield f"{rel(path)}:{line}: imports triton"

    faults(check())


def test_the_cpp_module_is_reached_through_op() -> None:
    def check() -> Iterator[str]:
        for path in MODULES.values():
            for name, line in imports_of(path):
                if name.endswith("._cpu") and rel(path) != "kernels/op.py":
                    yield f"{rel(path)}:{line}: imports {name}; take kernels.op.native()"

    faults(check())


def cuda_uses(path: Path) -> Iterator[tuple[str, int]]:
    """Attributes of torch.cuda that a file uses: is_available, Event, ..."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "torch.cuda":
            yield from ((alias.name, node.lineno) for alias in node.names)


def test_the_device_is_asked_in_two_places_and_timed_in_three() -> None:
    asks, times = (
        ("kernels/device.py", "bench/card.py"),
        ("kernels/tuning.py", "bench/clock.py", "bench/engine/graphs.py"),
    )

    def check() -> Iterator[str]:
        for path in MODULES.values():
            for name, line in cuda_uses(path):
                if name in ASKS_DEVICE and rel(path) not in asks:
                    yield f"{rel(path)}:{line}: asks torch.cuda.{name}; take kernels.device or bench.card"
                if name in TIMES_DEVICE and rel(path) not in (*times, "bench/card.py"):
                    yield f"{rel(path)}:{line}: uses torch.cuda.{name}; that is for {', '.join(times)}"

    faults(check())


def test_cpp_includes_our_headers_and_the_standard_library() -> None:
    headers = {p.name for p in (ROOT / "csrc").glob("*.h")}
    assert headers
    named = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
    system = {"immintrin.h", "cpuid.h", "unistd.h", "pthread.h", "omp.h", "arm_neon.h"}

    def check() -> Iterator[str]:
        for path in [*ROOT.glob("csrc/*"), *ROOT.glob("kernels/*/cpu.cpp")]:
            if path.suffix not in (".cpp", ".h"):
                continue
            for quote, name in named.findall(path.read_text(encoding="utf-8")):
                known = (
                    name in headers if quote == '"' else "/" not in name and (not name.endswith(".h") or name in system)
                )
                known = known or (name.startswith("nanobind/") and path.name == "module.cpp") or name.startswith("sys/")
                if not known:
                    yield f"{rel(path)}: includes {name}"

    faults(check())


def test_no_circle() -> None:
    graph = {m: sorted({name for name, _ in ours(p) if name in MODULES and name != m}) for m, p in MODULES.items()}
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str] | None:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return None
        for name in graph[module]:
            circle = walk(name, [*trail, module])
            if circle:
                return circle
        done.add(module)
        return None

    for module in graph:
        circle = walk(module, [])
        assert circle is None, " -> ".join(circle or [])


@pytest.mark.parametrize("op", sorted(OPS))
def test_an_op_folder_is_complete(op: str) -> None:
    wanted = [*EVERY_OP_HAS, *(() if op in OFFLINE_OPS else ("gpu.py", "tuned.json"))]
    folder = ROOT / "kernels" / op
    assert [name for name in wanted if not (folder / name).is_file()] == []
    if op in OFFLINE_OPS:
        assert not (folder / "gpu.py").exists()
    init = tree_of(folder / "__init__.py")
    assert ast.get_docstring(init), "the op's formula stands in the docstring of its __init__.py"
    built = [n for n in init.body if isinstance(n, ast.Assign)]
    assert len(built) == 1 and ast.unparse(built[0].value).startswith("Op("), (
        "an op's __init__.py holds the op, nothing else"
    )
    bodies = [ast.unparse(b.func) for b in built[0].value.args[2].elts]  # type: ignore[attr-defined]
    assert bodies == [*(() if op in OFFLINE_OPS else ("triton_body",)), "cpu_body", "reference_body"]


@pytest.mark.parametrize("op", sorted(OPS))
def test_an_op_has_the_same_inside_as_every_other(op: str) -> None:
    folder = ROOT / "kernels" / op
    contract = tree_of(folder / "contract.py")
    names = {n.name for n in contract.body if isinstance(n, ast.FunctionDef)}
    names |= {t.id for n in contract.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    names |= {a.asname or a.name for n in contract.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert {"SCHEMA", "unwrap", "check", "out_like", "cost", "native", "tolerance", "cpu_takes"} <= names
    reference = (folder / "reference.py").read_text(encoding="utf-8")
    assert len(reference.splitlines()) <= 60
    assert ".is_cuda" not in reference and ".device.type" not in reference and ".is_cpu" not in reference
    cases = tree_of(folder / "cases.py")
    cases_names = {n.name for n in cases.body if isinstance(n, ast.FunctionDef)}
    cases_names |= {t.id for n in cases.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    assert {"SMALL", "CASES", "inputs"} <= cases_names


def test_kernels_can_be_read() -> None:
    def check() -> Iterator[str]:
        for path in [p for p in MODULES.values() if p.name == "gpu.py" or p.name.endswith("tiles.py")]:
            tree = tree_of(path)
            if path.name == "gpu.py" and len(path.read_text(encoding="utf-8").splitlines()) > 400:
                yield f"{rel(path)}: over 400 lines"
            for node in ast.walk(tree):
                if isinstance(node, ast.Global):
                    yield f"{rel(path)}:{node.lineno}: global"
                if not isinstance(node, ast.FunctionDef):
                    continue
                marks = [ast.unparse(d) for d in node.decorator_list]
                if any("autotune" in m for m in marks):
                    yield f"{rel(path)}:{node.lineno}: {node.name} tunes itself at run time"
                if not any(m.startswith("triton.jit") for m in marks):
                    continue
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                if len(arguments) > 25:
                    yield f"{rel(path)}:{node.lineno}: {node.name} has {len(arguments)} parameters"
                if (node.end_lineno or 0) - node.lineno > 120:
                    yield f"{rel(path)}:{node.lineno}: {node.name} is over 120 lines"
                if node.name.endswith("_kernel") and not ast.get_docstring(node):
                    yield f"{rel(path)}:{node.lineno}: {node.name} has no docstring"

    faults(check())


def test_names_that_say_nothing_are_not_taken() -> None:
    def check() -> Iterator[str]:
        for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "csrc").glob("*")]:
            if path.stem in NO_NAMES or re.search(r"_v\d+$", path.stem):
                yield f"{rel(path)}: name it after what it does"

    faults(check())


def test_floors_are_not_packages_of_their_own() -> None:
    """`kernels` is also Hugging Face's package; with an __init__.py ours would shadow it at the repository root."""
    assert [floor for floor in (*FLOORS, "tests") if (ROOT / floor / "__init__.py").exists()] == []


def test_errors_live_on_the_floor_that_raises_them() -> None:
    found = {
        node.name: rel(path)
        for path in MODULES.values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and node.name in ERRORS
    }
    assert found == ERRORS


def test_files_stay_short_and_open_with_a_docstring() -> None:
    def check() -> Iterator[str]:
        for path in MODULES.values():
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > 450:
                yield f"{rel(path)}: {lines} lines, at most 450"
            if lines and not ast.get_docstring(tree_of(path)):
                yield f"{rel(path)}: no docstring"

    faults(check())


def test_no_star_import_and_no_probe_at_import() -> None:
    def check() -> Iterator[str]:
        for path in MODULES.values():
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                    yield f"{rel(path)}:{node.lineno}: star import"
            for statement in tree_of(path).body:
                if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                    continue
                for node in ast.walk(statement):
                    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(
                        ("torch.cuda.", "device.card", "device.has_card")
                    ):
                        yield f"{rel(path)}:{node.lineno}: asks for a device while being imported"

    faults(check())

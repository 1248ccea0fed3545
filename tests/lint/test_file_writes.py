"""Every file that a user sees is written by `core.files`, which writes it whole or not at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import kinetoscope

SOURCE = Path(kinetoscope.__file__).parent
WRITERS = {
    "write_text", "write_bytes", "touch", "rename", "renames", "copy2", "copyfile", "copytree", "link", "symlink_to",
    "hardlink_to", "savez", "savez_compressed", "savetxt", "tofile", "open_memmap", "save_file", "save_model",
    "savefig", "save_pretrained", "save_torch_state_dict", "write_table", "ParquetWriter", "NamedTemporaryFile",
    "mkstemp",
}  # fmt: skip
"""Methods and functions that write a file, whatever their object is."""
OF_MODULES = {
    ("os", "replace"), ("os", "open"), ("shutil", "copy"), ("shutil", "move"), ("np", "save"), ("torch", "save"),
    ("json", "dump"), ("pickle", "dump"), ("state_dict_saver", "save"), ("image", "save"), ("sheet", "save"),
}  # fmt: skip
"""(module or variable, function) where the name of the function alone does not tell."""
WHOLE = {"replacing", "replacing_folder"}
"""Context managers in whose block any function may write, since the file or folder gets its name at the end."""
ALLOWED = {
    ("core/files.py", "publish"): "replacing itself",
    ("core/files.py", "publish_folder"): "replacing itself",
    ("core/files.py", "append_line"): "logs, to which lines are added; a line that fails is taken back",
    ("core/files.py", "_sync"): "opens files for reading",
    ("core/file_lock.py", "file_lock"): "the lock file is empty",
    ("cli/main.py", "main"): "opens /dev/null",
    ("evaluation/pictures.py", "_png"): "encodes in memory",
    ("media/video.py", "_new_mp4"): "its callers give a name of replacing or temporary_beside",
    ("train/data/preprocess.py", "claimed"): "opens the folder for reading, to lock it",
    ("train/flow.py", "_new_array"): "an unfinished file that the next start continues, under a lock; then published",
    ("train/post_export.py", "_directory"): "files in a folder of replacing_folder",
    ("train/export.py", "export_video"): "files in a folder of replacing_folder",
    ("train/export.py", "export_played"): "files in a folder of replacing_folder",
    ("loading/directory.py", "copy"): "files in a folder of replacing_folder",
    ("train/kept.py", "save_shared"): "several processes write a temporary folder, then publish_folder names it",
    ("runtime/peak.py", "__init__"): "/proc/self/clear_refs is no file on a disk",
    ("runtime/paper.py", "_write"): "files in a temporary folder of this process",
}
"""(file, function) -> why it may write in another way."""


def name_of(call: ast.Call) -> tuple[str, str]:
    """Return (the object or module of a called attribute, or "", and the name of the called function)."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return (function.value.id if isinstance(function.value, ast.Name) else "?"), function.attr
    return "", function.id if isinstance(function, ast.Name) else ""


def writes(call: ast.Call) -> bool:
    """Return whether a call writes, moves or names a file."""
    owner, name = name_of(call)
    if name in ("write_text", "write_bytes") and not owner:
        return False  # those of core.files
    if name in WRITERS or (owner, name) in OF_MODULES:
        return True
    if name == "replace":  # of a path; strings take two arguments, dataclasses keywords
        return bool(owner) and len(call.args) == 1 and not call.keywords
    if name != "open":
        return False
    literals = [*call.args, *(k.value for k in call.keywords)]
    modes = [a.value for a in literals if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return any(len(mode) <= 3 and set(mode) & set("wax+") for mode in modes)


def writes_elsewhere(node: ast.AST, function: str = "") -> Iterator[tuple[str, int]]:
    """Yield (function, line) of each call that writes outside of a block of `WHOLE`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and writes(child):
            yield function, child.lineno
        if isinstance(child, ast.With) and any(
            isinstance(item.context_expr, ast.Call) and name_of(item.context_expr)[1] in WHOLE for item in child.items
        ):
            continue
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from writes_elsewhere(child, child.name if named else function)


def test_source_writes_files_whole() -> None:
    found = {
        (str(path.relative_to(SOURCE)), function): line
        for path in sorted(SOURCE.rglob("*.py"))
        for function, line in writes_elsewhere(ast.parse(path.read_text(encoding="utf-8")))
    }
    wrong = [f"{file}:{found[file, name]} in {name}" for file, name in found if (file, name) not in ALLOWED]
    assert not wrong, f"write these files by core.files (replacing, write_text, write_json, append_line): {wrong}"
    assert not [place for place in ALLOWED if place not in found], "allowed, and does not write any more"


def test_calls_that_write_are_recognised() -> None:
    lines = [
        "path.write_text(x)", "open(p, 'w')", "path.open('ab')", "path.open(mode='x')", "np.save(p, a)",
        "torch.save(s, p)", "save_file(t, p)", "temporary.replace(path)", "self.part.replace(path)", "path.rename(b)",
        "os.replace(a, b)", "json.dump(x, f)", "shutil.copytree(a, b)", "av.open(p, 'w')", "figure.savefig(p)",
        "pq.ParquetWriter(f, s)", "with replacing(p) as t:\n    pass\nopen(p, 'r+b')",
    ]  # fmt: skip
    for line in lines:
        assert list(writes_elsewhere(ast.parse(line))), line
    for line in (
        "text.replace('a', 'b')", "replace(x, y=1)", "write_text(p, x)", "path.open()", "path.open('rb')",
        "with replacing(p) as t, t.open('wb') as file:\n    torch.save(s, file)",
    ):  # fmt: skip
        assert not list(writes_elsewhere(ast.parse(line))), line

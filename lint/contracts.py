"""A contract for import-linter that sees what its own cannot: parts of external packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from importlinter import Contract, ContractCheck, fields, output

from lint.references import Reference, matches, references


class ReferencesContract(Contract):
    """Names that lie under `roots` and are reached by `modules` must fit one of `allowed` and none of `forbidden`.

    import-linter's graph knows an external package only as a whole, so that "diffusers, but not diffusers.pipelines"
    cannot be said with its own contracts. This one reads the sources.

    Options:
        modules: patterns of modules of the root package.
        roots: names of packages; `*` is every package.
        allowed, forbidden: patterns as `lint.references.matches` has them; `{package}` is the importing module's
            package.
    """

    type_name = "references"
    modules = fields.ListField(subfield=fields.StringField())
    roots = fields.ListField(subfield=fields.StringField())
    allowed = fields.ListField(subfield=fields.StringField())
    forbidden = fields.ListField(subfield=fields.StringField(), required=False)

    def check(self, graph: Any, verbose: bool) -> ContractCheck:
        """Read every module of the graph that fits `modules`."""
        modules: Any = self.modules
        broken: list[str] = []
        for module in sorted(graph.modules):
            if any(matches(module, pattern) for pattern in modules):
                path = _source(module)
                broken += [
                    f"{path}:{r.line}: {r.name}" for r in references(path.read_text()) if self._breaks(r, module)
                ]
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """One line a reference."""
        for line in check.metadata["broken"]:
            output.print_error(f"{line} is not allowed here")
            output.new_line()

    def _breaks(self, reference: Reference, module: str) -> bool:
        roots: Any = self.roots
        allowed: Any = self.allowed
        forbidden: Any = self.forbidden or []
        under = any(matches(reference.name, f"{root}.**") for root in roots if root != "*")
        if not under and ("*" not in roots or reference.spelled):
            return False
        package = module.rpartition(".")[0]
        fits = [any(matches(reference.name, p.format(package=package)) for p in ps) for ps in (allowed, forbidden)]
        return not fits[0] or fits[1]


def _source(module: str) -> Path:
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)  # of the root only: finding a submodule would run the packages above it
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        stem = Path(folder, *rest.split("."))
        for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"module {module} has no source file")

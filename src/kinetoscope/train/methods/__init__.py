"""Ways of post-training, by the name that a recipe's `method` section gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.registry import Registry, check_place
from kinetoscope.train.methods.base import BatchSource, Method, MethodSettings
from kinetoscope.train.roles import ModelBase

__all__ = [
    "METHODS",
    "BatchSource",
    "Method",
    "MethodSettings",
    "check_roles",
    "make_method",
    "method_class",
    "register_method",
]

METHODS = Registry(
    "unknown method {name!r}; the known ones are: {known}",
    {
        "consistency": "kinetoscope.train.methods.consistency:Consistency",
        "diffusion_forcing": "kinetoscope.train.methods.diffusion_forcing:DiffusionForcing",
        "dmd2": "kinetoscope.train.methods.dmd2:DMD2",
        "finetune": "kinetoscope.train.methods.finetune:Finetune",
        "ode_distill": "kinetoscope.train.methods.ode_distill:OdeDistill",
        "self_forcing": "kinetoscope.train.methods.self_forcing:SelfForcing",
        "sparse_finetune": "kinetoscope.train.methods.sparse_finetune:SparseFinetune",
        "teacher_forcing": "kinetoscope.train.methods.teacher_forcing:TeacherForcing",
    },
)


def register_method(name: str, place: str) -> None:
    """Let recipes name the `Method` at `place`, "module:class".

    Raises:
        ConfigError: `place` is no such text.
    """
    check_place(f"register_method: place of {name!r}", place)
    METHODS[name] = place


def method_class(name: str) -> type[Method]:
    """The method called `name`.

    Raises:
        ConfigError: there is none.
    """
    return METHODS.find(name)


def check_roles(name: str, roles: Iterable[str]) -> None:
    """Check that a recipe has the roles of its method, and no others.

    Args:
        name: of the method.
        roles: names of the roles that the recipe has.

    Raises:
        ConfigError: a role that the method needs is missing, or one is there that it does not use.
    """
    made, found = method_class(name), list(roles)
    if missing := [role for role in made.needs if role not in found]:
        raise ConfigError(f"method {name} needs models.{', models.'.join(missing)} in the recipe")
    used = {*made.needs, *getattr(made, "optional", ())}
    if unused := [role for role in found if role not in used]:
        raise ConfigError(
            f"method {name} does not use models.{', models.'.join(unused)}; leave it out (its roles are: "
            f"{', '.join(sorted(used))})"
        )


def make_method(settings: MethodSettings, roles: Mapping[str, ModelBase]) -> Method:
    """Return the method of a recipe's section over opened roles.

    Raises:
        ConfigError: see `check_roles`, and the method's own.
    """
    check_roles(settings.name, roles)
    return method_class(settings.name)(roles, settings)

"""Ways of post-training, by the name that a recipe's `method` section gives."""

from __future__ import annotations

from collections.abc import Mapping

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.registry import Registry
from kinetoscope.train.methods.base import BatchSource, Method, MethodSettings
from kinetoscope.train.roles import ModelBase

__all__ = ["METHODS", "BatchSource", "Method", "MethodSettings", "make_method", "method_class", "register_method"]

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
    """Let recipes name the `Method` at `place`, "module:class"."""
    METHODS[name] = place


def method_class(name: str) -> type[Method]:
    """The method called `name`.

    Raises:
        ConfigError: there is none.
    """
    return METHODS.find(name)


def make_method(settings: MethodSettings, roles: Mapping[str, ModelBase]) -> Method:
    """The method of a recipe's section over opened roles.

    Raises:
        ConfigError: a role that it needs is missing.
    """
    made = method_class(settings.name)
    if missing := [name for name in made.needs if name not in roles]:
        raise ConfigError(f"method {settings.name} needs models.{', models.'.join(missing)} in the recipe")
    return made(roles, settings)

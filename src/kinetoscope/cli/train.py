"""`kinetoscope train`: make a reference model from nothing, or another model out of one, by a recipe."""

from __future__ import annotations

import argparse

from kinetoscope.core.errors import ConfigError

NAME = "train"
HELP = "train a model by a recipe; the same command continues an interrupted run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("recipe", help="a YAML file, for instance recipes/tiny_t2v.yaml")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="section.key=value"
    )
    parser.add_argument(
        "--part", dest="parts", action="append", default=[], metavar="PART",
        help="train only this part (repeatable): text, encoder, decoder, transformer; then run without to finish",
    )  # fmt: skip
    parser.add_argument(
        "--export", action="store_true", help="post-training: write the model of the newest checkpoint, train nothing"
    )
    parser.add_argument("--fresh", action="store_true", help="refuse to continue an earlier run in the same folder")


def run(args: argparse.Namespace) -> int:
    """Train and print where the model is."""
    from kinetoscope.cli.progress import RunProgress, leads
    from kinetoscope.core.config import launch
    from kinetoscope.train.post import is_post_recipe
    from kinetoscope.train.post_run import run_post_recipe
    from kinetoscope.train.recipe import read_recipe
    from kinetoscope.train.run import run_recipe

    with RunProgress() as progress:
        if is_post_recipe(read_recipe(args.recipe)):
            if args.parts:
                raise ConfigError("--part is for recipes of models made from nothing; this one has a method")
            model = run_post_recipe(
                args.recipe, args.overrides, fresh=args.fresh, export_only=args.export, on_progress=progress.training
            )
        elif args.export:
            raise ConfigError("--export is for recipes of post-training; this one has no method")
        elif (started := launch()) is not None and started.world > 1:
            raise ConfigError("several processes are for recipes of post-training; this one makes a model from nothing")
        else:
            model = run_recipe(
                args.recipe, args.overrides, parts=args.parts, fresh=args.fresh, on_progress=progress.training
            )
    if leads():
        print(model)
    return 0

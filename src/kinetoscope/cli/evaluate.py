"""`kinetoscope eval`: does a reference model do what prompts say, or, if it is played, what the player does?"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinetoscope.cli.options import (
    DEFAULT_MODEL,
    add_compute_options,
    add_device_options,
    add_quiet_option,
    add_video_options,
    check_range,
    compute_fields,
    device_fields,
    video_fields,
)
from kinetoscope.core.errors import InputError
from kinetoscope.core.files import write_text

if TYPE_CHECKING:
    from kinetoscope.evaluation.drift import Drift

NAME = "eval"
HELP = "score how a model follows captions never trained on, or a player's actions, with the judge of its world"
PROMPTS = {"n": 300, "drift_frames": 12}
PLAYED = {"n": 16, "drift_frames": 20, "frames": 521}
"""Defaults of worlds that are played: over 2,000 actions, and the views after 500 frames."""
BATCH = 8
MAX_VIDEOS, MAX_SEED = 1_000_000, 2**32 - 1
SHEET_ROWS = 16
SCORES = "## Scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_quiet_option(parser)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a model trained on a world of this package")
    parser.add_argument("--n", type=int, help=f"videos (default: {PROMPTS['n']}; of played worlds {PLAYED['n']} games)")
    parser.add_argument("--seed", type=int, default=0, help="of the first video, of the choice of captions, of players")
    parser.add_argument("--world", metavar="NAME", help="whose judge scores (default: the model's own)")
    parser.add_argument("--json", metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--sheet", metavar="FILE", help=f"write a contact sheet of the first {SHEET_ROWS} videos (PNG)")
    parser.add_argument(
        "--drift", metavar="FILE",
        help="judge each part of the videos by itself too, and plot the scores (PNG): with --frames, of long videos",
    )  # fmt: skip
    parser.add_argument(
        "--drift-frames", type=int, metavar="N",
        help=f"frames of a part (default: {PROMPTS['drift_frames']}; of played worlds {PLAYED['drift_frames']})",
    )  # fmt: skip
    parser.add_argument("--card", action="store_true", help="write the scores into the README.md of the model")
    add_video_options(parser)
    add_compute_options(parser)
    add_device_options(parser)


@dataclass(slots=True)
class Result:
    """What was found.

    Attributes:
        title, table: for people, Markdown.
        facts: for JSON.
        videos, labels: uint8 [T, H, W, 3] each, for the contact sheet.
        drift: over time, if that was asked for.
    """

    title: str
    table: str
    facts: dict[str, Any]
    videos: list[Any]
    labels: list[str]
    drift: Drift | None = None

    def over_time(self, drift: Drift, frames: int) -> None:
        """Add what was seen part by part, `frames` frames each."""
        from kinetoscope.evaluation.drift import drift_json, drift_table

        self.drift = drift
        self.facts["drift"] = drift_json(drift)
        self.table += f"\n\nPart by part, {frames} frames each:\n\n{drift_table(drift)}"


def run(args: argparse.Namespace) -> int:
    """Generate or play, judge, and print scores beside ground truth and chance."""
    check_range("n", 1 if args.n is None else args.n, 1, MAX_VIDEOS)
    check_range("seed", args.seed, 0, MAX_SEED - MAX_VIDEOS)
    from kinetoscope.media import check_output, contact_sheet

    for path, suffix in ((args.json, ".json"), (args.sheet, ".png"), (args.drift, ".png")):
        if path:
            check_output(path, (suffix,))

    from kinetoscope.cli.progress import RunProgress
    from kinetoscope.runtime.generator import VideoGenerator
    from kinetoscope.worlds import get_world

    generator = VideoGenerator.from_pretrained(args.model, **compute_fields(args), **device_fields(args))
    model = generator.pipeline.model
    name = args.world or model.sidecar.get("world")
    if name is None:
        raise InputError(
            f"{args.model} names no world in its kinetoscope.json, so there is no judge for it; say --world"
        )
    world: Any = get_world(name)
    played = _is_played(generator, world)
    for key, value in (PLAYED if played else PROMPTS).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    with RunProgress(args.quiet) as progress:
        result = (_play if played else _generate)(generator, world, args, progress)
    generator.close()
    if result is None:
        return 0
    if result.drift is not None and args.drift:
        from kinetoscope.evaluation.drift import draw_drift

        draw_drift(result.drift, Path(args.drift))
    print(f"{result.title}\n\n{result.table}")
    if args.json:
        what = {"command": _command(args), "model_hash": model.fingerprint(), "n": args.n, "seed": args.seed}
        write_text(Path(args.json), json.dumps(what | result.facts, indent=2) + "\n")
    if args.sheet:
        contact_sheet(result.videos[:SHEET_ROWS], args.sheet, labels=result.labels[:SHEET_ROWS], columns=9)
    if args.card:
        card = model.path / "README.md"
        before = card.read_text(encoding="utf-8").partition(SCORES)[0].rstrip() if card.exists() else f"# {model.name}"
        command = f"`{_command(args)}`"
        write_text(card, f"{before}\n\n{SCORES}\n\n{command}\n\n{result.title}\n\n{result.table}\n")
    return 0


def _is_played(generator: Any, world: Any) -> bool:
    """Whether the model takes actions, in a world that is played.

    Raises:
        InputError: one of them is played and the other is not.
    """
    pipeline = generator.pipeline
    takes = "keyboard" in pipeline.block_inputs
    if takes != hasattr(world, "player"):
        raise InputError(
            f"{pipeline.model.name} {'is played block by block' if takes else 'takes no actions'}, and the world "
            f"{world.name!r} {'is described in words' if takes else 'is played'}: there is nothing to score"
        )
    return takes


def _generate(generator: Any, world: Any, args: argparse.Namespace, progress: Any) -> Result | None:
    """Videos of captions, and what the judge sees of them; None in all processes but the first."""
    from kinetoscope.cli.progress import leads
    from kinetoscope.evaluation import as_json, as_table, baselines, flicker, heldout_specs, prompt_following

    specs = heldout_specs(world, args.n, args.seed)
    videos: list[Any] = []
    fields = video_fields(args)
    for start in range(0, args.n, BATCH):
        part = specs[start : start + BATCH]
        seeds = [args.seed + start + i for i in range(len(part))]
        results = generator.generate_video([s.caption() for s in part], seed=seeds, batch_size=len(part), **fields)
        videos += [r.frames for r in results]
        progress.items("videos", len(videos), args.n)
    if not leads():
        return None
    t, h, w = videos[0].shape[:3]
    reports = {
        "model": prompt_following(world, zip(specs, videos, strict=True)),
        **baselines(world, specs, args.seed, height=h, width=w, num_frames=t),
    }
    steadiness = sorted(flicker(v) for v in videos)[len(videos) // 2] if t >= 3 else None
    title = f"{args.n} videos of captions of the world `{world.name}` that were never trained on, with 95 % intervals:"
    table = as_table(reports)
    if steadiness is not None:
        table += f"\n\nFlicker of the background, median over the videos: {steadiness:.2f} grey levels."
    facts = {"flicker": steadiness, **{k: as_json(v) for k, v in reports.items()}}
    result = Result(title, table, facts, videos, [s.caption() for s in specs])
    if args.drift:
        from kinetoscope.evaluation.drift import measure_drift

        result.over_time(measure_drift(world, specs, videos, args.drift_frames, args.seed), args.drift_frames)
    return result


def _play(generator: Any, world: Any, args: argparse.Namespace, progress: Any) -> Result | None:
    """Games from true first views, and what the judge sees of what was done in them; None in all processes but the
    first.

    Raises:
        InputError: see `parts`.
    """
    from kinetoscope.cli.progress import leads
    from kinetoscope.evaluation import as_json, as_table
    from kinetoscope.evaluation.playing import TrueGame, Walk, action_following, lasting, parts, play, shuffled_actions

    spans = parts(world, args.frames, args.drift_frames)
    fields = {k: v for k, v in video_fields(args).items() if v is not None and k != "num_frames"}
    defaults = generator.pipeline.defaults()
    height, width = fields.get("height", defaults.height), fields.get("width", defaults.width)
    walks: list[Walk] = []
    truth: list[Walk] = []
    for number in range(args.n):
        seed, game = args.seed + number, world.game(height, width)
        first = game.reset(seed)
        with generator.start_session(image=first, seed=seed, **fields) as session:
            walks.append(play(world, session, first, seed, args.frames))
        if leads():
            truth.append(play(world, TrueGame(game, first, walks[-1].blocks), first, seed, args.frames))
        progress.items("games", number + 1, args.n)
    if not leads():
        return None
    reports = {
        "model": action_following(world, walks),
        "ground truth": action_following(world, truth),
        "shuffled actions": shuffled_actions(world, walks, args.seed),
    }
    actions = next(iter(reports["model"].values())).total
    title = (
        f"{actions} actions in {args.n} games of {args.frames} frames in the world `{world.name}`, from true first "
        "views never trained on, with 95 % intervals:"
    )
    facts: dict[str, Any] = {"frames": args.frames, **{k: as_json(v) for k, v in reports.items()}}
    labels = [f"game {args.seed + number}" for number in range(args.n)]
    result = Result(title, as_table(reports), facts, [w.frames for w in walks], labels)
    result.over_time(lasting(world, walks, truth, spans), args.drift_frames)
    return result


def _command(args: argparse.Namespace) -> str:
    """What was typed, as far as it sets the scores."""
    given = video_fields(args)
    size = [f"--size {given['height']}x{given['width']}"] if given["width"] else []
    names = {"num_frames": "frames", "num_inference_steps": "steps"}
    rest = [
        f"--{names.get(k, k).replace('_', '-')} {v}"
        for k, v in given.items()
        if v is not None and k not in ("height", "width")
    ]
    world = [f"--world {args.world}"] if args.world else []
    dtype = [] if args.dtype in (None, "auto") else [f"--dtype {args.dtype}"]
    drift = [f"--drift {args.drift} --drift-frames {args.drift_frames}"] if args.drift else []
    start = ["kinetoscope eval", args.model, f"--n {args.n} --seed {args.seed}"]
    return " ".join([*start, *world, *size, *rest, *dtype, *drift])

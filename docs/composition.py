"""Writes docs/composition.md from what the code declares: `python docs/composition.py`. A test holds them together."""

from __future__ import annotations

from pathlib import Path

from kinetoscope.engine.hooks.caches import CACHES
from kinetoscope.engine.hooks.cfg_parallel import CFGParallel
from kinetoscope.engine.hooks.sequence import SequenceParallel
from kinetoscope.runtime import parallel
from kinetoscope.runtime.composition import CONFLICTS, MODEL_CONFLICTS, SETTINGS

FILE = Path(__file__).with_suffix(".md")
HEAD = """# What goes together

Written by `python docs/composition.py` from the declarations in `runtime/composition.py`; do not edit.

Any two settings below either work together, and a test holds the pair to its oracle, or are refused when the model
is opened, by an error that names both. The walk over all pairs is `tests/runtime/test_composition.py`:

- an **exact** setting changes no video beyond rounding, alone or beside any other: the pair is compared with the other
  alone (latents within 1e-4 of their standard deviation in float32);
- two **lossy** settings are compared with the same two where every row of a step has a forward of its own, and with
  each alone, so that neither is silently off.

How much a lossy setting costs is measured, not promised: `kinetoscope ab --a "" --b "SETTING"`
([quality-gate.md](quality-gate.md)). A list of prompts shares the forwards of its steps (`engine/batching.py`) under
every setting but step caches, whose rows are one batch as they are; each video is the one it would be alone.
"""

DEVICES = """
## Many devices

A layout (`parallel=`, [parallel.md](parallel.md)) is exact too: videos are within 1e-4 of their standard deviation of
one device's. Its hooks stand where they must: `{cfg}` around step caches, which then see the branches of their device
for a whole run, and `{sequence}` inside of them, so that they see whole tokens and decide alike on every device.
`tests/distributed` holds pairs to one device (`make test-distributed`): degrees with each other, `ulysses`, `ring`,
`cfg` and `tp` with every step cache, the first three with 8 bits, offloading, text modes and guidance, `tp` and `fsdp`
with LoRAs, `ulysses`, `ring`, `tp` and `fsdp` with compiled blocks, and `vae` with tiles and with streams.
"""


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [" | ".join(("", *row, "")).strip() for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def page() -> str:
    """The whole page."""
    settings = [("setting", "video", "what it does")]
    settings += [(f"`{s.text}`", "exact" if s.exact else "lossy", s.what) for s in SETTINGS]
    refused = [("refused together", "because")]
    refused += [(f"`{c.first}` and `{c.second}`".replace("|", "` or `"), c.why) for c in CONFLICTS]
    refused += [(f"two of the step caches {', '.join(sorted(CACHES))}", "each would answer for the other's steps")]
    layouts = [("refused together", "because")]
    layouts += [(f"`parallel {c.degree}` and `{c.option}`".replace("|", "` or `"), c.why) for c in parallel.CONFLICTS]
    layouts += [
        (
            f"`parallel {CFGParallel.name.removesuffix('-parallel')}` and `{name}`",
            "it measures the branches that it sees",
        )
        for name in sorted(CFGParallel.conflicts)
    ]
    met = [("setting", "refused for", "because"), *((f"`{a}`", b, c) for a, b, c in parallel.MODEL_CONFLICTS)]
    devices = DEVICES.format(cfg=CFGParallel.name, sequence=SequenceParallel.name)
    models = [
        ("setting", "refused for", "because"),
        *((f"`{a}`" if "=" in a else a, b, c) for a, b, c in MODEL_CONFLICTS),
    ]
    return "\n".join([
        HEAD, "## Settings\n", table(settings), "\n## Refused pairs\n", table(refused),
        "\n## Refused for a model or a device\n", table(models),
        devices, table(layouts), "", table(met), "",
    ])  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")

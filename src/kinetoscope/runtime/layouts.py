"""Which layout of devices is fastest for a video: compute, bytes sent and memory a rank, by formulas that are printed.

All of it is arithmetic on a `Workload` and an `Accelerator`; no process is started and nothing is loaded. The formulas
of bytes are those of `parallel.comm`'s counters, and tests hold the two against each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.parallel.config import ParallelConfig
from kinetoscope.runtime.accelerators import Accelerator
from kinetoscope.runtime.workload import Workload

COMPUTE = 0.5
"""Share of the dense peak that forwards are taken to reach."""
NETWORK = 0.7
"""Share of a link's rate that collectives are taken to reach."""
FILL = 0.92
"""Share of a device's memory that may be planned for; the rest is for the allocator and the libraries."""
CALL = 20e-6
"""Seconds that a collective takes however little it sends."""
VAE_PEAK = 0.5
"""The VAE computes in float32, on tensor cores at this share of the bfloat16 peak."""
VAE_ROWS = 4
"""Rows of latents that a device should have at least of a shared decode, or halos outweigh what is shared."""
OTHERS = 3
"""Layouts that an explanation compares with the best."""
GATHERED = 4
"""Blocks whose weights FSDP holds whole: one that runs, and as they came from all devices, of it and its neighbours."""
_NUMBER = re.compile("[0-9]+")


@dataclass(frozen=True, slots=True)
class Estimate:
    """One layout on one kind of device; bytes and seconds are of one rank.

    Attributes:
        config: the layout.
        compute: seconds of arithmetic a step.
        sent: scheme -> bytes sent a step.
        waits: scheme -> seconds a step that a rank waits for others: what arithmetic does not hide.
        step: seconds.
        decode: seconds of the VAE, once.
        seconds: of one video: steps and decode.
        videos: an hour, of all replicas.
        weights, activations, kept, decoding: bytes: weights; of a forward; keys and values; of decoding.
        peak: bytes at the most.
        fits: whether `peak` fits the device.
    """

    config: ParallelConfig
    compute: float
    sent: dict[str, int]
    waits: dict[str, float]
    step: float
    decode: float
    seconds: float
    videos: float
    weights: int
    activations: int
    kept: int
    decoding: int
    peak: int
    fits: bool

    @property
    def waiting(self) -> float:
        """Seconds a step that a rank waits for others."""
        return sum(self.waits.values())


@dataclass(frozen=True, slots=True)
class Choice:
    """What was compared.

    Attributes:
        compared: the fastest that fits first; then those that do not fit, the smallest first.
        refused: why layouts cannot be -> how many.
    """

    work: Workload
    device: Accelerator
    compared: tuple[Estimate, ...]
    refused: dict[str, int]

    @property
    def best(self) -> Estimate:
        """The fastest layout that fits.

        Raises:
            ConfigError: none does.
        """
        if not self.compared or not self.compared[0].fits:
            least = f"; the least is {_gb(self.compared[0].peak)}" if self.compared else ""
            raise ConfigError(
                f"{self.work.model} at this size fits no layout of these devices with {self.device.memory_gb:g} GB "
                f"each{least}. Take more devices, a smaller video or 8-bit weights"
            )
        return self.compared[0]

    def explain(self) -> list[str]:
        """Why the best is the best, a sentence a line."""
        best = self.best
        memory = (
            ""
            if math.isinf(self.device.memory_gb)
            else f", {_gb(best.peak)} of {self.device.memory_gb:.3g} GB a device"
        )
        lines = [f"{best.config}: {best.step:.3g} s a step, {best.seconds:.3g} s a video{memory}"]
        told = {replace(best.config, fsdp=False)}  # FSDP often changes nothing but the memory
        for other in (e for e in self.compared[1:] if e.fits):
            kind = replace(other.config, fsdp=False)
            if kind not in told and len(told) <= OTHERS:
                told.add(kind)
                lines.append(f"{other.config}: {_times(other, best)}: {_reason(best, other)}")
        full = [e for e in self.compared if not e.fits]
        if full:
            lines.append(f"{len(full)} more do not fit; the nearest, {full[0].config}, needs {_gb(full[0].peak)}")
        return lines

    def assumptions(self) -> list[str]:
        """What the numbers rest on."""
        d, w = self.device, self.work
        return [
            f"{d.name}: {d.tflops:g} TFLOP/s dense, {d.memory_gb:g} GB, {d.inside_gbps:g} GB/s to devices of the node "
            f"({d.node}), {d.between_gbps:g} GB/s to others ({d.source})",
            f"forwards reach {COMPUTE:.0%} of the peak, links {NETWORK:.0%} of their rate, a collective takes "
            f"{CALL * 1e6:.0f} us; {1 - FILL:.0%} of the memory is left free",
            f"{w.branches} rows a step of {w.tokens:,} tokens and {w.text} of text, {w.itemsize} bytes a number, "
            f"{w.flops / 1e15:.3g} PFLOP a row ({w.attention_flops / w.flops:.0%} attention), {w.steps} steps",
            f"the VAE, in float32, reaches {COMPUTE * VAE_PEAK:.0%} of the peak"
            if w.vae_flops
            else f"decoding is left out of the time: what {w.vae} computes cannot be counted",
            "ring passes hide behind attention and FSDP's gathers behind blocks; all else is waited for",
            "all components stay on the devices; text encoding is left out of the time",
        ]


def refusal(config: ParallelConfig, work: Workload) -> str | None:
    """Why a model cannot run in a layout, naming both sides; None: it can."""
    if work.heads % config.tp:
        return f"tp={config.tp} does not divide the {work.heads} attention heads of {work.model}"
    if work.hidden % config.tp:
        return f"tp={config.tp} does not divide the {work.hidden} hidden channels of {work.model}"
    if config.ulysses * config.tp > work.heads:
        return (
            f"ulysses={config.ulysses} with tp={config.tp} share {work.heads} attention heads of {work.model}: "
            "some devices would have none; use ring"
        )
    if config.cfg > work.branches:
        kind = "row" if work.branches == 1 else "rows"
        return f"cfg={config.cfg} is more than the {work.branches} {kind} of a step of {work.model}"
    if config.sequence > work.tokens:
        return f"ulysses x ring = {config.sequence} is more than the {work.tokens} tokens of the video"
    if config.fsdp and config.cfg * config.sequence == 1:
        return "fsdp shares weights among the devices of cfg, ulysses and ring, and there is one; use tp, or more"
    if config.vae > 1 and not work.vae_shared:
        return f"vae={config.vae}: devices cannot share {work.vae} as {work.model} has it"
    if config.vae > work.latent_size[1]:
        return f"vae={config.vae} is more than the {work.latent_size[1]} rows of latents"
    return None


def layouts(devices: int, work: Workload) -> Iterator[ParallelConfig]:
    """All ways to use `devices` devices, valid or not; `vae` follows from the others.

    Raises:
        ConfigError: not a positive number.
    """
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ConfigError(f"{devices!r} devices: give a positive whole number")
    for replicas in _divisors(devices):
        for cfg in _divisors(devices // replicas):
            for ring in _divisors(devices // replicas // cfg):
                for ulysses in _divisors(devices // replicas // cfg // ring):
                    tp = devices // replicas // cfg // ring // ulysses
                    vae = vae_share(devices // replicas, work)
                    for fsdp in (False, True) if cfg * ring * ulysses > 1 else (False,):
                        yield ParallelConfig(
                            tp=tp, ulysses=ulysses, ring=ring, cfg=cfg, vae=vae, replicas=replicas, fsdp=fsdp
                        )


def vae_share(ranks: int, work: Workload) -> int:
    """How many of the devices of a replica should decode together."""
    if not work.vae_shared:
        return 1
    return max(n for n in _divisors(ranks) if n == 1 or n * VAE_ROWS <= work.latent_size[1])


def choose(
    devices: int,
    work: Workload,
    device: Accelerator,
    *,
    replicas: int | None = None,
    allowed: Callable[[ParallelConfig], str | None] | None = None,
) -> Choice:
    """The layouts of `devices` devices, compared.

    Args:
        replicas: this many and no others; None: any, the fastest video first (replicas make more, not faster ones).
        allowed: says why a layout cannot be for reasons that are not of the workload, or None.

    Raises:
        ConfigError: impossible numbers.
    """
    if replicas is not None and (replicas < 1 or devices % replicas):
        raise ConfigError(f"replicas={replicas} does not divide {devices} devices")
    found: list[Estimate] = []
    refused: dict[str, int] = {}
    for config in layouts(devices, work):
        if replicas is not None and config.replicas != replicas:
            continue
        if why := refusal(config, work) or (allowed and allowed(config)):
            kind = _NUMBER.sub("", why)  # one example of each kind of reason, with the number of all
            example = next((w for w in refused if _NUMBER.sub("", w) == kind), why)
            refused[example] = refused.get(example, 0) + 1
        else:
            found.append(estimate(config, work, device))
    found.sort(key=lambda e: (not e.fits, e.seconds if e.fits else e.peak, -e.videos, len(e.config.as_dict())))
    return Choice(work, device, tuple(found), refused)


def estimate(config: ParallelConfig, work: Workload, device: Accelerator) -> Estimate:
    """What a layout costs. The layout is taken to be one that the model can run in (`refusal`)."""
    rate = device.tflops * 1e12 * COMPUTE
    rows = -(-work.branches // config.cfg)
    padded = -(-(work.heads // config.tp) // config.ulysses) * config.ulysses * config.tp / work.heads
    attention = work.attention_flops * padded * _uneven(work.tokens, config.sequence)
    linear = (work.flops - work.attention_flops) * _uneven(work.tokens, config.sequence)
    share = rows / (config.sequence * config.tp) / rate
    compute, hides = (attention + linear) * share, attention * share
    sent = bytes_a_step(config, work)
    spans = _spans(config)
    calls = _calls(config, work)
    hidden = {"ring": hides, "fsdp": compute}
    waits = {
        name: max(0.0, seconds_sent(size, spans[name], device) + calls[name] * CALL - hidden.get(name, 0.0))
        for name, size in sent.items()
    }
    step = compute + sum(waits.values())
    vae_bytes = int(work.vae_fixed_bytes / 2 / config.vae * (config.vae - 1))
    decode = work.vae_flops / config.vae / (rate * VAE_PEAK) + seconds_sent(vae_bytes, config.vae, device)
    seconds = step * work.steps + decode
    weights = weight_bytes(config, work)
    activations = work.activation_bytes * (rows if work.batched else 1) // config.sequence
    kept = work.kept_bytes * rows // config.tp
    decoding = work.vae_activation_bytes // config.vae + work.vae_fixed_bytes
    peak = weights + max(activations + kept + _gathered(config, work), decoding)
    return Estimate(
        config, compute, sent, waits, step, decode, seconds, 3600 * config.replicas / seconds, weights, activations,
        kept, decoding, peak, peak <= device.memory_gb * 1e9 * FILL,
    )  # fmt: skip


def bytes_a_step(config: ParallelConfig, work: Workload) -> dict[str, int]:
    """scheme -> bytes that the busiest rank sends in one step.

    With R rows on this rank, N tokens of the video in P = ulysses x ring parts of n = ceil(N / P), L of text, d
    channels in H heads, of which a rank of `tp` has d' (heads padded to a multiple of ulysses), and e bytes a number:

    - ulysses: 4 R n d' e (u - 1) / u a block: queries, keys and values out, results back.
    - ring: 2 R n d' e (r - 1) a block: keys and values of the others pass by.
    - joint attention, where every rank has the text, a block: ulysses R L d' e (u - 1) / u, results of the text's
      heads; ring 4 R L (d' + H') (r - 1) / u, what each found for the text, in float32.
    - sequence: R n d e (P - 1) a forward: the parts of the tokens are joined after the blocks.
    - tp: 2 m (t - 1) / t for each sum of m bytes: R n d e at the end of every attention and feed-forward, and R n 4
      for every norm over all heads; and the parts of the modulation are joined, taken to be one for all
      rows (what models with one a row or a latent frame send more of it is little).
    - cfg: R c e (cfg - 1), with c numbers of latents a row.
    - fsdp: w (s - 1) / s a forward, with w bytes of the linear layers after tp and s = cfg x P; twice that in models
      whose blocks make their modulation in every step before they run, as Cosmos with given frames does.
    """
    e, u, r, t = work.itemsize, config.ulysses, config.ring, config.tp
    rows = -(-work.branches // config.cfg)
    parts = config.sequence
    n = -(-work.tokens // parts)
    head = work.dim // work.heads
    d = -(-(work.heads // t) // u) * u * head
    sent: dict[str, int] = {}
    if u > 1:
        sent["ulysses"] = work.blocks * 4 * rows * n * d * e * (u - 1) // u
    if r > 1:
        sent["ring"] = work.blocks * 2 * rows * n * d * e * (r - 1)
    if work.joint and u > 1:
        sent["ulysses"] += work.blocks * rows * work.text * d // u * e * (u - 1)
    if work.joint and r > 1:
        sent["ring"] += work.blocks * rows * work.text * (d + d // head) // u * 4 * (r - 1)
    if parts > 1:
        sent["sequence"] = rows * n * work.dim * e * (parts - 1)
    if t > 1:
        joined = work.modulation // t * e * (t - 1)
        sent["tp"] = 2 * rows * _summed(work, n) * (t - 1) // t + joined
    if config.cfg > 1:
        sent["cfg"] = rows * work.latent * e * (config.cfg - 1)
    if config.fsdp:
        shard = config.cfg * parts
        gathers = work.gathers * (1 if work.batched else rows)
        sent["fsdp"] = gathers * work.transformer.matrices(t) * (shard - 1) // shard
    return sent


def weight_bytes(config: ParallelConfig, work: Workload) -> int:
    """Bytes of weights a rank: of transformers and encoders what tp and FSDP leave, the VAE whole."""
    shard = config.cfg * config.sequence if config.fsdp else 1
    return (work.transformers + work.encoders).held(config.tp, shard) + work.vae_bytes


def seconds_sent(size: int, span: int, device: Accelerator) -> float:
    """Time to send `size` bytes to devices of which the furthest is `span` ranks away."""
    rate = device.inside_gbps if span <= device.node else device.between_gbps
    return size / (rate * 1e9 * NETWORK)


def as_row(found: Estimate) -> dict[str, Any]:
    """An estimate as JSON."""
    values = {name: getattr(found, name) for name in Estimate.__dataclass_fields__ if name != "config"}
    return {"parallel": found.config.as_dict(), **values}


def _summed(work: Workload, n: int) -> int:
    """Bytes of all that tensor parallel sums in a forward of one row: see `bytes_a_step`."""
    line = work.dim * work.itemsize
    if work.joint:
        narrow = work.blocks - work.wide_blocks
        return ((2 * work.wide_blocks + narrow) * (n + work.text) + work.refined * work.text) * line
    norms = 3 * 4 if work.across_heads else 0  # of queries twice and of keys; those of the text are kept
    return work.blocks * n * (3 * line + norms)


def _calls(config: ParallelConfig, work: Workload) -> dict[str, int]:
    """scheme -> collectives a step."""
    rows = 1 if work.batched else -(-work.branches // config.cfg)
    return {
        "ulysses": 4 * work.blocks * rows,
        "ring": work.blocks * rows * (config.ring - 1),
        "sequence": rows,
        "tp": 3 * work.blocks * rows,
        "cfg": 1,
        "fsdp": work.gathers * work.blocks * rows,
    }


def _spans(config: ParallelConfig) -> dict[str, int]:
    """scheme -> ranks that a group of it reaches over; tp lies innermost (`parallel.config.AXES`)."""
    tp = config.tp
    ulysses, sequence = tp * config.ulysses, tp * config.sequence
    everyone = sequence * config.cfg
    return {"tp": tp, "ulysses": ulysses, "ring": sequence, "sequence": sequence, "cfg": everyone, "fsdp": everyone}


def _gathered(config: ParallelConfig, work: Workload) -> int:
    """Bytes of what FSDP gathers: of four blocks, measured by benchmarks/parallel_memory."""
    return GATHERED * work.largest_block // config.tp if config.fsdp else 0


def _uneven(count: int, parts: int) -> float:
    """How much more than an even share the largest part is."""
    return -(-count // parts) * parts / count


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _reason(best: Estimate, other: Estimate) -> str:
    if other.config.replicas > best.config.replicas and other.compute > best.compute:
        return f"fewer devices a video ({other.videos / best.videos:.3g} times the videos an hour)"
    if other.waiting - best.waiting > other.compute - best.compute:
        name = max(other.waits, key=lambda k: other.waits[k] - best.waits.get(k, 0.0))
        longer = other.waits[name] - best.waits.get(name, 0.0)
        return f"{name} sends {_gb(other.sent[name])} a step and waits {longer:.2g} s longer"
    if other.compute > best.compute:
        return f"{other.compute - best.compute:.2g} s more arithmetic a step"
    return "as fast, with more schemes or fewer videos"


def _times(other: Estimate, best: Estimate) -> str:
    longer = other.seconds / best.seconds
    return "as long" if longer < 1.005 else f"{longer:.3g} times as long"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"

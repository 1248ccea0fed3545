"""Tokens shared out among processes, against one process that has them all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed.opened import open_among
from distributed.ranks import run_ranks
from distributed.sequence_cases import EXACT, MERGED, Case, check_cases, check_gradients, forward, make_cases
from kinetoscope.attention import attention
from kinetoscope.attention.backends import math_attention
from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.core.errors import CompositionError
from kinetoscope.engine.hooks import Interceptor
from kinetoscope.nn.split import TokenAxes
from kinetoscope.nn.stack import BlockCall, join_tokens, run_blocks
from kinetoscope.parallel import Groups
from kinetoscope.parallel.comm import SENT
from kinetoscope.parallel.sequence import SequenceShard, share
from kinetoscope.parallel.sequence.partial import formula, merge, partial_attention
from tiny import make_tiny_wan

ODD = [(2, 3, 6, 10), (1, 5, 2, 6)]
"""Rows and latent T, H, W: of 45 and 15 tokens where a token covers 1 x 2 x 2."""

# -- attention over parts of the keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
def test_parts_make_the_whole(biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator) for n in (5, 12, 12))
    bias = torch.randn(2, 12, generator=generator) if biased else None
    if bias is not None:
        bias[1, 4:9] = -math.inf  # the second part, for one row, is hidden altogether
    whole = None
    for a, b in ((0, 4), (4, 9), (9, 12)):
        whole = merge(whole, partial_attention(q, k[:, a:b], v[:, a:b], None if bias is None else bias[:, a:b]))
    assert whole is not None
    torch.testing.assert_close(whole.out, math_attention(q, k, v, key_bias=bias), rtol=0, atol=1e-6)
    exact = formula(q, k, v, bias)
    torch.testing.assert_close(whole.lse, exact.lse, rtol=0, atol=1e-6)


def test_bfloat16_parts() -> None:
    """The formula serves any dtype; the merged sum is float32."""
    q, k, v = (torch.randn(1, n, 2, 8, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (4, 6, 6))
    got = merge(formula(q, k[:, :2], v[:, :2], None), formula(q, k[:, 2:], v[:, 2:], None)).out
    expected = math_attention(q.float(), k.float(), v.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# -- one attention among processes ------------------------------------------------------------------------------------

TOKENS = 15
SCENES: dict[str, dict[str, Any]] = {
    "odd": {},
    "divides": {"tokens": 16},
    "few": {"tokens": 1},
    "five heads": {"heads": 5},
    "text": {"tail": 5},
    "masked text": {"tail": 5, "masked": True, "heads": 3},
    "condition kept": {"lead": 4},
    "causal blocks": {"rows": (((0, 5), ((0, 5),)), ((5, 12), ((0, 12),)), ((12, 15), ((0, 15),)))},
    "window": {"rows": (((0, 6), ((0, 6),)), ((6, 15), ((0, 2), (9, 15))))},
    "condition alone": {"rows": (((0, 5), ((0, 5),)), ((5, 15), ((0, 15),)))},
    "cache": {"tokens": 16, "past": 8},
}


def scene(heads: int = 4, tokens: int = TOKENS, lead: int = 0, tail: int = 0, past: int = 0, **more: Any) -> Any:
    """Queries, keys, values and what attention is told, of the whole sequence."""
    generator = torch.Generator().manual_seed(tokens + heads)
    q = torch.randn(2, tokens + tail, heads, 8, generator=generator)
    k, v = (torch.randn(2, past + lead + tokens + tail, heads, 8, generator=generator) for _ in range(2))
    told: dict[str, Any] = {"lead": lead, "rows": more.get("rows")}
    if more.get("masked"):
        told["key_bias"] = torch.zeros(2, tokens + tail)
        told["key_bias"][0, -tail:] = -math.inf  # one row has no text at all
        told["key_bias"][1, -2:] = -math.inf
    return q, k, v, told


def attend_all(groups: Groups) -> dict[str, dict[str, Tensor]]:
    return {name: attend_one(groups, **given) for name, given in SCENES.items()}


def attend_one(groups: Groups, **given: Any) -> dict[str, Tensor]:
    q, k, v, told = scene(**given)
    leaves = [x.requires_grad_(True) for x in (q, k, v)]
    with torch.no_grad():
        out = attend_own(groups, q, k, v, told, **given)
    found = attend_own(groups, q, k, v, told, **given)
    return {"out": out, "again": found, "gradients": gradients_of(found, leaves)}


def gradients_of(out: Tensor, leaves: list[Tensor]) -> Tensor:
    """Of a loss that weighs all numbers differently, of queries, keys and values one after the other."""
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).cos()
    return torch.cat([g.flatten() for g in torch.autograd.grad((out * weights).sum(), leaves)])


def attend_own(groups: Groups, q: Tensor, k: Tensor, v: Tensor, told: dict[str, Any], **given: Any) -> Tensor:
    told = dict(told)
    tokens, lead, past = given.get("tokens", TOKENS), given.get("lead", 0), given.get("past", 0)
    part = SequenceShard.of(groups).share(tokens)

    def own(x: Tensor) -> Tensor:
        return torch.cat([x[:, :lead], part.take(x[:, lead:], 1)], dim=1)

    if past:
        ring, heads = groups.ring, groups.ulysses
        kept = [x[:, :past].tensor_split(ring.size, 1)[ring.index] for x in (k, v)]
        kept = [x.tensor_split(heads.size, 2)[heads.index] for x in kept]
        told["memory"] = lambda *new: tuple(torch.cat(pair, dim=1) for pair in zip(kept, new, strict=True))
        k, v = k[:, past:], v[:, past:]
    with forward_context(ForwardContext(share=part)):
        out = attention(part.take(q, 1), own(k), own(v), role="joint", **told)
    return torch.cat([part.gather(out[:, : part.own], 1), out[:, part.own :]], dim=1)


def check_scenes(parallel: str, tolerance: float) -> None:
    ranks = run_ranks(parallel, attend_all)
    for name, given in SCENES.items():
        q, k, v, told = scene(**given)
        leaves = [x.requires_grad_(True) for x in (q, k, v)]
        expected = attention(q, k, v, role="joint", **told)
        for rank in ranks:
            np.testing.assert_array_equal(rank[name]["out"], ranks[0][name]["out"], err_msg=name)
            np.testing.assert_array_equal(rank[name]["again"], ranks[0][name]["out"], err_msg=name)
        out = expected.detach().numpy()
        np.testing.assert_allclose(ranks[0][name]["out"], out, rtol=0, atol=tolerance, err_msg=name)
        mean = sum(rank[name]["gradients"] for rank in ranks) / len(ranks)  # all processes have the same loss
        np.testing.assert_allclose(mean, gradients_of(expected, leaves).numpy(), rtol=0, atol=1e-5, err_msg=name)


def test_by_heads() -> None:
    check_scenes("ulysses=2", EXACT)


def test_around_a_ring() -> None:
    check_scenes("ring=2", 1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ring=2,ulysses=2", "ring=4", "ulysses=4"])
def test_among_four(parallel: str) -> None:
    check_scenes(parallel, EXACT if parallel == "ulysses=4" else 1e-6)


# -- transformers -----------------------------------------------------------------------------------------------------

SLICE = ("wan-frames", "wan-three-heads", "cosmos", "ltx-frames")


def slice_cases() -> list[Case]:
    return [*make_cases(SLICE, ODD), *make_cases(["skyreels-causal"], [(2, 6, 6, 2)])]


def test_families_by_heads() -> None:
    """Bit for bit: odd numbers of tokens and heads, times of their own for frames that are cut, causal blocks."""
    check_cases("ulysses=2", slice_cases(), EXACT)


def test_families_around_a_ring() -> None:
    check_cases("ring=2", slice_cases(), MERGED)


SPARSE = ("sta:window=1,3,1,tile=2,1,2", "vsa:sparsity=0.5,tile=2,2,2", "vmoba:time=1,space=2,2,both=2,2,2",
          "sla:sparsity=0.5,query_block=4,key_block=4")  # fmt: skip


def test_sparse_kinds_by_heads() -> None:
    """A kind sees the whole grid of its heads, and the gates of them."""
    for kind in SPARSE[:2]:
        cases = make_cases(["wan-gated"], ODD[:1], kind)
        assert not torch.equal(cases[0].expected, make_cases(["wan-gated"], ODD[:1])[0].expected)
        check_cases("ulysses=2", cases, EXACT, kind)


def refused(groups: Groups, case: Case) -> str:
    with pytest.raises(CompositionError) as error:
        forward(case, SPARSE[0], SequenceShard.of(groups))
    return str(error.value)


def test_what_cannot_be_shared_is_refused() -> None:
    message = run_ranks("ring=2", refused, make_cases(["wan"], ODD[:1])[0])[0]
    assert message.startswith("ring and attention 'sta:") and message.endswith("use ulysses")


def test_gradients() -> None:
    """Of every weight, as one process finds them: the mean over the processes, which all have the same loss."""
    for parallel in ("ulysses=2", "ring=2"):
        check_gradients(parallel, slice_cases()[::2])


def without_padding_cut(groups: Groups, cases: list[Case]) -> list[Tensor]:
    """As if the padding were tokens: the share says that there are as many as fit."""
    plain = share.Share.attend

    def attend(self: share.Share, call: Any) -> Tensor:
        return plain(share.Share(self.shard, self.own * self.shard.sequence.size, self.own), call)

    share.Share.attend = attend  # in a forked process, which ends with it
    return [forward(case, "auto", SequenceShard.of(groups)) for case in cases]


@pytest.mark.parametrize("parallel", ["ulysses=2", "ring=2"])
def test_padding_would_be_seen(parallel: str) -> None:
    """What the comparisons above would find if padding were attended to."""
    cases = make_cases(["wan"], ODD)
    for case, got in zip(cases, run_ranks(parallel, without_padding_cut, cases)[0], strict=True):
        assert np.abs(got - case.expected.numpy()).max() > 100 * MERGED, case.name


# -- the loop over blocks ---------------------------------------------------------------------------------------------


class Whole:
    """A shard of one."""

    def share(self, tokens: int) -> Any:
        raise AssertionError("not reached")


def test_a_block_that_does_not_say_where_its_tokens_are() -> None:
    with (
        forward_context(ForwardContext(shard=Whole())),
        pytest.raises(CompositionError, match=r"ulysses or ring and Linear cannot be used together"),
    ):
        run_blocks(torch.zeros(1, 4, 2), [BlockCall(torch.nn.Linear(2, 2), {"bias": torch.zeros(1)})])


def two_streams(groups: Groups | None) -> list[Tensor]:
    """Blocks of two streams, then of one, as MMDiT models have them: x, text, what counts leading tokens."""
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(2, 15, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    table, joined = torch.randn(15, 4, generator=generator), torch.randn(18, 4, generator=generator)

    def double(x: Tensor, text: Tensor, table: Tensor, first: int) -> tuple[Tensor, Tensor]:
        x = torch.cat([x[:, :first] * 2, x[:, first:]], dim=1) + table
        tokens = torch.cat([x, text], dim=1).unsqueeze(2)
        out = attention(tokens, tokens, tokens, role="joint").squeeze(2)
        return out[:, : x.shape[1]], out[:, x.shape[1] :]

    def single(x: Tensor, table: Tensor) -> Tensor:
        tokens = (x + table).unsqueeze(2)
        return x + attention(tokens, tokens, tokens, role="joint").squeeze(2)

    one = BlockCall(double, {}, {"table": table, "first": 9}, TokenAxes(each={"table": 0}, leading=("first",)))
    other = BlockCall(single, {}, {"table": joined}, TokenAxes(each={"table": 0}, tail=3))
    with forward_context(ForwardContext(shard=None if groups is None else SequenceShard.of(groups))):
        both = run_blocks((x, text), [one, one])
        whole = run_blocks((x, text), [one, BlockCall(join_tokens), other])
        return [*both, whole, run_blocks(whole, [other, other])]


def test_two_streams_and_their_joining() -> None:
    expected = two_streams(None)
    for rank in run_ranks("ulysses=2", two_streams):
        for got, want in zip(rank, expected, strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-6)


def sent(groups: Groups, case: Case) -> dict[str, int]:
    SENT.clear()
    forward(case, "auto", SequenceShard.of(groups))
    return dict(SENT)


def bytes_of(case: Case, ring: int, ulysses: int) -> dict[str, int]:
    """What a process sends in a forward.

    Ulysses: of its n tokens all but its own heads, four times a block (q, k, v and the result). Ring: keys and values
    of a part, P - 1 times. And its n tokens to all others at the end.
    """
    config: Any = case.model.config
    rows, tokens, width = case.inputs["latents"].shape[0], 45, config.num_attention_heads * config.attention_head_dim
    n = -(-tokens // (ring * ulysses))
    heads = -(-config.num_attention_heads // ulysses)
    one = rows * n * heads * config.attention_head_dim * 4  # bytes of own tokens, some heads
    counts = {
        "ulysses": 4 * config.num_layers * one * (ulysses - 1),
        "ring": 2 * config.num_layers * one * ulysses * (ring - 1),
        "sequence": rows * n * width * 4 * (ring * ulysses - 1),
    }
    return {k: v for k, v in counts.items() if v}


@pytest.mark.parametrize(
    "parallel", ["ulysses=2", "ring=2", pytest.param("ring=2,ulysses=2", marks=pytest.mark.distributed)]
)
def test_bytes_sent(parallel: str) -> None:
    degrees = {"ring": 1, "ulysses": 1} | {k: int(v) for k, v in (p.split("=") for p in parallel.split(","))}
    for case in make_cases(["wan", "wan-three-heads"], ODD[:1]):
        for rank in run_ranks(parallel, sent, case):
            assert rank == bytes_of(case, **degrees)


# -- videos -----------------------------------------------------------------------------------------------------------


class EveryStep(Interceptor):
    """Keeps the latents before each forward."""

    name = "every-step"

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def around_forward(self, call: Any, state: Any, inputs: Any) -> Tensor:
        self.seen.append(state.latents.clone())
        return call(state, inputs)


def generate(groups: Groups | None, path: Path, **options: Any) -> dict[str, Any]:
    """A video, the latents of each step, and what a step cache did."""
    fields = options.pop("fields", {})
    hook = EveryStep()
    generator = open_among(groups, path, hooks=[hook], **options)
    result = generator.generate_video(
        "a red circle", height=48, width=80, num_frames=9, num_inference_steps=5, seed=3, guidance_scale=4.0, **fields
    )
    return {
        "latents": result.latents, "steps": torch.stack(hook.seen),
        "cache": {k: v for k, v in result.logging_info.get("step_cache", {}).items() if k != "name"},
    }  # fmt: skip


RUNS: dict[str, dict[str, Any]] = {
    "batched": {"cfg": "batched"},
    "sequential": {"cfg": "sequential"},
    "fbcache": {"cache": "fbcache:threshold=0.6,warmup=1"},
    "taylorseer": {"cache": "taylorseer:interval=2,warmup=1"},
}


def generate_all(groups: Groups | None, path: Path) -> dict[str, Any]:
    return {name: generate(groups, path, **options) for name, options in RUNS.items()}


def test_videos_step_by_step(tmp_path: Path) -> None:
    """The same noise, and at each step the same latents bit for bit, in all processes and in one alone; also where a
    step cache leaves out the same steps."""
    make_tiny_wan(tmp_path, layers=3)
    expected = generate_all(None, tmp_path)
    for rank in run_ranks("ulysses=2", generate_all, tmp_path):
        for name, one in expected.items():
            np.testing.assert_array_equal(rank[name]["steps"], one["steps"].numpy(), err_msg=name)
            np.testing.assert_array_equal(rank[name]["latents"], one["latents"].numpy(), err_msg=name)
            assert rank[name]["cache"] == one["cache"], name
    for name in ("fbcache", "taylorseer"):
        assert 0 < expected[name]["cache"]["skipped"] < expected[name]["cache"]["rows"], name

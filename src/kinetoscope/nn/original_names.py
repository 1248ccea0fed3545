"""Parameter names that the first repositories of these layers gave, and those of converted checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Names = Sequence[tuple[str, str]]
"""Pattern and replacement, applied one after the other."""

VIDEO_TRANSFORMER: Names = (  # github Wan-Video/Wan2.1, wan/modules/model.py, and what was built on it
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),  # diffusers counts the norms in the order of use
    (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"^(blocks\.\d+)\.self_attn\.", r"\1.attn1."),
    (r"^(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
    (r"^(blocks\.\d+\.attn\d)\.norm_k_img\.", r"\1.norm_added_k."),
    (r"^(blocks\.\d+\.attn\d)\.([kv])_img\.", r"\1.add_\2_proj."),
    (r"^(blocks\.\d+\.attn\d)\.([qkv])\.", r"\1.to_\2."),
    (r"^(blocks\.\d+\.attn\d)\.o\.", r"\1.to_out.0."),
)


def renamer(names: Names) -> Callable[[str], str]:
    """A function from a published tensor name to ours; names that no pattern knows stay."""
    patterns = [(re.compile(pattern), ours) for pattern, ours in names]

    def rename(key: str) -> str:
        for pattern, ours in patterns:
            key = pattern.sub(ours, key)
        return key

    return rename

"""DMD2 (arXiv 2405.14867) from top to bottom, for reading: python recipes/dmd2_loop.py MODEL OUTPUT.

Everything the method does is in this file, in the order in which it happens. `kinetoscope train` with a `method: dmd2`
recipe is the same with resume, several devices, any family and data; this is one process, Wan, and the prompts of a
procedural world. OUTPUT becomes a model directory that samples in four steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kinetoscope.train.plugins import Opened
from kinetoscope.worlds import get_world

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="the teacher: an embedded name, or a directory in diffusers layout")
parser.add_argument("output", type=Path, help="folder of the student")
parser.add_argument("--steps", type=int, default=1000, help="critic updates")
parser.add_argument("--student-every", type=int, default=2, help="critic updates for one of the student")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--guidance", type=float, default=4.0, help="of the teacher, which the student learns")
parser.add_argument("--shift", type=float, default=5.0, help="of the noise levels")
parser.add_argument("--lr", type=float, default=3e-5, help="of the student")
parser.add_argument("--critic-lr", type=float, default=1e-4)
parser.add_argument("--ema", type=float, default=0.99)
args = parser.parse_args()

# -- three copies of one network: what should be, what is made, and what makes it ------------------------------------

opened = Opened(args.model)
teacher = opened.transformer.eval().requires_grad_(False)
critic = copy.deepcopy(teacher).train().requires_grad_(True)
student = copy.deepcopy(teacher).train().requires_grad_(True)
average = copy.deepcopy(teacher)  # of the student's weights: what is sampled with in the end
betas = (0.0, 0.999)
student_optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=betas, weight_decay=0.0)
critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=args.critic_lr, betas=betas, weight_decay=0.0)

encode = opened.encoder()
negative = encode([opened.negative_prompt])
world = get_world(opened.model.sidecar["world"])
size = opened.pipeline.defaults()
spatial, temporal = (
    opened.model.config("vae").get(f"scale_factor_{k}", d) for k, d in (("spatial", 8), ("temporal", 4))
)
assert size.height and size.width and size.num_frames
shape = (
    args.batch, opened.latent_channels(), (size.num_frames - 1) // temporal + 1,
    size.height // spatial, size.width // spatial,
)  # fmt: skip
generator = torch.Generator().manual_seed(0)
words = np.random.default_rng(0)

# -- flow matching: x_s = (1 - s) x0 + s n, and the network returns n - x0 --------------------------------------------


def shifted(s: Tensor) -> Tensor:
    return args.shift * s / (1 + (args.shift - 1) * s)


def velocity(network: nn.Module, x: Tensor, s: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    return network(x, 1000 * s, encoder_hidden_states=text[0], text_lengths=text[1]).float()


def draw() -> Tensor:
    return torch.randn(shape, generator=generator)


def wide(s: Tensor) -> Tensor:
    return s.view(-1, 1, 1, 1, 1)


few = shifted(torch.tensor([1.0, 0.75, 0.5, 0.25]))  # the student's four steps, whatever their prompts


def rollout(text: tuple[Tensor, Tensor]) -> Tensor:
    """A video by the student: the steps it is sampled with, up to one drawn at random, which alone has gradients."""
    last = int(torch.randint(len(few), (), generator=generator))
    x = draw()
    for step in range(last + 1):
        s = few[step].expand(len(x))
        with torch.set_grad_enabled(step == last and torch.is_grad_enabled()):
            x0 = x - wide(s) * velocity(student, x, s, text)
        if step == last:
            return x0
        x = (1 - few[step + 1]) * x0 + few[step + 1] * draw()
    raise AssertionError("there is a last step")


# -- the loop ---------------------------------------------------------------------------------------------------------

for step in range(args.steps):
    pairs = [world.sample(int(words.integers(2**31)), height=16, width=16, num_frames=1) for _ in range(args.batch)]
    told = encode([pair.spec.caption(words) for pair in pairs])
    text = (told.states, told.lengths)
    nothing = (negative.states.expand(len(text[0]), -1, -1), negative.lengths.expand(len(text[0])))

    # The critic learns to denoise what the student makes now.
    with torch.no_grad():
        x0 = rollout(text)
    s, noise = shifted(torch.rand(args.batch, generator=generator)).clamp(0.02, 0.98), draw()
    made = velocity(critic, (1 - wide(s)) * x0 + wide(s) * noise, s, text)
    critic_loss = (made - (noise - x0)).square().mean()
    critic_optimizer.zero_grad()
    critic_loss.backward()
    nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
    critic_optimizer.step()
    if step % args.student_every:
        continue

    # The student goes where the teacher finds its videos likelier than the critic does.
    x0 = rollout(text)
    s, noise = shifted(torch.rand(args.batch, generator=generator)).clamp(0.02, 0.98), draw()
    with torch.no_grad():
        x = (1 - wide(s)) * x0 + wide(s) * noise
        fake = x - wide(s) * velocity(critic, x, s, text)
        with_prompt, without = velocity(teacher, x, s, text), velocity(teacher, x, s, nothing)
        real = x - wide(s) * (without + args.guidance * (with_prompt - without))
        gradient = (fake - real) / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
    student_loss = 0.5 * (x0 - (x0 - gradient).detach()).square().mean()  # its derivative in x0 is the gradient
    student_optimizer.zero_grad()
    student_loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    student_optimizer.step()
    with torch.no_grad():
        for mine, theirs in zip(average.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs, 1 - args.ema)
    print(f"step {step}  critic {critic_loss.item():.4f}  gradient {gradient.abs().mean().item():.4f}", flush=True)

# -- the teacher's directory with the student's weights, and how to sample it -----------------------------------------

shutil.copytree(opened.model.path, args.output, ignore=shutil.ignore_patterns("*.png", "README.md"))
for file in (args.output / "transformer").glob("*.safetensors*"):
    file.unlink()
save_file(average.state_dict(), args.output / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
index = json.loads((args.output / "model_index.json").read_text())
(args.output / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}, indent=2))
sidecar = opened.model.sidecar
few_steps = {"dmd_denoising_steps": [1000, 750, 500, 250], "warp_denoising_step": True}
defaults = sidecar["defaults"] | {"num_inference_steps": 4, "guidance_scale": 1.0, "flow_shift": args.shift}
sidecar = sidecar | {"defaults": defaults | {"extra": few_steps}}
(args.output / "kinetoscope.json").write_text(json.dumps(sidecar, indent=2))

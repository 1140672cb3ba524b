"""Emoji on coloured backgrounds, still and moving: names, pictures, random augmentation, captions."""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

EMOJI = {
    "red apple": "1f34e",
    "banana": "1f34c",
    "strawberry": "1f353",
    "grapes": "1f347",
    "watermelon": "1f349",
    "cherries": "1f352",
    "orange fruit": "1f34a",
    "lemon": "1f34b",
    "pineapple": "1f34d",
    "avocado": "1f951",
    "carrot": "1f955",
    "pizza": "1f355",
    "hamburger": "1f354",
    "doughnut": "1f369",
    "fried egg": "1f373",
    "cookie": "1f36a",
    "cat face": "1f431",
    "dog face": "1f436",
    "frog face": "1f438",
    "panda face": "1f43c",
    "pig face": "1f437",
    "fox face": "1f98a",
    "penguin": "1f427",
    "octopus": "1f419",
    "whale": "1f433",
    "fish": "1f420",
    "butterfly": "1f98b",
    "ladybug": "1f41e",
    "sunflower": "1f33b",
    "rose": "1f339",
    "cactus": "1f335",
    "tree": "1f333",
    "mushroom": "1f344",
    "smiling face": "1f600",
    "sunglasses face": "1f60e",
    "crying face": "1f62d",
    "alien": "1f47d",
    "robot": "1f916",
    "ghost": "1f47b",
    "pumpkin": "1f383",
    "soccer ball": "26bd",
    "basketball": "1f3c0",
    "red car": "1f697",
    "rocket": "1f680",
    "sun": "2600-fe0f",
    "star": "2b50",
    "rainbow": "1f308",
    "red heart": "2764-fe0f",
}
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 220, 60),
    "green": (46, 160, 67),
    "teal": (20, 150, 150),
    "blue": (40, 90, 220),
    "purple": (120, 50, 170),
    "pink": (250, 150, 190),
    "brown": (120, 72, 40),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "white": (245, 245, 245),
}
# How far a clip goes from its middle to its end: right, down (half widths), angle to the left, ln of the size.
MOTIONS = {
    "moving left": (-0.3, 0, 0, 0),
    "moving right": (0.3, 0, 0, 0),
    "moving up": (0, -0.3, 0, 0),
    "moving down": (0, 0.3, 0, 0),
    "turning left": (0, 0, 0.8, 0),
    "turning right": (0, 0, -0.8, 0),
    "growing": (0, 0, 0, 0.3),
    "shrinking": (0, 0, 0, -0.3),
}
NAMES, SHADES = list(EMOJI), list(COLOURS)
FRAMES = 13


def vocabulary(pad, more=()):
    """Every word that a caption can hold, the pad word first; `more` adds words to those of the names."""
    words = sorted({word for name in NAMES for word in name.split()} | set(more))
    return [pad] + words + [mark + shade for mark in ("on:", "and:") for shade in SHADES]


def load_pictures(folder):
    """Emoji pictures [N,4,64,64] in 0..1, colours multiplied by alpha."""
    files = [os.path.join(folder, code + ".png") for code in EMOJI.values()]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGBA")) for file in files])
    rgba = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def uniform(generator, count, low, high):
    """Random numbers [count] between low and high."""
    return low + (high - low) * torch.rand(count, generator=generator)


def warp(pictures, angle, size, flip, x, y):
    """Pictures [B,C,64,64] mirrored where flip [B] is -1, turned left by an angle [B], enlarged to a
    size [B], and put at x, y [B] (half widths from the centre)."""
    cos, sin = angle.cos() / size, angle.sin() / size
    rows = torch.stack([cos * flip, -sin * flip, (sin * y - cos * x) * flip, sin, cos, -sin * x - cos * y], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), pictures.shape, align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)


def move(pictures, generator):
    """Pictures [B,C,64,64] flipped, turned, scaled and shifted a little at random."""
    n = len(pictures)
    angle = uniform(generator, n, -math.pi / 18, math.pi / 18)
    size = 1 / uniform(generator, n, 1.0, 1.25)
    flip = (torch.rand(n, generator=generator) < 0.5).float() * 2 - 1
    return warp(pictures, angle, size, flip, *(uniform(generator, n, -0.1, 0.1) for _ in range(2)))


def animate(pictures, motion, generator):
    """Pictures [B,C,64,64] as clips [B,FRAMES,C,64,64], each with its motion [B] (a number in MOTIONS)."""
    n, time = len(pictures), torch.linspace(-1, 1, FRAMES)
    right, down, left, growth = torch.tensor(list(MOTIONS.values())).float()[motion].T
    still = lambda middle, spread: uniform(generator, n, middle - spread, middle + spread)[:, None]
    along = lambda start, speed: (start + speed[:, None] * time).flatten()
    angle, size = along(still(0, 0.05), left), along(still(-0.35, 0.04), growth).exp()
    x, y = along(still(0, 0.04), right), along(still(0, 0.04), down)
    frames = warp(pictures.repeat_interleave(FRAMES, 0), angle, size, torch.ones_like(x), x, y)
    return frames.unflatten(0, (n, FRAMES))


def backgrounds(upper, lower):
    """Vertical gradients [B,3,64,64] between colours numbered upper [B] and lower [B]."""
    palette = torch.tensor(list(COLOURS.values())).float() / 255
    ramp = torch.linspace(0, 1, 64).view(1, 1, 64, 1)
    top, bottom = (palette[i].view(-1, 3, 1, 1) for i in (upper, lower))
    return (top + (bottom - top) * ramp).expand(-1, -1, -1, 64)


def caption(name, upper, lower):
    """The prompt of one picture, e.g. "red apple on blue and pink"."""
    second = "" if upper == lower else f" and {SHADES[lower]}"
    return f"{NAMES[name]} on {SHADES[upper]}{second}"


def set_moving(prompt, motion):
    """The prompt of a clip: that of a picture with a motion after the name."""
    return prompt.replace(" on ", f" {motion} on ", 1)


def shorten(prompt, draw):
    """The prompt, its name alone, or nothing, by a random number draw in 0..1."""
    if draw < 0.12:
        return ""
    return prompt.partition(" on ")[0] if draw < 0.18 else prompt


def describe(count, generator):
    """Random numbers of names, upper and lower colours, each [count]; 68 in 100 backgrounds are of one colour."""
    name = torch.randint(len(NAMES), (count,), generator=generator)
    upper = torch.randint(len(SHADES), (count,), generator=generator)
    other = torch.randint(len(SHADES), (count,), generator=generator)
    return name, upper, torch.where(torch.rand(count, generator=generator) < 0.6, upper, other)


def batch(emoji, count, generator):
    """Random pictures [count,3,64,64] and their prompts."""
    name, upper, lower = describe(count, generator)
    moved = move(emoji[name], generator)
    pictures = moved[:, :3] + (1 - moved[:, 3:]) * backgrounds(upper, lower)
    prompts = map(caption, name.tolist(), upper.tolist(), lower.tolist())
    draws = torch.rand(count, generator=generator).tolist()
    return pictures.clamp(0, 1), [shorten(p, d) for p, d in zip(prompts, draws)]


def clips(emoji, count, generator):
    """Random clips [count,FRAMES,3,64,64] and their prompts, e.g. "red apple moving left on blue"."""
    name, upper, lower = describe(count, generator)
    motion = torch.randint(len(MOTIONS), (count,), generator=generator)
    frames = animate(emoji[name], motion, generator)
    pictures = frames[:, :, :3] + (1 - frames[:, :, 3:]) * backgrounds(upper, lower)[:, None]
    prompts = map(caption, name.tolist(), upper.tolist(), lower.tolist())
    moving = [set_moving(p, list(MOTIONS)[m]) for p, m in zip(prompts, motion.tolist())]
    draws = torch.rand(count, generator=generator).tolist()
    return pictures.clamp(0, 1), [shorten(p, d) for p, d in zip(moving, draws)]

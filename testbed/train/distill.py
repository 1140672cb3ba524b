"""Distil a flow model into one that needs no guidance and few steps. No pictures: only prompts and the teacher.

The student walks its own path from noise. At each of its steps it learns the mean velocity of the
finer, guided steps that the teacher takes from there to the end of that step.
"""

import argparse
import csv
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import data
import fp8
import lora
import mmdit
import torch
import torch._dynamo
import training
import wan
from safetensors.torch import load_file, save_file
from torch import Tensor

PATHS, KEPT, REUSE, EMA, NULL_SHARE = 16, 6, 3, 0.005, 0.04
HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = os.path.join(HERE, "..", "models")


@dataclass(frozen=True)
class Family:
    """What is known of the networks of one kind."""

    module: ModuleType  # its build(), velocity() and SHIFT
    codec: str  # the model with the codec
    shape: tuple[int, ...]  # of one latent
    layers: str  # names of the layers that a LoRA changes


@dataclass(frozen=True)
class Student:
    """One model to distil."""

    family: Family
    teacher: str  # the model that it starts from and learns from
    steps: int  # that it will be sampled with
    parts: int  # steps of the teacher in one of its own
    cfg: float  # of the teacher
    rank: int = 0  # of the LoRA; 0: a whole model
    rate: float = 1e-3
    minutes: float = 10


MMDIT = Family(
    mmdit,
    "emoji_mmdit",
    (16, 16, 16),
    r"joint_blocks.*(attn\.(qkv|proj)|mlp\.fc\d|adaLN_modulation\.1)$",
)
WAN = Family(wan, "emoji_wan", (48, 4, 8, 8), r"^blocks.*(attn\.[qkvo]|ffn\.[02])$")
STUDENTS = {
    "emoji_mmdit_turbo8": Student(MMDIT, "emoji_mmdit", 8, 3, 4.5, rate=4e-4, minutes=23),
    "emoji_wan_guided": Student(WAN, "emoji_wan", 20, 1, 4.5, rank=16, rate=2e-3, minutes=11),
    "emoji_mmdit_turbo4": Student(MMDIT, "emoji_mmdit_turbo8", 4, 2, 1.0, rank=12, rate=2e-3, minutes=8),
    "emoji_wan_turbo8": Student(WAN, "emoji_wan", 8, 3, 4.5, rank=16, rate=2e-3, minutes=20),
}


@dataclass
class Lesson:
    """States on the student's path [n, ...] with the number of the step, the prompt and the velocity to learn."""

    x: Tensor
    step: Tensor
    tokens: Tensor
    target: Tensor


@dataclass
class School:
    """Teacher, student and what both need."""

    plan: Student
    teacher: torch.nn.Module
    student: torch.nn.Module
    codec: Any
    generator: torch.Generator
    sigmas: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sigmas = simple_sigmas(self.plan.steps, self.plan.family.module.SHIFT)

    def velocity(self, model: torch.nn.Module, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """What a network gives."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.plan.family.module.velocity(model, x, sigma, *self.codec.embed(tokens)).float()

    def guided(self, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """The teacher's velocity, guided."""
        if self.plan.cfg == 1:
            return self.velocity(self.teacher, x, sigma, tokens)
        both = torch.cat([tokens, self.codec.tokens([""]).expand_as(tokens)])
        cond, uncond = self.velocity(self.teacher, torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return uncond + self.plan.cfg * (cond - uncond)

    def follow(self, x: Tensor, step: int, tokens: Tensor) -> Tensor:
        """The mean velocity of the teacher from x over one of the student's steps."""
        ends = between(self.sigmas[step], self.sigmas[step + 1], self.plan.parts, self.plan.family.module.SHIFT)
        at = x
        for start, end in itertools.pairwise(ends):
            at = at + (end - start) * self.guided(at, start.expand(len(x)), tokens)
        return (at - x) / (ends[-1] - ends[0])

    @torch.no_grad()
    def walk(self, count: int) -> Lesson:
        """The lessons along new paths of the student."""
        tokens = self.codec.tokens(prompts(self.plan.family.codec, count, self.generator))
        x = torch.randn(count, *self.plan.family.shape, generator=self.generator)
        states, targets = [], []
        for step in range(self.plan.steps):
            states.append(x)
            targets.append(self.follow(x, step, tokens))
            move = self.sigmas[step + 1] - self.sigmas[step]
            x = x + move * self.velocity(self.student, x, self.sigmas[step].expand(count), tokens)
        steps = torch.arange(self.plan.steps).repeat_interleave(count)
        return Lesson(torch.cat(states), steps, tokens.repeat(self.plan.steps, 1), torch.cat(targets))

    def loss(self, lesson: Lesson, rows: Tensor) -> Tensor:
        """Squared error of the velocity, weighted by the length of the step, which it will be multiplied with."""
        step = lesson.step[rows]
        found = self.velocity(self.student, lesson.x[rows], self.sigmas[step], lesson.tokens[rows])
        lengths = self.sigmas[:-1] - self.sigmas[1:]
        error = (found - lesson.target[rows]).square().flatten(1).mean(1)
        return (error * lengths[step] / lengths.mean()).mean()


def simple_sigmas(steps: int, shift: float) -> Tensor:
    """The host's `simple` schedule of a flow model."""
    times = torch.tensor([(1000 - int(i * 1000 / steps)) / 1000 for i in range(steps)] + [0.0])
    return shift * times / (1 + (shift - 1) * times)


def between(start: Tensor, end: Tensor, parts: int, shift: float) -> Tensor:
    """Sigmas from start to end, spaced as the schedule spaces them, [parts + 1]."""
    first, last = (s / (shift - (shift - 1) * s) for s in (start, end))
    times = first + (last - first) * torch.arange(parts + 1) / parts
    return shift * times / (1 + (shift - 1) * times)


def prompts(codec: str, count: int, generator: torch.Generator) -> list[str]:
    """Random prompts as the teacher knows them, a few of them empty."""
    captions = list(map(data.caption, *(numbers.tolist() for numbers in data.describe(count, generator))))
    if codec == "emoji_wan":
        motions = torch.randint(len(data.MOTIONS), (count,), generator=generator).tolist()
        captions = [data.set_moving(c, list(data.MOTIONS)[m]) for c, m in zip(captions, motions)]
    draws = torch.rand(count, generator=generator).tolist()
    return ["" if draw < NULL_SHARE else c for c, draw in zip(captions, draws)]


def lessons(school: School, batch: int) -> Iterator[Tensor]:
    """Losses without end: new paths, then batches of the lessons of the last KEPT times."""
    kept: list[Lesson] = []
    while True:
        kept = [*kept, school.walk(PATHS)][-KEPT:]
        pool = Lesson(*(torch.cat([getattr(k, name) for k in kept]) for name in ("x", "step", "tokens", "target")))
        for _ in range(REUSE * PATHS * school.plan.steps // batch):
            yield school.loss(pool, torch.randint(len(pool.x), (batch,), generator=school.generator))


def learn(school: School, weights: list[Tensor], args: argparse.Namespace, keep: Callable) -> None:
    """Descend until the time is up, keeping averaged weights and the losses."""
    optimizer = torch.optim.AdamW(weights, args.rate, (0.9, 0.98), weight_decay=0.0, fused=True)
    start, kept, rows = time.time(), time.time(), []
    ema = [w.detach().clone() for w in weights]
    for loss in lessons(school, args.batch):
        fraction = (time.time() - start) / 60 / args.minutes
        optimizer.param_groups[0]["lr"] = training.rate_at(fraction, args.rate)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema, [w.detach() for w in weights], max(EMA, 1 / (len(rows) + 1)))
        rows.append((len(rows) + 1, time.time() - start, loss.item()))
        if time.time() > kept + training.KEEP_SECONDS or fraction >= 1:
            keep(ema, rows)
            kept = time.time()
        if fraction >= 1:
            return


def write(args: argparse.Namespace, pack: Callable, ema: list[Tensor], rows: list[tuple]) -> None:
    """Write checkpoint and loss log, and print the mean of the last losses."""
    os.makedirs(args.out, exist_ok=True)
    save_file(pack(ema), os.path.join(args.out, f"{args.name}.safetensors"))
    means = [(*rows[i + 19][:2], sum(row[2] for row in rows[i : i + 20]) / 20) for i in range(0, len(rows) - 19, 20)]
    with open(os.path.join(args.out, "loss.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["updates", "seconds", "loss"])
        writer.writerows([update, f"{seconds:.0f}", f"{loss:.4f}"] for update, seconds, loss in means)
    recent = [row[2] for row in rows[-200:]]
    print(f"{rows[-1][0]} updates, {rows[-1][1]:.0f} s, loss {sum(recent) / len(recent):.4f}", flush=True)


def network(family: Family, name: str) -> torch.nn.Module:
    """A network with the weights of a model."""
    model = family.module.build()
    model.load_state_dict(fp8.widen(load_file(os.path.join(MODELS, name, f"{name}.safetensors"))))
    return model.requires_grad_(False)


def trained(plan: Student, student: torch.nn.Module) -> tuple[list[Tensor], Callable]:
    """The weights to train, and what makes the tensors of a file out of them."""
    if plan.rank:
        named = lora.insert(student, plan.family.layers, plan.rank)
        return list(named.values()), lambda ema: {key: w.half().contiguous() for key, w in zip(named, ema)}
    linear = {name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)}
    names = [name for name, _ in student.requires_grad_().named_parameters()]
    return list(student.parameters()), lambda ema: fp8.squeeze(dict(zip(names, ema)), linear)


def options(name: str) -> argparse.Namespace:
    """Command line options."""
    plan, parser = STUDENTS[name], argparse.ArgumentParser(description=f"Distil {name} for a fixed time on one core.")
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="ComfyUI folder")
    parser.add_argument("--out", default=os.path.join(MODELS, name))
    parser.add_argument("--minutes", type=float, default=plan.minutes)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=plan.rate)
    parser.add_argument(
        "--compile", action="store_true", help="for long runs: minutes to begin with, then 1.6 times as fast"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(namespace=argparse.Namespace(name=name))


def main(name: str) -> None:
    """Distil a student as the command line says."""
    args, plan = options(name), STUDENTS[name]
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch._dynamo.config.suppress_errors = True  # without a C++ compiler: eager
    training.use_host(args.comfyui)
    teacher, student = network(plan.family, plan.teacher), network(plan.family, plan.teacher)
    weights, pack = trained(plan, student)
    codec = training.emoji.load_codec(plan.family.codec)
    generator = torch.Generator().manual_seed(args.seed + 1)
    quick = torch.compile if args.compile else lambda model: model
    school = School(plan, quick(teacher), quick(student), codec, generator)
    learn(school, weights, args, partial(write, args, pack))

"""What every model of the test bed shares in training: processes, loop, rate, averages, files, picture codes."""

import argparse
import csv
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "nodes"))
import data  # noqa: E402
import emoji  # noqa: E402

SYNC, EMA, KEEP_SECONDS, RECENT = 8, 0.03, 60, 25
WIDTH = 128  # numbers a word


@dataclass(frozen=True)
class Recipe:
    """What one model does differently.

    build() gives a fresh model, once the host can be imported; batch(pictures, count, generator) gives
    pictures [count, ...] and their prompts; loss(model, codec, pictures, prompts, generator) a scalar.
    """

    name: str
    build: Callable
    loss: Callable
    batch: Callable
    vocabulary: Callable = data.vocabulary  # vocabulary(pad): the words of captions
    codec: type = emoji.Codec
    channels: int = 16  # of the latents
    load: Callable = data.load_pictures  # load(folder): what batch gets


def options(name):
    """Command line options."""
    parser = argparse.ArgumentParser(description=f"Train {name} for a fixed time on a few CPU processes.")
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="ComfyUI folder")
    parser.add_argument("--emoji", "--pictures", dest="pictures", required=True, help="folder of the pictures")
    parser.add_argument("--out", default=os.path.join(HERE, "..", "models", name))
    parser.add_argument("--resume", help="folder of an earlier run to start from")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def use_host(folder):
    """Make the host's modules importable, with plain PyTorch attention."""
    sys.path.insert(0, folder)
    sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()


def linear_code(rows, channels):
    """Mean [N], encoder [N,C], decoder [C,N] of rows [M,N]: principal components, half whitened, unit variance."""
    mean = rows.mean(0)
    values, basis = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, basis = values[-channels:].flip(0), basis[:, -channels:].flip(1)
    scale = values**-0.25
    scale = scale / (values * scale**2).mean().sqrt()
    return mean, basis * scale, (basis / scale).T.contiguous()


def new_codec(recipe, pictures, seed):
    """A codec with a random table and the linear code of augmented pictures."""
    sample, _ = recipe.batch(pictures, 2048, torch.Generator().manual_seed(seed))
    cells = recipe.codec.cut(sample)
    words = recipe.vocabulary(emoji.PAD)
    code = linear_code(cells.reshape(-1, cells.shape[-1]), recipe.channels)
    return recipe.codec(words, torch.randn(len(words), WIDTH), *code)


def flow_loss(model, codec, pictures, prompts, generator, shift):
    """Mean squared error of the predicted velocity, sigmas drawn as the sampler spaces them.

    model(x, sigma, context, pooled) gives the velocity.
    """
    x0 = codec.encode(pictures)
    u = torch.sigmoid(1.2 * torch.randn(len(x0), generator=generator))
    sigma = shift * u / (1 + (shift - 1) * u)
    noise = torch.randn(x0.shape, generator=generator)
    s = sigma.view(-1, *[1] * (x0.ndim - 1))
    with torch.autocast("cpu", torch.bfloat16):
        v = model((1 - s) * x0 + s * noise, sigma, *codec.embed(codec.tokens(prompts)))
    return (v.float() - (noise - x0)).square().mean()


def rate_at(fraction, peak):
    """Learning rate: short warm-up, level, then a cosine fall to zero at the deadline."""
    warm, fall = min(1.0, fraction / 0.02), max(0.0, (fraction - 0.3) / 0.7)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))


def average(weights):
    """Replace the weights by their mean over all processes."""
    flat = torch.cat([w.detach().view(-1) for w in weights])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for weight, part in zip(weights, flat.split([w.numel() for w in weights])):
        weight.data.copy_(part.view_as(weight))


def files(folder, name, codec):
    """Paths of the network's weights and of the codec."""
    return os.path.join(folder, f"{name}.safetensors"), os.path.join(folder, codec.file)


def save(out, name, names, ema, codec):
    """Write the averaged weights: fp16 model and codec."""
    os.makedirs(out, exist_ok=True)
    weights, text = files(out, name, codec)
    save_file({key: w.half().contiguous() for key, w in zip(names, ema)}, weights)
    type(codec)(list(codec.index), ema[-1], codec.mean, codec.encoder, codec.decoder).save(text)


def load(folder, recipe, model):
    """Give the model its weights of an earlier run; returns that run's codec."""
    weights, text = files(folder, recipe.name, recipe.codec)
    with safe_open(weights, "pt") as file:
        model.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118 (not a mapping)
    return recipe.codec.load(text)


def descend(args, recipe, model, codec, pictures, optimizer, generator):
    """SYNC optimizer steps; returns their mean loss."""
    total = 0.0
    for _ in range(SYNC):
        loss = recipe.loss(model, codec, *recipe.batch(pictures, args.batch, generator), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item() / SYNC
    return total


def loop(rank, args, step, weights, optimizer, keep):
    """Descend until the time is up; process 0 averages the weights over time and keeps them."""
    start, clock, rounds, rows, kept = time.time(), torch.zeros(1), 0, [], 0.0
    ema = [w.detach().clone() for w in weights]
    while clock < 1:
        optimizer.param_groups[0]["lr"] = rate_at(clock.item(), args.rate)
        loss, rounds = step(), rounds + 1
        average(weights)
        seconds = time.time() - start
        clock.fill_(seconds / 60 / args.minutes)
        dist.broadcast(clock, 0)
        torch._foreach_lerp_(ema, [w.detach() for w in weights], EMA)
        rows.append([rounds * SYNC * args.batch * args.workers, seconds, loss])
        if rank == 0 and (seconds > kept + KEEP_SECONDS or clock >= 1):
            keep(ema, rows)
            kept = seconds


def keep_files(args, name, names, codec, ema, rows):
    """Write checkpoint and loss log, and print the mean of the last losses."""
    save(args.out, name, names, ema, codec)
    with open(os.path.join(args.out, "loss.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pictures", "seconds", "loss"])
        writer.writerows([pictures, f"{seconds:.0f}", f"{loss:.4f}"] for pictures, seconds, loss in rows)
    recent = [row[2] for row in rows[-RECENT:]]
    print(f"{rows[-1][0]} pictures, {rows[-1][1]:.0f} s, loss {sum(recent) / len(recent):.4f}", flush=True)


def train(rank, recipe, args, store):
    """One process: train on its own batches, average the weights every SYNC steps."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch._dynamo.config.suppress_errors = True  # without a C++ compiler: eager
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.workers)
    use_host(args.comfyui)
    pictures = recipe.load(args.pictures)
    model, codec = recipe.build(), new_codec(recipe, pictures, args.seed)
    if args.resume:
        codec = load(args.resume, recipe, model)
    codec.table.requires_grad_()
    names = [name for name, _ in model.named_parameters()]
    weights = [*model.parameters(), codec.table]
    optimizer = torch.optim.AdamW(weights, args.rate, (0.9, 0.98), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(args.seed * 1000 + rank + 1)
    step = partial(descend, args, recipe, torch.compile(model), codec, pictures, optimizer, generator)
    loop(rank, args, step, weights, optimizer, partial(keep_files, args, recipe.name, names, codec))


def main(recipe):
    """Train a recipe as the command line says."""
    args = options(recipe.name)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (recipe, args, f"file://{folder}/store"), nprocs=args.workers)

"""Train the small SD3 MMDiT on emoji for a fixed time on a few CPU processes."""
import argparse
import csv
import math
import os
import sys
import tempfile
import time
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

DEPTH, CHANNELS, SIDE, WIDTH, SHIFT = 4, 16, 16, 128, 3.0
SYNC, EMA = 8, 0.03


def options():
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", required=True, help="ComfyUI folder")
    parser.add_argument("--emoji", required=True, help="folder of 64 px emoji pictures")
    parser.add_argument("--out", default=os.path.join(HERE, "..", "models", "emoji_mmdit"))
    parser.add_argument("--resume", help="checkpoint to start from")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def host_class(folder):
    """The host's MMDiT class with plain PyTorch attention."""
    sys.path.insert(0, folder)
    sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options
    comfy.options.enable_args_parsing()
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    return OpenAISignatureMMDITWrapper


def positions(side, width):
    """Sine and cosine position table [1,side*side,width]."""
    steps = torch.arange(side).float()[:, None] * math.pi / side
    waves = steps * torch.arange(1, width // 4 + 1) ** 0.5
    line = torch.cat([waves.sin(), waves.cos()], 1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], 2).reshape(1, side * side, width)


def build(host):
    """A fresh model; every block starts as the identity and the output as zero."""
    hidden = 64 * DEPTH
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": hidden}}
    model = host(input_size=None, patch_size=2, in_channels=CHANNELS, depth=DEPTH,
                 num_patches=(SIDE // 2) ** 2, pos_embed_max_size=SIDE // 2, qk_norm="rms",
                 adm_in_channels=WIDTH, context_embedder_config=embedder, operations=torch.nn)
    for name, weight in model.named_parameters():
        if "adaLN" in name or name.startswith("final_layer"):
            torch.nn.init.zeros_(weight)
        if name.endswith(("ln_q.weight", "ln_k.weight")):
            torch.nn.init.ones_(weight)
    table = positions(SIDE // 2, hidden)
    del model.pos_embed
    model.pos_embed = torch.nn.Parameter(table)
    return model


def picture_code(pictures):
    """Mean [48], encoder [48,16] and decoder [16,48]: principal components, half whitened."""
    rows = emoji.blocks(pictures).reshape(-1, 48)
    mean = rows.mean(0)
    values, basis = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, basis = values[-CHANNELS:].flip(0), basis[:, -CHANNELS:].flip(1)
    scale = values ** -0.25
    scale = scale / (values * scale ** 2).mean().sqrt()
    return mean, basis * scale, (basis / scale).T.contiguous()


def new_codec(pictures, seed):
    """A codec with a random table and the picture code of augmented pictures."""
    sample, _ = data.batch(pictures, 2048, torch.Generator().manual_seed(seed))
    words = data.vocabulary(emoji.PAD)
    return emoji.Codec(words, torch.randn(len(words), WIDTH), *picture_code(sample))


def flow_loss(model, codec, pictures, prompts, generator):
    """Mean squared error of the predicted velocity, sigmas drawn as the sampler spaces them."""
    x0 = codec.encode(pictures)
    u = torch.sigmoid(1.2 * torch.randn(len(x0), generator=generator))
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn(x0.shape, generator=generator)
    s = sigma.view(-1, 1, 1, 1)
    context, pooled = codec.embed(codec.tokens(prompts))
    with torch.autocast("cpu", torch.bfloat16):
        v = model((1 - s) * x0 + s * noise, sigma * 1000, context=context, y=pooled)
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


def save(out, names, ema, codec):
    """Write the averaged weights: fp16 model and codec."""
    os.makedirs(out, exist_ok=True)
    model = {name: w.half().contiguous() for name, w in zip(names, ema)}
    save_file(model, os.path.join(out, "emoji_mmdit.safetensors"))
    text = emoji.Codec(list(codec.index), ema[-1], codec.mean, codec.encoder, codec.decoder)
    text.save(os.path.join(out, "emoji_text.safetensors"))


def load(folder, model, codec):
    """Take model and codec weights from an earlier run."""
    with safe_open(os.path.join(folder, "emoji_mmdit.safetensors"), "pt") as file:
        model.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})
    return emoji.Codec.load(os.path.join(folder, "emoji_text.safetensors"))


def descend(args, model, codec, pictures, optimizer, generator):
    """SYNC optimizer steps; returns their mean loss."""
    total = 0.0
    for _ in range(SYNC):
        sample, prompts = data.batch(pictures, args.batch, generator)
        loss = flow_loss(model, codec, sample, prompts, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item() / SYNC
    return total


def loop(rank, args, step, weights, optimizer, keep):
    """Descend until the time is up; process 0 averages the weights over time and keeps them."""
    start, clock, rounds, rows = time.time(), torch.zeros(1), 0, []
    ema = [w.detach().clone() for w in weights]
    while clock < 1:
        optimizer.param_groups[0]["lr"] = rate_at(clock.item(), args.rate)
        loss, rounds = step(), rounds + 1
        average(weights)
        clock.fill_((time.time() - start) / 60 / args.minutes)
        dist.broadcast(clock, 0)
        torch._foreach_lerp_(ema, [w.detach() for w in weights], EMA)
        rows.append([rounds * SYNC * args.batch * args.workers, time.time() - start, loss])
        if rank == 0 and (rounds % 25 == 0 or clock >= 1):
            keep(ema, rows)


def keep_files(args, names, codec, ema, rows):
    """Write checkpoint and loss log, and print the mean of the last losses."""
    save(args.out, names, ema, codec)
    with open(os.path.join(args.out, "loss.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pictures", "seconds", "loss"])
        writer.writerows([pictures, f"{seconds:.0f}", f"{loss:.4f}"] for pictures, seconds, loss in rows)
    recent = [row[2] for row in rows[-25:]]
    print(f"{rows[-1][0]} pictures, {rows[-1][1]:.0f} s, loss {sum(recent) / len(recent):.4f}", flush=True)


def train(rank, args, store):
    """One process: train on its own batches, average the weights every SYNC steps."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch._dynamo.config.suppress_errors = True  # without a C++ compiler: eager
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.workers)
    pictures = data.load_pictures(args.emoji)
    model, codec = build(host_class(args.comfyui)), new_codec(pictures, args.seed)
    if args.resume:
        codec = load(args.resume, model, codec)
    codec.table.requires_grad_()
    names = [name for name, _ in model.named_parameters()]
    weights = list(model.parameters()) + [codec.table]
    optimizer = torch.optim.AdamW(weights, args.rate, (0.9, 0.98), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(args.seed * 1000 + rank + 1)
    step = partial(descend, args, torch.compile(model), codec, pictures, optimizer, generator)
    loop(rank, args, step, weights, optimizer, partial(keep_files, args, names, codec))


if __name__ == "__main__":
    arguments = options()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (arguments, f"file://{folder}/store"), nprocs=arguments.workers)

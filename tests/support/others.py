"""Small stand-ins for what other packs do on the same model: caches, windows, tiles, guiders."""

from unittest.mock import patch

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP


class Memory:
    """Answers from memory at every second call for what is asked, from the fourth on."""

    def __init__(self):
        self.kept, self.calls, self.answers = {}, {}, 0

    def __call__(self, key, run):
        calls = self.calls[key] = self.calls.get(key, 0) + 1
        if calls > 4 and calls % 2 and key in self.kept:
            self.answers += 1
            return self.kept[key].clone()
        self.kept[key] = run().clone()
        return self.kept[key].clone()


def in_function_wrapper(model, memory):
    """As those that put themselves around the host's call of the network."""

    def answer(function, args):
        shape = args["input"].shape
        return memory(tuple(shape), lambda: function(args["input"], args["timestep"], **args["c"]))

    model.set_model_unet_function_wrapper(answer)


def around(kind):
    def install(model, memory):
        def answer(executor, *args, **kwargs):
            return memory(tuple(args[0].shape), lambda: executor(*args, **kwargs))

        model.add_wrapper_with_key(kind, "other", answer)

    return install


def around_branches(model, memory):
    """As those that skip all branches of an evaluation."""

    def answer(executor, *args):
        return [*memory(len(args[1]), lambda: torch.stack(executor(*args)))]

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "other", answer)


def instead_of_blocks(model, memory):
    """As those that run a network of their own, without its blocks when they have an answer."""

    def answer(executor, *args, **kwargs):
        network = executor.class_obj.diffusion_model
        with patch.object(network, "forward", forward_of(network, memory)):
            return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", answer)


def forward_of(network, memory):
    original = network.forward

    def forward(x, *args, **kwargs):
        network.x_embedder(x) if hasattr(network, "x_embedder") else None  # what they always run
        return memory(tuple(x.shape), lambda: original(x, *args, **kwargs))

    return forward


def instead_of_the_list_of_blocks(model, memory):
    """As those that put one block in place of all, for each call, that runs the first and answers for the others."""

    def answer(function, args):
        network = model.model.diffusion_model
        with patch.dict(network._modules, {"joint_blocks": torch.nn.ModuleList([First(network.joint_blocks, memory)])}):
            return function(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(answer)


class First(torch.nn.Module):
    """Runs the first of some blocks of SD3, and the others where memory has no answer."""

    def __init__(self, blocks, memory):
        super().__init__()
        self.blocks, self.memory = blocks, memory

    def forward(self, context, x, **kwargs):
        first, *others = self.blocks
        context, start = first(context, x, **kwargs)

        def rest():
            now, x = context, start
            for block in others:
                now, x = block(now, x, **kwargs)
            return x - start

        return None, start + self.memory(tuple(x.shape), rest)


CACHES = {
    "function wrapper": in_function_wrapper,
    "APPLY_MODEL": around(WrappersMP.APPLY_MODEL),
    "DIFFUSION_MODEL": around(WrappersMP.DIFFUSION_MODEL),
    "PREDICT_NOISE": around(WrappersMP.PREDICT_NOISE),
    "branches": around_branches,
    "blocks": instead_of_blocks,
    "list of blocks": instead_of_the_list_of_blocks,
}
FAMILY = {"DIFFUSION_MODEL": "flux"}


def in_windows(told, moving=False, dim=2):
    """A node that samples three frames at a time, as AnimateDiff-Evolved does: it tells which in a field of its own.

    told: "its own", or "nowhere"; moving: they are others at every step.
    """

    def install(model):
        model = model.clone()
        at = [0]

        def branches(args):
            x, options = args["input"], args["model_options"]
            shift = at[0] % 2 if moving else 0
            at[0] += 1
            outputs = [torch.zeros_like(x) for _ in args["conds"]]
            counts = torch.zeros([n if i == dim else 1 for i, n in enumerate(x.shape)])
            for start in range(-shift, x.shape[dim], 3):
                frames = [i for i in range(start, start + 3) if 0 <= i < x.shape[dim]]
                options["transformer_options"]["ad_params"] = {"sub_idxs": frames if told == "its own" else None}
                part = x.index_select(dim, torch.tensor(frames))
                sigma = args["sigma"][frames] if dim == 0 else args["sigma"]
                made = comfy.samplers.calc_cond_batch(args["model"], args["conds"], part, sigma, options)
                for output, new in zip(outputs, made):
                    output.index_add_(dim, torch.tensor(frames), new)
                counts.index_add_(
                    dim, torch.tensor(frames), torch.ones_like(counts.index_select(dim, torch.tensor(frames)))
                )
            return [output / counts for output in outputs]

        model.model_options["sampler_calc_cond_batch_function"] = branches
        return model

    return install


def in_tiles(model, moving):
    """A node around the host's call of the network that runs it for each half of the latent by itself.

    moving: the latent is rolled before by other amounts at every step, as SpotDiffusion does.
    """
    model, at = model.clone(), [0]

    def tiled(function, args):
        at[0] += 1
        shift = (5 * at[0]) % 13 if moving else 0
        x = args["input"].roll(shift, -1)
        halves = [function(half.contiguous(), args["timestep"], **args["c"]) for half in x.chunk(2, -1)]
        return torch.cat(halves, -1).roll(-shift, -1)

    model.set_model_unet_function_wrapper(tiled)
    return model


class Scheduled(comfy.samplers.CFGGuider):
    """Has no scale to be read: makes one up itself at every step, from 12 down to 1."""

    def __init__(self, model):
        super().__init__(model)
        del self.cfg

    def scale(self, sigma):
        return 1 + 11 * sigma

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        conds = [self.conds["positive"], self.conds["negative"]]
        cond, uncond = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return uncond + (cond - uncond) * self.scale(float(timestep[0]))


class Named(comfy.samplers.CFGGuider):
    """Calls its conditionings something else, and lists the negative one first."""

    def set_conds(self, positive, negative):
        self.inner_set_conds({"xt_positive": positive, "xt_negative": negative})

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        conds = [self.conds["xt_negative"], self.conds["xt_positive"]]
        uncond, cond = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return uncond + (cond - uncond) * 4.5

"""The methods of FasterCache and FRDiff, and the engine that runs them: tensors and small dataclasses, no ComfyUI.

engine        one evaluation of one region: decide, act, observe, correct
protocols     what the engine asks of its parts: Pass, Network, Controller, Observer, and what it hands to them
settings      what a patched model does: its controller, and how signals and features are carried forward
controllers   what decides what an evaluation does: at intervals, under an error budget, or as planned beforehand
clock         where a run is: evaluations, sigmas, windows
actions       what an evaluation does for a branch
signal        one quantity that is predicted: its forecaster, and the local error of its last forecast
forecast      how a quantity is carried forward in sigma
bands         the low and high spatial frequencies of a tensor
published     settings of the papers' code, by the name of their model
paper_weights  the band weights of CFG-Cache
solvers       facts about samplers: calls, order, noise, steps
walk          whether a latent moves as a solver moves it
guidance      how far the guided result moves with the branches it is made of, measured
corrector     correcting what forecasts got wrong once the next evaluation is computed
readback      small results of the device, for the host to decide by
features      parts of the network from the cache, within a memory budget
calibration   the best policy for the user's own model
report        what a run did, as JSON, as a line and as text
messages      every sentence that a user reads in a report
metrics       PSNR and SSIM
law           from the errors of a run to the PSNR of its picture, and what pictures of one model teach
"""

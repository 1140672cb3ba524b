"""The arithmetic of FasterCache and FRDiff: plain tensors and small dataclasses, no ComfyUI.

clock     where a run is: evaluations, sigmas, windows
schedule  which action each evaluation takes
forecast  how a cached quantity is carried forward in sigma
bands     the low and high spatial frequencies of a tensor
guidance  CFG-Cache: the unconditional output from the conditional one
reuse     dynamic feature reuse: attention outputs from the cache
jump      whole evaluations forecast from earlier ones
measured  forecasts whose terms have gains measured during the run
gate      when skipping may begin, by what the forecasts were worth
mixing    FRDiff: held scores, reused features, and the mix of both
policy    what every evaluation does, as data and as a file
calibration  what skipping costs, from full runs of the user's own model
search    the best policy for every budget, by exact dynamic programming
autofr    the same by gradient descent, FRDiff's Auto-FR
settings  the methods of one run together
memory    cached features, per branch and per site, within a budget
storage   in which dtype and on which device they are kept
report    what a run did, as JSON, as a line and as text
metrics   PSNR and SSIM
"""

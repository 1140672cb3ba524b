"""Everything that knows ComfyUI's internals.

attach        puts settings and wrappers on a clone of a MODEL
run           one sampling run: its evaluations, features and report
scope         the branches of one latent region: which run, how the others are filled in
refusals      what cannot work with what, and the reason
announce      tells the web page what a run skipped
branches      which conditioning is which, and when it changes
output_space  between the host's denoised space and the network's output space
samplers      facts about the host's samplers
attention     attention modules of each model family, and how they are swapped
"""

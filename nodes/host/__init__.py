"""Everything that knows ComfyUI's internals, and nothing of the methods.

wrappers        puts settings on a clone of a MODEL; the host's calls, with their arguments by name
run             one sampling run: an engine for every region, and the report
network         the host's network, as the engine runs it
network_watch   whether the network itself answers, or a cache of another node
model_call      the host's calls as data
conditioning    which conditioning is which, and when it changes
prediction      between the host's denoised latents and the network's output space
compatibility   what cannot work with what, and the reason
compiler        the host's own compiler and CUDA graphs, off where reused features change what they recorded
policy_checks   whether a policy or FRDiff's mixing serves a run
calibrate       full runs that are recorded, and runs that fit a policy's weights
feature_pass    one pass of the network with features from the cache
feature_plan    which features have room in memory, decided before the first pass where possible
room            how much memory the host leaves for features
feature_hooks   the places of a network whose outputs are features, and how they are swapped
attention_hook  the same for a network of no known family
families        where each model family keeps what can be reused
structure       the same for a network of no known family, found by watching one pass
dry_run         a pass without values, to see the shapes of features
fingerprint     which model this is, and which size of picture
found           policies that Auto-FR found, kept in a file for each model, sampler and steps
learning        what the errors of a run mean on the user's own model, kept in a file
user_files      small files in the user's own folders
reports         where a run's report goes; many short runs of one picture are told together
announce        tells the web page what a run skipped
"""

"""Feature reuse: parts of the network from the cache.

reuse    which kinds of features may be reused, and how they are carried forward in sigma
memory   the last outputs of every site for every branch, within a memory budget
storage  features at rest: dtype, device, copies beside the computation
gains    gains of the forecast of every feature, fitted together
probe    the error of reused features, measured now and then
"""

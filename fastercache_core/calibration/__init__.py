"""Policies: what every evaluation does, found by calibration on the user's own model.

losses       the local errors of every way to skip evaluations, from one recorded full run
search       the best policy for every budget, by exact dynamic programming
gradient     the same by gradient descent, FRDiff's Auto-FR
policy       a policy as data, and on other sigmas
policy_file  a policy as JSON
learnt_file  what pictures of a model showed about its errors, as JSON
"""

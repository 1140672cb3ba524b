"""What decides what an evaluation does: exactly one controller in a run.

interval  every second, third ... evaluation is computed, if forecasts are good enough (the papers' way)
adaptive  gaps between computed evaluations follow from an error budget
together  one of the others beside CFG-Cache of another node
planned   laid down beforehand: FRDiff's keyframes and score mixing, or a policy found by calibration
"""
